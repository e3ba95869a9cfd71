"""The presence store in Redis: keys, scripts, and the stream of changes (DESIGN §3)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from asyncio import Future
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import cache
from importlib import resources
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, NoScriptError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from presence.adapters.lane import Command, Kind, Lane
from presence.adapters.patience import Patience
from presence.adapters.redis_servers import Node, Servers
from presence.core.model import Change, Reason, Session, Status
from presence.ports import Reading, StoreUnavailable, Sweep

T = TypeVar("T")

log = logging.getLogger(__name__)

PAGE = 500  # users, sessions or changes to a call
PIPED = 100  # commands to a call: to write them and to read their answers takes the loop some ms
SWEEP_LIMIT = 500  # sessions ended by one call: 50,000 at one go would block Redis for 0.6 s
SWEEP_ENOUGH_MS = 50  # another instance's sweep within this time is as good as ours
FOLLOW_BLOCK_MS = 500  # a reader looks this often whether the store has been lost meanwhile
LISTEN_SECONDS = 1.0  # of silence after which a listener asks whether the server is there
LOOK_SECONDS = 1.0  # between two looks where the partitions are; a server that fails is looked for at once


def tags(partitions: int) -> list[str]:
    """Return one hash tag a partition whose slots lie evenly over a cluster; none for a single partition."""
    if partitions == 1:
        return [""]
    width = REDIS_CLUSTER_HASH_SLOTS / partitions
    found: dict[int, str] = {}
    candidate = 0
    while len(found) < partitions:
        found.setdefault(int(key_slot(str(candidate).encode()) // width), f"{{{candidate}}}:")
        candidate += 1
    return [found[index] for index in range(partitions)]


class Keys:
    """The names of one partition's keys, for Python; `common.lua` makes the same from `online`."""

    def __init__(self, tag: str, partition: int) -> None:
        self.partition = partition
        self.base = f"{tag}presence:"
        self.online = f"{self.base}online"
        self.deadlines = f"{self.base}deadlines"
        self.changes = f"{self.base}changes"

    def user(self, user: str, name: str) -> str:
        return f"{self.base}user:{user}:{name}"


@cache
def _script(name: str) -> str:
    folder = resources.files("presence.adapters") / "redis_lua"
    return "\n".join((folder / f"{part}.lua").read_text() for part in ("common", name))


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(_script(name).encode(), usedforsecurity=False).hexdigest()


def _entry_id(version: int) -> str:
    return f"{version // 1000}-{version % 1000}"


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _change(entry: tuple[str, Mapping[str, str]]) -> Change:
    entry_id, fields = entry
    ms, us = entry_id.split("-")
    return Change(
        fields["user"],
        fields["online"] == "1",
        int(ms) * 1000 + int(us),
        int(fields["lastActive"]) if fields["lastActive"] else None,
        fields["device"],
        Reason(fields["reason"]),
    )


class _Moved(StoreUnavailable):
    """Another server has the partition by now; nothing was done."""


class RedisStore:
    """See `ports.PresenceStore`. Times are in s."""

    def __init__(
        self,
        url: str,
        *,
        instance: str,
        partitions: int = 1,
        lease: float = 60.0,
        amnesty: float = 5.0,
        amnesty_at_start: float | None = None,
        watch_ttl: float = 600.0,
        timeout: float = 2.0,
    ) -> None:
        """Connect when first asked.

        Args:
            url: of Redis or Valkey, see `core.redis_url`.
            instance: name of this process.
            lease: the longest lease of a session.
            amnesty: time after a loss of the store in which nobody goes offline.
            amnesty_at_start: the same when this instance finds it at its start (0 for a private store).
            watch_ttl: how long the record of what a session watches outlives its last renewal.
            timeout: of one question.
        """
        self.partitions = partitions
        self.floor = 0  # the highest version this instance has seen
        self._instance = instance
        self._lease = lease
        self._amnesty = amnesty
        self._amnesty_at_start = amnesty if amnesty_at_start is None else amnesty_at_start
        self._watch_ttl = round(watch_ttl)
        self._timeout = timeout
        self._keys = [Keys(tag, partition) for partition, tag in enumerate(tags(partitions))]
        self._lanes = [Lane(self._transitions(keys)) for keys in self._keys]
        self._epochs: dict[int, int] = {}  # partition → its last amnesty
        self._read_in: dict[tuple[str, int], str] = {}  # cursor and partition → epoch of the last backlog
        self._expired = asyncio.Event()
        names = [keys.online for keys in self._keys]
        self._servers = Servers(url, names, connections=32 + partitions, timeout=timeout)
        self.health = self._servers.health

    async def run(self) -> None:
        """Run the lanes and the listener to expired keys, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for lane in self._lanes:
                tasks.create_task(lane.run())
            tasks.create_task(self._listen())

    async def flushed(self) -> None:
        """Wait until all commands are done, within the time limit."""
        try:
            async with asyncio.timeout(self._timeout):
                for lane in self._lanes:
                    await lane.drained()
        except TimeoutError:
            log.warning("store away at the stop: %d sessions are left to their leases", sum(map(len, self._lanes)))

    async def close(self) -> None:
        """Close the connections."""
        await self._servers.close()

    async def check(self) -> Sequence[str]:
        """Look at the servers' settings; return what is wrong, a line with the remedy each.

        Raises:
            StoreUnavailable: they cannot be asked.
        """
        await asyncio.gather(*(self._pipe(keys, ("EXISTS", keys.online)) for keys in self._keys))  # finds them
        try:
            async with asyncio.timeout(self._timeout):
                return await self._servers.check()
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(str(error) or "no answer in time") from error

    def partition_of(self, user: str) -> int:
        return zlib.crc32(user.encode()) % self.partitions

    # Asking Redis

    @asynccontextmanager
    async def _asking(self, keys: Keys, *, blocks: float = 0.0) -> AsyncIterator[Node]:
        """Give the server that has the partition; what it does not answer in time is unavailable.

        Args:
            blocks: for how long it may wait for changes before it answers, s; not 0: ask by `Node.blocking`.
        """
        node = self._servers.nodes[keys.partition]
        limit = self._timeout + blocks
        now = asyncio.get_running_loop().time
        waited = False
        try:
            async with Patience(limit):
                node = node or await self._servers.found(keys.partition)
                waited, began = True, now()
                async with nullcontext() if blocks else node.turns:
                    waited = now() - began > limit / 2
                    yield node
        except AskError as error:
            _ = self._servers.look()
            raise _Moved(f"partition {keys.partition} moves") from error
        except (RedisError, OSError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            # Who waited for other questions most of that time cannot tell a server that is away from a busy one.
            if not (waited and isinstance(error, TimeoutError)):
                self._servers.note(node, reason)
            raise StoreUnavailable(reason) from error
        if node.away is not None:
            self._servers.note(node, None)

    async def _ask(self, name: str, keys: Keys, *args: object) -> Any:
        try:
            return await self._run_script(name, keys, args)
        except _Moved:
            await self._servers.look()
            return await self._run_script(name, keys, args)

    async def _run_script(self, name: str, keys: Keys, args: Sequence[object]) -> Any:
        async with self._asking(keys) as node:
            # The connection first: if it is a new one, the node has seen which server it is.
            pool = node.redis.connection_pool
            connection = await pool.get_connection()
            try:
                more = (1, keys.online, self.floor, *args, node.run_id)
                await connection.send_command("EVALSHA", _sha(name), *more)
                try:
                    return await connection.read_response()
                except NoScriptError:  # a new server
                    await connection.send_command("EVAL", _script(name), *more)
                    return await connection.read_response()
            finally:
                await pool.release(connection)

    async def _pipe(self, keys: Keys, *commands: tuple[Any, ...]) -> list[Any]:
        """Run commands on keys of the partition in one round trip; return their answers."""
        if not commands:
            return []
        async with self._asking(keys) as node:
            pipe = node.redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = await pipe.execute()
            return answers

    def _of(self, user: str) -> Keys:
        return self._keys[self.partition_of(user)]

    def _by_partition(self, items: Iterable[T], user: Callable[[T], str] = str) -> Iterator[tuple[Keys, list[T]]]:
        """The items, which are users or each belong to one, by their users' partitions."""
        groups: dict[int, list[T]] = {}
        if self.partitions == 1:
            groups[0] = list(items)
        else:
            for item in items:
                groups.setdefault(self.partition_of(user(item)), []).append(item)
        for partition, members in groups.items():
            if members:
                yield self._keys[partition], members

    # Transitions

    def _transitions(self, keys: Keys) -> Any:
        async def call(kind: Kind, commands: Sequence[Command]) -> Sequence[int]:
            now = asyncio.get_running_loop().time()
            args: list[object] = []
            for command in commands:
                session = command.session
                idle = -1 if command.active_at is None else max(0, round((now - command.active_at) * 1000))
                # A client that waits for its connect gets a full lease; all else counts from when it came.
                age = now - session.last_beat if command.give_up_at is None else 0.0
                lease = round((self._lease - age) * 1000)
                match kind:
                    case Kind.CONNECT:
                        limits = (command.limit, command.without_lease)
                        args += (session.user, session.id, session.device, lease, idle, command.reason, *limits)
                    case Kind.REFRESH:
                        args += (session.user, session.id, session.device, lease, idle)
                    case Kind.SHORTEN:
                        args += (session.user, session.id, command.reason, idle, max(1, round(command.rest * 1000)))
                    case Kind.END:
                        args += (session.user, session.id, command.reason, idle)
            answers: Sequence[int] = await self._ask(kind.name.lower(), keys, *args)
            self.floor = max(self.floor, *answers)
            return answers

        return call

    def _add(self, kind: Kind, session: Session, reason: Reason, active_at: float | None, **more: Any) -> Future[None]:
        return self._lanes[self.partition_of(session.user)].add(Command(kind, session, reason, active_at, **more))

    async def connect(self, session: Session, *, limit: int, without_lease: int) -> None:
        give_up_at = asyncio.get_running_loop().time() + self._timeout
        await self._add(
            Kind.CONNECT,
            session,
            Reason.CONNECTED,
            session.last_beat,
            limit=limit,
            without_lease=without_lease,
            give_up_at=give_up_at,
        )

    def restore(self, session: Session) -> Future[None]:
        return self._add(Kind.CONNECT, session, Reason.RESTORED, session.last_beat)

    def refresh(self, session: Session, *, active: bool = True, urgent: bool = False) -> Future[None]:
        active_at = session.last_beat if active else None
        return self._add(Kind.REFRESH, session, Reason.CONNECTED, active_at, urgent=urgent)

    def end(self, session: Session, reason: Reason, active_at: float) -> Future[None]:
        return self._add(Kind.END, session, reason, active_at)

    def shorten(self, session: Session, reason: Reason, active_at: float, rest: float) -> Future[None]:
        return self._add(Kind.SHORTEN, session, reason, active_at, rest=rest)

    # Reading

    async def read(self, users: Collection[str]) -> Reading:
        async def part(keys: Keys, members: list[str]) -> tuple[list[str], int, list[str]]:
            settled, values = await self._ask("read", keys, " ".join(members))
            return members, settled, values.split(" ")

        statuses: dict[str, Status] = {}
        unsettled: set[str] = set()
        groups = list(self._by_partition(users))
        parts = [await part(*groups[0])] if len(groups) == 1 else await asyncio.gather(*(part(*one) for one in groups))
        for members, settled, values in parts:
            for user, online, version, active in zip(members, values[::3], values[1::3], values[2::3], strict=True):
                statuses[user] = Status(user, online == "1", int(version), int(active) if active else None)
            if not settled:
                unsettled.update(members)
        return Reading(statuses, frozenset(unsettled))

    async def online_users(self) -> AsyncIterator[Sequence[Change]]:
        for keys in self._keys:
            async for members in self._pages(keys, "SSCAN", keys.online):
                # One may have left since.
                yield [change for change in await self._last_changes(keys, members) if change.online]

    async def _last_changes(self, keys: Keys, users: Sequence[str]) -> list[Change]:
        """Return each user's last change, with version 0 where none is known."""
        commands: list[tuple[str, ...]] = []
        for user in users:
            commands.append(("HMGET", keys.user(user, "change"), "version", "online", "device", "reason"))
            commands.append(("GET", keys.user(user, "last_active")))
        found = await self._pipe(keys, *commands)
        return [
            Change(
                user,
                online == "1",
                int(version or 0),
                int(active) if active else None,
                device or "web",
                Reason(reason or Reason.RESTORED),
            )
            for user, (version, online, device, reason), active in zip(users, found[::2], found[1::2], strict=True)
        ]

    async def _pages(self, keys: Keys, command: str, *args: str) -> AsyncIterator[list[Any]]:
        """Iterate over the pages of a SCAN command; SCAN itself over all of its keys. Some come twice."""
        cursor, run_id = "0", ""
        before = args if command != "SCAN" else ()
        after = args if command == "SCAN" else ()
        while True:
            async with self._asking(keys) as node:
                found, page = await node.redis.execute_command(command, *before, cursor, *after, "COUNT", PAGE)
            if cursor != "0" and node.run_id != run_id:
                cursor = "0"  # it was another server's, and means nothing to this one: begin anew
                continue
            cursor, run_id = found, node.run_id
            yield page
            if int(cursor) == 0:
                return

    async def _scan(self, pattern: str) -> AsyncIterator[list[str]]:
        """Iterate over the pages of all keys like the pattern, on every server once."""
        scanned: set[Node] = set()
        for keys in self._keys:
            await self._pipe(keys, ("EXISTS", keys.online))  # finds the server
            node = self._servers.nodes[keys.partition]
            if node and node not in scanned:
                scanned.add(node)
                async for page in self._pages(keys, "SCAN", "MATCH", pattern):
                    yield page

    async def online_count(self) -> int:
        counts = await asyncio.gather(*(self._pipe(keys, ("SCARD", keys.online)) for keys in self._keys))
        return sum(count for (count,) in counts)

    async def sessions_of(self, user: str) -> Mapping[str, str]:
        keys = self._of(user)
        (sessions,) = await self._pipe(keys, ("ZRANGE", keys.user(user, "sessions"), 0, -1))
        if not sessions:
            return {}
        (devices,) = await self._pipe(keys, ("MGET", *(keys.user(user, f"online:{session}") for session in sessions)))
        return {session: device or "web" for session, device in zip(sessions, devices, strict=True)}

    # Watching: for whoever looks at `presence:user:{userId}:watchers`; our own delivery never does (DESIGN §4)

    async def record_watches(self, session: Session, *, anew: bool = False) -> None:
        mine = self._of(session.user)
        name, sessions = (mine.user(session.user, one) for one in (f"watching:{session.id}", "watching"))

        def adding(users: Collection[str]) -> list[tuple[Any, ...]]:
            both = ((name, users), (sessions, (session.id,)))
            return [one for key, values in both for one in (("SADD", key, *values), ("EXPIRE", key, self._watch_ttl))]

        watched = set() if session.closed else set(session.watched)
        few = 0 < len(watched) <= PIPED  # then all of them are as dear as those that are missing, and spare a trip
        # Here first, or the cleanup takes for left over what is added to the watchers.
        found, *_ = await self._pipe(mine, ("SMEMBERS", name), *(adding(watched) if few else ()))
        recorded = set(found)
        if begun := watched if anew else watched - recorded:
            if not few:
                await self._pipe(mine, *adding(begun))
            await self._each_watched("SADD", session.user, begun)
        if ended := recorded - watched:
            taken = [("SREM", name, *ended), *([] if watched else [("SREM", sessions, session.id)])]
            await self._pipe(mine, *taken)
            await self._leave(session.user, ended)

    async def _leave(self, watcher: str, users: Collection[str]) -> int:
        """Take the watcher out of the watchers of those whom none of its sessions watches. Returns of how many."""
        left = set(users) - await self._watched_by(watcher, users)
        if not left:
            return 0
        try:
            await self._each_watched("SREM", watcher, left)
        finally:
            # A session may watch them since just now: then put them back.
            again = await self._watched_by(watcher, left)
            if again:
                await self._each_watched("SADD", watcher, again)
        return len(left) - len(again)

    async def _each_watched(self, command: str, watcher: str, users: Collection[str]) -> None:
        away: StoreUnavailable | None = None
        for keys, members in self._by_partition(users):
            try:
                for some in _pieces(members, PIPED):
                    await self._pipe(keys, *((command, keys.user(user, "watchers"), watcher) for user in some))
            except StoreUnavailable as error:
                away = error  # the other partitions do not wait for it
        if away:
            raise away

    async def _watched_by(self, watcher: str, users: Collection[str]) -> set[str]:
        """Those of ``users`` whom a session of the watcher watches. Forgets sessions of which nothing is recorded."""
        keys, asked = self._of(watcher), list(users)
        watching = keys.user(watcher, "watching")
        (found,) = await self._pipe(keys, ("SMEMBERS", watching))
        sessions = list(found)
        names = [keys.user(watcher, f"watching:{one}") for one in sessions]
        asks = (one for name in names for one in (("EXISTS", name), ("SMISMEMBER", name, *asked)))
        answers = await self._pipe(keys, *asks)
        exist, watched = answers[::2], answers[1::2]
        if gone := [session for session, there in zip(sessions, exist, strict=True) if not there]:
            look = (("EXISTS", keys.user(watcher, f"watching:{session}")) for session in gone)
            _, *exists = await self._pipe(keys, ("SREM", watching, *gone), *look)
            # One may have begun to watch since: then put it back.
            if again := [session for session, there in zip(gone, exists, strict=True) if there]:
                await self._pipe(keys, ("SADD", watching, *again))
        return {user for those in watched for user in compress(asked, those)}

    async def renew_watches(self, sessions: Iterable[Session]) -> AsyncIterator[Sequence[Session]]:
        away: StoreUnavailable | None = None
        watching = (session for session in sessions if session.watched)
        for keys, group in self._by_partition(watching, attrgetter("user")):
            try:
                for page in _pieces(group, PIPED):
                    commands: list[tuple[Any, ...]] = []
                    for session in page:
                        name = keys.user(session.user, f"watching:{session.id}")
                        both = [("EXPIRE", key, self._watch_ttl) for key in (name, keys.user(session.user, "watching"))]
                        commands += [*both, ("SCARD", name)]
                    found = iter(await self._pipe(keys, *commands))
                    yield [
                        session
                        for session, kept, listed, count in zip(page, found, found, found, strict=True)
                        if not (kept and listed and count == len(session.watched))
                    ]
            except StoreUnavailable as error:
                away = error
        if away:
            raise away

    async def record_watchers(self, watchers: Mapping[str, Collection[str]]) -> None:
        for keys, some in self._piped(watchers):
            await self._pipe(keys, *(("SADD", keys.user(user, "watchers"), *watchers[user]) for user in some))

    # The sweep, and what follows a loss of the store

    async def sweep(self, partition: int) -> Sweep:
        keys = self._keys[partition]
        amnesty = self._amnesty if partition in self._epochs else self._amnesty_at_start
        args = (round(self._lease * 1000), round(amnesty * 1000), SWEEP_LIMIT, SWEEP_ENOUGH_MS)
        epoch, left, more, version = await self._run_script("sweep", keys, args)
        self.floor = max(self.floor, version)
        self._epochs[partition] = epoch
        return Sweep(epoch, left / 1000, bool(more))

    async def overdue(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._expired.wait()
        except TimeoutError:
            pass
        self._expired.clear()

    async def _listen(self) -> None:
        """Listen on every server that holds partitions, and follow these when they move."""
        listening: dict[Node, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                nodes = self._servers.all()
                for node in listening.keys() - set(nodes):
                    listening.pop(node).cancel()
                for node in nodes:
                    if node not in listening:
                        listening[node] = tasks.create_task(self._listen_to(node))
                await self._servers.look()
                await asyncio.sleep(LOOK_SECONDS if all(self._servers.nodes) else LOOK_SECONDS / 10)

    async def _listen_to(self, node: Node) -> None:
        """Wake the sweep when a session's key expires (guide, RedisKeyExpirationListener)."""
        loop = asyncio.get_running_loop()
        subscribed = False
        while True:
            try:
                async with node.blocking.pubsub() as events:
                    async with asyncio.timeout(self._timeout):
                        await events.psubscribe("__keyevent@*__:expired")
                    asked_at: float | None = None  # a frozen server is noticed by nothing else
                    while True:
                        event = await events.get_message(timeout=LISTEN_SECONDS)
                        if event:
                            asked_at = None
                            # Of what expired between two subscriptions nothing was heard.
                            again = subscribed and event["type"] == "psubscribe"
                            subscribed = True
                            if again or "presence:user:" in str(event["data"]):
                                self._expired.set()
                        elif asked_at is None:
                            asked_at = loop.time()
                            async with asyncio.timeout(self._timeout):
                                await events.ping()
                        elif loop.time() - asked_at > self._timeout:
                            raise RedisConnectionError("no answer in time")
            except (RedisError, OSError) as error:
                log.debug("listening to expired keys of %s: %s", node.name, error)
                await asyncio.sleep(LISTEN_SECONDS)

    async def settle(self, statuses: Iterable[Status]) -> Sequence[Change]:
        distinct = {status.user: status for status in statuses}.values()
        otherwise: list[Change] = []
        for keys, group in self._by_partition(distinct, attrgetter("user")):
            for page in _pieces(group, PAGE):
                args = [
                    arg
                    for said in page
                    for arg in (
                        said.user,
                        int(said.online),
                        said.version,
                        "" if said.last_active is None else said.last_active,
                    )
                ]
                found: Sequence[Any] = await self._ask("settle", keys, *args)
                self.floor = max(self.floor, *found[::5])
                columns = (found[column::5] for column in range(5))
                otherwise += (
                    Change(said.user, online == "1", version, int(active) if active else None, device, Reason(reason))
                    for said, version, online, device, active, reason in zip(page, *columns, strict=True)
                    if version
                )
        return otherwise

    async def repair(self) -> Mapping[str, int]:
        count: Counter[str] = Counter(offline=0, online=0, deadlines=0, orphans=0)
        for keys in self._keys:
            async for page in self._pages(keys, "SSCAN", keys.online):
                await self._repair_users(count, ((user, "") for user in page))
            async for page in self._pages(keys, "ZSCAN", keys.deadlines):
                members = (member.partition(":") for member, _ in page)
                await self._repair_users(count, ((user, session) for user, _, session in members))
        async for page in self._scan("*presence:user:*:sessions"):
            await self._repair_users(count, ((_user_of(key), "") for key in page))
        count["watchers"] = await self._repair_watchers()
        return count

    async def _repair_users(self, count: Counter[str], found: Iterable[tuple[str, str]]) -> None:
        for keys, group in self._by_partition(found, itemgetter(0)):
            repaired = await self._ask("repair", keys, *chain.from_iterable(group))
            count.update(dict(zip(("offline", "online", "deadlines", "orphans"), repaired, strict=True)))

    async def _repair_watchers(self) -> int:
        """Take out of the watchers of a user who does not watch (any more). Returns how many."""
        count = 0
        async for page in self._scan("*presence:user:*:watchers"):
            recorded: dict[str, list[str]] = {}  # watcher → among whose watchers it is
            async for user, watchers in self._watchers_of(map(_user_of, page)):
                for watcher in watchers:
                    recorded.setdefault(watcher, []).append(user)
            for keys, some in self._piped(recorded):
                for watcher, users in (await self._not_watched(keys, {one: recorded[one] for one in some})).items():
                    count += await self._leave(watcher, users)
        return count

    def _piped(self, users: Iterable[str]) -> Iterator[tuple[Keys, list[str]]]:
        """The users by their partitions, as many at a time as there may be commands to a call."""
        for keys, members in self._by_partition(users):
            for some in _pieces(members, PIPED):
                yield keys, some

    async def _watchers_of(self, users: Iterable[str]) -> AsyncIterator[tuple[str, list[str]]]:
        """Iterate over the users and those who are recorded as their watchers, of many in pages."""
        for keys, some in self._piped(users):
            names = [keys.user(user, "watchers") for user in some]
            found = await self._pipe(keys, *(("SSCAN", name, 0, "COUNT", PAGE) for name in names))
            for user, name, (cursor, watchers) in zip(some, names, found, strict=True):
                if int(cursor) == 0:
                    yield user, watchers
                    continue
                async for page in self._pages(keys, "SSCAN", name):
                    yield user, page

    async def _not_watched(self, keys: Keys, recorded: Mapping[str, Sequence[str]]) -> Mapping[str, set[str]]:
        """Of the users that each watcher, all of one partition, is recorded to watch: those that it does not."""
        found = await self._pipe(keys, *(("SMEMBERS", keys.user(watcher, "watching")) for watcher in recorded))
        sessions = [(watcher, one) for watcher, those in zip(recorded, found, strict=True) for one in those]
        watching = await self._pipe(
            keys,
            *(("SMISMEMBER", keys.user(watcher, f"watching:{one}"), *recorded[watcher]) for watcher, one in sessions),
        )
        watched: dict[str, set[str]] = {watcher: set() for watcher in recorded}
        for (watcher, _), those in zip(sessions, watching, strict=True):
            watched[watcher].update(compress(recorded[watcher], those))
            if not any(those):
                await self._watched_by(watcher, recorded[watcher])  # the session may have lapsed: this forgets it
        wrong = ((watcher, set(users) - watched[watcher]) for watcher, users in recorded.items())
        return {watcher: users for watcher, users in wrong if users}

    async def hold(self, name: str, seconds: float, partition: int = 0) -> bool:
        return bool(await self._ask("hold", self._keys[partition], name, self._instance, round(seconds * 1000)))

    # The stream of changes

    async def follow(self, partition: int) -> AsyncIterator[Sequence[Change] | None]:
        keys = self._keys[partition]
        position: int | None = None
        checked = 0  # up to where it is known whether something was trimmed before it was read
        epoch: int | None = None
        while True:
            try:
                if position is None or self._epochs.get(partition) != epoch:
                    # At the start, and after a loss of the store: what is there now is read as statuses.
                    epoch = self._epochs.get(partition)
                    (version,) = await self._pipe(keys, ("GET", f"{keys.base}version"))
                    position = checked = int(version or 0)
                    yield None
                async with self._asking(keys, blocks=FOLLOW_BLOCK_MS / 1000) as node:
                    after = {keys.changes: _entry_id(position)}
                    found = await node.blocking.xread(after, count=PAGE, block=FOLLOW_BLOCK_MS)
                entries = [_change(entry) for _, stream in _streams(found) for entry in stream]
                if entries:
                    position = entries[-1].version
                    self.floor = max(self.floor, position)
                    yield entries
                (mark,) = await self._pipe(keys, ("GET", f"{keys.base}trimmed"))
                trimmed = int(mark or 0)
                missed, position = trimmed > checked, max(position, trimmed)
                checked = position
                if missed:
                    yield None
            except StoreUnavailable:
                await asyncio.sleep(0.2)

    async def backlog(self, cursor: str, partition: int, done: int, limit: int) -> tuple[Sequence[Change], int]:
        keys = self._keys[partition]
        read_in = self._read_in.get((cursor, partition), "")
        gap, epoch, entries = await self._ask("backlog", keys, cursor, done, read_in, limit)
        self._read_in[cursor, partition] = epoch
        return [_change((entry_id, _pairs(fields))) for entry_id, fields in entries], gap

    async def lag(self, cursor: str) -> float:
        async def part(keys: Keys) -> float | StoreUnavailable:
            try:
                (at,) = await self._pipe(keys, ("GET", f"{keys.base}cursor:{cursor}"))
                oldest = ("XRANGE", keys.changes, f"({_entry_id(int(at or 0))}", "+", "COUNT", 1)
                entries, (seconds, us) = await self._pipe(keys, oldest, ("TIME",))
            except StoreUnavailable as error:
                return error
            now_us = int(seconds) * 1_000_000 + int(us)
            return (now_us - _change(entries[0]).version) / 1e6 if entries else 0.0

        found = await asyncio.gather(*map(part, self._keys))
        ages = [age for age in found if isinstance(age, float)]
        if not ages:
            raise StoreUnavailable(str(found[0]))
        return max(0.0, *ages)

    async def newest(self, partition: int, upto: int) -> AsyncIterator[Sequence[Change]]:
        keys = self._keys[partition]
        async for page in self._pages(keys, "SCAN", "MATCH", f"{keys.base}user:*:change"):
            users = [user for user in map(_user_of, page) if self.partition_of(user) == partition]
            yield [change for change in await self._last_changes(keys, users) if 0 < change.version <= upto]

    async def trim(self, keep_seconds: float, cap: int) -> None:
        for keys in self._keys:
            while await self._ask("trim", keys, round(keep_seconds * 1000), cap):
                pass


def _pieces(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _user_of(key: str) -> str:
    """The user in ``{tag}:presence:user:{user}:{name}``."""
    return key.rsplit(":", 2)[1]


def _streams(found: Any) -> Iterable[tuple[str, Iterable[tuple[str, Mapping[str, str]]]]]:
    """The streams of an XREAD answer, which RESP2 gives as a list and RESP3 as a map of lists of lists."""
    return ((name, entries[0]) for name, entries in found.items()) if isinstance(found, dict) else found or ()
