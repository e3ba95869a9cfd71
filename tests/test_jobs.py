"""presence.jobs: what runs beside the connections, with a real store and real time."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import pytest_asyncio

from presence import jobs
from presence.adapters.sqlite import SqliteHistory
from presence.core.model import Session
from presence.fanout import Fanout, Watcher
from presence.ports import Health, HistoryUnavailable, StoreUnavailable
from presence.service import PresenceService, Rules
from tests.support.recording import recording
from tests.support.waiting import wait_until


@pytest.fixture(params=[1, 12], ids=lambda number: f"partitions={number}")
def partitions(request):
    return request.param


class NoDirectory:
    async def friends(self, user):
        return ()

    async def members(self, conversation):
        return None

    async def contacts(self, user):
        return frozenset({user})


@pytest_asyncio.fixture
async def make_service(deployment, tmp_path):
    history = await SqliteHistory.open(tmp_path / "history.db")

    deployment.steady = False  # the jobs themselves sweep

    async def make(*, lease: float = 60.0, **options) -> PresenceService:
        store = await deployment.instance(lease=lease, **options)
        return PresenceService(store, history, NoDirectory(), Fanout(), Rules(lease=lease))

    yield make
    await history.close()


@asynccontextmanager
async def running(*jobs):
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield
        assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def everywhere(job, service):
    return [job(service, partition) for partition in range(service.store.partitions)]


def watch(service, *users) -> Watcher:
    watcher = Watcher(Session("viewer", "watching", "web", time.monotonic(), time.monotonic()), lambda: None)
    service.fanout.watch(watcher, users)
    return watcher


async def test_a_session_ends_when_its_lease_ends_and_not_before(deployment, make_service):
    """WIRE §4: "L without a heartbeat": ended when the lease ends."""
    service = await make_service(lease=0.3)
    async with running(*everywhere(jobs.sweep, service)):
        for user in ("alice", "bob"):
            await service.set_user_online(user, "web", f"s-{user}")
        await wait_until(lambda: not deployment.online(), 0.3 + 2)
    for user in ("alice", "bob"):
        online, offline = deployment.changes(user)
        assert (offline.online, offline.reason) == (False, "expired")
        assert offline.version - online.version >= 300_000
    assert deployment.deadlines() == set()


async def test_a_session_that_keeps_beating_stays(deployment, make_service):
    service = await make_service(lease=1.0)
    async with running(*everywhere(jobs.sweep, service)):
        beating = await service.set_user_online("alice", "web", "s1")
        await service.set_user_online("bob", "web", "s2")

        def beat() -> bool:
            service.refresh_user_session(beating)
            return "bob" not in deployment.online()

        await wait_until(beat, 1.0 + 2)
        assert deployment.edges("alice") == [(True, "connected")]


@pytest.mark.parametrize("partitions", [1], ids=["partitions=1"])
async def test_many_that_lapse_together_end_without_a_pause(deployment, make_service, monkeypatch):
    """WIRE §4: "up to 10,000 a second, beyond that in the order of their leases"; DESIGN §3.3: "repeats at once".

    At neither of the two places where the sweep may pause is anybody left.
    """
    service = await make_service()
    pipe = deployment.redis.pipeline()
    for number in range(3_000):
        pipe.sadd("presence:online", f"u{number}")
        pipe.zadd(f"presence:user:u{number}:sessions", {"s": number + 1})
        pipe.zadd("presence:deadlines", {f"u{number}:s": number + 1})
    pipe.execute()
    deployment.pass_time(100)
    left_at_a_pause: list[int] = []

    async def pause(seconds: float) -> None:
        if seconds > 0:
            left_at_a_pause.append(len(deployment.online()))
        await asyncio.sleep(seconds)

    monkeypatch.setattr(service.store, "overdue", pause)
    monkeypatch.setattr(jobs, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": pause}))
    async with running(jobs.sweep(service, 0)):
        await wait_until(lambda: left_at_a_pause, 10)
    assert left_at_a_pause[0] == 0
    order = [int(change.user[1:]) for change in deployment.changes()]
    assert order == sorted(order)


async def test_the_sweep_goes_on_when_the_store_answers_again(deployment, make_service):
    service = await make_service(lease=0.3, timeout=0.2)
    async with running(*everywhere(jobs.sweep, service)):
        async with deployment.frozen():
            await wait_until(lambda: service.store.health.state == "down")
        await service.set_user_online("alice", "web", "s1")
        await wait_until(lambda: deployment.edges("alice")[-1:] == [(False, "expired")])


async def test_after_a_loss_of_the_store_all_is_as_it_was_but_for_those_who_have_gone(deployment, make_service):
    """DESIGN §3.6, from the loss to the settling: nobody who is there goes offline, not for a moment."""
    # Long enough for all to report, whatever else the machine does.
    service, other = await make_service(amnesty=1.0), await make_service(amnesty=1.0)
    dead = await make_service(amnesty=1.0)
    async with running(*everywhere(jobs.sweep, service), *everywhere(jobs.sweep, other)):
        await service.set_user_online("here", "web", "s1")
        await other.set_user_online("there", "web", "s2")
        await dead.set_user_online("gone", "web", "s3")
        watcher = watch(service, "here", "there", "gone")
        async with running(*everywhere(jobs.follow, service)):
            await service.snapshot(watcher, ["here", "there", "gone"])
            assert all(status.online for status in watcher.told.values())
            deployment.redis.flushall()
            await wait_until(lambda: deployment.online() == {"here", "there"})
            with pytest.raises(StoreUnavailable):
                await service.is_user_online("viewer", "gone")
            await wait_until(lambda: deployment.edges("gone") == [(False, "restored")])
            (flip,) = await wait_until(watcher.flips)
            assert (flip.user, flip.online) == ("gone", False)

            async def certain() -> bool:
                return not await service.is_user_online("viewer", "gone")

            assert await certain()
    assert deployment.edges("here") == deployment.edges("there") == [(True, "restored")]


async def test_a_loss_during_the_amnesty_begins_it_anew(deployment, make_service):
    service = await make_service(amnesty=60.0)
    async with running(*everywhere(jobs.sweep, service)):
        await service.set_user_online("here", "web", "s1")
        for _ in range(2):
            deployment.redis.flushall()
            await wait_until(lambda: deployment.online() == {"here"})


async def test_settling_is_tried_until_it_is_done(deployment, make_service, monkeypatch):
    service = await make_service(swept=False)
    monkeypatch.setattr(jobs, "SWEEP_EVERY", 0.01)
    settle, tries, done = service.settle, [], asyncio.Event()

    async def fail(partition: int) -> None:
        tries.append(partition)
        if len(tries) < 3:
            raise HistoryUnavailable("away")
        await settle(partition)
        done.set()

    monkeypatch.setattr(service, "settle", fail)
    async with running(jobs.sweep(service, 0)):
        async with asyncio.timeout(5):
            await done.wait()
    assert tries == [0, 0, 0]


async def test_a_history_that_is_away_has_nothing_else_settled_again(deployment, make_service, monkeypatch):
    """Found in review: all watched users were read anew ten times a second, as long as Cassandra was away."""
    service = await make_service(swept=False)
    monkeypatch.setattr(jobs, "SWEEP_EVERY", 0.01)
    monkeypatch.setattr(jobs, "HISTORY_EVERY", 0.02)
    settle, settled, tries, done = service.settle, [], [], asyncio.Event()

    async def noted(partition: int) -> None:
        settled.append(partition)
        await settle(partition)

    async def fail(partition: int, epoch: int) -> None:
        tries.append(partition)
        if len(tries) < 4:
            raise HistoryUnavailable("away")
        done.set()

    monkeypatch.setattr(service, "settle", noted)
    monkeypatch.setattr(service, "settle_history", fail)
    async with running(jobs.sweep(service, 0)):
        async with asyncio.timeout(5):
            await done.wait()
    assert (settled, tries) == ([0], [0] * 4)


async def test_every_change_is_told_to_those_who_watch(deployment, make_service):
    """WIRE §5: "on every server instance"."""
    service, other = await make_service(), await make_service()
    watcher = watch(service, "alice")
    await deployment.sweep(service.store)
    await service.snapshot(watcher, ["alice"])
    async with running(*everywhere(jobs.follow, service)):
        session = await other.set_user_online("alice", "web", "s1")
        assert (await wait_until(watcher.flips))[0].online
        await other.set_user_offline(session)
        (flip,) = await wait_until(watcher.flips)
        assert flip == deployment.changes()[-1]


async def test_what_a_follower_missed_is_read_anew(deployment, make_service, monkeypatch):
    service, other = await make_service(), await make_service()
    watcher = watch(service, "alice")
    await service.snapshot(watcher, ["alice"])
    resync, tries = service.resync, []

    async def fail_once(partition: int) -> None:
        tries.append(partition)
        if len(tries) == 1:
            raise StoreUnavailable("away")
        await resync(partition)

    monkeypatch.setattr(service, "resync", fail_once)
    await other.set_user_online("alice", "web", "s1")  # before the reader has begun
    await deployment.sweep(other.store)
    async with running(jobs.follow(service, service.store.partition_of("alice"))):
        assert (await wait_until(watcher.flips))[0].online
    assert len(tries) > 1


class HandBus:
    """A bus that brings what the test hands it; and that is away when the test says so."""

    name = "bus"

    def __init__(self) -> None:
        self.health = Health()
        self.health.note("up")
        self.wanted = None
        self.queue: asyncio.Queue = asyncio.Queue(10)

    async def write(self, changes):
        raise AssertionError("nobody relays here")

    def unread(self):
        return self.queue.qsize()

    async def follow(self, wanted):
        self.wanted = wanted
        while True:
            yield await self.queue.get()


@pytest_asyncio.fixture
async def bridged(deployment, make_service):
    """A service that follows a bus, with a watcher of alice's, who comes and goes elsewhere."""
    service, other = await make_service(), await make_service()
    watcher = watch(service, "alice")
    await deployment.sweep(service.store)
    await service.snapshot(watcher, ["alice"])
    read_anew, resync = [], service.resync

    async def noted(partition: int) -> None:
        await resync(partition)
        read_anew.append(partition)

    service.resync = noted
    return SimpleNamespace(
        read_anew=read_anew,
        service=service,
        bus=HandBus(),
        watcher=watcher,
        partition=service.store.partition_of("alice"),
        connect=lambda: other.set_user_online("alice", "web", "s1"),
        end=other.set_user_offline,
    )


async def told_within(watcher, seconds=1.0):
    """Whether the watcher is told anything in this time."""
    try:
        await wait_until(watcher.flips, seconds)
    except AssertionError:
        return False
    return True


async def test_with_a_bus_the_changes_come_from_it_alone(deployment, bridged):
    """DESIGN §4: relay, Kafka, fan-out; "skip a record by its key … when nobody here watches that user"."""
    one = bridged
    store_job = jobs.follow(one.service, one.partition, one.bus, 0.0)
    async with running(store_job, jobs.follow_bus(one.service, one.bus)):
        await wait_until(lambda: one.bus.wanted and one.read_anew)
        assert one.bus.wanted("alice")
        assert not one.bus.wanted("bob")
        await one.bus.queue.put(None)
        await wait_until(lambda: len(one.read_anew) == 1 + one.service.store.partitions)
        await one.connect()
        assert not await told_within(one.watcher)
        await one.bus.queue.put(deployment.changes("alice"))
        assert (await wait_until(one.watcher.flips))[0].online
        await one.bus.queue.put(deployment.changes("alice"))
        assert not await told_within(one.watcher, 0.3)


async def test_what_the_bus_missed_is_read_anew(bridged):
    one = bridged
    async with running(jobs.follow_bus(one.service, one.bus)):
        await one.connect()
        await one.bus.queue.put(None)
        assert (await wait_until(one.watcher.flips))[0].online


async def test_with_a_bus_a_loss_of_the_store_is_still_noticed(bridged):
    one = bridged
    await one.connect()
    async with running(jobs.follow(one.service, one.partition, one.bus, 0.0)):
        assert (await wait_until(one.watcher.flips))[0].online  # by the None of the store


async def test_a_bus_away_for_long_is_bypassed_until_it_is_back(deployment, bridged):
    """The issue's option: "delivers to local watchers straight from the stream when Kafka is away for longer"."""
    one = bridged
    fallback = 0.6
    work = (
        jobs.follow(one.service, one.partition, one.bus, fallback),
        jobs.follow_bus(one.service, one.bus),
        jobs.bridge_bus(one.service, one.bus, fallback),
    )
    async with running(*work):
        await wait_until(lambda: one.bus.wanted and one.read_anew)
        one.bus.health.note("down", "test")
        began = time.monotonic()
        session = await one.connect()  # told of by nobody at first
        assert (await wait_until(one.watcher.flips))[0].online
        assert time.monotonic() - began > fallback - 0.05
        await one.end(session)  # told of at once
        assert not (await wait_until(one.watcher.flips))[0].online
        read_anew = len(one.read_anew)
        one.bus.health.note("up")
        await wait_until(lambda: len(one.read_anew) == read_anew + one.service.store.partitions)
        await one.bus.queue.put(deployment.changes("alice"))  # which it has had already
        assert not await told_within(one.watcher, 0.3)
        await one.connect()
        assert not await told_within(one.watcher, 0.3)
        await one.bus.queue.put(deployment.changes("alice"))
        assert (await wait_until(one.watcher.flips))[0].online


async def test_without_a_fallback_changes_wait_for_the_bus(bridged):
    one = bridged
    work = (jobs.follow(one.service, one.partition, one.bus, 0.0), jobs.bridge_bus(one.service, one.bus, 0.0))
    async with running(*work):
        one.bus.health.note("down", "test")
        one.bus.health.since -= 3600
        await wait_until(lambda: one.read_anew)
        await one.connect()
        assert not await told_within(one.watcher, 0.5)
        one.bus.health.note("up")
        assert (await wait_until(one.watcher.flips))[0].online  # read anew: the change itself may have been trimmed


@pytest.mark.parametrize("unread", [None, 0, 1_001])
async def test_it_is_known_how_far_an_instance_is_behind_the_bus(bridged, caplog, monkeypatch, unread):
    """The issue: "The lag of both hops is known (health, logs)"."""
    caplog.set_level(logging.INFO, "presence.jobs")
    bus = bridged.bus
    monkeypatch.setattr(bus, "unread", lambda: unread)
    await jobs.lag(bridged.service.store, [bus], bus)
    assert (bus.health.unread, bus.health.lag) == (unread, 0.0)
    assert ("1001 changes in bus are still to be read" in caplog.messages) == (unread == 1_001)


async def test_the_relay_is_woken_by_every_change(bridged):
    one = bridged
    woken = asyncio.Event()
    async with running(jobs.follow(one.service, one.partition, one.bus, 0.0, woken.set)):
        async with asyncio.timeout(5):
            await woken.wait()  # by the first None
            woken.clear()
            await one.connect()
            await woken.wait()


async def test_a_job_that_fails_is_run_again_the_next_time():
    runs = 0

    async def job() -> None:
        nonlocal runs
        runs += 1
        raise StoreUnavailable("away")

    async with running(jobs.every(0.01, job, "job")):
        await wait_until(lambda: runs > 2)


async def test_a_shared_job_is_run_by_one_instance(deployment, make_service):
    one, other = await make_service(), await make_service()
    runs = []

    async def job() -> None:
        runs.append(1)

    await jobs.on_one_instance(one.store, "job", 60, job)
    await jobs.on_one_instance(other.store, "job", 60, job)
    assert len(runs) == 1
    await jobs.on_one_instance(one.store, "job", 60, job)
    assert len(runs) == 2


async def test_a_shared_job_that_one_instance_cannot_do_passes_on(deployment, make_service):
    one, other = await make_service(), await make_service()
    runs = []

    async def fail() -> None:
        raise HistoryUnavailable("away")

    async def job() -> None:
        runs.append(1)

    with pytest.raises(HistoryUnavailable):
        await jobs.on_one_instance(one.store, "job", 60, fail)
    await asyncio.sleep(0.01)
    await jobs.on_one_instance(other.store, "job", 60, job)
    assert runs


async def test_the_guides_scheduled_tasks_say_what_they_found(deployment, make_service, caplog):
    """Guide, Monitoring: "Cleanup Task", "Stats Logging: Logs online user count every minute"."""
    caplog.set_level(logging.INFO, "presence.jobs")
    service = await make_service()
    await service.set_user_online("alice", "web", "s1")
    await deployment.sweep(service.store)
    await jobs.stats(service)
    await jobs.cleanup(service)
    assert "online users=1 sessions here=1" in caplog.messages
    assert any(message.startswith("cleanup repaired") and "rows_online=1" in message for message in caplog.messages)


async def test_the_records_of_watches_of_open_sessions_are_made_again(deployment, make_service):
    service = await make_service()
    session = await service.set_user_online("alice", "web", "s1")
    session.watched.add("bob")
    await jobs.renew_watches(service)
    async with recording(service.records):
        await wait_until(lambda: deployment.redis.smembers(deployment.key("bob", "watchers")) == {"alice"})


async def test_open_connections_renew_their_leases(deployment, make_service):
    service = await make_service()
    session = await service.set_user_online("alice", "web", "s1")
    deployment.move_deadline(session, deployment.now_ms() + 10_000)
    await jobs.renew_open_sessions(service)
    await wait_until(lambda: deployment.lease_left(session) > 55)
