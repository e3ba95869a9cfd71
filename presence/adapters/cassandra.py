"""Cassandra: the history store, and a directory (DESIGN §2, §4; tables in ``cassandra_schema.cql``).

The driver runs its connections in a thread of its own, and blocks whoever connects, prepares or closes: so a second
thread does that. Requests are sent from the event loop, which never waits; the answers of many come to it at once.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import re
import time
from asyncio import Future
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cassandra import ConsistencyLevel, DriverException, InvalidRequest, OperationTimedOut
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable, ResponseFuture, Session
from cassandra.connection import ConnectionException
from cassandra.io.libevreactor import LibevConnection
from cassandra.policies import ConstantReconnectionPolicy, DCAwareRoundRobinPolicy, TokenAwarePolicy
from cassandra.query import UNSET_VALUE, PreparedStatement, tuple_factory

from presence.adapters.answers import Answers
from presence.core.model import Change, Reason, Status
from presence.ports import DirectoryUnavailable, Health, HistoryUnavailable

PORT = 9042
PROTOCOL = 4  # the frames of 5 carry checksums, which the driver computes in Python
IN_FLIGHT = 256  # requests, of one process
BURST = 32  # requests sent before others have their turn in the loop: about 3 ms
PAGE = 1000  # rows
IDS = 50  # users in one SELECT
PROBE = 5.0  # s between two looks whether it is there, and so are the tables
RETRY = 1.0  # s between two attempts, and after a failure in which nothing is asked
MAX_TTL = 630_720_000  # s; Cassandra's limit
DAY = 86_400_000_000  # µs
EPOCH = dt.date(1970, 1, 1).toordinal()
AT_ONCE = 32  # conversations asked for at a time, so that one user leaves others their turn
MAX_IDS = 100_000  # in one answer of the directory

HISTORY_TABLES = ("user_presence", "presence_history")
DIRECTORY_TABLES = ("friends_by_user", "users_by_friend", "members_by_conversation", "conversations_by_user")

_KEYSPACE = "SELECT keyspace_name FROM system_schema.keyspaces WHERE keyspace_name = ?"
_TABLES = "SELECT table_name FROM system_schema.tables WHERE keyspace_name = ?"
_WRITE = """
    INSERT INTO presence.user_presence (user_id, is_online, last_active, device)
    VALUES (?, ?, ?, ?) USING TIMESTAMP ?
"""
_KEEP = """
    INSERT INTO presence.presence_history (user_id, day, version, is_online, last_active, device, reason)
    VALUES (?, ?, ?, ?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?
"""
_STATUS = "SELECT user_id, is_online, WRITETIME(is_online), toUnixTimestamp(last_active) FROM presence.user_presence"
_READ = f"{_STATUS} WHERE user_id IN ?"
_CHANGES = """
    SELECT is_online, version, toUnixTimestamp(last_active), device, reason FROM presence.presence_history
    WHERE user_id = ? AND day = ? LIMIT ?
"""
_FRIENDS = "SELECT friend_id FROM presence.friends_by_user WHERE user_id = ?"
_LISTED_BY = "SELECT user_id FROM presence.users_by_friend WHERE friend_id = ?"
_MEMBERS = "SELECT user_id FROM presence.members_by_conversation WHERE conversation_id = ?"
_CONVERSATIONS = "SELECT conversation_id FROM presence.conversations_by_user WHERE user_id = ?"

ERRORS = (
    DriverException,
    NoHostAvailable,
    ConnectionException,
    OSError,
    RuntimeError,
)  # the last: its thread has ended

Rows = list[tuple[Any, ...]]
Request = tuple[str, Sequence[object]]  # CQL, and the values of its ?
T = TypeVar("T")

log = logging.getLogger(__name__)


class CassandraUnavailable(HistoryUnavailable, DirectoryUnavailable):
    """Cassandra cannot be asked. One line."""


class _Call:
    """Requests that are waited for together."""

    def __init__(self, count: int) -> None:
        self.answers: list[Rows] = [[]] * count
        self.left = count
        self.error: Exception | None = None
        self.done: Future[None] = asyncio.get_running_loop().create_future()  # all have come, or one has failed

    def take(self, index: int, outcome: Rows | Exception | None) -> None:
        self.left -= 1
        if isinstance(outcome, Exception):
            self.error = self.error or outcome
        else:
            self.answers[index] = outcome or []
        if (self.error or not self.left) and not self.done.done():
            self.done.set_result(None)


class CassandraSession:
    """The connections to one Cassandra, for all that use it. They come back by themselves whenever it does."""

    def __init__(
        self,
        contact_points: Sequence[str],
        *,
        keyspace: str = "presence",
        datacenter: str = "datacenter1",
        user: str | None = None,
        password: str | None = None,
        timeout: float = 2.0,
        tables: Collection[str] = HISTORY_TABLES,
    ) -> None:
        """Connect when told to: see `run` and `connect`.

        Args:
            contact_points: each host or host:port.
            keyspace: of the tables.
            datacenter: the only one that is asked.
            user: name, if Cassandra wants one.
            password: of that user.
            timeout: of one request, s.
            tables: those that are used, and so must be there.

        Raises:
            ValueError: a contact point is none.
        """
        self.health = Health()
        self._points = [_endpoint(point) for point in contact_points]
        self._name = f"PRESENCE_CASSANDRA_CONTACT_POINTS={','.join(contact_points)}"
        self._keyspace = keyspace
        self._datacenter = datacenter
        self._auth = PlainTextAuthProvider(user, password or "") if user is not None else None
        self._timeout = timeout
        self._limit = timeout + 1.0  # the driver's own limit comes first, unless its thread is stuck
        self._tables = tables
        self._thread = ThreadPoolExecutor(1, "cassandra")
        self._cluster: Cluster | None = None
        self._session: Session | None = None
        self._statements: dict[str, PreparedStatement] = {}
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._answers: deque[tuple[_Call, int, Rows | Exception | None]] = deque()
        self._waking = False
        self._paused_until = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = asyncio.Lock()
        logging.getLogger("cassandra").setLevel(logging.CRITICAL)  # it logs each attempt, with tracebacks; we say it

    async def run(self) -> None:
        """Connect, now or whenever Cassandra is there, and keep `health` true from then on, for ever."""
        while True:
            with suppress(CassandraUnavailable):
                await self.connect()
                await self.missing()
            await asyncio.sleep(PROBE if self.health.state == "up" else RETRY)

    async def connect(self) -> None:
        """Connect, unless that is done.

        Raises:
            CassandraUnavailable: it cannot be reached now.
        """
        self._loop = asyncio.get_running_loop()
        async with self._connecting:
            if self._session is None:
                try:  # the driver has a time limit for each step
                    self._session = await self._loop.run_in_executor(self._thread, self._open)
                except ERRORS as error:
                    raise self._away(error) from None

    async def close(self) -> None:
        """Close the connections, once what is under way is done or out of time."""
        self._session = None
        with suppress(RuntimeError):  # twice is once
            closing = asyncio.get_running_loop().run_in_executor(self._thread, self._shut)
            await asyncio.wait([closing], timeout=self._limit)
        self._thread.shutdown(wait=False)

    def _open(self) -> Session:
        profile = ExecutionProfile(
            load_balancing_policy=TokenAwarePolicy(DCAwareRoundRobinPolicy(self._datacenter)),
            consistency_level=ConsistencyLevel.LOCAL_QUORUM,
            request_timeout=self._timeout,
            row_factory=tuple_factory,
        )
        self._cluster = cluster = Cluster(
            self._points,
            port=PORT,
            protocol_version=PROTOCOL,
            connection_class=LibevConnection,
            compression=False,
            auth_provider=self._auth,
            execution_profiles={EXEC_PROFILE_DEFAULT: profile},
            reconnection_policy=ConstantReconnectionPolicy(RETRY, max_attempts=None),
            connect_timeout=self._timeout,
            control_connection_timeout=self._timeout,
            idle_heartbeat_interval=PROBE,
            idle_heartbeat_timeout=self._timeout,
        )
        try:
            session = cluster.connect()
        except Exception:
            cluster.shutdown()
            raise
        session.use_client_timestamp = False  # each statement has its own
        session.default_fetch_size = PAGE
        return session

    def _shut(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()

    async def missing(self) -> str | None:
        """Return what of keyspace and tables is missing, as one line; None when all is there.

        Raises:
            CassandraUnavailable: that cannot be asked.
        """
        keyspaces, tables = await self._ask([(_KEYSPACE, [self._keyspace]), (_TABLES, [self._keyspace])])
        there = {name for (name,) in tables}
        gone = f"keyspace {self._keyspace}" if not keyspaces else None
        gone = gone or next((f"table {self._keyspace}.{name}" for name in self._tables if name not in there), None)
        if gone:
            line = f"{gone} is missing: run presence init"
            self._note_away(line)
            return line
        self._paused_until = 0.0
        if self.health.note("up"):
            log.info("Cassandra reached")
        return None

    async def create_schema(self, replication: Mapping[str, object]) -> None:
        """Make what is missing of keyspace and tables.

        Args:
            replication: of the keyspace, if it is made now: ``{"class": "SimpleStrategy", "replication_factor": 1}``.

        Raises:
            CassandraUnavailable: it cannot be done.
        """
        await self.connect()
        options = ", ".join(f"'{key}': '{value}'" for key, value in replication.items())
        statements = [f"CREATE KEYSPACE IF NOT EXISTS {self._keyspace} WITH replication = {{{options}}}"]
        text = await asyncio.to_thread(Path(__file__).with_name("cassandra_schema.cql").read_text)
        statements += (
            self._qualified(statement)
            for statement in re.sub(r"--.*", "", text).split(";")
            if any(f" presence.{table} " in statement for table in self._tables)
        )
        session = self._session
        assert session is not None
        try:
            for statement in statements:  # a change of the schema may take long: all nodes must agree
                await self._in_thread(partial(session.execute, statement, timeout=10.0), 15.0)
        except ERRORS as error:
            raise self._away(error) from None

    # Requests

    async def ask(self, requests: Sequence[Request]) -> Sequence[Rows]:
        """Send all requests, as many at once as may be; return the rows of each, its first page.

        Raises:
            CassandraUnavailable: one of them failed. Whether the others have taken effect is unknown.
        """
        self._check()
        return await self._ask(requests)

    async def pages(self, cql: str, values: Sequence[object] = ()) -> AsyncIterator[Rows]:
        """Iterate over all rows that one request finds, in pages.

        Raises:
            CassandraUnavailable: the request, or the next page, failed.
        """
        self._check()
        session, statement = await self._prepared(cql)
        future: ResponseFuture | None = None
        while future is None or future.has_more_pages:
            call = _Call(1)
            await self._slot()
            if future is None:
                future = self._send(session, statement, values)
            else:
                future.clear_callbacks()
                future.start_fetching_next_page()
            self._expect(future, call, 0)
            yield (await self._outcome(call))[0]

    async def _ask(self, requests: Sequence[Request]) -> Sequence[Rows]:
        call = _Call(len(requests))
        if not requests:
            return []
        prepared = {cql: await self._prepared(cql) for cql in {cql for cql, _ in requests}}
        for index, (cql, values) in enumerate(requests):
            await self._slot()
            if call.error:
                self._slots.release()
                break
            self._expect(self._send(*prepared[cql], values), call, index)
            if index % BURST == BURST - 1:
                await asyncio.sleep(0)
        return await self._outcome(call)

    def _send(self, session: Session, statement: PreparedStatement, values: Sequence[object]) -> ResponseFuture:
        try:
            return session.execute_async(statement, values)
        except Exception:  # such values cannot be sent: a mistake of ours
            self._slots.release()
            raise

    def _expect(self, future: ResponseFuture, call: _Call, index: int) -> None:
        about = (call, index)
        future.add_callbacks(self._answered, self._answered, callback_args=about, errback_args=about)

    async def _slot(self) -> None:
        """Wait until one more request may be in flight."""
        if not self._slots.locked():
            await self._slots.acquire()  # at once
            return
        try:
            async with asyncio.timeout(self._limit):
                await self._slots.acquire()
        except TimeoutError as error:
            raise self._away(error) from None

    async def _outcome(self, call: _Call) -> Sequence[Rows]:
        try:
            async with asyncio.timeout(self._limit):
                await call.done
        except TimeoutError as error:
            raise self._away(error) from None
        if call.error:
            raise self._away(call.error)
        return call.answers

    def _answered(self, outcome: Rows | Exception | None, call: _Call, index: int) -> None:
        """Take an answer in the driver's thread. Many of them wake the loop once."""
        self._answers.append((call, index, outcome))
        if not self._waking:
            self._waking = True
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._waking = False  # first: an answer that comes from here on wakes the loop again
        while self._answers:
            call, index, outcome = self._answers.popleft()
            self._slots.release()
            call.take(index, outcome)

    async def _prepared(self, cql: str) -> tuple[Session, PreparedStatement]:
        session = self._session
        if session is None:
            raise CassandraUnavailable(self.health.detail or f"{self._name}: not connected yet")
        if cql not in self._statements:
            try:
                statement = await self._in_thread(partial(session.prepare, self._qualified(cql)), self._limit)
            except ERRORS as error:
                raise self._away(error) from None
            statement.is_idempotent = True  # all are: so the driver may send them again
            self._statements[cql] = statement
        return session, self._statements[cql]

    async def _in_thread(self, work: Callable[[], T], limit: float) -> T:
        async with asyncio.timeout(limit):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _qualified(self, cql: str) -> str:
        return re.sub(r"\bpresence\.", f"{self._keyspace}.", cql)

    # What is known of its health

    def _check(self) -> None:
        """Fail at once after a failure: else each of many requests would wait for the time limit."""
        if asyncio.get_running_loop().time() < self._paused_until:
            raise CassandraUnavailable(self.health.detail)

    def _away(self, error: Exception) -> CassandraUnavailable:
        if isinstance(error, NoHostAvailable) and isinstance(error.errors, dict):
            error = next(iter(error.errors.values()), error)
        line = " ".join(str(error).split())
        if isinstance(error, NoHostAvailable):
            line = f"no node can be asked; are they in PRESENCE_CASSANDRA_DATACENTER={self._datacenter}?"
        elif isinstance(error, OperationTimedOut | TimeoutError):
            line = f"no answer within {self._timeout:g} s"
        elif isinstance(error, InvalidRequest):
            line += ": run presence init"
        line = f"{self._name}: {line}"
        self._note_away(line)
        return CassandraUnavailable(line)

    def _note_away(self, line: str) -> None:
        self._paused_until = asyncio.get_running_loop().time() + RETRY
        if self.health.note("down", line):
            log.warning("Cassandra away: %s", line)


class CassandraHistory:
    """See `presence.ports.HistoryStore`."""

    name = "cassandra"

    def __init__(self, session: CassandraSession, *, history_days: int = 30) -> None:
        self.health = session.health
        self._session = session
        self._days = history_days
        self._ttl = min(history_days * 86_400, MAX_TTL)

    async def write(self, changes: Sequence[Change]) -> None:
        # Each row can be written again and in any order, so it does not matter after which of them a process dies.
        requests: list[Request] = []
        for one in changes:
            active = UNSET_VALUE if one.last_active is None else one.last_active  # a null would be a tombstone
            status = (one.online, active, one.device)
            key = (one.user, _day(one.version), one.version)
            requests.append((_WRITE, (one.user, *status, one.version)))
            requests.append((_KEEP, (*key, *status, one.reason, self._ttl, one.version)))
        await self._session.ask(requests)

    async def read(self, users: Collection[str]) -> Mapping[str, Status]:
        ids = list(users)
        pages = await self._session.ask([(_READ, [ids[i : i + IDS]]) for i in range(0, len(ids), IDS)])
        return {row[0]: Status(*row) for rows in pages for row in rows}

    async def online_users(self) -> AsyncIterator[Sequence[Status]]:
        # All rows come over and most are dropped here: a filter in Cassandra could look through millions of rows for
        # one page, and run out of time.
        async for rows in self._session.pages(_STATUS):
            if online := [Status(*row) for row in rows if row[1]]:
                yield online

    async def changes(self, user: str, limit: int) -> Sequence[Change]:
        now = time.time_ns() // 1000
        newest = max([now, *(status.version for status in (await self.read([user])).values())])
        days = [_day(moment) for moment in range(newest, now - (self._days + 1) * DAY, -DAY)]
        found: list[Change] = []
        for day in days:
            async for page in self._session.pages(_CHANGES, [user, day, limit]):
                for online, version, active, device, reason in page:
                    found.append(Change(user, online, version, active, device, Reason(reason)))
            if len(found) >= limit:
                break
        return found[:limit]


class CassandraDirectory:
    """See `presence.ports.Directory`. The host application fills the tables, both of each pair.

    An answer is used for ``cache`` s, also when Cassandra is away since.
    """

    def __init__(self, session: CassandraSession, *, cache: float = 5.0) -> None:
        self.health = session.health
        self._session = session
        self._answers = Answers(cache)

    async def friends(self, user: str) -> Sequence[str]:
        return await self._answers.get(f"friends {user}", partial(self._ids, _FRIENDS, user))

    async def members(self, conversation: str) -> Sequence[str] | None:
        return await self._answers.get(f"members {conversation}", partial(self._ids, _MEMBERS, conversation)) or None

    async def contacts(self, user: str) -> frozenset[str]:
        return await self._answers.get(f"contacts {user}", partial(self._contacts, user))

    async def _contacts(self, user: str) -> frozenset[str]:
        conversations = await self._ids(_CONVERSATIONS, user)
        contacts = {user, *await self._ids(_LISTED_BY, user)}
        for start in range(0, len(conversations), AT_ONCE):
            some = conversations[start : start + AT_ONCE]
            contacts.update(*await asyncio.gather(*(self._ids(_MEMBERS, one) for one in some)))  # not the cached ones
            if len(contacts) > MAX_IDS:
                raise DirectoryUnavailable(f"more than {MAX_IDS} contacts of {user}")
        return frozenset(contacts)

    async def _ids(self, cql: str, key: str) -> Sequence[str]:
        ids: list[str] = []
        async for rows in self._session.pages(cql, [key]):
            ids += (one for (one,) in rows)
            if len(ids) > MAX_IDS:
                raise DirectoryUnavailable(f"{cql.replace('?', repr(key))} finds more than {MAX_IDS} ids")
        return tuple(ids)


def _day(version: int) -> dt.date:
    return dt.date.fromordinal(EPOCH + version // DAY)


def _endpoint(point: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", point)
    if not match or not 0 < (port := int(match[2] or PORT)) < 65536:
        raise ValueError(f"must list host or host:port, not {point!r}")
    return match[1].strip("[]"), port
