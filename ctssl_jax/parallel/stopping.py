"""Requests to stop a run: SIGTERM (preemption, `scancel`, `kill`), SIGINT (Ctrl-C) and SIGHUP."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from ctssl_jax.parallel import meeting
from data_prep.system.command_line import stop_signals_handled_by
from data_prep.system.errors import RunFailed

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Listen for requests to stop within a block of the main thread.

    Yields:
      `should_stop()`, to be called before each step and each batch of a validation, equally often
      on all processes: true once any process got a signal, on all processes at the same call. A
      second Ctrl-C interrupts at once.
    """
    received = []

    def note(signal_number: int, frame: object) -> None:
        if received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal_number)

    with stop_signals_handled_by(note):
        if jax.process_count() == 1:
            yield lambda: bool(received)
            return
        agreement = _Agreement(lambda: bool(received))
        try:
            yield agreement.should_stop
        finally:
            agreement.close()


class _Agreement:
    """All processes stop at the same call of `should_stop`.

    A thread notices a request of any process within half a second. It then holds its main thread at
    the next call, and the processes exchange how many calls they have made: all stop one call after
    the largest number. Up to there every process dispatches its work, so that none waits for a
    collective that another one never begins. JAX's `reached_preemption_sync_point` does the same,
    but it listens only when all have joined, and for SIGTERM alone.
    """

    def __init__(self, asked: Callable[[], bool]):
        self._asked, self._lock, self._closed = asked, threading.Lock(), threading.Event()
        self._calls, self._stop_at, self._key = 0, 0, meeting.next_key()
        self._failed: RunFailed | None = None
        self._thread = threading.Thread(target=self._watch, name="stop requests", daemon=True)
        self._thread.start()

    def should_stop(self) -> bool:
        with self._lock:
            if self._failed:
                raise self._failed
            self._calls += 1
            return 0 < self._stop_at <= self._calls

    def close(self) -> None:
        """No more calls will come from this process."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        client, number = meeting.client(), jax.process_index()
        asked = f"ctssl/asked/{self._key}"
        try:
            while not self._closed.wait(_SECONDS_BETWEEN_LOOKS):
                if self._asked():
                    client.key_value_set(f"{asked}/{number}", "", allow_overwrite=True)
                elif not client.key_value_dir_get(f"{asked}/"):
                    continue
                with self._lock:
                    self._stop_at = (
                        max(meeting.exchange(self._key, "the last step", self._calls)) + 1
                    )
                return
            # for those that exchange their numbers later
            client.key_value_set(f"ctssl/{self._key}/{number}", str(self._calls))
        except RunFailed as error:
            self._failed = error
        except RuntimeError:
            pass  # the coordinator is gone: JAX ends this process
