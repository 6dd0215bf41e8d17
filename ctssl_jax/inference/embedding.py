"""Embeddings of all volumes of an input, written to files: the core of `ctssl_jax.embed`."""

import collections
import hashlib
import json
import types
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctssl_jax.evaluation.measured_run import patients_seen
from ctssl_jax.inference import embedding_files
from ctssl_jax.inference.embedding_files import VolumeEmbedding
from ctssl_jax.inference.embedding_inputs import (
    Input,
    InputVolume,
    keep_audit,
    open_dataset,
    open_scans,
    read_key,
)
from ctssl_jax.inference.pretrained import PretrainedModel, load, summarise_slices
from ctssl_jax.runs.run import Run
from data_prep.dataset.schema import PREPARATION_FILE, notes_on_rules
from data_prep.dataset.storage import write_table
from data_prep.raw.scans import Refused, explain, local_input, nothing_taken, plan_scans
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError
from data_prep.system.files import lock_directory, make_folder
from data_prep.system.stores import local_path
from data_prep.system.workers import Progress, usable_cores

FORMAT_VERSION = 1
MAX_WORKERS = 4  # together they decode about 500 slices/s
_REJECTED_COLUMNS = ("series_id", "reason", "detail")


def embed(
    workdir: str | Path,
    input_path: str | Path,
    output: str | Path,
    *,
    checkpoint: str = "best",
    split: str | None = None,
    archive: str = "auto",
    metadata_csv: str | Path | None = None,
    rules: Rules | None = None,
    pseudonym_key_file: str | Path | None = None,
    batch_size: int = 0,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Embed every volume of an input and write FILE.parquet (or .npz) and FILE.rejected.csv.

    Args:
      workdir: run directory, of any task.
      input_path: raw scans or a dataset directory.
      output: FILE.parquet or FILE.npz; its folder is made.
      checkpoint: `best`, `last`, `last_good` or a step.
      split: of a dataset; None takes all.
      archive, metadata_csv, rules: of raw scans, see `data_prep.raw.scans.plan_scans`.
      pseudonym_key_file: key of the pseudonyms of raw scans; None makes one in FILE-audit.
      batch_size: slices at a time at most, a multiple of the devices; 0 chooses by memory.
      num_workers: processes that decode raw scans; None takes the usable cores, at most four; 0
        takes this process alone.

    Returns:
      The facts that the files hold (among them `num_volumes`, `num_patients`, `num_slices`, and
      `refused`, the number of series by reason), `not_images` (number of files by reason), and
      `changed`, False if the files were complete already.

    Raises:
      InputError: an unknown run, checkpoint or input, data prepared otherwise than the data of the
        run, or an input whose volumes are all refused.
      OSError: the input went away, or the files cannot be written.
    """
    output = local_path(output, "--output", "choose a folder here")
    input_path = local_input(input_path)
    embedding_files.check_format(output)
    key = read_key(pseudonym_key_file)
    num_workers = min(MAX_WORKERS, usable_cores()) if num_workers is None else num_workers
    run = Run.open(workdir)
    model = load(run, checkpoint, batch_size=batch_size)
    if (input_path / PREPARATION_FILE).is_file():
        opened = open_dataset(run, input_path, split)
        make_folder(output.parent, "--output")
    else:
        if split is not None:
            raise InputError(
                f"--split={split} is for prepared datasets, and --input={input_path} is not one; "
                "leave it out"
            )
        rules = rules or Rules()
        plan = plan_scans(input_path, archive, rules, metadata_csv, num_workers=num_workers)
        make_folder(output.parent, "--output")
        key = keep_audit(output.with_suffix(""), plan, key)
        opened = open_scans(plan, rules, key, model.windows, model.image_size, num_workers)
        opened.facts["notes"] = notes_on_rules(run.preparation, None)

    facts = facts_of(model) | opened.facts
    settings = json.dumps(facts, sort_keys=True)
    digests = [job.digest for job in opened.jobs]
    facts["content"] = _digest(settings, *digests, *map(repr, sorted(opened.refused)))
    present = embedding_files.read_facts(output)
    if present and present["complete"] and facts.items() <= present.items():
        _remove_parts(output)
        return {**present, "not_images": opened.not_images, "changed": False}

    make_folder(_parts_dir(output), "--output")
    with lock_directory(_parts_dir(output)):  # another process would remove its parts
        parts = [_parts_dir(output) / f"{_digest(settings, digest)}.npz" for digest in digests]
        failed = _embed_missing(model, opened, parts)
        try:
            facts = write_results(
                output, input_path, run, model, parts, opened.refused, facts, failed
            )
        except InputError:
            if not failed:
                _remove_parts(output)
            raise
        if not failed:
            _remove_parts(output)
        return {**facts, "not_images": opened.not_images, "changed": True}


def write_results(
    output: Path,
    input_path: Path,
    run: Run,
    model: PretrainedModel,
    parts: list[Path],
    refused: list[Refused],
    facts: dict[str, Any],
    failed: Mapping[Path, Refused] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Write FILE.parquet (or .npz) and FILE.rejected.csv of finished volumes.

    Args:
      output: FILE.
      input_path: for the message.
      run, model: of the embeddings.
      parts: files of `embedding_files.write_part`, in the order of the rows.
      refused: series without a part.
      facts: all settings, with `key_fingerprint`.
      failed: parts that cannot be made for now, which are absent.

    Returns:
      The facts with the counts, as FILE holds them.

    Raises:
      InputError: all is refused; FILE.rejected.csv is written.
    """
    refused, embedded = list(refused), []
    for outcome in _outcomes(parts, failed):
        if isinstance(outcome, Refused):
            refused.append(outcome)
        else:
            embedded.append((outcome.patient_id, len(outcome.slices)))
    refused.sort()
    rows = [dict(zip(_REJECTED_COLUMNS, series, strict=True)) for series in refused]
    write_table(output.with_suffix(".rejected.csv"), _REJECTED_COLUMNS, rows)
    if not embedded:
        raise InputError(nothing_taken(input_path, refused))
    patients = sorted({patient_id for patient_id, _ in embedded})
    facts = facts | {
        "num_volumes": len(embedded),
        "num_patients": len(patients),
        "num_slices": sum(num_slices for _, num_slices in embedded),
        "num_patients_seen_in_training": _patients_seen(run, facts["key_fingerprint"], patients),
        "refused": dict(sorted(collections.Counter(series.reason for series in refused).items())),
        "complete": not failed,
    }
    volumes = (one for one in _outcomes(parts, failed) if not isinstance(one, Refused))
    embedding_files.write(output, volumes, model.embedding_dim, facts)
    return facts


def _embed_missing(model: PretrainedModel, opened: Input, parts: list[Path]) -> dict[Path, Refused]:
    """Write the parts that do not exist yet.

    Returns:
      The parts of volumes that cannot be read for now -> their refusals.
    """
    missing = [
        (job, part) for job, part in zip(opened.jobs, parts, strict=True) if not part.exists()
    ]
    failed = {}
    with Progress("embedding", "slices", sum(job.num_slices for job in opened.jobs)) as progress:
        for job, part in zip(opened.jobs, parts, strict=True):
            progress.advance(job.num_slices if part.exists() else 0, already_there=True)
        volumes = opened.read([job for job, _ in missing])
        for (job, part), volume in zip(missing, volumes, strict=True):
            if isinstance(volume, Refused) and volume.reason == FAILED_FOR_NOW:
                failed[part] = volume
            else:
                embedding_files.write_part(part, _embedded(model, volume))
            progress.advance(job.num_slices)
    return failed


def _outcomes(
    parts: list[Path], failed: Mapping[Path, Refused]
) -> Iterator[VolumeEmbedding | Refused]:
    for part in parts:  # one volume at a time in memory
        yield failed.get(part) or embedding_files.read_part(part)


def summary(result: dict[str, Any]) -> str:
    """The outcome of `embed`, as lines for the screen."""
    slices, volumes, patients = (
        f"{result[f'num_{name}']:,} {name if result[f'num_{name}'] != 1 else name[:-1]}"
        for name in ("slices", "volumes", "patients")
    )
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}: {slices} of {volumes} of "
        f"{patients}, {result['embedding_dim']} numbers a "
        f"slice{'  SYNTHETIC DATA' if result['synthetic'] else ''}"
    ]
    for reason, number in result["refused"].items():
        lines.append(f"{number:>8} series refused, {reason}: {explain(reason)}")
    for reason, number in result.get("not_images", {}).items():
        lines.append(f"{number:>8} files that are not images, {reason}: {explain(reason)}")
    if result["num_patients_seen_in_training"]:
        lines.append(
            f"NOTE: the model has learned from {result['num_patients_seen_in_training']} of these "
            "patients"
        )
    lines += [f"NOTE: {note}" for note in result.get("notes", ())]
    if not result["complete"]:
        lines.append("NOTE: some scans could not be read for now; run again to retry them")
    return "\n".join(lines)


def facts_of(model: PretrainedModel) -> dict[str, Any]:
    """All settings that the embedding of a volume depends on."""
    return {
        "kind": "embeddings",
        "format_version": FORMAT_VERSION,
        "recipe": model.config.recipe,
        "task": model.config.task,
        "checkpoint_step": model.step,
        "model_fingerprint": model.fingerprint,
        "trained_on_fingerprint": model.preparation["fingerprint"],
        "windows": [list(window) for window in model.windows],
        "image_size": model.image_size,
        "normalize": model.config.normalize,
        "dtype": model.config.dtype,
        "embedding_dim": model.embedding_dim,
        "batch_size": model.batch_size,
        "device": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "numpy", "pillow")},
    }


def _embedded(model: PretrainedModel, volume: InputVolume | Refused) -> VolumeEmbedding | Refused:
    """The embedding of a volume; a refusal stays a refusal."""
    if isinstance(volume, Refused):
        return volume
    embedding = summarise_slices(model.outputs(volume.prepared)["embedding"])
    return VolumeEmbedding(*volume[:3], np.asarray(volume.position_mm, np.float32), *embedding)


def _patients_seen(run: Run, key_fingerprint: str, patients: list[str]) -> int | None:
    """Number of the patients that the run or one of its ancestors has learned from; None if this is
    unknown."""
    ancestors = run.ancestors  # a damaged list is refused even where the patients are not known
    if not (run.workdir / "patients.json").is_file():
        return None
    learned_from = [*(ancestor["patients"] for ancestor in ancestors), run.patients]
    return patients_seen(learned_from, key_fingerprint, "test", patients)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _parts_dir(output: Path) -> Path:
    return output.with_suffix(".parts")


def _remove_parts(output: Path) -> None:
    """Remove the parts of this output, also of killed runs; other files stay."""
    folder = _parts_dir(output)
    partial = output.parent.glob(f"{output.stem}.*.partial")
    for path in (*folder.glob("*.npz"), *folder.glob("*.npz.*.partial"), *partial):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
