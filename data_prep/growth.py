"""What an earlier run left in a dataset: such volumes stay as they are when the archive grows."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.archives import Source
from data_prep.conversion import ExamNote, Rejected, exam_id, read_note, volume_id
from data_prep.dicom import Rejection, SeriesCandidate


@dataclasses.dataclass(frozen=True)
class KnownVolumes:
    """The volumes of a dataset by exam. `kept_notes_dir` holds the note of each."""

    kept_notes_dir: Path
    key: bytes = dataclasses.field(repr=False)
    volumes_of_exam: Mapping[str, list[str]]  # exam_id -> volume_ids
    one_per_study: bool = True

    def outcome(self, exam: list[SeriesCandidate]) -> ExamNote | None:
        """What becomes of an exam of which volumes are in the dataset; None: it is to be converted.

        The files of a volume count as they did; a file that came to its series since is rejected as `series_changed`.
        """
        notes = self._notes(*exam[0].exam_key)
        sources = [{header.source for header in candidate.all_headers} for candidate in exam]
        before = {source for note in notes for source in note.sources_of_volume}
        if not notes or not (self.one_per_study or before & set().union(*sources)):
            return None
        rejected, accounted = [], set()
        for candidate, files in zip(exam, sources, strict=True):
            new = files - before - accounted
            accounted |= new
            changed = bool(files & before)
            if changed and not new:
                continue
            reason = "series_changed" if changed else "other_reconstruction"
            rejected.append(Rejected(volume_id(self.key, candidate), reason, "", sorted(new)))
        return _outcome(notes, set().union(*sources), rejected)

    def outcome_of_rejection(self, rejection: Rejection, row: Rejected) -> ExamNote:
        """The same for a stack that the header checks refuse: its files may be in a volume from earlier."""
        first = rejection.headers[0]
        notes = self._notes(first.patient_key, first.study_instance_uid)
        before = {source for note in notes for source in note.sources_of_volume}
        if not before & set(row.sources):
            return _outcome([], set(), [row])
        new = sorted(set(row.sources) - before)
        rejected = [Rejected(row.series_id, "series_changed", "", new)] if new else []
        return _outcome(notes, set(row.sources), rejected)

    def _notes(self, patient_key: str, study_uid: str) -> list[ExamNote]:
        volumes = self.volumes_of_exam.get(exam_id(self.key, patient_key, study_uid), ())
        return [read_note(self.kept_notes_dir / f"{volume}.json") for volume in volumes]


def _outcome(notes: Iterable[ExamNote], found: set[Source], rejected: list[Rejected]) -> ExamNote:
    return ExamNote(
        key="",
        volume=None,
        record_bytes=0,
        taken=[source for note in notes for source in note.taken if source in found],
        dropped=[entry for note in notes for entry in note.dropped if entry[0] in found],
        rejected=rejected,
    )
