"""The outcome of an exam: a note beside its staged volume, written last, so it means "done"."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_prep.labels.lookup import Labels
from data_prep.pipeline.options import Directories, Options
from data_prep.privacy.pseudonyms import Rejected, private_digest
from data_prep.scan.archives import ArchiveDirectory, Source
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import Rules
from data_prep.scan.series import SeriesCandidate
from data_prep.system.files import read_json, write_file


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The settings by which all exams of a run are converted."""

    input_dir: ArchiveDirectory
    notes_dir: Path  # private: notes name source files
    records_dir: Path
    rules: Rules
    windows: tuple[tuple[float, float], ...]  # (level, width) in HU, one a channel
    image_size: int
    key: bytes = dataclasses.field(repr=False)  # of the pseudonyms
    labels: Labels
    options_digest: str = ""

    @staticmethod
    def of(options: Options, directories: Directories, key: bytes, labels: Labels) -> "Conversion":
        """The settings of a run and of each task of an array job, which must be the same."""
        return Conversion(
            input_dir=directories.input_dir,
            notes_dir=directories.notes_dir,
            records_dir=directories.records_dir,
            rules=options.rules,
            windows=options.windows,
            image_size=options.image_size,
            key=key,
            labels=labels,
            options_digest=options.conversion_digest(),
        )


@dataclasses.dataclass(frozen=True)
class ExamNote:
    """The outcome of an exam."""

    key: str
    # row of volumes.csv without split and first_record; None: no volume
    volume: dict[str, Any] | None
    record_bytes: int
    taken: list[Source]
    # files of the taken series that are not in the volume, with reasons
    dropped: list[tuple[Source, str]]
    rejected: list[Rejected]
    # of the volume: `slice_id` -> "" or the reason why it was dropped
    slices: dict[str, str] = dataclasses.field(default_factory=dict)
    # of the volume: see `_VolumeFacts.label_note`
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    # of the volume: `pixel_digests`; programs before version 2 of the rules wrote none
    pixels: list[str] = dataclasses.field(default_factory=list)

    @property
    def refusal(self) -> str:
        """Why no candidate became a volume: the reason of the first; "" if one did."""
        return "" if self.volume else self.rejected[0].reason

    @property
    def failed_for_now(self) -> bool:
        return any(series.reason == FAILED_FOR_NOW for series in self.rejected)


def exam_key(conversion: Conversion, exam: list[SeriesCandidate]) -> str:
    """Names the outcome of an exam."""
    files = [
        [
            candidate.series_key,
            candidate.notes,
            [(*header.source, header.frame) for header in candidate.all_headers],
        ]
        for candidate in exam
    ]
    content = json.dumps(
        [exam[0].exam_key, files, [conversion.labels.version(candidate) for candidate in exam]]
    )
    return private_digest(conversion.key, conversion.options_digest, content)


def note_path(conversion: Conversion, key: str) -> Path:
    return conversion.notes_dir / f"{key}.json"


def records_path(records_dir: Path, key: str) -> Path:
    return records_dir / f"{key}.array_record"


def read_note(path: Path) -> ExamNote:
    fields = read_json(path)
    return ExamNote(
        key=fields["key"],
        volume=fields["volume"],
        record_bytes=fields["record_bytes"],
        taken=[Source(*source) for source in fields["taken"]],
        dropped=[(Source(*source), reason) for source, reason in fields["dropped"]],
        rejected=[
            Rejected(**row | {"sources": [Source(*source) for source in row["sources"]]})
            for row in fields["rejected"]
        ],
        slices=fields["slices"],
        labels=fields["labels"],
        pixels=fields.get("pixels", []),
    )


def write_note(conversion: Conversion, note: ExamNote) -> None:
    write_file(note_path(conversion, note.key), json.dumps(dataclasses.asdict(note)).encode())


def is_converted(conversion: Conversion, exam: list[SeriesCandidate]) -> bool:
    """Whether an earlier run left the outcome of an exam, which is not to be tried again."""
    return final_note(conversion, exam_key(conversion, exam)) is not None


def final_note(conversion: Conversion, key: str) -> ExamNote | None:
    """The outcome of an exam that an earlier run left and that is not to be tried again."""
    path = note_path(conversion, key)
    if not path.exists():
        return None
    note = read_note(path)
    if note.failed_for_now:
        return None
    staged = note.volume is None or records_path(conversion.records_dir, key).exists()
    return note if staged else None
