r"""Embeddings of scans by a trained model: per slice, and their mean and maximum per volume.

    python -m ctssl_jax.embed --workdir=RUN --input=SCANS --output=FILE.parquet

SCANS is a folder of one scan or of many, a zip file, a DICOM or NIfTI file, or a prepared dataset. Raw scans are read
as `data_prep.prepare` reads them, with the run's window and image size: the embeddings are those of the dataset that it
would make. What the files hold says `ctssl_jax.embedding_files`; FILE.npz instead of FILE.parquet holds the same.

FILE.rejected.csv lists what was not taken. Killed at any moment, the same command continues where it stopped, with the
same result to the byte on the same device (FILE.parts holds what is done until then).

Raw scans get pseudonyms, as in a dataset; the private folder FILE-audit holds their key (unless --pseudonym_key_file
names one, such as a dataset's) and `sources.csv`, which links volumes to files. Keep it with the scans.
"""

import collections
import functools
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags

from ctssl_jax import scan_flags
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import make_folder

FORMAT_VERSION = 1
MOST_WORKERS = 4  # together they decode about 500 slices/s
_REJECTED_COLUMNS = ("series_id", "reason", "detail")
_OF_RAW_SCANS = (*scan_flags.ALL, "pseudonym_key_file", "num_workers")


def embed(
    workdir: str | Path,
    input_path: str | Path,
    output: str | Path,
    *,
    checkpoint: str = "best",
    split: str | None = None,
    archive: str = "auto",
    metadata_csv: str | Path | None = None,
    rules: Any = None,
    pseudonym_key_file: str | Path | None = None,
    batch_size: int = 0,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Embed every volume of an input and write FILE.parquet (or .npz) and FILE.rejected.csv.

    Args:
      workdir: run directory, of any task.
      input_path: raw scans or a dataset directory.
      output: FILE.parquet or FILE.npz; its folder is made.
      checkpoint: `best`, `last` or a step.
      split: of a dataset; None takes all.
      archive, metadata_csv, rules: of raw scans, see `scans.plan_scans`.
      pseudonym_key_file: key of the pseudonyms of raw scans; None makes one in FILE-audit.
      batch_size: slices at a time, rounded up to a multiple of the devices; 0 takes the training's.
      num_workers: processes that decode raw scans; None takes the usable cores, at most four; 0 this process alone.

    Returns:
      The facts that the files hold (among them `num_volumes`, `num_patients`, `num_slices`, and `refused`: series by
      reason), `not_images` (files by reason), and `changed`: False if all was there already.

    Raises:
      InputError: no such run, checkpoint or input, data prepared otherwise than the run's, or no volume that is taken.
      RunFailed: the input went away.
    """
    from ctssl_jax import embedding_files, embedding_inputs, pretrained
    from data_prep.dataset__schema import PREPARATION_FILE
    from data_prep.dataset__storage import write_table
    from data_prep.raw import scans
    from data_prep.scan.reasons import FAILED_FOR_NOW
    from data_prep.scan.rules import Rules
    from data_prep.workers import Progress, usable_cores

    # ---- What is asked for, and can it work? ----
    workdir, output = Path(workdir).expanduser(), Path(output).expanduser()
    input_path = scans.local_input(input_path)
    embedding_files.check_format(output)
    key = embedding_inputs.read_key(pseudonym_key_file)
    num_workers = min(MOST_WORKERS, usable_cores()) if num_workers is None else num_workers
    model = pretrained.load(workdir, checkpoint, batch_size=batch_size)
    if (input_path / PREPARATION_FILE).is_file():
        opened = embedding_inputs.open_dataset(workdir, input_path, split)
        make_folder(output.parent, "--output")
    else:
        if split is not None:
            raise InputError(f"--split={split} is of prepared datasets, and --input={input_path} is none; leave it out")
        rules = rules or Rules()
        plan = scans.plan_scans(input_path, archive, rules, metadata_csv, num_workers=num_workers)
        make_folder(output.parent, "--output")
        key = embedding_inputs.keep_audit(output.with_suffix(""), plan, key)
        opened = embedding_inputs.open_scans(plan, rules, key, model.windows, model.image_size, num_workers)
    facts = _facts(model) | opened.facts
    made_by = json.dumps(facts, sort_keys=True)
    facts["content"] = _digest(made_by, *(job.digest for job in opened.jobs), *map(repr, sorted(opened.refused)))
    there = embedding_files.read_facts(output)
    if there and there["complete"] and facts.items() <= there.items():
        _remove_parts(output)
        return {**there, "not_images": opened.not_images, "changed": False}

    # ---- One volume after the other ----
    make_folder(_parts_dir(output), "--output")
    parts = [_parts_dir(output) / f"{_digest(made_by, job.digest)}.npz" for job in opened.jobs]
    todo = [(job, part) for job, part in zip(opened.jobs, parts, strict=True) if not part.exists()]
    failed = {}
    with Progress("embedding", "slices", sum(job.num_slices for job in opened.jobs)) as progress:
        for job, part in zip(opened.jobs, parts, strict=True):
            progress.advance(job.num_slices if part.exists() else 0, already_there=True)
        volumes = opened.read([job for job, _ in todo])
        for (job, part), volume in zip(todo, volumes, strict=True):
            if _is_refused(volume) and volume.reason == FAILED_FOR_NOW:
                failed[part] = volume
            else:
                embedding_files.write_part(part, _embedded(model, volume))
            progress.advance(job.num_slices)

    # ---- Files ----
    def outcomes() -> Iterator:
        for part in parts:
            yield failed.get(part) or embedding_files.read_part(part)

    refused, patients, num_volumes, num_slices = list(opened.refused), set(), 0, 0
    for outcome in outcomes():
        if _is_refused(outcome):
            refused.append(outcome)
        else:
            patients.add(outcome.patient_id)
            num_volumes, num_slices = num_volumes + 1, num_slices + len(outcome.slices)
    refused.sort()
    rows = [dict(zip(_REJECTED_COLUMNS, series, strict=True)) for series in refused]
    write_table(output.with_suffix(".rejected.csv"), _REJECTED_COLUMNS, rows)
    if not (num_volumes or failed):
        _remove_parts(output)
    if not num_volumes:
        raise InputError(scans.nothing_taken(input_path, refused))
    facts |= {
        "num_volumes": num_volumes,
        "num_patients": len(patients),
        "num_slices": num_slices,
        "num_patients_seen_in_training": _patients_seen(workdir, facts["key_fingerprint"], sorted(patients)),
        "refused": dict(sorted(collections.Counter(series.reason for series in refused).items())),
        "complete": not failed,
    }
    volumes = (outcome for outcome in outcomes() if not _is_refused(outcome))
    embedding_files.write(output, volumes, model.embedding_dim, facts)
    if not failed:
        _remove_parts(output)
    return {**facts, "not_images": opened.not_images, "changed": True}


def summary(result: dict[str, Any]) -> str:
    """What was embedded, as lines for the screen."""
    from data_prep.raw.scans import explain

    slices, volumes, patients = (
        f"{result[f'num_{name}']:,} {name if result[f'num_{name}'] != 1 else name[:-1]}"
        for name in ("slices", "volumes", "patients")
    )
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}: {slices} of {volumes} of {patients}, "
        f"{result['embedding_dim']} numbers a slice{'  SYNTHETIC DATA' if result['synthetic'] else ''}"
    ]
    for reason, number in result["refused"].items():
        lines.append(f"{number:>8} series refused, {reason}: {explain(reason)}")
    for reason, number in result["not_images"].items():
        lines.append(f"{number:>8} files that are no images, {reason}: {explain(reason)}")
    if result["num_patients_seen_in_training"]:
        lines.append(f"NOTE: the model has learned from {result['num_patients_seen_in_training']} of these patients")
    if not result["complete"]:
        lines.append("NOTE: some scans could not be read for now; run again to retry them")
    return "\n".join(lines)


# ---- Results -------------------------------------------------------------------------------------------------


def _facts(model) -> dict[str, Any]:
    """What the numbers of any volume depend on."""
    import jax

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


def _embedded(model, volume):
    """`VolumeEmbedding` of an `InputVolume`; a refusal stays one."""
    import numpy as np

    from ctssl_jax import pretrained
    from ctssl_jax.embedding_files import VolumeEmbedding

    if _is_refused(volume):
        return volume
    embedding = pretrained.summarise_slices(model.outputs(volume.prepared)["embedding"])
    return VolumeEmbedding(*volume[:3], np.asarray(volume.position_mm, np.float32), *embedding)


def _is_refused(outcome: Any) -> bool:
    from data_prep.raw.scans import Refused

    return isinstance(outcome, Refused)


def _patients_seen(workdir: Path, key_fingerprint: str, patients: list[str]) -> int | None:
    """How many of the patients the run or one of its ancestors has learned from; None if that cannot be known."""
    from ctssl_jax import measurement, transplant

    learned_from = [run["patients"] for run in transplant.read_ancestors(workdir)]
    if not (workdir / "patients.json").is_file():
        return None
    learned_from.append(transplant.read_patients(workdir))
    return measurement.patients_seen(learned_from, key_fingerprint, "test", patients)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _parts_dir(output: Path) -> Path:
    return output.with_suffix(".parts")


def _remove_parts(output: Path) -> None:
    """Removes what is left of this run and of killed ones to this output; files that are not ours stay."""
    folder = _parts_dir(output)
    partial = output.parent.glob(f"{output.stem}.*.partial")
    for path in (*folder.glob("*.npz"), *folder.glob("*.npz.*.partial"), *partial):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# ---- Command line --------------------------------------------------------------------------------------------


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train, of any task.")
    text("input", None, "Raw scans (a folder, a zip, DICOM or NIfTI file) or a prepared dataset.")
    text("output", None, "FILE.parquet or FILE.npz.")
    text("checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step.")
    text("split", None, "train, validation or test of a dataset; by default all.")
    text("pseudonym_key_file", None, "File with the key of the pseudonyms (default: made in FILE-audit).")
    flags.DEFINE_integer("batch_size", 0, "Slices at a time; 0 takes the training's.", flag_values=given)
    flags.DEFINE_integer(
        "num_workers",
        None,
        "Processes that decode raw scans (default: the usable cores, at most 4).",
        lower_bound=0,
        flag_values=given,
    )
    scan_flags.define(given)
    flags.adopt_module_key_flags(scan_flags, given)  # --help shows them, too


def start(given: flags.FlagValues) -> bool:
    """Embed as the flags ask, in this process."""
    from data_prep.dataset__schema import PREPARATION_FILE

    for name in ("workdir", "input", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    if (Path(given.input).expanduser() / PREPARATION_FILE).is_file():
        for name in _OF_RAW_SCANS:
            if given[name].present:
                raise InputError(f"--{name} is of raw scans, and --input={given.input} is a dataset; leave it out")
    configure_jax()
    try:
        result = embed(
            given.workdir,
            given.input,
            given.output,
            checkpoint=given.checkpoint,
            split=given.split,
            archive=given.archive,
            metadata_csv=given.metadata_csv,
            rules=scan_flags.rules_of(given),
            pseudonym_key_file=given.pseudonym_key_file,
            batch_size=given.batch_size,
            num_workers=given.num_workers,
        )
    except OSError as error:
        raise RunFailed(f"{error}; run the same command again to continue") from None
    print(summary(result))
    state = "written" if result["changed"] else "complete already, nothing to do"
    print(f"{state}: {given.output} and, beside it, files of that name and other endings", flush=True)
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
