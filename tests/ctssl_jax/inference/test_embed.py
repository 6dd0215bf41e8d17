"""Embeddings of raw scans, arrays and datasets: one model, one answer; files, resuming, privacy,
refusals."""

import csv
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest
from flax import nnx

import ctssl_jax
from ctssl_jax import embed as door
from ctssl_jax.data import slices as data
from ctssl_jax.data.batches import evaluation_batches
from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference import (
    embedding,
    embedding_files,
    embedding_inputs,
    pretrained,
    serving,
)
from ctssl_jax.inference.embedding import embed, summary
from ctssl_jax.inference.serving import Watch, watch_embeddings
from ctssl_jax.probes.encoders import trained_encoder
from ctssl_jax.runs.run import Run, open_workdir
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model, evaluation_keys
from data_prep.dataset.reader import Dataset
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.raw import scans
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError
from tests.helpers import dicom_files
from tests.helpers.opened_files import listed, listing
from tests.helpers.own_flags import main_of
from tests.helpers.training_runs import save_scored, start, tiny_recipe

NUM_SLICES = 21
TASKS = {
    "next_slice": {},
    "rotation": {},
    "pe": {"num_classes": 2, "crop": "lung_box", "label": "sex"},
    "pe_se_resnext": {
        **{"num_classes": 2, "crop": "none", "label": "sex"},
        **{"model.layers": (1,), "model.width": 4, "model.groups": 2},
    },
    "nodules": {},
}
# indices of [S, H, W] -> right, anterior, superior
AFFINE = np.diag([-5.5, -5.5, 2.5, 1.0])[:, [2, 1, 0, 3]]


def save_untrained(config, workdir, preparation, steps):
    """A run directory as training leaves it, but of a model of random numbers."""
    patients = {
        split: [volume["patient_id"] for volume in Dataset.open(config.dataset).volumes(split)]
        for split in ("train", "validation")
    }
    open_workdir(workdir, config, preparation, patients)
    _, params, variables = abstract_model(config, get_task(config.task))
    random = np.random.default_rng(1)

    def numbers(path, leaf):
        if not np.issubdtype(leaf.dtype, np.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = random.normal(0, 0.3, leaf.shape)
        positive = jax.tree_util.keystr(path, simple=True).endswith(("var", "scale"))
        return jnp.asarray(1 + np.abs(values) if positive else values, leaf.dtype)

    params, variables = jax.tree_util.tree_map_with_path(numbers, (params, variables))
    states = {}
    for step in steps:
        scaled = jax.tree.map(lambda leaf, step=step: leaf * step / 2, params)
        states[step] = ({"params": scaled, "variables": variables}, 1 / step)
    save_scored(workdir, states)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Four patients, one scan with a gap; a short series and a text."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(1, 5):
        hu = dicom_files.thorax(NUM_SLICES + number, seed=number)
        datasets = dicom_files.slices(hu, study=number, patient=f"patient-{number}")
        if number == 2:
            del datasets[9]
        dicom_files.write(folder / f"scan{number}", datasets)
    short = dicom_files.slices(dicom_files.thorax(5), study=8, patient="patient-8")
    dicom_files.write(folder / "short", short)
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture(scope="module")
def folder(archive, tmp_path_factory):
    """`key`, and `dataset`: the archive prepared under it, with two windows."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "key").write_text("0123456789abcdef0123456789abcdef")
    windows = ((50.0, 350.0), (-600.0, 1500.0))
    options = Options(image_size=32, windows=windows, splits=(0.5, 0.25, 0.25))
    places = Directories(archive, folder / "dataset", folder / "private")
    prepare(options, places, num_workers=1, pseudonym_key_file=folder / "key")
    return folder


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of every kind of model, on the second window of the dataset."""
    workdirs = tmp_path_factory.mktemp("runs")
    preparation = Dataset.open(folder / "dataset").preparation
    for task, settings in TASKS.items():
        config = tiny_recipe(
            folder / "dataset", task, image_size=32, windows=((-600.0, 1500.0),), **settings
        )
        save_untrained(config, workdirs / task, preparation, (2, 4) if task == "rotation" else (4,))
    return workdirs


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """A model that is loaded twice is one object, with one compiled program: tests take a third of
    the time."""
    load_model = functools.cache(pretrained.load)

    def load(run, checkpoint="best", *, batch_size=0):
        return load_model(
            run.workdir if isinstance(run, Run) else run, checkpoint, batch_size=batch_size
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "load", load)
        patch.setattr(pretrained, "load", load)
        patch.setattr(serving, "load", load)
        yield


def rows_of(output):
    return parquet.read_table(output).to_pylist(), parquet.read_table(
        output.with_suffix(".volumes.parquet")
    ).to_pylist()


def slices_of(output):
    """volume_id -> embeddings [S, D]."""
    found = {}
    for row in rows_of(output)[0]:
        found.setdefault(row["volume_id"], []).append(row["embedding"])
        assert row["slice_index"] == len(found[row["volume_id"]]) - 1
    return {name: np.array(values, np.float32) for name, values in found.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# ---- one answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_raw_scans_give_the_embeddings_of_their_dataset(runs, folder, archive, tmp_path, task):
    raw, of_dataset = tmp_path / "raw.parquet", tmp_path / "dataset.parquet"
    result = embed(runs / task, archive, raw, pseudonym_key_file=folder / "key", num_workers=0)
    other = embed(runs / task, folder / "dataset", of_dataset)
    assert (
        result["num_volumes"] == other["num_volumes"] == 4
        and result["num_slices"] == 4 * NUM_SLICES + 10 - 1
    )
    assert result["refused"] == {"too_few_slices": 1} and result["not_images"] == {"not_dicom": 1}
    assert result["num_patients_seen_in_training"] == 3  # training and validation
    assert "NOTE: the model has learned from 3 of these patients" in summary(result)
    raw, of_dataset = slices_of(raw), slices_of(of_dataset)
    assert raw.keys() == of_dataset.keys()
    for name, values in raw.items():
        np.testing.assert_array_equal(values, of_dataset[name])
        assert values.std(axis=0).max() > 0


@pytest.mark.parametrize("task", TASKS)
def test_paths_arrays_and_prepared_slices_are_one_volume(runs, folder, archive, task):
    model = ctssl_jax.load(runs / task)
    z = model.embed(str(archive / "scan1"))
    assert z.slices.shape == (NUM_SLICES + 1, model.embedding_dim) and z.slices.dtype == np.float32
    np.testing.assert_allclose(z.mean, z.slices.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(z.max, z.slices.max(0))
    hu = dicom_files.thorax(NUM_SLICES + 1, seed=1)
    np.testing.assert_array_equal(model.embed(hu, AFFINE).slices, z.slices)
    np.testing.assert_array_equal(
        model.embed(np.flip(hu.T), AFFINE @ turn_of(hu.shape)).slices, z.slices
    )
    plan = scans.plan_scans(archive / "scan1")
    images = scans.read_scan(plan.input_dir, plan.exams[0], model.windows, 32).images
    if task == "pe":
        with pytest.raises(InputError, match="crops slices to the lungs; give HU"):
            model.embed(images)
    else:
        np.testing.assert_array_equal(model.embed(images).slices, z.slices)


def turn_of(shape):
    """Indices of np.flip(hu.T) -> indices of hu."""
    turn = np.zeros((4, 4))
    turn[[0, 1, 2], [2, 1, 0]] = -1
    turn[:3, 3] = np.array(shape) - 1
    turn[3, 3] = 1
    return turn


def test_embeddings_are_those_of_evaluation_and_probes(runs, folder):
    """Of downstream tasks what the task itself computes; of pretraining the encoder's mean of the
    slice as it is."""
    for task in TASKS:
        model = ctssl_jax.load(runs / task)
        config = model.config
        targets = get_task(config.task).targets(config)
        downstream = bool(targets.label or targets.mask)
        offsets = get_task(config.task).offsets(config) if downstream else (0,)
        given = targets._replace(label="", mask=False)
        source = data.open_source(Dataset.open(config.dataset), "test", (1,), offsets, given)
        batch = next(evaluation_batches(source, len(source)))
        if downstream:
            graph, *_ = abstract_model(config, get_task(config.task))
            batch |= {
                "label": np.ones(len(source), np.int32),
                "mask": np.ones((len(source), 32, 32), np.uint8),
            }

            @jax.jit
            def apply(state, batch, config=config, graph=graph):
                network = nnx.merge(graph, state["params"], state["variables"], copy=True)
                keys = evaluation_keys(batch["record_index"])
                return (
                    get_task(config.task)
                    .apply(network, batch, keys, None, config, train=False)
                    .embedding
                )

            expected = apply(model.state, batch)
        else:
            frozen = trained_encoder(config, get_task(config.task), Run.open(runs / task), 4)
            expected = jnp.mean(
                frozen.encode(frozen.state, batch["images"][:, 0] / np.float32(255))[0], axis=(1, 2)
            )
        (row,) = Dataset.open(config.dataset).volumes("test")
        prepared = scans.PreparedVolume(
            batch["images"][:, offsets.index(0)],
            [int(i) for i in row["gap_positions"].split()],
            row["lung_box"],
        )
        found = model.outputs(prepared)["embedding"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_gap_is_not_a_neighbour(runs):
    """Of SE-ResNeXt the embeddings on both sides of a gap change, and no others."""
    model = ctssl_jax.load(runs / "pe_se_resnext")
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 1), np.uint8)
    whole, gap = (
        model.outputs(scans.PreparedVolume(images, gaps))["embedding"] for gaps in ((), (2,))
    )
    changed = np.abs(whole - gap).max(axis=1) > 1e-7
    assert changed.tolist() == [False, False, True, True, False, False]
    first, last = (
        model.outputs(scans.PreparedVolume(part))["embedding"] for part in (images[:3], images[3:])
    )
    np.testing.assert_allclose(np.concatenate([first, last]), gap, rtol=1e-5, atol=1e-7)


def test_other_outputs(runs, folder, archive):
    scan = archive / "scan1"
    model = ctssl_jax.load(runs / "rotation", checkpoint="2", batch_size=3)
    assert (model.step, model.batch_size) == (2, 8)  # on eight devices
    probabilities = model.probabilities(scan)
    assert probabilities.shape == (NUM_SLICES + 1, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    latents = model.latents(scan)
    assert latents.shape == (NUM_SLICES + 1, 8, 8, 4)
    np.testing.assert_allclose(
        latents.mean(axis=(1, 2)), model.embed(scan).slices, rtol=1e-4, atol=1e-6
    )
    assert "array" not in repr(model) and str(runs) not in repr(model)
    assert not np.allclose(
        ctssl_jax.load(runs / "rotation").embed(scan).slices, model.embed(scan).slices
    )
    with pytest.raises(InputError, match="of the task next_slice does not predict classes"):
        ctssl_jax.load(runs / "next_slice").probabilities(scan)
    with pytest.raises(InputError, match="of the task slice_label_se_resnext has no encoder"):
        ctssl_jax.load(runs / "pe_se_resnext").latents(scan)


def test_the_fingerprint_is_that_of_results(runs, folder, tmp_path):
    result = evaluate(runs / "rotation", None, "test", tmp_path / "r.json")
    assert ctssl_jax.load(runs / "rotation").fingerprint == result["model_fingerprint"]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_stopped_anywhere_the_result_is_the_same_to_the_byte(
    runs, archive, tmp_path, monkeypatch, ending
):
    at_once, stopped = tmp_path / "at_once" / f"z{ending}", tmp_path / "stopped" / f"z{ending}"
    key = tmp_path / "key"
    key.write_text("another key of 32 characters....")
    settings = {"pseudonym_key_file": key, "num_workers": 0}
    embed(runs / "rotation", archive, at_once, **settings)
    write_part, parts = embedding_files.write_part, []

    def write_and_stop(path, content):
        write_part(path, content)
        parts.append(path.name)
        if len(parts) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(embedding_files, "write_part", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        # leaves a part that does not fit
        embed(runs / "rotation", archive, stopped, checkpoint="2", **settings)
    with pytest.raises(KeyboardInterrupt):
        embed(runs / "rotation", archive, stopped, **settings)
    assert not stopped.exists() and len(list((stopped.parent / "z.parts").iterdir())) == 3
    real_write = embedding_files.write

    def write_and_die(*arguments):
        real_write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding_files, "write", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        embed(runs / "rotation", archive, stopped, **settings)
    assert len(parts) == len(set(parts)) == 5  # nothing was embedded twice
    monkeypatch.undo()
    assert embed(runs / "rotation", archive, stopped, **settings)["changed"] is False
    assert contents(stopped.parent) == contents(at_once.parent)
    assert {path.name for path in stopped.parent.iterdir() if path.is_dir()} == {"z-audit"}
    last = embed(runs / "rotation", archive, stopped, checkpoint="2", **settings)
    assert last["changed"] is True and contents(stopped.parent) != contents(at_once.parent)


def test_both_formats_hold_the_same(runs, folder, tmp_path):
    for ending in (".parquet", ".npz"):
        result = embed(runs / "next_slice", folder / "dataset", tmp_path / f"z{ending}")
    slices, volumes = rows_of(tmp_path / "z.parquet")
    with np.load(tmp_path / "z.npz") as arrays:
        arrays = dict(arrays)
    assert parquet.read_schema(tmp_path / "z.parquet").field("embedding").type.list_size == 4
    facts = json.loads(str(arrays["facts"]))
    for path in (tmp_path / "z.parquet", tmp_path / "z.volumes.parquet"):
        assert json.loads(parquet.read_schema(path).metadata[b"ctssl_jax"]) == facts
    assert facts.items() <= result.items()
    assert {
        "kind": "embeddings", "task": "next_slice", "checkpoint_step": 4,
        "windows": [[-600.0, 1500.0]], "image_size": 32, "normalize": "window",
        "embedding_dim": 4, "num_volumes": 4, "split": None,
        "dataset_fingerprint": Dataset.open(folder / "dataset").preparation["fingerprint"],
    }.items() <= facts.items()  # fmt: skip
    for name in ("volume_id", "patient_id", "split", "num_slices", "mean", "max"):
        np.testing.assert_array_equal(
            arrays[name], np.array([row[name] for row in volumes], arrays[name].dtype)
        )
    for name in ("slice_index", "position_mm", "embedding"):
        np.testing.assert_array_equal(
            arrays[name], np.array([row[name] for row in slices], arrays[name].dtype)
        )
    assert [volumes[index]["volume_id"] for index in arrays["slice_volume"]] == [
        row["volume_id"] for row in slices
    ]
    expected = Dataset.open(folder / "dataset").volumes()
    assert {row["volume_id"]: row["split"] for row in volumes} == {
        v["volume_id"]: v["split"] for v in expected
    }
    of_volume = {volume["volume_id"]: volume for volume in expected}
    for row in volumes:
        inside = [s["embedding"] for s in slices if s["volume_id"] == row["volume_id"]]
        assert len(inside) == row["num_slices"] == of_volume[row["volume_id"]]["num_slices"]
        np.testing.assert_allclose(row["mean"], np.mean(inside, axis=0), rtol=1e-5)
        np.testing.assert_allclose(row["max"], np.max(inside, axis=0))
    only = embed(runs / "next_slice", folder / "dataset", tmp_path / "test.npz", split="test")
    assert only["num_volumes"] == 1 and only["num_patients_seen_in_training"] == 0


def test_nothing_identifying_leaves(runs, archive, tmp_path, capfd):
    output = tmp_path / "z.parquet"
    result = embed(runs / "rotation", archive, output, num_workers=0)
    audit = tmp_path / "z-audit"
    assert audit.stat().st_mode & 0o777 == 0o700
    assert (audit / "pseudonym_key").stat().st_mode & 0o077 == 0
    text = json.dumps(result).encode() + b"".join(capfd.readouterr()[i].encode() for i in (0, 1))
    public = text + b"".join(contents(tmp_path).values())
    for private in (
        b"patient-",
        b"scan1",
        b"IM00",
        b"Doe",
        b"1.2.826",
        str(archive).encode(),
        str(runs).encode(),
    ):
        assert private not in public
    volumes = rows_of(output)[1]
    with open(audit / "sources.csv", newline="") as file:
        sources = list(csv.DictReader(file))
    found = {
        row["volume_id"]: row["path"].split("/")[0]
        for row in sources
        if not row["refused_by_headers"]
    }
    assert found.keys() == {row["volume_id"] for row in volumes} and len(set(found.values())) == 4
    assert len(sources) == 4 * NUM_SLICES + 10 - 1 + 5 + 1
    with open(tmp_path / "z.rejected.csv", newline="") as file:
        (rejected,) = csv.DictReader(file)
    assert rejected["reason"] == "too_few_slices" and rejected["detail"] == (
        "5 slices, at least 20 asked"
    )
    # same folder, same key
    again = embed(runs / "rotation", archive, tmp_path / "z.npz", num_workers=0)
    assert again["key_fingerprint"] == result["key_fingerprint"]


def test_what_fails_for_now_is_tried_again(runs, archive, tmp_path, monkeypatch):
    """And what pixels refuse is not; the result is that of a run without failures."""
    output, whole = tmp_path / "z.npz", tmp_path / "whole.npz"
    key = tmp_path / "key"
    key.write_text("another key of 32 characters....")
    settings = {"pseudonym_key_file": key, "num_workers": 0}
    read_scan, asked = embedding_inputs.read_volume, []

    def fails(*arguments):
        asked.append(arguments)
        reason = {1: "failed_for_now", 2: "implausible_hu"}.get(len(asked))
        return (
            scans.Refused(f"id{len(asked)}", reason, "detail") if reason else read_scan(*arguments)
        )

    monkeypatch.setattr(embedding_inputs, "read_volume", fails)
    first = embed(runs / "rotation", archive, output, **settings)
    assert (first["num_volumes"], first["complete"], len(asked)) == (2, False, 4)
    assert first["refused"] == {"failed_for_now": 1, "implausible_hu": 1, "too_few_slices": 1}
    assert "run again to retry" in summary(first)
    second = embed(runs / "rotation", archive, output, **settings)
    assert (second["num_volumes"], second["complete"], len(asked)) == (3, True, 5)
    assert second["refused"] == {"implausible_hu": 1, "too_few_slices": 1}
    assert not (tmp_path / "z.parts").exists()
    asked[:] = [None, None]
    embed(runs / "rotation", archive, whole, **settings)
    with np.load(output) as one, np.load(whole) as all_of_them:
        assert (
            set(one["volume_id"]) < set(all_of_them["volume_id"])
            and len(all_of_them["volume_id"]) == 4
        )


def test_workers_change_nothing(runs, archive, folder, tmp_path):
    for number in (0, 2):
        output = tmp_path / str(number) / "z.npz"
        embed(
            runs / "rotation",
            archive,
            output,
            pseudonym_key_file=folder / "key",
            num_workers=number,
        )
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


# ---- a folder that grows -------------------------------------------------------------------------


def test_a_watched_folder_gives_the_embeddings_of_its_scans(runs, archive, tmp_path, monkeypatch):
    """Ended twice, each scan is embedded once, and FILE holds what it holds without --watch."""
    plain, watched, growing = tmp_path / "plain.npz", tmp_path / "w" / "z.npz", tmp_path / "in"
    key = tmp_path / "key"
    key.write_text("another key of 32 characters....")
    settings = {"pseudonym_key_file": key, "num_workers": 0}
    embed(runs / "rotation", archive, plain, **settings)
    shutil.copytree(archive / "scan1", growing / "scan1")
    write_part, parts = embedding_files.write_part, []

    def write_and_stop(path, content):
        write_part(path, content)
        parts.append(path.stem)
        if len(parts) in (1, 3):
            raise KeyboardInterrupt  # before the ledger has it

    monkeypatch.setattr(embedding_files, "write_part", write_and_stop)
    watch = Watch(settle_s=0, idle_exit_s=0.01)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            watch_embeddings(runs / "rotation", growing, watched, watch, **settings)
        shutil.copytree(archive, growing, dirs_exist_ok=True)
    result = watch_embeddings(runs / "rotation", growing, watched, watch, **settings)
    assert len(parts) == 6 and len(set(parts)) == 4 and result["num_volumes"] == 4
    assert result["refused"] == {"too_few_slices": 1} and "1 series refused" in summary(result)
    with np.load(plain) as one, np.load(watched) as other:
        for name in one.files:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6)
            elif name != "facts":
                np.testing.assert_array_equal(other[name], one[name])
    rejected = watched.with_suffix(".rejected.csv")
    assert rejected.read_bytes() == plain.with_suffix(".rejected.csv").read_bytes()
    watch_embeddings(runs / "rotation", growing, watched, watch, **settings)
    assert len(parts) == 6
    with pytest.raises(
        InputError, match=r"z\.scans has results of another checkpoint_step \(4, now"
    ):
        watch_embeddings(runs / "rotation", growing, watched, watch, checkpoint="2", **settings)
    with pytest.raises(InputError, match="lies in --input, whose files are taken for scans"):
        watch_embeddings(runs / "rotation", growing, growing / "z.npz", watch, **settings)
    with pytest.raises(InputError, match="--settle_s=-1: give 0 or more seconds"):
        Watch(settle_s=-1)


def test_batches_are_filled_across_volumes(runs):
    """By neighbours of their own volume alone, also across a gap."""
    model = ctssl_jax.load(runs / "pe_se_resnext", batch_size=8)
    rng = np.random.default_rng(0)
    volumes = [
        scans.PreparedVolume(rng.integers(0, 256, (number, 32, 32, 1), np.uint8), gaps)
        for number, gaps in ((3, ()), (21, (4,)), (1, ()), (8, ()))
    ]
    shared = list(model.in_shared_batches(map(model.rows, volumes)))
    for volume, outputs in zip(volumes, shared, strict=True):
        for name, values in model.outputs(volume).items():
            np.testing.assert_allclose(outputs[name], values, rtol=1e-5, atol=1e-6)
    assert list(model.in_shared_batches([])) == []


# ---- refusals ------------------------------------------------------------------------------------


def test_wrong_requests(runs, folder, archive, tmp_path):
    run, output = runs / "rotation", tmp_path / "z.npz"
    (tmp_path / "file").write_text("")
    (tmp_path / "short_key").write_text("abc")
    shutil.copytree(runs / "rotation", tmp_path / "other_window")
    content = json.loads((run / "preparation.json").read_text())
    content["windows"][1]["width"] = 1400.0
    (tmp_path / "other_window" / "preparation.json").write_text(json.dumps(content))
    config = json.loads((run / "config.json").read_text()) | {"windows": [[-600.0, 1400.0]]}
    (tmp_path / "other_window" / "config.json").write_text(json.dumps(config))
    ready = folder / "dataset"
    for arguments, settings, message in (
        ((tmp_path, archive, output), {}, "is not a run directory; give the --workdir"),
        ((run, archive, output), {"checkpoint": "9"}, "has no checkpoint '9'"),
        ((run, archive, tmp_path / "z.csv"), {}, "must end in .parquet or .npz"),
        ((run, archive, tmp_path / "file" / "z.npz"), {}, "cannot make .*file .*choose another "
                                                          "folder"),
        ((run, tmp_path / "none", output), {}, "--input=.*none: no such file or directory"),
        ((run, archive / "short", output), {},
         "has too few slices .*; give a smaller --min_slices"),
        ((run, archive / "notes.txt", output), {}, "not a DICOM file; give DICOM, or "
                                                   "--archive=nifti"),
        ((run, archive, output), {"split": "test"}, "--split=test is for prepared datasets, and "
                                                    "--input="),
        ((run, ready, output), {"split": "none"}, "--split=none: choose one of train, validation, "
                                                  "test"),
        ((run, archive, output), {"batch_size": -1}, "--batch_size=-1: must be 0 or more"),
        ((run, archive, output), {"pseudonym_key_file": tmp_path / "x"},
         "--pseudonym_key_file=.*no such key file"),
        ((run, archive, output), {"pseudonym_key_file": tmp_path / "short_key"},
         "at least 16 bytes, this one 3"),
        ((tmp_path / "other_window", ready, output), {},
         "--input=.* was prepared otherwise than the run's data: .*asks for level/width -600/1400"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as raised:
            embed(*arguments, **settings)
        assert "\n" not in str(raised.value) and "--dataset" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "short_key", "other_window"}


def test_wrong_volumes(runs, archive):
    model = ctssl_jax.load(runs / "next_slice")
    hu = dicom_files.thorax(NUM_SLICES, seed=1)
    for volume, affine, message in (
        (
            hu,
            None,
            r"an array of int16 \[21, 64, 64\] without an affine; give HU with the affine of "
            r"nibabel",
        ),
        (np.zeros((4, 16, 16, 1), np.uint8), None, r"but the run takes uint8 \[S, 32, 32, 1\]"),
        (np.zeros((4, 32, 32, 2), np.uint8), None, r"but the run takes uint8 \[S, 32, 32, 1\]"),
        (np.zeros((0, 32, 32, 1), np.uint8), None, r"slices of uint8 \[0, 32, 32, 1\]"),
        (np.clip(hu, 0, 255).astype(np.uint8), AFFINE, "values from 0 to 255 are not HU"),
        (archive, None, "holds 4 scans; give one, or all to ctssl embed"),
        (archive / "scan1", AFFINE, "a scan on disk has its own; leave it out"),
        (archive / "short", None, "give a smaller --min_slices"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            model.embed(volume, affine)
        assert "\n" not in str(raised.value)
    assert len(model.embed(archive / "short", rules=Rules(min_slices=5)).slices) == 5


def test_command_line(runs, folder, archive, tmp_path):
    run = runs / "rotation"
    given = [f"--input={archive / 'short'}", f"--output={tmp_path / 'z.parquet'}", "--min_slices=5"]
    named = [*listing("config.json", "preparation.json"), "ctssl_jax.embed"]
    process = start([*named, f"--workdir={run}", *given])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "5 slices of 1 volume of 1 patient, 4 numbers" in output and "written: " in output
    assert listed(errors) == [str(run / "config.json"), str(run / "preparation.json")]
    (on_one_device,) = slices_of(tmp_path / "z.parquet").values()
    # on eight
    here = ctssl_jax.load(runs / "rotation").embed(archive / "short", rules=Rules(min_slices=5))
    np.testing.assert_allclose(on_one_device, here.slices, rtol=1e-5, atol=1e-7)


def test_flags_that_contradict_the_input_are_refused(runs, folder):
    given = (f"--workdir={runs / 'rotation'}", "--output=z.npz")
    dataset = folder / "dataset"
    with pytest.raises(InputError) as refused:
        main_of(door, *given, f"--input={dataset}", "--min_slices=5")
    assert str(refused.value) == (
        f"--min_slices is for raw scans, and --input={dataset} is a dataset; leave it out"
    )
    with pytest.raises(InputError, match=r"^give --input$"):
        main_of(door, *given)


@pytest.mark.parametrize("name", ["lidc_0003.zip", "lidc_0001"])
def test_real_scans(runs, folder, real_data, tmp_path, name):
    output = tmp_path / "z.parquet"
    result = embed(runs / "next_slice", real_data / name, output)
    assert result["num_volumes"] == 1 and result["refused"] == {} and not result["synthetic"]
    assert result["num_patients_seen_in_training"] is None  # another key
    z = ctssl_jax.load(runs / "next_slice").embed(real_data / name)
    (values,) = slices_of(output).values()
    np.testing.assert_array_equal(values, z.slices)
    assert len(values) == {"lidc_0003.zip": 140, "lidc_0001": 133}[name]
    assert np.isfinite(values).all() and len(np.unique(values, axis=0)) > 100
