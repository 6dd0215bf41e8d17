"""Headers as scanners, archives and workstations write them: words within words, turned images,
wrong or rounded numbers, copies."""

import copy

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep.scan.archives import list_sources
from data_prep.scan.headers import read_header
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, plan_series, select_reconstructions
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_rejection, only_volume

HU = dicom_files.thorax()
TINY = np.zeros((24, 72, 72), np.int16)


def edited(hu=HU, *, spacing=2.5, **values) -> list[Dataset]:
    datasets = dicom_files.slices(hu, spacing=spacing)
    for i, ds in enumerate(datasets):
        for keyword, value in values.items():
            setattr(ds, keyword, value(i) if callable(value) else value)
    return datasets


def volume_of(folder, datasets, rules=None):
    return only_volume(convert(dicom_files.write(folder, datasets), rules))


# ---- Image Type ----------------------------------------------------------------------------------


def test_words_within_words_of_image_type(tmp_path):
    kinds = {
        "CT_SOM5 MPR\\MIP": "derived_image",
        "AXIAL\\THINMIP10": "derived_image",
        "PARALLEL\\MIN-IP THICK": "derived_image",
        "AXIAL\\CT_SOM7 VRT": "derived_image",
        "VOLUME\\MAXIMUM": "derived_image",
        "AXIAL\\EFF_ATOMIC_NUM": "derived_image",
        "SCOUT_AP": "localizer",
        "AXIAL\\CT_SOM5 SPI": None,
        "AXIAL\\AIDR 3D STANDARD": None,
        "AXIAL\\COMPRESSED": None,
        "AXIAL\\FILTERED BACK PROJECTION": None,
        "AXIAL\\MIPLEX": None,
        "VOLUME\\RESAMPLED": None,
        "MPR\\AVERAGE": None,
    }
    found = {}
    for number, kind in enumerate(kinds):
        datasets = edited(TINY[:1], ImageType=["DERIVED", "PRIMARY", *kind.split("\\")])
        [entry] = dicom_files.planned(tmp_path / str(number), datasets, Rules(min_slices=1))
        found[kind] = entry.reason if isinstance(entry, Rejection) else None
    assert found == kinds


# ---- turned images -------------------------------------------------------------------------------


def turned(degrees, tilt=0.0):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    tip = np.array([[1, 0, 0], [0, np.cos(np.radians(tilt)), 0], [0, -np.sin(np.radians(tilt)), 1]])
    return tuple(np.concatenate([tip @ (c, s, 0), tip @ (-s, c, 0)]))


@pytest.mark.parametrize(
    ("degrees", "tilt", "outcome"),
    [
        pytest.param(-8, 0, "8.0 degrees"),
        pytest.param(98, 0, "8.0 degrees"),
        pytest.param(4, 0, ("rotated",)),
        (0, 20, ()),
    ],
)
def test_turned_within_the_plane(tmp_path, degrees, tilt, outcome):
    datasets = dicom_files.slices(TINY, orientation=turned(degrees, tilt))
    [entry] = dicom_files.planned(tmp_path, datasets)
    if isinstance(outcome, str):
        assert entry.reason == "rotated" and entry.detail.startswith(outcome)
    else:
        assert entry.notes == outcome + (("gantry_tilt",) if tilt else ())


def stored_as(datasets, numbers, orientation, view, corner):
    """The same scan, some slices of which a workstation stored in another orientation."""
    extent = 5.5 * (HU.shape[1] - 1)
    for i in numbers:
        ds = datasets[i]
        dicom_files.set_pixels(ds, view(dicom_files.stored(ds)))
        ds.ImageOrientationPatient = list(orientation)
        for axis in range(2):
            place = float(ds.ImagePositionPatient[axis]) + corner[axis] * extent
            ds.ImagePositionPatient[axis] = f"{place:g}"
    return datasets


@pytest.mark.parametrize("numbers", [range(0, 24, 2), range(12), (3, 4, 9)])
@pytest.mark.parametrize(
    ("orientation", "view", "corner"),
    [
        ((-1, 0, 0, 0, 1, 0), lambda a: a[:, ::-1], (1, 0)),
        ((0, -1, 0, 1, 0, 0), lambda a: a[::-1].T, (0, 1)),
    ],
    ids=["mirrored", "quarter_turn"],
)
def test_some_slices_stored_in_another_orientation(tmp_path, numbers, orientation, view, corner):
    datasets = stored_as(dicom_files.slices(HU), numbers, orientation, view, corner)
    volume = volume_of(tmp_path, datasets)
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.notes == () and volume.pair_valid[:-1].all()


# ---- places and numbers --------------------------------------------------------------------------


def test_one_position_for_all_frames_of_an_enhanced_file(tmp_path):
    ds = dicom_files.enhanced(TINY, intercepts=[-1024] * 24, order=list(range(24)))
    for frame in ds.PerFrameFunctionalGroupsSequence:
        frame.PlanePositionSequence[0].ImagePositionPatient = ["0", "0", "0"]
    [entry] = dicom_files.planned(tmp_path, [ds])
    assert (entry.reason, entry.detail) == ("missing_position", "the same in all 24 images")


def test_a_slice_beside_the_others_at_the_position_of_one(tmp_path):
    datasets = dicom_files.slices(HU)
    stray = dicom_files.slices(HU[::-1])[9]
    stray.SOPInstanceUID = dicom_files.uid(99)
    stray.ImagePositionPatient[0] = "-120"
    volume = volume_of(tmp_path, [*datasets, stray])
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.notes == ("other_origin_dropped",) and volume.pair_valid[:-1].all()
    assert [reason for _, reason in volume.dropped] == ["other_origin"]


def test_odd_slice_thicknesses(tmp_path):
    def one_of(first, others, *numbers):
        return {"SliceThickness": lambda i: first if i in numbers else others}

    for name, values, outcome in (
        ("one", one_of("10", "2.5", 8), (2.5, ("odd_slice_thickness",))),
        ("two_thin", one_of("1.25", "2.5", 0, 23), (2.5, ("odd_slice_thickness",))),
        ("rounded", one_of("2.50001", "2.5", *range(12)), (2.50001, ())),
        ("missing", one_of("", "2.5", 5), (2.5, ())),
    ):
        [entry] = dicom_files.planned(tmp_path / name, edited(TINY, **values))
        assert (entry.slice_thickness_mm, entry.notes) == outcome, name
    for name, values in (("many", one_of("5", "2.5", *range(4))), ("all", one_of("5", "5"))):
        [entry] = dicom_files.planned(tmp_path / name, edited(TINY, **values))
        assert entry.reason == "too_thick", name
    thick_end = edited(TINY, **one_of("5", "2.5", 22, 23))
    thick_end[23].ImagePositionPatient[2] = f"{-300 + 2.5 * 24:g}"  # its step is 5 mm, too
    [entry] = dicom_files.planned(tmp_path / "thick_end", thick_end)
    assert entry.reason == "too_thick"


def test_pixel_spacings_that_differ_by_rounding(tmp_path):
    for name, values, spacing in (
        ("alternating", lambda i: ["0.703125"] * 2 if i % 2 else ["0.70", "0.70"], 0.703125),
        ("a_third", lambda i: ["0.976562"] * 2 if i % 3 else ["0.98", "0.98"], 0.976562),
    ):
        [entry] = dicom_files.planned(tmp_path / name, edited(TINY, PixelSpacing=values))
        assert entry.pixel_spacing_mm == (spacing, spacing) and entry.notes == (), name
    values = {"PixelSpacing": lambda i: ["0.70", "0.70"] if i % 2 else ["0.72", "0.72"]}
    [entry] = dicom_files.planned(tmp_path / "other", edited(TINY, **values))
    assert entry.reason == "grid_varies"


def raw(ds, **texts):
    """The file with the bytes of some decimal strings replaced."""
    for keyword, text in texts.items():
        setattr(ds, keyword, ["0"] * (text.count("\\") + 1))
        tag = pydicom.datadict.tag_for_keyword(keyword)
        data = text.encode().ljust(len(text) + len(text) % 2)
        ds[keyword] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), "DS", len(data), data, 0, False, True
        )
    return dicom_files.to_bytes(ds)


def write_raw(folder, files):
    folder.mkdir(exist_ok=True)
    for i, data in enumerate(files):
        (folder / f"IM{i}").write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "texts",
    [
        {"SliceThickness": "2,5"},
        {"PixelSpacing": "5,50\\5,50", "RescaleIntercept": " -1024,000 "},
        {"RescaleSlope": "+1,0E0", "ImageOrientationPatient": "1,0\\0,0\\0\\0\\1,\\,0"},
    ],
)
def test_decimal_commas(tmp_path, texts):
    files = [raw(ds, **texts) for ds in dicom_files.slices(HU)]
    volume = only_volume(convert(write_raw(tmp_path, files)))
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.notes == () and volume.slice_thickness_mm == 2.5


@pytest.mark.parametrize(
    ("keyword", "text", "reason", "name"),
    [
        ("PixelSpacing", "5;5\\5;5", "missing_pixel_spacing", "Pixel Spacing"),
        ("PixelSpacing", "1,234.5\\1", "missing_pixel_spacing", "Pixel Spacing"),
        ("ImagePositionPatient", "1\\2", "missing_position", "Image Position (Patient)"),
    ],
)
def test_what_is_no_number_is_named(tmp_path, keyword, text, reason, name):
    files = [raw(ds, **{keyword: text}) for ds in dicom_files.slices(TINY)]
    write_raw(tmp_path, files)
    headers = [read_header(tmp_path, source) for source in list_sources(tmp_path)]
    [entry] = plan_series(headers, Rules())
    assert entry.reason == reason and f"{name} is no number" in entry.detail


def test_slices_far_apart_make_no_pairs(tmp_path):
    volume = volume_of(tmp_path / "hrct", edited(spacing=12, SliceThickness="1.25"))
    np.testing.assert_array_equal(volume.hu, HU)
    assert not volume.pair_valid.any() and volume.notes == ("sparse_slices",)
    for spacing, thickness in ((2.5, "0.625"), (5, "2.5")):
        datasets = edited(spacing=spacing, SliceThickness=thickness)
        volume = volume_of(tmp_path / str(spacing), datasets)
        assert volume.pair_valid[:-1].all() and volume.notes == ()


# ---- body part -----------------------------------------------------------------------------------


def test_the_lungs_decide_and_not_the_body_part(tmp_path):
    volume = volume_of(tmp_path / "chest", edited(BodyPartExamined="ANKLE"))
    assert volume.notes == ("other_body_part",)
    head = HU.copy()
    head[head < -500] = 30
    head[:, :8] = -1000
    outcome = convert(dicom_files.write(tmp_path / "head", edited(head, BodyPartExamined="HEAD")))
    rejection = only_rejection(outcome)
    assert rejection.reason == "no_chest" and "HEAD" in rejection.detail
    rules = Rules(require_lung=False)
    assert volume_of(tmp_path / "head", [], rules).notes == ()


def test_a_head_that_is_refused_anyway_is_called_so(tmp_path):
    datasets = edited(TINY, BodyPartExamined="HEAD", SliceThickness="5")
    [entry] = dicom_files.planned(tmp_path, datasets)
    assert entry.reason == "no_chest" and "HEAD" in entry.detail and "5 mm" in entry.detail


# ---- copies --------------------------------------------------------------------------------------


def lossy(datasets, *, uids="same"):
    """Copies with other pixels, marked as compressed with loss."""
    copies = copy.deepcopy(datasets)
    for i, ds in enumerate(copies):
        dicom_files.set_pixels(ds, dicom_files.stored(ds) // 3 * 3)
        ds.LossyImageCompression = "01"
        ds.ImageType = ["DERIVED", *ds.ImageType[1:]]
        if uids == "new":
            ds.SOPInstanceUID = dicom_files.uid(5, i)
            ds.InstanceNumber = 100 + i
    return copies


@pytest.mark.parametrize(("uids", "count"), [("same", 24), ("same", 7), ("new", 24), ("new", 9)])
def test_an_original_is_preferred_to_its_lossy_copy(tmp_path, uids, count):
    datasets = dicom_files.slices(HU)
    copies = lossy(datasets[:count], uids=uids)
    dicom_files.write(tmp_path / "a", copies)
    dicom_files.write(tmp_path / "b", datasets, seed=1)
    outcome = convert(tmp_path)
    [[first, *_]] = select_reconstructions([v.candidate for v in outcome.volumes], Rules())
    [volume] = [v for v in outcome.volumes if v.candidate is first]
    np.testing.assert_array_equal(volume.hu, HU)
    if uids == "same":
        assert [reason for _, reason in volume.dropped] == ["lossy_copy"] * count
        assert volume.notes == ("lossy_copies_dropped",)


def test_a_lossy_series_beside_the_original_series(tmp_path):
    copies = lossy(dicom_files.slices(dicom_files.thorax(30), series=2))
    planned_series = dicom_files.planned(tmp_path, dicom_files.slices(HU) + copies)
    [[first, second]] = select_reconstructions(planned_series, Rules())
    assert [len(first.headers), len(second.headers)] == [24, 30]


@pytest.mark.parametrize("kind", ["incomplete", "lossless"])
def test_a_series_in_two_folders(tmp_path, kind):
    datasets = dicom_files.slices(HU)
    others = copy.deepcopy(datasets)
    if kind == "incomplete":
        del datasets[5], others[6:15]
    else:
        for ds in others:
            dicom_files.compress(ds, "1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode)
            ds.LossyImageCompression = "00"
    dicom_files.write(tmp_path / "a", datasets)
    dicom_files.write(tmp_path / "b", others, seed=1)
    volume = only_volume(convert(tmp_path))
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.notes == ("duplicates_dropped",)


def test_a_copy_that_lost_values_without_a_word_is_named(tmp_path):
    """The same SOP Instance UIDs in JPEG 2000, which may be lossy: the plain file is taken."""

    def encode(image):
        frame = imagecodecs.jpeg2k_encode(image, level=40, codecformat="j2k")
        assert (imagecodecs.jpeg2k_decode(frame) != image).any()
        return frame

    datasets = dicom_files.slices(HU)
    others = copy.deepcopy(datasets)
    for ds in others:
        dicom_files.compress(ds, "1.2.840.10008.1.2.4.91", encode)
    dicom_files.write(tmp_path / "a", others)
    dicom_files.write(tmp_path / "b", datasets, seed=1)
    volume = only_volume(convert(tmp_path))
    np.testing.assert_array_equal(volume.hu, HU)
    assert volume.notes == ("lossy_copies_dropped",)
