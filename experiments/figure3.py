r"""Figure 3: PE detection against the size of the training set, for every pretext, random weights and SE-ResNeXt-50.

    python -m experiments.figure3 run --preset=phantom --workdir=STUDY
    python -m experiments.figure3 draw --preset=phantom --workdir=STUDY

A and B: sensitivity and specificity at the threshold fixed on validation, of masked region prediction and the SOTA (the
paper's text says the 5 % model, its caption the 20 % one: both are drawn); C: AUROC of all arms. `plan` lists the
cells, one command each. With your own data:

    python -m experiments.figure3 run --preset=paper --workdir=STUDY --dataset=RSNA_DATASET \
        --pretrained=masked_20=RUN --pretrained=rotation=RUN --arms=random,masked_20,rotation,se_resnext
"""

from absl import flags

from data_prep.system import command_line
from experiments import downstream, learning_curves, study
from experiments.downstream import Study

ARMS = ("random", "masked_05", "masked_20", "next_slice", "denoising", "rotation", "flip", "se_resnext")
PANELS = (
    learning_curves.Panel(
        "A  Sensitivity (threshold of the validation split)", "sensitivity", ("masked_", "se_resnext")
    ),
    learning_curves.Panel("B  Specificity (the same threshold)", "specificity", ("masked_", "se_resnext")),
    learning_curves.Panel("C  AUROC over slices", "auroc", ("",)),
)
MORE = ("exam_auroc", "average_precision", "brier", "ece")


def cells_of(asked: Study, arms: list[str]) -> tuple[list[study.Cell], dict[downstream.Point, study.Cell]]:
    """All cells in order, and those of the grid by their point."""
    points = downstream.grid(asked, arms, (asked.sizes.pe_steps,))
    grid = {point: downstream.downstream_cell(asked, "pe", point, asked.dataset, {}) for point in points}
    data = downstream.data_cells(asked, ("pretraining", "pe"))
    return [*data, *downstream.pretraining_cells(asked, arms), *grid.values()], grid


def main(argv: list[str]) -> int:
    """Command line."""
    return learning_curves.main(
        argv,
        module="experiments.figure3",
        kind="pe",
        cells_of=cells_of,
        name="figure3",
        title="PE detection against the size of the training set",
        panels=PANELS,
        more=MORE,
    )


if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(main, study.VERBS)
