"""What a model sees of a dataset in training: its inputs, views and targets as pictures.

They are those of the training itself, by the same function of the seed, the step and the slice. The
model does not run: nothing of it is in these pictures, so XLA leaves it out.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ctssl_jax.data.batches import picture_batch
from ctssl_jax.ops.corruptions import example_keys
from ctssl_jax.runs import strips
from ctssl_jax.tasks.interface import item_slices
from ctssl_jax.training import pictures
from ctssl_jax.training.setup import Job, check
from ctssl_jax.training.state import Definition, define
from ctssl_jax.training.step import zeros_of
from data_prep.dataset.reader import Dataset
from data_prep.system.files import make_folder

_OF_A_MODEL = ("prediction", "prediction_mask")


def page(
    config: ml_collections.ConfigDict,
    output_dir: str | Path,
    *,
    num_slices: int = 3,
    num_draws: int = 3,
    dataset: Dataset | None = None,
) -> Path:
    """Write what a training with this configuration would see of some training slices.

    Args:
      config: a recipe with its dataset.
      output_dir: folder of `views.png`, made if need be.
      num_slices: slices, spread evenly over the training split (over those with a mask, if the task
        has masks).
      num_draws: rows of each slice: the draws of the first steps.
      dataset: the dataset of `config.dataset`, if it is open already.

    Returns:
      Path of the PNG: a row a draw. The stored slice comes first, then the model's input, its
      target where that is a picture, or views; the label of a task with classes is written on the
      row. The first channel is shown.

    Raises:
      InputError: something in the configuration or the dataset cannot work.
    """
    job = check(config, None, dataset=dataset)
    number = min(num_slices, len(job.train_source))
    batch = picture_batch(job.train_source, number, number)
    definition = define(job.config, job.task, len(job.channels), job.mesh)
    seen = jax.jit(functools.partial(_seen, definition))
    draws = [jax.device_get(seen(batch, step)) for step in range(num_draws)]
    setting = pictures.setting(
        job.config, job.dataset, job.channels, job.train_source, batch["record_index"]
    )
    # row after row: all draws of the first slice, then those of the second
    shown = {
        name: np.stack([images[name] for images, _ in draws], axis=1).reshape(
            -1, *draws[0][0][name].shape[1:]
        )
        for name in draws[0][0]
    }
    rows = []
    for item in range(number):
        for step, (_, labels) in enumerate(draws):
            label = "" if labels is None else f": {setting.class_names[labels[item]]}"
            rows.append(f"slice {item + 1}, step {step + 1}{label}")
    path = Path(output_dir) / "views.png"
    make_folder(path.parent, "--output_dir")
    strips.save_strip(path, shown, _legend(job, setting.legend, tuple(rows)))
    return path


def _legend(job: Job, legend: strips.Legend, rows: tuple[str, ...]) -> strips.Legend:
    note = f"{job.config.recipe}: what the model sees in training. {legend.note}"
    return legend._replace(note=note, rows=rows)


def _seen(definition: Definition, batch: dict[str, jax.Array], step: jax.Array) -> Any:
    """Pictures of a step by title, [B, H, W, C] float32 in [0, 1]; labels [B] int32 or None."""
    config, task = definition.config, definition.task
    # the values do not matter: no picture and no label depends on them
    model = definition.model(*zeros_of((definition.params, definition.variables)))
    keys = example_keys(definition.train_key, batch["record_index"], step)
    output = task.apply(model, batch, keys, definition.model_key, config, train=True)
    shown = {
        title: picture
        for title, picture in output.pictures.items()
        if title.rpartition(": ")[2] not in _OF_A_MODEL  # of a mix: OBJECTIVE: title
    }
    # the input of a joint embedding is the stored slice; a labelled item has slices as channels
    if "target" in shown:
        centre = list(task.offsets(config)).index(0)
        shown["stored slice"] = item_slices(batch["images"], centre, config)
    if "target_mask" in shown:
        shown["mask"] = shown.pop("target_mask")
        del shown["target"]
    return shown, None if output.classes is None else output.classes["label"]
