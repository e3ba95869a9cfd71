"""From a change to the sessions that watch its user (guide, Online Flow 7–8; DESIGN §4). No I/O.

A session is told of a user first by a snapshot, then by changes that turn round what it was told last. Only the newest
status of each user is pending, so a slow client costs no memory beyond the users it watches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter

from presence.core.model import Session, Status

_version = attrgetter("version")


def _nobody() -> None:
    pass


class Watcher:
    """What one session watches and has been told."""

    __slots__ = ("_wake", "hidden", "pending", "session", "told", "visible")

    def __init__(self, session: Session, wake: Callable[[], None]) -> None:
        self.session = session
        self.told: dict[str, Status] = {}
        """What the session was last told; a user is not in it before the snapshot."""
        self.pending: dict[str, Status] = {}
        """Newer statuses, not told yet."""
        self.hidden: set[str] = set()
        """Those told of who may not be seen (policy `contacts`)."""
        self.visible: frozenset[str] | None = None
        """Whom the session might see when the policy was last applied."""
        self._wake = wake

    def offer(self, status: Status) -> None:
        """Have the session told of the status, if it is news to it.

        What becomes of a hidden user wakes nobody: the look-ups made are those for a user never seen (WIRE §5).
        """
        known = self.pending.get(status.user) or self.told.get(status.user)
        if known is None or status.version > known.version:
            self.pending[status.user] = status
            if status.user not in self.hidden:
                self._wake()

    @property
    def has_news(self) -> bool:
        """Something is pending of a user who may be seen, as far as is known."""
        return not self.hidden.issuperset(self.pending)

    def leave(self) -> None:
        """Wake nobody any more: whoever was woken refers to this, and is to be freed without the garbage collector."""
        self._wake = _nobody

    def flips(self) -> list[Status]:
        """Return the pending statuses that turn round what was told; they count as told from now on.

        Statuses of users whose snapshot is still to come wait; those of hidden users are dropped.
        """
        waiting: dict[str, Status] = {}
        flips = []
        for user, status in self.pending.items():
            told = self.told.get(user)
            if told is None:
                waiting[user] = status
            elif user not in self.hidden and status.version > told.version:
                self.told[user] = status
                if status.online != told.online:
                    flips.append(status)
        self.pending = waiting
        return flips

    def snapshot(self, statuses: Iterable[Status], hidden: Collection[str] = ()) -> list[tuple[Status, bytes | None]]:
        """Take these statuses, just read, for told, or newer ones that came meanwhile.

        Returns:
            For each user still watched the status, and what a subscription is to be told that knew of the one before:
            its event if it turns that round, its snapshot if the user is hidden or visible only now, else None.
        """
        out: list[tuple[Status, bytes | None]] = []
        for read in statuses:
            user = read.user
            if user not in self.session.watched:
                continue
            told, pending = self.told.get(user), self.pending.pop(user, None)
            if told is not None and (user in hidden) != (user in self.hidden):
                newest = read if user in hidden else max(read, pending or read, key=_version)
                news = newest.snapshot
            elif user in hidden:
                newest, news = read, None
            else:
                newest = max(read, told or read, pending or read, key=_version)
                news = newest.event if told and newest.online != told.online else None
            self.hidden.add(user) if user in hidden else self.hidden.discard(user)
            self.told[user] = newest
            out.append((newest, news))
        return out

    def forget(self, users: Iterable[str]) -> None:
        """Tell nothing more of these users, unless there is a snapshot first."""
        for user in users:
            self.told.pop(user, None)
            self.pending.pop(user, None)
            self.hidden.discard(user)


class Fanout:
    """Watched user → the sessions of this instance that watch."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[Watcher]] = {}

    def watch(self, watcher: Watcher, users: Iterable[str]) -> None:
        """Have the session told of these users' changes, from its next snapshot on."""
        for user in users:
            self._watchers.setdefault(user, set()).add(watcher)
            watcher.session.watched.add(user)

    def unwatch(self, watcher: Watcher, users: Collection[str]) -> None:
        """Tell the session nothing more of these users."""
        for user in users:
            watchers = self._watchers.get(user)
            if watchers is not None:
                watchers.discard(watcher)
                if not watchers:
                    del self._watchers[user]
            watcher.session.watched.discard(user)
        watcher.forget(users)

    def deliver(self, status: Status) -> None:
        """Have all who watch the user told."""
        for watcher in self._watchers.get(status.user, ()):
            watcher.offer(status)

    def watches(self, user: str) -> bool:
        """Return whether anybody watches the user."""
        return user in self._watchers

    def watched(self) -> list[str]:
        """Return the users who are watched."""
        return list(self._watchers)

    def watchers(self, user: str) -> set[str]:
        """Return the users whose sessions here watch the user."""
        return {watcher.session.user for watcher in self._watchers.get(user, ())}

    def told(self) -> Iterator[Status]:
        """Iterate over what sessions have been told of users, or are to be, with the newest version of each user."""
        for user, watchers in list(self._watchers.items()):
            known = (by_user.get(user) for watcher in watchers for by_user in (watcher.told, watcher.pending))
            told = [status for status in known if status and status.version]  # which the hidden have not
            if told:
                yield max(told, key=_version)
