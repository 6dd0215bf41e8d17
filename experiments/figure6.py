r"""Figure 6: patient attributes (age, sex, ethnic group) in pretrained encoders and in controls.

    ctssl figure6 run --preset=phantom --workdir=STUDY
    ctssl figure6 draw --preset=phantom --workdir=STUDY

Each arm is a frozen encoder, the last weights of its pretraining as in the other figures, probed on
the middle slice of each volume (`ctssl_jax.attributes`). The paper's baseline is the same encoder
trained end to end from random weights (recipe `attributes`), one model an attribute. Controls,
with the architecture and weights of the first arm: random weights, pixels without a network, and
shuffled labels. Random parts are run once a seed; probes of trained weights are not. `plan` lists
the cells, one command each. With your own data:

    ctssl figure6 run --preset=paper --workdir=STUDY --dataset=DATASET \
        --pretrained=masked_20=RUN --pretrained=rotation=RUN --arms=masked_20,rotation \
        --attributes=age,sex
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from collections.abc import Sequence

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError

from .study import downstream, runner
from .study.attributes import Model, cells_of, draw
from .study.cells import Cell, Stage, keeping
from .study.downstream import Study
from .study.presets import PRETEXTS, TITLES

ARMS = ("masked_05", "masked_20", "next_slice", "denoising", "rotation", "flip")
ATTRIBUTES = ("age", "sex", "ethnic_group")
END_TO_END = "random weights, trained end to end"
CONTROLS = {
    "untrained": ("frozen random weights", {"encoder": "untrained"}),
    "pixels": ("pixels, no network", {"encoder": "pixels"}),
    "shuffled": ("shuffled labels", {"shuffled_labels": True}),
}


def probe_cell(
    study: Study, arm: str, attributes: Sequence[str], name: str, control: dict, seed: int
) -> Cell:
    """Probe the encoder of an arm for all attributes.

    Args:
      study: the study.
      arm: whose run is read.
      attributes: to probe; if they are not the default ones, the name of the cell lists them.
      name: of the cell, after `probe_`.
      control: options of `ctssl_jax.attributes`, for a control.
      seed: of random weights, shuffling and bootstrap.
    """
    name = "_".join([f"probe_{name}", *(attributes if tuple(attributes) != ATTRIBUTES else ())])
    result = study.workdir / "results" / f"{name}.json"
    options = {
        "workdir": study.run_of(arm),
        "dataset": study.dataset,
        "attributes": ",".join(attributes),
        "checkpoint": "last",
        "seed": seed,
        **control,
        "output": result,
    }
    probe = Stage(f"{name}: probe", "ctssl_jax.attributes", options)
    after = ["data_attributes"] if study.sizes.archives else []
    after += [] if arm in study.pretrained else [f"pretrain_{arm}"]
    return Cell(name, tuple(after), (probe,), result)


def models_of(study: Study, arms: Sequence[str], attributes: Sequence[str]) -> list[Model]:
    """The rows of the figure: pretrained encoders, the baseline, controls."""
    seeds, first = study.sizes.seeds, arms[0]
    models = []
    for arm in arms:
        cell = probe_cell(study, arm, attributes, arm, {}, seeds[0])
        cells = {attribute: [cell] for attribute in attributes}
        models.append(Model(TITLES.get(arm, arm), "pretrained", cells))

    (steps,) = study.sizes.steps["attributes"]
    fields = {"dataset": study.dataset, "num_classes": 0, **downstream.schedule(steps)}
    after = ("data_attributes",) if study.sizes.archives else ()
    baseline = {
        attribute: [
            study.cell(
                f"end_to_end_{attribute}_s{seed}",
                "attributes",
                {**fields, "label": attribute, "seed": seed},
                after,
            )
            for seed in seeds
        ]
        for attribute in attributes
    }
    models.append(Model(END_TO_END, "baseline", baseline))

    for control, (title, options) in CONTROLS.items():
        cells = [
            probe_cell(study, first, attributes, f"{first}_{control}_s{seed}", options, seed)
            for seed in (seeds[:1] if control == "pixels" else seeds)
        ]
        models.append(Model(title, "control", dict.fromkeys(attributes, cells)))
    return models


def check_request(study: Study, arms: Sequence[str], attributes: Sequence[str]) -> None:
    """Refuse arms that were not pretrained, repeated names, and shares of the training data.

    Raises:
      InputError: names the flag.
    """
    others = [arm for arm in arms if arm not in PRETEXTS and arm not in study.pretrained]
    if others:
        raise InputError(
            f"--arms: {others[0]} is not a pretrained encoder; choose from {', '.join(PRETEXTS)}"
        )
    for flag, names in (("arms", arms), ("attributes", attributes)):
        if not names or len(set(names)) < len(names):
            raise InputError(f"--{flag}={','.join(names)}: give one name or more, each once")
    if flags.FLAGS.fractions:
        raise InputError("--fractions: Figure 6 uses all training patients; leave it out")


def main(argv: list[str]) -> int:
    """Command line."""
    verb, flag = runner.verb_of(argv, f"{__package__}.figure6"), flags.FLAGS
    study = downstream.study_of_flags(verb, "attributes")
    check_request(study, flag.arms, flag.attributes)
    models = [
        model._replace(cells={n: keeping(own, study.kept) for n, own in model.cells.items()})
        for model in models_of(study, flag.arms, flag.attributes)
    ]
    if verb == "draw":
        print(draw(study, models), flush=True)
        runner.suggest_after("draw", f"{__package__}.figure6", [])
        return 0
    cells = [
        *downstream.data_cells(study, ("pretraining", "attributes")),
        *keeping(downstream.pretraining_cells(study, flag.arms), study.kept),
        *cells_of(models),
    ]
    downstream.act(verb, f"{__package__}.figure6", study, cells, lists=("attributes",))
    return 0


if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    flags.DEFINE_list(
        "attributes", list(ATTRIBUTES), "Attributes, as `ctssl_jax.attributes` takes them."
    )
    command_line.run(main, runner.VERBS)
