"""What is looked at before a run: each thing that would spoil it is one clear line, and nothing is started.

The harness changes no setting of the machine; it says what there is and what is needed.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import resource
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from loadtest import sampling
from loadtest.engine import sources_for
from loadtest.target import Instance, Target

BUSY = 15.0
"""Seconds that a server which thousands have just left may answer 503."""
ANSWER = BUSY
"""Seconds that it may take for an answer."""
SPARE_FILES = 256
"""Open files of a generator that are no session's."""

SERVER_FILES = 512
"""Open files that a process of the server started here keeps for itself."""

USER = "loadtest-preflight"

_BATCH = 1_000
"""Ids that are asked for at a time: no more are allowed (WIRE §3)."""
_LONGEST = 1 << 20
"""Octets of an answer that are read: of a batch there may be some 200 to an id."""
_IDS_PER_SECOND = 4_000
"""A little less than is allowed (WIRE §6)."""
_LOOK = 1.0
"""Seconds between two looks at who is online still."""


class PreflightError(Exception):
    """The run cannot be: one line that says what is wrong and what would help."""


def check(
    target: Target, sessions: int, *, processes: int = 1, sources: int | None = None, elsewhere: bool = False
) -> None:
    """Look at the machine, then at every instance of the server.

    Args:
        sessions: how many are to be held at once, by all processes.
        processes: of the generator.
        sources: how many source addresses it uses; None: as many as it needs.
        elsewhere: the processes may be on other machines, of whose ports nothing is known here.

    Raises:
        PreflightError: something would spoil the run.
    """
    check_files(sessions, processes, file_limit())
    for instance in target.instances:
        check_address(instance)
    first, last = sampling.ports()
    if not elsewhere:
        check_ports(sessions, target.instances, last - first + 1, sources)
    for instance in target.instances:
        check_server(instance, target)


def source_addresses(named: str, sessions: int, instances: Sequence[Instance]) -> list[str]:
    """Where the sessions connect from.

    Args:
        named: addresses, separated by commas; "": as many of the loopback as are needed, where the servers are there.
        sessions: of all processes.

    Returns:
        The addresses; none of them: the system's own choice.
    """
    if named:
        return named.split(",")
    if not all(sampling.is_local(one.host) for one in instances):
        return []
    return sources_for(math.ceil(sessions / len(instances)))


def check_sources(addresses: Sequence[str]) -> None:
    """Whether this machine has all of these source addresses.

    Raises:
        PreflightError: it has not.
    """
    for address in addresses:
        with socket.socket() as probe:
            try:
                probe.bind((address, 0))
            except (OSError, UnicodeError) as error:
                raise PreflightError(
                    f"--sources: {address!r} is no address of this machine: {_reason(error)}"
                ) from error


def check_shares(shares: Mapping[str, object]) -> None:
    """Whether options that are shares of a whole, by their names, are 0 to 1; one that is not set is None, or "".

    Raises:
        PreflightError: one is above 1.
    """
    for name, share in shares.items():
        if isinstance(share, (int, float)) and share > 1:
            raise PreflightError(f"--{name} {share:g}: is a share, from 0 to 1")


def check_output(path: Path) -> None:
    """Whether the data of the run can be written there: to be told so at its end would be late.

    Raises:
        PreflightError: it cannot.
    """
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise PreflightError(f"--run-json: {path} cannot be written: {_reason(error)}") from error


def check_embedded(sessions: int, workers: int, limit: float) -> None:
    """Whether a server started here can take so many: each of its processes keeps files for itself.

    Raises:
        PreflightError: it cannot.
    """
    there, enough = workers * (limit - SERVER_FILES), math.ceil(sessions / max(limit - SERVER_FILES, 1))
    if sessions > there:
        raise PreflightError(
            f"nofile is too low for the server started here: {_processes(workers)} of it may have {max(there, 0):,g} "
            f"sessions, by the hard limit of {limit:,g}: use --workers {enough}, or name a --target"
        )


def file_limit() -> float:
    """The open files that a process of ours may have, raised to the hard limit for all that is started from here."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return math.inf if hard == resource.RLIM_INFINITY else hard


def check_files(sessions: int, processes: int, limit: float) -> None:
    """Whether each process may open a socket for each of its sessions.

    Raises:
        PreflightError: it may not.
    """
    each = math.ceil(sessions / processes)
    if each + SPARE_FILES <= limit:
        return
    enough = math.ceil(sessions / max(limit - SPARE_FILES, 1)) if limit > SPARE_FILES else None
    help_ = f", or use --processes {enough}" if enough and enough <= 64 else ""
    raise PreflightError(
        f"nofile is too low: {sessions:,} sessions in {_processes(processes)} need {each + SPARE_FILES:,} open files "
        f"each, the hard limit is {limit:,g}: raise it (ulimit -Hn){help_}"
    )


def check_ports(sessions: int, instances: Sequence[Instance], ports: int, sources: int | None) -> None:
    """Whether there are ports enough for so many connections to so many listeners.

    Args:
        ports: how many the system gives to clients of one address.
        sources: source addresses; None: the harness takes what it needs of 127.0.0.0/8, where the server is there.

    Raises:
        PreflightError: there are not.
    """
    if sources is None:
        if all(sampling.is_local(one.host) for one in instances):
            return
        sources = 1
    there = ports * sources * len(instances)
    if sessions <= there:
        return
    needed = math.ceil(sessions / (ports * len(instances)))
    raise PreflightError(
        f"too few ports: {sessions:,} sessions, but only {there:,} ports ({ports:,} from each of {sources} source "
        f"address{'es' if sources > 1 else ''} to {len(instances)} listener{'s' if len(instances) > 1 else ''}): "
        f"use {needed} source addresses, or widen net.ipv4.ip_local_port_range"
    )


def check_address(instance: Instance) -> None:
    """Whether the crowd can connect to it at all.

    Raises:
        PreflightError: it cannot.
    """
    try:
        socket.gethostbyname(instance.host)
    except (OSError, UnicodeError) as error:  # a name with an empty part is a UnicodeError
        known = "is an IPv6 address" if ":" in instance.host else "has no IPv4 address that is known here"
        raise PreflightError(f"{instance.http}: {instance.host} {known}: the crowd connects over IPv4 only") from error


def check_server(instance: Instance, target: Target) -> None:
    """Whether a server of the contract is there, takes our tokens, and opens WebSockets.

    Raises:
        PreflightError: no, and why.
    """
    token = target.token(USER)
    status, body = _get(instance, token)
    until = time.monotonic() + BUSY
    while status == 503 and time.monotonic() < until:  # it may still be at the ends of the sessions before
        time.sleep(1.0)
        status, body = _get(instance, token)
    address = f"{instance.http}: "
    if status == 401:
        raise PreflightError(f"{address}wrong token: it refuses what [token] makes (401{_detail(body)})")
    if status == 503:
        raise PreflightError(f"{address}it is up, but not ready (503{_detail(body)})")
    if status != 200 or b"isOnline" not in body:
        raise PreflightError(f"{address}no presence server: GET /api/presence/check/{USER} was answered {status}")
    _open(instance, token)


def await_offline(target: Target, users: Sequence[str], asker: str = USER) -> str | None:
    """Wait until nobody of a run before is online under these names: the ends of thousands of sessions take a while.

    A lease is waited for, and a little more; a server that does not answer such questions is not.

    Args:
        asker: a user of its own for each process: rates are limited by user.

    Returns:
        What speaks against the run, in a sentence: some are online still, or it is not known; None: nobody is.
    """
    until = time.monotonic() + target.lease + BUSY
    for start in range(0, len(users), _BATCH):
        if start:
            time.sleep(_BATCH / _IDS_PER_SECOND)
        ids = users[start : start + _BATCH]
        while left := _left(target, ids, asker):
            if time.monotonic() > until:
                return left
            time.sleep(_LOOK)
    return None


def _left(target: Target, ids: Sequence[str], asker: str) -> str | None:
    try:
        status, body = _ask(target.instances[0], target.token(asker), "/batch", json.dumps(ids).encode())
        if status in (429, 503):
            return f"It is not known whether users of this run were online when it began: to ask was answered {status}."
        found = json.loads(body) if status == 200 else {}
        online = sum(state["isOnline"] is True for state in found.values())
    except (PreflightError, ValueError, AttributeError, TypeError, KeyError):
        return None
    if not online:
        return None
    return (
        f"{online} users of this run or more were online before it began: another run, or another client, has them, "
        "and what is told of them is not this run's doing."
    )


def _get(instance: Instance, token: str) -> tuple[int, bytes]:
    return _ask(instance, token, f"/check/{USER}")


def _ask(instance: Instance, token: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    parts = urlsplit(instance.http)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=ANSWER)
    headers = {"Authorization": f"Bearer {token}"} | ({"Content-Type": "application/json"} if body else {})
    try:
        connection.request("POST" if body else "GET", f"{parts.path}/api/presence{path}", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_LONGEST)
    except (OSError, http.client.HTTPException) as error:
        raise PreflightError(f"{instance.http}: the target is down: {_reason(error)}") from error
    finally:
        connection.close()


def _open(instance: Instance, token: str) -> None:
    """Open a WebSocket and close it: no CONNECT, so that nobody goes online."""
    request = (
        f"GET {instance.path} HTTP/1.1\r\nHost: {instance.host}:{instance.port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: bG9hZHRlc3QgcHJlZmxpZw==\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: v12.stomp\r\nAuthorization: Bearer {token}\r\n\r\n"
    )
    where = f"ws://{instance.host}:{instance.port}{instance.path}"
    try:
        with socket.create_connection((instance.host, instance.port), timeout=ANSWER) as sock:
            sock.sendall(request.encode())
            line = sock.makefile("rb").readline(1024).decode("latin-1").strip()
    except OSError as error:
        raise PreflightError(f"{where}: the target is down: {_reason(error)}") from error
    if not re.match(r"HTTP/1\.1 101\b", line):
        raise PreflightError(f"{where}: no WebSocket: the upgrade was answered {line or 'with nothing'!r}")


def _detail(body: bytes) -> str:
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return ""
    return f": {detail}" if isinstance(detail, str) else ""


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER:g} s"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _processes(count: int) -> str:
    return f"{count} processes" if count > 1 else "one process"
