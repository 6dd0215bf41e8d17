"""Inputs of `ctssl_jax.embed`: a prepared dataset, or raw scans, which get pseudonyms."""

import collections
import csv
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctssl_jax.evaluation.measured_run import MeasuredRun
from ctssl_jax.runs.run import Run
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS, notes_on_rules
from data_prep.privacy import pseudonyms
from data_prep.raw.scans import (
    PreparedVolume,
    Refused,
    ScanPlan,
    prepared_volume,
    read_scan,
    refused_series,
)
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import VERSION, Rules
from data_prep.system.errors import InputError
from data_prep.system.files import as_cell, written_whole
from data_prep.system.stores import local_path
from data_prep.system.workers import WorkerDied, WorkerPool


class Job(NamedTuple):
    """One volume to embed.

    volume_id: its pseudonym; for raw scans the pseudonym of the preferred reconstruction.
    digest: of the volume, as far as its embedding depends on it.
    num_slices: for raw scans the expected number.
    source: an exam, or a row of `volumes.csv`.
    """

    volume_id: str
    digest: str
    num_slices: int
    source: Any


class InputVolume(NamedTuple):
    """A volume on its way to the model."""

    volume_id: str
    patient_id: str
    split: str
    position_mm: Any  # [S] float
    prepared: PreparedVolume


class Input(NamedTuple):
    """An opened input.

    jobs: in the order of the results.
    read: jobs -> their volumes or refusals, in the order of the jobs.
    facts: of the results, with `key_fingerprint` of the pseudonyms.
    refused: series that are refused by their headers.
    not_images: reason -> number of files that are not images.
    """

    jobs: list[Job]
    read: Callable[[list[Job]], Iterator[InputVolume | Refused]]
    facts: dict[str, Any]
    refused: list[Refused]
    not_images: dict[str, int]


def open_dataset(run: Run, dataset: Path, split: str | None) -> Input:
    """A prepared dataset; only one split, if `split` is not None.

    Raises:
      InputError: it was prepared otherwise than the data of the run (see `MeasuredRun.open`), or
        the split does not exist.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"--split={split}: choose one of {', '.join(SPLITS)}, or leave it out")
    measured = MeasuredRun.open(run, dataset, () if split is None else (split,), "--input")
    opened, preparation = measured.dataset, measured.dataset.preparation
    notes = notes_on_rules(run.preparation, preparation)
    rows = [row for name in SPLITS if split in (None, name) for row in opened.volumes(name)]
    return Input(
        jobs=[
            Job(name, f"{opened.fingerprint} {name}", row["num_slices"], row)
            for row in rows
            for name in [row["volume_id"]]
        ],
        read=functools.partial(_read_dataset, opened, list(measured.channels)),
        facts={
            "input": "dataset",
            "dataset_fingerprint": opened.fingerprint,
            "split": split,
            "synthetic": preparation["synthetic"],
            "key_fingerprint": preparation["key_fingerprint"],
            **({"notes": notes} if notes else {}),
        },
        refused=[],
        not_images={},
    )


def _read_dataset(dataset: Dataset, channels: list[int], jobs: list[Job]) -> Iterator[InputVolume]:
    sources = {name: dataset.source(name) for name in {job.source["split"] for job in jobs}}
    for job in jobs:
        row = job.source
        records = [
            sources[row["split"]][row["first_record"] + index] for index in range(row["num_slices"])
        ]
        prepared = PreparedVolume(
            np.stack([record["image"][..., channels] for record in records]),
            tuple(map(int, row["gap_positions"].split())),
            row["lung_box"],
        )
        position_mm = np.array([record["position_mm"] for record in records])
        yield InputVolume(row["volume_id"], row["patient_id"], row["split"], position_mm, prepared)


def open_scans(
    plan: ScanPlan,
    rules: Rules,
    key: bytes,
    windows: tuple[tuple[float, float], ...],
    image_size: int,
    num_workers: int,
) -> Input:
    """Raw scans, ordered by pseudonyms, so that results do not show the order of the archive.

    Args:
      plan, rules: see `data_prep.raw.scans.plan_scans`.
      key: of the pseudonyms.
      windows, image_size: of the model.
      num_workers: processes that decode ahead of the model; 0 takes this process alone.
    """
    jobs = []
    for exam in plan.exams:
        files = [
            (*header.source, header.frame) for candidate in exam for header in candidate.all_headers
        ]
        digest = pseudonyms.private_digest(key, "embedding", json.dumps(files))
        jobs.append(Job(pseudonyms.volume_id(key, exam[0]), digest, len(exam[0].headers), exam))
    return Input(
        jobs=sorted(jobs, key=lambda job: job.volume_id),
        read=lambda jobs: _read_scans(
            [(plan.input_dir, job.source, windows, image_size, rules, key) for job in jobs],
            [job.volume_id for job in jobs],
            num_workers,
        ),
        facts={
            "input": "scans",
            "rules": dataclasses.asdict(rules),
            "rules_version": VERSION,
            "synthetic": any(
                header.quality_control_subject for exam in plan.exams for header in exam[0].headers
            ),
            "key_fingerprint": pseudonyms.key_fingerprint(key),
        },
        refused=refused_series(plan, key),
        not_images=dict(
            collections.Counter(entry.reason for entry in plan.not_images).most_common()
        ),
    )


def _read_scans(
    tasks: list[tuple], volume_ids: list[str], num_workers: int
) -> Iterator[InputVolume | Refused]:
    if num_workers == 0 or len(tasks) < 2:
        for task in tasks:
            yield read_volume(*task)
        return
    with WorkerPool(min(num_workers, len(tasks))) as pool:
        for volume_id, (_, result) in zip(volume_ids, pool.run(read_volume, tasks), strict=True):
            if isinstance(result, WorkerDied):
                result = Refused(volume_id, FAILED_FOR_NOW, "the worker process died")
            yield result


def read_volume(*arguments: Any) -> InputVolume | Refused:
    """The input of the model for a scan, which its HU are not part of; arguments of `read_scan`."""
    scan = read_scan(*arguments)
    if isinstance(scan, Refused):
        return scan
    return InputVolume(scan.volume_id, scan.patient_id, "", scan.position_mm, prepared_volume(scan))


# ---- Pseudonyms ----------------------------------------------------------------------------------


def read_key(pseudonym_key_file: str | Path | None) -> bytes | None:
    """The key in the file of the user; None without a file.

    Raises:
      InputError: the file cannot be read, or its key is too short.
    """
    if not pseudonym_key_file:
        return None
    try:
        return pseudonyms.read_key(local_path(pseudonym_key_file, "--pseudonym_key_file"))
    except InputError as error:
        raise InputError(f"--pseudonym_key_file={error}") from None


def keep_audit(output: Path, plan: ScanPlan, key: bytes | None) -> bytes:
    """Make the private folder OUTPUT-audit with the key and sources.csv, the files of each volume.

    Args:
      output: the folder lies beside it.
      plan: of the scans.
      key: of the user; None takes the key of the folder, which is made if it does not exist.

    Returns:
      The key.

    Raises:
      InputError: the folder cannot be made, or its key cannot be used.
    """
    audit_dir, key = open_audit(output, key)
    rows = []
    for candidate in (candidate for exam in plan.exams for candidate in exam):
        volume_id = pseudonyms.volume_id(key, candidate)
        rows += [(volume_id, "", source) for source in pseudonyms.sources_of(candidate.all_headers)]
    for series in (pseudonyms.rejected_row(key, rejection) for rejection in plan.rejections):
        rows += [(series.series_id, series.reason, source) for source in series.sources]
    rows += [("", entry.reason, entry.source) for entry in plan.not_images]
    sources = audit_dir / "sources.csv"
    with (
        written_whole(sources) as temporary,
        open(temporary, "w", newline="", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("volume_id", "refused_by_headers", "path", "member"))
        writer.writerows(
            (name, reason, as_cell(source.path), as_cell(source.member))
            for name, reason, source in sorted(rows)
        )
    return key


def open_audit(output: Path, key: bytes | None) -> tuple[Path, bytes]:
    """The private folder OUTPUT-audit, made if it does not exist, and the key; arguments and errors
    as for `keep_audit`."""
    audit_dir = pseudonyms.default_audit_dir(output)
    try:
        audit_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        audit_dir.chmod(0o700)
        key = key or pseudonyms.make_key(audit_dir / pseudonyms.KEY_FILE)
    except OSError as error:
        raise InputError(
            f"--output: cannot make {audit_dir} ({error.strerror}); choose another place"
        ) from None
    except InputError as error:
        raise InputError(f"{error}; remove it, and a new one is made") from None
    return audit_dir, key
