"""WIRE §6, over the wire: every limit, at its default where that is cheap; and clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from presence.settings import Settings
from tests.support.raw_websocket import TEXT
from tests.support.server import ServerProcess, running
from tests.support.stomp_client import QUEUE, Frame, StompClient, encode
from tests.support.waiting import wait_until

BEAT = "SEND\ndestination:/app/heartbeat\n\n\0"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow() -> AsyncIterator[ServerProcess]:
    """A server with limits that are soon met."""
    async with running(
        max_frames_per_second=5,
        max_frames_burst=20,
        max_ids_per_second=20,
        max_ids_burst=40,
        max_ids_per_request=30,
        max_watches=50,
        max_user_connections=3,
        grace_seconds=1.5,
        lease_seconds=2,
        send_seconds=1,
    ) as process:
        yield process


def watch(users: list[str], command: str = "subscribe", **headers: str) -> str:
    """A SEND frame as text that watches, or unwatches, these users."""
    body = json.dumps({"userIds": users})
    return encode(Frame("SEND", {"destination": f"/app/presence.{command}", **headers}, body))


def ids(count: int, start: int = 0) -> list[str]:
    """Distinct ids."""
    return [f"id-{number}" for number in range(start, start + count)]


async def fails(client: StompClient, code: int, message: str, timeout: float = 5.0) -> None:
    """The connection ends with this close code, after an ERROR frame with this message."""
    got, error = await client.closed(timeout)
    assert error is not None, f"closed with {got} without ERROR"
    assert got == code, error
    assert message in error.body


def test_the_limits_are_those_that_wire_lists():
    """WIRE §6: "Limits (each a setting): [...]"; §3: the times of a connection."""
    settings = Settings.model_construct()
    assert (
        settings.max_frame_bytes,
        settings.max_header_lines,
        settings.max_header_line_bytes,
        settings.max_subscriptions,
        settings.max_user_connections,
        settings.max_held_sends,
        settings.max_frames_per_second,
        settings.max_frames_burst,
        settings.max_ids_per_second,
        settings.max_ids_burst,
        settings.max_ids_per_request,
        settings.max_watches,
        settings.max_subscribes_per_second,
        settings.max_message_bytes,
    ) == (65_536, 64, 8_192, 16, 50, 100, 100, 400, 5_000, 10_000, 1_000, 5_000, 4, 2**20)
    assert (
        settings.connect_seconds,
        settings.beat_seconds,
        settings.silence_seconds,
        settings.ping_seconds,
        settings.tcp_user_timeout_seconds,
        settings.max_connections,
    ) == (10, 10, 90, 20, 45, None)


# Size


@pytest.mark.parametrize("sockjs", [False, True], ids=["plain", "SockJS"])
async def test_a_frame_has_64_kib_at_most(server, connect, users, sockjs):
    """WIRE §6: "frame 64 KiB"; "SockJS: limits count after unwrapping"; "1009 | a STOMP frame [...] too large"."""
    url = f"{server.ws}/0/f/websocket" if sockjs else server.ws
    head = "SEND\ndestination:/app/heartbeat\nreceipt:r\n\n"
    largest = head + "é" * ((65_536 - len(head) - 1) // 2) + "\0"
    largest = largest.replace("é\0", "é" + "x" * (65_536 - len(largest.encode())) + "\0")
    assert len(largest.encode()) == 65_536
    client = await connect(server, users("user"), url=url, sockjs=sockjs)
    # In JSON every é takes 6 bytes: the SockJS message is much larger than the frame.
    await client.raw(json.dumps([largest]) if sockjs else largest)
    await client.expect("RECEIPT")
    larger = largest.replace("r\n\n", "r\n\nx")
    await client.raw(json.dumps([larger]) if sockjs else larger)
    await fails(client, 1009, "frame larger than 65536 bytes")


@pytest.mark.parametrize("length", ["65536", "9" * 18, "9" * 400])
async def test_a_frame_that_says_that_it_is_larger_is_refused_at_once(server, connect, user, length):
    client = await connect(server, user)
    await client.raw(f"SEND\ndestination:/app/heartbeat\ncontent-length:{length}\n\nx\0")
    await fails(client, 1009, "content-length")


async def test_a_frame_that_never_ends_is_refused_when_it_is_too_large(server, connect, user):
    client = await connect(server, handshake=False)
    with contextlib.suppress(Exception):
        for _ in range(70):
            await client.raw("x" * 1024)
    await fails(client, 1009, "frame larger than 65536 bytes")


async def test_a_websocket_message_has_1_mib_at_most(server, connect, users, raw):
    """WIRE §6.

    "1009 | a STOMP frame or WebSocket message too large (a WebSocket message over 1 MiB may be closed without
    ERROR)"; the largest is taken.
    """
    client = await connect(server, users("user"))
    await client.raw("\n" * (2**20 - len(BEAT)) + BEAT)
    await client.beat()
    await client.raw("\n" * (2**20 + 1))
    assert (await client.closed())[0] == 1009
    # One that goes on all the same, in pieces without an end.
    ws = await raw(server.ws)
    ws.write(TEXT, b"\n" * 2**19, flags=0)
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            ws.write(0, b"\n" * 2**19, flags=0)
            await ws.writer.drain()
    assert (await ws.frame()).close_code == 1009


async def test_of_a_websocket_message_that_is_too_large_nothing_is_kept(server, raw):
    """WIRE §6: "1009 | [...] WebSocket message too large"; who has not even said CONNECT cannot fill the memory."""
    memory = worst = resident(server)
    ws = await raw(server.ws)
    close = asyncio.create_task(ws.frame())
    ws.writer.write(bytes([8 << 4 | TEXT, 0x80 | 127]) + struct.pack("!Q", 2**40) + bytes(4))
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            while True:
                ws.writer.write(bytes(2**19))
                await ws.writer.drain()
                worst = max(worst, resident(server))
                await asyncio.sleep(0.005)
    assert (await close).close_code == 1009
    assert worst - memory < 20 * 2**20


async def test_a_frame_has_64_header_lines_at_most(server, connect, user):
    """WIRE §6: "64 header lines"; "1008 | [...] too many [...] headers"."""
    lines = "".join(f"x{number}:\n" for number in range(62))
    client = await connect(server, user)
    await client.raw(f"SEND\ndestination:/app/heartbeat\nreceipt:r\n{lines}\n\0")
    await client.expect("RECEIPT")
    await client.raw(f"SEND\ndestination:/app/heartbeat\nreceipt:r\n{lines}one:more\n\n\0")
    await fails(client, 1008, "more than 64 headers")


async def test_a_header_line_has_8_kib_at_most(server, connect, user):
    """WIRE §6: "header line 8 KiB"; "1008 | [...] header line too long"."""
    client = await connect(server, user)
    await client.raw(f"SEND\ndestination:/app/heartbeat\nreceipt:r\nx:{'é' * 4_095}\n\n\0")
    await client.expect("RECEIPT")
    await client.raw(f"SEND\ndestination:/app/heartbeat\nreceipt:r\nx:{'é' * 4_095}y\n\n\0")
    await fails(client, 1008, "header line longer than 8192 bytes")


async def test_connect_is_limited_as_well(server, connect, user):
    client = await connect(server, handshake=False)
    await client.raw(f"CONNECT\naccept-version:1.2\nAuthorization:Bearer {'x' * 9_000}\n\n\0")
    await fails(client, 1008, "header line longer than 8192 bytes")


# Number


async def test_a_connection_has_16_subscriptions_at_most(server, connect, users):
    """WIRE §6: "16 subscriptions a connection"; "1008 | [...] too many [...] subscriptions"."""
    client = await connect(server, users("user"))
    for number in range(16):
        await client.subscribe(f"sub-{number}")
    await client.unsubscribe("sub-3")
    await client.subscribe("sub-3")
    await client.watch(["u1"])
    assert len(client.events("u1")) == 16, "one for each"
    await client.send_frame("SUBSCRIBE", {"id": "one more", "destination": QUEUE})
    await fails(client, 1008, "more than 16 subscriptions")


async def test_a_connection_holds_100_sends_at_most(server, connect, user):
    """WIRE §6: "at most 100 held"; "1008 | [...] too many [...] held SENDs"."""
    client = await connect(server, user)
    held = [f"BEGIN\ntransaction:{name}\n\n\0" for name in ("a", "b")]
    held += [f"SEND\ndestination:/app/heartbeat\ntransaction:{'ab'[n % 2]}\n\n\0" for n in range(100)]
    await client.raw("".join(held))
    await client.receipt("ABORT", {"transaction": "b"})
    await client.raw("".join(frame for frame in held if "transaction:b" in frame))
    await client.beat()
    await client.raw(held[2])  # 50 and 50 are held
    await fails(client, 1008, "more than 100 SENDs")


async def test_a_frame_names_1000_ids_at_most(server, connect, users):
    """WIRE §5: "at most 1,000 ids in one frame"; §6: "Limits on ids count [...] all ids in a frame"."""
    client = await connect(server, users("user"))
    await client.watch(ids(1_000))
    await client.unwatch(ids(1_000))
    for command in ("subscribe", "unsubscribe"):
        client = await connect(server, users("user"))
        await client.raw(watch(["the-same"] * 1_001, command))
        await fails(client, 1008, "userIds: more than 1000 ids in one frame")


async def test_a_session_watches_5000_at_most(server, connect, users):
    """WIRE §5: "5,000 watched per session"; §6: "1008 | [...] too many [...] watches"."""
    client = await connect(server, users("user"))
    for start in range(0, 5_000, 1_000):
        await client.watch(ids(1_000, start))
    await client.watch(ids(1_000, 4_000))  # the same again are no more
    await client.unwatch(["id-0"])
    await client.watch(["another"])
    other = await connect(server, users("user"))
    await other.watch(["one-more"])
    await client.raw(watch(["one-more"]))
    await fails(client, 1008, "userIds: more than 5000 users watched")


async def test_frames_may_burst(server, connect, user):
    """WIRE §6: "100 frames a second sustained with bursts of 400"; "1008 | [...] too many [...] frames"."""
    client = await connect(server, user)
    await asyncio.sleep(0.05)  # in which the CONNECT is made up for
    await client.raw(BEAT * 399 + BEAT.replace("\n\n", "\nreceipt:last\n\n"))
    await client.expect("RECEIPT")
    client = await connect(server, user)
    await client.raw(BEAT * 402)
    await fails(client, 1008, "more than 100 frames a second")


async def test_frames_are_limited_in_the_long_run(narrow, connect, user):
    """WIRE §6: "100 frames a second sustained" (here 5, with bursts of 20). Heart-beats are no frames."""
    client = await connect(narrow, user)
    await client.raw(BEAT * 19 + "\n" * 1000)
    for _ in range(3):
        await asyncio.sleep(0.5)
        await client.raw("\n" * 10 + BEAT * 2)
    await client.expect_nothing(0.1)
    await client.raw(BEAT * 21)
    await fails(client, 1008, "more than 5 frames a second")


async def test_ids_are_limited_by_user_over_stomp_and_rest_together(narrow, connect, users):
    """WIRE §6.

    "5,000 ids a second and user with bursts of 10,000 (REST and STOMP together; REST answers 429)" (here 20 and
    40); "Limits on ids count distinct ids in a batch, all ids in a frame."
    """
    user, other = users("user"), users("other")
    one, two = await connect(narrow, user), await connect(narrow, user)
    await one.watch(ids(20))
    answer = await narrow.post("/api/presence/batch", user, json=ids(15) * 3)
    assert answer.status == 200, "15 distinct ids in a batch"
    answer = await narrow.post("/api/presence/batch", user, json=ids(30))
    assert answer.status == 429
    assert float(answer.headers["Retry-After"]) > 0
    await two.raw(watch(["the-same"] * 30))
    await fails(two, 1008, "userIds: too many ids a second")
    await (await connect(narrow, other)).watch(ids(30))  # nobody else is concerned
    await one.beat()  # nor is the user's other connection

    async def enough_again() -> bool:
        return bool((await narrow.post("/api/presence/batch", user, json=ids(20))).status == 200)

    await wait_until(enough_again, 5, what="ids to be had again", every=0.2)


async def test_ids_are_limited_in_the_long_run(start_server, user):
    """WIRE §6: "5,000 ids a second [...] with bursts of 10,000" (here 10, and 40): the burst is spent once."""
    server = await start_server(max_ids_per_second=10, max_ids_burst=40, max_ids_per_request=40)
    began = time.monotonic()
    assert (await server.post("/api/presence/batch", user, json=ids(40))).status == 200
    answer = await server.post("/api/presence/batch", user, json=ids(30))
    assert answer.status == 429
    # 30 ids take 3 s, but for what of that has passed.
    assert 3 - (time.monotonic() - began) <= int(answer.headers["Retry-After"]) <= 3


async def test_subscribes_are_limited_once_more_than_1000_are_watched(server, connect, users):
    """WIRE §6: "4 SUBSCRIBEs a second once more than 1,000 users are watched"."""
    again = "".join(
        encode(Frame("SUBSCRIBE", {"id": "x", "destination": QUEUE})) + encode(Frame("UNSUBSCRIBE", {"id": "x"}))
        for _ in range(10)
    )
    client = await connect(server, users("user"))
    await client.watch(ids(1_000))
    await client.raw(again)
    await client.beat()
    await client.watch(["one-more"])
    for number in range(4):
        await client.subscribe(f"sub-{number}")
    await client.raw(again)
    await fails(client, 1008, "more than 4 SUBSCRIBEs a second")


# Connections of a user


async def test_a_user_has_50_connections_at_most_over_all_instances(start_server, valkey, connect, user):
    """WIRE §6: "50 open connections a user (over all instances"; "1008 | [...] too many connections of a user"."""
    store = await valkey()
    servers = [await start_server(redis_url=store.url, amnesty_seconds=0, lease_seconds=30) for _ in range(2)]
    clients = [await connect(servers[number % 2], user) for number in range(50)]
    for server in servers:
        client = await connect(server, handshake=False)
        with pytest.raises(AssertionError, match="too many connections of this user"):
            await client.login(server.token(user))
        await fails(client, 1008, "too many connections of this user")
    await connect(servers[0], "someone-else")
    await clients[0].disconnect()
    await connect(servers[1], user)
    assert store.redis().zcard(f"presence:user:{user}:sessions") == 50


async def test_sessions_left_in_grace_do_not_count(narrow, connect, user):
    """WIRE §6: "sessions left in grace or drain do not count"."""
    clients = [await connect(narrow, user) for _ in range(3)]
    await clients[0].vanish()
    redis = narrow.redis()
    await wait_until(lambda: redis.hlen(f"presence:user:{user}:lost") == 1, what="the loss to be noticed")
    await connect(narrow, user)
    assert redis.zcard(f"presence:user:{user}:sessions") == 4
    client = await connect(narrow, handshake=False)
    with pytest.raises(AssertionError, match="too many connections"):
        await client.login(narrow.token(user))


@pytest.mark.parametrize("how", ["signed off", "lapsed"])
async def test_open_connections_without_a_lease_count(narrow, connect, user, how):
    """WIRE §6: "50 open connections a user" (here 3), whether they have a lease or not."""
    clients = [await connect(narrow, user) for _ in range(3)]
    if how == "signed off":
        for client in clients:
            await client.set_online(False)
    redis = narrow.redis()
    await wait_until(lambda: not redis.sismember("presence:online", user), what="the user to be offline")
    client = await connect(narrow, handshake=False)
    with pytest.raises(AssertionError, match="too many connections"):
        await client.login(narrow.token(user))
    await clients[0].close()

    async def is_accepted() -> bool:
        client = await connect(narrow, handshake=False)
        with contextlib.suppress(AssertionError):
            return bool(await client.login(narrow.token(user)))
        return False

    await wait_until(is_accepted, what="room for one more")


# Clients that do not read


async def test_a_client_that_does_not_read_is_dropped_and_delays_nobody(start_server, connect, raw, users):
    """WIRE §6.

    "1008 | [...] slow reader (or a reset where nothing can be written)"; DESIGN §4: "A client that does not drain
    at all within the send time limit is disconnected."
    """
    server = await start_server(send_seconds=1, lease_seconds=30)
    slow, other = users("slow"), users("other")
    neighbour = await connect(server, users("neighbour"))
    await neighbour.subscribe()
    await neighbour.watch([slow, other])
    ws = await raw(server.ws, receive_buffer=2048)
    connecting = {"accept-version": "1.2", "Authorization": f"Bearer {server.token(slow)}"}
    ws.write(TEXT, encode(Frame("CONNECT", connecting)).encode())
    await neighbour.expect_event(slow, True)
    memory = resident(server)
    subscribing = [encode(Frame("SUBSCRIBE", {"id": f"{n}", "destination": QUEUE})) for n in range(16)]
    # 16 snapshots of 1,000 users, about 4 MB each time: more than the kernel takes in for a client.
    asking = watch(["u" * 50 + str(number) for number in range(1_000)])
    ws.write(TEXT, "".join(subscribing).encode())
    for _ in range(5):
        ws.write(TEXT, asking.encode())
    worst = 0.0
    deadline = time.monotonic() + 8
    while neighbour.changes(slow) != [True, False]:
        assert time.monotonic() < deadline
        began = time.monotonic()
        someone = await connect(server, other)
        await neighbour.expect_event(other, True)
        await someone.disconnect()
        await neighbour.expect_event(other, False)
        worst = max(worst, time.monotonic() - began)
    assert "a client is dropped: slow reader" in server.log
    assert worst < 4
    assert resident(server) - memory < 50_000_000


def resident(server: ServerProcess) -> int:
    """How much memory the server takes, in bytes."""
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * 4096
