"""One training at a time in a run directory, on a file system and on an object store."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from etils import epath

from ctssl_jax.runs import lock
from ctssl_jax.runs.lock import TrainingLock
from data_prep.system.errors import InputError

HOLDER = """
import sys, time
from pathlib import Path
from ctssl_jax.runs.lock import TrainingLock
with TrainingLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with TrainingLock() as second:
            for take in (second.take_if_there, second.take):
                with pytest.raises(
                    InputError, match=rf"--workdir={workdir}: process {holder.pid} on .* trains in"
                ):
                    take(workdir)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        before = (workdir / "training.lock").read_text()
        with TrainingLock() as third, TrainingLock() as fourth:
            third.take_if_there(workdir)  # at once
            assert (workdir / "training.lock").read_text() == before
            with pytest.raises(InputError, match="another process trains in it"):
                fourth.take(workdir)
            third.take(workdir)
            assert f'"process": {os.getpid()}' in (workdir / "training.lock").read_text()


def test_a_directory_without_a_lock_stays_as_it_is(tmp_path):
    with TrainingLock() as first:
        first.take_if_there(tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_removed_lock_frees_the_directory(tmp_path):
    """The remedy where a host is gone and an NFS server keeps its lock."""
    with TrainingLock() as first, TrainingLock() as second:
        first.take(tmp_path)
        (tmp_path / "training.lock").unlink()
        second.take(tmp_path)
        with TrainingLock() as third, pytest.raises(InputError, match="trains in it"):
            third.take(tmp_path)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with TrainingLock() as first:
        first.take(tmp_path)
    assert "no locks on this file system (Function not implemented)" in capsys.readouterr().err


# ---- gs:// ---------------------------------------------------------------------------------------


@pytest.fixture
def workdir(emulated_bucket, monkeypatch, tmp_path):
    """A run directory in an emulated bucket."""
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lock, "LOST_SECONDS", 0.5)
    return epath.Path(f"gs://{emulated_bucket}/{tmp_path.name}")


def leave(workdir, **holder):
    """The lock of a process that renews it no more."""
    written = {**lock._this_process(), **holder}
    assert lock._write(lock._blob(workdir), json.dumps(written).encode(), 0)


def test_an_object_lock_refuses_who_comes_second_and_ends_with_the_first(workdir):
    with TrainingLock() as first:
        first.take_if_there(workdir)  # nothing is written
        first.take(workdir)
        with TrainingLock() as second, pytest.raises(InputError, match=f"process {os.getpid()} on"):
            second.take(workdir)
    with TrainingLock() as third:
        third.take_if_there(workdir)
        third.take(workdir)


def test_an_object_lock_of_another_machine_is_watched(workdir, monkeypatch, capsys):
    with TrainingLock() as first, TrainingLock() as second:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_machine", lambda: "another machine")
            first.take(workdir)
        with pytest.raises(InputError, match="trains in it"):  # it is renewed
            second.take(workdir)
    assert "waiting      up to" in capsys.readouterr().out
    leave(workdir, machine="another machine")
    with TrainingLock() as third:
        third.take_if_there(workdir)  # it is not


def test_an_object_lock_of_a_dead_process_of_this_machine_is_taken_at_once(workdir, capsys):
    leave(workdir, birth="1")
    with TrainingLock() as next_one:
        next_one.take_if_there(workdir)
    assert not capsys.readouterr().out


def test_a_process_whose_object_lock_was_taken_over_ends(workdir, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
    with TrainingLock() as first:
        first.take(workdir)
        blob = lock._blob(workdir)
        while not lock._write(blob, b"{}", lock._read(blob) is not None and blob.generation):
            pass  # it was renewed between the two requests
        assert ended.wait(10)
