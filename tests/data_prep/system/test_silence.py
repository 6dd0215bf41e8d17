"""Long silences are named on stderr, short ones are not."""

import os
import subprocess
import sys

PROGRAM = """
import sys, time
from data_prep.system import silence
silence.SECONDS, silence._SECONDS_BETWEEN_LOOKS = 0.3, 0.02
silence.watch()
{body}
time.sleep(0.2)
"""


def stderr_of(body: str, folder, *, quiet: str = "") -> str:
    """What a program with this body prints on stderr; `slow` is a module that takes its time."""
    (folder / "slow.py").write_text("import time; time.sleep(0.8)")
    environment = {**os.environ, "CTSSL_QUIET": quiet}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    program = PROGRAM.format(body=body)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""  # that is for others
    return done.stderr


def test_slow_imports_are_named(tmp_path):
    first, second = stderr_of("import slow", tmp_path).splitlines()
    assert first == "loading      libraries ..."
    assert second.startswith("loading      libraries took ") and second.endswith(" s")


def test_the_outermost_work_is_named_once(tmp_path):
    body = (
        "with silence.work('reading      scans'):\n"
        "    for _ in range(4):\n"
        "        with silence.work('decoding'): time.sleep(0.2)"
    )
    first, second = stderr_of(body, tmp_path).splitlines()
    assert first == "reading      scans ..." and second.startswith("reading      scans took ")


def test_short_works_and_quiet_commands_say_nothing(tmp_path):
    assert stderr_of("with silence.work('reading'): time.sleep(0.05)", tmp_path) == ""
    assert stderr_of("import slow", tmp_path, quiet="1") == ""


def test_works_end_in_any_order_and_of_other_threads_are_not_named(tmp_path):
    body = (
        "import threading\n"
        "silence.begin('a'); silence.begin('b'); silence.end('a'); silence.end('b')\n"
        "silence.end('never begun')\n"
        "thread = threading.Thread(target=silence.begin, args=['elsewhere']); thread.start()\n"
        "thread.join(); time.sleep(0.6)"
    )
    assert stderr_of(body, tmp_path) == ""
