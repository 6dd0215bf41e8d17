"""What a model's page says beside its manifest's settings: the cohort that it was trained on, as
counts, and its training curve. All of it is free of patients and of links to them."""

import re
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ctssl_jax.runs.reports import read_reports
from ctssl_jax.runs.run import Run
from data_prep.dataset.cohort import cohort_table
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError

PICTURE = "training.png"
LEAST_CELL = 5  # smaller counts of some patients or volumes are not told
_SMALL = ("Patients", "Sex", "Ethnic group", "Manufacturer", "Noted")
_MOST_POINTS = 200  # of a curve


def training_dataset(run: Run, dataset: str | Path | None) -> Dataset:
    """The dataset that a run was trained on.

    Args:
      run: the run.
      dataset: where it is now; None takes the place of the training.

    Raises:
      InputError: it is not there, or other data.
    """
    name = run.config.dataset if dataset is None else dataset
    opened = Dataset.open(name)
    if opened.fingerprint != run.preparation["fingerprint"]:
        raise InputError(
            f"--dataset={name} is not the data that the run was trained on (another fingerprint); "
            "give that dataset"
        )
    return opened


def trained_volumes(run: Run, dataset: Dataset, split: str) -> list[dict[str, Any]]:
    """The volumes of the patients that a run has read of a split."""
    patients = set(run.patients[split])
    return [row for row in dataset.volumes(split) if row["patient_id"] in patients]


def cohort(run: Run, dataset: Dataset) -> list[list[str]]:
    """[group, item, value] of the training volumes, as `ctssl describe` counts them.

    Counts of fewer than `LEAST_CELL` patients or volumes of a kind are told as that.
    """
    rows = cohort_table(trained_volumes(run, dataset, "train"), [])
    return [
        [group, item, _told(value) if group in _SMALL and item != "Patients" else value]
        for group, item, value in rows
        if group != "Split"
    ]


def _told(value: str) -> str:
    """A value without small numbers, of `3 volumes` or `61.0 +/- 3.1 years (of 3 patients)`."""
    found = re.fullmatch(r"(\d+)(| volumes)", value) or re.search(r"\(of (\d+) patients\)", value)
    if found and int(found[1]) < LEAST_CELL:
        return f"fewer than {LEAST_CELL}"
    return value


def curve(run: Run) -> dict[str, Any]:
    """The curves of a training, from its reports: `loss` of the training, and on validation slices
    the score that chooses the best checkpoint, each as [step, value]; empty without reports."""
    if not (run.workdir / "metrics.jsonl").is_file():
        return {}
    score = run.config.get("best_by") or "loss"
    lines = {
        "loss": [
            [line["step"], line["loss"]]
            for line in read_reports(run.workdir, "train")
            if "loss" in line
        ],
        "validation": [
            [line["step"], line[score]]
            for line in read_reports(run.workdir, "validation")
            if score in line
        ],
    }
    if not any(lines.values()):
        return {}
    return {"score": score} | {name: _thinned(points) for name, points in lines.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Evenly spaced points with the last one, so that a page of a long training stays small."""
    stride = -(-len(points) // _MOST_POINTS)
    return points[::-1][::stride][::-1] if points else []


def draw_curve(path: Path, curves: dict[str, Any], step: int, title: str) -> None:
    """Write the curves as PNG, with a line at the step of the exported checkpoint.

    Args:
      path: file.
      curves: of `curve`, not empty.
      step: of the exported checkpoint.
      title: of the picture.
    """
    shown = [
        (name, words)
        for name, words in (("loss", "training loss"), ("validation", curves["score"]))
        if curves[name]
    ]
    figure = Figure(figsize=(4.6 * len(shown), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axis, (name, words) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        steps, values = zip(*curves[name], strict=True)
        axis.plot(steps, values, marker="." if len(steps) < 40 else None, linewidth=1.2)
        axis.axvline(
            step, color="0.5", linestyle=":", linewidth=1, label=f"this model, step {step:,}"
        )
        where = " (validation slices)" if name == "validation" else ""
        axis.set(xlabel="step", title=words + where)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
