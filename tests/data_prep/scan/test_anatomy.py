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


def test_the_thorax_of_the_other_tests_is_one():
    assert covers_chest(summarise(thorax(), (5.5, 5.5), 2.5))
