"""Evaluation: the same numbers by hand, the results file, baselines, refusals, patients seen in
training."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ctssl_jax.evaluation.measure import evaluate, table
from ctssl_jax.ops import corruptions
from ctssl_jax.runs.checkpoints import restore
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import DatasetError, InputError
from tests.helpers.example_dataset import change_preparation, write_example_dataset
from tests.helpers.opened_files import listed, listing
from tests.helpers.training_runs import start, tiny_config, train_on


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    assert train_on(tiny_config(tiny_dataset, num_steps=6, eval_every=3), workdir)
    return workdir


@pytest.fixture(scope="module")
def result(run, tiny_dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "made" / "test.json"
    return output, evaluate(run, tiny_dataset, "test", output, baselines=True)


def by_hand(run, tiny_dataset, result):
    """Predictions of the test split one slice at a time, compared in numpy: [24] MSE, masked MSE
    and SSIM."""
    from flax import nnx
    from skimage.metrics import structural_similarity

    config = tiny_config(tiny_dataset, num_steps=6, eval_every=3)
    task = get_task(config.task)
    graph, params, variables = abstract_model(config, task)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": params, "variables": variables},
    )
    restored = restore(run, result["checkpoint_step"], like)
    model = nnx.merge(graph, restored["params"], restored["variables"])
    records = Dataset.open(tiny_dataset).source("test")
    predict = jax.jit(lambda inputs: model(inputs, train=False).reconstruction)
    rows, mean = (
        [],
        np.mean([Dataset.open(tiny_dataset).source("train")[i]["image"] for i in range(60)], axis=0)
        / 255,
    )
    for index in range(len(records)):
        target = records[index]["image"][None].astype(np.float32) / 255
        keys = corruptions.example_keys(jax.random.key(0), np.array([index], np.int32))
        inputs, mask = corruptions.mask_region(keys, target, fraction=0.2)
        square = np.square(np.asarray(predict(inputs)) - target)[0]
        inside = np.asarray(mask)[0] > 0
        similarity = structural_similarity(
            np.asarray(predict(inputs))[0, ..., 0].astype(float),
            target[0, ..., 0].astype(float),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        rows.append(
            (
                square.mean(),
                square[inside].mean(),
                similarity,
                np.square(mean - target)[0][inside].mean(),
            )
        )
    return np.array(rows).T


def test_numbers_equal_a_computation_by_hand(run, tiny_dataset, result):
    output, content = result
    mse, masked_mse, ssim, mean_image = by_hand(run, tiny_dataset, content)
    for name, values in (("mse", mse), ("masked_mse", masked_mse), ("ssim", ssim)):
        volumes = values.reshape(2, 12).mean(axis=1)
        metric = content["metrics"][name]
        assert metric["mean"] == pytest.approx(volumes.mean(), abs=2e-5)
        assert metric["sd"] == pytest.approx(volumes.std(ddof=1), abs=2e-5)
        # two patients only
        assert metric["ci95"] == pytest.approx([volumes.min(), volumes.max()], abs=2e-5)
        assert (metric["num_volumes"], metric["num_patients"]) == (2, 2)
        with open(output.with_suffix(".csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(row[name]) for row in rows] == pytest.approx(volumes.tolist(), abs=2e-5)
    baseline = content["baselines"]["mean_image"]["masked_mse"]["mean"]
    assert baseline == pytest.approx(mean_image.mean(), abs=1e-6)


def test_result_files(run, result, tiny_dataset):
    output, content = result
    assert json.loads(output.read_text()) == content
    assert {
        "task",
        "recipe",
        "synthetic",
        "split",
        "metrics",
        "codebook",
        "num_slices",
        "num_patients_seen_in_training",
        "checkpoint_step",
        "model_fingerprint",
        "dataset_fingerprint",
        "trained_on_fingerprint",
        "init_from",
        "train_fraction",
        "seed",
        "config",
        "preparation",
        "versions",
        "device",
        "baselines",
    } <= content.keys()
    assert content["split"] == "test" and content["num_slices"] == 24 and content["synthetic"]
    assert content["dataset_fingerprint"] == Dataset.open(tiny_dataset).preparation["fingerprint"]
    assert all(
        set(metric) == {"mean", "sd", "ci95", "num_volumes", "num_patients", "unit"}
        for metric in content["metrics"].values()
    )
    assert str(tiny_dataset) not in output.read_text() and str(run) not in output.read_text()
    with open(output.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    scores = ["mse", "masked_mse", "ssim", "masked_mse_batch_sum"]
    assert list(rows[0]) == ["volume_id", "patient_id", "num_slices", *scores]
    assert [row["volume_id"] for row in rows] == [
        volume["volume_id"] for volume in Dataset.open(tiny_dataset).volumes("test")
    ]
    assert Image.open(output.with_suffix(".png")).size[0] > 4 * 16
    printed = table(content)
    assert (
        "SYNTHETIC DATA" in printed
        and "copy_input masked_mse" in printed
        and "of these patients" not in printed
    )
    assert content["num_patients_seen_in_training"] == 0


def test_the_model_before_training_is_told(result):
    """After few steps, the validation loss may be lowest before the first one."""
    note = (
        "NOTE: step 0 is the model before training, nothing was learned; --checkpoint=last takes "
        "the last"
    )
    assert note in table(result[1] | {"checkpoint_step": 0}).splitlines()
    assert "NOTE: step 0" not in table(result[1] | {"checkpoint_step": 3})


@pytest.mark.parametrize("batch_size", [5, 24])
def test_batch_size_changes_no_result(batch_size, run, result, tmp_path):
    again = evaluate(run, None, "test", tmp_path / "again.json", batch_size=batch_size)
    for name, metric in again["metrics"].items():
        assert metric["mean"] == pytest.approx(result[1]["metrics"][name]["mean"], abs=1e-6)
        assert metric["ci95"] == pytest.approx(result[1]["metrics"][name]["ci95"], abs=1e-6)
    assert again["model_fingerprint"] == result[1]["model_fingerprint"]
    assert again["codebook"] == result[1]["codebook"]


def test_validation_numbers_are_those_of_the_training(run, tmp_path):
    from ctssl_jax.runs.reports import read_reports

    for which in ("best", "last", "3"):
        content = evaluate(run, None, "validation", tmp_path / "result.json", checkpoint=which)
        (line,) = [
            line
            for line in read_reports(run, "validation")
            if line["step"] == content["checkpoint_step"]
        ]
        assert content["metrics"]["masked_mse"]["mean"] == pytest.approx(
            line["masked_mse"], abs=1e-6
        )
    assert content["checkpoint_step"] == 3


def test_patients_seen_in_training_are_counted(run, tiny_dataset, tmp_path):
    seen = evaluate(run, None, "train", tmp_path / "train.json")
    assert seen["num_patients_seen_in_training"] == 5
    assert "NOTE: 5 of these patients were in the training data" in table(seen)
    foreign = write_example_dataset(tmp_path / "foreign", image_size=16, seed=5)
    change_preparation(foreign, key_fingerprint="f" * 16)
    unknown = evaluate(run, foreign, "test", tmp_path / "foreign.json")
    assert unknown["num_patients_seen_in_training"] is None
    assert "cannot be checked" in table(unknown)
    assert unknown["dataset_fingerprint"] != unknown["trained_on_fingerprint"]


def test_data_prepared_otherwise_is_refused(run, tmp_path):
    output = tmp_path / "result.json"
    other_size = write_example_dataset(tmp_path / "larger", image_size=32)
    with pytest.raises(InputError, match=r"was prepared otherwise than the run's data: .*16"):
        evaluate(run, other_size, "test", output)
    other_window = write_example_dataset(tmp_path / "window", image_size=16)
    change_preparation(other_window, windows=[{"level": 100.0, "width": 350.0}])
    with pytest.raises(
        InputError,
        match=r"was prepared otherwise than the run's data: .*50/350.*--window=50,350",
    ):
        evaluate(run, other_window, "test", output)
    with pytest.raises(DatasetError, match="no such directory"):
        evaluate(run, tmp_path / "nowhere", "test", output)
    assert not output.exists()


def test_a_channel_with_the_run_s_window_is_found_in_a_dataset_of_two(
    run, result, tiny_dataset, tmp_path
):
    two = write_example_dataset(tmp_path / "two", image_size=16, channels=2)
    windows = [{"level": -600.0, "width": 1500.0}, {"level": 50.0, "width": 350.0}]
    change_preparation(two, windows=windows)
    second = evaluate(run, two, "test", tmp_path / "second.json")
    change_preparation(two, windows=windows[::-1])
    first = evaluate(run, two, "test", tmp_path / "first.json")
    expected = result[1]["metrics"]["mse"]["mean"]
    assert first["metrics"]["mse"]["mean"] == pytest.approx(expected, abs=1e-6)
    assert second["metrics"]["mse"]["mean"] != pytest.approx(expected, abs=1e-3)


def test_wrong_requests(run, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (
            (tmp_path, None, "test", tmp_path / "r.json"),
            "is not a run directory; give the --workdir of a run",
        ),
        ((run, None, "test", tmp_path / "r.csv"), "must end in .json"),
        ((run, None, "holdout", tmp_path / "r.json"), "has no holdout slices"),
        ((run, None, "test", tmp_path / "file" / "r.json"), "cannot make .*file"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(*arguments)
    with pytest.raises(InputError, match="has no checkpoint '99'"):
        evaluate(run, None, "test", tmp_path / "r.json", checkpoint="99")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command_line(run, result, tiny_dataset, tmp_path):
    flags = [f"--workdir={run}", f"--dataset={tiny_dataset}", f"--output={tmp_path / 'r.json'}"]
    program = [*listing("config.json", "preparation.json"), "ctssl_jax.evaluate"]
    process = start([*program, *flags], num_devices=2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "masked_mse" in output and "95 % interval" in output
    files = (run / "config.json", run / "preparation.json", tiny_dataset / "preparation.json")
    assert listed(errors) == sorted(map(str, files))  # each opened once
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["metrics"]["ssim"]["mean"] == pytest.approx(
        result[1]["metrics"]["ssim"]["mean"], abs=1e-6
    )
    assert again["model_fingerprint"] == result[1]["model_fingerprint"]
