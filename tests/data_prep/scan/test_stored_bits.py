"""Which bits of a pixel are its value: overlays, Bits Stored and High Bit that are wrong, padding,
and values that are no HU."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from scipy import ndimage

from tests.data_prep.scan.test_dicom_pixels import JPEG_LOSSLESS, encode_jpeg_lossless
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_rejection, only_volume

LETTERS = np.s_[50:54, 4:20]


def outcome_of(folder, edit, hu=None, **options):
    """The outcome of a thorax whose data sets were edited; `edit(ds, stored, i)` returns the new
    stored values, or None."""
    hu = dicom_files.thorax() if hu is None else hu
    datasets = dicom_files.slices(hu, **options)
    for i, ds in enumerate(datasets):
        values = edit(ds, dicom_files.stored(ds), i)
        if values is not None:
            bits = 8 * (ds.BitsAllocated // 8)
            ds.PixelData = (values & ((1 << bits) - 1)).astype(f"<u{bits // 8}").tobytes()
    return convert(dicom_files.write(folder, datasets))


def declare_overlay(ds, bit, group=0x6000):
    """An overlay in a bit of the pixels, as files had it before 2004."""
    for element, vr, value in (
        (0x10, "US", ds.Rows),
        (0x11, "US", ds.Columns),
        (0x40, "CS", "G"),
        (0x50, "SS", [1, 1]),
        (0x100, "US", ds.BitsAllocated),
        (0x102, "US", bit),
    ):
        ds.add_new(group << 16 | element, vr, value)


@pytest.mark.parametrize("signed", [False, True])
def test_overlays_in_two_bits_that_bits_stored_includes(tmp_path, signed):
    """Letters in bits 12 and 14 of 16 stored ones."""

    def edit(ds, values, i):
        declare_overlay(ds, 12)
        declare_overlay(ds, 14, 0x6002)
        values = values & 0xAFFF  # of the sign, bits 13 and 15 are left
        values[LETTERS] |= 1 << 12
        values[10, 10:40] |= 1 << 14
        return values

    hu = dicom_files.thorax()
    outcome = outcome_of(tmp_path, edit, signed=signed, intercept=0 if signed else -1024)
    np.testing.assert_array_equal(only_volume(outcome).hu, hu)


def test_an_overlay_in_the_last_bit_of_compressed_pixels(tmp_path):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        declare_overlay(ds, 15)
        values = dicom_files.stored(ds)
        values[LETTERS] |= 1 << 15
        dicom_files.set_pixels(ds, values)
        dicom_files.compress(ds, JPEG_LOSSLESS, encode_jpeg_lossless)
    outcome = convert(dicom_files.write(tmp_path, datasets))
    np.testing.assert_array_equal(only_volume(outcome).hu, hu)


@pytest.mark.parametrize("signed", [False, True])
def test_metal_beyond_bits_stored_keeps_its_values(tmp_path, signed):
    """12 bits are said to be stored, and a clip of metal needs 13."""
    hu = dicom_files.thorax()
    metal = np.zeros(hu.shape[1:])
    metal[30:35, 40:45] = 6500
    hu += np.rint(ndimage.gaussian_filter(metal, 1.5)).astype(np.int16)
    assert hu.max() > 3600

    def edit(ds, values, i):
        ds.BitsStored, ds.HighBit = 12, 11
        return values

    outcome = outcome_of(tmp_path, edit, hu, signed=signed, intercept=0 if signed else -1024)
    np.testing.assert_array_equal(only_volume(outcome).hu, hu)


@pytest.mark.parametrize("signed", [False, True])
def test_left_justified_values(tmp_path, signed):
    def edit(ds, values, i):
        ds.BitsStored, ds.HighBit = 12, 15
        return values << 4

    outcome = outcome_of(tmp_path, edit, signed=signed, intercept=0 if signed else -1024)
    np.testing.assert_array_equal(only_volume(outcome).hu, dicom_files.thorax())


@pytest.mark.parametrize(("stored", "high"), [(12, 15), (12, 0)])
def test_a_wrong_high_bit_of_values_that_need_no_shift(tmp_path, stored, high):
    def edit(ds, values, i):
        ds.BitsStored, ds.HighBit = stored, high

    np.testing.assert_array_equal(
        only_volume(outcome_of(tmp_path, edit)).hu, dicom_files.thorax()
    )  # fmt: skip


def test_high_bit_and_values_that_fit_no_reading_are_refused(tmp_path):
    """Values of 13 bits, said to be 12 bits that end at bit 15."""
    hu = dicom_files.thorax()
    hu[:, 30:34, 40:44] = 3601

    def edit(ds, values, i):
        ds.BitsStored, ds.HighBit = 12, 15

    assert only_rejection(outcome_of(tmp_path, edit, hu)).reason == "undecodable_pixels"


def test_padding_of_the_value_of_water_lies_in_the_corners_only(tmp_path):
    """Outside a round field all is 0, and Pixel Padding Value says so. Water within the body keeps
    its 0."""
    hu = dicom_files.thorax()
    y, x = np.mgrid[-1 : 1 : 64 * 1j, -1 : 1 : 64 * 1j]
    outside = x**2 + y**2 > 1.2
    hu[:, 30:34, 30:40] = 0

    def edit(ds, values, i):
        ds.add_new(0x00280120, "SS", 0)
        values[outside] = 0
        return values

    outcome = outcome_of(tmp_path, edit, hu, signed=True, intercept=0)
    expected = np.where(outside, -1000, hu)
    np.testing.assert_array_equal(only_volume(outcome).hu, expected)


@pytest.mark.parametrize("declared", [False, True])
def test_padding_of_minus_2000_in_unsigned_values_of_12_bits(tmp_path, declared):
    hu = dicom_files.thorax()
    y, x = np.mgrid[-1 : 1 : 64 * 1j, -1 : 1 : 64 * 1j]
    outside = x**2 + y**2 > 1.2

    def edit(ds, values, i):
        ds.BitsStored, ds.HighBit = 12, 11
        if declared:
            ds.add_new(0x00280120, "SS", -2000)
        values[outside] = -2000
        return values

    expected = np.where(outside, -1000, hu)
    np.testing.assert_array_equal(only_volume(outcome_of(tmp_path, edit, hu)).hu, expected)


@pytest.mark.parametrize(
    "kind",
    ["OD", "HU_MOD", "100ug/cm3", "Iodine", "mgml", "PCT"],
)
def test_maps_that_are_no_hu_are_refused_as_such(tmp_path, kind):
    def edit(ds, values, i):
        ds.RescaleType = kind

    assert only_rejection(outcome_of(tmp_path, edit)).reason == "derived_image"


@pytest.mark.parametrize("kind", ["US", "HU", "hu", "Hounsfield units", "CT"])
def test_spellings_of_hu_are_taken(tmp_path, kind):
    def edit(ds, values, i):
        ds.add_new(0x00281054, "LO", kind)

    assert only_volume(outcome_of(tmp_path, edit)).notes == ()


def test_a_real_world_value_map_of_another_quantity_is_refused(tmp_path):
    """The stored values look like HU; the map says that they are milligrams a millilitre."""

    def edit(ds, values, i):
        ds.RescaleType = "US"
        ds.RealWorldValueMappingSequence = [real_world_map("mg/mL", 1, 0)]

    assert only_rejection(outcome_of(tmp_path, edit)).reason == "derived_image"


def test_a_real_world_value_map_in_hu_stands_in_for_rescale_tags(tmp_path):
    def edit(ds, values, i):
        del ds.RescaleSlope, ds.RescaleIntercept
        ds.RealWorldValueMappingSequence = [real_world_map("[hnsf'U]", 1, -1024)]

    volume = only_volume(outcome_of(tmp_path, edit))
    np.testing.assert_array_equal(volume.hu, dicom_files.thorax())


def real_world_map(unit, slope, intercept):
    code, entry = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = unit, "UCUM", unit
    entry.MeasurementUnitsCodeSequence = [code]
    entry.add_new(0x00409216, "US", 0)
    entry.add_new(0x00409211, "US", 4095)
    entry.RealWorldValueSlope, entry.RealWorldValueIntercept = float(slope), float(intercept)
    return entry


@pytest.mark.parametrize(
    ("factor", "size"), [(0.001, "0.352 mm"), (0.1, "35.2 mm"), (1000, "352,000 mm")]
)
def test_a_field_that_no_scanner_has_is_refused_with_its_size(tmp_path, factor, size):
    def edit(ds, values, i):
        ds.PixelSpacing = [f"{dicom_files.PIXEL_MM * factor:.6g}"] * 2

    rejection = only_rejection(outcome_of(tmp_path, edit))
    assert rejection.reason == "implausible_spacing"
    assert size in rejection.detail
