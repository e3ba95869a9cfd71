"""Fifty slow readers of 300 users who flip again and again (DESIGN §4)."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

from tests.hostile.conftest import MIB, resident
from tests.support.raw_websocket import TEXT
from tests.support.stomp_client import QUEUE, Frame, encode
from tests.support.waiting import wait_until


@pytest.mark.timeout(120)
async def test_fifty_slow_readers_are_dropped_and_others_get_every_flip(start_server, connect, raw, users):
    """WIRE §6: "1008 | [...] slow reader (or a reset where nothing can be written)"; DESIGN §4, "Fan-out".

    Red when what waits for a slow reader is kept, or when its writing holds up others.
    """
    server = await start_server(lease_seconds=60, send_seconds=1)
    names = [users("flips") for _ in range(300)]
    clients = [await connect(server, name) for name in names]
    fast = await connect(server, users("fast"))
    await fast.subscribe()
    await fast.watch(names)
    asking = encode(Frame("SEND", {"destination": "/app/presence.subscribe"}, json.dumps({"userIds": names})))
    said: list[bool] = []

    async def flip() -> None:
        said.append(bool(len(said) % 2))
        await asyncio.gather(*(client.set_online(said[-1]) for client in clients))
        await wait_until(lambda: all(fast.changes(name) == said for name in names), 20, what="every flip", every=0.2)

    async def slow_ones() -> None:
        dropped = server.log.count("a client is dropped: slow reader")
        for _ in range(50):
            ws = await raw(server.ws, receive_buffer=2048)
            token = server.token(users("slow"))
            connecting = Frame("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {token}"})
            ws.write(TEXT, encode(connecting).encode())
            for number in range(16):
                ws.write(TEXT, encode(Frame("SUBSCRIBE", {"id": str(number), "destination": QUEUE})).encode())
            ws.write(TEXT, asking.encode())
        for _ in itertools.repeat(None, 10):
            await flip()
            if server.log.count("a client is dropped: slow reader") - dropped == 50:
                return
        await wait_until(
            lambda: server.log.count("a client is dropped: slow reader") - dropped == 50, 10, what="all to be dropped"
        )

    await slow_ones()
    before = resident(server)
    await slow_ones()
    assert resident(server) - before < 10 * MIB
