"""Accounts for every file of an archive: it is in a volume, dropped from one, rejected, or not an
image."""

import collections
import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from data_prep.dataset.schema import rules_lines, summary_text
from data_prep.labels.rsna_pe import RULES
from data_prep.pipeline.notes import ExamNote
from data_prep.privacy.pseudonyms import Rejected
from data_prep.raw.scans import REMEDIES, explain
from data_prep.scan.archives import Source, Unreadable
from data_prep.scan.headers import NotAnImage
from data_prep.scan.reasons import FAILED_FOR_NOW, LEFT_OUT, REASONS
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import as_cell

_COLUMNS = ("path", "member", "outcome", "pseudonym", "reason", "detail")
SOURCES_FILE = "sources.csv"  # private: the outcome of each file
REFUSED_FILE = "refused.csv"  # private: each series that was not taken
REFUSED_COLUMNS = ("pseudonym", "num_files", "reason", "detail", "element", "path", "thumbnail")


class FileAccount:
    """Collects outcomes and writes one row a file to `sources_file` and one row a series that was
    not taken to `refused_file`. Both are private: they name the sources."""

    def __init__(self, sources_file: TextIO, refused_file: TextIO):
        self._writer = csv.writer(sources_file, lineterminator="\n")
        self._writer.writerow(_COLUMNS)
        self._refused = csv.writer(refused_file, lineterminator="\n")
        self._refused.writerow(REFUSED_COLUMNS)
        self._files = {
            name: collections.Counter() for name in ("dropped", "rejected", "not_images")
        }
        self._series = collections.Counter()
        self._in_volumes = 0
        self.rejected: list[dict[str, Any]] = []  # rows of rejected.csv
        self.volumes: set[str] = set()  # volumes of which there are files

    def add(self, outcomes: list[ExamNote], not_images: list[NotAnImage | Unreadable]) -> None:
        """Adds the outcome of a group of files that share no file with another group.

        A file of several stacks (a multi-frame file) counts once: for a volume, else as dropped,
        else as rejected.
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
                rows |= {
                    source: ("rejected", series.series_id, series.reason, series.detail)
                    for source in files
                }
                self._add_refused(series, len(files))
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
        self._writer.writerows(
            (as_cell(source.path), as_cell(source.member), *row)
            for source, row in sorted(rows.items())
        )

    def _add_refused(self, series: Rejected, num_files: int) -> None:
        first = min(series.sources, default=None)
        path = as_cell("/".join(filter(None, (first.path, first.member)))) if first else ""
        private = (as_cell(series.element), path, series.thumbnail)
        self._refused.writerow(
            (series.series_id, num_files, series.reason, series.detail, *private)
        )

    def commonest_in_words(self) -> str:
        """The commonest reason of the rejected series, else of the files, with its remedy."""
        counts = self._series or self._files["not_images"]
        if not counts:
            return "no file is an image"
        reason = counts.most_common(1)[0][0]
        details = {row["detail"] for row in self.rejected if row["reason"] == reason} - {""}
        detail = f" ({min(details)})" if len(details) == 1 else ""
        remedy = f"; {REMEDIES[reason]}" if reason in REMEDIES else ""
        return f"{reason}: {explain(reason)}{detail}{remedy}"

    def counts(self, num_files: int) -> dict[str, Any]:
        """Numbers of files and series by outcome.

        Raises:
            RunFailed: they do not add up to `num_files`.
        """
        total = self._in_volumes + sum(sum(counter.values()) for counter in self._files.values())
        if total != num_files:
            raise RunFailed(
                f"{num_files} files were listed and {total} accounted for; if files come and go, "
                "run again when the archive is at rest, otherwise please report this"
            )
        return {
            "files": num_files,
            "files_in_volumes": self._in_volumes,
            **{
                f"files_{name}": dict(sorted(counter.items()))
                for name, counter in self._files.items()
            },
            "series_rejected": dict(sorted(self._series.items())),
        }


def num_failed_for_now(counts: Mapping[str, Any]) -> int:
    """Series and files that the next run tries again."""
    return sum(
        counts[name].get(FAILED_FOR_NOW, 0) for name in ("series_rejected", "files_not_images")
    )


# ---- in words ----------------------------------------------------------------------------------


class DryRunRefused(InputError):
    """A preparation that would be refused for its number of patients or volumes; `counts` is what a
    dry run returns."""

    def __init__(self, message: str, counts: Mapping[str, Any]):
        super().__init__(message)
        self.counts = counts


def print_dry_run(dry_run: Callable[[], Mapping[str, Any]]) -> None:
    """Prints the result of a dry run, also of one that is refused.

    Raises:
        InputError: of `dry_run`.
    """
    try:
        print(dry_run_text(dry_run()))
    except DryRunRefused as error:
        print(dry_run_text(error.counts))
        raise


def dry_run_text(counts: Mapping[str, Any]) -> str:
    """The result of a dry run, for the user."""
    return "\n".join(
        (
            "Dry run: from the headers; pixels may refuse more. Nothing was written.",
            f"{counts['exams']} volumes of {counts['patients']} patients with {counts['slices']} "
            f"slices would be converted, about {counts['bytes'] / 1e6:.0f} MB.",
            f"They have {counts['series']} usable series; of each study the preferred one is "
            "taken, or all with --reconstructions=all.",
            *(
                f"Label {name}: {', '.join(classes)}"
                for name, classes in counts["label_classes"].items()
            ),
            summary_table(counts),
        )
    )


def dataset_text(
    preparation: Mapping[str, Any], changed: bool, output_dir: Path, audit_dir: Path
) -> str:
    """The result of a preparation, for the user."""
    counts = preparation["counts"]
    lines = [summary_text(preparation, changed, output_dir), summary_table(counts)]
    lines += rules_lines(preparation)
    if missing := counts["volumes_without_files"]:
        lines.append(f"{missing:>8} volumes whose files are gone; they stay in the dataset")
    if failed := num_failed_for_now(counts):
        lines.append(
            f"{failed:>8} series or files could not be read for now ({FAILED_FOR_NOW}); run again "
            "to retry"
        )
    lines.append(f"Private: {audit_dir} links pseudonyms to files; keep it with the scans.")
    return "\n".join(lines)


def summary_table(counts: Mapping[str, Any]) -> str:
    """Numbers of files by outcome and reason, which add up to the number of files; then the
    labels."""
    lines = [f"{counts['files']:>8} files", f"{counts['files_in_volumes']:>8} in volumes"]
    for title, name in (
        ("of the volumes' series, dropped", "files_dropped"),
        ("in rejected series", "files_rejected"),
        ("not images", "files_not_images"),
    ):
        lines.append(f"{sum(counts[name].values()):>8} {title}")
        for reason, number in counts[name].items():
            is_series = name == "files_rejected"
            series = f" in {counts['series_rejected'][reason]} series" if is_series else ""
            lines.append(f"{number:>16} {reason}{series}: {REASONS[reason]}")
    return "\n".join(lines + _people_lines(counts) + _label_lines(counts))


def _people_lines(counts: Mapping[str, Any]) -> list[str]:
    lines = []
    if joined := counts.get("patients_joined"):
        lines.append(
            f"{joined:>8} patients whose scans carry several Patient IDs (spellings, missing in "
            "part, the same images or UIDs) count as one patient each: patients.json of the audit"
        )
    if placeholders := counts.get("placeholder_uids"):
        lines.append(
            f"{placeholders:>8} UIDs are shared by more than four Patient IDs, or by people of "
            "other sex or age; they are taken for placeholders, not for one patient"
        )
    return lines


def _label_lines(counts: Mapping[str, Any]) -> list[str]:
    """Numbers of cells, rows, annotations and masks by outcome."""
    lines = []
    for name, classes in counts.get("labels", {}).items():
        numbers = ", ".join(f"{number} {text}" for text, number in classes.items())
        lines.append(f"{sum(classes.values()):>8} cells of {name}: {numbers}")
    unmatched = {
        f"rows of labels ({names}) of scans that": number
        for names, number in counts.get("label_rows_without_match", {}).items()
    } | {
        "rows of attributes of patients who": counts.get("attribute_rows_without_match"),
        "annotations of scans that": counts.get("annotations_without_match"),
        "masks of scans that": counts.get("masks_without_match"),
    }
    for kind in ("masks", "annotations"):
        for reason, number in counts.get(f"files_of_{kind}_left_out", {}).items():
            text = f"files of {kind} left out, {reason}: {LEFT_OUT[reason]}"
            lines.append(f"{number:>8} {text} See label_files.csv in the audit directory.")
    for text, number in unmatched.items():
        lines += [f"{number:>8} {text} are not in the archive"] if number else []
    for names, number in counts.get("label_rows_of_several_scans", {}).items():
        lines.append(
            f"{number:>8} rows of labels ({names}) whose key fits several slices or scans; they "
            "label none"
        )
    for rule, number in counts.get("exams_with_inconsistent_labels", {}).items():
        lines.append(f"{number:>8} exams whose labels break the rule {rule}: {RULES[rule]}")
    return lines
