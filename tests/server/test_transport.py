"""The endpoint under the real Hypercorn, in this process: pings, aborts, and that nothing of a connection is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
import struct
import time
import weakref
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypercorn.asyncio import serve
from hypercorn.asyncio.tcp_server import TCPServer
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection as WSConnection
from wsproto.connection import ConnectionType
from wsproto.events import Message
from wsproto.frame_protocol import FrameProtocol

from presence import stomp
from presence.bootstrap import _config, _listen
from presence.core.model import Status
from presence.server import websocket
from presence.server.auth import TokenVerifier, make_token
from presence.server.budget import IdBudget
from presence.server.origins import Origins
from presence.server.share import Share
from presence.server.transport import Transport, _message, log_dropped
from presence.server.websocket import Endpoint, EndpointLimits
from presence.settings import load
from presence.stomp import sockjs
from tests.support.raw_websocket import BINARY, CLOSE, PING, PONG, TEXT, RawWebSocket, ws_frame
from tests.support.stomp_client import QUEUE, Frame, StompClient, encode
from tests.support.stub_store import StubStore, service_on, tell
from tests.support.waiting import wait_until

SECRET = b"a secret of the tests, of 32 bytes and more"


class Server:
    """Hypercorn with the endpoint, on a port of its own."""

    def __init__(self, **limits: Any) -> None:
        self.store = StubStore()
        self.service = service_on(self.store)
        limits = {"frames": stomp.Limits(frames_per_second=1e6, frames_burst=1_000_000)} | limits
        self.endpoint = Endpoint(
            _app,
            self.service,
            TokenVerifier(secret=SECRET),
            Origins((), loopback_only=True),
            IdBudget(1e9, 1e9),
            EndpointLimits(**limits),
        )
        settings = load(port=0)
        sock = _listen(settings, shared=False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)  # a slow reader is noticed sooner
        self.url = f"ws://127.0.0.1:{sock.getsockname()[1]}/ws"
        self._end = asyncio.Event()
        self._task = asyncio.create_task(
            serve(self.endpoint, _config(settings, sock), shutdown_trigger=self._end.wait)  # type: ignore[arg-type]
        )
        self._base: set[asyncio.Task[Any]] = set()

    async def started(self) -> Server:
        """Wait until it listens, and note which tasks it has without any connection."""
        ws = await RawWebSocket.connect(self.url)
        ws.abort()
        await wait_until(lambda: not self.endpoint.clients, what="the connection to be gone")
        await asyncio.sleep(0.05)
        self._base = asyncio.all_tasks()
        return self

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Those of connections: of the server, and of clients that still wait."""
        return {task for task in asyncio.all_tasks() - self._base if not task.done()}

    async def quiet(self, timeout: float = 4.0) -> None:
        """Wait until nothing is left of any connection."""
        mine = asyncio.current_task()
        await wait_until(lambda: self.tasks() <= {mine}, timeout, what="no task of a connection to be left")
        assert not self.endpoint.clients
        assert not self.store.live

    async def stop(self) -> None:
        """End it."""
        self._end.set()
        await asyncio.wait_for(self._task, 5)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "lifespan"
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


@pytest_asyncio.fixture
async def serving(caplog) -> AsyncIterator[Any]:
    """Start servers with these limits. No log of theirs may hold a traceback."""
    servers: list[Server] = []

    async def start(**limits: Any) -> Server:
        servers.append(Server(**limits))
        return await servers[-1].started()

    caplog.set_level(logging.INFO)
    yield start
    for server in servers:
        await server.quiet()
        await server.stop()
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def connecting(user: str) -> bytes:
    token = make_token(SECRET, user, 3600, None, None, now=time.time())
    return encode(Frame("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {token}"})).encode()


async def client_of(server: Server, user: str) -> StompClient:
    return await StompClient.connect(server.url, make_token(SECRET, user, 3600, None, None, now=time.time()))


# Sockets


def test_accepted_connections_have_the_user_timeout():
    """WIRE §3: "The server finds half-open connections itself as well ([...] TCP user timeout 45 s)."."""
    with _listen(load(port=0), shared=False) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux has it
            assert option is None or accepted.getsockopt(socket.IPPROTO_TCP, option) == 45_000


# Pings


async def test_pings_are_sent_as_often_as_set_and_end_with_the_connection(serving, raw):
    """WIRE §3: "WebSocket ping every 20 s" (here 0.1 s)."""
    server = await serving(ping_seconds=0.1)
    ws = await raw(server.url)
    for _ in range(3):
        assert tuple(await ws.frame())[:2] == (PING, b"")
    ws.abort()
    await server.quiet(1)


async def test_a_closed_connection_does_not_wait_for_its_next_ping(serving, raw):
    server = await serving(ping_seconds=1_000)
    ws = await raw(server.url)
    ws.write(CLOSE, b"\x03\xe8")
    assert (await ws.frame()).close_code == 1000
    await ws.ended()
    await server.quiet(2)


async def test_a_closed_connection_does_not_wait_for_the_end_of_its_idle_time(serving):
    """Found by fuzzing: Hypercorn kept each for 5 s, with its open file and 30 KB."""
    server = await serving()
    port = int(server.url.split(":")[2].split("/")[0])
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /half HTTP/1.1\r\n")
        await writer.drain()
        writer.transport.abort()
    began = time.monotonic()
    await server.quiet()
    assert time.monotonic() - began < 4


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"


@pytest.mark.parametrize(
    ("asked", "status"),
    [(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"404"), (b"GET / HTTP/1.1\r\nHost: a\r\n" + H2C, b"200")],
)
async def test_nobody_gets_http_2(start_server, asked, status):
    """Found by fuzzing: over HTTP/2 a connection is not limited, and stays open."""
    server = await start_server()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(asked)
    try:
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
    finally:
        writer.transport.abort()
    assert answer.split()[:2] == [b"HTTP/1.1", status]


def test_a_client_whose_bytes_make_the_server_raise_is_one_line_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    error = ExceptionGroup("of a task group", [UnicodeDecodeError("ascii", b"\xff", 0, 1, "not ASCII")])
    loop = asyncio.new_event_loop()
    log_dropped(loop, {"message": "Unhandled exception in client_connected_cb", "exception": error})
    loop.close()
    [record] = caplog.records
    assert record.getMessage().startswith("a client is dropped: UnicodeDecodeError")
    assert record.exc_info is None


async def test_under_another_server_nothing_is_pinged_or_aborted():
    async def nothing(_: object = None) -> None:
        raise AssertionError("no such message in ASGI")

    transport = Transport(nothing, nothing)
    await transport.ping()
    transport.abort()
    transport.leave()


async def test_no_compression_is_agreed_whatever_is_offered(serving, raw):
    """One message of 200 KB would else be inflated to 200 MB before any limit is looked at."""
    server = await serving()
    ws = await raw(server.url, {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"})
    assert "sec-websocket-extensions" not in ws.headers
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(b"\n" * 200_000_000) + deflate.flush(zlib.Z_SYNC_FLUSH)
    ws.write(TEXT, bomb[:-4], flags=0b1100)
    await ws.ended()


# Messages that are read without wsproto


@given(
    opcode=st.sampled_from([*[TEXT] * 6, *[BINARY] * 3, CLOSE, PING, 0, 3]),
    flags=st.sampled_from([*[8] * 6, 0, 9, 12]),
    payload=st.binary(max_size=70) | st.text(max_size=300).map(str.encode) | st.just(b"x" * 70_000),
    key=st.sampled_from([b"mask", b"\xff\x00\x80A", bytes(4), None]),
    length=st.sampled_from([*[7] * 6, 16, 64]),
    cut=st.sampled_from([*[0] * 6, 1, 3]),
    after=st.binary(max_size=9),
)
def test_what_is_read_without_wsproto_is_what_wsproto_reads(opcode, flags, payload, key, length, cut, after):
    """And what it would refuse, or wait for more of, is left to it."""
    size = len(payload)
    length = length if size < 126 else 16 if size < 2**16 else 64
    sizes = {7: bytes([size & 127]), 16: b"\x7e" + (size & 0xFFFF).to_bytes(2), 64: b"\x7f" + size.to_bytes(8)}[length]
    head = bytes([flags << 4 | opcode, sizes[0] | (0x80 if key else 0)]) + sizes[1:] + (key or b"")
    frame = head + bytes(octet ^ (key or bytes(4))[at % 4] for at, octet in enumerate(payload))
    data = b"earlier" + frame[: len(frame) - cut] + (after if cut == 0 else b"")
    found = _message(data, len(b"earlier"), 250)

    reference = WSConnection(ConnectionType.SERVER)
    reference.receive_data(data[len(b"earlier") :])
    first = next(iter(reference.events()), None)
    whole = isinstance(first, Message) and first.frame_finished and first.message_finished
    if isinstance(first, Message) and whole and key and size <= 250:
        assert found is not None
        assert found == (
            first.data.encode() if isinstance(first.data, str) else first.data,
            len(b"earlier") + len(frame),
        )
    else:
        assert found is None


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
async def test_messages_take_effect_in_order_however_they_are_framed_and_cut(serving, raw, step):
    """Whole frames are read by us, the others by wsproto: neither overtakes the other."""
    server = await serving()
    ws = await raw(server.url)
    ws.write(TEXT, connecting("user"))
    assert (await ws.frame()).payload.startswith(b"CONNECTED")
    sent = b""
    for number in range(40):
        beat = encode(Frame("SEND", {"destination": "/app/heartbeat", "receipt": str(number)})).encode()
        match number % 4:
            case 0:
                sent += ws_frame(TEXT, beat)
            case 1:
                sent += ws_frame(TEXT, beat[:9], flags=0) + ws_frame(PING, b"%d" % number) + ws_frame(0, beat[9:])
            case 2:
                sent += ws_frame(BINARY, beat)
            case 3:
                sent += ws_frame(TEXT, beat[:30]) + ws_frame(TEXT, beat[30:])
    for at in range(0, len(sent), step):
        ws.writer.write(sent[at : at + step])
        await asyncio.sleep(0)
    frames = [await ws.frame() for _ in range(50)]
    receipts = [int(frame.payload.partition(b"receipt-id:")[2].split()[0]) for frame in frames if frame.opcode == TEXT]
    assert receipts == list(range(40))
    assert [int(frame.payload) for frame in frames if frame.opcode == PONG] == list(range(1, 40, 4))
    ws.abort()


@pytest.mark.parametrize("cut", [2, 8], ids=["in the head", "after the head"])
async def test_the_rest_of_a_frame_is_not_taken_for_a_frame(serving, raw, cut):
    """At both places what follows looks like the head of one: the length, 0x8190, and the masked payload."""
    server = await serving()
    ws = await raw(server.url)
    ws.write(TEXT, connecting("user"))
    assert (await ws.frame()).payload.startswith(b"CONNECTED")
    beat = b"SEND\ndestination:/app/heartbeat\nreceipt:1\n\n\0".ljust(0x8190, b"\n")
    key = bytes([beat[0] ^ 0x81, beat[1] ^ 0x80, 0, 0])
    frame = b"\x82\xfe\x81\x90" + key + bytes(octet ^ key[at % 4] for at, octet in enumerate(beat))
    ws.writer.write(ws_frame(PING) + frame[:cut])
    assert (await ws.frame()).opcode == PONG
    ws.writer.write(frame[cut:])
    assert (await ws.frame()).payload == b"RECEIPT\nreceipt-id:1\n\n\0"
    ws.abort()


async def test_a_message_within_another_is_refused(serving, raw):
    """RFC 6455 §5.4: "The fragments of one message MUST NOT be interleaved between the fragments of another"."""
    server = await serving()
    ws = await raw(server.url)
    ws.write(TEXT, connecting("user"))
    assert (await ws.frame()).payload.startswith(b"CONNECTED")
    ws.writer.write(ws_frame(TEXT, b"\n", flags=0) + ws_frame(PING))
    assert (await ws.frame()).opcode == PONG
    ws.write(TEXT, b"\n")
    await ws.ended(2)
    ws.abort()


# What is left behind


async def test_nothing_is_left_of_200_connections_however_they_end(serving, raw):
    server = await serving()
    for how in ("close", "abort", "end", "disconnect", "error"):
        sockets = await asyncio.gather(*(raw(server.url) for _ in range(40)))
        for number, ws in enumerate(sockets):
            ws.write(TEXT, connecting(f"user-{number}"))
        await asyncio.gather(*(ws.frame() for ws in sockets))
        assert len(server.store.live) == len(server.endpoint.clients) == 40
        for ws in sockets:
            match how:
                case "close":
                    ws.write(CLOSE, b"\x03\xe8")
                case "abort":
                    ws.abort()
                case "end":
                    ws.writer.write_eof()
                case "disconnect":
                    ws.write(TEXT, b"DISCONNECT\n\n\0")
                case "error":
                    ws.write(TEXT, b"NO-SUCH\n\n\0")
        await asyncio.gather(*(ws.ended() for ws in sockets if how != "abort"))
        await server.quiet()


@pytest.mark.parametrize("how", ["close", "end", "abort", "reset"])
async def test_what_is_closed_does_not_wait_for_the_garbage_collector(serving, raw, how):
    """With 15,000 sessions a full collection stops everything for seconds; so there are none."""
    server = await serving()
    sockets = await asyncio.gather(*(raw(server.url) for _ in range(10)))
    for number, ws in enumerate(sockets):
        ws.write(TEXT, connecting(f"user-{number}"))
    await asyncio.gather(*(ws.frame() for ws in sockets))
    gc.collect()
    gc.disable()
    try:
        mine = [one for one in gc.get_objects() if isinstance(one, TCPServer) and vars(one)]
        kept: list[weakref.ref[Any]] = []
        kept += [weakref.ref(part) for one in mine for part in (one, one.reader, one.writer.transport)]
        kept += [weakref.ref(one) for one in gc.get_objects() if isinstance(one, FrameProtocol)]
        assert len(kept) == 4 * len(mine) == 40
        mine.clear()
        for ws in sockets:
            match how:
                case "close":
                    ws.write(CLOSE, b"\x03\xe8")
                case "end":
                    ws.writer.write_eof()
                case "abort":
                    ws.abort()
                case "reset":
                    linger = struct.pack("ii", 1, 0)
                    ws.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    ws.abort()
        await server.quiet()
        await wait_until(lambda: not any(one() for one in kept), what="all of the connections to be gone")
    finally:
        gc.enable()


@pytest.mark.parametrize("first", [b"NO-SUCH\n\n\0", b"DISCONNECT\n\n\0"], ids=["error", "disconnect"])
async def test_nothing_is_left_of_one_who_goes_on_sending(serving, raw, first):
    """Hypercorn keeps a connection whose messages nobody takes any more; so they are taken, to the end."""
    server = await serving()
    ws = await raw(server.url)
    ws.write(TEXT, connecting("user") + first)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(8):
            while True:
                ws.writer.write(ws_frame(TEXT, b"x" * 100) * 200)
                await ws.writer.drain()
    await server.quiet()


async def test_nothing_is_left_of_one_who_goes_on_sending_and_does_not_read(serving, raw):
    """WIRE §6: "1008 | [...] slow reader (or a reset where nothing can be written)"."""
    server = await serving(send_seconds=0.5)
    ws = await raw(server.url, receive_buffer=2048)
    ws.write(TEXT, connecting("user"))
    subscribed = "".join(encode(Frame("SUBSCRIBE", {"id": str(n), "destination": QUEUE})) for n in range(16))
    ws.write(TEXT, subscribed.encode())
    body = json.dumps({"userIds": [f"user-{n}" for n in range(1_000)]})
    asking = ws_frame(TEXT, encode(Frame("SEND", {"destination": "/app/presence.subscribe"}, body)).encode())
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(8):
            while True:
                ws.writer.write(asking)
                await ws.writer.drain()
    await server.quiet()


async def test_what_comes_before_connect_counts_to_its_share_of_the_time(serving, raw, monkeypatch):
    """DESIGN §7. It takes another way, and no frame limit counts what SockJS wraps around nothing."""
    noted: list[float] = []

    def note(_share: Share, took: float, _now: float) -> float:
        noted.append(took)
        return 0.0

    monkeypatch.setattr(Share, "note", note)
    server = await serving()
    ws = await raw(server.url + "/0/x/websocket")
    before = len(noted)
    message = json.dumps([""] * 15_000)
    ws.write(TEXT, message.encode())
    await wait_until(lambda: len(noted) == before + 2, what="the message to be read, and handled")
    began = time.perf_counter()
    sockjs.unwrap(message)
    assert max(noted[before:]) > (time.perf_counter() - began) / 10


async def test_one_who_pings_without_end_and_does_not_read_is_not_answered_without_end(serving, raw):
    """Pongs that are not taken in hold up whoever is not reading, and grow no memory."""
    server = await serving(send_seconds=0.5, ping_seconds=0.3)
    ws = await raw(server.url, receive_buffer=2048)
    ws.write(TEXT, connecting("user"))
    await wait_until(lambda: server.store.live, what="the session")
    [client] = server.endpoint.clients
    writer = client._transport._stream.send.__self__.send.__self__.writer
    worst = 0
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while True:
                ws.writer.write(ws_frame(PING, b"x" * 125) * 500)
                await ws.writer.drain()
                worst = max(worst, writer.transport.get_write_buffer_size())
    assert worst < 200_000
    await server.quiet()


async def test_a_slow_reader_of_300_users_that_flip_is_dropped_and_delays_nobody(serving, raw, caplog):
    """WIRE §6.

    "1008 | [...] slow reader (or a reset where nothing can be written)"; DESIGN §7: "What one client does never
    delays, disconnects or grows the cost of another."
    """
    server = await serving(send_seconds=1.0)
    users = [f"user-{number}" for number in range(300)]
    body = json.dumps({"userIds": users})
    watching = encode(Frame("SEND", {"destination": "/app/presence.subscribe"}, body)).encode()
    slow = await raw(server.url, receive_buffer=2048)
    slow.write(TEXT, connecting("slow"))
    await wait_until(lambda: server.store.live, what="the session")
    [client] = server.endpoint.clients
    transport = client._transport._stream.send.__self__.send.__self__.writer.transport
    for number in range(16):
        subscribing = encode(Frame("SUBSCRIBE", {"id": str(number), "destination": QUEUE})).encode()
        slow.write(TEXT, subscribing)
    slow.write(TEXT, watching)
    healthy = await client_of(server, "healthy")
    await healthy.subscribe()
    await healthy.watch(users)
    told = len(healthy.frames)
    version, buffered, out, waited = 0, 0, 0, 0.0
    deadline = time.monotonic() + 10
    while client in server.endpoint.clients:
        assert time.monotonic() < deadline
        version += 1
        statuses = [Status(user, version % 2 == 1, version) for user in users]
        server.store.statuses |= {status.user: status for status in statuses}
        began = time.monotonic()
        tell(server.service, statuses)
        await wait_until(lambda: len(healthy.frames) >= told + 300 * version, what="all to be told", every=0.002)  # noqa: B023
        waited = max(waited, time.monotonic() - began)
        buffered = max(buffered, transport.get_write_buffer_size())
        out = max(out, len(client._out))
        if client._watcher is not None:
            assert len(client._watcher.pending) <= 300
    assert "a client is dropped: slow reader" in caplog.text
    assert buffered < 300_000, "one message on its way, besides what the transport holds"
    assert out < 20
    assert waited < 3
    changes: dict[str, list[bool]] = {user: [] for user in users}
    for frame in healthy.frames[told:]:
        changes[frame.json["userId"]].append(frame.json["online"])
    assert all(one == [number % 2 == 0 for number in range(version)] for one in changes.values())
    await healthy.dispose()


async def test_one_who_comes_while_the_store_is_away_and_leaves_is_gone_when_it_is_back(serving, raw):
    server = await serving()
    server.store.reachable.clear()
    sockets = await asyncio.gather(*(raw(server.url) for _ in range(20)))
    for number, ws in enumerate(sockets):
        ws.write(TEXT, connecting(f"user-{number}") + b"\n" * number)
        for _ in range(number):
            ws.write(TEXT, b"\n")
    await wait_until(lambda: len(server.store.commands) == 20, what="all to be asked for")
    for ws in sockets:
        ws.abort()
    server.store.reachable.set()
    await server.quiet()


async def test_what_follows_a_frame_in_whose_midst_the_client_was_lost_is_not_done(serving, raw):
    """A token's keys may have to be fetched. Red if the users it then watches are watched for ever."""
    server = await serving(ping_seconds=0.05)
    ws = await raw(server.url)
    ws.write(TEXT, connecting("user"))
    assert (await ws.frame()).payload.startswith(b"CONNECTED")
    verify, fetched = server.endpoint.verifier.verify, asyncio.Event()

    async def slowly(token: str) -> Any:
        await fetched.wait()
        return await verify(token)

    server.endpoint.verifier.verify = slowly
    token = make_token(SECRET, "user", 3600, None, None, now=time.time())
    beat = encode(Frame("SEND", {"destination": "/app/heartbeat", "Authorization": f"Bearer {token}"}))
    watch = encode(Frame("SEND", {"destination": "/app/presence.subscribe"}, json.dumps({"userIds": ["other"]})))
    ws.write(TEXT, (beat + watch).encode())
    ws.abort()
    await wait_until(lambda: not server.endpoint.clients, what="the connection to be gone")
    fetched.set()
    await server.quiet()
    assert server.service.fanout.watched() == []
    assert ("watch", "user") not in server.store.commands


async def test_a_stop_leaves_nothing_of_those_who_do_not_answer(serving, raw):
    server = await serving()
    sockets = await asyncio.gather(*(raw(server.url) for _ in range(10)))
    for number, ws in enumerate(sockets[:5]):
        ws.write(TEXT, connecting(f"user-{number}"))
        await ws.frame()
    await server.endpoint.stop(5)
    assert {(await ws.frame()).close_code for ws in sockets} == {1001}
    await server.quiet()


def test_linger_is_the_second_of_wire():
    """WIRE §6: "(the server after 1 s)"."""
    assert websocket.LINGER == 1.0


def test_the_transport_reaches_into_the_version_that_is_pinned():
    """It uses what Hypercorn keeps to itself."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"hypercorn>=0.18,<0.19"' in text
