"""NIfTI files as programs in the field write them: exact, or refused by name."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
from nibabel import orientations

from data_prep.raw import scans
from data_prep.scan.headers import NotAnImage
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection
from data_prep.system.errors import InputError
from tests.helpers.nifti_files import (
    AFFINE,
    COLUMN_MM,
    NUM_SLICES,
    ROW_MM,
    THORAX,
    headers_of,
    image_of,
    load,
    save_as_it_is,
    with_forms,
    write,
    write_table,
)

SPACING_MM = (ROW_MM, COLUMN_MM)


def assert_exact(volume, notes=()):
    assert not isinstance(volume, (NotAnImage, Rejection)), volume
    np.testing.assert_array_equal(volume.hu, THORAX)
    assert volume.pixel_spacing_mm == pytest.approx(SPACING_MM)
    assert volume.slice_spacing_mm == pytest.approx(2.5)
    assert volume.position_mm[0] == pytest.approx(-300)
    assert set(notes) <= set(volume.notes)


def assert_refused(loaded, reason, detail=""):
    assert isinstance(loaded, (NotAnImage, Rejection))
    assert loaded.reason == reason and detail in loaded.detail


# ---- where the voxels begin ----------------------------------------------------------------------


def with_offset(path, offset, extension=b"", flag=bytes(4), trailing=b"", big=False):
    """A file of the thorax with `extension` behind its header, which says `offset`."""
    header = image_of(THORAX).header
    values = np.ascontiguousarray(THORAX.transpose(2, 1, 0))
    if big:
        header, values = header.as_byteswapped(">"), values.astype(">i2")
    header["magic"], header["vox_offset"] = b"n+1", offset
    header.set_slope_inter(1, 0)
    content = header.binaryblock + flag + extension + values.tobytes(order="F") + trailing
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


EXTENSION = struct.pack("<ii", 32, 6) + b"a comment of a man" + bytes(6)


@pytest.mark.parametrize(
    ("offset", "layout"),
    [
        (0, {}),
        (0, {"big": True}),
        (16, {"trailing": b"\n"}),
        (348, {"flag": b""}),  # the header ends there: no flag for extensions
        (352, {"trailing": bytes(100)}),
        (0, {"extension": EXTENSION, "flag": b"\1\0\0\0"}),
        (352, {"extension": EXTENSION * 2, "flag": b"\1\0\0\0"}),  # not counted by the writer
        (384, {"extension": EXTENSION, "flag": b"\1\0\0\0"}),
        (0, {"extension": EXTENSION, "flag": b"\1\0\0\0", "trailing": bytes(7)}),
    ],
)
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_voxels_begin_behind_header_and_extensions(tmp_path, name, offset, layout):
    with_offset(tmp_path / name, offset, **layout)
    assert_exact(load(tmp_path))


@pytest.mark.parametrize("offset", [-16, float("nan"), 1e30, 350.5])
def test_an_offset_that_is_none_is_exact_or_refused(tmp_path, offset):
    with_offset(tmp_path / "scan.nii", offset)
    loaded = load(tmp_path)
    if isinstance(loaded, (NotAnImage, Rejection)):
        assert loaded.reason in ("undecodable_pixels", "truncated_pixel_data", "unreadable")
    else:
        assert_exact(loaded)


def test_bytes_behind_the_compressed_file(tmp_path):
    write(tmp_path / "scan.nii.gz")
    with open(tmp_path / "scan.nii.gz", "ab") as file:
        file.write(bytes(512) + b"tape block")
    assert_exact(load(tmp_path))


# ---- not a number --------------------------------------------------------------------------------


def test_nan_up_to_the_edge_is_padding(tmp_path):
    outside = np.indices(THORAX.shape).sum(axis=0) < 20  # an oblique corner, as of a rotation
    outside[0] = True  # a slice beyond the registered scan
    values = np.where(outside, np.nan, THORAX).astype(np.float32)
    write(tmp_path / "scan.nii", (values - 24) / 2, scale=(2, 24))
    volume = load(tmp_path)
    assert not isinstance(volume, (NotAnImage, Rejection)), volume
    assert volume.hu.dtype == np.int16
    np.testing.assert_array_equal(volume.hu, np.where(outside, -1000, THORAX))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_none_within_the_body_are_refused(tmp_path, value):
    values = THORAX.astype(np.float32)
    values[3:9, 30:34, 30:34] = value
    write(tmp_path / "scan.nii", values)
    assert_refused(load(tmp_path), "undecodable_pixels")
    values = THORAX.astype(np.float32)
    values[4, 30:34, 30:34] = value  # one slice is lost by name
    write(tmp_path / "scan.nii", values)
    volume = load(tmp_path)
    assert [reason for _, reason in volume.dropped] == ["undecodable_pixels"]
    np.testing.assert_array_equal(volume.hu, np.delete(THORAX, 4, axis=0))


# ---- where the voxels lie ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "dtype"),
    [("SPL", ">f4"), *((axes, "<i2") for axes in "SPL LSP IAR PSR RIA AIL SRA".split())],
)
def test_any_axis_may_count_the_slices(tmp_path, axes, dtype):
    path = write(tmp_path / "scan.nii", THORAX.astype(dtype), axes)
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == tuple(axes)
    assert_exact(load(tmp_path))


def test_a_coronal_reformat_of_thick_slices_is_refused(tmp_path):
    """Its pixels are no slices: 12 mm from front to back."""
    coronal = AFFINE @ np.diag([1, 12 / ROW_MM, 1, 1])
    write(tmp_path / "scan.nii", axes="LSP", affine=coronal)
    assert_refused(load(tmp_path), "not_axial")


def tilted(degrees):
    """The affine of a scan with a tilted gantry: slices are sheared along y."""
    affine = AFFINE.copy()
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine[1:3, 1] = [-ROW_MM * cosine, ROW_MM * sine]
    return affine


def closest_rotation(affine):
    """The affine without its shear, as nibabel, dcm2niix and others write it as qform."""
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), None)
    image.header.set_qform(affine, code=1, strip_shears=True)
    return image.header.get_qform()


def plane_with_normal(affine, length):
    """The rotation of the slices' plane, as a DICOM orientation gives it."""
    rigid = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    rigid[:3, 2] = length * normal / np.linalg.norm(normal)
    return rigid


@pytest.mark.parametrize("degrees", [-15, 8, 20])
@pytest.mark.parametrize("qform", ["closest", "plane", "plane and distance"])
def test_a_tilted_scan_whose_qform_is_its_rotation(tmp_path, degrees, qform):
    sheared = tilted(degrees)
    if qform == "closest":
        rigid = closest_rotation(sheared)
    else:
        distance = 2.5 * np.cos(np.radians(degrees)) if "distance" in qform else 2.5
        rigid = plane_with_normal(sheared, distance)
    save_as_it_is(with_forms(sheared, rigid), tmp_path / "scan.nii")
    volume = load(tmp_path)
    assert not isinstance(volume, (NotAnImage, Rejection)), volume
    np.testing.assert_array_equal(volume.hu, THORAX)
    assert volume.gantry_tilt_degrees == pytest.approx(abs(degrees), abs=0.01)
    assert "gantry_tilt" in volume.notes


def test_a_sheared_sform_with_another_qform_is_refused(tmp_path):
    save_as_it_is(with_forms(tilted(15), AFFINE), tmp_path / "scan.nii")
    assert_refused(load(tmp_path), "unknown_affine", "sform and qform differ")


def with_pixdim(path, pixdim, qform=None):
    image = with_forms(AFFINE, qform)
    image.header["pixdim"][1:4] = pixdim
    save_as_it_is(image, path)


@pytest.mark.parametrize(
    "pixdim",
    [
        (COLUMN_MM, ROW_MM, 2.5),
        (COLUMN_MM, -ROW_MM, 2.505),
        (1, 1, 1),  # never set
        (0, 0, 0),
        (np.nan, np.nan, np.nan),
    ],
)
def test_a_spacing_that_agrees_or_is_not_set(tmp_path, pixdim):
    with_pixdim(tmp_path / "scan.nii", pixdim)
    assert_exact(load(tmp_path))


@pytest.mark.parametrize("pixdim", [(COLUMN_MM, ROW_MM, 5), (0.7, 0.7, 2.5), (2.5, 5.5, 5)])
def test_a_spacing_against_the_sform_is_refused_or_the_table_tells(tmp_path, pixdim):
    folder = tmp_path / "scans"
    folder.mkdir()
    with_pixdim(folder / "scan.nii", pixdim)
    assert_refused(load(folder), "unknown_affine", "pixdim and sform")
    spacing = f'scan,"[{ROW_MM}, {COLUMN_MM}]",2.5'
    assert_exact(load(folder, write_table(tmp_path / "t.csv", "XYSpacing,ZSpacing", spacing)))


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3), ("unknown", 1)])
@pytest.mark.parametrize("forms", ["both", "sform", "qform"])
def test_other_units_of_length_are_converted(tmp_path, unit, factor, forms):
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    image = with_forms(affine if forms != "qform" else None, affine if forms != "sform" else None)
    image.header.set_xyzt_units(unit, "sec")
    save_as_it_is(image, tmp_path / "scan.nii")
    assert_exact(load(tmp_path))


def test_a_unit_of_no_meaning_is_refused(tmp_path):
    image = with_forms(AFFINE, AFFINE)
    image.header["xyzt_units"] = 5
    save_as_it_is(image, tmp_path / "scan.nii")
    assert_refused(load(tmp_path), "unknown_affine", "unit of length")


# ---- more than one volume, other files -----------------------------------------------------------


def test_several_volumes_are_named_and_one_is_a_scan(tmp_path):
    image = image_of(THORAX)
    values = np.asarray(image.dataobj)
    for name, parts in {"phases": [values, values], "once": [values]}.items():
        (tmp_path / name).mkdir()
        file = nibabel.Nifti1Image(np.stack(parts, axis=-1), image.affine)
        file.header.set_xyzt_units("mm", "sec")
        file.to_filename(tmp_path / name / "scan.nii.gz")
    assert_refused(load(tmp_path / "phases"), "several_volumes", "4 dimensions")
    with pytest.raises(InputError, match=r"4-D.*2 volumes"):
        scans.plan_scans(tmp_path / "phases", "nifti")
    assert_exact(load(tmp_path / "once"))
    (tmp_path / "flat").mkdir()
    flat = nibabel.Nifti1Image(values[:, :, 0], image.affine)
    flat.to_filename(tmp_path / "flat" / "scan.nii")
    assert_refused(load(tmp_path / "flat"), "unreadable", "2 dimensions")


def test_pairs_of_header_and_image_are_named(tmp_path):
    nibabel.Nifti1Pair(THORAX.transpose(2, 1, 0), AFFINE).to_filename(tmp_path / "scan.img")
    entries = headers_of(tmp_path)
    assert len(entries) == 2 and {entry.reason for entry in entries} == {"not_nifti"}
    assert all("pair" in entry.detail and ".nii" in entry.detail for entry in entries)
    with pytest.raises(InputError, match="pair"):
        scans.plan_scans(tmp_path / "scan.hdr")


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.float64])
def test_a_slope_that_is_none_means_no_scaling(tmp_path, slope, dtype):
    path = write(tmp_path / "scan.nii", THORAX.astype(dtype))
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<ff", slope, 0 if slope == 0 else np.nan)
    path.write_bytes(content)
    assert_exact(load(tmp_path), ["no_rescale_tags"])


# ---- a table that repeats the rescale ------------------------------------------------------------


@pytest.mark.parametrize("intercept", [-1024, -8192])
@pytest.mark.parametrize("scale", [None, (1, 0)])
def test_values_that_are_hu_already_are_not_rescaled_by_the_table(tmp_path, intercept, scale):
    """CT-RATE's second version: HU, beside the table of the first."""
    folder = tmp_path / "scans"
    folder.mkdir()
    write(folder / "valid_1_a_1.nii.gz", scale=scale)
    row = f"valid_1_a_1.nii.gz,1,{intercept}"
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", row)
    assert_exact(load(folder, table), ["hu_against_table"])


@pytest.mark.parametrize("intercept", [-1024, -8192])
def test_stored_values_are_rescaled_by_the_table(tmp_path, intercept):
    folder = tmp_path / "scans"
    folder.mkdir()
    stored = THORAX - np.int16(intercept)
    stored[:, :6] = -2000  # padding that is no HU either
    write(folder / "scan.nii", stored)
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", f"scan,1,{intercept}")
    volume = load(folder, table)
    assert not isinstance(volume, (NotAnImage, Rejection)), volume
    np.testing.assert_array_equal(volume.hu[:, 6:], THORAX[:, 6:])
    assert "hu_against_table" not in volume.notes


def test_values_that_are_hu_in_neither_way_are_refused(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    write(folder / "scan.nii", THORAX + np.int16(3000))
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", "scan,1,-1024")
    assert_refused(load(folder, table), "ambiguous_rescale")


# ---- no lung -------------------------------------------------------------------------------------


def test_a_file_without_lung_is_refused_early(tmp_path, monkeypatch):
    from data_prep.scan import volume

    calls = []
    to_hu = volume.to_hu
    monkeypatch.setattr(volume, "to_hu", lambda *a: calls.append(1) or to_hu(*a))
    values = np.concatenate([np.where(THORAX < -700, 30, THORAX)] * 4)
    values[:, :4] = -1000
    write(tmp_path / "scan.nii", values)
    assert_refused(load(tmp_path), "no_chest", "of lung")
    assert len(calls) < len(values) / 4
    assert not isinstance(load(tmp_path, rules=Rules(require_lung=False)), Rejection)


def test_orientations_of_the_helper():
    """What `write` stores along other axes is what nibabel brings back."""
    image = image_of(THORAX, "SPL")
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("SPL"), orientations.axcodes2ornt("LPS")
    )
    back = orientations.apply_orientation(np.asarray(image.dataobj), turn)
    np.testing.assert_array_equal(back.transpose(2, 1, 0), THORAX)
    assert len(THORAX) == NUM_SLICES
