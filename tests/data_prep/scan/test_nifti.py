"""NIfTI archives: the same slices as from DICOM, rescale applied once, refusals by reason."""

import gzip
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS
from data_prep.scan import nifti_metadata
from data_prep.scan.headers import NotAnImage
from data_prep.scan.nifti_metadata import read_metadata
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, plan_series, select_reconstructions
from data_prep.scan.volume import load_volume
from data_prep.system.errors import InputError
from tests.helpers import dicom_files
from tests.helpers.nifti_files import (
    AFFINE,
    COLUMN_MM,
    NUM_SLICES,
    ORIGIN,
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


@pytest.fixture(scope="module")
def from_dicom(tmp_path_factory):
    datasets = dicom_files.slices(THORAX, origin=ORIGIN)
    for ds in datasets:
        ds.PixelSpacing = [str(ROW_MM), str(COLUMN_MM)]
    folder = dicom_files.write(tmp_path_factory.mktemp("dicom"), datasets)
    volume = dicom_files.only_volume(dicom_files.convert(folder))
    np.testing.assert_array_equal(volume.hu, THORAX)
    return volume


def assert_same(volume, expected) -> None:
    assert not isinstance(volume, (NotAnImage, Rejection)), volume
    assert volume.hu.dtype == expected.hu.dtype
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.position_mm, expected.position_mm, atol=1e-4)
    np.testing.assert_array_equal(volume.pair_valid, expected.pair_valid)
    assert volume.pixel_spacing_mm == pytest.approx(expected.pixel_spacing_mm)
    assert volume.slice_spacing_mm == pytest.approx(expected.slice_spacing_mm)
    assert volume.slice_thickness_mm == pytest.approx(expected.slice_thickness_mm)
    assert volume.chest.lung_volume_ml == pytest.approx(expected.chest.lung_volume_ml)


# ---- the same slices as from DICOM ---------------------------------------------------------------


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAS", "RPI", "LPI", "PLS", "ARI"])
def test_any_axes_give_the_slices_of_dicom(tmp_path, from_dicom, axes):
    assert nibabel.aff2axcodes(
        nibabel.load(write(tmp_path / "scan.nii.gz", axes=axes)).affine
    ) == tuple(axes)
    assert_same(load(tmp_path), from_dicom)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (THORAX, None),
        (THORAX, (1, 0)),
        (THORAX.astype(np.int32), None),
        (THORAX.astype(np.float32), None),
        (THORAX.astype(np.float64), (1, 0)),
        ((THORAX + 1024).astype(np.uint16), (1, -1024)),
        (2 * (THORAX + 1024), (0.5, -1024)),
        ((THORAX / 4.0).astype(np.float32), (4, 0)),
        (THORAX.astype(">i2"), None),
    ],
)
def test_any_data_type_and_scale_give_the_slices_of_dicom(tmp_path, from_dicom, values, scale):
    path = write(tmp_path / "scan.nii", values, "RAS", scale)
    np.testing.assert_array_equal(
        nibabel.load(path).get_fdata()[::-1, ::-1].transpose(2, 1, 0), THORAX
    )
    volume = load(tmp_path)
    assert_same(volume, from_dicom)
    assert ("no_rescale_tags" in volume.notes) == (scale is None)
    assert "fractional_hu" not in volume.notes and "no_slice_thickness" in volume.notes


def test_big_endian_files_and_nifti_2(tmp_path, from_dicom):
    image = image_of(THORAX)
    nibabel.Nifti2Image(np.asarray(image.dataobj), image.affine).to_filename(tmp_path / "a.nii.gz")
    big = nibabel.Nifti1Image(image.dataobj, image.affine, image.header.as_byteswapped(">"))
    big.to_filename(tmp_path / "b.nii")
    assert (tmp_path / "b.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    planned = plan_series(headers_of(tmp_path), Rules())
    assert len(planned) == 2
    for candidate in planned:
        assert_same(load_volume(tmp_path, candidate, Rules()), from_dicom)


def test_fractions_stay(tmp_path):
    write(tmp_path / "scan.nii", (THORAX + np.float32(0.25)).astype(np.float32))
    volume = load(tmp_path)
    assert volume.hu.dtype == np.float32 and "fractional_hu" in volume.notes
    np.testing.assert_array_equal(volume.hu[THORAX > -1000] - THORAX[THORAX > -1000], 0.25)


def test_files_in_zip_files_and_compressed_in_parts(tmp_path, from_dicom):
    raw = write(tmp_path / "scan.nii").read_bytes()
    (tmp_path / "scan.nii").unlink()
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.writestr("a/scan.nii.gz", gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    assert_same(load(tmp_path), from_dicom)


def test_one_trailing_dimension_of_one(tmp_path, from_dicom):
    image = image_of(THORAX)
    nibabel.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine).to_filename(
        tmp_path / "scan.nii"
    )
    assert_same(load(tmp_path), from_dicom)


# ---- what a file cannot be used for --------------------------------------------------------------


def test_an_oblique_or_sheared_affine_is_refused(tmp_path):
    angle = np.radians(50)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    write(tmp_path / "scan.nii", affine=turn @ AFFINE)
    assert load(tmp_path).reason == "not_axial"
    sheared = AFFINE.copy()
    sheared[0, 1] = 2
    write(tmp_path / "scan.nii", affine=sheared)
    assert load(tmp_path).reason == "unknown_orientation"


def test_either_form_is_enough_and_they_must_agree(tmp_path, from_dicom):
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.05
    for sform, qform in ((AFFINE, None), (None, AFFINE), (AFFINE, AFFINE), (AFFINE, shifted)):
        save_as_it_is(with_forms(sform, qform), tmp_path / "scan.nii")
        assert_same(load(tmp_path), from_dicom)
    flipped = AFFINE @ np.diag([-1, 1, 1, 1])  # the classic left-right mistake
    shifted[0, 3] += 0.1
    for other in (flipped, shifted):
        save_as_it_is(with_forms(AFFINE, other), tmp_path / "scan.nii")
        refused = load(tmp_path)
        assert refused.reason == "unknown_affine" and "sform and qform differ" in refused.detail
    save_as_it_is(with_forms(None, None), tmp_path / "scan.nii")
    assert load(tmp_path).reason == "unknown_affine"


def test_a_small_error_of_direction_counts_where_it_is_largest(tmp_path):
    tilted = AFFINE.copy()
    tilted[2, 0] = 0.005  # 0.32 mm at the last column
    save_as_it_is(with_forms(tilted, AFFINE), tmp_path / "scan.nii")
    assert load(tmp_path).detail == "sform and qform differ by up to 0.32 mm"


@pytest.mark.parametrize("row", [[0, 0, 0, -300], [0, 0, np.nan, -300]])
def test_affines_that_say_nothing_are_refused(tmp_path, row):
    image = image_of(THORAX)
    image.header["srow_z"] = row
    save_as_it_is(image, tmp_path / "scan.nii")
    assert load(tmp_path).reason == "unknown_affine"


def test_files_that_hold_no_scan(tmp_path):
    good = write(tmp_path / "good.nii.gz").read_bytes()
    raw = gzip.decompress(good)
    contents = {
        "bytes.nii": (b"no scan at all" * 50, "not_nifti"),
        "cut.nii": (raw[:200], "not_nifti"),
        "cut.nii.gz": (good[:200], "not_nifti"),
        "broken.nii.gz": (good[:15] + bytes(50) + good[65:], "unreadable"),
        "empty.nii.gz": (b"", "not_nifti"),
        "pair.nii": (raw[:344] + b"ni1\0" + raw[348:], "not_nifti"),
        "notes.txt": (raw, "not_nifti"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    image = image_of(THORAX)
    four = np.stack([np.asarray(image.dataobj)] * 2, axis=-1)
    nibabel.Nifti1Image(four, image.affine).to_filename(tmp_path / "four.nii")
    reasons = {entry.source.path: getattr(entry, "reason", "") for entry in headers_of(tmp_path)}
    expected = {name: reason for name, (_, reason) in contents.items()}
    assert reasons == expected | {"good.nii.gz": "", "four.nii": "several_volumes"}


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_voxels_refuse_the_volume(tmp_path, compressed):
    raw = write(tmp_path / "scan.nii").read_bytes()[:-1]
    (tmp_path / "scan.nii").unlink()
    name = "scan.nii.gz" if compressed else "scan.nii"
    (tmp_path / name).write_bytes(gzip.compress(raw) if compressed else raw)
    assert load(tmp_path).reason == "truncated_pixel_data"


def test_a_damaged_byte_of_compressed_voxels_refuses_the_volume(tmp_path):
    packed = bytearray(gzip.compress(write(tmp_path / "scan.nii").read_bytes(), compresslevel=0))
    (tmp_path / "scan.nii").unlink()
    packed[len(packed) // 2] ^= 1  # stored, not deflated: only the checksum tells
    (tmp_path / "scan.nii.gz").write_bytes(packed)
    assert load(tmp_path).reason == "undecodable_pixels"


def test_values_that_are_no_hu_refuse_the_volume(tmp_path):
    values = THORAX.astype(np.float32)
    values[:3, 30, 30] = np.nan
    write(tmp_path / "scan.nii", values)
    assert load(tmp_path).reason == "undecodable_pixels"
    write(tmp_path / "scan.nii", (THORAX + 1024).astype(np.uint16))
    assert load(tmp_path).reason == "missing_rescale"
    write(tmp_path / "scan.nii", (THORAX + 1024).astype(np.uint16), scale=(1, 0))
    assert load(tmp_path).reason == "implausible_hu"
    colour = np.zeros(THORAX.shape[::-1], [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(colour, image_of(THORAX).affine).to_filename(tmp_path / "scan.nii")
    assert load(tmp_path).reason == "not_grey"


# ---- the table of metadata -----------------------------------------------------------------------

RAW = (THORAX + 1024).astype(np.int16)


@pytest.mark.parametrize(
    ("stored", "scale", "row"),
    [
        (RAW, None, "1,-1024"),
        (RAW, (1, 0), "1,-1024"),  # a scale of 1 and 0 says nothing
        (RAW, (1, -1024), "1,-1024"),  # both say it: it is applied once
        (RAW, (1, -1024), ","),
        (2 * RAW, (0.5, -1024), "0.5,-1024"),
        (THORAX, None, "1,0"),
        (THORAX, (1, 0), ","),
    ],
)
def test_slope_and_intercept_are_applied_exactly_once(tmp_path, from_dicom, stored, scale, row):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans / "scan.nii.gz", stored, scale=scale)
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", f"scan.nii.gz,{row}")
    assert_same(load(scans, table), from_dicom)


@pytest.mark.parametrize(
    ("scale", "row"),
    [((1, -1024), "1,-8192"), ((2, 0), "1,-1024"), ((1, -1024), "1,"), ((1, -1024), "1,0")],
)
def test_two_different_rescales_are_refused(tmp_path, scale, row):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans / "scan.nii.gz", RAW, scale=scale)
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", f"scan,{row}")
    assert load(scans, table).reason == "ambiguous_rescale"


def test_half_a_rescale_is_refused(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans / "scan.nii.gz", RAW)
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", "scan,1,")
    assert load(scans, table).reason == "missing_rescale"


def test_the_table_tells_what_the_file_does_not(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans / "scan.nii.gz")
    columns = (
        "PatientID,PatientSex,PatientAge,Manufacturer,ConvolutionKernel,SliceThickness,Comment"
    )
    table = write_table(tmp_path / "t.csv", columns, "scan,p7,Female,061Y,SIEMENS,B30f,1.5,secret")
    volume = load(scans, table)
    first = volume.headers[0]
    assert (first.patient_id, first.sex, first.age, first.manufacturer) == (
        "p7",
        "F",
        61,
        "SIEMENS",
    )
    assert (
        first.kernel == "B30f"
        and volume.slice_thickness_mm == 1.5
        and volume.slice_spacing_mm == 2.5
    )
    assert volume.notes == ("no_rescale_tags",)
    table = write_table(tmp_path / "thick.csv", "SliceThickness", "scan,5")
    assert load(scans, table).reason == "too_thick"


@pytest.mark.parametrize("axes", ["LPS", "PLS"])
def test_spacing_of_the_table_goes_before_an_affine_that_differs(tmp_path, axes):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans / "scan.nii.gz", axes=axes)
    spacing = "XYSpacing,ZSpacing"
    volume = load(scans, write_table(tmp_path / "a.csv", spacing, 'scan,"[5.51, 5.01]",2.51'))
    # within 1 %: the affine stays
    assert volume.pixel_spacing_mm == pytest.approx((ROW_MM, COLUMN_MM))
    assert "spacing_from_metadata" not in volume.notes
    volume = load(scans, write_table(tmp_path / "b.csv", spacing, 'scan,"[6, 4]",2'))
    assert volume.pixel_spacing_mm == pytest.approx(
        (6, 4)
    ) and volume.slice_spacing_mm == pytest.approx(2)
    assert "spacing_from_metadata" in volume.notes
    assert volume.position_mm == pytest.approx(-300 + 2 * np.arange(NUM_SLICES))
    np.testing.assert_array_equal(volume.hu, THORAX)


def test_a_file_without_a_row_is_rejected_by_name(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans / "scan.nii.gz")
    table = write_table(tmp_path / "t.csv", "PatientID", "other.nii.gz,p")
    refused = load(scans, table)
    assert isinstance(refused, NotAnImage) and refused.reason == "no_metadata"
    with pytest.raises(InputError, match="none of its 1 volumes is in"):
        nifti_metadata.check(scans, table)
    nifti_metadata.check(
        scans, write_table(tmp_path / "u.csv", "PatientID", "other,p", "scan.nii,q")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Name,RescaleSlope\nscan,1\n", "no column VolumeName; give it"),
        ("", "the first line is empty"),
        ("VolumeName,VolumeName\na,a\n", "column 'VolumeName' is there twice"),
        ("VolumeName,RescaleSlope\nscan,one\n", "line 2: RescaleSlope is not a number"),
        ("VolumeName,ZSpacing\nscan,0\n", "line 2: ZSpacing is not a number above 0"),
        ("VolumeName,XYSpacing\nscan,wide\n", r"line 2: XYSpacing is not like \[0.7, 0.7\]"),
        ("VolumeName,XYSpacing\nscan,[0 0]\n", r"line 2: XYSpacing is not like \[0.7, 0.7\]"),
        ("VolumeName,ZSpacing\nscan.nii,1\nscan.nii.gz,2\n", "line 3: a second row of one volume"),
    ],
)
def test_tables_that_cannot_be_used_say_where_and_what_helps(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_metadata(tmp_path / "t.csv")
    assert "\n" not in str(error.value)


def test_tables_are_read_as_people_write_them(tmp_path):
    lines = [
        "\ufeffVolumeName , XYSpacing,PatientAge,PatientSex",
        'a.nii.gz,"[0.7, 0.8]",61.0,m',
        *["b,0.7,95Y,"] * 2,
    ]
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).encode())
    table = read_metadata(tmp_path / "t.csv")
    assert table["a"].xy_spacing == (0.7, 0.8) and table["a"].age == 61 and table["a"].sex == "M"
    assert (
        table["b"].xy_spacing == (0.7, 0.7)
        and table["b"].age == 90
        and table["b"].rescale_slope is None
    )
    (tmp_path / "t.csv").write_bytes("VolumeName\nä\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_metadata(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no such file"):
        read_metadata(tmp_path / "absent.csv")


# ---- patients and exams --------------------------------------------------------------------------


def test_names_of_ct_rate_tell_patient_and_exam(tmp_path):
    for name in ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "other_1_a_1"):
        write(tmp_path / f"{name}.nii.gz")
    headers = headers_of(tmp_path)
    assert {h.series_instance_uid: h.patient_id for h in headers} == {
        "train_1_a_1": "train_1",
        "train_1_a_2": "train_1",
        "train_1_b_1": "train_1",
        "train_2_a_1": "train_2",
        "other_1_a_1": "",
    }
    exams = select_reconstructions(plan_series(headers, Rules()), Rules())
    assert sorted(len(exam) for exam in exams) == [1, 1, 1, 2]  # train_1_a has two reconstructions


@pytest.mark.parametrize(("name", "num_patients"), [("ct", 2), ("train_1_a_1", 1)])
def test_files_of_one_name_never_become_one_volume(tmp_path, name, num_patients):
    shifted = AFFINE.copy()
    shifted[2, 3] += 1.25  # their slices would interleave
    for folder, affine in (("a", AFFINE), ("b", shifted)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / f"{name}.nii.gz", affine=affine)
    planned = plan_series(headers_of(tmp_path), Rules())
    assert [len(candidate.headers) for candidate in planned] == [NUM_SLICES, NUM_SLICES]
    assert len({candidate.patient_key for candidate in planned}) == num_patients
    table = write_table(tmp_path / "t.csv", "PatientID", f"{name},p")
    with pytest.raises(InputError, match="1 of its volumes have more than one file"):
        nifti_metadata.check(tmp_path, table)


# ---- the whole command ---------------------------------------------------------------------------


def run_prepare(*arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        "--archive=nifti",
        "--num_workers=1",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_prepare_makes_a_dataset_and_names_what_it_leaves(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    rows = []
    for number in (1, 2, 3):
        values = (dicom_files.thorax(NUM_SLICES, seed=number) + 1024).astype(np.int16)
        write(scans / f"valid_{number}_a_1.nii.gz", values, ("LPS", "RAS", "RPI")[number - 1])
        rows.append(f"valid_{number}_a_1.nii.gz,1,-1024")
    write(scans / "without_row.nii.gz")
    table = write_table(tmp_path / "t.csv", "RescaleSlope,RescaleIntercept", *rows)
    options = (f"--input_dir={scans}", f"--output_dir={tmp_path / 'out'}", "--image_size=64")
    done = run_prepare(*options, f"--metadata_csv={table}", "--window=-300,1400")
    assert done.returncode == 0, done.stderr
    assert "1 no_metadata: The metadata table lacks a row of the NIfTI file." in done.stdout
    volumes = Dataset.open(tmp_path / "out").volumes()
    assert [v["num_slices"] for v in volumes] == [NUM_SLICES] * 3
    assert len({v["patient_id"] for v in volumes}) == 3 and {v["split"] for v in volumes} == set(
        SPLITS
    )
    assert {(v["pixel_spacing_row_mm"], v["pixel_spacing_column_mm"]) for v in volumes} == {
        (ROW_MM, COLUMN_MM)
    }
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.csv"))
    assert "valid_" not in text and "without_row" not in text
    (tmp_path / "t2.csv").write_text("VolumeName\nabsent\n")
    refused = run_prepare(
        *options[:1], f"--output_dir={tmp_path / 'no'}", f"--metadata_csv={tmp_path / 't2.csv'}"
    )
    assert (
        refused.returncode == 2
        and refused.stderr.startswith("error: ")
        and refused.stderr.count("\n") == 1
    )
    assert "none of its 1 volumes is in" in refused.stderr and not (tmp_path / "no").exists()


def test_real_scans(real_data):
    """A torso, 3 mm: the values that nibabel reads, in the order of the canonical axes."""
    folder = real_data / "nifti"
    planned = plan_series(headers_of(folder), Rules())
    assert sorted(len(candidate.headers) for candidate in planned) == [30, 112]
    for candidate in planned:
        image = nibabel.load(folder / candidate.headers[0].source.path)
        volume = load_volume(folder, candidate, Rules(require_lung=False))
        # stored as RAS
        np.testing.assert_array_equal(volume.hu, image.get_fdata()[::-1, ::-1].transpose(2, 1, 0))
        assert volume.pixel_spacing_mm == (3, 3) and volume.slice_spacing_mm == pytest.approx(3)
        assert volume.position_mm[0] == pytest.approx(image.affine[2, 3])
        assert set(volume.notes) == {"no_patient_id", "no_slice_thickness"}
        assert load_volume(folder, candidate, Rules()).reason == "no_chest"  # abdomen and pelvis
