"""Processes find each other before JAX waits for them, and exchange what they know; here they are
threads."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ctssl_jax.parallel import meeting, rendezvous, stopping
from data_prep.system.errors import InputError, RunFailed


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Refusals come sooner."""
    monkeypatch.setattr(rendezvous, "_SECONDS_FOR_LATE_GUESTS", 0.5)


def meet_all(processes, seconds=20.0, address=""):
    """The outcome of each process, given as (its number, how many it expects): "" or the
    refusal."""
    address = address or f"127.0.0.1:{free_port()}"

    def meet(process):
        number, expected = process
        try:
            rendezvous.meet(address, expected, number, seconds)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(meet, processes))


def test_all_go_on_when_the_last_has_come():
    assert meet_all([(2, 4), (1, 4), (3, 4), (0, 4)]) == [""] * 4


def test_who_does_not_come_is_named(capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "SAY_AFTER_SECONDS", 0.3)
    first, second = meet_all([(0, 4), (2, 4)], seconds=1.0)
    assert "processes 1, 3 of 4 did not come to 127.0.0.1:" in first
    assert second == first
    # where threads are slow it is said before process 2 has come
    waited = r"waiting      for processes 1, (2, )?3 of 4 at 127\.0\.0\.1:"
    assert re.search(waited, capsys.readouterr().out)


def test_a_missing_first_process_is_named(capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "SAY_AFTER_SECONDS", 0.2)
    (refusal,) = meet_all([(1, 2)], seconds=1.0)
    assert "process 1 did not find process 0 at 127.0.0.1:" in refusal and "refused" in refusal
    assert "waiting      for process 0 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("processes", "reason"),
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes have --process_id=1"),
        ([(0, 3), (1, 3), (2, 5)], "process 2 (127.0.0.1) has --num_processes=5, process 0 has 3"),
    ],
)
def test_processes_that_contradict_each_other_are_refused(processes, reason):
    refusals = meet_all(processes)
    assert reason in refusals[0] and all(refusals)


def test_strangers_are_ignored():
    address = f"127.0.0.1:{(port := free_port())}"

    def stranger():
        for word in (b"PRI * HTTP/2.0\r\n", b"[]\n", b""):
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(word)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(rendezvous.meet, address, 2, 0, 20.0)
        threads.submit(stranger).result()
        rendezvous.meet(address, 2, 1, 20.0)
        first.result()


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("nowhere.invalid:8000", "the name nowhere.invalid does not resolve"),
        ("127.0.0.1", "give HOST:PORT"),
        ("127.0.0.1:port", "give HOST:PORT"),
        ("127.0.0.1:99999", "give HOST:PORT"),
    ],
)
def test_addresses_that_cannot_work(address, fault, monkeypatch):
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_RESOLVE", 0)
    (refusal,) = meet_all([(1, 2)], address=address)
    assert refusal.startswith(f"--coordinator_address={address}: ") and fault in refusal


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        (refusal,) = meet_all([(0, 2)], address=f"127.0.0.1:{other.getsockname()[1]}")
    assert "process 0 cannot listen on port" in refusal and "choose another port" in refusal


class Coordinator:
    """The names and texts of JAX's coordinator."""

    def __init__(self):
        self.texts: dict[str, str] = {}

    def key_value_set(self, name, value, allow_overwrite=False):
        assert allow_overwrite or name not in self.texts
        self.texts[name] = value

    def key_value_dir_get(self, folder):
        return [
            (name, value) for name, value in list(self.texts.items()) if name.startswith(folder)
        ]


@pytest.fixture
def three(monkeypatch):
    """Three processes; a thread has the number that its name ends with."""
    coordinator = Coordinator()
    monkeypatch.setattr(meeting, "client", lambda: coordinator)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("jax.process_index", lambda: int(threading.current_thread().name[-1]))
    return coordinator


def test_a_process_that_does_not_complete_its_part_is_named(three, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "SAY_AFTER_SECONDS", 0.1)
    three.texts["ctssl/check/1"] = "null"
    caught = []

    def wait():
        try:
            meeting.exchange("check", "reading the dataset", "mine", seconds=0.5)
        except RunFailed as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait, name="process 0")
    thread.start()
    thread.join()
    assert caught == [
        "process 2 of 3 did not complete reading the dataset within 0 s; look at the messages and "
        "the storage of that host"
    ]
    assert "waiting      for process 2 of 3: reading the dataset" in capsys.readouterr().out


def test_all_stop_at_the_same_call_however_far_each_is(three, monkeypatch):
    monkeypatch.setattr(stopping, "_SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(meeting, "next_key", lambda: "stop")
    stopped_at, asked = {}, threading.Event()

    def run(number):
        agreement = stopping._Agreement(lambda: number == 1 and asked.is_set())
        agreement._thread.join(0)
        calls = 0
        while not agreement.should_stop() and calls < 10_000:
            calls += 1
            if calls == 20 * (number + 1):
                asked.set()
            time.sleep(0.001 * (number + 1))
        agreement.close()
        stopped_at[number] = calls

    monkeypatch.setattr(
        threading.Thread, "__init__", _named_after_its_starter(threading.Thread.__init__)
    )
    threads = [threading.Thread(target=run, args=(i,), name=f"process {i}") for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stopped_at) == 3 and len(set(stopped_at.values())) == 1
    assert stopped_at[0] < 10_000


def _named_after_its_starter(initialise):
    def named(self, *args, **options):
        if options.get("name") == "stop requests":
            options["name"] = f"stop requests of {threading.current_thread().name}"
        initialise(self, *args, **options)

    return named
