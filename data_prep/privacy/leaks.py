"""Search of a dataset for values of the source headers that could identify someone.

Secret texts are

- values of five characters or more, at any depth, of all elements with the value representations
  PN, UI, DA, TM, DT, LO, SH, LT, ST, UT, UC and AE (names, UIDs, dates, times, IDs, free text);
- printable values of private elements whose value representation is unknown;
- the components of names by themselves;
- from the audit directory, the paths of the sources and the pseudonym key.

They are searched in every byte of the dataset directory, and in every record decompressed. Short
texts occur by chance: five digits in every checksum, any five bytes somewhere in a million pixels.
Therefore

- in text, a secret of fewer than 12 characters must stand by itself, between characters that are
  not letters or digits;
- in pixels and other binary data, secrets with fewer than 12 characters, or with fewer than 4
  different characters, are not searched;
- in columns of fractions, a secret of 7 digits or more must be all of the whole number or all of
  its decimals; columns of counts are not searched;
- the program's own file names and sentences (reasons, notes, descriptions) are not searched for
  single words of descriptive elements, such as a Series Description "chest", nor for values that
  are words of its own, such as a patient "Train";
- manufacturer, kernel and ethnic group are published on purpose. Their cells must be published
  values of exactly these elements (an ethnic group may also come from a table of attributes). Where
  they are no known spelling, they must be free of names, IDs, dates and institutions, in capitals
  or not.

An element whose value is damaged is searched as text. `Search` counts the headers that have one,
and those that could not be read to their end.
"""

import csv
import dataclasses
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    LABELS_FILE,
    PREPARATION_FILE,
    REGIONS_FILE,
    REJECTED_FILE,
    SLICES_FILE,
    SPLITS,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    description,
    table_columns,
)
from data_prep.dataset.storage import read_records
from data_prep.privacy.pseudonyms import (
    KEY_FILE,
    public_ethnic_group,
    public_kernel,
    public_manufacturer,
)
from data_prep.scan.archives import (
    ArchiveDirectory,
    Source,
    Unreadable,
    list_sources,
    open_source,
    read_bytes,
)
from data_prep.scan.elements import read_elements, too_many_items
from data_prep.scan.loading import chunks
from data_prep.scan.reasons import NOTES, REASONS
from data_prep.system.errors import InputError
from data_prep.system.workers import Progress, WorkerDied, WorkerPool

SHORTEST_NEEDLE = 5
LONG_NEEDLE = 12  # characters; from here on a match counts anywhere
_IDENTIFYING = {"PN", "UI", "DA", "TM", "DT"}
_DESCRIPTIVE = {"LO", "SH", "LT", "ST", "UT", "UC", "AE"}
# column of volumes.csv -> its source elements, and the function that cleans their values
_PUBLISHED = {
    "manufacturer": ({0x00080070}, public_manufacturer),
    "kernel": ({0x00181210, 0x00189316}, public_kernel),
    "ethnic_group": ({0x00102160}, public_ethnic_group),
}
_PERSONAL_VRS = {"PN", "DA", "TM", "DT"}
_PERSONAL = {  # elements of other value representations, searched in the published texts, too
    # accession number, institution, station, department
    *(0x00080050, 0x00080080, 0x00080081, 0x00081010, 0x00081040),
    # IDs, address, telephone, study ID
    *(0x00100020, 0x00101000, 0x00101040, 0x00102154, 0x00200010),
}
_PUBLIC_UIDS = "1.2.840.10008."  # UIDs of the standard itself
_OWN_COLUMNS = {"reason", "detail", "notes", "split"}
_OWN_FILES = (
    *(LABELS_FILE, PREPARATION_FILE, REGIONS_FILE, REJECTED_FILE, SLICES_FILE, VOLUMES_FILE),
    *("features.json", "dataset_info.json", "array_record", "cohort.csv", "contact_sheet.png"),
)
_SHORTEST_NUMBER = 7  # digits of a secret that is searched in numbers
_FILES_PER_TASK = 64
_MAX_ITEMS = 200_000  # of a sequence; an enhanced file of 8,000 frames has 100,000
_PADDING = " \0\t\r\n"


@dataclasses.dataclass
class SourceValues:
    """Values from the headers of an archive."""

    identifying: set[str] = dataclasses.field(default_factory=set)
    # letters only, from descriptive elements
    words: set[str] = dataclasses.field(default_factory=set)
    # names, IDs, dates, institutions in small letters
    personal: set[str] = dataclasses.field(default_factory=set)
    published: dict[str, set[str]] = dataclasses.field(
        default_factory=lambda: {column: set() for column in _PUBLISHED}
    )
    num_damaged: int = 0  # headers with a damaged element, which was searched as text
    num_unread: int = 0  # headers that could not be read to their end

    def update(self, other: "SourceValues") -> None:
        """Adds the values of other files."""
        self.identifying |= other.identifying
        self.words |= other.words
        self.personal |= other.personal
        self.num_damaged += other.num_damaged
        self.num_unread += other.num_unread
        for column, values in other.published.items():
            self.published[column] |= values


def read_source_values(input_dir: ArchiveDirectory, pool: WorkerPool) -> SourceValues:
    """The values of all readable DICOM headers of an archive."""
    values = SourceValues()
    sources = (entry for entry in list_sources(input_dir) if not isinstance(entry, Unreadable))
    with Progress("reading headers", "files", None) as progress:
        tasks = ((input_dir, chunk) for chunk in chunks(sources, _FILES_PER_TASK))
        for (_, chunk), result in pool.run(_values_of_files, tasks):
            if isinstance(result, WorkerDied):
                values.num_unread += len(chunk)
            else:
                values.update(result)
            progress.advance(len(chunk))
    return values


def _values_of_files(input_dir: ArchiveDirectory, sources: Iterable[Source]) -> SourceValues:
    values = SourceValues()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values
        for source in sources:
            try:
                with _opened(input_dir, source) as file:
                    elements, damaged, unread = elements_of(file, source.size)
            except OSError:
                if not input_dir.is_dir():
                    raise
                continue  # a damaged file is not in the dataset
            values.num_damaged += damaged
            values.num_unread += unread
            for element in elements:
                _add_element(values, element)
    return values


def _opened(input_dir: ArchiveDirectory, source: Source) -> BinaryIO:
    if source.member:
        return io.BytesIO(read_bytes(input_dir, source))
    return open_source(input_dir, source)


def header_elements(content: bytes) -> tuple[list[pydicom.DataElement], bool, bool]:
    """`elements_of` the content of a file."""
    return elements_of(io.BytesIO(content), len(content))


def elements_of(file: BinaryIO, size: int) -> tuple[list[pydicom.DataElement], bool, bool]:
    """The elements of a header, at any depth; whether one is damaged; whether a part of the header
    could not be read.

    A damaged element, whose value does not fit its value representation, is given as its bytes
    (UN). A file that is not DICOM has no elements.
    """
    start = file.read(132)
    file.seek(0)
    if start[128:] != b"DICM" and start[:1] not in (b"\x02", b"\x08", b"\x00"):
        return [], False, False
    reader = _ElementReader()
    try:
        header, _ = read_elements(file, size)
        reader.add(getattr(header, "file_meta", pydicom.Dataset()))
        reader.add(header)
    except Exception as error:  # pydicom raises a dozen kinds on headers that cannot be read
        if isinstance(error, OSError) and error.errno is not None:  # from the disk
            raise
        reader.unread = True
    return reader.elements, reader.damaged, reader.unread


class _ElementReader:
    """Collects elements and goes on past those that cannot be read."""

    def __init__(self):
        self.elements: list[pydicom.DataElement] = []
        self.damaged = self.unread = False

    def add(self, dataset: pydicom.Dataset) -> None:
        """Adds the elements of a data set and of the items in it."""
        for tag in dataset.keys():
            raw = dataset.get_item(tag)
            if too_many_items(raw, _MAX_ITEMS):
                self.unread = True
                continue
            try:
                element = dataset[tag]
            except Exception:  # of a wrong length, or no number
                element = pydicom.DataElement(tag, "UN", raw.value)
                self.damaged = True
                self.unread |= raw.VR == "SQ"
            if element.VR != "SQ":
                self.elements.append(element)
                continue
            for part in element.value or ():
                self.add(part)


def element_texts(element: pydicom.DataElement) -> list[str]:
    """The values of a text element, one by one and without padding; [] for other elements.

    A private element of unknown value representation (UN, as in implicit files) is text if its
    value is printable.
    """
    value = element.value
    if element.VR in ("UN", "OB") and isinstance(value, bytes):
        plain = value.strip(_PADDING.encode())
        value = (
            plain.decode().split("\\") if plain.isascii() and plain.decode().isprintable() else None
        )
    elif element.VR not in _IDENTIFYING | _DESCRIPTIVE | {"CS"}:
        return []
    if value is None:
        return []
    parts = value if isinstance(value, list | pydicom.multival.MultiValue) else [value]
    return [str(part).strip(_PADDING) for part in parts]


def _add_element(values: SourceValues, element: pydicom.DataElement) -> None:
    if element.VR == "CS":  # defined terms of the standard
        return
    for text in element_texts(element):
        if element.VR == "PN":
            names = {name for name in re.split(r"[\^=\s]+", text) if len(name) >= SHORTEST_NEEDLE}
            values.identifying |= names
            values.personal |= {name.casefold() for name in names}
        for column, (tags, public_text) in _PUBLISHED.items():
            if int(element.tag) in tags:
                values.published[column].add(public_text(text))
        if len(text) < SHORTEST_NEEDLE or text.startswith(_PUBLIC_UIDS):
            continue
        if element.VR in _PERSONAL_VRS or int(element.tag) in _PERSONAL:
            values.personal.add(text.casefold())
        if element.VR in _DESCRIPTIVE | {"UN", "OB"} and text.replace(" ", "").isalpha():
            values.words.add(text)
        else:
            values.identifying.add(text)


class SecretTexts:
    """Finds many strings in bytes at once, by their first five bytes."""

    def __init__(self, values: Iterable[str]):
        self._by_prefix: dict[bytes, list[bytes]] = {}
        for value in values:
            encoded = value.encode("utf-8", "surrogateescape")
            self._by_prefix.setdefault(encoded[:SHORTEST_NEEDLE], []).append(encoded)
        self._pairs = np.zeros(65536, dtype=bool)
        for prefix in self._by_prefix:
            self._pairs[prefix[0] | prefix[1] << 8] = True
        self._keys = np.array(
            sorted(int.from_bytes(prefix, "little") for prefix in self._by_prefix), np.uint64
        )

    def find(self, data: bytes) -> Iterator[tuple[int, str]]:
        """(offset, secret text) of every occurrence in `data`."""
        octets = np.frombuffer(data, dtype=np.uint8)
        if len(octets) < SHORTEST_NEEDLE or not len(self._keys):
            return
        pairs = octets[:-1].astype(np.uint16) | octets[1:].astype(np.uint16) << 8
        places = np.flatnonzero(self._pairs[pairs[: len(octets) - SHORTEST_NEEDLE + 1]])
        keys = np.zeros(len(places), dtype=np.uint64)
        for offset in range(SHORTEST_NEEDLE):
            keys |= octets[places + offset].astype(np.uint64) << np.uint64(8 * offset)
        for place in places[np.isin(keys, self._keys)].tolist():
            for needle in self._by_prefix[data[place : place + SHORTEST_NEEDLE]]:
                if data.startswith(needle, place):
                    yield place, needle.decode("utf-8", "surrogateescape")

    def find_in_text(self, text: str) -> Iterator[str]:
        """Secret texts in a text: long texts anywhere, short texts where they stand by
        themselves."""
        data = text.encode("utf-8", "surrogateescape")
        for place, needle in self.find(data):
            end = place + len(needle.encode("utf-8", "surrogateescape"))
            alone = not _alphanumeric(data[place - 1 : place]) and not _alphanumeric(
                data[end : end + 1]
            )
            if alone or len(needle) >= LONG_NEEDLE:
                yield needle


def _alphanumeric(octet: bytes) -> bool:
    return octet.isalnum() or octet >= b"\x80"


class Search(NamedTuple):
    """The result of `search`.

    leaks: places of secret texts, a line each that names file and place.
    num_damaged: headers with a damaged element, which was searched as text.
    num_unread: headers that could not be read to their end.
    """

    leaks: list[str]
    num_damaged: int
    num_unread: int


def find_leaks(
    dataset: Dataset, input_dir: ArchiveDirectory, audit_dir: Path, pool: WorkerPool
) -> list[str]:
    """The `leaks` of `search`."""
    return search(dataset, input_dir, audit_dir, pool).leaks


def search(
    dataset: Dataset, input_dir: ArchiveDirectory, audit_dir: Path, pool: WorkerPool
) -> Search:
    """Searches a dataset for secret texts.

    The lines quote at most the first two characters of a value, since they may end up in a log.

    Args:
        dataset: to search.
        input_dir: the archive that the dataset was made from.
        audit_dir: the private directory of the dataset.
        pool: the workers.

    Raises:
        InputError: `audit_dir` is not an audit directory.
        OSError: a file cannot be read.
    """
    values = read_source_values(input_dir, pool)
    secrets = _audit_secrets(audit_dir)
    all_values = values.identifying | values.words | secrets
    everything = SecretTexts(all_values)
    own = _own_words(dataset.preparation)
    of_others = {value for value in values.identifying | secrets if value.casefold() not in own}
    without_words = SecretTexts(of_others)
    in_names = SecretTexts(of_others | {v for v in values.words if v.casefold() not in own})
    binary = SecretTexts(v for v in all_values if len(v) >= LONG_NEEDLE and len(set(v)) >= 4)
    preparation = dataset.preparation
    tables = [name for name, _ in preparation["options"].get("tables", ())]
    not_from_headers = {"ethnic_group"} if "attributes_csv" in tables else set()
    not_from_headers |= {"manufacturer", "kernel"} if "metadata_csv" in tables else set()
    columns = table_columns(preparation)
    own_sentences = {
        description(preparation | {"synthetic": synthetic}) for synthetic in (False, True)
    }
    leaks = []
    shards = []
    for path in sorted(path for path in dataset.directory.rglob("*") if path.is_file()):
        name = path.relative_to(dataset.directory).as_posix()
        leaks += _lines(name, "its name", in_names.find_in_text(name))
        if ".array_record-" in name:
            shards.append((path, name, binary))
        elif path.suffix == ".csv":
            types = columns.get(name, VOLUME_COLUMNS)
            leaks += _table_leaks(
                path, name, types, not_from_headers, everything, without_words, values
            )
        elif path.suffix == ".json":
            leaks += _json_leaks(path, name, without_words, own_sentences)
        else:
            leaks += _lines(
                name, "its bytes", (needle for _, needle in binary.find(path.read_bytes()))
            )
    with Progress("searching", "shards", len(shards)) as progress:
        for (_, name, _), result in pool.run(_shard_leaks, shards):
            leaks += [f"{name}: searching it crashed"] if isinstance(result, WorkerDied) else result
            progress.advance(1)
    return Search(leaks, values.num_damaged, values.num_unread)


def _own_words(preparation: Mapping[str, Any]) -> set[str]:
    """Words and names, in small letters, that every dataset has, whatever its scans."""
    texts = [*SPLITS, *_OWN_FILES, *VOLUME_COLUMNS, *preparation, *preparation["options"]]
    texts += [*REASONS, *REASONS.values(), *NOTES, *NOTES.values(), *preparation["counts"]]
    texts += [description(preparation | {"synthetic": synthetic}) for synthetic in (False, True)]
    words = {word for text in texts for word in re.split(r"[^a-z0-9]+", text.casefold())}
    return words | {text.casefold() for text in texts}


def _audit_secrets(audit_dir: Path) -> set[str]:
    """The paths of the sources and the pseudonym key.

    Raises:
        InputError: `audit_dir` is not an audit directory.
    """
    table = audit_dir / "sources.csv"
    if not table.is_file():
        raise InputError(
            f"--audit_dir={audit_dir}: no sources.csv in it; give the audit directory that "
            "data_prep.prepare made"
        )
    secrets = set()
    with open(table, newline="", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            names = (row[column].removeprefix("'") for column in ("path", "member"))
            secrets |= {name for name in names if len(name) >= LONG_NEEDLE}
    key = audit_dir / KEY_FILE
    return secrets | ({key.read_text().strip()} if key.is_file() else set())


def _table_leaks(
    path: Path,
    name: str,
    types: Mapping[str, type],
    not_from_headers: set[str],
    everything: SecretTexts,
    without_words: SecretTexts,
    values: SourceValues,
) -> Iterator[str]:
    personal = SecretTexts(values.personal)
    numbers = {
        value
        for value in values.identifying
        if value.isdecimal() and len(value) >= _SHORTEST_NUMBER
    }
    with open(path, newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            for column, cell in row.items():
                kind = types.get(column, str)
                if column in _PUBLISHED:
                    if (
                        cell
                        and column not in not_from_headers
                        and cell not in values.published[column]
                    ):
                        yield f"{name}: line {line}, {column}: not a {column} of any source"
                    if _PUBLISHED[column][1](cell) != cell:
                        yield from _lines(
                            name, f"line {line}, {column}", personal.find_in_text(cell.casefold())
                        )
                elif kind is float:
                    needles = (part for part in cell.split(".") if part in numbers)
                    yield from _lines(name, f"line {line}, {column}", needles)
                elif kind is str and column != "num_files":
                    needles = without_words if column in _OWN_COLUMNS else everything
                    yield from _lines(name, f"line {line}, {column}", needles.find_in_text(cell))


def _json_leaks(
    path: Path, name: str, needles: SecretTexts, own_sentences: set[str]
) -> Iterator[str]:
    for text in set(_strings(json.loads(path.read_text()))) - own_sentences:
        yield from _lines(name, "a text", needles.find_in_text(text))


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from node
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)


def _shard_leaks(path: Path, name: str, needles: SecretTexts) -> list[str]:
    leaks = []
    for number, record in enumerate(read_records(path)):
        leaks += _lines(name, f"record {number}", (needle for _, needle in needles.find(record)))
    return leaks


def _lines(name: str, place: str, needles: Iterable[str]) -> list[str]:
    return [
        f"{name}: {place}: holds a source value of {len(needle)} characters that begins with "
        f"{needle[:2]!r}"
        for needle in needles
    ]
