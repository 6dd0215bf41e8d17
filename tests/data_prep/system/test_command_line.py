"""The exit codes that all commands share."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.system import command_line
from data_prep.system.errors import InputError

# as a library that adds words of its own says it
FULL_DISK = "raise OSError(28, 'Error writing bytes. Detail: [errno 28] No space', 'results.csv')"
MAKE_ROOM = "results.csv: No space left on device; make room and run the same command again"
VERBS = "choose one of plan, run; options begin with --"


def _hear_signals() -> None:
    """In a process before its program begins: a shell may have started the tests in the background,
    where Ctrl-C is ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(body: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """A command whose `main` is `body`."""
    program = (
        "import signal, sys, time\n"
        "from data_prep.system import command_line\n"
        "from data_prep.system.errors import *\n"
        f"def main(argv):\n    {body}\n"
        "command_line.run(main, ('plan', 'run'))\n"
    )
    command = [*prefix, sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_signals,
    )


@pytest.mark.parametrize(
    ("error", "code", "end"),
    [
        ("RuntimeError('planted')", 1, "RuntimeError: planted\n"),
        ("InputError('planted')", 2, "error: planted\n"),
    ],
)
def test_an_error_ends_a_process_whose_threads_hang(error, code, end):
    body = (
        "import threading; command_line.LEAVING_SECONDS = 0.2; "
        f"threading.Thread(target=threading.Event().wait).start(); raise {error}"
    )
    process = start(body)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors.endswith(end)


@pytest.mark.parametrize(
    ("body", "arguments", "code", "message"),
    [
        ("return None", (), 0, ""),
        ("return 0", ("run",), 0, ""),
        (
            "raise InputError('--seed=x: give a\\n number')",
            (),
            2,
            "error: --seed=x: give a number\n",
        ),
        ("raise DatasetError('damaged; copy it again')", (), 2, "error: damaged; copy it again\n"),
        (
            "return 0",
            ("--absent=1",),
            2,
            "error: Unknown command line flag 'absent'; --help lists the flags\n",
        ),
        ("return 0", ("left",), 2, f"error: unexpected argument 'left'; {VERBS}\n"),
        ("return 0", ("run", "plan"), 2, f"error: unexpected argument 'plan'; {VERBS}\n"),
        ("raise RunFailed('a worker was killed')", (), 1, "error: a worker was killed\n"),
        (FULL_DISK, (), 1, f"error: {MAKE_ROOM}\n"),
        (
            "raise StartAgain('a host was lost; start again')",
            (),
            75,
            "a host was lost; start again\n",
        ),
        ("raise KeyboardInterrupt", (), 75, "stopped; run the same command again to continue\n"),
    ],
)
def test_exit_codes(body, arguments, code, message):
    process = start(body, *arguments)
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (code, "", message)


@pytest.mark.parametrize("words", [["a"], ["1", "b"], ["0"], ["-2"], ["1.5"], [""], []])
def test_what_is_no_list_of_numbers_is_refused_by_the_flag_s_name(words):
    with pytest.raises(InputError, match=r"^--batch_sizes=.*: give whole numbers from 1 on"):
        command_line.whole_numbers("batch_sizes", words)
    assert command_line.whole_numbers("batch_sizes", ["1", " 16"]) == [1, 16]


@pytest.mark.parametrize(
    "error", ["ValueError", "RuntimeError", "KeyError", "ImportError", "AttributeError"]
)
def test_a_bug_is_a_traceback(error):
    process = start(f"raise {error}('of us')")
    errors = process.communicate()[1]
    assert (
        process.returncode == 1
        and errors.startswith("Traceback")
        and re.search(
            rf"\n{error}: .*of us",
            errors,
        )
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_and_the_second_ends_at_once(number):
    body = (
        "try: print('ready', flush=True); time.sleep(60)\n    finally: print('tidied', "
        "flush=True); {}"
    )
    process = start(body.format("pass"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate() == (
        "tidied\n",
        "stopped; run the same command again to continue\n",
    )
    assert process.returncode == 75
    process = start(body.format("time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "tidied\n"
    process.send_signal(number)
    begun = time.monotonic()
    assert process.wait() == -number and time.monotonic() - begun < 10
    process.communicate()


def test_under_nohup_a_closed_terminal_stops_nothing():
    process = start("signal.raise_signal(signal.SIGHUP); print('finished')", prefix=("nohup",))
    assert process.communicate()[0] == "finished\n" and process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_before_the_work_a_signal_ends_at_once_also_while_c_computes(number):
    program = (
        "from data_prep.system import early_stop; early_stop.leave_at_once(); import hashlib; "
        "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_signals,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "stopped; run the same command again to continue\n"
    assert process.returncode == 75


def test_a_command_hears_a_signal_before_its_imports():
    """Once Linux shows that the signal is caught, it ends with 75, however early that is."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ctssl_jax.train",
            "--config=configs/masked_region.py",
            "--workdir=x",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        if caught & (1 << signal.SIGTERM - 1):
            break
    imported = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "stopped; run the same command again to continue\n"
    assert process.returncode == 75 and "jaxlib" not in imported
