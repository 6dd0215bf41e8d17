r"""How well a trained model tells flipped slices, every patient tested once.

    python -m experiments.bench.patient_folds --dataset=DATASET --workdir=FOLDS

The patients of DATASET, of all its splits, are dealt to four folds by their sorted pseudonyms. For
each fold `flip:small` learns from the patients of the other three and is scored on the fold's own,
slices averaged by volume. FOLDS gets a dataset and a run a fold, and `result.json`. Killed at any
moment, the same command continues.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absl import app, flags

from ctssl_jax.runs.reports import read_reports
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    make_preparation,
    shard_name,
)
from data_prep.dataset.storage import encode_record, write_records, write_table
from data_prep.dataset.tfds import complete
from data_prep.system.files import file_sha256, folder_written_whole, read_json, write_text
from experiments.study.runner import run_stage

NUM_FOLDS = 4
# 97.5 % point of Student's t with 3 degrees of freedom
_T = 3.182


def deal(patients: Iterable[str], num_folds: int = NUM_FOLDS) -> list[list[str]]:
    """Pseudonyms in so many folds of nearly equal size."""
    ordered = sorted(patients)
    return [ordered[fold::num_folds] for fold in range(num_folds)]


def write_split(dataset: Dataset, folder: Path, split_of: Mapping[str, str]) -> None:
    """The same slices, without labels and masks, under other splits.

    Args:
      dataset: of any splits.
      folder: of the new dataset: an empty one.
      split_of: split by patient; patients without one are left out.
    """
    records: dict[str, list[bytes]] = {}
    rows = []
    for old in dataset.preparation["splits"]:
        source = dataset.source(old)
        for volume in dataset.volumes(old):
            if (split := split_of.get(volume["patient_id"])) is None:
                continue
            kept = records.setdefault(split, [])
            rows.append(volume | {"split": split, "first_record": len(kept)})
            for index in range(volume["num_slices"]):
                record = dict(source[volume["first_record"] + index])
                record.pop("mask", None)
                kept.append(encode_record(**record))
    lengths = {
        split: [write_records(folder / shard_name(split, 0), kept)]
        for split, kept in records.items()
    }
    write_table(folder / VOLUMES_FILE, VOLUME_COLUMNS, rows)
    same = ("archive", "windows", "image_size", "key_fingerprint", "options", "versions", "counts")
    preparation = make_preparation(
        volumes=rows,
        shard_lengths=lengths,
        labels={},
        masks=None,
        **{name: dataset.preparation[name] for name in same},
    )
    complete(folder, preparation, (), {p.name: file_sha256(p) for p in sorted(folder.iterdir())})


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Where the mean of four other folds lies in 95 of 100 cases, from the scores of four."""
    mean = statistics.mean(scores)
    half = _T * statistics.stdev(scores) * math.sqrt(2 / len(scores))
    return mean - half, min(1.0, mean + half)


def main(argv: list[str]) -> None:
    """Command line."""
    flag = flags.FLAGS
    dataset, workdir = Dataset.open(flag.dataset), Path(flag.workdir)
    folds = deal({volume["patient_id"] for volume in dataset.volumes()})
    curves, scores = [], []
    for number, held_out in enumerate(folds):
        folder, run = workdir / f"fold{number}", workdir / f"run{number}"
        score = workdir / f"score{number}.json"
        if not folder.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            splits = {
                patient: "validation" if patient in held_out else "train"
                for fold in folds
                for patient in fold
            }
            with folder_written_whole(folder, workdir / f".fold{number}") as temporary:
                write_split(dataset, temporary, splits)
        if not score.exists():
            run_stage(
                f"fold {number}: learn",
                "ctssl_jax.train",
                "--config=flip:small",
                f"--config.dataset={folder}",
                f"--config.image_size={dataset.preparation['image_size']}",
                f"--config.num_steps={flag.num_steps}",
                f"--config.eval_every={max(1, flag.num_steps // 5)}",
                f"--workdir={run}",
            )
            run_stage(
                f"fold {number}: score",
                "ctssl_jax.evaluate",
                f"--workdir={run}",
                "--split=validation",
                "--checkpoint=last",
                f"--output={score}",
            )
        scores.append(read_json(score)["metrics"]["auroc"]["mean"])
        curves.append({r["step"]: r["auroc"] for r in read_reports(run, "validation")})
    low, high = interval(scores)
    result = {"num_steps": flag.num_steps, "auroc": scores, "interval": [low, high]}
    write_text(workdir / "result.json", json.dumps({**result, "curves": curves}, indent=1) + "\n")
    print(f"flip AUROC {statistics.mean(scores):.3f}, of folds {scores}, {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of the folds.", required=True)
    flags.DEFINE_integer("num_steps", 750, "Training steps, of 16 slices each.")
    app.run(main)
