"""The names that wings of `ctssl_jax` offer to Python: documented by examples that run, hidden by
no file."""

import doctest
import importlib
import subprocess
import sys

import pytest

from tests.helpers import dicom_files
from tests.helpers.opened_files import opened_files
from tests.helpers.training_runs import PROJECT, save_untrained, tiny_recipe

# by the example of the wing
OPENED_RUNS = {"evaluation": 1, "inference": 2, "probes": 1, "release": 1, "training": 0}
OPENED_DATASETS = {"evaluation": 1, "inference": 1, "probes": 1, "release": 0, "training": 1}
WINGS = tuple(OPENED_RUNS)


@pytest.fixture(scope="module")
def folder(tiny_dataset, tmp_path_factory):
    """A run of random weights, the dataset that it is of, and a scan."""
    folder = tmp_path_factory.mktemp("faces")
    save_untrained(tiny_recipe(tiny_dataset, "masked_region"), folder / "run")
    (folder / "dataset").symlink_to(tiny_dataset)
    dicom_files.write(
        folder / "scan", dicom_files.slices(dicom_files.thorax(21, size=60)[:, :56, 2:])
    )
    return folder


@pytest.mark.parametrize("wing", WINGS)
def test_the_example_of_a_wing_runs(wing, folder, monkeypatch):
    """And opens each run and dataset once."""
    if wing == "release":
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
    monkeypatch.chdir(folder)
    module = importlib.import_module(f"ctssl_jax.{wing}")
    with opened_files("config.json") as configs, opened_files("preparation.json") as preparations:
        assert (
            doctest.testmod(module, raise_on_error=True, optionflags=doctest.ELLIPSIS).attempted
            >= 3
        )
    assert len(configs) == OPENED_RUNS[wing]
    assert len(preparations) == OPENED_RUNS[wing] + OPENED_DATASETS[wing]


@pytest.mark.parametrize("wing", WINGS)
def test_every_name_is_there_and_no_file_bears_it(wing):
    module = importlib.import_module(f"ctssl_jax.{wing}")
    assert module.__all__ == sorted(module._HOMES)
    for name in module.__all__:
        assert not (PROJECT / "ctssl_jax" / wing / f"{name}.py").exists()
        if name != "export" or importlib.util.find_spec("torch"):
            assert getattr(module, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.parametrize("file_first", [True, False])
def test_file_and_face_are_imported_in_any_order(file_first):
    """Importing a file puts its name into the wing: it must not take the place of a function of the
    face."""
    program = [
        "import sys",
        "import ctssl_jax.evaluation, ctssl_jax.inference, ctssl_jax.probes, ctssl_jax.release",
        "import ctssl_jax.training",
    ]
    program.append("assert 'jax' not in sys.modules")
    faces = [
        "from ctssl_jax.evaluation import evaluate",
        "from ctssl_jax.inference import embed, load, predict",
        "from ctssl_jax.probes import attributes, probe",
        "from ctssl_jax.release import import_weights",
        "from ctssl_jax.training import train",
    ]
    files = [
        "import ctssl_jax.evaluation.measure, ctssl_jax.inference.embedding, "
        "ctssl_jax.inference.prediction",
        "import ctssl_jax.training.loop, ctssl_jax.probes.probing",
        "import ctssl_jax.probes.attribute_probe, ctssl_jax.release.importing",
    ]
    program += [*files, *faces] if file_first else [*faces, *files, *faces]
    program.append(
        "assert all(map(callable, (attributes, embed, evaluate, import_weights, load, predict)))"
    )
    program.append("assert callable(probe) and callable(train)")
    subprocess.run([sys.executable, "-c", "\n".join(program)], check=True, cwd=PROJECT)
