"""The privacy campaign: what it searches for, that it finds what is planted, and its short version
on real scans."""

import base64
import gzip
import json
import zipfile
import zlib
from collections import Counter

import imagecodecs
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset as DicomDataset
from tensorboardX import SummaryWriter

from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference.embedding import embed
from ctssl_jax.inference.prediction import Request, predict
from data_prep.dataset.cohort import contact_sheet
from data_prep.dataset.reader import Dataset
from data_prep.dataset.storage import encode_record, write_records
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.privacy import leaks
from data_prep.scan.rules import Rules
from tests.campaigns import privacy
from tests.helpers import dicom_files
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.real_scans import parts_of_scans
from tests.helpers.training_runs import save_scored, save_untrained, tiny_recipe

NAME, TIME, IDENTIFIER = "Quixote^Alonso", "131415", "ab-47-cd"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> privacy.Source:
    folder = tmp_path_factory.mktemp("scans")
    (ds,) = dicom_files.slices(dicom_files.thorax(1))
    ds.PatientName, ds.StudyTime, ds.PatientID, ds.Manufacturer = NAME, TIME, IDENTIFIER, "SIEMENS"
    item = DicomDataset()
    item.add_new(0x00091001, "UN", b"Dulcinea del T. ")
    item.add_new(0x00091002, "UN", bytes(range(100, 200)))
    ds.RequestAttributesSequence = [item]
    dicom_files.write(folder / "windmill7", [ds])
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("Sancho/12345.dcm", dicom_files.to_bytes(ds))
    return privacy.read_source(folder)


def test_what_is_searched_for(source):
    assert (source.num_headers, source.num_paths) == (2, 2)
    expected = {
        "quixote^alonso",
        "quixote",
        "alonso",
        TIME,
        IDENTIFIER,
        "dulcinea del t.",
        "windmill7",
        "sancho",
        "sancho/12345.dcm",
        "12345.dcm",
        "12345",
        dicom_files.uid(1),
    }
    assert expected <= source.values.keys()
    assert all(len(value) >= 5 for value in source.values)
    assert source.values["quixote"] == {"PN PatientName"}


def found(source, folder) -> list[privacy.Finding]:
    search = privacy.Search(source.values)
    return [
        finding for finding in privacy.search_folder(folder, search)[0] if finding.kind == "hit"
    ]


def in_record(folder, text: str) -> None:
    image = np.zeros((16, 16, 1), np.uint8)
    image.ravel()[30 : 30 + len(text)] = np.frombuffer(text.encode(), np.uint8)
    hidden = [(image, "volume"), (np.zeros_like(image), text)][len(text) < leaks.LONG_NEEDLE]
    records = [encode_record(*hidden, 0, 0.0, False)]
    write_records(folder / "train.array_record-00000", records)


def in_checkpoint(state, metadata):
    def plant(folder, text: str) -> None:
        states = {name: value(text) for name, value in state(text).items()}
        save_scored(folder, {1: (states, 0.5)}, metadata(text))

    return plant


def in_png(folder, text: str) -> None:
    information = PngImagePlugin.PngInfo()
    information.add_text("comment", text, zip=True)
    Image.new("L", (8, 8)).save(folder / "a.png", pnginfo=information)


def in_base64_png(folder, text: str) -> None:
    in_png(folder, text)
    png = (folder / "a.png").read_bytes()
    (folder / "a.png").unlink()
    (folder / "report.html").write_text(
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


def in_parquet(folder, text: str) -> None:
    table = pyarrow.table({"volume": [text] * 100})
    pyarrow.parquet.write_table(table, folder / "a.parquet", compression="zstd")


def in_events(folder, text: str) -> None:
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar(text, 1.0, 0)


def zeros(_):
    return np.zeros((4, 4), np.float32)


def letters(text):
    return np.frombuffer(text.encode(), np.uint8)


PLANTS = {
    "log": lambda folder, text: (folder / "a.log").write_text(f"read {text}, done"),
    "name of a file": lambda folder, text: (folder / f"x{text}.json").write_text("{}"),
    "capitals": lambda folder, text: (folder / "a.csv").write_text(f"a,{text.upper()}\n"),
    "record": in_record,
    "npz": lambda folder, text: np.savez_compressed(
        folder / "a.npz", names=np.array([text.encode()] * 9)
    ),
    "gzip": lambda folder, text: (folder / "mask.nii.gz").write_bytes(
        gzip.compress(bytes(400) + text.encode())
    ),
    "zstd somewhere": lambda folder, text: (folder / "x").write_bytes(
        b"\1\2" + imagecodecs.zstd_encode(bytes(50) + text.encode()) + b"\3" * 20
    ),
    "zlib in zip": lambda folder, text: zipped(
        folder / "a.pt", zlib.compress(bytes(50) + text.encode())
    ),
    "png": in_png,
    "png in html": in_base64_png,
    "parquet": in_parquet,
    "tensorboard": in_events,
    "metadata of a checkpoint": in_checkpoint(
        lambda text: {"a": zeros}, lambda text: {"note": {"deep": [text]}}
    ),
    "name of an array": in_checkpoint(
        lambda text: {text.replace("/", "_"): zeros}, lambda text: {}
    ),
    "numbers of an array": in_checkpoint(lambda text: {"a": letters}, lambda text: {}),
}


def zipped(path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", content)


@pytest.mark.parametrize("text", [NAME, IDENTIFIER])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_found(source, tmp_path, plant, text):
    PLANTS[plant](tmp_path, "nobody at all")
    assert found(source, tmp_path) == []
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    PLANTS[plant](tmp_path, text)
    written = {text.lower(), *text.lower().split("^")}  # TensorBoard writes another letter for ^
    assert written & {finding.value for finding in found(source, tmp_path)}
    findings, counts = privacy.search_folder(tmp_path, privacy.Search(source.values))
    lines, clean = privacy.report(source, findings, counts, 0)
    assert not clean and any(line.startswith("LEAK ") for line in lines)
    # it tells no secrets
    assert not any(text.lower() in line.lower() for line in lines if plant != "name of a file")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"time {TIME}.", "hit"),
        (f"at {TIME}.0", "hit"),
        (f"0.{TIME}", "part of a longer number or digest"),
        (f"0123456789abcde{TIME}", "part of a longer number or digest"),
        (f"scan{TIME}", "hit"),
        (f"1.2.{TIME}.4.x", "hit"),
        ("made by Siemens", "published field"),
        (json.dumps("1.2.840.10008.5.1.4.1.1.2"), "UID of the standard"),
        ("A" * 120 + "Quixote" + "b" * 120, "part of base64, which is opened"),
        ("A" * 20 + "Quixote" + "b" * 20, "hit"),
    ],
)
def test_what_is_none_has_a_reason(source, text, kind):
    kinds = {
        finding.kind
        for finding in privacy.Search(source.values).find("log", "bytes", text.encode())
    }
    assert kinds == {kind}


def test_own_words_stand_in_their_own_sentences_alone():
    search = privacy.Search({"chest": {"LO StudyDescription"}})
    (own,), (leak,) = (
        list(search.find("a.csv", "bytes", text)) for text in (b"12,no_chest,", b"12,CHEST,")
    )
    assert (own.kind, leak.kind) == ("own words, chest", "hit")


def test_short_values_in_pixels_are_weighed_against_made_up_ones(source, tmp_path):
    """One may be chance; many are none."""
    search = privacy.Search(source.values)
    for number, clean in ((1, True), (200, False)):
        findings = list(search.find("a", "record 0, pixels", b"\0".join([TIME.encode()] * number)))
        assert (
            len(findings) == number and privacy.report(source, findings, Counter(), 0)[1] == clean
        )
    assert search.made_up_in_pixels == 0
    list(search.find("a", "record 0, pixels", TIME.translate(privacy._OTHER).encode()))
    assert search.made_up_in_pixels == 1


def test_real_scans(real_data, tmp_path, capfd):
    """Preparation, contact sheet, checkpoint, results, embeddings and masks of real scans hold
    nothing of them."""
    archive, out = parts_of_scans(real_data, tmp_path / "archive"), tmp_path / "out"
    places = Directories(archive, out / "dataset", out / "dataset-audit")
    rules = Rules(require_lung=False)
    prepare(Options(image_size=32, rules=rules), places, num_workers=1)
    contact_sheet(Dataset.open(places.output_dir), 6, 0).save(out / "sheet.png")
    save_untrained(tiny_recipe(places.output_dir, "masked_region", image_size=32), out / "run")
    evaluate(out / "run", places.output_dir, "test", out / "result.json")
    embed(out / "run", archive, out / "embeddings.parquet", rules=rules, num_workers=0)
    masks = write_example_dataset(tmp_path / "masks", image_size=32, masks=True)
    save_untrained(tiny_recipe(masks, "nodules", image_size=32), tmp_path / "nodules")
    predict(tmp_path / "nodules", Request(archive, rules=rules, series_index=0), out / "prediction")
    (out / "log").write_text("".join(capfd.readouterr()))
    source = privacy.read_source(archive)
    search = privacy.Search(source.values)
    findings, counts = privacy.search_folder(out, search)
    lines, clean = privacy.report(source, findings, counts, search.made_up_in_pixels)
    assert clean, lines
    assert source.num_headers > 60 and len(source.values) > 300
    assert counts["opened bytes"] > 100_000
    private = {finding.path for finding in findings if privacy.is_private(finding.path)}
    assert {"dataset-audit/sources.csv", "prediction/segmentation.dcm"} <= private, (
        "the search does not work"
    )
