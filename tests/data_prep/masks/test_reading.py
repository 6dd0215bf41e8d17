"""Masks of files: voxel-exact on the scan's grid whatever way they are stored, or refused."""

import csv
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel import orientations
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage

from data_prep.dataset.reader import Dataset
from data_prep.masks.files import index_masks
from data_prep.masks.grid import MaskError
from data_prep.masks.reading import read_mask
from data_prep.scan import nifti
from data_prep.scan.archives import list_sources
from data_prep.scan.rules import Rules
from data_prep.scan.series import plan_series
from data_prep.scan.volume import load_volume
from tests.helpers import dicom_files

ROW_MM, COLUMN_MM, SLICE_MM = 5.5, 5.0, 2.5
# first pixel of the lowest slice in canonical orientation, DICOM's patient space
ORIGIN = (-150.0, -170.0, -300.0)
# 65 rows and 63 columns: frames of bits end within bytes
THORAX = dicom_files.thorax(22, size=66)[:, 1:, 2:65]
NUM_SLICES, HEIGHT, WIDTH = THORAX.shape
SERIES = dicom_files.uid(1, 1)


def pattern(shape: tuple[int, ...] = THORAX.shape, seed: int = 0) -> np.ndarray:
    """Regions 1 to 3 at random places, so that every shift, turn or mirror image differs."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 4, shape) * (rng.random(shape) < 0.2)).astype(np.uint8)


REGIONS = pattern()


def scan(folder: Path, turned: str = ""):
    """The volume of THORAX, from DICOM slices as they are, or turned about the long axis, or
    transposed."""
    hu, orientation, origin, spacing = THORAX, (1, 0, 0, 0, 1, 0), list(ORIGIN), (ROW_MM, COLUMN_MM)
    if turned == "prone":
        hu, orientation = hu[:, ::-1, ::-1], (-1, 0, 0, 0, -1, 0)
        origin[0] += (WIDTH - 1) * COLUMN_MM
        origin[1] += (HEIGHT - 1) * ROW_MM
    elif turned == "transposed":
        hu, orientation, spacing = hu.transpose(0, 2, 1), (0, 1, 0, 1, 0, 0), (COLUMN_MM, ROW_MM)
    datasets = dicom_files.slices(
        hu, orientation=orientation, origin=tuple(origin), spacing=SLICE_MM
    )
    for ds in datasets:
        ds.PixelSpacing = [str(value) for value in spacing]
    volume = dicom_files.only_volume(dicom_files.convert(dicom_files.write(folder, datasets)))
    np.testing.assert_array_equal(volume.hu, THORAX)
    assert volume.pixel_spacing_mm == (ROW_MM, COLUMN_MM)
    return volume


@pytest.fixture(scope="module", params=["", "prone", "transposed"])
def any_volume(request, tmp_path_factory):
    return scan(tmp_path_factory.mktemp("scan"), request.param)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return scan(tmp_path_factory.mktemp("scan"))


# ---- NIfTI ---------------------------------------------------------------------------------------


def affine_at(origin=ORIGIN, spacing=(COLUMN_MM, ROW_MM, SLICE_MM)) -> np.ndarray:
    """RAS+ affine of voxels [columns, rows, slices] in canonical orientation."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -origin[0], -origin[1], origin[2]
    return affine


def write_nifti(
    path: Path, values: np.ndarray, axes: str = "LPS", affine: np.ndarray | None = None
) -> Path:
    """`values` [S, H, W] in canonical orientation, stored along other axes."""
    affine = affine_at() if affine is None else affine
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(axes)
    )
    stored = orientations.apply_orientation(values.transpose(2, 1, 0), turn)
    image = nibabel.Nifti1Image(
        stored, affine @ orientations.inv_ornt_aff(turn, values.shape[::-1])
    )
    image.to_filename(path)
    return path


@pytest.mark.parametrize("axes", ["LPS", "RAS", "RPI", "PLS", "SPL", "IRA"])
def test_nifti_masks_lie_on_their_voxels_whatever_their_axes(any_volume, tmp_path, axes):
    path = write_nifti(tmp_path / "mask.nii.gz", REGIONS, axes)
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == tuple(axes)
    mask = read_mask(path, any_volume)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, REGIONS)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_nifti_masks_of_any_data_type(volume, tmp_path, dtype):
    values = REGIONS.astype(dtype)
    values[0, 0, 0] = 255
    mask = read_mask(write_nifti(tmp_path / "mask.NII", values), volume)
    np.testing.assert_array_equal(mask, values)


def test_scaled_nifti_masks_are_what_the_scale_makes_of_them(volume, tmp_path):
    image = nibabel.load(write_nifti(tmp_path / "mask.nii", REGIONS))
    image.header.set_slope_inter(2, 0)
    content = bytearray((tmp_path / "mask.nii").read_bytes())
    content[112:120] = image.header.binaryblock[112:120]
    (tmp_path / "mask.nii").write_bytes(content)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume), 2 * REGIONS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "no whole numbers"),
        (np.nan, "no whole numbers"),
        (256, "from 0 to 256"),
        (-1, "from -1 to 3"),
    ],
)
def test_values_that_are_no_regions_are_refused(volume, tmp_path, value, message):
    values = REGIONS.astype(np.float32)
    values[3, 4, 5] = value
    with pytest.raises(MaskError, match=message) as error:
        read_mask(write_nifti(tmp_path / "mask.nii", values), volume)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_another_matrix_is_refused(volume, tmp_path):
    path = write_nifti(tmp_path / "mask.nii", REGIONS[:, :-1])
    with pytest.raises(
        MaskError,
        match=r"22 x 64 x 63 voxels \(slices, rows, columns\), the scan 22 x 65 x 63",
    ):
        read_mask(path, volume)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mask_elsewhere_is_refused(volume, tmp_path, axis):
    size = (COLUMN_MM, ROW_MM, SLICE_MM)[axis]
    for shift, fits in ((0.2, True), (-0.2, True), (0.5, False), (1, False), (-1, False)):
        origin = list(ORIGIN)
        origin[axis] += shift * size
        path = write_nifti(tmp_path / "mask.nii", REGIONS, affine=affine_at(origin))
        if fits:
            np.testing.assert_array_equal(read_mask(path, volume), REGIONS)
        else:
            with pytest.raises(MaskError, match="the mask lies elsewhere"):
                read_mask(path, volume)


@pytest.mark.parametrize("wrong", ["mirrored", "zoomed", "slices_zoomed", "turned"])
def test_an_affine_that_fits_at_a_corner_only_is_refused(volume, tmp_path, wrong):
    affine = affine_at()
    if wrong == "mirrored":
        affine = affine @ np.diag([-1.0, 1, 1, 1])
    elif wrong == "zoomed":
        affine[0, 0] *= 1.03
    elif wrong == "slices_zoomed":
        affine[2, 2] *= 1.05
    else:
        angle = np.radians(3)
        turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine[:2, :2] = turn @ affine[:2, :2]
    with pytest.raises(MaskError, match="the mask lies elsewhere"):
        read_mask(write_nifti(tmp_path / "mask.nii", REGIONS, affine=affine), volume)


def test_slices_beyond_the_scan_must_be_empty_and_none_may_lack(volume, tmp_path):
    longer = np.concatenate([np.zeros_like(REGIONS[:2]), REGIONS, np.zeros_like(REGIONS[:1])])
    below = affine_at((*ORIGIN[:2], ORIGIN[2] - 2 * SLICE_MM))
    np.testing.assert_array_equal(
        read_mask(write_nifti(tmp_path / "a.nii", longer, "RAI", affine=below), volume), REGIONS
    )
    longer[0, 5, 5] = 1
    with pytest.raises(MaskError, match="regions on slices that the scan has not"):
        read_mask(write_nifti(tmp_path / "b.nii", longer, affine=below), volume)
    with pytest.raises(MaskError, match="1 of 22 slices of the scan have none"):
        read_mask(write_nifti(tmp_path / "c.nii", REGIONS[:-1]), volume)


def test_nifti_masks_that_say_nothing_are_refused(volume, tmp_path):
    image = nibabel.Nifti1Image(REGIONS.transpose(2, 1, 0), None)
    image.to_filename(tmp_path / "mask.nii")
    with pytest.raises(MaskError, match="no affine"):
        read_mask(tmp_path / "mask.nii", volume)
    four = nibabel.Nifti1Image(np.stack([REGIONS.transpose(2, 1, 0)] * 2, -1), affine_at())
    four.to_filename(tmp_path / "mask.nii")
    with pytest.raises(MaskError, match="4 dimensions"):
        read_mask(tmp_path / "mask.nii", volume)
    packed = write_nifti(tmp_path / "mask.nii.gz", REGIONS).read_bytes()
    (tmp_path / "mask.nii.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(MaskError, match="damaged"):
        read_mask(tmp_path / "mask.nii.gz", volume)
    with pytest.raises(FileNotFoundError):
        read_mask(tmp_path / "absent.nii", volume)


def test_a_mask_shares_the_wrong_spacing_of_its_scan(tmp_path):
    """The metadata table corrects the scan's spacing; a mask with the affine of the scan's file
    goes with it."""
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "a.nii.gz", THORAX)
    (tmp_path / "t.csv").write_text('VolumeName,XYSpacing,ZSpacing\na,"[6, 4]",2\n')
    (source,) = list_sources(tmp_path / "scans")
    header = nifti.read_header(tmp_path / "scans", source, tmp_path / "t.csv")
    (candidate,) = plan_series([header], Rules())
    corrected = load_volume(tmp_path / "scans", candidate, Rules())
    assert corrected.pixel_spacing_mm == pytest.approx((6, 4))
    for affine in (affine_at(), affine_at(spacing=(4, 6, 2))):
        mask = read_mask(write_nifti(tmp_path / "mask.nii", REGIONS, affine=affine), corrected)
        np.testing.assert_array_equal(mask, REGIONS)
    shifted = affine_at((ORIGIN[0] + COLUMN_MM, *ORIGIN[1:]))
    with pytest.raises(MaskError, match="lies elsewhere"):
        read_mask(write_nifti(tmp_path / "mask.nii", REGIONS, affine=shifted), corrected)


# ---- DICOM segmentations -------------------------------------------------------------------------


def segmentation(
    frames: list[tuple[int, int, np.ndarray]],
    *,
    mirrored: bool = False,
    shift_mm: tuple[float, float, float] = (0, 0, 0),
    series: tuple[str, ...] = (SERIES,),
    shared_orientation: bool = True,
) -> DicomDataset:
    """A binary segmentation of frames (segment, slice, [H, W] in canonical orientation), bits
    packed across frames;
    mirrored: rows to anterior, columns to right."""
    cosines = [-1, 0, 0, 0, -1, 0] if mirrored else [1, 0, 0, 0, 1, 0]
    images = np.stack([image[::-1, ::-1] if mirrored else image for *_, image in frames]).astype(
        np.uint8
    )
    ds = DicomDataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SegmentationStorage, dicom_files.uid(5)
    ds.SeriesInstanceUID, ds.Modality, ds.SegmentationType = dicom_files.uid(6), "SEG", "BINARY"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
    ds.NumberOfFrames, ds.Rows, ds.Columns = images.shape
    ds.ReferencedSeriesSequence = [_item(SeriesInstanceUID=uid) for uid in series]
    orientation = [_item(ImageOrientationPatient=cosines)]
    shared = _item(
        PixelMeasuresSequence=[_item(PixelSpacing=[ROW_MM, COLUMN_MM], SliceThickness=SLICE_MM)]
    )
    if shared_orientation:
        shared.PlaneOrientationSequence = orientation
    ds.SharedFunctionalGroupsSequence = [shared]
    per_frame = []
    for segment, index, _ in frames:
        position = np.array(ORIGIN) + shift_mm + (0, 0, index * SLICE_MM)
        if mirrored:
            position += ((WIDTH - 1) * COLUMN_MM, (HEIGHT - 1) * ROW_MM, 0)
        frame = _item(
            PlanePositionSequence=[_item(ImagePositionPatient=position.tolist())],
            SegmentIdentificationSequence=[_item(ReferencedSegmentNumber=segment)],
        )
        if not shared_orientation:
            frame.PlaneOrientationSequence = orientation
        per_frame.append(frame)
    ds.PerFrameFunctionalGroupsSequence = per_frame
    ds.PixelData = pack_bits(images.reshape(-1))
    ds["PixelData"].VR = "OB"
    return ds


def _item(**elements) -> DicomDataset:
    item = DicomDataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def write_segmentation(path: Path, ds: DicomDataset) -> Path:
    path.write_bytes(dicom_files.to_bytes(ds))
    return path


def frames_of(regions: np.ndarray, seed: int = 1) -> list[tuple[int, int, np.ndarray]]:
    """A frame for each region and slice that it is on, in no order."""
    frames = [
        (int(k), i, regions[i] == k)
        for i in range(len(regions))
        for k in np.unique(regions[i])
        if k
    ]
    return [frames[i] for i in np.random.default_rng(seed).permutation(len(frames))]


@pytest.mark.parametrize("mirrored", [False, True])
def test_segmentations_lie_on_their_voxels_whatever_their_order(any_volume, tmp_path, mirrored):
    regions = REGIONS.copy()
    regions[[0, 7, 8]] = 0  # slices without a frame
    ds = segmentation(frames_of(regions), mirrored=mirrored, shared_orientation=not mirrored)
    mask = read_mask(write_segmentation(tmp_path / "seg.dcm", ds), any_volume)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, regions)


def test_one_frame_and_overlapping_segments(volume, tmp_path):
    image = REGIONS[4] == 1
    mask = read_mask(write_segmentation(tmp_path / "one", segmentation([(7, 4, image)])), volume)
    assert np.unique(mask[np.arange(NUM_SLICES) != 4]).tolist() == [0]
    np.testing.assert_array_equal(mask[4], 7 * image)
    other = REGIONS[4] <= 1
    frames = [(2, 4, image), (9, 4, other)]
    for order in (frames, frames[::-1]):
        mask = read_mask(write_segmentation(tmp_path / "two", segmentation(order)), volume)
        # the lowest number stays
        np.testing.assert_array_equal(mask[4], np.where(image, 2, 9 * other))


def test_segmentations_elsewhere_are_refused(volume, tmp_path):
    frames = frames_of(REGIONS)
    for axis, size in enumerate((COLUMN_MM, ROW_MM, SLICE_MM)):
        shift = np.zeros(3)
        shift[axis] = 0.2 * size
        ds = segmentation(frames, shift_mm=tuple(shift))
        np.testing.assert_array_equal(
            read_mask(write_segmentation(tmp_path / "seg", ds), volume), REGIONS
        )
        ds = segmentation(frames, shift_mm=tuple(2.5 * shift))
        with pytest.raises(MaskError, match=r"lies elsewhere by more than 0\.25 of a voxel"):
            read_mask(write_segmentation(tmp_path / "seg", ds), volume)
    above = [*frames, (1, NUM_SLICES, np.zeros_like(REGIONS[0]))]
    np.testing.assert_array_equal(
        read_mask(write_segmentation(tmp_path / "seg", segmentation(above)), volume), REGIONS
    )
    above[-1] = (1, NUM_SLICES, REGIONS[0] == 1)
    with pytest.raises(MaskError, match="on slices that the scan has not"):
        read_mask(write_segmentation(tmp_path / "seg", segmentation(above)), volume)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ds: setattr(ds, "SegmentationType", "FRACTIONAL"), "no binary DICOM segmentation"),
        (
            lambda ds: setattr(ds, "SOPClassUID", dicom_files.CTImageStorage),
            "no binary DICOM segmentation",
        ),
        (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), "damaged or incomplete"),
        (
            lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[0], "PlanePositionSequence"),
            "incomplete .KeyError",
        ),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-400]), "damaged or incomplete"),
        (lambda ds: setattr(_segment_of(ds), "ReferencedSegmentNumber", 0), "not 1 to 255"),
        (lambda ds: setattr(_segment_of(ds), "ReferencedSegmentNumber", 256), "not 1 to 255"),
        (
            lambda ds: setattr(_cosines_of(ds), "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
            "Orientation .* invalid",
        ),
    ],
)
def test_segmentations_that_cannot_be_used_are_refused(volume, tmp_path, change, message):
    ds = segmentation(frames_of(REGIONS))
    change(ds)
    with pytest.raises(MaskError, match=message) as error:
        read_mask(write_segmentation(tmp_path / "seg", ds), volume)
    assert "\n" not in str(error.value) and dicom_files.uid(1) not in str(error.value)


def _segment_of(ds: DicomDataset) -> DicomDataset:
    return ds.PerFrameFunctionalGroupsSequence[3].SegmentIdentificationSequence[0]


def _cosines_of(ds: DicomDataset) -> DicomDataset:
    return ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]


def test_segmentations_of_other_series_or_matrices_are_refused(volume, tmp_path):
    ds = segmentation(frames_of(REGIONS), series=(dicom_files.uid(1, 2),))
    with pytest.raises(MaskError, match="refers to another series"):
        read_mask(write_segmentation(tmp_path / "seg", ds), volume)
    small = segmentation([(1, 4, REGIONS[4, :-1] == 1)])
    with pytest.raises(MaskError, match="the mask has 64 x 63 pixels, the scan 65 x 63"):
        read_mask(write_segmentation(tmp_path / "seg", small), volume)


# ---- the folder ----------------------------------------------------------------------------------


def test_masks_are_indexed_by_what_they_are_of(tmp_path):
    (tmp_path / "deep").mkdir()
    empty = np.zeros((2, 2, 2), np.uint8)
    names = {
        "scan_1.nii.gz": "scan_1",
        "scan_2_mask.nii": "scan_2",
        "deep/scan_3_seg.nii.gz": "scan_3",
        "scan_4_label.NII": "scan_4",
        "1.2.3.nii.gz": "1.2.3",
        "scan_mask_5.nii": "scan_mask_5",
    }
    for name in names:
        write_nifti(tmp_path / "a.nii", empty).rename(tmp_path / name)
    write_segmentation(
        tmp_path / "deep" / "without_extension", segmentation([(1, 0, REGIONS[0] == 1)])
    )
    (tmp_path / "readme.txt").write_text("masks")
    (tmp_path / "ct.dcm").write_bytes(dicom_files.to_bytes(dicom_files.slices(THORAX[:1])[0]))
    masks = {key: str(path.relative_to(tmp_path)) for key, (path,) in index_masks(tmp_path).items()}
    expected = {key: name for name, key in names.items()} | {SERIES: "deep/without_extension"}
    assert masks == expected


def test_masks_that_cannot_be_told_apart_are_refused(tmp_path):
    for series, count in (((), 0), (("1.2", "1.3"), 2)):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_segmentation(folder / "seg", segmentation([(1, 0, REGIONS[0] == 1)], series=series))
        with pytest.raises(MaskError, match=f"refers to {count} series, not to one"):
            index_masks(folder)


# ---- the whole command ---------------------------------------------------------------------------


def test_prepare_of_nifti_scans_and_masks(tmp_path):
    """Scans and masks are stored along unlike axes; the records have both on one grid."""
    scans, masks, size = tmp_path / "scans", tmp_path / "masks", 64
    scans.mkdir()
    masks.mkdir()
    # of square pixels: slices and masks are stored unresized
    affine = affine_at(spacing=(5.5, 5.5, SLICE_MM))
    expected = {}
    for number, (axes, mask_axes) in enumerate(
        [("RAS", "LPS"), ("LPS", "SPL"), ("RPI", "RAS"), ("LPS", "LPS")]
    ):
        hu = dicom_files.thorax(20, seed=number)
        write_nifti(scans / f"scan_{number}.nii.gz", hu, axes, affine)
        regions = pattern(hu.shape, seed=number)
        if number < 3:
            expected[f"scan_{number}.nii.gz"] = (hu, regions)
            write_nifti(masks / f"scan_{number}_mask.nii.gz", regions, mask_axes, affine)
        else:  # the left-right mistake
            write_nifti(
                masks / f"scan_{number}_mask.nii.gz",
                regions,
                mask_axes,
                affine @ np.diag([-1.0, 1, 1, 1]),
            )
    write_nifti(scans / "without_mask.nii.gz", dicom_files.thorax(20, seed=9), "RAS", affine)
    write_nifti(masks / "of_no_scan.nii.gz", REGIONS)
    out, audit = tmp_path / "out", tmp_path / "audit"
    command = [sys.executable, "-m", "data_prep.prepare", "--archive=nifti", f"--masks_dir={masks}"]
    command += [
        f"--input_dir={scans}",
        f"--output_dir={out}",
        f"--audit_dir={audit}",
        "--num_workers=1",
    ]
    command += [f"--image_size={size}", "--window=-300,1400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 masks of scans that are not in the archive" in done.stdout
    with open(audit / "sources.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows["scan_3.nii.gz"]["reason"] == "mask_mismatch"
    assert rows["without_mask.nii.gz"]["outcome"] == "volume"
    volumes = {volume["volume_id"]: volume for volume in Dataset.open(out).volumes()}
    taken = {*expected, "without_mask.nii.gz"}
    assert set(volumes) == {rows[name]["pseudonym"] for name in taken}
    for name, (hu, regions) in expected.items():
        volume = volumes[rows[name]["pseudonym"]]
        records = Dataset.open(out).source(volume["split"])
        records = [records[volume["first_record"] + i] for i in range(volume["num_slices"])]
        np.testing.assert_array_equal([record["mask"] for record in records], regions)
        grey = np.rint(255 * np.clip((hu + 1000) / 1400, 0, 1))
        np.testing.assert_array_equal([record["image"][..., 0] for record in records], grey)
        slices, rows_of_regions = (
            [row for row in table if row["volume_id"] == volume["volume_id"]]
            for table in (Dataset.open(out).slices(), Dataset.open(out).regions())
        )
        assert [row["mask_area_px"] for row in slices] == np.count_nonzero(
            regions, axis=(1, 2)
        ).tolist()
        voxels = np.bincount(regions.ravel())
        assert {row["region"]: row["volume_mm3"] for row in rows_of_regions} == {
            k: pytest.approx(voxels[k] * 5.5**2 * SLICE_MM) for k in (1, 2, 3)
        }
