"""A STOMP client for tests, with a codec of its own: it shares nothing with the server, so that no error hides in both.

It is strict where WIRE §6 binds the server: text messages only, one or more whole frames to a message, LF only, a beat
is a message of its own. Whatever breaks that fails the test that meets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

T = TypeVar("T")

QUEUE = "/user/queue/online-status"

_ESCAPES = {"1.0": {}, "1.1": {"\\": "\\\\", "\n": "\\n", ":": "\\c"}}
_ESCAPES["1.2"] = _ESCAPES["1.1"] | {"\r": "\\r"}


# Codec.


@dataclass(frozen=True)
class Frame:
    """One STOMP frame, and when it came (monotonic clock, s)."""

    command: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    at: float = field(default=0.0, compare=False)

    @cached_property
    def json(self) -> Any:
        """The body, which must be JSON; read once, as those who wait look at every frame again and again."""
        return json.loads(self.body)


def encode(frame: Frame, version: str = "1.2") -> str:
    """The frame as text. ``CONNECT`` and ``CONNECTED`` are not escaped (STOMP 1.2, "Value Encoding")."""
    table = {} if frame.command in ("CONNECT", "CONNECTED") else _ESCAPES[version]

    def escape(text: str) -> str:
        return "".join(table.get(character, character) for character in text)

    lines = [frame.command, *(f"{escape(name)}:{escape(value)}" for name, value in frame.headers.items())]
    return "\n".join([*lines, "", frame.body]) + "\0"


def decode(message: str, version: str = "1.2", at: float = 0.0) -> list[Frame]:
    """All frames of one message.

    Raises:
        ValueError: the message is not one or more whole frames without anything around them.
    """
    back = {escaped: character for character, escaped in _ESCAPES[version].items()}

    def unescape(text: str) -> str:
        return re.sub(r"\\.?", lambda match: back[match[0]], text) if back else text

    frames: list[Frame] = []
    rest = message.encode()
    try:
        while rest or not frames:
            head, _, rest = rest.partition(b"\n\n")
            command, *lines = head.decode().split("\n")
            if not re.fullmatch("[A-Z]+", command):
                raise ValueError(f"no command: {command!r}")
            pairs = [line.split(":", 1) for line in lines]
            if command != "CONNECTED":
                pairs = [[unescape(name), unescape(value)] for name, value in pairs]
            headers = dict(pair for pair in pairs)
            if len(headers) != len(pairs) or any("\r" in line for line in lines):
                raise ValueError("a repeated header, or a CR")
            size = int(headers["content-length"]) if "content-length" in headers else rest.index(b"\0")
            body, end, rest = rest[:size], rest[size : size + 1], rest[size + 1 :]
            if end != b"\0":
                raise ValueError("no NUL after the body")
            frames.append(Frame(command, headers, body.decode(), at))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{error}, in the message {message!r}") from error
    return frames


# Client.


class StompClient:
    """One connection. Make it with `connect`; everything that waits has a deadline.

    An ERROR frame or the end of the connection fails whatever waits for something else.
    """

    def __init__(self, ws: ClientConnection, *, sockjs: bool = False) -> None:
        self.ws = ws
        self.version = "1.2"
        """Whose escapes count: the one that the server chose, once it did."""
        self.connected: Frame | None = None
        self.frames: list[Frame] = []
        """All frames that came."""
        self.beats: list[float] = []
        """When the server's heart-beats came (monotonic clock, s)."""
        self.sockjs_frames: list[str] = []
        """What came around the STOMP frames: ``o``, ``h``, ``c[code,"reason"]``."""
        self.subscriptions: set[str] = set()
        self._sockjs = sockjs
        self._pending: list[Frame] = []
        self._broken: ValueError | None = None
        self._news = asyncio.Event()
        self._receipts = 0
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        url: str,
        token: str | None = None,
        *,
        version: str | None = "1.2",
        heart_beat: str | None = "0,0",
        command: str = "CONNECT",
        headers: Mapping[str, str | None] | None = None,
        handshake: bool = True,
        origin: str | None = None,
        subprotocols: Sequence[str] | None = ("v12.stomp",),
        user_agent: str | None = None,
        upgrade_headers: Mapping[str, str] | None = None,
        compression: str | None = None,
        sockjs: bool = False,
        timeout: float = 10.0,
    ) -> Self:
        """Connect, and unless ``handshake`` is False log in: CONNECT is sent and CONNECTED awaited.

        Args:
            url: ``ws://host:port/ws``.
            token: sent in the ``Authorization`` header of CONNECT.
            version: the ``accept-version``; None leaves the header out.
            heart_beat: None leaves the header out.
            command: ``CONNECT`` or ``STOMP``.
            headers: further headers of CONNECT; they win, None leaves one out.
            handshake: False leaves it to the test to send CONNECT.
            origin: of the upgrade; None sends none, as native clients do.
            subprotocols: offered; None offers none.
            user_agent: of the upgrade; None sends none.
            upgrade_headers: further headers of the upgrade.
            compression: ``deflate`` offers it.
            sockjs: the URL is one of a SockJS transport: unwrap what comes, wrap what goes.
            timeout: of the upgrade and of CONNECTED, each, in s.

        Raises:
            websockets.exceptions.InvalidStatus: the upgrade was refused; it has ``response.status_code``.
        """
        ws = await ws_connect(
            url,
            origin=None if origin is None else Origin(origin),
            subprotocols=None if subprotocols is None else [Subprotocol(name) for name in subprotocols],
            additional_headers=upgrade_headers,
            user_agent_header=user_agent,
            compression=compression,
            proxy=None,
            open_timeout=timeout,
            close_timeout=2,
            ping_interval=None,
            max_size=None,
            max_queue=None,
        )
        client = cls(ws, sockjs=sockjs)
        if handshake:
            try:
                await client.login(token, version, heart_beat, command, headers, timeout)
            except BaseException:
                await client.dispose()
                raise
        return client

    async def login(
        self,
        token: str | None,
        version: str | None = "1.2",
        heart_beat: str | None = "0,0",
        command: str = "CONNECT",
        headers: Mapping[str, str | None] | None = None,
        timeout: float = 10.0,
    ) -> Frame:
        """Send CONNECT and wait for CONNECTED; see `connect`."""
        all_headers = {
            "accept-version": version,
            "host": "localhost",
            "heart-beat": heart_beat,
            "Authorization": None if token is None else f"Bearer {token}",
        } | dict(headers or {})
        await self.send_frame(command, {name: value for name, value in all_headers.items() if value is not None})
        self.connected = await self.expect("CONNECTED", timeout)
        self.version = self.connected.headers["version"]
        return self.connected

    # Sending.

    async def raw(self, data: str | bytes) -> None:
        """Send ``data`` as one WebSocket message, text or binary."""
        await self.ws.send(data)

    async def send_frame(self, command: str, headers: Mapping[str, str] | None = None, body: str = "") -> None:
        """Send one frame, without waiting for anything."""
        text = encode(Frame(command, headers or {}, body), self.version)
        await self.raw(json.dumps([text]) if self._sockjs else text)

    async def receipt(
        self, command: str, headers: Mapping[str, str] | None = None, body: str = "", timeout: float = 5.0
    ) -> Frame:
        """Send a frame that asks for a receipt and wait for it. Other frames that come are kept."""
        name = self._next_receipt()
        await self.send_frame(command, {**(headers or {}), "receipt": name}, body)
        return await self._take_receipt(name, timeout)

    async def send(
        self, destination: str, body: object = None, headers: Mapping[str, str] | None = None, timeout: float = 5.0
    ) -> Frame:
        """SEND and wait for the receipt: it has taken effect. A ``body`` that is no string is sent as JSON."""
        text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
        return await self.receipt("SEND", {"destination": destination, **(headers or {})}, text, timeout)

    async def beat(self) -> None:
        """Renew the session's lease."""
        await self.send("/app/heartbeat")

    @contextlib.asynccontextmanager
    async def beating(self, every: float = 0.5) -> AsyncIterator[None]:
        """Renew the lease every so many seconds while the block runs."""

        async def go_on() -> None:
            while True:
                await self.send_frame("SEND", {"destination": "/app/heartbeat"})
                await asyncio.sleep(every)

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await task

    async def set_online(self, online: bool) -> None:
        """Say so on `/app/online-status`."""
        await self.send("/app/online-status", {"online": online})

    async def subscribe(
        self,
        id: str | None = "sub-0",  # noqa: A002 - the header's name
        destination: str = QUEUE,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
    ) -> dict[str, Any]:
        """SUBSCRIBE with a receipt; return the snapshots that came before it: user id → body."""
        ids = {} if id is None else {"id": id}
        name = self._next_receipt()
        await self.send_frame("SUBSCRIBE", {"destination": destination, **ids, **(headers or {}), "receipt": name})
        snapshots = await self._take_snapshots(name, None, timeout)
        self.subscriptions.add(id or destination)
        return snapshots

    async def unsubscribe(self, id: str = "sub-0") -> None:  # noqa: A002 - the header's name
        """UNSUBSCRIBE with a receipt."""
        await self.receipt("UNSUBSCRIBE", {"id": id})
        self.subscriptions.discard(id)

    async def watch(self, users: Collection[str], timeout: float = 5.0) -> dict[str, Any]:
        """SEND `/app/presence.subscribe` with a receipt; return the snapshots that came before it: user id → body.

        With a subscription there is one for each user, or the test fails: "the receipt of `presence.subscribe` comes
        after all its snapshots" (WIRE §5).
        """
        name = self._next_receipt()
        headers = {"destination": "/app/presence.subscribe", "content-type": "application/json", "receipt": name}
        await self.send_frame("SEND", headers, json.dumps({"userIds": list(users)}))
        snapshots = await self._take_snapshots(name, users, timeout)
        missing = set(users) - set(snapshots) if self.subscriptions else set()
        assert not missing, f"the receipt of presence.subscribe came without snapshots of {missing}"
        return snapshots

    async def unwatch(self, users: Collection[str]) -> None:
        """SEND `/app/presence.unsubscribe` with a receipt."""
        await self.send("/app/presence.unsubscribe", {"userIds": list(users)})

    # Waiting.

    async def expect(self, command: str, timeout: float = 5.0) -> Frame:
        """Wait for the next frame, which must be a ``command``, and return it."""

        def find() -> Frame | None:
            if not self._pending:
                return None
            frame = self._pending.pop(0)
            assert frame.command == command, f"{frame} instead of {command}"
            return frame

        return await self._wait(find, timeout, command, errors=command == "ERROR")

    async def expect_event(
        self, user: str, online: bool, timeout: float = 5.0, *, subscription: str | None = None
    ) -> Frame:
        """Wait for the next MESSAGE about ``user``: it must be a change to ``online``. Those about others are kept."""
        return await self._expect_message(user, online, timeout, subscription, snapshot=False)

    async def expect_snapshot(
        self, user: str, online: bool, timeout: float = 5.0, *, subscription: str | None = None
    ) -> Frame:
        """Wait for the next MESSAGE about ``user``, a snapshot with ``online``. Those about others are kept."""
        return await self._expect_message(user, online, timeout, subscription, snapshot=True)

    async def expect_nothing(self, seconds: float, user: str | None = None) -> None:
        """Assert that for so long no frame comes, or none about ``user``, and that the connection stays open."""

        def find() -> Frame | None:
            return next((frame for frame in self._pending if user is None or _user(frame) == user), None)

        try:
            frame = await self._wait(find, seconds, "nothing", errors=user is None)
        except TimeoutError:
            return
        raise AssertionError(f"{frame} instead of nothing for {seconds} s")

    async def expect_beat(self, timeout: float) -> float:
        """Wait for the server's next heart-beat; return when it came."""
        known = len(self.beats)
        return await self._wait(lambda: self.beats[known] if len(self.beats) > known else None, timeout, "a heart-beat")

    async def closed(self, timeout: float = 5.0) -> tuple[int, Frame | None]:
        """Wait for the end; return the close code (1006: none came) and the last frame, if it was an ERROR."""
        await asyncio.wait_for(asyncio.shield(self._reader), timeout)
        assert self._broken is None, self._broken
        assert self.ws.close_code is not None
        last = self.frames[-1] if self.frames else None
        return self.ws.close_code, last if last and last.command == "ERROR" else None

    def events(self, user: str, subscription: str | None = None) -> list[dict[str, Any]]:
        """The bodies of all MESSAGEs about ``user`` that ever came, in order."""
        return [
            frame.json
            for frame in self.frames
            if _user(frame) == user and subscription in (None, frame.headers.get("subscription"))
        ]

    def changes(self, user: str, subscription: str | None = None) -> list[bool]:
        """What all changes of ``user`` that ever came said, snapshots left out."""
        return [event["online"] for event in self.events(user, subscription) if "snapshot" not in event]

    # Leaving.

    async def disconnect(self) -> None:
        """Leave as a well-behaved client does: DISCONNECT, its RECEIPT, then close."""
        await self.receipt("DISCONNECT")
        await self.close()

    async def close(self) -> None:
        """Close the WebSocket (1000), without DISCONNECT unless that was sent."""
        await self.ws.close()
        await self._reader

    async def abort(self) -> None:
        """Reset the TCP connection: no close frame, and what the server sends meets a reset."""
        raw: socket.socket = self.ws.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.vanish()

    async def vanish(self) -> None:
        """End the TCP connection as a killed client's system does: no close frame."""
        self.ws.transport.abort()
        await self._reader

    def stop_reading(self) -> None:
        """Be a slow reader: leave in the sockets' buffers what the server sends."""
        self.ws.transport.pause_reading()

    def go_on_reading(self) -> None:
        """Be one no more."""
        self.ws.transport.resume_reading()

    async def dispose(self) -> None:
        """Drop the connection in whatever state it is."""
        self.ws.transport.abort()
        await asyncio.wait_for(self.ws.wait_closed(), 5)
        await self._reader

    # Inside.

    async def _read(self) -> None:
        try:
            async for message in self.ws:
                at = time.monotonic()
                for text in self._unwrap(message):
                    if text == "\n":
                        self.beats.append(at)
                        continue
                    # What follows ERROR is the close; versions differ in escapes only.
                    frames = decode(text, self.version, at)
                    self.frames += frames
                    self._pending += frames
                self._news.set()
        except ConnectionClosed:
            pass
        except ValueError as error:
            self._broken = error
            self.ws.transport.abort()
        finally:
            self._news.set()

    def _unwrap(self, message: str | bytes) -> list[str]:
        if isinstance(message, bytes):
            raise ValueError(f"a binary message: {message!r}")  # noqa: TRY004 - it is the value that is wrong
        if not self._sockjs:
            return [message]
        if message.startswith("a"):
            texts: list[str] = json.loads(message[1:])
            return texts
        self.sockjs_frames.append(message)
        return []

    async def _wait(self, find: Callable[[], T | None], timeout: float, what: str, *, errors: bool = False) -> T:
        """Wait until ``find`` finds something. Without ``errors`` an ERROR that came fails it."""
        deadline = time.monotonic() + timeout
        while True:
            self._news.clear()
            if (found := find()) is not None:
                return found
            error = next((frame for frame in self._pending if frame.command == "ERROR"), None)
            assert errors or error is None, f"{error} instead of {what}"
            assert self._broken is None, self._broken
            assert not self._reader.done(), f"closed with {self.ws.close_code} instead of {what}"
            try:
                # Not `wait_for`: before Python 3.12 it may swallow a cancellation.
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._news.wait()
            except TimeoutError:
                kept = ", ".join(map(str, self._pending)) or "nothing"
                raise TimeoutError(f"no {what} within {timeout} s; came: {kept}") from None

    async def _expect_message(
        self, user: str, online: bool, timeout: float, subscription: str | None, *, snapshot: bool
    ) -> Frame:
        def find() -> Frame | None:
            for frame in self._pending:
                if _user(frame) == user and subscription in (None, frame.headers.get("subscription")):
                    self._pending.remove(frame)
                    return frame
            return None

        frame = await self._wait(find, timeout, f"MESSAGE that {user} is {'online' if online else 'offline'}")
        said = (frame.json["online"], frame.json.get("snapshot", False))
        assert said == (online, snapshot), f"{frame} instead of online: {online}, snapshot: {snapshot}"
        return frame

    def _next_receipt(self) -> str:
        self._receipts += 1
        return f"receipt-{self._receipts}"

    async def _take_receipt(self, name: str, timeout: float) -> Frame:
        def find() -> Frame | None:
            for frame in self._pending:
                if frame.command == "RECEIPT" and frame.headers["receipt-id"] == name:
                    self._pending.remove(frame)
                    return frame
            return None

        return await self._wait(find, timeout, f"RECEIPT of {name}")

    async def _take_snapshots(self, receipt: str, users: Collection[str] | None, timeout: float) -> dict[str, Any]:
        before = await self._take_receipt(receipt, timeout)
        came = self.frames[: self.frames.index(before)]
        snapshots = {}
        for frame in [frame for frame in self._pending if any(frame is one for one in came)]:
            user = _user(frame)
            if user is not None and (users is None or user in users) and frame.json.get("snapshot"):
                snapshots[user] = frame.json
                self._pending.remove(frame)
        return snapshots


def _user(frame: Frame) -> str | None:
    """The user whom a MESSAGE is about."""
    return str(frame.json["userId"]) if frame.command == "MESSAGE" else None
