"""A run: instances on real stores, 300 users who come, beat, go and die at random from a seed, and 300 watchers.

All that the clients do and see is in `World.recorder.history`, from which `checker` decides afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any, Protocol

import redis

from presence.adapters.redis import tags
from tests.fleet.checker import DELIVERY
from tests.fleet.client import Client, Recorder
from tests.fleet.history import History, Setup
from tests.support.process import free_port
from tests.support.rest import request
from tests.support.server import ServerProcess, environment, run_presence
from tests.support.waiting import wait_until

LEASE, AMNESTY, DRAIN = 2.0, 2.0, 2.0
BEAT = 0.8
"""Between two heartbeats, s."""
WATCHED = 40
"""How many users a watcher watches."""
POLL = 0.2
"""Between two questions over REST, s."""
POLLED = 5
"""About how many users each is."""
STAY, AWAY = 12.0, 4.0
"""How long a session stays, and stays away, on average, s."""
TAKEOVER = 5.5
"""By then another instance relays: the lease of a relay's holder (`relay.LEASE`), and a tenth of it, s."""
RETRY = 1.9
"""By then all have noticed that Kafka is back, s: a try that began before it was ends by its time limit
(`SETTINGS`); 0.4 s later comes the next (`relay.POLL`), or, after another tenth of a lease, that of another instance.
"""
SETTLED = 12.0
"""By then, once nobody does anything any more, all is as it should be, s; else the checker says what is not."""
STALLED = 0.2
"""A stall of our own that is longer is noted, s."""
SETTINGS: dict[str, Any] = {
    "lease_seconds": LEASE,
    "amnesty_seconds": AMNESTY,
    "drain_seconds": DRAIN,
    "store_timeout_seconds": 1.0,
    "cleanup_seconds": 5,
    "log_level": "info",
}


def clocks() -> tuple[float, float]:
    """The monotonic clock and Unix time of one moment, s: what is preempted between the two is not taken.

    A millisecond between them, and changes would seem to be made before what they are of.
    """
    pairs = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(20)]
    before, unix, after = min(pairs, key=lambda pair: pair[2] - pair[0])
    return (before + after) / 2, unix


class Service(Protocol):
    """A real server under the run's thumb, as the fixtures of tests/conftest.py make them."""

    url: str

    async def start(self) -> Any: ...
    async def kill9(self) -> None: ...
    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...


class Store(Protocol):
    """The Redis of all instances."""

    url: str

    async def start(self) -> Any: ...
    def redis(self) -> Any: ...
    def asyncio_redis(self) -> Any: ...
    def close(self) -> None: ...


class World:
    """One run. Make it, `start` it, break what is to be broken within `broken`, `finish` it, `close` it.

    Args:
        store: the Redis of all instances.
        seed: of all that happens at random.
        kafka: None: the instances read the changes from Redis.
        cassandra: None: each instance has a history of its own, in SQLite.
        skewed: the clock of the first instance is so many s ahead.
        behind: that of what takes the store's place in a fail-over is so many s behind.
        proxied: some connections go through a network that `cut` cuts.
        settings: of all instances.
    """

    def __init__(
        self,
        store: Store,
        seed: str,
        name: str = "",
        *,
        kafka: Service | None = None,
        cassandra: Service | None = None,
        users: int = 300,
        watchers: int = 300,
        instances: int = 3,
        skewed: float = 0.0,
        behind: float = 0.0,
        proxied: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.store, self.kafka, self.cassandra = store, kafka, cassandra
        self.random = random.Random(seed)
        self.seed = seed
        tag = f"{random.getrandbits(32):08x}"  # a topic and a keyspace of its own: the services may be shared
        self.settings = SETTINGS | {"redis_url": store.url}
        if kafka is not None:
            self.settings |= {"kafka_bootstrap_servers": kafka.url, "kafka_topic": f"presence-{tag}"}
        if cassandra is not None:
            self.settings |= {"cassandra_contact_points": cassandra.url, "cassandra_keyspace": f"presence_{tag}"}
        self.settings |= settings or {}
        self.instances = {f"instance {number}": ServerProcess(**self.settings) for number in range(instances)}
        start, unix = clocks()
        self.setup = Setup(
            lease=self.settings["lease_seconds"],
            amnesty=self.settings["amnesty_seconds"],
            drain=self.settings["drain_seconds"],
            unix=unix,
            behind=behind,
            relayed=kafka is not None,
            takeover=0.0 if kafka is None else TAKEOVER,
            retry=0.0 if kafka is None else RETRY,
            instances=tuple(self.instances),
            histories=tuple(self.instances) if cassandra is None else ("cassandra",),
            seed=seed,
            name=name,
        )
        self.recorder = Recorder(History(self.setup), start)
        self.users = [f"u{number}" for number in range(users)]
        self._watchers = [f"w{number}" for number in range(watchers)]
        self._skewed = skewed
        self._proxies = {name: Proxy(server.port) for name, server in self.instances.items()} if proxied else {}
        self._cut: list[Client] = []
        self._over = asyncio.Event()
        """Nobody comes or goes any more."""
        self._done = asyncio.Event()
        self._open: set[Client] = set()
        self._number = 0
        self._bases = [f"{tag}presence:" for tag in tags(self.settings.get("redis_partitions", 1))]
        self._last = dict.fromkeys(self._bases, "0-0")  # of each stream, as far as it is read
        self._version = dict.fromkeys(self._bases, 0)
        self._read = dict.fromkeys(self._bases, 0.0)  # when it was read so far
        self._tasks: list[asyncio.Task[None]] = []

    # The run

    async def start(self) -> None:
        """Start the instances, and everybody who connects to them."""
        if self.kafka is not None or self.cassandra is not None:
            code, out, err = await run_presence("init", **self.settings)
            assert code == 0, f"presence init: {code}\n{out}{err}"
        for name, server in self.instances.items():
            if self._skewed and name == "instance 0":
                late = f"import time; t = time.time; time.time = lambda: t() + {self._skewed}; "
                main = "import sys; sys.argv = ['presence', 'serve']; from presence.cli import main; main()"
                server.spawn([sys.executable, "-c", late + main], environment(server.settings))
            else:
                server.start()
        for name, server in self.instances.items():
            await server.ready()
            await wait_until(
                partial(_whole, server), 20, what=f"{name} to reach all it needs\n{server.log}", every=0.05
            )
        for proxy in self._proxies.values():
            await proxy.start()
        self._tasks.append(asyncio.create_task(self._follow()))
        self._tasks.append(asyncio.create_task(self._poll()))
        for number, user in enumerate(self.users):
            for session in range(1 + number % 3):
                self._tasks.append(asyncio.create_task(self._life(user, session)))
        for number, user in enumerate(self._watchers):
            self._tasks.append(asyncio.create_task(self._watch(user, number)))

    async def settle_in(self, timeout: float = 30.0) -> None:
        """Wait until all watchers watch, and most users are there."""

        def there() -> bool:
            watching = sum(len(client.told) >= min(WATCHED, len(self.users)) for client in self._open)
            return watching == len(self._watchers) and len(self._open) - watching > len(self.users)

        await wait_until(there, timeout, what="the clients to be connected", every=0.1)

    @asynccontextmanager
    async def broken(self, on: str, how: str) -> AsyncIterator[None]:
        """Note that something is broken meanwhile; it must work again at the end."""
        if how in ("emptied", "failed over"):
            self._catch_up()  # as nobody can read it afterwards
        self.recorder.note("fault", on=on, how=how)
        yield
        self.recorder.note("mended", on=on)

    async def recover(self, timeout: float = 15.0) -> None:
        """Wait until every instance says for certain of users who never were, in every partition, that they are off."""
        nobodies = [f"nobody-{number}" for number in range(100)]

        async def certain() -> bool:
            answers = [
                await one.post("/api/presence/batch", "nobody", json=nobodies, timeout=2)
                for one in self.instances.values()
            ]
            return all(answer.status == 200 for answer in answers)

        await wait_until(certain, timeout, what="every instance to be sure", every=0.1)
        self.recorder.note("recovered")

    async def finish(self) -> History:
        """Let all come to rest, and note what the stores say then; return the history."""
        self._over.set()
        began = time.monotonic()
        least = LEASE + DELIVERY + 0.2  # so that the checker can tell who is gone
        with contextlib.suppress(AssertionError):  # the checker says what is wrong
            await wait_until(lambda: time.monotonic() - began > least and self._at_rest(), SETTLED, every=0.2)
        self.recorder.note("end")
        for user in sorted(self._online()):
            self.recorder.note("store", user=user, online=True)
        for name, server in self.instances.items():
            answer = await server.post("/api/presence/batch", "nobody", json=self.users + self._watchers)
            for user, entry in answer.json().items() if answer.status == 200 else ():
                self.recorder.note("rest", user=user, online=entry["isOnline"], instance=name)
        for name, rows in (await self._rows()).items():
            for user, (online, version) in rows.items():
                self.recorder.note("row", user=user, online=online, version=version, instance=name)
        for name, changes in (await self._kept()).items():
            for user, version, online in changes:
                self.recorder.note("kept", user=user, online=online, version=version, instance=name)
        if self.kafka is not None:
            await self._log()
        self._done.set()
        await asyncio.wait(self._tasks, timeout=10)
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
        return self.recorder.history

    async def stop(self) -> None:
        """Stop the instances, which must go well."""
        for proxy in self._proxies.values():
            proxy.close()
        await asyncio.gather(*(server.finish() for server in self.instances.values()))

    def close(self) -> None:
        """Drop all connections; kill what still lives."""
        for task in self._tasks:
            task.cancel()
        for client in [*self._open, *self._cut]:
            if client.transport is not None:
                client.transport.abort()
        for proxy in self._proxies.values():
            proxy.close()
        for server in self.instances.values():
            server.close()

    async def pause(self, seconds: float) -> None:
        """Wait, until nobody comes or goes any more at the longest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    # Clients

    async def _come(self, user: str, among: list[str], *, proxied: bool = False) -> Client | None:
        name = among[0]
        server = self.instances[name]
        self._number += 1
        port = self._proxies[name].port if proxied and self._proxies else server.port
        session = f"{user}#{self._number}"
        client = await Client.connect(self.recorder, session, user, name, port, server.token(user), timeout=3.0)
        if client is not None:
            self._open.add(client)
        return client

    async def _life(self, user: str, number: int) -> None:
        """One of the user's sessions, which comes and goes as long as the run goes on."""
        dice = random.Random(f"{self.seed} {user} {number}")
        await self.pause(dice.uniform(0, 2) if dice.random() < 0.7 else dice.uniform(0, 2 * AWAY))
        while not self._over.is_set():
            among = dice.sample(sorted(self.instances), len(self.instances))
            client = await self._come(user, among, proxied=bool(self._proxies) and dice.random() < 0.3)
            if client is None:
                await self.pause(dice.uniform(0.2, 0.6))
                continue
            await self._stay(client, dice)
            self._open.discard(client)
            # Who was lost comes back at once, mostly.
            away = dice.uniform(0, 0.3) if client.connected and dice.random() < 0.6 else dice.expovariate(1 / AWAY)
            await self.pause(away)

    async def _stay(self, client: Client, dice: random.Random) -> None:
        """Beat until it is time to go, or the connection is lost."""
        until = time.monotonic() + dice.expovariate(1 / STAY)
        patience = dice.choice((1.5 * LEASE, 3600.0))
        while not client.closed.is_set() and not self._done.is_set():
            client.beat(receipt=dice.random() < 0.3)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT * dice.uniform(0.8, 1.1)):
                    await client.closed.wait()
            if client.closed.is_set() or self._over.is_set():
                continue
            if client.owed and time.monotonic() - client.answered > patience:
                return client.die()
            if time.monotonic() > until:
                until += dice.expovariate(1 / STAY)
                way = dice.choice(("leave", "close", "die", "die", "off", "silent"))
                if way == "off":
                    client.sign(on=False)
                    await self.pause(dice.uniform(0.1, 3))
                    client.sign(on=True)
                elif way == "silent":
                    await self.pause(dice.uniform(1, 2 * LEASE))
                else:
                    return getattr(client, way)()  # type: ignore[no-any-return]

    async def _watch(self, user: str, number: int) -> None:
        """A watcher, who comes back whenever the connection is lost."""
        dice = random.Random(f"{self.seed} {user}")
        watched = dice.sample(self.users, min(WATCHED, len(self.users)))
        names = sorted(self.instances)
        among = names[number % len(names) :] + names[: number % len(names)]
        await self.pause(dice.uniform(0, 2))
        while not self._done.is_set():
            client = await self._come(user, among)
            if client is None:
                among = dice.sample(names, len(names))
                await asyncio.sleep(dice.uniform(0.1, 0.5))
                continue
            try:
                await client.watch(watched)
            except TimeoutError:
                client.die()  # and the checker says what was owed
            done = asyncio.create_task(self._done.wait())
            closed = asyncio.create_task(client.closed.wait())
            await asyncio.wait({done, closed}, return_when=asyncio.FIRST_COMPLETED)
            done.cancel()
            closed.cancel()
            self._open.discard(client)
            if not client.closed.is_set():
                client.die()
            among = dice.sample(names, len(names))
            await asyncio.sleep(dice.uniform(0, 0.3) if not self._done.is_set() else 0)

    async def _poll(self) -> None:
        """Ask one instance after the other over REST, as long as the run goes on; none that has not answered yet."""
        dice = random.Random(f"{self.seed} REST")
        tokens = {name: server.token("nobody") for name, server in self.instances.items()}
        asking: dict[str, asyncio.Task[None]] = {}

        async def ask(name: str, users: list[str]) -> None:
            url = f"{self.instances[name].http}/api/presence/batch"
            asked = self.recorder.now
            with contextlib.suppress(OSError):  # it is not there, or frozen
                answer = await request("POST", url, token=tokens[name], json=users, timeout=2.0)
                seconds = round(self.recorder.now - asked, 4) + 0.0001  # no less than it was
                if answer.status == 503:
                    self.recorder.note("polled", instance=name, how="unknown", seconds=seconds)
                    return
                assert answer.status == 200, answer
                for user, entry in answer.json().items():
                    self.recorder.note("polled", instance=name, user=user, online=entry["isOnline"], seconds=seconds)

        names = itertools.cycle(self.instances)
        while not self._over.is_set():
            name = next(names)
            if name not in asking or asking[name].done():
                if name in asking:
                    asking[name].result()
                asking[name] = asyncio.create_task(ask(name, dice.sample(self.users, min(POLLED, len(self.users)))))
            await self.pause(POLL)
        await asyncio.gather(*asking.values())

    def cut(self) -> int:
        """Cut the network of the connections that go through it; return how many there were."""
        for proxy in self._proxies.values():
            proxy.cut()
        ports = {proxy.port for proxy in self._proxies.values()}
        count = 0
        for client in list(self._open):
            assert client.transport is not None
            if client.transport.get_extra_info("peername")[1] in ports:
                client.cut()
                self._cut.append(client)
                count += 1
        return count

    # What is true

    async def _follow(self) -> None:
        """Note every change in the store's stream as it comes, and every amnesty; and when we are stalled ourselves."""
        client: Any = None
        epochs: dict[str, str] = {}
        looked = 0.0
        try:
            while not self._done.is_set():
                try:
                    client = client or self.store.asyncio_redis()
                    look = time.monotonic() - looked > 0.3
                    looked = time.monotonic() if look else looked
                    for base in self._bases:
                        began = self.recorder.now
                        self._changes(base, began, await client.xrange(f"{base}changes", f"({self._last[base]}"))
                        amnesty: Any = await client.hgetall(f"{base}amnesty") if look else None
                        if amnesty and amnesty["epoch"] != epochs.get(base):
                            epochs[base] = epoch = amnesty["epoch"]
                            at = int(epoch) / 1e6 - self.setup.unix
                            seconds = int(amnesty["till"]) / 1000 - int(epoch) / 1e6
                            self.recorder.history.note(at, "amnesty", seconds=round(seconds, 3))
                except (redis.RedisError, OSError):  # it is away, and may come back elsewhere
                    if client is not None:
                        await client.aclose()
                        client = None
                before = self.recorder.now
                await asyncio.sleep(0.05)
                if (late := self.recorder.now - before - 0.05) > STALLED:
                    self.recorder.history.note(before, "stalled", seconds=round(late, 3))
        finally:
            if client is not None:
                await client.aclose()

    def _catch_up(self) -> None:
        for base in self._bases:
            began = self.recorder.now
            self._changes(base, began, self.store.redis().xrange(f"{base}changes", f"({self._last[base]}"))

    def _online(self) -> set[str]:
        return {user for base in self._bases for user in self.store.redis().smembers(f"{base}online")}

    def _changes(self, base: str, began: float, entries: Any) -> None:
        unseen = round(self.recorder.now - self._read[base], 4)
        for entry, fields in entries:
            ms, us = entry.split("-")
            version = int(ms) * 1000 + int(us)
            if version > self._version[base]:  # both read
                online = fields["online"] == "1"
                told = {"user": fields["user"], "online": online, "version": version, "why": fields["reason"]}
                self.recorder.note("change", seconds=unseen, **told)
                self._last[base], self._version[base] = entry, version
        self._read[base] = max(self._read[base], began)

    def _at_rest(self) -> bool:
        online = self._online()
        watchers = [client for client in self._open if client.user.startswith("w")]
        return (
            {client.user for client in self._open if client.user.startswith("u")} == online
            and len(watchers) == len(self._watchers)
            and all(told is (user in online) for client in watchers for user, told in client.told.items())
        )

    async def _rows(self) -> dict[str, dict[str, tuple[bool, int]]]:
        """The rows of the history stores, once they have the last change of everybody, or have had the time to."""
        last: dict[str, int] = {}
        for event in self.recorder.history.events:
            if event.what == "change":
                last[event.user] = max(last.get(event.user, 0), event.version)
        found: dict[str, dict[str, tuple[bool, int]]] = {}

        async def complete() -> bool:
            found.update(await asyncio.to_thread(self._read_rows))
            return all(
                rows.get(user, (False, -1))[1] >= version for rows in found.values() for user, version in last.items()
            )

        with contextlib.suppress(AssertionError):
            await wait_until(complete, 8, every=0.3)
        return found

    def _read_rows(self) -> dict[str, dict[str, tuple[bool, int]]]:
        if self.cassandra is not None:
            cql = "SELECT user_id, is_online, WRITETIME(is_online) FROM user_presence"
            found = {"cassandra": cassandra_rows(self.cassandra.url, self.settings["cassandra_keyspace"], cql)}
        else:
            found = self._sqlite_rows("SELECT user_id, is_online, version FROM user_presence")
        return {name: {user: (bool(online), version) for user, online, version in rows} for name, rows in found.items()}

    async def _kept(self) -> dict[str, list[tuple[str, int, bool]]]:
        """All changes that the history stores keep; call it after `_rows`: what is written last is there then."""
        query = "SELECT user_id, version, is_online FROM presence_history"
        if self.cassandra is not None:
            await asyncio.sleep(0.5)  # a change is written to both tables at once, in no order
            keyspace = self.settings["cassandra_keyspace"]
            found = {"cassandra": await asyncio.to_thread(cassandra_rows, self.cassandra.url, keyspace, query)}
        else:
            found = self._sqlite_rows(query)
        return {name: [(user, version, bool(online)) for user, version, online in rows] for name, rows in found.items()}

    def _sqlite_rows(self, query: str) -> dict[str, list[Any]]:
        found = {}
        for name, server in self.instances.items():
            with closing(sqlite3.connect(f"file:{server.data_dir}/history.db?mode=ro", uri=True, timeout=5)) as db:
                found[name] = db.execute(query).fetchall()
        return found

    async def _log(self) -> None:
        """Note Kafka's log, once it has every change, or has had the time to get it."""
        assert self.kafka is not None
        wanted = {(e.user, e.version) for e in self.recorder.history.events if e.what == "change"}
        records: list[tuple[str, bool, int]] = []

        async def complete() -> bool:
            records[:] = await kafka_log(self.kafka.url, self.settings["kafka_topic"])  # type: ignore[union-attr]
            return wanted <= {(user, version) for user, _, version in records}

        with contextlib.suppress(AssertionError):
            await wait_until(complete, 8, every=0.5)
        for user, online, version in records:
            self.recorder.note("log", user=user, online=online, version=version)


async def _whole(server: ServerProcess) -> bool:
    """The instance reaches all it needs; it is ready, and its clients may come, as soon as it reaches the store."""
    answer = await server.get("/health/ready", timeout=2)
    return all(one["state"] == "up" for one in answer.json()["dependencies"].values())


def cassandra_rows(contact_point: str, keyspace: str, cql: str) -> list[Any]:
    """All rows that the statement finds."""
    from cassandra.cluster import Cluster

    host, _, port = contact_point.partition(",")[0].rpartition(":")
    with Cluster([host], port=int(port), connect_timeout=10) as cluster, cluster.connect(keyspace) as session:
        return list(session.execute(cql, timeout=20))


async def kafka_log(bootstrap: str, topic: str) -> list[tuple[str, bool, int]]:
    """The whole log of the topic, partition after partition: user, online, version."""
    import json

    from aiokafka import AIOKafkaConsumer, TopicPartition

    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=None, auto_offset_reset="earliest")
    records = []
    async with asyncio.timeout(30):
        await consumer.start()
        try:
            numbers = await consumer._client.fetch_all_metadata()
            partitions = [TopicPartition(topic, number) for number in numbers.partitions_for_topic(topic) or ()]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            for partition in partitions:
                consumer.pause(*(other for other in partitions if other != partition))
                consumer.resume(partition)
                while await consumer.position(partition) < ends[partition]:
                    for record in (await consumer.getmany(partition, timeout_ms=1000)).get(partition, ()):
                        value = json.loads(record.value)
                        assert record.key.decode() == value["userId"], record
                        records.append((value["userId"], value["online"], value["version"]))
        finally:
            await consumer.stop()
    return records


class Proxy:
    """A network between clients and a port of this machine, which can be cut without anybody being told."""

    def __init__(self, to: int) -> None:
        self.port = free_port()
        self._to = to
        self._server: asyncio.Server | None = None
        self._pipes: set[_Pipe] = set()

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Pipe(self._pipes, self._to), "127.0.0.1", self.port
        )

    def cut(self) -> None:
        """Forward nothing any more on the connections that there are, and no end either."""
        for pipe in self._pipes:
            pipe.cut()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for pipe in list(self._pipes):
            pipe.end()


class _Pipe(asyncio.Protocol):
    """One side of a forwarded connection; with a port it opens the other."""

    def __init__(self, pipes: set[_Pipe], to: int = 0, other: _Pipe | None = None) -> None:
        self._pipes, self._to, self.other = pipes, to, other
        self.transport: asyncio.Transport | None = None
        self.is_cut = False
        self._early: list[bytes] = []
        self._opening: asyncio.Task[Any] | None = None
        pipes.add(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._to:
            self.other = other = _Pipe(self._pipes, other=self)
            loop = asyncio.get_running_loop()
            self._opening = loop.create_task(self._open(other))
        elif self.other is not None:
            for data in self.other._early:
                transport.write(data)

    async def _open(self, other: _Pipe) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self._to)
        except OSError:
            self.end()

    def data_received(self, data: bytes) -> None:
        if self.is_cut or self.other is None:
            return
        if self.other.transport is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._pipes.discard(self)
        if not self.is_cut and self.other is not None and self.other.transport is not None:
            self.other.transport.abort() if error else self.other.transport.close()

    def eof_received(self) -> bool:
        return self.is_cut

    def cut(self) -> None:
        self.is_cut = True

    def end(self) -> None:
        self._pipes.discard(self)
        if self.transport is not None:
            self.transport.abort()
