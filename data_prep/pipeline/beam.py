r"""The expensive steps of a preparation under Apache Beam: conversion of exams, writing of shards.

    pip install '.[beam]'
    ctssl prepare ... --runner=beam --beam_options="OPTIONS OF BEAM"

The workers run the functions of the local runner, and the dataset is the same to the byte. Either
runner continues the work of the other. Listing, headers, planning, the frozen plan and the tables
stay with the process that was started, on its --num_workers. Without a runner in --beam_options the
pipelines run on this machine (Beam's FnApiRunner) with --num_workers workers: good for a trial, not
faster than the local runner. On a cluster of Dask, with the same paths everywhere (below):

    pip install '.[dask]'                                         # on all machines
    dask scheduler                                                # on one
    DASK_DISTRIBUTED__WORKER__DAEMON=False dask worker tcp://HOST:8786      # on each of the others
    ctssl prepare ... --runner=dask --dask_scheduler=tcp://HOST:8786

Without that variable the workers may start no processes, and each scan is read in one of its own.
On other clusters:

    --beam_options="--runner=FlinkRunner --flink_master=HOST:8081 --parallelism=64
                    --environment_type=EXTERNAL --environment_config=WORKER:50000"
    --beam_options="--runner=SparkRunner --spark_master_url=spark://HOST:7077
                    --environment_type=EXTERNAL --environment_config=WORKER:50000"
    --beam_options="--runner=DataflowRunner --project=PROJECT --region=REGION
                    --temp_location=gs://BUCKET/tmp --sdk_container_image=IMAGE"
                    # and pip install 'apache-beam[gcp]'

EXTERNAL: each worker machine of Flink or Spark runs
`python -m apache_beam.runners.worker.worker_pool_main --service_port=50000` in an activated
environment with this package (the pool starts the `python` that is first on PATH). WORKER is the
name by which a machine reaches itself. IMAGE holds this package and mounts the directories.

All workers, and the machine that starts the job, need the same paths to input_dir (or reach its
URL, with credentials of their own), output_dir, audit_dir and the files of labels and masks. They
may write there, with atomic renames and symbolic links (NFS, Lustre, GPFS, Filestore). Only paths
and numbers go through Beam: the pseudonym key and all names of scans stay in the audit directory,
where the workers read them.

Beam may run a task again, after a lost worker or for no reason, also while its first run is still
at work, perhaps cut off and on another machine. So each run of a task writes into a directory of
its own and then renames; finished tasks are skipped. Cancel the old job before you start it again:
the lock that keeps two runs apart belongs to the process that started the job, not to its workers.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import pickle
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from data_prep.pipeline import assemble, convert, dask_cluster, notes
from data_prep.pipeline.options import Directories
from data_prep.pipeline.plan import read_plan
from data_prep.pipeline.progress import ExamProgress
from data_prep.scan.series import SeriesCandidate
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import PARTIAL, publish, write_file
from data_prep.system.workers import WorkerDied, WorkerPool

_HERE = "--runner=FnApiRunner"  # not DirectRunner, which may download another one
_REMEDY = (
    "its finished work stays: run the same command again to continue (also with --runner=local)"
)
_CONVERSION_FILE = "conversion.pickle"  # private: it holds the pseudonym key


def pipeline_arguments(options: Sequence[str], num_workers: int) -> list[str]:
    """Beam's own arguments, with a runner on this machine if `options` names none.

    Raises:
        InputError: Beam refuses them.
    """
    # They log the errors of workers on this machine, which `_run` raises, too.
    for name in ("common", "worker", "portability.fn_api_runner", "portability.local_job_service"):
        logging.getLogger(f"apache_beam.runners.{name}").setLevel(logging.CRITICAL)
    arguments = list(options)
    if not any(option.split("=")[0] == "--runner" for option in options):
        arguments = [
            _HERE,
            "--direct_running_mode=multi_threading",
            f"--direct_num_workers={num_workers}",
            *options,
        ]
    if dask_scheduler(arguments):
        from apache_beam.runners.dask import dask_runner  # noqa: F401  it defines its options
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = PipelineOptions(arguments)
            parsed.get_all_options()
            beam.Pipeline(options=parsed)
    # argparse prints and exits, and runners raise errors of any type
    except (Exception, SystemExit) as error:
        reason = (
            (complaint.getvalue() or str(error)).strip().splitlines()[-1].rpartition(": error: ")[2]
        )
        raise InputError(f"--beam_options={shlex.join(options)}: {reason}") from None
    return arguments


def dask_scheduler(arguments: Sequence[str]) -> str | None:
    """The address of the scheduler in Beam's arguments; None: not on Dask."""
    named = [text for text in arguments if text.startswith(dask_cluster.ADDRESS_OPTION)]
    return named[-1].removeprefix(dask_cluster.ADDRESS_OPTION) if named else None


def check_cluster(arguments: Sequence[str]) -> None:
    """Refuses a Dask cluster that can't do the work; other runners see for themselves.

    Raises:
        InputError: see `dask_cluster.check_cluster`.
    """
    if scheduler := dask_scheduler(arguments):
        dask_cluster.check_cluster(scheduler)


def check_directories(arguments: Sequence[str], directories: Directories) -> None:
    """Refuses a Dask cluster that does not reach the directories, and waits for tasks of an ended
    run.

    Raises:
        InputError, RunFailed: see `dask_cluster.check_directories`.
    """
    if scheduler := dask_scheduler(arguments):
        readable = [directories.input_dir] if isinstance(directories.input_dir, Path) else []
        writable = [directories.output_dir, directories.audit_dir]
        dask_cluster.check_directories(scheduler, readable, writable, directories.records_dir)


# ---- conversion ----------------------------------------------------------------------------------


def convert_exams(
    conversion: notes.Conversion,
    exams_of_plan: Mapping[Path, list[int]],
    expected: Mapping[str, int],
    work_dir: Path,
    arguments: Sequence[str],
    progress: ExamProgress,
) -> None:
    """Converts exams.

    Args:
        conversion: the settings of all exams.
        exams_of_plan: positions in the `exams` of each file of `plan_archive`.
        expected: the slices of each of these exams, by the key of its note.
        work_dir: private.
        arguments: of `pipeline_arguments`.
        progress: of these exams; it is moved on by the notes that appear.

    Raises:
        RunFailed: the pipeline failed; its finished work stays.
    """
    elements = [(str(plan), exams) for plan, exams in exams_of_plan.items()]
    if not elements:
        return
    _say(f"converting: {len(expected)} exams under Apache Beam")
    scheduler = dask_scheduler(arguments)
    conversion_file = work_dir / _CONVERSION_FILE
    write_file(conversion_file, pickle.dumps(conversion))
    convert_them = _Convert(str(conversion_file), lasting=bool(scheduler))
    with progress.following(conversion.notes_dir, expected) as missing:
        if scheduler:
            exams = [exam for element in elements for exam in _exams_of_plan(element)]
            _run_on_dask(exams, convert_them, conversion.records_dir, arguments, scheduler)
        else:
            pipeline = beam.Pipeline(options=PipelineOptions(list(arguments)))
            _ = (
                pipeline
                | "plans" >> beam.Create(elements)
                | "exams" >> beam.FlatMap(_exams_of_plan)
                | "spread exams" >> beam.Reshuffle()
                | "convert" >> beam.ParDo(convert_them)
            )
            _run(pipeline)
    if missing:
        raise RunFailed(f"the Beam pipeline left out {len(missing)} exams; {_REMEDY}")


def _exams_of_plan(element: tuple[str, list[int]]) -> list[tuple[str, int]]:
    plan, exams = element
    return [(plan, exam) for exam in exams]


class _Convert(beam.DoFn):
    """Converts in a process of its own, as the local runner does: a scan that kills it is noted and
    stops no other scan."""

    def __init__(self, conversion_file: str, *, lasting: bool):
        self._conversion_file, self._lasting = conversion_file, lasting

    def setup(self) -> None:
        self._open = contextlib.ExitStack()
        self._conversion = pickle.loads(Path(self._conversion_file).read_bytes())
        pool = dask_cluster.lasting_pool() if self._lasting else WorkerPool(1)
        self._pool = self._open.enter_context(pool)

    def process(self, element: tuple[str, int]) -> None:
        plan, exam = element
        convert_once(self._conversion, read_plan(Path(plan)).exams[exam], self._pool)

    def teardown(self) -> None:
        self._open.close()


def convert_once(
    conversion: notes.Conversion, exam: list[SeriesCandidate], pool: WorkerPool
) -> None:
    """`convert.convert_exam`, unless the exam is converted. Another run of the same task at the
    same time does no harm.

    Raises:
        OSError: the archive went away, or the output can't be written.
    """
    if notes.is_converted(conversion, exam):
        return
    key = notes.exam_key(conversion, exam)
    with (
        _private_directory(conversion.notes_dir) as notes_dir,
        _private_directory(conversion.records_dir) as records_dir,
    ):
        private = dataclasses.replace(conversion, notes_dir=notes_dir, records_dir=records_dir)
        for _, result in pool.run(convert.convert_exam, [(private, exam)]):
            if isinstance(result, WorkerDied):
                notes.write_note(private, convert.note_of_crash(private, exam))
        if notes.is_converted(conversion, exam):  # another run was first; this one may have failed
            return
        records = notes.records_path(records_dir, key)
        if records.exists():
            publish(records, notes.records_path(conversion.records_dir, key))
        # last: it means "done"
        publish(notes.note_path(private, key), notes.note_path(conversion, key))


# ---- shards --------------------------------------------------------------------------------------


def write_shards(
    frozen: assemble.FrozenPlan,
    frozen_file: Path,
    output_dir: Path,
    records_dir: Path,
    arguments: Sequence[str],
) -> None:
    """Writes the missing new shards, with the sidecars by which `assemble.assemble` knows them.

    Raises:
        RunFailed: the pipeline failed; its finished work stays.
    """
    missing = [
        i
        for i, shard in enumerate(frozen.new_shards)
        if not _is_written(shard["name"], output_dir, records_dir)
    ]
    if not missing:
        return
    _say(f"writing shards: {len(missing)} shards under Apache Beam")
    write_them = _WriteShard(str(frozen_file), str(output_dir), str(records_dir))
    if scheduler := dask_scheduler(arguments):
        _run_on_dask(missing, write_them, records_dir, arguments, scheduler)
        return
    pipeline = beam.Pipeline(options=PipelineOptions(list(arguments)))
    _ = (
        pipeline
        | "shards" >> beam.Create(missing)
        | "spread shards" >> beam.Reshuffle()
        | "write" >> beam.ParDo(write_them)
    )
    _run(pipeline)


class _WriteShard(beam.DoFn):
    def __init__(self, frozen_file: str, output_dir: str, records_dir: str):
        self._files = (frozen_file, output_dir, records_dir)

    def setup(self) -> None:
        frozen_file, self._output_dir, self._records_dir = map(Path, self._files)
        self._shards = _new_shards(frozen_file, frozen_file.stat().st_mtime_ns)

    def process(self, element: int) -> None:
        shard = self._shards[element]
        path = self._output_dir / shard["name"]
        write_shard_once(path, self._records_dir, shard["staged"], shard["num_records"])


@functools.lru_cache(1)  # Dask calls `setup` for each shard
def _new_shards(frozen_file: Path, written: int) -> list[dict[str, Any]]:
    return assemble.FrozenPlan.load(frozen_file).new_shards


def write_shard_once(path: Path, records_dir: Path, staged: list[str], num_records: int) -> None:
    """Writes a shard of the staged volumes `staged`, unless it is written. Another run of the same
    task at the same time does no harm.

    Raises:
        OSError, RunFailed: the shard can't be written, or not all of its records are there.
    """
    try:
        if not _is_written(path.name, path.parent, records_dir):
            _write_shard(path, records_dir, staged, num_records)
    except Exception:  # of any type: another run that was first removes the staged volumes
        if not _is_written(path.name, path.parent, records_dir):
            raise
    for key in staged:
        notes.records_path(records_dir, key).unlink(missing_ok=True)


def _write_shard(path: Path, records_dir: Path, staged: list[str], num_records: int) -> None:
    with _private_directory(records_dir) as private:
        # Links, since `write_shard` removes its staged volumes and another run may read them.
        for key in staged:
            notes.records_path(private, key).symlink_to(
                notes.records_path(records_dir, key).absolute()
            )
        assemble.write_shard(private / path.name, private, staged, num_records)
        publish(private / path.name, path)
        publish(
            assemble.sidecar_path(private, path.name), assemble.sidecar_path(records_dir, path.name)
        )  # it means "done"


def _is_written(name: str, output_dir: Path, records_dir: Path) -> bool:
    return assemble.sidecar_path(records_dir, name).exists() and (output_dir / name).exists()


# ---- both ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _private_directory(parent: Path) -> Iterator[Path]:
    """A directory for one run of a task, on any machine. If the run is killed, the next preparation
    removes it."""
    with tempfile.TemporaryDirectory(
        dir=parent, suffix=PARTIAL, ignore_cleanup_errors=True
    ) as directory:
        yield Path(directory)


class _OnDask(beam.DoFn):
    """Another DoFn, whose errors are its output: (element, worker, reason). Dask would try a task
    again on the worker that can't do it, and calls no `teardown` after an error."""

    def __init__(self, inner: beam.DoFn, directory: str):
        self._inner, self._directory = inner, directory

    def process(self, element: Any) -> Iterator[dask_cluster.Failure]:
        try:
            with dask_cluster.at_work(self._directory):
                try:
                    self._inner.setup()
                    self._inner.process(element)
                finally:
                    self._inner.teardown()
        except Exception as error:  # of any type
            yield dask_cluster.failure(element, _reason(error))


def _run_on_dask(
    elements: Sequence[Any],
    inner: beam.DoFn,
    directory: Path,
    arguments: Sequence[str],
    scheduler: str,
) -> None:
    """A task for each element, with a transform as the last one of a single chain: Dask runs the
    last leaf of a pipeline alone, and its Reshuffle does nothing."""

    def start(elements: Sequence[Any]) -> PipelineResult:
        pipeline = beam.Pipeline(options=PipelineOptions(list(arguments)))
        _ = pipeline | beam.Create(elements) | beam.ParDo(_OnDask(inner, str(directory)))
        return pipeline.run()

    try:
        dask_cluster.run_tasks(elements, start, scheduler)
    except RunFailed as error:
        raise RunFailed(f"{error}; {_REMEDY}") from error
    except Exception as error:  # of any type
        raise RunFailed(f"the Beam pipeline failed: {_reason(error)}; {_REMEDY}") from error


def _run(pipeline: beam.Pipeline) -> None:
    try:
        # Workers on this machine print tracebacks of errors that are raised, too.
        with contextlib.redirect_stderr(io.StringIO()):
            state = pipeline.run().wait_until_finish()
    except Exception as error:  # of any runner
        raise RunFailed(f"the Beam pipeline failed: {_reason(error)}; {_REMEDY}") from error
    if state != PipelineState.DONE:
        raise RunFailed(f"the Beam pipeline ended in state {state}; {_REMEDY}")


def _reason(error: Exception) -> str:
    """The error in one line: runners pass on the tracebacks of their workers as text."""
    raised = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", str(error), re.MULTILINE)
    lines = raised or str(error).strip().split("\n")
    return lines[-1].split(" [while running")[0].strip() or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
