"""Attributes of patients: classes from the training split, planted answers found, controls,
results, refusals."""

import csv
import json
import sys

import numpy as np
import pytest

from ctssl_jax import attributes as door
from ctssl_jax.data.labels import age_classes, join_decades, label_classes, read_attribute
from ctssl_jax.parallel import processes
from ctssl_jax.probes.attribute_probe import attributes, table
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import VOLUME_COLUMNS, VOLUMES_FILE
from data_prep.dataset.storage import write_table
from data_prep.system.errors import InputError
from tests.ctssl_jax.probes.test_probe import save_untrained
from tests.helpers.example_dataset import renew_checksums, write_example_dataset
from tests.helpers.own_flags import main_of
from tests.helpers.training_runs import start, tiny_recipe

VOLUMES = {"train": 60, "validation": 24, "test": 30}


def change_volumes(folder, change):
    """Write volumes.csv again with `change(row, number)` applied to every row."""
    rows = Dataset.open(folder).volumes()
    for number, row in enumerate(rows):
        change(row, number)
    write_table(folder / VOLUMES_FILE, VOLUME_COLUMNS, rows)
    renew_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Sex is the side of the disc in the middle slice, age its height; every tenth volume has
    neither."""
    folder = write_example_dataset(
        tmp_path_factory.mktemp("attributes") / "planted",
        image_size=16,
        slices_per_volume=7,
        volumes_per_split=VOLUMES,
        volumes_per_shard=60,
        volume_labels=True,
    )
    sources = {split: Dataset.open(folder).source(split) for split in VOLUMES}

    def plant(row, number):
        row["middle_slice"] = number % 7  # not the same in all volumes
        image = sources[row["split"]][row["first_record"] + row["middle_slice"]]["image"][
            ..., 0
        ].astype(float)
        rows, columns = (np.average(axis, weights=image) for axis in np.indices(image.shape))
        row["sex"], row["age"] = "FM"[int(columns < 7.5)], 45 if rows < 7.5 else 81
        if number % 10 == 0:
            row["sex"], row["age"] = "", None

    return change_volumes(folder, plant)


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribute_runs") / "rotation"
    save_untrained(tiny_recipe(planted, "rotation"), folder)
    return folder


@pytest.fixture(scope="module")
def result(run, planted, tmp_path_factory):
    output = tmp_path_factory.mktemp("attribute_results") / "r.json"
    return output, attributes(run, planted, output, encoder="pixels", pooling_regions=4)


# ---- Classes ----


def test_decades_are_joined_until_each_class_has_enough_patients():
    decades = [3, 4, 5, 5, 5, 6, 6, 6, 7, 9]
    patients = [f"p{number}" for number in range(len(decades))]
    assert join_decades(decades, patients, 3) == [6]  # 3, 4 and 5; then 6, which the last two join
    assert join_decades(decades, patients, 2) == [5, 6, 7]  # 3 and 4; 5; 6; 7 and 9
    assert join_decades(decades, patients, 1) == [4, 5, 6, 7, 9]
    assert join_decades(decades, patients, 11) == []
    # two scans of one patient are one patient
    assert join_decades([5, 5, 6, 6], ["a", "a", "b", "c"], 2) == []
    assert age_classes([5, 7]) == ("0-49", "50-69", "70+") and age_classes([]) == ("0+",)


def test_ages_of_other_splits_fall_into_the_classes_of_the_training_split(planted):
    attribute = read_attribute(Dataset.open(planted), "age")
    assert attribute.classes == ("0-79", "80+") and attribute.missing == {
        "train": 6,
        "validation": 3,
        "test": 3,
    }
    assert attribute.labels["test"].shape == (30,) and (attribute.labels["train"] == -1).sum() == 6
    volumes = Dataset.open(planted).volumes("test")
    for volume, label in zip(volumes, attribute.labels["test"], strict=True):
        assert label == {None: -1, 45: 0, 81: 1}[volume["age"]]


def test_small_classes_are_left_out_by_the_training_split(tmp_path):
    folder = write_example_dataset(
        tmp_path / "d",
        image_size=16,
        slices_per_volume=7,
        volumes_per_split={"train": 7, "validation": 2, "test": 4},
    )
    change_volumes(
        folder, lambda row, number: row.update(ethnic_group="aabbc  abcbd "[number].strip())
    )
    attribute = read_attribute(Dataset.open(folder), "ethnic_group", 2)
    assert attribute.classes == ("a", "b") and attribute.too_small == {"c": 2, "d": 1}
    assert attribute.missing == {"train": 2, "validation": 0, "test": 1}
    assert attribute.labels["train"].tolist() == [0, 0, 1, 1, -1, -1, -1]
    assert attribute.labels["test"].tolist() == [-1, 1, -1, -1]
    with pytest.raises(
        InputError, match="ethnic_group has fewer than two classes with 3 training patients"
    ):
        read_attribute(Dataset.open(folder), "ethnic_group", 3)


def test_errors_name_the_field_that_the_user_typed(planted, tmp_path):
    with pytest.raises(
        InputError,
        match=r"^config\.label: no training volume .* of ethnic_group; .*--attributes_csv",
    ) as raised:
        label_classes(Dataset.open(planted), "ethnic_group")
    assert "--attributes:" not in str(raised.value)
    few = write_example_dataset(tmp_path / "few", image_size=16, slices_per_volume=7)
    with pytest.raises(
        InputError,
        match=r"^config\.label: sex has fewer than two .*; choose another label",
    ) as raised:
        label_classes(Dataset.open(few), "sex")
    assert "--min_patients" not in str(raised.value)  # training has no such flag


def test_labels_of_the_dataset_are_attributes(planted):
    attribute = read_attribute(Dataset.open(planted), "smoker")
    assert attribute.classes == ("no", "yes") and attribute.missing["train"] == 20
    assert attribute.labels["train"][:6].tolist() == [0, 1, -1, 0, 1, -1]
    assert (
        read_attribute(Dataset.open(planted), "pe_positive_exam").labels["test"].tolist()
        == [0, 1] * 15
    )


# ---- Probes ----


def test_a_planted_attribute_is_found_in_the_middle_slice(result):
    _, content = result
    metrics = content["metrics"]
    for name in ("sex", "age"):
        assert metrics[f"{name}/auroc"]["mean"] > 0.95
        assert metrics[f"{name}/auroc"]["ci95"][1] == 1
        assert (
            metrics[f"{name}/auroc"]["num_volumes"]
            == metrics[f"{name}/auroc"]["num_patients"]
            == 27
        )
    assert metrics["sex/auroc/F"]["mean"] == pytest.approx(metrics["sex/auroc/M"]["mean"])


def test_shuffled_labels_are_not_found(run, planted, result, tmp_path):
    means = []
    for seed in range(6):
        output = tmp_path / "r.json"
        content = attributes(
            run,
            planted,
            output,
            names=["sex"],
            encoder="pixels",
            pooling_regions=4,
            shuffled_labels=True,
            seed=seed,
        )
        means.append(content["metrics"]["sex/auroc"]["mean"])
        assert content["shuffled_labels"] and content["seed"] == seed
    assert len(set(means)) > 1 and 0.2 < np.mean(means) < 0.8
    assert np.mean(means) < result[1]["metrics"]["sex/auroc"]["mean"] - 0.1
    with open(output.with_suffix(".csv")) as shuffled, open(result[0].with_suffix(".csv")) as true:
        truth = [[row["sex/class"] for row in csv.DictReader(file)] for file in (shuffled, true)]
    assert truth[0] == truth[1]  # the test labels stay


def test_encoders(run, planted, tmp_path):
    means = {}
    for encoder, regions, number in (
        ("run", 1, 4),
        ("run", 4, 64),
        ("untrained", 1, 4),
        ("pixels", 1, 4),
    ):
        settings = {"names": ["sex", "smoker"], "encoder": encoder, "pooling_regions": regions}
        content = attributes(run, None, tmp_path / "r.json", **settings)
        assert content["num_features"] == number and content["encoder"] == encoder
        assert content["checkpoint_step"] == (2 if encoder == "run" else None)
        means[encoder, regions] = content["metrics"]["sex/auroc"]["mean"]
        assert list(content["attributes"]) == ["sex", "smoker"]
        again = attributes(run, None, tmp_path / "again.json", batch_size=7, **settings)
        assert again["metrics"]["sex/auroc"]["mean"] == pytest.approx(
            means[encoder, regions], abs=0.02
        )
    assert means["run", 4] > 0.8 and len(set(means.values())) > 2


def test_result_files(run, planted, result):
    output, content = result
    assert json.loads(output.read_text()) == content
    assert str(planted) not in output.read_text() and str(run) not in output.read_text()
    assert {
        "kind": "attributes", "task": "rotation", "encoder": "pixels", "synthetic": True,
        "split": "test", "num_patients_seen_in_training": 0, "num_features": 64, "seed": 0,
        "num_volumes": VOLUMES, "shuffled_labels": False,
        "dataset_fingerprint": Dataset.open(planted).preparation["fingerprint"],
    }.items() <= content.items()  # fmt: skip
    for metric in content["metrics"].values():
        assert {"mean", "sd", "ci95", "num_volumes", "num_patients", "unit"} <= set(metric)
    assert content["not_probed"] == {
        "ethnic_group": "no training volume of the dataset has a value of ethnic_group"
    }
    facts = content["attributes"]["sex"]
    assert (
        sum(facts["num_patients"][name]["train"] for name in "FM") == 54
        and facts["missing"]["test"] == 3
    )
    with open(output.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    volumes = Dataset.open(planted).volumes("test")
    assert [row["volume_id"] for row in rows] == [volume["volume_id"] for volume in volumes]
    for row, volume in zip(rows, volumes, strict=True):
        assert row["sex/class"] == volume["sex"] and row["patient_id"] == volume["patient_id"]
        shown = [row[f"sex/probability/{name}"] for name in "FM"]
        assert (
            shown == ["", ""]
            if volume["sex"] == ""
            else sum(map(float, shown)) == pytest.approx(1, abs=1e-5)
        )
    right = [row["sex/class"] == max("FM", key=lambda name: float(row[f"sex/probability/{name}"]))
             for row in rows if row["sex/class"]]  # fmt: skip
    assert np.mean(right) == pytest.approx(content["metrics"]["sex/accuracy"]["mean"])
    printed = table(content)
    assert (
        "SYNTHETIC DATA" in printed
        and "sex/auroc/F" in printed
        and "not probed: no training volume" in printed
    )
    assert "sex: left out 12 volumes without a value" in printed and "SHUFFLED" not in printed


# ---- Refusals ----


def test_wrong_requests(run, planted, tmp_path):
    output = tmp_path / "r.json"
    one_class = write_example_dataset(
        tmp_path / "one", image_size=16, slices_per_volume=7, slice_labels=True,
        volumes_per_split={"train": 4, "validation": 2, "test": 1},
    )  # fmt: skip
    for folder, settings, message in (
        (planted, {"encoder": "best"}, "choose one of run, renewed, untrained, pixels"),
        (planted, {"pooling_regions": 2}, "--pooling_regions=2: choose one of 1, 4"),
        (planted, {"min_patients": 0}, "--min_patients=0: must be 1 or more"),
        (planted, {"seed": -1}, "--seed=-1: must be 0 to"),
        (planted, {"checkpoint": "99"}, "has no checkpoint '99'"),
        (
            planted,
            {"names": ["weight"]},
            "^--attributes: the dataset has no attribute 'weight'; choose of age, sex, "
            "ethnic_group, pe_positive_exam",
        ),
        (
            planted,
            {"names": ["ethnic_group"]},
            "^--attributes: no training volume of the dataset has a value of ethnic_group",
        ),
        (planted, {"names": []}, "--attributes is empty"),
        (
            planted,
            {"min_patients": 50},
            "no attribute can be probed on .*age has fewer than two classes with 50",
        ),
        (
            one_class,
            {"names": ["sex"], "min_patients": 2},
            "sex has fewer than two classes in the test split",
        ),
        (
            one_class,
            {"names": ["age"]},
            "^--attributes: age has fewer .* 10 training patients; give a smaller --min_patients",
        ),
        (
            one_class,
            {"names": ["pe_present_on_image"]},
            "^--attributes: pe_present_on_image is a label of slices",
        ),
    ):
        with pytest.raises(InputError, match=message) as raised:
            attributes(run, folder, output, **settings)
        assert "\n" not in str(raised.value)
    assert not output.exists()


def test_a_model_without_the_encoder_is_refused(planted, tmp_path):
    folder = tmp_path / "run"
    small = {
        "model__layers": (1, 1, 1, 1),
        "model__width": 16,
        "model__groups": 8,
        "windows": ((50, 350),),
    }
    save_untrained(tiny_recipe(planted, "pe_se_resnext", label="pe_positive_exam", **small), folder)
    with pytest.raises(InputError, match="has no encoder to probe"):
        attributes(folder, planted, tmp_path / "r.json", encoder="untrained")


def test_command_line(run, planted, tmp_path, monkeypatch):
    flags = [
        f"--workdir={run}",
        f"--dataset={planted}",
        f"--output={tmp_path / 'r.json'}",
        "--attributes=sex,smoker",
    ]
    process = start([sys.executable, "-m", "ctssl_jax.attributes", *flags, "--encoder=pixels"])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "control: pixels" in output and "smoker/auroc/yes" in output and "written: " in output
    assert json.loads((tmp_path / "r.json").read_text())["encoder"] == "pixels"
    monkeypatch.setattr(processes, "configure_jax", lambda: None)
    with pytest.raises(InputError, match=r"^--encoder=none"):
        main_of(door, *flags, "--encoder=none")
