"""What can be read out of a frozen encoder without training a network.

from ctssl_jax.probes import attributes, probe

result = probe("RUN", "DATASET", "PROBE.json")
result = attributes("RUN", "DATASET", "ATTRIBUTES.json", names=["sex", "age"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.probes.attribute_probe import attributes
    from ctssl_jax.probes.probing import probe

__all__ = ["attributes", "probe"]


def __getattr__(name: str) -> Any:
    if name == "attributes":  # when it is first used: JAX takes seconds to import
        from ctssl_jax.probes.attribute_probe import attributes

        return attributes
    if name == "probe":
        from ctssl_jax.probes.probing import probe

        return probe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
