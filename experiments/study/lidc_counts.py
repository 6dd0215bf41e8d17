"""Counts of the readers' annotations of LIDC-IDRI, as in the paper's Table I."""

import collections
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.labels import lidc
from data_prep.system.errors import InputError

_MATRIX = (512, 512)  # of every CT series of the collection


class Series(NamedTuple):
    """A CT series: a line of --geometry."""

    patient_id: str
    series_instance_uid: str
    slice_thickness_mm: float
    slice_spacing_mm: float


class PatientVotes(NamedTuple):
    """The nodules of a patient's first scan."""

    patient_id: str
    nodules: list[lidc.Votes]


def read_geometry(path: Path) -> list[Series]:
    """The CT series by scan_order, or without this column in the order of the file.

    Raises:
        InputError: an unreadable file, a missing column or value, or a series twice.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"--geometry={path}: {error}; give the CSV of slice thickness and spacing"
        ) from error
    needed = ("patient_id", "series_instance_uid", "slice_thickness_mm", "median_slice_spacing_mm")
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise InputError(
            f"--geometry={path} has no line or no column {missing[0]}; it needs {', '.join(needed)}"
        )
    series, order = [], []
    for number, row in enumerate(rows, start=2):
        try:
            thickness, spacing = float(row[needed[2]]), float(row[needed[3]])
            order.append(int(row.get("scan_order", number)))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"--geometry={path}, line {number}: not a number ({error}); fill it in"
            ) from error
        if not (0 < thickness < float("inf") and 0 < spacing < float("inf")):
            raise InputError(
                f"--geometry={path}, line {number}: thickness and spacing are not above 0; correct "
                "them"
            )
        series.append(Series(row[needed[0]], row[needed[1]], thickness, spacing))
    if len({one.series_instance_uid for one in series}) < len(series):
        raise InputError(f"--geometry={path} holds a series twice; leave one line out")
    return [series[i] for i in sorted(range(len(series)), key=order.__getitem__)]


def first_scan_votes(
    readings: dict[str, lidc.Reading], geometry: Sequence[Series], *, keep_excluded: bool = False
) -> list[PatientVotes]:
    """The annotated nodules of each patient's first scan, before the consensus is taken.

    Args:
        readings: by Series Instance UID.
        geometry: of exactly these series; the first of a patient counts.
        keep_excluded: also take `lidc.EXCLUDED_READINGS`.

    Raises:
        InputError: series with a reading and no geometry, or the reverse.
    """
    listed = {series.series_instance_uid for series in geometry}
    without_geometry, without_reading = len(readings.keys() - listed), len(listed - readings.keys())
    if without_geometry or without_reading:
        raise InputError(
            f"{without_geometry} series of --annotations are not in --geometry, and "
            f"{without_reading} the reverse; give both for the same series"
        )
    first = {series.patient_id: series for series in reversed(geometry)}
    patients = []
    for series in geometry:
        if first[series.patient_id] is not series:
            continue
        reading = readings[series.series_instance_uid]
        slices = lidc.slices_from_positions(reading, series.slice_spacing_mm)
        votes = lidc.nodule_votes(
            reading, slices, _MATRIX, series.slice_thickness_mm, keep_excluded=keep_excluded
        )
        patients.append(PatientVotes(series.patient_id, votes))
    return patients


def count(patients: Iterable[PatientVotes], consensus: float, min_area_px: int) -> dict[str, int]:
    """The lines of `TABLE1` but the number of volumes, by the rule of `lidc.consensus_nodule`."""
    slices, volumes, kept = collections.Counter(), collections.defaultdict(set), set()
    for patient in patients:
        for votes in patient.nodules:
            nodule = lidc.consensus_nodule(votes, consensus, min_area_px)
            if nodule is not None:
                slices[nodule.malignancy] += int(nodule.mask.any(axis=(1, 2)).sum())
                volumes[lidc.finding(nodule.malignancy)].add(patient.patient_id)
                kept.add(patient.patient_id)
    return {
        "Slices": slices.total(),
        **{
            f"{name}: volumes": len(volumes[name.lower()])
            for name in ("Cancer", "Ambiguous", "No cancer")
        },
        **{f"Malignancy score {score}: slices": slices[score] for score in range(1, 6)},
        "Patients": len(kept),
    }
