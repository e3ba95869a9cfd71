"""presence.adapters.cassandra: what the history store does beyond its port (`test_history.py`), and in outages."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from presence.adapters.cassandra import HISTORY_TABLES, IN_FLIGHT, CassandraHistory, CassandraSession
from presence.core.model import Change
from presence.ports import HistoryUnavailable
from tests.adapters.conftest import ONE_NODE, cassandra_session
from tests.support.process import free_port
from tests.support.turns import uncollected
from tests.support.waiting import wait_until

NOW = time.time_ns() // 1000
GAP = 0.4  # s that the loop may be held, while each call to a frozen server takes its time limit, 0.5 s and more


@pytest.fixture
def history(session) -> CassandraHistory:
    return CassandraHistory(session, history_days=3)


def change(user: str, version: int, online: bool = True, **more) -> Change:
    return Change(user, online, version, version // 1000, **more)


async def rows(session, cql, *values):
    (found,) = await session.ask([(cql, values)])
    return found


@asynccontextmanager
async def never_held():
    """The event loop never waits for the server: between two turns it works, or the machine has no core for us."""
    held, worked = [0.0], [0.0]

    async def tick():
        last, before, used = time.monotonic(), waits(), time.thread_time()
        while True:
            await asyncio.sleep(0.005)
            now, after, using = time.monotonic(), waits(), time.thread_time()
            lost = sum(seconds - before.get(thread, 0) for thread, seconds in after.items())
            worked.append(using - used)
            held.append(now - last - lost - worked[-1])
            last, before, used = now, after, using

    task = asyncio.create_task(tick())
    with uncollected():
        yield
    assert not task.done()
    task.cancel()
    assert len(held) > 10
    assert max(held) < GAP
    assert max(worked) < GAP


def waits() -> dict[str, float]:
    """How long each thread was ready to run and did not, s. Any of them may have held the interpreter's lock then.

    And how long the host gave the machine no core, of each of its cores, as that is no thread's wait.
    """
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            found[str(path)] = int(path.read_text().split()[1]) / 1e9
    stolen = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
    return found | {"stolen": stolen / os.sysconf("SC_CLK_TCK")}


# Tables.


async def test_the_table_is_the_guides(session, keyspace, user):
    """The guide, Cassandra layer: `user_presence` with `user_id`, `is_online`, `last_active`, `device`."""
    columns = await rows(
        session,
        "SELECT column_name, type, kind FROM system_schema.columns WHERE keyspace_name = ? AND table_name = ?",
        *(keyspace, "user_presence"),
    )
    assert columns == [
        ("device", "text", "regular"),
        ("is_online", "boolean", "regular"),
        ("last_active", "timestamp", "regular"),
        ("user_id", "text", "partition_key"),
    ]


async def test_the_version_is_the_time_of_writing(history, session, user):
    """DESIGN §4: "Cassandra rows are written `USING TIMESTAMP` the version"."""
    await history.write([Change(user, True, NOW, 1_752_748_200_100, "tablet")])
    cql = "SELECT device, WRITETIME(is_online), WRITETIME(last_active), WRITETIME(device) FROM presence.user_presence"
    assert await rows(session, f"{cql} WHERE user_id = ?", user) == [("tablet", NOW, NOW, NOW)]


async def test_the_history_is_kept_for_so_many_days_and_the_last_status_for_ever(history, session, user):
    await history.write([change(user, NOW)])
    (page,) = [page async for page in session.pages("SELECT user_id, TTL(is_online) FROM presence.presence_history")]
    (ttl,) = [ttl for one, ttl in page if one == user]
    assert 3 * 86_400 - 60 < ttl <= 3 * 86_400
    cql = "SELECT TTL(is_online) FROM presence.user_presence WHERE user_id = ?"
    assert await rows(session, cql, user) == [(None,)]


async def test_the_history_is_compacted_by_time(session, keyspace):
    cql = "SELECT compaction FROM system_schema.tables WHERE keyspace_name = ? AND table_name = ?"
    ((compaction,),) = await rows(session, cql, keyspace, "presence_history")
    assert compaction["class"].endswith("TimeWindowCompactionStrategy")


async def test_a_row_is_in_the_partition_of_its_day(history, session, user):
    day = 86_400_000_000
    midnight = NOW // day * day
    await history.write([change(user, midnight), change(user, midnight - 1)])
    pages = session.pages("SELECT user_id, day, version FROM presence.presence_history")
    found = [(str(day), version) async for page in pages for one, day, version in page if one == user]
    today, yesterday = (time.strftime("%Y-%m-%d", time.gmtime(m // 10**6)) for m in (midnight, midnight - 1))
    assert sorted(found) == [(yesterday, midnight - 1), (today, midnight)]


async def test_there_are_no_tombstones(history, session, keyspace, user):
    """A last activity that is unknown, replays and newer changes leave nothing to skip: reads say so themselves."""
    unknown = Change(user, True, NOW, None)
    await history.write([unknown, change(user, NOW + 1, online=False), unknown])
    await history.write([Change(user, True, NOW + 2, None)])
    for table in HISTORY_TABLES:
        events = await asyncio.to_thread(traced, session, f"SELECT * FROM {keyspace}.{table} LIMIT 10000")
        read = [event for event in events if "tombstone cells" in event]
        assert read, events
        assert all(" 0 tombstone cells" in event for event in read)


def traced(session, cql):
    """What the server notes while it reads."""
    result = session._session.execute(cql, trace=True)
    return [event.description for event in result.get_query_trace(10).events]


# Speed and bounds.


async def test_many_writes_leave_others_their_turns_and_are_bounded(history, session, users):
    changes = [change(users("u"), NOW + number) for number in range(2_000)]
    fewest, used, worked = IN_FLIGHT, time.thread_time(), []
    writing = asyncio.create_task(history.write(changes))
    with uncollected():
        while not writing.done():
            await asyncio.sleep(0.001)
            worked.append(time.thread_time() - used)
            used += worked[-1]
            fewest = min(fewest, session._slots._value)
    await writing
    assert len(worked) > 10  # others had their turns
    assert max(worked) < sum(worked) / 2  # all the time
    assert fewest == 0  # as many at once as may be, and
    await wait_until(lambda: session._slots._value == IN_FLIGHT, what="all slots to be given back")
    asked = [one.user for one in changes]
    assert len(await history.read(asked)) == 2_000


async def test_a_caller_that_leaves_does_not_disturb_the_next(history, session, users):
    changes = [change(users("u"), NOW) for _ in range(1_000)]
    leaver = asyncio.create_task(history.write(changes))
    await asyncio.sleep(0.01)
    leaver.cancel()
    await asyncio.wait([leaver])
    one = change(users("a"), NOW)
    await history.write([one])
    assert list(await history.read([one.user])) == [one.user]
    await wait_until(lambda: session._slots._value == IN_FLIGHT, what="all slots to be given back")


# What is wrong, in one line.


@pytest.mark.parametrize("point", ("", "host:", "host:0", "host:70000", "a:b:9042", "http://host", "[::1", "ho st"))
def test_what_is_no_contact_point_is_said(point):
    with pytest.raises(ValueError, match="must list host or host:port"):
        CassandraSession([point])


@pytest.mark.parametrize(
    ("point", "found"),
    (("db", ("db", 9042)), ("db:1", ("db", 1)), ("[::1]:7", ("::1", 7)), ("10.0.0.1", ("10.0.0.1", 9042))),
)
async def test_a_contact_point_is_host_and_port(point, found):
    async with cassandra_session(point) as session:
        assert session._points == [found]


async def test_a_cassandra_that_is_not_there_is_unavailable(user):
    async with cassandra_session(f"127.0.0.1:{free_port()}", timeout=0.5) as session:
        with pytest.raises(HistoryUnavailable, match="not connected yet"):
            await CassandraHistory(session).read([user])
        with pytest.raises(HistoryUnavailable, match=r"^PRESENCE_CASSANDRA_CONTACT_POINTS=\S+: .*refused") as caught:
            await session.connect()
        assert "\n" not in str(caught.value)
        assert session.health.state == "down"


async def test_another_datacenter_is_unavailable(cassandra):
    async with cassandra_session(cassandra.url, datacenter="elsewhere") as session:
        with pytest.raises(HistoryUnavailable, match="PRESENCE_CASSANDRA_DATACENTER"):
            await session.connect()


async def test_what_is_missing_is_said_until_it_is_there(cassandra, user):
    """Start order does not matter: the keyspace may be made by `presence init` while the server runs."""
    name = f"t{uuid.uuid4().hex[:12]}"
    async with cassandra_session(cassandra.url, keyspace=name, tables=HISTORY_TABLES) as session:
        running = asyncio.create_task(session.run())
        history = CassandraHistory(session)
        line = f"keyspace {name} is missing: run presence init"
        await wait_until(lambda: session.health.detail == line, 10, what=line)
        with pytest.raises(HistoryUnavailable, match=r"is missing: run presence init|run presence init$"):
            await history.write([change(user, NOW)])
        assert await session.missing() == line
        async with cassandra_session(cassandra.url, keyspace=name, tables=HISTORY_TABLES[:1]) as other:
            await other.create_schema(ONE_NODE)
        assert await session.missing() == f"table {name}.presence_history is missing: run presence init"
        async with cassandra_session(cassandra.url, keyspace=name, tables=HISTORY_TABLES) as other:
            await other.create_schema(ONE_NODE)
            await other.create_schema(ONE_NODE)  # twice is once
        await wait_until(lambda: session.health.state == "up", 10, what="the tables to be seen")
        assert await session.missing() is None
        await history.write([change(user, NOW)])
        running.cancel()


async def test_after_the_close_it_is_unavailable(history, session, user):
    await session.close()
    with pytest.raises(HistoryUnavailable):
        await history.read([user])


# Outages.


@pytest.mark.timeout(150)  # of which most is for the node to start, twice, when the machine has much to do
async def test_freeze_kill_and_restart(start_cassandra, users):
    """What was acknowledged is there; meanwhile each call fails in time; the loop is not held; then all goes on."""
    node = await start_cassandra()
    async with cassandra_session(node.url, timeout=1.0, tables=HISTORY_TABLES) as session:
        await session.create_schema(ONE_NODE)
        running = asyncio.create_task(session.run())
        history = CassandraHistory(session)
        acknowledged: list[str] = []
        failed: list[float] = []
        over = asyncio.Event()

        async def write() -> None:
            while not over.is_set():
                one = change(users("u"), NOW)
                began = time.monotonic()
                try:
                    await history.write([one])
                    acknowledged.append(one.user)
                except HistoryUnavailable:
                    failed.append(time.monotonic() - began)
                await asyncio.sleep(0.01)

        async def goes_on(session: CassandraSession, seconds: float) -> None:
            count = len(acknowledged)
            await wait_until(lambda: len(acknowledged) > count + 10, seconds, what="writes to go on")
            await wait_until(lambda: session.health.state == "up", 10, what="its health to say so")

        writing = asyncio.create_task(write())
        await goes_on(session, 10)

        async with never_held():
            await node.freeze()
            await wait_until(lambda: failed, 5, what="a write to fail")
            assert session.health.state == "down"
            with pytest.raises(HistoryUnavailable, match="no answer within 1 s"):
                await history.read(acknowledged[:1])
            async with cassandra_session(node.url, timeout=0.5) as other:
                connecting = asyncio.create_task(other.run())
                await asyncio.sleep(0.1)
                began = time.monotonic()
                connecting.cancel()
            assert time.monotonic() - began < 4  # closed, though it was connecting
            await node.thaw()
            await goes_on(session, 10)
        assert max(failed) < 3

        failed.clear()
        async with never_held(), cassandra_session(node.url, timeout=1.0, tables=HISTORY_TABLES) as late:
            await node.kill9()
            await wait_until(lambda: failed, 5, what="a write to fail")
            coming = asyncio.create_task(late.run())
            await wait_until(lambda: late.health.state == "down", 5, what="the outage to be seen")
            await node.start()
            await goes_on(session, 20)
            await goes_on(late, 20)
            known = acknowledged.copy()
            assert sorted(await CassandraHistory(late).read(known)) == sorted(known)
            coming.cancel()
        assert max(failed) < 3

        over.set()
        await writing
        assert sorted(await history.read(acknowledged)) == sorted(acknowledged)
        running.cancel()
