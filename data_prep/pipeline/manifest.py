"""Manifests: which files belong to an archive, in parts that tasks on many machines share.

A manifest is a text file of one of three kinds:

- lines `cp s3://BUCKET/UUID/* DEST` of s5cmd, as the Imaging Data Commons writes them;
- lines with a URL or path each: a file, or a folder if it ends with `/` or `/*`;
- a table (`.csv`, `.tsv`) with one column `url`, or whose name ends with `_url`, for URLs or
  paths, and optionally `series` (any name: lines of one name stay together), `size` (bytes of the
  file, or of all files of the folder), `sha256` and `md5` (of a file).

Blank lines and lines that begin with `#` are passed over. Relative paths lie beside the manifest.

An entry holds files that one task takes: those of one folder, or of one name in the column
`series`. A series must not be spread over entries.
"""

import collections
import dataclasses
import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.system import stores
from data_prep.system.errors import InputError
from data_prep.system.spreadsheets import read_names, read_rows

HASHES = ("sha256", "md5")
_TABLES = (".csv", ".tsv")
_SHOWN = 5  # lines that a message names
_BEFORE_ALL = "\0"  # separates folders so that texts sort as lists of folders do


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What a line names: a file, or a folder with all that is in it."""

    line: int
    url: str  # of a store, or an absolute local path
    path: str  # relative to the root of the archive; "" is the root itself
    is_folder: bool
    size: int | None = None  # bytes
    hashes: tuple[tuple[str, str], ...] = ()  # (name of `HASHES`, hexadecimal digits)

    @property
    def is_remote(self) -> bool:
        return not self.url.startswith("/")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Files that one task takes."""

    number: int  # from 0, in the order of the manifest
    places: tuple[Place, ...]

    @property
    def named(self) -> str:
        """The entry in words, which name no file."""
        return in_words([place.line for place in self.places])

    @property
    def facts(self) -> str:
        """All that the files of the entry depend on, but not where in the manifest it stands."""
        return repr(
            [(_parts(one), one.path, one.is_folder, one.size, one.hashes) for one in self.places]
        )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The entries of a manifest. The paths of their files are relative to `root`."""

    path: Path
    root: str  # URL or path
    entries: tuple[Entry, ...]

    def of_task(self, task_index: int, task_count: int) -> list[Entry]:
        """The entries of a task, whose index counts from 0."""
        return [entry for entry in self.entries if entry.number % task_count == task_index]


def in_words(lines: Sequence[int]) -> str:
    """`line 3`, `lines 3 and 9`, `lines 1, 2, 3, 4, 5 and 20 more`."""
    shown = list(map(str, lines[:_SHOWN]))
    if len(lines) > _SHOWN:
        shown.append(f"{len(lines) - _SHOWN} more")
    *most, last = shown
    return f"line{'s' * bool(most)} {', '.join(most)}{' and ' * bool(most)}{last}"


def read_manifest(path: Path, input_dir: str | None = None) -> Manifest:
    """Reads a manifest.

    Args:
        path: of the manifest.
        input_dir: URL or path that all its files lie in; None: the deepest folder of which that is
            so.

    Raises:
        InputError: a line cannot be read, a file is there twice, or lies outside `input_dir`.
    """
    if not path.is_file():
        raise InputError(f"--manifest={path}: no such file; give a text file of URLs or paths")
    places, series = [], []
    for place, of_series in _places(path):
        places.append(place)
        series.append(of_series)
    if not places:
        raise InputError(f"--manifest={path}: names no files; give a URL or path a line")
    if input_dir is None:
        root = _common(map(_folder, places))
    else:
        url = input_dir if stores.is_url(input_dir) else str(stores.local_path(input_dir).resolve())
        root = _parts_of(url)
    # a tuple stands for a folder, a text for a series
    entries: dict[tuple[str] | str, list[Place]] = collections.defaultdict(list)
    for number, place in enumerate(places):
        parts = _parts(place)
        if parts[: len(root)] != root:
            raise InputError(
                f"{path}, line {place.line}: lies outside --input_dir={input_dir}; leave the line "
                "or --input_dir out"
            )
        inside = "/".join(part for part in parts[len(root) :] if part)
        places[number] = place = dataclasses.replace(place, path=inside)
        folder = parts if place.is_folder else parts[:-1]
        entries[series[number] or (_BEFORE_ALL.join(folder),)].append(place)
    _refuse_overlaps(path, places)
    return Manifest(
        path,
        "/".join(root) or "/",
        tuple(Entry(number, tuple(of)) for number, of in enumerate(entries.values())),
    )


def _places(path: Path) -> Iterator[tuple[Place, str]]:
    """The place of each line, and its series ("" if it names none)."""
    if path.suffix.lower() in _TABLES:
        yield from _places_of_table(path)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                line = line.strip()
                if line and not line.startswith("#"):
                    yield _place(path, number, _without_command(path, number, line)), ""
    except UnicodeError:
        raise InputError(f"--manifest={path}: is not UTF-8 text; give a text file") from None


def _without_command(path: Path, number: int, line: str) -> str:
    """The source of a line `cp SOURCE DEST` of s5cmd; other lines as they are."""
    if not line.startswith("cp "):
        return line
    try:
        quoted = not line.isascii() or any(sign in line for sign in "'\"\\")
        words = shlex.split(line) if quoted else line.split()  # which is 15 times faster
    except ValueError as error:
        raise InputError(f"{path}, line {number}: {error}; correct it") from None
    words = [word for word in words[1:] if not word.startswith("-")]
    if not 1 <= len(words) <= 2:
        raise InputError(f"{path}, line {number}: is not `cp SOURCE DEST`; correct it")
    return words[0]


def _places_of_table(path: Path) -> Iterator[tuple[Place, str]]:
    names = read_names(path, "--manifest")
    urls = [name for name in names if name.lower() == "url" or name.lower().endswith("_url")]
    if len(urls) != 1:
        raise InputError(
            f"--manifest={path}: {len(urls)} columns are named url or end with _url; name the one "
            "of the files url, and leave the others out"
        )
    chosen = [*urls, *(name for name in ("series", "size", *HASHES) if name in names)]
    for line, cells in read_rows(path, chosen):
        row = dict(zip(["url", *chosen[1:]], cells, strict=True))
        if not row["url"]:
            raise InputError(f"{path}, line {line}: no URL; fill the cell or leave the line out")
        place = _place(path, line, row["url"])
        size, hashes = row.get("size", ""), tuple(_hashes(path, line, row))
        if size and not size.isdecimal():
            raise InputError(f"{path}, line {line}: a size is a number of bytes; correct it")
        if place.is_folder and hashes:
            raise InputError(
                f"{path}, line {line}: a folder has no {hashes[0][0]}; list its files, or leave "
                "the cell empty"
            )
        yield (
            dataclasses.replace(place, size=int(size) if size else None, hashes=hashes),
            row.get("series", ""),
        )


def _hashes(path: Path, line: int, row: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, digits in zip(HASHES, (64, 32), strict=True):
        if value := row.get(name, "").lower():
            if len(value) != digits or set(value) - set("0123456789abcdef"):
                raise InputError(
                    f"{path}, line {line}: {name} has {digits} hexadecimal digits; correct it"
                )
            yield name, value


def _place(path: Path, line: int, text: str) -> Place:
    try:
        is_url = stores.is_url(text)
    except InputError as error:
        raise InputError(f"{path}, line {line}: {error}") from None
    is_folder = text.endswith(("/", "/*"))
    text = text.removesuffix("*").rstrip("/") if is_folder else text
    if not is_url:
        local = path.parent / stores.local_path(text or "/")
        return Place(line, str(local.resolve()), "", is_folder or local.is_dir())
    if "*" in text or ".." in _parts_of(text):
        raise InputError(
            f"{path}, line {line}: of wildcards only /* at the end is read, and no ..; correct it"
        )
    return Place(line, text, "", is_folder)


def _parts(place: Place) -> tuple[str, ...]:
    return _parts_of(place.url)


def _folder(place: Place) -> tuple[str, ...]:
    """Of a folder, the folder itself."""
    return _parts(place) if place.is_folder else _parts(place)[:-1]


def _parts_of(url: str) -> tuple[str, ...]:
    """The folders that lead to a place, and its name; without the question of a URL."""
    if url.startswith("/"):
        return tuple(url.rstrip("/").split("/"))
    scheme, _, rest = url.partition("://")
    host, *inside = rest.partition("#")[0].partition("?")[0].split("/")
    return (f"{scheme}://{host}", *filter(None, inside))


def _common(folders: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all begin with."""
    folders = iter(folders)
    common = next(folders)
    for folder in folders:
        if folder[: len(common)] != common:
            pairs = zip(common, folder, strict=False)
            common = tuple(one for one, _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
    return common


def _refuse_overlaps(path: Path, places: Sequence[Place]) -> None:
    """Raises InputError if a file is named twice."""
    above: list[tuple[str, Place]] = []  # the folders that lead to the last place
    for place in sorted(places, key=_sorted_as_folders):
        name = _sorted_as_folders(place)
        while above and name != above[-1][0] and not name.startswith(above[-1][0] + _BEFORE_ALL):
            above.pop()
        if above and (above[-1][1].is_folder or above[-1][0] == name):
            lines = in_words(sorted((above[-1][1].line, place.line)))
            raise InputError(f"{path}, {lines}: name the same files; leave one out")
        above.append((name, place))


def _sorted_as_folders(place: Place) -> str:
    return _BEFORE_ALL.join(_parts(place))
