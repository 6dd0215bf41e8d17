r"""A run of several hosts, each with an address and a name of its own: network namespaces.

    python -m tests.campaigns.hosts [--only=start,packet_loss,...] [--num_hosts=3]

Needs root, and Debian's packages iproute2 and iptables. Every scenario says in which time all
processes ended, with which exit codes, and their last lines:

    start          2 and 4 hosts train to the end, with the losses of one process
    packet_loss    3 % of all packets are dropped: the same losses
    stop           SIGTERM on one host: all save at the same step, exit code 75
    killed         SIGKILL on one host: the others end with 75
    link_down      the link of one host goes down: all end with 75
    disk_full      the part of the disk of one host is full: all end with 1, and name it
    not_shared     --workdir is another folder on one host: refused
    not_writable   one host may not write in --workdir: refused
    missing        one host does not come: its number is named
    contradiction  two hosts have the same number, or another number of hosts: refused
    no_name        the name of the coordinator does not resolve
    blocked        a firewall drops packets to the coordinator's port
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import example_dataset, training_runs

NETWORK = "10.77.0"
PORT = 7654
MOST_SECONDS = 600.0
TINY = {"batch_size": 12, "num_steps": 30, "log_every": 5, "eval_every": 10}
HEARTBEAT = "--heartbeat_timeout_seconds=15"


def ip(*arguments: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def network(number: int) -> Iterator[list[str]]:
    """Hosts on one bridge; yields their names, which are also those of their namespaces."""
    names, bridge = [f"ctssl-h{i}" for i in range(number)], "ctssl-br"
    addresses = "".join(f"{NETWORK}.{i + 1} {name}\n" for i, name in enumerate(names))
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"ctssl-v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"ctssl-v{i}", "master", bridge, "up")
            ip("-n", name, "address", "add", f"{NETWORK}.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / name  # mounted over /etc by `ip netns exec`
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + addresses)
        yield names
    finally:
        for i, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"ctssl-v{i}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


class Run:
    """A training on several hosts."""

    def __init__(self, folder: Path, dataset: Path, name: str):
        self.name, self.workdir, self.dataset = name, folder / name, dataset
        self.logs: list[Path] = []
        self.processes: list[subprocess.Popen] = []
        self.folder = folder

    def start(
        self,
        host: str,
        number: int,
        of: int,
        *,
        first: str = "true",
        address: str = f"{NETWORK}.1:{PORT}",
        **overrides,
    ) -> None:
        """Start one process on a host, after a shell command in its namespaces."""
        flags = [f"--coordinator_address={address}", f"--num_processes={of}"]
        flags += ["--distributed", f"--process_id={number}", HEARTBEAT]
        command = training_runs.command(self.dataset, self.workdir, *flags, **{**TINY, **overrides})
        script = f'hostname {host} && {first} && exec "$@"'
        log = self.folder / f"{self.name}.{number}.{len(self.logs)}.log"
        self.logs.append(log)
        self.processes.append(
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    host,
                    *"unshare --uts sh -c".split(),
                    script,
                    "sh",
                    *command,
                ],
                cwd=training_runs.PROJECT,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )

    def until(self, text: str, process: int = 0) -> None:
        """Wait for a text in the output of a process."""
        deadline = time.monotonic() + MOST_SECONDS
        while text not in self.logs[process].read_text():
            if time.monotonic() > deadline or self.processes[process].poll() is not None:
                raise TimeoutError(
                    f"{text!r} did not come: {self.logs[process].read_text()[-2000:]}"
                )
            time.sleep(0.05)

    def finish(self, event: str, ignored: tuple[int, ...] = ()) -> list[int]:
        """Wait for the end of all processes, and print it; the codes."""
        began, times = time.monotonic(), {}
        waited = [p for p in range(len(self.processes)) if p not in ignored]
        while len(times) < len(waited):
            for p in waited:
                if p not in times and self.processes[p].poll() is not None:
                    times[p] = time.monotonic() - began
            if time.monotonic() - began > MOST_SECONDS:
                break
            time.sleep(0.02)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        seconds = " ".join(f"{times[p]:.1f}" if p in times else "HANGS" for p in waited)
        codes = [process.returncode for process in self.processes]
        print(f"{self.name}: {event}; ended after {seconds} s, exit codes {codes}")
        for p in waited:
            lines = [
                line
                for line in self.logs[p].read_text().splitlines()
                if line.startswith(("error", "waiting", "stopped", "finished", "process "))
            ]
            for line in lines[-3:]:
                print(f"    {p}: {line[:300]}")
        sys.stdout.flush()
        return codes


def losses(workdir: Path) -> list[float]:
    """The losses that a run reported, in order."""
    return training_runs.losses(workdir)


def close(one: list[float], other: list[float]) -> bool:
    """Whether losses are equal up to the order of sums."""
    return len(one) == len(other) > 0 and all(
        abs(a - b) <= 2e-3 * abs(b) for a, b in zip(one, other, strict=True)
    )


def campaign(chosen: list[str], number: int, folder: Path) -> list[str]:
    """Run the chosen scenarios; names of those that ended otherwise than they should."""
    dataset = example_dataset.write_example_dataset(folder / "data", image_size=16)
    wrong = []

    def expect(name: str, good: bool) -> None:
        if not good:
            wrong.append(name)
            print(f"    WRONG: {name}", flush=True)

    with network(4) as hosts:
        endless = {"num_steps": 1_000_000}

        def started(name: str, of: int = number, **overrides) -> Run:
            run = Run(folder, dataset, name)
            for i in range(of):
                run.start(hosts[i], i, of, **overrides)
            return run

        reference: list[float] = []
        if {"start", "packet_loss"} & set(chosen):
            alone = subprocess.run(
                training_runs.command(dataset, folder / "alone", **TINY),
                cwd=training_runs.PROJECT,
                capture_output=True,
                text=True,
            )
            assert alone.returncode == 0, alone.stderr
            reference = losses(folder / "alone")
        if "start" in chosen:
            for of in (2, 4):
                codes = started(f"start_{of}", of).finish(f"{of} hosts")
                expect(
                    f"start_{of}",
                    codes == [0] * of and close(losses(folder / f"start_{of}"), reference),
                )
        if "packet_loss" in chosen:
            drop = ["-A", "INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random"]
            for host in hosts:
                command = ["ip", "netns", "exec", host, "iptables", *drop]
                subprocess.run([*command, "--probability", "0.03", "-j", "DROP"], check=True)
            codes = started("packet_loss").finish("3 % of all packets dropped")
            for host in hosts:
                subprocess.run(["ip", "netns", "exec", host, "iptables", "-F"], check=True)
            expect(
                "packet_loss",
                codes == [0] * number and close(losses(folder / "packet_loss"), reference),
            )
        if "stop" in chosen:
            run = started("stop", **endless)
            run.until("step 10/")
            run.processes[-1].send_signal(signal.SIGTERM)
            expect("stop", run.finish("SIGTERM to the last") == [75] * number)
        if "killed" in chosen:
            for which in (number - 1, 0):
                run = started(f"killed_{which}", **endless)
                run.until("step 10/")
                run.processes[which].kill()
                codes = run.finish(f"SIGKILL to {which}")
                codes.pop(which)
                expect(f"killed_{which}", codes == [75] * (number - 1))
        if "link_down" in chosen:
            run = started("link_down", **endless)
            run.until("step 10/")
            ip("link", "set", f"ctssl-v{number - 1}", "down")
            codes = run.finish(f"link of {number - 1} down")
            ip("link", "set", f"ctssl-v{number - 1}", "up")
            expect("link_down", codes == [75] * number)
        if "disk_full" in chosen:
            run = Run(folder, dataset, "disk_full")
            run.workdir.mkdir()
            part = folder / "part"
            part.mkdir()
            overlay = (
                f"mount -t tmpfs -o size=1m part {part} && mkdir {part}/upper {part}/work && "
                f"mount -t overlay -o lowerdir={run.workdir},upperdir={part}/upper,"
                f"workdir={part}/work overlay {run.workdir}"
            )
            begin = folder / "fill"
            wait = f"until [ -e {begin} ]; do sleep 0.1; done"
            fills = f"{overlay}; ({wait}; head -c 2m /dev/zero > {part}/upper/filler) &"
            for i in range(number):
                first = "true" if i < number - 1 else f"{fills} true"
                run.start(hosts[i], i, number, first=first, **endless)
            run.until("step 10/")
            begin.touch()
            codes = run.finish("the disk of the last one fills")
            expect("disk_full", codes == [1] * number)
        if "not_shared" in chosen:
            run = Run(folder, dataset, "not_shared")
            run.workdir.mkdir()
            own = f"mount -t tmpfs own {run.workdir}"
            for i in range(number):
                run.start(hosts[i], i, number, first="true" if i < number - 1 else own)
            expect("not_shared", run.finish("another folder on the last") == [2] * number)
        if "not_writable" in chosen:
            run = Run(folder, dataset, "not_writable")
            run.workdir.mkdir()
            own = f"mount --bind {run.workdir} {run.workdir}"
            own += f" && mount -o remount,bind,ro {run.workdir}"
            for i in range(number):
                run.start(hosts[i], i, number, first="true" if i < number - 1 else own)
            expect("not_writable", run.finish("read-only on the last") == [2] * number)
        if "missing" in chosen:
            run = Run(folder, dataset, "missing")
            for i in range(number - 1):
                run.start(hosts[i], i, number)
            expect("missing", run.finish("the last does not come") == [2] * (number - 1))
        if "contradiction" in chosen:
            run = Run(folder, dataset, "contradiction")
            for i in range(number):
                run.start(hosts[i], min(i, number - 2), number)
            codes = run.finish(f"two have the number {number - 2}")
            expect("contradiction", codes == [2] * number)
            run = Run(folder, dataset, "contradiction_of_numbers")
            for i in range(number):
                run.start(hosts[i], i, number + (i == number - 1))
            codes = run.finish("the last one expects another one")
            expect("contradiction_of_numbers", codes == [2] * number)
        if "no_name" in chosen:
            run = started("no_name", address=f"nowhere.invalid:{PORT}")
            expect("no_name", run.finish("a name that does not resolve") == [2] * number)
        if "blocked" in chosen:
            firewall = f"iptables -A INPUT -i eth0 -p tcp --dport {PORT} -j DROP"
            run = Run(folder, dataset, "blocked")
            for i in range(number):
                run.start(hosts[i], i, number, first=firewall if i == 0 else "true")
            expect("blocked", run.finish("the port of process 0 is blocked") == [2] * number)
            subprocess.run(["ip", "netns", "exec", hosts[0], "iptables", "-F"], check=True)
    return wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = "start packet_loss stop killed link_down disk_full not_shared not_writable missing"
    every = ",".join([*names.split(), "contradiction", "no_name", "blocked"])
    parser.add_argument("--only", default=every)
    parser.add_argument("--num_hosts", type=int, default=3)
    given = parser.parse_args()
    if os.geteuid() or not all(map(shutil.which, ("ip", "iptables", "unshare"))):
        sys.exit("needs root, and Debian's packages iproute2 and iptables")
    folder = Path(tempfile.mkdtemp(prefix="hosts"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    wrong = campaign(given.only.split(","), given.num_hosts, folder)
    print("wrong: " + ", ".join(wrong) if wrong else "all as they should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
