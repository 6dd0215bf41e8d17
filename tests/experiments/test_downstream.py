"""Downstream tasks from training to results: labels of slices and attributes, masks, subsets,
leakage, wrong input."""

import csv
import json
import math
import shutil

import numpy as np
import pytest

from ctssl_jax.data import slices
from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.labels import label_classes, read_attribute
from ctssl_jax.evaluation import outcomes, predictions
from ctssl_jax.evaluation.measure import evaluate, table
from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.runs.reports import read_reports
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.example_dataset import (
    change_preparation,
    renew_checksums,
    write_example_dataset,
)
from tests.helpers.training_runs import begun_state, renew_sums, saved_state, tiny_recipe, train_on

SHORT = {"num_steps": 2, "log_every": 1, "eval_every": 2}
SPLITS = {"train": 6, "validation": 3, "test": 3}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A dataset with slice labels, volume labels and masks."""
    folder = tmp_path_factory.mktemp("labelled") / "dataset"
    return write_example_dataset(
        folder,
        image_size=16,
        volumes_per_split=SPLITS,
        masks=True,
        slice_labels=True,
        volume_labels=True,
    )


@pytest.fixture(scope="module")
def runs(labelled, tmp_path_factory):
    """A pretrained run of other patients under the same pseudonym key, and runs that go on from
    it."""
    folder = tmp_path_factory.mktemp("runs")
    others = write_example_dataset(folder / "others", image_size=16, seed=7)
    assert train_on(tiny_recipe(others, "masked_region", **SHORT), folder / "pretrained")
    given = {**SHORT, "init_from": str(folder / "pretrained"), "init_checkpoint": "last"}
    assert train_on(tiny_recipe(labelled, "pe", **given), folder / "pe")
    assert train_on(tiny_recipe(labelled, "nodules", **given), folder / "nodules")
    return folder


# ---- what a batch holds --------------------------------------------------------------------------


def test_labels_and_masks_are_those_of_their_slices(labelled):
    rows = Dataset.open(labelled).slices("train")
    targets = slices.Targets(label="pe_present_on_image", mask=True)
    source = slices.open_source(
        Dataset.open(labelled), "train", (0,), (-1, 0, 1), targets._replace(repeat_edges=True)
    )
    kept = [number for number, row in enumerate(rows) if row["pe_present_on_image"] is not None]
    assert 0 < len(kept) < len(rows) and len(source) == len(kept)
    records = Dataset.open(labelled).source("train")
    for item, number in zip((source[i] for i in range(len(source))), kept, strict=True):
        assert (
            item["record_index"] == number and item["label"] == rows[number]["pe_present_on_image"]
        )
        np.testing.assert_array_equal(item["images"][1], records[number]["image"])
        np.testing.assert_array_equal(item["mask"], records[number]["mask"])
        assert np.count_nonzero(item["mask"]) == rows[number]["mask_area_px"]


def test_edges_and_gaps_repeat_the_slice_itself(labelled):
    source = slices.open_source(
        Dataset.open(labelled), "test", (0,), (-1, 0, 1), slices.Targets(repeat_edges=True)
    )
    volume = source.volumes[1]
    first, last = volume["first_record"], volume["first_record"] + volume["num_slices"] - 1
    gap = first + int(volume["gap_positions"].split()[0])
    assert len(source) == sum(volume["num_slices"] for volume in source.volumes)
    assert source.table[first].tolist() == [first, first, first + 1]
    assert source.table[last].tolist() == [last - 1, last, last]
    assert source.table[gap].tolist() == [gap - 1, gap, gap]
    assert source.table[gap + 1].tolist() == [gap + 1, gap + 1, gap + 2]


def test_smaller_training_subsets_are_parts_of_larger_ones(labelled):
    volumes = Dataset.open(labelled).volumes("train")
    for seed in range(3):
        taken = [
            {volume["exam_id"] for volume in slices.training_subset(volumes, fraction, seed)}
            for fraction in (1 / 6, 0.5, 1.0)
        ]
        assert [len(exams) for exams in taken] == [1, 3, 6]
        assert taken[0] < taken[1] < taken[2]
    chosen = {
        tuple(sorted(v["exam_id"] for v in slices.training_subset(volumes, 0.5, seed)))
        for seed in range(8)
    }
    assert len(chosen) > 1


def test_positive_share_is_kept_and_every_slice_comes(labelled):
    source = slices.open_source(
        Dataset.open(labelled), "train", (0,), (0,), slices.Targets(mask=True, positive_share=0.75)
    )
    positive = int(source.positive.sum())
    batches = training_batches(source, 8, 0, num_threads=1)
    seen = [next(batches) for _ in range(positive)]  # at least once all of either kind
    shares = [np.any(batch["mask"], axis=(1, 2)).mean() for batch in seen]
    assert shares == [0.75] * len(shares)
    assert {int(i) for batch in seen for i in batch["record_index"]} == set(range(len(source)))
    on_the_way = training_batches(source, 8, 0, num_threads=1, start_step=5)
    np.testing.assert_array_equal(next(on_the_way)["record_index"], seen[5]["record_index"])


def test_attributes_are_labels_of_volumes(labelled, monkeypatch):
    monkeypatch.setattr(read_attribute, "__defaults__", (1,))
    classes, level = label_classes(Dataset.open(labelled), "sex")
    assert level == "volume" and len(classes) == 2
    source = slices.open_source(
        Dataset.open(labelled), "train", (0,), (0,), slices.Targets(label="sex", middle_only=True)
    )
    expected = {
        volume["volume_id"]: classes.index(volume["sex"])
        for volume in source.volumes
        if volume["sex"]
    }
    starts = {
        volume["first_record"] + volume["middle_slice"]: volume["volume_id"]
        for volume in source.volumes
    }
    assert len(source) == len(expected) > 1
    for i in range(len(source)):
        assert source[i]["label"] == expected[starts[int(source[i]["record_index"])]]


# ---- from a pretrained encoder to results --------------------------------------------------------


def test_label_results(runs, labelled, tmp_path):
    result = evaluate(runs / "pe", None, "test", tmp_path / "pe.json")
    for name in (
        "auroc",
        "average_precision",
        "brier",
        "ece",
        "sensitivity",
        "specificity",
        "exam_auroc",
    ):
        assert name in result["metrics"]
    assert set(result["thresholds"]) == {"slice", "exam"} and set(result["by_group"]) == {
        "sex",
        "age",
        "ethnic_group",
    }
    assert result["num_train_studies"] == 6 and result["train_fraction"] == 1.0
    rows = [
        row
        for row in Dataset.open(labelled).slices("test")
        if row["pe_present_on_image"] is not None
    ]
    assert result["num_train_slices"] == 6 * 11 and result["num_slices"] == len(rows)
    found = predictions.read(tmp_path / "pe.json")
    assert found.label.tolist() == [row["pe_present_on_image"] for row in rows]
    assert found.volume_id.tolist() == [row["volume_id"] for row in rows]
    assert found.slice_index.tolist() == [row["slice_index"] for row in rows]
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-6)
    loss = -np.log(found.probabilities[np.arange(len(rows)), found.label])
    by_volume = [
        loss[found.volume_id == volume].mean() for volume in dict.fromkeys(found.volume_id)
    ]
    assert result["metrics"]["cross_entropy"]["mean"] == pytest.approx(np.mean(by_volume), rel=1e-5)
    assert "exam_auroc" in table(result) and "AUROC by sex" in table(result)
    assert (
        json.loads((tmp_path / "pe.json").read_text())["metrics"].keys() == result["metrics"].keys()
    )
    shown = np.load(tmp_path / "pe.npz")  # the slice once, the truth and P, no difference
    assert {"input", "label", "probabilities", "class_names"} == set(shown.files)
    assert shown["class_names"].tolist() == ["0", "1"]
    found = predictions.read(tmp_path / "pe.json")
    pairs = {tuple(row) for row in np.column_stack([found.label, found.probabilities]).round(4)}
    of_pictures = np.column_stack([shown["label"], shown["probabilities"]]).round(4)
    assert {tuple(row) for row in of_pictures} <= pairs


def test_groups_are_measured_over_the_items_of_the_headline(tmp_path):
    random = np.random.default_rng(0)
    volumes = [
        {"volume_id": f"v{number:02d}", "patient_id": f"p{number:02d}", "sex": "FM"[number % 2]}
        for number in range(24)
    ]
    rows = [{**volume, "age": "", "ethnic_group": ""} for volume in volumes]
    found = hand_made(
        random.random(72),
        np.repeat(np.arange(24) // 2 % 2, 3),
        [volume["volume_id"] for volume in volumes for _ in range(3)],
    )._replace(patient_id=np.repeat([volume["patient_id"] for volume in volumes], 3))
    for level, items, number in (("slice", "slices", 36), ("patient", "volumes", 12)):
        groups = outcomes.by_group(found, rows, level)["sex"]
        assert groups["items"] == items and groups["groups"]["F"]["num_items"] == number
    # one group: its AUROC is the headline's
    alone = outcomes.by_group(found, [{**row, "sex": "F"} for row in rows], "volume")["sex"]
    metrics, _ = outcomes.label_metrics(found, None, ["no", "yes"], None)
    assert alone["groups"]["F"]["mean"] == metrics["auroc"]["mean"]


def test_mask_results(runs, labelled, tmp_path):
    result = evaluate(runs / "nodules", None, "test", tmp_path / "nodules.json")
    found = predictions.read(tmp_path / "nodules.json")
    areas = [row["mask_area_px"] for row in Dataset.open(labelled).slices("test")]
    assert found.target_px.tolist() == areas
    with np.errstate(invalid="ignore"):  # both masks empty
        dice = 2 * found.intersection_px / (found.predicted_px + found.target_px)
    assert result["metrics"]["dice"]["mean"] == pytest.approx(dice[found.target_px > 0].mean())
    assert result["metrics"]["dice"]["num_slices"] == np.count_nonzero(areas)
    assert result["metrics"]["dice_all_slices"]["num_slices"] == len(areas)
    assert "not empty" in result["metrics"]["dice"]["unit"]
    assert "both masks empty 1" in result["metrics"]["dice_all_slices"]["unit"]
    with open(tmp_path / "nodules.csv") as file:
        by_volume = list(csv.DictReader(file))
    for row in by_volume:
        own = (found.volume_id == row["volume_id"]) & (found.target_px > 0)
        expected = dice[own].mean() if own.any() else math.nan
        assert float(row["dice"] or "nan") == pytest.approx(expected, abs=1e-5, nan_ok=True)
    one = found.volume_id == found.volume_id[0]
    whole = (
        2
        * found.intersection_px[one].sum()
        / (found.predicted_px[one] + found.target_px[one]).sum()
    )
    assert float(
        (tmp_path / "nodules.csv").read_text().split("\n")[1].split(",")[-2]
    ) == pytest.approx(whole, abs=1e-5)
    arrays = np.load(tmp_path / "nodules.npz")
    assert (
        arrays["target_mask"].any()
        and arrays["prediction_mask"].shape == arrays["target_mask"].shape
    )


@pytest.mark.parametrize(
    ("run", "names"),
    [
        ("pe", {"auroc", "average_precision", "cross_entropy", "accuracy"}),
        (
            "nodules",
            {"dice", "iou", "dice_all_slices", "iou_all_slices", "binary_cross_entropy"},
        ),
    ],
)
def test_a_validation_has_the_names_and_numbers_of_the_evaluation(run, names, runs, tmp_path):
    (line,) = read_reports(runs / run, "validation")[-1:]
    metrics = evaluate(runs / run, None, "validation", tmp_path / "r.json", checkpoint="last")[
        "metrics"
    ]
    assert names <= metrics.keys() & line.keys()
    for name in metrics.keys() & line.keys():
        assert line[name] == pytest.approx(metrics[name]["mean"], abs=1e-6), name


@pytest.mark.parametrize(
    ("run", "scope"),
    [("pe", ("downsample", "stem", "blocks", "project")), ("nodules", ("downsample", "stem"))],
)
def test_the_pretrained_layers_and_no_others_move(run, scope, runs):
    names = json.loads((runs / run / "transplant.json").read_text())
    start, donor = begun_state(runs / run), saved_state(runs / "pretrained")
    layers = {name.split("/")[2] for name in names["moved"]}
    assert layers == set(scope) and all(name.split("/")[1] == "encoder" for name in names["moved"])
    for name in names["moved"]:
        np.testing.assert_array_equal(start[name], donor[name])
    assert not any(name.split("/")[1] == "encoder" for name in names["initialised"])


def test_arms_start_alike_but_for_the_encoder(runs, labelled, tmp_path):
    assert train_on(tiny_recipe(labelled, "nodules", **SHORT), tmp_path / "random")
    ours, random = begun_state(runs / "nodules"), begun_state(tmp_path / "random")
    different = {
        name.split("/")[1] for name in ours if not np.array_equal(ours[name], random[name])
    }
    assert different == {"encoder"}


def test_a_frozen_encoder_does_not_move(runs, labelled, tmp_path):
    given = {
        "init_from": str(runs / "pretrained"),
        "encoder_learning_rate_factor": 0.0,
        "init_checkpoint": "last",
    }
    assert train_on(tiny_recipe(labelled, "pe", **SHORT, **given), tmp_path / "run")
    before, after = begun_state(tmp_path / "run"), saved_state(tmp_path / "run")
    moved = {
        name.split("/")[1]
        for name in before
        if not np.array_equal(before[name], after[name])
        and name.split("/")[0] in ("params", "variables")
    }
    assert moved and "encoder" not in moved


# ---- leakage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained_on_test_patients(labelled, tmp_path_factory):
    """A run whose training patients are the test patients of `labelled`."""
    folder = tmp_path_factory.mktemp("leaking")
    shutil.copytree(labelled, folder / "dataset")
    assert train_on(tiny_recipe(folder / "dataset", "masked_region", **SHORT), folder / "run")
    patients = json.loads((folder / "run" / "patients.json").read_text())
    test = {volume["patient_id"] for volume in Dataset.open(labelled).volumes("test")}
    patients["train"] = sorted(test)[:2]
    (folder / "run" / "patients.json").write_text(json.dumps(patients))
    renew_sums(folder / "run")
    return folder / "run"


def test_patients_of_the_evaluation_are_not_learned_from(
    pretrained_on_test_patients, labelled, tmp_path
):
    given = {**SHORT, "init_from": str(pretrained_on_test_patients), "init_checkpoint": "last"}
    for leakage in ("refuse", "allow_unchecked"):
        with pytest.raises(
            InputError,
            match=r"2 of the 6 validation and test patients .* --config.leakage=allow",
        ):
            train_on(tiny_recipe(labelled, "pe", leakage=leakage, **given), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert train_on(tiny_recipe(labelled, "pe", leakage="allow", **given), tmp_path / "run")
    result = evaluate(tmp_path / "run", None, "test", tmp_path / "result.json")
    assert "allowed by config.leakage: 2 validation and test patients" in table(result)
    assert result["init_from"][-1]["leakage_let_pass"].startswith("2 validation and test patients")


def test_what_cannot_be_compared_is_refused(pretrained_on_test_patients, labelled, tmp_path):
    donor = shutil.copytree(pretrained_on_test_patients, tmp_path / "donor")
    patients = json.loads((donor / "patients.json").read_text())
    (donor / "patients.json").write_text(json.dumps({**patients, "key_fingerprint": "another"}))
    renew_sums(donor)
    given = {**SHORT, "init_from": str(donor), "init_checkpoint": "last"}
    with pytest.raises(InputError, match="another pseudonym key"):
        train_on(tiny_recipe(labelled, "nodules", **given), tmp_path / "refused")


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        ("pe", {"label": "emphysema"}, "config.label=emphysema: the dataset .* has no such label"),
        ("pe", {"num_classes": 3}, "has 2 classes .* --config.num_classes=2"),
        ("pe", {"train_fraction": 0.0}, "config.train_fraction=0"),
        ("pe", {"positive_share": 1.0}, "config.positive_share=1.0"),
        ("pe", {"augmentation__contrast": -1.0}, "config.augmentation.contrast=-1"),
        ("nodules", {"model__widths": (1, 2)}, "config.model: widths must be 5"),
    ],
)
def test_wrong_fields_are_named(recipe, fields, message, labelled, tmp_path):
    with pytest.raises(InputError, match=message):
        train_on(tiny_recipe(labelled, recipe, **SHORT, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_share_without_a_positive_study_is_refused(labelled, tmp_path):
    negative = shutil.copytree(labelled, tmp_path / "dataset")
    lines = (negative / "slices.csv").read_text().splitlines()
    header = lines[0].split(",")
    area = header.index("mask_area_px")
    volumes = Dataset.open(negative).volumes("train")
    with_masks = slices.training_subset(volumes, 1 / 6, 1)[0]["volume_id"]
    emptied = [
        line
        if line.startswith(with_masks)
        else ",".join(["0" if i == area else cell for i, cell in enumerate(line.split(","))])
        for line in lines[1:]
    ]
    (negative / "slices.csv").write_text("\n".join([lines[0], *emptied]) + "\n")
    renew_checksums(negative)
    other_seed = next(
        seed
        for seed in range(50)
        if slices.training_subset(volumes, 1 / 6, seed)[0]["volume_id"] != with_masks
    )
    config = tiny_recipe(negative, "nodules", **SHORT, train_fraction=1 / 6, seed=other_seed)
    with pytest.raises(
        InputError,
        match=r"none of the .* slices of 1 training studies .*choose a larger config.train",
    ):
        train_on(config, tmp_path / "run")


def test_masks_and_labels_must_be_there(tiny_dataset, tmp_path):
    with pytest.raises(
        InputError,
        match=r"has no masks; prepare it with --archive=lidc_idri or with --masks_dir",
    ):
        train_on(tiny_recipe(tiny_dataset, "nodules", **SHORT), tmp_path / "run")
    with pytest.raises(InputError, match=r"config.label=pe_present_on_image"):
        train_on(tiny_recipe(tiny_dataset, "pe", **SHORT), tmp_path / "run")


# ---- measures ------------------------------------------------------------------------------------


def hand_made(probabilities, labels, volumes):
    positive = np.array(probabilities)
    volumes = np.array(volumes)
    return Predictions(
        patient_id=volumes,
        volume_id=volumes,
        slice_index=np.arange(len(volumes)),
        label=np.array(labels),
        probabilities=np.stack([1 - positive, positive], axis=-1),
    )


def test_exam_scores_and_thresholds_by_hand():
    test = hand_made(
        [0.1, 0.9, 0.2, 0.3, 0.6, 0.4], [0, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "c", "c"]
    )
    validation = hand_made([0.2, 0.4, 0.8, 0.5], [0, 0, 1, 1], ["p", "q", "q", "r"])
    exams = {name: f"exam of {name}" for name in "abcpqr"}
    found, thresholds = outcomes.label_metrics(test, validation, ["0", "1"], exams)
    assert thresholds["slice"] == pytest.approx(0.45)
    assert thresholds["exam"] == pytest.approx(0.35)  # exams p 0.2 negative; q 0.8, r 0.5 positive
    assert found["auroc"]["mean"] == 1.0 and found["exam_auroc"]["mean"] == 1.0
    assert found["sensitivity"]["mean"] == 1.0 and found["exam_specificity"]["mean"] == 1.0
    without, thresholds = outcomes.label_metrics(test, None, ["0", "1"], exams)
    assert thresholds == {"slice": None, "exam": None} and "sensitivity" not in without
    of_volumes, _ = outcomes.label_metrics(
        hand_made([0.2, 0.4, 0.9, 0.5], [0, 0, 1, 1], ["a", "a", "b", "b"]), None, ["F", "M"], None
    )
    assert of_volumes["auroc"]["num_volumes"] == 2
    assert of_volumes["brier"]["mean"] == pytest.approx((0.3**2 + 0.3**2) / 2)


def test_adjacent_slices_of_two_windows_are_channels(tmp_path):
    folder = write_example_dataset(
        tmp_path / "two", image_size=16, channels=2, volumes_per_split=SPLITS, slice_labels=True
    )
    small = {"model__width": 4, "model__groups": 2, "model__layers": (1, 1, 1, 1), "crop": "none"}
    both = ((50.0, 350.0), (-600.0, 1500.0))
    change_preparation(folder, windows=[{"level": one, "width": other} for one, other in both])
    for windows in ((), both):
        fields = {**SHORT, **small, "windows": windows}
        with pytest.raises(InputError, match=r"3 adjacent slices of 2 window\(s\) .*(to|make) 6"):
            train_on(tiny_recipe(folder, "pe_se_resnext", **fields), tmp_path / "refused")
        config = tiny_recipe(folder, "pe_se_resnext", **fields, model__in_channels=6)
        assert train_on(config, tmp_path / f"run_{len(windows)}")
    first, second = (saved_state(tmp_path / f"run_{number}") for number in (0, 2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    measured = evaluate(tmp_path / "run_2", None, "test", tmp_path / "result.json")
    assert measured["num_slices"] > 0 and 0 <= measured["metrics"]["accuracy"]["mean"] <= 1


def test_weights_of_a_file_are_where_the_training_starts(labelled, tmp_path):
    torch = pytest.importorskip("torch")
    fields = {
        **{"windows": (), "model__width": 4, "model__groups": 2, "model__layers": (1, 1, 1, 1)},
        **{"normalize": "window", "crop": "none"},
    }
    assert train_on(
        tiny_recipe(labelled, "pe_se_resnext", **SHORT, **fields, seed=1), tmp_path / "other"
    )
    names = {
        "scale": "weight",
        "bias": "bias",
        "kernel": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }
    tensors = {}
    for name, value in saved_state(tmp_path / "other").items():
        if not name.startswith(("params/", "variables/")) or "/classification/" in name:
            continue
        _, *parts, last = name.split("/")
        block = "layer0" if parts[0] == "stem" else f"layer{int(parts[1]) + 1}.{parts[2]}"
        layer = {"stem/conv": "conv1", "stem/norm": "bn1"}.get("/".join(parts))
        if layer is None:
            layer = {
                "squeeze": "se_module.fc1",
                "excite": "se_module.fc2",
                "downsample": f"downsample.{int(parts[-1] == 'norm')}",
            }.get(parts[3], parts[3] if parts[-1] == "conv" else parts[3].replace("conv", "bn"))
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
        tensors[f"{block}.{layer}.{names[last]}"] = torch.tensor(np.ascontiguousarray(value))
    torch.save(tensors, tmp_path / "weights.pth")
    named = {"init_weights": str(tmp_path / "weights.pth"), "leakage": "allow_unchecked"}
    config = tiny_recipe(labelled, "pe_se_resnext", **SHORT, **fields, **named)
    assert train_on(config, tmp_path / "run")
    start, given = begun_state(tmp_path / "run"), saved_state(tmp_path / "other")
    model = [name for name in start if name.split("/")[0] in ("params", "variables")]
    for name in model:
        same = np.array_equal(start[name], given[name])
        assert same or "/classification/" in name, name
    assert not np.array_equal(
        start["params/classification/kernel"], given["params/classification/kernel"]
    )
    result = evaluate(tmp_path / "run", None, "test", tmp_path / "result.json")
    assert len(result["init_weights_sha256"]) == 64 and str(tmp_path) not in json.dumps(
        result["config"]
    )
    assert result["num_patients_seen_in_training"] is None
    assert "overlap with the training data of the initial weights could not be" in table(result)
    assert train_on(config, tmp_path / "run")  # started again: what it began from is still known
    assert evaluate(tmp_path / "run", None, "test", tmp_path / "result.json")["init_weights_sha256"]
    del tensors["layer1.0.conv1.weight"]
    torch.save(tensors, tmp_path / "cut.pth")
    config.init_weights = str(tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight is missing"):
        train_on(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
