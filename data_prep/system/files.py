"""Files that are written whole or not at all; locks, lasting renames and removal of folders."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.system.errors import InputError

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)
PARTIAL = ".partial"  # suffix of files that are being written

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "permit larger files there",
    errno.EROFS: "permit writing there",
    errno.EACCES: "permit access",
    errno.EPERM: "permit access",
    errno.EIO: "check the disk",
}


def explain(error: OSError) -> str:
    """The message for the user: one line, with the remedy if one is known."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno not in REMEDIES:
        return f"{place}{error.strerror}" if error.strerror else str(error)
    said = os.strerror(error.errno)  # libraries add words of their own
    return f"{place}{said}; {REMEDIES[error.errno]} and run the same command again"


def printable(text: str) -> str:
    """The text with escapes in place of control characters, which would act on a terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def as_cell(text: str) -> str:
    """The text as a cell of a table that no spreadsheet program computes: printable, and quoted
    where it begins as a formula does."""
    text = printable(text)
    is_formula = text.startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


# ---- whole or not at all -----------------------------------------------------------------------


def unique_name(path: Path) -> Path:
    """A name to write to that no other process uses, such as a worker that outlives its killed
    parent by a moment, or a process on another machine that shares the folder."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


@contextlib.contextmanager
def written_whole(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A name to write to, which becomes `path` once all is written. An error removes the file.

    `temporary`: by default the name with `.tmp`, which the next run overwrites if this one is
    killed. A `path` on an object store (not a `pathlib.Path`) gets the content of a local file in
    one request: objects appear whole or not at all.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            yield local
            path.write_bytes(local.read_bytes())
        return
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None  # a full disk does not name the file
        raise


@contextlib.contextmanager
def folder_written_whole(path: Path, temporary: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` (absent, or an empty folder) at the end of the
    block.

    An error removes it. The folder of a killed process is removed first.
    """
    remove_tree(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its name, in a way that survives a power cut."""
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that several processes may write at the same time."""
    with written_whole(path, unique_name(path)) as temporary:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file that one process writes at a time."""
    with written_whole(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(
    path: Path, fields: Sequence[str] = (), remedy: str = "bring back a copy of it"
) -> Any:
    """The content of a JSON file.

    Args:
      path: of the file.
      fields: names that the content must have.
      remedy: the advice to the user about a damaged or missing file.

    Raises:
      InputError: the file is missing or not JSON, or lacks one of the fields.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}); {remedy}") from None
    if missing := [name for name in fields if not isinstance(content, dict) or name not in content]:
        raise InputError(f"{path} is damaged ({missing[0]} is not in it); {remedy}")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- folders -----------------------------------------------------------------------------------


def make_folder(
    folder: Path, flag: str, mode: int = 0o777, remedy: str = "choose another folder"
) -> None:
    """Make a folder with its parents, unless it exists.

    Raises:
      InputError: it cannot be made; the message begins with `flag`, the flag that names it.
    """
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: cannot make {folder} ({error.strerror}); {remedy}") from None


def check_writable(path: Path, flag: str) -> None:
    """Refuse a file or folder that cannot be made here, before the work that it is for.

    Raises:
      InputError: the nearest folder that exists permits no writing.
    """
    folder = next(one for one in path.absolute().parents if one.exists())
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"{flag}={path} cannot be written (no permission in {folder}); choose another folder"
        )


@contextlib.contextmanager
def filled_folder(folder: Path, flag: str) -> Iterator[None]:
    """`make_folder` for a block that fills the folder: after an error no empty folder stays that
    was made for it."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    make_folder(folder, flag)
    try:
        yield
    except BaseException:
        for one in made:
            with contextlib.suppress(OSError):  # it is not empty
                one.rmdir()
        raise


def remove_tree(directory: Path) -> None:
    """Remove a folder and all that it holds, if it exists."""
    if directory.exists():
        shutil.rmtree(directory)


@contextlib.contextmanager
def lock_directory(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """An advisory lock on the directory itself, which ends with the process, however it ends.

    Args:
      directory: to lock.
      shared: others may hold a shared lock at the same time.

    Raises:
      InputError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{directory}: another run is at work in it; wait for it or stop it"
            ) from None
        except OSError:
            print(
                f"{directory}: no locks on this file system; let no two runs write here",
                file=sys.stderr,
            )
        yield
    finally:
        os.close(descriptor)
