"""Thousands of STOMP sessions on one gevent hub, without a greenlet for each.

The sockets are in an epoll set of our own, and the hub watches that one: a session costs no watcher, and a beat no more
than in a plain epoll loop.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import socket as constants
from _socket import socket as Socket  # noqa: N812 # gevent replaces socket.socket, never this one
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from os import strerror, urandom
from select import EPOLLIN, EPOLLOUT
from time import monotonic
from typing import Any, Final

import gevent  # type: ignore[import-untyped]
from gevent import monkey

from loadtest import wire
from loadtest.connection import Connection, Handler, Opening, reason_of

__all__ = ["PORTS_PER_SOURCE", "Connection", "Engine", "Handler", "Timer", "freeze_heap", "sources_for"]

PORTS_PER_SOURCE: Final = 12_000
"""Connections from one source address to one destination, before Linux takes long to find a free port."""

_AT_ONCE = 64  # events handled before timers, and the hub's other work, get their turn
_STRETCH = 0.002  # seconds for which timers are called, likewise
_NO_PORT = 24  # IP_BIND_ADDRESS_NO_PORT: the port is chosen at connect, and so need only be unique per destination

log = logging.getLogger(__name__)


def sources_for(connections: int) -> list[str]:
    """Return as many loopback addresses as this many connections to one destination need."""
    count = -(-connections // PORTS_PER_SOURCE)
    return ["127.0.0.1"] if count <= 1 else [f"127.0.{1 + n // 250}.{1 + n % 250}" for n in range(count)]


def freeze_heap() -> None:
    """Take what is alive out of the garbage collector's sight, and give back what is not: for after a ramp.

    A full collection over 15,000 sessions stops everything for some 100 ms; the harness would measure itself. And the
    ramp's tables, as they grew, leave 0.6 KiB of each session's 2 unused, which the C library keeps unless it is told.
    """
    gc.collect()
    gc.freeze()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)


class Timer:
    """A call that is due; made by `Engine.at`."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., None], args: tuple[object, ...]) -> None:
        self.call: Callable[..., None] | None = call
        self.args = args

    def cancel(self) -> None:
        """Do not call; after the call this does nothing."""
        self.call, self.args = None, ()


class Engine:
    """The sessions of one process."""

    def __init__(self, *, sources: Sequence[str] = ("127.0.0.1",), fresh_masks: bool = True) -> None:
        """Begin on the hub of this thread.

        Args:
            sources: Addresses to connect from, in turn; those of the loopback are left out for a server elsewhere.
            fresh_masks: Whether every WebSocket frame has a masking key of its own, as real clients' have.
        """
        self.fresh_masks = fresh_masks
        self.errors = 0
        """Calls of the owner that raised: each is logged, and a run with any is not to be believed."""
        self.epoll = monkey.get_original("select", "epoll")()
        self.lag = array("d")
        """Seconds from when each timer was due to when it was called."""
        self._sources = sources
        self._dialled: Counter[tuple[str, int]] = Counter()  # connections, by where to
        self._connections: dict[int, Connection] = {}
        self._due: list[tuple[float, int, Timer]] = []
        self._made = 0
        self._loop = gevent.get_hub().loop
        self._alarm: Any = None
        self._alarm_at = float("inf")
        self._watcher = self._loop.io(self.epoll.fileno(), 1)
        self._watcher.start(self._on_ready)

    def __len__(self) -> int:
        """How many sockets are open."""
        return len(self._connections)

    def now(self) -> float:
        """Return the time of everything here (`time.monotonic`, s)."""
        return monotonic()

    def connect(
        self,
        address: tuple[str, int],
        path: str,
        handler: Handler,
        *,
        token: str | Callable[[], str],
        upgrade: Mapping[str, str] = {},
        connect: Mapping[str, str] = {},
    ) -> Connection:
        """Begin a session; the handler hears what becomes of it, never before this has returned.

        There is no time limit: the owner drops what takes too long.

        Args:
            address: A literal address (a name would be looked up, which blocks) and a port.
            path: Of the WebSocket.
            handler: What is told; may be exchanged later.
            token: For the ``Authorization`` header of CONNECT, or what makes it then; "" for none.
            upgrade: Further headers of the upgrade.
            connect: Further headers of CONNECT, or others in place of ours.
        """
        opening = Opening(address, path, token, upgrade, connect)
        socket: Socket | None = None
        try:
            socket = Socket(constants.AF_INET6 if ":" in address[0] else constants.AF_INET, constants.SOCK_STREAM)
            self._start(socket, address)
        except OSError as error:
            if socket is not None:
                socket.close()
            conn = Connection(self, handler, None, opening)
            self._loop.run_callback(self._guard, conn.end, reason_of(error.errno), monotonic())
            return conn
        conn = Connection(self, handler, socket, opening)
        self._connections[conn.fd] = conn
        self.epoll.register(conn.fd, EPOLLIN | EPOLLOUT)
        return conn

    def _start(self, socket: Socket, address: tuple[str, int]) -> None:
        socket.setblocking(False)
        socket.setsockopt(constants.IPPROTO_TCP, constants.TCP_NODELAY, 1)
        # In turn for each destination: were it for all together, some pairs might never come.
        source = self._sources[self._dialled[address] % len(self._sources)] if self._sources else ""
        self._dialled[address] += 1
        if source and ":" not in address[0] and (address[0].startswith("127.") or not source.startswith("127.")):
            socket.setsockopt(constants.IPPROTO_IP, _NO_PORT, 1)
            socket.bind((source, 0))
        failed = socket.connect_ex(address)
        if failed not in (0, errno.EINPROGRESS):
            raise OSError(failed, strerror(failed))

    def at(self, when: float, call: Callable[..., None], *args: object) -> Timer:
        """Call, at ``when`` (`time.monotonic`, s) or as soon after as can be."""
        timer = Timer(call, args)
        self._made += 1
        heappush(self._due, (when, self._made, timer))
        if when < self._alarm_at:
            self._set_alarm(when)
        return timer

    def take_lag(self) -> array[float]:
        """Return the lags since the last call, in seconds."""
        lag, self.lag = self.lag, array("d")
        return lag

    def prepare(self, command: str, headers: Mapping[str, str], body: str = "") -> bytes:
        """Return a frame for `Connection.send_prepared`, on any connection of this engine."""
        payload = wire.stomp(command, headers, body)
        return payload if self.fresh_masks else self.framed(payload)

    def framed(self, payload: bytes, opcode: int = wire.TEXT) -> bytes:
        """Return a WebSocket frame, masked as was set."""
        return wire.frame(payload, urandom(4) if self.fresh_masks else wire.FIXED_KEY, opcode)

    def close(self) -> None:
        """Drop all connections and timers, at once; nobody is told."""
        for conn in list(self._connections.values()):
            conn.drop(reset=not conn.is_closing)  # what was said last shall still arrive
        self._due.clear()
        self._set_alarm(float("inf"))
        self._watcher.close()
        self.epoll.close()

    def forget(self, fd: int) -> None:
        """Leave out a socket that is about to be closed (for its connection)."""
        del self._connections[fd]

    def _on_ready(self) -> None:
        for fd, event in self.epoll.poll(0, _AT_ONCE):
            # A call of the owner may have closed this one. Another may even have its number since: an event that was
            # not meant for it finds nothing to do.
            conn = self._connections.get(fd)
            if conn is not None:
                self._guard(conn.on_event, event)

    def _on_alarm(self) -> None:
        due = self._due
        self._alarm_at = float("-inf")  # a timer made meanwhile does not set the alarm: that is done below
        until = (now := monotonic()) + _STRETCH
        while due and due[0][0] <= now < until:
            when, _, timer = heappop(due)
            if timer.call is not None:
                self.lag.append(now - when)
                self._guard(timer.call, *timer.args)
                now = monotonic()
        self._set_alarm(due[0][0] if due else float("inf"))

    def _set_alarm(self, when: float) -> None:
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None
        self._alarm_at = when
        if when < float("inf"):
            self._alarm = self._loop.timer(max(0.0, when - monotonic()))
            self._alarm.start(self._on_alarm, update=True)

    def _guard(self, call: Callable[..., None], *args: object) -> None:
        """Call, and keep what it raises from the others."""
        try:
            call(*args)
        except Exception:
            self.errors += 1
            log.exception("%s raised", call)
