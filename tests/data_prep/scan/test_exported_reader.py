"""The DICOM reader of exported folders stands alone; it must accept and refuse scans as
`data_prep.scan.loading` does.

Where data_prep parts, chooses or drops, it refuses by name; whether lungs are there it does not
judge.
"""

import hashlib
import io
import json
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep import Refused, plan_scans, read_scan
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError
from tests.helpers import dicom_files

ctssl_torch = pytest.importorskip("ctssl_jax.torch_bridge.ctssl_torch", reason="needs PyTorch")

HU = dicom_files.thorax()
OTHER_HU = dicom_files.thorax(seed=1)
TILTED = (1, 0, 0, 0, np.cos(np.radians(15)), -np.sin(np.radians(15)))


def edited(hu: np.ndarray = HU, **values) -> list[Dataset]:
    """Slices with other values of some attributes; None deletes one."""
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        for keyword, value in values.items():
            delattr(ds, keyword) if value is None else setattr(ds, keyword, value)
    return datasets


def without(datasets: list[Dataset], *numbers: int) -> list[Dataset]:
    return [ds for number, ds in enumerate(datasets) if number not in numbers]


def acquisition(number: int, datasets: list[Dataset]) -> list[Dataset]:
    for ds in datasets:
        ds.AcquisitionNumber = number
    return datasets


def copy_of_a_slice(change: int) -> list[Dataset]:
    copy = dicom_files.slices(HU)[7]
    copy.SOPInstanceUID = dicom_files.uid(77)
    dicom_files.set_pixels(copy, dicom_files.stored(copy) + change)
    return [*dicom_files.slices(HU), copy]


def of_spacing(second: float) -> list[Dataset]:
    datasets = dicom_files.slices(HU)
    for ds, z in zip(datasets, np.cumsum([0] + [2.5] * 12 + [second] * 11), strict=True):
        ds.ImagePositionPatient[2] = f"{z:g}"
    return datasets


def of_origin(axis: int, shifts: np.ndarray) -> list[Dataset]:
    datasets = dicom_files.slices(HU)
    for ds, shift in zip(datasets, shifts, strict=True):
        ds.ImagePositionPatient[axis] = f"{float(ds.ImagePositionPatient[axis]) + shift:.6f}"
    return datasets


def with_localizer() -> list[Dataset]:
    localizer = dicom_files.slices(HU[:1])[0]
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    return [*dicom_files.slices(HU), localizer]


def padded(*elements: tuple[str, str, int]) -> list[Dataset]:
    datasets = dicom_files.slices(HU, signed=True)
    for ds in datasets:
        values = dicom_files.stored(ds)
        values[:6, :6] = -2000
        dicom_files.set_pixels(ds, values)
        for element in elements:
            ds.add_new(*element)
    return datasets


def other_matrix(*numbers: int) -> list[Dataset]:
    datasets = dicom_files.slices(HU)
    for number in numbers:
        dicom_files.set_pixels(
            datasets[number], np.pad(dicom_files.stored(datasets[number]), 8, constant_values=24)
        )
    return datasets


def of_slopes() -> list[Dataset]:
    hu = HU // 4 * 4
    datasets = dicom_files.slices(hu)
    for number, ds in enumerate(datasets):
        slope = (1, 2, 4)[number % 3]
        dicom_files.set_pixels(ds, (hu[number].astype(int) + 1024) // slope)
        ds.RescaleSlope = str(slope)
    return datasets


def wrong_sign() -> list[Dataset]:
    datasets = dicom_files.slices(HU, signed=True, intercept=0)
    for ds in datasets:
        ds.PixelRepresentation = 0
    return datasets


def captures_beside() -> list[Dataset]:
    captures = dicom_files.slices(dicom_files.thorax(6, seed=1), origin=(-170, -160, 500))
    for number, ds in enumerate(captures):
        ds.SOPInstanceUID, ds.ImageType = (
            dicom_files.uid(1, 1, 100 + number),
            ["DERIVED", "SECONDARY"],
        )
    return dicom_files.slices(HU) + captures


def fractional() -> list[Dataset]:
    datasets = edited(RescaleSlope="0.5")
    for ds in datasets:
        dicom_files.set_pixels(ds, dicom_files.stored(ds) * 2 + 1)
    return datasets


def abdomen() -> np.ndarray:
    hu = np.full_like(HU, -1000)
    hu[:, 10:40, 10:40] = 40
    return hu


SCANS: dict[str, Callable[[], list[Dataset]]] = {
    "plain": lambda: dicom_files.slices(HU),
    "missing_slice": lambda: without(dicom_files.slices(HU), 10),
    "spacing_halves": lambda: of_spacing(1.0),
    "spacing_grows": lambda: of_spacing(3.5),
    "spacing_doubles": lambda: of_spacing(5.0),
    "duplicate_identical_slice": lambda: copy_of_a_slice(0),
    "duplicate_position_other_pixels": lambda: copy_of_a_slice(1),
    "gantry_tilt": lambda: dicom_files.slices(HU, orientation=TILTED),
    "jump_within_the_plane": lambda: of_origin(0, np.repeat([0, 30], 12)),
    "jitter_within_the_plane": lambda: of_origin(
        0, np.random.default_rng(0).uniform(-0.3, 0.3, 24)
    ),
    "jittered_positions": lambda: of_origin(2, np.random.default_rng(0).uniform(-0.01, 0.01, 24)),
    "localizer_inside": with_localizer,
    "acquisitions_at_the_same_positions": lambda: (
        dicom_files.slices(HU) + acquisition(2, dicom_files.slices(OTHER_HU))
    ),
    "acquisitions_that_follow": lambda: (
        dicom_files.slices(HU)[:12] + acquisition(2, dicom_files.slices(HU)[12:])
    ),
    "padding_declared": lambda: padded(("PixelPaddingValue", "SS", -2000)),
    "padding_undeclared": lambda: padded(),
    "padding_declared_as_unsigned": lambda: padded(("PixelPaddingValue", "US", 63536)),
    "padding_range": lambda: padded(
        ("PixelPaddingValue", "SS", -2000), ("PixelPaddingRangeLimit", "SS", -1990)
    ),
    "monochrome1": lambda: edited(PhotometricInterpretation="MONOCHROME1"),
    "matrix_varies": lambda: other_matrix(*range(0, 24, 2)),
    "matrix_of_one_slice": lambda: other_matrix(5),
    "thick": lambda: edited(SliceThickness="5"),
    "no_thickness": lambda: edited(SliceThickness=None),
    "no_instance_numbers": lambda: edited(InstanceNumber=None),
    "two_series": lambda: dicom_files.slices(HU) + dicom_files.slices(OTHER_HU, series=2),
    "two_patients": lambda: (
        dicom_files.slices(HU)
        + dicom_files.slices(OTHER_HU, series=2, study=2, patient="patient-2")
    ),
    "no_position": lambda: edited(ImagePositionPatient=None),
    "wrong_sign": wrong_sign,
    "no_pixel_spacing": lambda: edited(PixelSpacing=None),
    "no_slope": lambda: edited(RescaleSlope=None),
    "slope_of_0": lambda: edited(RescaleSlope="0"),
    "implausible_intercept": lambda: edited(RescaleIntercept="-5000"),
    "sagittal": lambda: dicom_files.slices(HU, orientation=(0, 1, 0, 0, 0, -1)),
    "coronal": lambda: dicom_files.slices(HU, orientation=(1, 0, 0, 0, 0, -1)),
    "secondary_capture": lambda: edited(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"),
    "reformatted": lambda: edited(ImageType=["DERIVED", "SECONDARY", "REFORMATTED"]),
    "projection": lambda: edited(ImageType=["DERIVED", "PRIMARY", "MIP"]),
    "derived_axial": lambda: edited(ImageType=["DERIVED", "PRIMARY", "AXIAL"]),
    "captures_beside": captures_beside,
    "slope_differs_per_slice": of_slopes,
    "multi_frame": lambda: [
        dicom_files.enhanced(HU, intercepts=[-1024] * 24, order=list(range(24)))
    ],
    "mirrored": lambda: dicom_files.slices(HU[:, :, ::-1], orientation=(-1, 0, 0, 0, 1, 0)),
    "prone": lambda: dicom_files.slices(HU[:, ::-1, ::-1], orientation=(-1, 0, 0, 0, -1, 0)),
    "transposed": lambda: dicom_files.slices(HU.transpose(0, 2, 1), orientation=(0, 1, 0, 1, 0, 0)),
    "feet_first": lambda: dicom_files.slices(HU[::-1], spacing=-2.5),
    "no_series_uid": lambda: edited(SeriesInstanceUID=None),
    "no_orientation": lambda: edited(ImageOrientationPatient=None),
    "impossible_orientation": lambda: edited(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
    "burned_in_annotation": lambda: edited(BurnedInAnnotation="YES"),
    "positron_emission": lambda: edited(Modality="PT"),
    "localizers": lambda: edited(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "head": lambda: edited(BodyPartExamined="HEAD"),
    "atomic_numbers": lambda: edited(RescaleType="Z_EFF"),
    "no_patient_id": lambda: edited(PatientID=None),
    "few_slices": lambda: dicom_files.slices(HU[:19]),
    "one_slice": lambda: dicom_files.slices(HU[:1]),
    "no_lung": lambda: dicom_files.slices(abdomen()),
    "fractional": fractional,
}
# taken here, refused there: what the refusal says
REFUSED_THERE = {
    "missing_slice": "slices are missing",
    "acquisitions_at_the_same_positions": "AcquisitionNumber differs",
    "matrix_of_one_slice": "differ in orientation, spacing or matrix",
    "two_series": "2 CT series",
    "multi_frame": "multi-frame CT cannot be read here",
    "truncated_pixels": "the pixel data ends early",
}
NOT_JUDGED_THERE = ("no_lung",)  # taken there whatever `require_lung` says
REAL = (
    *("lidc_0001", "lidc_0003.zip", "cptac_pda_c3n_00249.zip", "lung_petct_dx_a0002"),
    *("gantry_tilt_ge", "no_uids_j2k", "not_a_clean_volume", "mixed_patients", "transfer_syntaxes"),
)


def taken_by_loading(path: Path, rules: Rules) -> tuple[np.ndarray, tuple[float, float]] | str:
    """HU and pixel spacing of the one volume of `path`, or why there is none."""
    try:
        plan = plan_scans(path, rules=rules)
    except InputError as error:
        return str(error)
    if len(plan.exams) > 1:
        return f"{len(plan.exams)} exams"
    scan = read_scan(plan.input_dir, plan.exams[0], ((50.0, 350.0),), 32, rules)
    if isinstance(scan, Refused):
        return f"{scan.reason} {scan.detail}"
    return scan.volume.hu, scan.volume.pixel_spacing_mm


def taken_by_export(path: Path) -> tuple[np.ndarray, tuple[float, float]] | str:
    try:
        return ctssl_torch.to_canonical(*ctssl_torch.read_dicom(path))
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)


def check_the_same(path: Path, name: str) -> None:
    rules = Rules(require_lung=name not in NOT_JUDGED_THERE)
    expected, taken = taken_by_loading(path, rules), taken_by_export(path)
    if name in REFUSED_THERE:
        assert not isinstance(expected, str), expected
        assert REFUSED_THERE[name] in str(taken), taken
        return
    assert isinstance(expected, str) == isinstance(taken, str), (expected, taken)
    if not isinstance(expected, str):
        np.testing.assert_array_equal(taken[0], expected[0])
        assert taken[1] == pytest.approx(expected[1])


@pytest.mark.parametrize("name", SCANS)
def test_an_export_reads_synthetic_scans_as_we_do(tmp_path, name):
    check_the_same(dicom_files.write(tmp_path / "scan", SCANS[name]()), name)


@pytest.mark.parametrize("name", REAL)
def test_an_export_reads_real_scans_as_we_do(real_data, name):
    check_the_same(real_data / name, name)


@pytest.mark.parametrize(
    "name", ["truncated_pixels", "no_preamble", "a_folder_and_its_copy", "other_files"]
)
def test_an_export_reads_odd_folders_as_we_do(tmp_path, name):
    folder = dicom_files.write(
        tmp_path / "a", dicom_files.slices(HU), preamble=name != "no_preamble"
    )
    if name == "truncated_pixels":
        victim = next(
            path for path in folder.iterdir() if pydicom.dcmread(path).InstanceNumber == 9
        )
        victim.write_bytes(victim.read_bytes()[:-1000])
    elif name == "a_folder_and_its_copy":
        dicom_files.write(tmp_path / "b", dicom_files.slices(HU), seed=1)
    elif name == "other_files":
        (folder / "notes.txt").write_text("none")
    check_the_same(tmp_path, name)


# ---- files that are made to harm ------------------------------------------------------------


@pytest.mark.parametrize("name", ["zeros", "ratio", "dicm_and_zeros", "deflated", "encrypted"])
def test_hostile_zip_files_are_refused_in_bounded_time(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ctssl_torch, "_FREE_BYTES", 16 << 20)
    path = tmp_path / "bomb.zip"
    zeros = bytes(10 << 20)
    plain = dicom_files.to_bytes(dicom_files.slices(HU[:1])[0])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if name == "zeros":
            archive.writestr("x.dcm", zeros)
        elif name == "ratio":
            for number in range(8):
                archive.writestr(f"{number}.dcm", zeros)
        elif name == "dicm_and_zeros":
            archive.writestr("x.dcm", plain[:132] + zeros[: 1 << 20])
        elif name == "deflated":
            meta = plain[: plain.index(b"\x08\x00\x08\x00CS")]
            syntax = b"UI\x14\x001.2.840.10008.1.2.1\0"
            meta = meta.replace(syntax, b"UI\x16\x001.2.840.10008.1.2.1.99")
            stream = zlib.compressobj(wbits=-15)
            archive.writestr("x.dcm", meta + stream.compress(zeros * 2) + stream.flush())
        else:
            archive.writestr("x.dcm", plain)
    if name == "encrypted":
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"no CT series|expand|damaged|cannot be read") as error:
        ctssl_torch.read_dicom(path)
    assert "\n" not in str(error.value) and time.process_time() - start < 30


class Writes:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def write_folder(folder: Path, weights: bytes, manifest: str | dict) -> Path:
    (folder / "weights.pt").write_bytes(weights)
    if isinstance(manifest, dict):
        files = {"weights.pt": {"sha256": hashlib.sha256(weights).hexdigest()}}
        manifest = json.dumps({"format_version": 1, "files": files, **manifest})
    (folder / "manifest.json").write_text(manifest)
    return folder


def saved(weights: object) -> bytes:
    buffer = io.BytesIO()
    ctssl_torch.torch.save(weights, buffer)
    return buffer.getvalue()


def small_model(**changes: object) -> dict:
    settings = {"in_channels": 1, "hidden": [4, 4], "depth": 1, "embedding_dim": 4, "num_codes": 8}
    return {"architecture": "VQVAE", "model": settings | changes}


def test_a_small_model_is_loaded(tmp_path):
    model = ctssl_torch.VQVAE(**small_model()["model"])
    folder = write_folder(tmp_path, saved(model.state_dict()), small_model())
    assert ctssl_torch.load(folder).vq_layer.embedding.weight.shape == (8, 4)


@pytest.mark.parametrize("name", [
    "nested", "list", "no_files", "no_digest", "no_model", "wide", "deep", "many", "negative",
    "pickle", "bare_pickle", "no_tensors", "zip_bomb", "cut",
])  # fmt: skip
def test_hostile_folders_are_refused_and_run_nothing(tmp_path, name):
    model = ctssl_torch.VQVAE(**small_model()["model"])
    weights, manifest = saved(model.state_dict()), small_model()
    if name in ("nested", "list", "no_files", "no_digest"):
        manifest = {
            "nested": "[" * 100_000 + "]" * 100_000,
            "list": "[]",
            "no_files": "{}",
            "no_digest": json.dumps({"files": {"weights.pt": {}}, "format_version": 1}),
        }[name]
    elif name == "no_model":
        manifest = {"architecture": "VQVAE"}
    elif name in ("wide", "deep", "many", "negative"):
        manifest = small_model(**{
            "wide": {"num_codes": 10**9},
            "deep": {"depth": 10**9},
            "many": {"hidden": [4] * 100_000},
            "negative": {"depth": -1},
        }[name])  # fmt: skip
    elif name == "pickle":
        weights = saved({"state_dict": Writes(str(tmp_path / "ran"))})
    elif name == "bare_pickle":
        weights = pickle.dumps(Writes(str(tmp_path / "ran")))
    elif name == "no_tensors":
        weights = saved({"encoder": 1})
    elif name == "zip_bomb":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("weights/data.pkl", bytes(40 << 20))
        weights = buffer.getvalue()
    else:
        weights = weights[:-100]
    with pytest.raises(ValueError, match="copy the whole folder again") as error:
        ctssl_torch.load(write_folder(tmp_path, weights, manifest))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


# ---- several stacks in one ---------------------------------------------------------------------


def two_stacks(keyword: str, first: object, second: object) -> list[Dataset]:
    """Two stacks of one series; the second lies half a step above the first."""
    lower = dicom_files.slices(HU)
    upper = dicom_files.slices(OTHER_HU, origin=(-170.0, -160.0, -298.75))
    for number, (below, above) in enumerate(zip(lower, upper, strict=True)):
        above.SOPInstanceUID = dicom_files.uid(1, 1, 100 + number)
        for ds, value in ((below, first), (above, second)):
            setattr(ds, keyword, value(number) if callable(value) else value)
    return lower + upper


@pytest.mark.parametrize(
    ("keyword", "first", "second"),
    [
        ("ConvolutionKernel", "B30f", "B70f"),
        ("KVP", "80", "140"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "A"], ["ORIGINAL", "PRIMARY", "AXIAL", "B"]),
        ("FrameOfReferenceUID", "1.2.3", "1.2.4"),
        ("NominalPercentageOfCardiacPhase", 40.0, 75.0),
        ("TemporalPositionIdentifier", 1, 2),
        ("AcquisitionNumber", 1, 2),
        ("AcquisitionTime", lambda i: f"1010{i:02d}", lambda i: f"1011{i:02d}"),
        ("TriggerTime", "300", "620"),
    ],
)
def test_stacks_that_lie_in_one_another_are_never_one_volume(tmp_path, keyword, first, second):
    folder = dicom_files.write(tmp_path / "scan", two_stacks(keyword, first, second))
    assert f"{keyword} differs" in str(taken_by_export(folder))
    expected = taken_by_loading(folder, Rules())
    assert isinstance(expected, str) or len(expected[0]) == len(HU)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("AcquisitionNumber", lambda i: 1 + i % 2),
        ("AcquisitionNumber", lambda i: 1 + i // 4),
        ("AcquisitionTime", lambda i: f"1010{i:02d}.5"),
        ("TriggerTime", lambda i: str(430 + 7 * (i // 3 * 13 % 11))),
        ("TemporalPositionIdentifier", lambda i: i + 1),
        ("SliceThickness", lambda i: "5" if i == 11 else "2.5"),
    ],
)
def test_slices_that_count_themselves_are_one_volume(tmp_path, keyword, value):
    datasets = dicom_files.slices(HU)
    for number, ds in enumerate(datasets):
        setattr(ds, keyword, value(number))
    folder = dicom_files.write(tmp_path / "scan", datasets)
    np.testing.assert_array_equal(taken_by_export(folder)[0], HU)
    np.testing.assert_array_equal(taken_by_loading(folder, Rules())[0], HU)
