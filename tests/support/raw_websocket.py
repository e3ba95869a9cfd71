"""RFC 6455 by hand: for what a WebSocket library hides, such as pings, and for what it would never send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Mapping
from typing import NamedTuple, Self
from urllib.parse import urlsplit

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WsFrame(NamedTuple):
    """One frame: opcode, payload, and the bits FIN and RSV1 to RSV3 of its first byte."""

    opcode: int
    payload: bytes
    flags: int = 8

    @property
    def close_code(self) -> int:
        """The code of a close frame."""
        assert self.opcode == CLOSE, self
        return int(struct.unpack("!H", self.payload[:2])[0])


def ws_frame(opcode: int, payload: bytes = b"", *, flags: int = 8, masked: bool = True) -> bytes:
    """The bytes of a frame from a client. The mask is zeros, so that the payload can be read as it is."""
    size = len(payload)
    length = bytes([size]) if size < 126 else struct.pack("!BH", 126, size) if size < 65536 else b""
    length = length or struct.pack("!BQ", 127, size)
    if masked:
        length = bytes([length[0] | 0x80]) + length[1:] + bytes(4)
    return bytes([flags << 4 | opcode]) + length + payload


class RawWebSocket:
    """A TCP connection with an upgrade. It answers nothing by itself: no pong, no close."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        """Of the answer to the upgrade; names in lower case."""

    @classmethod
    async def connect(
        cls, url: str, headers: Mapping[str, str | None] | None = None, *, receive_buffer: int | None = None
    ) -> Self:
        """Connect and ask for the upgrade; whether it was granted tells ``status``, 101.

        Args:
            url: ``ws://host:port/path``.
            headers: further ones; they win, None leaves one out.
            receive_buffer: the most that the system takes in for us, in bytes.
        """
        parts = urlsplit(url)
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        self = cls(*await asyncio.open_connection(sock=sock, limit=2**16 if receive_buffer is None else receive_buffer))
        given = {
            "Host": parts.netloc,
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        } | dict(headers or {})
        lines = [f"{name}: {value}\r\n" for name, value in given.items() if value is not None]
        self.writer.write(f"GET {parts.path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode())
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).decode().split("\r\n")
        self.status = int(head[0].split()[1])
        self.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        return self

    def write(self, opcode: int, payload: bytes = b"", *, flags: int = 8, masked: bool = True) -> None:
        """Send one frame, without waiting for anything."""
        self.writer.write(ws_frame(opcode, payload, flags=flags, masked=masked))

    async def frame(self, timeout: float = 5.0) -> WsFrame:
        """Wait for the next frame of any kind.

        Raises:
            asyncio.IncompleteReadError: the connection has ended.
            ConnectionResetError: likewise, with a reset.
        """
        async with asyncio.timeout(timeout):
            first, second = await self.reader.readexactly(2)
            size = second & 0x7F
            if size > 125:
                extended = await self.reader.readexactly(2 if size == 126 else 8)
                size = int.from_bytes(extended, "big")
            return WsFrame(first & 0x0F, await self.reader.readexactly(size), first >> 4)

    async def ended(self, timeout: float = 5.0) -> None:
        """Wait for the end of the TCP connection; whatever comes before it is read and dropped."""
        async with asyncio.timeout(timeout):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(2**16):
                    pass

    def abort(self) -> None:
        """Drop the TCP connection."""
        self.writer.transport.abort()
