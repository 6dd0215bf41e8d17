"""Table I of the paper: the cohort of the nodule task, counted from the readers' annotations, and prepared datasets.

    python -m experiments.table1 --annotations=LIDC-XML-only.tar --geometry=series_geometry.csv --output_dir=TABLE1
    python -m experiments.table1 --dataset=DATASET --dataset=OTHER --output_dir=TABLE1

Writes table1.md and table1.csv. No images are needed for the first part; it takes half a minute. --geometry is a CSV
with a line for each CT series and the columns patient_id, series_instance_uid, slice_thickness_mm (DICOM (0018,0050))
and median_slice_spacing_mm (of neighbouring slices, along the normal). Of a patient the first scan counts: that of the
lowest scan_order, or the first in the file without this column. The defaults give the paper's counts exactly, but for
the number of volumes; what is counted under each name stands below the table.

The second part is what `data_prep.describe` computes of each dataset; its files go to OUTPUT_DIR/DATASET.
"""

import collections
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from data_prep import lidc
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text
from experiments import study
from experiments.paper import TABLE1

_MATRIX = (512, 512)  # of every CT series of the collection


class Series(NamedTuple):
    """A line of --geometry."""

    patient_id: str
    series_instance_uid: str
    slice_thickness_mm: float
    slice_spacing_mm: float


class PatientVotes(NamedTuple):
    """The nodules of a patient's first scan."""

    patient_id: str
    nodules: list[lidc.Votes]


def read_geometry(path: Path) -> list[Series]:
    """The CT series, by scan_order (else as they stand).

    Raises:
        InputError: no such file, a missing column or value, or a series twice.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--geometry={path}: {error}; give the CSV of slice thickness and spacing") from error
    needed = ("patient_id", "series_instance_uid", "slice_thickness_mm", "median_slice_spacing_mm")
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"--geometry={path} has no line or no column {missing[0]}; it needs {', '.join(needed)}")
    series, order = [], []
    for number, row in enumerate(rows, start=2):
        try:
            thickness, spacing = float(row[needed[2]]), float(row[needed[3]])
            order.append(int(row.get("scan_order", number)))
        except (TypeError, ValueError) as error:
            raise InputError(f"--geometry={path}, line {number}: not a number ({error}); fill it in") from error
        if not (0 < thickness < float("inf") and 0 < spacing < float("inf")):
            raise InputError(f"--geometry={path}, line {number}: thickness and spacing are not above 0; correct them")
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
            f"{without_geometry} series of --annotations are not in --geometry, and {without_reading} the reverse; "
            "give both for the same series"
        )
    first = {series.patient_id: series for series in reversed(geometry)}
    patients = []
    for series in geometry:
        if first[series.patient_id] is not series:
            continue
        reading = readings[series.series_instance_uid]
        slices = lidc.slices_from_positions(reading, series.slice_spacing_mm)
        votes = lidc.nodule_votes(reading, slices, _MATRIX, series.slice_thickness_mm, keep_excluded=keep_excluded)
        patients.append(PatientVotes(series.patient_id, votes))
    return patients


def count(patients: Iterable[PatientVotes], consensus: float, min_area_px: int) -> dict[str, int]:
    """The lines of `TABLE1` but the number of volumes, under `lidc.consensus_nodule`'s rule."""
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
        **{f"{name}: volumes": len(volumes[name.lower()]) for name in ("Cancer", "Ambiguous", "No cancer")},
        **{f"Malignancy score {score}: slices": slices[score] for score in range(1, 6)},
        "Patients": len(kept),
    }


def lidc_rows(counted: dict[str, int], num_series: int) -> list[dict[str, str]]:
    """A line for each of `TABLE1`, ours beside it."""
    ours = {"Volumes": num_series, **counted}
    return [
        {"characteristic": name, "ours": f"{ours[name]:,}", "the paper's": f"{value:,}"}
        for name, value in TABLE1.items()
    ]


def caption(num_patients: int, consensus: float, min_area_px: int) -> str:
    """What the lines count."""
    return (
        f"Volumes: annotated CT series, of {num_patients:,} patients; all else is of a patient's first scan. A slice "
        "counts once for each nodule that it shows. A pixel is of a nodule where a share of at least "
        f"{consensus:g} of its annotations has it; a slice is kept where the nodule has more than {min_area_px} "
        "pixels. The score is the median of the readers' (the upper one of an even number); above 3 cancer, below "
        "no cancer. A volume counts under each finding that it shows. Patients: with at least one kept nodule."
    )


def dataset_rows(dataset: Path, output_dir: Path) -> list[dict[str, str]]:
    """What `data_prep.describe` computes of a dataset, which it also writes into `output_dir`.

    Raises:
        InputError: it is no dataset; the command has said why.
    """
    study.run_stage(
        f"characteristics of {dataset}", "data_prep.describe", f"--dataset={dataset}", f"--output_dir={output_dir}"
    )
    with open(output_dir / "cohort.csv", newline="") as file:
        return [
            {"group": row["group"], "characteristic": row["item"], "value": row["value"]}
            for row in csv.DictReader(file)
        ]


def define_flags() -> None:
    """Only where this module is the program."""
    flags.DEFINE_string("annotations", None, "Folder or tar file of the XML annotations of LIDC-IDRI.")
    flags.DEFINE_string("geometry", None, "CSV of slice thickness and spacing of the series (see above).")
    flags.DEFINE_multi_string("dataset", [], "Prepared dataset; repeatable.")
    flags.DEFINE_string("output_dir", None, "Where table1.md and table1.csv go.", required=True)
    flags.DEFINE_float("consensus", lidc.CONSENSUS, "Share of a nodule's annotations that must have a voxel.", 0.0, 1.0)
    flags.DEFINE_integer("min_area_px", lidc.MIN_AREA_PX, "Slices with more pixels are kept.", lower_bound=0)
    flags.DEFINE_bool("keep_excluded", False, "Also take the readings that the curated annotations leave out.")


def main(argv: list[str]) -> int:
    """Command line."""
    given = flags.FLAGS
    if bool(given.annotations) != bool(given.geometry):
        raise InputError("--annotations and --geometry belong together; give both or neither")
    if not given.annotations and not given.dataset:
        raise InputError("nothing to count; give --annotations and --geometry, or --dataset")
    if given.consensus == 0:
        raise InputError("--consensus=0 takes every voxel; give a share above 0")
    datasets = [Path(name) for name in given.dataset]
    if len({path.resolve().name for path in datasets}) < len(datasets):
        raise InputError("two --dataset have the same folder name; rename one, their descriptions go to folders of it")
    output_dir = Path(given.output_dir)
    parts, table = ["# Table I: characteristics of the cohorts\n"], []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if given.annotations:
            geometry = read_geometry(Path(given.geometry))
            readings = lidc.read_readings(given.annotations)
            patients = first_scan_votes(readings, geometry, keep_excluded=given.keep_excluded)
            rows = lidc_rows(count(patients, given.consensus, given.min_area_px), len(readings))
            words = caption(len(patients), given.consensus, given.min_area_px)
            parts.append(f"## LIDC-IDRI\n\n{study.markdown(rows)}\n{words}\n")
            table += [
                {"cohort": "LIDC-IDRI", "group": "", "characteristic": row["characteristic"]}
                | {"ours": row["ours"].replace(",", ""), "paper": row["the paper's"].replace(",", "")}
                for row in rows
            ]
    except (lidc.LidcError, OSError) as error:
        raise InputError(str(error)) from error
    for path in datasets:
        name = path.resolve().name
        rows = dataset_rows(path, output_dir / name)
        parts.append(f"## Dataset {name}\n\n{study.markdown(rows)}")
        table += [
            {"cohort": name, "group": row["group"], "characteristic": row["characteristic"]}
            | {"ours": row["value"], "paper": None}
            for row in rows
        ]
    text = "\n".join(parts)
    write_text(output_dir / "table1.md", text)
    study.write_csv(output_dir / "table1.csv", table)
    print(f"{text}\nWritten: {output_dir}/table1.md, {output_dir}/table1.csv")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
