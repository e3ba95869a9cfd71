"""Clients that send as fast as they can and read nothing: ended or held back, and a neighbour is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.hostile.conftest import MIB, resident
from tests.support.raw_websocket import PING, TEXT, RawWebSocket, ws_frame
from tests.support.server import ServerProcess, running
from tests.support.stomp_client import QUEUE, Frame, encode
from tests.support.waiting import wait_until

HEARTBEAT = "SEND\ndestination:/app/heartbeat\n\n\0"
WATCH = encode(
    Frame("SEND", {"destination": "/app/presence.subscribe"}, json.dumps({"userIds": [f"id-{n}" for n in range(1000)]}))
)
PAIR = f"SUBSCRIBE\nid:0\ndestination:{QUEUE}\n\n\0UNSUBSCRIBE\nid:0\n\n\0"
FLOOD_SECONDS = 1.5
TINY = ws_frame(TEXT, b"\n", flags=0) + ws_frame(0, b"\n", flags=0) * 2_000 + ws_frame(0, b"\n")
EMPTY = ws_frame(TEXT, b"", flags=0) + ws_frame(0, b"", flags=0) * 2_000 + ws_frame(0, b"")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def flooded() -> AsyncIterator[ServerProcess]:
    """A server that gives up slow readers after 1 s."""
    async with running(lease_seconds=60, send_seconds=1) as process:
        yield process


async def flood(server: ServerProcess, user: str, data: bytes, path: str = "") -> bool:
    """Send ``data`` again and again, and read nothing; return whether the server has ended it meanwhile."""
    ws = await RawWebSocket.connect(server.ws + path, receive_buffer=4096)
    connecting = encode(Frame("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {server.token(user)}"}))
    ws.write(TEXT, (json.dumps([connecting]) if path else connecting).encode())
    try:
        async with asyncio.timeout(FLOOD_SECONDS):
            while True:
                ws.writer.write(data)
                await ws.writer.drain()
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    finally:
        ws.abort()


FLOODS = {
    "heartbeats": (ws_frame(TEXT, HEARTBEAT.encode() * 50), ""),
    "watches": (ws_frame(TEXT, WATCH.encode()), ""),
    "subscriptions": (ws_frame(TEXT, PAIR.encode() * 50), ""),
    "SockJS arrays": (ws_frame(TEXT, json.dumps([HEARTBEAT] * 50).encode()), "/0/x/websocket"),
    "SockJS arrays of nothing": (ws_frame(TEXT, json.dumps([""] * 250_000).encode()), "/0/x/websocket"),
    "1 MiB of EOLs": (ws_frame(TEXT, b"\n" * MIB), ""),
    "single EOLs": (ws_frame(TEXT, b"\n") * 2_000, ""),
    "pings": (ws_frame(PING, b"x" * 125) * 500, ""),
    "tiny fragments": (TINY, ""),
    "empty fragments": (EMPTY, ""),
}


@pytest.mark.parametrize("what", FLOODS)
async def test_a_flood_grows_no_memory_and_delays_no_answer_for_long(flooded, neighbour, users, what):
    """WIRE §6: "100 frames a second sustained with bursts of 400", then 1008; DESIGN §6: "ASGI `receive` is bounded".

    Red with an inbound queue without a bound, or when frames are not counted.
    """
    data, path = FLOODS[what]
    healthy = await neighbour(flooded)
    async with healthy.served():
        await flood(flooded, users("warm"), data, path)
        before = resident(flooded)
        ended = await flood(flooded, users("flood"), data, path)
        await wait_until(lambda: resident(flooded) - before < 10 * MIB, 10, what="the memory not to have grown")
    if what in ("heartbeats", "watches", "subscriptions", "SockJS arrays"):
        assert ended, "more frames a second than are allowed"


async def test_a_pipelined_flood_of_requests_is_held_back(flooded, neighbour, users):
    """DESIGN §7. Red without a bound on what is read ahead of the answers."""
    token = flooded.token(users("flood"))
    request = f"GET /api/presence/friends HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    healthy = await neighbour(flooded)

    async def pipeline() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", flooded.port, limit=4096)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(FLOOD_SECONDS):
                while True:
                    writer.write(request * 100)
                    await writer.drain()
        writer.transport.abort()

    async with healthy.served():
        await pipeline()
        before = resident(flooded)
        await pipeline()
        await wait_until(lambda: resident(flooded) - before < 10 * MIB, 10, what="the memory not to have grown")
