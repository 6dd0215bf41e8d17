"""The tasks by name: pretraining (paper, section II.C), joint embeddings, which the paper does not
have, and downstream (sections II.D and E)."""

import ml_collections

from ctssl_jax.tasks import (
    joint_embedding,
    mixed,
    reconstruction,
    segmentation,
    slice_label,
    sparse,
    transformation,
)
from ctssl_jax.tasks.interface import Task
from data_prep.system.errors import InputError

TASKS = {
    "masked_region": reconstruction.MASKED_REGION,
    "next_slice": reconstruction.NEXT_SLICE,
    "denoising": reconstruction.DENOISING,
    "spark": sparse.SPARK,
    "rotation": transformation.ROTATION,
    "flip": transformation.FLIP,
    "lejepa": joint_embedding.LEJEPA,
    "visreg": joint_embedding.VISREG,
    "vicreg": joint_embedding.VICREG,
    "simclr": joint_embedding.SIMCLR,
    "dino": joint_embedding.DINO,
    "mixed": mixed.MIXED,
    "slice_label": slice_label.SLICE_LABEL,
    "slice_label_se_resnext": slice_label.SLICE_LABEL_SE_RESNEXT,
    "segmentation": segmentation.SEGMENTATION,
    "segmentation_standard_unet": segmentation.SEGMENTATION_STANDARD_UNET,
}
_RECIPES = {
    "slice_label": "pe",
    "slice_label_se_resnext": "pe_se_resnext",
    "segmentation": "nodules",
    "segmentation_standard_unet": "nodules_standard_unet",
}


def get_task(name: str) -> Task:
    """The task with the name of `config.task`.

    Raises:
      InputError: there is no task of this name.
    """
    if name not in TASKS:
        raise InputError(f"config.task={name!r} is not known; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def check_task(config: ml_collections.ConfigDict) -> None:
    """Refuse a configuration whose task is unknown, impossible, or not the task of its recipe.

    Raises:
      InputError: names the field and the remedy.
    """
    task = get_task(config.task)
    all_fields = dict.fromkeys(field for other in TASKS.values() for field in other.fields)
    missing = [f"config.{field} is missing" for field in task.fields if field not in config]
    foreign = [
        f"config.{field} has no meaning"
        for field in all_fields
        if field not in task.fields and field in config
    ]
    if missing or foreign:
        raise InputError(
            f"config.task={config.task!r} does not fit this recipe "
            f"({', '.join(missing + foreign)}); start from "
            f"--config={_RECIPES.get(config.task, config.task)}"
        )
    names = scores_of(task)
    if config.get("best_by") not in names:
        raise InputError(
            f"config.best_by={config.get('best_by')!r}: a validation of the task {config.task} has "
            f"no such score; choose one of {', '.join(names)}"
        )
    task.check(config)


def scores_of(task: Task) -> tuple[str, ...]:
    """The names that `config.best_by` may have; never terms of a loss that compares examples."""
    predicts_label = "cross_entropy" in task.reported
    reported = () if task.compares_batch else task.reported
    return (*reported, *(["auroc"] if predicts_label else []), "position_r2")
