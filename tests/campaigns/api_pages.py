r"""The pages of the Python faces, as HTML, by pdoc.

    python -m tests.campaigns.api_pages --output_dir=site    # then open site/index.html

Needs the extra `docs`. A warning of pdoc (a name without an object, a type that is not found) ends
it with exit code 1.
"""

import argparse
import importlib
import sys
import typing
import warnings
from pathlib import Path

FACES = (
    *("data_prep", "ctssl_jax"),
    *(f"ctssl_jax.{wing}" for wing in "training evaluation inference probes release".split()),
    *("ctssl_jax.inference.pretrained", "ctssl_jax.torch_bridge.ctssl_torch"),
)


def import_names(face: str) -> None:
    """Make pdoc see all: a face imports a name at its first use, and the types of the fields of a
    named tuple may be texts."""
    module = importlib.import_module(face)
    for name in getattr(module, "__all__", ()):
        setattr(module, name, getattr(module, name))
    for value in vars(module).values():
        if isinstance(value, type) and hasattr(value, "_fields"):
            value.__new__.__annotations__ = typing.get_type_hints(value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    output_dir = parser.parse_args().output_dir

    import pdoc

    for face in FACES:
        import_names(face)
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pdoc.pdoc(*FACES, output_directory=output_dir)
    for warning in said:
        print(f"WARNING {warning.message}", file=sys.stderr)
    print(f"{len(FACES)} pages in {output_dir}")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
