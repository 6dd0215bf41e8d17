"""Accounts for every file of an archive: it is in a volume, dropped from one, rejected, or no image."""

import collections
import csv
from typing import Any, TextIO

from data_prep.archives import Source, Unreadable
from data_prep.headers import NotAnImage
from data_prep.pipeline.notes import ExamNote

_COLUMNS = ("path", "member", "outcome", "pseudonym", "reason", "detail")


class Account:
    """Collects outcomes; writes one row a file to `sources_file` (private: it names the sources)."""

    def __init__(self, sources_file: TextIO):
        self._writer = csv.writer(sources_file, lineterminator="\n")
        self._writer.writerow(_COLUMNS)
        self._files = {name: collections.Counter() for name in ("dropped", "rejected", "not_images")}
        self._series = collections.Counter()
        self._in_volumes = 0
        self.rejected: list[dict[str, Any]] = []  # rows of rejected.csv
        self.volumes: set[str] = set()  # those of which there are files

    def add(self, outcomes: list[ExamNote], not_images: list[NotAnImage | Unreadable]) -> None:
        """Adds what became of a group of files that share none with any other group.

        A file of several stacks (a multi-frame file) counts once: for a volume, else as dropped, else as rejected.
        """
        rows: dict[Source, tuple[str, ...]] = {}
        for note in outcomes:
            volume = note.volume["volume_id"] if note.volume else ""
            rows |= {source: ("volume", volume, "", "") for source in note.taken}
            self.volumes |= {volume} if note.taken else set()
        self._in_volumes += len(rows)
        for note in outcomes:
            volume = note.volume["volume_id"] if note.volume else ""
            for source, reason in note.dropped:
                if source not in rows:
                    rows[source] = ("dropped", volume, reason, "")
                    self._files["dropped"][reason] += 1
        for note in outcomes:
            for series in note.rejected:
                files = [source for source in series.sources if source not in rows]
                rows |= {source: ("rejected", series.series_id, series.reason, series.detail) for source in files}
                self._files["rejected"][series.reason] += len(files)
                self._series[series.reason] += 1
                self.rejected.append(
                    {
                        "series_id": series.series_id,
                        "num_files": len(files),
                        "reason": series.reason,
                        "detail": series.detail,
                    }
                )
        for entry in not_images:
            rows[entry.source] = ("not_an_image", "", entry.reason, entry.detail)
            self._files["not_images"][entry.reason] += 1
        self._writer.writerows((source.path, source.member, *row) for source, row in sorted(rows.items()))

    def counts(self, num_files: int) -> dict[str, Any]:
        """Files and series by what became of them.

        Raises RuntimeError unless they add up to `num_files`.
        """
        total = self._in_volumes + sum(sum(counter.values()) for counter in self._files.values())
        if total != num_files:
            raise RuntimeError(
                f"{num_files} files were listed and {total} accounted for; "
                "if files come and go, run again when the archive is at rest, else please report this"
            )
        return {
            "files": num_files,
            "files_in_volumes": self._in_volumes,
            **{f"files_{name}": dict(sorted(counter.items())) for name, counter in self._files.items()},
            "series_rejected": dict(sorted(self._series.items())),
        }
