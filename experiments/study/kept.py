"""Results that are kept: a small JSON a cell, from which every table and figure is drawn anywhere.

They hold numbers only: measures, scores of each volume, and what the model said of each item where
arms are compared in pairs. Patients are numbered, p0, p1, ... by their pseudonyms in the scored
split; no pseudonym, path or picture is in them.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, read_json, write_text

from . import results
from .cells import Cell, Settings, Stage

# Fields of RESULT.json that are kept as they are.
FIELDS = (
    *("kind", "recipe", "task", "encoder", "synthetic", "split", "seed", "label", "classes"),
    *("num_patients_seen_in_training", "checkpoint_step", "checkpoint_score"),
    *("num_train_studies", "num_train_slices", "num_slices", "dataset_fingerprint"),
    *("metrics", "embedding", "codebook", "warnings", "chosen", "device", "versions"),
)
CONFIG = ("image_size", "num_steps", "batch_size")
CURVES = {  # kind of report -> what is kept of it
    "train": ("loss", "slices_per_second"),
    "validation": (
        *("loss", "position_r2", "order_auroc", "neighbour_recall"),
        *("effective_rank", "pairwise_cosine", "relative_sd", "uniformity"),
    ),
}
LOGIT_LIMIT = 30.0  # of a kept logit: float32 probabilities reach no farther


def keep(cell: Cell, seconds: float | None) -> dict[str, Any]:
    """Write the result of a complete cell as `cell.kept`; returns its content.

    Args:
      cell: whose `result` is there.
      seconds: that the cell took; None where that is not known.

    Raises:
      InputError: the result is damaged.
    """
    result = read_json(cell.result)
    content: dict[str, Any] = {name: result[name] for name in FIELDS if name in result}
    content["cell"], content["seconds"] = cell.name, seconds
    content["baselines"] = {
        name: {metric: value["mean"] for metric, value in measures.items()}
        for name, measures in result.get("baselines", {}).items()
    }
    config = result.get("config", {})
    content["config"] = {name: config[name] for name in CONFIG if name in config}
    for stage in cell.stages:
        if stage.recipe:
            content |= _made_of(cell, stage)
            content["training"] = _training(stage)
    if cell.result.with_suffix(".csv").exists():
        content["volumes"] = _volumes(cell.result.with_suffix(".csv"))
    if cell.result.with_suffix(".predictions.npz").exists():
        content["predictions"] = _predictions(cell.result)
    make_folder(cell.kept.parent, "--results")
    write_text(cell.kept, json.dumps(_rounded(content), separators=(",", ":")) + "\n")
    return content


def _made_of(cell: Cell, stage: Stage) -> dict[str, Any]:
    """`fields` of a training without its paths, as JSON has them; and `start`, a digest of the
    configuration of a run that was given to the study."""
    fields = {k: v for k, v in stage.recipe.fields.items() if not isinstance(v, Path)}
    content = {"fields": json.loads(json.dumps(fields))}
    start = stage.recipe.fields.get("init_from")
    if start and not cell.after and (Path(start) / "config.json").exists():
        config = read_json(Path(start) / "config.json")
        own = {k: v for k, v in config.items() if k not in ("dataset", "init_from")}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        content["start"] = digest.hexdigest()
    return content


def check_as_now(cell: Cell, fingerprint: str = "") -> None:
    """Refuse the kept result of a cell that would be made otherwise today.

    Args:
      cell: whose fields are compared, and a run that was given for it to start from.
      fingerprint: of the dataset, where it was given to the study.

    Raises:
      InputError: names the file and what differs.
    """
    if cell.kept is None or not cell.kept.exists():
        return
    content = read_json(cell.kept)
    for stage in cell.stages:
        if not stage.recipe or "fields" not in content:
            continue
        now, differs = _made_of(cell, stage), ""
        before, after = content["fields"], now["fields"]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                differs = f"with {name}={before.get(name)}, not {after.get(name)}"
        if "start" in content and now.get("start", content["start"]) != content["start"]:
            differs = f"from another run than {stage.recipe.fields['init_from']}"
        if fingerprint and content["dataset_fingerprint"] != fingerprint:
            differs = f"on another dataset than {stage.recipe.fields['dataset']}"
        if differs:
            raise InputError(
                f"{cell.kept}: was made {differs}; give another --results and --workdir, or remove "
                "it"
            )


def step_flops(config: ml_collections.ConfigDict) -> int:
    """Floating-point operations of a training step: all slices, views, projector and teacher,
    forward and backward; counted from the shapes of the model."""
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.tasks import interface
    from ctssl_jax.tasks.table import get_task

    return config.batch_size * interface.step_flops(get_task(config.task), config)


def _training(stage: Stage) -> dict[str, Any]:
    """`step_flops`, and what a run reported: `train` and `validation` -> name -> a number a report,
    and `step`."""
    from ctssl_jax.runs.reports import read_reports

    content: dict[str, Any] = {"step_flops": step_flops(stage.recipe.config())}
    for kind, names in CURVES.items():
        reports = read_reports(Path(stage.options["workdir"]), kind)
        content[kind] = {
            name: [report.get(name) for report in reports]
            for name in ("step", *names)
            if any(name in report for report in reports)
        }
    return content


def _volumes(path: Path) -> dict[str, list]:
    """Scores of each volume and the number of its patient."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    order = {name: number for number, name in enumerate(sorted({r["patient_id"] for r in rows}))}
    content: dict[str, list] = {"patient": [order[row["patient_id"]] for row in rows]}
    for name in rows[0] if rows else ():
        if name not in ("volume_id", "patient_id"):
            content[name] = [float(row[name]) if row[name] else None for row in rows]
    return content


def _predictions(result: Path) -> dict[str, list]:
    from ctssl_jax.evaluation import predictions

    found = predictions.read(result)
    _, patient = np.unique(found.patient_id, return_inverse=True)
    if found.target_px is not None:  # Dice is a mean over the slices with a true mask
        kept = found.target_px > 0
        counts = (found.intersection_px, found.predicted_px, found.target_px)
        names = ("intersection_px", "predicted_px", "target_px")
        return {"patient": patient[kept].tolist()} | {
            name: value[kept].astype(int).tolist()
            for name, value in zip(names, counts, strict=True)
        }
    content = {"patient": patient.tolist(), "label": found.label.tolist()}
    chances = found.probabilities.astype(np.float64)
    if chances.shape[1] == 2:
        with np.errstate(divide="ignore"):
            logits = np.log(chances[:, 1]) - np.log(chances[:, 0])
        logits = np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)
        return content | {"logit": np.round(logits, 2).tolist()}
    return content | {"probabilities": np.round(chances, 5).tolist()}


def _rounded(value: Any) -> Any:
    """Numbers with six digits; undefined ones are null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def predictions_of(cell: Cell):
    """What the model of a complete cell said of each item, as `ctssl_jax.evaluation.predictions`;
    of a kept result, the slices of a segmentation are those with a true mask.

    Raises:
      InputError: the cell kept none.
    """
    from ctssl_jax.evaluation import predictions
    from ctssl_jax.evaluation.predictions import Predictions

    if cell.kept is None or not cell.kept.exists():
        return predictions.read(cell.result)
    content = read_json(cell.kept).get("predictions")
    if content is None:
        raise InputError(f"{cell.kept}: holds no predictions; remove it and run the cell again")
    patient = np.array([f"p{number}" for number in content["patient"]])
    fields = {
        name: np.asarray(values, np.float32 if name.endswith("_px") else np.int32)
        for name, values in content.items()
        if name not in ("patient", "logit", "probabilities")
    }
    if "logit" in content:
        positive = 1 / (1 + np.exp(-np.asarray(content["logit"], np.float64)))
        fields["probabilities"] = np.stack([1 - positive, positive], axis=1)
    elif "probabilities" in content:
        fields["probabilities"] = np.asarray(content["probabilities"])
    return Predictions(patient, patient, np.arange(len(patient)), **fields)


def pooled(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of a cell in all folds as one: measures over the volumes of all folds.

    Args:
      folds: kept results of cells `fold_K/...` with `volumes`; their patients differ from fold to
        fold.

    Returns:
      The first result with `metrics` over all volumes, and intervals by all patients.
    """
    from ctssl_jax.evaluation.measured_run import summaries

    volumes = [fold["volumes"] for fold in folds]
    numbers = [fold["cell"].split("/")[0].removeprefix("fold_") for fold in folds]
    patients = [
        f"f{number}p{k}"
        for number, of_fold in zip(numbers, volumes, strict=True)
        for k in of_fold["patient"]
    ]
    names = [name for name in volumes[0] if name not in ("patient", "num_slices")]
    by_volume = {
        name: np.array(
            [np.nan if v is None else v for fold in volumes for v in fold.get(name, ())], float
        )
        for name in names
        if all(name in fold for fold in volumes)
    }
    defined = {name: values for name, values in by_volume.items() if not np.isnan(values).all()}
    return {
        **folds[0],
        "metrics": summaries(defined, patients),
        "seconds": sum(fold["seconds"] or 0 for fold in folds),
        "num_patients_seen_in_training": _most([f["num_patients_seen_in_training"] for f in folds]),
        "embedding": _means([fold.get("embedding") for fold in folds]),
        "codebook": _means([fold.get("codebook") for fold in folds]),
        "baselines": _baselines(folds),
        "warnings": list(
            dict.fromkeys(text for fold in folds for text in fold.get("warnings", ()))
        ),
        "volumes": {"patient": patients} | {n: v.tolist() for n, v in by_volume.items()},
        "folds": len(folds),
    }


def results_of(
    settings: Settings, cells_of: Callable[[Settings], Sequence[Cell]]
) -> dict[str, dict[str, Any] | None]:
    """Name of a cell -> its results, None while they are missing; of folds, those of all patients
    of the folds that are there.

    Args:
      settings: of the study.
      cells_of: settings of one dataset -> its cells.
    """
    cells = {cell.name: cell for cell in settings.study(cells_of)}
    names = [cell.name for cell in cells_of(settings._replace(folds=0, kept=None))]
    if not settings.folds:
        return {name: results.read_result(cells[name]) for name in names}
    found: dict[str, dict[str, Any] | None] = {}
    for name in names:
        of_folds = [cells[f"fold_{fold}/{name}"] for fold in range(settings.folds)]
        there = [read_json(cell.kept) for cell in of_folds if cell.kept.exists()]
        found[name] = pooled(there) if there else None
    return found


def folds_in_words(settings: Settings, found: dict[str, dict[str, Any] | None]) -> str:
    """Whether every patient was tested; empty without folds."""
    if not settings.folds:
        return ""
    some = [
        f"{name} {result['folds']}"
        for name, result in found.items()
        if result and result["folds"] < settings.folds
    ]
    text = f" {settings.folds} folds of patients, each patient tested once"
    return text + (f"; NOT ALL FOLDS ARE THERE of {', '.join(some)}." if some else ".")


def _most(numbers: Sequence[int | None]) -> int | None:
    """The most that are known; None where nothing is known of a fold, and nothing bad of others."""
    known = max((number for number in numbers if number is not None), default=0)
    return known or (None if None in numbers else 0)


def _baselines(folds: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the volumes of all folds."""
    weights = [len(fold["volumes"]["patient"]) for fold in folds]
    of_folds = [fold.get("baselines", {}) for fold in folds]
    return {
        name: {
            metric: float(np.average([one[name][metric] for one in of_folds], weights=weights))
            for metric in measures
        }
        for name, measures in of_folds[0].items()
        if all(name in one for one in of_folds)
    }


def _means(parts: Sequence[dict | None]) -> dict | None:
    if any(part is None for part in parts):
        return None
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
