r"""Mutated DICOM files: no exception, no hang, no wrong HU, bounded memory.

    python -m tests.campaigns.mutated_dicom --archive=SCANS --num_mutants=10000 --seed=0

Mutant number i of a seed is always the same. A worker process makes the mutants and reads header,
plan and pixels; it is ended if a mutant takes more than 20 s. If pydicom reads a mutant, too, the
HU must be equal, except for padding and HU below -1500.
"""

import argparse
import collections
import multiprocessing
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import pixel_array

from data_prep.scan.archives import Source, list_sources, read_bytes
from data_prep.scan.headers import NATIVE_SYNTAXES, NotAnImage, read_header
from data_prep.scan.hounsfield import to_hu
from data_prep.scan.pixels import PixelReader
from data_prep.scan.reasons import REASONS
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, plan_series
from data_prep.scan.stored_bits import PixelError
from data_prep.scan.volume import load_volume

SECONDS_A_MUTANT = 20
MAX_GROWTH_BYTES = 512 << 20
DEFECTS = ("exception", "hang", "died", "memory", "wrong_hu", "undocumented_reason")
RULES = Rules(max_slice_thickness_mm=1e6, min_slices=1, require_lung=False)
_FRAMES_COMPARED = 3
_PIXEL_DATA = 0x7FE00010

_SHORTS = {  # tag -> values of an unsigned short
    0x00280010: (0, 1, 255, 513, 65535),  # Rows
    0x00280011: (0, 1, 255, 513, 65535),  # Columns
    0x00280100: (0, 1, 7, 8, 12, 24, 31, 32, 64, 65535),  # Bits Allocated
    0x00280101: (0, 1, 8, 12, 13, 17, 65535),  # Bits Stored
    0x00280102: (0, 7, 11, 14, 16, 65535),  # High Bit
    0x00280103: (0, 1, 2, 65535),  # Pixel Representation
    0x00280002: (0, 2, 3, 65535),  # Samples per Pixel
    0x00280120: (0, 1, 24, 63536, 65535),  # Pixel Padding Value
}
_NUMBERS = (
    b"",
    b"0",
    b"-1",
    b"nan",
    b"inf",
    b"1e300",
    b"1e-300",
    b"1,5",
    b"1_0",
    b"0x10",
    b"2\\1",
    b"9" * 5000,
)
_TEXTS = {  # tag -> values of text and numbers
    0x00280008: (b"1000000000", b"-1", b"0", b"2", b"9999", b"1e9", b"9" * 400),  # Number of Frames
    0x00281053: _NUMBERS,  # Rescale Slope
    0x00281052: _NUMBERS,  # Rescale Intercept
    0x00180050: _NUMBERS,  # Slice Thickness
    0x00280030: (b"0\\0", b"-1\\1", b"nan\\nan", b"1e300\\1", b"1"),  # Pixel Spacing
    0x00200032: (b"nan\\0\\0", b"1e300\\0\\0", b"0\\0", b"\\\\"),  # Image Position
    0x00200037: (
        b"0\\0\\0\\0\\0\\0",
        b"nan\\0\\0\\0\\1\\0",
        b"1\\0\\0\\1\\0\\0",
        b"0\\1\\0\\0\\0\\1",
    ),
    0x00101010: (b"9" * 5000 + b"Y", b"-12Y", b"\xff\xfe"),  # Patient's Age
    0x00280004: (b"RGB", b"MONOCHROME1", b"PALETTE COLOR", b"\xff"),  # Photometric Interpretation
    0x00080005: (b"ISO 2022 IR 87", b"nonsense", b"\xff\xff"),  # Specific Character Set
}
_SYNTAXES = (
    *NATIVE_SYNTAXES,
    *("1.2.840.10008.1.2." + end for end in "1.99 5 4.50 4.70 4.80 4.90 4.100 9".split()),
)


class Parts:
    """The top-level elements of a file as byte ranges, in their order."""

    def __init__(self, data: bytes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data), force=True)
        implicit, little = dataset.original_encoding
        self.implicit, self.order = implicit, "<" if little else ">"
        starts = []
        for element in dataset._dict.values():
            tell = getattr(element, "value_tell", None) or getattr(element, "file_tell", None) or 0
            tag = struct.pack(self.order + "HH", element.tag.group, element.tag.elem)
            places = (tell - n for n in (8, 12) if tell >= n)
            starts += [
                (place, int(element.tag)) for place in places if data[place : place + 4] == tag
            ]
        self.starts = sorted(dict(starts).items())
        self.ranges = {
            tag: (start, end)
            for (start, tag), end in zip(
                self.starts, [s for s, _ in self.starts[1:]] + [len(data)], strict=False
            )
        }
        self.pixels = self.ranges.get(_PIXEL_DATA, (len(data) * 9 // 10, 0))[0]

    def element(self, tag: int, vr: bytes, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        head = struct.pack(self.order + "HH", tag >> 16, tag & 0xFFFF)
        if self.implicit:
            return head + struct.pack(self.order + "I", len(value)) + value
        return head + vr + struct.pack(self.order + "H", len(value)) + value

    def replaced(self, data: bytes, tag: int, element: bytes) -> bytes:
        after = [start for start, other in self.starts if other > tag]
        start, end = self.ranges.get(tag, (min(after, default=self.pixels),) * 2)
        return data[:start] + element + data[end:]


def _flip(data: bytes, random: np.random.Generator, low: int, high: int) -> bytes:
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        changed[random.integers(low, max(low + 1, high))] ^= 1 << random.integers(8)
    return bytes(changed)


def _header_bits(data, parts, random):
    return _flip(data, random, min(132, parts.pixels - 1), parts.pixels)


def _pixel_bits(data, parts, random):
    return _flip(data, random, parts.pixels, len(data))


def _start_of_pixels(data, parts, random):
    return _flip(data, random, parts.pixels, min(len(data), parts.pixels + 200))


def _frame_size(data, parts, random):
    """The matrix that the compressed frame itself names: JPEG and JPEG-LS (SOF), JPEG 2000
    (SIZ)."""
    changed, end = bytearray(data), min(len(data), parts.pixels + 2000)
    for marker, offset, size in (
        (b"\xff\xc0", 5, 4),
        (b"\xff\xc1", 5, 4),
        (b"\xff\xc3", 5, 4),
        (b"\xff\xf7", 5, 4),
        (b"\xff\xc2", 5, 4),
        (b"\xff\x51", 6, 8),
    ):
        at = data.find(marker, parts.pixels, end)
        if at >= 0 and at + offset + size <= len(data):
            number = int(random.choice([1, 513, 30000, 65535]))
            changed[at + offset : at + offset + size] = struct.pack(
                ">HH" if size == 4 else ">II", number, number
            )
            return bytes(changed)
    return _start_of_pixels(data, parts, random)


def _truncated(data, parts, random):
    low, high = (1, parts.pixels) if random.random() < 0.5 else (parts.pixels, len(data))
    return data[: random.integers(low, max(low + 1, high))]


def _inserted_or_cut(data, parts, random):
    at, size = int(random.integers(0, parts.pixels)), int(random.integers(1, 20))
    return (
        data[:at] + random.bytes(size) + data[at:]
        if random.random() < 0.5
        else data[:at] + data[at + size :]
    )


def _elements_moved(data, parts, random):
    """Two elements swapped, one doubled or one removed."""
    if len(parts.starts) < 3:
        return _header_bits(data, parts, random)
    tags = [tag for _, tag in parts.starts]
    first, second = sorted(random.choice(len(tags), 2, replace=False))
    (a, b), (c, d) = parts.ranges[tags[first]], parts.ranges[tags[second]]
    return (
        data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:],
        data[:b] + data[a:b] + data[b:],
        data[:a] + data[b:],
    )[random.integers(3)]


def _absurd_value(data, parts, random):
    if random.random() < 0.5:
        tag = int(random.choice(list(_SHORTS)))
        value = struct.pack(parts.order + "H", int(random.choice(_SHORTS[tag])))
        return parts.replaced(data, tag, parts.element(tag, b"US", value))
    tag = int(random.choice(list(_TEXTS)))
    value = _TEXTS[tag][random.integers(len(_TEXTS[tag]))]
    vr = pydicom.datadict.dictionary_VR(tag).encode()
    return parts.replaced(data, tag, parts.element(tag, vr, value))


def _absurd_length(data, parts, random):
    if not parts.starts:
        return _header_bits(data, parts, random)
    start = parts.starts[random.integers(len(parts.starts))][0]
    changed = bytearray(data)
    if parts.implicit or data[start + 4 : start + 6] in (b"OW", b"OB", b"SQ", b"UN", b"UT"):
        at = start + (4 if parts.implicit else 8)
        lengths = (0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, int(random.integers(1 << 20)))
        changed[at : at + 4] = struct.pack(
            parts.order + "I", lengths[random.integers(len(lengths))]
        )
    else:
        changed[start + 6 : start + 8] = struct.pack(
            parts.order + "H", (0, 1, 0xFFFE, 0xFFFF)[random.integers(4)]
        )
    return bytes(changed)


def _nested(data, parts, random):
    """Sequences within sequences, of undefined length."""
    depth = int(random.choice([3, 100, 3000]))
    sequence = (
        struct.pack(parts.order + "HH", 0x0008, 0x1140)
        + (b"" if parts.implicit else b"SQ\0\0")
        + b"\xff" * 4
    )
    item = struct.pack(parts.order + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack(parts.order + "HHI", 0xFFFE, 0xE00D, 0) + struct.pack(
        parts.order + "HHI", 0xFFFE, 0xE0DD, 0
    )
    return parts.replaced(data, 0x00081140, (sequence + item) * depth + ends * depth)


def _other_syntax(data, parts, random):
    at = data.find(b"\x02\x00\x10\x00UI", 0, 1000)
    if at < 0:
        return _header_bits(data, parts, random)
    size = struct.unpack_from("<H", data, at + 6)[0]
    value = str(random.choice(_SYNTAXES)).encode()
    value += b"\0" * (len(value) % 2)
    return data[: at + 6] + struct.pack("<H", len(value)) + value + data[at + 8 + size :]


MUTATIONS = (
    _header_bits,
    _pixel_bits,
    _start_of_pixels,
    _frame_size,
    _truncated,
    _inserted_or_cut,
    _elements_moved,
    _absurd_value,
    _absurd_value,
    _absurd_length,
    _nested,
    _other_syntax,
)


def mutate(files: list[bytes], seed: int, number: int) -> tuple[bytes, str]:
    """Mutant `number` of a seed, and the name of its mutation."""
    random = np.random.default_rng([seed, number])
    data = files[random.integers(len(files))]
    mutation = MUTATIONS[number % len(MUTATIONS)]
    return mutation(data, Parts(data), random), mutation.__name__.strip("_")


def expected_hu(path: Path, frame: int) -> np.ndarray | None:
    """A frame's HU [H, W] by pydicom alone, float64; None where pydicom does not read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            stored = pixel_array(dataset, index=frame, raw=True).astype(np.float64)
            places = [dataset]
            for keyword, index in (
                ("SharedFunctionalGroupsSequence", 0),
                ("PerFrameFunctionalGroupsSequence", frame),
            ):
                if groups := dataset.get(keyword):
                    places += list(groups[index].get("PixelValueTransformationSequence") or [])
            slope, intercept = 1.0, 0.0
            for place in places:
                slope = slope if place.get("RescaleSlope") is None else float(place.RescaleSlope)
                intercept = (
                    intercept
                    if place.get("RescaleIntercept") is None
                    else float(place.RescaleIntercept)
                )
            return stored * slope + intercept
    except Exception:
        return None


def read_mutant(folder: Path, mutation: str) -> str:
    """The outcome of `folder`/mutant: "not_image reason", "rejected reason", "pixels reason",
    "equal", ..."""
    header = read_header(folder, Source("mutant", "", (folder / "mutant").stat().st_size))
    if isinstance(header, NotAnImage):
        return (
            f"not_image {header.reason}"
            if header.reason in REASONS
            else f"undocumented_reason {header.reason}"
        )
    outcomes = []
    for planned in plan_series([header], RULES):
        loaded = planned if isinstance(planned, Rejection) else load_volume(folder, planned, RULES)
        if isinstance(loaded, Rejection) and loaded.reason not in REASONS:
            return f"undocumented_reason {loaded.reason}"
        if isinstance(planned, Rejection) or (
            isinstance(loaded, Rejection) and loaded.reason == "missing_rescale"
        ):
            # slices without rescale tags are judged as a volume
            outcomes.append(f"rejected {loaded.reason}")
            continue
        reader = PixelReader(folder)
        for one in planned.all_headers[:_FRAMES_COMPARED]:
            try:
                hu = to_hu(reader.read(one), one).astype(np.float64)
            except PixelError as error:
                if "MemoryError" in str(error):
                    return "memory refused by the limit"
                outcomes.append(f"pixels {error.reason}")
                continue
            expected = expected_hu(folder / "mutant", one.frame)
            if expected is None:
                outcomes.append("read, not by pydicom")
            elif expected.shape == hu.shape and np.allclose(
                hu[hu != -1000], expected[hu != -1000], atol=1e-3
            ):
                outcomes.append("equal to pydicom")
            elif one.transfer_syntax not in NATIVE_SYNTAXES and mutation in (
                "pixel_bits",
                "start_of_pixels",
            ):
                outcomes.append("damaged compressed frame: decoders differ")
            elif isinstance(loaded, Rejection) and loaded.reason == "implausible_hu":
                outcomes.append("not as pydicom, and the volume is refused: implausible_hu")
            else:
                return f"wrong_hu {mutation}"
    return outcomes[0] if outcomes else "nothing"


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _work(connection, files: list[bytes], seed: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    with tempfile.TemporaryDirectory() as folder:
        while (number := connection.recv()) is not None:
            data, mutation = mutate(files, seed, number)
            (Path(folder) / "mutant").write_bytes(data)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _peak_bytes()
            try:
                outcome = read_mutant(Path(folder), mutation)
            except BaseException as error:
                outcome = f"exception {type(error).__name__}: {mutation}"
            if _peak_bytes() - before > MAX_GROWTH_BYTES:
                outcome = f"memory {(_peak_bytes() - before) >> 20} MiB: {mutation}"
            connection.send(outcome)


def run(files: list[bytes], num_mutants: int, seed: int, first: int = 0) -> dict[str, list[int]]:
    """Outcome -> numbers of mutants. Outcomes that begin with a name of `DEFECTS` are defects."""
    outcomes = collections.defaultdict(list)
    context, process, ours = multiprocessing.get_context("fork"), None, None
    for number in range(first, first + num_mutants):
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, files, seed), daemon=True)
            process.start()
            theirs.close()
        ours.send(number)
        try:
            outcome = ours.recv() if ours.poll(SECONDS_A_MUTANT) else "hang"
        except EOFError:
            outcome = "died"
        if outcome in ("hang", "died"):
            process.kill()
            process.join()
            process = None
        outcomes[outcome].append(number)
    if process is not None:
        ours.send(None)
        process.join()
    return dict(outcomes)


def defects(outcomes: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: numbers for name, numbers in outcomes.items() if name.startswith(DEFECTS)}


def load_files(archive: Path, every: int = 10) -> list[bytes]:
    """All small folders' files and every so manyth of the rest, in the order of their names."""
    files = []
    for number, source in enumerate(
        entry for entry in list_sources(archive) if isinstance(entry, Source)
    ):
        if (number % every == 0 or "transfer_syntaxes" in source.path) and source.size < 4 << 20:
            data = read_bytes(archive, source)
            if data[128:132] == b"DICM":
                files.append(data)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--archive", type=Path, required=True, help="folder of DICOM files; it is only read"
    )
    parser.add_argument("--num_mutants", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = load_files(arguments.archive)
    outcomes = run(files, arguments.num_mutants, arguments.seed, arguments.first)
    for name, numbers in sorted(outcomes.items()):
        print(
            f"{len(numbers):>7} {name}" + (f": {numbers[:8]}" if name.startswith(DEFECTS) else "")
        )
    print(f"{sum(map(len, outcomes.values())):>7} mutants of {len(files)} files")
    return 1 if defects(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
