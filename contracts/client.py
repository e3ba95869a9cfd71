"""One actor's connection: a WebSocket, raw or in SockJS, and the STOMP frames that came over it."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import socket
import ssl
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Origin, Subprotocol

from contracts.faults import Failed, Misused, Unreachable, Untrusted
from contracts.match import ABSENT
from contracts.stomp import Decoder, Frame, Malformed

AGENT = "presence-contracts"
_MAX_SIZE = 64 * 2**20
_CLOSE_LIMIT = 1.0
"""s: for the closing handshake."""


class Refused(Exception):
    """The upgrade was answered with another status than 101."""

    def __init__(self, url: str, status: int, headers: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"the upgrade of {url} was answered with {status}")
        self.status = status
        self.headers = headers


@dataclass(frozen=True)
class Received:
    """A frame, when it came (the loop's clock, s), and how."""

    frame: Frame
    at: float
    frames: int
    """So many frames ended in its WebSocket message."""
    binary: bool
    whole: bool
    """Its message began with a frame and ended with one."""

    @cached_property
    def json(self) -> Any:
        """The body as JSON; `ABSENT` when it is none."""
        try:
            return json.loads(self.frame.body)
        except ValueError:
            return ABSENT

    @property
    def about(self) -> str | None:
        """The user whom a MESSAGE is about; None for whatever is no event."""
        event = self.json if self.frame.command == "MESSAGE" else None
        about = event.get("userId") if isinstance(event, dict) else None
        return about if isinstance(about, str) else None

    @property
    def snapshot(self) -> bool:
        event = self.json
        return isinstance(event, dict) and event.get("snapshot") is True

    @property
    def online(self) -> Any:
        event = self.json
        return event.get("online") if isinstance(event, dict) else None


@dataclass(frozen=True)
class Closed:
    """The end of a connection: 1006 means that no close frame came."""

    code: int
    reason: str
    at: float


class _Connect(connect):
    """As the library's, but it follows no redirect: a redirect is an answer to be judged."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


@dataclass
class Connection:
    """What came over one WebSocket, and what an actor keeps about it. Made by `Connection.open`."""

    actor: str
    user: str
    instance: int
    sockjs: bool
    socket: ClientConnection
    log: Callable[[str, str, str], None]
    """Takes the actor, the direction and a text for the transcript."""
    news: asyncio.Event
    """Set whenever something came."""
    decoder: Decoder = field(default_factory=Decoder)
    unread: list[Received] = field(default_factory=list)
    receipts: set[str] = field(default_factory=set)
    """Of the runner's own frames."""
    own_receipts: set[str] = field(default_factory=set)
    beats: list[float] = field(default_factory=list)
    """When heart-beats came that were not yet expected."""
    error: Received | None = None
    closed: Closed | None = None
    broken: str | None = None
    """How it is no STOMP, no SockJS or no WebSocket."""
    over: bool = False
    """We ended it, or a step has seen its end: whatever comes now is no fault."""
    frozen: bool = False
    greeted: bool = False
    """SockJS has said `o`."""
    connected: Frame | None = None
    subscribed: bool = False
    watches: bool = False
    canaries: set[str] = field(default_factory=set)
    sightings: list[Received] = field(default_factory=list)
    """MESSAGEs about canaries: no step sees them."""
    told: dict[str, bool] = field(default_factory=dict)
    """What a step last expected of a user."""
    watching: object = None
    """The `canary.Watching` of this connection."""
    beating: asyncio.Task[None] | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def open(
        cls,
        actor: str,
        user: str,
        url: str,
        *,
        instance: int,
        sockjs: bool,
        headers: Mapping[str, str],
        origin: str | None,
        subprotocols: Sequence[str],
        tls: ssl.SSLContext,
        limit: float,
        log: Callable[[str, str, str], None],
        news: asyncio.Event,
    ) -> Connection:
        """Upgrade.

        Args:
            url: of the raw endpoint, or the SockJS base.
            tls: for wss.
            limit: s until it must be open.

        Raises:
            Refused: it was answered with another status.
            Failed: it was not answered, or not as RFC 6455 says.
            Unreachable: no TCP connection came up; Untrusted: its certificate is not trusted.
        """
        if sockjs:
            url = f"{url}/{random.randrange(1000):03}/{secrets.token_hex(8)}/websocket"
        lines = "".join(f"{name}: {value}\n" for name, value in headers.items())
        log(actor, "→", f"upgrade {url}\n{lines}" + (f"Origin: {origin}\n" if origin else ""))
        opened = await _upgrade(url, headers, origin, subprotocols, tls, limit)
        log(actor, "←", f"101 {opened.subprotocol or '(no subprotocol)'}")
        made = cls(actor, user, instance, sockjs, opened, log, news)
        made.tasks.append(asyncio.create_task(made._read()))
        return made

    @property
    def session(self) -> str | None:
        return self.connected.get("session") if self.connected else None

    # What goes out.

    async def send(self, data: str | bytes, *, limit: float, wrapped: bool = True) -> None:
        """Send one WebSocket message; nothing when the connection is closed (which is seen as such).

        Args:
            wrapped: in SockJS: the text goes out in an array.

        Raises:
            Failed: the server does not take it within the limit.
        """
        if self.frozen:
            raise Misused(f"{self.actor} is frozen and cannot send")
        shown = data if isinstance(data, str) else f"(binary) {data.decode(errors='backslashreplace')}"
        self.log(self.actor, "→", shown)
        if self.sockjs and wrapped and isinstance(data, str):
            data = json.dumps([data])
        try:
            async with asyncio.timeout(limit):
                await self.socket.send(data)
        except TimeoutError as error:
            raise Failed(f"the server to read within {limit:g} s", "it did not") from error
        except ConnectionClosed:
            # The reader knows better how it ended.
            await asyncio.wait(self.tasks[:1], timeout=_CLOSE_LIMIT)

    def freeze(self) -> None:
        """Read no more, and write no more: pongs neither."""
        self.frozen = True
        self.socket.transport.pause_reading()

    def thaw(self) -> None:
        self.frozen = False
        self.socket.transport.resume_reading()

    async def close(self, code: int = 1000) -> None:
        """The closing handshake, for at most a second; then the socket goes."""
        self.over = True
        try:
            async with asyncio.timeout(_CLOSE_LIMIT):
                await self.socket.close(code)
        except TimeoutError:
            pass
        await self.drop()

    def cut(self) -> None:
        """Reset the TCP connection."""
        self.over = True
        raw = self.socket.transport.get_extra_info("socket")
        if raw is not None:
            # On, for 0 s: close() sends RST instead of FIN.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.transport.abort()

    async def drop(self) -> None:
        """Let go of the socket and the tasks, at once."""
        self.over = True
        self.socket.transport.abort()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # What comes in.

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                message = await self.socket.recv()
                self._take(message, loop.time())
                self.news.set()
        except ConnectionClosed as end:
            if end.rcvd is not None:
                code, reason = end.rcvd.code, end.rcvd.reason
                if self.sockjs and not self.over:
                    # Its clients learn the code from that frame.
                    code, reason = 1006, f"{code} {reason}, and no c[…] of SockJS before it"
            else:
                code, reason = 1006, ""
                if end.sent is not None and end.sent.code in {1002, 1003, 1007, 1009}:
                    self.broken = f"no good WebSocket frame: {end.sent.reason}"
            if self.closed is None:
                self.closed = Closed(code, reason, loop.time())
            self.log(self.actor, "←", f"closed: {code} {reason}")
        finally:
            self.news.set()

    def _take(self, message: str | bytes, at: float) -> None:
        if not self.sockjs:
            self._take_stomp(message, at)
        elif self.greeted != (message != "o"):
            self.broken = "no o of SockJS first" if not self.greeted else "a second o of SockJS"
        elif message == "o" or message == "h":  # noqa: PLR1714 (one is the open frame, one a beat of SockJS)
            self.greeted = True
            self.log(self.actor, "←", str(message))
        elif message[:1] in {"a", "c"}:
            try:
                content = json.loads(message[1:])
            except ValueError:
                content = None
            if message[:1] == "a" and isinstance(content, list) and all(isinstance(one, str) for one in content):
                for one in content:
                    self._take_stomp(one, at)
            elif message[:1] == "c" and isinstance(content, list) and len(content) == 2 and isinstance(content[0], int):
                self.log(self.actor, "←", str(message))
                self.closed = Closed(content[0], str(content[1]), at)
            else:
                self.broken = f"the SockJS frame {message[:80]!r}"
        else:
            self.broken = f"the SockJS frame {message[:80]!r}"

    def _take_stomp(self, message: str | bytes, at: float) -> None:
        data = message.encode() if isinstance(message, str) else message
        began_whole = not self.decoder.within_frame
        if began_whole and data and not data.strip(b"\r\n"):
            self.log(self.actor, "←", "(heart-beat)" if data == b"\n" else f"(line ends: {data!r})")
            if data == b"\n":
                self.beats.append(at)
            return
        self.log(self.actor, "←", data.decode(errors="backslashreplace"))
        try:
            frames = self.decoder.feed(data)
        except Malformed as error:
            self.broken = str(error)
            return
        whole = began_whole and not self.decoder.within_frame
        for frame in frames:
            self._deliver(Received(frame, at, len(frames), isinstance(message, bytes), whole))

    def _deliver(self, received: Received) -> None:
        frame = received.frame
        if frame.command == "RECEIPT" and (name := frame.get("receipt-id")) in self.own_receipts:
            self.receipts.add(str(name))
            return
        if frame.command == "CONNECTED":
            self.connected = frame
        elif frame.command == "ERROR":
            self.error = self.error or received
        elif received.about in self.canaries:
            self.sightings.append(received)
            return
        self.unread.append(received)


async def _upgrade(
    url: str,
    headers: Mapping[str, str],
    origin: str | None,
    subprotocols: Sequence[str],
    tls: ssl.SSLContext,
    limit: float,
) -> ClientConnection:
    expected = f"a WebSocket at {url} within {limit:g} s"
    up = False

    class Up(ClientConnection):
        """Made as soon as the TCP connection is up."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            nonlocal up
            up = True
            super().__init__(*arguments, **named)

    try:
        return await _Connect(
            url,
            origin=Origin(origin) if origin is not None else None,
            subprotocols=[Subprotocol(one) for one in subprotocols] or None,
            compression=None,
            additional_headers=list(headers.items()),
            user_agent_header=None if "user-agent" in {name.lower() for name in headers} else AGENT,
            proxy=None,
            ssl=tls if urlsplit(url).scheme == "wss" else None,
            open_timeout=limit,
            ping_interval=None,
            close_timeout=_CLOSE_LIMIT,
            max_size=_MAX_SIZE,
            max_queue=None,
            create_connection=Up,
        )
    except InvalidStatus as error:
        raise Refused(url, error.response.status_code, list(error.response.headers.raw_items())) from error
    except InvalidHandshake as error:
        raise Failed(expected, f"the upgrade went wrong: {error}") from error
    except ssl.SSLCertVerificationError as error:
        raise Untrusted(url, error.verify_message) from error
    except OSError as error:
        if not up:
            raise Unreachable.after(error, url, limit) from error
        if isinstance(error, TimeoutError):
            raise Failed(expected, "none was opened") from error
        raise Failed(expected, f"the connection broke: {error}") from error
    except EOFError as error:
        raise Failed(expected, "the connection was closed") from error
