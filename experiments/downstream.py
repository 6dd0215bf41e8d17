"""What the downstream studies (Figures 3 to 6 and S1) share: presets, data, pretrained arms, and their cells.

A study is a grid of arm x share of the training data x seed (x training steps). Its arms differ in the weights that
they start from and in nothing else: data order, augmentation, schedule and the new layers' initial values are the
same at the same seed.

    --preset=phantom    everything is made here, on two cores: synthetic archives, datasets, pretrained runs
    --preset=paper      your datasets (--dataset) and your pretrained runs (--pretrained=NAME=RUN, repeated)

Studies of one --workdir share data, pretrained runs and cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from data_prep.system.errors import InputError
from experiments import study
from experiments.study import PROJECT, Cell

TITLES = {
    "random": "random weights",
    "masked_05": "masked region, 5 %",
    "masked_10": "masked region, 10 %",
    "masked_20": "masked region, 20 %",
    "masked_33": "masked region, 33 %",
    "next_slice": "next slice",
    "denoising": "denoising",
    "rotation": "rotation",
    "flip": "flip",
    "se_resnext": "SE-ResNeXt-50 (SOTA)",
    "standard_unet": "standard U-Net",
}
# Synthetic patients need no secret; a fixed key gives the same splits everywhere.
SYNTHETIC_KEY = "the pseudonym key of the synthetic patients of the downstream studies"
MASKED = {"masked_05": 0.05, "masked_10": 0.10, "masked_20": 0.20, "masked_33": 0.33}
PRETEXTS = (*MASKED, "next_slice", "denoising", "rotation", "flip")


class Archive(NamedTuple):
    """A synthetic archive of the phantom preset.

    layout: of `data_prep.phantom` and kind of `data_prep.prepare`.
    num_patients, seed: of the phantom.
    splits: of `data_prep.prepare`.
    windows: of `data_prep.prepare`; () takes its defaults.
    """

    layout: str
    num_patients: int
    seed: int
    splits: str
    windows: tuple[str, ...] = ()


class Preset(NamedTuple):
    """Size of all studies.

    size: of the recipes.
    archives: data set -> archive that is made; empty: the user's.
    fractions: shares of the training studies.
    seeds: of weights, data order and subset.
    pretraining_steps: of each pretext; 0 takes the recipe's.
    pe_steps: training steps of each PE cell; 0 takes the recipe's.
    nodule_steps: training steps of the segmentation cells, one curve each.
    attribute_steps: of the end-to-end baselines; 0 takes the recipe's.
    overrides: `FIELD=VALUE` of the recipes with an encoder of ours.
    left_out: arms that are run only where `--arms` names them: a figure on two cores should take less than an hour.
    """

    size: str
    archives: dict[str, Archive]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    pretraining_steps: int
    pe_steps: int
    nodule_steps: tuple[int, ...]
    attribute_steps: int
    overrides: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


PRESETS = {
    "phantom": Preset(
        size="small",
        archives={
            "pretraining": Archive("dicom", 72, 0, "0.8,0.1,0.1"),
            "pe": Archive("rsna_pe", 120, 1, "0.4,0.15,0.45"),
            "nodules": Archive("lidc_idri", 100, 2, "0.4,0.15,0.45"),
            "attributes": Archive("dicom", 160, 3, "0.5,0.2,0.3"),
        },
        fractions=(0.125, 0.25, 1.0),
        seeds=(0, 1, 2),
        pretraining_steps=500,
        pe_steps=150,
        nodule_steps=(50, 150),
        attribute_steps=100,
        left_out=("next_slice", "denoising", "flip"),
    ),
    "paper": Preset(
        size="reference",
        archives={},
        fractions=(0.04, 0.075, 0.25, 0.5, 1.0),  # of 1.54 million slices: the paper's 60, 115, 380 and 770 thousand
        seeds=(0, 1, 2),
        pretraining_steps=0,
        pe_steps=0,
        nodule_steps=(2_000, 5_000, 20_000),
        attribute_steps=0,
        overrides=("dtype=bfloat16",),
    ),
}


class Study(NamedTuple):
    """What the flags ask for.

    preset: name of the preset.
    sizes: the preset, as far as flags did not change it.
    workdir: folder of all studies.
    dataset: the downstream dataset.
    pretrained: arm -> its run directory, for arms that are given.
    """

    preset: str
    sizes: Preset
    workdir: Path
    dataset: Path
    pretrained: dict[str, Path]

    def run_of(self, arm: str) -> Path:
        """Run directory of the weights that an arm starts from."""
        return self.pretrained.get(arm, self.workdir / "runs" / f"pretrain_{arm}")


def data_cells(asked: Study, names: Sequence[str]) -> list[Cell]:
    """Make and prepare the synthetic archives; none where the data are the user's."""
    data = asked.workdir / "data"
    cells = []
    for name in names if asked.sizes.archives else ():
        archive = asked.sizes.archives[name]
        scans, dataset, key = data / f"{name}_scans", data / name, data / "pseudonym_key"
        make = (
            *(f"{name}: make scans", "data_prep.phantom", f"--output_dir={scans}", f"--layout={archive.layout}"),
            *(f"--num_patients={archive.num_patients}", f"--seed={archive.seed}", "--num_slices=24"),
            "--image_size=128",
        )
        prepare = (
            *(f"{name}: prepare", "data_prep.prepare", f"--archive={archive.layout}", f"--input_dir={scans}"),
            *(f"--output_dir={dataset}", "--image_size=64", f"--splits={archive.splits}"),
            f"--pseudonym_key_file={key}",
            *(f"--window={window}" for window in archive.windows),
            *([f"--attributes_csv={scans / 'attributes.csv'}"] if archive.layout == "rsna_pe" else []),
        )
        cells.append(Cell(f"data_{name}", (), (make, prepare), dataset / "preparation.json"))
    return cells


def pretraining_cells(asked: Study, arms: Sequence[str]) -> list[Cell]:
    """Pretrain the arms that are not given: the chain of mask sizes up to the largest, and single pretexts."""
    wanted = [arm for arm in arms if arm in PRETEXTS and arm not in asked.pretrained]
    if not asked.sizes.archives:
        if wanted:
            raise InputError(
                f"no weights for {', '.join(wanted)}: give --pretrained={wanted[0]}=RUN for each, or choose --arms"
            )
        return []
    chain = list(MASKED)
    last = max((chain.index(arm) for arm in wanted if arm in MASKED), default=-1)
    cells = []
    for arm in (*chain[: last + 1], *(arm for arm in wanted if arm not in MASKED)):
        recipe = "masked_region" if arm in MASKED else arm
        before = f"pretrain_{chain[chain.index(arm) - 1]}" if arm in MASKED and arm != chain[0] else ""
        fields = {"mask.fraction": MASKED[arm]} if arm in MASKED else {}
        if before:
            fields |= {"init_from": asked.workdir / "runs" / before, "init_checkpoint": "last"}
        if asked.sizes.pretraining_steps:
            fields |= {"num_steps": asked.sizes.pretraining_steps, "eval_every": asked.sizes.pretraining_steps}
        dataset = asked.workdir / "data" / "pretraining"
        cells.append(
            trained_cell(asked, f"pretrain_{arm}", recipe, dataset, fields, after=(before or "data_pretraining",))
        )
    return cells


def trained_cell(
    asked: Study, name: str, recipe: str, dataset: Path, fields: dict[str, Any], *, after: tuple[str, ...]
) -> Cell:
    """Train a recipe and evaluate it on the test split.

    Args:
      asked: the study.
      name: of the cell; the run is `WORKDIR/runs/NAME`, the result `WORKDIR/results/NAME.json`.
      recipe: file in `configs/`.
      dataset: dataset directory.
      fields: of the configuration; `num_steps` is the recipe's where it is not given.
      after: cells that must be complete before.
    """
    run, result = asked.workdir / "runs" / name, asked.workdir / "results" / f"{name}.json"
    given = [f"{field}={value}" for field, value in fields.items()]
    ours = recipe not in ("pe_se_resnext", "nodules_standard_unet")
    overrides = [text for text in asked.sizes.overrides if ours or not text.startswith("model.")]
    train = (
        *(f"{name}: train", "ctssl_jax.train", f"--config={PROJECT / 'configs' / recipe}.py:{asked.sizes.size}"),
        *(f"--config.{text}" for text in (f"dataset={dataset}", *given, *overrides)),
        f"--workdir={run}",
    )
    # The last checkpoint: by the loss on few patients, the best one may be that before any training.
    evaluate = (
        *(f"{name}: evaluate", "ctssl_jax.evaluate", f"--workdir={run}", f"--output={result}"),
        "--checkpoint=last",
    )
    return Cell(name, after, (train, evaluate), result)


class Point(NamedTuple):
    """One cell of the grid.

    arm: name in `TITLES`, or of a run of the user's.
    fraction: of the training studies.
    seed: of weights, data order and subset.
    steps: of the training; 0 is the recipe's.
    """

    arm: str
    fraction: float
    seed: int
    steps: int

    def cell_name(self, kind: str) -> str:
        """`pe_masked_20_0.25_s1_150`."""
        return f"{kind}_{self.arm}_{self.fraction:g}_s{self.seed}" + (f"_{self.steps}" if self.steps else "")


def grid(asked: Study, arms: Sequence[str], steps: Sequence[int]) -> list[Point]:
    """All points, smallest shares first, so that a study that is stopped has whole columns."""
    return [
        Point(arm, fraction, seed, number)
        for number in steps
        for fraction in asked.sizes.fractions
        for seed in asked.sizes.seeds
        for arm in arms
    ]


def downstream_cell(asked: Study, kind: str, point: Point, dataset: Path, fields: dict[str, Any]) -> Cell:
    """The cell of a point: fine-tune an arm.

    Args:
      asked: the study.
      kind: `pe`, `nodules` or `attributes`, the recipe.
      point: of the grid.
      dataset: dataset directory.
      fields: further fields of the configuration.
    """
    recipe = {"se_resnext": "pe_se_resnext", "standard_unet": "nodules_standard_unet"}.get(point.arm, kind)
    fields = {"train_fraction": point.fraction, "seed": point.seed, **fields}
    if point.steps:
        fields |= {"num_steps": point.steps, "eval_every": point.steps}
    after = [f"data_{kind}"] if asked.sizes.archives else []
    if point.arm in PRETEXTS or point.arm in asked.pretrained:
        fields |= {"init_from": asked.run_of(point.arm), "init_checkpoint": "last"}
        after += [] if point.arm in asked.pretrained else [f"pretrain_{point.arm}"]
    return trained_cell(asked, point.cell_name(kind), recipe, dataset, fields, after=tuple(after))


def define_flags(arms: Sequence[str]) -> None:
    """Flags that all downstream studies share; only where a study is the program."""
    flags.DEFINE_enum("preset", "phantom", list(PRESETS), "Size of the study, and whose data.")
    flags.DEFINE_string("workdir", None, "Folder of the studies: data, runs, results, figures.")
    flags.DEFINE_string("dataset", None, "Downstream dataset directory (--preset=paper).")
    flags.DEFINE_multi_string("pretrained", [], "NAME=RUN: weights of an arm, NAME of --arms or one of your own.")
    flags.DEFINE_list("arms", list(arms), "Arms, separated by commas; by default those of the preset.")
    flags.DEFINE_list("fractions", [], "Shares of the training studies; by default the preset's.")
    flags.DEFINE_list("seeds", [], "Seeds; by default the preset's.")
    flags.DEFINE_list("cells", [], "Cells to run, separated by commas; by default all that are missing.")


def study_of_flags(verb: str, kind: str) -> Study:
    """What the command line asks for.

    Args:
      verb: `plan`, `run` or `draw`.
      kind: data set of the study, `pe` or `nodules`.

    Raises:
      InputError: a flag is missing, or names what does not exist.
    """
    given = flags.FLAGS
    if not given.workdir:
        raise InputError("give --workdir=DIR")
    sizes, workdir = PRESETS[given.preset], Path(given.workdir).resolve()
    for name, kind_of in (("fractions", float), ("seeds", int)):
        try:
            values = tuple(kind_of(value) for value in given[name].value)
        except ValueError:
            raise InputError(f"--{name}={','.join(given[name].value)}: give numbers separated by commas") from None
        sizes = sizes._replace(**{name: values}) if values else sizes
    if not given["arms"].present:
        given["arms"].value = [arm for arm in given.arms if arm not in sizes.left_out]
    pretrained = {}
    for text in given.pretrained:
        name, _, run = text.partition("=")
        if not (run and (Path(run) / "config.json").is_file()):
            raise InputError(f"--pretrained={text}: give NAME=RUN with a run directory of ctssl_jax.train")
        pretrained[name] = Path(run).resolve()
    unknown = [arm for arm in given.arms if arm not in TITLES and arm not in pretrained]
    if unknown:
        raise InputError(f"--arms: {unknown[0]} is not known; choose from {', '.join(TITLES)}, or give --pretrained")
    if sizes.archives:
        dataset = workdir / "data" / kind
    elif given.dataset or verb == "draw":
        dataset = study.local_dataset(given.dataset or "")
    else:
        raise InputError("give --dataset=DIR, made by data_prep.prepare")
    return Study(given.preset, sizes, workdir, dataset, pretrained)


def act(verb: str, module: str, asked: Study, cells: Sequence[Cell], lists: Sequence[str] = ()) -> None:
    """`plan` or `run` a study's cells.

    Args:
      verb: `plan` or `run`.
      module: of the study, whose `run` verb runs a cell.
      asked: the study.
      cells: of the study.
      lists: its flags of comma-separated lists, beside those that all downstream studies share.
    """
    if verb == "plan":
        given = flags.FLAGS
        options = [f"--preset={asked.preset}", f"--workdir={asked.workdir}", f"--arms={','.join(given.arms)}"]
        options += [f"--dataset={asked.dataset}"] if given.dataset else []
        options += [f"--pretrained={text}" for text in given.pretrained]
        options += [
            f"--{name}={','.join(given[name].value)}" for name in ("fractions", "seeds", *lists) if given[name].value
        ]
        study.plan(cells, module, options)
    else:
        study.record_settings(asked.workdir, {"preset": asked.preset})
        if asked.sizes.archives:
            key = asked.workdir / "data" / "pseudonym_key"
            key.parent.mkdir(exist_ok=True)
            key.write_text(SYNTHETIC_KEY)
        study.run(cells, flags.FLAGS.cells, asked.workdir, here=True)
