"""Masks on their way back to the scan: exact in resolution and orientation, and equal when our own
importer reads them."""

import gzip
import itertools
import math
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel import orientations

from data_prep.masks.reading import read_mask
from data_prep.masks.regions import patient_position_mm, regions_of
from data_prep.masks.writing import (
    MaskOutputError,
    Segment,
    dicom_segmentation,
    mask_image,
    orient_back,
    resize_back,
    slice_grid,
)
from data_prep.scan import nifti
from data_prep.scan.archives import list_sources
from data_prep.scan.geometry import canonical_axes, orient
from data_prep.scan.rules import Rules
from data_prep.scan.series import plan_series
from data_prep.scan.volume import load_volume
from data_prep.scan.window import resize_mask, resize_slice
from tests.helpers import dicom_files

ROW_MM, COLUMN_MM, SLICE_MM = 5.5, 5.0, 2.5
ORIGIN = (-150.0, -170.0, -300.0)
THORAX = dicom_files.thorax(22, size=66)[:, 1:, 2:65]  # 65 rows and 63 columns
NUM_SLICES, HEIGHT, WIDTH = THORAX.shape
# Every shift, turn or mirror image differs.
PATTERN = np.random.default_rng(0).random(THORAX.shape) < 0.2
SEGMENT = Segment("nodule", True, "ctssl_jax", "0.1.0", "nodules", "0123456789abcdef")


def slices_of(turned: str = "", hu: np.ndarray = THORAX) -> list[pydicom.Dataset]:
    """DICOM slices of `hu` as they are, or turned about the long axis, transposed, or with a
    mirrored column axis."""
    orientation, origin, spacing = (1, 0, 0, 0, 1, 0), list(ORIGIN), (ROW_MM, COLUMN_MM)
    if turned == "prone":
        hu, orientation = hu[:, ::-1, ::-1], (-1, 0, 0, 0, -1, 0)
        origin[0] += (WIDTH - 1) * COLUMN_MM
        origin[1] += (HEIGHT - 1) * ROW_MM
    elif turned == "transposed":
        hu, orientation, spacing = hu.transpose(0, 2, 1), (0, 1, 0, 1, 0, 0), (COLUMN_MM, ROW_MM)
    elif turned == "turned":  # rows run to the right, columns to posterior: transposed and flipped
        hu, orientation, spacing = (
            hu[:, :, ::-1].transpose(0, 2, 1),
            (0, 1, 0, -1, 0, 0),
            (COLUMN_MM, ROW_MM),
        )
        origin[0] += (WIDTH - 1) * COLUMN_MM
    datasets = dicom_files.slices(
        hu, orientation=orientation, origin=tuple(origin), spacing=SLICE_MM
    )
    for ds in datasets:
        ds.PixelSpacing = [str(value) for value in spacing]
        ds.FrameOfReferenceUID = dicom_files.uid(7)
    return datasets


def scan_of(folder: Path, datasets: list[pydicom.Dataset]):
    volume = dicom_files.only_volume(dicom_files.convert(dicom_files.write(folder, datasets)))
    assert volume.pixel_spacing_mm == (ROW_MM, COLUMN_MM)
    return volume


@pytest.fixture(scope="module", params=["", "prone", "transposed", "turned"])
def any_scan(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    volume = scan_of(folder, slices_of(request.param))
    np.testing.assert_array_equal(volume.hu, THORAX)
    return folder, volume


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    return folder, scan_of(folder, slices_of())


# ---- the way back --------------------------------------------------------------------------------


def test_orient_back_undoes_every_orientation():
    image = np.arange(12).reshape(3, 4)
    seen = set()
    for signs in itertools.product((1, -1), repeat=2):
        for along_x in (True, False):
            right, down = (float(signs[0]), 0.0, 0.0), (0.0, float(signs[1]), 0.0)
            axes = canonical_axes((*right, *down) if along_x else (*down, *right))
            seen.add((axes.transpose, axes.flip_rows, axes.flip_columns))
            np.testing.assert_array_equal(orient_back(orient(image, axes), axes), image)
    assert len(seen) == 8


@pytest.mark.parametrize("size", [16, 24, 48, 96])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((48, 48), (0.8, 0.8)),
        ((48, 32), (0.8, 0.8)),
        ((30, 48), (1.0, 1.0)),
        ((40, 50), (1.2, 0.7)),
    ],
)
def test_places_come_back_to_where_they_were(shape, spacing, size):
    """A ramp over the field, sampled at the centres of the model's pixels, is the same ramp at
    the centres of the scan's pixels."""
    field_mm = max(shape[0] * spacing[0], shape[1] * spacing[1])
    edge_mm = field_mm / size
    middle_mm = (np.arange(size) + 0.5) * edge_mm - field_mm / 2  # from the middle of the field
    for axis in (0, 1):
        ramp = np.broadcast_to(middle_mm[:, None] if axis == 0 else middle_mm, (size, size)).astype(
            np.float32
        )
        expected = (np.arange(shape[axis]) + 0.5 - shape[axis] / 2) * spacing[axis]
        resized = resize_back(ramp, shape, spacing)
        assert resized.shape == shape
        # the filter's reach from the rim
        inner = np.abs(expected) < field_mm / 2 - 2 * max(edge_mm, spacing[axis])
        along = np.moveaxis(resized, axis, 0)[inner]
        # Pillow's weights are exact where they interpolate; where they average they are sampled,
        # not integrated
        atol = 1e-4 if spacing[axis] <= edge_mm else 0.07
        np.testing.assert_allclose(
            along, np.broadcast_to(expected[inner][:, None], along.shape), atol=atol
        )


def test_what_was_never_resized_comes_back_untouched():
    values = np.random.default_rng(0).random((48, 48), np.float32)
    assert resize_back(values, (48, 48), (0.8, 0.8)) is values


def test_the_air_around_a_field_is_cut_off():
    values = np.full((32, 32), 0.9, np.float32)
    values[:, 8:24] = 0.1  # a scan of 32 x 16 lies in the middle half of its square
    assert (
        resize_slice(np.zeros((32, 16)), (1, 1), 32)[0].tolist()
        == [-1000] * 8 + [0] * 16 + [-1000] * 8
    )
    back = resize_back(values, (32, 16), (1, 1))
    np.testing.assert_allclose(back, 0.1, atol=1e-6)


@pytest.mark.parametrize("size", [64, 96, 160])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((128, 128), (0.7, 0.7)), ((128, 100), (0.7, 0.7)), ((96, 128), (0.9, 0.6))],
)
def test_a_sphere_keeps_its_place_and_its_volume(shape, spacing, size):
    y, x = np.ogrid[: shape[0], : shape[1]]
    centre, radius_mm, step_mm = (0.55 * shape[0], 0.4 * shape[1]), 15.0, 1.0
    places, moments = [], np.zeros(2)
    for z in np.arange(-16, 17) * step_mm:
        inside = ((y - centre[0]) * spacing[0]) ** 2 + (
            (x - centre[1]) * spacing[1]
        ) ** 2 < radius_mm**2 - z**2
        resized = resize_mask(inside.astype(np.uint8), spacing, size).astype(np.float32)
        back = resize_back(resized, shape, spacing) > 0.5
        places.append((inside.sum(), back.sum()))
        moments += back.sum(axis=1) @ np.arange(shape[0]), back.sum(axis=0) @ np.arange(shape[1])
    before, after = np.sum(places, axis=0)
    assert after == pytest.approx(before, rel=0.03)
    assert after * np.prod(spacing) * step_mm == pytest.approx(
        4 / 3 * math.pi * radius_mm**3, rel=0.04
    )
    np.testing.assert_allclose(moments / after, centre, atol=0.5)


# ---- NIfTI ---------------------------------------------------------------------------------------


def assert_placed(image: nibabel.Nifti1Image, volume, slices=slice(None)) -> None:
    """Each voxel's affine position is the one that the headers give to the stored pixel."""
    for place, header in zip(np.arange(image.shape[2])[slices], volume.headers, strict=True):
        for row, column in ((0, 0), (header.rows - 1, 3), (5, header.columns - 1)):
            down, right = np.array(header.orientation[3:]), np.array(header.orientation[:3])
            expected = (
                header.position
                + row * header.pixel_spacing[0] * down
                + column * header.pixel_spacing[1] * right
            )
            placed = image.affine @ [column, row, place, 1]
            np.testing.assert_allclose(placed[:3] * [-1, -1, 1], expected, atol=1e-3)


def test_nifti_lies_on_the_dicom_slices_and_reads_back(any_scan, tmp_path):
    folder, volume = any_scan
    image = mask_image(PATTERN, volume, folder)
    image.to_filename(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", volume), PATTERN)
    loaded = nibabel.load(tmp_path / "mask.nii.gz")
    assert loaded.shape == (volume.headers[0].columns, volume.headers[0].rows, NUM_SLICES)
    assert loaded.get_data_dtype() == np.uint8
    assert loaded.header["sform_code"] == loaded.header["qform_code"] == 1
    np.testing.assert_allclose(loaded.header.get_qform(), loaded.header.get_sform(), atol=1e-3)
    assert_placed(loaded, volume)


def test_missing_slices_are_empty_places(tmp_path):
    datasets = slices_of()
    volume = scan_of(tmp_path / "scan", datasets[:6] + datasets[7:])  # in the middle
    mask = np.delete(PATTERN, 6, axis=0)
    image = mask_image(mask, volume, tmp_path / "scan")
    assert image.shape[2] == NUM_SLICES and not np.asarray(image.dataobj)[:, :, 6].any()
    np.testing.assert_array_equal(np.asarray(image.dataobj)[:, :, 7].T, PATTERN[7])
    image.to_filename(tmp_path / "mask.nii")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume), mask)


def test_a_tilted_gantry_shears_the_affine(tmp_path):
    angle = math.radians(20)
    datasets = slices_of()
    for i, ds in enumerate(datasets):  # slices tilted about the x axis, stacked along z
        ds.ImageOrientationPatient = [
            1,
            0,
            0,
            0,
            round(math.cos(angle), 8),
            round(-math.sin(angle), 8),
        ]
        ds.ImagePositionPatient = [*ORIGIN[:2], ORIGIN[2] + i * SLICE_MM]
    volume = scan_of(tmp_path / "scan", datasets)
    image = mask_image(PATTERN, volume, tmp_path / "scan")
    assert image.header["sform_code"] == 1 and image.header["qform_code"] == 0
    assert_placed(image, volume)
    image.to_filename(tmp_path / "mask.nii")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume), PATTERN)


@pytest.mark.parametrize("axis", [0, 2])
def test_slices_off_the_grid_are_told(tmp_path, axis):
    """Along the slices or within the plane. A shift that the importer allows is allowed."""
    datasets = slices_of()
    pitch = (COLUMN_MM, ROW_MM, SLICE_MM)[axis]
    for name, shift, fits in (("small", 0.2, True), ("large", 0.4, False)):
        position = [*ORIGIN[:2], ORIGIN[2] + 10 * SLICE_MM]
        position[axis] += shift * pitch
        datasets[10].ImagePositionPatient = [f"{value:.6g}" for value in position]
        volume = scan_of(tmp_path / name, datasets)
        if fits:
            mask_image(PATTERN, volume, tmp_path / name).to_filename(tmp_path / "mask.nii")
            np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume), PATTERN)
        else:
            with pytest.raises(MaskOutputError, match=r"^1 of 22 slices lie off a regular grid"):
                slice_grid(volume)


AFFINE = np.array(
    [[-COLUMN_MM, 0, 0, 150], [0, -ROW_MM, 0, 170], [0, 0, 2.5, -300], [0, 0, 0, 1.0]]
)


def nifti_scan(
    folder: Path, axes: str, name: str, version: int = 1, unit: str = "mm"
) -> tuple[nibabel.Nifti1Image, object]:
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(axes)
    )
    stored = orientations.apply_orientation(THORAX.transpose(2, 1, 0), turn)
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    factor = {"mm": 1, "meter": 1e-3}[unit]
    affine = AFFINE @ orientations.inv_ornt_aff(turn, THORAX.shape[::-1])
    image = kind(stored, np.diag([factor] * 3 + [1]) @ affine)
    image.header.set_xyzt_units(unit)
    image.set_qform(image.affine, 1)
    image.header["descrip"] = b"Doe^Jane"
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("scan.nii.gz", gzip.compress(image.to_bytes()))
    else:
        image.to_filename(folder / name)
    (source,) = list_sources(folder)
    (planned,) = plan_series([nifti.read_header(folder, source, None)], Rules())
    return image, load_volume(folder, planned, Rules())


@pytest.mark.parametrize(
    ("axes", "name", "version", "unit"),
    [
        ("LPS", "scan.nii", 1, "mm"),
        ("RAS", "scan.nii.gz", 1, "meter"),
        ("RPI", "scan.zip", 1, "mm"),
        ("PLS", "scan.nii.gz", 2, "mm"),
        ("SPL", "scan.nii.gz", 1, "mm"),
        ("AIL", "scan.nii", 1, "meter"),
    ],
)
def test_a_nifti_mask_overlays_its_scan_voxel_for_voxel(tmp_path, axes, name, version, unit):
    original, volume = nifti_scan(tmp_path / "scan", axes, name, version, unit)
    np.testing.assert_array_equal(volume.hu, THORAX)
    image = mask_image(volume.hu > 500, volume, tmp_path / "scan")  # bone
    assert image.shape == original.shape
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(original.dataobj) > 500)
    np.testing.assert_allclose(image.affine, original.affine, atol=1e-4)
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert image.header[code] == original.header[code]
    assert b"Doe" not in image.to_bytes()
    image.to_filename(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", volume), THORAX > 500)


def test_a_nifti_mask_has_all_places_of_the_scan(tmp_path):
    original, volume = nifti_scan(tmp_path / "scan", "RAI", "scan.nii")
    kept = [i for i in range(NUM_SLICES) if i != 4]
    fewer = type(volume)(
        **{**vars(volume), "headers": tuple(volume.headers[i] for i in kept), "hu": volume.hu[kept]}
    )
    image = mask_image(PATTERN[kept], fewer, tmp_path / "scan")
    assert image.shape == original.shape
    whole = np.asarray(mask_image(PATTERN, volume, tmp_path / "scan").dataobj)
    empty = np.flatnonzero(~np.asarray(image.dataobj).any(axis=(0, 1)))
    assert empty.tolist() == [NUM_SLICES - 1 - 4]  # its third axis runs to inferior
    rest = np.delete(np.arange(NUM_SLICES), empty)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[:, :, rest], whole[:, :, rest])


# ---- DICOM segmentation --------------------------------------------------------------------------


def written(segmentation: pydicom.Dataset, path: Path) -> Path:
    segmentation.save_as(path)
    return path


def test_a_segmentation_reads_back(any_scan, tmp_path):
    pytest.importorskip("highdicom")
    folder, volume = any_scan
    path = written(
        dicom_segmentation(PATTERN, volume, folder, SEGMENT), tmp_path / "segmentation.dcm"
    )
    np.testing.assert_array_equal(read_mask(path, volume), PATTERN)
    ds = pydicom.dcmread(path)
    # it goes back to the archive
    assert (ds.PatientID, str(ds.PatientName)) == ("patient-1", "Doe^Jane")
    assert ds.StudyInstanceUID == dicom_files.uid(1) and ds.SeriesInstanceUID != dicom_files.uid(
        1, 1
    )
    (segment,) = ds.SegmentSequence
    assert (segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType) == (
        1,
        "nodule",
        "AUTOMATIC",
    )
    assert segment.SegmentAlgorithmName == "ctssl_jax"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "27925004"
    (referenced,) = ds.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == dicom_files.uid(1, 1)


def test_only_slices_with_foreground_are_frames(scan, tmp_path):
    pytest.importorskip("highdicom")
    folder, volume = scan
    mask = np.zeros(THORAX.shape, bool)
    mask[3, 10, 20] = mask[17, 40, 5] = True
    tissue = SEGMENT._replace(label="effusion", nodule=False)
    path = written(dicom_segmentation(mask, volume, folder, tissue), tmp_path / "a.dcm")
    ds = pydicom.dcmread(path)
    assert ds.NumberOfFrames == 2
    assert ds.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    np.testing.assert_array_equal(read_mask(path, volume), mask)
    mask[:] = False
    np.testing.assert_array_equal(
        read_mask(
            written(dicom_segmentation(mask, volume, folder, SEGMENT), tmp_path / "b.dcm"), volume
        ),
        mask,
    )


def test_a_segmentation_of_a_multi_frame_scan(tmp_path):
    pytest.importorskip("highdicom")
    hu = dicom_files.thorax(22, size=64)
    order = np.random.default_rng(1).permutation(22).tolist()
    ds = dicom_files.enhanced(hu, intercepts=[-1024] * 22, order=order)
    ds.FrameOfReferenceUID = dicom_files.uid(7)
    folder = dicom_files.write(tmp_path / "scan", [ds])
    volume = dicom_files.only_volume(dicom_files.convert(folder))
    mask = np.random.default_rng(2).random(hu.shape) < 0.1
    path = written(dicom_segmentation(mask, volume, folder, SEGMENT), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_mask(path, volume), mask)
    mask_image(mask, volume, folder).to_filename(tmp_path / "mask.nii")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume), mask)


def test_what_a_segmentation_needs_is_named(tmp_path):
    pytest.importorskip("highdicom")
    datasets = slices_of()
    for ds in datasets:
        del ds.FrameOfReferenceUID
    volume = scan_of(tmp_path / "scan", datasets)
    with pytest.raises(
        MaskOutputError,
        match=r"lack what a segmentation must repeat \(no FrameOfReferenceUID\)$",
    ):
        dicom_segmentation(PATTERN, volume, tmp_path / "scan", SEGMENT)
    _, nifti_volume = nifti_scan(tmp_path / "nifti", "LPS", "scan.nii")
    with pytest.raises(MaskOutputError, match="NIfTI"):
        dicom_segmentation(PATTERN, nifti_volume, tmp_path / "nifti", SEGMENT)


# ---- regions -------------------------------------------------------------------------------------


def test_regions_by_hand(scan):
    _, volume = scan
    mask = np.zeros(THORAX.shape, bool)
    mask[4:7, 10:12, 20:24] = True  # 24 voxels
    mask[7, 12, 24] = True  # shares a corner with them
    mask[15, 30, 31] = True
    probabilities = np.where(mask, 0.6, 0.1).astype(np.float32)
    probabilities[15, 30, 31], probabilities[5, 10, 20] = 0.9, 0.7
    large, small = regions_of(mask, probabilities, volume)
    voxel_ml = ROW_MM * COLUMN_MM * SLICE_MM / 1000
    assert (large["num_voxels"], small["num_voxels"]) == (25, 1)
    assert large["volume_ml"] == pytest.approx(25 * voxel_ml, abs=1e-6)
    assert large["equivalent_diameter_mm"] == pytest.approx(
        2 * (3 * 25000 * voxel_ml / 4 / math.pi) ** (1 / 3), abs=1e-3
    )
    assert (
        large["first_slice"],
        large["last_slice"],
        large["largest_slice"],
        large["centre_slice"],
    ) == (4, 7, 4, 5)
    assert large["highest_probability"] == pytest.approx(0.7) and small[
        "highest_probability"
    ] == pytest.approx(0.9)
    expected = (ORIGIN[0] + 31 * COLUMN_MM, ORIGIN[1] + 30 * ROW_MM, ORIGIN[2] + 15 * SLICE_MM)
    assert small["centre_lps_mm"] == pytest.approx(expected)
    assert small["centre_position_mm"] == pytest.approx(ORIGIN[2] + 15 * SLICE_MM)
    assert regions_of(np.zeros_like(mask), probabilities, volume) == []


def test_a_place_in_the_patient_is_that_of_the_canonical_voxel(any_scan):
    _, volume = any_scan
    position_mm = patient_position_mm(np.array([2.5, 10, 20.25]), volume)
    expected = (ORIGIN[0] + 20.25 * COLUMN_MM, ORIGIN[1] + 10 * ROW_MM, ORIGIN[2] + 2.5 * SLICE_MM)
    np.testing.assert_allclose(position_mm, expected, atol=1e-6)


@pytest.mark.parametrize("turned", ["prone", "transposed", "turned"])
def test_a_mask_of_a_scan_with_some_slices_turned(tmp_path, turned):
    """Every second slice is stored in another orientation, as by a workstation."""
    kinds = zip(slices_of(), slices_of(turned), strict=True)
    datasets = [pair[i % 2] for i, pair in enumerate(kinds)]
    volume = scan_of(tmp_path / "scan", datasets)
    np.testing.assert_array_equal(volume.hu, THORAX)
    nibabel.save(mask_image(PATTERN, volume, tmp_path / "scan"), tmp_path / "mask.nii")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume) > 0, PATTERN)
    place = patient_position_mm(np.array([3, 5, 7]), volume)
    expected = np.add(ORIGIN, (7 * COLUMN_MM, 5 * ROW_MM, 3 * SLICE_MM))
    np.testing.assert_allclose(place, expected, atol=1e-6)
    with pytest.raises(MaskOutputError, match="stored turned"):
        dicom_segmentation(PATTERN, volume, tmp_path / "scan", SEGMENT)
