"""The XML files of a folder or an archive of annotations, in bounded memory."""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.scan import archives
from data_prep.scan.elements import MAX_COMPRESSION_RATIO
from data_prep.scan.packed_files import PACKED_START, is_of_system
from data_prep.scan.reasons import LeftOut
from data_prep.system.errors import InputError

_LARGEST_XML = 64 << 20  # bytes; the largest reading of LIDC-IDRI has 1 MB
_ARCHIVE_FREE_BYTES = 64 << 20  # an archive that expands to this size is harmless
_OPENERS = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\0", lzma.open), (b"BZh", bz2.open))


class AnnotationsError(InputError):
    """An archive of annotations that cannot be read, in one line."""


def xml_files(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every XML file below a folder, packed files included, or in a tar file,
    compressed or not.

    Args:
        path: folder or tar file.
        left_out: collects files that are named .xml and are not XML.

    Raises:
        AnnotationsError: the tar file cannot be read, or expands beyond all annotations.
        InputError: `path` does not exist.
        OSError: a file cannot be read.
    """
    for name, content in (_members if path.is_file() else _below)(path, left_out):
        if is_of_system(name.rsplit("/", 1)[-1], content[:PACKED_START]):
            left_out.append(LeftOut(name, "system_file", "a file of the operating system"))
        else:
            yield name, content


def _is_read(name: str, size: int, left_out: list[LeftOut]) -> bool:
    if name.lower().endswith(".xml") and size > _LARGEST_XML:
        left_out.append(LeftOut(name, "damaged", f"{size} bytes, more than any reading"))
        return False
    return name.lower().endswith(".xml")


def _below(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, bytes]]:
    for entry in archives.list_sources(path):
        if isinstance(entry, archives.Source):
            name = f"{entry.path} {entry.member}".strip()
            if _is_read(name, entry.size, left_out):
                yield name, archives.read_bytes(path, entry)


def _members(path: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, bytes]]:
    allowed = max(_ARCHIVE_FREE_BYTES, MAX_COMPRESSION_RATIO * path.stat().st_size)
    with open(path, "rb") as file:
        start = file.read(PACKED_START)
    opener = next((opener for magic, opener in _OPENERS if start.startswith(magic)), open)
    try:
        with (
            opener(path, "rb") as file,
            tarfile.open(fileobj=_Bounded(file, allowed), mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile() and _is_read(member.name, member.size, left_out):
                    yield member.name, archive.extractfile(member).read()
    except _TooLarge:
        raise AnnotationsError(
            f"{path}: expands beyond all annotations ({allowed} bytes); unpack it into a folder"
        ) from None
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise AnnotationsError(
            f"{path}: not a readable tar file ({error}); give a folder or tar file of XML"
        ) from error


class _TooLarge(Exception):
    """More bytes than an archive of annotations has."""


class _Bounded:
    """A file of which no more than so many bytes are read."""

    def __init__(self, file: BinaryIO, allowed: int):
        self._file, self._left = file, allowed

    def read(self, number: int) -> bytes:
        content = self._file.read(number)
        self._left -= len(content)
        if self._left < 0:
            raise _TooLarge
        return content
