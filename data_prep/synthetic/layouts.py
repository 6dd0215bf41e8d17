"""Writes synthetic patients in the folder layouts of three kinds of archives.

dicom       `P0000/...`, one folder a patient, its files named as some scanner or archive would
rsna_pe     `train.csv` beside `train/<study>/<series>/<instance>.dcm`, as the RSNA STR
            Pulmonary Embolism data
lidc_idri   `PHANTOM-0001/<study>/<series>/*.dcm` with the readers' XML in the series folder, as
            LIDC-IDRI
"""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pydicom

from data_prep.labels.rsna_pe import COLUMNS as TRAIN_COLUMNS
from data_prep.labels.rsna_pe import EXAM_LABELS as EXAM_COLUMNS
from data_prep.synthetic.dicom_writer import (
    as_written,
    instance_uid,
    slice_height,
    write_localizer,
    write_series,
)
from data_prep.synthetic.exam import Exam, Options, render_series, sample_exam
from data_prep.synthetic.patient import ventricle_ratio
from data_prep.synthetic.readers import read_scan, reading_xml
from data_prep.system.files import read_json, write_text, written_whole

ATTRIBUTE_COLUMNS = ("PatientID", "age", "sex", "ethnic_group")
# Rows that each patient of the rsna_pe layout adds to the tables, which are written again when the
# archive grows.
TABLES_FOLDER = ".tables"


def patient_folder(output_dir: Path, index: int, options: Options) -> Path:
    """The folder whose presence says that patient `index` is complete."""
    if options.layout == "rsna_pe":
        return output_dir / "train" / _hex_id(str(options.seed), str(index), "study")
    return output_dir / (
        f"PHANTOM-{index + 1:04d}" if options.layout == "lidc_idri" else f"P{index:04d}"
    )


def write_patient(folder: Path, output_dir: Path, index: int, options: Options) -> int:
    """Renders patient `index` and writes its files below `folder`, an empty folder that becomes
    `patient_folder` later; returns the number of files."""
    exam, rng = sample_exam(index, options)
    if options.layout == "rsna_pe":
        return _write_rsna_pe(folder, output_dir, exam, index, options, rng)
    if options.layout == "lidc_idri":
        return _write_lidc_idri(folder, exam, rng)
    return _write_dicom(folder, exam, rng)


def write_tables(output_dir: Path, options: Options) -> None:
    """`train.csv` and `attributes.csv` of all patients that the folder holds, in the rsna_pe
    layout."""
    if options.layout != "rsna_pe":
        return
    parts = [read_json(path) for path in sorted((output_dir / TABLES_FOLDER).glob("*.json"))]
    tables = (
        ("train.csv", TRAIN_COLUMNS, [row for part in parts for row in part["train"]]),
        ("attributes.csv", ATTRIBUTE_COLUMNS, [part["attributes"] for part in parts]),
    )
    for name, columns, rows in tables:
        with (
            written_whole(output_dir / name) as temporary,
            open(temporary, "w", newline="") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def _write_dicom(folder: Path, exam: Exam, rng: np.random.Generator) -> int:
    """One or two reconstructions and sometimes a localizer; findings are in the images but not
    written down."""
    reconstructions = (
        ["soft", "sharp"]
        if rng.random() < 0.2
        else [str(rng.choice(["soft", "sharp"], p=[0.8, 0.2]))]
    )
    with_localizer = rng.random() < 0.3
    naming = NAMINGS[int(rng.integers(len(NAMINGS)))]
    count = 0
    for number, reconstruction in enumerate(reconstructions, start=2):
        series, _ = render_series(exam, reconstruction, number, rng)
        paths = naming(folder, number, rng.permutation(len(series.hu)))
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        write_series(series, paths)
        count += len(paths)
        if with_localizer and number == 2:
            path = naming(folder, 1, np.array([0]))[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_localizer(series, path)
            count += 1
    return count


def _write_rsna_pe(
    folder: Path, output_dir: Path, exam, index: int, options, rng: np.random.Generator
) -> int:
    """One series under ids of 12 hexadecimal digits; headers without age, sex and group. The labels
    go to `TABLES_FOLDER` first, so that a complete patient always has them."""
    series, rendering = render_series(exam, "soft" if rng.random() < 0.85 else "sharp", 2, rng)
    names = (str(options.seed), str(index))
    study, series_id = _hex_id(*names, "study"), _hex_id(*names, "series")
    instances = tuple(_hex_id(*names, "instance", str(i)) for i in range(len(series.hu)))
    private = ("PatientSex", "PatientAge", "PatientBirthDate", "EthnicGroup")
    attributes = {name: value for name, value in series.attributes.items() if name not in private}
    attributes |= {"StudyInstanceUID": study, "SeriesInstanceUID": series_id}
    series = dataclasses.replace(series, attributes=attributes, instance_uids=instances)
    paths = [folder / series_id / f"{instance}.dcm" for instance in instances]
    paths[0].parent.mkdir(parents=True)
    with pydicom.config.disable_value_validation():  # such ids are not valid UIDs
        write_series(series, paths)
    positive, labels = exam_labels(exam, rendering.embolus_area_mm2, options.min_embolus_mm2)
    constant = [labels[name] for name in EXAM_COLUMNS]
    rows = [
        [study, series_id, instance, int(label), *constant]
        for instance, label in zip(instances, positive, strict=True)
    ]
    patient = exam.anatomy.patient
    tables = {
        "train": [rows[i] for i in rng.permutation(len(rows))],
        "attributes": [exam.attributes["PatientID"], patient.age, patient.sex, patient.group],
    }
    (output_dir / TABLES_FOLDER).mkdir(exist_ok=True)
    write_text(output_dir / TABLES_FOLDER / f"{index:06d}.json", json.dumps(tables))
    return len(paths)


def exam_labels(
    exam: Exam, embolus_area_mm2: np.ndarray, min_mm2: float
) -> tuple[np.ndarray, dict[str, int]]:
    """(positive [S] bool, exam labels by column) of an exam whose emboli cover [S, E] mm^2 of its
    slices; a slice of which they cover less than `min_mm2` is not positive.

    They keep the rules of the RSNA data: with a positive slice exactly one ventricle ratio, at
    least one of central, left and right and not both chronic and acute-and-chronic; without one,
    exactly one of negative and indeterminate.
    """
    positive = embolus_area_mm2.sum(axis=1) >= min_mm2
    seen = [
        embolus
        for embolus, area in zip(
            exam.findings.emboli, embolus_area_mm2[positive].sum(axis=0), strict=True
        )
        if area
    ]
    labels = dict.fromkeys(EXAM_COLUMNS, 0)
    labels["qa_motion"] = int("motion" in exam.poor_quality)
    labels["qa_contrast"] = int("contrast" in exam.poor_quality)
    if not seen:
        labels["indeterminate" if exam.poor_quality else "negative_exam_for_pe"] = 1
        return positive, labels
    wide = ventricle_ratio(exam.anatomy.patient) >= 1
    labels["rv_lv_ratio_gte_1" if wide else "rv_lv_ratio_lt_1"] = 1
    labels["central_pe"] = int(any(embolus.central for embolus in seen))
    labels["leftsided_pe"] = int(any("left" in embolus.sides for embolus in seen))
    labels["rightsided_pe"] = int(any("right" in embolus.sides for embolus in seen))
    chronic = [embolus.chronic for embolus in seen]
    labels["chronic_pe"] = int(all(chronic))
    labels["acute_and_chronic_pe"] = int(any(chronic) and not all(chronic))
    return positive, labels


def _write_lidc_idri(folder: Path, exam: Exam, rng: np.random.Generator) -> int:
    """One series and the XML of its four readers."""
    series, rendering = render_series(exam, "soft" if rng.random() < 0.7 else "sharp", 2, rng)
    study, series_id = exam.attributes["StudyInstanceUID"], series.attributes["SeriesInstanceUID"]
    parent = folder / study / series_id
    parent.mkdir(parents=True)
    order = rng.permutation(len(series.hu))
    write_series(series, [parent / f"1-{number + 1:03d}.dcm" for number in order])
    readers = read_scan(
        exam.findings,
        rendering,
        series.pixel_spacing_mm,
        series.slice_spacing_mm,
        lambda masks: as_written(series, masks),
        rng,
    )
    slices = range(len(series.hu))
    instances = [instance_uid(series, i) for i in slices]
    heights = [slice_height(series, i) for i in slices]
    xml = reading_xml(readers, series_id, study, instances, heights, rng)
    (parent / f"{int(rng.integers(60, 300)):03d}.xml").write_bytes(xml)
    return len(series.hu) + 1


def _hex_id(*names: str) -> str:
    """12 hexadecimal digits that the names decide."""
    return hashlib.sha256("/".join(("rsna_pe", *names)).encode()).hexdigest()[:12]


def _numbered(folder: Path, series: int, order: np.ndarray) -> list[Path]:
    return [folder / "DICOM" / f"SE{series:05d}" / f"IM{number:05d}" for number in order]


def _with_extension(folder: Path, series: int, order: np.ndarray) -> list[Path]:
    return [folder / f"series_{series}" / f"{number + 1:06d}.dcm" for number in order]


def _one_folder(folder: Path, series: int, order: np.ndarray) -> list[Path]:
    return [folder / f"CT.{series}.{number * 7919 % 100003}.img" for number in order]


NAMINGS = (_numbered, _with_extension, _one_folder)
