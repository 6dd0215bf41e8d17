"""Odd headers of sound scans: kinds of images, people, text, private elements."""

from __future__ import annotations

import copy

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage

from tests.campaigns.odd_base import OddScan, Sound, drop, kind, put

# ---- what kind of image -----------------------------------------------------------------------


@kind
def image_types(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    value = scan.choice([
        ["ORIGINAL", "PRIMARY"],
        ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM7 SPI DUAL", "STD", "SNRG"],
        ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SEQ"],
        ["ORIGINAL", "PRIMARY", "AXIAL", "", "HELIX"],
        ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        ["ORIGINAL", "SECONDARY", "AXIAL"],
        ["DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 SPI"],
        ["DERIVED", "PRIMARY", "AXIAL", "HELIX", "IMR1"],
        ["ORIGINAL", "PRIMARY", "AXIAL", "HELICAL_CT", "DLR"],
        ["original", "primary", "axial"],
        ["", "", "AXIAL"],
        "",
    ])  # fmt: skip
    put(datasets, "ImageType", value)
    return scan.odd(datasets)


@kind
def body_parts(scan: Sound) -> OddScan:
    """The protocol's default, or nothing: the lungs are there."""
    datasets = scan.datasets()
    words = ["HEAD", "EXTREMITY", "", "ABDOMEN", "NECK", "THORAX_1WB", "BRUST", "KNEE", "SPINE"]
    put(datasets, "BodyPartExamined", scan.choice(words))
    put(datasets, "ProtocolName", "1.1 Schaedel Routine")
    return scan.odd(datasets)


@kind
def modality_odd(scan: Sound) -> OddScan:
    """Modality in other letters, or empty in some or all: the SOP class says CT."""
    datasets = scan.datasets()
    which = int(scan.rng.integers(3))
    put(datasets, "Modality", lambda i: ("ct", "", "CT" if i % 2 else "")[which])
    return scan.odd(datasets)


@kind
def localizer_in_the_series(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    scout = scan.datasets(scan.hu[:1])[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.SOPInstanceUID = scan.uid("scout")
    scout.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    scout.InstanceNumber = 0
    return scan.odd([*datasets, scout], scan.right(lost={"localizer": 1}))


@kind
def capture_in_the_series(scan: Sound) -> OddScan:
    """A page of the patient protocol or a dose table behind the last slice."""
    datasets = scan.datasets()
    page = copy.deepcopy(datasets[0])
    page.SOPClassUID, page.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", scan.uid("page")
    page.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    drop([page], "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    page.InstanceNumber = 999
    lost = scan.right(lost={"secondary_capture": 1})
    return scan.odd([*datasets, page], [lost, scan.right(lost={"unknown_orientation": 1})])


@kind
def other_objects_beside(scan: Sound) -> OddScan:
    """A dose report, a presentation state and a scout of other series in the study."""
    datasets = scan.datasets()
    report = Dataset()
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate"):
        setattr(report, keyword, datasets[0][keyword].value)
    report.file_meta = copy.deepcopy(datasets[0].file_meta)
    report.SOPClassUID, report.Modality = "1.2.840.10008.5.1.4.1.1.88.67", "SR"
    report.SOPInstanceUID, report.SeriesInstanceUID = scan.uid("report"), scan.uid("reports")
    item = Dataset()
    item.ValueType, item.TextValue = "TEXT", "CTDIvol"
    report.ContentSequence = Sequence([item])
    scout = scan.datasets(scan.hu[:1], series=1)[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    return scan.odd([*datasets, report, scout], scan.right())


# ---- people and text --------------------------------------------------------------------------


@kind
def ages_and_sexes(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    put(datasets, "PatientAge", scan.choice(["", "061Y ", "61", "019M", "004W", "999Y", "Y", None]))
    put(datasets, "PatientSex", scan.choice(["", "f", "O", "Female", "M ", None]))
    return scan.odd(datasets)


@kind
def character_sets(scan: Sound) -> OddScan:
    """Names, Patient IDs and descriptions that are not ASCII."""
    charset, text = scan.choice([
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "山田^太郎"),
        ("ISO_IR 144", "Иванов^Пётр"),
        ("ISO_IR 126", "Διονυσιος"),
        ("ISO_IR 101", "Wałęsa^Żaneta"),
        ("GB18030", "王^小东"),
        ("ISO_IR 166", "นามสกุล"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ])  # fmt: skip
    datasets = scan.datasets()
    put(datasets, "SpecificCharacterSet", charset)
    put(datasets, "PatientName", text)
    put(datasets, "InstitutionName", text.split("=")[-1])
    if scan.rng.random() < 0.5:
        put(datasets, "PatientID", f"{text.split('=')[-1].split('^')[0]} {scan.names[1]}")
    return scan.odd(datasets)


@kind
def empty_values(scan: Sound) -> OddScan:
    """All that planning can do without is empty."""
    datasets = scan.datasets()
    keywords = ("KVP", "ConvolutionKernel", "PatientAge", "PatientSex", "Manufacturer",
                "StudyDate", "StudyTime", "AcquisitionDate", "AcquisitionTime", "PatientPosition",
                "SeriesNumber", "BodyPartExamined", "SpecificCharacterSet", "PatientName",
                "RescaleType", "FrameOfReferenceUID", "SliceLocation")  # fmt: skip
    for keyword in keywords:
        if scan.rng.random() < 0.8:
            put(datasets, keyword, None)
    return scan.odd(datasets)


@kind
def deidentified(scan: Sound) -> OddScan:
    """As an archive's de-identification leaves it: names removed, dates shifted, elements gone."""
    datasets = scan.datasets()
    drop(datasets, "PatientName", "StudyTime", "AcquisitionTime", "Manufacturer", "AcquisitionDate",
         "FrameOfReferenceUID", "SeriesNumber")  # fmt: skip
    put(datasets, "PatientIdentityRemoved", "YES")
    put(datasets, "DeidentificationMethod", "CTP")
    put(datasets, "StudyDate", "18000101")
    return scan.odd(datasets)


@kind
def windows_of_several_values(scan: Sound) -> OddScan:
    datasets = scan.datasets()
    put(datasets, "WindowCenter", ["40", "-600", "400"])
    put(datasets, "WindowWidth", ["400", "1600", "2000"])
    put(datasets, "WindowCenterWidthExplanation", ["WINDOW1", "WINDOW2", "BONE"])
    put(datasets, "VOILUTFunction", "SIGMOID")
    return scan.odd(datasets)


@kind
def styles_of_vendors(scan: Sound) -> OddScan:
    """Private groups as the vendors write them."""
    datasets = scan.datasets()
    creator, group, values = scan.choice([
        ("SIEMENS CSA HEADER", 0x0029, ((0x08, "CS", "IMAGE NUM 4"), (0x10, "OB", b"SV10" * 40))),
        ("SIEMENS CT VA0  COAD", 0x0019, ((0xB0, "DS", "1.5"), (0x10, "DS", ["1", "2"]))),
        ("GEMS_ACQU_01", 0x0019, ((0x02, "SL", 912), (0x23, "DS", "39.37"), (0x27, "DS", "0.5"))),
        ("GEMS_PARM_01", 0x0043, ((0x10, "US", 400), (0x27, "SH", "/1.375:1"))),
        ("TOSHIBA_MEC_CT3", 0x7005, ((0x0A, "DS", "0.75"), (0x0B, "UN", b"\1\0\0\0"))),
        ("ELSCINT1", 0x00E1, ((0x21, "DS", "302.1"), (0x37, "DS", "0"), (0x50, "DS", "1.2"))),
        ("UIH", 0x0065, ((0x01, "LO", "VOLUME"), (0x02, "FD", 0.4))),
        ("PHILIPS MR/PART", 0x2005, ((0x20, "SL", 4), (0x63, "SL", 1))),
    ])  # fmt: skip
    for ds in datasets:
        block = ds.private_block(group, creator, create=True)
        for element, vr, value in values:
            block.add_new(element, vr, value)
    put(datasets, "SOPClassUID", CTImageStorage)
    return scan.odd(datasets)


@kind
def private_sequences(scan: Sound) -> OddScan:
    """Sequences within sequences in private groups, of defined and undefined length."""
    datasets = scan.datasets()
    for ds in datasets:
        inner, outer = Dataset(), Dataset()
        inner.add_new(0x00100020, "LO", "other")
        inner.add_new(0x00200032, "DS", ["9", "9", "9"])
        inner.is_undefined_length_sequence_item = bool(scan.rng.integers(2))
        outer.ReferencedImageSequence = Sequence([inner, inner])
        outer["ReferencedImageSequence"].is_undefined_length = bool(scan.rng.integers(2))
        block = ds.private_block(0x0099, "ODD SEQUENCES", create=True)
        block.add_new(0x10, "SQ", Sequence([outer]))
        early = ds.private_block(0x0009, "ODD EARLY", create=True)
        early.add_new(0x11, "SQ", Sequence([outer]))
    return scan.odd(datasets)
