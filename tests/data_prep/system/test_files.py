"""What is refused before work whose result could not be written."""

import os

import pytest

from data_prep.system.errors import InputError
from data_prep.system.files import check_writable


def test_a_folder_without_permission_is_refused_before_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "result.json", "--output")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda folder, mode: str(folder) != str(tmp_path))
    with pytest.raises(InputError, match=r"--output=.*json cannot be written .*permission"):
        check_writable(tmp_path / "new" / "result.json", "--output")
