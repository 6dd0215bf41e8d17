"""Raw scans: the slices that prepare would write, HU arrays of any orientation, refusals in one
line."""

import errno
import itertools
import json
import shutil
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest
from absl import flags
from nibabel import orientations

from ctssl_jax.inference import hu_arrays, scan_flags
from data_prep.dataset.reader import Dataset
from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.raw import scans
from data_prep.scan import loading
from data_prep.scan.rules import Rules
from data_prep.scan.window import prepare_images
from data_prep.synthetic.archive import make_archive
from data_prep.synthetic.exam import Options as PhantomOptions
from data_prep.system.errors import InputError
from tests.helpers import dicom_files

KEY = "0123456789abcdef0123456789abcdef"
WINDOWS = ((50.0, 350.0), (-600.0, 1500.0))
# neither matrix is the dataset's, nor square
HU, SECOND_HU, THIRD_HU = (
    dicom_files.thorax(21, size=60, seed=seed)[:, :56, 2:] for seed in (4, 5, 6)
)  # of three patients
SPACING_MM = (2.5, 5.0, 5.5)  # slices, rows, columns
# indices of HU -> mm to the right, anterior, superior: rows run to posterior, columns to the left
AFFINE = np.array([[0, 0, -5.5, 150], [0, -5.0, 0, 140], [2.5, 0, 0, -300], [0, 0, 0, 1.0]])


def prepared(folder, archive, options, **sources):
    """The dataset's volumes as prepare writes them: volume_id -> (patient_id, images,
    position_mm)."""
    key_file = folder / "key"
    key_file.write_text(KEY)
    places = Directories(archive, folder / "dataset", folder / "private")
    prepare(
        options,
        places,
        sources=LabelSources(options.archive, **sources),
        num_workers=1,
        pseudonym_key_file=key_file,
    )
    volumes = {}
    for row in Dataset.open(places.output_dir).volumes():
        source = Dataset.open(places.output_dir).source(row["split"])
        records = [source[row["first_record"] + index] for index in range(row["num_slices"])]
        images = np.stack([record["image"] for record in records])
        position_mm = np.array([record["position_mm"] for record in records], np.float32)
        volumes[row["volume_id"]] = (row["patient_id"], images, position_mm)
    return volumes


def read_all(path, options, archive="auto", metadata_csv=None):
    plan = scans.plan_scans(path, archive, options.rules, metadata_csv)
    return [
        scans.read_scan(
            plan.input_dir, exam, options.windows, options.image_size, options.rules, KEY.encode()
        )
        for exam in plan.exams
    ]


def assert_as_prepared(folder, archive, options, metadata_csv=None, number=None):
    expected = prepared(
        folder, archive, options, **({"metadata_csv": metadata_csv} if metadata_csv else {})
    )
    read = {
        scan.volume_id: scan for scan in read_all(archive, options, options.archive, metadata_csv)
    }
    assert read.keys() == expected.keys() and len(read) == number
    for volume_id, (patient_id, images, position_mm) in expected.items():
        scan = read[volume_id]
        assert scan.patient_id == patient_id
        assert scan.images.dtype == np.uint8 and scan.images.std() > 10
        np.testing.assert_array_equal(scan.images, images)
        np.testing.assert_array_equal(scan.position_mm.astype(np.float32), position_mm)


def write_dicom(folder, hu=HU, **settings):
    datasets = dicom_files.slices(hu, **settings)
    for ds in datasets:
        ds.PixelSpacing = ["5.0", "5.5"]
    return dicom_files.write(folder, datasets)


def as_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


# ---- the same slices as prepare ------------------------------------------------------------------


def test_slices_equal_those_of_prepare(tmp_path):
    archive = tmp_path / "archive"
    write_dicom(archive / "a", study=1, patient="one")
    # thicker
    write_dicom(
        archive / "a", dicom_files.thorax(22, seed=7)[:, :56, :56], series=2, study=1, patient="one"
    )
    feet_first = (-1, 0, 0, 0, 1, 0)
    second, third = SECOND_HU[:, :, ::-1], np.delete(THIRD_HU, 7, axis=0)
    write_dicom(archive / "b", second, study=2, patient="two", orientation=feet_first)
    write_dicom(tmp_path / "zipped", third, study=3, patient="three")
    as_zip(tmp_path / "zipped", archive / "c.zip")
    write_dicom(archive / "short", HU[:5], study=4)
    (archive / "notes.txt").write_text("none")
    options = Options(image_size=48, windows=WINDOWS, splits=(1.0, 0.0, 0.0))
    assert_as_prepared(tmp_path, archive, options, number=3)
    (refused,) = scans.refused_series(scans.plan_scans(archive), KEY.encode())
    assert (
        f"{refused.volume_id},5,too_few_slices,"
        in (tmp_path / "dataset" / "rejected.csv").read_text()
    )


def test_slices_of_a_phantom_equal_those_of_prepare(tmp_path):
    make_archive(
        tmp_path / "archive",
        1,
        PhantomOptions(seed=3, image_size=64, num_slices=12, slice_spacing_mm=0.0),
    )
    rules = Rules(max_slice_thickness_mm=60.0, min_slices=10)
    options = Options(image_size=64, windows=WINDOWS[:1], splits=(1.0, 0.0, 0.0), rules=rules)
    assert_as_prepared(tmp_path, tmp_path / "archive", options, number=1)


def test_nifti_slices_equal_those_of_prepare(tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    for number, stored in enumerate((HU, (SECOND_HU + 1024).astype(np.int16))):
        image = nibabel.Nifti1Image(stored, AFFINE)
        turn = orientations.ornt_transform(
            orientations.io_orientation(AFFINE), orientations.axcodes2ornt("LPS")
        )
        image = image.as_reoriented(turn)
        image.header.set_xyzt_units("mm")
        image.to_filename(archive / f"scan{number}.nii.gz")
    table = tmp_path / "metadata.csv"
    table.write_text(
        "VolumeName,RescaleSlope,RescaleIntercept,PatientID\nscan0,1,0,p0\nscan1,1,-1024,p1\n"
    )
    options = Options(archive="nifti", image_size=48, windows=WINDOWS, splits=(1.0, 0.0, 0.0))
    assert_as_prepared(tmp_path, archive, options, table, number=2)
    (single,) = read_all(archive / "scan0.nii.gz", options)
    np.testing.assert_array_equal(single.images, prepare_images(HU, (5.0, 5.5), WINDOWS, 48))


def test_slices_of_a_real_scan_equal_those_of_prepare(tmp_path, real_data):
    (tmp_path / "archive").mkdir()
    shutil.copy(real_data / "lidc_0003.zip", tmp_path / "archive")
    options = Options(image_size=128, splits=(1.0, 0.0, 0.0))
    assert_as_prepared(tmp_path, tmp_path / "archive", options, number=1)


def test_a_folder_a_zip_file_and_their_neighbours(tmp_path):
    """One zip file is one input: what lies beside it is not read."""
    write_dicom(tmp_path / "scan", study=1)
    write_dicom(tmp_path / "other", study=2)
    options = Options(image_size=32)
    (folder,) = read_all(tmp_path / "scan", options)
    (zipped,) = read_all(as_zip(tmp_path / "scan", tmp_path / "scan.zip"), options)
    assert len(read_all(tmp_path, options)) == 2  # the copy in the zip file is of the same series
    np.testing.assert_array_equal(folder.images, zipped.images)
    assert folder.volume_id == zipped.volume_id
    np.testing.assert_array_equal(folder.volume.hu, HU)


def test_headers_read_in_processes_are_the_same(tmp_path, monkeypatch):
    for number in range(3):
        write_dicom(tmp_path / f"scan{number}", study=number)
    monkeypatch.setattr(scans, "SOURCES_PER_TASK", 5)
    assert scans.plan_scans(tmp_path, num_workers=1) == scans.plan_scans(tmp_path)


# ---- refusals ------------------------------------------------------------------------------------


def test_nothing_to_take_is_one_line_with_the_remedy(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next(write_dicom(tmp_path / "scan").iterdir()), one / "slice")
    thick = write_dicom(tmp_path / "thick", spacing=4.0)
    head = dicom_files.slices(HU)
    for ds in head:
        ds.BodyPartExamined, ds.SliceThickness = "HEAD", "4"
    head = dicom_files.write(tmp_path / "head", head)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("a")
    (tmp_path / "empty").mkdir()
    shutil.copytree(thick, tmp_path / "several" / "thick")
    write_dicom(tmp_path / "several" / "short", HU[:4], study=5)
    for path, settings, message in (
        (tmp_path / "nowhere", {}, "no such file or directory; give a scan"),
        (one, {}, r"has too few slices \(1 slice, at least 20 asked\); give a smaller --min_sli"),
        (one / "slice", {}, "give a smaller --min_slices"),
        (thick, {}, r"thicker than the limit \(4 mm, .*; give a larger --max_slice_thickness_mm"),
        (head, {}, "does not cover the chest.*is HEAD; and .* 4 mm.*; give --require_lung="),
        (tmp_path / "text", {}, "not a DICOM file; give DICOM, or --archive=nifti"),
        (tmp_path / "scan", {"archive": "nifti"}, "21 files not_nifti: .*; give NIfTI, or "
                                                  "--archive=dicom"),
        (tmp_path / "empty", {}, "holds no usable CT volume .no files.; give another scan"),
        (tmp_path / "several", {}, "1 series too_.*, 1 series too_.*--.*, or give a .*--"),
        (tmp_path / "scan", {"archive": "mha"}, "--archive=mha: choose one of auto, dicom, nifti"),
        (tmp_path / "scan", {"metadata_csv": "t.csv"}, "--metadata_csv goes with --archive=nifti"),
        (tmp_path / "scan", {"archive": "nifti", "metadata_csv": "t.csv"}, "--metadata_csv=t.csv: "
                                                                           "no such file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as raised:
            scans.plan_scans(path, **settings)
        assert "\n" not in str(raised.value) and "patient-1" not in str(raised.value)


def test_what_pixels_refuse(tmp_path, monkeypatch):
    abdomen = np.full_like(HU, -1000)
    abdomen[:, 10:40, 10:40] = 40
    folder = write_dicom(tmp_path / "abdomen", abdomen)
    plan = scans.plan_scans(folder)
    refused = scans.read_scan(plan.input_dir, plan.exams[0], WINDOWS, 32)
    assert refused[1:] == ("no_chest", "0 ml of lung")
    message = scans.nothing_taken(folder, [refused])
    assert message.endswith("another body part (0 ml of lung); give --require_lung=false")
    rules = Rules(require_lung=False)
    assert isinstance(
        scans.read_scan(plan.input_dir, plan.exams[0], WINDOWS, 32, rules), scans.Scan
    )

    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(loading, "load_volume", fails)
    assert scans.read_scan(plan.input_dir, plan.exams[0], WINDOWS, 32)[1:] == (
        "failed_for_now",
        "Input/output error",
    )
    monkeypatch.setattr(loading, "load_volume", lambda *arguments: 1 / 0)
    assert scans.read_scan(plan.input_dir, plan.exams[0], WINDOWS, 32)[1:] == (
        "conversion_crashed",
        "ZeroDivisionError",
    )


def test_the_next_reconstruction_stands_in_for_a_refused_one(tmp_path):
    broken = dicom_files.slices(HU)
    for ds in broken:
        dicom_files.set_pixels(ds, np.zeros((56, 58), np.int32))
    dicom_files.write(tmp_path / "scan", broken)
    other = dicom_files.slices(HU, series=2)
    for ds in other:
        ds.ConvolutionKernel = "BONE"
    dicom_files.write(tmp_path / "scan", other)
    plan = scans.plan_scans(tmp_path / "scan")
    assert [candidate.headers[0].kernel for candidate in plan.exams[0]] == ["STANDARD", "BONE"]
    scan = scans.read_scan(plan.input_dir, plan.exams[0], WINDOWS, 32)
    assert scan.volume.headers[0].kernel == "BONE"


def test_flags_are_those_of_prepare():
    flag_values = flags.FlagValues()
    scan_flags.define(flag_values)
    flag_values(["program"])
    assert scan_flags.rules_of(flag_values) == Rules()
    flag_values(
        [
            "program",
            "--min_slices=3",
            "--norequire_lung",
            "--reconstructions=all",
            "--max_slice_thickness_mm=5",
        ]
    )
    assert scan_flags.rules_of(flag_values) == Rules(
        5.0, 3, require_lung=False, reconstructions="all"
    )
    flag_values(["program", "--max_slice_thickness_mm=-1"])
    with pytest.raises(
        InputError,
        match=r"--max_slice_thickness_mm is -1\.0; give a positive number",
    ):
        scan_flags.rules_of(flag_values)


def test_nothing_here_loads_jax():
    program = (
        "import sys, json, ctssl_jax, data_prep.raw.scans; print(json.dumps('jax' in sys.modules))"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", program])) is False


# ---- HU arrays -----------------------------------------------------------------------------------


def test_all_48_orientations_give_one_volume():
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turn = np.array(list(zip(order, signs, strict=True)))
            array = orientations.apply_orientation(HU, turn)
            affine = AFFINE @ orientations.inv_ornt_aff(turn, HU.shape)
            hu, pixel_spacing_mm, slice_spacing_mm = hu_arrays.canonical_volume(array, affine)
            np.testing.assert_array_equal(hu, HU)
            np.testing.assert_allclose((slice_spacing_mm, *pixel_spacing_mm), SPACING_MM)


def test_padding_and_types_of_hu():
    padded = HU.copy()
    padded[:, :3] = -2000
    air = HU.copy()
    air[:, :3] = -1000
    for dtype in (np.int16, np.int32, np.float16, np.float32, np.float64):
        hu, *_ = hu_arrays.canonical_volume(padded.astype(dtype), AFFINE)
        assert hu.dtype == np.int16
        np.testing.assert_array_equal(hu, air)
    big_endian, *_ = hu_arrays.canonical_volume(HU.astype(">i2"), AFFINE)
    np.testing.assert_array_equal(big_endian, HU)
    fractional, *_ = hu_arrays.canonical_volume(HU + 0.25, AFFINE)
    assert fractional.dtype == np.float32
    np.testing.assert_array_equal(fractional, HU + np.float32(0.25))


def rotated(degrees: float, axis: int) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    one, two = (index for index in range(3) if index != axis)
    turn[[one, one, two, two], [one, two, one, two]] = cosine, -sine, sine, cosine
    return turn @ AFFINE


def test_small_tilts_pass_and_oblique_volumes_do_not():
    for degrees, axis in ((20, 0), (-20, 1), (30, 2)):
        np.testing.assert_array_equal(hu_arrays.canonical_volume(HU, rotated(degrees, axis))[0], HU)
    # a quarter turn in the plane is taken back
    turned, *_ = hu_arrays.canonical_volume(HU, rotated(90, 2))
    assert turned.shape == (21, 58, 56)
    for degrees, axis in ((40, 0), (40, 1)):
        with pytest.raises(InputError, match="the volume is oblique"):
            hu_arrays.canonical_volume(HU, rotated(degrees, axis))
    sheared = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(InputError, match="shears the slices"):
        hu_arrays.canonical_volume(HU, sheared)


def test_values_that_are_not_hu_are_refused():
    missing = HU.astype(np.float32)
    missing[3, 3, 3] = np.nan
    blank = HU.copy()
    blank[11] = -1000
    for values, message in (
        ((HU + 1024).astype(np.int16), "no air or lung"),
        (np.clip(HU / 3000 + 0.3, 0, 1), "values from 0 to .* are not HU"),
        (np.clip(HU, 0, 255).astype(np.uint8), "values from 0 to 255 are not HU"),
        (np.where(HU > 50, 9000, HU), "% of the pixels are above 4000 HU"),
        (missing, "values that are not finite"),
        (blank, f"1 of {len(HU)} slices are on another scale"),
        (HU[0], "give a 3-D array"),
        (HU[:0], "give a 3-D array"),
        (HU > 0, "give a 3-D array of numbers"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            hu_arrays.canonical_volume(np.asarray(values), AFFINE)
        assert "\n" not in str(raised.value)
    for affine in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(InputError, match="not an invertible 4 x 4 matrix"):
            hu_arrays.canonical_volume(HU, affine)
    with pytest.raises(InputError, match="another unit than mm"):
        hu_arrays.canonical_volume(HU, np.diag([1000, 1000, 1000, 1]) @ AFFINE)
