"""The guide's flows, in the guide's words: who is online, who was told, and what happens when something fails."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from asyncio import Future
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from presence.core.model import Reason, Session, Status
from presence.fanout import Fanout, Watcher
from presence.ports import (
    Directory,
    DirectoryUnavailable,
    HistoryStore,
    HistoryUnavailable,
    PresenceStore,
    StoreUnavailable,
)
from presence.watch_records import WatchRecords

log = logging.getLogger(__name__)

PAGE = 500  # users to a read of the store
SNAPSHOTS = 8  # snapshots read at once: when all clients come back together, the sweep is to get through
SETTLED = 30 * 86_400.0  # s for which it is remembered that a loss of the store was settled with the history


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be configured of the rules. Times in s."""

    lease: float = 60.0
    grace: float = 0.0
    """Lease left after a lost connection."""
    drain: float = 15.0
    """Lease left at a planned stop."""
    renewed_by_connection: bool = False
    contacts_only: bool = False
    """The watch policy `contacts`."""
    user_connections: int = 50


@dataclass(frozen=True, slots=True)
class Answer:
    """Statuses as one user may see them."""

    statuses: Mapping[str, Status]
    degraded: bool
    """The history could not be asked, so that some `last_active` may be missing."""
    visible: frozenset[str] | None
    """Whom the viewer may see; None: everybody."""


class PresenceService:
    """One instance's view of the presence system."""

    def __init__(
        self,
        store: PresenceStore,
        history: HistoryStore,
        directory: Directory,
        fanout: Fanout,
        rules: Rules,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.history = history
        self.directory = directory
        self.fanout = fanout
        self.rules = rules
        self.records = WatchRecords(store)
        self._clock = clock
        self._draining = False
        self._snapshots = asyncio.Semaphore(SNAPSHOTS)
        self._settled = [asyncio.Event() for _ in range(store.partitions)]
        for partition in range(store.partitions):
            self.note_settled(partition, settled=True)
        self._looking = asyncio.Lock()
        self._looks = self._looked = 0  # at the history, to settle: the last one that began, and that ended well
        self._open: dict[str, set[Session]] = {}  # user → sessions whose connection is here

    def open_sessions(self) -> list[Session]:
        """Return the sessions whose connection is on this instance."""
        return [session for sessions in self._open.values() for session in sessions]

    # Online Flow

    async def set_user_online(self, user: str, device: str, session_id: str) -> Session:
        """Make a session; whoever sees this return is online for every reader (WIRE §3).

        Raises:
            TooManyConnections: the user has too many open ones.
            StoreUnavailable: nothing is left of the session.
        """
        now = self._clock()
        session = Session(user, session_id, device, last_beat=now, last_input=now)
        without_lease = sum(self._has_no_lease(other, now) for other in self._open.get(user, ()))
        try:
            await self.store.connect(session, limit=self.rules.user_connections, without_lease=without_lease)
        except asyncio.CancelledError:
            session.closed = True
            _ = self.store.end(session, Reason.DISCONNECTED, now)
            raise
        self._open.setdefault(user, set()).add(session)
        return session

    def _has_no_lease(self, session: Session, now: float) -> bool:
        return session.signed_off or now - session.last_beat > self.rules.lease

    # Heartbeat Flow

    def refresh_user_session(self, session: Session, *, wait: bool = False) -> Future[None] | None:
        """Renew the lease from now; revive the session if it had lapsed. After a sign-off: nothing.

        Args:
            wait: somebody waits for the future that is returned.
        """
        if session.signed_off or session.closed:
            return None
        session.last_beat = self._clock()
        return self.store.refresh(session, urgent=wait)

    def sign_on(self, session: Session, *, wait: bool = False) -> Future[None] | None:
        """`{"online": true}`: a heartbeat that also revives after a sign-off (WIRE §4)."""
        revives, session.signed_off = session.signed_off, False
        return self.refresh_user_session(session, wait=wait or revives)

    def renew_open_sessions(self) -> None:
        """Let open connections renew their leases themselves (`PRESENCE_LEASE_RENEWED_BY=connection`)."""
        for session in self.open_sessions():
            if not session.signed_off:
                session.last_beat = self._clock()
                _ = self.store.refresh(session, active=False)

    # Offline Flow (Disconnect)

    def set_user_offline(self, session: Session) -> Future[None] | None:
        """DISCONNECT: the session has ended, its connection is about to."""
        leaves = self._close(session) or (self._draining and not session.signed_off)
        return self.store.end(session, Reason.DISCONNECTED, self._clock()) if leaves else None

    def sign_off(self, session: Session) -> Future[None] | None:
        """`{"online": false}`: the session has ended, its connection stays. Twice is once."""
        if session.signed_off or session.closed:
            return None
        session.signed_off = True
        return self.store.end(session, Reason.SIGNED_OFF, self._clock())

    def connection_lost(self, session: Session, *, rest: float | None = None) -> Future[None] | None:
        """A close without DISCONNECT, a lost connection, silence: what is left of the lease is the grace (WIRE §4).

        Args:
            rest: s of the lease to leave instead of the grace.
        """
        if not self._close(session):
            return None
        reason = Reason.DISCONNECTED
        if self._draining:
            reason, rest = Reason.DRAINED, max(self.rules.drain, self.rules.grace)
        rest = self.rules.grace if rest is None else rest
        if rest <= 0:
            return self.store.end(session, reason, session.last_input)
        return self.store.shorten(session, reason, session.last_input, rest)

    def token_expired(self, session: Session) -> Future[None] | None:
        """The connection's token has ended: its client may come back with a new one without a change (WIRE §1)."""
        return self.connection_lost(session, rest=max(self.rules.grace, self.rules.drain))

    def _close(self, session: Session) -> bool:
        """Let nothing revive the session. False when it had been ended already, so that nothing is left to do."""
        if session.closed:
            return False
        session.closed = True
        sessions = self._open.get(session.user, set())
        sessions.discard(session)
        if not sessions:
            self._open.pop(session.user, None)
        return not session.signed_off

    async def drain(self, timeout: float) -> None:
        """Planned stop: shorten the leases of all sessions here, before any of their sockets closes (WIRE §4)."""
        self._draining = True
        done = [future for session in self.open_sessions() if (future := self.connection_lost(session))]
        if done:
            await asyncio.wait(done, timeout=timeout)

    # Reading

    async def get_all_online_user_ids(self) -> set[str]:
        """Return the ids of all users who are online (guide, Health Checks)."""
        return {change.user async for page in self.store.online_users() for change in page}

    async def get_user_active_sessions(self, user: str) -> set[str]:
        """Return the ids of the user's sessions that have a lease (guide, Health Checks)."""
        return set(await self.store.sessions_of(user))

    async def is_user_online(self, viewer: str, user: str) -> bool:
        """Return whether ``user`` is online, as far as ``viewer`` may know.

        Raises:
            StoreUnavailable: it is unknown; so it is with all that follow.
        """
        return (await self.get_presence(viewer, [user])).statuses[user].online

    async def get_friends_presence(self, viewer: str) -> Answer:
        """Return the statuses of the viewer's friends."""
        return await self.get_presence(viewer, await self.directory.friends(viewer))

    async def get_conversation_presence(self, viewer: str, conversation: str) -> Answer | None:
        """Return the statuses of all members; None when the viewer is none, or there is no such conversation."""
        members = await self.directory.members(conversation)
        return None if members is None or viewer not in members else await self.get_presence(viewer, members)

    async def get_presence(self, viewer: str, users: Collection[str]) -> Answer:
        """Return the statuses of ``users``. Those who are hidden are like those never seen, and cost the same look-ups.

        Raises:
            StoreUnavailable: some answer would be "offline", and that is not certain.
            DirectoryUnavailable: it is not known who may be seen.
        """
        users = dict.fromkeys(users)
        visible = await self.visible(viewer)
        reading = await self.store.read(users) if users else None
        statuses = dict(reading.statuses) if reading else {}
        if visible is not None:
            statuses.update((user, Status(user)) for user in users if user not in visible)
        if reading and any(not statuses[user].online for user in reading.unsettled):
            raise StoreUnavailable("the presence store has just come back and is still settling")
        missing = [u for u, s in statuses.items() if not s.online and (s.last_active is None or s.version == 0)]
        degraded = False
        if missing:
            try:
                rows = await self.history.read(missing)
            except HistoryUnavailable:
                rows, degraded = {}, True
            for user, row in rows.items():
                if visible is None or user in visible:
                    known = statuses[user]
                    last_active = row.last_active if known.last_active is None else known.last_active
                    # A row that says online is newer than what was read: its change is still to be told.
                    version = known.version or (0 if row.online else row.version)
                    statuses[user] = Status(user, False, version, last_active)
        return Answer(statuses, degraded, visible)

    async def visible(self, viewer: str) -> frozenset[str] | None:
        """Return whom the viewer may see; None: everybody (WIRE §5, Policy)."""
        return await self.directory.contacts(viewer) if self.rules.contacts_only else None

    # Watching

    def watch(self, watcher: Watcher, users: Collection[str]) -> None:
        """Have the session told of these users' changes, from its next snapshot on."""
        if users:
            self.fanout.watch(watcher, users)
            self.records.note(watcher.session)

    def unwatch(self, watcher: Watcher, users: Collection[str]) -> None:
        """Tell the session nothing more of these users."""
        if users:
            self.fanout.unwatch(watcher, users)
            self.records.note(watcher.session)

    async def snapshot(self, watcher: Watcher, users: Collection[str]) -> list[tuple[Status, bytes | None]]:
        """Return the present state of those of ``users`` whom the session watches; they count as told.

        With each what its other subscriptions are told (`Watcher.snapshot`). Waits while the store or the directory is
        away (WIRE §4): a snapshot is never a guess.
        """
        out: list[tuple[Status, bytes | None]] = []
        for page in _pages(users):
            while True:
                for partition in {self.store.partition_of(user) for user in page}:
                    await self._settled[partition].wait()  # nobody asks while the answer could only be "unknown"
                try:
                    async with self._snapshots:
                        answer = await self.get_presence(watcher.session.user, page)
                    break
                except (StoreUnavailable, DirectoryUnavailable):
                    await asyncio.sleep(random.uniform(0.1, 1.0))
            visible = answer.visible
            if visible is not watcher.visible:
                watcher.visible = None  # told by other contacts than the rest: `revise` is to look again
            hidden = () if visible is None else [user for user in page if user not in visible]
            out += watcher.snapshot(answer.statuses.values(), hidden)
        return out

    async def renew_watches(self, sessions: Iterable[Session]) -> None:
        """Keep the records of what these sessions watch; make them again where they were lost."""
        async for lost in self.store.renew_watches(sessions):
            for session in lost:
                self.records.note(session, anew=True)

    async def revise(self, watcher: Watcher) -> tuple[list[Status], list[str]]:
        """Apply the policy `contacts` to what the session has been told.

        Returns:
            What to tell at once of users who may not be seen any more, and the users who may be seen again.
        """
        watcher.visible = visible = await self.visible(watcher.session.user)
        if visible is None:
            return [], []
        revoked = [user for user in watcher.told if user not in watcher.hidden and user not in visible]
        told = [status for status, _ in watcher.snapshot(map(Status, revoked), revoked)]
        return told, [user for user in watcher.hidden if user in visible]

    # The store was away, or came back without its memory (DESIGN §3.6)

    def note_settled(self, partition: int, *, settled: bool) -> None:
        """Note whether the partition can be asked, and says "offline" for certain. Snapshots wait for it."""
        if settled:
            self._settled[partition].set()
        else:
            self._settled[partition].clear()

    def restore(self, partition: int) -> None:
        """Assert again the sessions of the open sockets here that kept beating."""
        now = self._clock()
        for session in self.open_sessions():
            if self.store.partition_of(session.user) == partition and not self._has_no_lease(session, now):
                _ = self.store.restore(session)

    async def settle(self, partition: int) -> None:
        """After the amnesty: what somebody was told, and is not so, is announced."""
        told = [status for status in self.fanout.told() if self.store.partition_of(status.user) == partition]
        await self.store.settle(told)
        await self.resync(partition)
        here = [session for session in self.open_sessions() if self.store.partition_of(session.user) == partition]
        await self.renew_watches(here)
        for page in _pages(self._watched(partition)):  # by whomever: a watcher's own partition may have lost nothing
            watchers = {user: self.fanout.watchers(user) for user in page}
            await self.store.record_watchers({user: names for user, names in watchers.items() if names})

    async def settle_history(self, partition: int, epoch: int) -> None:
        """After that: whoever the history still says is online, and is not, goes offline; unless that was done already.

        Args:
            partition: in which the store has come back.
            epoch: since when.
        """
        done = f"settled.{self.history.name}.{epoch}"
        looks = self._looks
        if await self.store.hold(done, 0.001, partition):  # else another instance has it, since it has done it
            async with self._looking:
                if self._looked <= looks:  # since then: one look at the history is enough for all partitions
                    self._looks += 1
                    count = await self._settle_history()
                    self._looked = self._looks
                    log.info("settled with the history: %d kept as online were not", count)
            await self.store.hold(done, SETTLED, partition)
        log.info("settled partition %d", partition)

    async def resync(self, partition: int) -> None:
        """Changes were missed: read the statuses of all watched users anew."""
        for page in _pages(self._watched(partition)):
            reading = await self.store.read(page)
            for user, status in reading.statuses.items():
                if status.online or user not in reading.unsettled:
                    self.fanout.deliver(status)

    def _watched(self, partition: int) -> list[str]:
        return [user for user in self.fanout.watched() if self.store.partition_of(user) == partition]

    async def _settle_history(self) -> int:
        """Announce as offline whom the history still says is online. Returns how many."""
        count = 0
        async for rows in self.history.online_users():
            offline = await self.store.settle(rows)
            await self.history.write(offline)
            count += len(offline)
        return count

    # Maintenance

    async def cleanup(self) -> Mapping[str, int]:
        """Make online set, sessions, watchers and the history's rows agree (guide, Cleanup Task, Stale Detection).

        Returns:
            How many of each kind were repaired.
        """
        repaired = dict(await self.store.repair())
        repaired["rows_offline"] = await self._settle_history()
        repaired["rows_online"] = 0
        async for page in self.store.online_users():
            rows = await self.history.read([change.user for change in page])
            stale = [c for c in page if c.version > (rows[c.user].version if c.user in rows else -1)]
            await self.history.write(stale)
            # The store may have lost the writes of which a row knows.
            await self.store.settle([rows[c.user] for c in page if c.user in rows and rows[c.user].version > c.version])
            repaired["rows_online"] += len(stale)
        return repaired


def _pages(users: Collection[str]) -> Iterable[Sequence[str]]:
    users = list(users)
    return (users[start : start + PAGE] for start in range(0, len(users), PAGE))
