r"""Array jobs over a manifest of 200 series behind servers that lose, under `kill -9`.

    python -m tests.campaigns.array_jobs [--num_series=200] [--num_kills=20] [--seed=0]
        [--only=http,s3]

http: a table of URLs with sizes and SHA-256 on a web server. s3: lines of s5cmd with wildcards,
listed anonymously on moto's server behind a proxy that loses (skipped without s3fs and moto). Both
lose some files for good (not found, no rights, cut off, changed, silent) and some at the first
request. Tasks are killed at random moments, and one runs twice at the same time.

The entries that lost a file for good are named, each by its line and reason, and no others. The
dataset of the rest is that of one `prepare` over the rest, to the byte; and, once the servers lose
nothing more, that of one that grew. What lies in the scratch folder is measured all the time,
against workers x tasks x the largest series. Staged entries are not downloaded again.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import http.server
import importlib.util
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import dicom_files

PROJECT = Path(__file__).resolve().parents[2]
NUM_TASKS, NUM_WORKERS, AT_A_TIME = 4, 2, 2
TIMEOUT_S = 2.0
FOR_GOOD = {  # what happens to a file -> what the task says
    "missing": "not found",
    "no_rights": "no permission to read it",
    "cut_off": "was cut off, 3 times",
    "changed": "has another sha256 than the manifest says",
    "silent": "no answer in time, 3 times",
}
ONCE = ("cut_off", "unavailable", "silent")
OPTIONS = ("--image_size=48", "--shard_size_mb=0.3", "--splits=0.8,0.1,0.1")


def make_archive(folder: Path, num_series: int) -> list[Path]:
    """Folders of series; some exams have two, some patients two spellings, some are too short."""
    made = []
    for number in range(num_series):
        study = number - 1 if number % 5 == 4 else number  # the second reconstruction of an exam
        slices = 8 if number % 17 == 16 else 20 + number % 7
        patient = f"patient-{study // 2}"
        hu = dicom_files.thorax(slices, size=48, seed=number)
        series = dicom_files.slices(
            hu,
            study=study + 1,
            series=number + 1,
            patient=patient.upper() if number % 29 == 7 else patient,
        )
        for dataset in series:
            dataset.ConvolutionKernel = "BONE" if number % 5 == 3 else "STANDARD"
        made.append(dicom_files.write(folder / f"series{number:03d}", series))
    return made


class Losing(http.server.BaseHTTPRequestHandler):
    """A web server of a folder, or a proxy of another server, that loses."""

    def __init__(self, folder: Path | None, upstream: str, state: "State", *arguments):
        self.folder, self.upstream, self.state = folder, upstream, state
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        loss = self.state.loss(path) if self.command == "GET" else ""
        status, headers, content = self._answer(path)
        if loss in ("missing", "no_rights", "unavailable"):
            status = {"missing": 404, "no_rights": 403, "unavailable": 503}[loss]
            content = b""
        with contextlib.suppress(OSError):
            if loss == "silent":
                self.state.end.wait(2 * TIMEOUT_S)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if loss == "cut_off":
                content = content[: len(content) // 2]
                self.close_connection = True
            elif loss == "changed":
                content = content[:-1] + bytes([content[-1] ^ 1])
            if self.command == "GET":
                self.wfile.write(content)

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.folder is not None:
            return 200, {}, (self.folder / path.lstrip("/")).read_bytes()
        request = urllib.request.Request(self.upstream + self.path, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                kept = {"Content-Type", "ETag", "Last-Modified", "Content-Range"}
                headers = {k: v for k, v in answer.headers.items() if k in kept}
                return answer.status, headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read()

    def log_message(self, *arguments):
        pass


class State:
    """What a server loses, and how often each file was asked for."""

    def __init__(self, for_good: dict[str, str], once: dict[str, str]):
        self.for_good, self.once = for_good, once
        self.requests: collections.Counter[str] = collections.Counter()
        self.end = threading.Event()
        self._lock = threading.Lock()

    def loss(self, path: str) -> str:
        with self._lock:
            self.requests[path] += 1
            return self.for_good.get(path) or self.once.pop(path, "")


@contextlib.contextmanager
def serving(folder: Path | None, upstream: str, state: State) -> Iterator[str]:
    handler = functools.partial(Losing, folder, upstream, state)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        state.end.set()
        server.shutdown()


class Disk(threading.Thread):
    """The most bytes that lay in a folder."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most, self.samples, self.over = folder, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            total = 0
            for root, _, names in os.walk(self.folder):
                for name in names:
                    with contextlib.suppress(OSError):
                        total += os.lstat(os.path.join(root, name)).st_size
            self.most, self.samples = max(self.most, total), self.samples + 1
            time.sleep(0.005)


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Part:
    """One manifest, its tasks and what they made."""

    def __init__(self, folder: Path, name: str, manifest: Path, key: Path, *flags: str):
        self.name, self.dataset, self.scratch = name, folder / name, folder / f"{name}-scratch"
        self.scratch.mkdir()
        self.command = [
            *(sys.executable, "-m", "data_prep.prepare", f"--manifest={manifest}", *OPTIONS),
            *(f"--pseudonym_key_file={key}", f"--output_dir={self.dataset}"),
            *(f"--download_dir={self.scratch}", f"--num_workers={NUM_WORKERS}"),
            *("--remove_downloads", f"--read_timeout={TIMEOUT_S}", *flags),
        ]
        self.kills = self.completed = 0

    def start(self, task: int) -> subprocess.Popen:
        flags = (f"--task_index={task}", f"--task_count={NUM_TASKS}")
        return subprocess.Popen(
            [*self.command, *flags],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run_tasks(self, num_kills: int, chance: random.Random) -> dict[int, str]:
        """Runs the tasks in random order, two at a time, and kills them; what each said at last."""
        said: dict[int, str] = {}
        left = chance.sample(range(NUM_TASKS), NUM_TASKS)
        left.insert(chance.randrange(NUM_TASKS), left[0])  # twice, perhaps at the same time
        while left:
            started = [(task, self.start(task)) for task in left[:AT_A_TIME]]
            left = left[AT_A_TIME:]
            for task, process in started:
                if self.kills < num_kills and self._killed(process, chance.uniform(0, 6)):
                    left.append(task)
                    continue
                said[task], _ = process.communicate(timeout=1800)
                self.completed += 1
        return said

    def _killed(self, process: subprocess.Popen, seconds: float) -> bool:
        """Kills a task so long after its entries began to come; False: it was done before."""
        while process.poll() is None and not any(self.scratch.iterdir()):
            time.sleep(0.02)
        time.sleep(seconds)
        if process.poll() is not None:
            return False
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        self.kills += 1
        return True

    def assemble(self) -> str:
        done = subprocess.run(
            [*self.command, "--assemble", f"--task_count={NUM_TASKS}"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr


def plain(scans: Path, dataset: Path, key: Path) -> dict[str, bytes]:
    """The dataset of one run."""
    flags = [f"--input_dir={scans}", f"--output_dir={dataset}", f"--pseudonym_key_file={key}"]
    command = [sys.executable, "-m", "data_prep.prepare", *flags, *OPTIONS, "--num_workers=2"]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    return content(dataset)


def losses(
    archive: list[Path], prefix: str, kinds: list[str], chance: random.Random
) -> tuple[dict[str, str], dict[str, str]]:
    """Files that are lost for good, of one series in ten, and at the first request, of others."""
    chosen = chance.sample(archive, len(archive) // 5)
    for_good, once = {}, {}
    for number, folder in enumerate(chosen):
        name = chance.choice(sorted(folder.iterdir())).name
        path = f"{prefix}/{folder.name}/{name}"
        if number % 2:
            for_good[path] = kinds[number // 2 % len(kinds)]
        else:
            once[path] = ONCE[number // 2 % len(ONCE)]
    return for_good, once


def check(
    part: Part,
    folder: Path,
    archive: list[Path],
    state: State,
    expected: dict[int, str],
    key: Path,
    num_kills: int,
    chance: random.Random,
) -> list[str]:
    """Runs the part; what is wrong. expected: line -> reason."""
    wrong = []
    disk = Disk(part.scratch)
    disk.start()
    num_once = len(state.once)
    said = part.run_tasks(num_kills, chance)
    named = {
        int(line): reason
        for text in said.values()
        for line, reason in re.findall(r"[(;] ?line (\d+): ([^;)]*(?:\([^)]*\))?[^;)]*)", text)
    }
    for line in expected.keys() | named.keys():
        if not named.get(line, "").startswith(expected.get(line, "?")):
            wrong.append(f"line {line}: {named.get(line)!r}, expected {expected.get(line)!r}")
    private = [text for text in said.values() if "series0" in text or "127.0.0.1" in text]
    wrong += ["a task named a file"] * bool(private)
    rest = folder / f"{part.name}-rest"
    lost = {path.split("/")[-2] for path in state.for_good}
    for one in archive:
        if one.name not in lost:
            shutil.copytree(one, rest / one.name)
    before = state.requests.copy()
    said_at_end = part.assemble()
    again = sum((state.requests - before).values())
    one_run = folder / f"{part.name}-one"
    same = content(part.dataset) == plain(rest, one_run, key)
    wrong += [] if same else [f"the rest differs: {said_at_end[-500:]}"]
    wrong += [] if f"{len(lost)} failed for now" in said_at_end else ["assemble names no losses"]
    state.for_good.clear()
    before = state.requests.copy()
    part.run_tasks(0, chance)
    asked = {path.split("/")[-2] for path in (state.requests - before) if path.count("/") > 1}
    wrong += [] if asked <= lost else [f"{len(asked - lost)} staged entries downloaded again"]
    part.assemble()
    for one in archive:
        if one.name in lost:
            shutil.copytree(one, rest / one.name)
    same = content(part.dataset) == plain(rest, one_run, key)
    wrong += [] if same else ["the grown dataset differs"]
    disk.over.set()
    disk.join()
    sizes = [sum(path.stat().st_size for path in one.iterdir()) for one in archive]
    bound = AT_A_TIME * NUM_WORKERS * max(sizes) + (NUM_TASKS - AT_A_TIME) * NUM_WORKERS * max(
        sizes
    )
    wrong += [] if disk.most <= bound else ["more on the disk than the bound"]
    left = [path for path in part.scratch.rglob("*") if path.is_file()]
    wrong += [f"{len(left)} files are left in the scratch folder"] * bool(left)
    largest = max(sizes)
    print(
        f"{part.name}: {len(archive)} series, {sum(sizes) / 1e6:.1f} MB; {len(lost)} lost for "
        f"good, {num_once} files lost at first; {part.kills} kills, {part.completed} runs "
        f"completed; largest series {largest / 1e6:.3f} MB, at most {disk.most / 1e6:.3f} MB in "
        f"scratch ({disk.samples} samples), bound {bound / 1e6:.3f} MB; {again} requests of "
        "--assemble",
        flush=True,
    )
    for fault in wrong:
        print(f"    WRONG {fault}")
    return wrong


def http_part(folder: Path, archive: list[Path], key: Path, num_kills: int, seed: int) -> list[str]:
    """A table of URLs with sizes and hashes."""
    chance = random.Random(seed)
    state = State(*losses(archive, "", list(FOR_GOOD), chance))
    with serving(archive[0].parent, "", state) as url:
        rows, expected = ["url,size,sha256"], {}
        for one in archive:
            for path in sorted(one.iterdir()):
                body = path.read_bytes()
                name = f"/{one.name}/{path.name}"
                rows.append(f"{url}{name},{len(body)},{hashlib.sha256(body).hexdigest()}")
                if name in state.for_good:
                    expected[len(rows)] = FOR_GOOD[state.for_good[name]]
        manifest = folder / "http.csv"
        manifest.write_text("\n".join(rows) + "\n")
        part = Part(folder, "http", manifest, key, f"--input_dir={url}")
        return check(part, folder, archive, state, expected, key, num_kills, chance)


def s3_part(folder: Path, archive: list[Path], key: Path, num_kills: int, seed: int) -> list[str]:
    """Lines of s5cmd."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    chance = random.Random(seed)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    upstream = "http://{}:{}".format(*moto.get_host_and_port())
    login = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=upstream, region_name="us-east-1", **login)
    public = {"ACL": "public-read"}
    client.create_bucket(Bucket="scans", **public)
    for one in archive:
        for path in one.iterdir():
            client.upload_file(str(path), "scans", f"{one.name}/{path.name}", ExtraArgs=public)
    kinds = [kind for kind in FOR_GOOD if kind != "changed"]  # no hashes, so nobody can tell
    state = State(*losses(archive, "/scans", kinds, chance))
    try:
        with serving(None, upstream, state) as url:
            manifest = folder / "s3.txt"
            lines = [f"cp s3://scans/{one.name}/* ./DEST" for one in archive]
            manifest.write_text("\n".join(lines) + "\n")
            number = {one.name: line for line, one in enumerate(archive, start=1)}
            expected = {
                number[path.split("/")[2]]: FOR_GOOD[kind] for path, kind in state.for_good.items()
            }
            part = Part(folder, "s3", manifest, key, f"--endpoint_url={url}")
            return check(part, folder, archive, state, expected, key, num_kills, chance)
    finally:
        moto.stop()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_series", type=int, default=200)
    parser.add_argument("--num_kills", type=int, default=20, help="of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="http,s3")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="array"))
    key = folder / "pseudonym_key"
    key.write_text("0123456789abcdef0123456789abcdef")
    archive = make_archive(folder / "scans", arguments.num_series)
    wrong: list[str] = []
    for name, run in (("http", http_part), ("s3", s3_part)):
        if name not in arguments.only.split(","):
            continue
        if name == "s3" and not all(map(importlib.util.find_spec, ("s3fs", "moto"))):
            print("s3: not run: needs s3fs and moto[server]")
            continue
        wrong += run(folder, archive, key, arguments.num_kills, arguments.seed)
    if not wrong:
        shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
