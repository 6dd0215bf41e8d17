"""A few scans of the campaign of odd scans."""

import pytest

from tests.campaigns import odd_base, odd_scans

QUICK = (
    *("times_of_each_slice", "step_and_shoot", "gantry_tilt", "orientations", "padding_range"),
    *("positions_rounded", "elements_as_unknown", "jpeg_2000", "enhanced", "copies", "image_types"),
)


@pytest.fixture(scope="module")
def few_patients():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(odd_base, "NUM_PATIENTS", 1)
        yield


@pytest.mark.parametrize("name", QUICK)
def test_odd_scans_come_out_as_stated(tmp_path, few_patients, name):
    number = list(odd_base.KINDS).index(name)
    scans = odd_scans.write_archive(tmp_path, [number], 0, size=64)
    counts = odd_scans.read_archive(tmp_path, scans)
    assert counts[name].right == counts[name].exams > 0, counts


def test_a_scan_is_the_same_every_time():
    first, again = (odd_base.make(3, 40, size=64) for _ in range(2))
    assert first.files == again.files


def test_a_volume_that_is_not_as_stated_is_counted(tmp_path, few_patients):
    scans = odd_scans.write_archive(tmp_path, [list(odd_base.KINDS).index("copies")], 0, size=64)
    (scan,) = scans.values()
    ((right,),) = scan.exams
    right.hu[3, 4, 5] += 1
    counts = odd_scans.read_archive(tmp_path, scans)
    assert counts[scan.kind].wrong == {"voxels differ": 1} and counts[scan.kind].differing == 1
    assert "1 otherwise than stated" in odd_scans.report(counts)[-1]
