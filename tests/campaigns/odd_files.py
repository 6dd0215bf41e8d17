"""Odd files of sound scans: transfer syntaxes, encodings of elements, names, copies, enhanced
multi-frame images."""

from __future__ import annotations

import copy
import io
import zipfile

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from data_prep.synthetic.dicom_writer import VENDORS
from tests.campaigns.odd_base import (
    OddScan,
    Sound,
    compress,
    compressed_frame,
    drop,
    get_stored,
    kind,
    put,
    raw,
    set_stored,
)
from tests.helpers.dicom_files import to_bytes

UNSIGNED = [vendor for vendor in VENDORS if not vendor.signed]
ENCAPSULATED = (JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless)


def _compressible(scan: Sound) -> list[Dataset]:
    """Explicit little endian data sets of unsigned pixels, which all codecs write alike."""
    scan.syntax, scan.vendor = ExplicitVRLittleEndian, scan.choice(UNSIGNED)
    return scan.datasets()


# ---- transfer syntaxes --------------------------------------------------------------------------


@kind
def big_endian(scan: Sound) -> OddScan:
    scan.syntax = ExplicitVRBigEndian
    return scan.odd(scan.datasets())


def _all_compressed(scan: Sound, datasets: list[Dataset], syntax: str) -> OddScan:
    for ds in datasets:
        compress(ds, syntax)
    return scan.odd(datasets)


@kind
def deflated(scan: Sound) -> OddScan:
    scan.syntax = DeflatedExplicitVRLittleEndian
    return scan.odd(scan.datasets())


@kind
def run_lengths(scan: Sound) -> OddScan:
    scan.syntax = ExplicitVRLittleEndian
    return _all_compressed(scan, scan.datasets(), RLELossless)


@kind
def jpeg_lossless(scan: Sound) -> OddScan:
    return _all_compressed(scan, _compressible(scan), JPEGLosslessSV1)


@kind
def jpeg_ls(scan: Sound) -> OddScan:
    return _all_compressed(scan, _compressible(scan), JPEGLSLossless)


@kind
def jpeg_2000(scan: Sound) -> OddScan:
    """Unsigned or signed samples."""
    scan.syntax = ExplicitVRLittleEndian
    return _all_compressed(scan, scan.datasets(), JPEG2000Lossless)


@kind
def syntax_of_each_slice(scan: Sound) -> OddScan:
    """A router compressed some of the slices."""
    datasets = _compressible(scan)
    for i, ds in enumerate(datasets):
        if i % 3:
            compress(ds, (JPEG2000Lossless, JPEGLSLossless)[i % 2])
    return scan.odd(datasets)


@kind
def bytes_behind_the_frame(scan: Sound) -> OddScan:
    """One byte of any value, or several FF or 00, behind the end marker."""
    datasets, syntax = _compressible(scan), scan.choice(ENCAPSULATED)
    behind = scan.choice([b"\xff", b"\n", b"\0", b"\xff" * 6, b"\0" * 8, b"A"])
    for ds in datasets:
        compress(ds, syntax, behind)
    return scan.odd(datasets)


@kind
def no_end_marker(scan: Sound) -> OddScan:
    """JPEG 2000 frames that are whole but for FF D9."""
    datasets = _compressible(scan)
    for ds in datasets:
        frame = compressed_frame(ds, JPEG2000Lossless)
        assert frame.endswith(b"\xff\xd9")
        compress(ds, JPEG2000Lossless)
        ds.PixelData = encapsulate([frame[:-2]])
    return scan.odd(datasets)


@kind
def frame_in_fragments(scan: Sound) -> OddScan:
    """A frame in several fragments; with and without an offset table."""
    datasets, syntax = _compressible(scan), scan.choice(ENCAPSULATED)
    has_table = scan.rng.random() < 0.5
    for ds in datasets:
        compress(ds, syntax, fragments_per_frame=3, has_bot=has_table)
    return scan.odd(datasets)


@kind
def native_pixels_under_a_compressed_syntax(scan: Sound) -> OddScan:
    """Decompressed by a tool that left the transfer syntax as it was."""
    datasets, syntax = _compressible(scan), scan.choice(ENCAPSULATED)
    contents = []
    for ds in datasets:
        contents.append(_renamed_syntax(to_bytes(ds), syntax))
    return scan.odd(scan.named(contents))


def _renamed_syntax(data: bytes, syntax: str) -> bytes:
    """The file with another Transfer Syntax UID and the group length that belongs to it."""
    at = data.index(b"\x02\x00\x10\x00UI")
    old = int.from_bytes(data[at + 6 : at + 8], "little")
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    data = data[: at + 6] + len(value).to_bytes(2, "little") + value + data[at + 8 + old :]
    length = data.index(b"\x02\x00\x00\x00UL") + 8
    number = int.from_bytes(data[length : length + 4], "little") + len(value) - old
    return data[:length] + number.to_bytes(4, "little") + data[length + 4 :]


# ---- elements and files -------------------------------------------------------------------------


@kind
def no_preamble(scan: Sound) -> OddScan:
    """Neither preamble nor file meta information, implicit or explicit."""
    return scan.odd(scan.named([to_bytes(ds, preamble=False) for ds in scan.datasets()]))


@kind
def no_preamble_but_meta(scan: Sound) -> OddScan:
    """The 132 bytes before the file meta information were cut off."""
    return scan.odd(scan.named([to_bytes(ds)[132:] for ds in scan.datasets()]))


@kind
def meta_group_length_wrong(scan: Sound) -> OddScan:
    contents = []
    for ds in scan.datasets():
        data = bytearray(to_bytes(ds))
        at = data.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "little") + 6).to_bytes(4, "little")
        contents.append(bytes(data))
    return scan.odd(scan.named(contents))


@kind
def trailing_padding(scan: Sound) -> OddScan:
    """Data Set Trailing Padding (FFFC,FFFC) behind the pixels."""
    datasets = scan.datasets()
    size = int(scan.choice([2, 126, 1024]))
    for ds in datasets:
        ds.add_new(0xFFFCFFFC, "OB", b"\0" * size)
    return scan.odd(datasets)


@kind
def trailing_zeros(scan: Sound) -> OddScan:
    """Files filled up to blocks of a tape or a disk."""
    contents = [to_bytes(ds) for ds in scan.datasets()]
    block = scan.choice([512, 2048, 4096])
    return scan.odd(scan.named([data + b"\0" * (-len(data) % block) for data in contents]))


@kind
def elements_as_unknown(scan: Sound) -> OddScan:
    """VR UN for elements that everyone knows, as routers without a dictionary write them."""
    scan.syntax = ExplicitVRLittleEndian
    datasets = scan.datasets()
    keywords = ("ImagePositionPatient", "PixelSpacing", "ConvolutionKernel", "AcquisitionNumber")
    for ds in datasets:
        for keyword in keywords:
            value = ds[keyword].value
            parts = value if isinstance(value, list | pydicom.multival.MultiValue) else [value]
            raw(ds, keyword, "\\".join(map(str, parts)).encode(), "UN")
        raw(ds, "PixelRepresentation", int(ds.PixelRepresentation).to_bytes(2, "little"), "UN")
    return scan.odd(datasets)


@kind
def uids_padded(scan: Sound) -> OddScan:
    """UIDs padded by blanks, or by more zeros than needed."""
    scan.syntax = ExplicitVRLittleEndian
    datasets = scan.datasets()
    pad = scan.choice([b" ", b"  ", b"\0\0\0"])
    for ds in datasets:
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            raw(ds, keyword, str(ds[keyword].value).encode() + pad)
    return scan.odd(datasets)


@kind
def group_lengths(scan: Sound) -> OddScan:
    """Group lengths, retired since 2008, and some of them wrong."""
    datasets = scan.datasets()
    for ds in datasets:
        for group in (0x0008, 0x0010, 0x0018, 0x0020, 0x0028):
            ds.add_new(group << 16, "UL", 400 + group)
    return scan.odd(datasets)


@kind
def pixel_data_vr(scan: Sound) -> OddScan:
    """OB, or UN, for pixels of 16 bits."""
    scan.syntax = ExplicitVRLittleEndian
    datasets = scan.datasets()
    for ds in datasets:
        ds["PixelData"].VR = "OB"
    return scan.odd(datasets)


@kind
def extra_pixel_bytes(scan: Sound) -> OddScan:
    """Pixel Data longer than the matrix needs."""
    datasets = scan.datasets()
    for ds in datasets:
        ds.PixelData = ds.PixelData + b"\0" * 64
        ds["PixelData"].VR = "OW"
    return scan.odd(datasets)


@kind
def one_frame_said(scan: Sound) -> OddScan:
    """Number of Frames 1 in plain images; an icon with pixels of its own."""
    datasets = scan.datasets()
    put(datasets, "NumberOfFrames", "1")
    for ds in datasets:
        icon = Dataset()
        icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
        icon.Rows = icon.Columns = 8
        icon.BitsAllocated, icon.BitsStored, icon.HighBit, icon.PixelRepresentation = 8, 8, 7, 0
        icon.add_new(0x7FE00010, "OB", bytes(64))
        ds.IconImageSequence = Sequence([icon])
    return scan.odd(datasets)


# ---- names and copies ---------------------------------------------------------------------------


@kind
def file_names(scan: Sound) -> OddScan:
    """Names that do not follow the slices, or follow them downwards."""
    contents = [to_bytes(ds) for ds in scan.datasets()]
    count = len(contents)
    style = scan.choice([
        lambda i: f"{-100.5 - 2.5 * i:f}.dcm",
        lambda i: f"slice ({count - i}).DCM",
        lambda i: f"I{(i * 7919) % 100003}",
        lambda i: f"ÄÖ ü/scan n° {i}.ima",
        lambda i: f"a/{i % 3}/b c/{i}",
        lambda i: f"{i}",
        lambda i: f"IMG{i}.dcm.1",
        lambda i: f"{i:032x}",
        lambda i: f"影像{i}.dcm",
    ])  # fmt: skip
    return scan.odd({style(i): data for i, data in enumerate(contents)})


@kind
def other_files_beside(scan: Sound) -> OddScan:
    files = scan.named([to_bytes(ds) for ds in scan.datasets()])
    files |= {
        "README.TXT": b"created by a burner\r\n",
        "Thumbs.db": bytes(range(256)) * 8,
        "viewer/run.exe": b"MZ" + bytes(500),
        ".DS_Store": b"\0\0\0\1Bud1" + bytes(200),
        "autorun.inf": b"[autorun]\r\n",
        "empty.dcm": b"",
    }
    return scan.odd(files, scan.right())


@kind
def zipped(scan: Sound) -> OddScan:
    """A zip file with folders, stored or deflated."""
    buffer = io.BytesIO()
    method = scan.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in scan.named([to_bytes(ds) for ds in scan.datasets()], "scan 1/").items():
            archive.writestr(name, data)
    return scan.odd({"series.zip": buffer.getvalue()}, scan.right())


@kind
def copies(scan: Sound) -> OddScan:
    """Some files twice, as browsers name them."""
    contents = [to_bytes(ds) for ds in scan.datasets()]
    files = {f"IM{i}.dcm": data for i, data in enumerate(contents)}
    doubled = range(0, len(contents), int(scan.choice([1, 5])))
    files |= {f"IM{i}(1).dcm": contents[i] for i in doubled}
    return scan.odd(files, scan.right(lost={"duplicate_slice": len(doubled)}))


@kind
def two_folders(scan: Sound) -> OddScan:
    """The series in two folders: the second is incomplete, or compressed without loss."""
    datasets = _compressible(scan)
    files = {f"a/{i}.dcm": to_bytes(ds) for i, ds in enumerate(datasets)}
    again = datasets[: len(datasets) // 2] if scan.rng.random() < 0.5 else datasets
    syntax = scan.choice([None, JPEGLSLossless, JPEG2000Lossless])
    for i, ds in enumerate(again):
        if syntax:
            compress(ds, syntax)
        files[f"b/{i}.dcm"] = to_bytes(ds)
    return scan.odd(files, scan.right(lost={"duplicate_slice": len(again)}))


# ---- enhanced --------------------------------------------------------------------------------


def _group(ds: Dataset, *keywords: str) -> Sequence:
    item = Dataset()
    for keyword in keywords:
        if keyword in ds:
            setattr(item, keyword, ds[keyword].value)
    return Sequence([item])


def _enhanced(scan: Sound, sop_class: str, *, orientation_shared: bool) -> Dataset:
    """The scan as one multi-frame image, its frames in random order."""
    plain = scan.datasets()
    order = scan.rng.permutation(len(plain))
    ds = copy.deepcopy(plain[0])
    ds.SOPClassUID = sop_class
    ds.NumberOfFrames = len(plain)
    moved = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
             "RescaleSlope", "RescaleIntercept", "RescaleType", "AcquisitionNumber", "KVP",
             "ConvolutionKernel", "SliceLocation")  # fmt: skip
    drop([ds], *moved)
    ds.VolumetricProperties, ds.ImageType = "VOLUME", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = Dataset()
    shared.PixelMeasuresSequence = _group(plain[0], "PixelSpacing", "SliceThickness")
    if orientation_shared:
        shared.PlaneOrientationSequence = _group(plain[0], "ImageOrientationPatient")
    shared.CTXRayDetailsSequence = _group(plain[0], "KVP")
    shared.CTReconstructionSequence = _group(plain[0], "ConvolutionKernel")
    frames = []
    for number, i in enumerate(order):
        frame, content = Dataset(), Dataset()
        content.StackID, content.InStackPositionNumber = "1", int(i) + 1
        content.DimensionIndexValues = [1, int(i) + 1]
        content.FrameAcquisitionNumber, content.TemporalPositionIndex = 1, 1
        content.FrameAcquisitionDateTime = f"201901071017{number % 60:02d}.5"
        frame.FrameContentSequence = Sequence([content])
        frame.PlanePositionSequence = _group(plain[i], "ImagePositionPatient")
        if not orientation_shared:
            frame.PlaneOrientationSequence = _group(plain[i], "ImageOrientationPatient")
        frame.PixelValueTransformationSequence = _group(
            plain[i], "RescaleSlope", "RescaleIntercept", "RescaleType"
        )
        kinds = Dataset()
        kinds.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        frame.CTImageFrameTypeSequence = Sequence([kinds])
        frames.append(frame)
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    values = np.stack([get_stored(plain[i]) for i in order])
    set_stored(ds, values[0])
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW"
    return ds


@kind
def enhanced(scan: Sound) -> OddScan:
    ds = _enhanced(scan, EnhancedCTImageStorage, orientation_shared=scan.rng.random() < 0.5)
    return scan.odd({"enhanced.dcm": to_bytes(ds)}, scan.right())


@kind
def enhanced_compressed(scan: Sound) -> OddScan:
    scan.syntax, scan.vendor = ExplicitVRLittleEndian, scan.choice(UNSIGNED)
    ds = _enhanced(scan, EnhancedCTImageStorage, orientation_shared=True)
    values = np.frombuffer(ds.PixelData, "<u2").reshape(-1, ds.Rows, ds.Columns)
    frames = []
    for image in values:
        one = Dataset()
        one.file_meta, one.BitsAllocated, one.BitsStored = ds.file_meta, 16, ds.BitsStored
        one.PixelRepresentation = 0
        set_stored(one, image)
        frames.append(compressed_frame(one, JPEGLSLossless))
    ds.PixelData = encapsulate(frames, has_bot=scan.rng.random() < 0.5)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = UID(JPEGLSLossless)
    return scan.odd({"IM0001": to_bytes(ds)}, scan.right())


@kind
def legacy_converted(scan: Sound) -> OddScan:
    """A classic series that an archive converted into one multi-frame image."""
    ds = _enhanced(scan, LegacyConvertedEnhancedCTImageStorage, orientation_shared=True)
    return scan.odd({"converted.dcm": to_bytes(ds)}, scan.right())


@kind
def enhanced_in_parts(scan: Sound) -> OddScan:
    """An enhanced series in several instances, as scanners split long scans."""
    ds = _enhanced(scan, EnhancedCTImageStorage, orientation_shared=True)
    groups, size = ds.PerFrameFunctionalGroupsSequence, ds.Rows * ds.Columns * 2
    pixels, files = ds.PixelData, {}
    half = len(groups) // 2
    for part, chosen in enumerate((slice(0, half), slice(half, None))):
        ds.PerFrameFunctionalGroupsSequence = Sequence(groups[chosen])
        count = len(ds.PerFrameFunctionalGroupsSequence)
        ds.NumberOfFrames = count
        start = half * size * part
        ds.PixelData = pixels[start : start + count * size]
        ds["PixelData"].VR = "OW"
        ds.SOPInstanceUID, ds.InstanceNumber = scan.uid("part", part), part + 1
        files[f"part{part}.dcm"] = to_bytes(ds)
    return scan.odd(files, scan.right())
