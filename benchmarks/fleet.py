"""Rows of the table that need Kafka, Cassandra and several servers: what the fleet costs."""

from __future__ import annotations

import asyncio
import os
import tempfile
from asyncio import Future
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.client import HEARTBEAT, Socket, frame, send
from benchmarks.measure import DRIVER_CORE, SERVER_CORE, Row, Server, Servers, cpu, in_waves, pairs, percentile, pin
from benchmarks.rows import close, paced, sessions, users
from presence.adapters.cassandra import CassandraSession
from presence.adapters.kafka import KafkaBus
from tests.support.cassandra import CassandraProcess
from tests.support.kafka import KafkaProcess
from tests.support.redis_cluster import RedisClusterProcess
from tests.support.store import ValkeyProcess
from tests.support.waiting import wait_until


@asynccontextmanager
async def stores(*, cassandra: bool = True) -> AsyncIterator[dict[str, Any]]:
    """Real stores, set up; the settings that name them."""
    async with AsyncExitStack() as stack:
        redis, kafka, rows = ValkeyProcess("--notify-keyspace-events", "Ex"), KafkaProcess(), CassandraProcess()
        started: list[ValkeyProcess | KafkaProcess | CassandraProcess] = [redis, kafka, *([rows] if cassandra else [])]
        for one in started:
            stack.callback(one.close)
        await asyncio.gather(*(one.start() for one in started))
        for one in started:
            pin(one.pid, DRIVER_CORE)
        bus = KafkaBus([kafka.url])
        await bus.create_topic(6, 3_600_000, 1)
        await bus.close()
        settings: dict[str, Any] = {"redis_url": redis.url, "kafka_bootstrap_servers": kafka.url}
        if cassandra:
            session = CassandraSession([rows.url])
            await session.create_schema({"class": "SimpleStrategy", "replication_factor": 1})
            await session.close()
            settings["cassandra_contact_points"] = rows.url
        yield settings


async def all_up(server: Server) -> None:
    """Wait until the server has reached all that it is set up with."""

    async def up() -> bool:
        found = (await server.get("/health/ready", "driver")).json()["dependencies"]
        return all(one["state"] == "up" for one in found.values())

    await wait_until(up, 30, what="all of the server's stores", every=0.2)


async def kafka() -> list[Row]:
    """200 changes on one instance, told on another; the baseline is a record there and back, in this process."""
    rows = [
        Row("change → MESSAGE on another instance, p50 (baseline: aiokafka, produce → consume)", "ms", "≤ 3"),
        Row("… p99", "ms", "reported"),
    ]
    async with stores(cassandra=False) as settings, Servers() as servers:
        one, other = await servers.presence(**settings), await servers.presence(**settings)
        await asyncio.gather(all_up(one), all_up(other))
        [alice], [bob] = await sessions(one, ["alice"]), await sessions(other, ["bob"])
        bob.subscribe()
        await bob.watch(["alice"])
        url = settings["kafka_bootstrap_servers"]
        bare = KafkaBus([url], topic="bare")
        await bare.create_topic(1, 3_600_000, 1)
        await bare.close()
        producer = AIOKafkaProducer(bootstrap_servers=url, acks="all", linger_ms=0)
        consumer = AIOKafkaConsumer(bootstrap_servers=url)
        await producer.start()
        await consumer.start()
        consumer.assign([TopicPartition("bare", 0)])
        await consumer.seek_to_end()

        async def ours() -> Sequence[float]:
            times = []
            for number in range(200):
                told: Future[float] = asyncio.get_running_loop().create_future()
                bob.on_message = lambda _, now, told=told: told.set_result(now)
                began = perf_counter()
                alice.write(send("/app/online-status", {"online": number % 2 == 1}))
                async with asyncio.timeout(10):
                    times.append(await told - began)
                await asyncio.sleep(0.012)
            return [percentile(times, share) * 1000 for share in (0.5, 0.99)]

        async def base() -> Sequence[float]:
            times = []
            for _ in range(200):
                began = perf_counter()
                await producer.send("bare", bytes(200), key=b"alice")
                async with asyncio.timeout(10):
                    await consumer.getone()
                times.append(perf_counter() - began)
                await asyncio.sleep(0.012)
            return [percentile(times, share) * 1000 for share in (0.5, 0.99)]

        await pairs(rows, ours, base)
        await consumer.stop()
        await producer.stop()
    return rows


async def _beats(server: Server, opened: Sequence[Socket]) -> Sequence[float]:
    before = cpu(server.pid)
    sent = await paced(opened, frame(HEARTBEAT), rate=3_000, seconds=4)
    await asyncio.sleep(0.2)
    return [(cpu(server.pid) - before) / sent * 1e6]


async def fleet() -> list[Row]:
    """Heartbeats while nothing changes, with Kafka and Cassandra; the baseline is the embedded mode."""
    row = Row("server CPU per heartbeat with Kafka and Cassandra (baseline: embedded)", "µs", "1")
    async with stores() as settings, Servers() as servers:
        ours, base = await servers.presence(**settings), await servers.presence()
        await all_up(ours)
        mine, theirs = await sessions(ours, users(1_000)), await sessions(base, users(1_000))
        await pairs([row], partial(_beats, ours, mine), partial(_beats, base, theirs))
    return [row]


async def cluster() -> list[Row]:
    """Heartbeats on a cluster of three primaries and 12 partitions; the baseline is one Valkey."""
    row = Row("server CPU per heartbeat, Redis Cluster of 3 primaries (baseline: one Valkey)", "µs", "reported")
    async with Servers() as servers, AsyncExitStack() as stack:
        redis, one = RedisClusterProcess(), ValkeyProcess()
        stack.callback(redis.close)
        stack.callback(one.close)
        await redis.start()
        await one.start()
        ours = await servers.presence(redis_url=redis.url, redis_partitions=12)
        base = await servers.presence(redis_url=one.url)
        mine, theirs = await sessions(ours, users(1_000)), await sessions(base, users(1_000))
        await pairs([row], partial(_beats, ours, mine), partial(_beats, base, theirs))
        keys = [node.redis().dbsize() for node in redis.nodes]
        row.notes.append(f"keys on the primaries: {', '.join(map(str, keys))}")
    return [row]


async def storm() -> list[Row]:
    """5,000 users on two servers go and come back at once; each change is told to one watcher and kept in Cassandra."""
    told_row = Row("reconnect storm of 5,000 users on two servers: changes told a second", "/s", "reported")
    kept_row = Row("… changes kept in Cassandra a second", "/s", "reported")
    hold = Row("… a callback holds a server's loop, p99.9 of CPU time", "ms", "≤ 20")
    names = users(5_000)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("one", "other")]
        async with stores() as settings, Servers() as servers:
            running = []
            for file in files:
                os.environ["BENCHMARK_HOLDS"] = str(file)
                running.append(await servers.presence("benchmarks.timed", **settings))
            del os.environ["BENCHMARK_HOLDS"]
            pin(running[1].pid, DRIVER_CORE if DRIVER_CORE != SERVER_CORE else SERVER_CORE)
            await asyncio.gather(*map(all_up, running))
            count = 0

            def take(message: bytes, _now: float) -> None:
                nonlocal count
                count += message.count(b"MESSAGE\n")

            watchers = []
            for number in range(50):  # each watches 100 users, of both servers
                [watcher] = await sessions(running[number % 2], [f"watcher-{number}"])
                watcher.subscribe()
                await watcher.watch(names[100 * number : 100 * (number + 1)])
                watcher.on_message = take
                watchers.append(watcher)
            tokens = [running[0].token(name) for name in names]

            async def arrive() -> list[Socket]:
                ports = [running[number % 2].port for number in range(len(names))]
                makers = [partial(Socket.connect, *one) for one in zip(ports, tokens, strict=True)]
                return await in_waves(makers, width=200)

            opened = await arrive()
            await wait_until(lambda: count >= 5_000, 60, what="all to be told")
            await asyncio.sleep(2)
            count, began, redis = 0, perf_counter(), running[0].redis()
            await close(opened)
            # Who is back before its watcher is told that it went is news to nobody.
            await wait_until(lambda: count >= 5_000, 60, what="all to be told", every=0.01)
            opened = await arrive()
            await wait_until(lambda: count >= 10_000, 60, what="all to be told", every=0.01)
            told_row.ours.append(10_000 / (perf_counter() - began))

            def kept() -> bool:
                cursor: Any = redis.get("presence:cursor:cassandra")
                return int(cursor or 0) >= last

            version: Any = redis.get("presence:version")
            last = int(version)
            await wait_until(kept, 120, what="all to be kept", every=0.01)
            kept_row.ours.append(10_000 / (perf_counter() - began))
            await close([*opened, *watchers])
        for file in files:
            short, *long = map(float, file.read_text().split())
            rank = int(0.999 * (short + len(long)) - short)
            hold.ours.append(long[rank] if rank >= 0 else 1.0)
            hold.notes.append(f"longest {long[-1]:.0f} ms")
    return [told_row, kept_row, hold]


ROWS = {row.__name__: row for row in (kafka, fleet, cluster, storm)}
