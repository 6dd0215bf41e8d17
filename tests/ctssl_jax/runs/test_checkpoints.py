"""Checkpoints: exact, asynchronous in spite of donated buffers, the right ones kept, damage and
full disks named."""

import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.parallel.mesh import make_mesh, replicated
from ctssl_jax.runs.checkpoints import Checkpoints, choose, choose_step, read_metadata, restore
from ctssl_jax.runs.damage import LAST_GOOD, check_all_undamaged, damaged_steps, set_aside
from ctssl_jax.runs.scores import best_step, make_score
from data_prep.system.errors import InputError, RunFailed


def state(seed: int) -> dict:
    random = np.random.default_rng(seed)
    return {
        "params": {"layers": [jnp.asarray(random.random((300, 200), np.float32)), jnp.arange(8.0)]},
        "step": jnp.asarray(seed, jnp.int32),
    }


def shapes(tree: dict, sharding=None) -> dict:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("checkpoints") / "run"
    checkpoints = Checkpoints(workdir)
    for step, error in ((0, 0.1), (1, 2.0), (2, 1.0), (3, 3.0), (4, None), (5, 1.5)):
        checkpoints.save(step, state(step), {"config": {"step": step}})
        if error is not None:
            checkpoints.score(make_score("mse", False, {"mse": error}))
    checkpoints.close()
    return workdir


@pytest.fixture
def run(three_checkpoints, tmp_path):
    return shutil.copytree(three_checkpoints, tmp_path / "run")


def test_flat_names_are_readable_and_reversible():
    tree = state(1)
    flat = flatten(tree)
    assert list(flat) == ["params/layers/0", "params/layers/1", "step"]
    assert jax.tree.structure(unflatten(tree, flat)) == jax.tree.structure(tree)


def test_best_and_last_two_are_kept_and_restored_exactly(three_checkpoints):
    assert sorted(path.name for path in (three_checkpoints / "checkpoints").iterdir()) == [
        "2",
        "4",
        "5",
    ]
    assert Checkpoints(three_checkpoints).last_step == 5
    for which, step in (("best", 2), ("last", 5), ("4", 4)):
        assert choose_step(three_checkpoints, which) == step
        restored = restore(three_checkpoints, step, shapes(state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, state(step))
        assert read_metadata(three_checkpoints, step) == {"config": {"step": step}}


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_restores_onto_any_number_of_devices_and_in_parts(three_checkpoints, num_devices):
    mesh = make_mesh(jax.devices()[:num_devices])
    like = shapes({"params": state(0)["params"]}, replicated(mesh))
    restored = restore(three_checkpoints, 5, like)
    jax.tree.map(np.testing.assert_array_equal, restored["params"], state(5)["params"])
    assert restored["params"]["layers"][1].sharding.device_set == set(mesh.devices.flat)


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path):
    """The training step gives its buffers away while a checkpoint is still being written."""
    sharding = replicated(make_mesh())
    values = jax.device_put(jnp.zeros((1000, 1000)), sharding)
    step = jax.jit(lambda values: values + 1, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    for number in range(20):
        if number % 5 == 0:
            checkpoints.save(number, {"values": values}, {})
        values = step(values)
    checkpoints.close()
    for number in (10, 15):
        restored = restore(tmp_path, number, shapes({"values": values}, sharding))["values"]
        np.testing.assert_array_equal(restored, np.full((1000, 1000), number, np.float32))


def test_tensors_that_do_not_fit_are_named(three_checkpoints):
    like = shapes({"params": {"layers": [jnp.zeros((3, 2))]}, "more": jnp.zeros(3)})
    with pytest.raises(
        InputError,
        match=r"missing: more; of another shape: params/layers/0 \(300, 200\) instead of",
    ):
        restore(three_checkpoints, 5, like)


def test_choosing_a_checkpoint_that_is_not_there(three_checkpoints, tmp_path):
    with pytest.raises(
        InputError, match="has no checkpoint '3'; there are steps 2, 4, 5, and the names best, last"
    ):
        choose_step(three_checkpoints, "3")
    with pytest.raises(InputError, match="has no checkpoint; give the --workdir of a run"):
        choose_step(tmp_path, "last")


@pytest.mark.parametrize("damage", ["remove", "truncate"])
@pytest.mark.parametrize(
    "pattern", ["state/d/*", "state/ocdbt.process_0/d/*", "state/manifest.ocdbt", "state/_METADATA"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_left(run, pattern, damage):
    for path in (run / "checkpoints" / "5").glob(pattern):
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for with_sums in (True, False):  # a checkpoint of a killed process has none
        with pytest.raises(
            InputError,
            match=r"checkpoint 5 of .* is damaged .*; good ones are: 2, 4; .*last_good",
        ):
            restore(run, 5, shapes(state(0)))
        assert choose_step(run, LAST_GOOD) == 4
        if with_sums:
            (run / "checkpoints" / "5" / "SHA256SUMS").unlink()
    set_aside(run, damaged_steps(run))
    assert choose_step(run, "last") == 4 and (run / "damaged_checkpoints" / "5").is_dir()
    restore(run, 4, shapes(state(0)))


def test_a_changed_bit_of_a_tensor_is_found(run):
    """Orbax restores it without a word: the numbers are wrong, and nothing but the checksums
    tells."""
    data = max((run / "checkpoints" / "5").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(
        InputError,
        match=rf"checkpoint 5 of .* is damaged \({data.name} has another checksum\)",
    ):
        restore(run, 5, shapes(state(0)))
    (run / "checkpoints" / "5" / "SHA256SUMS").unlink()
    restored = restore(run, 5, shapes(state(0)))
    assert not np.array_equal(restored["params"]["layers"][0], state(5)["params"]["layers"][0])


def test_a_damaged_score_is_said_and_does_not_make_another_checkpoint_the_best(run):
    """Changed, cut, of another step, no JSON: the checkpoint itself is not damaged."""
    path = run / "checkpoints" / "5" / "score.json"
    text = path.read_text()
    other = (run / "checkpoints" / "2" / "score.json").read_text()
    for content in (text.replace("1.5", "0.5"), text[: len(text) // 2], "", "[]", other, "\udcff"):
        path.write_text(content, errors="surrogateescape")
        chosen = choose(run, "best")
        assert chosen.step == 2 and chosen.why == "best mse 1"
        (warning,) = chosen.warnings
        assert str(path) in warning and "counts as unscored" in warning
        assert not Checkpoints(run).last_is_scored
    check_all_undamaged(run)


def test_a_checkpoint_in_the_place_of_another_is_found(run):
    folder = run / "checkpoints"
    (folder / "5").rename(folder / "6")
    with pytest.raises(
        InputError, match=r"checkpoint 6 of .* is damaged \(it is the checkpoint of step 5\)"
    ):
        check_all_undamaged(run)


def test_a_damaged_file_of_the_run_is_named(three_checkpoints, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "patients.json").write_text('{"train": ["a"]}')
    checkpoints = Checkpoints(run)
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    check_all_undamaged(run)
    sums = run / "checkpoints" / "1" / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    assert lines[0].endswith("  ../patients.json\n")
    for kept in range(len(lines)):
        sums.write_text("".join(lines[:kept]))
        with pytest.raises(
            InputError,
            match=r"checkpoint 1 of .* is damaged \(SHA256SUMS (lacks 1/|is cut)",
        ):
            check_all_undamaged(run)
    sums.write_text("".join(lines))
    (run / "patients.json").write_text('{"train": ["b"]}')
    for attempt in (lambda: check_all_undamaged(run), lambda: restore(run, 1, shapes(state(0)))):
        with pytest.raises(
            InputError,
            match=r"run is damaged \(patients.json has another checksum; it was not",
        ):
            attempt()
    assert damaged_steps(run) == []


def test_sums_are_those_of_sha256sum(three_checkpoints):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    subprocess.run(
        ["sha256sum", "-c", "--quiet", "5/SHA256SUMS"],
        cwd=three_checkpoints / "checkpoints",
        check=True,
    )


def test_a_cut_list_of_checksums_is_found(run):
    sums = run / "checkpoints" / "5" / "SHA256SUMS"
    text = sums.read_text()
    for cut, message in (
        (text[:-30], "SHA256SUMS is cut"),
        (text[:-1], "SHA256SUMS is cut"),
        (text[: text.rindex("\n", 0, -1) + 1], "SHA256SUMS lacks 5/"),  # between two lines
        (text + "x", "SHA256SUMS is cut"),
    ):
        sums.write_text(cut)
        with pytest.raises(InputError, match=rf"checkpoint 5 of .* is damaged \({message}"):
            check_all_undamaged(run)
        assert choose_step(run, LAST_GOOD) == 4


def test_all_damaged_is_said_and_nothing_is_moved(run):
    for step in (2, 4, 5):
        (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").unlink()
    for attempt in (lambda: damaged_steps(run), lambda: choose_step(run, LAST_GOOD)):
        with pytest.raises(InputError, match=r"all checkpoints of .* are damaged"):
            attempt()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "5"]


def test_a_damaged_list_of_checkpoints_is_named(run):
    (run / "checkpoints" / "5" / "SHA256SUMS").unlink()
    (run / "checkpoints" / "5" / "metrics").mkdir()
    (run / "checkpoints" / "5" / "metrics" / "metrics").write_text('{"loss')
    with pytest.raises(
        InputError,
        match=r"a checkpoint in .*checkpoints is damaged .*; remove the newest one",
    ):
        Checkpoints(run)


def test_a_full_disk_stops_the_run_and_keeps_what_is_saved(run):
    """A limit on file sizes stands for the full disk."""
    checkpoints = Checkpoints(run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            RunFailed,
            match=r"not be saved in \S*run \(File too large\); make room .*again: it resumes",
        ):
            checkpoints.save(6, state(6), {})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints = Checkpoints(run)
    assert checkpoints.last_step == 5
    checkpoints.save(6, state(6), {})
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restore(run, 6, shapes(state(0))), state(6))


def scores_of(**values):
    """Scores by step: `_3=0.5` is step 3."""
    return {int(step[1:]): make_score("mse", False, {"mse": v}) for step, v in values.items()}


def test_what_is_the_best():
    assert best_step(scores_of(_0=0.1, _2=0.4, _4=0.3, _6=0.5)) == 4  # never step 0
    assert best_step(scores_of(_2=0.3, _4=0.3, _6=0.5)) == 4  # of equal ones the later
    assert best_step(scores_of(_2=0.3, _4=float("nan"))) == 2
    assert best_step(scores_of(_0=0.3)) is best_step(scores_of(_2=float("inf"))) is None
    rising = {step: make_score("auroc", True, {"auroc": step / 10}) for step in (1, 2)}
    assert best_step(rising) == 2
    # The newest says by what: a run may go on with another config.best_by.
    both = {2: make_score("mse", False, {"mse": 0.1, "ssim": 0.2})}
    both[4] = make_score("ssim", True, {"mse": 0.3, "ssim": 0.1})
    assert best_step(both) == 2 and best_step(both | {6: rising[1]}) == 6


def test_a_score_that_is_undefined_is_no_reason_to_validate_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(3), {})
    checkpoints.score(make_score("auroc", True, {"loss": 0.5}))
    checkpoints.close()
    assert Checkpoints(tmp_path).last_is_scored
    chosen = choose(tmp_path)
    assert chosen.step == 3 and chosen.why == (
        "the last one, since auroc was undefined in each validation"
    )
    assert chosen.facts == {
        "checkpoint_step": 3,
        "checkpoint_score": {"name": "auroc", "value": None},
    }


def test_a_run_of_an_older_version_is_taken_at_its_last_step(tmp_path):
    """It stored the loss alone, which is lowest before the training."""
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as older:
        for step, loss in ((0, 0.1), (3, 0.9)):
            tensors = {"state": flatten(state(step))}
            older.save_checkpointables(step, tensors, metrics={"loss": loss})
    chosen = choose(tmp_path)
    assert chosen.step == 3 and chosen.score is None and "an older version" in chosen.why
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_step == 3 and not checkpoints.last_is_scored  # scored when it goes on
    checkpoints.score(make_score("mse", False, {"mse": 0.25}))
    checkpoints.close()
    assert choose(tmp_path).why == "best mse 0.25"


def test_what_a_kill_leaves_is_tidied_up(run):
    """Within a removal, and within the writing of a score."""
    folder = run / "checkpoints"
    shutil.copytree(folder / "2", folder / "1.removed")
    (folder / "5" / "score.json").rename(folder / "5" / "score.json.tmp")
    check_all_undamaged(run)
    checkpoints = Checkpoints(run)
    assert not checkpoints.last_is_scored
    checkpoints.score(make_score("mse", False, {"mse": 1.5}))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5"]
    assert not (folder / "5" / "score.json.tmp").exists()
