"""Damaged checkpoints: checksums that notice them, and a folder to set them aside.

Orbax does not notice a changed bit in the numbers of a tensor. So a complete checkpoint gets a file
SHA256SUMS, with the checksums of its files and of the run's files that never change. It is written
together with the next checkpoint, or when the run ends or stops.

A checkpoint is compared with its checksums before it is restored. One that has none, because its
process was killed or an older version wrote it, is restored unchecked.
`sha256sum -c STEP/SHA256SUMS` in `checkpoints/` makes the same comparison.

On `gs://` nothing is read for it: the store keeps an MD5 or CRC32C of every object, and lists them.
They are compared with the file OBJECTSUMS of the checkpoint, in one request, whatever its size.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from ctssl_jax.runs.directory import (
    absolute,
    complete_checkpoints,
    move_checkpoint,
    object_checksums,
)
from ctssl_jax.runs.scores import is_of_score
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256, write_text

CHECKPOINTS = "checkpoints"
SET_ASIDE = "damaged_checkpoints"
SUMS = "SHA256SUMS"
OBJECT_SUMS = "OBJECTSUMS"  # on `gs://`
LAST_GOOD = "last_good"
# a line of SHA256SUMS or OBJECTSUMS
_SUM = re.compile(r"(?P<sum>[0-9a-f]{64}|[a-z0-9]+=[\w+/]+=*)  (?P<name>(?:\.\./|\d+/).+)")
# the size up to which files are compared whenever the list of checkpoints is read
_SMALL_BYTES = 1 << 20
_NEVER_CHANGE = (
    "ancestors.json",
    "imported.json",
    "patients.json",
    "training_data.json",
    "transplant.json",
)


def step_numbers(workdir: Path) -> list[int]:
    """Steps of all complete checkpoints, readable or not, in order."""
    return sorted(int(path.name) for path in complete_checkpoints(workdir / CHECKPOINTS))


def holds_checkpoint(workdir: Path) -> bool:
    """Whether a run directory holds a complete checkpoint, readable or not."""
    return bool(step_numbers(workdir))


def write_sums(workdir: Path, step: int) -> None:
    """Write the checksums of a complete checkpoint, if it is still there."""
    folder = workdir / CHECKPOINTS / str(step)
    if not folder.is_dir():
        return
    if not isinstance(folder, Path):
        lines = [f"{checksum}  {name}\n" for name, checksum in _object_sums(workdir, step).items()]
        write_text(folder / OBJECT_SUMS, "".join(lines))
        return
    # The run's files first: a list that is cut then lacks files of the checkpoint, and is noticed.
    files = [workdir / name for name in _NEVER_CHANGE if (workdir / name).is_file()]
    files += [
        path for path in sorted(folder.rglob("*")) if path.is_file() and not _later(path.name)
    ]
    lines = [f"{file_sha256(path)}  {os.path.relpath(path, folder.parent)}\n" for path in files]
    write_text(folder / SUMS, "".join(lines))


def _object_sums(workdir: Path, step: int) -> dict[str, str]:
    """The checksums of the objects of a checkpoint and of its run, by the names of a list."""
    of_run = object_checksums(workdir, depth=1)
    sums = {f"../{name}": of_run[name] for name in _NEVER_CHANGE if name in of_run}
    for name, checksum in object_checksums(workdir / CHECKPOINTS / str(step)).items():
        if not _later(name.split("/")[-1]):
            sums[f"{step}/{name}"] = checksum
    return sums


def _sums_path(folder: Path) -> Path:
    return folder / (SUMS if isinstance(folder, Path) else OBJECT_SUMS)


def _later(name: str) -> bool:
    """Whether a file of a checkpoint, by its name, is written when the checkpoint is complete."""
    return name in (SUMS, OBJECT_SUMS) or is_of_score(name)


def _difference(workdir: Path, step: int, of_run: bool, small_files_only: bool = False) -> str:
    """The first file of the checkpoint (or of its run) that differs from SHA256SUMS, in words; ""
    if all agree."""
    folder = workdir / CHECKPOINTS / str(step)
    path = _sums_path(folder)
    if not path.exists():
        return ""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        return f"{path.name} cannot be read: {first_line(error)}"
    lines = [_SUM.fullmatch(line) for line in text.splitlines()]
    if not all(lines) or not text.endswith("\n"):
        return f"{path.name} is cut or not a list of checksums"
    sums = {line["name"]: line["sum"] for line in lines if line["name"].startswith("../") == of_run}
    if not of_run:
        if other := [name.split("/")[0] for name in sums if not name.startswith(f"{step}/")]:
            return f"it is the checkpoint of step {other[0]}"
    if not isinstance(folder, Path):
        return _object_difference(sums, _object_sums(workdir, step), of_run)
    if not of_run:
        there = {
            os.path.relpath(path, folder.parent)
            for path in folder.rglob("*")
            if path.is_file() and not _later(path.name)
        }
        if unknown := sorted(there - sums.keys()):
            return f"{SUMS} lacks {unknown[0]}"
    for name, sha256 in sums.items():
        path = workdir / CHECKPOINTS / name
        if not path.is_file():
            return f"{path.name} is missing"
        if (
            not (small_files_only and path.stat().st_size > _SMALL_BYTES)
            and file_sha256(path) != sha256
        ):
            return f"{path.name} has another checksum"
    return ""


def _object_difference(sums: dict[str, str], there: dict[str, str], of_run: bool) -> str:
    for name, checksum in sums.items():
        if name not in there:
            return f"{name.split('/')[-1]} is missing"
        if there[name] != checksum:
            return f"{name.split('/')[-1]} has another checksum"
    unknown = (
        [] if of_run else sorted(name for name in there if name[0] != "." and name not in sums)
    )
    return f"{OBJECT_SUMS} lacks {unknown[0]}" if unknown else ""


def check_undamaged(workdir: Path, step: int, *, small_files_only: bool = False) -> None:
    """Refuse a changed checkpoint, a checkpoint of another step, and changed files of the run.

    Raises:
      InputError: names the file and the remedy.
    """
    if difference := _difference(workdir, step, of_run=False, small_files_only=small_files_only):
        raise damaged(workdir, step, difference)
    if difference := _difference(workdir, step, of_run=True):
        raise InputError(
            f"{workdir} is damaged ({difference}; it was not when checkpoint {step} was saved); "
            "bring back a copy of it"
        )


def check_all_undamaged(workdir: Path, except_steps: Sequence[int] = ()) -> None:
    """Refuse a run with a damaged checkpoint.

    All files of the newest checkpoint are compared, and the small files of all others.

    Raises:
      InputError: names the file and the remedy.
    """
    steps = [step for step in step_numbers(workdir) if step not in except_steps]
    for step in steps:
        check_undamaged(workdir, step, small_files_only=step != steps[-1])


def newest_vouched_for(workdir: Path) -> int | None:
    """Step of the newest checkpoint whose checksums are there and agree with its small files; None
    if there is none."""
    for step in reversed(step_numbers(workdir)):
        if _sums_path(workdir / CHECKPOINTS / str(step)).exists():
            if not _difference(workdir, step, of_run=False, small_files_only=True):
                return step
    return None


def damaged_steps(workdir: Path) -> list[int]:
    """Steps of the damaged checkpoints of a run that has a good one.

    Raises:
      InputError: all are damaged.
    """
    steps = step_numbers(workdir)
    damaged_ones = [step for step in steps if is_damaged(workdir, step)]
    if steps and damaged_ones == steps:
        raise InputError(
            f"all checkpoints of {workdir} are damaged; start again in another --workdir"
        )
    return damaged_ones


def set_aside(workdir: Path, steps: Sequence[int]) -> None:
    """Move checkpoints into `damaged_checkpoints/`: the run then resumes from the last one that
    stays."""
    for step in steps:
        (workdir / SET_ASIDE).mkdir(exist_ok=True)
        source = workdir / CHECKPOINTS / str(step)
        move_checkpoint(source, _free(workdir / SET_ASIDE / str(step)))


def _free(path: Path) -> Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('_')[0]}_{number}")
    return path


def is_damaged(workdir: Path, step: int) -> bool:
    """Whether a checkpoint differs from its checksums or, without any, cannot be read as a
    whole."""
    folder = workdir / CHECKPOINTS / str(step)
    if _sums_path(folder).exists():
        return bool(_difference(workdir, step, of_run=False))
    try:
        stored = ocp.checkpointables_metadata(absolute(folder)).metadata["state"]
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        template = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in stored.items()
        }
        ocp.load_checkpointables(absolute(folder), {"state": template})
        return False
    except Exception:  # Orbax raises many types, bare `Exception` among them
        return True


def damaged(workdir: Path, step: int, reason: Exception | str) -> InputError:
    """The error that names a damaged checkpoint, the good ones and how to use them."""
    reason = reason if isinstance(reason, str) else first_line(reason)
    others = [
        other
        for other in step_numbers(workdir)
        if other != step and not _difference(workdir, other, of_run=False)
    ]
    remedy = "no other one is good; train again in another --workdir"
    if others:
        remedy = (
            f"good ones are: {', '.join(map(str, others))}; --checkpoint={LAST_GOOD} takes the "
            "last of them, and ctssl_jax.train --set_aside_damaged resumes from it"
        )
    return InputError(f"checkpoint {step} of {workdir} is damaged ({reason}); {remedy}")


def first_line(error: Exception) -> str:
    """Type and first line of an error, for a message of one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
