"""A dataset as pages to look through: its table, its distributions, a picture of every volume."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import charts
from data_prep.dataset.reader import Dataset, SliceSource
from data_prep.dataset.schema import rules_lines, synthetic_text
from data_prep.system import pages
from data_prep.system.workers import Progress

_SHEETS = "volumes"  # name of the pages of tiles
_CHARTS = {  # column of volumes.csv -> title
    "slice_spacing_mm": "Slice spacing (mm)",
    "pixel_spacing_row_mm": "Pixel spacing (mm)",
    "slice_thickness_mm": "Slice thickness (mm)",
    "num_slices": "Slices of a volume",
}


def write_pages(dataset: Dataset, cohort: Sequence[tuple[str, str, str]], folder: Path) -> None:
    """Writes `index.html` and the pages of volumes into `folder`, in place of an earlier run's.

    A page holds its pictures: the middle slice of each volume in the first window. Nothing on it
    is more than the dataset has: pseudonyms, and no path. A page is in memory at a time.

    Args:
        dataset: with its shards on this machine.
        cohort: (group, item, value) rows.
        folder: for the pages alone.

    Raises:
        InputError: the folder holds something else.
        DatasetError: a record cannot be read.
        OSError: the pages cannot be written.
    """
    volumes = dataset.volumes()
    greys = {
        split: np.zeros((dataset.preparation["channels"], 256), np.int64)
        for split in dataset.preparation["splits"]
    }
    with pages.folder_of_pages(folder, "--output_dir") as writing:
        with Progress("pages", "volumes", len(volumes)) as progress:
            tiles = _tiles(dataset, greys, progress)
            for number in range(1, pages.num_sheets(len(volumes)) + 1):
                of_page = list(itertools.islice(tiles, pages.TILES_PER_PAGE))
                text = pages.sheet("Volumes", _SHEETS, number, len(volumes), of_page)
                (writing / pages.sheet_name(_SHEETS, number)).write_text(text)
        (writing / "index.html").write_text(_index(dataset, cohort, greys))


def _tiles(dataset: Dataset, greys: Mapping[str, np.ndarray], progress: Progress) -> Iterator[str]:
    """The tile of each volume. Adds the grey values of its middle slice to those of its split."""
    sources = {split: SliceSource(dataset, split) for split in dataset.preparation["splits"]}
    for volume in dataset.volumes():
        middle = volume["middle_slice"]
        middle = volume["num_slices"] // 2 if middle is None else middle
        image = sources[volume["split"]][volume["first_record"] + middle]["image"]
        for channel, counts in enumerate(greys[volume["split"]]):
            counts += np.bincount(image[..., channel].ravel(), minlength=256)
        yield _tile(volume, middle, image[..., 0])
        progress.advance(1)


def _tile(volume: Mapping[str, Any], middle: int, grey: np.ndarray) -> str:
    name, slices, split = volume["volume_id"], volume["num_slices"], volume["split"]
    thickness = volume["slice_thickness_mm"]
    size = f"{slices} slices" + ("" if thickness is None else f" of {thickness:g} mm")
    noted = volume["notes"].replace(" ", ", ").replace("_", " ")
    alternative = (
        f"slice {middle + 1} of {slices} of volume {name}, mean grey {grey.mean():.0f} of 255"
        + (f"; noted: {noted}" if noted else "")
    )
    lines = [f"<code>{html.escape(name[:12])}</code>", html.escape(f"{split}, {size}")]
    lines += [html.escape(volume["kernel"])] if volume["kernel"] else []
    lines += [f"<b>{html.escape(noted)}</b>"] if noted else []
    return pages.picture(pages.jpeg_thumbnail(grey), alternative, "jpeg") + "<br>".join(lines)


def _index(
    dataset: Dataset, cohort: Sequence[tuple[str, str, str]], greys: Mapping[str, np.ndarray]
) -> str:
    preparation, volumes = dataset.preparation, dataset.volumes()
    patients = {volume["patient_id"]: volume for volume in volumes}
    synthetic = synthetic_text(preparation)
    banner = (
        f"<p class=banner>{synthetic} DATA: computer-made scans, no patients.</p>"
        if synthetic
        else ""
    )
    number_charts = [
        charts.number_chart(title, [volume[column] for volume in volumes])
        for column, title in _CHARTS.items()
    ]
    number_charts.append(charts.text_chart("Kernel", [volume["kernel"] for volume in volumes]))
    ages = [patient["age"] for patient in patients.values()]
    number_charts.append(charts.number_chart("Age of the patients (years)", ages))
    grey_charts = [
        charts.grey_chart({split: counts[channel] for split, counts in greys.items()}, window)
        for channel, window in enumerate(preparation["windows"])
    ]
    notes = "".join(f"<p>{html.escape(line.strip())}</p>" for line in rules_lines(preparation))
    window = preparation["windows"][0]
    body = f"""<h1>Chest CT dataset</h1>
{banner}
<p>{len(volumes)} volumes of {len(patients)} patients; fingerprint
<code>{dataset.fingerprint[:16]}</code>. Not for clinical use.</p>
<h2>Every volume</h2>
<p>{pages.sheet_links(_SHEETS, len(volumes))}</p>
<p><small>The middle slice of each volume, window {window["level"]:g}/{window["width"]:g} HU, in the
order of volumes.csv; the arrow keys turn the pages.</small></p>
<h2>Distributions</h2>
<div class=charts>{"".join(number_charts)}</div>
<h2>Grey values by split</h2>
<p><small>Of the middle slice of each volume.</small></p>
{"".join(grey_charts)}
<h2>Cohort</h2>
{pages.table(cohort, ("group", "item", "value"))}
{notes}"""
    return pages.page("Chest CT dataset", body, charts.STYLE)
