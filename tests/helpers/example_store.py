"""An object store for tests: a protocol of fsspec, `example://`, whose objects are the files of a
folder.

Every process finds it by an entry point, as it would find a package for a store; requests are
logged to a file, objects can be made to fail. It can do no more than list, ask for sizes and read
ranges.
"""

import fnmatch
import os
import time
from pathlib import Path

import fsspec
import pytest


class ExampleStore(fsspec.AbstractFileSystem):
    """Objects lie in `$EXAMPLE_STORE/objects`; requests that match a line of `failing` fail."""

    protocol = "example"

    def _request(self, kind: str, path: str, size: int = 0) -> Path:
        folder, path = Path(os.environ["EXAMPLE_STORE"]), path.strip("/")
        with open(folder / "requests", "a") as file:
            file.write(f"{kind} {size} {path}\n")
        failing = (
            (folder / "failing").read_text().split("\n") if (folder / "failing").exists() else []
        )
        time.sleep(float(os.environ.get("EXAMPLE_STORE_SECONDS", 0)) * (kind != "got"))
        if any(fnmatch.fnmatchcase(f"{kind} {path}", pattern) for pattern in failing):
            raise RuntimeError(f"503 for {path}")
        hanging = (
            (folder / "hanging").read_text().split("\n") if (folder / "hanging").exists() else []
        )
        while any(fnmatch.fnmatchcase(f"{kind} {path}", pattern) for pattern in hanging):
            time.sleep(1)
        if not (folder / "objects" / path).exists():
            raise FileNotFoundError(path)
        return folder / "objects" / path

    def ls(self, path, detail=True, **kwargs):
        folder = self._request("list", path)
        entries = [
            self._entry(f"{path.strip('/')}/{child.name}", child) for child in folder.iterdir()
        ]
        # as stores' consoles make folders
        entries.append({"name": f"{path.strip('/')}/", "type": "file", "size": 0})
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path, **kwargs):
        return self._entry(path, self._request("info", path))

    def cat_file(self, path, start=None, end=None, **kwargs):
        start, end = start or 0, end if end is not None else 1 << 40
        file = self._request("read", path)
        content = file.read_bytes()[start:end]
        self._request("got", path, len(content))
        return content

    def _open(self, path, *args, **kwargs):
        raise NotImplementedError("more requests than are needed")

    def _entry(self, name: str, path: Path) -> dict:
        if path.is_dir():
            return {"name": name, "type": "directory", "size": 0}
        return {"name": name, "type": "file", "size": path.stat().st_size}


class Handle:
    """What a test does with the store."""

    def __init__(self, folder: Path):
        self.folder, self.objects = folder, folder / "objects"

    def fail(self, *patterns: str) -> None:
        """From now on, requests such as `read scans/a*` and `list scans/b` fail."""
        (self.folder / "failing").write_text("\n".join(patterns))

    def hang(self, *patterns: str) -> None:
        """From now on, such requests are never answered."""
        (self.folder / "hanging").write_text("\n".join(patterns))

    def requests(self) -> list[tuple[str, int, str]]:
        """(kind, bytes, path) of the requests since the last call."""
        path = self.folder / "requests"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [
            (kind, int(size), name) for kind, size, name in (line.split(" ", 2) for line in lines)
        ]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Handle:
    """An empty store, for this process and those that it starts: `example://FOLDER` is
    `objects / FOLDER`."""
    installed = folder / "packages" / "example_store-1.dist-info"
    installed.mkdir(parents=True)
    (folder / "objects").mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: example-store\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(
        "[fsspec.specs]\nexample = tests.helpers.example_store:ExampleStore\n"
    )
    monkeypatch.setenv("EXAMPLE_STORE", str(folder))
    project = Path(__file__).resolve().parents[2]
    found = [str(folder / "packages"), str(project), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))
    monkeypatch.syspath_prepend(str(folder / "packages"))
    fsspec.register_implementation("example", ExampleStore, clobber=True)
    return Handle(folder)
