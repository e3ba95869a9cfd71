"""presence.adapters.kafka: the bus, on real brokers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from presence.adapters import kafka as module
from presence.adapters.kafka import BusUnavailable, KafkaBus
from presence.core.model import Change, Reason
from tests.support import services, versions
from tests.support.process import free_port
from tests.support.turns import uncollected
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.filterwarnings("default::ResourceWarning"),  # of a connection of aiokafka that is cut while it is made
    pytest.mark.timeout(180),  # a broker takes its time where there is no CPU to spare
]


class Reader:
    """What `follow` told, and when it began to tell of everything."""

    def __init__(self, bus: KafkaBus, wanted: Callable[[str], bool]) -> None:
        self.changes: list[Change] = []
        self.gaps = 0
        self._bus = bus
        self._wanted = wanted

    async def run(self) -> None:
        async for changes in self._bus.follow(self._wanted):
            if changes is None:
                self.gaps += 1
            else:
                self.changes += changes

    async def has(self, changes: Sequence[Change]) -> None:
        """Wait until it was told all of these and no others, however often."""
        versions = {one.version for one in changes}
        await wait_until(lambda: {one.version for one in self.changes} == versions, 20, every=0.005)

    def of(self, user: str) -> list[Change]:
        return [change for change in self.changes if change.user == user]


@asynccontextmanager
async def following(
    bus: KafkaBus, wanted: Callable[[str], bool] = bool, *, ready: bool = True
) -> AsyncIterator[Reader]:
    reader = Reader(bus, wanted)
    task = asyncio.create_task(reader.run())
    try:
        if ready:
            await wait_until(lambda: reader.gaps, 15, what="the first None")
        yield reader
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def faulty() -> AsyncIterator[Any]:
    """A broker for those tests of this module that kill and freeze it; it makes the topics that it is asked for."""
    try:
        by = services.provider_of("kafka")
    except services.Lacking as reason:
        pytest.skip(str(reason))
    service = services.make("kafka", "auto.create.topics.enable=true", provider=by)
    try:
        await service.start()
        versions.note("Kafka", f"{service.version} ({by})")
        yield service
    finally:
        service.close()


@pytest_asyncio.fixture
async def broker(faulty: Any) -> AsyncIterator[Any]:
    yield faulty
    if not faulty.running:
        await faulty.start()


@pytest_asyncio.fixture
async def make_bus() -> AsyncIterator[Callable[..., Any]]:
    """Make buses; at a topic of their own, made with 3 partitions, unless one is given."""
    buses: list[KafkaBus] = []

    async def make(url: str, topic: str | None = None, *, partitions: int = 3, timeout: float = 2.0) -> KafkaBus:
        bus = KafkaBus([url], topic=topic or f"t-{uuid.uuid4().hex[:12]}", timeout=timeout)
        buses.append(bus)
        if topic is None:
            assert await bus.create_topic(partitions, 3_600_000)
        return bus

    yield make
    for bus in buses:
        await bus.close()


_versions = iter(range(1_700_000_000_000_000, 2_000_000_000_000_000, 1_000))


def change(user: str, online: bool = True, **more: Any) -> Change:
    """The user's next change, with a version of its own."""
    return Change(user, online, next(_versions), 1_700_000_000_123, **more)


def flips(user: str, count: int) -> list[Change]:
    return [change(user, number % 2 == 0) for number in range(count)]


async def records(url: str, topic: str, partitions: int = 3) -> list[Any]:
    """All records of the topic, each partition's in order."""
    consumer = AIOKafkaConsumer(bootstrap_servers=url, auto_offset_reset="earliest")
    await consumer.start()
    try:
        parts = [TopicPartition(topic, number) for number in range(partitions)]
        end = await consumer.end_offsets(parts)
        consumer.assign(parts)
        found: list[Any] = []
        async with asyncio.timeout(20):
            while len(found) < sum(end.values()):
                for some in (await consumer.getmany(timeout_ms=200)).values():
                    found += some
        return found
    finally:
        await consumer.stop()


async def send(url: str, topic: str, *entries: tuple[bytes | None, bytes | None]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=url, acks="all")
    await producer.start()
    try:
        for key, value in entries:
            await producer.send_and_wait(topic, value, key)
    finally:
        await producer.stop()


def in_order_without_repeats(changes: Sequence[Change]) -> bool:
    """Per user, once the repeats are dropped, the versions rise."""
    seen: dict[str, set[int]] = {}
    newest: dict[str, int] = {}
    for one in changes:
        known = seen.setdefault(one.user, set())
        if one.version not in known:
            if one.version < newest.get(one.user, 0):
                return False
            newest[one.user] = one.version
            known.add(one.version)
    return True


async def write_all(bus: KafkaBus, changes: Sequence[Change]) -> int:
    """As the relay does: until the bus has them all. Return how often it had not."""
    failures = 0
    while True:
        try:
            await bus.write(changes)
        except BusUnavailable:
            failures += 1
            await asyncio.sleep(0.1)
        else:
            return failures


# What is in the topic


async def test_a_record_is_the_event_with_its_device_activity_and_reason(kafka, make_bus):
    """WIRE §7: "key = user id, value = the event as above plus `device`, `lastActive` and `reason`"."""
    bus = await make_bus(kafka.url)
    one = Change("alice", True, 1_700_000_000_123_456, 1_700_000_000_120, "ios", Reason.REVIVED)
    never = Change("bob", False, 1_700_000_000_123_457, None, "web", Reason.SIGNED_OFF)
    await bus.write([one, never])
    found = {record.key: json.loads(record.value) for record in await records(kafka.url, bus.topic)}
    assert found == {
        b"alice": {
            "userId": "alice",
            "online": True,
            "timestamp": "2023-11-14T22:13:20.123Z",
            "version": 1_700_000_000_123_456,
            "device": "ios",
            "lastActive": "2023-11-14T22:13:20.120Z",
            "reason": "revived",
        },
        b"bob": json.loads(never.event) | {"device": "web", "lastActive": None, "reason": "signed-off"},
    }


async def test_what_is_written_is_told_as_it_was(kafka, make_bus):
    bus = await make_bus(kafka.url)
    changes = [change("alice", device="ios", reason=reason) for reason in Reason]
    async with following(bus) as reader:
        await bus.write([*changes, Change("bob", False, 5, None)])
        await wait_until(lambda: len(reader.changes) == len(changes) + 1)
    assert reader.of("alice") == changes
    assert reader.of("bob") == [Change("bob", False, 5, None)]
    assert reader.gaps == 1
    assert bus.health.state == "up"


# Writing


async def test_a_users_changes_come_in_order_and_never_two_are_in_flight(kafka, make_bus, monkeypatch):
    """DESIGN §4: "never has two changes of one user in flight"."""
    bus = await make_bus(kafka.url)
    in_flight: set[str] = set()
    together = []
    send = bus._send

    async def watched(changes: Sequence[Change]) -> None:
        users = [one.user for one in changes]
        assert len(set(users)) == len(users)
        assert not in_flight.intersection(users)
        in_flight.update(users)
        await send(changes)
        in_flight.difference_update(users)
        together.append(len(users))

    monkeypatch.setattr(bus, "_send", watched)
    changes = [one for group in zip(*(flips(f"u{n}", 20) for n in range(30)), strict=True) for one in group]
    async with following(bus) as reader:
        await bus.write(changes)
        await wait_until(lambda: len(reader.changes) == len(changes))
    assert together == [30] * 20
    for number in range(30):
        assert reader.of(f"u{number}") == [one for one in changes if one.user == f"u{number}"]


async def test_all_records_of_a_user_are_in_one_partition(kafka, make_bus):
    bus = await make_bus(kafka.url)
    await bus.write([one for number in range(30) for one in flips(f"u{number}", 2)])
    found = await records(kafka.url, bus.topic)
    places = {(record.key, record.partition) for record in found}
    assert len(places) == 30
    assert len({partition for _, partition in places}) == 3


async def test_ten_thousand_changes_arrive(kafka, make_bus):
    bus = await make_bus(kafka.url)
    changes = [one for number in range(5_000) for one in flips(f"u{number}", 2)]
    async with following(bus) as reader:
        await bus.write(changes)
        await wait_until(lambda: len(reader.changes) >= len(changes), 20)
    assert in_order_without_repeats(reader.changes)
    assert {one.version for one in reader.changes} == {one.version for one in changes}


# Reading


async def test_what_is_written_after_the_first_none_is_told(kafka, make_bus):
    """DESIGN §4: "… was seen in 1 of 30 trials, unless the position of every partition was awaited first"."""
    bus = await make_bus(kafka.url)
    await bus.write(flips("before", 4))
    for trial in range(30):
        one = change(f"u{trial}")
        async with following(bus) as reader:
            await bus.write([one])
            await reader.has([one])


async def test_a_record_that_nobody_wants_is_skipped_by_its_key(kafka, make_bus, monkeypatch):
    """DESIGN §4: "Skip a record by its key before decoding the value when nobody here watches that user"."""
    bus = await make_bus(kafka.url)
    decoded = []
    decode = module._change

    def noted(user: str, value: bytes) -> Change:
        decoded.append(user)
        return decode(user, value)

    monkeypatch.setattr(module, "_change", noted)
    async with following(bus, lambda user: user == "alice") as reader:
        await send(kafka.url, bus.topic, (b"bob", b"not even JSON"))
        await bus.write([*flips("bob", 5), last := change("alice")])
        await wait_until(lambda: reader.changes)
    assert decoded == ["alice"]
    assert reader.changes == [last]


async def test_malformed_records_are_skipped_and_told_of_once_a_minute(kafka, make_bus, caplog):
    bus = await make_bus(kafka.url, partitions=1)
    good = json.loads(module._value(change("alice")))
    bad: list[tuple[bytes | None, bytes | None]] = [
        (None, b"{}"),
        (b"alice", None),
        (b"\xff", b"{}"),
        (b"alice", b"\xff"),
        (b"alice", b"[]"),
        (b"alice", b"{}"),
        (b"alice", b"[" * 100_000),
        *(
            (b"alice", json.dumps(good | {field: value}).encode())
            for field, value in (
                ("userId", "bob"),
                ("online", 1),
                ("version", "5"),
                ("version", 0),
                ("version", 2**53),
                ("lastActive", "yesterday"),
                ("reason", "whatever"),
            )
        ),
    ]
    async with following(bus) as reader:
        await send(kafka.url, bus.topic, *bad)
        await send(kafka.url, bus.topic, (b"alice", json.dumps(good | {"added": "later"}).encode()))
        await wait_until(lambda: reader.changes)
    assert [one.version for one in reader.changes] == [good["version"]]
    assert len([message for message in caplog.messages if "malformed" in message]) == 1


async def test_two_instances_read_all(kafka, make_bus):
    one = await make_bus(kafka.url)
    other = await make_bus(kafka.url, one.topic)
    async with following(one) as here, following(other) as there:
        changes = flips("alice", 4)
        await one.write(changes[:2])
        await other.write(changes[2:])
        await wait_until(lambda: here.changes == there.changes == changes)


async def test_a_partition_that_is_added_is_read_from_its_beginning(kafka, make_bus, monkeypatch):
    monkeypatch.setattr(module, "NEW_PARTITIONS", 0.5)
    bus = await make_bus(kafka.url, partitions=1)
    writer = await make_bus(kafka.url, bus.topic)
    async with following(bus) as reader:
        await bus.write(flips("u", 2))
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.url)
        await admin.start()
        await admin.create_partitions({bus.topic: NewPartitions(4)})
        await admin.close()
        changes = [change(f"u{number}") for number in range(40)]

        async def spread() -> bool:
            return len(await writer._partitions()) == 4

        await wait_until(spread)
        await writer.write(changes)  # a producer that knows of all four
        await wait_until(lambda: {one.user for one in reader.changes} >= {one.user for one in changes})
    assert reader.gaps == 1
    assert {record.partition for record in await records(kafka.url, bus.topic, 4)} == {0, 1, 2, 3}


async def test_what_is_still_to_be_read_is_known(kafka, make_bus):
    bus = await make_bus(kafka.url, partitions=1)
    assert bus.unread() is None
    reading = asyncio.Event()

    async def slow() -> None:
        async for changes in bus.follow(bool):
            if changes:
                await reading.wait()

    task = asyncio.create_task(slow())
    await wait_until(lambda: bus.health.state == "up")
    assert bus.unread() == 0
    await bus.write([change("first")])
    for number in range(5):
        await bus.write([change(f"u{number}")])
    await wait_until(lambda: (bus.unread() or 0) > 0)
    reading.set()
    await wait_until(lambda: bus.unread() == 0)
    task.cancel()
    await asyncio.wait([task])


# The topic


async def test_the_topic_is_made_once_and_its_lack_is_told(broker, make_bus):
    bus = await make_bus(broker.url, f"t-{uuid.uuid4().hex[:12]}")
    assert await bus.missing() == f"topic {bus.topic} is missing: run `presence init`"
    with pytest.raises(BusUnavailable, match="is missing: run `presence init`"):
        await bus.write([change("alice")])
    assert await bus.missing(), "writing made it"
    assert await bus.create_topic(2, 60_000)
    assert await bus.missing() is None
    assert not await bus.create_topic(5, 60_000, 1)
    assert len(await bus._partitions()) == 2


async def test_a_topic_that_kafka_does_not_want_is_told_in_one_line(kafka, make_bus):
    bus = await make_bus(kafka.url, f"t-{uuid.uuid4().hex[:12]}")
    with pytest.raises(BusUnavailable, match=f"^topic {bus.topic}: .*replication"):
        await bus.create_topic(1, 60_000, 5)


async def test_who_reads_before_the_topic_is_there_gets_all(kafka, make_bus):
    bus = await make_bus(kafka.url, f"t-{uuid.uuid4().hex[:12]}")
    async with following(bus, ready=False) as reader:
        await wait_until(lambda: bus.health.state == "down")
        assert "is missing" in (bus.health.detail or "")
        await bus.create_topic(1, 60_000)
        await wait_until(lambda: reader.gaps)
        await bus.write(flips("alice", 2))
        await wait_until(lambda: len(reader.changes) == 2)


async def test_a_topic_made_anew_is_a_gap(kafka, make_bus):
    bus = await make_bus(kafka.url)
    async with following(bus) as reader:
        await bus.write(flips("alice", 10))
        await wait_until(lambda: len(reader.changes) == 10)
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.url)
        await admin.start()
        await admin.delete_topics([bus.topic])
        await admin.close()
        await wait_until(lambda: bus.health.state == "down", 10)
        await bus.create_topic(3, 60_000)
        await wait_until(lambda: reader.gaps == 2, 10)
        await write_all(bus, last := flips("bob", 2))
        await wait_until(lambda: reader.of("bob") == last)


# Kafka away


async def test_a_broker_that_is_killed_and_comes_back_loses_nothing(broker, make_bus):
    bus = await make_bus(broker.url)
    async with following(bus) as reader:
        await bus.write(first := flips("alice", 6))
        await wait_until(lambda: len(reader.changes) == 6)
        await broker.kill9()
        began = time.monotonic()
        with pytest.raises(BusUnavailable, match=broker.url):
            await bus.write([change("nobody")])
        assert time.monotonic() - began < 2 * 2.0 + 1
        await wait_until(lambda: bus.health.state == "down")
        second = flips("alice", 6)
        writing = asyncio.create_task(write_all(bus, second))
        await broker.start()
        assert await asyncio.wait_for(writing, 15) > 0
        await wait_until(lambda: reader.of("alice")[-1] == second[-1], 15)
        await wait_until(lambda: bus.health.state == "up")
    assert reader.gaps == 1
    assert in_order_without_repeats(reader.changes)
    assert {one.version for one in reader.of("alice")} == {one.version for one in first + second}


async def test_a_broker_that_is_killed_again_and_again_loses_nothing(broker, make_bus):
    bus, other = await make_bus(broker.url), None
    other = await make_bus(broker.url, bus.topic)
    changes = [one for group in zip(*(flips(f"u{n}", 40) for n in range(10)), strict=True) for one in group]

    async def write() -> None:
        for start in range(0, len(changes), 20):
            await write_all(bus, changes[start : start + 20])
            await asyncio.sleep(0.1)

    async with following(bus) as here, following(other) as there:
        writing = asyncio.create_task(write())
        for _ in range(2):
            await asyncio.sleep(0.3)
            await broker.restart()
        await asyncio.wait_for(writing, 30)
        for reader in (here, there):
            await reader.has(changes)
            assert in_order_without_repeats(reader.changes)
            assert reader.gaps == 1


async def test_a_frozen_broker_blocks_nothing_and_is_used_again(broker, make_bus):
    bus = await make_bus(broker.url)
    async with following(bus) as reader:
        await bus.write(flips("alice", 2))
        await broker.freeze()
        worst, failures, changes = 0.0, 0, flips("alice", 4)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            began = time.monotonic()
            with pytest.raises(BusUnavailable):
                await bus.write(changes)
            failures += 1
            worst = max(worst, time.monotonic() - began)
        assert worst < 2 * 2.0 + 0.5
        assert failures >= 2
        assert bus.health.state == "down"
        await broker.thaw()
        thawed = time.monotonic()
        await write_all(bus, changes)
        assert time.monotonic() - thawed < 5
        await wait_until(lambda: reader.of("alice")[-1:] == changes[-1:], 15)
        await wait_until(lambda: bus.health.state == "up")
    assert reader.gaps == 1
    assert in_order_without_repeats(reader.changes)
    assert {one.version for one in changes} <= {one.version for one in reader.changes}


async def test_the_loop_is_free_while_a_broker_is_frozen(broker, make_bus):
    bus = await make_bus(broker.url, timeout=0.5)
    async with following(bus):
        await broker.freeze()
        writing = asyncio.create_task(write_all(bus, [one for n in range(2_000) for one in flips(f"u{n}", 2)]))
        worked, until = [], time.monotonic() + 3
        try:
            with uncollected():
                while time.monotonic() < until:
                    began = time.thread_time()
                    await asyncio.sleep(0)
                    worked.append(time.thread_time() - began)
                    await asyncio.sleep(0.001)
        finally:
            await broker.thaw()
        assert len(worked) > 100  # of thousands; one call that waited for the broker would take half a second
        assert max(worked) < sum(worked) / 2
        await asyncio.wait_for(writing, 20)


async def test_a_broker_may_come_later(broker, make_bus):
    topic = (await make_bus(broker.url)).topic
    await broker.kill9()
    bus = await make_bus(broker.url, topic)
    async with following(bus, ready=False) as reader:
        await wait_until(lambda: bus.health.state == "down")
        with pytest.raises(BusUnavailable):
            await bus.missing()
        assert bus.unread() is None
        await broker.start()
        await wait_until(lambda: reader.gaps == 1, 10)
        await write_all(bus, changes := flips("alice", 2))
        await wait_until(lambda: {one.version for one in reader.changes} == {one.version for one in changes})


async def test_a_position_that_is_lost_is_a_gap(broker, make_bus):
    """Records were dropped by the topic's retention before this instance had them."""
    bus = await make_bus(broker.url, partitions=1)
    async with following(bus) as reader:
        await bus.write(flips("alice", 2))
        await wait_until(lambda: len(reader.changes) == 2)
        await broker.kill9()
        await wait_until(lambda: bus.health.state == "down", 10)  # else the consumer that is there may go on by itself
        bus._positions[TopicPartition(bus.topic, 0)] = 1_000_000  # as after a broker came back with less
        await broker.start()
        await wait_until(lambda: reader.gaps == 2, 15)
        await write_all(bus, last := flips("bob", 2))
        await wait_until(lambda: reader.of("bob")[-1:] == last[-1:])


async def test_what_was_cut_short_leaves_nothing_behind(broker, make_bus):
    bus = await make_bus(broker.url)
    before = asyncio.all_tasks()
    async with following(bus):
        await bus.write([change("alice")])
        await broker.kill9()
        await wait_until(lambda: bus.health.state == "down", 10)
    await bus.close()
    await wait_until(lambda: asyncio.all_tasks() <= before, 10, what="the end of all tasks")


async def test_a_wrong_address_is_one_line(make_bus, caplog):
    caplog.set_level(logging.INFO)
    bus = await make_bus(f"127.0.0.1:{free_port()}", "t")
    for _ in range(3):
        with pytest.raises(BusUnavailable, match=r"^127\.0\.0\.1:\d+: .*Unable to bootstrap"):
            await bus.write([change("alice")])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Kafka away: 127.0.0.1:")
