"""Masks as RTSTRUCT and label map, several files of one scan, damaged files, scans without a
mask."""

import csv
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

from data_prep.dataset.reader import Dataset
from data_prep.labels.lookup import LabelSources
from data_prep.masks.files import index_masks
from data_prep.masks.grid import MaskError
from data_prep.masks.reading import read_mask, read_masks
from data_prep.pipeline.accounting import dataset_text
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from tests.data_prep.masks import test_reading as plain
from tests.data_prep.masks.test_reading import (
    COLUMN_MM,
    HEIGHT,
    NUM_SLICES,
    ORIGIN,
    REGIONS,
    ROW_MM,
    SERIES,
    SLICE_MM,
    THORAX,
    WIDTH,
    _item,
)
from tests.helpers import dicom_files

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"


def rtstruct(
    contours: list[tuple[int, float, list[tuple[float, float]]]],
    kind: str = "CLOSED_PLANAR",
    external: tuple[int, ...] = (),
) -> DicomDataset:
    """A structure set of contours (region, slice, [(row, column)]) in voxels of the canonical
    grid."""
    ds = DicomDataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = RTStructureSetStorage, dicom_files.uid(7)
    ds.Modality = "RTSTRUCT"
    series = _item(SeriesInstanceUID=SERIES)
    study = _item(RTReferencedSeriesSequence=[series])
    ds.ReferencedFrameOfReferenceSequence = [_item(RTReferencedStudySequence=[study])]
    rois = {}
    for region, index, points in contours:
        corner = np.add(ORIGIN, (0, 0, index * SLICE_MM))
        places = [np.add(corner, (c * COLUMN_MM, r * ROW_MM, 0)) for r, c in points]
        data = [f"{value:.6g}" for place in places for value in place]
        rois.setdefault(region, []).append(
            _item(ContourGeometricType=kind, NumberOfContourPoints=len(points), ContourData=data)
        )
    ds.ROIContourSequence = [
        _item(ReferencedROINumber=region, ContourSequence=items) for region, items in rois.items()
    ]
    ds.RTROIObservationsSequence = [
        _item(
            ReferencedROINumber=region,
            RTROIInterpretedType="EXTERNAL" if region in external else "GTV",
        )
        for region in rois
    ]
    return ds


def label_map(regions: np.ndarray) -> DicomDataset:
    """A label map segmentation of `regions` [S, H, W], its frames from the last to the first."""
    order = list(range(len(regions)))[::-1]
    ds = plain.segmentation([(1, i, regions[i] > 0) for i in order])
    ds.SOPClassUID, ds.SegmentationType = LABEL_MAP, "LABELMAP"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    for frame in ds.PerFrameFunctionalGroupsSequence:
        del frame.SegmentIdentificationSequence
    ds.PixelData = regions[order].astype(np.uint8).tobytes() + b"\0" * (regions.size % 2)
    ds["PixelData"].VR = "OB"
    return ds


def box(top: float, left: float, bottom: float, right: float) -> list[tuple[float, float]]:
    return [(top, left), (top, right), (bottom, right), (bottom, left)]


@pytest.fixture(scope="module", params=["", "prone", "transposed"])
def any_volume(request, tmp_path_factory):
    return plain.scan(tmp_path_factory.mktemp("scan"), request.param)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return plain.scan(tmp_path_factory.mktemp("scan"))


def written(path: Path, ds: DicomDataset) -> Path:
    return plain.write_segmentation(path, ds)


# ---- two further members -------------------------------------------------------------------------


def test_contours_of_a_structure_set_fill_the_pixels_whose_centres_they_hold(any_volume, tmp_path):
    """A region with a hole and an island in it (even-odd), two regions that overlap (the lowest
    number stays), a body outline that is no region."""
    contours = [
        (2, 5, box(9.5, 9.5, 30.5, 40.5)),
        (2, 5, box(14.5, 14.5, 20.5, 30.5)),
        (2, 5, box(16.5, 16.5, 18.5, 18.5)),
        (1, 5, box(27.6, 30.6, 33.4, 50.4)),
        (1, 9, [(9.5, 9.5), (9.5, 21.3), (21.3, 9.5)]),  # a triangle
        (7, 5, box(-4, -9, HEIGHT + 3, WIDTH + 8)),
    ]
    expected = np.zeros_like(REGIONS)
    expected[5, 10:31, 10:41] = 2
    expected[5, 15:21, 15:31] = 0
    expected[5, 17:19, 17:19] = 2
    expected[5, 28:34, 31:51] = 1
    for row in range(10, 22):
        expected[9, row, 10 : 31 - row] = 1
    path = written(tmp_path / "rt.dcm", rtstruct(contours, external=(7,)))
    assert index_masks(tmp_path) == {SERIES: (path,)}
    np.testing.assert_array_equal(read_mask(path, any_volume), expected)


def test_structure_sets_that_cannot_be_placed_are_refused(volume, tmp_path):
    inside = box(9.5, 9.5, 30.5, 40.5)
    for index, kind, message in (
        (NUM_SLICES, "CLOSED_PLANAR", "1 of 1 contours lie on no slice of the scan"),
        (4.5, "CLOSED_PLANAR", "1 of 1 contours lie on no slice of the scan"),
        (4, "OPEN_PLANAR", "contours that are not closed"),
        (4, "POINT", "no closed contour"),
    ):
        ds = rtstruct([(1, index, inside)], kind)
        with pytest.raises(MaskError, match=message):
            read_mask(written(tmp_path / "rt.dcm", ds), volume)
    ds = rtstruct([(1, 4, inside)])
    ds.ROIContourSequence[0].ContourSequence[0].ContourData[2] = "-250"  # out of its plane
    with pytest.raises(MaskError, match="lie on no slice"):
        read_mask(written(tmp_path / "rt.dcm", ds), volume)


def test_label_maps_lie_on_their_voxels(volume, tmp_path):
    path = written(tmp_path / "map.dcm", label_map(REGIONS))
    assert index_masks(tmp_path) == {SERIES: (path,)}
    np.testing.assert_array_equal(read_mask(path, volume), REGIONS)


def test_files_of_one_scan_are_merged_by_a_stated_rule(volume, tmp_path):
    """Regions that touch no voxel of another file stay by themselves, under the next free number;
    those that share voxels are one."""
    first, second, third = (np.zeros_like(REGIONS) for _ in range(3))
    first[3, 5:10, 5:10], first[3, 20:25, 5:10] = 1, 2
    second[3, 7:12, 7:12], second[8, 30:40, 30:40] = 1, 2
    third[8, 50:60, 30:40] = 1
    paths = [
        plain.write_nifti(tmp_path / f"{SERIES}.nii.gz", first),
        plain.write_nifti(tmp_path / f"{SERIES}_mask.nii", second, "RAS"),
        written(tmp_path / "z.dcm", label_map(third)),
    ]
    assert index_masks(tmp_path) == {SERIES: tuple(paths)}
    expected = first.copy()
    expected[3, 7:12, 7:12] = 1
    expected[8, 30:40, 30:40], expected[8, 50:60, 30:40] = 3, 4
    np.testing.assert_array_equal(read_masks(paths, volume), expected)


def test_bad_files_are_left_out_by_name_and_the_rest_goes_on(tmp_path):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    masks.mkdir()
    for number in range(1, 4):
        datasets = dicom_files.slices(
            THORAX, study=number, patient=f"p{number}", spacing=SLICE_MM, origin=ORIGIN
        )
        for ds in datasets:
            ds.PixelSpacing = [str(ROW_MM), str(COLUMN_MM)]
        dicom_files.write(scans / str(number), datasets)
    mask = plain.write_nifti(masks / f"{dicom_files.uid(1, 1)}_seg.nii.gz", REGIONS)
    (masks / f"._{mask.name}").write_bytes(b"\0\5\x16\7" + bytes(90))
    (masks / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(90))
    whole = dicom_files.to_bytes(plain.segmentation(plain.frames_of(REGIONS)))
    (masks / "damaged.dcm").write_bytes(whole[:132] + b"\xff" * 9000)
    written(masks / "of_none.dcm", plain.segmentation([(1, 0, REGIONS[0] == 1)], series=()))
    fractional = plain.segmentation(plain.frames_of(REGIONS), series=(dicom_files.uid(2, 1),))
    fractional.SegmentationType = "FRACTIONAL"
    written(masks / "fractional.dcm", fractional)

    def prepared(name: str, **flags: bool) -> dict:
        places = Directories(scans, tmp_path / name, tmp_path / f"{name}-audit")
        sources = LabelSources(masks_dir=masks, **flags)
        options = Options(image_size=32, splits=(1.0, 0.0, 0.0))
        return prepare(options, places, sources=sources, num_workers=1)[0]

    preparation = prepared("out")
    text = dataset_text(preparation, True, tmp_path / "out", tmp_path / "out-audit")
    for line in (
        "2 files of masks left out, system_file:",
        "1 files of masks left out, damaged:",
        "1 files of masks left out, of_no_series:",
        "label_files.csv",
    ):
        assert line in text
    with open(tmp_path / "out-audit" / "label_files.csv", newline="") as file:
        left_out = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert left_out == {
        f"._{mask.name}": "system_file",
        ".DS_Store": "system_file",
        "damaged.dcm": "damaged",
        "of_none.dcm": "of_no_series",
    }
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.preparation["counts"]["series_rejected"] == {"mask_mismatch": 1}
    areas = {}
    for row in dataset.slices():
        areas.setdefault(row["volume_id"], set()).add(row["mask_area_px"])
    unknown = [volume for volume, values in areas.items() if values == {None}]
    assert len(areas) == 2 and len(unknown) == 1  # unread is not empty
    strict = prepared("strict", require_masks=True)
    assert strict["counts"]["series_rejected"] == {"mask_mismatch": 1, "no_annotation": 1}
