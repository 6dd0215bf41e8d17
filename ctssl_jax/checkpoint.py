"""Names that moved, until the last caller imports them from where they are."""

from ctssl_jax.ops.trees import fingerprint, flatten, unflatten  # noqa: F401
from ctssl_jax.runs.checkpoints import Checkpoints, choose_step, restore  # noqa: F401
from data_prep.system.files import read_json, write_json, write_text  # noqa: F401
