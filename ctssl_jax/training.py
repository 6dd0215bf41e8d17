"""Names that moved, until the last caller imports them from where they are."""

from ctssl_jax import training__scoring
from ctssl_jax.training__state import (  # noqa: F401
    TrainState,
    abstract_model,
    count_parameters,
    evaluation_keys,
    restore_model,
)
from ctssl_jax.training__step import make_program  # noqa: F401


def evaluate_split(program, *arguments):
    """`training__scoring.evaluate_split`."""
    return training__scoring.evaluate_split(program.scorer, *arguments)


def render_pictures(program, *arguments):
    """`training__scoring.render_pictures`."""
    return training__scoring.render_pictures(program.scorer, *arguments)
