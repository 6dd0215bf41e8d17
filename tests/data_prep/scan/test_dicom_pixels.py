"""Pixel data in every coding: against pydicom's own decoders, against the uncompressed image, and
damaged."""

import dataclasses

import imagecodecs
import numpy as np
import pydicom
import pytest

from data_prep.scan.archives import Source, list_sources
from data_prep.scan.decoders import COMPRESSED_SYNTAXES
from data_prep.scan.headers import Header, read_header
from data_prep.scan.hounsfield import to_hu
from data_prep.scan.pixels import PixelReader
from data_prep.scan.series import slice_headers
from data_prep.scan.stored_bits import PixelError
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_rejection, only_volume

JPEG_LS, JPEG_2000, RLE, JPEG_LOSSLESS = (
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.70",
)


def read_all(folder, source):
    """[(header, stored values or reason)] of the slices of a file."""
    reader = PixelReader(folder)
    results = []
    for header in slice_headers(read_header(folder, source)):
        try:
            results.append((header, reader.read(header)))
        except PixelError as error:
            results.append((header, error.reason))
    return results


def encode_jpeg_ls(image):
    return imagecodecs.jpegls_encode(image.view(f"u{image.itemsize}"))


def encode_jpeg_2000(image):
    return imagecodecs.jpeg2k_encode(image, level=0, reversible=True, codecformat="j2k")


def encode_jpeg_lossless(image):
    return imagecodecs.jpeg8_encode(image.view(f"u{image.itemsize}"), lossless=True)


def encode_rle(image):
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = (
        *image.shape,
        1,
        "MONOCHROME2",
    )
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
        16,
        16,
        15,
        int(image.dtype.kind == "i"),
    )
    ds.compress(RLE, arr=image, generate_instance_uid=False)
    return pydicom.encaps.get_frame(ds.PixelData, 0)


CODINGS = [
    pytest.param(JPEG_LS, encode_jpeg_ls, id="jpeg_ls"),
    pytest.param(JPEG_2000, encode_jpeg_2000, id="jpeg_2000"),
    pytest.param(JPEG_LOSSLESS, encode_jpeg_lossless, id="jpeg_lossless"),
    pytest.param(RLE, encode_rle, id="rle"),
]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("syntax", "encode"), CODINGS)
def test_compressed_series_is_exact(tmp_path, syntax, encode, signed):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu, signed=signed, intercept=-24 if signed else -1024)
    for ds in datasets:
        dicom_files.compress(ds, syntax, encode)
    np.testing.assert_array_equal(
        only_volume(convert(dicom_files.write(tmp_path, datasets))).hu, hu
    )


@pytest.mark.parametrize(("syntax", "encode"), CODINGS)
@pytest.mark.parametrize("left", [0.3, 0.99])
def test_damaged_compressed_slices_are_dropped_by_name(tmp_path, syntax, encode, left):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    for i, ds in enumerate(datasets):
        dicom_files.compress(ds, syntax, encode)
        if i in (4, 15):
            frame = pydicom.encaps.get_frame(ds.PixelData, 0)
            ds.PixelData = pydicom.encaps.encapsulate([frame[: int(left * len(frame))]])
    outcome = convert(dicom_files.write(tmp_path, datasets))
    volume = only_volume(outcome)
    assert [reason for _, reason in volume.dropped] == ["undecodable_pixels"] * 2
    np.testing.assert_array_equal(volume.hu, np.delete(hu, [4, 15], axis=0))


@pytest.mark.parametrize(("syntax", "encode"), CODINGS)
def test_truncated_compressed_file(tmp_path, syntax, encode):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        dicom_files.compress(ds, syntax, encode)
    folder = dicom_files.write(tmp_path, datasets)
    victim = folder / "IM0007"
    victim.write_bytes(victim.read_bytes()[:-40])
    volume = only_volume(convert(folder))
    assert [(h.source.path, reason) for h, reason in volume.dropped] == [
        ("IM0007", "truncated_pixel_data")
    ]


def test_unknown_transfer_syntax_is_named(tmp_path):
    datasets = dicom_files.slices(dicom_files.thorax())
    for ds in datasets:
        dicom_files.compress(ds, JPEG_LS, encode_jpeg_ls)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2.4.100")  # MPEG-2
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == (
        "unsupported_transfer_syntax"
    )


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
)
def test_uncompressed_codings(tmp_path, syntax):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu, signed=True)
    for ds in datasets:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        if syntax.endswith("2.2"):
            ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
    folder = dicom_files.write(tmp_path, datasets)
    np.testing.assert_array_equal(only_volume(convert(folder)).hu, hu)


def test_bits_above_the_stored_ones_are_ignored(tmp_path):
    """12 bits stored, an overlay in the bits above."""
    hu = dicom_files.thorax()
    for signed, folder in ((False, tmp_path / "a"), (True, tmp_path / "b")):
        datasets = dicom_files.slices(hu, signed=signed, intercept=0 if signed else -1024)
        for ds in datasets:
            values = dicom_files.stored(ds) & 0x0FFF
            values[::3, ::3] |= 0x5000
            ds.BitsStored, ds.HighBit = 12, 11
            ds.PixelData = values.astype("<u2").tobytes()
        np.testing.assert_array_equal(
            only_volume(convert(dicom_files.write(folder, datasets))).hu, hu
        )


def test_32_bits_allocated(tmp_path):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        values = dicom_files.stored(ds)
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 32, 32, 31
        dicom_files.set_pixels(ds, values)
    np.testing.assert_array_equal(
        only_volume(convert(dicom_files.write(tmp_path, datasets))).hu, hu
    )


def test_fractional_values_come_as_float32(tmp_path):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    for ds in datasets[12:]:
        dicom_files.set_pixels(ds, (dicom_files.stored(ds) * 2) + 1)
        ds.RescaleSlope = "0.5"
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    assert volume.hu.dtype == np.float32 and "fractional_hu" in volume.notes
    expected = hu.astype(np.float32)
    expected[12:] += 0.5
    np.testing.assert_array_equal(volume.hu, expected)


def header_like(tmp_path, **values):
    ds = dicom_files.slices(dicom_files.thorax(1))[0]
    (tmp_path / "f").write_bytes(dicom_files.to_bytes(ds))
    return dataclasses.replace(
        read_header(tmp_path, Source("f", "", (tmp_path / "f").stat().st_size)), **values
    )


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint8])
@pytest.mark.parametrize("slope", [1.0, 2.0, 0.37, -1.0])
@pytest.mark.parametrize("intercept", [-1024.0, 0.0, 0.5, -8192.0, 30000.0, 70000.0])
def test_rescale_of_all_values(tmp_path, dtype, slope, intercept):
    """Against the formula in float64, for every stored value: also where 16 bits overflow."""
    info = np.iinfo(dtype)
    stored = (
        np.linspace(max(info.min, -70000), min(info.max, 70000), 70001).astype(dtype).reshape(1, -1)
    )
    hu = to_hu(stored, header_like(tmp_path, rescale_slope=slope, rescale_intercept=intercept))
    exact = stored.astype(np.float64) * slope + intercept
    exact[exact < -1500] = -1000
    np.testing.assert_array_equal(hu, exact if hu.dtype == np.int16 else exact.astype(np.float32))
    assert (hu.dtype == np.int16) == (
        bool(np.all(exact == np.rint(exact))) and exact.max() <= 32767
    )


@pytest.mark.parametrize(
    ("padding", "limit", "air"),
    [
        (-100, None, []),  # would be soft tissue: not believed
        (0, None, []),
        (-950, None, [-950]),
        (-1200, -1100, [-1200, -1150, -1100]),
        (-1100, -1200, [-1200, -1150, -1100]),
        (5000, None, [5000]),
    ],
)
def test_declared_padding(tmp_path, padding, limit, air):
    stored = np.array([[-1200, -1150, -1100, -950, -100, 0, 40, 5000]], dtype=np.int16)
    header = header_like(
        tmp_path, rescale_intercept=0.0, padding_value=padding, padding_limit=limit
    )
    np.testing.assert_array_equal(
        to_hu(stored, header), np.where(np.isin(stored, air), -1000, stored)
    )


# ---- real files ----------------------------------------------------------------------------------


def test_every_real_file_decodes_as_pydicom_does(real_data):
    """All codings of the sample files are read; where pydicom's installed decoders read the file,
    too, the values are the same."""
    folder = real_data / "transfer_syntaxes"
    compared, syntaxes = set(), set()
    for source in list_sources(folder):
        for header, values in read_all(folder, source):
            assert not isinstance(values, str), (source.path, values)
            syntaxes.add(header.transfer_syntax)
            try:
                expected = pydicom.pixels.pixel_array(
                    pydicom.dcmread(folder / source.path), index=header.frame, raw=True
                )
            except (RuntimeError, NotImplementedError):  # no plugin for this syntax installed
                continue
            np.testing.assert_array_equal(values, expected, err_msg=source.path)
            compared.add(header.transfer_syntax)
    compressed = {
        uid for uid in COMPRESSED_SYNTAXES if not uid.startswith("1.2.840.10008.1.2.4.20")
    }
    assert syntaxes >= compressed
    assert compared >= {
        "1.2.840.10008.1.2",
        "1.2.840.10008.1.2.1",
        "1.2.840.10008.1.2.2",
        "1.2.840.10008.1.2.1.99",
        RLE,
    }


def test_one_image_in_every_coding(real_data):
    """The same slice in fifteen transfer syntaxes: lossless ones are equal, lossy ones close."""
    folder = real_data / "transfer_syntaxes"
    name = "cornerstoneWADOImageLoader__CTImage.dcm"
    reference = None
    seen = {}
    for source in list_sources(folder):
        if source.path.startswith(name):
            header = read_header(folder, source)
            assert isinstance(header, Header)
            hu = to_hu(PixelReader(folder).read(header), header).astype(np.float32)
            seen[header.transfer_syntax] = hu
            reference = hu if source.path == name else reference
    lossy = {f"1.2.840.10008.1.2.4.{code}": limit for code, limit in
             {"50": 40, "51": 12, "53": 12, "55": 12, "81": 3, "91": 12}.items()}  # fmt: skip
    assert len(seen) == 15
    for syntax, hu in seen.items():
        error = np.abs(hu - reference)[reference > -1000]
        assert np.sqrt(np.mean(error**2)) <= lossy.get(syntax, 0), syntax
