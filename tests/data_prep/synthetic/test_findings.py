"""Findings of the synthetic archive: emboli and their labels, nodules and the readers' XML, the
layouts."""

import csv
import dataclasses
import hashlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage
from skimage.draw import polygon

from data_prep.synthetic.archive import make_archive
from data_prep.synthetic.dicom_writer import as_written
from data_prep.synthetic.exam import CENTRAL_ARTERIES_Z, Options, render_series, sample_exam
from data_prep.synthetic.findings import (
    SOLID,
    Embolus,
    Findings,
    Nodule,
    nodule_distance,
    polyline,
    sample_nodule,
)
from data_prep.synthetic.layouts import EXAM_COLUMNS, TRAIN_COLUMNS, exam_labels
from data_prep.synthetic.patient import sample_patient
from data_prep.synthetic.readers import NAMESPACE, border, read_scan
from data_prep.synthetic.render import render_scan, render_volume
from data_prep.synthetic.scan import enhancement

RSNA = Options(seed=1, image_size=64, num_slices=24, slice_spacing_mm=0.0, layout="rsna_pe")
LIDC = Options(seed=1, image_size=192, num_slices=16, slice_spacing_mm=0.0, layout="lidc_idri")
XML = {"l": NAMESPACE}


@pytest.fixture(scope="module")
def rsna(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rsna") / "archive"
    make_archive(folder, 6, RSNA)
    return folder


@pytest.fixture(scope="module")
def lidc(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lidc") / "archive"
    make_archive(folder, 3, LIDC)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "phantom.json"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def header(path: Path) -> pydicom.Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def filled(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The rule of LIDC-IDRI: the outline's inside without the outline itself; points [N, 2]
    (column, row)."""
    mask = np.zeros(shape, bool)
    mask[polygon(points[:, 1], points[:, 0], shape)] = True
    mask[points[:, 1], points[:, 0]] = False
    return mask


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


# --- emboli ---


def test_slices_are_positive_where_the_emboli_darken_the_arteries():
    """The same scan without the emboli, under the same noise: what gets darker is embolus."""
    checked = 0
    for index in range(6):
        exam, _ = sample_exam(index, RSNA)
        without = dataclasses.replace(exam.findings, emboli=())
        seed = np.random.default_rng
        volume = render_scan(exam.anatomy, exam.scan, exam.findings, seed(0))
        clean = render_scan(exam.anatomy, exam.scan, without, seed(0))
        loss = clean.hu.astype(int) - volume.hu
        positive, _ = exam_labels(exam, volume.embolus_area_mm2, RSNA.min_embolus_mm2)
        blood = enhancement(exam.scan).pulmonary_artery
        assert loss.min() >= -1  # nothing gets brighter
        if len(exam.findings.emboli) == 1:
            contrast = blood - exam.findings.emboli[0].hu
            darkened = loss.sum(axis=(1, 2)) * exam.scan.pixel_spacing_mm**2 / contrast
            assert np.allclose(darkened, volume.embolus_area_mm2[:, 0], rtol=0.03, atol=2)
        darkest = loss.max(axis=(1, 2))
        assert np.all(darkest[positive] > 25)
        assert np.all(darkest[volume.embolus_area_mm2.sum(axis=1) == 0] == 0)
        if positive.any():
            checked += 1
            if any(embolus.central for embolus in exam.findings.emboli):
                # of blood with contrast, not of other tissue
                assert np.median(clean.hu[loss > 60]) > 150
            assert not positive.all()
    assert checked == 3


def test_train_csv_obeys_the_rules_of_the_labels(rsna):
    exams = {}
    for row in rows_of(rsna / "train.csv"):
        exams.setdefault(row["StudyInstanceUID"], []).append({k: v for k, v in row.items()})
    assert len(exams) == 6
    positive_exams = 0
    for rows in exams.values():
        assert len(rows) == 24 and len({row["SeriesInstanceUID"] for row in rows}) == 1
        labels = [{name: int(row[name]) for name in EXAM_COLUMNS} for row in rows]
        assert all(label == labels[0] for label in labels)
        exam = labels[0]
        ratio = exam["rv_lv_ratio_gte_1"] + exam["rv_lv_ratio_lt_1"]
        places = exam["central_pe"] + exam["leftsided_pe"] + exam["rightsided_pe"]
        kinds = exam["chronic_pe"] + exam["acute_and_chronic_pe"]
        without = exam["negative_exam_for_pe"] + exam["indeterminate"]
        if any(row["pe_present_on_image"] == "1" for row in rows):
            positive_exams += 1
            assert (ratio, without) == (1, 0) and places >= 1 and kinds <= 1
        else:
            assert (ratio, places, kinds, without) == (0, 0, 0, 1)
    assert positive_exams == 3


def test_exam_labels_of_hand_made_areas():
    exam, _ = sample_exam(0, RSNA)
    tubes = polyline([(0, 0, 0), (0, 0, 9)], 4.0)
    emboli = (
        Embolus(tubes, True, ("left",), False, 40.0),
        Embolus(tubes, False, ("right",), True, 70.0),
    )
    exam = dataclasses.replace(exam, findings=Findings(emboli=emboli), poor_quality=())
    limit = 30.0
    positive, labels = exam_labels(exam, np.array([[limit, 0], [limit - 1, 0], [0, 0]]), limit)
    assert positive.tolist() == [True, False, False]
    assert {k for k, v in labels.items() if v and not k.startswith("rv_lv")} == {
        "central_pe",
        "leftsided_pe",
    }
    _, labels = exam_labels(exam, np.array([[limit, 0], [0, limit]]), limit)
    assert (
        labels["acute_and_chronic_pe"] == labels["rightsided_pe"] == 1 and labels["chronic_pe"] == 0
    )
    _, labels = exam_labels(exam, np.array([[0, limit]]), limit)
    assert labels["chronic_pe"] == 1 and labels["central_pe"] == labels["acute_and_chronic_pe"] == 0
    # Too little on every slice is a negative exam, a spoilt one an indeterminate.
    _, labels = exam_labels(exam, np.array([[limit / 3, limit / 3]]), limit)
    assert {k for k, v in labels.items() if v} == {"negative_exam_for_pe"}
    spoilt = dataclasses.replace(exam, poor_quality=("motion",))
    _, labels = exam_labels(spoilt, np.zeros((1, 2)), limit)
    assert {k for k, v in labels.items() if v} == {"qa_motion", "indeterminate"}


def test_the_rsna_layout_names_files_by_the_ids_of_train_csv(rsna):
    rows = rows_of(rsna / "train.csv")
    assert tuple(rows[0]) == TRAIN_COLUMNS
    named = {
        f"train/{r['StudyInstanceUID']}/{r['SeriesInstanceUID']}/{r['SOPInstanceUID']}.dcm"
        for r in rows
    }
    assert named == {str(path.relative_to(rsna)) for path in rsna.rglob("*.dcm")}
    path = next(rsna.rglob("*.dcm"))
    dataset = header(path)
    assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID == path.stem
    assert len(path.stem) == 12 and set(path.stem) <= set("0123456789abcdef")
    assert (
        dataset.SeriesInstanceUID == path.parent.name
        and dataset.StudyInstanceUID == path.parent.parent.name
    )


def test_rsna_attributes_stand_beside_the_headers_only(rsna):
    attributes = {row["PatientID"]: row for row in rows_of(rsna / "attributes.csv")}
    for study in (rsna / "train").iterdir():
        dataset = header(next(study.rglob("*.dcm")))
        assert not {"PatientSex", "PatientAge", "PatientBirthDate", "EthnicGroup"} & set(
            dataset.dir()
        )
        row = attributes.pop(dataset.PatientID)
        assert (
            row["sex"] in "FM"
            and 18 < int(row["age"]) < 95
            and row["ethnic_group"].startswith("group_")
        )
    assert not attributes


def test_a_grown_rsna_archive_has_the_tables_of_one_made_at_once(rsna, tmp_path):
    make_archive(tmp_path / "grown", 1, RSNA)
    assert len(rows_of(tmp_path / "grown" / "train.csv")) == 24
    make_archive(tmp_path / "grown", 6, RSNA)
    assert digests(tmp_path / "grown") == digests(rsna)


# --- nodules ---


def test_a_nodule_has_the_volume_of_its_diameter():
    nodule = Nodule(
        (3.0, -5.0, 7.0), (8.0, 8.0, 8.0), 3, 5, False, 0.0, 0.0, 0.0, 40.0, ((1.0, 0, 0),)
    )
    scale = (0.9, 1.1, 1.05)
    x, y = np.meshgrid(np.arange(-20, 26, 0.5) / scale[0], np.arange(-28, 18, 0.5) / scale[1])
    heights = np.arange(-5, 19, 0.5)
    body = [nodule_distance(nodule, x, y, z / scale[2] + 0.0, scale)[0] < 0 for z in heights]
    assert nodule.diameter_mm == pytest.approx(16)
    assert np.sum(body) * 0.125 == pytest.approx(np.pi / 6 * 16**3, rel=0.03)


def test_growing_malignancy_makes_nodules_larger_and_more_spiculated():
    exam, rng = sample_exam(0, dataclasses.replace(LIDC, num_slices=0))
    z_range = exam.anatomy.patient.lung_extent_mm
    nodules = [sample_nodule(exam.anatomy, z_range, [], rng) for _ in range(60)]
    nodules = [nodule for nodule in nodules if nodule is not None]
    malignancy = [nodule.malignancy for nodule in nodules]
    assert len(nodules) > 50 and set(malignancy) == {1, 2, 3, 4, 5}
    for values in ([n.diameter_mm for n in nodules], [n.spiculation for n in nodules]):
        assert np.corrcoef(malignancy, values)[0, 1] > 0.5
    assert all(3 <= nodule.diameter_mm <= 34 for nodule in nodules)


def test_nodules_lie_in_the_lungs_and_are_as_dense_as_said():
    seen = 0
    for index in (1, 3, 5):
        exam, _ = sample_exam(index, LIDC)
        volume = render_scan(exam.anatomy, exam.scan, exam.findings, np.random.default_rng(0))
        without = dataclasses.replace(exam.findings, nodules=(), dots=())
        clean = render_scan(exam.anatomy, exam.scan, without, np.random.default_rng(0))
        for nodule, field in zip(exam.findings.nodules, volume.nodules, strict=True):
            core = field.paste(field.distance < -2.5, volume.hu.shape)
            if nodule.texture == SOLID and not nodule.cavity_mm and core.sum() > 5:
                seen += 1
                assert np.median(clean.hu[core]) < -600
                assert abs(np.median(volume.hu[core]) - nodule.hu) < 25
    assert seen >= 2


# --- the readers ---


@pytest.mark.parametrize("name", ["pixel", "square", "disc", "bean"])
def test_an_outline_outside_a_mask_fills_to_the_mask(name):
    rows, columns = np.mgrid[:30, :30]
    mask = {
        "pixel": (rows == 9) & (columns == 4),
        "square": (abs(rows - 10) < 4) & (abs(columns - 12) < 3),
        "disc": np.hypot(rows - 15, columns - 14) < 9.3,
        "bean": (np.hypot(rows - 12, columns - 12) < 6) | (np.hypot(rows - 17, columns - 18) < 5),
    }[name]
    points = border(ndimage.binary_dilation(mask))
    assert np.array_equal(points[0], points[-1])
    assert np.abs(np.diff(points, axis=0)).max() == 1
    assert dice(filled(points, mask.shape), mask) > (0.98 if name == "bean" else 0.9999)


def test_the_outline_of_one_pixel_is_that_pixel():
    mask = np.zeros((5, 5), bool)
    mask[3, 1] = True
    assert border(mask).tolist() == [[1, 3]]


@pytest.mark.parametrize("prone, mirrored", [(False, False), (True, False), (False, True)])
def test_outlines_fill_to_the_true_nodules_in_the_written_images(prone, mirrored):
    compared = 0
    for index in range(4):
        exam, rng = sample_exam(index, LIDC)
        position = "HFP" if prone else "FFS" if mirrored else "HFS"
        exam = dataclasses.replace(exam, position=position, mirrored=mirrored)
        series, rendering = render_series(exam, "soft", 2, rng)

        def written(masks, series=series):
            return as_written(series, masks)

        readers = read_scan(
            exam.findings, rendering, series.pixel_spacing_mm, series.slice_spacing_mm, written, rng
        )
        assert len(readers) == 4
        shape = rendering.hu.shape
        true = [
            None if f is None else written(f.paste(f.distance < 0, shape))
            for f in rendering.nodules
        ]
        votes = [[] for _ in true]
        for mark in (mark for marks in readers for mark in marks):
            if mark.ratings is None:
                assert len(mark.regions) == 1 and len(mark.regions[0].points) == 1
                continue
            assert len(mark.ratings) == 9
            volume = np.zeros(shape, bool)
            for region in mark.regions:
                if region.inclusion:
                    volume[region.slice_index] |= filled(region.points, shape[1:])
            score, which = max(
                (dice(volume, mask), i) for i, mask in enumerate(true) if mask is not None
            )
            assert score > 0.5
            votes[which].append(volume)
        for nodule, mask, volumes in zip(exam.findings.nodules, true, votes, strict=True):
            if nodule.diameter_mm > 8:
                # A reader's hand shakes; what half of them outline is the nodule.
                compared += 1
                assert len(volumes) >= 2
                assert min(dice(volume, mask) for volume in volumes) > 0.7
                assert dice(np.mean(volumes, axis=0) >= 0.5, mask) > 0.8
    assert compared >= 4


def test_lidc_xml_names_its_series_and_its_slices(lidc):
    nodules = 0
    for patient in sorted(lidc.glob("PHANTOM-*")):
        (path,) = patient.rglob("*.xml")
        root = ElementTree.parse(path).getroot()
        assert root.tag == f"{{{NAMESPACE}}}LidcReadMessage"
        slices = {d.SOPInstanceUID: d for d in map(header, path.parent.glob("*.dcm"))}
        assert len(slices) == 16
        first = next(iter(slices.values()))
        assert (
            root.findtext(".//l:SeriesInstanceUid", namespaces=XML)
            == first.SeriesInstanceUID
            == path.parent.name
        )
        assert root.findtext(".//l:StudyInstanceUID", namespaces=XML) == first.StudyInstanceUID
        assert len(root.findall("l:readingSession", XML)) == 4
        for roi in root.iterfind(".//l:roi", XML):
            dataset = slices[roi.findtext("l:imageSOP_UID", namespaces=XML)]
            height = float(roi.findtext("l:imageZposition", namespaces=XML))
            assert height == pytest.approx(float(dataset.ImagePositionPatient[2]), abs=1e-3)
        for nodule in root.iterfind(".//l:unblindedReadNodule", XML):
            ratings = nodule.find("l:characteristics", XML)
            outlined = (
                max(len(roi.findall("l:edgeMap", XML)) for roi in nodule.iterfind("l:roi", XML)) > 1
            )
            assert (ratings is not None) == outlined
            if ratings is not None:
                nodules += 1
                assert len(ratings) == 9 and all(1 <= int(rating.text) <= 6 for rating in ratings)
    assert nodules >= 4


# --- layouts ---


def test_layouts_have_different_patients_and_the_group_in_the_header(lidc, rsna, tmp_path):
    make_archive(tmp_path / "dicom", 1, dataclasses.replace(RSNA, layout="dicom"))
    folders = (lidc, rsna, tmp_path / "dicom")
    headers = [
        [
            header(p)
            for p in f.rglob("*")
            if p.suffix not in (".json", ".csv", ".xml") and p.is_file()
        ]
        for f in folders
    ]
    people = [{d.PatientID for d in part} for part in headers]
    assert [len(ids) for ids in people] == [3, 6, 1]
    assert len(set.union(*people)) == 10
    for dataset in headers[0] + headers[2]:
        assert dataset.EthnicGroup in ("group_a", "group_b", "group_c")


def test_an_unknown_layout_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"^--layout=nifti: choose dicom, rsna_pe, lidc_idri$"):
        make_archive(tmp_path / "archive", 1, dataclasses.replace(RSNA, layout="nifti"))
    assert not (tmp_path / "archive").exists()


def test_a_part_of_the_chest_holds_the_central_arteries():
    for index in range(8):
        exam, _ = sample_exam(index, RSNA)
        low, high = (z * exam.anatomy.patient.scale[2] for z in CENTRAL_ARTERIES_Z)
        assert exam.scan.z_mm[0] <= low + 3 and exam.scan.z_mm[-1] >= high - 3


def test_group_is_independent_of_sex_and_age_and_leaves_a_trace():
    people = [sample_patient(np.random.default_rng(i)) for i in range(1500)]
    for group in ("group_a", "group_b", "group_c"):
        members = [p for p in people if p.group == group]
        assert len(members) == pytest.approx(500, abs=80)
        assert np.mean([p.age for p in members]) == pytest.approx(
            np.mean([p.age for p in people]), abs=2
        )
        assert np.mean([p.sex == "F" for p in members]) == pytest.approx(0.5, abs=0.09)
    exam, _ = sample_exam(0, LIDC)
    scan = dataclasses.replace(exam.scan, z_mm=exam.scan.z_mm[:2])
    volumes = []
    for group in ("group_a", "group_c"):
        anatomy = dataclasses.replace(
            exam.anatomy, patient=dataclasses.replace(exam.anatomy.patient, group=group)
        )
        volumes.append(render_volume(anatomy, scan, np.random.default_rng(0)).astype(int))
    difference = np.abs(volumes[0] - volumes[1])
    assert 1 < difference[difference > 0].mean() < 15 and difference.max() < 60


def test_the_field_of_one_lung_holds_most_nodules():
    options = dataclasses.replace(LIDC, field="lung")
    inside, total = 0, 0
    for index in range(12):
        exam, _ = sample_exam(index, options)
        scan = exam.scan
        assert 120 < scan.field_of_view_mm < 220
        centres = np.array([n.centre[:2] for n in exam.findings.nodules]).reshape(-1, 2)
        away = np.abs(centres * exam.anatomy.patient.scale[:2] - scan.centre_mm)
        held = (away < scan.field_of_view_mm / 2).all(axis=1)
        inside, total = inside + held.sum(), total + len(held)
    assert inside > 0.6 * total
