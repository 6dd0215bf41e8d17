"""Embeddings and predictions of a folder that grows, such as a PACS export: the core of `--watch`.

Each exam is taken once, when its files have stopped changing (`data_prep.raw.arrivals`). Workers
decode scans ahead of the model, and slices of several scans fill a batch together. Each result is
written whole or not at all, then noted in a ledger of the audit folder: after a kill at any moment
the same command goes on, to the same results.
"""

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctssl_jax.inference import embedding, embedding_files, label_prediction, mask_prediction
from ctssl_jax.inference.embedding_files import VolumeEmbedding
from ctssl_jax.inference.embedding_inputs import InputVolume, open_audit, read_key, read_volume
from ctssl_jax.inference.prediction import Request, check_request, open_run, write_prediction
from ctssl_jax.inference.pretrained import PretrainedModel, load, summarise_slices
from ctssl_jax.runs.reports import say
from ctssl_jax.runs.run import Run
from data_prep.dataset.schema import notes_on_rules
from data_prep.privacy import pseudonyms
from data_prep.raw.arrivals import Arrivals, Exam
from data_prep.raw.ledger import Ledger
from data_prep.raw.scans import (
    Refused,
    Scan,
    explain,
    header_reader_of,
    local_input,
    prepared_volume,
    read_scan,
)
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import VERSION, Rules
from data_prep.scan.series import SeriesCandidate
from data_prep.system.errors import InputError
from data_prep.system.files import (
    folder_written_whole,
    lock_directory,
    make_folder,
    read_json,
    remove_tree,
    write_json,
)
from data_prep.system.stores import local_path
from data_prep.system.workers import WorkerDied, WorkerPool, usable_cores

MAX_WORKERS = 4
_EXAMS_A_ROUND = 64  # then the folder is looked through again
_LONGEST_REST_S = 10.0
# Another device or batch size changes results by rounding alone.
_MAY_CHANGE = ("batch_size", "device", "versions")


@dataclasses.dataclass(frozen=True)
class Watch:
    """When an exam is complete, and when the watch ends.

    Attributes:
      settle_s: an exam is taken when no file of it has come or changed for so many seconds.
      idle_exit_s: the watch ends when nothing has come for so many seconds, and nothing waits; 0
        watches until it is stopped.

    Raises:
      InputError: a negative number.
    """

    settle_s: float = 60.0
    idle_exit_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("settle_s", "idle_exit_s"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name}={getattr(self, name)}: give 0 or more seconds")


class _Service(NamedTuple):
    """What is done with each scan.

    folder: of the results.
    result: pseudonym -> its file or folder.
    model: the model.
    function: of `PretrainedModel.in_shared_batches`.
    read: arguments of `tasks` -> a scan or its refusal; runs in workers.
    tasks: candidates of a volume -> arguments of `read`.
    rows: scan -> its slices, as `in_shared_batches` takes them.
    write: candidates, scan, outputs; writes the result whole or not at all.
    """

    folder: Path
    result: Callable[[str], Path]
    model: PretrainedModel
    function: Callable | None
    read: Callable[..., Any]
    tasks: Callable[[list[SeriesCandidate]], tuple]
    rows: Callable[[Any], dict[str, np.ndarray]]
    write: Callable[[list[SeriesCandidate], Any, Any], None]


class _Folder(NamedTuple):
    """The folder that grows, opened."""

    path: Path
    read_header: Callable
    rules: Rules
    audit: Path
    key: bytes
    num_workers: int


def watch_embeddings(
    workdir: str | Path,
    input_path: str | Path,
    output: str | Path,
    watch: Watch,
    *,
    checkpoint: str = "best",
    archive: str = "auto",
    metadata_csv: str | Path | None = None,
    rules: Rules | None = None,
    pseudonym_key_file: str | Path | None = None,
    batch_size: int = 0,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Embed the scans of a folder as they come, each into FILE.scans/PSEUDONYM.npz.

    At the end of the watch (`Watch.idle_exit_s`) FILE and FILE.rejected.csv are written of all
    scans since the first start, as `embed` writes them. Arguments are those of `embed`.

    Returns:
      The facts that FILE holds.

    Raises:
      InputError: as `embed`; or FILE.scans is of another model, key or other rules; or no scan was
        taken.
      OSError: the folder went away, or results cannot be written.
    """
    output = local_path(output, "--output", "choose a folder here")
    embedding_files.check_format(output)
    run = Run.open(workdir)
    model = load(run, checkpoint, batch_size=batch_size)
    folder = _open_folder(
        *(input_path, output, archive, metadata_csv, rules, pseudonym_key_file, num_workers)
    )
    scans = output.with_suffix(".scans")
    facts = embedding.facts_of(model) | {
        "input": "scans",
        "rules": dataclasses.asdict(folder.rules),
        "rules_version": VERSION,
        "key_fingerprint": pseudonyms.key_fingerprint(folder.key),
        "notes": notes_on_rules(run.preparation, None),
    }

    def result(volume_id: str) -> Path:
        return scans / f"{volume_id}.npz"

    def write(_: list[SeriesCandidate], volume: InputVolume, outputs: dict) -> None:
        summary = summarise_slices(outputs["embedding"])
        position_mm = np.asarray(volume.position_mm, np.float32)
        part = VolumeEmbedding(*volume[:3], position_mm, *summary)
        embedding_files.write_part(result(volume.volume_id), part)

    service = _Service(
        folder=scans,
        result=result,
        model=model,
        function=None,
        read=read_volume,
        tasks=lambda exam: _task(folder, exam, model),
        rows=lambda volume: model.rows(volume.prepared),
        write=write,
    )
    with _opened(service, folder, facts) as ledger:
        _serve(service, folder, ledger, watch)
        names = sorted(name for volumes in ledger.volumes.values() for name in volumes)
        parts = [result(name) for name in names]
        refused = sorted(Refused(*row) for rows in ledger.refused.values() for row in rows)
        facts["synthetic"] = ledger.synthetic
        return embedding.write_results(output, folder.path, run, model, parts, refused, facts)


def watch_predictions(
    workdir: str | Path,
    request: Request,
    output: str | Path,
    watch: Watch,
    *,
    checkpoint: str = "best",
    pseudonym_key_file: str | Path | None = None,
    batch_size: int = 0,
    num_workers: int | None = None,
) -> int:
    """Predict the scans of a folder as they come, each into OUTPUT/PSEUDONYM.

    Arguments are those of `predict`.

    Returns:
      The number of scans that have a prediction.

    Raises:
      InputError: as `predict`; or OUTPUT is of another model, key or other settings.
      OSError: the folder went away, or results cannot be written.
    """
    output = local_path(output, "--output", "choose a folder here")
    run = open_run(workdir)
    predicts_label = run.config.task in label_prediction.TASKS
    check_request(predicts_label, request)
    model = load(run, checkpoint, batch_size=batch_size)
    thresholds = {}
    if request.evaluation:
        thresholds = label_prediction.read_thresholds(
            request.evaluation, run.config, model.fingerprint
        )
    folder = _open_folder(
        *(request.input_path, output, request.archive, request.metadata_csv, request.rules),
        *(pseudonym_key_file, num_workers),
    )
    facts = embedding.facts_of(model) | {
        "kind": "predictions",
        "rules": dataclasses.asdict(folder.rules),
        "rules_version": VERSION,
        "key_fingerprint": pseudonyms.key_fingerprint(folder.key),
        "thresholds": thresholds,
        "dicom_seg": request.dicom_seg,
        "segment_label": request.segment_label,
    }

    def rows(scan: Scan) -> dict[str, np.ndarray]:
        return model.rows(prepared_volume(scan)) if predicts_label else {"images": scan.images}

    def write(exam: list[SeriesCandidate], scan: Scan, outputs: Any) -> None:
        values = outputs["probabilities"] if predicts_label else outputs
        place = {"volume_id": scan.volume_id, "patient_id": scan.patient_id}
        final = output / scan.volume_id
        remove_tree(final)  # of a scan that is done again
        with folder_written_whole(final, output / f".{scan.volume_id}.tmp") as unfinished:
            write_prediction(
                *(unfinished, model, folder.path, exam, scan, values, place, request, thresholds)
            )

    service = _Service(
        folder=output,
        result=lambda volume_id: output / volume_id / "prediction.json",
        model=model,
        function=None if predicts_label else mask_prediction.slice_program(model),
        read=read_scan,
        tasks=lambda exam: _task(folder, exam, model),
        rows=rows,
        write=write,
    )
    with _opened(service, folder, facts) as ledger:
        _serve(service, folder, ledger, watch)
        return sum(map(len, ledger.volumes.values()))


# ---- the folder ----------------------------------------------------------------------------------


def _open_folder(
    input_path: str | Path,
    output: Path,
    archive: str,
    metadata_csv: str | Path | None,
    rules: Rules | None,
    pseudonym_key_file: str | Path | None,
    num_workers: int | None,
) -> _Folder:
    path = local_input(input_path)
    read_header = header_reader_of(path, archive, metadata_csv, grows=True)
    if not path.is_dir():
        raise InputError(f"--input={input_path} is a file; --watch is for a folder that grows")
    if output.resolve().is_relative_to(path.resolve()):
        raise InputError(
            f"--output={output} lies in --input, whose files are taken for scans; choose another "
            "folder"
        )
    key = read_key(pseudonym_key_file)
    make_folder(output.parent, "--output")
    audit, key = open_audit(output.with_suffix(""), key)
    workers = min(MAX_WORKERS, usable_cores()) if num_workers is None else num_workers
    return _Folder(path, read_header, rules or Rules(), audit, key, workers)


@contextlib.contextmanager
def _opened(service: _Service, folder: _Folder, facts: dict[str, Any]) -> Iterator[Ledger]:
    """The ledger, with the folder of results made and locked.

    Raises:
      InputError: the folder has results of other settings, or is in use.
    """
    make_folder(service.folder, "--output")
    settings = {name: value for name, value in facts.items() if name not in _MAY_CHANGE}
    settings = json.loads(json.dumps(settings))
    path = service.folder / "settings.json"
    with lock_directory(service.folder):
        if path.exists():
            present = read_json(path, remedy=f"remove {service.folder}, and all is done again")
            if other := [name for name in settings if present.get(name) != settings[name]]:
                raise InputError(
                    f"--output: {service.folder} has results of another {other[0]} "
                    f"({present.get(other[0])}, now {settings[other[0]]}); choose another --output"
                )
        else:
            write_json(path, settings)
        yield Ledger(folder.audit / f"{facts['kind']}.jsonl")


def _task(folder: _Folder, exam: list[SeriesCandidate], model: PretrainedModel) -> tuple:
    return (folder.path, exam, model.windows, model.image_size, folder.rules, folder.key)


# ---- the watch -----------------------------------------------------------------------------------


def _serve(service: _Service, folder: _Folder, ledger: Ledger, watch: Watch) -> None:
    """Take the scans of the folder until nothing comes any more."""
    arrivals = Arrivals(
        folder.path,
        folder.read_header,
        folder.rules,
        folder.key,
        ledger,
        lambda volume_id: service.result(volume_id).exists(),
        settle_s=watch.settle_s,
        num_workers=folder.num_workers,
    )
    rest_s = max(0.1, min(_LONGEST_REST_S, watch.settle_s / 4, (watch.idle_exit_s or 1e9) / 4))
    say(
        f"watching     an exam is taken {watch.settle_s:g} s after its last file; "
        + (f"ends after {watch.idle_exit_s:g} s without a file" if watch.idle_exit_s else "ends by")
        + (" or by" if watch.idle_exit_s else "")
        + " Ctrl-C or SIGTERM, and the same command goes on"
    )
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(WorkerPool(folder.num_workers)) if folder.num_workers else None
        last = time.monotonic()
        while True:
            found = arrivals.look()
            for late in found.late:
                _say_late(service, late.volumes, len(late.sources), ledger.path.name)
            reasons = collections.Counter(entry.reason for entry in found.not_images)
            for reason, number in reasons.most_common():
                where = f"named in {ledger.path.name}"
                say(f"not images   {number} files {reason}: {explain(reason)} ({where})")
            if found.changed or found.ready or found.waiting:
                last = time.monotonic()
            elif watch.idle_exit_s and time.monotonic() - last >= watch.idle_exit_s:
                return
            if found.ready:
                _take(found.ready[:_EXAMS_A_ROUND], service, arrivals, pool)
            else:
                time.sleep(rest_s)


def _say_late(service: _Service, volumes: list[str], number: int, listed: str) -> None:
    results = " and ".join(str(service.result(name)) for name in volumes)
    say(
        f"LATE         {number} files came or changed after their exam was done, and are not in "
        f"its result (named in {listed}); remove {results}, and it is done again with all files"
    )


def _take(
    exams: list[Exam], service: _Service, arrivals: Arrivals, pool: WorkerPool | None
) -> None:
    """Read, compute and write some exams, and note what became of them."""
    started = time.monotonic()
    jobs = [(exam, candidates) for exam in exams for candidates in exam.volumes]
    unfinished = collections.Counter(exam.name for exam, _ in jobs)
    volumes: dict[str, list[str]] = collections.defaultdict(list)
    refused: dict[str, list[Refused]] = {}
    num_slices = num_done = 0

    def close(exam: Exam) -> None:
        """Note an exam whose volumes are all dealt with."""
        rows = refused[exam.name]
        if any(row.reason == FAILED_FOR_NOW for row in rows):
            again = (
                "tried again later" if arrivals.try_again(exam) else "the next start tries again"
            )
            say(f"failed       {rows[-1].volume_id}: {rows[-1].detail or 'unreadable'}; {again}")
            return
        for row in () if volumes[exam.name] else rows[:1]:
            detail = f" ({row.detail})" if row.detail else ""
            say(f"refused      {row.volume_id}: {row.reason}: {explain(row.reason)}{detail}")
        arrivals.finish(exam, volumes[exam.name], [tuple(row) for row in rows])

    def decoded() -> Iterator[dict[str, np.ndarray]]:
        tasks = [service.tasks(candidates) for _, candidates in jobs]
        for (exam, candidates), scan in zip(jobs, _read(service.read, tasks, pool), strict=True):
            if scan is None:
                name = pseudonyms.volume_id(arrivals.key, candidates[0])
                scan = Refused(name, FAILED_FOR_NOW, "the worker process died")
            if isinstance(scan, Refused):
                refused[exam.name].append(scan)
                dealt_with(exam)
                continue
            waiting.append((exam, candidates, scan))
            yield service.rows(scan)

    def dealt_with(exam: Exam) -> None:
        unfinished[exam.name] -= 1
        if not unfinished[exam.name]:
            close(exam)

    for exam in exams:
        rows = [pseudonyms.rejected_row(arrivals.key, one) for one in exam.rejections]
        refused[exam.name] = [Refused(row.series_id, row.reason, row.detail) for row in rows]
        if not exam.volumes:
            close(exam)
    waiting: collections.deque[tuple[Exam, list[SeriesCandidate], Any]] = collections.deque()
    for outputs in service.model.in_shared_batches(decoded(), service.function):
        exam, candidates, scan = waiting.popleft()
        try:
            service.write(candidates, scan, outputs)
        except OSError:
            raise
        except Exception as error:  # one odd scan must not end the watch, now and at each start
            crashed = Refused(scan.volume_id, "conversion_crashed", type(error).__name__)
            refused[exam.name].append(crashed)
        else:
            volumes[exam.name].append(scan.volume_id)
            num_slices, num_done = num_slices + len(scan.position_mm), num_done + 1
        dealt_with(exam)
    if num_done:
        seconds = time.monotonic() - started
        say(
            f"taken        {num_done} scans, {num_slices:,} slices in {seconds:.1f} s "
            f"({num_slices / seconds:.1f} slices/s)"
        )


def _read(
    function: Callable[..., Any], tasks: Iterable[tuple], pool: WorkerPool | None
) -> Iterator[Any]:
    """The result of each task in their order; None where the worker died."""
    if pool is None:
        yield from (function(*task) for task in tasks)
        return
    for _, result in pool.run(function, tasks):
        yield None if isinstance(result, WorkerDied) else result
