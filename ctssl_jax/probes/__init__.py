"""Simple probes of a frozen encoder: `probe` for tasks of slices, `attributes` for patients.

>>> from ctssl_jax.probes import probe
>>> result = probe("run", "dataset", "probe.json", encoder="pixels")  # doctest: +ELLIPSIS
encoder        masked_region (control: pixels) on ...
>>> result["num_features"]
{'latent': 1, 'pooled': 64}
"""

from typing import TYPE_CHECKING

from data_prep.system import lazy_names

if TYPE_CHECKING:
    from ctssl_jax.probes.attribute_probe import attributes
    from ctssl_jax.probes.probing import probe

__all__ = ["attributes", "probe"]

_HOMES = {  # imported when they are used: JAX takes seconds
    "attributes": "ctssl_jax.probes.attribute_probe",
    "probe": "ctssl_jax.probes.probing",
}

__getattr__ = lazy_names.importer(__name__, _HOMES)
