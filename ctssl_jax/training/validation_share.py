"""The share of a run's time that validations take, reckoned before it starts."""

import math

import ml_collections
import numpy as np

from ctssl_jax.data.slices import NeighbourSource
from ctssl_jax.tasks.interface import Task, step_flops

LARGEST_SHARE = 0.05


def reckoned_share(config: ml_collections.ConfigDict, task: Task, num_slices: int) -> float:
    """Share of the time in validations, counted in forward passes of the model.

    A validation comes every `eval_every` steps and after the last one. It scores whole batches, and
    one more for the pictures.

    Args:
      config: a recipe.
      task: the task of `config.task`.
      num_slices: slices of a validation.

    Returns:
      Share in [0, 1). Reading, compiling and writing files are not in it.
    """
    part = config.batch_size // config.microbatches
    number = math.ceil(config.num_steps / config.eval_every)
    validation = number * (math.ceil(num_slices / part) + 1) * part
    # three for a training slice, less where the encoder is frozen
    passes = step_flops(task, config) / task.flops(config)
    return validation / (validation + config.num_steps * config.batch_size * passes)


def line(
    config: ml_collections.ConfigDict, task: Task, source: NeighbourSource, items: np.ndarray
) -> str:
    """The reckoned share of a run as a line for the screen; where it is too large, with a number of
    slices that mends it.

    Args:
      config: a checked configuration.
      task: the task of `config.task`.
      source: the validation split.
      items: its items that a validation scores.
    """
    share = reckoned_share(config, task, len(items))
    of_patients = len(np.unique(source.patients[items]))
    text = (
        f"validation   {len(items):,} of {len(source):,} slices, of {of_patients:,} of "
        f"{len(np.unique(source.patients)):,} patients, every {config.eval_every:,} steps: about "
        f"{share:.1%} of the time"
    )
    part = config.batch_size // config.microbatches
    fewer = (len(items) - 1) // part * part
    while fewer > 0 and reckoned_share(config, task, fewer) > LARGEST_SHARE:
        fewer -= part
    if share > LARGEST_SHARE and fewer > 0:
        less = reckoned_share(config, task, fewer)
        text += f"; --config.validation_slices={fewer} makes it {less:.1%}"
    return text
