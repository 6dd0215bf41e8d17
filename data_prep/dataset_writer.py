"""Files that are there in full or not at all."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

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


def temporary_path(path: Path) -> Path:
    """Unlike any other: neither a worker that outlives its killed parent by a moment nor one on another machine that
    shares the directory meets it."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


@contextlib.contextmanager
def written_whole(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A name to write to, which becomes `path` once all is written; after an error nothing is left of it.

    `temporary`: by default the name with `.tmp`, which the next run writes anew where one was killed.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None  # a full disk does not say it
        raise


def explain(error: OSError) -> str:
    """The message for the user, in one line and with the remedy where there is one."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno not in REMEDIES:
        return f"{place}{error.strerror}" if error.strerror else str(error)
    return f"{place}{error.strerror}; {REMEDIES[error.errno]} and run the same command again"


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that is there in full or not at all, whenever the process is killed."""
    with written_whole(path, temporary_path(path)) as temporary:
        temporary.write_bytes(content)


def sync_directory(directory: Path) -> None:
    """Makes renames inside a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
