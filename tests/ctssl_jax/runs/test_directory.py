"""Run directories on a file system and on an emulated object store."""

import pytest

from ctssl_jax.runs import checkpoints, damage, directory, reports
from ctssl_jax.runs.directory import run_directory
from ctssl_jax.runs.run import Run
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_config, train_on


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b/run", "no run directory can be on s3://; copy it from or to a local folder"),
        ("gcs://b/run", "no run directory can be on gcs://; write gs://b/run"),
        ("http://h/run", "must be on a mounted file system; give a folder, or gs://BUCKET/DIR"),
        ("gs:/b/run", "is not a URL; write gs://b/run"),
        ("GS://b/run", "is not a URL; write gs://b/run"),
        ("gs://b", "give a folder of a bucket, gs://BUCKET/DIR"),
        ("gs:///run", "give a folder of a bucket, gs://BUCKET/DIR"),
    ],
)
def test_urls_of_another_kind_are_refused(url, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        run_directory(url, "config.init_from")
    assert str(refused.value).startswith(f"config.init_from={url}: ") and words in str(
        refused.value
    )
    with pytest.raises(InputError, match="--workdir="):
        Run.open(url)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(directory, "_is_installed", lambda package: False)
    with pytest.raises(InputError, match=r"--workdir=gs://b/run: needs .*pip install 'gcsfs"):
        run_directory("gs://b/run")


def test_a_run_on_an_object_store(tiny_dataset, emulated_bucket, tmp_path):
    """It equals a local run; damage is named, and set aside; what a kill left is removed."""
    config = tiny_config(tiny_dataset, num_steps=2, eval_every=1, log_every=1)
    with pytest.raises(InputError, match="no such bucket"):
        train_on(config, "gs://no-such-bucket/run")
    url = f"gs://{emulated_bucket}/{tmp_path.name}"
    assert train_on(config, tmp_path / "local") and train_on(config, url)
    local, run = Run.open(tmp_path / "local"), Run.open(url)
    for kind in ("train", "validation"):
        numbers = [
            [(line["step"], line["loss"]) for line in reports.read_reports(one.workdir, kind)]
            for one in (local, run)
        ]
        assert numbers[0] == numbers[1] and len(numbers[0]) == 2
    assert checkpoints.choose(run.workdir) == checkpoints.choose(local.workdir)
    assert damage.step_numbers(run.workdir) == [1, 2]
    assert (run.workdir / "pictures" / "step_00000002.png").read_bytes()[1:4] == b"PNG"
    assert not (run.workdir / "training.lock").exists()

    damage.check_all_undamaged(run.workdir)
    patients = (run.workdir / "patients.json").read_bytes()
    (run.workdir / "patients.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"is damaged \(patients.json has another checksum"):
        damage.check_all_undamaged(run.workdir)
    (run.workdir / "patients.json").write_bytes(patients)
    state = run.workdir / "checkpoints" / "2" / "state"
    objects = directory.object_checksums(state)
    (state / next(name for name in objects if "/d/" in name)).write_bytes(b"damage")
    with pytest.raises(InputError, match=r"checkpoint 2 of .* is damaged .*has another checksum"):
        damage.check_undamaged(run.workdir, 2)
    damage.set_aside(run.workdir, [2])
    assert damage.step_numbers(run.workdir) == [1]
    moved = directory.object_checksums(run.workdir / "damaged_checkpoints" / "2" / "state")
    assert moved.keys() == objects.keys()
    # a kill within a removal leaves a checkpoint that is complete no more
    (run.workdir / "checkpoints" / "1" / "commit_success.txt").unlink()
    assert damage.step_numbers(run.workdir) == []
    directory.remove_incomplete(run.workdir / "checkpoints")
    assert not (run.workdir / "checkpoints" / "1").exists()
