r"""Odd but sound scans: none is lost, all voxels are exact.

    python -m tests.campaigns.odd_scans --num_scans=500 --seed=0 [--prepare]

Makes an archive of small scans of odd kinds (`odd_stacks`, `odd_values`, `odd_headers`,
`odd_files`, `odd_bodies`), each with its right outcome: HU, spacing, pairs, and the slices that
are dropped by reason. Reads the archive as a whole by `data_prep.raw.scans`, with `--prepare` also
by `data_prep.prepare`, and counts the scans that are lost by reason, those that come out otherwise,
and the voxels that differ. Scan number i of a seed is always the same.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.raw.scans import Refused, Scan, plan_scans, read_scan
from tests.campaigns import odd_bodies, odd_files, odd_headers, odd_stacks, odd_values
from tests.campaigns.odd_base import KINDS, OddScan, Right, make

WINDOWS = ((50.0, 350.0),)
IMAGE_SIZE = 32
MODULES = (odd_stacks, odd_values, odd_headers, odd_files, odd_bodies)  # they fill KINDS


@dataclasses.dataclass
class Count:
    """What became of the exams of one kind.

    right: exams that came out exactly as stated.
    lost: reason -> exams without a volume.
    wrong: what is wrong -> exams with another volume than stated.
    voxels, differing: of the volumes that were taken.
    """

    right: int = 0
    lost: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wrong: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    voxels: int = 0
    differing: int = 0

    @property
    def exams(self) -> int:
        return self.right + self.lost.total() + self.wrong.total()


def write_archive(
    folder: Path, numbers: Sequence[int], seed: int, size: int = 0
) -> dict[str, OddScan]:
    """Writes the scans of these numbers, a folder each; returns them by the folder's name."""
    scans = {}
    for number in numbers:
        scan = make(seed, number, size)
        name = f"{number:04d}-{scan.kind}"
        for path, content in scan.files.items():
            file = folder / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        scans[name] = dataclasses.replace(scan, files={})
    return scans


def read_archive(folder: Path, scans: dict[str, OddScan], workers: int = 0) -> dict[str, Count]:
    """Reads the archive and compares; kind -> count."""
    plan = plan_scans(folder, "dicom", num_workers=workers)
    counts: dict[str, Count] = collections.defaultdict(Count)
    reasons = collections.defaultdict(collections.Counter)  # folder -> reasons of refusals
    open_exams = {name: list(scan.exams) for name, scan in scans.items()}
    for rejection in plan.rejections:
        name = _folder(rejection.headers[0].source.path)
        reasons[name][f"{rejection.reason} ({rejection.detail})"] += 1
    for file in plan.not_images:
        reasons[_folder(file.source.path)][f"file {file.reason}"] += 1
    for exam in plan.exams:
        name = _folder(exam[0].headers[0].source.path)
        count = counts[scans[name].kind]
        taken = read_scan(plan.input_dir, exam, WINDOWS, IMAGE_SIZE)
        if isinstance(taken, Refused):
            reasons[name][f"{taken.reason} ({taken.detail})"] += 1
            continue
        best = min(
            (
                (_difference(taken, right), number, right)
                for number, choices in enumerate(open_exams[name])
                for right in choices
            ),
            key=lambda item: item[:2],
            default=None,
        )
        if best is None:
            count.wrong["one volume more than there are exams"] += 1
            continue
        (differing, fault), number, right = best
        del open_exams[name][number]
        count.voxels += right.hu.size
        count.differing += differing
        if fault:
            count.wrong[fault] += 1
        else:
            count.right += 1
    for name, choices in open_exams.items():
        for _ in choices:
            words = " + ".join(sorted(reasons[name])) or "without a word"
            words = re.sub(r"\d+(\.\d+)?", "#", words)
            count, refusal = counts[scans[name].kind], scans[name].refusal
            if refusal and words.startswith(f"{refusal} "):
                count.right += 1
            else:
                count.lost[words] += 1
    return dict(counts)


def _folder(path: str) -> str:
    return path.split("/")[0]


def _difference(taken: Scan, right: Right) -> tuple[int, str]:
    """(voxels that differ, what is wrong or "")."""
    volume = taken.volume
    if volume.hu.shape != right.hu.shape:
        slices, stated = volume.hu.shape[0], right.hu.shape[0]
        fault = f"{slices} slices, not {stated}" if slices != stated else "another matrix"
        return right.hu.size, fault
    differing = int(np.count_nonzero(volume.hu != right.hu))
    if differing:
        return differing, "voxels differ"
    if abs(volume.slice_spacing_mm - right.spacing_mm) > 1e-3 * right.spacing_mm:
        return 0, f"slice spacing {volume.slice_spacing_mm:g}, not {right.spacing_mm:g}"
    if not np.allclose(volume.pixel_spacing_mm, right.pixel_mm, rtol=2e-3):
        return 0, "another pixel spacing"
    pairs = int(volume.pair_valid.sum())
    if pairs != right.pairs:
        return 0, f"{pairs} pairs, not {right.pairs}"
    lost = dict(collections.Counter(reason for _, reason in volume.dropped))
    if lost != dict(right.lost):
        return 0, f"dropped {lost}, not {dict(right.lost)}"
    return 0, ""


def read_by_export(folder: Path, scans: dict[str, OddScan]) -> collections.Counter:
    """What `ctssl_torch.read_dicom` makes of each scan: "exact", why it refuses, or "WRONG: KIND"
    for another volume than stated."""
    from ctssl_jax.torch_bridge import ctssl_torch

    outcomes: collections.Counter[str] = collections.Counter()
    for name, scan in scans.items():
        path = folder / name
        zips = list(path.glob("*.zip"))
        try:
            hu, affine = ctssl_torch.read_dicom(zips[0] if zips else path)
            volume, spacing = ctssl_torch.to_canonical(hu, affine)
        except ValueError as error:
            words = re.sub(r"[\d.]+", "#", str(error).replace(f"{path}", "")[:60])
            outcomes[f"refused: {scan.kind}: {words}"] += 1
            continue
        rights = [right for choices in scan.exams for right in choices]
        exact = any(
            np.array_equal(volume, right.hu) and np.allclose(spacing, right.pixel_mm, rtol=2e-3)
            for right in rights
        )
        outcomes["exact" if exact else f"WRONG: {scan.kind}"] += 1
    return outcomes


def prepare_archive(folder: Path, output: Path, scans: dict[str, OddScan]) -> list[str]:
    """Prepares the archive as a dataset; returns lines that say what was taken and refused."""
    options = Options(windows=WINDOWS, image_size=IMAGE_SIZE, splits=(1.0, 0.0, 0.0))
    where = Directories(folder, output / "dataset", output / "audit")
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        prepare(options, where, num_workers=1)
    with open(where.output_dir / "volumes.csv", newline="") as file:
        volumes = list(csv.DictReader(file))
    with open(where.output_dir / "rejected.csv", newline="") as file:
        refused = collections.Counter(row["reason"] for row in csv.DictReader(file))
    stated = sum(len(scan.exams) for scan in scans.values())
    listed = ", ".join(f"{number} {reason}" for reason, number in refused.most_common())
    return [f"prepare: {len(volumes)} volumes of {stated} exams; refused series: {listed}"]


def report(counts: dict[str, Count]) -> list[str]:
    """Lines of a table: a line for each kind that lost or changed an exam, and the sums."""
    lines, total = [], Count()
    for name in KINDS:
        count = counts.get(name, Count())
        total.right += count.right
        total.voxels += count.voxels
        total.differing += count.differing
        total.lost.update({name: count.lost.total()})
        total.wrong.update({name: count.wrong.total()})
        if count.right != count.exams:
            lines.append(f"{name}: {count.right} of {count.exams} right")
            lines += [f"    lost {number}: {words}" for words, number in count.lost.most_common(4)]
            lines += [
                f"    wrong {number}: {words}" for words, number in count.wrong.most_common(4)
            ]
    lines.append(
        f"{total.exams} exams of {len(KINDS)} kinds: {total.right} right, "
        f"{total.lost.total()} lost, {total.wrong.total()} otherwise than stated; "
        f"{total.differing} of {total.voxels} voxels of the taken differ"
    )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_scans", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first scan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only scans of this kind")
    parser.add_argument("--prepare", action="store_true", help="also prepare the archive")
    parser.add_argument("--exported", action="store_true", help="also by ctssl_torch.read_dicom")
    parser.add_argument("--keep", type=Path, help="a new folder for the archive, which is kept")
    arguments = parser.parse_args()
    names = list(KINDS)
    numbers = [
        n
        for n in range(arguments.first, arguments.first + arguments.num_scans)
        if arguments.kind in ("", names[n % len(names)])
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch) / "archive"
        scans = write_archive(folder, numbers, arguments.seed)
        counts = read_archive(folder, scans)
        print("\n".join(report(counts)))
        if arguments.exported:
            for outcome, number in sorted(read_by_export(folder, scans).items()):
                print(f"read_dicom: {number:>4} {outcome}")
        if arguments.prepare:
            print("\n".join(prepare_archive(folder, Path(scratch), scans)))
    return 0 if all(count.right == count.exams for count in counts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
