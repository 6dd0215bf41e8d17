"""Exported folders: what stands in them, that PyTorch, ONNX and the way back give the same model,
and wrong input."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax import export as door
from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.parallel import processes
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks import slice_label
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError, RunFailed
from tests.helpers import dicom_files
from tests.helpers.example_dataset import change_preparation, write_example_dataset
from tests.helpers.own_flags import main_of
from tests.helpers.training_runs import (
    begun_state,
    save_untrained,
    saved_state,
    start,
    tiny_config,
    tiny_recipe,
    train_on,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
pytest.importorskip("safetensors", reason="safetensors is not installed: pip install '.[torch]'")

from ctssl_jax.release import exporting, onnx_file, parity, small_onnx  # noqa: E402
from ctssl_jax.release.exporting import export  # noqa: E402
from ctssl_jax.release.importing import import_weights  # noqa: E402
from ctssl_jax.torch_bridge import ctssl_torch, manifests  # noqa: E402

ALL = ("torch", "safetensors")
WINDOWS = [[50.0, 350.0]]


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert train_on(
        tiny_config(tiny_dataset, num_steps=2, eval_every=2, dtype="bfloat16"),
        folder / "masked_region",
    )
    save_untrained(tiny_recipe(tiny_dataset, "rotation"), folder / "rotation")
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """The trained autoencoder, whose convolutions ran in bfloat16, with its results on the test
    split."""
    folder = tmp_path_factory.mktemp("exported")
    evaluate(runs / "masked_region", None, "test", folder / "result.json", checkpoint="last")
    results = [folder / "result.json"]
    export(
        runs / "masked_region", folder / "model", ALL, "CC0-1.0", checkpoint="last", results=results
    )
    return folder / "model"


def onnx_is_here():
    return all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


def load_alone(folder):
    """The folder's own `ctssl_torch.py`, as a user of the folder imports it."""
    spec = importlib.util.spec_from_file_location("alone", folder / "ctssl_torch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["alone"] = module
    spec.loader.exec_module(module)
    return module


# ---- what is in a folder -------------------------------------------------------------------------


def test_folder(exported, runs, tiny_dataset):
    assert {path.name for path in exported.iterdir()} == {
        *(
            "README.md",
            "ctssl_torch.py",
            "manifest.json",
            "test_input.npz",
            "training.png",
            "weights.pt",
            "weights.safetensors",
        )
    }
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["format_version"] == ctssl_torch.FORMAT_VERSION == manifests.FORMAT_VERSION
    assert manifest["license"] == "CC0-1.0" and manifest["architecture"] == "VQVAE"
    assert (
        manifest["preprocessing"]["windows"] == WINDOWS
        and manifest["preprocessing"]["image_size"] == 16
    )
    assert (
        manifest["parity"]["largest_difference"] < 1e-4 and len(manifest["parity"]["stages"]) > 15
    )
    assert manifest["data"]["splits"]["train"]["num_slices"] == 60
    (result,) = manifest["results"]
    assert result["metrics"]["masked_mse"]["ci95"][0] < result["metrics"]["masked_mse"]["mean"]
    card = (exported / "README.md").read_text()
    for text in (
        *("CC0-1.0", "level 50 / width 350 HU", "masked_mse", "Not a medical device"),
        *(
            "| Dataset | Volumes, slices | ",
            "(training.png)",
            "| 2 (this model) |",
            "10.1117/1.JMI",
        ),
        f"`{manifest['model_fingerprint']}`",
    ):
        assert text in card, text
    everything = b"".join(path.read_bytes() for path in exported.iterdir())
    patients = {
        volume[name]
        for volume in Dataset.open(tiny_dataset).volumes()
        for name in ("patient_id", "volume_id")
    }
    for secret in (*patients, str(tiny_dataset), str(runs)):
        assert secret.encode() not in everything


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_weights_file_alone_says_what_it_is(name, exported, tmp_path):
    path = shutil.copy(exported / name, tmp_path / name)
    facts, manifest = (
        manifests.facts_of(path, "--weights"),
        json.loads((exported / "manifest.json").read_text()),
    )
    for field in ("architecture", "model", "preprocessing", "training", "data"):
        assert facts[field] == manifest[field]
    path.write_bytes((exported / "test_input.npz").read_bytes())
    with pytest.raises(InputError, match="is damaged or not a"):
        manifests.facts_of(path, "--weights")


def test_the_folder_alone_is_enough_where_jax_and_this_package_are_not(exported, tmp_path):
    """What torch_bridge/README.md shows, with the folder on the path and no more."""
    scan = dicom_files.slices(dicom_files.thorax(20, size=32))
    dicom_files.write(tmp_path / "scan", scan)
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = sys.argv[3].split(",")
sys.meta_path.insert(0, Refuse())
import ctssl_torch
assert ctssl_torch.__file__ == sys.argv[1] + "/ctssl_torch.py"
model = ctssl_torch.load(sys.argv[1])
assert not model.training and model.manifest["license"] == "CC0-1.0"
assert max(ctssl_torch.verify(sys.argv[1]).values()) < 1e-5
hu, affine = ctssl_torch.read_dicom(sys.argv[2])
images = model.preprocess(hu, affine)
assert images.shape == (20, 1, 16, 16)
z = model.embed(images)
features = ctssl_torch.Features(model).forward_features(images)
assert z.shape == (20, 4) and features.shape == (20, 4, 4, 4)
assert not {name.split(".")[0] for name in sys.modules} & set(BLOCKED)
"""
    blocked = "jax,jaxlib,flax,optax,orbax,absl,ml_collections,grain,nibabel,scipy"
    blocked += ",ctssl_jax,data_prep,configs,experiments"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(exported), str(tmp_path / "scan"), blocked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(exported)},
    )
    assert ran.returncode == 0, ran.stderr


def test_both_files_hold_the_checkpoint(exported, runs):
    import safetensors.torch

    entries = torch.load(exported / "weights.pt", weights_only=True)
    same = safetensors.torch.load_file(exported / "weights.safetensors")
    assert entries.keys() == same.keys() and all(
        torch.equal(entries[name], same[name]) for name in entries
    )
    saved = saved_state(runs / "masked_region")
    kernel = saved["params/encoder/stem/conv/kernel"]
    np.testing.assert_array_equal(
        entries["encoder.2.0.weight"].numpy(), kernel.transpose(3, 2, 0, 1)
    )
    assert entries["encoder.2.1.num_batches_tracked"].dtype == torch.int64
    assert int(entries["encoder.2.1.num_batches_tracked"]) == 2


def test_onnx(runs, tmp_path):
    if not onnx_is_here():
        pytest.skip("onnx or onnxruntime is not installed: pip install '.[torch]'")
    import onnx
    import onnxruntime

    folder, formats = tmp_path / "model", ("onnx", "onnx_fp16", "onnx_int8")
    manifest = export(runs / "masked_region", folder, formats, "CC0-1.0", num_dataset_slices=8)
    facts = manifest["onnx"]
    assert facts["largest_difference"] < 1e-5
    assert (
        facts["input"].startswith("images [batch, 1, H, W] ") and "multiples of 4" in facts["input"]
    )
    assert facts["codes"]["compared"] == 4 * 4 * 4 + 8 * 7 and facts["codes"]["different"] == 0
    assert facts["input"] in (folder / "README.md").read_text()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert session.get_modelmeta() and not (folder / "model.onnx.data").exists()
    images = np.random.default_rng(0).uniform(size=(3, 1, 32, 20)).astype(np.float32)
    outputs = dict(zip(facts["outputs"], session.run(None, {"images": images}), strict=True))
    model = exporting.open_model(Run.open(runs / "masked_region"), "best").model
    expected = parity.jax_outputs(model, images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(
        outputs["latents"].transpose(0, 2, 3, 1), expected["latents"], atol=1e-5
    )
    margins = parity.relative_margins(expected["latents"], np.asarray(model.quantizer.codebook))
    clear = margins > onnx_file.NEAR_TIE
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(outputs["codes"][clear], expected["codes"][clear])

    # A code that rounding cannot explain is a fault.
    twin = ctssl_torch.build(json.loads((folder / "manifest.json").read_text()))
    twin.vq_layer.embedding.weight.data = torch.tensor(np.asarray(model.quantizer.codebook[...]))
    wrong = {**expected, "codes": np.where(clear, (expected["codes"] + 1) % 8, expected["codes"])}
    _, codes = onnx_file._compare(
        folder / "model.onnx",
        twin,
        ["latents", "codes"],
        [(images.transpose(0, 2, 3, 1), wrong)],
    )
    assert codes["wrong"] == clear.sum()

    # Smaller files: weights of the convolutions alone, and near the file in float32.
    card = (folder / "README.md").read_text()
    for name, kind, limit in (("fp16", np.float16, 0.02), ("int8", np.int8, 0.5)):
        small = onnx.load(folder / f"model_{name}.onnx")
        weights = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in small.graph.initializer
        }
        kinds = [array.dtype for array in weights.values() if array.ndim == 4]
        assert kinds.count(kind) > 5
        codebooks = [array for array in weights.values() if array.shape == (8, 4)]
        assert codebooks and all(array.dtype == np.float32 for array in codebooks)
        measured = manifest["small_onnx"][f"onnx_{name}"]
        assert 0 < measured["error"] < limit and measured["cosine"] > 0.9
        assert measured["num_slices"] == 8 and 0 <= measured["codes_equal"] <= 1
        assert small_onnx.sentence(measured) in card
        session = onnxruntime.InferenceSession(str(folder / f"model_{name}.onnx"))
        again = dict(zip(facts["outputs"], session.run(None, {"images": images}), strict=True))
        assert {value.dtype for value in again.values()} == {np.dtype("f4"), np.dtype("i8")}
        assert again["latents"].shape == outputs["latents"].shape


def test_agreement_of_embeddings():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 4)).astype(np.float32)
    same = small_onnx.agreement(vectors, vectors)
    assert same["error"] == 0 and same["neighbours_equal"] == 1
    assert same["cosine"] == pytest.approx(1)
    off = small_onnx.agreement(vectors, vectors + 1.0)
    assert off["neighbours_equal"] == 1 and off["cosine"] < 1  # shifted, but as far from each other
    spread = np.linalg.norm(vectors - vectors.mean(0), axis=1).mean()
    assert off["error"] == pytest.approx(2 / spread, rel=1e-5)
    assert small_onnx.agreement(vectors, vectors[::-1])["neighbours_equal"] < 0.5


def test_margins_of_codes():
    codebook = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]])
    latents = np.array([[[1.0, 0.0], [0.5, 0.0]]])
    np.testing.assert_allclose(parity.relative_margins(latents, codebook), [[0.0, 8.0]])
    assert np.isinf(parity.relative_margins(latents, codebook[:1])).all()


@pytest.mark.parametrize("windows", [1, 2])
def test_cropped_slices_that_are_stretched_with_their_neighbours(windows, tiny_dataset, tmp_path):
    dataset, chosen = tiny_dataset, ((50.0, 350.0),)
    if windows == 2:
        dataset = write_example_dataset(tmp_path / "two", image_size=16, channels=2)
        chosen = ((50.0, 350.0), (-600.0, 1500.0))
        change_preparation(dataset, windows=[{"level": one, "width": w} for one, w in chosen])
    config = tiny_recipe(
        dataset,
        "pe_se_resnext",
        windows=chosen,
        model__in_channels=3 * windows,
        model__layers=(1, 1),
        model__width=8,
        model__groups=4,
    )
    assert (config.normalize, config.crop) == ("slice_minmax", "lung_box")
    save_untrained(config, tmp_path / "run")
    manifest = export(tmp_path / "run", tmp_path / "model", ("torch",), "CC0-1.0")
    model = ctssl_torch.load(tmp_path / "model")
    grey = np.random.default_rng(0).integers(20, 200, (5, 16, 16, windows), np.uint8)
    images = torch.from_numpy(grey.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    box, numbers = (2.25, -1.0, 13.5, 12.0), [0, 2, 4]
    around = np.clip(np.array(numbers)[:, None] + [-1, 0, 1], 0, 4)
    batch = {
        "images": jnp.asarray(grey[around]),
        "box": jnp.asarray([box] * len(numbers), jnp.float32),
    }
    expected = np.asarray(slice_label.inputs(batch, config))
    inputs = model.inputs(images, torch.tensor(numbers), box)
    np.testing.assert_allclose(inputs.numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)
    ours = exporting.open_model(Run.open(tmp_path / "run"), "best").model
    embeddings = ours(jnp.asarray(expected), train=False).embedding
    np.testing.assert_allclose(
        model.embed(images, box=box).numpy()[numbers], embeddings, rtol=1e-4, atol=1e-5
    )
    hu = dicom_files.thorax(6, size=16).transpose(2, 1, 0)
    whole = model.preprocess(hu, np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert whole.shape == (6, windows, 16, 16)
    assert model.inputs(whole, torch.arange(6), box).shape[1] == 3 * windows
    card = (tmp_path / "model" / "README.md").read_text()
    assert "box = model.lung_box(hu, affine)" in card and "stretched together" in card
    assert manifest["preprocessing"]["crop"] == "lung_box"
    anatomy = (tmp_path / "model" / "ctssl_anatomy.py").read_text()
    alone = load_alone(tmp_path / "model")  # finds the box by the file beside it
    found = alone.lung_box(hu, np.diag([-1.0, -1.0, 1.0, 1.0]), 16)
    assert found == model.lung_box(hu, np.diag([-1.0, -1.0, 1.0, 1.0])) and "scipy" in anatomy
    assert "ctssl_anatomy" in sys.modules
    for given, message in (
        (None, r"give box=\(top, left, bottom, right\)"),
        ((1, 2, 3), "give \\(top, left, bottom, right\\) in pixels"),
        ((1, 2, float("nan"), 5), "in pixels"),
        ((8, 3, 8.5, 9), "less than a pixel of it"),
        ((20, 3, 30, 9), "less than a pixel of it"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(images, box=given)


# ---- the way back --------------------------------------------------------------------------------


def test_round_trip_is_bit_identical(exported, runs, tmp_path):
    import safetensors.torch

    import_weights(exported, tmp_path / "back", None, [])
    before, after = saved_state(runs / "masked_region"), saved_state(tmp_path / "back")
    for name in after:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    with pytest.raises(InputError, match="imported under CC0"):
        export(tmp_path / "back", tmp_path / "again", ALL, "MIT")
    if onnx_is_here():
        with pytest.raises(InputError, match="names no dataset; give --dataset=DIR"):
            export(tmp_path / "back", tmp_path / "again", ("onnx_int8",), "CC0-1.0")
    export(tmp_path / "back", tmp_path / "again", ALL, "CC0-1.0")
    # The weights' files also hold a note of their training, of which an imported run knows less.
    for name, read in (
        ("weights.pt", lambda path: torch.load(path, weights_only=True)),
        ("weights.safetensors", safetensors.torch.load_file),
        ("test_input.npz", np.load),
    ):
        first, again = read(exported / name), read(tmp_path / "again" / name)
        assert list(first) == list(again)
        for entry in first:
            np.testing.assert_array_equal(again[entry], first[entry], err_msg=f"{name} {entry}")


def test_the_notes_of_safetensors_stand_in_one_order():
    import safetensors.numpy

    tensors, notes = {"a": np.arange(6.0), "b": np.eye(2)}, {"ctssl_jax": "x", "format": "pt"}
    files = {
        b"".join(exporting._in_fixed_order(safetensors.numpy.save(tensors, metadata=notes)))
        for _ in range(20)
    }
    assert len(files) == 1
    again = safetensors.numpy.load(files.pop())
    assert all(np.array_equal(again[name], value) for name, value in tensors.items())


def authors_file(path, prefix="", *, channels=3, counter=11):
    """Weights in the authors' layout, random, as their release saves them; returns the tensors."""
    twin = ctssl_torch.VQVAE(
        in_channels=channels,
        hidden=(4, 8),
        depth=2,
        embedding_dim=4,
        num_codes=8,
        output_activation="tanh",
    )
    generator = torch.Generator().manual_seed(0)
    entries = twin.state_dict()
    for name, value in entries.items():
        if value.is_floating_point():
            value.copy_(
                torch.rand(value.shape, generator=generator)
                + (0.5 if "running_var" in name else -0.5)
            )
        else:
            value.fill_(counter if "encoder" in name else counter + 1)  # as after a frozen encoder
    torch.save(
        {"epoch": 3, "model_state": {prefix + name: value for name, value in entries.items()}}, path
    )
    return entries


@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoint(prefix, tiny_dataset, tmp_path):
    entries = authors_file(tmp_path / "last.pth.tar", prefix)
    config = tiny_config(tiny_dataset, normalize="slice_minmax")
    config.model.output_activation = "tanh"
    import_weights(tmp_path / "last.pth.tar", tmp_path / "run", config, WINDOWS)
    imported = json.loads((tmp_path / "run" / "config.json").read_text())
    assert imported["model"]["in_channels"] == 3 and imported["model"]["depth"] == 2
    export(tmp_path / "run", tmp_path / "model", ("torch",), "unknown")
    back = torch.load(tmp_path / "model" / "weights.pt", weights_only=True)
    assert list(back) and back.keys() == entries.keys()
    assert all(torch.equal(back[name], entries[name]) for name in entries)  # counters, too
    model = load_alone(tmp_path / "model").load(tmp_path / "model")
    assert model.output_activation == "tanh" and model.manifest["preprocessing"]["normalize"] == (
        "slice_minmax"
    )


def test_imported_runs_are_evaluated_and_trained_from(tiny_dataset, tmp_path):
    authors_file(tmp_path / "best.pth.tar", channels=1)
    config = tiny_config(tiny_dataset)
    import_weights(tmp_path / "best.pth.tar", tmp_path / "run", config, WINDOWS)
    result = evaluate(tmp_path / "run", tiny_dataset, "test", tmp_path / "result.json")
    assert result["num_patients_seen_in_training"] is None  # nobody knows
    given = {"init_from": str(tmp_path / "run"), "model__depth": 2, "num_steps": 1, "eval_every": 1}
    with pytest.raises(InputError, match="another pseudonym key"):
        train_on(tiny_config(tiny_dataset, **given), tmp_path / "refused")
    assert train_on(
        tiny_config(tiny_dataset, **given, leakage="allow_unchecked"), tmp_path / "next"
    )
    before, after = saved_state(tmp_path / "run"), begun_state(tmp_path / "next")
    model = [name for name in before if name.startswith(("params/", "variables/"))]
    assert len(model) > 50
    for name in model:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


# ---- preprocessing -------------------------------------------------------------------------------


def prepared_and_preprocessed(model, scan, tmp_path, size, **rules):
    """The slices that data_prep makes of a scan, in [0, 1], and those of the folder's own file."""
    from data_prep.raw import scans
    from data_prep.scan.rules import Rules

    plan = scans.plan_scans(scan, rules=Rules(**rules))
    (exam,) = plan.exams
    read = scans.read_scan(plan.input_dir, exam, ((50.0, 350.0),), size, Rules(**rules), b"key")
    hu, affine = ctssl_torch.read_dicom(scan)
    box = scans.prepared_volume(read).lung_box or f"0 0 {size} {size}"
    assert " ".join(map(str, model.lung_box(hu, affine))) == box
    return read.images.transpose(0, 3, 1, 2).astype(np.float32) / 255, model.preprocess(
        hu, affine
    ).numpy()


def test_preprocessing_is_that_of_the_dataset(exported, tmp_path):
    model = load_alone(exported).load(exported)
    hu = dicom_files.thorax(22, size=60, seed=4)[:, :56]
    dicom_files.write(tmp_path / "scan", dicom_files.slices(hu))
    want, found = prepared_and_preprocessed(model, tmp_path / "scan", tmp_path, 16)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("scan", ["lidc_0003.zip", "lidc_0001"])
def test_preprocessing_of_real_scans(exported, real_data, tmp_path, scan):
    model = load_alone(exported).load(exported)
    want, found = prepared_and_preprocessed(model, real_data / scan, tmp_path, 16)
    np.testing.assert_array_equal(found, want)


def test_any_axis_order_is_understood(exported):
    model = load_alone(exported).load(exported)
    hu = dicom_files.thorax(6, size=40, seed=2).astype(np.float32)
    affine = np.array([[0, 0, -1.5, 30], [0, -1.5, 0, 30], [3.0, 0, 0, -50], [0, 0, 0, 1]])
    want = model.preprocess(hu, affine).numpy()
    flipped = affine.copy()
    flipped[:, 2] *= -1
    np.testing.assert_array_equal(model.preprocess(hu[:, :, ::-1], flipped).numpy(), want)
    turned = affine[:, [2, 0, 1, 3]]
    np.testing.assert_array_equal(model.preprocess(hu.transpose(2, 0, 1), turned).numpy(), want)
    flipped = affine.copy()
    flipped[:, 0] *= -1
    np.testing.assert_array_equal(model.preprocess(hu[::-1], flipped).numpy(), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hu, affine: (np.clip(hu, 0, 255), affine), "no pixel is air"),
        (lambda hu, affine: (hu[0], affine), "give hu"),
        (lambda hu, affine: (hu, affine[:3]), "give hu"),
        (lambda hu, affine: (np.where(hu > 0, np.nan, hu), affine), "not finite"),
        (lambda hu, affine: (hu, affine * 0), "length 0"),
        (lambda hu, affine: (hu, turned_by(50) @ affine), "not axial"),
        (lambda hu, affine: (hu, sheared() @ affine), "right angle"),
    ],
)
def test_volumes_that_the_model_does_not_know_are_refused(exported, change, message):
    model = load_alone(exported).load(exported)
    hu = dicom_files.thorax(6, size=40).astype(np.float32)
    affine = np.array([[0, 0, -1.5, 30], [0, -1.5, 0, 30], [3.0, 0, 0, -50], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match=message) as error:
        model.preprocess(*change(hu, affine))
    assert "\n" not in str(error.value)


def turned_by(degrees):
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])


def sheared():
    return np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_models_of_whole_slices_take_no_box(exported):
    model = ctssl_torch.load(exported)
    with pytest.raises(ValueError, match="whole slices; give no box"):
        model.embed(torch.zeros(1, 1, 16, 16), box=(0, 0, 8, 8))


def test_series_that_cannot_be_read_are_refused(tmp_path):
    hu = dicom_files.thorax(6, size=32)

    def read(folder):
        return ctssl_torch.read_dicom(tmp_path / folder, min_slices=2)

    datasets = dicom_files.slices(hu)
    dicom_files.write(tmp_path / "two", [*datasets, *dicom_files.slices(hu, series=2)])
    with pytest.raises(ValueError, match=r"2 CT series \(of 6, 6 slices\)"):
        read("two")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="no CT series"):
        read("none")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        read("none/a.txt")
    other = dicom_files.slices(hu + 1)[2]
    dicom_files.write(tmp_path / "doubled", [*datasets, other])
    with pytest.raises(ValueError, match="two slices at one position"):
        read("doubled")
    dicom_files.write(tmp_path / "gap", [d for i, d in enumerate(dicom_files.slices(hu)) if i != 3])
    with pytest.raises(ValueError, match="slices are missing"):
        read("gap")
    dicom_files.write(tmp_path / "bare", dicom_files.slices(hu), preamble=False)
    assert read("bare")[0].shape == hu.shape
    del datasets[0].RescaleIntercept
    dicom_files.write(tmp_path / "unscaled", datasets[:1])
    with pytest.raises(ValueError, match="lacks RescaleIntercept"):
        read("unscaled")


# ---- wrong input ---------------------------------------------------------------------------------


class Writes:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tiny_dataset, tmp_path):
    torch.save(
        {"model_state": {}, "model": Writes(str(tmp_path / "ran"))}, tmp_path / "last.pth.tar"
    )
    with pytest.raises(InputError, match=r"holds Python objects beside its tensors.*model_state"):
        import_weights(
            tmp_path / "last.pth.tar", tmp_path / "run", tiny_config(tiny_dataset), WINDOWS
        )
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Writes(str(tmp_path / "ran"))))
    with pytest.raises(InputError):
        import_weights(tmp_path / "bare.pth", tmp_path / "run", tiny_config(tiny_dataset), WINDOWS)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_files_that_are_no_such_model_are_refused(exported, tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset)

    def refused(path, message):
        with pytest.raises(InputError, match=message) as error:
            import_weights(path, tmp_path / "run", config, WINDOWS)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

    authors_file(tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut.pth", "truncated")
    (tmp_path / "cut.safetensors").write_bytes(
        (exported / "weights.safetensors").read_bytes()[:-100]
    )
    refused(tmp_path / "cut.safetensors", "damaged")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "not an autoencoder in the authors' layout")
    entries = torch.load(tmp_path / "good.pth", weights_only=True)["model_state"]
    del entries["decoder.0.0.weight"]
    torch.save(entries, tmp_path / "lacking.pth")
    refused(tmp_path / "lacking.pth", r"decoder\.0\.0\.weight is missing")
    refused(tmp_path / "absent.pth", "no such file")
    refused(tmp_path, "manifest.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").write_text("x")
    with pytest.raises(InputError, match="is there already"):
        import_weights(tmp_path / "good.pth", tmp_path / "run", config, WINDOWS)


def test_a_folder_whose_weights_were_changed_is_refused(exported, tmp_path):
    changed = tmp_path / "model"
    changed.mkdir()
    for path in exported.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    entries = torch.load(changed / "weights.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in entries.items()}, changed / "weights.pt")
    alone = load_alone(changed)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        alone.load(changed / "weights.pt")
    with pytest.raises(
        InputError,
        match=r"is not the file that the manifest\.json beside it describes",
    ):
        import_weights(changed / "weights.pt", tmp_path / "run", None, [])
    assert alone.load(changed / "weights.safetensors")
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        alone.load(changed)
    with pytest.raises(InputError, match="format_version 99"):
        import_weights(changed, tmp_path / "run", None, [])
    for content in ({**manifest, "files": []}, {**manifest, "model": {"depth": 9}}):
        (changed / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="manifest"):
            alone.load(changed)
    for content in ({**manifest, "files": []}, {**manifest, "training": None}):
        (changed / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="is damaged"):
            import_weights(changed, tmp_path / "run", None, [])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        alone.load(changed / "weights_v2.pt")
    (changed / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest"):
        alone.load(changed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formats": ("pickle",)}, "give one or more of torch, safetensors, onnx"),
        ({"formats": ()}, "give one or more of"),
        ({"licence": ""}, "give --license"),
        ({"num_test_slices": 0}, "must be 1 or more"),
        ({"checkpoint": "77"}, "has no checkpoint '77'"),
        ({"num_dataset_slices": 1}, "num_dataset_slices=1: must be 2 or more"),
    ],
)
def test_requests_that_cannot_be_met(runs, tmp_path, given, message):
    settings = {"formats": ALL, "licence": "CC0-1.0"} | given
    with pytest.raises(InputError, match=message):
        export(
            runs / "rotation",
            tmp_path / "model",
            settings.pop("formats"),
            settings.pop("licence"),
            **settings,
        )
    assert not (tmp_path / "model").exists()


def test_small_files_need_data_of_the_same_preparation(runs, tmp_path):
    if not onnx_is_here():
        pytest.skip("onnx or onnxruntime is not installed: pip install '.[torch]'")
    write_example_dataset(tmp_path / "other", image_size=32)
    for dataset, message in (
        (tmp_path / "none", "none"),
        (tmp_path / "other", "prepared otherwise"),
    ):
        with pytest.raises(InputError, match=message):
            export(
                runs / "rotation", tmp_path / "model", ("onnx_int8",), "CC0-1.0", dataset=dataset
            )
    assert not (tmp_path / "model").exists()


def test_published_series_need_the_training_with_its_dataset_and_key(runs, tiny_dataset, tmp_path):
    table = tmp_path / "published.csv"
    table.write_text("PatientID,StudyInstanceUID,SeriesInstanceUID\nP-1,1.2,1.2.3\n")
    (tmp_path / "key").write_text("a key of another dataset, 32 characters")
    for run, settings, message in (
        ("rotation", {}, r"published\.csv: these weights were not trained here"),
        (
            "masked_region",
            {"dataset": tmp_path / "none"},
            r"published\.csv needs the dataset of the",
        ),
        ("masked_region", {}, r"needs the key of .*pseudonym_key is not there; give --pseudonym_k"),
        (
            "masked_region",
            {"pseudonym_key_file": tmp_path / "key"},
            "--pseudonym_key_file is not the key of the dataset's pseudonyms",
        ),
    ):
        with pytest.raises(InputError, match=message) as raised:
            export(
                *(runs / run, tmp_path / "model", ("safetensors",), "CC0-1.0"),
                public_series=table,
                **settings,
            )
        assert "\n" not in str(raised.value) and not (tmp_path / "model").exists()


def test_nothing_is_overwritten_and_results_must_be_of_this_model(exported, runs, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        export(runs / "rotation", exported, ALL, "CC0-1.0")
    with pytest.raises(InputError, match="is not a run directory"):
        export(tmp_path, tmp_path / "model", ALL, "CC0-1.0")
    (tmp_path / "result.json").write_text(json.dumps({"model_fingerprint": "other"}))
    with pytest.raises(InputError, match="another model or checkpoint"):
        export(
            runs / "rotation",
            tmp_path / "model",
            ALL,
            "CC0-1.0",
            results=[tmp_path / "result.json"],
        )
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(InputError, match="not a results file"):
        export(
            runs / "rotation",
            tmp_path / "model",
            ALL,
            "CC0-1.0",
            results=[tmp_path / "result.json"],
        )


def test_a_twin_that_is_not_the_same_is_not_written(runs, tmp_path, monkeypatch):
    make = exporting._twin

    def wrong(manifest, entries):
        twin = make(manifest, entries)
        with torch.no_grad():
            twin.classification.weight.mul_(1.01)
        return twin

    monkeypatch.setattr(exporting, "_twin", wrong)
    with pytest.raises(RunFailed, match="not the same function: classification differs"):
        export(runs / "rotation", tmp_path / "model", ALL, "CC0-1.0")
    assert not list(tmp_path.iterdir())


def test_command_lines(exported, tmp_path, monkeypatch):
    arguments = [f"--checkpoint={exported}", f"--workdir={tmp_path / 'run'}"]
    process = start([sys.executable, "-m", "ctssl_jax.import_torch", *arguments])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "tensors of" in output and (tmp_path / "run" / "config.json").is_file()
    monkeypatch.setattr(processes, "configure_jax", lambda: None)
    with pytest.raises(InputError, match=r"^give --license"):
        main_of(door, f"--workdir={tmp_path / 'run'}", f"--output_dir={tmp_path / 'x'}")
    assert not (tmp_path / "x").exists()
