"""Damaged outputs: the short version of the campaign, that it can fail, going on from the last good
checkpoint."""

from pathlib import Path

import pytest

from ctssl_jax.runs import checkpoints
from ctssl_jax.runs.checkpoints import choose_step
from ctssl_jax.runs.run import Run, to_json
from ctssl_jax.training.loop import train
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import write_json
from data_prep.system.workers import WorkerPool
from tests.campaigns import corrupted_outputs as campaign
from tests.helpers.training_runs import saved_state

MEASURED = ("verify", "evaluate")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> campaign.Sound:
    """The files alone: no command was run on them."""
    return campaign.make_sound(tmp_path_factory.mktemp("campaign") / "sound", ())


@pytest.fixture(scope="module")
def measured(sound) -> campaign.Sound:
    with WorkerPool(1) as pool:
        copies = {
            name: campaign.shutil.copytree(sound.folder, sound.folder.with_name(name))
            for name in MEASURED
        }
        return sound._replace(
            results={name: campaign._result(name, copy, pool) for name, copy in copies.items()}
        )


def test_corruptions_are_named_or_harmless(measured):
    found = campaign.run(measured, 12, seed=1)
    assert campaign.defects(found) == []
    assert len(found) == 12 and sum(text == "named" for text, _ in found) > 6


def test_a_corruption_is_the_same_every_time(sound, tmp_path):
    works = [campaign.shutil.copytree(sound.folder, tmp_path / name) for name in ("one", "two")]
    done = [
        campaign.corrupt(work, campaign.np.random.default_rng([5, 0]), MEASURED) for work in works
    ]
    assert done[0] == done[1]
    files = [
        {p.relative_to(work): p.read_bytes() for p in work.rglob("*") if p.is_file()}
        for work in works
    ]
    assert files[0] == files[1]


def tensors(run: Path, step: int) -> Path:
    return max((run / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def test_without_checksums_wrong_numbers_are_seen(measured, tmp_path, monkeypatch):
    """The campaign can fail: this is what Orbax alone makes of most changed bits."""
    places = iter((0.5, 0.5, 0.3, 0.4, 0.6, 0.7))

    def corrupt(folder, random, commands):
        flip(tensors(folder / "run", 2), next(places))
        return campaign.Corruption(
            "flipped", str(tensors(folder / "run", 2).relative_to(folder)), "evaluate"
        )

    monkeypatch.setattr(campaign, "corrupt", corrupt)
    with WorkerPool(1) as pool:
        assert campaign.outcome(measured, tmp_path / "a", None, pool)[0] == "named"
        monkeypatch.setattr(checkpoints, "check_undamaged", lambda *arguments, **options: None)
        assert "wrong result" in (
            campaign.outcome(measured, tmp_path / name, None, pool)[0] for name in "bcdef"
        )


def test_training_goes_on_from_the_last_good_checkpoint_when_asked(sound, tmp_path, capsys):
    campaign.shutil.copytree(sound.folder, tmp_path / "x")
    run, config = (
        tmp_path / "x" / "run",
        campaign._config(tmp_path / "x" / "dataset", campaign.MORE_STEPS),
    )
    flip(tensors(run, campaign.STEPS))
    devices = campaign.jax.devices()[:1]
    with pytest.raises(
        InputError,
        match=r"checkpoint 4 of .* is damaged .*; good ones are: 2; .*set_aside_damaged",
    ):
        train(config, run, devices)
    assert "compiled" not in capsys.readouterr().out, "refused before the work begins"
    assert train(config, run, devices, set_aside_damaged=True)
    assert "resuming     from step 2" in capsys.readouterr().out
    assert (run / "damaged_checkpoints" / "4").is_dir()
    assert choose_step(run, "last") == campaign.MORE_STEPS
    assert int(saved_state(run)["step"]) == campaign.MORE_STEPS


# ---- datasets ------------------------------------------------------------------------------------


@pytest.fixture
def damaged(sound, tmp_path) -> Path:
    return campaign.shutil.copytree(sound.folder / "dataset", tmp_path / "dataset")


def test_tables_that_are_no_text_are_named(damaged):
    path = damaged / "volumes.csv"
    path.write_bytes(path.read_bytes()[:-9] + b"\xb0\xff" + path.read_bytes()[-9:])
    with pytest.raises(
        DatasetError,
        match=r"volumes.csv, line \d+: damaged \(UnicodeDecodeError: "
        r".{,90}\); copy it",
    ):
        Dataset.open(damaged).volumes()


def test_shards_that_changed_places_are_refused(damaged):
    one, two = (damaged / f"train.array_record-0000{number}" for number in (0, 1))
    one.rename(damaged / "x"), two.rename(one), (damaged / "x").rename(two)
    source = Dataset.open(damaged).source("train")
    with pytest.raises(
        DatasetError,
        match=r"train.array_record-00000: damaged \(record 3 is another slice",
    ):
        source[3]
    with pytest.raises(
        DatasetError,
        match=r"train.array_record-00001: damaged \(record 0 is another slice",
    ):
        source[24]


def test_a_shard_of_another_length_is_refused(damaged):
    campaign.shutil.copy(damaged / "train.array_record-00002", damaged / "train.array_record-00000")
    with pytest.raises(DatasetError, match=r"train.array_record-00000: damaged \(12 records\)"):
        Dataset.open(damaged).source("train")[0]


def test_a_flipped_bit_in_a_shard_is_one_line(damaged):
    path = damaged / "test.array_record-00000"
    content = bytearray(path.read_bytes())
    # the rest of a block is padding
    written = [place for place, byte in enumerate(content) if byte]
    content[written[len(written) // 2]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"test.array_record-00000: damaged \(") as raised:
        for record in Dataset.open(damaged).source("test"):
            assert record
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["volumes.csv", "slices.csv", "features.json", "rejected.csv"])
def test_a_changed_table_is_refused(damaged, name):
    opened = Dataset.open(damaged)
    opened.check_tables()
    flip(damaged / name)
    with pytest.raises(
        DatasetError,
        match=rf"{name}: checksum differs from preparation.json; copy the data",
    ):
        opened.check_tables()


def test_preparation_json_checks_itself(damaged):
    path = damaged / "preparation.json"
    text = path.read_text()
    path.write_text(text.replace('"level": 50.0', '"level": 40.0'))
    with pytest.raises(
        DatasetError,
        match=r"preparation.json: damaged \(its checksum of itself differs\)",
    ):
        Dataset.open(damaged)
    path.write_text(text)
    assert "sha256" not in Dataset.open(damaged).preparation


# ---- run directories -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "config.json",
            '"fraction": 0.2',
            '"fraction": 0.3',
            r"config.json is damaged \(mask.fraction differs from",
        ),
        (
            "config.json",
            '"fraction"',
            "'fraction'",
            r"config.json is damaged \(Expecting property name",
        ),
        ("config.json", '"task"', '"tusk"', r"config.json is damaged \(task is not in it\)"),
        (
            "preparation.json",
            '"level": 50.0',
            '"level": 51.0',
            r"preparation.json is damaged \(windows differs from",
        ),
        (
            "patients.json",
            '"train"',
            '"tr\\u0001in"',
            r"patients.json is damaged \(train is not in it\)",
        ),
        ("ancestors.json", "[]", "{}", r"ancestors.json is damaged \(it is not a list"),
        (
            "training_data.json",
            "1.0",
            "0.5",
            r"run is damaged \(training_data.json has another checksum",
        ),
        (
            "metrics.jsonl",
            '"step": 2',
            '"step": x',
            r"metrics.jsonl is damaged at .*; remove that line",
        ),
    ],
)
def test_a_damaged_file_of_a_run_is_named(sound, tmp_path, name, old, new, message):
    campaign.shutil.copytree(sound.folder, tmp_path / "x")
    path = tmp_path / "x" / "run" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    command = "train" if name == "metrics.jsonl" else "evaluate"
    with WorkerPool(1) as pool, pytest.raises(InputError, match=message) as raised:
        campaign._result(command, tmp_path / "x", pool)
    assert "\n" not in str(raised.value)


def test_what_may_change_is_no_damage(sound, tmp_path):
    """A run goes on for longer, on a dataset that was moved: config.json differs from the last
    checkpoint's."""
    campaign.shutil.copytree(sound.folder, tmp_path / "x")
    config = Run.open(tmp_path / "x" / "run").config
    config.num_steps, config.dataset = 99, "elsewhere"
    write_json(tmp_path / "x" / "run" / "config.json", to_json(config))
    assert Run.open(tmp_path / "x" / "run").config.num_steps == 99
