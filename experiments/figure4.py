r"""Figure 4: PE detection from masked region prediction with 5, 10, 20 and 33 % of the area covered.

    python -m experiments.figure4 run --preset=phantom --workdir=STUDY
    python -m experiments.figure4 draw --preset=phantom --workdir=STUDY

Same cells, data and statistics as `experiments.figure3`; in one --workdir the arms that both have are run once.
"""

from absl import flags

from data_prep.system import command_line
from experiments import downstream, figure3, learning_curves, study

ARMS = ("random", *downstream.MASKED)


def main(argv: list[str]) -> int:
    """Command line."""
    return learning_curves.main(
        argv,
        module="experiments.figure4",
        kind="pe",
        cells_of=figure3.cells_of,
        name="figure4",
        title="PE detection by size of the masked region",
        panels=(learning_curves.Panel("AUROC over slices", "auroc", ("",)),),
        more=figure3.MORE,
    )


if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(main, study.VERBS)
