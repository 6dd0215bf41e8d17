"""Volumes that an earlier run wrote: they stay the same when the archive grows or is rearranged."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.pipeline.notes import ExamNote, read_note
from data_prep.privacy.pseudonyms import Rejected, exam_id, slice_id, sources_of, volume_id
from data_prep.scan.headers import Header
from data_prep.scan.series import Rejection, SeriesCandidate


@dataclasses.dataclass(frozen=True)
class KnownVolumes:
    """The volumes of a dataset by exam. `kept_notes_dir` holds the note of each.

    Files are known by their content (`slice_id`), not by their place. An exam is known under every
    key of its patient (`Patients.keys_of`).
    """

    kept_notes_dir: Path
    key: bytes = dataclasses.field(repr=False)
    volumes_of_exam: Mapping[str, list[str]]  # exam_id -> volume_ids
    one_per_study: bool = True
    keys_of: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def outcome(self, exam: list[SeriesCandidate]) -> list[ExamNote] | None:
        """The notes of an exam of which volumes are in the dataset; None: it is to be converted.

        The files of a volume count as before. A file that has come to its series since is rejected
        as `series_changed`.
        """
        notes = self._notes(*exam[0].exam_key)
        names = [volume_id(self.key, candidate) for candidate in exam]
        known = [
            name in notes or any(self._is_known(header, notes) for header in candidate.all_headers)
            for name, candidate in zip(names, exam, strict=True)
        ]
        if not notes or not (self.one_per_study or any(known)):
            return None
        outcomes = []
        for candidate, name, changed in zip(exam, names, known, strict=True):
            reason = "series_changed" if changed else "other_reconstruction"
            outcomes += self._account(candidate.all_headers, notes, Rejected(name, reason, "", []))
        return outcomes

    def outcome_of_rejection(self, rejection: Rejection, row: Rejected) -> list[ExamNote]:
        """The notes of a stack that the header checks refuse: its slices may be in a volume of an
        earlier run."""
        first = rejection.headers[0]
        notes = self._notes(first.patient_key, first.study_instance_uid)
        if row.series_id in notes or any(
            self._is_known(header, notes) for header in rejection.headers
        ):
            changed = dataclasses.replace(
                row, reason="series_changed", detail="", element="", thumbnail=""
            )
            return self._account(rejection.headers, notes, changed)
        return [ExamNote("", None, 0, [], [], [row])]

    def _is_known(self, header: Header, notes: Mapping[str, ExamNote]) -> bool:
        name = slice_id(self.key, header)
        return any(name in note.slices for note in notes.values())

    def _account(
        self, headers: Iterable[Header], notes: Mapping[str, ExamNote], rest: Rejected
    ) -> Iterable[ExamNote]:
        """Shares the files of a stack among the volumes that hold its slices and, for new ones,
        `rest`."""
        taken = {name: [] for name in notes}
        dropped = {name: [] for name in notes}
        seen, new = set(), []
        for header in sorted(headers, key=lambda header: (header.source, header.frame)):
            slice_name = slice_id(self.key, header)
            name = next((name for name, note in notes.items() if slice_name in note.slices), None)
            if name is None:
                new.append(header)
            elif slice_name in seen:
                dropped[name].append((header.source, "duplicate_slice"))
            elif reason := notes[name].slices[slice_name]:
                dropped[name].append((header.source, reason))
            else:
                taken[name].append(header)
            seen.add(slice_name)
        outcomes = [
            ExamNote("", notes[name].volume, 0, sources_of(taken[name]), dropped[name], [])
            for name in notes
            if taken[name] or dropped[name]
        ]
        if new:
            rejected = dataclasses.replace(rest, sources=sources_of(new))
            outcomes.append(ExamNote("", None, 0, [], [], [rejected]))
        return outcomes

    def _notes(self, patient_key: str, study_uid: str) -> dict[str, ExamNote]:
        volumes: list[str] = []
        for key in dict.fromkeys((patient_key, *self.keys_of.get(patient_key, ()))):
            volumes += self.volumes_of_exam.get(exam_id(self.key, key, study_uid), ())
        return {volume: read_note(self.kept_notes_dir / f"{volume}.json") for volume in volumes}
