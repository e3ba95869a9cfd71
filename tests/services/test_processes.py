"""The services of the tests keep what they are said to keep: as processes, and those that a whole run shares."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from cassandra import OperationTimedOut
from cassandra.cluster import NoHostAvailable

from tests.services.talk import make_table, make_topic, received, send, session
from tests.support import cassandra as cassandra_support
from tests.support import kafka as kafka_support
from tests.support import services
from tests.support.redis_cluster import RedisClusterProcess
from tests.support.sentinel import SentinelProcess
from tests.support.tls_store import TlsRedisProcess
from tests.support.waiting import wait_until


async def test_kafka_keeps_what_it_acknowledged_over_a_kill(start_kafka):
    kafka = await start_kafka()
    topic = await make_topic(kafka.url)
    await send(kafka.url, topic, b"1", b"2")
    await kafka.restart()
    await send(kafka.url, topic, b"3")
    assert await received(kafka.url, topic, 3) == [b"1", b"2", b"3"]


async def test_kafka_frozen_answers_nothing_and_thawed_it_goes_on(start_kafka):
    kafka = await start_kafka()
    await kafka.freeze()
    assert not await kafka_support.answers(kafka.url)
    await kafka.thaw()
    await wait_until(lambda: kafka_support.answers(kafka.url), 10, what="Kafka to answer again")


async def test_cassandra_keeps_what_it_acknowledged_over_a_kill(start_cassandra):
    cassandra = await start_cassandra()
    db = await asyncio.to_thread(session, cassandra.url)
    try:
        table = await asyncio.to_thread(make_table, db)
        for number in range(100):
            db.execute(f"INSERT INTO {table} (a) VALUES ({number})")
        await cassandra.restart()

        def rows() -> int:
            with contextlib.suppress(NoHostAvailable, OperationTimedOut):  # not connected again yet
                return len(list(db.execute(f"SELECT a FROM {table}")))
            return 0

        assert await wait_until(lambda: asyncio.to_thread(rows), 15, what="the session to recover") == 100
    finally:
        await asyncio.to_thread(db.cluster.shutdown)


async def test_cassandra_frozen_answers_nothing_and_thawed_it_goes_on(start_cassandra):
    cassandra = await start_cassandra()
    await cassandra.freeze()
    assert not await cassandra_support.answers(cassandra.url)
    await cassandra.thaw()
    await wait_until(lambda: cassandra_support.answers(cassandra.url), 10, what="Cassandra to answer again")


async def test_closed_they_leave_nothing_behind(start_kafka, start_cassandra):
    for start in (start_kafka, start_cassandra):
        service = await start()
        if not hasattr(service, "family"):
            continue  # in a container
        assert list(service.family()) == [service.pid]
        service.close()
        assert not service.family()
        assert not service.root.exists()


# Redis Cluster, Sentinel


async def test_a_cluster_serves_all_slots_and_keeps_its_data(start_cluster):
    cluster: RedisClusterProcess = await start_cluster()
    client = redis.RedisCluster("127.0.0.1", cluster.nodes[1].port, decode_responses=True)
    try:
        for number in range(100):
            client.set(f"key-{number}", number)
        assert [node.redis().dbsize() > 10 for node in cluster.nodes] == [True] * 3
        await cluster.restart()
        assert sum(int(str(node.redis().dbsize())) for node in cluster.nodes) == 100
    finally:
        client.close()


async def test_a_replica_takes_over_from_a_primary_that_was_killed(start_cluster):
    cluster: RedisClusterProcess = await start_cluster(replicas=True)
    await cluster.kill9(0)
    assert not cluster.nodes[0].running
    replica = cluster.replicas[0]
    await wait_until(lambda: replica.role() == "master", 10, what="the replica to take over")
    await cluster.settled()
    await cluster.nodes[0].start()
    await cluster.settled()
    assert cluster.nodes[0].role() == "slave"


@pytest.mark.parametrize("held_back", [False, True])
async def test_a_replica_takes_over_under_sentinels(start_sentinel, held_back):
    sentinel: SentinelProcess = await start_sentinel()
    first = sentinel.primary()
    assert first is sentinel.servers[0]
    first.redis().set("key", "value")
    first.redis().wait(1, 2000)
    if held_back:
        await sentinel.hold_back()
    first.redis().set("key", "newer")
    if not held_back:
        first.redis().wait(1, 2000)
    second = await sentinel.fail_over()
    assert second is sentinel.servers[1]
    assert second.redis().get("key") == ("value" if held_back else "newer")


async def test_a_redis_with_tls_lets_in_only_whom_it_knows(start_tls):
    store: TlsRedisProcess = await start_tls()
    client = redis.Redis.from_url(store.url, socket_timeout=5, decode_responses=True)
    assert client.acl_whoami() == "presence"
    client.close()
    for url in (store.plain_url, store.url.replace("a-secret", "another"), store.url.partition("?")[0]):
        stranger = redis.Redis.from_url(url, socket_timeout=5, retry=None)
        with pytest.raises(redis.RedisError):
            stranger.ping()
        stranger.close()


# One for a whole run


def test_all_tests_of_a_run_share_one(kafka, cassandra):
    for kind, kept in {"kafka": kafka, "cassandra": cassandra}.items():
        again = services.Run.join().shared(kind)
        assert (again.url, again.keeper) == (kept.url, kept.keeper)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_shared_service_ends_with_its_run_however_that_ends(tmp_path, how):
    leader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        kept = services.shared("redis", tmp_path, leader.pid)
        assert services.noted("redis", tmp_path) == kept
        client = redis.Redis.from_url(kept.url, socket_timeout=2, retry=None)
        assert client.ping()
        if how == signal.SIGTERM:
            assert services.end(tmp_path) == ["redis"]
        else:
            leader.kill()
            leader.wait()
        asyncio.run(wait_until(lambda: not services.alive(kept.keeper), 10, what="the keeper to end"))
        with pytest.raises(redis.ConnectionError):
            client.ping()
        client.close()
        assert not kept.folder or not Path(kept.folder).exists()
        assert services.noted("redis", tmp_path) is None
    finally:
        services.end(tmp_path)
        leader.kill()
        leader.communicate()


def test_an_address_given_from_outside_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PRESENCE_TEST_KAFKA", "broker.example:9092")
    kept = services.shared("kafka", tmp_path, None)
    assert (kept.url, kept.provider) == ("broker.example:9092", "outside")


def test_what_is_lacking_is_told_for_each_provider(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("PRESENCE_TEST_PROVIDER", "process")
    with pytest.raises(services.Lacking, match="Kafka cannot be had: as a process: there is no Java"):
        services.provider_of("kafka")
    monkeypatch.setenv("PRESENCE_TEST_PROVIDER", "else")
    with pytest.raises(services.Lacking, match="PRESENCE_TEST_PROVIDER must be process or container, not 'else'"):
        services.provider_of("kafka")


# By hand


def by_hand(folder: Path, *arguments: str) -> Any:
    command = [sys.executable, "-c", (
        "import sys, pathlib; from tests.support import services; "
        f"services.HAND_FOLDER = pathlib.Path({str(folder)!r}); sys.argv[0] = 'services'; sys.exit(services.main())"
    ), *arguments]  # fmt: skip
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(services.ROOT)},
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip


def test_by_hand_they_are_started_once_and_ended_once(tmp_path, kafka, cassandra):
    folder = tmp_path / "services"
    try:
        first = by_hand(folder)
        assert first.returncode == 0, first.stderr
        exports = dict(
            line.removeprefix("export ").split("=", 1)
            for line in first.stdout.splitlines()
            if line.startswith("export")
        )
        assert list(exports) == list(services.EXPORTS.values())
        assert by_hand(folder).stdout == first.stdout
        client = redis.Redis.from_url(exports["PRESENCE_REDIS_URL"], socket_timeout=2)
        assert client.ping()
        client.close()
    finally:
        stopped = by_hand(folder, "stop")
    assert stopped.stdout == "ended: redis, kafka, cassandra\n"
    assert by_hand(folder, "stop").stdout == "ended: nothing was running\n"
