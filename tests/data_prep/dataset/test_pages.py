"""The pages of a dataset: what stands on them, and how they look in a browser."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset.charts import grey_chart, number_chart, ranges, text_chart
from data_prep.dataset.cohort import cohort_table
from data_prep.dataset.merge import merge
from data_prep.dataset.pages import write_pages
from data_prep.dataset.reader import Dataset
from data_prep.system import pages
from data_prep.system.errors import InputError
from tests.helpers import browser
from tests.helpers.example_dataset import write_example_dataset

NARROW, WIDE = 390, 1300


def written(dataset: Dataset, folder: Path) -> dict[str, str]:
    """Name -> text of all pages."""
    write_pages(dataset, cohort_table(dataset.volumes(), []), folder)
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def small_sheets():
    """Four tiles a page, so that few volumes make several pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "TILES_PER_PAGE", 4)
        yield


@pytest.fixture(scope="module")
def made(small_sheets, tiny_dataset, tmp_path_factory) -> tuple[Dataset, dict[str, str]]:
    dataset = Dataset.open(tiny_dataset)
    return dataset, written(dataset, tmp_path_factory.mktemp("pages") / "html")


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_every_volume_has_one_picture_of_its_middle_slice(made):
    dataset, made_pages = made
    assert list(made_pages) == ["index.html", *(f"volumes-000{n}.html" for n in (1, 2, 3))]
    sheets = [made_pages[name] for name in list(made_pages)[1:]]
    assert [sheet.count("<li>") for sheet in sheets] == [4, 4, 1]
    shown = [picture for sheet in sheets for picture in pictures(sheet)]
    everything = "".join(sheets)
    for volume, picture in zip(dataset.volumes(), shown, strict=True):
        middle = volume["middle_slice"]
        middle = volume["num_slices"] // 2 if middle is None else middle
        record = dataset.source(volume["split"])[volume["first_record"] + middle]
        image = record["image"][..., 0].astype(float)
        assert abs(picture - image).mean() < 6  # JPEG
        alternative = (
            f"slice {middle + 1} of 12 of volume {volume['volume_id']}, "
            f"mean grey {image.mean():.0f} of 255"
        )
        assert everything.count(f'alt="{alternative}') == 1


def test_links_lead_to_pages_of_the_folder_and_nothing_leads_out(made):
    _, made_pages = made
    for text in made_pages.values():
        assert "://" not in text and text.count("<img ") == text.count('src="data:')
        assert set(re.findall(r'href="([^"]+)"', text)) <= set(made_pages)
    assert 'rel=next href="volumes-0002.html"' in made_pages["volumes-0001.html"]
    assert "rel=next" not in made_pages["volumes-0003.html"]
    assert re.findall(r">(\d to \d)<", made_pages["index.html"]) == ["1 to 4", "5 to 8", "9 to 9"]


def test_grey_values_are_those_of_the_middle_slices(made):
    dataset, made_pages = made
    for split in ("train", "validation", "test"):
        source = dataset.source(split)
        greys = np.concatenate(
            [
                source[volume["first_record"] + (volume["middle_slice"] or 6)]["image"].ravel()
                for volume in dataset.volumes(split)
            ]
        )
        row = [split, f"{greys.mean():.1f}"]
        row += [f"{100 * np.mean(greys == end):.1f} %" for end in (0, 255)]
        assert "".join(f"<td>{cell}</td>" for cell in row) in made_pages["index.html"]


def test_pages_name_no_path_and_say_synthetic(made):
    dataset, made_pages = made
    assert not any(str(dataset.directory) in text for text in made_pages.values())
    assert "SYNTHETIC DATA" in made_pages["index.html"]


def test_a_second_run_writes_the_same_and_replaces_nothing_of_others(made, tmp_path):
    dataset, made_pages = made
    folder = tmp_path / "html"
    assert written(dataset, folder) == made_pages
    (folder / "volumes-0009.html").write_text("of an earlier, larger dataset")
    assert written(dataset, folder) == made_pages
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "index.html").write_text("<h1>My page</h1>")
    with pytest.raises(InputError, match="holds other files"):
        written(dataset, tmp_path / "own")
    assert (tmp_path / "own" / "index.html").read_text() == "<h1>My page</h1>"


def test_a_view_and_a_dataset_on_a_store_have_the_same_pages(made, store, tmp_path, monkeypatch):
    dataset, made_pages = made
    monkeypatch.setenv("CTSSL_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(dataset.directory, store.objects / "data" / "tiny")
    remote = Dataset.open("example://data/tiny")
    remote.fetch(remote.preparation["splits"])
    assert written(remote, tmp_path / "remote") == made_pages
    parts = [dataset, Dataset.open(write_example_dataset(tmp_path / "two", image_size=16, seed=1))]
    merge(parts, tmp_path / "view")
    of_view = written(Dataset.open(tmp_path / "view"), tmp_path / "pages")
    assert sum(len(pictures(text)) for text in of_view.values()) == 18
    assert not any(str(tmp_path) in text for text in of_view.values())


def test_several_windows_have_a_histogram_each(small_sheets, tmp_path):
    directory = write_example_dataset(tmp_path / "two", image_size=16, channels=2)
    index = written(Dataset.open(directory), tmp_path / "html")["index.html"]
    assert index.count("<svg role=img aria-label=") == 2


def test_ranges_hold_every_value_once():
    assert ranges([2.5, 1, 2.5]) == [("1", 1), ("2.5", 2)]
    values = np.random.default_rng(0).uniform(0.5, 0.98, 500).tolist()
    found = ranges(values)
    assert len(found) <= 13 and sum(number for _, number in found) == 500
    for name, number in found:
        low, high = map(float, name.split(" to "))
        assert number == sum(low <= value < high for value in values)
    assert found[0] == ("0.5 to 0.55", sum(value < 0.55 for value in values))


def test_charts_say_what_is_unknown_and_escape_texts():
    assert "median 2, from 1 to 3; unknown in 1 of 3" in number_chart("Age", [1, 3, None])
    assert "not recorded" in number_chart("Age", [None])
    assert "always 20" in number_chart("Slices", [20, 20])
    kernels = text_chart("Kernel", ["<b>", "<b>", ""] + [f"K{number}" for number in range(20)])
    assert "&lt;b&gt;" in kernels and "<b>, " not in kernels and "11 others" in kernels
    counts = re.findall(r"</i>(\d+)", kernels)
    assert sum(map(int, counts)) == 23 and len(counts) == 12
    empty = grey_chart({"train": np.zeros(256, int)}, {"level": 50, "width": 350})
    assert "nan" not in empty


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no `chromium` in PATH")
def test_pages_in_a_browser(made, tmp_path):
    """No sideways scrolling, every picture loaded, nothing asked for from anywhere."""
    _, made_pages = made
    for name, num_pictures in (("index.html", 0), ("volumes-0001.html", 4)):
        for found, width in zip(
            browser.measure(made_pages[name], (NARROW, WIDE), tmp_path), (NARROW, WIDE), strict=True
        ):
            assert found.width == width and found.scroll_width <= width
            assert len(found.pictures) == num_pictures and all(found.pictures)
            assert [request for request in found.requests if not request.startswith("data:")] == []
