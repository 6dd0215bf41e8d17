import dataclasses

import numpy as np
import pytest

from data_prep.scan.anatomy import covers_chest, summarise
from tests.helpers.dicom_files import thorax


def torso(num_slices=60, size=96, mm=4.0):
    """An ellipse of tissue that is widest at slice 40; lungs of 90 x 140 mm in slices 30 to 49;
    bowel gas below."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * mm
    hu = np.full((num_slices, size, size), -1000, dtype=np.int16)
    for i in range(num_slices):
        widest = 150 - 0.5 * abs(i - 40)
        hu[i][(x / widest) ** 2 + (y / 110) ** 2 < 1] = 30
        if 30 <= i < 50:
            for side in (-1, 1):
                hu[i][((x - 70 * side) / 45) ** 2 + (y / 70) ** 2 < 1] = -850
        elif i < 30:
            hu[i][(x / 40) ** 2 + (y / 40) ** 2 < 1] = -1000
    return hu


def test_summary_of_known_shapes():
    summary = summarise(torso(), (4.0, 4.0), 5.0)
    assert (summary.first_lung_slice, summary.last_lung_slice) == (30, 49)
    assert summary.lung_volume_ml == pytest.approx(20 * 5 * 2 * np.pi * 45 * 70 / 1000, rel=0.03)
    assert summary.body_area_mm2[40] == pytest.approx(np.pi * 150 * 110, rel=0.03)
    assert summary.lung_fraction[40] == pytest.approx(2 * 45 * 70 / (150 * 110), rel=0.03)
    assert summary.lung_fraction[10] == 0
    centre = 95 / 2
    rows = (centre - 70 / 4, centre + 70 / 4 + 1)
    columns = (centre - 115 / 4, centre + 115 / 4 + 1)
    np.testing.assert_allclose(summary.lung_box, (*rows, *columns), atol=1.5)


def test_middle_slice_is_the_widest_lung_slice_nearest_the_centre():
    # areas within 99.5 % of the largest (slice 40): slices 39 to 41; the volume's centre is 29.5
    assert summarise(torso(), (4.0, 4.0), 5.0).middle_slice in (38, 39)
    hu = torso()
    hu[50:] = hu[40]
    hu[50:][hu[50:] == -850] = 30  # as wide, nearer the end, no lung
    assert 30 <= summarise(hu, (4.0, 4.0), 5.0).middle_slice <= 40


def test_results_do_not_depend_on_the_pixel_size():
    fine = np.repeat(np.repeat(torso(), 4, axis=1), 4, axis=2)
    coarse, detailed = summarise(torso(), (4.0, 4.0), 5.0), summarise(fine, (1.0, 1.0), 5.0)
    np.testing.assert_array_equal(coarse.lung_fraction, detailed.lung_fraction)
    assert coarse.middle_slice == detailed.middle_slice
    np.testing.assert_array_equal(4 * np.array(coarse.lung_box), detailed.lung_box)


def test_what_covers_the_chest():
    hu = torso()
    assert covers_chest(summarise(hu, (4.0, 4.0), 5.0))
    assert covers_chest(summarise(hu[34:44], (4.0, 4.0), 2.5))  # a slab through the lungs
    assert not covers_chest(summarise(hu[:36], (4.0, 4.0), 5.0))  # an abdomen with lung bases
    assert not covers_chest(summarise(np.where(hu == -850, 30, hu), (4.0, 4.0), 5.0))
    assert not covers_chest(summarise(np.full_like(hu, -1000), (4.0, 4.0), 5.0))
    assert not covers_chest(summarise(np.full_like(hu, 30), (4.0, 4.0), 5.0))


def test_empty_volume_has_no_lung():
    summary = summarise(np.full((5, 20, 20), -1000, np.int16), (4.0, 4.0), 5.0)
    assert (
        summary.lung_box is None and summary.first_lung_slice is None and summary.middle_slice == 2
    )
    assert dataclasses.asdict(summary)["lung_volume_ml"] == 0


@pytest.mark.parametrize("spacing_mm", [(0.001, 0.001), (0.01, 5.0), (900.0, 900.0)])
def test_any_spacing_has_a_summary(spacing_mm):
    assert summarise(torso(3, 20), spacing_mm, 5.0).middle_slice == 1


def test_the_thorax_of_the_other_tests_is_one():
    assert covers_chest(summarise(thorax(), (5.5, 5.5), 2.5))


# ---- thin walls, and fields that cut the body ----------------------------------------------------

PLEURA_MM = (105, 140)  # semi-axes of the chest's inside, rows and columns
LUNGS = slice(3, 11)  # of 12 slices; widest at slice 7


def chest(pixel_mm=0.75, wall_mm=25.0, size=512, lungs=LUNGS, seed=0):
    """[12, size, size] int16 HU: an elliptic chest wall, two lungs beside a mediastinum, liver and
    bowel gas in the other slices, noise. Slices 10 mm apart."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 25, (size, size))
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * pixel_mm
    hu = np.empty((12, size, size), np.int16)
    for i in range(12):
        scale = 1 - 0.01 * abs(i - 7)
        rows, columns = (scale * half for half in PLEURA_MM)
        image = np.full((size, size), -1000.0)
        image[(x / (columns + wall_mm)) ** 2 + (y / (rows + wall_mm)) ** 2 < 1] = 40
        if lungs.start <= i < lungs.stop:
            inside = (x / columns) ** 2 + (y / rows) ** 2 < 1
            image[inside & (np.abs(x - 10) > 30)] = -860
        else:
            image[(x / 40) ** 2 + ((y + 40) / 30) ** 2 < 1] = -1000
        hu[i] = np.rint(image + np.roll(noise, 17 * i))
    return hu


def circular(hu, pixel_mm, radius_mm, padding=-1000):
    """The same in a circular field of view."""
    y, x = (np.mgrid[: hu.shape[1], : hu.shape[2]] - (hu.shape[1] - 1) / 2) * pixel_mm
    return np.where(np.hypot(x, y) > radius_mm, np.int16(padding), hu)


def assert_both_lungs(hu, pixel_mm, box_mm=(-105, 105, -140, 140), origin_mm=None, middle=(6, 7)):
    """`box_mm`: the lungs' box, relative to the chest's centre, which lies at `origin_mm` (rows,
    columns) of the image, by default in its middle."""
    summary = summarise(hu, (pixel_mm, pixel_mm), 10.0)
    assert covers_chest(summary)
    assert (summary.first_lung_slice, summary.last_lung_slice) == (LUNGS.start, LUNGS.stop - 1)
    assert summary.middle_slice in middle
    centre = origin_mm or [pixel_mm * (size - 1) / 2 for size in hu.shape[1:]]
    expected = [(centre[i // 2] + edge) / pixel_mm for i, edge in enumerate(box_mm)]
    np.testing.assert_allclose(summary.lung_box, expected, atol=10 / pixel_mm)
    return summary


@pytest.mark.parametrize("pixel_mm", [0.59, 0.7, 0.85])
@pytest.mark.parametrize("wall_mm", [6, 8, 10])
def test_lungs_behind_a_thin_wall_are_seen(pixel_mm, wall_mm):
    summary = assert_both_lungs(chest(pixel_mm, wall_mm), pixel_mm)
    area = np.pi * 105 * 140 - 2 * 60 * 105
    assert summary.lung_fraction[7] == pytest.approx(
        area / (np.pi * (105 + wall_mm) * (140 + wall_mm)), rel=0.05
    )


@pytest.mark.parametrize("cut", ["one side", "both sides", "front", "circle", "padded circle"])
@pytest.mark.parametrize("left_mm", [5, -15])  # of the wall of 25 mm; below 0: the lung is cut
def test_a_field_that_cuts_the_wall_loses_no_lung(cut, left_mm):
    hu, pixel_mm = chest(), 0.75
    centre = pixel_mm * (512 - 1) / 2
    side = round((centre - 140 - left_mm) / pixel_mm)
    front = round((centre - 105 - left_mm) / pixel_mm)
    box, origin = [-105, 105, -140, 140], [centre, centre]
    if cut == "one side":
        hu, origin[1], box[2] = hu[:, :, side:], centre - side * pixel_mm, max(-140, -140 - left_mm)
    elif cut == "both sides":
        hu, origin[1] = hu[:, :, side:-side], centre - side * pixel_mm
        box[2:] = max(-140, -140 - left_mm), min(140, 140 + left_mm)
    elif cut == "front":
        hu, origin[0], box[0] = hu[:, front:], centre - front * pixel_mm, max(-105, -105 - left_mm)
    else:
        hu = circular(hu, pixel_mm, 140 + left_mm, -1000 if cut == "circle" else -1024)
        box[2:] = max(-140, -140 - left_mm), min(140, 140 + left_mm)
    # A body that fills the whole field is as wide in all slices.
    middle = (5, 6, 7) if "circle" in cut and left_mm < 0 else (6, 7)
    assert_both_lungs(hu, pixel_mm, box, origin, middle)


def test_lungs_of_a_child_on_a_table_prone_with_arms_beside():
    """A wall of 6 mm, arms that touch the edge of the field, a table in front of the chest."""
    hu, pixel_mm = chest(wall_mm=6), 0.75
    y, x = (np.mgrid[:512, :512] - 255.5) * pixel_mm
    hu[:, (np.hypot((np.abs(x) - 180) / 25, y / 40) < 1)] = 40
    add_table(hu, -1, y)
    assert_both_lungs(hu, pixel_mm)


def add_table(hu, side, y):
    """A table of foam between two shells, 120 to 160 mm behind (1) or in front (-1) of the middle,
    up to the edge of the field, with a mattress on it that touches the body."""
    below = side * y
    hu[:, (below > 108) & (below < 120)] = np.maximum(hu[:, (below > 108) & (below < 120)], -915)
    hu[:, (below > 120) & (below < 160)] = -900
    hu[:, (np.abs(below - 121.5) < 1.5) | (np.abs(below - 158.5) < 1.5)] = 100


@pytest.mark.parametrize("radius_mm", [None, 150])
@pytest.mark.parametrize("side", [1, -1])
def test_table_and_mattress_are_no_lung(radius_mm, side):
    """An abdomen as wide as the field, with the lung bases in two slices."""
    hu, pixel_mm = chest(wall_mm=15, lungs=slice(10, 12)), 0.75
    y = (np.mgrid[:512, :512] - 255.5)[0] * pixel_mm
    add_table(hu, side, y)
    hu = hu[:, :, 70:-70] if radius_mm is None else circular(hu, pixel_mm, radius_mm)
    summary = summarise(hu, (pixel_mm, pixel_mm), 10.0)
    assert not covers_chest(summary)
    assert (summary.first_lung_slice, summary.last_lung_slice) == (10, 11)
    assert summary.lung_fraction[:10].max() < 0.01


def test_air_between_arms_and_body_bowel_gas_and_sinuses_are_no_lung():
    hu, pixel_mm = chest(wall_mm=15, lungs=slice(0, 0)), 0.75
    y, x = (np.mgrid[:512, :512] - 255.5) * pixel_mm
    ring = np.hypot(x / 190, y / 150)
    hu[:, (ring < 1.2) & (ring > 1.02)] = 40  # arms crossed over the body: closed pockets of air
    summary = summarise(hu, (pixel_mm, pixel_mm), 10.0)
    assert not covers_chest(summary) and summary.lung_fraction.max() < 0.01
    skull = np.full((12, 256, 256), -1000, np.int16)
    y, x = np.mgrid[:256, :256] - 127.5
    skull[:, np.hypot(x / 75, y / 95) < 1] = 40
    for side in (-1, 1):
        skull[:, np.hypot((x - 25 * side) / 18, (y + 40) / 25) < 1] = -1000
    skull += np.random.default_rng(0).normal(0, 25, skull.shape).astype(np.int16)
    assert not covers_chest(summarise(skull, (1.0, 1.0), 2.5))
