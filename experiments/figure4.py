r"""Figure 4: PE detection from masked region prediction, by the covered area (5 to 33 %).

    ctssl figure4 run --preset=phantom --workdir=STUDY
    ctssl figure4 draw --preset=phantom --workdir=STUDY

Cells, data and statistics are as in `experiments.figure3`. In one --workdir the arms of both
figures are run once.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line

from .study import curves, downstream, presets, runner

ARMS = presets.FIGURES["figure4"][1]
FIGURE = curves.pe_figure(
    "figure4",
    "PE detection by size of the masked region",
    curves.Panel("AUROC over slices", "auroc"),
)

if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(lambda argv: curves.main(argv, FIGURE), runner.VERBS)
