"""The processes of a run: what JAX must know before it is first used."""

import os
from importlib.metadata import version

import jax


def configure_jax() -> None:
    """Settings of every command line: faster convolutions on CPU, and compiled programs kept
    between runs.

    Must run before JAX is first used. jaxlib 0.10 and 0.11 send the weight gradients of
    convolutions on CPU to a library that uses one core for them; the flag turns that off (a
    training step takes two thirds of the time on two cores, four fifths with 0.11). Other versions
    of jaxlib end at flags that they do not know, so they get none.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    if version("jaxlib").startswith(("0.10.", "0.11.")) and flag not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=".strip()
    _use_compilation_cache()


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs (in `$JAX_COMPILATION_CACHE_DIR`, else in the user's
    cache folder)."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "ctssl_jax", "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
