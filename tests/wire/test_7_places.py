"""WIRE §7, Other places: Redis keys, in both kinds of store, as the guide's troubleshooting section expects them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing

import pytest
import pytest_asyncio
import redis

from tests.support.server import ServerProcess
from tests.support.store import ValkeyProcess
from tests.support.waiting import wait_until

LEASE = 2  # s


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=("embedded", "outside"))
async def server(request: pytest.FixtureRequest) -> AsyncIterator[ServerProcess]:
    """A server with each kind of store. The outside one is set up as the guide asks: `notify-keyspace-events Ex`."""
    options = ("--notify-keyspace-events", "Ex", "--enable-debug-command", "yes")
    store = ValkeyProcess(*options) if request.param == "outside" else None
    process: ServerProcess | None = None
    try:
        url = (await store.start()).url if store else None
        process = ServerProcess(lease_seconds=LEASE, amnesty_seconds=0, redis_url=url)
        yield await process.start().ready()
        await process.finish()
    finally:
        if process:
            process.close()
        if store:
            store.close()


@pytest.fixture
def store(server: ServerProcess) -> redis.Redis:
    """What an operator's `redis-cli` talks to."""
    return server.redis()


async def test_smembers_of_the_online_set_are_the_online_users(server, store, connect, users):
    """WIRE §7: "`SMEMBERS presence:online`"; guide: "`presence:online` - Set of all online user IDs"."""
    alice, bob = users("alice"), users("bob")
    one, other = await connect(server, alice), await connect(server, alice)
    await connect(server, bob)
    assert {alice, bob} <= store.smembers("presence:online")
    await one.disconnect()
    assert alice in store.smembers("presence:online")
    await other.disconnect()
    assert alice not in store.smembers("presence:online")


async def test_each_session_has_a_key_with_its_device_and_the_lease_as_its_ttl(server, store, connect, user):
    """WIRE §7.

    "`KEYS presence:user:*:online:*`"; guide: "`presence:user:{userId}:online:{sessionId}` - Individual session keys
    with TTL (60s)".
    """
    phone = await connect(server, user, headers={"device": "mobile"})
    browser = await connect(server, user)
    keys = {f"presence:user:{user}:online:{client.connected.headers['session']}" for client in (phone, browser)}
    assert set(store.keys(f"presence:user:{user}:online:*")) == keys
    assert keys <= set(store.keys("presence:user:*:online:*"))
    assert sorted(store.mget(keys)) == ["mobile", "web"]
    assert all(0 < store.pttl(key) <= LEASE * 1000 for key in keys)
    await phone.disconnect()
    assert len(store.keys(f"presence:user:{user}:online:*")) == 1
    await browser.set_online(False)
    assert store.keys(f"presence:user:{user}:online:*") == []


async def test_a_heartbeat_extends_the_ttl_and_moves_last_active(server, store, connect, user):
    """Guide, Heartbeat Flow.

    "Extend session key TTL to 60s; Update last_active timestamp"; WIRE §7: "`GET presence:user:{id}:last_active`";
    guide: "Redis stores millisecond-precision timestamps".
    """
    before = time.time()
    client = await connect(server, user)
    key = f"presence:user:{user}:online:{client.connected.headers['session']}"
    first = int(store.get(f"presence:user:{user}:last_active"))
    assert before - 0.01 <= first / 1000 <= time.time()
    end = store.pexpiretime(key)
    await client.expect_nothing(0.2)
    before = time.time()
    await client.beat()
    last = int(store.get(f"presence:user:{user}:last_active"))
    assert before - 0.01 <= last / 1000 <= time.time()
    assert last > first
    assert store.pexpiretime(key) > end
    await client.disconnect()
    assert int(store.get(f"presence:user:{user}:last_active")) >= last


async def test_smembers_of_the_watchers_are_those_who_watch(server, store, connect, users):
    """WIRE §7: "`SMEMBERS presence:user:{id}:watchers`"; guide: "Set of users watching this user's presence"."""
    alice, bob, carol = users("alice"), users("bob"), users("carol")
    one, other, third = [await connect(server, user) for user in (bob, bob, carol)]
    async with one.beating(), other.beating(), third.beating():
        for client in (one, other, third):
            await client.watch([alice])
        key = f"presence:user:{alice}:watchers"
        await wait_until(lambda: store.smembers(key) == {bob, carol}, what="both to be recorded")
        await third.disconnect()
        await wait_until(lambda: store.smembers(key) == {bob}, what="a connection that is gone to watch no more")
        recorded = f"presence:user:{bob}:watching"
        await wait_until(lambda: store.scard(recorded) == 2, what="both sessions to be recorded")
        await one.unwatch([alice])
        await wait_until(lambda: store.scard(recorded) == 1, what="one of them to watch no more")
        assert store.smembers(key) == {bob}
    await other.unwatch([alice])
    await wait_until(lambda: store.smembers(key) == set(), what="the last one to watch no more")


async def test_the_expired_events_of_session_keys_are_published(server, store, connect, user):
    """WIRE §7.

    "`PSUBSCRIBE __keyevent@*__:expired`"; DESIGN §3.3: "it touches the due session keys with EXISTS, so that the
    guide's `PSUBSCRIBE …:expired` shows real events".
    """
    if server.settings["redis_url"]:
        # Redis itself takes its time to find keys that have expired: here it does not look at all.
        store.execute_command("DEBUG", "SET-ACTIVE-EXPIRE", "0")
    with closing(store.pubsub(ignore_subscribe_messages=True)) as events:
        events.psubscribe("__keyevent@*__:expired")
        events.get_message(timeout=5)  # the subscription's confirmation
        client = await connect(server, user)
        key = f"presence:user:{user}:online:{client.connected.headers['session']}"
        expired = set()

        def is_published() -> bool:
            while (message := events.get_message(timeout=0)) is not None:
                expired.add(message["data"])
            return key in expired

        await wait_until(is_published, LEASE + 2, what=f"the expired event of {key}")
    await server.wait_online(user, False, timeout=2)


async def test_keyspace_notifications_are_on(store):
    """Guide, Troubleshooting: "`CONFIG GET notify-keyspace-events`"; Redis Setup: "notify-keyspace-events Ex"."""
    flags = store.config_get("notify-keyspace-events")["notify-keyspace-events"]
    assert "E" in flags
    assert "x" in flags or "A" in flags


async def test_the_other_keys_are_those_of_the_design(server, store, connect, users):
    """DESIGN §3: the key tables; WIRE §7: "Redis keys: `DESIGN.md` §3"."""
    alice, bob = users("alice"), users("bob")
    client = await connect(server, alice)
    session = client.connected.headers["session"]
    await client.watch([bob])
    types = {
        "presence:online": "set",
        f"presence:user:{alice}:online:{session}": "string",
        f"presence:user:{alice}:last_active": "string",
        f"presence:user:{bob}:watchers": "set",
        f"presence:user:{alice}:sessions": "zset",
        f"presence:user:{alice}:watching:{session}": "set",
        f"presence:user:{alice}:change": "hash",
        "presence:deadlines": "zset",
        "presence:changes": "stream",
        "presence:version": "string",
        "presence:swept": "string",
    }
    await wait_until(lambda: store.exists(f"presence:user:{bob}:watchers"), what="it to be recorded who watches")
    assert {key: store.type(key) for key in types} == types
    # Nothing of ours lies outside.
    assert all(key.startswith("presence:") for key in store.scan_iter())
    lease_end = store.zscore(f"presence:user:{alice}:sessions", session)
    assert lease_end == store.zscore("presence:deadlines", f"{alice}:{session}")
    assert lease_end == store.pexpiretime(f"presence:user:{alice}:online:{session}")
    assert store.smembers(f"presence:user:{alice}:watching:{session}") == {bob}
    assert store.hgetall(f"presence:user:{alice}:change").items() >= {("online", "1"), ("device", "web")}


async def test_each_change_is_in_the_stream_once_with_its_reason(server, store, connect, users):
    """WIRE §7.

    "the event as above plus `device`, `lastActive` and `reason` (`connected`, `disconnected`, `signed-off`, `expired`,
    `revived`, [...])"; DESIGN §3: "`presence:changes`: every change"; "Its entry id is the change's version".
    """
    alice, watcher = users("alice"), await connect(server, users("watcher"))
    async with watcher.beating():
        await watcher.subscribe()
        await watcher.watch([alice])
        client = await connect(server, alice, headers={"device": "tablet"})
        await client.set_online(False)
        await client.set_online(True)
        await server.wait_online(alice, False, timeout=LEASE + 2)
        await client.beat()
        second = await connect(server, alice)
        await second.disconnect()
        await client.disconnect()
        await wait_until(lambda: len(watcher.changes(alice)) == 6)
    entries = [(entry_id, fields) for entry_id, fields in store.xrange("presence:changes") if fields["user"] == alice]
    reasons = [fields["reason"] for _, fields in entries]
    assert reasons == ["connected", "signed-off", "revived", "expired", "revived", "disconnected"]
    assert [fields["online"] for _, fields in entries] == ["1", "0", "1", "0", "1", "0"]
    assert all(fields["device"] == "tablet" for _, fields in entries)
    assert all(abs(int(fields["lastActive"]) / 1000 - time.time()) < 30 for _, fields in entries)
    ids = [entry_id.split("-") for entry_id, _ in entries]
    versions = [int(ms) * 1000 + int(us) for ms, us in ids]
    assert versions == [event["version"] for event in watcher.events(alice) if "snapshot" not in event]


async def test_what_cassandra_would_hold_is_in_the_history_file(server, connect, user):
    """WIRE §7.

    "Cassandra `user_presence(user_id text PRIMARY KEY, is_online boolean, last_active timestamp, device text)`"; DESIGN
    §5: "SQLite for what Cassandra would hold".
    """
    query = "SELECT is_online, last_active, device FROM user_presence WHERE user_id = ?"
    with closing(sqlite3.connect(server.data_dir / "history.db", timeout=10)) as db:
        client = await connect(server, user, headers={"device": "mobile"})
        row = await wait_until(lambda: db.execute(query, (user,)).fetchone(), what="the user in the history")
        assert (row[0], row[2]) == (1, "mobile")
        await client.disconnect()
        row = await wait_until(lambda: (found := db.execute(query, (user,)).fetchone())[0] == 0 and found)
        assert abs(row[1] / 1000 - time.time()) < 10
        assert row[2] == "mobile"


async def test_the_embedded_store_is_for_its_owner_alone(start_server):
    """DESIGN §5: "it starts a private Valkey"."""
    server = await start_server()
    assert (server.data_dir / "valkey.sock").stat().st_mode & 0o077 == 0
    assert server.redis().config_get("port") == {"port": "0"}
