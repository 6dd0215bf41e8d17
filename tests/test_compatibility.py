"""What earlier versions wrote is opened by this one: a dataset, a run, its export, results and
embeddings, of synthetic scans. `compatibility/make.sh` makes an artefact of a version; none is ever
made again."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import ctssl_jax
from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference.embedding import embed
from ctssl_jax.release import model_card, opening, public_series
from ctssl_jax.runs.run import Run, from_json, to_json
from ctssl_jax.training.loop import train
from data_prep.dataset.reader import Dataset
from data_prep.dataset.verify import verify
from data_prep.system.workers import WorkerPool

ARTEFACTS = sorted((Path(__file__).parent / "compatibility").glob("*.tar.xz"))


@pytest.fixture(
    scope="module", params=ARTEFACTS, ids=lambda path: path.name.removesuffix(".tar.xz")
)
def artefact(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_the_first_format_is_there():
    assert "35d749c.tar.xz" in [path.name for path in ARTEFACTS]


def test_results_are_computed_again(artefact, tmp_path):
    before = json.loads((artefact / "result.json").read_text())
    evaluate(artefact / "run", artefact / "dataset", "test", tmp_path / "r.json", checkpoint="last")
    now = json.loads((tmp_path / "r.json").read_text())
    assert now["model_fingerprint"] == before["model_fingerprint"]
    assert now["dataset_fingerprint"] == before["dataset_fingerprint"]
    for name, value in before["metrics"].items():
        assert now["metrics"][name]["mean"] == pytest.approx(value["mean"], rel=1e-4), name


def test_embeddings_are_computed_again(artefact, tmp_path):
    embed(artefact / "run", artefact / "dataset", tmp_path / "e.npz", checkpoint="last")
    before, now = (np.load(path) for path in (artefact / "embedding.npz", tmp_path / "e.npz"))
    for name in ("volume_id", "patient_id", "split", "slice_index", "position_mm"):
        np.testing.assert_array_equal(now[name], before[name])
    np.testing.assert_allclose(now["embedding"], before["embedding"], rtol=1e-4, atol=1e-6)


def test_the_dataset_is_whole(artefact):
    dataset = Dataset.open(artefact / "dataset")
    assert len(list(dataset.volumes())) == 4
    with WorkerPool(1) as pool:
        assert verify(dataset, pool) == []


def test_the_run_goes_on(artefact):
    config = from_json(to_json(Run.open(artefact / "run").config))
    with config.unlocked():
        config.dataset, config.num_steps = str(artefact / "dataset"), 3
        config.best_by = "masked_mse"  # as the recipe of today; older recipes had none
    assert train(config, artefact / "run")
    assert Run.open(artefact / "run").choose_checkpoint("last").step == 3


def test_the_export_is_the_run(artefact, tmp_path, monkeypatch):
    pytest.importorskip(
        "safetensors", reason="safetensors is not installed: pip install '.[torch]'"
    )
    monkeypatch.setenv("CTSSL_CACHE", str(tmp_path))
    grey = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 1), np.uint8)
    expected = ctssl_jax.load(artefact / "run", "2").embed(grey).slices
    np.testing.assert_array_equal(ctssl_jax.load(artefact / "export").embed(grey).slices, expected)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
    ctssl_torch = pytest.importorskip("ctssl_jax.torch_bridge.ctssl_torch")
    twin = ctssl_torch.load(artefact / "export")
    images = torch.from_numpy(grey.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    np.testing.assert_allclose(twin.embed(images).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_hub_repository_is_the_run(artefact, tmp_path, monkeypatch):
    """Of later formats: the weights under a hub's name, the page's facts, and the published series
    that were trained on."""
    if not (artefact / "hub").is_dir():
        pytest.skip("this version wrote no repository of a hub")
    pytest.importorskip(
        "safetensors", reason="safetensors is not installed: pip install '.[torch]'"
    )
    monkeypatch.setenv("CTSSL_CACHE", str(tmp_path))
    manifest = json.loads((artefact / "hub" / "manifest.json").read_text())
    assert opening.as_run(artefact / "hub") != artefact / "hub"  # imported, so its sums are right
    grey = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 1), np.uint8)
    expected = ctssl_jax.load(artefact / "run", "2").embed(grey).slices
    np.testing.assert_array_equal(ctssl_jax.load(artefact / "hub").embed(grey).slices, expected)
    text = model_card.text(manifest)
    assert "| Dataset | Volumes, slices | " in text and "(training.png)" in text
    listed = (artefact / "hub" / "public_series.csv").read_text().splitlines()[1:]
    uids = [line.split(",")[0] for line in listed]
    found = public_series.overlap(artefact / "hub", [*uids, "1.2.3"])
    assert sorted(found["train"] + found["validation"]) == sorted(uids) and found["train"]
