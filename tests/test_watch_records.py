"""presence.watch_records: who watches whom, for whoever looks (DESIGN §4)."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress

import pytest

from presence import watch_records
from presence.core.model import Session
from presence.ports import StoreUnavailable
from presence.watch_records import RECORDERS, WatchRecords
from tests.support.waiting import wait_until


class Store:
    """Notes what it is asked; answers while it is reachable, and fails while it is away."""

    def __init__(self):
        self.asked = []
        self.reachable = asyncio.Event()
        self.reachable.set()
        self.away = False
        self.under_way = self.most = 0

    async def watch(self, session, users):
        await self._answer("watch", session.user, set(users))

    async def unwatch(self, session, users=None):
        await self._answer("unwatch", session.user, users and set(users))

    async def _answer(self, *asked):
        self.asked.append(asked)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.reachable.wait()
        self.under_way -= 1
        if self.away:
            raise StoreUnavailable("away")


@pytest.fixture
def store():
    return Store()


@asynccontextmanager
async def recording(store):
    records = WatchRecords(store)
    task = asyncio.create_task(records.run())
    yield records
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def recorded(records):
    await wait_until(lambda: len(records) == 0, what="all to be recorded")


def session(user, watched=()):
    made = Session(user, f"of-{user}", "web", time.monotonic(), time.monotonic())
    made.watched = set(watched)
    return made


def watch(records, session, *users):
    session.watched |= set(users)
    records.note(session, users)


def unwatch(records, session, *users):
    session.watched -= set(users)
    records.note(session, users)


def close(records, session):
    session.closed = True
    unwatch(records, session, *session.watched)


async def test_what_a_session_watches_is_seen_in_the_store(deployment):
    async with recording(await deployment.instance()) as records:
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
        assert deployment.redis.keys("*watch*") == []


async def test_nothing_is_asked_for_nothing(store):
    async with recording(store) as records:
        one = session("viewer")
        watch(records, one)
        close(records, one)
        assert len(records) == 0
    assert store.asked == []


async def test_what_changed_meanwhile_is_recorded_at_once_and_as_it_is(store):
    store.reachable.clear()
    async with recording(store) as records:
        one = session("viewer")
        watch(records, one, "alice")
        await wait_until(lambda: store.asked)
        watch(records, one, "bob", "carol")
        unwatch(records, one, "alice", "bob")
        watch(records, one, "dave")
        store.reachable.set()
        await recorded(records)
    assert store.asked[1:] == [
        ("watch", "viewer", {"carol", "dave"}),
        ("unwatch", "viewer", {"alice", "bob"}),
    ]


async def test_of_one_that_has_gone_nothing_is_recorded_any_more(store):
    """A record made behind its removal would stay as long as its user has a session."""
    store.reachable.clear()
    async with recording(store) as records:
        one = session("viewer")
        watch(records, one, "alice")
        await wait_until(lambda: store.asked)
        watch(records, one, "bob")
        close(records, one)
        store.reachable.set()
        await recorded(records)
    assert store.asked == [("watch", "viewer", {"alice"}), ("unwatch", "viewer", None)]


async def test_of_thousands_who_come_and_go_a_few_are_recorded_at_a_time(store):
    """Else all else waits behind them: of 19,000 who came back at once 1,000 were told that the store is away."""
    store.reachable.clear()
    async with recording(store) as records:
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
    done = {user: name for name, user, _ in store.asked}
    assert done == {one.user: "unwatch" if one.closed else "watch" for one in sessions}


async def test_while_the_store_is_away_nothing_is_forgotten(store, monkeypatch):
    monkeypatch.setattr(watch_records, "RETRY", 0.01)
    store.away = True
    async with recording(store) as records:
        stays, leaves = session("stays"), session("leaves")
        watch(records, stays, "alice")
        watch(records, leaves, "alice")
        await wait_until(lambda: {user for _, user, _ in store.asked} == {"stays", "leaves"})
        watch(records, stays, "bob")
        close(records, leaves)
        await wait_until(lambda: ("unwatch", "leaves", None) in store.asked)
        assert len(records) == 2
        store.away = False
        store.asked.clear()
        await recorded(records)
    assert ("watch", "stays", {"alice", "bob"}) in store.asked
    assert ("unwatch", "leaves", None) in store.asked


async def test_one_that_cannot_be_recorded_keeps_nobody_out(store, monkeypatch):
    monkeypatch.setattr(watch_records, "RETRY", 0.01)
    monkeypatch.setattr(watch_records, "RECORDERS", 1)

    async def answer(name, user, users):
        store.asked.append((name, user, users))
        if user == "bad":
            raise StoreUnavailable("its part of the store is away")

    monkeypatch.setattr(store, "_answer", answer)
    async with recording(store) as records:
        watch(records, session("bad"), "alice")
        watch(records, session("good"), "alice")
        await wait_until(lambda: ("watch", "good", {"alice"}) in store.asked)
        assert len(records) == 1


async def test_more_that_have_gone_than_can_wait_are_left_to_the_cleanup(store, monkeypatch):
    monkeypatch.setattr(watch_records, "GONE", 3)
    monkeypatch.setattr(watch_records, "RECORDERS", 1)
    records = WatchRecords(store)
    going = [session(f"gone-{number}", ["alice"]) for number in range(5)]
    for one in going:
        close(records, one)
    assert len(records) == 3
    watch(records, session("here"), "alice")
    assert len(records) == 4, "of those who are here none is left out"


async def test_a_mistake_of_ours_ends_the_job_which_is_noticed_and_loses_nothing(store, monkeypatch):
    monkeypatch.setattr(store, "_answer", None)
    records = WatchRecords(store)
    watch(records, session("viewer"), "alice")
    with pytest.raises(ExceptionGroup):
        await records.run()
    assert len(records) == 1
