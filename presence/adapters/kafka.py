"""The bus in Kafka: the topic that carries every change to every instance (WIRE §7; DESIGN §4)."""

from __future__ import annotations

import asyncio
import json
import logging
from asyncio import Task
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

from aiokafka import AIOKafkaClient, AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.metadata import MetadataRequest

from presence.core.model import Change, Reason, rfc3339
from presence.ports import Health, Unavailable

log = logging.getLogger(__name__)
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs each try that fails; `health` tells of the outage

IN_FLIGHT = 250  # changes sent before the first is acknowledged
BATCH_BYTES = 131_072  # of one partition, not sent yet; more wait
PAGE = 500  # records read at one go
FETCH_WAIT = 0.5  # s an idle broker waits before it answers that there is nothing new
PAUSE = 0.5  # s between two tries to reach Kafka
NEW_PARTITIONS = 10.0  # s after which a partition that was added is read; all that is in it
COMPLAIN = 60.0  # s between two complaints about malformed records
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
STALE = 5.0  # s after which a write that failed says nothing about now


class BusUnavailable(Unavailable):
    """The bus cannot take changes, or be asked, now."""


class KafkaBus:
    """See `presence.ports.Bus`. Connects when first asked; one reader (`follow`) to an instance."""

    name = "kafka"

    def __init__(self, servers: Sequence[str], *, topic: str = "user.presence.status", timeout: float = 2.0) -> None:
        """Connect nowhere yet.

        Args:
            servers: some brokers, ``host:port``.
            topic: is made by `create_topic`, never by writing to it.
            timeout: of one question, s. A write takes twice that at most for each `IN_FLIGHT` changes.
        """
        self.health = Health()
        self.topic = topic
        self._servers = list(servers)
        self._timeout = timeout
        self._troubles: dict[str, str] = {}  # "write", "read" → the reason
        self._write_failed_at = 0.0
        self._producer: Any = None
        self._starting = asyncio.Lock()
        self._consumer: Any = None
        self._positions: dict[TopicPartition, int] = {}
        self._closing: set[Task[None]] = set()
        self._malformed = 0
        self._complained_at = -COMPLAIN

    async def close(self) -> None:
        """Close the connections, within the time limit."""
        if self._producer is not None:
            _ = self._let_go(self._producer.stop)
            self._producer = None
        if self._closing:
            await asyncio.wait(self._closing, timeout=self._timeout)

    # The topic

    async def missing(self) -> str | None:
        """Return what has to be made before the bus works, in one line; None: nothing.

        Raises:
            BusUnavailable: that is unknown.
        """
        try:
            async with asyncio.timeout(2 * self._timeout):
                await self._partitions()
        except UnknownTopicOrPartitionError:
            return f"topic {self.topic} is missing: run `presence init`"
        except (KafkaError, OSError, TimeoutError) as error:
            raise BusUnavailable(self._reason(error)) from None
        return None

    async def create_topic(self, partitions: int, retention_ms: int, replication: int = -1) -> bool:
        """Make the topic unless it is there; it is never changed. Return whether it was made.

        Args:
            partitions: how many.
            retention_ms: how long records are kept.
            replication: on how many brokers; -1: Kafka's default.

        Raises:
            BusUnavailable: Kafka cannot be asked, or does not want to.
        """
        places: dict[int, list[int]] | None = (
            {} if replication == -1 else None
        )  # aiokafka takes the one for the sign of the other
        topic = NewTopic(self.topic, partitions, replication, places, {"retention.ms": str(retention_ms)})
        admin = AIOKafkaAdminClient(**self._options())
        try:
            async with asyncio.timeout(5 * self._timeout):
                await admin.start()
                answer = await admin.create_topics([topic])
                (_, code, *message) = answer.topic_errors[0]
                if code not in (0, TopicAlreadyExistsError.errno):
                    raise BusUnavailable(f"topic {self.topic}: {(message and message[0]) or for_code(code).__name__}")
                while await self.missing():  # it is told to the brokers a moment later
                    await asyncio.sleep(0.05)
        except (KafkaError, OSError, TimeoutError, AttributeError) as error:  # the last: no controller yet
            raise BusUnavailable(self._reason(error)) from None
        finally:
            await self._stopped(admin.close)
        return bool(code == 0)

    async def _partitions(self) -> list[TopicPartition]:
        """Return the topic's partitions. It is not made by asking, as Kafka would by default.

        Raises:
            UnknownTopicOrPartitionError: there is no such topic.
        """
        client = AIOKafkaClient(**self._options())
        try:
            await client.bootstrap()
            question = MetadataRequest([self.topic], allow_auto_topic_creation=False)
            (found,) = (await client.send(client.get_random_node(), question)).to_object()["topics"]
        finally:
            await self._stopped(client.close)
        if found["error_code"]:
            raise for_code(found["error_code"])
        return [TopicPartition(self.topic, one["partition"]) for one in found["partitions"]]

    # Writing

    async def write(self, changes: Sequence[Change]) -> None:
        """See `ports.Sink`. Never two changes of one user in flight, so that a failed one cannot overtake the next.

        Raises:
            BusUnavailable: some may have been written, others not.
        """
        waiting: dict[str, deque[Change]] = {}
        for change in changes:
            waiting.setdefault(change.user, deque()).append(change)
        while waiting:
            users = list(islice(waiting, IN_FLIGHT))
            await self._send([waiting[user].popleft() for user in users])
            for user in users:
                if not waiting[user]:
                    del waiting[user]

    async def _send(self, changes: Sequence[Change]) -> None:
        producer = None
        sent: list[asyncio.Future[object]] = []
        try:
            async with asyncio.timeout(2 * self._timeout):
                producer = await self._started()
                for change in changes:
                    sent.append(  # noqa: PERF401 - those before one that fails are to be known
                        await producer.send(self.topic, _value(change), change.user.encode())
                    )
                await asyncio.gather(*sent)
        except (KafkaError, OSError, TimeoutError) as error:
            for future in sent:
                future.cancel()  # nobody waits for the others
            if producer is not None and producer is self._producer:
                # The next one asks all servers anew: this one may know only of brokers that are no more.
                _ = self._let_go(producer.stop)
                self._producer = None
            self._write_failed_at = asyncio.get_running_loop().time()
            raise BusUnavailable(self._away("write", error)) from None
        self._reached("write")

    async def _started(self) -> Any:
        async with self._starting:
            if self._producer is None:
                await self._partitions()  # a producer that finds no topic may have it made
                producer = AIOKafkaProducer(
                    **self._options(),
                    acks="all",
                    enable_idempotence=False,  # else nothing ever fails in an outage; our repeats are harmless
                    linger_ms=0,
                    max_batch_size=BATCH_BYTES,
                )
                try:
                    await producer.start()
                except BaseException:
                    _ = self._let_go(producer.stop)
                    raise
                self._producer = producer
            return self._producer

    # Reading

    async def follow(self, wanted: Callable[[str], bool]) -> AsyncIterator[Sequence[Change] | None]:
        """See `ports.Bus`. No group: every instance reads all partitions, from positions of its own.

        A partition that is added is read from its beginning, and may bring a user's change before an older one.
        """
        positions = self._positions = {}
        while True:
            consumer = AIOKafkaConsumer(
                **self._options(FETCH_WAIT),
                auto_offset_reset="none",  # where to begin is ours to say: "latest" is found too late, if not asked for
                metadata_max_age_ms=round(NEW_PARTITIONS * 1000),
                fetch_max_wait_ms=round(FETCH_WAIT * 1000),
                consumer_timeout_ms=1000,  # how often it looks round though nothing has happened
            )
            pause = PAUSE
            try:
                async with asyncio.timeout(4 * self._timeout):
                    missed = await self._place(consumer, positions)
                self._consumer = consumer
                if missed:
                    yield None
                watch = _Watch(positions, self._timeout + 2 * FETCH_WAIT)
                while not self._grown(consumer, positions):
                    found, changes = await self._read(consumer, positions, wanted)
                    if changes:
                        yield changes
                    if watch.answered(consumer, found=found):
                        self._reached("read")
                pause = 0.0
            except UnknownTopicOrPartitionError as error:
                self._away("read", error)
                positions.clear()  # another topic of the name begins anew
            except (KafkaError, OSError, TimeoutError) as error:
                self._away("read", error)
            finally:
                self._consumer = None
                await self._stopped(partial(_stop, consumer))
            await asyncio.sleep(pause)

    def unread(self) -> int | None:
        consumer = self._consumer
        if consumer is None:
            return None
        return sum(max(0, (consumer.highwater(one) or at) - at) for one, at in self._positions.items())

    async def _place(self, consumer: Any, positions: dict[TopicPartition, int]) -> bool:
        """Start the consumer at the positions; at the end if there are none, or records there were lost: then True."""
        partitions = await self._partitions()
        await consumer.start()
        first = await consumer.beginning_offsets(partitions)
        end = await consumer.end_offsets(partitions)
        missed = not positions or not all(one in end and first[one] <= at <= end[one] for one, at in positions.items())
        if missed:
            positions.clear()
            positions.update(end)
        for one in partitions:
            positions.setdefault(one, first[one])
        consumer.assign(partitions)
        for one, at in positions.items():
            consumer.seek(one, at)
        return missed

    def _grown(self, consumer: Any, positions: Mapping[TopicPartition, int]) -> bool:
        return len(consumer.partitions_for_topic(self.topic) or ()) > len(positions)

    async def _read(
        self, consumer: Any, positions: dict[TopicPartition, int], wanted: Callable[[str], bool]
    ) -> tuple[bool, list[Change]]:
        """Return whether there were records, and the changes in them that are wanted."""
        changes = []
        found = await consumer.getmany(timeout_ms=round(FETCH_WAIT * 1000), max_records=PAGE)
        for partition, records in found.items():
            positions[partition] = records[-1].offset + 1
            for record in records:
                try:
                    user = record.key.decode()
                    if wanted(user):
                        changes.append(_change(user, record.value))
                except MALFORMED as error:
                    self._complain(partition, record.offset, error)
        return bool(found), changes

    def _complain(self, partition: TopicPartition, offset: int, error: Exception) -> None:
        self._malformed += 1
        now = asyncio.get_running_loop().time()
        if now - self._complained_at >= COMPLAIN:
            where = f"{partition.topic}, partition {partition.partition}, offset {offset}"
            log.warning("%d malformed records were skipped, the last in %s: %r", self._malformed, where, error)
            self._malformed, self._complained_at = 0, now

    # Kafka comes and goes

    def _options(self, more: float = 0.0) -> dict[str, Any]:
        return {
            "bootstrap_servers": self._servers,
            "client_id": "presence",
            "request_timeout_ms": round((self._timeout + more) * 1000),
        }

    def _reason(self, error: Exception) -> str:
        where = ",".join(self._servers)
        if isinstance(error, UnknownTopicOrPartitionError):
            return f"{where}: topic {self.topic} is missing: run `presence init`"
        if isinstance(error, TimeoutError):
            return f"{where}: {str(error) or 'no answer in time'}"
        return f"{where}: {error}"

    def _away(self, side: str, error: Exception) -> str:
        reason = self._troubles[side] = self._reason(error)
        if self.health.note("down", reason):
            log.warning("Kafka away: %s", reason)
        return reason

    def _reached(self, side: str) -> None:
        self._troubles.pop(side, None)
        if self._troubles and asyncio.get_running_loop().time() - self._write_failed_at > STALE:
            self._troubles.pop("write", None)  # another instance may write since
        if not self._troubles and self.health.note("up"):
            log.info("Kafka reached")

    async def _stopped(self, stop: Callable[[], Awaitable[None]]) -> None:
        """Let a client go; wait for that, within the time limit."""
        await asyncio.wait([self._let_go(stop)], timeout=self._timeout)

    def _let_go(self, stop: Callable[[], Awaitable[None]]) -> Task[None]:
        """Let a client go, in a task of its own: whatever goes wrong or hangs in it is nobody's concern."""

        async def run() -> None:
            await stop()

        def done(task: Task[None]) -> None:
            self._closing.discard(task)
            if not task.cancelled() and task.exception():
                log.debug("closing a client of Kafka: %r", task.exception())

        task = asyncio.create_task(run())
        self._closing.add(task)
        task.add_done_callback(done)
        return task


class _Watch:
    """Notices that a partition's broker answers no more, of which aiokafka says nothing."""

    def __init__(self, positions: Mapping[TopicPartition, int], limit: float) -> None:
        self._limit = limit
        self._looked = asyncio.get_running_loop().time()
        self._answered: dict[TopicPartition, int | None] = dict.fromkeys(positions)  # → when, as the consumer says
        self._silent = dict.fromkeys(positions, 0.0)  # partition → s without an answer

    def answered(self, consumer: Any, *, found: bool) -> bool:
        """Look; return whether all partitions have answered by now.

        Args:
            consumer: whose partitions they are.
            found: there were records: no partition is asked while those of one still wait to be read.

        Raises:
            TimeoutError: one has not for too long.
        """
        now = asyncio.get_running_loop().time()
        # All above is time in which we did not look, but did other work.
        passed = 0.0 if found else min(now - self._looked, FETCH_WAIT)
        self._looked = now
        for partition, before in self._answered.items():
            answered = consumer.last_poll_timestamp(partition)
            self._silent[partition] = self._silent[partition] + passed if answered == before else 0.0
            self._answered[partition] = answered
        if max(self._silent.values()) > self._limit:
            raise TimeoutError
        return None not in self._answered.values()


async def _stop(consumer: Any) -> None:
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        pass  # of a fetch of the consumer's that was waiting: aiokafka passes it on, and closes no connection
    finally:
        await consumer._client.close()  # noqa: SLF001 - twice is once


def _value(change: Change) -> bytes:
    return json.dumps(
        {
            "userId": change.user,
            "online": change.online,
            "timestamp": rfc3339(change.version // 1000),
            "version": change.version,
            "device": change.device,
            "lastActive": None if change.last_active is None else rfc3339(change.last_active),
            "reason": change.reason,
        },
        separators=(",", ":"),
    ).encode()


def _change(user: str, value: bytes) -> Change:
    """Return the change in a record. Raises one of `MALFORMED`."""
    event = json.loads(value)
    online, version, active = event["online"], event["version"], event["lastActive"]
    if event["userId"] != user or type(online) is not bool or type(version) is not int:
        raise ValueError(f"no change of {user}: {value[:200]!r}")
    if not 0 < version < 2**53:  # µs: what is no time could not be told
        raise ValueError(f"version {version}")
    last_active = None if active is None else round(datetime.fromisoformat(active).timestamp() * 1000)
    return Change(user, online, version, last_active, str(event["device"]), Reason(event["reason"]))
