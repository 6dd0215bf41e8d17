"""Weights of a file: whose patients they learned from, and the pooling that they were trained
with."""

import json

import numpy as np
import pytest

from ctssl_jax.ops.trees import flatten
from ctssl_jax.tasks.table import get_task
from ctssl_jax.torch_bridge import imagenet_weights, manifests, names, weight_files
from ctssl_jax.training import recipe, warm_start
from ctssl_jax.training.setup import check
from ctssl_jax.training.state import abstract_model
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import save_untrained, tiny_recipe

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

MODEL = {
    **{"windows": (), "normalize": "window", "crop": "none"},
    **{"model.width": 4, "model.groups": 2, "model.layers": (1, 1)},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_example_dataset(
        tmp_path_factory.mktemp("labelled") / "dataset", image_size=16, slice_labels=True
    )


def recipe_of(dataset, path="", **fields):
    return tiny_recipe(dataset, "pe_se_resnext", **MODEL, init_weights=str(path), **fields)


@pytest.fixture(scope="module")
def tensors(dataset):
    """Tensors by the names of either published layout."""
    config = recipe_of(dataset)
    _, params, variables = abstract_model(config, get_task(config.task))
    shapes = flatten({"params": params, "variables": variables})
    ours = {name.split("/", 1)[1]: np.ones(leaf.shape, np.float32) for name, leaf in shapes.items()}
    timm = names.state_dict(ours, "SEResNeXt", 0, 0)

    def older(name):
        name = "layer0." + name if name.startswith(("conv1.", "bn1.")) else name
        return name.replace(".se.", ".se_module.").replace("fc.", "last_linear.", name[:3] == "fc.")

    return {"timm": timm, "legacy": {older(name): value for name, value in timm.items()}}


def manifest_of(dataset, **changes):
    """The manifest of an export of a run on this dataset."""
    return {
        "format_version": manifests.FORMAT_VERSION,
        "architecture": "SEResNeXt",
        "model": {"pooling": "legacy"},
        "preprocessing": {"windows": [[50, 350]], "normalize": "window"},
        "training": {"task": "slice_label_se_resnext", "checkpoint_step": 2, "config": {}},
        "data": {"dataset_fingerprint": Dataset.open(dataset).fingerprint, "splits": {}},
        "files": {},
        **changes,
    }


def exported(folder, tensors, manifest):
    """A weights file of an export, moved away from its manifest."""
    metadata = {weight_files.NOTE: manifests.note(manifest)}
    safetensors.save_file(tensors, folder / "moved.safetensors", metadata=metadata)
    return folder / "moved.safetensors"


@pytest.mark.parametrize("layout", ["timm", "legacy"])
def test_whose_weights_these_are_cannot_be_told(layout, dataset, tensors, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(tensors[layout], path)
    with pytest.raises(InputError, match=r"init_weights=.* cannot be told; .*=allow_unchecked, wh"):
        check(recipe_of(dataset, path), None)
    job = check(recipe_of(dataset, f"file://{path}", leakage="allow_unchecked"), None)
    assert job.warm_start.allowed_overlap.endswith("could not be checked")
    assert job.config.model.pooling == layout
    warm_start.record(job.warm_start, tmp_path)
    (ancestor,) = json.loads((tmp_path / "ancestors.json").read_text())
    assert ancestor["sha256"] == job.warm_start.sha256 and ancestor["leakage_let_pass"]
    assert ancestor["patients"]["key_fingerprint"] == "unknown"
    given = recipe_of(dataset, path, leakage="allow_unchecked", model__pooling="legacy")
    assert check(given, None).config.model.pooling == "legacy"


def test_published_weights_of_photographs_hold_no_patients(dataset, tensors, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(tensors["timm"], path)
    monkeypatch.setattr(imagenet_weights, "PUBLISHED", ("00000000", file_sha256(path)[:8]))
    source = check(recipe_of(dataset, path), None).warm_start
    assert source.ancestors == [] and source.allowed_overlap == ""


def test_an_export_moved_alone_says_what_it_learned_from(dataset, tensors, tmp_path):
    """Of a run on the same data its patients are known, of one on other data they are not."""
    path = exported(tmp_path, tensors["timm"], manifest_of(dataset))
    job = check(recipe_of(dataset, path), None)
    assert job.warm_start.allowed_overlap == "" and job.config.model.pooling == "legacy"
    (ancestor,) = job.warm_start.ancestors
    train = {volume["patient_id"] for volume in Dataset.open(dataset).volumes("train")}
    assert set(ancestor["patients"]["train"]) == train
    other = {"data": {"dataset_fingerprint": "another", "splits": {}}}
    path = exported(tmp_path, tensors["timm"], manifest_of(dataset, **other))
    with pytest.raises(InputError, match=r"give the run itself as config\.init_from"):
        check(recipe_of(dataset, path), None)
    training = manifest_of(dataset)["training"]
    started = training | {"init_from": [{"recipe": "rotation", "dataset_fingerprint": "another"}]}
    path = exported(tmp_path, tensors["timm"], manifest_of(dataset, training=started))
    with pytest.raises(InputError, match="cannot be told"):
        check(recipe_of(dataset, path), None)
    begun = training | {"init_weights_sha256": "f" * 64}
    path = exported(tmp_path, tensors["timm"], manifest_of(dataset, training=begun))
    with pytest.raises(InputError, match="cannot be told"):
        check(recipe_of(dataset, path), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocessing": {"windows": [[-600, 1500]], "normalize": "window"}},
         r"init_weights=.* was trained on level/width -600/1500, this run reads 50/350; set conf"),
        ({"preprocessing": {"windows": [[50, 350]], "normalize": "slice_minmax"}},
         r"init_weights=.* was trained with normalize=slice_minmax; set --config.normalize="),
        ({"training": []}, r"init_weights=.* is damaged; export it again"),
        ({"format_version": 9}, r"init_weights=.* has format_version 9; this version reads 1"),
    ],
)  # fmt: skip
def test_what_an_export_says_is_checked(change, message, dataset, tensors, tmp_path):
    path = exported(tmp_path, tensors["timm"], manifest_of(dataset, **change))
    with pytest.raises(InputError, match=message) as raised:
        check(recipe_of(dataset, path), None)
    assert "\n" not in str(raised.value)


def test_a_run_keeps_its_pooling_and_gives_it_on(dataset, tmp_path):
    save_untrained(recipe_of(dataset, model__pooling="timm"), tmp_path / "run")
    begun = recipe_of(dataset), tmp_path / "run"
    warm = recipe_of(dataset, init_from=str(tmp_path / "run")), None
    random = recipe_of(dataset), None
    taken = [recipe.with_pooling(*each).model.pooling for each in (begun, warm, random)]
    assert taken == ["timm", "timm", "legacy"]
