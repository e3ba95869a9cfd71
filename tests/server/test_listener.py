"""The listening socket under asyncio's server, as Hypercorn uses it (the last open file: tests/hostile)."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

from presence.bootstrap import _config, _listen
from presence.settings import load

CLIENTS = 200


async def test_of_many_who_wait_ten_are_let_in_at_each_turn_of_the_loop():
    """DESIGN §7: "What one client does never delays [...] another". Red with Hypercorn's own way: all in one turn."""
    settings = load(port=0)
    config = _config(settings, _listen(settings, shared=False))
    [listener] = config.create_sockets().insecure_sockets
    came: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: came.append(writer), sock=listener, backlog=config.backlog)
    at_each_turn: list[int] = []
    with ExitStack() as clients:
        for _ in range(CLIENTS):  # all at once, before any is accepted: the kernel holds them
            clients.enter_context(socket.create_connection(listener.getsockname(), timeout=5))
        async with asyncio.timeout(10):
            while len(came) < CLIENTS:
                before = len(came)
                await asyncio.sleep(0)
                at_each_turn.append(len(came) - before)
    for writer in came:
        writer.close()
        await writer.wait_closed()
    server.close()
    await server.wait_closed()
    assert max(at_each_turn) == 10
