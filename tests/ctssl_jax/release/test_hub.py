"""Exports in the shape of a model hub: what stands in them, and the ways in by folder, zip file and
repository, in JAX, PyTorch and timm."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import ctssl_jax
from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.runs.run import Run
from data_prep.system.errors import InputError
from tests.helpers import hub_server
from tests.helpers.training_runs import PROJECT, save_untrained, tiny_config, tiny_recipe

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
pytest.importorskip("safetensors", reason="safetensors is not installed: pip install '.[torch]'")
hub_package = pytest.importorskip(
    "huggingface_hub", reason="huggingface_hub is not installed: pip install '.[hub]'"
)

from ctssl_jax.release import hub, opening  # noqa: E402
from ctssl_jax.release.exporting import export, open_model  # noqa: E402
from ctssl_jax.torch_bridge import ctssl_torch  # noqa: E402


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "masked_region"
    save_untrained(tiny_config(tiny_dataset), folder)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    evaluate(run, None, "test", folder / "result.json")
    export(run, folder / "model", ["hub"], "CC-BY-NC-4.0", results=[folder / "result.json"])
    return folder / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imported"


def zipped(folder, path, change=lambda name, content: content, top="model/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.writestr(top + file.name, change(file.name, file.read_bytes()))
    return path


# ---- the folder ----------------------------------------------------------------------------------


def test_the_card_is_a_hubs_card_with_the_results_in_its_fields(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    card = hub_package.ModelCard.load(exported / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.library_name == "ctssl_jax"
    assert card.data.model_name == manifest["name"] and "synthetic-data" in card.data.tags
    again = hub_package.ModelCardData(**card.data.to_dict())  # to the index and back
    (result,) = manifest["results"]
    kept = {entry.metric_type: entry for entry in again.eval_results}
    assert set(kept) == {name for name, value in result["metrics"].items() if value["mean"]}
    for name, entry in kept.items():
        expected = result["metrics"][name]
        assert entry.metric_value == expected["mean"] and entry.dataset_split == "test"
        assert entry.metric_args["ci95"] == expected["ci95"]
        assert entry.metric_args["num_patients"] == expected["num_patients"]
    assert "# masked_region" in card.text and "Not a medical device" in card.text


def test_the_configs_say_what_the_manifest_says(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["VQVAE"] and config["hidden"] == manifest["model"]["hidden"]
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    assert (processor["window_level"], processor["window_width"]) == ([50.0], [350.0])
    assert processor["size"] == {"height": 16, "width": 16} and processor["crop"] == "none"
    assert {"model.safetensors", "config.json"} < set(manifest["files"])


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Our Lab's terms 2", {"license": "other", "license_name": "our-lab-s-terms-2"}),
    ],
)
def test_licences(licence, expected):
    assert hub._licence(licence) == expected


# ---- the ways in ---------------------------------------------------------------------------------


def test_folder_and_zip_file_are_the_run_and_are_imported_once(
    exported, run, tiny_dataset, tmp_path, cache, capsys
):
    grey = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 1), np.uint8)
    expected = ctssl_jax.load(run).embed(grey).slices
    for name in (exported, str(zipped(exported, tmp_path / "model.zip"))):
        model = ctssl_jax.load(name)
        np.testing.assert_array_equal(model.embed(grey).slices, expected)
        assert model.step == 2
    assert capsys.readouterr().out.count("imported ") == 1 and len(list(cache.iterdir())) == 1
    twin = ctssl_torch.load(tmp_path / "model.zip")
    images = torch.from_numpy(grey.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    np.testing.assert_allclose(twin.embed(images).numpy(), expected, rtol=1e-4, atol=1e-6)
    assert max(ctssl_torch.verify(tmp_path / "model.zip").values()) < 1e-4
    assert opening.as_run(run) == run and opening.as_run("gs://bucket/run") == "gs://bucket/run"


def changed_byte(name, content):
    return content[:-1] + bytes([content[-1] ^ 1]) if name == "model.safetensors" else content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, path: zipped(folder, path, changed_byte), "not the file that the manifest"),
        (lambda folder, path: zipped(folder, path, top="a/b/"), "has no manifest.json"),
        (lambda folder, path: path.write_bytes(b"PK\3\4 half a download"), "damaged zip file"),
        (lambda folder, path: path.write_bytes(zipped(folder, path).read_bytes()[:-99]), "damaged"),
    ],
)
def test_damaged_zip_files_are_refused_and_leave_nothing(make, message, exported, tmp_path, cache):
    make(exported, tmp_path / "model.zip")
    with pytest.raises(InputError, match=message) as error:
        opening.as_run(tmp_path / "model.zip")
    assert f"--workdir={tmp_path / 'model.zip'}" in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())
    with pytest.raises((ValueError, FileNotFoundError)):
        ctssl_torch.load(tmp_path / "model.zip")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:lab", "hf-hub:lab/a b", "hf-hub:a/b/c@main"])
def test_names_that_are_none_are_refused_before_the_network(name):
    with pytest.raises(InputError, match=r"is not a name of a hub; give hf-hub:ORG/NAME or"):
        opening.as_run(name)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            b" " * (17 << 20),
            r"model\.zip: manifest\.json is damaged or not a manifest of ctssl_jax",
        ),
        (b"{}", r"model\.zip: manifest\.json is damaged or not a manifest of ctssl_jax"),
        (
            b"",
            r"model\.zip: manifest\.json is damaged or was changed \(AttributeError: .*image_size",
        ),
        (b"[", r"model\.zip: manifest\.json is damaged; copy the whole folder again"),
    ],
)
def test_manifests_that_were_changed(manifest, message, exported, tmp_path, cache):
    """By another content; "" without the settings of the training, "[" with a file of no facts."""
    content = json.loads((exported / "manifest.json").read_text())
    if not manifest:
        content["training"]["config"] = {}
    if manifest == b"[":
        content["files"]["model.safetensors"] = 3
    new = manifest if len(manifest) > 1 else json.dumps(content).encode()
    change = lambda name, old: new if name == "manifest.json" else old  # noqa: E731
    with pytest.raises(InputError, match=message):
        opening.as_run(zipped(exported, tmp_path / "model.zip", change))
    assert not cache.exists() or not list(cache.iterdir())


def test_upload_and_both_loads_through_a_hub(exported, tmp_path):
    """The commands and loads of a user, each a process, since the package reads its settings when
    it is imported."""
    load = "import sys; from ctssl_jax.torch_bridge import ctssl_torch; "
    with hub_server.running() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_no"}
        environment = os.environ | settings | {"PYTHONPATH": str(PROJECT)}

        def python(*words):
            return subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, text=True
            )

        push = ["-m", "ctssl_jax", "export", f"--output_dir={exported}", "--push=lab/ct"]
        listed = python(*push)
        assert listed.returncode == 0 and "nothing was sent" in listed.stdout, listed.stderr
        assert not server.requests
        assert python(*push, "--upload").returncode == 0
        sent = server.repositories["lab/ct"]["main"]
        assert set(sent) == {file.name for file in exported.iterdir()}
        assert all(sent[file.name] == file.read_bytes() for file in exported.iterdir())
        # later the repository gets a pickle and a script: a load neither fetches nor runs them
        first = next(name for name in server.repositories["lab/ct"] if name != "main")
        server.commit("lab/ct", {"weights.pt": b"\x80", "sitecustomize.py": b"raise SystemExit(9)"})
        script = (
            "import ctssl_jax, sys\nfrom ctssl_jax.torch_bridge import ctssl_torch\n"
            "from ctssl_jax.release.opening import as_run\n"
            "right = max(ctssl_torch.verify('hf-hub:lab/ct').values()) < 1e-4\n"
            "print(right, as_run('hf-hub:lab/ct'))\n"
            "ctssl_torch.load('hf-hub:lab/ct@' + sys.argv[1])\n"
            "for name in ('lab/ct@v9', 'lab/none'):\n"
            "    try:\n        as_run('hf-hub:' + name)\n"
            "    except Exception as error:\n        print(error)\n"
        )
        both = python("-c", script, first)
        assert both.returncode == 0, both.stderr
        first_line, revision, repository = both.stdout.splitlines()[-3:]
        assert first_line.startswith("True ") and "hf-hub" not in first_line
        assert "hf-hub:lab/ct@v9 cannot be fetched (RevisionNotFoundError" in revision
        assert "hf-hub:lab/none cannot be fetched (RepositoryNotFoundError" in repository
        assert not any("weights.pt" in line or "sitecustom" in line for line in server.requests)
    environment["HF_HUB_OFFLINE"] = "1"  # the server is gone; what was fetched is still there
    offline = python("-c", load + "print(type(ctssl_torch.load('hf-hub:lab/ct')).__name__)")
    assert offline.stdout.strip() == "VQVAE", offline.stderr


@pytest.mark.parametrize(
    ("change", "repository", "message"),
    [
        (lambda folder: None, "lab", "give ORG/NAME"),
        (lambda folder: (folder / "README.md").unlink(), "lab/ct", "missing or not what was"),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            "lab/ct",
            "missing or not what was",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "lab/ct", "has no manifest.json"),
    ],
)
def test_only_what_was_exported_is_pushed(change, repository, message, exported, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "patients.csv").write_text("private")
    assert "patients.csv" not in hub.push(folder, "lab/ct", upload=False)
    change(folder)
    with pytest.raises(InputError, match=message):
        hub.push(folder, repository, upload=False)


def test_requests_that_cannot_be_met(run, tmp_path):
    with pytest.raises(InputError, match="leave one of them out"):
        export(run, tmp_path / "out", ["hub", "safetensors"], "CC0-1.0")
    assert not (tmp_path / "out").exists()


# ---- timm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["legacy", "timm"])
def test_timm_creates_an_exported_se_resnext(pooling, tiny_dataset, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    config = tiny_recipe(tiny_dataset, "pe_se_resnext", windows=((50.0, 350.0),))
    with config.unlocked():
        config.model.update(layers=(3, 4, 6, 3), width=64, groups=32, pooling=pooling)
    save_untrained(config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model", ["hub"], "MIT")
    network = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    twin = ctssl_torch.load(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        np.testing.assert_array_equal(network(images).numpy(), twin(images).logits.numpy())
    assert list(network.pretrained_cfg["input_size"]) == [3, 16, 16]
    assert list(network.pretrained_cfg["mean"]) == [0.0, 0.0, 0.0]
    again = open_model(Run.open(opening.as_run(tmp_path / "model")), "best")
    assert again.fingerprint == twin.manifest["model_fingerprint"]
