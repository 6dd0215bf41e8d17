r"""Speed of prepare beside the floor: bare `pydicom.dcmread(path).pixel_array` of the same files, on one core.

    python -m experiments.benchmark_preparation --input_dir=SCANS

SCANS holds plain DICOM files (no zip files). The page cache is warmed first. "Steps" are those of prepare one after the
other in this process; "end to end" is `data_prep.preparation.prepare` with one worker, starting processes included, on
--copies of SCANS as other patients, so that the start weighs as little as in a real archive.
"""

import resource
import tempfile
import time
from pathlib import Path

import pydicom
from absl import app, flags

from data_prep import conversion, dataset, dataset_writer
from data_prep.archives import Source, list_sources
from data_prep.dicom import Header, SeriesCandidate, plan_series, read_header, select_reconstructions
from data_prep.preparation import Options, Places, prepare

FLAGS = flags.FLAGS
flags.DEFINE_string("input_dir", None, "Directory of DICOM files.", required=True)
flags.DEFINE_integer("copies", 8, "Of SCANS in the temporary directory, for the end-to-end figure.", lower_bound=1)
flags.DEFINE_integer("repeats", 3, "The best of so many runs counts for the floor and the steps.", lower_bound=1)


def cpu_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def best_seconds(function, repeats: int) -> float:
    """CPU time of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = cpu_seconds()
        function()
        times.append(cpu_seconds() - start)
    return min(times)


def copy_as_patient(paths: list[Path], folder: Path, number: int) -> None:
    """Copies DICOM files with the UIDs and the Patient ID of somebody else."""
    folder.mkdir()
    for index, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        ds.PatientID = f"copy {number}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = (
            f"{ds.StudyInstanceUID[:60]}.{number}",
            f"{ds.SeriesInstanceUID[:60]}.{number}",
        )
        ds.save_as(folder / f"{index:05d}")


def main(argv: list[str]) -> None:
    input_dir = Path(FLAGS.input_dir)
    options = Options(splits=(1.0, 0.0, 0.0))
    sources = [source for source in list_sources(input_dir) if isinstance(source, Source)]
    headers = [header for header in (read_header(input_dir, s) for s in sources) if isinstance(header, Header)]
    planned = plan_series(headers, options.rules)
    exams = select_reconstructions([p for p in planned if isinstance(p, SeriesCandidate)], options.rules)
    slices = [header for exam in exams for header in exam[0].headers]
    if not slices:
        raise app.UsageError(f"--input_dir={input_dir}: no series that prepare would take")
    paths = [input_dir / header.source.path for header in slices]
    number = len(slices)

    def floor() -> None:
        for path in paths:
            pydicom.dcmread(path).pixel_array  # noqa: B018

    def rate(name: str, seconds: float, what: str = "") -> None:
        print(f"{name:<44} {number / seconds:8.0f} slices/s  {1000 * seconds / number:6.2f} ms {what}")

    floor()
    floor_seconds = best_seconds(floor, FLAGS.repeats)
    rate("bare pydicom.dcmread(path).pixel_array", floor_seconds)

    with tempfile.TemporaryDirectory() as folder:
        notes, records = Path(folder) / "notes", Path(folder) / "records"
        notes.mkdir()
        records.mkdir()
        run = conversion.Conversion(
            input_dir, notes, records, options.rules, options.windows, options.image_size, b"0" * 16
        )

        def headers_step() -> None:
            for source in sources:
                read_header(input_dir, source)

        def convert_step() -> None:
            for exam in exams:
                conversion.convert_exam(run, exam)

        def shard_step() -> None:
            staged = sorted(records.glob("*.array_record"))
            dataset_writer.write_records(
                Path(folder) / "shard", (record for path in staged for record in dataset.read_records(path))
            )
            dataset.file_sha256(Path(folder) / "shard")

        steps = [("read headers", headers_step), ("convert and stage", convert_step), ("write shards", shard_step)]
        total = 0.0
        for name, step in steps:
            seconds = best_seconds(step, FLAGS.repeats)
            total += seconds
            rate(f"  {name}", seconds)
        rate("all steps", total, f"= {floor_seconds / total:.2f} of the floor's speed")

    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive"
        archive.mkdir()
        for copy in range(FLAGS.copies):
            copy_as_patient(paths, archive / str(copy), copy)
        places = Places(archive, Path(folder) / "dataset", Path(folder) / "audit")
        start, start_cpu = time.perf_counter(), cpu_seconds()
        preparation, _ = prepare(options, places, num_workers=1)
        wall, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
    taken = preparation["splits"]["train"]["num_slices"]
    print(f"end to end, 1 worker, {taken} slices:")
    rate("  CPU time", cpu * number / taken, f"= {floor_seconds * taken / number / cpu:.2f} of the floor's speed")
    rate("  wall time", wall * number / taken)


if __name__ == "__main__":
    app.run(main)
