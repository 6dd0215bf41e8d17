"""What a preparation refused: the private table, the pictures in it, and the pages."""

import base64
import csv
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset.reader import Dataset
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.pipeline.refusals import audit_dir_of, write_refusals
from data_prep.system.errors import InputError
from tests.helpers import browser, dicom_files

NARROW, WIDE = 390, 1300


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Directories:
    """Three good scans; refused: by the headers two scouts and an MR, by their pixels one without
    lungs and one of impossible values."""
    folder = tmp_path_factory.mktemp("refusals")

    def write(name: str, number: int, hu: np.ndarray, change=lambda ds: None) -> None:
        datasets = dicom_files.slices(hu, study=number, patient=f"patient-{number}")
        for ds in datasets:
            change(ds)
        dicom_files.write(folder / "scans" / name, datasets)

    for number in (1, 2, 3):
        write(f"good{number}", number, dicom_files.thorax(20, seed=number))
    thorax = dicom_files.thorax(20, seed=4)
    write("scout<1>", 4, thorax, lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "LOCALIZER"]))
    write("scout2", 5, thorax, lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "LOCALIZER"]))
    write("brain", 6, thorax, lambda ds: setattr(ds, "Modality", "MR"))
    write("belly", 7, np.where((thorax > -970) & (thorax < -300), 40, thorax).astype(np.int16))
    write("steep", 8, thorax, lambda ds: setattr(ds, "RescaleSlope", "40"))
    (folder / "scans" / "notes.txt").write_text("no image")
    directories = Directories(folder / "scans", folder / "dataset", folder / "dataset-audit")
    prepare(Options(image_size=32), directories, num_workers=1)
    return directories


def rows(directories: Directories) -> dict[str, dict[str, str]]:
    """Folder of the scan -> row of refused.csv."""
    with open(directories.audit_dir / "refused.csv", newline="") as file:
        return {row["path"].split("/")[0]: row for row in csv.DictReader(file)}


def test_the_element_that_decided_and_a_picture_of_what_was_read(prepared):
    refused = rows(prepared)
    assert {name: row["reason"] for name, row in refused.items()} == {
        "scout<1>": "localizer",
        "scout2": "localizer",
        "brain": "not_ct",
        "belly": "no_chest",
        "steep": "implausible_hu",
    }
    assert refused["scout2"]["element"] == r"Image Type (0008,0008) = ORIGINAL\LOCALIZER"
    assert refused["brain"]["element"] == "Modality (0008,0060) = MR"
    assert "Rescale Slope (0028,1053) = 40" in refused["steep"]["element"]
    pictures = {name: row["thumbnail"] for name, row in refused.items() if row["thumbnail"]}
    assert sorted(pictures) == ["belly", "steep"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures["steep"]))))
    assert image.shape == (64, 64) and image.std() > 20  # whatever the scale of the values


def test_pages_by_reason(prepared):
    folder = write_refusals(prepared.audit_dir).parent
    assert folder == prepared.audit_dir / "refused"
    pages = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(pages) == [
        *("implausible_hu-0001.html", "index.html", "localizer-0001.html"),
        *("no_chest-0001.html", "not_ct-0001.html"),
    ]
    assert "scout&lt;1&gt;/" in pages["localizer-0001.html"]
    assert "scout<1>" not in "".join(pages.values())
    assert pages["localizer-0001.html"].count("No picture: no pixels were read") == 2
    assert pages["no_chest-0001.html"].count('alt="A slice of the series refused as no_chest') == 1
    assert "<br>" in pages["no_chest-0001.html"] and "://" not in "".join(pages.values())
    assert "notes.txt" in pages["index.html"] and "5 series of 100 files" in pages["index.html"]
    assert r"ORIGINAL\LOCALIZER: 2 series" in pages["index.html"]
    again = {
        path.name: path.read_text() for path in write_refusals(prepared.audit_dir).parent.iterdir()
    }
    assert again == pages


def test_nothing_of_the_audit_directory_is_in_the_dataset_s_folder(prepared):
    command = [sys.executable, "-m", "data_prep.describe", f"--dataset={prepared.output_dir}"]
    done = subprocess.run([*command, "--html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    description = prepared.output_dir.with_name("dataset-description")
    assert f"Written: {description}/html/index.html\n" in done.stdout
    assert f"Written: {prepared.audit_dir}/refused/index.html (private)\n" in done.stdout
    published = "".join(path.read_text() for path in (description / "html").iterdir())
    assert "localizer" in published  # how many, by reason
    for private in ("scout2", "LOCALIZER", "patient-", str(prepared.input_dir), "notes.txt"):
        assert private not in published
    assert not any("refused" in path.name for path in description.rglob("*"))


def test_an_audit_directory_of_an_earlier_program(prepared, tmp_path):
    """It has no `refused.csv`: no pictures, and elements without values."""
    old = tmp_path / "audit"
    old.mkdir()
    (old / "sources.csv").write_bytes((prepared.audit_dir / "sources.csv").read_bytes())
    folder = write_refusals(old).parent
    assert "5 series of 100 files" in (folder / "index.html").read_text()
    assert "<li>Modality (0008,0060): 1 series</li>" in (folder / "index.html").read_text()
    assert "belly/" in (folder / "no_chest-0001.html").read_text()


def test_only_its_own_audit_directory_is_taken(prepared, tmp_path, tiny_dataset):
    dataset = Dataset.open(prepared.output_dir)
    assert audit_dir_of(dataset, None) == prepared.audit_dir
    assert audit_dir_of(Dataset.open(tiny_dataset), None) is None
    for other in (tmp_path, prepared.audit_dir):
        with pytest.raises(InputError, match="is not the audit directory of"):
            audit_dir_of(Dataset.open(tiny_dataset), str(other))
    (tmp_path / "sources.csv").write_text("path,member\na,b\n")
    with pytest.raises(InputError, match="its tables are damaged"):
        write_refusals(tmp_path)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no `chromium` in PATH")
def test_pages_in_a_browser(prepared, tmp_path):
    folder = write_refusals(prepared.audit_dir).parent
    for name, num_pictures in (("index", 0), ("implausible_hu-0001", 1), ("localizer-0001", 0)):
        page = (folder / f"{name}.html").read_text()
        for found in browser.measure(page, (NARROW, WIDE), tmp_path):
            assert found.scroll_width <= found.width
            assert len(found.pictures) == num_pictures and all(found.pictures)
