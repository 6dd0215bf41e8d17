"""Impossible recipes are refused before any file is written, in one line with the remedy."""

import importlib
import json
import resource
import shutil
import subprocess
import sys

import pytest

from ctssl_jax.runs.run import (
    ADDED_SINCE,
    MAY_CHANGE,
    Run,
    check_resumable,
    flat,
    from_json,
    open_workdir,
    to_json,
)
from ctssl_jax.training.fields import FIELDS
from ctssl_jax.training.recipe import check_config, check_dataset, with_pooling
from ctssl_jax.training.recipe_files import load_recipe
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import write_json
from tests.helpers.example_dataset import change_preparation, write_example_dataset
from tests.helpers.forked_commands import ended
from tests.helpers.training_runs import PROJECT, command, tiny_config, train_on

# Every recipe as `config.json` of a run held it before the fields of `ADDED_SINCE` existed.
OLDER_RUNS = json.loads((PROJECT / "tests/ctssl_jax/runs/recipes_of_older_runs.json").read_text())
WRONG_FIELDS = {
    "dataset": ("", "config.dataset is empty; give --config.dataset=DIR"),
    "task": ("jigsaw", "config.task='jigsaw': choose one of masked_region"),
    "optimizer": ("sgd", "config.optimizer='sgd': choose one of radam, adamw"),
    "schedule": ("stepwise", "config.schedule='stepwise': choose one of constant, cosine, linear"),
    "normalize": ("none", "config.normalize='none': choose one of window, slice_minmax"),
    "dtype": ("float16", "config.dtype='float16': choose one of float32, bfloat16"),
    "batch_size": (0, "config.batch_size=0: must be 1 or more"),
    "microbatches": (
        3,
        "config.batch_size=8 is not divisible by 1 devices x 3 microbatches; choose a multiple of "
        "3",
    ),
    "num_steps": (-1, "config.num_steps=-1: must be 1 or more"),
    "learning_rate": (float("nan"), "config.learning_rate=nan: must be a finite number"),
    "image_size": (
        18,
        "config.image_size=18 is not divisible by the encoder's stride 4; prepare with",
    ),
    "model.depth": (-1, "config.model.depth=-1: must be 0 or more"),
    "model.vq_init": (
        "data",
        'config.model: vq_init="data" and vq_revive_every need vq_update="ema"',
    ),
    "model.in_channels": (0, "config.model.in_channels=0: must be 1 or more"),
    "mask.fraction": (1.5, "config.mask.fraction=1.5: must be above 0 and below 1"),
    "mask.unit": ("volume", "config.mask.unit='volume': choose one of area, side"),
    "mask.margin": (
        100,
        "config.mask: a mask of 7 pixels with margin 100 does not fit into 16 pixels; lower",
    ),
    "mask.fill": (float("inf"), "config.mask.fill=inf: must be a finite number"),
    "loss.mse": (float("nan"), "config.loss.mse=nan: must be a finite number"),
    "init_scope": ("decoder", "config.init_scope='decoder': choose one of model, encoder"),
    "init_from": (
        "nowhere",
        "config.init_from=nowhere is not a run directory; give the --workdir of a finished run",
    ),
    "batch_norm_group": (
        3,
        "config.batch_norm_group=3 does not divide the 1 devices; choose a divisor, or 0 for all",
    ),
    "fsdp_devices": (3, "config.fsdp_devices=3 does not divide the 1 devices; choose a divisor"),
    "seed": (-1, "config.seed=-1: must be 0 or more and below 4294967296"),
    "windows": (
        ((100, 700),),
        "level/width 100/700, but the dataset holds 50/350; prepare it again with --window=",
    ),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_wrong_field_is_named_with_the_remedy(field, tiny_dataset, tmp_path):
    value, message = WRONG_FIELDS[field]
    with pytest.raises(InputError) as raised:
        train_on(tiny_config(tiny_dataset, **{field: value}), tmp_path / "run")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "field", "value", "message"),
    [
        ("lejepa", "views.local_area", ("a", 0.07), "each of its items must be a number"),
        ("lejepa", "views.local_area", (0.05, True), "each of its items must be a number"),
        ("lejepa", "views.local_area", (0.05, float("nan")), "must be a finite number"),
        ("lejepa", "views.local_area", 0.07, "must be a tuple, e.g. '(1, 2)'"),
        ("dino", "teacher.temperature", (None, 0.07), "each of its items must be a number"),
        ("lejepa", "model.projector", (64.5, 8), "each of its items must be a whole number"),
        ("rotation", "windows", ((50, 350), ("a", 350)), "must hold (level, width) pairs"),
        ("lejepa", "model.projector", (1j, 8), "each of its items must be a whole number"),
        ("rotation", "windows", ((True, 350),), "must hold (level, width) pairs"),
        ("rotation", "windows", ((50, float("inf")),), "must be a finite number"),
        ("rotation", "prolonged", ((True, 3),), "must hold (step, number of steps) pairs"),
        ("rotation", "batch_size", 8.5, "must be a whole number"),
        ("rotation", "seed", None, "must be a whole number"),
        ("rotation", "init_from", None, "must be a text"),
        ("mixed", "objectives", ((["flip"], 1.0),), "['flip'] is not known; choose from"),
        ("mixed", "objectives", (("simmim", 1.0),), "SimMIM is masked_region with"),
    ],
)
def test_values_of_another_type_are_one_line(recipe, field, value, message):
    config = load_recipe(recipe, "small")
    *parts, last = field.split(".")
    with config.unlocked():
        config.dataset, node = "somewhere", config
        for part in parts:
            node = node[part]
        with node.ignore_type():
            node[last] = value
    with pytest.raises(InputError) as raised:
        check_config(config, 1)
    assert str(raised.value).startswith(f"config.{field}") and message in str(raised.value)


def test_fields_of_no_view_are_not_checked():
    config = load_recipe("lejepa", "small")
    config.dataset = "somewhere"
    config.views.local_size = 1_000
    with pytest.raises(InputError, match=r"config\.views\.local_size=1000: must be a"):
        check_config(config, 1)
    config.views.num_local = 0
    check_config(config, 1)


def test_batch_must_be_divisible_by_devices_and_processes(tiny_dataset, tmp_path):
    with pytest.raises(
        InputError,
        match="batch_size=12 is not divisible by 8 devices x 1 microbatches; choose a mult",
    ):
        train_on(tiny_config(tiny_dataset, batch_size=12), tmp_path / "run", num_devices=8)
    check_config(tiny_config(tiny_dataset), num_devices=8)


def test_images_too_small_for_ssim_are_refused(tmp_path):
    folder = write_example_dataset(tmp_path / "data", image_size=8, slices_per_volume=8)
    with pytest.raises(InputError, match=r"config.image_size=8: SSIM needs at least 11 pixels"):
        train_on(tiny_config(folder, image_size=8), tmp_path / "run")


def test_datasets_that_do_not_fit(tiny_dataset, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(
        InputError,
        match=r"images of 16 pixels, config.image_size is 32; set --config.image_size=16",
    ):
        train_on(tiny_config(tiny_dataset, image_size=32), workdir)
    with pytest.raises(
        DatasetError,
        match=r"no such directory; make one with ctssl prepare",
    ):
        train_on(tiny_config(tmp_path / "nowhere"), workdir)
    partial = shutil.copytree(tiny_dataset, tmp_path / "partial")
    (partial / "preparation.json").unlink()
    with pytest.raises(DatasetError, match="not a complete dataset"):
        train_on(tiny_config(partial), workdir)
    no_validation = write_example_dataset(
        tmp_path / "small", image_size=16, volumes_per_split={"train": 2}
    )
    with pytest.raises(
        InputError, match="has no validation slices; prepare it again with --splits"
    ):
        train_on(tiny_config(no_validation), workdir)
    three_windows = write_example_dataset(tmp_path / "three", image_size=16, channels=3)
    with pytest.raises(
        InputError,
        match=r"3 windows are selected, but config.model.in_channels is 2; set it to 3",
    ):
        train_on(tiny_config(three_windows, model__in_channels=2, windows=()), workdir)
    lung = shutil.copytree(tiny_dataset, tmp_path / "lung")
    change_preparation(lung, windows=[{"level": -600.0, "width": 1500.0}])
    with pytest.raises(
        InputError,
        match=r"asks for level/width 50/350, but the dataset holds -600/1500; prepare it",
    ):
        train_on(tiny_config(lung), workdir)
    assert not workdir.exists()


def test_folders_that_cannot_be_run_directories(tiny_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"cannot be written \(.*\); choose another folder"):
            train_on(tiny_config(tiny_dataset), workdir)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds files but no run; give a new or empty folder"):
        train_on(tiny_config(tiny_dataset), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "other", "thesis.tex"]


def test_a_run_that_ended_at_its_very_start_starts_again(tiny_dataset, tmp_path):
    config, preparation = tiny_config(tiny_dataset), Dataset.open(tiny_dataset).preparation
    for name in ("preparation.json", "patients.json.tmp"):
        (tmp_path / name).write_text("{")
    check_resumable(tmp_path, config, preparation)
    open_workdir(tmp_path, config, preparation, {"train": [], "validation": []})
    assert json.loads((tmp_path / "preparation.json").read_text()) == preparation
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\)"):
            open_workdir(tmp_path / "full", config, preparation, {"train": [], "validation": []})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any((tmp_path / "full").iterdir())


def test_tracebacks_that_libraries_log_are_shown_on_request_only():
    program = """
import asyncio
from absl import logging
from data_prep.system import command_line
from data_prep.system.errors import RunFailed
class Late:  # as TensorStore's threads after a save that failed
    def __del__(self):
        loop = asyncio.new_event_loop()
        loop.close()
        loop.call_soon_threadsafe(print)
def main(argv):
    Late()
    try:
        raise OSError("disk")
    except OSError:
        logging.exception("a thread failed")
    raise RunFailed("could not be saved")
command_line.run(main)
"""
    for arguments, shown in (([], False), (["--verbosity=0"], True)):
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        assert ended.returncode == 1 and ended.stderr.endswith("error: could not be saved\n")
        assert ("Traceback" in ended.stderr) == shown


def make_workdir(path, config):
    """A run directory with the name of a checkpoint."""
    dataset = Dataset.open(config.dataset)
    check_dataset(config, dataset, ("train",))
    open_workdir(path, config, dataset.preparation, {"train": ["a"], "validation": ["b"]})
    (path / "checkpoints" / "6").mkdir(parents=True)
    return dataset.preparation


@pytest.fixture
def workdir(tiny_dataset, tmp_path):
    make_workdir(tmp_path / "run", tiny_config(tiny_dataset))
    return tmp_path / "run"


def test_before_the_first_checkpoint_a_corrected_configuration_takes_the_place(
    workdir, tiny_dataset
):
    preparation = json.loads((workdir / "preparation.json").read_text())
    (workdir / "checkpoints" / "6").rmdir()
    check_resumable(
        workdir, tiny_config(tiny_dataset, microbatches=2, learning_rate=0.5), preparation
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_with_a_falling_rate_may_grow_but_not_shrink(schedule, tiny_dataset, tmp_path):
    """Steps that were taken keep the number of steps which their rate was of."""
    workdir = tmp_path / "run"

    def config(num_steps, **fields):
        return tiny_config(tiny_dataset, schedule=schedule, num_steps=num_steps, **fields)

    preparation = make_workdir(workdir, config(12))  # a checkpoint of step 6
    assert check_resumable(workdir, config(12), preparation) == []
    assert check_resumable(workdir, config(24), preparation) == [[6, 12]]
    with pytest.raises(InputError, match=r"num_steps=12, not 9: under config.schedule=.* may grow"):
        check_resumable(workdir, config(9), preparation)
    grown = config(24, prolonged=((6, 12),))
    write_json(workdir / "config.json", to_json(grown))
    for asked in (config(24), grown):
        assert check_resumable(workdir, asked, preparation) == [[6, 12]]
    with pytest.raises(InputError, match=r"config.prolonged=\[\[6, 12\]\], not \[\[5, 12\]\]"):
        check_resumable(workdir, config(24, prolonged=((5, 12),)), preparation)
    # no step was taken of the 24
    assert check_resumable(workdir, config(36), preparation) == [[6, 12]]
    for step in (3, 18):
        (workdir / "checkpoints" / str(step)).mkdir()
    assert check_resumable(workdir, config(36), preparation) == [[6, 12], [18, 24]]
    # the run goes back to step 3 of the first 12
    assert check_resumable(workdir, config(36), preparation, set_aside=[6, 18]) == [[3, 12]]
    assert check_resumable(workdir, config(24), preparation, set_aside=[6, 18]) == [[6, 12]]


@pytest.mark.parametrize(
    "prolonged", [((6,),), ((0, 6),), ((8, 6),), ((6, 12),), ((4, 8), (3, 9)), (("a", 6),), (6, 8)]
)
def test_an_impossible_record_of_growth_is_refused(prolonged, tiny_dataset):
    config = tiny_config(tiny_dataset, prolonged=prolonged)
    with pytest.raises(InputError, match=r"must hold .step, number of steps. pairs, both rising"):
        check_config(config, 1)


@pytest.mark.parametrize("name", OLDER_RUNS)
def test_a_run_from_before_some_fields_existed_goes_on_with_the_recipe_of_today(
    name, tiny_dataset, tmp_path
):
    preparation = Dataset.open(tiny_dataset).preparation
    old = OLDER_RUNS[name]
    write_json(tmp_path / "config.json", old)
    write_json(tmp_path / "preparation.json", preparation)
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    recipe, size = name.split(":")
    config = importlib.import_module(f"configs.{recipe}").get_config(size)
    config = with_pooling(config, tmp_path)
    check_resumable(tmp_path, config, preparation)
    run = Run.open(tmp_path)
    assert set(flat(to_json(run.config))) == set(flat(to_json(config)))
    stored = flat(to_json(run.config))
    added = stored.keys() - flat(old).keys()
    assert added and {name: stored[name] for name in added} == {
        name: ADDED_SINCE[name] for name in added
    }


def test_the_table_of_fields_that_may_change_is_in_the_documents():
    rows = "".join(f"| `{name}` | {effect} |\n" for name, effect in MAY_CHANGE.items())
    assert f"|---|---|\n{rows}\n" in (PROJECT / "ctssl_jax" / "README.md").read_text()
    assert MAY_CHANGE.keys() <= FIELDS.keys() and ADDED_SINCE.keys() <= FIELDS.keys()


def test_a_run_of_another_version_is_told_from_a_changed_field(workdir, tiny_dataset):
    preparation = json.loads((workdir / "preparation.json").read_text())
    config = tiny_config(tiny_dataset)
    with config.unlocked():
        config.new_field = 1
    with pytest.raises(
        InputError,
        match=r"another version of this program \(config.new_field is not in both\)",
    ):
        check_resumable(workdir, config, preparation)


def test_what_may_change_when_a_run_goes_on(workdir, tiny_dataset, tmp_path):
    preparation = json.loads((workdir / "preparation.json").read_text())

    def check(**overrides):
        check_resumable(workdir, tiny_config(tiny_dataset, **overrides), preparation)

    check()
    check(num_steps=99, log_every=1, eval_every=3, remat=True, dataset="moved/elsewhere")
    check(num_steps=6, validation_slices=5, num_pictures=1, reading_threads=1, scan=True)
    for name, value in (
        ("seed", 1),
        ("batch_size", 16),
        ("model.depth", 2),
        ("loss.vq", 0.5),
        ("model.hidden", (4, 4)),
    ):
        with pytest.raises(
            InputError,
            match=rf"holds a run with config.{name}=.*; use another --workdir, or --config",
        ):
            check(**{name: value})
    other = write_example_dataset(tmp_path / "other", image_size=16, seed=1)
    with pytest.raises(
        InputError,
        match=r"a run on other data than .*other \(dataset fingerprints differ\)",
    ):
        train_on(tiny_config(other), workdir)


def test_configuration_survives_json(tiny_dataset):
    config = tiny_config(tiny_dataset, windows=((50, 350),))
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert to_json(again) == to_json(config)
    check_config(again, 1)
    assert check_dataset(again, Dataset.open(again.dataset), ("test",)) == (0,)


def test_wrong_flags_are_one_line(tiny_dataset, tmp_path):
    wrong = {
        "--config.learningrate=1": "did you mean config.learning_rate?",
        "--config.batch_size=many": "invalid literal for int",
        "--config.windows=50,350": (
            "must hold (level, width) pairs of numbers, e.g. '((50, 350),)'"
        ),
        "--config=configs/absent.py": "configs/absent.py",
        "--num_processes=2": "need --distributed",
        "leftover": "unexpected argument 'leftover'",
    }
    _, _, *words = command(tiny_dataset, tmp_path / "run")  # without `python -m`
    commands = [(*words, flag) for flag in wrong]
    results = ended(commands, ["ctssl_jax.training.recipe_files"])
    for result, (flag, message) in zip(results, wrong.items(), strict=True):
        assert result.returncode == 2, flag
        assert message in result.stderr and result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert not (tmp_path / "run").exists()
