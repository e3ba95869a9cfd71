"""What the tests of sessions and of watching share."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.support.stomp_client import StompClient
from tests.support.truth import Truth


@pytest.fixture
def truth(server) -> Truth:
    return Truth(server)


@pytest_asyncio.fixture
async def watcher(server, connect, users) -> StompClient:
    """Somebody who is subscribed."""
    client: StompClient = await connect(server, users("watcher"))
    await client.subscribe()
    return client


@pytest_asyncio.fixture
async def marker(server, connect, users) -> StompClient:
    """For `nothing_more`."""
    client: StompClient = await connect(server, users("marker"))
    return client
