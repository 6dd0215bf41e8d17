r"""Search of all outputs of the program for values of the headers and paths of its scans.

    python -m tests.campaigns.privacy --archive=SCANS [--work_dir=DIR]

Runs every command that reads scans or their datasets (prepare of each kind of archive, describe,
quickstart and its report, train, evaluate, embed, predict, export) on SCANS. Searches every output
file, its name and the printed lines, stored and decompressed (`tests.campaigns.output_bytes`), for

- every value of five characters or more of every PN, UI, DA, TM, DT, LO, SH, ST, LT, UT, UC and AE
  element of every header, of the ID elements of CS, and of private elements of unknown kind that
  are printable; each component of names;
- every source path and member name of a zip file, each part of it of five characters or more, also
  without its ending where it has a digit;
- the key of the pseudonyms.

Capitals do not matter. All outputs are searched but the private ones: audit directories, and
segmentation.dcm, which carries the patient's identity by purpose (the search must find the values
there, otherwise it does not work). `Search.kind` names the values that may occur; all of them are
counted and printed.
"""

import argparse
import collections
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pydicom

from data_prep.privacy import leaks, pseudonyms
from data_prep.scan.archives import Unreadable, list_sources, read_bytes
from tests.campaigns.output_bytes import PIXELS, pieces

PROJECT = Path(__file__).resolve().parents[2]
# of `data_prep.privacy.pseudonyms.public_fields` those that are texts, and what of them is
# published
PUBLISHED = {
    "LO Manufacturer": pseudonyms.public_manufacturer,
    "SH ConvolutionKernel": pseudonyms.public_kernel,
    "SH EthnicGroup": pseudonyms.public_ethnic_group,
}
# those of the DICOM standard itself: they name classes and codings, not patients
STANDARD_UIDS = "1.2.840.10008."
OWN_WORDS = {  # values that are words of our own: what they have to stand in, in small letters
    "chest": rb"no_chest|chest_ct|chest ct|chest scans?|cover the chest",
    # a folder's name, and a kind of archive
    "nifti": rb"not_nifti|not a nifti file|archive(\": \"|=)nifti",
    "unknown": rb"its findings are unknown|contrast unknown: volumes",
    "license": rb"\"license\":",
    "applied": rb"rescale slope and intercept are applied",
    "brain": rb"brain\.event:2",  # how every file of TensorBoard begins
}
# An export holds a copy of this file, whose words are ours.
OWN_SOURCE = PROJECT / "ctssl_jax" / "torch_bridge" / "ctssl_torch.py"
PRIVATE = ("-audit/", "private/", "segmentation.dcm")
_NUMBER = re.compile(rb"(?<![0-9a-z])(?<![0-9]\.)(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(?![0-9a-z]|\.\d)")
_DIGEST = re.compile(rb"(?<![0-9a-z])[0-9a-f]{16,}(?![0-9a-z])")
_OTHER = str.maketrans(
    "abcdefghijklmnopqrstuvwxyz0123456789", "nopqrstuvwxyzabcdefghijklm5678901234"
)
IN_PIXELS = "fewer than 12 characters in pixels"
_BASE64 = re.compile(rb"[a-z0-9+/]{200,}")
_AROUND = 400  # bytes
_CHANCE = 20  # places in pixels that may be chance though none of the made-up values has any


class Source(NamedTuple):
    """What is searched for: values in small letters -> where they come from ("LO PatientID",
    "path")."""

    num_headers: int
    num_paths: int
    values: dict[str, set[str]]


class Finding(NamedTuple):
    """A value in an output. `kind`: "hit", or the reason why it is allowed."""

    path: str
    place: str
    value: str
    kind: str


def read_source(archive: Path) -> Source:
    """The values that must not occur in any output."""
    values, num_headers, num_paths = collections.defaultdict(set), 0, 0
    for entry in list_sources(archive):
        source = entry.source if isinstance(entry, Unreadable) else entry
        num_paths += 1
        for path in filter(None, (source.path, source.member)):
            stem = Path(path).stem
            for text in (path, *path.split("/"), *([stem] if re.search("[0-9]", stem) else ())):
                values[text].add("path")
        elements = (
            []
            if isinstance(entry, Unreadable)
            else leaks.header_elements(read_bytes(archive, source))[0]
        )
        num_headers += bool(elements)
        for element in elements:
            name = pydicom.datadict.keyword_for_tag(element.tag) or str(element.tag)
            if element.VR == "CS" and not name.endswith("ID"):
                continue
            for text in leaks.element_texts(element):
                values[text].add(f"{element.VR} {name}")
                for part in re.split(r"[\^=\s]+", text) if element.VR == "PN" else ():
                    values[part].add(f"{element.VR} {name}")
    merged = collections.defaultdict(set)
    for text, origins in values.items():
        if len(text) >= leaks.SHORTEST_NEEDLE:
            merged[text.lower()] |= origins
    return Source(num_headers, num_paths, dict(merged))


class Search:
    """Finds the values of a source in bytes.

    Values of fewer than 12 characters occur in millions of pixels by chance. How often is measured
    by as many made-up ones, in which every letter and digit is another: `made_up_in_pixels` counts
    where those occur.
    """

    def __init__(self, values: Mapping[str, set[str]]):
        self._origins = values
        self._values = {}  # as it may be written -> the value
        for value in values:
            forms = {value, json.dumps(value)[1:-1], value.replace("/", "\\/")}
            try:
                forms.add(value.encode("latin-1").decode("utf-8", "surrogateescape"))
            except UnicodeEncodeError:
                pass
            self._values |= dict.fromkeys(forms, value)
        self._needles = leaks.SecretTexts(self._values)
        short = (value.translate(_OTHER) for value in values if len(value) < leaks.LONG_NEEDLE)
        self._made_up = leaks.SecretTexts(value for value in short if value not in self._values)
        self.made_up_in_pixels = 0

    def find(self, path: str, place: str, data: bytes) -> Iterator[Finding]:
        """Every occurrence with its kind."""
        data = data.lower()
        if place.endswith(PIXELS):
            self.made_up_in_pixels += sum(1 for _ in self._made_up.find(data))
        for at, form in self._needles.find(data):
            end = at + len(form.encode("utf-8", "surrogateescape"))
            yield Finding(
                path, place, self._values[form], self.kind(self._values[form], place, data, at, end)
            )

    def kind(self, value: str, place: str, data: bytes, at: int, end: int) -> str:
        """ "hit", or why a value at this place of some bytes in small letters is none."""
        if self._is_public(value):
            return "published field"
        if value.startswith(STANDARD_UIDS):
            return "UID of the standard"
        if place.endswith(PIXELS) and len(value) < leaks.LONG_NEEDLE:
            return IN_PIXELS
        start = max(0, at - _AROUND)
        around = data[start : end + _AROUND]

        def lies_within(pattern: re.Pattern | bytes) -> bool:
            matches = (
                match for match in re.finditer(pattern, around) if match.start() <= at - start
            )
            return any(
                end - start <= match.end() and not _same_number(match.group(), value)
                for match in matches
            )

        if value in OWN_WORDS and lies_within(OWN_WORDS[value]):
            return f"own words, {value}"
        if lies_within(_DIGEST) or lies_within(_NUMBER):
            return "part of a longer number or digest"
        return "part of base64, which is opened" if lies_within(_BASE64) else "hit"

    def _is_public(self, value: str) -> bool:
        return any(
            published(value) == value
            for origin, published in PUBLISHED.items()
            if origin in self._origins[value]
        )


def _same_number(token: bytes, value: str) -> bool:
    """Whether a token says no more than the value: it itself, or the same number, as 20010203.0
    does."""
    return (
        token == value.encode()
        or re.fullmatch(rb"\.0*", token.removeprefix(value.encode())) is not None
    )


def search_folder(folder: Path, search: Search) -> tuple[list[Finding], collections.Counter]:
    """Findings in all outputs below a folder, and how many files and bytes, stored and opened, were
    searched."""
    findings, counts = [], collections.Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        counts["files"] += 1
        findings += search.find(name, "its name", name.encode("utf-8", "surrogateescape"))
        if path.name == OWN_SOURCE.name and path.read_bytes() == OWN_SOURCE.read_bytes():
            counts["own source"] += 1
            continue
        for place, data in pieces(path):
            counts["stored bytes" if place == "bytes" else "opened bytes"] += len(data)
            findings += search.find(name, place, data)
    return findings, counts


# ---- outputs -------------------------------------------------------------------------------------

_TINY = (
    "model.hidden=(4,8)",
    "model.depth=1",
    "num_steps=2",
    "eval_every=2",
    "log_every=1",
    "batch_size=8",
)


def stages(archive: Path, work_dir: Path) -> list[tuple[str, int, list[str]]]:
    """(name, exit code, module and arguments) of every command that is run."""
    w, key = work_dir, f"--pseudonym_key_file={work_dir}/private/key"
    prepare = ("data_prep.prepare", f"--input_dir={archive}", key)
    run = f"--workdir={w}/quickstart/run"

    def train(name: str, recipe: str, *fields: str) -> list[str]:
        given = [f"--config.{field}" for field in (f"dataset={w}/{name}", *_TINY, *fields)]
        return [
            "ctssl_jax.train",
            f"--config=configs/{recipe}.py:small",
            f"--workdir={w}/{name}-run",
            *given,
        ]

    def evaluate(name: str, split: str) -> list[str]:
        return [
            "ctssl_jax.evaluate",
            f"--workdir={w}/{name}-run",
            f"--dataset={w}/{name}",
            f"--split={split}",
            f"--output={w}/{name}-result.json",
        ]

    def predict(name: str, *more: str) -> list[str]:
        return [
            "ctssl_jax.predict",
            f"--workdir={w}/{name}-run",
            f"--input={archive}",
            f"--output={w}/{name}-prediction",
            *more,
        ]

    return [
        ("dry_run", 0, [*prepare, f"--output_dir={w}/full", "--dry_run"]),
        ("prepare", 0, [*prepare, f"--output_dir={w}/full"]),
        (
            "describe",
            0,
            [
                "data_prep.describe",
                f"--dataset={w}/full",
                "--verify",
                f"--input_dir={archive}",
                f"--audit_dir={w}/full-audit",
            ],
        ),
        (
            "quickstart",
            0,
            [
                "experiments.quickstart",
                f"--input_dir={archive}",
                f"--output_dir={w}/quickstart",
                "--num_steps=2",
            ],
        ),
        (
            "lidc",
            0,
            [
                *prepare,
                f"--output_dir={w}/nodules",
                "--archive=lidc_idri",
                "--image_size=64",
                f"--annotations_dir={archive}/lidc_xml",
                "--splits=0.5,0.5,0",
            ],
        ),
        (
            "labels",
            0,
            [
                *prepare,
                f"--output_dir={w}/labels",
                "--image_size=64",
                "--window=50,350",
                "--window=-600,1500",
                f"--labels_csv={w}/private/labels.csv",
                f"--labels_csv={w}/private/smokers.csv",
            ],
        ),
        (
            "torso",
            0,
            [
                *prepare,
                f"--output_dir={w}/torso",
                "--archive=nifti",
                "--image_size=64",
                "--splits=1,0,0",
                "--norequire_lung",
                "--max_slice_thickness_mm=10",
            ],
        ),
        ("train_labels", 0, train("labels", "pe", "label=finding")),
        ("train_nodules", 0, train("nodules", "nodules")),
        ("evaluate_labels", 0, evaluate("labels", "test")),
        ("evaluate_nodules", 0, evaluate("nodules", "validation")),
        ("predict_several", 2, predict("labels")),
        ("predict_label", 0, predict("labels", "--series_index=0")),
        ("predict_mask", 0, predict("nodules", "--series_index=1", "--dicom_seg")),
        (
            "embed_scans",
            0,
            [
                "ctssl_jax.embed",
                run,
                f"--input={archive}",
                key,
                f"--output={w}/embeddings/scans.parquet",
            ],
        ),
        (
            "embed_dataset",
            0,
            [
                "ctssl_jax.embed",
                run,
                f"--input={w}/quickstart/dataset",
                f"--output={w}/embeddings/dataset.npz",
            ],
        ),
        (
            "export",
            0,
            [
                "ctssl_jax.export",
                run,
                f"--output_dir={w}/exported",
                "--format=torch,safetensors,onnx",
                "--license=CC-BY-4.0",
                f"--results={w}/quickstart/result.json",
            ],
        ),
    ]


def write_private_tables(archive: Path, folder: Path) -> None:
    """A key, and tables of labels by SOP Instance UID and by Patient ID, as an archive's owner has
    them."""
    folder.mkdir(parents=True, exist_ok=True)
    pseudonyms.make_key(folder / "key")
    slices, patients = {}, {}
    for source in list_sources(archive):
        if not isinstance(source, Unreadable):
            found = {
                element.keyword: element.value
                for element in leaks.header_elements(read_bytes(archive, source))[0]
            }
            if found.get("Modality") == "CT" and found.get("SOPInstanceUID"):
                slices[str(found["SOPInstanceUID"])] = len(slices) % 2
                if found.get("PatientID"):
                    patients.setdefault(str(found["PatientID"]), len(patients) % 2)
    for name, column, key, rows in (
        ("labels", "finding", "SOPInstanceUID", slices),
        ("smokers", "smoker", "PatientID", patients),
    ):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([(key, column), *rows.items()])


def make_outputs(archive: Path, work_dir: Path) -> list[str]:
    """Run all stages; what each prints is in logs/NAME.log. Returns the names of those that ended
    otherwise."""
    write_private_tables(archive, work_dir / "private")
    (work_dir / "logs").mkdir(exist_ok=True)
    wrong = []
    for name, code, command in stages(archive, work_dir):
        with open(work_dir / "logs" / f"{name}.log", "w") as log:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=PROJECT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        print(f"{name}: exit code {done.returncode}", flush=True)
        wrong += [name] if done.returncode != code else []
    return wrong


# ---- the command ---------------------------------------------------------------------------------


def is_private(path: str) -> bool:
    """Whether an output is for the archive's owner alone."""
    return any(part in path for part in PRIVATE)


def report(
    source: Source, findings: Iterable[Finding], counts: Mapping[str, int], made_up_in_pixels: int
) -> tuple[list[str], bool]:
    """The findings as lines, and whether no value leaked. A line quotes at most two characters of a
    value."""
    origins = source.values
    kinds = collections.defaultdict(list)
    for finding in findings:
        kinds["private output" if is_private(finding.path) else finding.kind].append(finding)
    hits = kinds.pop("hit", [])
    lines = [
        f"{source.num_headers} headers, {source.num_paths} paths, {len(origins)} different values",
        f"{counts['files']} files, {counts['stored bytes']} bytes as stored, "
        f"{counts['opened bytes']} bytes opened",
    ]
    for kind, found in sorted(kinds.items()):
        values = {finding.value for finding in found}
        lines.append(f"not counted, {kind}: {len(found)} places, {len(values)} values")
    in_pixels = len(kinds[IN_PIXELS])
    lines.append(
        f"in pixels: {in_pixels} places of short values, {made_up_in_pixels} of as many made-up "
        f"ones"
    )
    for (path, place, value), number in collections.Counter(
        finding[:3] for finding in hits
    ).items():
        where = ", ".join(sorted(origins[value]))
        lines.append(
            f"LEAK {path}: {place}: {len(value)} characters that begin with {value[:2]!r} "
            f"({where}), {number} x"
        )
    lines.append(f"{len(hits)} leaks")
    return lines, not hits and in_pixels <= 2 * made_up_in_pixels + _CHANCE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, required=True, help="folder of scans")
    parser.add_argument(
        "--work_dir", type=Path, help="for the outputs, kept; default: a temporary one"
    )
    parser.add_argument(
        "--search_only", action="store_true", help="search what an earlier call left in --work_dir"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        archive, work_dir = given.archive.resolve(), (given.work_dir or Path(temporary)).resolve()
        wrong = [] if given.search_only else make_outputs(archive, work_dir)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote values
            source = read_source(archive)
        for key in (*work_dir.rglob("pseudonym_key"), work_dir / "private" / "key"):
            source.values[key.read_text().strip()] = {"pseudonym key"}
        search = Search(source.values)
        findings, counts = search_folder(work_dir, search)
        lines, clean = report(source, findings, counts, search.made_up_in_pixels)
    print(
        "\n".join(
            lines + [f"WRONG {name}: another exit code than expected; see logs" for name in wrong]
        )
    )
    return 0 if clean and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
