"""What a preparation refused, as pages to look through. They name files, so they are private."""

import collections
import csv
import html
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.dataset.reader import Dataset
from data_prep.pipeline.accounting import REFUSED_FILE, SOURCES_FILE
from data_prep.pipeline.options import Directories
from data_prep.privacy.pseudonyms import default_audit_dir
from data_prep.scan.deciding_elements import DECIDING
from data_prep.scan.reasons import REASONS
from data_prep.system import pages, stores
from data_prep.system.errors import InputError

_FOLDER = "refused"  # of the audit directory
_MOST_ELEMENTS = 8  # that are listed of a reason
_MOST_PATHS = 50  # that are listed of the files that are no images
_PLACEHOLDER = (
    '<span class=unseen role=img aria-label="No picture: no pixels were read">no pixels read</span>'
)


class _Series(NamedTuple):
    """A row of refused.csv."""

    pseudonym: str
    num_files: int
    reason: str
    detail: str
    element: str
    path: str
    thumbnail: str


def audit_dir_of(dataset: Dataset, given: str | None) -> Path | None:
    """The audit directory of a dataset.

    Args:
        dataset: not merged of others.
        given: by the user; None: the one beside the dataset, if it is there and is its own.

    Raises:
        InputError: the given directory is that of another dataset, or none.
    """
    if given is None and stores.is_url(dataset.name):
        return None
    audit_dir = (
        default_audit_dir(dataset.directory)
        if given is None
        else stores.local_path(given, "--audit_dir")
    )
    bound = Directories(audit_dir, dataset.directory, audit_dir).bound()
    if bound["fingerprint"] == dataset.fingerprint and (audit_dir / SOURCES_FILE).is_file():
        return audit_dir
    if given is None:
        return None
    raise InputError(
        f"--audit_dir={audit_dir}: is not the audit directory of {dataset.name}; give the one that "
        "its preparation wrote"
    )


def write_refusals(audit_dir: Path) -> Path:
    """Writes pages of the series that were refused, by reason, and a summary of all files that are
    not in the dataset, into the folder `refused` of the audit directory.

    Returns:
        The first page.

    Raises:
        InputError: a table of the audit directory is damaged, or the folder holds something else.
        OSError: the pages cannot be written.
    """
    try:
        left_out, paths, of_sources = _read_sources(audit_dir / SOURCES_FILE)
        table = audit_dir / REFUSED_FILE
        series = _read_refused(table) if table.exists() else of_sources
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"--audit_dir={audit_dir}: its tables are damaged ({type(error).__name__}); bring back "
            "a copy of them"
        ) from None
    by_reason = collections.defaultdict(list)
    for one in series:
        by_reason[one.reason].append(one)
    reasons = sorted(by_reason, key=lambda reason: (-len(by_reason[reason]), reason))
    folder = audit_dir / _FOLDER
    with pages.folder_of_pages(folder, "--audit_dir") as writing:
        for reason in reasons:
            tiles = map(_tile, sorted(by_reason[reason], key=lambda one: (one.path, one)))
            total = len(by_reason[reason])
            for number in range(1, pages.num_sheets(total) + 1):
                of_page = list(itertools.islice(tiles, pages.TILES_PER_PAGE))
                text = pages.sheet(f"Refused: {reason}", reason, number, total, of_page)
                (writing / pages.sheet_name(reason, number)).write_text(text)
        sections = "".join(_section(reason, by_reason[reason]) for reason in reasons)
        (writing / "index.html").write_text(_index(sections, series, left_out, paths))
    return folder / "index.html"


def _read_refused(path: Path) -> list[_Series]:
    with open(path, newline="") as file:
        return [
            _Series(**row | {"num_files": int(row["num_files"])}) for row in csv.DictReader(file)
        ]


def _read_sources(
    path: Path,
) -> tuple[collections.Counter, dict[str, list[str]], list[_Series]]:
    """Files that are dropped or no images, by (outcome, reason); the first paths of the latter by
    reason; and the refused series as far as a preparation without `refused.csv` told."""
    left_out: collections.Counter = collections.Counter()
    paths: dict[str, list[str]] = collections.defaultdict(list)
    first: dict[tuple[str, str, str], str] = {}
    files: collections.Counter = collections.Counter()
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            outcome, reason = row["outcome"], row["reason"]
            name = "/".join(filter(None, (row["path"], row["member"])))
            if outcome == "rejected":
                series = row["pseudonym"], reason, row["detail"]
                first.setdefault(series, name)
                files[series] += 1
            elif outcome != "volume":
                left_out[outcome, reason] += 1
                if outcome == "not_an_image" and len(paths[reason]) < _MOST_PATHS:
                    paths[reason].append(name)
    series = [
        _Series(pseudonym, files[pseudonym, reason, detail], reason, detail, "", name, "")
        for (pseudonym, reason, detail), name in first.items()
    ]
    return left_out, paths, series


def _tile(series: _Series) -> str:
    """The picture of a series, what decided, and where its files are."""
    words = series.detail or REASONS.get(series.reason, series.reason)
    if series.thumbnail:
        shown = f"A slice of the series refused as {series.reason}: {words}"
        image = (
            f'<img alt="{html.escape(shown)}" src="data:image/jpeg;base64,'
            f'{html.escape(series.thumbnail)}">'
        )
    else:
        image = _PLACEHOLDER
    number = f"{series.num_files} {'file' if series.num_files == 1 else 'files'}"
    lines = [f"<b>{html.escape(text)}</b>" for text in (series.element, series.detail) if text]
    lines += [f"{number}: {html.escape(series.path)}"]
    lines += [f"<code>{html.escape(series.pseudonym[:12])}</code>"]
    return image + "<br>".join(lines)


def _section(reason: str, series: Sequence[_Series]) -> str:
    files = sum(one.num_files for one in series)
    elements = collections.Counter(one.element for one in series if one.element)
    ordered = sorted(elements.items(), key=lambda item: (-item[1], item[0]))
    # of an audit directory without `refused.csv`
    unknown = [(name, len(series)) for name in DECIDING.get(reason, ()) if not elements]
    shown = "".join(
        f"<li>{html.escape(element)}: {number} series</li>"
        for element, number in (ordered or unknown)[:_MOST_ELEMENTS]
    )
    return f"""<h2>{pages.breakable(reason)}: {len(series)} series, {files} files</h2>
<p>{html.escape(REASONS.get(reason, ""))}</p>
<ul>{shown}</ul>
<p>{pages.sheet_links(reason, len(series))}</p>
"""


def _index(
    sections: str,
    series: Sequence[_Series],
    left_out: collections.Counter,
    paths: dict[str, list[str]],
) -> str:
    files = sum(one.num_files for one in series)
    with_pictures = sum(bool(one.thumbnail) for one in series)
    body = f"""<h1>What was refused</h1>
<p class=banner>PRIVATE: names files and shows scans. It belongs in the audit directory, and leaves
the archive's owner no more than the scans do.</p>
<p>{len(series)} series of {files} files were refused; {with_pictures} of them after their pixels
were read, which have a picture (black at the 1st percentile of its values, white at the 99th).</p>
{sections}
<h2>Files that are not in the dataset for another reason</h2>
{pages.table(_other_files(left_out), ("files", "outcome", "reason", "meaning"))}
"""
    for reason, names in sorted(paths.items()):
        more = left_out["not_an_image", reason] - len(names)
        listed = "\n".join(names) + (f"\nand {more} more, in {SOURCES_FILE}" if more else "")
        body += (
            f"<details><summary>Files: {html.escape(reason)}</summary><pre>{html.escape(listed)}"
            "</pre></details>\n"
        )
    return pages.page("What was refused", body)


def _other_files(left_out: collections.Counter) -> Iterator[Sequence[str]]:
    words = {"dropped": "dropped from a volume", "not_an_image": "no image"}
    for (outcome, reason), number in sorted(left_out.items()):
        yield str(number), words.get(outcome, outcome), reason, REASONS.get(reason, "")
