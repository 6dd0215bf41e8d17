"""Labels, masks and attributes on their way into a dataset: joined by the right key, oriented with
the images, missing where nothing is known, the same bytes after an interruption, and nothing of the
source's names."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset import tfds
from data_prep.dataset.reader import Dataset
from data_prep.dataset.verify import verify
from data_prep.labels import staging
from data_prep.labels.lookup import LabelSources
from data_prep.labels.rsna_pe import COLUMNS, EXAM_LABELS
from data_prep.masks import reading
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import dry_run, prepare
from data_prep.privacy.leaks import find_leaks
from data_prep.scan.archives import list_sources
from data_prep.scan.headers import read_header
from data_prep.scan.rules import Rules
from data_prep.scan.series import plan_series
from data_prep.scan.volume import load_volume
from data_prep.system.errors import InputError
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files

NUM_SLICES = 20
SIZE = 64
KEY = "0123456789abcdef0123456789abcdef"
# in canonical orientation: slices, rows, columns
NODULE = (slice(9, 12), slice(20, 27), slice(14, 20))


def scan(number: int, **attributes) -> list:
    """A thorax with a cube of 300 HU in one lung; slice i + 1 is the instance uid(number, 1, i +
    1)."""
    hu = dicom_files.thorax(NUM_SLICES, size=SIZE, seed=number)
    hu[NODULE] = 300
    return dicom_files.slices(
        hu, **({"study": number, "patient": f"patient-{number}"} | attributes)
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for number in (1, 2, 3):
        dicom_files.write(folder / str(number), scan(number))
    return folder


@pytest.fixture
def copy(archive, tmp_path) -> Path:
    return shutil.copytree(archive, tmp_path / "scans")


def write_csv(path: Path, header: str, rows: list[tuple]) -> Path:
    path.write_text(
        "".join(f"{line}\n" for line in [header, *(",".join(map(str, row)) for row in rows)])
    )
    return path


def run(input_dir: Path, folder: Path, options: Options | None = None, **sources) -> Directories:
    """Prepares into `folder`, at one worker and with one key."""
    folder.mkdir(exist_ok=True)
    (folder / "key").write_text(KEY)
    places = Directories(input_dir, folder / "dataset", folder / "audit")
    archive = sources.get("archive", "dicom")
    options = options or Options(archive=archive, image_size=SIZE)
    prepare(
        options,
        places,
        sources=LabelSources(**sources),
        num_workers=1,
        pseudonym_key_file=folder / "key",
    )
    return places


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def volume_of_patient(places: Directories, number: int) -> str:
    """`volume_id` of the scan of patient `number`."""
    with open(places.audit_dir / "sources.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return next(
        row["pseudonym"]
        for row in rows
        if row["path"].startswith(f"{number}/") and row["outcome"] == "volume"
    )


def problems(places: Directories) -> list[str]:
    with WorkerPool(1) as pool:
        return verify(Dataset.open(places.output_dir), pool) + find_leaks(
            Dataset.open(places.output_dir), places.input_dir, places.audit_dir, pool
        )


# ---- tables --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, tuple[Path, ...] | Path]:
    folder = tmp_path_factory.mktemp("tables")
    of_slices = [(dicom_files.uid(1, 1, i + 1), i % 3) for i in reversed(range(NUM_SLICES))]
    of_slices += [
        (dicom_files.uid(2, 1, 4), ""),
        (dicom_files.uid(2, 1, 5), 2),
        (dicom_files.uid(7, 1, 1), 9),
    ]
    of_series = [
        (dicom_files.uid(2, 1), "solid"),
        (dicom_files.uid(3, 1), "none"),
        (dicom_files.uid(8, 1), "part"),
    ]
    attributes = [
        ("patient-2", 95, "", "group_a"),
        ("patient-3", "", "m", ""),
        ("unknown", 50, "F", ""),
    ]
    return {
        "labels_csv": (
            write_csv(folder / "slices.csv", "SOPInstanceUID,grade", of_slices),
            write_csv(folder / "series.csv", "SeriesInstanceUID,nodule", of_series),
            write_csv(
                folder / "patients.csv",
                "PatientID,smoker",
                [("patient-1", "yes"), ("patient-3", "no")],
            ),
        ),
        "attributes_csv": write_csv(
            folder / "attributes.csv", "PatientID,age,sex,ethnic_group", attributes
        ),
    }


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, archive, tables) -> Directories:
    return run(archive, tmp_path_factory.mktemp("labelled"), **tables)


def test_labels_of_every_level_reach_their_rows(labelled):
    preparation = Dataset.open(labelled.output_dir).preparation
    assert preparation["labels"] == {
        "grade": {"level": "slice", "classes": ["0", "1", "2", "9"]},
        "nodule": {"level": "volume", "classes": ["none", "part", "solid"]},
        "smoker": {"level": "patient", "classes": ["no", "yes"]},
    }
    assert preparation["masks"] is None
    names = [volume_of_patient(labelled, number) for number in (1, 2, 3)]
    grades = {
        name: [
            r["grade"] for r in Dataset.open(labelled.output_dir).slices() if r["volume_id"] == name
        ]
        for name in names
    }
    assert grades[names[0]] == [i % 3 for i in range(NUM_SLICES)]
    assert grades[names[1]] == [2 if i == 4 else None for i in range(NUM_SLICES)]
    assert grades[names[2]] == [None] * NUM_SLICES
    rows = {row.pop("volume_id"): row for row in Dataset.open(labelled.output_dir).labels()}
    assert [rows[name] for name in names] == [
        {"nodule": None, "smoker": 1},
        {"nodule": 2, "smoker": None},
        {"nodule": 0, "smoker": 0},
    ]
    assert Dataset.open(labelled.output_dir).regions() == []


def test_order_of_the_tables_is_that_of_records_and_volumes(labelled):
    volumes = Dataset.open(labelled.output_dir).volumes()
    assert [row["volume_id"] for row in Dataset.open(labelled.output_dir).labels()] == [
        v["volume_id"] for v in volumes
    ]
    for split in ("train", "validation", "test"):
        records = Dataset.open(labelled.output_dir).source(split)
        rows = Dataset.open(labelled.output_dir).slices(split)
        assert [(r["volume_id"], r["slice_index"]) for r in rows] == [
            (record["volume_id"], record["slice_index"])
            for record in map(records.__getitem__, range(len(records)))
        ]
    assert len(Dataset.open(labelled.output_dir).slices()) == 3 * NUM_SLICES


def test_what_is_missing_or_unmatched_is_counted(labelled):
    counts = Dataset.open(labelled.output_dir).preparation["counts"]
    assert counts["labels"]["grade"] == {"0": 7, "1": 7, "2": 7, "9": 0, "missing": 39}
    assert counts["labels"]["nodule"] == {"none": 1, "part": 0, "solid": 1, "missing": 1}
    assert counts["label_rows_without_match"] == {"grade": 1, "nodule": 1, "smoker": 0}
    assert counts["attribute_rows_without_match"] == 1


def test_attributes_go_before_the_headers_and_empty_cells_do_not(labelled):
    rows = {volume["volume_id"]: volume for volume in Dataset.open(labelled.output_dir).volumes()}
    people = [rows[volume_of_patient(labelled, number)] for number in (1, 2, 3)]
    assert [(p["age"], p["sex"], p["ethnic_group"]) for p in people] == [
        (61, "F", ""),
        (90, "F", "group_a"),
        (61, "M", ""),
    ]


def test_dataset_with_labels_is_sound_and_names_nobody(labelled):
    assert problems(labelled) == []
    everything = b"".join(content(labelled.output_dir).values())
    for private in (
        b"patient-1",
        dicom_files.uid(1).encode(),
        str(labelled.input_dir).encode(),
        b"unknown",
    ):
        assert private not in everything


def test_interrupted_run_continues_to_the_same_bytes(
    labelled, archive, tables, tmp_path, monkeypatch
):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tfds, "_write_tfds_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        run(archive, tmp_path, **tables)
    monkeypatch.undo()
    places = run(archive, tmp_path, **tables)
    assert content(places.output_dir) == content(labelled.output_dir)
    assert content(places.audit_dir) == content(labelled.audit_dir)


def test_a_grown_archive_keeps_its_labels(tables, copy, tmp_path):
    places = run(copy, tmp_path / "run", **tables)
    before = Dataset.open(places.output_dir).slices()
    dicom_files.write(copy / "4", scan(7, patient="patient-4"))
    run(copy, tmp_path / "run", **tables)
    after = Dataset.open(places.output_dir).slices()
    assert len(after) == len(before) + NUM_SLICES and all(row in after for row in before)
    assert [r["grade"] for r in after if r not in before] == [
        3,
        *[None] * (NUM_SLICES - 1),
    ]  # class "9" of uid(7, 1, 1)
    assert problems(places) == []


def test_another_table_is_refused_on_a_finished_dataset(labelled, tables, tmp_path):
    folder = labelled.output_dir.parent
    other = write_csv(tmp_path / "other.csv", "PatientID,age", [("patient-2", 33)])
    for changed in (tables | {"attributes_csv": other}, tables | {"labels_csv": ()}):
        with pytest.raises(
            InputError, match="was prepared with other labels or attributes"
        ) as error:
            run(labelled.input_dir, folder, **changed)
        assert "another --output_dir" in str(error.value) and "\n" not in str(error.value)
    run(labelled.input_dir, folder, **tables)


@pytest.mark.parametrize(
    ("flag", "header", "rows", "message"),
    [
        (
            "labels_csv",
            "PatientID,x",
            [("a", 1), ("b", 2)],
            "none of the 2 rows with the labels x is of this archive",
        ),
        (
            "labels_csv",
            "PatientID,x",
            [("patient-1", 1), ("a", 1), ("patient-1", 2)],
            "line 4: .* of line 2 with other",
        ),
        (
            "attributes_csv",
            "PatientID,age",
            [("a", 1)],
            "none of its 1 patients is in this archive",
        ),
        (
            "attributes_csv",
            "PatientID,age",
            [("a", 1), ("a", 2)],
            "line 3: the patient of line 2 with other",
        ),
    ],
)
def test_tables_that_contradict_or_match_nothing_end_the_run_before_the_conversion(
    archive, tmp_path, flag, header, rows, message
):
    path = write_csv(tmp_path / "table.csv", header, rows)
    with pytest.raises(InputError, match=message) as error:
        run(archive, tmp_path / "run", **{flag: (path,) if flag == "labels_csv" else path})
    assert "\n" not in str(error.value) and "patient-1" not in str(error.value)
    assert not list((tmp_path / "run").rglob("*.array_record*"))


def test_repeated_rows_that_agree_count_once(archive, tmp_path):
    path = write_csv(
        tmp_path / "t.csv",
        "PatientID,x",
        [("patient-1", "a"), ("patient-1", "a"), ("patient-2", "b")],
    )
    places = run(archive, tmp_path / "run", labels_csv=(path,))
    assert Dataset.open(places.output_dir).preparation["counts"]["labels"]["x"] == {
        "a": 1,
        "b": 1,
        "missing": 1,
    }


def test_one_label_in_two_tables_is_refused(archive, tmp_path):
    paths = tuple(
        write_csv(tmp_path / f"{key}.csv", f"{key},x", [(1, 1)])
        for key in ("PatientID", "VolumeName")
    )
    with pytest.raises(InputError, match="the label x is in two tables"):
        staging.check(LabelSources(labels_csv=paths), archive)


# ---- RSNA ----------------------------------------------------------------------------------------


def test_rsna_archive_from_the_command_line(archive, copy, tmp_path):
    rows = []
    for number in (1, 2, 3):
        ones = {
            1: ("rv_lv_ratio_lt_1", "central_pe"),
            2: ("negative_exam_for_pe",),
            3: ("indeterminate", "chronic_pe"),
        }
        constant = [int(name in ones[number]) for name in EXAM_LABELS]
        for i in range(NUM_SLICES):
            if (number, i) != (2, 5):  # a slice without a row
                names = (
                    dicom_files.uid(number),
                    dicom_files.uid(number, 1),
                    dicom_files.uid(number, 1, i + 1),
                )
                rows.append((*names, int(number == 1 and i in (3, 4)), *constant))
    write_csv(copy / "train.csv", ",".join(COLUMNS), rows[::-1])
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        "--archive=rsna_pe",
        f"--input_dir={copy}",
    ]
    command += [f"--output_dir={tmp_path / 'd'}", "--image_size=32", "--num_workers=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 exams whose labels break the rule no_positive_slice" in result.stdout
    assert "60 cells of pe_present_on_image: 57 0, 2 1, 1 missing" in result.stdout
    preparation = Dataset.open(tmp_path / "d").preparation
    assert preparation["windows"] == [
        {"level": 50.0, "width": 350.0},
        {"level": 100.0, "width": 700.0},
    ]
    assert preparation["counts"]["exams_with_inconsistent_labels"] == {"no_positive_slice": 1}
    assert list(preparation["labels"]) == ["pe_present_on_image", *EXAM_LABELS, "pe_positive_exam"]
    places = Directories(copy, tmp_path / "d", tmp_path / "d-audit")
    volumes = [volume_of_patient(places, number) for number in (1, 2, 3)]
    rows = {row["volume_id"]: row for row in Dataset.open(tmp_path / "d").labels()}
    assert [rows[v]["pe_positive_exam"] for v in volumes] == [1, 0, 0]
    assert [rows[v]["central_pe"] for v in volumes] == [1, 0, 0]
    of_slices = [
        [
            r["pe_present_on_image"]
            for r in Dataset.open(tmp_path / "d").slices()
            if r["volume_id"] == v
        ]
        for v in volumes
    ]
    assert [i for i, value in enumerate(of_slices[0]) if value] == [3, 4]
    assert [i for i, value in enumerate(of_slices[1]) if value is None] == [5]
    violations = (places.audit_dir / "label_violations.csv").read_text().splitlines()
    assert len(violations) == 2 and violations[1].startswith(
        f"{dicom_files.uid(3)},no_positive_slice,"
    )
    assert problems(places) == []


def test_a_missing_column_comes_before_anything_else(copy, tmp_path):
    write_csv(copy / "train.csv", "StudyInstanceUID,SOPInstanceUID", [])
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        "--archive=rsna_pe",
        f"--input_dir={copy}",
    ]
    result = subprocess.run(
        [*command, f"--output_dir={tmp_path / 'd'}"], capture_output=True, text=True
    )
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and len(result.stderr.splitlines()) == 1
    )
    assert "lacks the column SeriesInstanceUID, pe_present_on_image" in result.stderr
    assert not (tmp_path / "d").exists()


# ---- masks ---------------------------------------------------------------------------------------


def xml(
    series: str,
    study: str,
    boxes: list[tuple[str, int, int, int, int]],
    malignancy: int = 4,
    root="LidcReadMessage",
):
    """XML of four readers with the same outline of one nodule, one pixel outside its rectangles.

    A rectangle is (instance, first and last column, first and last row).
    """
    names = (
        *("subtlety", "internalStructure", "calcification", "sphericity", "margin"),
        *("lobulation", "spiculation", "texture"),
    )
    characteristics = (
        "".join(f"<{name}>3</{name}>" for name in names) + f"<malignancy>{malignancy}</malignancy>"
    )
    rois = ""
    for instance, x0, x1, y0, y1 in boxes:
        outline = [(x, y) for x in range(x0 - 1, x1 + 2) for y in range(y0 - 1, y1 + 2)]
        outline = [(x, y) for x, y in outline if x in (x0 - 1, x1 + 1) or y in (y0 - 1, y1 + 1)]
        outline.sort(
            key=lambda point: np.arctan2(point[1] - (y0 + y1) / 2, point[0] - (x0 + x1) / 2)
        )
        edges = "".join(
            f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in outline
        )
        rois += f"<roi><imageZposition>0</imageZposition><imageSOP_UID>{instance}</imageSOP_UID>"
        rois += f"<inclusion>TRUE</inclusion>{edges}</roi>"
    nodule = f"<noduleID>1</noduleID><characteristics>{characteristics}</characteristics>{rois}"
    session = (
        f"<readingSession><unblindedReadNodule>{nodule}</unblindedReadNodule></readingSession>"
    )
    uids = (
        f"<SeriesInstanceUid>{series}</SeriesInstanceUid>"
        f"<StudyInstanceUID>{study}</StudyInstanceUID>"
    )
    start = f'<?xml version="1.0"?><{root} xmlns="http://www.nih.gov">'
    return f"{start}<ResponseHeader>{uids}</ResponseHeader>{session * 4}</{root}>"


def write_xml(
    path: Path, number: int, boxes: list[tuple[int, int, int, int, int]], **options
) -> None:
    """`boxes`: (slice in the order of the instances, first and last column and row)."""
    named = [(dicom_files.uid(number, 1, i + 1), *box) for i, *box in boxes]
    path.write_text(xml(dicom_files.uid(number, 1), dicom_files.uid(number), named, **options))


NODULE_BOXES = [(i, 14, 19, 20, 26) for i in (9, 10, 11)]


@pytest.fixture(scope="module")
def lidc_archive(tmp_path_factory) -> Path:
    """1: as the dataset lies; 2: written upside down and from left to right, last slice first; 3:
    no nodule."""
    folder = tmp_path_factory.mktemp("lidc")
    dicom_files.write(folder / "1", scan(1))
    hu = dicom_files.thorax(NUM_SLICES, size=SIZE, seed=2)
    hu[NODULE] = 300
    turned = {"orientation": (-1, 0, 0, 0, -1, 0), "origin": (170.0, 160.0, -300.0)}
    dicom_files.write(
        folder / "2", dicom_files.slices(hu[:, ::-1, ::-1], study=2, patient="patient-2", **turned)
    )
    dicom_files.write(folder / "3", scan(3))
    write_xml(folder / "anywhere.xml", 1, NODULE_BOXES)
    last = SIZE - 1
    boxes = [(i, last - x1, last - x0, last - y1, last - y0) for i, x0, x1, y0, y1 in NODULE_BOXES]
    write_xml(folder / "2" / "158.xml", 2, boxes, malignancy=2)
    write_xml(folder / "2" / "again.xml", 2, boxes, malignancy=2)  # the same reading once more
    write_xml(folder / "1" / "radiograph.xml", 1, [], root="IdriReadMessage")
    write_xml(folder / "3" / "069.xml", 3, [])
    write_xml(folder / "other.xml", 9, NODULE_BOXES)
    return folder


@pytest.fixture(scope="module")
def with_nodules(tmp_path_factory, lidc_archive) -> Directories:
    return run(lidc_archive, tmp_path_factory.mktemp("nodules"), archive="lidc_idri")


def volume_masks(places: Directories, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks [S, H, W] and grey values of the scan of patient `number`."""
    name = volume_of_patient(places, number)
    row = next(v for v in Dataset.open(places.output_dir).volumes() if v["volume_id"] == name)
    source = Dataset.open(places.output_dir).source(row["split"])
    records = [source[row["first_record"] + i] for i in range(row["num_slices"])]
    return np.stack([r["mask"] for r in records]), np.stack([r["image"][..., 0] for r in records])


def test_nodules_lie_where_the_image_has_them(with_nodules):
    expected = np.zeros((NUM_SLICES, SIZE, SIZE), np.uint8)
    expected[NODULE] = 1
    for number in (1, 2):
        mask, image = volume_masks(with_nodules, number)
        np.testing.assert_array_equal(mask, expected)
        assert (image[mask == 1] == 255).all()
    assert not volume_masks(with_nodules, 3)[0].any()
    counts = Dataset.open(with_nodules.output_dir).preparation["counts"]
    assert counts["annotations_without_match"] == 1
    assert problems(with_nodules) == []


def test_tables_of_masks(with_nodules):
    preparation = Dataset.open(with_nodules.output_dir).preparation
    assert preparation["masks"] == {"source": "lidc_idri", "consensus": 0.7, "min_area_px": 20}
    assert preparation["labels"] == {}
    rows = {row["volume_id"]: row for row in Dataset.open(with_nodules.output_dir).regions()}
    assert len(rows) == 2
    mm3 = 3 * 7 * 6 * dicom_files.PIXEL_MM**2 * dicom_files.SPACING_MM
    for number, malignancy in ((1, 4), (2, 2)):
        row = rows[volume_of_patient(with_nodules, number)]
        assert (row["region"], row["first_slice"], row["last_slice"]) == (1, 9, 11)
        assert (row["malignancy"], row["num_readers"]) == (malignancy, 4)
        assert row["volume_mm3"] == pytest.approx(mm3) and row["diameter_mm"] == pytest.approx(
            (6 * mm3 / np.pi) ** (1 / 3)
        )
        area = [
            r["mask_area_px"]
            for r in Dataset.open(with_nodules.output_dir).slices()
            if r["volume_id"] == row["volume_id"]
        ]
        assert area == [42 if i in (9, 10, 11) else 0 for i in range(NUM_SLICES)]


def test_tfds_reads_the_masks(with_nodules):
    program = f"""
import sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(with_nodules.output_dir)!r}).as_data_source("train")
masks = [source[i]["mask"] for i in range(len(source))]
print([int(mask.sum()) for mask in masks], masks[0].shape, "tensorflow" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    rows = Dataset.open(with_nodules.output_dir).slices("train")
    assert result.stdout.strip() == (
        f"{[row['mask_area_px'] for row in rows]} ({SIZE}, {SIZE}) False"
    )


def test_series_without_or_with_foreign_annotations_are_rejected_by_name(lidc_archive, tmp_path):
    scans = shutil.copytree(lidc_archive, tmp_path / "scans")
    (scans / "3" / "069.xml").unlink()
    dicom_files.write(scans / "4", scan(4))
    # an instance that the series lacks
    write_xml(scans / "4.xml", 4, [(NUM_SLICES + 3, 14, 19, 20, 26)])
    dicom_files.write(scans / "5", scan(5))
    write_xml(scans / "5.xml", 5, [(3, SIZE - 5, SIZE + 5, 20, 26)])  # beyond the image
    options = Options(archive="lidc_idri", image_size=SIZE, splits=(1.0, 0.0, 0.0))
    places = run(scans, tmp_path / "run", options, archive="lidc_idri")
    counts = Dataset.open(places.output_dir).preparation["counts"]
    assert counts["series_rejected"] == {"annotation_mismatch": 2, "no_annotation": 1}
    assert len(Dataset.open(places.output_dir).volumes()) == 2


def test_annotations_of_other_scans_end_the_run(archive, tmp_path):
    (tmp_path / "xml").mkdir()
    write_xml(tmp_path / "xml" / "a.xml", 9, NODULE_BOXES)
    with pytest.raises(InputError, match="the XML of 1 readings is of other scans"):
        run(archive, tmp_path / "run", archive="lidc_idri", annotations_dir=tmp_path / "xml")
    with pytest.raises(ValueError, match="no CT reading of LIDC-IDRI"):
        run(archive, tmp_path / "run", archive="lidc_idri")


def test_other_mask_options_are_refused_on_a_finished_dataset(with_nodules):
    with pytest.raises(
        InputError,
        match=r"masks=source:lidc_idri,consensus:0.7,min_area_px:20, not .*consensus:0.5",
    ):
        run(
            with_nodules.input_dir,
            with_nodules.output_dir.parent,
            archive="lidc_idri",
            consensus=0.5,
        )


def test_nodules_of_few_pixels_are_left_out_where_asked(lidc_archive, tmp_path):
    places = run(lidc_archive, tmp_path, archive="lidc_idri", min_area_px=42)
    assert Dataset.open(places.output_dir).regions() == []
    assert problems(places) == []


def test_masks_of_files(archive, tmp_path, monkeypatch):
    """The use of masks by `labels`, without the readers of mask files."""
    (volume,), _ = loaded(archive / "1")
    uid = dicom_files.uid(1, 1)
    mask = np.zeros(volume.hu.shape, np.uint8)
    mask[3:5, 10:12, 20:23], mask[4, 30, 30] = 2, 5
    monkeypatch.setattr(staging, "index_masks", lambda path, _: {uid: (tmp_path / "seg",)})
    monkeypatch.setattr(reading, "read_mask", lambda path, of_volume: mask)
    (tmp_path / "seg").write_bytes(b"mask")
    staged = staging.stage(LabelSources(masks_dir=tmp_path), archive, tmp_path / "db")
    strict = LabelSources(masks_dir=tmp_path, require_masks=True)
    strict = staging.stage(strict, archive, tmp_path / "strict")
    assert staged.fault(volume.candidate) is None and len(staged.version(volume.candidate)) == 64
    volume_labels = staged.labels_of(volume)
    np.testing.assert_array_equal(volume_labels.mask, mask)
    voxel = dicom_files.PIXEL_MM**2 * dicom_files.SPACING_MM
    assert [(r["region"], r["first_slice"], r["last_slice"]) for r in volume_labels.regions] == [
        (2, 3, 4),
        (5, 4, 4),
    ]
    assert [r["volume_mm3"] for r in volume_labels.regions] == pytest.approx([12 * voxel, voxel])
    mask = mask[:-1]
    assert staged.labels_of(volume).reason == "mask_mismatch"
    (other,), _ = loaded(archive / "2")
    assert strict.fault(other.candidate).reason == "no_annotation"
    assert staged.fault(other.candidate) is None and staged.labels_of(other).mask is None
    assert staging.match(staged, volume.headers) == {"masks_without_match": 0}
    with pytest.raises(InputError, match="none of its 1 masks is of this archive"):
        staging.match(staged, other.headers)


def loaded(folder: Path):
    headers = [read_header(folder, source) for source in list_sources(folder)]
    planned = plan_series(headers, Rules())
    return [load_volume(folder, candidate, Rules()) for candidate in planned], headers


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"archive": "lidc_idri", "masks_dir": Path(".")},
            "--masks_dir and --archive=lidc_idri both give masks",
        ),
        ({"annotations_dir": Path(".")}, "--annotations_dir goes with --archive=lidc_idri"),
        (
            {"archive": "lidc_idri", "annotations_dir": Path("absent")},
            "--annotations_dir=absent: no such directory",
        ),
        ({"archive": "lidc_idri", "consensus": 0.0}, "--consensus=0: give a share"),
        ({"archive": "lidc_idri", "min_area_px": -1}, "--min_area_px=-1"),
        ({"masks_dir": Path("absent")}, "--masks_dir=absent: no such directory"),
        ({"attributes_csv": Path("absent")}, "--attributes_csv=absent: no such file"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(archive, options, message):
    with pytest.raises(InputError, match=message) as error:
        staging.check(LabelSources(**options), archive)
    assert "\n" not in str(error.value)


def test_dry_run_says_what_has_no_match_and_writes_nothing(archive, tables, tmp_path):
    places = Directories(archive, tmp_path / "d", tmp_path / "a")
    counts = dry_run(Options(), places, sources=LabelSources(**tables), num_workers=1)
    assert counts["label_rows_without_match"]["grade"] == 1 and list(tmp_path.iterdir()) == []


def test_real_nodules_are_denser_than_the_lung_around_them(real_data, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(real_data / "lidc_0001", scans / "1")
    shutil.copy(next((real_data / "lidc_xml").glob("LIDC-IDRI-0001*_069.xml")), scans / "069.xml")
    options = Options(
        archive="lidc_idri", image_size=256, windows=((-600.0, 1500.0),), splits=(1.0, 0.0, 0.0)
    )
    places = run(scans, tmp_path / "run", options, archive="lidc_idri")
    mask, image = volume_masks(places, 1)
    (region,) = Dataset.open(places.output_dir).regions()
    assert (region["malignancy"], region["num_readers"]) == (5, 4)
    area = mask.reshape(len(mask), -1).sum(axis=1)
    assert np.flatnonzero(area).tolist() == list(
        range(region["first_slice"], region["last_slice"] + 1)
    )
    rows, columns = np.flatnonzero(mask.any(axis=(0, 2))), np.flatnonzero(mask.any(axis=(0, 1)))
    box = image[area > 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = mask[area > 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] > 0
    assert box[inside].mean() > box[~inside].mean() + 40
    assert json.loads((places.output_dir / "features.json").read_text())["featuresDict"][
        "features"
    ]["mask"]
