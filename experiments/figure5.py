r"""Figure 5: nodule segmentation against the size of the training set and the training steps.

    ctssl figure5 run --preset=phantom --workdir=STUDY
    ctssl figure5 draw --preset=phantom --workdir=STUDY

Dice and IoU are drawn. All arms are the same U-Net, whose down branch has the compression layers of
the encoder; they differ in the weights of these layers alone. A standard U-Net is a reference
beside them.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line

from .study import curves, downstream, presets, runner

ARMS = presets.FIGURES["figure5"][1]
FIGURE = curves.nodule_figure("figure5", "Nodule segmentation by pretext")

if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(lambda argv: curves.main(argv, FIGURE), runner.VERBS)
