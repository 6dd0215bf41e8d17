r"""`kill -9` of trainings on `gs://` between two requests, then to the end: the same result.

    python -m tests.campaigns.object_store_kills --num_kills=100 --seed=0

The bucket is emulated on this machine (tests/helpers/bucket.py). The server ends the training when
it gets a writing or deleting request whose number was drawn, before or after it acts on it. So the
points are spread over all requests of checkpoints, scores, retention, reports, pictures and lock.
The training then starts again in the same run directory, is killed again, and at last runs through.

Compared with an undisturbed run: each tensor of the last checkpoint, the steps that are kept, every
score and the choice of the best one, and each line of metrics.jsonl without its times. After each
kill the last complete checkpoint is at least as new as before.
"""

import argparse
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.helpers import bucket

STEPS = 8
_WRITING = ("POST", "PUT", "DELETE", "PATCH")


class Killer:
    """Ends a process when the server gets its writing request of some number."""

    def __init__(self) -> None:
        self.count, self.number, self.process, self.after = 0, 0, 0, False
        self.lock, self.last = threading.Lock(), ""

    def aim(self, process: int, number: int, after: bool) -> int:
        """From the next request on; returns the number of requests since the last call."""
        with self.lock:
            counted, self.count = self.count, 0
            self.number, self.process, self.after = number, process, after
            return counted

    def strike(self, request: str, after: bool) -> bool:
        with self.lock:
            if not after:
                self.count += 1
            if not (self.process and self.count == self.number and after == self.after):
                return False
            os.kill(self.process, signal.SIGKILL)
            self.process, self.last = 0, request
            return True


def watched(killer: Killer) -> Any:
    """The server, whose requests the killer sees."""
    server = bucket.make_server()
    from gcp_storage_emulator import server as module

    handle = module.Router.handle

    def counted(router: Any, method: str) -> None:
        writes = method in _WRITING
        request = f"{method} {router._request_handler.path}"
        if writes and killer.strike(request, after=False):
            return  # as if it had not arrived
        handle(router, method)
        if writes:
            killer.strike(request, after=True)

    module.Router.handle = counted
    return server


_CHILD = """
import pickle, sys
from tests.campaigns import object_store_kills
result = getattr(object_store_kills, sys.argv[2])(*sys.argv[3:])
with open(sys.argv[1], "wb") as file:
    pickle.dump(result, file)
"""


def in_child(name: str, *arguments: str, killed_at: tuple[Killer, int, bool] | None = None) -> Any:
    """The result of a function of this file in a process of its own; None if it was killed."""
    with tempfile.NamedTemporaryFile() as file:
        child = subprocess.Popen([sys.executable, "-c", _CHILD, file.name, name, *arguments])
        if killed_at:
            killer, number, after = killed_at
            killer.aim(child.pid, number, after)
        if child.wait() == -signal.SIGKILL:
            return None
        assert child.returncode == 0, f"{name} failed; its message is above"
        return pickle.load(file)


def train(workdir: str, dataset: str) -> bool:
    """Train to the end, silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from ctssl_jax.parallel.processes import configure_jax
    from ctssl_jax.training.loop import train
    from tests.helpers.training_runs import tiny_config

    configure_jax()
    config = tiny_config(Path(dataset), num_steps=STEPS, eval_every=2, log_every=2)
    return train(config, workdir)


def result(workdir: str) -> dict[str, Any]:
    """What a finished run must have in common with an undisturbed one."""
    import jax
    import numpy as np

    from ctssl_jax.runs import checkpoints, damage
    from ctssl_jax.runs.directory import run_directory

    folder = run_directory(workdir)
    steps = damage.step_numbers(folder)
    shapes = checkpoints.ocp.checkpointables_metadata(folder / damage.CHECKPOINTS / str(steps[-1]))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = checkpoints.restore(
        folder,
        steps[-1],
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name, leaf in shapes.metadata["state"].items()
        },
    )
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + np.asarray(state[name]).tobytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = ("kind", "step", "loss", "mse", "masked_mse", "ssim")
    return {
        "steps": steps,
        "tensors": digest.hexdigest(),
        "best": checkpoints.choose(folder, "best"),
        "scores": [checkpoints.choose(folder, str(step)).score for step in steps],
        "lines": [[line.get(name) for name in numbers] for line in lines],
        "objects": sorted({path.name for path in (folder / damage.CHECKPOINTS).iterdir()}),
    }


def last_step(workdir: str) -> int:
    """Step of the last complete checkpoint; 0 before the first one."""
    from ctssl_jax.runs import damage
    from ctssl_jax.runs.directory import run_directory

    return max(damage.step_numbers(run_directory(workdir)), default=0)


def run(num_kills: int, seed: int, dataset: Path) -> int:
    """Kill, compare, and print a line a round; returns the number of kills."""
    killer, draw = Killer(), random.Random(seed)
    server = watched(killer)
    server.start()
    while server._api._httpd is None:
        threading.Event().wait(0.01)
    server._api._httpd.handle_error = lambda *connection: None  # of a killed process
    os.environ.update(bucket.environment(server._api._httpd.server_address[1]))

    reference = f"gs://{bucket.BUCKET}/reference"
    in_child("train", reference, str(dataset), killed_at=(killer, 0, False))
    number_of_requests = killer.aim(0, 0, False)
    wanted = in_child("result", reference)
    print(f"undisturbed: {number_of_requests} writing requests, steps {wanted['steps']}")
    kills, rounds = 0, 0
    while kills < num_kills:
        workdir, last, points = f"gs://{bucket.BUCKET}/run{rounds}", 0, []
        while True:
            point = (killer, draw.randint(1, number_of_requests), draw.random() < 0.5)
            if kills == num_kills or len(points) > 8:
                point = (killer, 0, False)
            if in_child("train", workdir, str(dataset), killed_at=point) is not None:
                break
            kills += 1
            points.append(killer.last.split("?")[0][-60:])
            before, last = last, in_child("last_step", workdir)
            assert last >= before, f"{workdir} lost step {before}: {points}"
        found = in_child("result", workdir)
        different = [name for name in wanted if found[name] != wanted[name]]
        assert not different, f"{workdir} differs in {different} after {points}"
        rounds += 1
        print(f"{kills} kills, {rounds} runs, none different", flush=True)
    server.stop()
    return kills


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    from tests.helpers.example_dataset import write_example_dataset

    with tempfile.TemporaryDirectory() as folder:
        dataset = write_example_dataset(Path(folder) / "dataset", image_size=16)
        print(
            f"{run(flags.num_kills, flags.seed, dataset)} kills: no checkpoint lost, no result "
            "different"
        )


if __name__ == "__main__":
    main()
