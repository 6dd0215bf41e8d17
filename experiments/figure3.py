r"""Figure 3: PE detection against the size of the training set, by pretext.

    ctssl figure3 run --preset=phantom --workdir=STUDY
    ctssl figure3 draw --preset=phantom --workdir=STUDY

Panels A and B show sensitivity and specificity of masked region prediction and of SE-ResNeXt-50
(SOTA), at the threshold fixed on validation. The paper's text names the 5 % model, its caption the
20 % model; both are drawn. Panel C shows the AUROC of all arms, random weights among them. `plan`
lists the cells, one command each. With your own data:

    ctssl figure3 run --preset=paper --workdir=STUDY --dataset=RSNA_DATASET \
        --pretrained=masked_20=RUN --pretrained=rotation=RUN \
        --arms=random,masked_20,rotation,se_resnext
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line

from .study import curves, downstream, presets, runner

ARMS = presets.FIGURES["figure3"][1]
SOTA = ("masked_", "se_resnext")
FIGURE = curves.pe_figure(
    "figure3",
    "PE detection against the size of the training set",
    curves.Panel("A  Sensitivity (threshold of the validation split)", "sensitivity", SOTA),
    curves.Panel("B  Specificity (the same threshold)", "specificity", SOTA),
    curves.Panel("C  AUROC over slices", "auroc"),
)

if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    command_line.run(lambda argv: curves.main(argv, FIGURE), runner.VERBS)
