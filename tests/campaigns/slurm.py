r"""The Slurm recipes of the documents, word for word but for GPUs, on a real Slurm of two nodes.

    python -m tests.campaigns.slurm
        [--only=stopped,first_second,time_limit,node_failure,array,manifest]

Two `slurmd` run on this machine; needs root and Debian's packages slurm-wlm and munge. Every job
trains a tiny model in two tasks, one a node. It must end as completed, with the training losses of
a job that nothing disturbed. `manifest` is the array of preparation: two of its eight tasks are
killed, so that its last job does not start; they run again, one other twice, and the dataset has
the bytes of one run.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import dicom_files, example_dataset, training_runs

PROJECT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 900.0  # of a job
CONFIGURATION = """
ClusterName=campaign
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=46817
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.1.1 Port=46818 CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.1.2 Port=46819 CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODES = ("node1", "node2")
# In place of the recipe's words: a tiny model, no GPU.
TINY = {
    "--nodes=4": "--nodes=2",
    "--gres=gpu:8 ": "",
    "--gres=gpu:1 ": "",
    "--cpus-per-task=32": "--cpus-per-task=2",
    "--cpus-per-task=16": "--cpus-per-task=2",
    "--config.dtype=bfloat16": "--config.num_steps=60 --config.eval_every=20",
    "--config.batch_size=256": "--config.batch_size=16 --config.log_every=10",
}


class Slurm:
    """A Slurm of two nodes in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        host = subprocess.check_output(["hostname", "-s"], text=True).strip()
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host))
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"], check=True)
        subprocess.run(["slurmctld", "-c"], check=True)
        time.sleep(2)
        for node in NODES:
            self.start(node)
        self.until(lambda: self.say("sinfo", "-h", "-o", "%T") == "idle", 30)

    def start(self, node: str) -> None:
        """Start the daemon of a node."""
        subprocess.run(["slurmd", "-N", node], check=True)

    def end(self, node: str) -> None:
        """The node dies: its daemon and all tasks on it get SIGKILL."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        for process in [daemon, *self.processes_on(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes_on(self, node: str) -> list[int]:
        """Processes that Slurm started there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={node}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def close(self) -> None:
        """End all daemons and jobs."""
        subprocess.run(["scancel", "--full", "--state=RUNNING"], capture_output=True)
        subprocess.run(["scancel", "-u", "root"], capture_output=True)
        time.sleep(3)
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(1)

    def say(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def state(self, job: str) -> str:
        """State, exit code and restarts of a job."""
        shown = self.say("scontrol", "show", "job", job)
        fields = [re.search(rf"{name}=(\S+)", shown) for name in ("JobState", "ExitCode")]
        restarts = re.search(r"Restarts=(\d+)", shown)
        return " ".join(field[1] for field in [*fields, restarts] if field)

    def until(self, true: Callable[[], bool], seconds: float = MOST_SECONDS) -> None:
        """Wait.

        Raises:
          TimeoutError: it did not come true.
        """
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {self.say('squeue')}")
            time.sleep(0.1)

    def until_complete(self, job: str) -> None:
        """Wait for the end of a job that may be requeued."""
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.until(lambda: self.state(job).startswith(ended))


def recipes() -> list[str]:
    """The documents' scripts for `sbatch`: of several nodes, and of an array."""
    text = (PROJECT / "ctssl_jax" / "parallel" / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [block for block in blocks if "#SBATCH" in block]


def tiny(recipe: str, dataset: Path, workdir: Path, **words: str) -> str:
    """A recipe with paths, and a tiny model in place of its GPU lines."""
    flags = [
        f"--config.{name}={value}"
        for name, value in training_runs.TINY.items()
        if name not in ("batch_size", "num_steps", "eval_every", "log_every", "reading_threads")
    ]
    replaced = {
        **TINY,
        "--config.reading_threads=16": "--config.reading_threads=1 " + shlex.join(flags),
        "DATASET": str(dataset),
        "RUN ": f"{workdir} ",
        "STUDY": str(workdir),
        **words,
    }
    for old, new in replaced.items():
        recipe = recipe.replace(old, new)
    return recipe


def losses(workdir: Path) -> list[tuple[int, float]]:
    """The training losses of a run, by step."""
    from ctssl_jax.runs import reports

    return [(line["step"], line["loss"]) for line in reports.read_reports(workdir, "train")]


class Jobs:
    """Jobs of the first recipe."""

    def __init__(self, slurm: Slurm, folder: Path, dataset: Path):
        self.slurm, self.folder, self.dataset = slurm, folder, dataset
        self.checkout = folder / "checkout"
        self.checkout.mkdir()
        for name in ("configs", "ctssl_jax", "data_prep", "experiments"):
            (self.checkout / name).symlink_to(PROJECT / name)
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        activate = f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
        (self.checkout / ".venv" / "bin" / "activate").write_text(activate)
        self.number = 0

    def submit(self, name: str, **words: str) -> tuple[str, Path, Path]:
        """Number, run directory and log of a new job."""
        workdir = self.folder / name
        script = self.checkout / f"{name}.sh"
        script.write_text(tiny(recipes()[0], self.dataset, workdir, **words))
        job = self.slurm.say("sbatch", "--parsable", f"--chdir={self.checkout}", str(script))
        assert job.isdigit(), job
        return job, workdir, self.checkout / f"ctssl-{job}.log"

    def stopped(self, name: str, when: Callable[[str, Path, Path], None], **words: str) -> Path:
        """A job that something disturbs; prints what became of it."""
        job, workdir, log = self.submit(name, **words)
        began = time.monotonic()
        when(job, workdir, log)
        asked = time.monotonic()
        self.slurm.until_complete(job)
        kept = [
            line
            for line in (log.read_text() if log.exists() else "").splitlines()
            if line.startswith(("stopped", "resuming", "finished", "error", "process", "waiting"))
        ]
        print(
            f"{name}: {self.slurm.state(job)}; disturbed after {asked - began:.1f} s, complete "
            f"{time.monotonic() - asked:.0f} s later"
        )
        for line in kept:
            print(f"    {line[:150]}")
        if not self.slurm.state(job).startswith("COMPLETED"):
            print(log.read_text()[-3000:])
        return workdir


def at_step(step: int) -> Callable[[Path], bool]:
    """Whether a log shows this step."""
    return lambda log: log.exists() and f"step {step}/" in log.read_text()


def check_curve(name: str, workdir: Path, expected: list[tuple[int, float]]) -> bool:
    """Whether a run has the losses of the undisturbed one."""
    same = losses(workdir) == expected
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    print(f"    losses {'equal' if same else 'DIFFER'}, checkpoints {steps}", flush=True)
    return same


def array(jobs: Jobs) -> bool:
    """The recipe of an array over the cells of a study, all of it."""
    study = jobs.folder / "study"
    small = [f"--override={flag}" for flag in ("model.hidden=(4,8)", "model.depth=1")]
    words = {
        "--size=reference --override=dtype=bfloat16": "--size=small --num_steps=4 "
        + shlex.join(small),
        "mask_05,mask_10,mask_20,mask_33 next_slice denoising rotation flip": "mask_05,mask_10 "
        "rotation",
        "| sed -n": "--size=small --num_steps=4 | sed -n",
        "STUDY": str(study),
        "table2 plan": f"table2 plan {shlex.join(small)}",
        r"\(cross_[a-z0-9_]*\)": r"\(cross_mask_05\|cross_rotation\)",
    }
    block = tiny(recipes()[1], jobs.dataset_64, study, **words)
    script = jobs.checkout / "array.sh"
    script.write_text("source .venv/bin/activate\n" + block)
    done = subprocess.run(["bash", str(script)], cwd=jobs.checkout, capture_output=True, text=True)
    print(done.stdout[-500:], done.stderr[-1500:])
    jobs.slurm.until(lambda: not jobs.slurm.say("squeue", "-h"))
    for log in sorted(jobs.checkout.glob("cell-*.log")):
        print(f"    {log.name}: {log.read_text().splitlines()[-1:]}")
    complete = sorted(path.stem for path in study.rglob("*.json"))
    print(f"array: {complete}", flush=True)
    return bool(complete)


def manifest(jobs: Jobs) -> bool:
    """The recipe of an array over a manifest, all of it."""
    scans, dataset = jobs.folder / "scans", jobs.folder / "prepared"
    for number in range(32):
        hu = dicom_files.thorax(20 + number % 5, seed=number)
        study = number - (number % 4 == 3)  # every fourth series is of the exam before it
        series = dicom_files.slices(
            hu, study=study + 1, series=number + 1, patient=f"patient-{study // 2}"
        )
        dicom_files.write(scans / f"{number:02d}", series)
    lines = [f"{folder}/" for folder in sorted(scans.iterdir())]
    (jobs.checkout / "nlst.txt").write_text("\n".join(lines) + "\n")
    ctssl = jobs.checkout / ".venv" / "bin" / "ctssl"
    ctssl.write_text('#!/bin/sh\nexec python -m ctssl_jax "$@"\n')
    ctssl.chmod(0o755)
    with open(jobs.checkout / ".venv" / "bin" / "activate", "a") as file:
        file.write(f'export PATH="{ctssl.parent}:$PATH"\n')
    text = (PROJECT / "data_prep" / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "#SBATCH" in b]
    options = ("--image_size=48", "--shard_size_mb=0.1")
    for old, new in {
        "--cpus-per-task=16": "--cpus-per-task=1",
        "--array=0-63": "--array=0-7",
        "--task_count=64": f"--task_count=8 --num_workers=1 {shlex.join(options)}",
        "/tmp/scans": str(jobs.folder / "scratch"),
        "=DATASET": f"={dataset}",
    }.items():
        assert old in block, old
        block = block.replace(old, new)
    slurm, script = jobs.slurm, jobs.checkout / "recipe.sh"
    script.write_text(block + "echo $tasks\n")

    def submit(*command: str) -> str:
        done = subprocess.run(command, cwd=jobs.checkout, capture_output=True, text=True)
        print(f"    {done.stdout.strip()[-200:]}{done.stderr.strip()[-300:]}")
        return done.stdout.split()[-1]

    tasks = submit("bash", str(script))
    killed: list[str] = []

    def kill_two() -> bool:
        for line in slurm.say("squeue", "-s", "-h", "-j", tasks, "-o", "%i").splitlines():
            name = line.split(".")[0]
            if line.endswith(".0") and name not in killed and len(killed) < 2:
                slurm.say("scancel", "--signal=KILL", name)
                killed.append(name)
        return len(killed) == 2

    slurm.until(kill_two)
    slurm.until(lambda: not slurm.say("squeue", "-h", "-j", tasks, "-o", "%i"))
    waiting = slurm.say("squeue", "-h", "-o", "%i %r")
    kept = not (dataset / "preparation.json").exists()
    print(f"    killed {killed}; then waits: {waiting}; no dataset yet: {kept}")
    slurm.say("scancel", "-u", "root")
    slurm.until(lambda: not slurm.say("squeue", "-h"))
    again = sorted({name.split("_")[1] for name in killed})
    other = next(str(n) for n in range(8) if str(n) not in again)
    second = submit("sbatch", "--parsable", f"--array={','.join([*again, other])}", "part.sh")
    submit("sbatch", f"--dependency=afterok:{second}", "assemble.sh")
    slurm.until(lambda: not slurm.say("squeue", "-h"))
    for log in sorted(jobs.checkout.glob("part-*.log")):
        print(f"    {log.name}: {log.read_text().splitlines()[-1:]}")
    one = jobs.folder / "one"
    key = f"--pseudonym_key_file={jobs.checkout / 'pseudonym_key'}"
    command = [sys.executable, "-m", "data_prep.prepare", f"--input_dir={scans}", key, *options]
    subprocess.run([*command, f"--output_dir={one}"], cwd=PROJECT, check=True, capture_output=True)
    names = {path.name for path in one.iterdir()}
    same = names == {path.name for path in dataset.iterdir()} and all(
        (one / name).read_bytes() == (dataset / name).read_bytes() for name in names
    )
    print(f"manifest: {len(names)} files, {'equal' if same else 'DIFFERENT'}", flush=True)
    return same and kept and len(again) == 2


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="stopped,first_second,time_limit,node_failure,array,manifest"
    )
    chosen = parser.parse_args().only.split(",")
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munge"))):
        sys.exit("needs root, and Debian's packages slurm-wlm and munge")
    if "CTSSL_NODES_ARE_NAMED" not in os.environ:  # in a mount namespace of this campaign
        os.environ["CTSSL_NODES_ARE_NAMED"] = "1"
        names = Path(tempfile.mkstemp(prefix="hosts")[1])
        own = subprocess.check_output(["hostname", "-s"], text=True).strip()
        names.write_text(f"127.0.0.1 localhost {own}\n127.0.1.1 node1\n127.0.1.2 node2\n")
        script = f'mount --bind {names} /etc/hosts && exec "$@"'
        command = [sys.executable, "-u", "-m", "tests.campaigns.slurm", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script, "sh", *command])
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.pop("PYTHONPATH", None)
    dataset = example_dataset.write_example_dataset(folder / "data", image_size=16)
    slurm = Slurm(folder / "cluster")
    jobs = Jobs(slurm, folder, dataset)
    good = True
    try:
        if "manifest" in chosen:
            good &= manifest(jobs)
        if chosen == ["manifest"]:
            return
        plain = jobs.stopped("undisturbed", lambda job, workdir, log: None)
        expected = losses(plain)
        assert expected[-1][0] == 60, expected

        def signalled(ready: Callable[[str, Path], bool], seconds: float = 0.0):
            def disturb(job: str, workdir: Path, log: Path) -> None:
                slurm.until(lambda: ready(job, log))
                time.sleep(seconds)
                slurm.say("scancel", "--signal=TERM", job)

            return disturb

        def step_begun(job: str, log: Path) -> bool:
            return f"{job}.0" in slurm.say("squeue", "-s", "-h", "-o", "%i")

        if "stopped" in chosen:
            name = "stopped"
            run = jobs.stopped(name, signalled(lambda job, log: at_step(30)(log)))
            good &= check_curve(name, run, expected)
        if "first_second" in chosen:
            for seconds in (0.0, 0.3, 1.0, 3.0):
                name = f"first_second_{seconds}"
                run = jobs.stopped(name, signalled(step_begun, seconds))
                good &= check_curve(name, run, expected)
        if "time_limit" in chosen:
            words = {"--time=12:00:00": "--time=3", "num_steps=60": "num_steps=1000"}
            words |= {"TERM@120": "TERM@60", "eval_every=20": "eval_every=1000"}
            run = jobs.stopped("time_limit", lambda job, workdir, log: None, **words)
            good &= losses(run)[-1][0] == 1000
        if "node_failure" in chosen:

            def node_dies(job: str, workdir: Path, log: Path) -> None:
                slurm.until(lambda: at_step(30)(log))
                slurm.end("node2")
                slurm.until(lambda: "down" in slurm.say("sinfo", "-h", "-n", "node2", "-o", "%T"))
                slurm.start("node2")

            run = jobs.stopped("node_failure", node_dies)
            good &= check_curve("node_failure", run, expected)
        if "array" in chosen:
            jobs.dataset_64 = example_dataset.write_example_dataset(
                folder / "data_64", image_size=64
            )
            good &= array(jobs)
    finally:
        slurm.close()
        if not good:
            sys.exit(1)


if __name__ == "__main__":
    main()
