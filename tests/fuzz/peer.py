"""One connection of the fuzzer: sends a case, reads what comes, and says what WIRE does not allow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable

from tests.fuzz.generate import PROBE, Bytes, Request, Socket, TokenCase, World, connect_frame, frame
from tests.support import stomp_client
from tests.support.raw_websocket import CLOSE, PONG, TEXT, ws_frame

DEADLINE = 20.0  # s in which whatever must come has come
STATUSES = frozenset({101, 200, 204, 206, 304, 400, 401, 403, 404, 405, 413, 415, 416, 429})
BEFORE = STATUSES | {100, 431, 501, 505}  # what the HTTP library says of broken requests
CODES = frozenset({1000, 1002, 1007, 1008, 1009})
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*\r\n")


class Finding(AssertionError):
    """The server did what it must not."""


class Peer(asyncio.Protocol):
    """A TCP connection that keeps what it reads."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.closed = False
        self.transport: asyncio.Transport
        self._look: Callable[[], bool] = lambda: False
        self._found: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int) -> Peer:
        _, peer = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._wake()

    def eof_received(self) -> bool:
        self.closed = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        if self._found is not None and not self._found.done() and (self._look() or self.closed):
            self._found.set_result(None)

    async def until(self, look: Callable[[], bool], timeout: float = DEADLINE) -> bool:
        """Wait until ``look``, asked whenever something came, says yes. False: the connection ended, or in vain."""
        if not look() and not self.closed:
            self._look, self._found = look, asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout):
                    await self._found
            except TimeoutError:
                return False
        return look()

    def send(self, *chunks: bytes) -> None:
        for chunk in chunks:
            if not self.closed:
                self.transport.write(chunk)


# HTTP


def _answer(peer: Peer, method: str) -> tuple[int, dict[str, str], bytes] | None:
    """Take the answer to a request off what was read, once it is all there."""
    while True:
        end = peer.data.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = bytes(peer.data[:end]).decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        if status != 100:
            break
        del peer.data[: end + 4]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    size = 0 if method == "HEAD" or status in (204, 304) else int(headers.get("content-length", 0))
    if len(peer.data) < end + 4 + size:
        return None
    body = bytes(peer.data[end + 4 : end + 4 + size])
    del peer.data[: end + 4 + size]
    return status, headers, body


async def ask(peer: Peer, data: bytes, method: str) -> tuple[int, dict[str, str], bytes]:
    """Send a request and wait for its answer."""
    found: list[tuple[int, dict[str, str], bytes]] = []

    def look() -> bool:
        if not found and (answer := _answer(peer, method)):
            found.append(answer)
        return bool(found)

    peer.send(data)
    if not await peer.until(look):
        raise Finding(f"no answer{', closed' if peer.closed else ''}, after {bytes(peer.data[:200])!r}")
    return found[0]


def check(status: int, headers: dict[str, str], body: bytes, case: Request) -> str:
    """Hold an answer against WIRE §2."""
    if status not in case.statuses:
        raise Finding(f"{status} instead of {sorted(case.statuses)}: {body[:200]!r}")
    if case.method == "HEAD" or not body:
        return str(status)
    if status >= 400:
        problem = json.loads(body)
        if headers["content-type"] != "application/problem+json" or problem["status"] != status or len(problem) != 4:
            raise Finding(f"{status} without a problem document: {headers} {body[:200]!r}")
    if (status == 401) != ("www-authenticate" in headers) or (status == 429) != ("retry-after" in headers):
        raise Finding(f"{status} with headers {headers}")
    if case.kind in ("good", "good batch") and status == 200:
        for entry in json.loads(body).values():
            if isinstance(entry, dict) and len(entry) != 5:
                raise Finding(f"an entry {entry}")
    return str(status)


async def http(case: Bytes, port: int) -> str:
    """Bytes before the upgrade: whatever is answered is an answer of HTTP, and then it ends."""
    peer = await Peer.open(port)
    try:
        for chunk in case.chunks:
            peer.send(chunk)
            await asyncio.sleep(0)
        if case.ending == "abort":
            return "gone at once"
        await peer.until(lambda: bool(peer.data), DEADLINE if case.ending == "wait" else 0.2)
        if case.ending == "end" and not peer.closed:
            with contextlib.suppress(OSError):  # the server was faster
                peer.transport.write_eof()
        if not await peer.until(lambda: peer.closed):
            raise Finding(f"the connection stays open, after {bytes(peer.data[:200])!r}")
    finally:
        peer.transport.abort()
    if not peer.data:
        return "no answer"
    first = _STATUS.match(peer.data)
    if first is None:
        if case.chunks and (b"".join(case.chunks).startswith(b"PRI") or peer.data[3] <= 9):
            return "HTTP/2"
        raise Finding(f"no HTTP: {bytes(peer.data[:200])!r}")
    status = int(first[1])
    if status not in BEFORE:
        raise Finding(f"{status}: {bytes(peer.data[:300])!r}")
    return str(status)


# WebSocket


class Told:
    """What the server said on a WebSocket, read as it comes."""

    def __init__(self, peer: Peer, version: str, *, is_sockjs: bool) -> None:
        self.peer = peer
        self.version = version
        self.pongs: list[bytes] = []
        self.receipts: list[str] = []
        self.error: stomp_client.Frame | None = None
        self.connected = False
        self.code: int | None = None
        self._is_sockjs = is_sockjs

    def read(self) -> None:
        data = self.peer.data
        while len(data) >= 2 and self.code is None:
            size, start = data[1], 2
            if size > 125:
                start = 4 if size == 126 else 10
                size = int.from_bytes(data[2:start], "big")
            if len(data) < start + size:
                return
            first, payload = data[0], bytes(data[start : start + size])
            if first & 0x70 or data[1] & 0x80 or not first & 0x80:
                raise Finding(f"a frame with {bytes(data[:2])!r}")
            del data[: start + size]
            self._take(first & 15, payload)

    def _take(self, opcode: int, payload: bytes) -> None:
        match opcode:
            case 10:
                self.pongs.append(payload)
            case 9:
                self.peer.send(ws_frame(PONG, payload))
            case 8:
                self.code = int.from_bytes(payload[:2], "big") if payload else 1005
                self.peer.send(ws_frame(CLOSE, payload[:2]))
            case 1:
                text = payload.decode()
                if self._is_sockjs:
                    for one in json.loads(text[1:]) if text[0] == "a" else ():
                        self._frames(one)
                else:
                    self._frames(text)
            case _:
                raise Finding(f"a frame with opcode {opcode}")

    def _frames(self, text: str) -> None:
        if text == "\n":
            return
        if self.error is not None:
            raise Finding(f"{text[:100]!r} after {self.error}")
        version = self.version if self.connected else "1.0"
        if version != "1.2":  # which alone can escape the CR of a receipt id that is given back
            text = text.replace("\r", "?")
        for one in stomp_client.decode(text, version):
            match one.command:
                case "RECEIPT":
                    self.receipts.append(one.headers["receipt-id"])
                case "CONNECTED":
                    self.connected = True
                    self.version = one.headers["version"]
                case "ERROR":
                    self.error = one
                case "MESSAGE":
                    if not {"userId", "online", "timestamp", "version"} <= set(one.json):
                        raise Finding(f"{one}")
                case _:
                    raise Finding(f"{one}")


async def upgraded(port: int, path: str) -> Peer:
    """A connection that was upgraded."""
    peer = await Peer.open(port)
    peer.send(
        f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    if not await peer.until(lambda: b"\r\n\r\n" in peer.data) or not peer.data.startswith(b"HTTP/1.1 101"):
        peer.transport.abort()
        raise Finding(f"no upgrade: {bytes(peer.data[:200])!r}")
    del peer.data[: peer.data.index(b"\r\n\r\n") + 4]
    return peer


async def socket(case: Socket, port: int) -> str:
    """A WebSocket: answers as due, or an ERROR and a close as due; never silence."""
    peer = await upgraded(port, case.path)
    told = Told(peer, case.version, is_sockjs=case.path.count("/") == 4)
    broken: list[Exception] = []

    def look(enough: Callable[[], bool]) -> bool:
        try:
            told.read()
        except (Finding, ValueError, KeyError) as error:
            broken.append(error)
        return bool(broken) or enough()

    try:
        for chunk in case.chunks:
            peer.send(chunk)
            await asyncio.sleep(0)
        if case.kind.startswith("mutated") and case.leaves == "abort":
            await peer.until(lambda: look(lambda: False), 0.05)
        elif case.ends:
            await peer.until(lambda: look(lambda: told.code is not None))
        else:
            await peer.until(lambda: look(lambda: told.code is not None or _complete(case, told)))
        if broken:
            raise Finding(repr(broken[0]))
        outcome = _judge(case, told)
        if not case.ends and case.leaves != "abort" and told.code is None:
            if case.leaves == "close":
                peer.send(ws_frame(CLOSE, b"\x03\xe8"))
            await peer.until(lambda: look(lambda: told.code is not None))
            if told.code != 1000:
                raise Finding(f"{told.code} instead of 1000 to {case.leaves}")
        if case.leaves != "abort" and not await peer.until(lambda: peer.closed):
            raise Finding("the connection stays open after its close")
        return outcome
    finally:
        peer.transport.abort()


def _complete(case: Socket, told: Told) -> bool:
    return len(told.pongs) >= len(case.pongs) and len(told.receipts) >= len(case.receipts)


def _judge(case: Socket, told: Told) -> str:
    if told.code is None and case.ends and not told.peer.closed:
        raise Finding(f"neither an answer nor an end; {told.receipts[-1:]}")
    if not case.ends and case.kind != "mutated" and not case.kind.startswith("mutated"):
        if told.error or told.code is not None or told.peer.closed:
            raise Finding(f"ended with {told.code}, {told.error}")
        if told.receipts != list(case.receipts) or told.pongs != list(case.pongs):
            raise Finding(
                f"receipts {told.receipts[-3:]} of {case.receipts[-3:]}, {len(told.pongs)} of {len(case.pongs)} pongs"
            )
        return "answered"
    if told.code is None:
        return "TCP end" if told.peer.closed else "left"
    if told.code not in (case.codes or CODES) and not case.kind.startswith(("close", "empty close", "mutated")):
        raise Finding(f"{told.code} instead of {sorted(case.codes)}; {told.error}")
    if told.code in (1008, 1013) and told.error is None:
        raise Finding(f"{told.code} without ERROR")
    if told.error is not None:
        if case.receipt is not None and told.error.headers.get("receipt-id") != case.receipt:
            raise Finding(f"{told.error} instead of the receipt-id {case.receipt}")
        if told.error.headers.get("content-type") != "text/plain" or not told.error.headers.get("message"):
            raise Finding(f"{told.error}")
        if case.receipts and told.receipts != list(case.receipts[: len(told.receipts)]):
            raise Finding(f"receipts {told.receipts} of {case.receipts}")
    return f"ERROR {told.code}" if told.error else str(told.code)


# Tokens


async def token_on_socket(case: TokenCase, port: int, world: World) -> str:
    """Show a token on CONNECT, or on a heartbeat."""
    peer = await upgraded(port, "/ws")
    told = Told(peer, "1.2", is_sockjs=False)

    def look() -> bool:
        told.read()
        return told.error is not None or bool(told.receipts) or told.code is not None

    try:
        shown = ("Authorization", f"Bearer {case.token}")
        beat = [("destination", "/app/heartbeat"), ("receipt", PROBE)]
        if case.by == "connect":
            first = frame("CONNECT", [("accept-version", "1.2"), shown])
        else:
            first, beat = connect_frame(world, case.user), [*beat, shown]
        peer.send(ws_frame(TEXT, first + frame("SEND", beat)))
        await peer.until(look)
        taken = bool(told.receipts)
        if not taken and told.error is None:
            raise Finding(f"no answer, {told.code}")
        if case.good is not None and taken != case.good:
            raise Finding(f"{'taken' if taken else 'refused'}: {told.error}")
        return "taken" if taken else "refused"
    finally:
        peer.transport.abort()


def token_request(case: TokenCase) -> Request:
    """A request with the token."""
    data = f"GET /api/presence/check/a HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {case.token}\r\n\r\n".encode()
    statuses = {None: {200, 401}, True: {200}, False: {401}}[case.good]
    return Request(kind="token", messages=1, data=data, statuses=frozenset(statuses))
