"""What hostile clients are measured by: the memory of the server, and a healthy neighbour."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ServerProcess
from tests.support.stomp_client import StompClient

MIB = 2**20


class Neighbour:
    """A healthy client, who is to get all its answers, while the block runs, and then some."""

    def __init__(self, server: ServerProcess, client: StompClient) -> None:
        self.server = server
        self.client = client
        self.rounds = 0

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Neighbour]:
        """Ask again and again while the block runs; each answer must come within 10 s."""
        over = asyncio.Event()
        task = asyncio.create_task(self._ask(over))
        try:
            yield self
        finally:
            over.set()
            await asyncio.wait_for(task, 30)
        assert self.rounds > 0

    async def _ask(self, over: asyncio.Event) -> None:
        assert self.client.connected is not None
        user = self.client.connected.headers["user-name"]
        while not over.is_set() or not self.rounds:
            await self.client.send("/app/heartbeat", timeout=10)
            answer = await self.server.get(f"/api/presence/check/{user}", user)
            assert (answer.status, answer.json()) == (200, {"isOnline": True})
            self.rounds += 1
            await asyncio.sleep(0.05)


def resident(server: ServerProcess) -> int:
    """How much memory the server takes, in bytes."""
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * 4096


@pytest.fixture
def rss() -> Callable[[ServerProcess], int]:
    return resident


@pytest.fixture
def neighbour(connect, users) -> Any:
    """Make a `Neighbour` at a server."""

    async def make(server: ServerProcess) -> Neighbour:
        return Neighbour(server, await connect(server, users("neighbour")))

    return make
