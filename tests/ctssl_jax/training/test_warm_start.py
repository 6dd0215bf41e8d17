"""Warm starts: the tensors that move or stay, refusals, and the patients that a model has seen."""

import json
import shutil
from types import SimpleNamespace

import jax
import ml_collections
import numpy as np
import pytest

from ctssl_jax.evaluation.measure import evaluate, table
from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.runs.lock import TrainingLock
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import setup, warm_start
from ctssl_jax.training.step import make_program
from data_prep.system.errors import InputError
from tests.helpers.example_dataset import change_preparation, write_example_dataset
from tests.helpers.training_runs import (
    ask_to_stop_at,
    assert_same_state,
    begun_state,
    renew_sums,
    saved_state,
    tiny_recipe,
    train_on,
)

SHORT = {"num_steps": 2, "log_every": 1, "eval_every": 2}


def tiny(dataset_dir, task, /, **overrides):
    """A recipe of two steps."""
    return tiny_recipe(dataset_dir, task, **{**SHORT, **overrides})


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """Finished runs by task, each of two steps from random weights."""
    folder = tmp_path_factory.mktemp("donors")
    for task in ("masked_region", "rotation"):
        assert train_on(tiny(tiny_dataset, task, seed=5, eval_every=1), folder / task)
    return folder


def initial_state(config):
    """The tensors of a run with this configuration before its first step, by name."""
    mesh = make_mesh(jax.devices()[:1])
    program = make_program(config, get_task(config.task), 1, mesh)
    return flatten(jax.device_get(program.initial_state()))


@pytest.mark.parametrize(
    ("task", "donor", "scope"),
    [
        ("masked_region", "masked_region", "model"),  # the progressive chain
        ("next_slice", "masked_region", "encoder"),
        ("rotation", "masked_region", "encoder"),
        ("masked_region", "rotation", "encoder"),
    ],
)
def test_exactly_the_reported_tensors_change(
    task, donor, scope, runs, tiny_dataset, tmp_path, capsys
):
    fields = {"mask__fraction": 0.1} if task == "masked_region" else {}
    fields |= {"init_from": str(runs / donor), "init_checkpoint": "last", "init_scope": scope}
    config = tiny(tiny_dataset, task, **fields)
    assert train_on(config, tmp_path / "run")
    before, after, theirs = (
        initial_state(config),
        begun_state(tmp_path / "run"),
        saved_state(runs / donor, 2),
    )
    names = json.loads((tmp_path / "run" / "transplant.json").read_text())
    for name in before:
        expected = theirs[name] if name in names["moved"] else before[name]
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed <= set(names["moved"])
    # they were not equal before
    assert {name for name in names["moved"] if name.endswith("kernel")} <= changed
    model = {name for name in before if name.split("/")[0] in ("params", "variables")}
    parts = {name.split("/")[1] for name in names["moved"]}
    assert parts == ({"encoder", "quantizer", "decoder"} if scope == "model" else {"encoder"})
    assert sorted(names["moved"] + names["initialised"]) == sorted(model)
    assert not [name for name in names["initialised"] if name.split("/")[1] in parts]
    # BatchNorm statistics
    assert len([name for name in names["moved"] if name.startswith("variables/encoder")]) == 10
    printed = capsys.readouterr().out
    assert (
        f"{len(names['moved'])} tensors of checkpoint 2 of {runs / donor}" in printed
        and "moved: " in printed
    )
    assert int(after["step"]) == 0


def test_batch_normalisation_and_convolutions_are_the_two_parts_of_the_encoder(runs):
    names = list(saved_state(runs / "rotation", 2))
    parts = {
        scope: {name for name in names if warm_start.in_scope(name, scope)}
        for scope in ("encoder", "encoder_norms", "encoder_kernels")
    }
    assert parts["encoder_norms"] | parts["encoder_kernels"] == parts["encoder"]
    assert not parts["encoder_norms"] & parts["encoder_kernels"]
    assert {name.split("/")[-1] for name in parts["encoder_kernels"]} == {"kernel", "bias"}
    norms = parts["encoder_norms"]
    assert {name.split("/")[-1] for name in norms} == {"scale", "bias", "mean", "var"}
    assert all("/norm/" in name for name in norms) and "params/encoder" in min(norms)


def test_the_steps_of_a_codebook_move_with_its_running_counts():
    for part in ("", "heads/masked_region/"):
        assert warm_start.in_scope(f"variables/{part}quantizer/steps", "model")


def test_which_checkpoint_is_taken(runs, tiny_dataset, tmp_path):
    config = tiny(
        tiny_dataset, "denoising", init_from=str(runs / "masked_region"), init_checkpoint="1"
    )
    assert train_on(config, tmp_path / "run")
    kernel = "params/encoder/stem/conv/kernel"
    np.testing.assert_array_equal(
        begun_state(tmp_path / "run")[kernel], saved_state(runs / "masked_region", 1)[kernel]
    )
    assert not np.array_equal(
        saved_state(runs / "masked_region", 1)[kernel], saved_state(runs / "masked_region")[kernel]
    )


def test_interrupted_run_needs_its_donor_no_more_and_equals_a_straight_one(
    runs, tiny_dataset, tmp_path, monkeypatch
):
    donor = shutil.copytree(runs / "masked_region", tmp_path / "donor")
    config = tiny(tiny_dataset, "denoising", init_from=str(donor), num_steps=4)
    assert train_on(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 1)
        assert not train_on(config, tmp_path / "run")
    shutil.rmtree(donor)
    assert train_on(config, tmp_path / "run")
    assert_same_state(tmp_path / "run", tmp_path / "straight")
    assert len(Run.open(tmp_path / "run").ancestors) == 1
    config.init_from = ""
    with pytest.raises(
        InputError,
        match=r"holds a run with config.init_from=.*donor, not ; use another --workdir",
    ):
        train_on(config, tmp_path / "run")


def test_results_know_the_ancestors_and_their_patients(runs, tiny_dataset, tmp_path):
    """A model has seen the patients of every run that its weights went through."""
    other = write_example_dataset(tmp_path / "other", image_size=16, seed=9)
    second = tiny(other, "rotation", init_from=str(runs / "masked_region"), init_scope="encoder")
    assert train_on(second, tmp_path / "second")
    third = tiny(
        other,
        "flip",
        init_from=str(tmp_path / "second"),
        init_scope="encoder",
        init_checkpoint="last",
    )
    assert train_on(third, tmp_path / "third")
    result = evaluate(tmp_path / "third", other, "test", tmp_path / "r.json")
    assert result["num_patients_seen_in_training"] == 0
    assert [run["task"] for run in result["init_from"]] == ["masked_region", "rotation"]
    assert [run["scope"] for run in result["init_from"]] == ["encoder", "encoder"]
    text = (tmp_path / "r.json").read_text()
    patients = json.loads((runs / "masked_region" / "patients.json").read_text())
    assert str(tmp_path) not in text and not [name for name in patients["train"] if name in text]
    on_first = evaluate(tmp_path / "third", tiny_dataset, "train", tmp_path / "first.json")
    assert on_first["num_patients_seen_in_training"] == 5
    path = tmp_path / "third" / "ancestors.json"
    ancestors = json.loads(path.read_text())
    ancestors[0]["patients"]["key_fingerprint"] = "f" * 16
    path.write_text(json.dumps(ancestors))
    renew_sums(tmp_path / "third")
    unknown = evaluate(tmp_path / "third", other, "test", tmp_path / "r.json")
    assert unknown["num_patients_seen_in_training"] is None and "cannot be checked" in table(
        unknown
    )


@pytest.mark.parametrize(
    ("task", "donor", "fields", "message"),
    [
        ("denoising", "nowhere", {}, r"config.init_from=.*nowhere is not a run directory; give "
                                     r"the --workdir of a fin"),
        ("denoising", "masked_region", {"init_checkpoint": "7"}, r"config.init_from: .* has no "
                                                                 r"checkpoint '7'; there"),
        ("denoising", "masked_region", {"init_scope": "decoder"}, r"config.init_scope='decoder': "
                                                                  r"choose one of model"),
        (
            "rotation", "masked_region", {},
            r"does not fit this model \(14 tensors missing, 25 extra, 0 of another shape; "
            r"params/classification/bias is missing there; params/decoder/.* has no place here\); "
            r"the encoder alone fits: --config.init_scope=enc",
        ),
        (
            "denoising", "masked_region", {"model__hidden": (4, 16)},
            r"tensors missing, 0 extra, \d+ of another shape; params/.* has shape \(.*\) there, "
            r"\(.*\) here\); give "
            "the runs equal config.model fields",
        ),
        (
            "flip", "rotation", {"model__depth": 0, "init_scope": "encoder"},
            r"\(0 tensors missing, 6 extra, 0 of another shape; params/encoder/blocks/0/.* has no "
            r"place here\)",
        ),
        ("denoising", "masked_region", {"normalize": "slice_minmax"}, "trained with "
                                                                      "normalize=window; set "
                                                                      "--config"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(task, donor, fields, message, runs, tiny_dataset, tmp_path):
    config = tiny(tiny_dataset, task, init_from=str(runs / donor), **fields)
    with pytest.raises(InputError, match=message) as raised:
        train_on(config, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_window_are_refused(runs, tmp_path):
    folder = write_example_dataset(tmp_path / "lung", image_size=16)
    change_preparation(folder, windows=[{"level": -600.0, "width": 350.0}])
    config = tiny(
        folder, "denoising", init_from=str(runs / "masked_region"), windows=((-600, 350),)
    )
    with pytest.raises(
        InputError,
        match=r"was trained on level/width 50/350, this run reads -600/350; set config.wind",
    ):
        train_on(config, tmp_path / "run")
    config.windows = ()  # all windows of the dataset
    with pytest.raises(InputError, match="50/350, this run reads -600/350"):
        train_on(config, tmp_path / "run")


@pytest.mark.parametrize("field", ["init_from", "init_weights"])
def test_an_incomplete_checkpoint_is_no_reason_to_leave_out_the_other_weights(field, tmp_path):
    """`check` looked for no weights, since the folder has a checkpoint; Orbax cannot read it."""
    job = SimpleNamespace(
        process_index=1,  # another one writes
        workdir=tmp_path,
        has_checkpoint=True,
        config=ml_collections.ConfigDict({"init_from": "", field: "weights"}),
    )
    with pytest.raises(InputError, match="holds an incomplete checkpoint and nothing else; remove"):
        setup.Job.open_run(job, TrainingLock())
    job.config[field] = ""
    checkpoints = setup.Job.open_run(job, TrainingLock())
    assert checkpoints.last_step is None
    checkpoints.close()
