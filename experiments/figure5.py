r"""Figure 5: nodule segmentation (Dice, IoU) against the size of the training set and the number of training steps.

    python -m experiments.figure5 run --preset=phantom --workdir=STUDY
    python -m experiments.figure5 draw --preset=phantom --workdir=STUDY

All arms are one graph, a U-Net whose down branch is the encoder's compression layers; they differ in the weights of
these layers alone. A standard U-Net is a reference beside them.
"""

from absl import flags

from data_prep.system import command_line
from experiments import downstream, learning_curves, study
from experiments.downstream import Study

ARMS = ("random", "masked_20", "next_slice", "denoising", "rotation", "flip", "standard_unet")
MORE = ("dice_all_slices", "volume_dice", "volume_iou")


def cells_of(asked: Study, arms: list[str]) -> tuple[list[study.Cell], dict[downstream.Point, study.Cell]]:
    """All cells in order, and those of the grid by their point."""
    points = downstream.grid(asked, arms, asked.sizes.nodule_steps)
    grid = {point: downstream.downstream_cell(asked, "nodules", point, asked.dataset, {}) for point in points}
    data = downstream.data_cells(asked, ("pretraining", "nodules"))
    return [*data, *downstream.pretraining_cells(asked, arms), *grid.values()], grid


def panels(asked: Study) -> tuple[learning_curves.Panel, ...]:
    """Dice and IoU, a panel each for every number of steps."""
    return tuple(
        learning_curves.Panel(f"{title}, {steps:,} steps" if steps else title, metric, ("",), steps)
        for metric, title in (("dice", "Dice of annotated slices"), ("iou", "IoU of annotated slices"))
        for steps in asked.sizes.nodule_steps
    )


def main(argv: list[str], name: str = "figure5", what: str = "by pretext") -> int:
    """Command line."""
    return learning_curves.main(
        argv,
        module=f"experiments.{name}",
        kind="nodules",
        cells_of=cells_of,
        name=name,
        title=f"Nodule segmentation {what}",
        panels=panels,
        more=MORE,
        note="Hard at probability .5; both masks empty count 1, exactly one empty 0.",
    )


if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(main, study.VERBS)
