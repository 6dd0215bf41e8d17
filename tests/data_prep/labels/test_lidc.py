"""LIDC-IDRI: the XML, masks of one reader, readers grouped into nodules, nodules on
real scans."""

import tarfile
import zipfile

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from data_prep.labels import lidc
from data_prep.scan.archives import list_sources
from data_prep.scan.headers import Header, read_header
from data_prep.scan.rules import Rules
from data_prep.scan.series import plan_series
from data_prep.scan.volume import load_volume
from data_prep.system.errors import InputError

SHAPE = (40, 50)
SLICES = [f"image-{number}" for number in range(6)]


def rectangle(left: int, top: int, width: int, height: int) -> list[tuple[int, int]]:
    """The (x, y) pixels of an outline, once around."""
    right, bottom = left + width - 1, top + height - 1
    upper = [(x, top) for x in range(left, right)]
    lower = [(x, bottom) for x in range(right, left, -1)]
    return (
        upper
        + [(right, y) for y in range(top, bottom)]
        + lower
        + [(left, y) for y in range(bottom, top, -1)]
    )


def contour(
    number: int, points, *, inclusion: bool = True, position_mm: float | None = None
) -> lidc.Contour:
    position_mm = 2.0 * number if position_mm is None else position_mm
    return lidc.Contour(SLICES[number], position_mm, inclusion, np.array(points))


def nodule(*contours: lidc.Contour, malignancy: int = 3, name: str = "1") -> lidc.ReaderNodule:
    return lidc.ReaderNodule(
        name, dict.fromkeys(lidc.CHARACTERISTICS, 3) | {"malignancy": malignancy}, contours
    )


def reading(*sessions, series: str = "series") -> lidc.Reading:
    return lidc.Reading(series, "study", sessions)


def mask_of(*contours: lidc.Contour) -> np.ndarray:
    """[6, 40, 50]."""
    return lidc.reader_masks(
        contours, [SLICES.index(c.sop_instance_uid) for c in contours], (0, 0, 0, 6, *SHAPE)
    )


def xml(
    *sessions: list[str], root: str = "LidcReadMessage", series: str = "series", note: str = ""
) -> bytes:
    """A reading with these nodules for each reader."""
    texts = "".join(f"<readingSession>{''.join(nodules)}</readingSession>" for nodules in sessions)
    header = f"<ResponseHeader><SeriesInstanceUid>{series}</SeriesInstanceUid>{note}"
    header += "<StudyInstanceUID>study</StudyInstanceUID></ResponseHeader>"
    return (
        f'<?xml version="1.0"?><{root} xmlns="http://www.nih.gov">{header}{texts}</{root}>'.encode()
    )


def xml_nodule(points, characteristics: dict | None = None, inclusion: str = "TRUE") -> str:
    values = "".join(f"<{name}>{value}</{name}>" for name, value in (characteristics or {}).items())
    edges = "".join(
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points
    )
    roi = "<roi><imageZposition>-2.5 </imageZposition><imageSOP_UID> image-1 </imageSOP_UID>"
    roi += f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    element = "" if characteristics is None else f"<characteristics>{values}</characteristics>"
    return f"<unblindedReadNodule><noduleID>7</noduleID>{element}{roi}</unblindedReadNodule>"


SCORES = dict(zip(lidc.CHARACTERISTICS, (5, 1, 6, 3, 4, 1, 2, 5, 4), strict=True))
OUTLINE = rectangle(10, 20, 6, 4)


# ---- reading -------------------------------------------------------------------------------------


def test_read_keeps_what_is_a_nodule_of_3_mm_and_whose_it_is():
    small = [
        xml_nodule(OUTLINE),
        xml_nodule(OUTLINE, {}),
        xml_nodule(OUTLINE, SCORES | {"texture": 0}),
        xml_nodule(OUTLINE, SCORES | {"margin": ""}),
        xml_nodule([(3, 4)], SCORES),
    ]
    result = lidc.read_reading(xml(small, [xml_nodule(OUTLINE, SCORES), *small]))
    assert (result.series_instance_uid, result.study_instance_uid) == ("series", "study")
    # the reader without a nodule keeps the place
    assert [len(session) for session in result.sessions] == [0, 1]
    (kept,) = result.sessions[1]
    assert kept.characteristics == SCORES and kept.nodule_id == "7"
    (outline,) = kept.contours
    assert (
        outline.sop_instance_uid == "image-1" and outline.position_mm == -2.5 and outline.inclusion
    )
    assert outline.points.tolist() == [list(point) for point in OUTLINE]


def test_other_reads_are_none_and_damage_is_named():
    assert lidc.read_reading(xml([], root="IdriReadMessage")) is None
    assert lidc.read_reading(b"<html/>") is None
    damaged = xml([xml_nodule(OUTLINE, SCORES)])[:-30]
    for content, words in (
        (damaged, r"158\.xml: damaged XML"),
        (b"", r"158\.xml: damaged XML"),
        (xml([], series=" "), "SeriesInstanceUid is empty"),
        (xml([xml_nodule([(1, 2), ("x", 3)], SCORES)]), "coordinate"),
        (xml([xml_nodule(OUTLINE, SCORES, inclusion="maybe")]), "inclusion"),
        (xml([xml_nodule(OUTLINE, SCORES | {"malignancy": "high"})]), "malignancy"),
    ):
        with pytest.raises(lidc.LidcError, match=words) as caught:
            lidc.read_reading(content, "158.xml")
        assert "\n" not in str(caught.value)


def test_a_series_in_several_files_counts_once(tmp_path):
    one, other = [xml_nodule(OUTLINE, SCORES)], [xml_nodule(OUTLINE[::-1], SCORES)]
    folder = tmp_path / "xml"
    folder.mkdir()
    (folder / "1.xml").write_bytes(xml(one, other))
    # readers in another order
    (folder / "2.XML").write_bytes(xml(other, one, note="<Version>2</Version>"))
    (folder / "3.xml").write_bytes(xml([], root="IdriReadMessage"))
    (folder / "4.xml").write_bytes(xml(one, series="second"))
    (folder / "notes.txt").write_bytes(b"no XML")
    with tarfile.open(tmp_path / "all.tar.xz", "w:xz") as archive:
        archive.add(folder, "xml")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("5.xml", xml(one, series="third"))
    assert set(lidc.read_readings(folder)) == {"series", "second", "third"}
    assert set(lidc.read_readings(tmp_path / "all.tar.xz")) == {"series", "second"}
    (folder / "6.xml").write_bytes(xml(one, [xml_nodule(OUTLINE, SCORES | {"malignancy": 5})]))
    with pytest.raises(lidc.LidcError, match=r"6\.xml: a second, different reading"):
        lidc.read_readings(folder)


def test_no_readings_is_an_error(tmp_path):
    with pytest.raises(lidc.LidcError, match="no CT reading"):
        lidc.read_readings(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"a\.tar: not a readable tar"):
        lidc.read_readings(tmp_path / "a.tar")
    (tmp_path / "b.xml").write_bytes(b"<broken")
    with pytest.raises(lidc.LidcError, match=r"^b\.xml: damaged"):
        lidc.read_readings(tmp_path)


# ---- one reader ----------------------------------------------------------------------------------


def test_contour_lies_outside_the_nodule():
    mask = mask_of(contour(2, rectangle(10, 20, 6, 4)))
    expected = np.zeros((6, *SHAPE), bool)
    expected[2, 21:23, 11:15] = True  # rows are y, columns are x
    np.testing.assert_array_equal(mask, expected)


def test_inclusions_unite_and_a_hole_takes_its_contour_too():
    outer = contour(1, rectangle(5, 5, 12, 12))  # 10 x 10 inside
    hole = contour(1, rectangle(8, 8, 4, 4), inclusion=False)
    beside = contour(1, rectangle(30, 5, 5, 5))
    overlapping = contour(1, rectangle(10, 10, 12, 6))  # 10 x 4 inside, of which 5 x 4 in the first
    mask = mask_of(hole, outer, beside, overlapping)
    assert not mask[1, 8:12, 8:12].any()
    assert mask[1].sum() == 100 + 9 + 40 - 20 - 16
    assert not mask[[0, 2, 3, 4, 5]].any()


def test_contours_without_an_inside_are_empty():
    assert not mask_of(contour(0, [(4, 4), (5, 4)]), contour(1, rectangle(9, 9, 2, 2))).any()


# ---- grouping ------------------------------------------------------------------------------------


def line(x: int, number: int = 0) -> np.ndarray:
    return np.array([[x, y, number] for y in range(3)])


def test_grouping_is_by_the_smallest_distance_in_voxels_and_goes_through_others():
    groups = lidc.cluster_annotations([line(0), line(20), line(2), line(4, 1), line(23)], 2.5)
    assert groups[0] == groups[2] == groups[3]  # 2 pixels; then 2 pixels and a slice, 2.24
    assert len({groups[0], groups[1], groups[4]}) == 3  # 3 pixels are too far


def test_more_than_four_members_shrink_the_tolerance():
    five = [line(0), line(1), line(2), line(5), line(6)]
    assert len(set(lidc.cluster_annotations(five[1:], 3.0))) == 1
    assert lidc.cluster_annotations(five, 3.0).tolist() == [0, 0, 0, 1, 1]
    # cannot be told apart: stays
    assert lidc.cluster_annotations([line(0)] * 5, 3.0).tolist() == [0] * 5


# ---- consensus -----------------------------------------------------------------------------------


def nodules_of(one_reading: lidc.Reading, **rule) -> list[lidc.Nodule]:
    return lidc.consensus_nodules(one_reading, SLICES, SHAPE, 2.0, **{"min_area_px": 0, **rule})


@pytest.mark.parametrize(
    ("readers", "of", "taken"), [(1, 1, True), (1, 2, False), (2, 3, False), (3, 4, True)]
)
def test_seven_tenths_of_the_readers(readers, of, taken):
    """Some readers see 6 x 6 pixels, the others the left 3 x 6 of them."""
    wide, narrow = (
        nodule(contour(3, rectangle(10, 10, 8, 8))),
        nodule(contour(3, rectangle(10, 10, 5, 8))),
    )
    (kept,) = nodules_of(reading(*[(wide,)] * readers, *[(narrow,)] * (of - readers)))
    assert kept.mask.shape == (1, 6, 6 if taken else 3) and kept.mask.all()
    assert (kept.first_slice, kept.top, kept.left, kept.num_readers) == (3, 11, 11, of)
    (half,) = nodules_of(
        reading(*[(wide,)] * readers, *[(narrow,)] * (of - readers)), consensus=0.5
    )
    assert half.mask.sum() == 36


def test_malignancy_is_the_upper_median_of_the_readers():
    def malignancy(*scores):
        (one,) = nodules_of(
            reading(*[(nodule(contour(0, OUTLINE), malignancy=score),) for score in scores])
        )
        return one.malignancy

    assert (malignancy(2), malignancy(2, 3)) == (2, 3)
    assert (malignancy(1, 2, 5), malignancy(1, 2, 4, 5)) == (2, 4)
    assert [lidc.finding(score) for score in (1, 2, 3, 4, 5)] == ["no cancer"] * 2 + [
        "ambiguous"
    ] + ["cancer"] * 2


def test_slices_are_kept_above_the_smallest_area_and_the_box_is_of_these():
    one = nodule(
        contour(1, rectangle(9, 9, 5, 5)),
        contour(2, rectangle(8, 8, 6, 6)),
        contour(4, rectangle(8, 8, 7, 7)),
    )
    (kept,) = nodules_of(reading((one,)), min_area_px=9)
    assert kept.first_slice == 2 and kept.mask.sum(axis=(1, 2)).tolist() == [16, 0, 25]
    assert nodules_of(reading((one,)), min_area_px=25) == []
    assert nodules_of(reading((), ())) == []


def test_order_of_the_slices_may_be_either():
    one = nodule(contour(1, rectangle(9, 9, 5, 5)), contour(2, rectangle(8, 8, 6, 6)))
    (kept,) = lidc.consensus_nodules(reading((one,)), SLICES[::-1], SHAPE, 2.0, min_area_px=0)
    assert kept.first_slice == 3 and kept.mask.sum(axis=(1, 2)).tolist() == [16, 9]


def test_slice_mask_is_the_union_in_the_whole_image():
    near = nodule(contour(1, rectangle(9, 9, 5, 5)), contour(2, rectangle(9, 9, 5, 5)))
    far = nodule(contour(2, rectangle(30, 20, 4, 5)))
    nodules = nodules_of(reading((near, far)))
    assert len(nodules) == 2
    expected = np.zeros(SHAPE, bool)
    expected[10:13, 10:13] = True
    np.testing.assert_array_equal(lidc.slice_mask(nodules, 1, SHAPE), expected)
    expected[21:24, 31:33] = True
    np.testing.assert_array_equal(lidc.slice_mask(nodules, 2, SHAPE), expected)
    assert not any(lidc.slice_mask(nodules, number, SHAPE).any() for number in (0, 3))


def test_two_nodules_of_one_reader_in_one_group_are_two_annotations_of_one_reader():
    left, right = (
        nodule(contour(0, rectangle(5, 5, 6, 6))),
        nodule(contour(0, rectangle(12, 5, 6, 6))),
    )
    (votes,) = lidc.nodule_votes(reading((left, right)), SLICES, SHAPE, 2.0)
    assert (votes.num_annotations, votes.num_readers, votes.votes.max()) == (2, 1, 1)


def test_an_excluded_reading_is_left_out_unless_asked_for():
    series, session, name = next(iter(lidc.EXCLUDED_READINGS))
    assert session == 0
    one_reading = reading((nodule(contour(0, OUTLINE), name=name),), series=series)
    assert nodules_of(one_reading) == []
    assert len(nodules_of(one_reading, keep_excluded=True)) == 1
    assert len(nodules_of(one_reading._replace(series_instance_uid="another"))) == 1


# ---- images and slices ---------------------------------------------------------------------------


def test_slices_without_images_are_numbered_by_position():
    contours = [
        lidc.Contour(uid, z, True, np.array(OUTLINE))
        for uid, z in (("c", -90.02), ("a", -100), ("b", -98.75), ("b2", -98.75))
    ]
    numbers = lidc.slices_from_positions(reading((nodule(*contours),)), 1.25)
    assert numbers == {"a": 0, "b": 1, "b2": 1, "c": 8}
    assert lidc.slices_from_positions(reading(()), 1.25) == {}
    with pytest.raises(lidc.LidcError, match="slice spacing 0"):
        lidc.slices_from_positions(reading(()), 0)


def test_an_image_named_at_two_positions_is_placed_by_position():
    """The slice at 2 mm bears the UID of the one at 4 mm."""
    size = {0: 5, 4: 6, 6: 7}
    contours = [contour(z // 2, rectangle(8, 8, side, side)) for z, side in size.items()]
    contours.append(contour(2, rectangle(8, 8, 8, 8), position_mm=2.0))
    for slices, areas in ((SLICES, [9, 36, 16, 25]), (SLICES[::-1], [25, 16, 36, 9])):
        (placed,) = lidc.consensus_nodules(
            reading((nodule(*contours),)), slices, SHAPE, 2.0, min_area_px=0
        )
        assert placed.mask.sum(axis=(1, 2)).tolist() == areas


def test_annotations_of_another_scan_are_refused_without_naming_it():
    one_reading = reading((nodule(contour(4, OUTLINE)),))
    with pytest.raises(lidc.LidcError, match="an image that the series does not have") as caught:
        lidc.consensus_nodules(one_reading, SLICES[:4], SHAPE, 2.0)
    assert "image-4" not in str(caught.value)
    # the outline's last row is 23
    with pytest.raises(lidc.LidcError, match="leaves the image of 23 x 50"):
        lidc.consensus_nodules(one_reading, SLICES, (23, 50), 2.0)
    for arguments in ({"consensus": 0.0}, {"consensus": 1.1}, {"min_area_px": -1}):
        with pytest.raises(lidc.LidcError, match="consensus"):
            nodules_of(one_reading, **arguments)
    with pytest.raises(lidc.LidcError, match="slice thickness"):
        lidc.consensus_nodules(one_reading, SLICES, SHAPE, 0.0)


# ---- real scans ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scan", "annotations", "expected"),
    [
        ("lidc_0001", "LIDC-IDRI-0001__tcia-lidc-xml_185_069.xml", [(86, 8, 5, 4)]),
        (
            "lidc_0003.zip",
            "LIDC-IDRI-0003__tcia-lidc-xml_185_072.xml",
            [(62, 8, 2, 1), (72, 7, 5, 4), (82, 3, 4, 4), (82, 5, 4, 4)],
        ),
    ],
)
def test_masks_lie_on_the_nodules_of_real_scans(real_data, scan, annotations, expected):
    sources = [source for source in list_sources(real_data) if source.path.split("/")[0] == scan]
    headers = [
        header for source in sources if isinstance(header := read_header(real_data, source), Header)
    ]
    candidate = next(entry for entry in plan_series(headers, Rules()) if len(entry.headers) > 100)
    hu = load_volume(real_data, candidate, Rules()).hu
    one_reading = lidc.read_reading((real_data / "lidc_xml" / annotations).read_bytes())
    assert {header.series_instance_uid for header in candidate.headers} == {
        one_reading.series_instance_uid
    }
    uids = [header.sop_instance_uid for header in candidate.headers]
    nodules = lidc.consensus_nodules(one_reading, uids, hu.shape[1:], candidate.slice_thickness_mm)
    facts = [(one.first_slice, len(one.mask), one.malignancy, one.num_readers) for one in nodules]
    assert sorted(facts) == expected
    for one in nodules:
        middle = one.first_slice + len(one.mask) // 2
        inside = lidc.slice_mask([one], middle, hu.shape[1:])
        ring = binary_dilation(inside, iterations=8) & ~binary_dilation(inside, iterations=3)
        if one.num_readers > 1:  # the one that a single reader drew is ground glass
            assert -250 < hu[middle][inside].mean() < 100
        assert np.median(hu[middle][ring]) < min(-750, hu[middle][inside].mean() - 150)


def test_radiograph_reads_of_real_patients_are_none(real_data):
    for name in (
        "LIDC-IDRI-0001__tcia-lidc-xml_185_068.xml",
        "LIDC-IDRI-0003__tcia-lidc-xml_185_073.xml",
    ):
        assert lidc.read_reading((real_data / "lidc_xml" / name).read_bytes()) is None
