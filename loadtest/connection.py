"""One session of a crowd: a raw socket, and what is read from and written to it."""

from __future__ import annotations

import errno
import socket as constants
from _socket import socket as Socket  # noqa: N812 # gevent replaces socket.socket, never this one
from collections.abc import Callable, Mapping
from os import strerror
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loadtest import wire

if TYPE_CHECKING:
    from loadtest.engine import Engine

_RECEIVE = 32_768  # octets of one read
_CLOSE_SECONDS = 5.0  # how long a server may take to answer a close
_LINGER_RESET = bytes((1, 0, 0, 0, 0, 0, 0, 0))  # struct linger: on, 0 s
_READ, _WRITE = EPOLLIN, EPOLLIN | EPOLLOUT
_CONNECTING, _UPGRADING, _GREETING, _OPEN, _CLOSING, _CLOSED = range(6)
_REASONS = {
    errno.EADDRNOTAVAIL: "no free port: more source addresses are needed (EADDRNOTAVAIL)",
    errno.EMFILE: "too many open files in this process: raise nofile (EMFILE)",
    errno.ENFILE: "too many open files on this machine (ENFILE)",
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "reset",
}


def reason_of(number: int | None) -> str:
    """Return what an errno means to who runs the test."""
    return _REASONS.get(number or 0) or strerror(number or 0).lower()


class Opening(NamedTuple):
    """What a session is opened with. Each part of it is made when it is sent: thousands may be waiting for that."""

    address: tuple[str, int]
    path: str
    token: str | Callable[[], str]
    upgrade: Mapping[str, str]
    connect: Mapping[str, str]

    def request(self, key: bytes) -> bytes:
        """Return the HTTP request, with a ``Sec-WebSocket-Key``."""
        return wire.upgrade_request(f"{self.address[0]}:{self.address[1]}", self.path, key, self.upgrade)

    def hello(self) -> bytes:
        """Return the CONNECT frame."""
        token = self.token if isinstance(self.token, str) else self.token()
        authorized = {"Authorization": f"Bearer {token}"} if token else {}
        headers = {"accept-version": "1.2", "host": self.address[0], "heart-beat": "0,0", **authorized, **self.connect}
        return wire.stomp("CONNECT", headers)


class Handler(Protocol):
    """What a connection tells its owner. Called in the hub: must neither block nor switch.

    ``at`` is when it was read (`time.monotonic`, s). A connection ends with exactly one of `on_refused` (before
    CONNECTED) and `on_closed` (after), or with neither if the owner closed or dropped it.
    """

    def on_connected(self, conn: Connection, at: float) -> None:
        """CONNECTED was read."""

    def on_message(self, conn: Connection, headers: Mapping[str, str], body: str, at: float) -> None:
        """A MESSAGE was read."""

    def on_receipt(self, conn: Connection, receipt_id: str, at: float) -> None:
        """A RECEIPT was read."""

    def on_error(self, conn: Connection, message: str, at: float) -> None:
        """An ERROR was read after CONNECTED; `on_closed` will follow."""

    def on_closed(self, conn: Connection, code_or_reason: str, at: float) -> None:
        """The server closed, or the connection was lost.

        ``code_or_reason`` is the close code in digits, or ``no close frame``, ``reset`` or what else went wrong.
        """

    def on_refused(self, conn: Connection, reason: str, at: float) -> None:
        """No session came about: no port, no connection, no upgrade, or an ERROR (``ERROR: its message``)."""


class Connection:
    """One session; made by `Engine.connect`. Whatever is sent when it is not open, or frozen, is not sent."""

    __slots__ = (
        "_engine", "_frozen", "_opening", "_out", "_reader", "_socket", "_stage", "fd", "handler", "owner", "state",
        "upgraded_at",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        handler: Handler,
        socket: Socket | None,
        opening: Opening,
    ) -> None:
        """Begin with a socket that connects.

        Args:
            engine: What it belongs to.
            handler: What is told.
            socket: None if there is none to be had: then `end` is called soon.
            opening: What is said first.
        """
        self.handler = handler
        self.owner: Any = None
        """Free for the owner."""
        self.state: Any = None
        """Free for the owner."""
        self.upgraded_at = 0.0
        """When the WebSocket was there (`time.monotonic`, s); 0.0 until then."""
        self._engine = engine
        self._socket = socket
        self.fd = socket.fileno() if socket else -1
        """Of the socket, while there is one (for the engine)."""
        self._stage = _CONNECTING
        self._frozen = False
        self._opening: Opening | None = opening
        self._out = b""  # what the socket did not take yet; epoll looks for room as long as there is something
        self._reader: wire.Reader | None = None

    @property
    def is_open(self) -> bool:
        """Whether CONNECTED came and nothing has ended the session since, as far as is known."""
        return self._stage == _OPEN

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called and the server has not answered yet."""
        return self._stage == _CLOSING

    def send(self, command: str, headers: Mapping[str, str], body: str = "") -> None:
        """Send a STOMP frame."""
        self.send_text(wire.stomp(command, headers, body))

    def send_text(self, payload: bytes) -> None:
        """Send a WebSocket text message of any content."""
        self.write(self._engine.framed(payload))

    def prepare(self, command: str, headers: Mapping[str, str], body: str = "") -> bytes:
        """Return a frame for `send_prepared`, on this and any other connection of the engine."""
        return self._engine.prepare(command, headers, body)

    def send_prepared(self, prepared: bytes) -> None:
        """Send a frame that `prepare` made."""
        self.write(self._engine.framed(prepared) if self._engine.fresh_masks else prepared)

    def write(self, data: bytes) -> None:
        """Put octets on the connection as they are."""
        if self._stage < _CLOSING and not self._frozen:
            self._write(data)

    def close(self) -> None:
        """Send DISCONNECT and a close frame; the server's answer is awaited for some seconds, but not by the owner."""
        if self._stage >= _CLOSING:
            return
        if self._stage < _GREETING:
            return self.drop()
        self.thaw()
        framed = self._engine.framed
        bye = framed(wire.stomp("DISCONNECT", {})) if self._stage == _OPEN else b""
        self._stage = _CLOSING
        # Not closed at once: the kernel would answer what is unread with a reset, which may overtake the DISCONNECT.
        self._write(bye + framed((1000).to_bytes(2, "big"), wire.CLOSE))
        self._engine.at(monotonic() + _CLOSE_SECONDS, self.drop)

    def drop(self, *, reset: bool = False) -> None:
        """Close the socket without a word.

        Args:
            reset: With a RST, which leaves no TIME_WAIT behind; else with a FIN (or a RST, where something is unread).
        """
        if self._stage == _CLOSED:
            return
        self._stage = _CLOSED
        self._reader, self._out, self._opening = None, b"", None
        if self._socket is not None:
            self._engine.forget(self.fd)
            if reset:
                self._socket.setsockopt(constants.SOL_SOCKET, constants.SO_LINGER, _LINGER_RESET)
            self._socket.close()  # and thereby out of epoll

    def freeze(self) -> None:
        """Read nothing until `thaw`, as a process that is stopped: not even that the server closed."""
        if not self._frozen and self._stage < _CLOSING and self._socket is not None:
            self._frozen = True
            self._engine.epoll.unregister(self.fd)

    def thaw(self) -> None:
        """Go on; what came in the meantime is read now."""
        if self._frozen and self._stage < _CLOSING:
            self._frozen = False
            self._engine.epoll.register(self.fd, _WRITE if self._out or self._stage == _CONNECTING else _READ)

    def _write(self, data: bytes) -> None:
        assert self._socket is not None
        if self._out:
            self._out += data
            return
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # epoll tells of it, and the end is told from there
        if sent < len(data):
            self._out = data[sent:]
            self._engine.epoll.modify(self.fd, _WRITE)

    def end(self, reason: str, at: float) -> None:
        """Drop the connection and tell its owner why (for the engine)."""
        stage = self._stage
        self.drop()
        if stage < _OPEN:
            self.handler.on_refused(self, reason, at)
        elif stage == _OPEN:
            self.handler.on_closed(self, reason, at)

    def on_event(self, event: int) -> None:
        """Do what epoll says can be done (for the engine)."""
        if self._socket is None or self._frozen:
            return
        if self._stage == _CONNECTING:
            failed = self._socket.getsockopt(constants.SOL_SOCKET, constants.SO_ERROR)
            if failed:
                return self.end(reason_of(failed), monotonic())
            self._ask()
        if event & EPOLLOUT:
            self._engine.epoll.modify(self.fd, _READ)
            data, self._out = self._out, b""
            self._write(data)
        if event & (EPOLLIN | EPOLLHUP | EPOLLERR):
            self._read()

    def _ask(self) -> None:
        assert self._opening is not None
        key = wire.new_key()
        self._stage, self._reader, self._out = _UPGRADING, wire.Reader(key), self._opening.request(key)

    def _read(self) -> None:
        assert self._socket is not None and self._reader is not None
        try:
            data = self._socket.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            return self.end(reason_of(error.errno), monotonic())
        at = monotonic()
        if not data:
            return self.end("no close frame", at)
        try:
            found = self._reader.feed(data)
        except (wire.Refused, wire.WireError) as error:
            return self.end(str(error), at)
        if self._stage == _UPGRADING and self._reader.upgraded:
            self._stage, self.upgraded_at = _GREETING, at
            assert self._opening is not None
            self.send_text(self._opening.hello())
            self._opening = None
        for one in found:
            if isinstance(one, wire.Control):
                self._on_control(one, at)
            elif self._stage < _CLOSING:
                self._on_frame(one.command, one.headers, one.body, at)
            if self._stage == _CLOSED:
                return

    def _on_frame(self, command: str, headers: Mapping[str, str], body: bytes, at: float) -> None:
        if command == "MESSAGE":
            self.handler.on_message(self, headers, body.decode(errors="replace"), at)
        elif command == "RECEIPT":
            self.handler.on_receipt(self, headers.get("receipt-id", ""), at)
        elif command == "CONNECTED" and self._stage == _GREETING:
            self._stage = _OPEN
            self.handler.on_connected(self, at)
        elif command == "ERROR" and self._stage == _OPEN:
            self.handler.on_error(self, headers.get("message", ""), at)
        else:
            self.end(f"{command}: {headers.get('message', '')}".removesuffix(": "), at)

    def _on_control(self, one: wire.Control, at: float) -> None:
        if one.opcode == wire.PING:
            self.write(self._engine.framed(one.payload, wire.PONG))
        elif one.opcode == wire.CLOSE:
            self.write(self._engine.framed(one.payload[:2], wire.CLOSE))
            self.end(one.code, at)
