"""A client as cheap as Python allows, so that a core has room for thousands."""

from __future__ import annotations

import asyncio
import json
from asyncio import Future
from collections.abc import Callable, Iterable
from time import perf_counter

HEARTBEAT = b"SEND\ndestination:/app/heartbeat\n\n\0"


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return a WebSocket frame of a client. The masking key is 0, so that the payload is sent as it is."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65_536:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def send(destination: str, body: object = None, receipt: str = "") -> bytes:
    """Return a SEND frame in its WebSocket frame."""
    text = "" if body is None else json.dumps(body)
    asked = f"receipt:{receipt}\n" if receipt else ""
    return frame(f"SEND\ndestination:{destination}\n{asked}\n{text}\0".encode())


class Socket(asyncio.Protocol):
    """One WebSocket. ``on_message`` gets each message, and when its last byte came in (`perf_counter`)."""

    __slots__ = ("_buffer", "_opened", "_request", "closed", "messages", "on_message", "transport")

    def __init__(self, port: int) -> None:
        self.transport: asyncio.Transport = None  # type: ignore[assignment] # until it is connected
        self.messages = 0
        self.on_message: Callable[[bytes, float], None] | None = None
        self.closed: Future[None] = asyncio.get_running_loop().create_future()
        self._opened: Future[None] | None = asyncio.get_running_loop().create_future()
        self._buffer = b""
        self._request = (
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            "Sec-WebSocket-Protocol: v12.stomp\r\n\r\n"
        ).encode()

    @classmethod
    async def open(cls, port: int) -> Socket:
        """Connect and upgrade."""
        _, self = await asyncio.get_running_loop().create_connection(lambda: cls(port), "127.0.0.1", port)
        assert self._opened is not None
        async with asyncio.timeout(30):
            await self._opened
        return self

    @classmethod
    async def connect(cls, port: int, token: str) -> Socket:
        """Connect a STOMP session."""
        self = await cls.open(port)
        connect = f"CONNECT\naccept-version:1.2\nhost:localhost\nAuthorization:Bearer {token}\n\n\0"
        answer = await self.ask(frame(connect.encode()))
        assert answer.startswith(b"CONNECTED"), answer
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        data = self._buffer + data if self._buffer else data
        if self._opened is not None:
            head, blank, data = data.partition(b"\r\n\r\n")
            if not blank:
                self._buffer = head
                return
            assert head.startswith(b"HTTP/1.1 101 "), head
            self._opened.set_result(None)
            self._opened = None
        while len(data) >= 2:
            size, start = data[1], 2
            if size > 125:
                start = 4 if size == 126 else 10
                size = int.from_bytes(data[2:start], "big")
            if len(data) < start + size:
                break
            if data[0] & 0x0F == 8:
                return self.transport.close()
            if data[0] & 0x0F < 3:
                self.messages += 1
                if self.on_message is not None:
                    self.on_message(data[start : start + size], now)
            data = data[start + size :]
        self._buffer = data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def write(self, data: bytes) -> None:
        """Send a frame."""
        self.transport.write(data)

    async def ask(self, data: bytes) -> bytes:
        """Send a frame, and wait for the next message."""
        answer: Future[bytes] = asyncio.get_running_loop().create_future()

        def take(message: bytes, now: float) -> None:
            if not answer.done():
                answer.set_result(message)

        self.on_message = take
        self.write(data)
        async with asyncio.timeout(30):
            message = await answer
        self.on_message = None
        return message

    def subscribe(self) -> None:
        """Subscribe to the queue."""
        self.write(frame(b"SUBSCRIBE\nid:0\ndestination:/user/queue/online-status\n\n\0"))

    async def watch(self, users: Iterable[str]) -> None:
        """Watch these users; their snapshots have begun to come when this returns."""
        await self.ask(send("/app/presence.subscribe", {"userIds": list(users)}))

    def abort(self) -> None:
        """Drop the connection."""
        self.transport.abort()
