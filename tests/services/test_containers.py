"""Two presence servers on a Redis in a container: leases that expire, sessions, and Redis killed and paused.

And the three services in containers keep what those as processes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import Connect, StartService
from tests.services.talk import make_table, make_topic, received, send, session
from tests.support import kafka as kafka_support
from tests.support import services
from tests.support.server import ServerProcess
from tests.support.stomp_client import StompClient
from tests.support.truth import Truth
from tests.support.waiting import wait_until
from tests.support.witness import told_truly

LEASE = 2.0
AMNESTY = 2.0
SLACK = 2.0
"""Room for a loaded machine, s."""
SETTLED = AMNESTY + LEASE + SLACK + 3.0


@dataclass
class Pair:
    """Two servers on one Redis in a container, and on each somebody who watches."""

    store: services.Service
    servers: list[ServerProcess]
    watchers: list[StompClient]

    async def watch(self, *users: str) -> None:
        for watcher in self.watchers:
            await watcher.watch(users)

    async def told(self, user: str, online: bool, timeout: float = 5.0) -> None:
        """Both watchers are told."""
        for watcher in self.watchers:
            await watcher.expect_event(user, online, timeout)

    async def told_truly(self, expected: dict[str, list[bool]]) -> None:
        """Both watchers were told exactly this, and the truth last."""
        await told_truly(self.watchers, Truth(self.servers[0]), expected)


@pytest_asyncio.fixture
async def pair(start_container: StartService, start_server, connect: Connect, users) -> AsyncIterator[Pair]:
    store = await start_container("redis")
    settings: dict[str, Any] = {"lease_seconds": LEASE, "amnesty_seconds": AMNESTY, "store_timeout_seconds": 0.5}
    servers = await asyncio.gather(*(start_server(redis_url=store.url, **settings) for _ in range(2)))
    watchers = [await connect(server, users("watcher")) for server in servers]
    for watcher in watchers:
        await watcher.subscribe()
    made = Pair(store, list(servers), watchers)
    async with watchers[0].beating(0.4), watchers[1].beating(0.4):
        await settled(*servers)
        yield made


async def settled(*servers: ServerProcess) -> None:
    """Wait until "offline" is certain."""

    async def certain() -> bool:
        answers = [await server.get("/api/presence/check/nobody", "nobody") for server in servers]
        return all(answer.status == 200 for answer in answers)

    await wait_until(certain, SETTLED, what="the store to have settled")


async def test_a_session_that_does_not_beat_ends_with_its_lease(pair: Pair, connect: Connect, users):
    silent, beating = users("silent"), users("beating")
    await pair.watch(silent, beating)
    await connect(pair.servers[0], silent)
    other = await connect(pair.servers[1], beating)
    async with other.beating(0.4):
        await pair.told(silent, True)
        await pair.told(beating, True)
        await pair.told(silent, False, LEASE + SLACK)
        await pair.told_truly({silent: [True, False], beating: [True]})


async def test_a_user_of_several_sessions_is_offline_with_the_last(pair: Pair, connect: Connect, user):
    await pair.watch(user)
    first, second = [await connect(server, user) for server in pair.servers]
    async with first.beating(0.4), second.beating(0.4):
        await pair.told(user, True)
        assert len(Truth(pair.servers[0]).leases(user)) == 2
        await first.disconnect()
        for server in pair.servers:
            assert await server.is_online(user)
        await second.disconnect()
    await pair.told(user, False)
    await pair.told_truly({user: [True, False]})


@pytest.mark.parametrize("fault", ["killed", "paused"])
async def test_nobody_who_beats_is_told_offline_while_redis_is_away(pair: Pair, connect: Connect, users, fault):
    stays, leaves = users("stays"), users("leaves")
    await pair.watch(stays, leaves)
    stay, leave = await connect(pair.servers[0], stays), await connect(pair.servers[1], leaves)
    async with stay.beating(0.4):
        await pair.told(stays, True)
        await pair.told(leaves, True)
        await (pair.store.kill9() if fault == "killed" else pair.store.freeze())
        await leave.close()
        for server in pair.servers:
            assert (await server.get(f"/api/presence/check/{leaves}", leaves)).status in (200, 503)
        await asyncio.sleep(LEASE + 0.6)  # the outage is to be longer than a lease
        await (pair.store.start() if fault == "killed" else pair.store.thaw())
        await pair.told(leaves, False, SETTLED)
        await settled(*pair.servers)
        await pair.told_truly({stays: [True], leaves: [True, False]})


# The services


async def test_a_redis_in_a_container_keeps_its_data_and_its_port_over_a_kill(start_container):
    store = await start_container("redis")
    store.redis().set("key", "value")
    url = store.url
    await store.restart()
    assert (store.redis().get("key"), store.url) == ("value", url)


async def test_a_kafka_in_a_container_is_killed_and_paused(start_container):
    kafka = await start_container("kafka")
    topic = await make_topic(kafka.url)
    await send(kafka.url, topic, b"1", b"2")
    await kafka.restart()
    await send(kafka.url, topic, b"3")
    assert await received(kafka.url, topic, 3) == [b"1", b"2", b"3"]
    await kafka.freeze()
    assert not await kafka_support.answers(kafka.url)
    await kafka.thaw()
    await wait_until(lambda: kafka_support.answers(kafka.url), 10, what="Kafka to answer again")


async def test_a_cassandra_in_a_container_keeps_its_rows_over_a_kill(start_container):
    cassandra = await start_container("cassandra")
    db = await asyncio.to_thread(session, cassandra.url)
    table = await asyncio.to_thread(make_table, db)
    await asyncio.to_thread(db.execute, f"INSERT INTO {table} (a) VALUES (1)")
    await asyncio.to_thread(db.cluster.shutdown)
    await cassandra.restart()
    db = await asyncio.to_thread(session, cassandra.url)
    rows = await asyncio.to_thread(lambda: list(db.execute(f"SELECT a FROM {table}")))
    await asyncio.to_thread(db.cluster.shutdown)
    assert [row.a for row in rows] == [1]
