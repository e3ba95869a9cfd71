"""Single clients that wait for each answer, for what is measured closely: beside the crowd, and in small numbers.

`ProbeUser` is an ordinary Locust user: `-u 21` gives the crowd of one process 20 of them.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import gevent  # type: ignore[import-untyped]
from locust import User, task
from locust.env import Environment

from loadtest import target, wire
from loadtest.metrics import Metrics
from loadtest.recording import Recording
from loadtest.target import Instance
from presence.stomp.frames import Frame

LIMIT = 10.0
"""Seconds for any answer."""
_numbers = itertools.count()  # of the probes of this process


class ProbeError(Exception):
    """What was to come has not come; one line."""


def is_online(answer: Any) -> bool:
    """The state in REST's answer about one user.

    Raises:
        ProbeError: there is none in it.
    """
    online = answer.get("isOnline") if isinstance(answer, dict) else None
    if not isinstance(online, bool):
        raise ProbeError("an answer of the wrong shape")
    return online


class StompClient:
    """One STOMP session over a blocking socket. Use it as a context manager: with the context the socket is closed."""

    def __init__(self, instance: Instance, *, limit: float = LIMIT) -> None:
        self._instance = instance
        self._limit = limit
        self._socket: socket.socket | None = None
        self._frames: list[Frame] = []
        self._reader = wire.Reader(b"")
        self.closed: str | None = None
        """The close code, in digits, once the server has closed."""

    def upgrade(self, headers: Mapping[str, str] = {}) -> None:
        """Opens the WebSocket."""
        key = wire.new_key()
        self._reader = wire.Reader(key)
        address = self._instance.host, self._instance.port
        self._socket = socket.create_connection(address, timeout=self._limit)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(wire.upgrade_request(f"{address[0]}:{address[1]}", self._instance.path, key, headers))
        self._read_until(lambda: self._reader.upgraded, "the answer to the upgrade")

    def connect(self, token: str) -> Frame:
        """Begins the session; returns CONNECTED."""
        headers = {"accept-version": "1.2", "host": self._instance.host, "heart-beat": "0,0"}
        self.send("CONNECT", headers | {"Authorization": f"Bearer {token}"})
        return self.expect("CONNECTED")

    def send(self, command: str, headers: Mapping[str, str], body: str = "") -> None:
        """Sends a frame."""
        self.send_text(wire.stomp(command, headers, body))

    def send_text(self, payload: bytes) -> None:
        """Sends a WebSocket text message of any content."""
        self.write(wire.frame(payload, random.randbytes(4)))

    def write(self, data: bytes) -> None:
        """Puts octets on the connection as they are."""
        assert self._socket is not None
        self._socket.sendall(data)

    def watch(self, *users: str) -> None:
        """Watches, and returns when the receipt has come; the snapshots are passed over."""
        self.send("SUBSCRIBE", {"id": "0", "destination": "/user/queue/online-status"})
        headers = {"destination": "/app/presence.subscribe", "content-type": "application/json", "receipt": "w"}
        self.send("SEND", headers, json.dumps({"userIds": users}))
        self.expect("RECEIPT")

    def expect(self, command: str, accept: Callable[[Frame], bool] = lambda _: True) -> Frame:
        """The next frame of this command that is acceptable; others are passed over.

        Raises:
            ProbeError: an ERROR came instead, the server closed, or nothing came in time.
        """
        found: list[Frame] = []

        def came() -> bool:
            while self._frames and not found:
                frame = self._frames.pop(0)
                if frame.command == command and accept(frame):
                    found.append(frame)
                elif frame.command == "ERROR":
                    raise ProbeError(f"ERROR instead of {command}: {frame.headers.get('message', '')}")
            return bool(found)

        self._read_until(came, command)
        return found[0]

    def expect_change(self, user: str, online: bool) -> None:
        """Waits for the notice that the user has changed to this state."""

        def is_it(frame: Frame) -> bool:
            notice = json.loads(frame.body)
            return notice["userId"] == user and notice["online"] is online and "snapshot" not in notice

        self.expect("MESSAGE", is_it)

    def expect_end(self) -> str:
        """Reads until the server has closed; returns the close code, or `none` when there was no close frame."""
        with suppress(ConnectionResetError):
            self._read_until(lambda: self.closed is not None, "the close")
        return self.closed or "none"

    def disconnect(self) -> None:
        """Ends the session, and waits for the receipt."""
        self.send("DISCONNECT", {"receipt": "d"})
        self.expect("RECEIPT", lambda frame: frame.headers.get("receipt-id") == "d")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def _read_until(self, condition: Callable[[], bool], what: str) -> None:
        assert self._socket is not None
        end = time.monotonic() + self._limit
        while not condition():
            rest = end - time.monotonic()
            if rest <= 0:
                raise ProbeError(f"{what} has not come within {self._limit:g} s")
            self._socket.settimeout(rest)
            try:
                data = self._socket.recv(65_536)
            except TimeoutError:
                continue
            if not data:
                self.closed = self.closed or "none"
                if condition():
                    return
                raise ProbeError(f"closed before {what}")
            for one in self._reader.feed(data):
                if isinstance(one, Frame):
                    self._frames.append(one)
                elif one.opcode == wire.PING:
                    self.write(wire.frame(one.payload, random.randbytes(4), wire.PONG))
                elif one.opcode == wire.CLOSE:
                    self.closed = one.code


class RestClient:
    """REST over one connection that is kept."""

    def __init__(self, instance: Instance, *, limit: float = LIMIT) -> None:
        self._base = urlsplit(instance.http)
        self._limit = limit
        self._connection: http.client.HTTPConnection | None = None
        self.sent = 0
        """Requests that went out, whatever was answered."""

    def request(self, method: str, path: str, token: str, body: object = None) -> Any:
        """The JSON of the answer.

        Raises:
            ProbeError: the answer's status is not 200.
            OSError, http.client.HTTPException: there was no answer.
        """
        if self._connection is None:
            assert self._base.hostname is not None
            self._connection = http.client.HTTPConnection(self._base.hostname, self._base.port, timeout=self._limit)
        headers = {"Authorization": f"Bearer {token}"} | ({"Content-Type": "application/json"} if body else {})
        try:
            text = None if body is None else json.dumps(body)
            self._connection.request(method, self._base.path + path, text, headers)
            self.sent += 1
            answer = self._connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        if answer.status != 200:
            raise ProbeError(f"{method} {path.rpartition('/')[0]}: {answer.status}")
        return json.loads(said)

    def close(self) -> None:
        """Closes the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ProbeUser(User):
    """Watches another user come and go: time to CONNECTED, to the receipt, to the notices, and to REST's answer."""

    every: ClassVar[float] = 5.0
    """Seconds between the beginnings of two visits."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        recording = Recording.of(environment)
        self._metrics: Metrics = recording.metrics
        options: Any = environment.parsed_options
        self._target = target.load(options.target or None, host=environment.host or None)
        index = getattr(environment.runner, "worker_index", 0)
        self._name = f"load-probe-{index}-{next(_numbers)}"
        self._due = time.monotonic() + random.uniform(0.0, self.every)

    @task
    def visit(self) -> None:
        """One visit, from its intended moment on; one that begins late counts from there as well."""
        gevent.sleep(max(0.0, self._due - time.monotonic()))
        due, self._due = self._due, self._due + self.every
        watcher, guest = f"{self._name}-watcher", f"{self._name}-guest"
        instances = self._target.instances
        # The notice crosses from one instance to the other, where there are several.
        with StompClient(instances[0]) as here, StompClient(instances[-1]) as there:
            done = self._connected(here, watcher, due)
            done = done and self._timed("STOMP watch", lambda: here.watch(guest))
            if not done:
                return
            came = time.monotonic()
            if not self._connected(there, guest, came):
                return
            self._timed("PUSH online", lambda: here.expect_change(guest, True), came)
            self._timed("REST check", lambda: self._check(guest))
            went = time.monotonic()
            self._timed("STOMP DISCONNECT", there.disconnect, went)
            self._timed("PUSH offline", lambda: here.expect_change(guest, False), went)
            self._timed("STOMP DISCONNECT", here.disconnect)

    def _connected(self, client: StompClient, user: str, due: float) -> bool:
        return self._timed("WS connect", client.upgrade, due) and self._timed(
            "STOMP CONNECTED", lambda: client.connect(self._target.token(user)), due
        )

    def _check(self, user: str) -> None:
        rest = RestClient(self._target.instances[0])
        try:
            answer = rest.request("GET", f"/api/presence/check/{user}", self._target.token(user))
        finally:
            rest.close()
        if not is_online(answer):
            raise ProbeError("REST says offline of one who is online")

    def _timed(self, name: str, call: Callable[[], object], since: float | None = None) -> bool:
        return timed(self._metrics, name, call, since)


def timed(metrics: Metrics, name: str, call: Callable[[], object], since: float | None = None) -> bool:
    """Calls, and records how long after `since` it was done, or its failure; returns whether it was done."""
    since = time.monotonic() if since is None else since
    try:
        call()
    except (ProbeError, OSError, http.client.HTTPException, wire.Refused, wire.WireError, ValueError) as error:
        metrics.failed(name, error, time.monotonic() - since)
        return False
    metrics.record(name, time.monotonic() - since)
    return True
