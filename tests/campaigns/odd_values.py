"""Odd pixel values, rescale, padding and numbers of sound scans."""

from __future__ import annotations

import dataclasses

import numpy as np
from pydicom.uid import ExplicitVRLittleEndian

from data_prep.synthetic.dicom_writer import VENDORS
from tests.campaigns.odd_base import OddScan, Sound, drop, kind, put, raw, set_stored

# ---- values -----------------------------------------------------------------------------------


def _signed(scan: Sound) -> None:
    scan.vendor = scan.choice([vendor for vendor in VENDORS if vendor.signed])


def _unsigned(scan: Sound) -> None:
    scan.vendor = scan.choice([vendor for vendor in VENDORS if not vendor.signed])


@kind
def left_justified(scan: Sound) -> OddScan:
    """12 bits stored, high bit 15: the values lie in the upper bits. Exact, or refused by name."""
    _unsigned(scan)
    datasets = scan.datasets()
    for ds, values in zip(datasets, scan.stored(scan.hu), strict=True):
        ds.HighBit = 15
        set_stored(ds, scan.lay(values << (16 - ds.BitsStored)))
    return dataclasses.replace(scan.odd(datasets), refusal="undecodable_pixels")


@kind
def overlay_bits_above_the_stored(scan: Sound) -> OddScan:
    """An old overlay lies in the unused upper bits."""
    _unsigned(scan)
    datasets = scan.datasets()
    for ds, values in zip(datasets, scan.stored(scan.hu), strict=True):
        overlay = np.zeros(values.shape, np.int32)
        overlay[5:9, 5:30] = 1 << 12
        set_stored(ds, scan.lay(values | overlay))
        ds.add_new(0x60000010, "US", ds.Rows)
        ds.add_new(0x60000011, "US", ds.Columns)
        ds.add_new(0x60000040, "CS", "G")
        ds.add_new(0x60000050, "SS", [1, 1])
        ds.add_new(0x60000100, "US", 16)
        ds.add_new(0x60000102, "US", 12)
    return scan.odd(datasets)


@kind
def overlay_data_of_its_own(scan: Sound) -> OddScan:
    """An overlay in (6000,3000), as DICOM has it today."""
    datasets = scan.datasets()
    for ds in datasets:
        ds.add_new(0x60000010, "US", ds.Rows)
        ds.add_new(0x60000011, "US", ds.Columns)
        ds.add_new(0x60000040, "CS", "G")
        ds.add_new(0x60000050, "SS", [1, 1])
        ds.add_new(0x60000100, "US", 1)
        ds.add_new(0x60000102, "US", 0)
        ds.add_new(0x60003000, "OW", b"\0" * ((ds.Rows * ds.Columns + 15) // 16 * 2))
    return scan.odd(datasets)


@kind
def padding_range(scan: Sound) -> OddScan:
    """Pixel Padding Value and Range Limit around several values outside of the field."""
    _signed(scan)
    datasets = scan.datasets()
    outside = np.where(scan.rng.random(scan.outside.shape) < 0.5, -2000, -3024)
    for ds, values in zip(datasets, scan.stored(scan.hu), strict=True):
        set_stored(ds, scan.lay(np.where(scan.outside, outside, values)))
        ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = -3024, -2000
    return scan.odd(datasets)


@kind
def padding_as_unsigned(scan: Sound) -> OddScan:
    """63536 with VR US is -2000 of signed pixels."""
    _signed(scan)
    datasets = scan.datasets()
    for ds in datasets:
        del ds.PixelPaddingValue
        raw(ds, "PixelPaddingValue", (63536).to_bytes(2, "little"), "US")
    return scan.odd(datasets)


@kind
def padding_not_declared(scan: Sound) -> OddScan:
    _signed(scan)
    datasets = scan.datasets()
    drop(datasets, "PixelPaddingValue")
    return scan.odd(datasets)


@kind
def padding_that_is_water(scan: Sound) -> OddScan:
    """Pixel Padding Value 0 by default, where 0 is water and nothing is padded."""
    _signed(scan)
    scan.outside = np.zeros_like(scan.outside)
    datasets = scan.datasets()
    put(datasets, "PixelPaddingValue", -scan.vendor.intercept)
    return scan.odd(datasets)


@kind
def intercept_of_each_slice(scan: Sound) -> OddScan:
    """As some Philips and PET/CT scanners write them."""
    _signed(scan)
    scan.outside = np.zeros_like(scan.outside)
    datasets = scan.datasets()
    for i, (ds, hu) in enumerate(zip(datasets, scan.hu, strict=True)):
        intercept = -1024 - 8 * (i % 5)
        ds.RescaleIntercept = str(intercept)
        drop([ds], "PixelPaddingValue")
        set_stored(ds, scan.lay(hu.astype(np.int32) - intercept))
    return scan.odd(datasets)


@kind
def slope_of_two(scan: Sound) -> OddScan:
    """Rescale Slope 2 and 0.5 in one scan or another; all values stay whole."""
    _signed(scan)
    scan.outside = np.zeros_like(scan.outside)
    scan.hu = scan.hu // 2 * 2
    slope = scan.choice([2.0, 0.5])
    datasets = scan.datasets()
    for ds, hu in zip(datasets, scan.hu, strict=True):
        ds.RescaleSlope, ds.RescaleIntercept = f"{slope:g}", "-1024"
        drop([ds], "PixelPaddingValue")
        set_stored(ds, scan.lay(((hu.astype(np.int32) + 1024) / slope).astype(np.int32)))
    return scan.odd(datasets)


@kind
def fractional_values(scan: Sound) -> OddScan:
    """Photon-counting and cone-beam scanners write quarters of a Hounsfield unit."""
    _signed(scan)
    scan.outside = np.zeros_like(scan.outside)
    datasets, quarters = scan.datasets(), []
    for ds, hu in zip(datasets, scan.hu, strict=True):
        values = hu.astype(np.int32) * 4 + scan.rng.integers(0, 4, hu.shape)
        quarters.append(values / np.float32(4))
        ds.RescaleSlope, ds.RescaleIntercept = "0.25", "0"
        drop([ds], "PixelPaddingValue")
        set_stored(ds, scan.lay(values))
    hu = np.stack(quarters).astype(np.float32)
    return scan.odd(datasets, dataclasses.replace(scan.right(), hu=hu))


@kind
def no_rescale_tags(scan: Sound) -> OddScan:
    """Signed values that are HU already; slope and intercept are missing."""
    scan.vendor = next(v for v in VENDORS if v.intercept == 0)
    datasets = scan.datasets()
    drop(datasets, "RescaleSlope", "RescaleIntercept", "RescaleType")
    return scan.odd(datasets)


@kind
def rescale_type(scan: Sound) -> OddScan:
    """Missing, empty, unspecified, or HU in other letters: all are HU."""
    datasets = scan.datasets()
    put(datasets, "RescaleType", scan.choice(["", "US", "hu", "HU ", "HOUNSFIELD", None]))
    return scan.odd(datasets)


@kind
def monochrome1(scan: Sound) -> OddScan:
    """Bone is shown black: the values are the same."""
    datasets = scan.datasets()
    put(datasets, "PhotometricInterpretation", "MONOCHROME1")
    return scan.odd(datasets)


@kind
def thirty_two_bits(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    for ds, values in zip(datasets, scan.stored(scan.hu), strict=True):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 32, 32, 31
        set_stored(ds, scan.lay(values))
    return scan.odd(datasets)


@kind
def number_spellings(scan: Sound) -> OddScan:
    """Decimal strings with signs, exponents, blanks, and more than 16 characters."""
    scan.syntax = ExplicitVRLittleEndian
    datasets = scan.datasets()
    for ds in datasets:
        intercept, spacing = f"{scan.vendor.intercept}", f"{scan.pixel_mm:.9g}"
        raw(ds, "RescaleSlope", scan.choice([b"1.000000", b"+1", b" 1 ", b"1.0e+00", b"1."]))
        spellings = [f"{intercept}.0", f" {intercept}", f"{float(intercept):.12e}"]
        raw(ds, "RescaleIntercept", scan.choice(spellings).encode())
        raw(ds, "PixelSpacing", f"{spacing} \\ {spacing}".encode())
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        raw(ds, "ImagePositionPatient", f"{x:+.14f}\\{y:.14e}\\{z:.15g}".encode())
        raw(ds, "SliceThickness", f"{scan.thickness_mm:.18f}".encode())
    return scan.odd(datasets)


@kind
def decimal_commas(scan: Sound) -> OddScan:
    """Numbers as a German computer writes them."""
    scan.syntax = ExplicitVRLittleEndian
    datasets = scan.datasets()
    keywords = ("PixelSpacing", "ImagePositionPatient", "SliceThickness", "RescaleSlope")
    for ds in datasets:
        for keyword in keywords:
            element = ds[keyword]
            parts = element.value if element.VM > 1 else [element.value]
            text = "\\".join(f"{float(part):.6f}" for part in parts).replace(".", ",")
            raw(ds, keyword, text.encode())
    return scan.odd(datasets)
