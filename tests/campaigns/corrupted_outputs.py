r"""Damaged datasets and runs: every command that reads them names the damage in one line.

    python -m tests.campaigns.corrupted_outputs --num_corruptions=300 --seed=0

Corruption number i of a seed is always the same. One file of a tiny dataset or of a tiny trained
run gets flipped bits, loses its end or a part of it to zeros, is removed, or changes places with
another file of its kind. Then a command reads it, as its command line would: `describe --verify`,
train (which resumes the run), evaluate, embed or export. It must name the file, or its checkpoint,
in one line. Otherwise its result must equal the result of the undamaged files, since it may not
read this file. `describe --verify` must always name a damage of a dataset.
"""

import argparse
import collections
import contextlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference.embedding import embed
from ctssl_jax.parallel import mesh
from ctssl_jax.release.exporting import export
from ctssl_jax.runs.checkpoints import Checkpoints
from ctssl_jax.runs.reports import Reports
from ctssl_jax.runs.run import open_workdir, to_json
from ctssl_jax.runs.scores import make_score
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.loop import train
from ctssl_jax.training.recipe import check_dataset
from ctssl_jax.training.step import make_program
from ctssl_jax.training.warm_start import record
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS
from data_prep.dataset.verify import verify
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import write_json
from data_prep.system.workers import WorkerPool
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import saved_state, tiny_config

DEFECTS = ("exception", "several lines", "not named", "wrong result", "not verified")
STEPS, MORE_STEPS = 4, 6
OF_DATASETS = ("verify", "train", "evaluate", "embed")
OF_RUNS = ("train", "evaluate", "embed", "export")
COMMANDS = tuple(dict.fromkeys(OF_DATASETS + OF_RUNS))


class Corruption(NamedTuple):
    """The damage of `run/...` or `dataset/...`, and the command that then read it."""

    kind: str
    path: str
    command: str


class Sound(NamedTuple):
    """The undamaged folder with `run` and `dataset`, and the result of each command."""

    folder: Path
    results: dict[str, Any]


def make_sound(folder: Path, commands: Sequence[str] = COMMANDS) -> Sound:
    """A tiny dataset, a run with three checkpoints on it, and the results of the commands."""
    dataset = write_example_dataset(folder / "dataset", image_size=16, slice_labels=True)
    save_run(_config(dataset, STEPS), folder / "run")
    results = {}
    with WorkerPool(1) as pool:
        for name in commands:
            shutil.copytree(folder, work := folder.with_name("sound_copy"))
            results[name] = _result(name, work, pool)
            shutil.rmtree(work)
    return Sound(folder, results)


def save_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """A run directory as training leaves it, with checkpoints of other weights at each step, but
    nothing is trained."""
    dataset = Dataset.open(config.dataset)
    channels = check_dataset(config, dataset, ("train", "validation"))
    patients = {name: [row["patient_id"] for row in dataset.volumes(name)] for name in SPLITS[:2]}
    open_workdir(workdir, config, dataset.preparation, patients)
    record(None, workdir)
    write_json(workdir / "training_data.json", {"train_fraction": 1.0})
    program = make_program(
        config, get_task(config.task), len(channels), mesh.make_mesh(jax.devices()[:1])
    )
    state, checkpoints = program.initial_state(), Checkpoints(workdir)
    metadata = {"config": to_json(config), "preparation": dataset.preparation}
    metrics = Reports(workdir, -1)
    for step, loss in ((1, 0.7), (2, 0.5), (STEPS, 0.6)):
        params = jax.tree.map(lambda leaf, factor=1 + step / 10: leaf * factor, state.params)
        checkpoints.save(
            step, state.replace(step=jnp.asarray(step, jnp.int32), params=params), metadata
        )
        checkpoints.score(make_score(config.best_by, False, {config.best_by: loss}))
        metrics.write("train", step, {"loss": loss})
    checkpoints.close()
    metrics.close()


# ---- the commands: folder -> a result that can be compared ---------------------------------------


def _config(dataset: Path, num_steps: int) -> ml_collections.ConfigDict:
    return tiny_config(dataset, num_steps=num_steps, eval_every=2, log_every=1, num_pictures=1)


def _result(command: str, folder: Path, pool: WorkerPool) -> Any:
    run, dataset = folder / "run", folder / "dataset"
    if command == "verify":
        return verify(Dataset.open(dataset), pool)
    if command == "train":
        train(_config(dataset, MORE_STEPS), run, jax.devices()[:1])
        return {name: array.tobytes() for name, array in saved_state(run, MORE_STEPS).items()}
    if command == "evaluate":
        return evaluate(run, dataset, "test", folder / "result.json")
    if command == "embed":
        embed(run, dataset, folder / "z.npz")
        with np.load(folder / "z.npz") as arrays:
            return {name: array.tobytes() for name, array in arrays.items()}
    return export(run, folder / "exported", ("safetensors",), "CC0-1.0", num_test_slices=1)


# ---- corruptions ---------------------------------------------------------------------------------


def _flipped(data: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(random.integers(1, 5)):
        changed[random.integers(len(data))] ^= 1 << random.integers(8)
    return bytes(changed)


def _cut(data: bytes, random: np.random.Generator) -> bytes:
    return data[: random.integers(len(data))]


def _zeroed(data: bytes, random: np.random.Generator) -> bytes:
    start = random.integers(len(data))
    return data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :]


CONTENT = {"flipped": _flipped, "cut": _cut, "zeroed": _zeroed}
KINDS = ("flipped", "flipped", "cut", "zeroed", "removed", "swapped")


def corrupt(folder: Path, random: np.random.Generator, commands: Sequence[str]) -> Corruption:
    """Damage one file of `folder`/run or `folder`/dataset, and choose which of the commands reads
    it."""
    part = ("dataset", "run")[random.integers(2)]
    kind, files = (
        str(random.choice(KINDS)),
        [p for p in sorted((folder / part).rglob("*")) if p.is_file()],
    )
    files = [
        path for path in files if "tensorboard" not in path.parts and "pictures" not in path.parts
    ]
    path = files[random.integers(len(files))]
    of_part = OF_DATASETS if part == "dataset" else OF_RUNS
    command = str(random.choice([name for name in of_part if name in commands]))
    if kind == "swapped":
        alike = [other for other in files if other.suffix[:6] == path.suffix[:6] and other != path]
        other = alike[random.integers(len(alike))] if alike else files[0]
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
        return Corruption(kind, f"{path.relative_to(folder)} {other.relative_to(folder)}", command)
    if kind == "removed" or not path.stat().st_size:
        path.unlink()
        return Corruption("removed", str(path.relative_to(folder)), command)
    path.write_bytes(CONTENT[kind](path.read_bytes(), random))
    return Corruption(kind, str(path.relative_to(folder)), command)


def names_damage(message: str, corruption: Corruption) -> bool:
    """Whether a message names a damaged file: itself, or the checkpoint that it is part of."""
    for path in corruption.path.split():
        step = re.match(r"run/checkpoints/(\d+)/", path)
        if Path(path).name in message or (step and f"checkpoint {step[1]} of" in message):
            return True
    return False


def outcome(
    sound: Sound, work: Path, random: np.random.Generator, pool: WorkerPool
) -> tuple[str, Corruption]:
    """The outcome of a corruption: "named", "same result" or a name of `DEFECTS`."""
    shutil.copytree(sound.folder, work)
    corruption = corrupt(work, random, tuple(sound.results))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = _result(corruption.command, work, pool)
    except (InputError, RunFailed, OSError) as error:  # of which the command lines make one line
        message = str(error)
    except Exception as error:
        return f"exception {type(error).__name__}: {str(error)[:150]}", corruption
    else:
        if result == sound.results[corruption.command]:
            changed = any(
                not _same(work / path, sound.folder / path) for path in corruption.path.split()
            )
            return (
                "not verified" if corruption.command == "verify" and changed else "same result"
            ), corruption
        if corruption.command != "verify":
            return "wrong result", corruption
        message = result[0]
    if "\n" in message:
        return "several lines", corruption
    return (
        "named" if names_damage(message, corruption) else f"not named: {message[:200]}"
    ), corruption


def _same(path: Path, other: Path) -> bool:
    return path.is_file() and path.read_bytes() == other.read_bytes()


def run(
    sound: Sound, num_corruptions: int, seed: int, first: int = 0
) -> list[tuple[str, Corruption]]:
    """Outcome and corruption, one after the other."""
    found = []
    with WorkerPool(1) as pool:
        for number in range(first, first + num_corruptions):
            work = sound.folder.with_name(f"work_{number}")
            found.append(outcome(sound, work, np.random.default_rng([seed, number]), pool))
            shutil.rmtree(work)
    return found


def defects(found: list[tuple[str, Corruption]]) -> list[tuple[str, Corruption]]:
    """The outcomes that must not occur."""
    return [(text, corruption) for text, corruption in found if text.startswith(DEFECTS)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_corruptions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--commands", default=",".join(COMMANDS), help="of these, separated by commas"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first corruption")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sound = make_sound(Path(folder) / "sound", given.commands.split(","))
        found = run(sound, given.num_corruptions, given.seed, given.first)
    counts = collections.Counter(
        (corruption.path.split("/")[0], corruption.command, corruption.kind, text.split(":")[0])
        for text, corruption in found
    )
    for (part, command, kind, text), number in sorted(counts.items()):
        print(f"{number:6} {part:8} {kind:8} {command:9} {text}")
    print(dict(collections.Counter(text.split(":")[0] for text, _ in found)))
    for text, corruption in defects(found):
        print(f"DEFECT {corruption.kind} {corruption.path}, {corruption.command}: {text}")
    return 1 if defects(found) else 0


if __name__ == "__main__":
    sys.exit(main())
