"""Models that leave the building and come back: folders for PyTorch users, and imported weights.

from ctssl_jax.release import export, import_weights

manifest = export("RUN", "FOLDER", ["torch", "safetensors"], "CC-BY-NC-4.0")
number_of_tensors = import_weights("FOLDER", "NEW_RUN", None, [])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.release.exporting import export
    from ctssl_jax.release.importing import import_weights

__all__ = ["export", "import_weights"]


def __getattr__(name: str) -> Any:
    if name == "export":  # when it is first used: PyTorch takes seconds to import, and may be absent
        from data_prep.system.command_line import require

        require("torch", "an export", "torch")
        from ctssl_jax.release.exporting import export

        return export
    if name == "import_weights":
        from ctssl_jax.release.importing import import_weights

        return import_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
