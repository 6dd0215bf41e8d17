"""Headers of sound, odd and damaged files."""

import inspect
import pickle
import re
import struct

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet

from data_prep.privacy import leaks
from data_prep.privacy.pseudonyms import public_fields
from data_prep.scan import elements, headers
from data_prep.scan.archives import Source
from data_prep.scan.headers import Header, NotAnImage, read_header
from data_prep.scan.series import slice_headers
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_volume


def read(folder, content, name="file"):
    (folder / name).write_bytes(content)
    return read_header(folder, Source(name, "", len(content)))


@pytest.fixture
def dataset():
    return dicom_files.slices(dicom_files.thorax(1))[0]


def raw(dataset, keyword, value):
    """The file with an element's value replaced by other bytes of its length."""
    content = dicom_files.to_bytes(dataset)
    old = dataset[keyword].value
    text = (
        "\\".join(str(part) for part in old)
        if isinstance(old, pydicom.multival.MultiValue)
        else str(old)
    )
    index = content.index(text.encode())
    return (
        content[:index]
        + value.ljust(len(text)).encode()[: len(text)]
        + content[index + len(text) :]
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x08\x00", id="two_bytes"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(b"<?xml version='1.0'?><LidcReadMessage/>" * 9, id="xml"),
        pytest.param(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(300), id="jpeg"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(300), id="png"),
        pytest.param(b"patient,slice\n1,2\n" * 20, id="csv"),
        pytest.param(b"\x08\x00\x05\x00" + b"junk" * 50, id="starts_like_dicom"),
        pytest.param(np.random.default_rng(0).bytes(5000), id="random"),
    ],
)
def test_other_files_are_not_dicom(tmp_path, content):
    entry = read(tmp_path, content)
    assert isinstance(entry, NotAnImage) and entry.reason in (
        "not_dicom",
        "unreadable",
        "no_pixel_data",
    )
    assert entry.reason == "not_dicom" or content.startswith(b"\x08\x00")


def test_random_bytes_behind_a_preamble(tmp_path):
    for seed in range(30):
        entry = read(tmp_path, bytes(128) + b"DICM" + np.random.default_rng(seed).bytes(2000))
        assert isinstance(entry, NotAnImage)


def test_report_without_pixels(tmp_path, dataset):
    for keyword in ("Rows", "Columns", "PixelData", "BitsAllocated"):
        delattr(dataset, keyword)
    dataset.Modality, dataset.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.67"
    entry = read(tmp_path, dicom_files.to_bytes(dataset))
    assert isinstance(entry, NotAnImage) and (entry.reason, entry.detail) == ("no_pixel_data", "SR")


def test_ct_image_whose_header_is_cut(tmp_path, dataset):
    content = dicom_files.to_bytes(dataset)
    entry = read(tmp_path, content[: content.index(struct.pack("<HH", 0x28, 0x10))])
    assert isinstance(entry, NotAnImage) and entry.reason == "unreadable"


def test_damaged_text_holds_no_other_elements(tmp_path, dataset):
    """A wrong length byte joins elements. Their text must not become the manufacturer."""
    content = bytearray(dicom_files.to_bytes(dataset))
    at = content.index(b"Example Scanners")
    content[at - 2] = 40
    entry = read(tmp_path, bytes(content))
    assert isinstance(entry, NotAnImage) or entry.manufacturer == ""


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        read_header(tmp_path, Source("gone", "", 1))


def test_header_is_picklable_and_small(tmp_path, dataset):
    header = read(tmp_path, dicom_files.to_bytes(dataset))
    assert pickle.loads(pickle.dumps(header)) == header
    assert len(pickle.dumps(header)) < 3000


@pytest.mark.parametrize(
    ("keyword", "value", "field"),
    [
        ("SliceThickness", "abc", "slice_thickness"),
        ("SliceThickness", "nan", "slice_thickness"),
        ("SliceThickness", "-1", "slice_thickness"),
        ("PixelSpacing", "5.5\\x", "pixel_spacing"),
        ("PixelSpacing", "0\\0", "pixel_spacing"),
        ("PixelSpacing", "5.5", "pixel_spacing"),
        ("ImagePositionPatient", "a\\b\\c", "position"),
        ("ImagePositionPatient", "1\\2", "position"),
        ("ImageOrientationPatient", "1\\0", "orientation"),
        ("RescaleIntercept", "1e99", "rescale_intercept"),
        ("PatientAge", "old", "age"),
    ],
)
def test_broken_values_are_missing(tmp_path, dataset, keyword, value, field):
    header = read(tmp_path, raw(dataset, keyword, value))
    assert isinstance(header, Header) and getattr(header, field) is None


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("061Y", 61),
        ("089Y", 89),
        ("090Y", 90),
        ("104Y", 90),
        ("018M", 1),
        ("100W", 1),
        ("010D", 0),
        ("45", 45),
        ("", None),
    ],
)
def test_age(tmp_path, dataset, text, years):
    with pydicom.config.disable_value_validation():
        dataset.PatientAge = text
        assert read(tmp_path, dicom_files.to_bytes(dataset)).age == years


@pytest.mark.parametrize("vr", ["SS", "US"])
@pytest.mark.parametrize("signed", [0, 1])
def test_padding_value_in_the_sign_of_the_pixels(tmp_path, dataset, vr, signed):
    dataset.PixelRepresentation = signed
    dataset.add_new("PixelPaddingValue", vr, -2000 if vr == "SS" else 63536)
    assert read(tmp_path, dicom_files.to_bytes(dataset)).padding_value == (
        -2000 if signed else 63536
    )


def test_text_in_other_character_sets(tmp_path, dataset):
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.Manufacturer, dataset.PatientID = "Société", "é1"
    header = read(tmp_path, dicom_files.to_bytes(dataset))
    assert (header.manufacturer, header.patient_id) == ("Société", "é1")


def test_other_attributes(tmp_path, dataset):
    dataset.ContrastBolusAgent, dataset.EthnicGroup, dataset.BodyPartExamined = "IV", "2", "CHEST"
    dataset.QualityControlSubject, dataset.GantryDetectorTilt = "YES", "-12.5"
    header = read(tmp_path, dicom_files.to_bytes(dataset))
    assert (header.contrast_agent, header.ethnic_group, header.body_part) == ("IV", "2", "CHEST")
    assert header.quality_control_subject and not header.burned_in_annotation
    assert header.gantry_tilt == -12.5 and header.patient_key == "patient-1"


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"]
)
def test_meta_information_names_another_syntax(tmp_path, syntax):
    """Files that name another syntax than they are written in are read by their bytes."""
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    folder = dicom_files.write(tmp_path, datasets)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(
            content.replace(b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0"), 1)
        )
    outcome = convert(folder)
    if syntax.endswith("2.2"):  # the wrong byte order is beyond repair: named, not guessed
        assert outcome.volumes == []
    else:
        np.testing.assert_array_equal(only_volume(outcome).hu, hu)


def test_media_folder_with_dicomdir(tmp_path):
    hu = dicom_files.thorax()
    file_set = FileSet()
    for ds in dicom_files.slices(hu):
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.SeriesNumber = "20200101", "120000", "1", 1
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
            ds.SOPClassUID,
            ds.SOPInstanceUID,
        )
        file_set.add(ds)
    file_set.write(tmp_path)
    outcome = convert(tmp_path)
    np.testing.assert_array_equal(only_volume(outcome).hu, hu)
    assert [(entry.source.path, entry.reason) for entry in outcome.not_images] == [
        ("DICOMDIR", "dicomdir")
    ]


def test_absurd_matrix_allocates_nothing(tmp_path):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        ds.Rows, ds.Columns = 65535, 65535
        ds.PixelSpacing = ["0.01", "0.01"]
    outcome = convert(dicom_files.write(tmp_path, datasets))
    assert [r.reason for r in outcome.rejections] == ["undecodable_pixels"]


def test_absurd_number_of_frames(tmp_path, dataset):
    dataset.NumberOfFrames = 2_000_000_000
    assert read(tmp_path, dicom_files.to_bytes(dataset)).reason == "unreadable"


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_never_raise(tmp_path, seed):
    """Bytes changed, cut and inserted at random, in headers and pixels: every file is still
    accounted for."""
    rng = np.random.default_rng(seed)
    dicom_files.write(tmp_path, dicom_files.slices(dicom_files.thorax(), signed=bool(seed % 2)))
    dicom_files.write(
        tmp_path,
        [
            dicom_files.enhanced(
                dicom_files.thorax(), intercepts=[-1024] * 24, order=list(range(24)), series=2
            )
        ],
    )
    for path in sorted(tmp_path.iterdir()):
        content = bytearray(path.read_bytes())
        header_end = content.index(struct.pack("<HH", 0x7FE0, 0x10)) + 12
        for _ in range(rng.integers(0, 12)):
            content[rng.integers(132, header_end)] = rng.integers(0, 256)
        if rng.random() < 0.2:
            del content[rng.integers(132, len(content)) :]
        if rng.random() < 0.2:
            at = int(rng.integers(132, header_end))
            content[at:at] = rng.bytes(3)
        path.write_bytes(content)
    for name in ("x.xml", "y.bin"):
        (tmp_path / name).write_bytes(rng.bytes(500))
    convert(tmp_path)


def test_dataset_without_elements(tmp_path):
    empty = Dataset()
    empty.PatientName = "Doe^John"
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    pydicom.filewriter.write_dataset(buffer, empty)
    assert read(tmp_path, bytes(128) + b"DICM" + buffer.getvalue()).reason == "unreadable"


def deflated(dataset, num_bytes: int) -> bytes:
    """The file in the deflated transfer syntax, with so many zeros beside its image."""
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.add_new(0x00091001, "OB", bytes(num_bytes))
    return dicom_files.to_bytes(dataset)


def test_a_deflated_file_is_read(tmp_path, dataset):
    entry = read(tmp_path, deflated(dataset, 1 << 20))
    assert isinstance(entry, Header) and entry.rows == dataset.Rows


def test_a_deflated_file_that_expands_beyond_any_scan_is_refused_before(
    tmp_path, dataset, monkeypatch
):
    """pydicom would inflate the whole file to find the first element."""
    content = deflated(dataset, 30 << 20)
    monkeypatch.setattr(
        elements, "read_partial", lambda *arguments, **options: pytest.fail("inflated")
    )
    entry = read(tmp_path, content)
    assert isinstance(entry, NotAnImage) and entry.reason == "too_large", entry
    assert len(content) < 200_000
    assert leaks.header_elements(content) == ([], False, True)


def test_every_tag_that_is_asked_for_is_read():
    named = {int(tag, 16) for tag in re.findall(r"0x([0-9A-F]{8})\b", inspect.getsource(headers))}
    overlays = {tag for pair in headers._OVERLAYS for tag in pair}
    # the meta information is read whole
    assert {tag for tag in named if tag >> 16 != 0x0002} == set(headers._TAGS) - overlays


def test_elements_that_are_passed_over_change_no_header(tmp_path, dataset, monkeypatch):
    dataset.add_new(0x00090010, "LO", "PRIVATE")
    dataset.add_new(0x00091001, "UN", b"\x01\x02" * 500)
    dataset.add_new(0x00081140, "SQ", [Dataset()])
    dataset[0x00081140].value[0].SeriesInstanceUID = "1.2.3"
    dataset[0x00081140].is_undefined_length = True
    content = []
    for syntax in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2"):
        dataset.file_meta.TransferSyntaxUID = syntax
        whole = dicom_files.to_bytes(dataset)
        # cut anywhere in pixels and header
        content += [whole[:-size] for size in range(1, len(whole), 97)]
    passed_over = [read(tmp_path, one) for one in content]
    monkeypatch.setattr(headers, "_TAGS", None)
    assert passed_over == [read(tmp_path, one) for one in content]


@pytest.mark.parametrize(
    ("agent", "contrast"),
    [
        (None, None),
        ("", None),
        ("NONE", False),
        ("No contrast", False),
        ("OMNIPAQUE", True),
    ],
)
def test_contrast_is_unknown_where_nothing_names_it(tmp_path, dataset, agent, contrast):
    if agent is not None:
        dataset.ContrastBolusAgent = agent
    header = read(tmp_path, dicom_files.to_bytes(dataset))
    assert public_fields(header)["contrast"] is contrast


@pytest.mark.parametrize("shared", [True, False])
def test_tube_voltage_of_enhanced_files(tmp_path, shared):
    hu = dicom_files.thorax(3)
    ds = dicom_files.enhanced(hu, intercepts=[-1024] * 3, order=[0, 1, 2])
    del ds.KVP
    details = pydicom.Dataset()
    details.KVP = 100.0
    groups = ds.SharedFunctionalGroupsSequence if shared else ds.PerFrameFunctionalGroupsSequence
    for group in groups:
        group.CTXRayDetailsSequence = [details]
    header = read(tmp_path, dicom_files.to_bytes(ds))
    slices = slice_headers(header)
    assert {one.marks.tube_voltage for one in slices} == {100.0}
    assert public_fields(slices[0])["tube_voltage_kvp"] == 100.0
