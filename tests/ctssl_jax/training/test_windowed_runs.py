"""Runs with a windowed order: exact resume, the recorded number of streams, and what is refused."""

import shutil

import pytest

from ctssl_jax.runs.checkpoints import choose_step
from ctssl_jax.runs.run import Run
from ctssl_jax.training import recipe
from ctssl_jax.training.setup import check
from data_prep.dataset import cache
from data_prep.system.errors import InputError
from tests.helpers.training_runs import ask_to_stop_at, assert_same_state, tiny_config, train_on

WINDOWED = {"shuffle": "windowed", "shuffle_window": 20, "shuffle_streams": 4}


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """Twelve steps without a stop."""
    workdir = tmp_path_factory.mktemp("windowed") / "run"
    assert train_on(tiny_config(tiny_dataset, **WINDOWED), workdir)
    return workdir


def test_goes_on_bit_for_bit(straight, tiny_dataset, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny_dataset, **WINDOWED)
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 5)
        assert not train_on(config, tmp_path / "run")
    assert choose_step(tmp_path / "run", "last") >= 5
    assert train_on(
        tiny_config(tiny_dataset, **WINDOWED | {"shuffle_streams": 0}), tmp_path / "run"
    )
    assert_same_state(tmp_path / "run", straight)
    assert "windowed: 4 stream(s) of 3 shards, windows of 20 slices" in capsys.readouterr().out


def test_the_number_of_streams_is_recorded_and_decides_which_processes_may_go_on(
    straight, tiny_dataset
):
    assert Run.open(straight).config.shuffle_streams == 4
    config = tiny_config(tiny_dataset, shuffle="windowed", shuffle_window=20)
    for processes in (1, 2, 4):
        assert recipe.with_streams(config, straight, processes).shuffle_streams == 4
    with pytest.raises(
        InputError,
        match=r"holds a run whose order is of 4 streams .*, which 3 processes cannot share "
        r"equally; start 4, 2, 1 of them, or a new --workdir$",
    ):
        recipe.with_streams(config, straight, 3)
    # a new run takes one stream a process
    assert recipe.with_streams(config, None, 3).shuffle_streams == 3
    assert recipe.with_streams(tiny_config(tiny_dataset), straight, 3).shuffle_streams == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shuffle": "global"}, r"a run with config.shuffle=windowed, not global"),
        ({"shuffle_window": 10}, r"a run with config.shuffle_window=20, not 10"),
        ({"shuffle_streams": 2}, r"a run with config.shuffle_streams=4, not 2"),
    ],
)
def test_another_order_is_refused(changed, message, straight, tiny_dataset):
    with pytest.raises(InputError, match=message):
        check(tiny_config(tiny_dataset, **WINDOWED | changed), straight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shuffle": "local"}, r"^config.shuffle='local': choose one of global, windowed$"),
        ({"shuffle_window": 0}, r"^config.shuffle_window=0: must be 1 or more$"),
        ({"shuffle_streams": -1}, r"^config.shuffle_streams=-1: must be 0 or more$"),
        ({"shards_gb": 0.0}, r"^config.shards_gb=0.0: must be above 0$"),
        ({"shuffle_streams": 3}, r"^config.batch_size=8 is not divisible by 1 .* x 3 streams of "),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changed, message, tiny_dataset, tmp_path):
    with pytest.raises(InputError, match=message):
        check(tiny_config(tiny_dataset, **WINDOWED | changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bound_that_is_too_small_is_refused_with_the_one_that_is_not(
    store, tiny_dataset, tmp_path, monkeypatch
):
    shutil.copytree(tiny_dataset, store.objects / "data" / "tiny")
    monkeypatch.setenv("CTSSL_CACHE_DIR", str(tmp_path / "copies"))
    cache._open.cache_clear()
    settings = WINDOWED | {"shuffle_streams": 0}
    config = tiny_config("example://data/tiny", **settings, shards_gb=1e-5)
    with pytest.raises(
        InputError, match=r"^config.shards_gb=1e-05: the shards of three windows of 20 slices take "
    ) as refused:
        check(config, tmp_path / "run")
    config.shards_gb = float(str(refused.value).split("--config.shards_gb=")[1].split()[0])
    assert check(config, tmp_path / "run").train_source is not None
    cache._open.cache_clear()
