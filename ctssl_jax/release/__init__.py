"""Export of models as folders for PyTorch users, and import of weights from PyTorch.

>>> from ctssl_jax.release import export, import_weights
>>> manifest = export("run", "folder", ["torch"], "CC-BY-NC-4.0")  # doctest: +ELLIPSIS
checkpoint   step ... of run: best ...
model        VQVAE, ... parameters, step 2 of run
...
>>> sorted(manifest["files"])
['ctssl_torch.py', 'test_input.npz', 'weights.pt']
>>> number = import_weights("folder", "imported", config=None, windows=[])
>>> number > len(manifest["parity"]["stages"])
True
"""

from typing import TYPE_CHECKING, Any

from data_prep.system import lazy_names
from data_prep.system.extras import require

if TYPE_CHECKING:
    from ctssl_jax.release.exporting import export
    from ctssl_jax.release.importing import import_weights

__all__ = ["export", "import_weights"]

_HOMES = {  # imported when they are used: PyTorch takes seconds, and may be absent
    "export": "ctssl_jax.release.exporting",
    "import_weights": "ctssl_jax.release.importing",
}

_import_name = lazy_names.importer(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name == "export":
        require("torch", "an export", "torch")
    return _import_name(name)
