"""The downstream studies (Figures 3 to 6 and S1): presets, data, pretrained arms, and their cells.

A study is a grid of arm x share of the training data x seed (x training steps). Its arms differ
only in the weights that they start from: at the same seed, data order, augmentation, schedule and
the first values of new layers are the same.

    --preset=phantom    makes everything here, on two cores: synthetic archives, datasets,
                        pretrained runs
    --preset=paper      takes your datasets (--dataset) and your pretrained runs
                        (--pretrained=NAME=RUN, repeated)

Studies of one --workdir share data, pretrained runs and cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ctssl_jax.training.recipe_files import load_recipe
from data_prep.dataset.reader import Dataset
from data_prep.system import stores
from data_prep.system.errors import InputError

from . import given, kept, runner
from .cells import Cell, Recipe, Stage, keeping, train_cell
from .presets import (
    ALONE,
    CONTROLS,
    FIGURES,
    MASKED,
    OTHER_NETWORKS,
    PARTS,
    PRESETS,
    PRETEXTS,
    SECONDS_A_STEP,
    SYNTHETIC_KEY,
    TITLES,
    TODAYS,
    VARIANTS,
    Preset,
)


class Study(NamedTuple):
    """A downstream study.

    preset: name of the preset.
    sizes: the preset, with the changes of the flags.
    workdir: folder of all studies.
    dataset: the downstream dataset.
    pretrained: arm -> run directory, for the arms of `--pretrained`.
    kept: folder of the small results; None: none are kept.
    """

    preset: str
    sizes: Preset
    workdir: Path
    dataset: Path
    pretrained: dict[str, Path]
    kept: Path | None = None

    def run_of(self, arm: str) -> Path:
        """Run directory of the weights that an arm starts from."""
        return self.pretrained.get(arm, self.workdir / "runs" / f"pretrain_{arm}")

    def fields(
        self, recipe: str, fields: dict[str, Any], *, own_network: bool = False
    ) -> dict[str, Any]:
        """`fields` with those that the preset gives to all cells of a recipe; `own_network` as in
        `cell`."""
        for field, value in self.sizes.overrides.items():
            if not (own_network and field.startswith("model.")):
                fields = fields | {field: value}
        if self.sizes.windows:
            fields = fields | {"windows": self.sizes.windows}
            channels = len(self.sizes.windows)
            if recipe == OTHER_NETWORKS["se_resnext"]:  # three adjacent slices, of the field here
                channels, fields = 3 * channels, fields | {"crop": "none"}
            fields = fields | {"model.in_channels": channels}
        return fields

    def equal_steps(self, recipe: str) -> int:
        """Training steps of a recipe that cost what `pretraining_steps` of `masked_region` do:
        floating-point operations, counted from the shapes of the models."""
        ours, papers = (
            kept.step_flops(Recipe(name, self.sizes.size, self.fields(name, {})).config())
            for name in (recipe, "masked_region")
        )
        steps = self.sizes.pretraining_steps
        steps = steps or load_recipe("masked_region", self.sizes.size).num_steps
        return max(1, round(steps * papers / ours))

    def cell(
        self,
        name: str,
        recipe: str,
        fields: dict[str, Any],
        after: tuple[str, ...],
        *,
        own_network: bool = False,
    ) -> Cell:
        """Train a recipe and evaluate its last checkpoint on the test split.

        Args:
          name: of the cell.
          recipe: file in `configs/`.
          fields: of the configuration.
          after: cells that must be complete before.
          own_network: the network is not the pretrained one: overrides of the model do not apply.
        """
        fields = self.fields(recipe, fields, own_network=own_network)
        # not the best: by the loss on few patients that may be the checkpoint before any training
        evaluation = {"checkpoint": "last"}
        trained = Recipe(recipe, self.sizes.size, fields)
        return train_cell(name, trained, self.workdir, evaluation, after)


def data_cells(study: Study, names: Sequence[str]) -> list[Cell]:
    """Make and prepare the synthetic archives; no cells where the user gives the datasets."""
    data = study.workdir / "data"
    cells = []
    for name in names if study.sizes.archives else ():
        archive = study.sizes.archives[name]
        scans, dataset = data / f"{name}_scans", data / name
        make = {
            "output_dir": scans,
            "layout": archive.layout,
            "num_patients": archive.num_patients,
            "seed": archive.seed,
            "num_slices": 24,
            "image_size": 128,
            **archive.made_with,
        }
        prepare = {
            "archive": archive.layout,
            "input_dir": scans,
            "output_dir": dataset,
            "image_size": 64,
            "splits": archive.splits,
            "pseudonym_key_file": data / "pseudonym_key",
            **archive.prepared_with,
        }
        if study.sizes.windows:
            prepare["window"] = tuple(f"{w[0]:g},{w[1]:g}" for w in study.sizes.windows)
        if archive.layout == "rsna_pe":
            prepare["attributes_csv"] = scans / "attributes.csv"
        stages = (
            Stage(f"{name}: make scans", "data_prep.phantom", make),
            Stage(f"{name}: prepare", "data_prep.prepare", prepare),
        )
        cells.append(Cell(f"data_{name}", (), stages, dataset / "preparation.json"))
    return cells


def pretraining_cells(study: Study, arms: Sequence[str]) -> list[Cell]:
    """Pretrain the arms that are not given: the mask sizes up to the largest, and single pretexts.

    Raises:
      InputError: an arm without weights, where the data are the user's.
    """
    arms = list(dict.fromkeys(PARTS.get(arm, (arm,))[0] for arm in arms))
    wanted = [arm for arm in arms if arm in PRETEXTS and arm not in study.pretrained]
    if not study.sizes.archives:
        if wanted:
            raise InputError(
                f"no weights for {', '.join(wanted)}: give --pretrained={wanted[0]}=RUN for each, "
                "or choose --arms"
            )
        return []
    chain = list(MASKED)
    last = max((chain.index(arm) for arm in wanted if arm in MASKED), default=-1)
    cells = []
    for arm in (*chain[: last + 1], *(arm for arm in wanted if arm not in MASKED)):
        mask, times = ALONE.get(arm, ("masked_20" if arm in VARIANTS else arm, 1))
        recipe = "masked_region" if mask in MASKED else arm
        before = (
            f"pretrain_{chain[chain.index(arm) - 1]}" if arm in MASKED and arm != chain[0] else ""
        )
        fields = {"dataset": study.workdir / "data" / "pretraining"}
        fields |= {"mask.fraction": MASKED[mask]} if mask in MASKED else {}
        fields |= VARIANTS.get(arm, {})
        if before:
            fields |= {"init_from": study.workdir / "runs" / before, "init_checkpoint": "last"}
        if arm in TODAYS:
            steps = study.equal_steps(recipe)
        else:  # 0 leaves them to the recipe
            steps = study.sizes.pretraining_steps
            if times > 1 and not steps:
                steps = load_recipe(recipe, study.sizes.size).num_steps
        fields |= schedule(times * steps)
        after = (before or "data_pretraining",)
        cells.append(study.cell(f"pretrain_{arm}", recipe, fields, after))
    return cells


def schedule(steps: int) -> dict[str, int]:
    """The fields of a training of so many steps; empty for 0, where the recipe decides."""
    return {"num_steps": steps, "eval_every": steps} if steps else {}


class Point(NamedTuple):
    """One cell of the grid.

    arm: name in `TITLES` or in `Study.pretrained`.
    fraction: of the training studies.
    seed: of weights, data order and subset.
    steps: of the training; 0 takes the number of the recipe.
    """

    arm: str
    fraction: float
    seed: int
    steps: int

    def cell_name(self, kind: str) -> str:
        """`pe_masked_20_0.25_s1_150`."""
        steps = f"_{self.steps}" if self.steps else ""
        return f"{kind}_{self.arm}_{self.fraction:g}_s{self.seed}{steps}"


def grid_cells(
    study: Study, kind: str, arms: Sequence[str]
) -> tuple[list[Cell], dict[Point, Cell]]:
    """The cells of a figure in order, and the cells of its grid by their point.

    Args:
      study: whose preset has the shares, seeds and steps.
      kind: `pe` or `nodules`, the downstream recipe.
      arms: of the grid.

    Returns:
      all cells; and the grid, smallest shares first: a stopped study then has complete shares.
    """
    points = [
        Point(arm, fraction, seed, steps)
        for steps in study.sizes.steps[kind]
        for fraction in study.sizes.fractions
        for seed in study.sizes.seeds
        for arm in arms
        if arm not in study.sizes.two_shares
        or fraction in (min(study.sizes.fractions), max(study.sizes.fractions))
    ]
    cells = keeping([downstream_cell(study, kind, point) for point in points], study.kept)
    before = [*data_cells(study, ("pretraining", kind)), *pretraining_cells(study, arms)]
    return [*keeping(before, study.kept), *cells], dict(zip(points, cells, strict=True))


def hours_in_words(study: Study) -> str:
    """The hours of all figures of fine-tuned models, each and together: cells that they share count
    once. "" for a preset that takes the user's data."""
    if not study.sizes.archives:
        return ""
    lines, together = [], {}
    for name, (kind, arms) in FIGURES.items():
        of_kind = study._replace(dataset=study.workdir / "data" / kind)
        wanted = [arm for arm in arms if arm not in study.sizes.left_out]
        cells = [c for c in grid_cells(of_kind, kind, wanted)[0] if c.kept is not None]
        together |= {cell.name: cell for cell in cells}
        lines.append(_hours_line(name, cells, study.workdir))
    return "\n".join([*lines, _hours_line("together", list(together.values()), study.workdir)])


def _hours_line(name: str, cells: Sequence[Cell], workdir: Path) -> str:
    took, ahead, unknown = runner.reckoned_hours(cells, workdir, SECONDS_A_STEP)
    missing = sum(not cell.is_complete() for cell in cells)
    more = f", and {unknown} cells whose recipe was not measured yet" if unknown else ""
    return (
        f"# {name}: {len(cells)} cells, {len(cells) - missing} took {took:.2f} hours (measured), "
        f"{missing} are missing: {ahead:.2f} hours (reckoned){more}"
    )


def downstream_cell(study: Study, kind: str, point: Point) -> Cell:
    """The cell of a point: fine-tune an arm on the downstream dataset."""
    recipe = OTHER_NETWORKS.get(point.arm, kind)
    fields = {"dataset": study.dataset, "train_fraction": point.fraction, "seed": point.seed}
    fields |= schedule(point.steps) | CONTROLS.get(point.arm, {})
    if "normalize" in VARIANTS.get(point.arm, {}):  # an encoder keeps its grey map
        fields["normalize"] = VARIANTS[point.arm]["normalize"]
    after = [f"data_{kind}"] if study.sizes.archives else []
    start, *scope = PARTS.get(point.arm, (point.arm,))
    if start in PRETEXTS or start in study.pretrained:
        fields |= {"init_from": study.run_of(start), "init_checkpoint": "last"}
        fields |= {"init_scope": scope[0]} if scope else {}
        after += [] if start in study.pretrained else [f"pretrain_{start}"]
    name, own_network = point.cell_name(kind), point.arm in OTHER_NETWORKS
    return study.cell(name, recipe, fields, tuple(after), own_network=own_network)


def define_flags(arms: Sequence[str]) -> None:
    """Flags that all downstream studies share; only where a study is the program."""
    flags.DEFINE_enum("preset", "phantom", list(PRESETS), "Size of the study, and whose data.")
    flags.DEFINE_string("workdir", None, "Folder of the studies: data, runs, results, figures.")
    given.define_results_flag()
    flags.DEFINE_string("dataset", None, "Downstream dataset directory (--preset=paper).")
    flags.DEFINE_multi_string(
        "pretrained", [], "NAME=RUN: weights of an arm; NAME is one of --arms or a new one."
    )
    flags.DEFINE_list(
        "arms", list(arms), "Arms, separated by commas; by default the arms of the preset."
    )
    flags.DEFINE_list("fractions", [], "Shares of the training studies; by default the preset's.")
    flags.DEFINE_list("seeds", [], "Seeds; by default the preset's.")
    flags.DEFINE_list(
        "cells", [], "Cells to run, separated by commas; by default all that are missing."
    )


def study_of_flags(verb: str, kind: str) -> Study:
    """The study of the command line.

    Args:
      verb: `plan`, `run` or `draw`.
      kind: of the dataset: `pe`, `nodules` or `attributes`.

    Raises:
      InputError: a flag is missing, or names an arm, a run or a dataset that does not exist.
    """
    flag = flags.FLAGS
    if not flag.workdir:
        raise InputError("give --workdir=DIR")
    sizes, workdir = PRESETS[flag.preset], given.local_study(flag.workdir)
    for name, kind_of in (("fractions", float), ("seeds", int)):
        try:
            values = tuple(kind_of(value) for value in flag[name].value)
        except ValueError:
            raise InputError(
                f"--{name}={','.join(flag[name].value)}: give numbers separated by commas"
            ) from None
        sizes = sizes._replace(**{name: values}) if values else sizes
    if not flag["arms"].present:
        flag["arms"].value = [arm for arm in flag.arms if arm not in sizes.left_out]
    pretrained = {}
    for text in flag.pretrained:
        name, _, run = text.partition("=")
        path = stores.local_path(run, f"--pretrained={name}") if run else None
        if not (path and (path / "config.json").is_file()):
            raise InputError(
                f"--pretrained={text}: give NAME=RUN with a run directory of ctssl_jax.train"
            )
        pretrained[name] = path.resolve()
    unknown = [arm for arm in flag.arms if arm not in TITLES and arm not in pretrained]
    if unknown:
        raise InputError(
            f"--arms: {unknown[0]} is not known; choose from {', '.join(TITLES)}, or give "
            "--pretrained"
        )
    if sizes.archives:
        dataset = workdir / "data" / kind
    elif flag.dataset or verb == "draw":
        dataset = given.local_dataset(flag.dataset or "")
    else:
        raise InputError("give --dataset=DIR, made by data_prep.prepare")
    kept = given.results_folder(workdir)
    return Study(flag.preset, sizes, workdir, dataset, pretrained, kept)


def act(
    verb: str, module: str, study: Study, cells: Sequence[Cell], lists: Sequence[str] = ()
) -> None:
    """`plan` or `run` a study's cells.

    Args:
      verb: `plan` or `run`.
      module: of the study, whose `run` verb runs a cell.
      study: the study.
      cells: of the study.
      lists: names of its own flags that hold lists.
    """
    flag = flags.FLAGS
    options = [
        f"--preset={study.preset}",
        f"--workdir={study.workdir}",
        f"--arms={','.join(flag.arms)}",
    ]
    options += [f"--dataset={study.dataset}"] if flag.dataset else []
    options += [f"--pretrained={text}" for text in flag.pretrained]
    options += [
        f"--{name}={','.join(flag[name].value)}"
        for name in ("fractions", "seeds", *lists)
        if flag[name].value
    ]
    options += [f"--results={study.kept}"] if flag.results else []
    if verb == "plan":
        runner.plan(cells, module, options, study.workdir)
        print(hours_in_words(study), flush=True)
    else:
        runner.check_chosen(cells, flags.FLAGS.cells)
        for folder in (study.workdir, study.kept):
            given.record_settings(folder, {"preset": study.preset})
        if study.sizes.archives:
            key = study.workdir / "data" / "pseudonym_key"
            key.parent.mkdir(exist_ok=True)
            key.write_text(SYNTHETIC_KEY)
        else:
            fingerprint = Dataset.open(study.dataset).fingerprint
            for cell in cells:
                kept.check_as_now(cell, fingerprint)
        runner.run(cells, flags.FLAGS.cells, study.workdir, here=True)
        runner.suggest_after("run", module, options)
