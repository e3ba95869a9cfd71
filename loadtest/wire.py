"""The client's side of a WebSocket that carries STOMP: bytes to frames and back. No I/O, no clock."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha1
from os import urandom
from sys import intern
from typing import NamedTuple

from presence.stomp.errors import StompError
from presence.stomp.frames import Frame, Limits, Parser, encode

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
"""Opcodes of WebSocket frames (RFC 6455, 5.2)."""

FIXED_KEY = b"\x5a\xa5\x3c\xc3"
"""The masking key where none is to be made: not 0, which a server might treat as a case of its own."""

_LARGEST = 1 << 24  # octets of a WebSocket frame: more is not read but taken for an error
_LARGEST_HEAD = 1 << 16  # octets of the answer to the upgrade
_SERVER_LIMITS = Limits(frame_bytes=1 << 20, header_lines=256)  # what a server may send: our own limits are a client's
_NO_CODE = b"\x03\xed"  # 1005: the close frame held no code


class Refused(Exception):
    """The server answered the upgrade with something else than a WebSocket."""


class WireError(Exception):
    """The server broke WebSocket's or STOMP's grammar: nothing after this can be read."""


class Control(NamedTuple):
    """A control frame of the server: `CLOSE`, `PING` or `PONG`."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> str:
        """The close code, in digits; ``1005`` where the frame has none."""
        return str(int.from_bytes(self.payload[:2] or _NO_CODE, "big"))


def new_key() -> bytes:
    """Return a fresh ``Sec-WebSocket-Key``: 24 octets of base64."""
    return b64encode(urandom(16))


def accept_of(key: bytes) -> bytes:
    """Return the ``Sec-WebSocket-Accept`` that belongs to ``key``."""
    return b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest())


def upgrade_request(host: str, path: str, key: bytes, headers: Mapping[str, str]) -> bytes:
    """Return the HTTP request that asks for a WebSocket.

    Args:
        host: Host and port, as in the ``Host`` header.
        path: The request's target, such as ``/ws``.
        key: From `new_key`.
        headers: Further headers; one that is named here replaces ours, whatever its case.
    """
    lines = {
        "host": f"Host: {host}",
        "upgrade": "Upgrade: websocket",
        "connection": "Connection: Upgrade",
        "sec-websocket-version": "Sec-WebSocket-Version: 13",
        "sec-websocket-key": f"Sec-WebSocket-Key: {key.decode()}",
        "sec-websocket-protocol": "Sec-WebSocket-Protocol: v12.stomp",
    }
    lines |= {name.lower(): f"{name}: {value}" for name, value in headers.items()}
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines.values(), "", ""]).encode()


def frame(payload: bytes, key: bytes, opcode: int = TEXT) -> bytes:
    """Return ``payload`` in one masked WebSocket frame.

    Args:
        payload: Any octets; control frames hold at most 125.
        key: The masking key, 4 octets.
        opcode: `TEXT`, `CLOSE`, …
    """
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 1 << 16:
        head = bytes((0x80 | opcode, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0xFF)) + size.to_bytes(8, "big")
    # One XOR of two long integers: ten times faster than octet by octet.
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return head + key + (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")


def stomp(command: str, headers: Mapping[str, str], body: str = "") -> bytes:
    """Return a STOMP 1.2 frame."""
    return encode(command, headers, body.encode(), version="1.2")


class Reader:
    """What a server sends: first the answer to the upgrade, then STOMP frames and WebSocket's control frames."""

    __slots__ = ("_accept", "_parser", "_rest")

    def __init__(self, key: bytes) -> None:
        """Begin.

        Args:
            key: The ``Sec-WebSocket-Key`` that was sent.
        """
        self._accept: bytes | None = accept_of(key)
        self._rest = b""  # of a frame that is not whole yet
        self._parser = Parser(_SERVER_LIMITS)

    @property
    def upgraded(self) -> bool:
        """Whether the server has accepted the upgrade."""
        return self._accept is None

    def feed(self, data: bytes) -> list[Frame | Control]:
        """Take in what was received and return the frames that are whole now, in order.

        A STOMP frame may be spread over several WebSocket messages, and a message may hold several frames: to STOMP
        the messages are one stream.

        Raises:
            Refused: The answer to the upgrade is no 101, or the wrong one.
            WireError: Bad grammar.
        """
        if self._rest:
            data = self._rest + data
        start, size = 0, len(data)
        if self._accept is not None:
            start = self._read_answer(data, self._accept)
        found: list[Frame | Control] = []
        while self._accept is None and size - start >= 2:
            first, length = data[start], data[start + 1]
            if first & 0x70 or length & 0x80:
                raise WireError("a WebSocket frame with reserved bits, or masked by the server")
            at = start + 2
            if length > 125:
                at += 2 if length == 126 else 8
                if at > size:
                    break
                length = int.from_bytes(data[start + 2 : at], "big")
                if length > _LARGEST:
                    raise WireError(f"a WebSocket frame of {length} bytes")
            if at + length > size:
                break
            start = at + length
            if first & 0x0F < CLOSE:
                self._read_stomp(data[at:start], found)
            else:
                found.append(Control(first & 0x0F, data[at:start]))
        self._rest = data[start:]
        return found

    def _read_answer(self, data: bytes, accept: bytes) -> int:
        """Return how many octets the answer to the upgrade takes; 0 while it is not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _LARGEST_HEAD:
                raise Refused("the answer to the upgrade has no end")
            return 0
        status, *lines = data[:end].decode("latin-1").split("\r\n")
        if not status.startswith("HTTP/1.1 101"):
            raise Refused(status.removeprefix("HTTP/1.1 ")[:128])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("sec-websocket-accept") != accept.decode():
            raise Refused("101 with a wrong Sec-WebSocket-Accept")
        self._accept = None
        return end + 4

    def _read_stomp(self, payload: bytes, found: list[Frame | Control]) -> None:
        parser = self._parser
        parser.feed(payload)
        try:
            while (one := parser.next_frame()) is not None:
                if one.command == "CONNECTED":
                    # What follows is escaped as the agreed version has it; a server of 1.0 names none.
                    parser.version = intern(one.headers.get("version", "1.0"))  # the same for thousands
                found.append(one)
        except (StompError, KeyError) as error:  # KeyError: a version there is not
            raise WireError(f"STOMP: {error}") from None
