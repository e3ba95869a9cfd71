"""presence.watch_records: who watches whom, for whoever looks (DESIGN §4)."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from presence import watch_records
from presence.core.model import Session
from presence.ports import StoreUnavailable
from presence.watch_records import RECORDERS, WatchRecords
from tests.support.recording import recording
from tests.support.waiting import wait_until


class Store:
    """Notes what each session watches when it is asked to; answers while it is reachable, fails while it is away."""

    def __init__(self):
        self.recorded = {}
        self.asked = []
        self.reachable = asyncio.Event()
        self.reachable.set()
        self.away = False
        self.under_way = self.most = 0

    async def record_watches(self, session, *, anew=False):
        watched = set() if session.closed else set(session.watched)
        self.asked.append((session.user, watched, anew))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.reachable.wait()
        self.under_way -= 1
        if self.away:
            raise StoreUnavailable("away")
        self.recorded[session.user] = watched


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watch_records, "RETRY", 0.02)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(watch_records, "RECORDERS", 1)


@asynccontextmanager
async def recorded_in(store):
    records = WatchRecords(store)
    async with recording(records):
        yield records


async def recorded(records):
    await wait_until(lambda: len(records) == 0, what="all to be recorded")


def session(user):
    return Session(user, f"of-{user}", "web", time.monotonic(), time.monotonic())


def watch(records, session, *users):
    session.watched |= set(users)
    records.note(session)


def unwatch(records, session, *users):
    session.watched -= set(users)
    records.note(session)


def close(records, session):
    session.closed = True
    unwatch(records, session, *session.watched)


async def test_what_a_session_watches_is_seen_in_the_store(deployment):
    async with recorded_in(await deployment.instance()) as records:
        one, two = session("viewer"), session("other")
        watch(records, one, "alice", "bob")
        watch(records, two, "bob")
        await recorded(records)
        assert deployment.redis.smembers(deployment.key("bob", "watchers")) == {"viewer", "other"}
        unwatch(records, one, "bob")
        await recorded(records)
        assert deployment.redis.smembers(deployment.key("alice", "watchers")) == {"viewer"}
        assert deployment.redis.smembers(deployment.key("bob", "watchers")) == {"other"}
        close(records, one)
        close(records, two)
        await recorded(records)
        assert deployment.redis.keys("*:watchers") == []


@asynccontextmanager
async def one_under_way(store):
    """The records, and a session whose first one is being made; at the end all are."""
    store.reachable.clear()
    async with recorded_in(store) as records:
        one = session("viewer")
        watch(records, one, "alice")
        await wait_until(lambda: store.asked)
        yield records, one
        store.reachable.set()
        await recorded(records)


async def test_what_changed_meanwhile_is_recorded_at_once_and_as_it_is(store):
    async with one_under_way(store) as (records, one):
        watch(records, one, "bob", "carol")
        unwatch(records, one, "alice", "bob")
        watch(records, one, "dave")
        assert len(records) == 2, "one under way, one to follow"
    assert store.asked == [("viewer", {"alice"}, False), ("viewer", {"carol", "dave"}, False)]


async def test_the_record_of_one_that_has_gone_is_removed_behind_what_was_under_way(store):
    async with one_under_way(store) as (records, one):
        watch(records, one, "bob")
        close(records, one)
    assert store.asked == [("viewer", {"alice"}, False), ("viewer", set(), False)]


async def test_of_thousands_who_come_and_go_a_few_are_recorded_at_a_time(store):
    """Else all else waits behind them: of 19,000 who came back at once 1,000 were told that the store is away."""
    store.reachable.clear()
    async with recorded_in(store) as records:
        sessions = [session(f"viewer-{number}") for number in range(50 * RECORDERS)]
        for one in sessions:
            watch(records, one, "alice")
        await wait_until(lambda: store.under_way == RECORDERS)
        assert len(records) == len(sessions)
        for one in sessions[::2]:
            close(records, one)
        store.reachable.set()
        await recorded(records)
    assert store.most == RECORDERS
    assert store.recorded == {one.user: set() if one.closed else {"alice"} for one in sessions}


@pytest.mark.usefixtures("impatient")
async def test_while_the_store_is_away_nothing_is_forgotten(store):
    store.away = True
    async with recorded_in(store) as records:
        stays, leaves = session("stays"), session("leaves")
        watch(records, stays, "alice")
        watch(records, leaves, "alice")
        await wait_until(lambda: ("stays", {"alice"}, True) in store.asked, what="another try, of all of it")
        watch(records, stays, "bob")
        close(records, leaves)
        await wait_until(lambda: ("leaves", set(), True) in store.asked)
        await wait_until(lambda: len(records) == 0, what="all to have been tried: a planned stop waits for no more")
        store.away = False
        await wait_until(lambda: store.recorded == {"stays": {"alice", "bob"}, "leaves": set()})


@pytest.mark.usefixtures("impatient", "alone")
async def test_those_that_cannot_be_recorded_keep_nobody_out(store, monkeypatch):
    tried = []

    async def record(session, *, anew):
        tried.append(session.user)
        await asyncio.sleep(0)
        if session.user != "good":
            raise StoreUnavailable("its part of the store is away")

    monkeypatch.setattr(store, "record_watches", record)
    async with recorded_in(store) as records:
        for number in range(20):
            watch(records, session(f"bad-{number}"), "alice")
        await wait_until(lambda: len(tried) > 20)
        before = len(tried)
        watch(records, session("good"), "alice")
        await wait_until(lambda: "good" in tried)
        assert tried.index("good") <= before + 1, "not behind those that have failed"
        await wait_until(lambda: len(tried) > 50)
        assert tried.count("good") == 1
        assert {f"bad-{number}" for number in range(20)} <= set(tried[-21:]), "in turn"


@pytest.mark.usefixtures("alone")
async def test_the_queue_is_bounded_by_who_is_here(store, monkeypatch):
    monkeypatch.setattr(watch_records, "GONE", 3)
    records = WatchRecords(store)
    sessions = [session(f"viewer-{number}") for number in range(10)]
    for one in sessions:
        watch(records, one, "alice")
    assert len(records) == 10
    for one in sessions:
        close(records, one)
    assert len(records) == 2, "the cleanup removes what is recorded of the others"


async def test_a_mistake_of_ours_ends_the_job_which_is_noticed_and_loses_nothing(store, monkeypatch):
    monkeypatch.setattr(store, "record_watches", None)
    records = WatchRecords(store)
    watch(records, session("viewer"), "alice")
    with pytest.raises(ExceptionGroup):
        await records.run()
    assert len(records) == 1
