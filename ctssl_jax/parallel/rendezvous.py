"""All processes of a run find process 0, before JAX waits for them without a word.

Process 0 listens where JAX's coordinator will, and lets the others go on when all have come. JAX's
own start ends the process if one is missing, and cannot say which.
"""

import contextlib
import json
import os
import select
import socket
import time

from ctssl_jax.parallel.meeting import SAY_AFTER_SECONDS, WAIT_SECONDS, name_processes
from data_prep.system.errors import InputError

_SECONDS_TO_RESOLVE = 10.0
_SECONDS_FOR_LATE_GUESTS = 3.0
_GO = "go"
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


def meet(address: str, number: int, process: int, seconds: float = WAIT_SECONDS) -> None:
    """Return when all processes have come.

    Args:
      address: `host:port` of process 0.
      number: processes of the run.
      process: this process's number.
      seconds: to wait.

    Raises:
      InputError: the address does not resolve or is taken, processes did not come (the message
        names them), or two of them contradict each other.
    """
    host, port = _resolved(address)
    if number == 1:
        return
    if any(os.environ.get(name) for name in _PROXIES):  # gRPC would look behind the proxy
        kept = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = f"{host},{kept}" if kept else host
    deadline = time.monotonic() + seconds
    if process == 0:
        _receive(address, port, number, deadline)
    else:
        _come(address, host, port, number, process, deadline)


def _resolved(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator_address={address}: give HOST:PORT of process 0")
    deadline = time.monotonic() + _SECONDS_TO_RESOLVE
    while True:
        try:
            socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            return host, int(port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"--coordinator_address={address}: the name {host} does not resolve on "
                    f"{socket.gethostname()} ({error.strerror}); give a name or an IP address that "
                    "every host knows"
                ) from None
            time.sleep(1)


def _receive(address: str, port: int, number: int, deadline: float) -> None:
    """Process 0: wait for the others, then let all of them go."""
    try:
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=number
            )
        else:
            listener = socket.create_server(("", port), backlog=number)
    except OSError as error:
        raise InputError(
            f"--coordinator_address={address}: process 0 cannot listen on port {port} "
            f"({error.strerror}); another run may use it; choose another port"
        ) from None
    came: dict[int, tuple[socket.socket, str]] = {}
    unnamed: dict[socket.socket, str] = {}
    say_at = time.monotonic() + SAY_AFTER_SECONDS
    refusal = ""
    while not refusal and len(came) < number - 1:
        missing = name_processes([n for n in range(1, number) if n not in came], number)
        now = time.monotonic()
        if now > deadline:
            refusal = f"{missing} did not come to {address} in time"
        elif now > say_at:
            print(f"waiting      for {missing} at {address}", flush=True)
            say_at = now + 2 * SAY_AFTER_SECONDS
        readable, _, _ = select.select([listener, *unnamed, *_sockets(came)], [], [], 0.5)
        for one in readable:
            if one is listener:
                guest, where = listener.accept()
                unnamed[guest] = where[0].removeprefix("::ffff:")
            elif one in unnamed:
                refusal = refusal or _introduce(one, unnamed.pop(one), came, number)
            else:  # a guest speaks once: it has gone, and may come again
                for n in [n for n, (guest, _) in came.items() if guest is one]:
                    came.pop(n)[0].close()
    answer = (json.dumps(refusal or _GO) + "\n").encode()
    guests = [*_sockets(came), *unnamed]
    late = time.monotonic() + (_SECONDS_FOR_LATE_GUESTS if refusal else 0)
    while time.monotonic() < late:  # they, too, shall hear why
        if select.select([listener], [], [], 0.2)[0]:
            guests.append(listener.accept()[0])
    for guest in guests:
        with contextlib.suppress(OSError):
            guest.sendall(answer)
            guest.settimeout(2)
            guest.recv(100)  # the guest closes first, so that the port is free at once
    for one in [listener, *guests]:
        one.close()
    if refusal:
        raise InputError(f"--distributed: {refusal}; start all processes with the same settings")


def _sockets(came: dict[int, tuple[socket.socket, str]]) -> list[socket.socket]:
    return [guest for guest, _ in came.values()]


def _introduce(
    guest: socket.socket, where: str, came: dict[int, tuple[socket.socket, str]], number: int
) -> str:
    """Note who has come; returns why the run cannot start, or ""."""
    guest.settimeout(2)
    try:
        its_process, its_number = json.loads(guest.makefile().readline(200))
    except (OSError, ValueError, TypeError):
        guest.close()  # not one of ours
        return ""
    if its_number != number:
        guest.sendall(b'"process 0 waits for another number of processes"\n')
        guest.close()
        return (
            f"process {its_process} ({where}) has --num_processes={its_number}, process 0 has "
            f"{number}"
        )
    if its_process in came or its_process == 0:
        other = came[its_process][1] if its_process else "process 0"
        guest.sendall(b'"another process has this number"\n')
        guest.close()
        return f"two processes have --process_id={its_process} ({other} and {where})"
    came[its_process] = (guest, where)
    return ""


def _come(address: str, host: str, port: int, number: int, process: int, deadline: float) -> None:
    """Another process: come to process 0, and wait for its word."""
    say_at, why = time.monotonic() + SAY_AFTER_SECONDS, ""
    while (now := time.monotonic()) < deadline:
        if why and now > say_at:
            print(
                f"waiting      for process 0 of {number} at {address} ({why}; this is process "
                f"{process} on {socket.gethostname()})",
                flush=True,
            )
            say_at = now + 2 * SAY_AFTER_SECONDS
        try:
            with socket.create_connection((host, port), timeout=min(5, deadline - now)) as door:
                door.sendall((json.dumps([process, number]) + "\n").encode())
                door.settimeout(max(1, deadline + 5 - now))  # process 0 says who is missing
                answer = door.makefile().readline(1000)
        except OSError as error:
            why = error.strerror or "no answer"
            time.sleep(0.5)
            continue
        if not answer:
            why = "it has gone"
            time.sleep(0.5)
        elif (word := json.loads(answer)) == _GO:
            return
        else:
            raise InputError(f"--distributed: {word}; start all processes with the same settings")
    raise InputError(
        f"--distributed: process {process} did not find process 0 at {address} ({why}); start all "
        "processes at once, and let the port through between the hosts"
    )
