"""The names that `data_prep` offers to Python: documented by an example that runs, imported when
they are used."""

import doctest
import subprocess
import sys

import pytest

import data_prep
from tests.helpers import dicom_files


def test_the_example_of_the_package_runs(tmp_path, tiny_dataset, monkeypatch):
    dicom_files.write(
        tmp_path / "scan", dicom_files.slices(dicom_files.thorax(21, size=60)[:, :56, 2:])
    )
    (tmp_path / "dataset").symlink_to(tiny_dataset)
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(data_prep, raise_on_error=True).attempted == 12


def test_every_name_is_there():
    assert data_prep.__all__ == sorted(data_prep._HOMES)
    for name in data_prep.__all__:
        value = getattr(data_prep, name)
        assert value.__module__.startswith("data_prep.") and value.__doc__
    with pytest.raises(AttributeError, match="'data_prep' has no attribute 'no_such_name'"):
        _ = data_prep.no_such_name


def test_a_name_is_imported_when_it_is_used():
    program = (
        "import sys, data_prep; assert 'numpy' not in sys.modules\n"
        "data_prep.Rules; assert 'numpy' not in sys.modules\n"
        "data_prep.read_scan; assert 'numpy' in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
