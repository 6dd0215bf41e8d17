"""Names that moved, until all callers import them from where they are."""

from ctssl_jax.ops.trees import fingerprint, flatten, unflatten
from ctssl_jax.runs.checkpoints import (
    Checkpoints,
    choose_step,
    read_metadata,
    restore,
    saved_with,
    stored_shapes,
)
from ctssl_jax.runs.damage import (
    CHECKPOINTS,
    LAST_GOOD,
    SET_ASIDE,
    SUMS,
    check_all_undamaged,
    check_undamaged,
    holds_checkpoint,
    set_aside_damaged,
    write_sums,
)

__all__ = [
    "CHECKPOINTS", "LAST_GOOD", "SET_ASIDE", "SUMS", "Checkpoints", "check_all_undamaged", "check_undamaged",
    "choose_step", "fingerprint", "flatten", "holds_checkpoint", "read_metadata", "restore", "saved_with",
    "set_aside_damaged", "stored_shapes", "unflatten", "write_sums",
]  # fmt: skip
