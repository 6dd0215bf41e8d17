"""A Dask cluster of real processes on addresses of its own, to be disturbed and killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


class Cluster:
    """`dask scheduler` on 127.0.0.1, and `dask worker` with its nanny on 127.0.0.2, 127.0.0.3, ...

    Each process has a process group of its own and a log. Use as a context manager.
    """

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.address = f"tcp://127.0.0.1:{port}"
        self.processes: dict[str, subprocess.Popen] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start_scheduler(self, **settings: str) -> None:
        """Waits until it listens. `settings`: variables of its environment."""
        options = ["--host=127.0.0.1", f"--port={self.port}", "--no-dashboard", "--no-show"]
        self._start("scheduler", ["scheduler", *options], settings)
        deadline = time.monotonic() + 120
        while "Scheduler at" not in self.log("scheduler"):
            assert time.monotonic() < deadline, self.log("scheduler")
            time.sleep(0.05)

    def start_worker(
        self, number: int, *options: str, before: tuple[str, ...] = (), **settings: str
    ) -> None:
        """Does not wait. `options`: of `dask worker`; `before`: the command line that starts it,
        such as `prlimit`; `settings`: variables of its environment."""
        name = f"worker-{number}"
        command = ["worker", self.address, f"--host=127.0.0.{number + 1}", f"--name={name}"]
        command += ["--nthreads=1", "--no-dashboard", f"--local-directory={self.folder / name}"]
        settings = {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"} | settings
        self._start(name, [*command, *options], settings, before)

    def _start(
        self,
        name: str,
        command: list[str],
        settings: dict[str, str],
        before: tuple[str, ...] = (),
    ) -> None:
        path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*before, sys.executable, "-m", "dask", *command],
                env=os.environ | {"PYTHONPATH": path} | settings,
                cwd=self.folder,  # `-m` puts it before PYTHONPATH
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        """What a process has said, all that were started under this name."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """Ends a process with its whole group: a worker with its nanny, as a machine that is
        lost."""
        process = self.processes.pop(name)
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            pass
        process.wait()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.processes):
            self.kill(name)
