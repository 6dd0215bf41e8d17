"""The synthetic archive: real DICOM, the right geometry and HU, the same bytes for the same
seed."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import generate_frames

from data_prep.synthetic import archive as archives
from data_prep.synthetic.anatomy import build_anatomy
from data_prep.synthetic.archive import make_archive
from data_prep.synthetic.dicom_writer import (
    SYNTAXES_SIGNED,
    SYNTAXES_UNSIGNED,
    VENDORS,
    Series,
    write_series,
)
from data_prep.synthetic.exam import Options, sample_scan
from data_prep.synthetic.patient import Patient, sample_patient, spine_y
from data_prep.synthetic.render import render_volume
from data_prep.synthetic.scan import Scan, outside_field_of_view
from data_prep.system import workers
from data_prep.system.errors import InputError
from data_prep.system.files import lock_directory
from tests.conftest import SPAWNED_WORKERS

SMALL = Options(seed=3, image_size=64, num_slices=12, slice_spacing_mm=0.0)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "archive"
    make_archive(folder, 10, SMALL)
    return folder


def wide_features(output_dir: Path, index: int, options: Options) -> int:
    """In the place of writing a patient: how many features beyond AVX2 numpy uses."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    wide = [name for name in __cpu_dispatch__ if "AVX512" in name or name == "X86_V4"]
    return sum(__cpu_features__[name] for name in wide)


def test_all_processors_make_the_same_patients(tmp_path, monkeypatch):
    """With the features of some, one pixel in a million differs, and a dataset is another one."""
    monkeypatch.setattr(workers, "_new_executor", SPAWNED_WORKERS)
    monkeypatch.setattr(archives, "_finish_patient", wide_features)
    monkeypatch.delenv("NPY_DISABLE_CPU_FEATURES", raising=False)
    assert make_archive(tmp_path / "one", 1, SMALL) == 0


def dicom_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != "phantom.json"
    )


def stored_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in (pydicom.uid.JPEGLSLossless, pydicom.uid.JPEG2000Lossless):
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
        lossless = syntax == pydicom.uid.JPEGLSLossless
        return imagecodecs.jpegls_decode(frame) if lossless else imagecodecs.jpeg2k_decode(frame)
    return dataset.pixel_array


def axial_series(folder: Path) -> dict[str, list[pydicom.Dataset]]:
    series = {}
    for path in dicom_files(folder):
        dataset = pydicom.dcmread(path)
        if "LOCALIZER" not in dataset.ImageType:
            series.setdefault(dataset.SeriesInstanceUID, []).append(dataset)
    return series


def digests(folder: Path) -> dict[str, str]:
    files = dicom_files(folder)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def small_scan(**changes) -> Scan:
    scan = Scan(
        image_size=96,
        field_of_view_mm=420.0,
        centre_mm=(0.0, 0.0),
        z_mm=(-60.0, -30.0, 20.0),
        slice_spacing_mm=30.0,
        slice_thickness_mm=3.0,
        contrast="none",
        bolus=1.0,
        kernel="soft",
        noise_hu=8.0,
        rotation_degrees=0.0,
        circular=True,
        prone=False,
        flat_table=True,
    )
    return dataclasses.replace(scan, **changes)


def render(patient: Patient, **changes) -> np.ndarray:
    anatomy = build_anatomy(patient)
    return render_volume(anatomy, small_scan(**changes), np.random.default_rng(0))


@pytest.fixture(scope="module")
def patient() -> Patient:
    sampled = sample_patient(np.random.default_rng(5))
    # As the reference space is: tests look at places of it.
    return dataclasses.replace(
        sampled, scale=(1.0, 1.0, 1.0), scoliosis_mm=0.0, asymmetry=(0.0, 0.0, 0.0)
    )


def test_same_seed_same_bytes_with_other_workers_and_grown_in_two_steps(archive, tmp_path):
    make_archive(tmp_path / "again", 2, SMALL)
    make_archive(tmp_path / "again", 10, SMALL, num_workers=2)
    assert digests(tmp_path / "again") == digests(archive)


def test_a_patient_left_half_written_is_written_anew(archive, tmp_path):
    folder = tmp_path / "archive"
    make_archive(folder, 1, SMALL)
    (folder / "P0000").rename(folder / ".P0000.partial")
    (folder / ".P0000.partial" / "stray").write_text("x")
    make_archive(folder, 1, SMALL)
    assert digests(folder) == {
        name: d for name, d in digests(archive).items() if name.startswith("P0000")
    }


def test_patients_and_seeds_differ(archive, tmp_path):
    contents = digests(archive)
    assert len(set(contents.values())) == len(contents)
    make_archive(tmp_path / "other", 1, dataclasses.replace(SMALL, seed=4))
    assert not set(digests(tmp_path / "other").values()) & set(contents.values())


def test_every_file_is_labelled_synthetic(archive):
    for path in dicom_files(archive):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert dataset.QualityControlSubject == "YES"
        assert "SYNTHETIC" in dataset.ImageComments and str(dataset.PatientName).startswith(
            "SYNTHETIC^"
        )


def test_geometry_of_each_series(archive):
    series = axial_series(archive)
    assert len(series) >= 10
    for slices in series.values():
        orientation = np.array(slices[0].ImageOrientationPatient, float)
        assert np.allclose(np.abs(orientation), [1, 0, 0, 0, 1, 0])
        positions = np.array([d.ImagePositionPatient for d in slices], float)
        steps = np.diff(np.sort(positions[:, 2]))
        assert np.allclose(steps, steps[0], atol=1e-3) and 1.9 < steps[0] < 3.1
        assert np.ptp(positions[:, :2], axis=0).max() == 0
        assert (
            len({d.SOPInstanceUID for d in slices}) == len({d.InstanceNumber for d in slices}) == 12
        )
        assert float(slices[0].SliceThickness) <= 3
        fov = float(slices[0].PixelSpacing[0]) * slices[0].Rows
        assert abs(fov - float(slices[0].ReconstructionDiameter)) < 1
        # File order is not slice order.
        assert not np.all(np.diff(positions[:, 2]) > 0) and not np.all(np.diff(positions[:, 2]) < 0)


def test_pixels_decode_to_plausible_hu(archive):
    for slices in axial_series(archive).values():
        for dataset in slices[:2]:
            stored = stored_pixels(dataset)
            assert stored.dtype == (np.int16 if dataset.PixelRepresentation else np.uint16)
            assert stored.shape == (64, 64)
            assert int(stored.max()) < 2 ** (dataset.BitsStored - dataset.PixelRepresentation)
            hu = stored.astype(int) * int(dataset.RescaleSlope) + int(dataset.RescaleIntercept)
            inside = hu[stored != dataset.get("PixelPaddingValue", -9999)]
            assert inside.min() >= -1024 and 300 < inside.max() <= 3071
            assert 0.06 < np.mean((inside > -950) & (inside < -600)) < 0.6


@pytest.mark.parametrize("syntax", [s for s, _ in SYNTAXES_SIGNED + SYNTAXES_UNSIGNED])
def test_transfer_syntaxes_keep_the_pixels(syntax, tmp_path, patient):
    unsigned = [s for s, _ in SYNTAXES_UNSIGNED]
    vendor = VENDORS[0 if syntax in unsigned else 1]
    hu = render(patient, z_mm=(-30.0,))
    outside = outside_field_of_view(small_scan())
    series = Series(
        hu,
        (0.0, 0.0, 0.0),
        4.4,
        3.0,
        3.0,
        outside,
        vendor,
        syntax,
        "HFS",
        False,
        {"SeriesInstanceUID": "1.2"},
        ("t",),
    )
    write_series(series, [tmp_path / "slice"])
    dataset = pydicom.dcmread(tmp_path / "slice")
    assert dataset.file_meta.TransferSyntaxUID == syntax
    expected = np.clip(
        hu[0].astype(int) - vendor.intercept, -32768, 4095 if not vendor.signed else 32767
    )
    expected[outside] = vendor.outside
    assert np.array_equal(stored_pixels(dataset), expected)


@pytest.mark.parametrize("position, mirrored", [("HFS", False), ("FFS", True), ("HFP", False)])
def test_written_voxels_keep_their_place_in_the_patient(position, mirrored, tmp_path):
    hu = np.full((2, 8, 8), -1000, np.int16)
    hu[1, 2, 5] = 500
    series = Series(
        hu,
        (-7.0, -3.0, 10.0),
        2.0,
        3.0,
        3.0,
        np.zeros((8, 8), bool),
        VENDORS[1],
        pydicom.uid.ExplicitVRLittleEndian,
        position,
        mirrored,
        {"SeriesInstanceUID": "1.2"},
        ("t",),
    )
    write_series(series, [tmp_path / "a", tmp_path / "b"])
    dataset = pydicom.dcmread(tmp_path / "b")
    row, column = np.argwhere(dataset.pixel_array == dataset.pixel_array.max())[0]
    origin = np.array(dataset.ImagePositionPatient, float)
    along = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    place = origin + 2.0 * (column * along[0] + row * along[1])
    assert np.allclose(place, [-7 + 2 * 5, -3 + 2 * 2, 13])


def test_vendors_positions_and_syntaxes_vary(archive):
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicom_files(archive)]
    assert len({h.Manufacturer for h in headers}) >= 3
    assert len({h.file_meta.TransferSyntaxUID for h in headers}) >= 3
    assert len({h.RescaleIntercept for h in headers}) >= 2
    assert {h.PatientSex for h in headers} == {"F", "M"}
    assert any("ContrastBolusAgent" in h for h in headers) and any(
        "ContrastBolusAgent" not in h for h in headers
    )


def test_air_lung_and_contrast(patient):
    plain, enhanced = render(patient), render(patient, contrast="pulmonary")
    assert abs(np.median(plain[:, 4:10, 40:56]) + 1000) < 15
    x = (np.arange(96) - 47.5) * 420 / 96
    lung = plain[1][:, (np.abs(x) > 75) & (np.abs(x) < 90)][40:56]
    assert -950 < np.median(lung) < -780
    # The descending aorta lies left of and in front of the spine.
    row = round((float(spine_y(-30, patient)) - 24) / (420 / 96) + 47.5)
    column = round(24 / (420 / 96) + 47.5)
    around = (1, slice(row - 1, row + 2), slice(column - 1, column + 2))
    assert 10 < np.median(plain[around]) < 80
    assert np.median(enhanced[around]) > 200


def test_sex_changes_the_breasts(patient):
    man = render(dataclasses.replace(patient, breast_mm=0.0))
    woman = render(dataclasses.replace(patient, breast_mm=55.0))
    front = slice(0, 48)
    assert np.sum(woman[0, front] > -300) > 1.1 * np.sum(man[0, front] > -300)


def test_sharp_kernel_is_noisier(patient):
    air = (slice(None), slice(8, 24), slice(72, 120))
    fine = {"image_size": 192, "field_of_view_mm": 210.0, "centre_mm": (0.0, -90.0)}
    soft, sharp = (render(patient, kernel=kernel, **fine) for kernel in ("soft", "sharp"))
    assert sharp[air].std() > 1.5 * soft[air].std()
    # What a sharp kernel adds lies between coarse pixels.
    soft, sharp = render(patient), render(patient, kernel="sharp")
    air = (slice(None), slice(4, 12), slice(36, 60))
    assert sharp[air].std() < 1.3 * soft[air].std()
    assert soft[0, 44:50, 44:50].std() < 60


def test_vessel_trees_taper_and_stay_in_the_chest(patient):
    vessels = build_anatomy(patient).vessels
    for tree in (vessels.arteries_tree, vessels.veins_tree):
        assert len(tree) > 2000
        assert np.all(tree.end_radius <= tree.start_radius + 1e-5)
        assert tree.start_radius.max() > 3 and tree.end_radius.min() < 0.5
        assert np.abs(tree.end[:, 0]).max() < 140
    parent, tree = vessels.arteries_parent, vessels.arteries_tree
    branches = parent >= 0
    assert np.sum(~branches) == 2 and np.all(parent < np.arange(len(parent)))
    assert np.allclose(tree.start[branches], tree.end[parent[branches]])


def test_a_whole_chest_runs_from_apex_to_base(patient):
    rng = np.random.default_rng(1)
    scan = sample_scan(patient, VENDORS[0], dataclasses.replace(SMALL, num_slices=0), rng)
    assert 90 <= len(scan.z_mm) <= 160
    volume = render_volume(build_anatomy(patient), dataclasses.replace(scan, circular=False), rng)
    x = np.abs((np.arange(64) - 31.5) * scan.pixel_spacing_mm)
    air = ((volume < -500) & (volume > -970))[:, 16:44][:, :, x < 120].mean(axis=(1, 2))
    assert air.argmax() not in (0, len(air) - 1)
    assert air[0] < 0.3 * air.max() and air[-1] < 0.3 * air.max()


@pytest.mark.parametrize(
    "changes",
    [{"image_size": 4}, {"num_slices": -1}, {"slice_spacing_mm": 40.0}, {"seed": -1}],
    ids=str,
)
def test_impossible_options_are_refused_before_anything_is_written(changes, tmp_path):
    with pytest.raises(ValueError, match=f"^--{next(iter(changes))}=[^\n]*$"):
        make_archive(tmp_path / "archive", 1, dataclasses.replace(SMALL, **changes))
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize(
    "flags, word", [(["--num_patients=0"], "--num_patients"), ([], "not empty")]
)
def test_wrong_flags_end_in_one_line(flags, word, tmp_path):
    output = tmp_path / "archive"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    command = [sys.executable, "-m", "data_prep.phantom", f"--output_dir={output}", *flags]
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and word in result.stderr
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_other_options_in_the_same_folder_are_refused(archive):
    with pytest.raises(ValueError, match="other options"):
        make_archive(archive, 1, dataclasses.replace(SMALL, image_size=96))


def test_no_two_processes_make_one_archive(tmp_path):
    with lock_directory(tmp_path), pytest.raises(InputError, match="another run is at work in it"):
        make_archive(tmp_path, 1, SMALL)
    assert not list(tmp_path.iterdir())
