r"""What the paper leaves open: one choice of masked region prediction changed at a time.

    ctssl confounds run --preset=study --workdir=STUDY
    ctssl confounds draw --preset=study --workdir=STUDY

Area or side of the square, a larger mask or longer training (20 % for as many steps as the chain
took, and the chain itself), a trained codebook or one by gradient, the grey map, the batch
normalisation or the convolutions of the encoder alone; all against 20 % of the area, trained in one
stage from random weights. Cells, data and statistics are as in `experiments.figure3`.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line

from .study import curves, downstream, presets, runner

ARMS = presets.FIGURES["confounds"][1]
FIGURE = curves.pe_figure(
    "confounds",
    "PE detection: choices of masked region prediction",
    curves.Panel("AUROC over slices", "auroc"),
)._replace(reference="area_20")

if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(lambda argv: curves.main(argv, FIGURE), runner.VERBS)
