r"""Time and memory of what one process does for a whole corpus, at growing numbers of exams.

    python -m experiments.bench.corpus_size [--num_exams=10000,100000] [--scratch_dir=FOLDER]
        [--num_workers=2]

The steps of `ctssl prepare --manifest=FILE --assemble`, in order in one process as they are there,
and in a second process the opening of the dataset and what `ctssl describe` prints. Each number of
exams has processes of its own. For each step: seconds that all cores computed (other work on the
machine hardly changes them), and the largest memory of the main process and of a worker, with all
that earlier steps left in it.

Simulated, since a million real exams do not fit here:

- the files: headers of two slices an exam come from a function, at the place where the files of
  tasks are read; every twentieth exam is refused for its slice thickness; two exams a patient;
- the conversion: a note an exam is written as `convert_exam` writes it, with the names of 16 slices
  for `pixels` (as a scan of 16 slices or more has) and a class for each slice; staged volumes are
  empty files;
- the shards, whose writing depends on their own exams alone: empty files;
- with --quick_planning the decision on each series, too, a third of all the time and as long for
  each series whatever their number: its bucket is read, and written as a plan, without the checks.

--one_process_each leaves the files of the exams out: the steps that hold something of every exam
(manifest, patients, shared images, frozen plan, tables, reading) run on facts that are made in
memory, each in a process of its own. A million exams take some minutes so.

All else is the program's: the lines of the manifest, a file an entry with the outcome of a task, a
note an exam, the frozen plan, the tables and preparation.json are written and read. Linux only (it
reads /proc).
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from data_prep.dataset.cohort import cohort_table, label_rows
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import REJECTED_FILE
from data_prep.labels.lookup import Labels, LabelSources, TableSpec
from data_prep.pipeline import assemble, plan, steps
from data_prep.pipeline.downloads import Downloads
from data_prep.pipeline.known_patients import patients_sharing
from data_prep.pipeline.manifest import read_manifest
from data_prep.pipeline.notes import (
    Conversion,
    ExamNote,
    exam_key,
    note_path,
    read_note,
    records_path,
)
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.staged_series import Gathering, Outcome, Staging
from data_prep.privacy.pseudonyms import (
    exam_id,
    patient_pseudonym,
    public_fields,
    slice_id,
    sources_of,
    volume_id,
)
from data_prep.scan.archives import Source
from data_prep.scan.headers import Header, read_header
from data_prep.scan.loading import ExamPlan, plan_exams
from data_prep.scan.patients import Patients, People, identities
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.system.workers import WorkerPool

NUM_SLICES = 2
KEY = b"0123456789abcdef0123456789abcdef"
OPTIONS = Options(
    image_size=8, rules=Rules(min_slices=NUM_SLICES), splits=(0.8, 0.1, 0.1), shard_size_mb=1.0
)
RECORD_BYTES = 2 * 150


# ---- what is simulated ---------------------------------------------------------------------------


def headers_of(number: int, folder: str) -> list[Header]:
    """The headers of an exam."""
    study = f"1.2.826.0.1.3680043.8.498.{10**12 + number}"
    first = Header(
        source=Source("", "", 528_384),
        transfer_syntax="1.2.840.10008.1.2.1",
        pixel_data_offset=1_000,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid="",
        study_instance_uid=study,
        series_instance_uid=f"{study}.1",
        patient_id=f"patient{number // 2:09d}",
        patient_id_before=None,
        modality="CT",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        body_part="CHEST",
        acquisition_number=1,
        rows=512,
        columns=512,
        position=None,
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        pixel_spacing=(0.6 + number % 977 * 1e-4,) * 2,
        slice_thickness=5.0 if number % 20 == 7 else 2.5,
        gantry_tilt=0.0,
        patient_position="HFS",
        rescale_slope=1.0,
        rescale_intercept=-1024.0,
        rescale_type="HU",
        samples_per_pixel=1,
        photometric="MONOCHROME2",
        bits_allocated=16,
        bits_stored=12,
        high_bit=11,
        pixel_representation=0,
        padding_value=None,
        padding_limit=None,
        overlay_bits=(),
        burned_in_annotation=False,
        quality_control_subject=False,
        manufacturer="SIEMENS",
        kernel="B30f",
        contrast_agent="",
        age=40 + number // 2 % 50,
        sex="FM"[number // 2 % 2],
        ethnic_group="",
    )
    return [
        dataclasses.replace(
            first,
            source=Source(f"{folder}/{index:03d}.dcm", "", 528_384),
            sop_instance_uid=f"{study}.1.{index}",
            position=(-170.0, -170.0, -2.5 * index),
        )
        for index in range(NUM_SLICES)
    ]


def read_simulated(path: Path) -> list[Header]:
    """In place of `read_staged`."""
    with open(path, "rb") as file:
        pickle.load(file)
        number = pickle.load(file)
    return headers_of(number, folder_of(number))


def folder_of(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-{number:012x}"


def plan_quickly(headers_path: Path, plan_path: Path, rules: Rules, patients: Patients) -> None:
    """In place of `plan._plan_bucket`."""
    by_study: dict[str, list[Header]] = {}
    for entries in plan._unpickled(headers_path):
        for header in entries:
            by_study.setdefault(header.study_instance_uid, []).append(header)
    exams, rejections = [], []
    for study, headers in by_study.items():
        headers.sort(key=lambda header: header.position)
        series, patient = f"{study}.1", headers[0].patient_key
        if headers[0].slice_thickness > rules.max_slice_thickness_mm:
            rejections.append(Rejection(series, tuple(headers), "too_thick", "5 mm"))
            continue
        candidate = SeriesCandidate(
            series_key=series,
            exam_key=(patient, study),
            patient_key=patient,
            headers=tuple(headers),
            duplicates=((),) * len(headers),
            position_mm=tuple(header.position[2] for header in headers),
            slice_spacing_mm=2.5,
            slice_thickness_mm=2.5,
            pixel_spacing_mm=headers[0].pixel_spacing,
            gantry_tilt_degrees=0.0,
            dropped=(),
            notes=(),
            preference=(),
        )
        exams.append([candidate])
    with open(plan_path, "wb") as file:
        pickle.dump(ExamPlan(exams, rejections, []), file, pickle.HIGHEST_PROTOCOL)
    headers_path.unlink()


def note_of(conversion: Conversion, exam: list[SeriesCandidate]) -> ExamNote:
    """The note of an exam."""
    candidate, chance = exam[0], random.Random(exam[0].series_key)
    headers = candidate.headers
    row = {
        "volume_id": volume_id(conversion.key, candidate),
        "patient_id": patient_pseudonym(conversion.key, candidate.patient_key),
        "exam_id": exam_id(conversion.key, *candidate.exam_key),
        "num_slices": len(headers),
        "source_rows": 512,
        "source_columns": 512,
        "pixel_spacing_row_mm": candidate.pixel_spacing_mm[0],
        "pixel_spacing_column_mm": candidate.pixel_spacing_mm[1],
        "slice_thickness_mm": candidate.slice_thickness_mm,
        "slice_spacing_mm": candidate.slice_spacing_mm,
        "gap_positions": "",
        "gantry_tilt_degrees": candidate.gantry_tilt_degrees,
        **public_fields(headers[0]),
        "middle_slice": 1,
        "first_lung_slice": 0,
        "last_lung_slice": 1,
        "lung_box": "1 1 7 7",
        "notes": "",
        "num_files": len(headers),
        "num_dropped_files": 0,
    }
    labels = {
        "slices": {"pe": [chance.randrange(2) for _ in headers]},
        "volume": {},
        "regions": [],
    }
    return ExamNote(
        exam_key(conversion, exam),
        row,
        RECORD_BYTES,
        sources_of(headers),
        [],
        [],
        {slice_id(conversion.key, header): "" for header in headers},
        labels,
        sorted(f"{chance.getrandbits(64):016x}" for _ in range(16)),
    )


def write_empty_shard(path: Path, records_dir: Path, staged: list[str], num_records: int) -> str:
    """In place of `assemble.write_shard`."""
    path.touch()
    checksum = hashlib.sha256(path.name.encode()).hexdigest()
    assemble.sidecar_path(records_dir, path.name).write_text(checksum)
    for key in staged:
        records_path(records_dir, key).unlink()
    return checksum


def make_manifest(folder: Path, num_exams: int) -> Path:
    """Lines of s5cmd, a folder an exam."""
    path = folder / "manifest.txt"
    with open(path, "w") as file:
        for number in range(num_exams):
            file.write(f"cp s3://idc-open-data/{folder_of(number)}/* .\n")
    return path


def leave_outcomes(manifest_file: Path, staged: Staging) -> None:
    """What tasks left of the entries."""
    staged.folder.mkdir(parents=True)
    outcome = Outcome(staged.version, num_files=NUM_SLICES, num_volumes=1)
    for entry in read_manifest(manifest_file).entries:
        content = pickle.dumps(dataclasses.replace(outcome, digest=f"{entry.number:064x}"))
        staged.path(entry).write_bytes(content + pickle.dumps(entry.number))


def leave_notes(plans: steps.Plans, conversion: Conversion) -> None:
    """What the conversion left of the exams."""
    for _, _, exam in plans.new_exams():
        note = note_of(conversion, exam)
        path = note_path(conversion, note.key)
        path.write_text(json.dumps(dataclasses.asdict(note)))
        records_path(conversion.records_dir, note.key).touch()


# ---- what is measured ----------------------------------------------------------------------------


class Meter:
    """Seconds of all cores, and peak memory in MB, of steps that follow each other."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float, float]] = {}
        self._name = ""
        self._start = 0.0

    def begin(self, name: str) -> None:
        """Ends the step before; "" only ends it."""
        if self._name:
            workers = [_peak_mb(one.pid) for one in multiprocessing.active_children()]
            memory = _peak_mb("self"), max(workers, default=0.0)
            self.steps[self._name] = (_core_seconds() - self._start, *memory)
            line = "{:22}{:9.1f}{:9.0f}{:9.0f}".format(self._name, *self.steps[self._name])
            print(f"  {line}", flush=True)
        self._name, self._start = name, _core_seconds()
        for process in ("self", *(one.pid for one in multiprocessing.active_children())):
            Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak begins anew


def _core_seconds() -> float:
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _peak_mb(process: int | str | None) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def measure_preparation(
    num_exams: int, folder: Path, num_workers: int, real_planning: bool, connection: Any
) -> None:
    """Sends the steps of `--assemble`; runs in a process of its own."""
    meter = Meter()
    directories = Directories(None, folder / "dataset", folder / "audit")
    directories.make()
    manifest_file = make_manifest(folder, num_exams)
    staged = Staging.of(directories, OPTIONS, read_header, KEY)
    leave_outcomes(manifest_file, staged)

    def plan_staged(*arguments: Any) -> list[Path]:
        paths, plan_dir, rules, num_files, pool, _, known = arguments
        meter.begin("headers to buckets")
        plan.scan_staged(paths, plan_dir, num_files, pool, read_simulated, known)
        meter.begin("planning" if real_planning else "(planning)")
        planner = plan._plan_bucket if real_planning else plan_quickly
        with mock.patch.object(plan, "_plan_bucket", planner):
            planned = plan.plan_buckets(plan_dir, rules, pool)
        meter.begin("patients, counts")
        return planned

    with WorkerPool(num_workers) as pool:
        for _ in pool.run(time.sleep, [(1,)] * num_workers):
            pass  # the start of the workers is not measured
        meter.begin("manifest")
        manifest = read_manifest(manifest_file)
        meter.begin("looking at tasks")
        gathering = Gathering.of(manifest, staged, read_header, Downloads(folder))
        num_files, digest = gathering.listed()
        if gathering.missing or gathering.failed:
            raise RuntimeError("entries are missing")
        run = steps.Preparation(
            OPTIONS, directories, LabelSources(), KEY, num_files, digest, pool, gathering=gathering
        )
        steps.clean(run)
        labels = steps.stage_labels(run)
        with mock.patch.object(steps, "plan_staged", plan_staged):
            plans = steps.plan_exams(run, labels)
        steps.check_splits(run, plans)
        meter.begin("")
        conversion = Conversion.of(OPTIONS, directories, KEY, labels)
        leave_notes(plans, conversion)
        labels = dataclasses.replace(
            labels, tables=(TableSpec("SOPInstanceUID", "slice", ("pe",), (("0", "1"),)),)
        )
        meter.begin("gathering notes")
        steps.gather_exams(run, gathering, plans, conversion)
        meter.begin("accounting")
        account, new_volumes = steps.account_for_files(
            run, plans, lambda exam: read_note(note_path(conversion, exam_key(conversion, exam)))
        )
        meter.begin("freezing")
        frozen = steps.freeze_plan(run, plans, labels, account, new_volumes)
        meter.begin("assembly")
        with mock.patch.object(assemble, "write_shard", write_empty_shard):
            preparation = steps.write_dataset(frozen, directories, pool, None)
        meter.begin("")
    written = sum(split["num_volumes"] for split in preparation["splits"].values())
    if written + len(account.rejected) != num_exams or num_files != NUM_SLICES * num_exams:
        raise RuntimeError(f"{written} volumes of {num_exams} exams")
    connection.send(meter.steps)


def measure_one_process_each(num_exams: int, folder: Path) -> dict[str, tuple[float, float, float]]:
    """The steps that hold something of every exam, each in a process of its own, without the files
    of the exams."""
    measured = {}
    steps_of_all = (read_a_manifest, find_patients, find_shared_images, freeze_and_save)
    for function in steps_of_all:
        measured |= in_a_process(function, folder, num_exams)
    for function in (write_tables, measure_reading):
        measured |= in_a_process(function, folder)
    return measured


def read_a_manifest(folder: Path, num_exams: int, connection: Any) -> None:
    path, meter = make_manifest(folder, num_exams), Meter()
    meter.begin("manifest")
    manifest = read_manifest(path)
    meter.begin("")
    if len(manifest.entries) != num_exams:
        raise RuntimeError("entries are missing")
    connection.send(meter.steps)


def find_patients(folder: Path, num_exams: int, connection: Any) -> None:
    meter, people, example = Meter(), People(), headers_of(0, "folder")
    [(identity, _)] = identities(example).items()
    meter.begin("patients")
    for number in range(num_exams):
        patient, study = f"patient{number // 2:09d}", f"1.2.826.0.1.3680043.8.498.{10**12 + number}"
        fields = {"patient_id": patient, "patient_key": patient, "key_before": patient}
        one = identity._replace(**fields, study_uid=study, series_uid=f"{study}.1")
        people.add({one: [hash(study) % 2**64, hash(study + "2") % 2**64]})
    patients = people.resolve()
    meter.begin("")
    if patients.key_of:
        raise RuntimeError("patients were joined")
    connection.send(meter.steps)


def find_shared_images(folder: Path, num_exams: int, connection: Any) -> None:
    meter, chance = Meter(), random.Random(0)
    meter.begin("shared images")
    shared = patients_sharing(
        (f"{number // 2:032x}", [f"{chance.getrandbits(64):016x}" for _ in range(16)])
        for number in range(num_exams)
    )
    meter.begin("")
    if shared:
        raise RuntimeError("images are shared")
    connection.send(meter.steps)


def freeze_and_save(folder: Path, num_exams: int, connection: Any) -> None:
    [example] = plan_exams(headers_of(0, "folder"), OPTIONS.rules).exams
    labels = Labels(folder / "none", (), LabelSources(), {}, {})
    directories = Directories(None, folder / "dataset", folder / "audit")
    row = note_of(Conversion.of(OPTIONS, directories, KEY, labels), example).volume
    assert row is not None
    meter = Meter()
    meter.begin("freezing")
    volumes = {
        _digits("key", number): assemble.NewVolume(
            _digits("volume", number), _digits("patient", number // 2), NUM_SLICES, RECORD_BYTES
        )
        for number in range(num_exams)
    }

    def row_of(key: str) -> dict[str, Any]:
        return row | {
            "volume_id": volumes[key].volume_id,
            "exam_id": _digits("exam", int(key[-8:], 16)),
            "patient_id": volumes[key].patient_id,
        }

    frozen = assemble.freeze(
        options=OPTIONS.as_dict(),
        key=KEY,
        archive_digest="",
        new_volumes=volumes,
        row_of=row_of,
        old_volumes=[],
        old_preparation=None,
        known_splits={},
        rejected=[],
        counts={"volumes_without_files": 0},
        labels={},
        known_patients={},
    )
    frozen.save(folder / "frozen.json")
    meter.begin("")
    connection.send(meter.steps)


def _digits(kind: str, number: int) -> str:
    """In the form of a pseudonym; the last eight are the number."""
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()[:24] + f"{number:08x}"


def write_tables(folder: Path, connection: Any) -> None:
    directories = Directories(None, folder / "dataset", folder / "audit")
    directories.make()
    directories.records_dir.mkdir()
    meter = Meter()
    meter.begin("reading the frozen plan")
    frozen = assemble.FrozenPlan.load(folder / "frozen.json")
    meter.begin("")
    for shard in frozen.new_shards:
        (directories.output_dir / shard["name"]).touch()
        assemble.sidecar_path(directories.records_dir, shard["name"]).write_text("0" * 64)
    with WorkerPool(1) as pool:
        meter.begin("assembly")
        assemble.assemble(
            frozen, directories.output_dir, directories.records_dir, folder, folder, pool
        )
        meter.begin("")
    connection.send(meter.steps)


def measure_reading(folder: Path, connection: Any) -> None:
    """Sends the steps of a reader; runs in a process of its own."""
    meter = Meter()
    meter.begin("opening, volumes.csv")
    dataset = Dataset.open(folder / "dataset")
    volumes = dataset.volumes()
    meter.begin("slices.csv")
    dataset.slices()
    meter.begin("description")
    with open(dataset.directory / REJECTED_FILE, newline="") as file:
        rejected = list(csv.DictReader(file))
    cohort_table(volumes, rejected)
    label_rows(dataset)
    meter.begin("")
    connection.send(meter.steps)


def in_a_process(function: Any, *arguments: Any) -> dict[str, tuple[float, float, float]]:
    """What a process sends."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__} failed") from None
    finally:
        process.join()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_exams", default="10000,100000")
    parser.add_argument("--scratch_dir", default=tempfile.gettempdir(), type=Path)
    parser.add_argument("--num_workers", default=2, type=int)
    parser.add_argument("--quick_planning", action="store_true", help="see above")
    parser.add_argument("--one_process_each", action="store_true", help="see above")
    arguments = parser.parse_args()
    for num_exams in map(int, arguments.num_exams.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.scratch_dir) as folder:
            print(
                f"{num_exams:,} exams of {NUM_SLICES} slices: "
                "seconds of all cores, MB, MB a worker",
                flush=True,
            )
            settings = arguments.num_workers, not arguments.quick_planning
            if arguments.one_process_each:
                measured = measure_one_process_each(num_exams, Path(folder))
            else:
                measured = in_a_process(measure_preparation, num_exams, Path(folder), *settings)
                measured |= in_a_process(measure_reading, Path(folder))
        total = sum(seconds for seconds, *_ in measured.values())
        print(f"  {'all':22}{total:9.1f}{max(most for _, most, _ in measured.values()):9.0f}")


if __name__ == "__main__":
    main()
