"""Probes of frozen encoders: scikit-learn's numbers, planted answers, the inputs of evaluation,
results, refusals."""

import csv
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from ctssl_jax.data import slices
from ctssl_jax.data.batches import evaluation_batches, training_batches
from ctssl_jax.ops.trees import flatten
from ctssl_jax.probes import encoders, image_probe, label_probe
from ctssl_jax.probes.encoders import FrozenEncoder
from ctssl_jax.probes.image_probe import IMAGES, ImageFeatures
from ctssl_jax.probes.label_probe import LABELS, LabelFeatures
from ctssl_jax.probes.probing import probe, table
from ctssl_jax.runs import checkpoints
from ctssl_jax.runs.checkpoints import choose_step
from ctssl_jax.runs.run import Run, from_json
from ctssl_jax.stats.volumes import auroc_one_vs_rest
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model, evaluation_keys
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import save_untrained, start, tiny_config, tiny_recipe, train_on

SCORES = {
    **dict.fromkeys(LABELS, ("auroc", "accuracy")),
    **dict.fromkeys(("clean", "denoising", "next_slice"), ("mse", "ssim")),
    "masked_region": ("mse", "masked_mse", "ssim"),
}
NAMES = {
    f"{target}/{read}/{score}"
    for target in SCORES
    for read in ("linear", "knn")
    for score in SCORES[target]
}
PLACES = {"position/linear/r2", "order/linear/auroc", "neighbours/knn/recall"}
PLACES |= {f"whole_{name}" for name in PLACES}


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """An autoencoder, trained for a few steps, and a classifier."""
    folder = tmp_path_factory.mktemp("probed")
    assert train_on(tiny_config(tiny_dataset, num_steps=2, eval_every=2), folder / "masked_region")
    save_untrained(tiny_recipe(tiny_dataset, "rotation"), folder / "rotation")
    return folder


@pytest.fixture(scope="module")
def results(runs, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    files = {task: folder / f"{task}.json" for task in ("masked_region", "rotation")}
    return {task: (file, probe(runs / task, tiny_dataset, file)) for task, file in files.items()}


def same_image(**settings):
    """An encoder whose features are the images that it was given."""

    def encode(state, images):
        return images, images.reshape(len(images), -1)

    return FrozenEncoder((), encode, **{"channels": 1, "normalize": "window"} | settings)


# ---- The probes themselves ----


def test_ridge_equals_scikit_learn():
    random = np.random.default_rng(0)
    features = random.normal(3, [1.0, 20.0, 0.1, 0.0], (50, 4))
    outputs = features @ random.normal(size=(4, 3)) + random.normal(size=(50, 3))
    sums = sum(
        image_probe.gram(features[part], outputs[part]) for part in (slice(20), slice(20, 50))
    )
    for penalty in (1e-6, 1e-2, 1.0):
        weights = image_probe.ridge(sums, 4, penalty)
        standard = StandardScaler().fit_transform(features[:, :3])
        expected = Ridge(alpha=50 * penalty).fit(standard, outputs).predict(standard)
        np.testing.assert_allclose(weights[0] + features @ weights[1:], expected, atol=1e-8)
        assert not weights[4].any()  # the constant feature
        error = np.square(expected - outputs).mean()
        assert image_probe.ridge_error(sums, weights) == pytest.approx(error, rel=1e-9)


def test_patches_and_regions():
    images = np.random.default_rng(0).random((2, 8, 12, 3), np.float32)
    patches = image_probe.to_patches(images)
    assert patches.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(4, 4, 3), images[1, 4:, 8:])
    np.testing.assert_array_equal(image_probe.from_patches(patches), images)
    regions = encoders.pool(jnp.asarray(images), 4).reshape(2, 4, 4, 3)
    np.testing.assert_allclose(regions[0, 1, 3], images[0, 2:4, 9:].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        encoders.area_weights(5, 2), [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]], atol=1e-7
    )


@pytest.mark.parametrize("fit", [label_probe.fit_logistic, label_probe.fit_neighbours])
def test_a_planted_label_is_found_and_a_shuffled_one_is_not(fit):
    random = np.random.default_rng(0)

    def features(size, planted):
        labels = random.integers(0, 4, size)
        shown = labels if planted else random.permutation(labels)
        pooled = np.eye(4)[shown] * 5 + random.normal(size=(size, 4)) * 0.5
        return LabelFeatures(pooled.astype(np.float32), labels, np.arange(size))

    for planted, expected, tolerance in ((True, 1.0, 1e-3), (False, 0.5, 0.06)):
        train, validation, test = (features(400, planted) for _ in range(3))
        readout = fit(train, validation)
        probabilities = readout.probabilities(test.pooled)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        auroc = auroc_one_vs_rest(probabilities, test.label)
        assert auroc == pytest.approx(expected, abs=tolerance)


def test_planted_images_are_found():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 12, 12, 1), np.uint8)
    mixing = random.normal(size=(16, 16))

    def batches(chosen, kept=None):
        patches = image_probe.to_patches(images[chosen] / np.float32(255))
        pooled = images[chosen].reshape(len(chosen), -1)[:, :50].astype(np.float32)
        kept = np.ones(len(chosen), bool) if kept is None else kept
        yield ImageFeatures(
            (patches @ mixing).astype(np.float32), pooled, images[chosen], None, chosen, kept
        )

    kept = np.arange(40) < 32
    probes = image_probe.fit_images(batches(np.arange(40), kept), batches(np.arange(8)))
    # validation slices are among the training's
    assert probes.number == 1 and len(probes.targets) == 32
    scores, record_index = image_probe.score_images(
        probes, batches(np.arange(24, 40), np.arange(16) < 8)
    )
    np.testing.assert_array_equal(record_index, np.arange(24, 32))
    for read in ("linear", "knn"):
        assert scores[f"{read}/mse"].max() < 1e-6 and scores[f"{read}/ssim"].min() > 0.999
    scores, _ = image_probe.score_images(probes, batches(np.arange(32, 40)))
    # never seen in training
    assert scores["linear/mse"].max() < 1e-6 and scores["knn/mse"].min() > 0.05


# ---- The same inputs and labels as evaluation ----


@pytest.mark.parametrize("task", [*LABELS, "masked_region", "denoising", "next_slice"])
def test_inputs_targets_and_labels_equal_those_of_evaluation(task, tiny_dataset):
    config = tiny_recipe(tiny_dataset, task)
    task_functions = get_task(task)
    source = slices.open_source(
        Dataset.open(tiny_dataset), "test", (0,), task_functions.offsets(config)
    )
    batch = next(evaluation_batches(source, len(source)))

    @jax.jit  # drops the model: only what goes in and what should come out is asked for
    def evaluated(images, record_index):
        model, keys = (
            task_functions.build(config, nnx.Rngs(params=0)),
            evaluation_keys(record_index),
        )
        batch = {"images": images, "weight": jnp.ones(len(images))}
        output = task_functions.apply(model, batch, keys, None, config, train=False)
        return (
            output.pictures["input"],
            output.pictures["target"],
            output.classes and output.classes["label"],
        )

    inputs, target, label = jax.device_get(evaluated(batch["images"], batch["record_index"]))
    if task in LABELS:
        features = label_probe.label_features(
            same_image(), LABELS[task], evaluation_batches(source, 7)
        )
        np.testing.assert_array_equal(features.label, label)
        np.testing.assert_array_equal(
            label_probe.labels_of(features.record_index, LABELS[task].num_classes), features.label
        )
        np.testing.assert_allclose(features.pooled.reshape(inputs.shape), inputs, atol=1e-6)
        return
    assert source.table.shape[1] == len(IMAGES[task].offsets)
    (features,) = image_probe.image_features(same_image(), IMAGES[task], [batch])
    np.testing.assert_allclose(features.latents, inputs, atol=1e-6)
    np.testing.assert_allclose(features.target / 255, target, atol=1e-6)
    covered = features.region is not None and features.region.sum(axis=(1, 2, 3))
    assert np.all(covered == 49) if task == "masked_region" else not covered  # 7 x 7 of 16 x 16


def test_targets_are_the_same_for_every_grey_scale_of_the_encoder(tiny_dataset):
    batch = next(
        evaluation_batches(slices.open_source(Dataset.open(tiny_dataset), "test", (0,), (0,)), 4)
    )
    encoder = same_image(channels=3, normalize="slice_minmax")
    (features,) = image_probe.image_features(encoder, IMAGES["clean"], [batch])
    assert features.latents.shape == (4, 16, 16, 3) and features.latents.max() == 1
    np.testing.assert_array_equal(features.target, batch["images"][:, 0])


# ---- Encoders ----


@pytest.mark.parametrize("task", ["masked_region", "rotation"])
def test_only_the_encoder_is_read_and_it_is_the_run_s(task, runs, monkeypatch):
    config = from_json(json.loads((runs / task / "config.json").read_text()))
    run, names, restore = Run.open(runs / task), [], checkpoints.restore
    step = run.choose_checkpoint().step

    def recording_restore(workdir, step, template):
        names.extend(flatten(template))
        return restore(workdir, step, template)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "restore", recording_restore)
        encoder = encoders.trained_encoder(config, get_task(task), run, step)
    assert names and all(
        name.split("/")[:2] in (["params", "encoder"], ["variables", "encoder"]) for name in names
    )
    graph, params, variables = abstract_model(config, get_task(task))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole = restore(runs / task, step, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": params, "variables": variables},
    ))  # fmt: skip
    images = jnp.asarray(np.random.default_rng(0).random((3, 16, 16, 1), np.float32))
    model = nnx.merge(graph, whole["params"], whole["variables"])
    expected = jax.jit(lambda images: model.encoder(images, train=False))(images)
    latents, pooled = encoder.encode(encoder.state, images)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    assert pooled.shape == (3, 16 * 4)
    # 4 x 4 latents are their own regions
    np.testing.assert_allclose(pooled, latents.reshape(3, -1), atol=1e-6)
    assert encoders.num_features(encoder, 16) == {"latent": 4, "pooled": 64}


def test_an_untrained_encoder_has_the_statistics_of_the_training_slices(tiny_dataset):
    config = tiny_recipe(tiny_dataset, "rotation")
    source = slices.open_source(Dataset.open(tiny_dataset), "train", (0,), (0,))
    encoder = encoders.untrained_encoder(
        config, get_task("rotation"), training_batches(source, 8, seed=0)
    )
    again = encoders.untrained_encoder(
        config, get_task("rotation"), training_batches(source, 8, seed=0)
    )
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, encoder.state, again.state)))
    images = np.stack([source[index]["images"][0] for index in range(60)]).astype(np.float32) / 255
    model = get_task("rotation").build(config, nnx.Rngs(params=0)).encoder
    for part in encoder.state:
        nnx.update(model, part["encoder"])
    before = model.downsample[0].conv(images)
    norm = model.downsample[0].norm
    np.testing.assert_allclose(norm.mean[...], before.mean((0, 1, 2)), atol=0.03)
    np.testing.assert_allclose(norm.var[...], before.var((0, 1, 2)), rtol=0.3)
    # the weights are as they were drawn
    np.testing.assert_array_equal(model.project.norm.scale[...], 1)


def test_a_renewed_encoder_has_its_weights_and_the_statistics_of_whole_slices(
    tiny_dataset, tmp_path
):
    config = tiny_recipe(tiny_dataset, "rotation")
    save_untrained(config, tmp_path / "run")
    run, task = Run.open(tmp_path / "run"), get_task("rotation")
    step = run.choose_checkpoint("last").step
    source = slices.open_source(Dataset.open(tiny_dataset), "train", (0,), (0,))
    saved = encoders.trained_encoder(config, task, run, step)
    batches = training_batches(source, 8, seed=0)
    renewed = encoders.trained_encoder(config, task, run, step, batches=batches)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, renewed.state[0], saved.state[0])))
    assert not jax.tree.all(jax.tree.map(np.array_equal, renewed.state[1], saved.state[1]))
    images = np.stack([source[index]["images"][0] for index in range(60)]).astype(np.float32) / 255
    model = task.build(config, nnx.Rngs(params=0)).encoder
    for part in renewed.state:
        nnx.update(model, part["encoder"])
    norm, before = model.downsample[0].norm, model.downsample[0].conv(images)
    np.testing.assert_allclose(norm.mean[...], before.mean((0, 1, 2)), atol=0.03)


def test_the_pixel_control_averages():
    images = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    encoder = encoders.pixel_encoder(1, 4)
    latents, pooled = encoder.encode(encoder.state, images)
    np.testing.assert_allclose(latents[1, 2, 3, 0], images[1, 8:12, 12:].mean(), rtol=1e-5)
    assert pooled.shape == (2, 64)  # as many as 4 x 4 regions of 4 features
    np.testing.assert_allclose(pooled[0, 9], images[0, 2:4, 2:4].mean(), rtol=1e-5)
    assert encoders.num_features(encoders.pixel_encoder(1, 64), 16) == {"latent": 1, "pooled": 256}


# ---- Results ----


def test_result_files(runs, results, tiny_dataset):
    for task, (output, content) in results.items():
        assert json.loads(output.read_text()) == content
        assert set(content["metrics"]) == NAMES | PLACES
        for metric in content["metrics"].values():
            assert set(metric) == {"mean", "sd", "ci95", "num_volumes", "num_patients", "unit"}
            assert np.isfinite([metric["mean"], metric["sd"], *metric["ci95"]]).all()
            assert (metric["num_volumes"], metric["num_patients"]) == (2, 2)
        assert content["metrics"]["position/linear/r2"]["mean"] <= 1
        assert {
            "kind": "probe", "task": task, "recipe": task, "encoder": "run", "synthetic": True,
            "split": "test",
            # a gap in each volume
            "num_train_slices": 60, "num_train_pairs": 50, "num_slices": 24, "num_pairs": 20,
            "num_patients_seen_in_training": 0, "seed": 0,
            "num_features": {"latent": 4, "pooled": 64},
            "dataset_fingerprint": Dataset.open(tiny_dataset).preparation["fingerprint"],
            "checkpoint_step": choose_step(runs / task),
        }.items() <= content.items()  # fmt: skip
        assert set(content["chosen"]) == {name.rsplit("/", 1)[0] for name in NAMES}
        assert str(tiny_dataset) not in output.read_text() and str(runs) not in output.read_text()
        with open(output.with_suffix(".csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        for name, metric in content["metrics"].items():
            assert np.mean([float(row[name]) for row in rows]) == pytest.approx(
                metric["mean"], rel=1e-4
            )
        printed = table(content)
        assert (
            "SYNTHETIC DATA" in printed
            and "masked_region     knn" in printed
            and "NOTE: intervals of 2 patients" in printed
        )


def test_the_same_twice_bit_for_bit(runs, results, tiny_dataset, tmp_path):
    """A target of slices and one of images, each alone as beside all others."""
    output, content = results["rotation"]
    chosen = ("flip", "denoising")
    again = probe(runs / "rotation", tiny_dataset, tmp_path / "again.json", targets=chosen)
    assert {name.split("/")[0] for name in again["chosen"]} == set(chosen)
    for part in ("metrics", "chosen"):
        assert again.pop(part).items() <= content[part].items()
    assert again.items() <= content.items()
    rows, whole = (
        list(csv.DictReader(path.read_text().splitlines()))
        for path in (tmp_path / "again.csv", output.with_suffix(".csv"))
    )
    for row, same in zip(rows, whole, strict=True):
        assert "denoising/knn/ssim" in row and row.items() <= same.items()


def test_controls_and_a_part_of_the_training_slices(runs, results, tiny_dataset, tmp_path):
    means = {"run": results["masked_region"][1]["metrics"]["clean/linear/mse"]["mean"]}
    for encoder in ("untrained", "pixels"):
        output = tmp_path / f"{encoder}.json"
        content = probe(
            runs / "masked_region",
            None,
            output,
            encoder=encoder,
            targets=("flip", "clean", "next_slice"),  # of slices, and of pairs
            max_slices=40,
            checkpoint="unused",
        )
        assert {name.split("/")[0] for name in content["chosen"]} == {"flip", "clean", "next_slice"}
        names = {name for name in NAMES if name.split("/")[0] in ("flip", "clean", "next_slice")}
        assert set(content["metrics"]) == names | PLACES and content["encoder"] == encoder
        assert content["checkpoint_step"] is None and content["num_patients_seen_in_training"] == 0
        assert (content["num_train_slices"], content["num_train_pairs"], content["num_slices"]) == (
            40,
            40,
            24,
        )
        means[encoder] = content["metrics"]["clean/linear/mse"]["mean"]
    assert len(set(means.values())) == 3


def test_handcrafted_statistics_and_chosen_targets(runs, tiny_dataset, tmp_path):
    pytest.importorskip("skimage", reason="needs scikit-image, the extra `handcrafted`")
    content = probe(
        runs / "rotation", None, tmp_path / "r.json", encoder="handcrafted", targets=("flip",)
    )
    assert set(content["metrics"]) == {name for name in NAMES if name[:5] == "flip/"} | PLACES
    assert content["num_features"] == {"latent": 4, "pooled": 140}
    assert content["checkpoint_step"] is None


def test_wrong_requests(runs, tiny_dataset, tmp_path):
    run, output = runs / "rotation", tmp_path / "r.json"
    (tmp_path / "file").write_text("")
    small = write_example_dataset(
        tmp_path / "small",
        image_size=16,
        volumes_per_split={"train": 2, "validation": 1, "test": 1},
    )
    short = write_example_dataset(
        tmp_path / "short",
        image_size=16,
        slices_per_volume=12,
        volumes_per_split={"train": 3, "test": 1},
    )
    large = write_example_dataset(tmp_path / "large", image_size=32)
    for arguments, settings, message in (
        ((tmp_path, tiny_dataset, output), {},
         "is not a run directory; give the --workdir of a run"),
        ((run, tiny_dataset, tmp_path / "r.csv"), {}, "must end in .json"),
        ((run, tiny_dataset, tmp_path / "file" / "r.json"), {}, "cannot make .*file"),
        ((run, tiny_dataset, output), {"checkpoint": "99"}, "has no checkpoint '99'"),
        ((run, tiny_dataset, output), {"encoder": "best"}, "choose one of run, renewed, untrained"),
        ((run, tiny_dataset, output), {"split": "train"}, "choose test or validation"),
        ((run, tiny_dataset, output), {"max_slices": 8}, "--max_slices=8: must be 32 or more"),
        ((run, tiny_dataset, output), {"batch_size": -1}, "--batch_size=-1: must be 0 or more"),
        ((run, small, output), {}, "24 training slices are too few for probes, which need 32; "
                                   "give a --dataset"),
        ((run, short, output), {}, "has no validation slices; prepare it again with --splits"),
        ((run, large, output), {}, "prepared otherwise than the run's data: the dataset .* holds "
                                   "images of 32 pix"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as raised:
            probe(*arguments, **settings)
        assert "\n" not in str(raised.value)
    assert not output.exists()


def test_command_line(runs, results, tiny_dataset, tmp_path):
    flags = [
        f"--workdir={runs / 'rotation'}",
        f"--dataset={tiny_dataset}",
        f"--output={tmp_path / 'r.json'}",
        "--targets=next_slice",
        "--encoder=pixels",
    ]
    process = start([sys.executable, "-m", "ctssl_jax.probe", *flags])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (
        "control: pixels" in output
        and "next_slice        linear  mse" in output
        and "written: " in output
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["encoder"] == "pixels"
    assert set(result["chosen"]) == {"next_slice/linear", "next_slice/knn"}
