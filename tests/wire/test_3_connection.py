"""WIRE §3, over the wire: how a connection begins, how it is kept, and how it is found to be lost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.raw_websocket import CLOSE, PING, PONG, TEXT, RawWebSocket, ws_frame
from tests.support.server import ServerProcess, running
from tests.support.stomp_client import Frame, decode, encode
from tests.support.waiting import wait_until

SILENCE = 1.5
BEAT = "SEND\ndestination:/app/heartbeat\n\n\0"
OFF = 'SEND\ndestination:/app/online-status\n\n{"online": false}\0'
ON = OFF.replace("false", "true")
WATCH = 'SEND\ndestination:/app/presence.subscribe\n\n{"userIds": ["a", "b"]}\0'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty() -> AsyncIterator[ServerProcess]:
    """Short times: 0.7 s to connect, beats and pings every 0.3 s, 1.5 s of silence; and a long lease."""
    async with running(
        connect_seconds=0.7, beat_seconds=0.3, ping_seconds=0.3, silence_seconds=SILENCE, lease_seconds=60
    ) as process:
        yield process


def connect_frame(server: ServerProcess, user: str, **headers: str) -> str:
    """A CONNECT frame as text."""
    given = {"accept-version": "1.2", "Authorization": f"Bearer {server.token(user)}"} | headers
    return encode(Frame("CONNECT", given))


async def stomp_frames(ws: RawWebSocket, timeout: float = 5.0) -> list[Frame]:
    """The frames in the next text message; other WebSocket frames are dropped."""
    async with asyncio.timeout(timeout):
        while True:
            frame = await ws.frame(timeout)
            if frame.opcode == TEXT:
                return decode(frame.payload.decode())


def connections(server: ServerProcess) -> int:
    """How many connections of clients the server holds."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    # Local address and port, state, inode; 0A listens, and what no process holds any more has the inode 0.
    return sum(row[1].endswith(f":{server.port:04X}") and row[3] != "0A" and row[9] != "0" for row in rows)


# The upgrade


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["v12.stomp"], "v12.stomp"),
        (["v11.stomp"], "v11.stomp"),
        (["v10.stomp"], "v10.stomp"),
        (["v10.stomp", "v11.stomp", "v12.stomp"], "v12.stomp"),
        (["v10.stomp", "v11.stomp"], "v11.stomp"),
        (["mqtt", "v10.stomp"], "v10.stomp"),
        (["mqtt"], None),
        (None, None),
    ],
)
async def test_the_highest_offered_subprotocol_is_chosen(server, connect, user, offered, chosen):
    """WIRE §3.

    "subprotocols `v12.stomp`, `v11.stomp`, `v10.stomp` (highest offered is chosen; none offered is fine".
    """
    client = await connect(server, user, subprotocols=offered)
    assert client.ws.subprotocol == chosen
    await client.beat()


@pytest.mark.parametrize(
    ("offered", "version", "agreed"), [("v10.stomp", "1.2,1.1,1.0", "1.2"), ("v12.stomp", None, "1.0")]
)
async def test_the_subprotocol_does_not_decide_the_version(server, connect, user, offered, version, agreed):
    """WIRE §3: "`accept-version` alone decides the STOMP version"."""
    client = await connect(server, user, subprotocols=[offered], version=version)
    assert client.connected.headers["version"] == agreed


@pytest.mark.parametrize("path", ["/ws", "/ws/websocket"])
async def test_plain_websocket_is_spoken_at_both_paths(server, connect, user, path):
    """WIRE §3: "`/ws`: WebSocket upgrade", and "`/ws/websocket`"."""
    client = await connect(server, user, url=server.ws.removesuffix("/ws") + path)
    await client.beat()


async def test_the_sockjs_transport_is_spoken_below(server, connect, user):
    """WIRE §3: "the same path is a SockJS base: [...] `/ws/{server}/{session}/websocket`"."""
    client = await connect(server, user, url=f"{server.ws}/123/abcdefgh/websocket", sockjs=True, subprotocols=None)
    await client.subscribe()
    assert client.sockjs_frames == ["o"]
    assert not (await client.watch([user]))[user].get("nothing")
    await client.disconnect()


async def test_a_sockjs_client_may_use_the_session_id_of_another(server, connect, users):
    url = f"{server.ws}/000/same/websocket"
    one = await connect(server, users("one"), url=url, sockjs=True)
    two = await connect(server, users("two"), url=url, sockjs=True)
    await one.beat()
    await two.beat()


async def test_sockjs_beats_and_binary_and_single_strings_are_accepted(server, connect, user):
    """SockJS.

    a message is an array of strings or one string; an empty one is ignored. WIRE §6: "binary in is accepted".
    """
    client = await connect(server, url=f"{server.ws}/0/x/websocket", sockjs=True, handshake=False)
    await client.raw("")
    await client.raw("[]")
    frame = connect_frame(server, user).replace("\n", r"\n").replace("\0", r"\u0000")
    await client.raw(f'"{frame}"')
    await client.expect("CONNECTED")
    await client.raw(rb'["SEND\ndestination:/app/heartbeat\nrece", "ipt:r\n\n\u0000"]')
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "r"}


async def test_no_extension_is_agreed(server, connect, user, raw):
    """Compression would cost 300 KB a connection, and inflate without a limit what a client sends."""
    client = await connect(server, user, compression="deflate")
    assert "Sec-WebSocket-Extensions" not in client.ws.response.headers
    await client.beat()
    ws = await raw(server.ws, {"Sec-WebSocket-Extensions": "permessage-deflate;server_max_window_bits"})
    assert ws.status == 101
    ws.write(TEXT, b"\n", flags=0b1100)  # RSV1: compressed
    await ws.ended()


# CONNECT and CONNECTED


async def test_connect_must_come_in_time(hasty, connect):
    """WIRE §3: "The CONNECT frame must come within 10 s"; §6: "1008 [...] no CONNECT in time"."""
    began = time.monotonic()
    client = await connect(hasty, handshake=False)
    code, error = await client.closed()
    assert time.monotonic() - began >= 0.6
    assert (code, error and error.headers["message"]) == (1008, "no CONNECT within 0.7 s")


async def test_bytes_that_are_no_connect_do_not_put_it_off(hasty, connect, user):
    client = await connect(hasty, handshake=False)
    half = connect_frame(hasty, user)[:-1]
    with contextlib.suppress(Exception):
        for piece in (half[:10], half[10:]):
            await client.raw(piece)
            await asyncio.sleep(0.1)
        while True:
            await client.ws.ping()
            await asyncio.sleep(0.1)
    assert (await client.closed())[0] == 1008


async def test_connect_must_come_in_time_over_sockjs(hasty, connect):
    client = await connect(hasty, url=f"{hasty.ws}/0/x/websocket", sockjs=True, handshake=False)
    code, error = await client.closed()
    assert (code, error and error.headers["message"]) == (1008, "no CONNECT within 0.7 s")
    assert client.sockjs_frames[-1] == 'c[1008,"no CONNECT within 0.7 s"]'


async def test_one_who_connected_is_not_asked_again(hasty, connect, user):
    client = await connect(hasty, user)
    await client.expect_nothing(1.0)


async def test_a_missing_host_is_accepted(server, connect, user):
    """WIRE §3: "A missing `host` is accepted."."""
    await connect(server, user, headers={"host": None})


@pytest.mark.parametrize("heart_beat", [None, "0,0", "5000,5000"])
@pytest.mark.parametrize("version", [None, "1.0", "1.1", "1.2"])
async def test_connected_carries_what_wire_lists(server, connect, user, version, heart_beat):
    """WIRE §3.

    "CONNECTED carries `version`, `heart-beat` (always), `session` (made by the server, 128 random bits), `server`,
    `user-name`. Header values that we make contain no colon or backslash"; "the server offers 10000,10000".
    """
    client = await connect(server, user, version=version, heart_beat=heart_beat)
    headers = dict(client.connected.headers)
    assert headers.pop("session")
    assert headers.pop("server")
    assert headers == {"version": version or "1.0", "heart-beat": "10000,10000", "user-name": user}
    assert client.connected.body == ""
    assert not any(re.search(r"[:\\]", value) for value in client.connected.headers.values())


async def test_session_ids_are_random_and_the_servers_own(server, connect, user):
    """WIRE §3: "`session` (made by the server, 128 random bits)"."""
    clients = [await connect(server, user, headers={"session": "mine"}) for _ in range(8)]
    ids = [client.connected.headers["session"] for client in clients]
    assert "mine" not in ids
    values = [base64.urlsafe_b64decode(session + "==") for session in ids]
    assert {len(value) for value in values} == {16}
    bits = [{value[at // 8] >> at % 8 & 1 for value in values} for at in range(128)]
    assert sum(len(seen) == 2 for seen in bits) > 96, "of 8 random bits all are alike once in 128 times"
    assert set(server.redis().zrange(f"presence:user:{user}:sessions", 0, -1)) == set(ids)


async def test_whoever_has_read_connected_is_online_for_every_reader(start_server, valkey, connect, users):
    """WIRE §3.

    "CONNECTED is sent only once the session is recorded: whoever has read CONNECTED is online for every reader."
    """
    store = await valkey()
    here = await start_server(redis_url=store.url, amnesty_seconds=0)
    there = await start_server(redis_url=store.url, amnesty_seconds=0)
    reader = await connect(there, users("reader"))
    await reader.subscribe()
    for _ in range(25):
        user = users("user")
        await connect(here, user)
        assert await there.is_online(user)
        assert store.redis().sismember("presence:online", user)
        assert (await reader.watch([user]))[user]["online"] is True


async def test_of_many_clients_that_leave_at_any_moment_none_stays_online(hasty, users, raw):
    """WIRE §4: "close without DISCONNECT [...] ended at once", whatever the moment. And no connection lingers."""
    rng = random.Random(20250717)
    names = [users("user") for _ in range(200)]

    async def come_and_go(user: str) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            ws = await raw(hasty.ws)
            first = rng.choice(["", "\n", BEAT, BEAT, OFF, OFF + ON, OFF + ON + OFF, WATCH, WATCH + BEAT])
            data = ws_frame(TEXT, (connect_frame(hasty, user) + first).encode()) + ws_frame(TEXT, BEAT.encode())
            if rng.random() < 0.3:
                data = data[: rng.randrange(len(data))]
            ws.writer.write(data)
            await asyncio.sleep(rng.choice([0, 0, 0.001, 0.003, 0.005, 0.01, 0.02, 0.03]))
            match rng.randrange(3):
                case 0:
                    ws.abort()
                case 1:
                    ws.writer.close()
                case 2:
                    ws.write(CLOSE, b"\x03\xe8")
                    await ws.ended()
                    ws.abort()

    for start in range(0, len(names), 20):
        await asyncio.gather(*map(come_and_go, names[start : start + 20]))
    redis = hasty.redis()

    def online() -> set[str]:
        return {user for user in names if redis.sismember("presence:online", user)}

    await wait_until(lambda: not online(), 5, what="nobody to be online")  # the lease is 60 s
    await wait_until(lambda: connections(hasty) == 0, 4, what="all connections to be gone")
    assert not online()


# Heart-beats and silence


async def test_the_server_beats_as_agreed(hasty, connect, user):
    """WIRE §3: "the server offers 10000,10000 and sends each beat as a message of its own, one LF" (here 300,300)."""
    client = await connect(hasty, user, heart_beat="0,300")
    assert client.connected.headers["heart-beat"] == "300,300"
    async with client.beating():
        for _ in range(4):
            await client.expect_beat(3)
    for earlier, later in zip(client.beats, client.beats[1:], strict=False):
        assert later - earlier > 0.1, "no more beats than agreed"


@pytest.mark.parametrize(("version", "heart_beat"), [("1.2", "300,0"), ("1.2", None), ("1.0", "300,300")])
async def test_the_server_beats_for_nobody_who_does_not_want_it(hasty, connect, user, version, heart_beat):
    client = await connect(hasty, user, version=version, heart_beat=heart_beat)
    async with client.beating(0.2):
        await client.expect_nothing(1.0)
    assert client.beats == []


async def test_beats_of_sockjs_clients_are_wrapped(hasty, connect, user):
    url = f"{hasty.ws}/0/y/websocket"
    client = await connect(hasty, user, url=url, sockjs=True, heart_beat="0,300")
    await client.expect_beat(3)
    assert client.sockjs_frames == ["o"]


async def test_beats_are_text_messages_of_one_lf(hasty, user, raw):
    ws = await raw(hasty.ws)
    ws.write(TEXT, connect_frame(hasty, user, **{"heart-beat": "0,300"}).encode())
    await stomp_frames(ws)
    while (frame := await ws.frame()).opcode != TEXT:
        assert frame.opcode == PING
    assert (frame.payload, frame.flags) == (b"\n", 0b1000)
    ws.abort()


@pytest.mark.parametrize(
    ("heart_beat", "version", "tolerated"),
    [("0,0", "1.2", SILENCE), ("300,0", "1.2", SILENCE), (None, "1.0", SILENCE), ("1000,0", "1.2", 3.0)],
    ids=["no beats", "3 × 0.3 s < 1.5 s", "1.0", "3 × 1 s > 1.5 s"],
)
async def test_silence_is_tolerated_as_long_as_agreed_and_no_longer(
    hasty, connect, user, heart_beat, version, tolerated
):
    """WIRE §3.

    "Silence tolerated: max(3 × agreed interval, `PRESENCE_SILENCE_SECONDS` [...]); with no client heart-beats
    agreed `PRESENCE_SILENCE_SECONDS` alone counts [...]. Then ERROR `silence`, close 1002, and the session ends as
    a lost connection."
    """
    client = await connect(hasty, user, version=version, heart_beat=heart_beat)
    began = time.monotonic()
    code, error = await client.closed(tolerated + 4)
    assert time.monotonic() - began >= tolerated - 0.1
    assert (code, error and error.headers["message"]) == (1002, "silence")
    assert time.monotonic() - began <= tolerated + 4
    await hasty.wait_online(user, False, 3)  # the lease is 60 s
    last = int(hasty.redis().get(f"presence:user:{user}:last_active"))
    assert time.time() * 1000 - last >= (tolerated - 0.2) * 1000, "the last byte counts, not when the loss was noticed"


@pytest.mark.parametrize("data", ["\n", "SEND\ndestination:/app/heartbeat\n\n\0", "S"], ids=["LF", "frame", "a byte"])
async def test_any_stomp_byte_counts(hasty, connect, user, data):
    """WIRE §3: "Any STOMP byte counts"."""
    client = await connect(hasty, user)
    pieces = iter("END\ndestination:/app/heartbeat\n\n\0")
    for _ in range(6):
        await client.raw(data)
        data = next(pieces) if data in "SEND" else data
        await asyncio.sleep(SILENCE / 3)
    await client.expect_nothing(0.1)


async def test_pings_and_pongs_do_not_count(hasty, user, raw):
    """WIRE §3: "WebSocket pings and pongs do not"."""
    ws = await raw(hasty.ws)
    ws.write(TEXT, connect_frame(hasty, user).encode())
    await stomp_frames(ws)

    async def ping() -> None:
        while True:
            ws.write(PING)
            ws.write(PONG)
            await asyncio.sleep(0.2)

    task = asyncio.create_task(ping())
    [error] = await stomp_frames(ws, SILENCE + 4)
    task.cancel()
    assert (error.command, error.headers["message"]) == ("ERROR", "silence")
    ws.abort()


async def test_a_silence_of_0_lets_the_heart_beats_alone_decide(start_server, connect, users):
    """WIRE §3: "with no client heart-beats agreed `PRESENCE_SILENCE_SECONDS` alone counts (0: never)"."""
    server = await start_server(silence_seconds=0, beat_seconds=0.2)
    silent = await connect(server, users("silent"), heart_beat="0,0")
    beating = await connect(server, users("beating"), heart_beat="200,0")
    code, error = await beating.closed(6)
    assert (code, error and error.headers["message"]) == (1002, "silence")
    await silent.expect_nothing(0.5)
    await silent.beat()


# Pings


async def test_the_server_pings_and_does_not_wait_for_the_pong(hasty, user, raw):
    """WIRE §3: "The server finds half-open connections itself as well (WebSocket ping every 20 s"; here every 0.3 s."""
    ws = await raw(hasty.ws)
    ws.write(TEXT, connect_frame(hasty, user).encode())
    await stomp_frames(ws)
    came = []
    for _ in range(3):
        frame = await ws.frame(3)
        assert frame.opcode == PING
        came.append(time.monotonic())
    assert came[2] - came[0] >= 0.4, "no more pings than are due"
    ws.write(TEXT, b"SEND\ndestination:/app/heartbeat\nreceipt:still-there\n\n\0")
    [receipt] = await stomp_frames(ws)
    assert receipt.headers == {"receipt-id": "still-there"}
    ws.abort()


async def test_pings_of_the_client_are_answered(server, raw):
    ws = await raw(server.ws)
    ws.write(PING, b"are you there")
    assert tuple(await ws.frame())[:2] == (PONG, b"are you there")
    ws.abort()


# Clients without manners


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\xfd" * 30,
        ws_frame(TEXT, b"CONNECT\n\n\0", masked=False),
        ws_frame(TEXT, b"CONNECT\n\n\0", flags=0b1001),
        ws_frame(3, b"CONNECT\n\n\0"),
        ws_frame(TEXT, b"CONNECT\nx:\xff\n\n\0"),
        ws_frame(0, b"no beginning"),
        ws_frame(PING, b"x" * 126),
        ws_frame(PING, b"", flags=0),
        ws_frame(CLOSE, b"\x03"),
        ws_frame(CLOSE, b"\x00\x01"),
        ws_frame(CLOSE, b"\x03\xe8\xff\xfe"),
        ws_frame(CLOSE) + ws_frame(TEXT, b"CONNECT\n\n\0"),
        ws_frame(CLOSE, b"\x03\xe8") + ws_frame(CLOSE, b"\x03\xe8") + b"and more",
    ],
    ids=lambda data: repr(data[:16]),
)
async def test_whoever_breaks_the_websocket_protocol_is_dropped_and_nothing_is_logged(server, data, raw):
    """The log is looked at after each test."""
    ws = await raw(server.ws)
    ws.writer.write(data)
    await ws.ended()


async def test_one_who_floods_after_an_error_leaves_nothing_behind(server, connect, users, raw):
    """What is sent after an ERROR is read for a moment, then the connection is dropped."""
    neighbour = await connect(server, users("neighbour"))
    ws = await raw(server.ws)
    ws.write(TEXT, b"NO-SUCH\n\n\0")
    with pytest.raises(ConnectionError):  # noqa: PT012 - each of the two may be the one
        async with asyncio.timeout(8):
            while True:
                ws.writer.write(ws_frame(TEXT, b"x" * 100) * 100)
                await ws.writer.drain()
    await neighbour.beat()
    await neighbour.close()
    await wait_until(lambda: connections(server) == 0, what="the connections to be gone")


async def test_a_close_that_is_never_answered_ends_all_the_same(server, raw):
    """The client neither closes nor reads: it is given a second."""
    ws = await raw(server.ws)
    ws.write(TEXT, b"NO-SUCH\n\n\0")
    [error] = await stomp_frames(ws)
    assert error.command == "ERROR"
    assert (await ws.frame()).close_code == 1002
    await ws.ended(5)


async def test_clients_that_end_between_two_bytes_leave_no_session(server, connect, user):
    client = await connect(server, user)
    await client.raw("SEND\ndestination:/app/heart")
    await client.vanish()
    await server.wait_online(user, False, 1.8)
