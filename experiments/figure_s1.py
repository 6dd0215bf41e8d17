r"""Figure S1: nodule segmentation from masked region prediction, by the covered area (5 to 33 %).

    ctssl figure_s1 run --preset=phantom --workdir=STUDY
    ctssl figure_s1 draw --preset=phantom --workdir=STUDY

Cells, data and statistics are as in `experiments.figure5`. In one --workdir the arms of both
figures are run once.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line

from .study import curves, downstream, presets, runner

ARMS = presets.FIGURES["figure_s1"][1]
FIGURE = curves.nodule_figure("figure_s1", "Nodule segmentation by size of the masked region")

if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(lambda argv: curves.main(argv, FIGURE), runner.VERBS)
