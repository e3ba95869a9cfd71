"""A client so light that one process drives a thousand on half a core; it notes all that it does and sees."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any

from tests.fleet.history import History
from tests.support.raw_websocket import CLOSE, PING, PONG, TEXT, ws_frame

SUBSCRIPTION = "s"


class Recorder:
    """The history of a run, and its clock."""

    def __init__(self, history: History, start: float) -> None:
        self.history = history
        self.start = start
        """When the history's clock was 0: monotonic, s."""

    @property
    def now(self) -> float:
        return time.monotonic() - self.start

    def note(self, what: str, **rest: Any) -> None:
        """Something happens now, or is about to."""
        self.history.note(time.monotonic() - self.start, what, **rest)


class Client(asyncio.Protocol):
    """One connection of a user. Its id in the record is ``name``."""

    def __init__(self, recorder: Recorder, name: str, user: str, instance: str, token: str) -> None:
        self.name, self.user, self.instance = name, user, instance
        loop = asyncio.get_running_loop()
        self.connected: asyncio.Future[bool] = loop.create_future()
        """Whether CONNECTED has come; False when the connection has ended before."""
        self.closed = asyncio.Event()
        self.told: dict[str, bool] = {}
        """What it was told last of each user it watches."""
        self.answered = time.monotonic()
        """When the last receipt came that was waited for: monotonic, s."""
        self.owed = 0
        """Receipts that are still to come."""
        self._recorder = recorder
        self._token = token
        self._buffer = b""
        self._upgraded = False
        self._ended = False  # by us, or by the network
        self._ref = 0
        self._asked: dict[int, tuple[asyncio.Future[bool], tuple[str, ...]]] = {}
        self.transport: asyncio.Transport | None = None

    @classmethod
    async def connect(
        cls, recorder: Recorder, name: str, user: str, instance: str, port: int, token: str, timeout: float = 8.0
    ) -> Client | None:
        """Connect a session; None when it was refused, or not answered in time."""
        self = cls(recorder, name, user, instance, token)
        recorder.note("connecting", session=name, user=user, instance=instance)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)
                if await self.connected:
                    return self
        except (OSError, TimeoutError) as error:
            if self.transport is not None:
                self._end("died", why="no answer")
                self.transport.abort()
            else:
                recorder.note("refused", session=name, why=str(error) or "no answer")
        return None

    # What comes in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            b"Sec-WebSocket-Protocol: v12.stomp\r\n\r\n"
        )

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        if not self._upgraded:
            head, blank, rest = data.partition(b"\r\n\r\n")
            if not blank:
                self._buffer = data
                return
            self._upgraded = head.startswith(b"HTTP/1.1 101 ")
            if not self._upgraded:
                return self._lose(head.partition(b"\r\n")[0].decode())
            data = rest
            self._send(f"CONNECT\naccept-version:1.2\nhost:localhost\nAuthorization:Bearer {self._token}\n\n\0")
        at = 0
        while len(data) - at >= 2:
            size, start = data[at + 1], at + 2
            if size > 125:
                start += 2 if size == 126 else 8
                size = int.from_bytes(data[at + 2 : start], "big")
            if len(data) < start + size:
                break
            opcode, payload = data[at] & 15, data[start : start + size]
            at = start + size
            if opcode == TEXT:
                self._take(payload)
            elif opcode == PING:
                self._write(ws_frame(PONG, payload))
            elif opcode == CLOSE:
                return self._lose(f"close {int.from_bytes(payload[:2], 'big')}")
        self._buffer = data[at:]

    def _take(self, message: bytes) -> None:
        for frame in message.split(b"\0"):
            head, _, body = frame.partition(b"\n\n")
            command, *lines = head.decode().split("\n")
            if command == "MESSAGE":
                event = json.loads(body)
                self.told[event["userId"]] = event["online"]
                self._note(
                    "told",
                    subscription=SUBSCRIPTION,
                    user=event["userId"],
                    online=event["online"],
                    version=event["version"],
                    snapshot=event.get("snapshot", False),
                )
            elif command == "RECEIPT":
                self._answered(int(lines[0].partition(":")[2]))
            elif command == "CONNECTED":
                self._note("connected")
                if not self.connected.done():
                    self.connected.set_result(True)
            elif command == "ERROR":
                return self._lose(next(line for line in lines if line.startswith("message")))

    def _answered(self, ref: int) -> None:
        answer, users = self._asked.pop(ref)
        self.answered = time.monotonic()
        self.owed -= 1
        if users:
            self._note("watched", users=users)
        else:
            self._note("receipt", ref=ref)
        if not answer.done():
            answer.set_result(True)

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(str(error or "closed"))

    def _lose(self, why: str) -> None:
        self._end("lost" if self.connected.done() else "refused", why=why)
        assert self.transport is not None
        self.transport.abort()

    # What goes out

    def beat(self, *, receipt: bool = False) -> None:
        self._ask("beat", "/app/heartbeat", receipt=receipt)

    def sign(self, *, on: bool) -> None:
        """Sign on, or off."""
        self._ask("on" if on else "off", "/app/online-status", {"online": on}, receipt=True)

    async def watch(self, users: Iterable[str], timeout: float = 30.0) -> None:
        """Subscribe and watch these users; return once all snapshots have come, or the connection is lost."""
        self._note("subscribed", subscription=SUBSCRIPTION)
        self._send(f"SUBSCRIBE\nid:{SUBSCRIPTION}\ndestination:/user/queue/online-status\n\n\0")
        names = tuple(users)
        answer = self._ask("watching", "/app/presence.subscribe", {"userIds": names}, receipt=True, users=names)
        async with asyncio.timeout(timeout):
            await answer

    def leave(self) -> None:
        """DISCONNECT."""
        self._end("left")
        self._send("DISCONNECT\n\n\0")
        assert self.transport is not None
        self.transport.close()

    def close(self) -> None:
        """Close the TCP connection without a word."""
        self._end("closed")
        assert self.transport is not None
        self.transport.close()

    def die(self) -> None:
        """What the system does for a process that is killed."""
        self._end("died")
        assert self.transport is not None
        self.transport.abort()

    def cut(self) -> None:
        """The network lets nothing through any more."""
        self._end("cut")

    def _ask(
        self, what: str, destination: str, body: object = None, *, receipt: bool, users: tuple[str, ...] = ()
    ) -> asyncio.Future[bool]:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        ref = 0
        if receipt:
            self._ref += 1
            ref = self._ref
            self._asked[ref] = answer, users
            if not self.owed:
                self.answered = time.monotonic()
            self.owed += 1
        self._note(what, **{"users": users} if users else {"ref": ref})
        asked = f"receipt:{ref}\n" if receipt else ""
        text = "" if body is None else json.dumps(body)
        self._send(f"SEND\ndestination:{destination}\n{asked}\n{text}\0")
        return answer

    def _send(self, frame: str) -> None:
        self._write(ws_frame(TEXT, frame.encode()))

    def _write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def _note(self, what: str, **rest: Any) -> None:
        if not self._ended:
            self._recorder.note(what, session=self.name, **rest)

    def _end(self, what: str, **rest: Any) -> None:
        self._note(what, **rest)
        self._ended = True
        self.closed.set()
        for answer, _ in self._asked.values():
            if not answer.done():
                answer.set_result(False)
        if not self.connected.done():
            self.connected.set_result(False)
