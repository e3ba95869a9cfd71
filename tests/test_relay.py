"""presence.relay: every change to a sink, in order per user, at least once (DESIGN §4, Relay). With a real store."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from presence import relay as module
from presence.core.model import Change, Reason
from presence.ports import Health, HistoryUnavailable
from presence.relay import Relay
from tests.support.deployment import connect
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "LEASE", 0.4)
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "PAGE", 3)


class Sink:
    """Notes what it is given, and fails when it is told to."""

    name = "sink"

    def __init__(self) -> None:
        self.health = Health()
        self.writes: list[list[Change]] = []
        self.failures = 0
        self.away = False
        self.hangs = False
        self.under_way = 0

    async def write(self, changes):
        self.under_way += 1
        assert self.under_way == 1, "two changes of one user could be in flight"
        await asyncio.sleep(3600 if self.hangs else 0)
        self.under_way -= 1
        if self.away:
            self.failures += 1
            raise HistoryUnavailable("away")
        self.writes.append(list(changes))

    @property
    def changes(self) -> list[Change]:
        return [change for write in self.writes for change in write]


@asynccontextmanager
async def relaying(store, sink):
    task = asyncio.create_task(Relay(store, sink, 0).run())
    try:
        yield task
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def changes_of(store, user="alice", count=2):
    for _ in range(count // 2):
        one = await connect(store, user)
        await store.end(one, Reason.DISCONNECTED, one.last_beat)


def cursor(deployment) -> int:
    return int(deployment.redis.get("presence:cursor:sink") or 0)


async def test_every_change_reaches_the_sink_once_and_in_order(deployment):
    store = await deployment.instance()
    sink = Sink()
    await changes_of(store, count=6)
    async with relaying(store, sink):
        await wait_until(lambda: len(sink.changes) == 6)
        await changes_of(store, count=4)
        await wait_until(lambda: cursor(deployment) == deployment.changes()[-1].version)
    assert sink.changes == deployment.changes()
    assert all(len(write) <= 3 for write in sink.writes)


async def test_a_sink_that_is_away_loses_nothing(deployment):
    """DESIGN §4: "moves the cursor once the sink has acknowledged"; "a sink that is away for an hour loses nothing"."""
    store = await deployment.instance()
    sink = Sink()
    sink.away = True
    await changes_of(store, count=4)
    async with relaying(store, sink):
        await wait_until(lambda: sink.failures >= 3)
        assert cursor(deployment) == 0
        sink.away = False
        await wait_until(lambda: sink.changes == deployment.changes())


async def test_who_goes_on_repeats_at_most_what_was_not_acknowledged(deployment):
    store, other = await deployment.instance(), await deployment.instance()
    sink = Sink()
    await changes_of(store, count=4)
    async with relaying(store, sink):
        await wait_until(lambda: cursor(deployment) == deployment.changes()[-1].version)
    done = len(sink.changes)
    await changes_of(store, count=2)
    async with relaying(other, sink):
        await wait_until(lambda: len(sink.changes) == done + 2)
    assert sink.changes == deployment.changes()


async def test_who_stops_as_planned_lets_another_take_over_at_once(deployment, monkeypatch):
    """Else the changes of a rolling restart wait for the lease to end."""
    monkeypatch.setattr(module, "LEASE", 30.0)
    store = await deployment.instance()
    sink = Sink()
    async with relaying(store, sink):
        await wait_until(lambda: deployment.redis.get("presence:holder:relay.sink.0"))
    await wait_until(lambda: not deployment.redis.get("presence:holder:relay.sink.0"), 0.5)


async def test_one_instance_relays_and_another_takes_over_when_its_lease_has_lapsed(deployment, monkeypatch):
    """DESIGN §4: "Whoever holds the cursor's lease reads"."""
    monkeypatch.setattr(module, "LEASE", 2.0)
    store, other = await deployment.instance(), await deployment.instance()
    first, second = Sink(), Sink()
    async with relaying(other, second):
        await changes_of(store, count=2)
        await wait_until(lambda: len(second.changes) == 2)
        async with relaying(store, first):
            await changes_of(store, count=4)
            await wait_until(lambda: len(second.changes) == 6)
            assert first.writes == []
            second.hangs = True  # as a process that was stopped
            await changes_of(store, count=2)
            await wait_until(lambda: len(first.changes) == 2, 10)
    assert first.changes == deployment.changes()[-2:]


async def test_the_holder_keeps_its_lease(deployment, monkeypatch):
    monkeypatch.setattr(module, "LEASE", 2.0)
    store = await deployment.instance()
    holder = "presence:holder:relay.sink.0"
    async with relaying(store, Sink()):
        await wait_until(lambda: 0 < deployment.redis.pttl(holder) < 1_400)
        await wait_until(lambda: deployment.redis.pttl(holder) > 1_600)


async def test_overtaken_by_the_trim_it_brings_the_last_change_of_everybody_and_goes_on(deployment):
    """DESIGN §4: "above a cap (setting) the newest state per user is published instead of the backlog"."""
    store = await deployment.instance()
    sink = Sink()
    await changes_of(store, "alice", count=4)
    await changes_of(store, "bob", count=2)
    await connect(store, "bob")
    last = {change.user: change for change in deployment.changes()}
    await store.trim(0, 0)
    await changes_of(store, "alice", count=2)  # not trimmed: they come in order, after what was
    async with relaying(store, sink):
        await wait_until(lambda: len(sink.changes) == 3)
        await changes_of(store, "cid", count=2)
        await wait_until(lambda: sink.changes[-1].user == "cid" and len(sink.changes) == 5)
    assert sink.changes[0] == last["bob"]
    assert sink.changes[1:] == deployment.changes()


async def test_the_newest_state_is_brought_as_soon_as_the_sink_is_back_by_whoever_relays_then(deployment):
    """A cap is passed when the sink is away, so it is away just when it is to be brought the newest state."""
    store, other = await deployment.instance(), await deployment.instance()
    away, sink = Sink(), Sink()
    away.away = True
    await changes_of(store, count=2)
    [_, last] = deployment.changes()
    await store.trim(0, 0)
    async with relaying(store, away):
        await wait_until(lambda: away.failures >= 2)
        assert cursor(deployment) == 0, "it has been brought nothing yet"
    async with relaying(other, sink):
        await wait_until(lambda: cursor(deployment) >= last.version)
    assert sink.changes == [last]


async def test_while_the_store_is_away_it_waits(deployment):
    store = await deployment.instance(timeout=1.0)
    sink = Sink()
    async with relaying(store, sink):
        async with deployment.frozen():
            await wait_until(lambda: store.health.state == "down")
        await changes_of(store, count=2)
        await wait_until(lambda: sink.changes == deployment.changes() != [])


async def test_a_holder_that_wakes_late_does_not_move_the_cursor_back(deployment):
    """DESIGN §4: "a stale holder's repeats are harmless"."""
    store, other = await deployment.instance(), await deployment.instance()
    stale, sink = Sink(), Sink()
    stale.hangs = True
    await changes_of(store, count=2)
    late = asyncio.create_task(Relay(other, stale, 0).run())
    await wait_until(lambda: stale.under_way)
    async with relaying(store, sink):
        await changes_of(store, count=6)
        await wait_until(lambda: cursor(deployment) == deployment.changes()[-1].version)
        moved = cursor(deployment)
        assert await other.backlog("sink", 0, deployment.changes()[1].version, 10) == (
            [],
            0,
        )  # what it does when it wakes
        assert cursor(deployment) == moved
    late.cancel()
    await asyncio.wait([late])


async def test_a_change_of_a_new_slower_primary_below_what_the_sink_has_is_not_left_out(deployment):
    """Found in review: what was read of the primary that died moved the cursor past what the next one gave out."""
    store = await deployment.instance()

    class Loses(Sink):
        async def write(self, changes):
            await super().write(changes)
            if len(self.writes) == 1:
                deployment.redis.delete("presence:changes")
                deployment.redis.hset("presence:amnesty", "server", "the primary that died")

    sink = Loses()
    entry = {"user": "lost", "online": "1", "lastActive": "", "device": "web", "reason": "connected"}
    deployment.redis.xadd("presence:changes", entry, f"{deployment.now_ms() + 30_000}-0")
    async with relaying(store, sink):
        await wait_until(lambda: len(sink.writes) == 1)
        await asyncio.sleep(10 * module.POLL)  # some looks before a sweep has met the new one, and some after
        await deployment.sweep(store)
        await asyncio.sleep(10 * module.POLL)
        await changes_of(store, count=2)
        await wait_until(lambda: cursor(deployment) == deployment.changes()[-1].version)
    assert sink.changes[1:] == deployment.changes()


async def test_a_holder_that_alone_cannot_reach_the_sink_leaves_it_to_another(deployment):
    store, other = await deployment.instance(), await deployment.instance()
    cut_off, sink = Sink(), Sink()
    cut_off.away = True
    await changes_of(store, count=2)
    async with relaying(store, cut_off):
        await wait_until(lambda: cut_off.failures)
        async with relaying(other, sink):
            await wait_until(lambda: sink.changes == deployment.changes())


async def test_it_is_known_how_long_changes_have_waited(deployment, monkeypatch):
    monkeypatch.setattr(module, "LEASE", 60.0)
    store = await deployment.instance()
    sink = Sink()
    one = Relay(store, sink, 0)
    assert one.lag == 0
    sink.away = True
    await changes_of(store, count=2)
    task = asyncio.create_task(one.run())
    await wait_until(lambda: one.lag > 0.3)
    await changes_of(store, count=2)
    await wait_until(lambda: one.lag > 0.6)
    sink.away = False
    await wait_until(lambda: sink.changes == deployment.changes())  # what is not read yet does not count
    await wait_until(lambda: one.lag == 0)
    task.cancel()
    await asyncio.wait([task])


async def test_the_lag_counts_from_the_change_not_from_when_it_was_met(deployment):
    store = await deployment.instance()
    sink = Sink()
    sink.away = True
    await changes_of(store, count=2)
    deployment.redis.xadd(
        "presence:changes",
        {"user": "bob", "online": "1", "lastActive": "", "device": "web", "reason": "connected"},
        f"{deployment.now_ms() + 30_000}-0",
    )
    one = Relay(store, sink, 0)
    task = asyncio.create_task(one.run())
    await wait_until(lambda: one.lag > 29)
    task.cancel()
    await asyncio.wait([task])


async def test_who_does_not_relay_has_no_lag(deployment):
    store, other = await deployment.instance(), await deployment.instance()
    await changes_of(store, count=2)
    assert await store.hold("relay.sink.0", 60)
    one = Relay(other, Sink(), 0)
    one._waits_since = 0.0  # from when it did
    task = asyncio.create_task(one.run())
    await wait_until(lambda: one.lag == 0)
    task.cancel()
    await asyncio.wait([task])


async def test_when_it_is_woken_it_looks_at_once(deployment, monkeypatch):
    monkeypatch.setattr(module, "POLL", 60.0)
    store = await deployment.instance()
    sink = Sink()
    one = Relay(store, sink, 0)
    task = asyncio.create_task(one.run())
    for _ in range(3):
        await changes_of(store, count=2)
        one.wake()
        await wait_until(lambda: sink.changes == deployment.changes())
    task.cancel()
    await asyncio.wait([task])
