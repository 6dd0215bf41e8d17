"""What a preparation would do, from the headers alone."""

import io
import tempfile
from pathlib import Path
from typing import Any

from data_prep import label_staging
from data_prep.labels import LabelSources
from data_prep.pipeline.accounting import Account
from data_prep.pipeline.notes import ExamNote
from data_prep.pipeline.prepare import Options, Places, check_places
from data_prep.pipeline.splits import check_numbers
from data_prep.planning import all_headers, list_archive, plan_archive, read_plan
from data_prep.privacy.pseudonyms import Rejected, sources_of
from data_prep.scan.loading import header_reader
from data_prep.series import Rejection, SeriesCandidate
from data_prep.workers import WorkerPool, usable_cores

_BYTES_PER_PIXEL = 0.34  # zstd-1 on windowed CT slices, measured


def dry_run(
    options: Options, places: Places, *, sources: LabelSources | None = None, num_workers: int | None = None
) -> dict[str, Any]:
    """What the headers say of an archive. Writes nothing but temporary files, which it removes.

    Returns the counts of preparation.json with the expected `exams`, `patients`, `slices` and `bytes`. Pixels may
    refuse more. What lies in the output directory already makes no difference.

    Raises:
        InputError: unusable directories, no files, or too few patients or volumes for the splits.
    """
    check_places(places)
    sources = sources or LabelSources(options.archive)
    label_staging.check(sources, places.input_dir)
    exams = slices = 0
    patients = set()
    account = Account(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, WorkerPool(num_workers or usable_cores()) as pool:
        listing = Path(folder) / "listing"
        num_files, _ = list_archive(places.input_dir, listing)
        staged = label_staging.stage(sources, places.input_dir, Path(folder) / "labels.sqlite")
        read = header_reader(sources.archive, sources.metadata_csv)
        plans = plan_archive(places.input_dir, Path(folder) / "plan", options.rules, num_files, pool, read, listing)
        label_counts = label_staging.match(staged, all_headers(plans))
        for plan in map(read_plan, plans):
            exams += len(plan.exams)
            slices += sum(len(exam[0].headers) for exam in plan.exams)
            patients.update(exam[0].patient_key for exam in plan.exams)
            outcomes = [*map(_of_rejection, plan.rejections), *map(_of_exam, plan.exams)]
            account.add(outcomes, plan.not_images)
    if patients:
        check_numbers(len(patients), exams, options.splits, options.holdout_volumes)
    size = slices * options.image_size**2 * len(options.windows) * _BYTES_PER_PIXEL
    expected = {"exams": exams, "patients": len(patients), "slices": slices, "bytes": int(size)}
    return account.counts(num_files) | label_counts | expected


def _of_rejection(rejection: Rejection) -> ExamNote:
    row = Rejected("", rejection.reason, rejection.detail, sources_of(rejection.headers))
    return ExamNote("", None, 0, [], [], [row])


def _of_exam(exam: list[SeriesCandidate]) -> ExamNote:
    """If the preferred candidate is taken, as far as its headers tell."""
    first, *others = exam
    dropped = [(header.source, reason) for header, reason in first.dropped]
    dropped += [(header.source, "duplicate_slice") for group in first.duplicates for header in group]
    rejected = [Rejected("", "other_reconstruction", "", sources_of(other.all_headers)) for other in others]
    return ExamNote("", None, 0, sources_of(first.headers), dropped, rejected)
