"""The outside things the server needs, one Protocol each: duties, units, and the answer when a key is missing.

Every method may raise its port's error (`StoreUnavailable`, `HistoryUnavailable`, `DirectoryUnavailable`) when what is
behind it cannot be asked within its time limit. Nobody turns that into "offline" (DESIGN §7).
"""

from __future__ import annotations

import time
from asyncio import Future
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from presence.core.model import Change, Reason, Session, Status


class Unavailable(Exception):
    """Something outside cannot be asked now: the answer is unknown."""


class StoreUnavailable(Unavailable):
    """The presence store cannot be asked, or has just come back and is still settling."""


class HistoryUnavailable(Unavailable):
    """The history store cannot be asked."""


class DirectoryUnavailable(Unavailable):
    """The directory cannot be asked."""


class Health:
    """Whether a dependency can be reached, and since when that is so."""

    def __init__(self) -> None:
        self.state = "unknown"
        self.since = time.time()  # Unix s
        self.detail: str | None = None
        self.lag: float | None = None  # s that the oldest change which is not there yet has waited
        self.unread: int | None = None  # changes in a bus that this instance has still to read

    def note(self, state: str, detail: str | None = None) -> bool:
        """Note what was seen last: `up`, or `down` with the reason. True when that is news."""
        news = state != self.state
        if news:
            self.state, self.since = state, time.time()
        self.detail = detail
        return news


class TooManyConnections(Exception):
    """The user has as many open connections as the limit allows."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Statuses read at one moment."""

    statuses: Mapping[str, Status]
    """One for each user asked; `Status(user)` when the store knows nothing of the user."""
    unsettled: frozenset[str]
    """Users asked for whom "offline" would not be certain, since the store has just come back (DESIGN §3.6)."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found."""

    epoch: int
    """Names the last time the store came back (an *amnesty*); changes with each."""
    settling: float
    """Seconds of amnesty left; 0 when sessions end again."""
    more: bool
    """More sessions are due than one call takes."""


class PresenceStore(Protocol):
    """Sessions, leases and the online set, for one deployment (DESIGN §3). One clock: its own.

    All commands of one session take effect in the order of the calls. Those that return a future never fail while the
    store is away: they are kept, and done when it is back.
    """

    partitions: int
    health: Health

    def partition_of(self, user: str) -> int:
        """Return the partition, 0 … partitions-1, in which the user's keys are."""

    async def connect(self, session: Session, *, limit: int, without_lease: int) -> None:
        """Make the session with a full lease; its user is online if this is the first one.

        Args:
            limit: open connections a user may have, over all instances.
            without_lease: open connections of this user on this instance that have no lease (signed off, lapsed).

        Raises:
            TooManyConnections: nothing was made.
            StoreUnavailable: nothing will be left of it.
        """

    def restore(self, session: Session) -> Future[None]:
        """Make the session again after a loss of the store, with what is left of its lease."""

    def refresh(self, session: Session, *, active: bool = True, urgent: bool = False) -> Future[None]:
        """Renew the lease, from ``session.last_beat``; revive the session if it had lapsed and is not closed.

        Args:
            active: False renews the lease alone, and leaves the user's last activity as it is.
            urgent: somebody waits for it; else it may wait some ms for company.
        """

    def end(self, session: Session, reason: Reason, active_at: float) -> Future[None]:
        """End the session; its user is offline if it was the last. A session that has ended already: a no-op.

        Args:
            active_at: the user's last activity, monotonic s.
        """

    def shorten(self, session: Session, reason: Reason, active_at: float, rest: float) -> Future[None]:
        """Let the lease end after ``rest`` s, unless it ends earlier. A session that has ended already: a no-op."""

    async def read(self, users: Collection[str]) -> Reading:
        """Return the statuses of ``users``, read on the primary."""

    async def record_watches(self, session: Session, *, anew: bool = False) -> None:
        """Record what the session watches now, for whoever looks at the watchers of a user; nothing once it is closed.

        Args:
            anew: all of it, as what has been recorded may be there in part only: a try before this has failed.
        """

    def renew_watches(self, sessions: Iterable[Session]) -> AsyncIterator[Sequence[Session]]:
        """Keep the records of what these sessions watch from lapsing. Yields those of which they are to be made again.

        Raises:
            StoreUnavailable: of some it is not known; the others have been yielded.
        """

    async def record_watchers(self, watchers: Mapping[str, Collection[str]]) -> None:
        """Record again who watches these users, where it may have been lost: user → watchers, at least one."""

    async def sweep(self, partition: int) -> Sweep:
        """End overdue sessions (DESIGN §3.3); notice that the store has come back, and begin the amnesty."""

    async def settle(self, statuses: Iterable[Status]) -> Sequence[Change]:
        """Hold what is said of these users somewhere against what is so; announce what is not (reason `restored`).

        Returns:
            The changes, new or known, that say otherwise, each with a version not below the one given.
        """

    async def repair(self) -> Mapping[str, int]:
        """Make the online set, sessions, deadlines and watchers agree. Return how many of each were repaired."""

    def online_users(self) -> AsyncIterator[Sequence[Change]]:
        """Iterate over all users who are online, in pages, each with the change that made them so."""

    async def online_count(self) -> int:
        """Return how many users are online."""

    async def sessions_of(self, user: str) -> Mapping[str, str]:
        """Return the user's sessions that have a lease: session id → device; empty when there are none."""

    async def hold(self, name: str, seconds: float, partition: int = 0) -> bool:
        """Take or keep the lease called ``name`` for this instance. False: another instance has it.

        Args:
            partition: where the lease is kept; one of another partition is another lease.
        """

    async def overdue(self, seconds: float) -> None:
        """Wait until a session's key has expired, ``seconds`` at most. A hint, no more (DESIGN §3.3)."""

    def follow(self, partition: int) -> AsyncIterator[Sequence[Change] | None]:
        """Iterate over the changes from now on, in order. None: some were missed, read the statuses anew."""

    async def backlog(self, cursor: str, partition: int, done: int, limit: int) -> tuple[Sequence[Change], int]:
        """Return the changes behind the cursor, which is first moved on to the version ``done`` (0: left where it is).

        ``done`` is of what the last call returned. Was the store lost since, the cursor stays, and some come again.

        Returns:
            At most ``limit`` changes in order, and 0; or none, and the version up to which changes were trimmed before
            the cursor reached them.
        """

    async def lag(self, cursor: str) -> float:
        """Return for how long the oldest change behind the cursor has been there, s; 0 when there is none.

        Of partitions that cannot be asked, nothing, unless it is all of them.
        """

    def newest(self, partition: int, upto: int) -> AsyncIterator[Sequence[Change]]:
        """Iterate over the last changes of the partition's users, those up to the version ``upto``, in pages."""

    async def trim(self, keep_seconds: float, cap: int) -> None:
        """Drop changes that are older than ``keep_seconds`` and behind all cursors; and the oldest above ``cap``."""


class Sink(Protocol):
    """Is brought every change, in order per user, at least once (`relay`)."""

    name: str
    """Names its cursor: sinks that share their content share the name."""
    health: Health

    async def write(self, changes: Sequence[Change]) -> None:
        """Take the changes; on return it has them all. Repeats are harmless."""


class Bus(Sink, Protocol):
    """Carries every change to every instance (guide, Kafka topic `user.presence.status`)."""

    def unread(self) -> int | None:
        """Return how many changes this instance has still to read; None while it is away."""

    def follow(self, wanted: Callable[[str], bool]) -> AsyncIterator[Sequence[Change] | None]:
        """Iterate over the changes from now on, for ever; while it is away, it waits.

        Of one user they come in order, and some more than once. None: some may have been missed, read the statuses
        anew; it comes first, when all that is written from then on will be told.

        Args:
            wanted: whether anybody asks for a user's changes; those of the others may be left out.
        """


class HistoryStore(Sink, Protocol):
    """The last known status of every user ever seen, and the changes before it. It outlives the presence store.

    Of one user's changes the highest version wins, whatever the order in which they are written.
    """

    async def changes(self, user: str, limit: int) -> Sequence[Change]:
        """Return the user's last ``limit`` changes that are still kept, the newest first."""

    async def read(self, users: Collection[str]) -> Mapping[str, Status]:
        """Return the last known status of each of ``users``; those never seen are not in the answer."""

    def online_users(self) -> AsyncIterator[Sequence[Status]]:
        """Iterate over all users whose last known status is online, in pages."""


class Directory(Protocol):
    """Who is whose friend, who is in which conversation. Owned by the host application."""

    async def friends(self, user: str) -> Sequence[str]:
        """Return the friends of ``user``; empty for an unknown user."""

    async def members(self, conversation: str) -> Sequence[str] | None:
        """Return the members of the conversation; None when there is no such conversation."""

    async def contacts(self, user: str) -> frozenset[str]:
        """Return whom ``user`` may see under the policy ``contacts``, at most 10 s old.

        These are the user, everybody who lists the user as a friend, and all who share a conversation with the user.
        """
