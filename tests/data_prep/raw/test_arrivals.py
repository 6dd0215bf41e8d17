"""A folder that grows: each exam once, when its files are there, by a clock of the test's own."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.raw.arrivals import TRIES, Arrivals
from data_prep.raw.ledger import Ledger
from data_prep.raw.scans import header_reader_of
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError
from tests.helpers import dicom_files, nifti_files

SETTLE_S = 60.0
FILE = "taken.jsonl"


class Watched:
    """A folder with a clock that stands still, and results that are names."""

    def __init__(self, folder: Path, archive="auto", **rules):
        self.folder, self.archive, self.rules = folder, archive, Rules(**rules)
        self.now, self.results, self.taken = 1000.0, set(), []
        (folder / "in").mkdir(exist_ok=True)
        self.start()

    def start(self):
        """As after a kill: only what is on the disk is known."""
        self.ledger = Ledger(self.folder / FILE)
        self.arrivals = Arrivals(
            self.folder / "in",
            header_reader_of(self.folder / "in", self.archive, grows=True),
            self.rules,
            b"a key of 32 characters..........",
            self.ledger,
            self.results.__contains__,
            settle_s=SETTLE_S,
            clock=lambda: self.now,
        )

    def look(self, seconds=0.0):
        """The next look; whatever is ready is taken, and a result written where it has volumes."""
        self.now += seconds
        found = self.arrivals.look()
        for exam in found.ready:
            names = [f"{exam.name[:8]}{i}" for i in range(len(exam.volumes))]
            self.taken.append([len(one[0].headers) for one in exam.volumes])
            self.results.update(names)
            refused = [(one.series_key, one.reason, one.detail) for one in exam.rejections]
            self.arrivals.finish(exam, names, refused)
        return found


@pytest.fixture(scope="module")
def scan():
    """Slices of two exams, each 22."""
    return [
        dicom_files.slices(dicom_files.thorax(22, size=16), study=n, patient=f"patient-{n}")
        for n in (1, 2)
    ]


def put(folder, datasets, start, stop):
    """Some slices of a scan, under the names that all of them have."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, stop):
        datasets[number].save_as(folder / f"IM{number:04d}", enforce_file_format=True)


def test_an_exam_is_taken_once_after_its_last_slice(tmp_path, scan):
    watched = Watched(tmp_path)
    assert not watched.look().ready
    for start in range(0, 22, 2):  # a pause of 50 seconds between two slices
        put(tmp_path / "in" / "a", scan[0], start, start + 2)
        assert watched.look(50).waiting == start + 2 and watched.taken == []
    put(tmp_path / "in" / "b", scan[1], 0, 22)
    watched.look(SETTLE_S - 1)
    assert watched.taken == []
    watched.look(1)
    assert watched.taken == [[22]]
    watched.start()  # the other one waits again, the first is not looked at
    found = watched.look()
    assert watched.taken == [[22]] and found.waiting == 22
    watched.look(SETTLE_S)
    assert watched.taken == [[22], [22]]
    found = watched.look(1000)
    assert not (found.ready or found.late or found.waiting or found.changed)


def test_a_late_slice_is_named_once_and_the_exam_is_done_again_when_asked(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 21)
    watched.look()
    watched.look(SETTLE_S)
    assert watched.taken == [[21]]
    put(tmp_path / "in", scan[0], 21, 22)
    assert not watched.look(1).late
    (late,) = watched.look(SETTLE_S).late
    assert late.volumes == sorted(watched.results) and [s.path for s in late.sources] == ["IM0021"]
    watched.start()
    assert not (watched.look().late or watched.look(SETTLE_S).late)
    watched.results.clear()  # what the user removes
    watched.look(1)
    watched.look(SETTLE_S)
    assert watched.taken == [[21], [22]]
    kinds = [json.loads(line)["kind"] for line in open(tmp_path / FILE)]
    assert kinds == ["taken", "late", "again", "taken"]


def test_half_a_file_waits(tmp_path, scan):
    """Also where its header is not there yet, and beside the others of its folder."""
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 22)
    last = tmp_path / "in" / "IM0021"
    whole = last.read_bytes()
    last.write_bytes(whole[:200])
    watched.look()
    watched.look(SETTLE_S - 1)
    last.write_bytes(whole[:400])
    found = watched.look(1)
    assert watched.taken == [] and found.waiting == 22 and not found.not_images
    last.write_bytes(whole)
    watched.look(1)
    watched.look(SETTLE_S)
    assert watched.taken == [[22]]


def test_what_stays_half_is_named_once_and_holds_no_exam_for_ever(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 21)
    (tmp_path / "in" / "IM0021").write_bytes((tmp_path / "in" / "IM0020").read_bytes()[:200])
    watched.look()
    (broken,) = watched.look(SETTLE_S).not_images
    assert (broken.source.path, broken.reason) == ("IM0021", "unreadable")
    assert watched.taken == [[21]]
    watched.start()
    watched.look()
    assert not watched.look(SETTLE_S).not_images


def test_a_growing_log_beside_the_slices_holds_them_up_by_one_settle_time(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 22)
    for number in range(8):
        (tmp_path / "in" / "export.log").write_text("line\n" * number)
        watched.look(SETTLE_S / 4)
        assert watched.taken == []
    (tmp_path / "in" / "export.log").write_text("the end")
    watched.look(SETTLE_S / 4)
    assert watched.taken == [[22]]


def test_too_few_slices_become_enough(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 8)
    watched.look()
    watched.look(SETTLE_S)
    assert watched.taken == [[]]
    (refused,) = [row for rows in watched.ledger.refused.values() for row in rows]
    assert refused[1:] == ("too_few_slices", "8 slices, at least 20 asked")
    put(tmp_path / "in", scan[0], 8, 22)
    watched.look()
    watched.look(SETTLE_S)
    watched.look()
    watched.look(SETTLE_S)
    assert watched.taken == [[], [22]] and [*watched.ledger.refused.values()] == [[]]


def test_reconstructions_of_an_exam_wait_for_each_other_unless_all_are_taken(tmp_path):
    hu = dicom_files.thorax(22, size=16)
    series = [dicom_files.slices(hu, study=1, series=number) for number in (1, 2)]
    for rules, expected in (({}, [[22]]), ({"reconstructions": "all"}, [[22], [22]])):
        folder = tmp_path / str(len(expected))
        folder.mkdir()
        watched = Watched(folder, **rules)
        put(folder / "in" / "1", series[0], 0, 22)
        watched.look()
        put(folder / "in" / "2", series[1], 0, 22)
        watched.look(SETTLE_S - 1)
        watched.look(1)
        assert watched.taken == expected[1:]
        watched.look(SETTLE_S)
        assert watched.taken == expected


def test_nifti(tmp_path):
    watched = Watched(tmp_path, archive="nifti")
    whole = nifti_files.write(tmp_path / "scan.nii.gz").read_bytes()
    (tmp_path / "in" / "scan.nii.gz").write_bytes(whole[:100])
    watched.look()
    (tmp_path / "in" / "scan.nii.gz").write_bytes(whole)
    watched.look(SETTLE_S - 1)
    watched.look(1)
    assert watched.taken == []
    watched.look(SETTLE_S)
    assert watched.taken == [[nifti_files.NUM_SLICES]]


def test_a_zip_file_is_read_when_it_is_whole(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "scan", scan[0], 0, 22)
    whole = Path(shutil.make_archive(tmp_path / "scan", "zip", tmp_path / "scan")).read_bytes()
    target = tmp_path / "in" / "scan.zip"
    target.write_bytes(whole[: len(whole) // 2])
    watched.look()
    target.write_bytes(whole)
    assert watched.look(SETTLE_S).waiting == 1 and watched.taken == []
    watched.look(SETTLE_S)
    assert watched.taken == [[22]]


def test_an_exam_that_fails_for_now_is_tried_three_times_and_by_the_next_start(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 22)
    watched.arrivals.look()
    for number in range(1, TRIES + 1):
        watched.now += SETTLE_S
        (exam,) = watched.arrivals.look().ready
        assert watched.arrivals.try_again(exam) == (number < TRIES)
        assert not watched.arrivals.look().ready
    assert not watched.arrivals.look().waiting
    watched.start()
    watched.look()
    watched.look(SETTLE_S)
    assert watched.taken == [[22]]


def test_a_line_that_a_kill_cut_off_is_written_again(tmp_path, scan):
    watched = Watched(tmp_path)
    put(tmp_path / "in", scan[0], 0, 22)
    watched.look()
    watched.look(SETTLE_S)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-10])
    watched.start()
    watched.look()
    watched.look(SETTLE_S)
    assert (tmp_path / FILE).read_bytes() == whole
    (tmp_path / FILE).write_bytes(b"{}\n" + whole)
    with pytest.raises(InputError, match=r"taken\.jsonl is damaged in line 1; remove that line"):
        Ledger(tmp_path / FILE)


def test_a_folder_that_went_away(tmp_path):
    watched = Watched(tmp_path)
    (tmp_path / "in").rmdir()
    with pytest.raises(OSError, match="the folder went away; run again to continue"):
        watched.look()
