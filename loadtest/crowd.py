"""A crowd of users on one engine. They act when it was intended, whatever the server does, and account is kept of it.

The crowd runs in the hub: nothing here blocks, and nothing waits for an answer before the next action.
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Generic, TypeVar

from loadtest.engine import Connection, Engine
from loadtest.ledger import EARLY, Ledger
from loadtest.metrics import Metrics
from loadtest.target import Target
from loadtest.workload import Action

DRAIN = 15.0
"""Seconds for which a planned stop keeps the sessions, so that their clients can return unnoticed."""
ROUNDED = 0.002
"""Seconds: servers keep leases in whole ms, so the end of one may be told by so much before we reckon with it."""
CONNECT_LIMIT = 30.0
"""Seconds after which a connection that is not there is given up, and counted as failed."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts to connect, at most; the first come sooner."""
_IDS = 1000  # that one frame may name
_SWEEP = 1.0  # s between two looks for connections that take too long
_BEHIND = 0.25  # s that an action may be behind its time before it counts as one that was not made
_JSON = {"content-type": "application/json"}
_HEARTBEAT = {"destination": "/app/heartbeat"}
_OFFLINE = {
    "lost": "PUSH offline-by-loss",
    "expiry": "PUSH offline-by-expiry",
    "shortened": "PUSH offline-by-expiry",  # what a planned stop or a loss left of the lease has ended
}
"""Metric of a change to offline, by what made it; of any other, PUSH offline."""


T = TypeVar("T")


class Schedule(Generic[T]):
    """What is to be done, each at its moment, and is not done yet. It is read as it is needed: it may have no end."""

    def __init__(self, moments: Iterator[tuple[float, T]]) -> None:
        """Begin.

        Args:
            moments: when (`time.monotonic`, s) and what, in order of time.
        """
        self._moments = moments
        self._read: deque[tuple[float, T]] = deque()

    def first(self) -> float | None:
        """When the next is due; None at the end."""
        if not self._read:
            self._read_on()
        return self._read[0][0] if self._read else None

    def pop(self) -> tuple[float, T]:
        """Take out the one that `first` spoke of."""
        return self._read.popleft()

    def overdue(self, now: float) -> int:
        """How many were to be done by now."""
        while (not self._read or self._read[-1][0] <= now) and self._read_on():
            pass
        return sum(when <= now for when, _ in self._read)

    def _read_on(self) -> bool:
        one = next(self._moments, None)
        if one is not None:
            self._read.append(one)
        return one is not None


class Refused(Exception):
    """No session came about."""


class TimedOut(Exception):
    """No session came about within `CONNECT_LIMIT`."""


class Closed(Exception):
    """A session ended that was to stay."""


class StompError(Exception):
    """The server answered with ERROR."""


class Session:
    """One user of the crowd. Moments are `time.monotonic()` seconds; 0.0: not yet."""

    __slots__ = (
        "beat_at", "beats_due", "conn", "intended", "lost_at", "muted", "number", "tries", "user", "visit", "wanted",
        "watch_from",
    )  # fmt: skip

    def __init__(self, number: int, user: str) -> None:
        self.number = number
        self.user = user
        self.conn: Connection | None = None
        self.visit = 0
        """Number of its session with the server: each CONNECTED begins another."""
        self.wanted = False
        """It is to be there. Whether it is, `is_open` says."""
        self.muted = False
        """It is to be silent: signed off, or frozen by the scenario."""
        self.tries = 0
        """Attempts to connect again, since it was connected last."""
        self.intended = 0.0
        """When it was to connect."""
        self.lost_at = 0.0
        """When it lost the connection that it is to have."""
        self.beat_at = 0.0
        """When the last beat was sent, or CONNECT: the lease counts from there, at the earliest."""
        self.beats_due: tuple[float, ...] = ()
        """When the beats whose receipts are awaited were intended; receipts come in the order of the beats."""
        self.watch_from = 0.0
        """When it asked for the watch that is not confirmed yet."""

    @property
    def is_open(self) -> bool:
        """CONNECTED has come, and nothing has ended the session since."""
        return self.conn is not None and self.conn.is_open


class Crowd:
    """The users of one process; the handler of their connections.

    What is timed, and from when:
        `WS connect`, `STOMP CONNECTED`: from when the user was to come, however often it was refused since. One that
        lost its connection is not the user's intention: each attempt counts from its own moment.
        `STOMP back`: from the loss of a connection to the next CONNECTED, with all pauses and attempts between.
        `PUSH ...`: from when the change that the notice is about was intended, or the lease ended.

    Args:
        users: Their ids.
        watches: For the number of a watcher, the numbers of those it watches.
        beat_receipts: Share of the heartbeats that ask for a receipt, 0 to 1.
        period: Longest time between two beats in s; when it may exceed the lease, users go offline in between.
        late: Seconds in which all is to be answered.
        sheltered: The server is restarted by the scenario: that it closes with 1001 and then refuses connections is
            counted, but is no failure, and what a session cannot do meanwhile was not intended.
    """

    def __init__(
        self,
        engine: Engine,
        target: Target,
        ledger: Ledger,
        metrics: Metrics,
        users: Sequence[str],
        watches: Mapping[int, Sequence[int]],
        *,
        addresses: Sequence[tuple[str, int]],
        beat_receipts: float = 0.1,
        period: float = 30.0,
        late: float = 5.0,
        sheltered: bool = False,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.target = target
        self.ledger = ledger
        self.metrics = metrics
        self.sessions = [Session(number, user) for number, user in enumerate(users)]
        self.by_user = {session.user: session for session in self.sessions}
        self.watches = watches
        self.counts: Counter[str] = Counter()
        """What was done, and what went wrong, by cause. Among them the actions that were `offered`, those of them that
        were `made`, and, apart, those that the server `prevented`: it refused the session or closed its connection.
        `begun` are the sessions that have dialled at all, `connects` is how often that was.
        `watches asked` and `beats unanswered` are those that the server had the time to answer.
        """
        self.quiet = False
        """No more comings and goings; only heartbeats."""
        self._addresses = addresses
        self._receipts = beat_receipts
        self._risky = period >= target.lease
        self._late = late
        self._sheltered = sheltered
        self._dice = random.Random(seed)
        self._beat = engine.prepare("SEND", _HEARTBEAT)
        self._beat_with_receipt = engine.prepare("SEND", {**_HEARTBEAT, "receipt": "b"})
        self._subscribe = engine.prepare("SUBSCRIBE", {"id": "0", "destination": "/user/queue/online-status"})
        self._schedules: list[Schedule[Any]] = []
        self._dialling: dict[Connection, float] = {}
        """Connection to the moment at which it is given up; in this order."""
        engine.at(engine.now() + _SWEEP, self._sweep)

    @property
    def present(self) -> int:
        """Sessions that are connected."""
        return sum(session.is_open for session in self.sessions)

    @property
    def unaware(self) -> int:
        """Sessions that wait to be told of those whom they watch."""
        return sum(session.watch_from > 0.0 for session in self.sessions)

    @property
    def wanted(self) -> int:
        """Sessions that are to be connected."""
        return sum(session.wanted for session in self.sessions)

    @property
    def coming(self) -> int:
        """Sessions that are being connected, at the first try and in time."""
        since = self.engine.now() - self._late
        return sum(conn.owner.tries == 0 and conn.owner.intended > since for conn in self._dialling)

    # What is intended.

    def follow(self, actions: Iterator[Action], start: float) -> None:
        """Does what a schedule says from `start` on."""
        self.keep_to(((start + action.at, action) for action in actions), self._act)

    def keep_to(self, moments: Iterator[tuple[float, T]], do: Callable[[T, float], None]) -> None:
        """Calls `do` with each thing and the moment that was intended. It is an action: `do` counts it, if it is made.

        Args:
            moments: in order of time. One waits at a time, so that there may be no end of them.
        """
        schedule = Schedule(moments)
        self._schedules.append(schedule)
        self._await(schedule, do)

    def _await(self, schedule: Schedule[T], do: Callable[[T, float], None]) -> None:
        when = schedule.first()
        if when is None:
            self._schedules.remove(schedule)
        else:
            self.engine.at(when, self._do_next, schedule, do)

    def _do_next(self, schedule: Schedule[T], do: Callable[[T, float], None]) -> None:
        intended, what = schedule.pop()
        self._await(schedule, do)
        do(what, intended)

    def tally(self) -> Counter[str]:
        """The counts of now. What should have been done by now, and is not, is among what was offered."""
        counts = self.counts.copy()
        before = self.engine.now() - _BEHIND
        counts["offered"] += sum(schedule.overdue(before) for schedule in self._schedules)
        return counts

    def _act(self, action: Action, intended: float) -> None:
        session = self.sessions[action.session]
        if action.kind == "beat":
            self.beat(session, intended)
        elif not self.quiet:
            if action.kind == "connect":
                self.connect(session, intended)
            else:
                self.leave(session, intended, self._dice.choices(("disconnect", "lost", "signed-off"), (7, 2, 1))[0])

    def connect(self, session: Session, intended: float) -> None:
        """The user comes. One whose last connect the server has not answered yet cannot."""
        if not session.wanted:
            session.lost_at, session.tries = 0.0, 0
        session.wanted, session.muted = True, False
        if session.conn is None:
            self.counts["offered"] += 1
            self._dial(session, intended)
            self.counts["made"] += session.conn is not None
        elif not session.is_open:
            self.counts["prevented"] += not self._sheltered

    def beat(self, session: Session, intended: float) -> None:
        """The user says that it is there; one whom the server keeps away cannot."""
        if not session.wanted or session.muted:
            return
        conn = session.conn
        if conn is None or not conn.is_open:
            # One that connects for the first time has nothing to keep; one that was refused or lost its connection has.
            self.counts["prevented"] += (conn is None or session.tries > 0) and not self._sheltered
            return
        self.counts["offered"] += 1
        now = self.engine.now()
        if self._dice.random() < self._receipts:
            session.beats_due += (intended,)
            self.counts["receipts asked"] += 1
            conn.send_prepared(self._beat_with_receipt)
        else:
            conn.send_prepared(self._beat)
        self.counts["made"] += 1
        session.beat_at = now
        self.ledger.beat(session.user, str(session.visit), now, intended)
        if self._risky:
            self._may_expire(session)

    def leave(self, session: Session, intended: float, how: str = "disconnect") -> None:
        """The user goes.

        Args:
            how: `disconnect`; `signed-off` and then closed; or `lost`, the TCP connection without a word.
        """
        session.wanted = False
        conn = session.conn
        if conn is None or not conn.is_open:
            return  # when CONNECTED comes, it will leave
        self.counts["offered"] += 1
        if how == "signed-off" and not session.muted:
            self.sign_off(session, intended)
        session.conn = conn.owner = None
        now = self.engine.now()
        self._count_unanswered(session, now - self._late)
        self.ledger.watcher_gone(session.user, now)
        if how == "lost":
            self._lost(session, now, intended)
        else:
            self.ledger.session_ended(session.user, str(session.visit), now, how, intended)
        if how == "disconnect":
            conn.close()
        else:
            conn.drop()
        self.counts["made"] += 1

    def sign_off(self, session: Session, intended: float) -> None:
        """The user says that it is offline, and stays connected."""
        if session.conn is None or not session.is_open or session.muted:
            return
        self.counts["offered"] += 1
        session.muted = True
        session.conn.send("SEND", {"destination": "/app/online-status", **_JSON}, '{"online": false}')
        self.counts["made"] += 1
        self.ledger.session_ended(session.user, str(session.visit), self.engine.now(), "signed-off", intended)

    def sign_on(self, session: Session, intended: float) -> None:
        """The user says that it is online again."""
        if session.conn is None or not session.is_open or not session.muted:
            return
        self.counts["offered"] += 1
        session.muted = False
        session.visit += 1
        session.beat_at = self.engine.now()
        session.conn.send("SEND", {"destination": "/app/online-status", **_JSON}, '{"online": true}')
        self.counts["made"] += 1
        self.ledger.session_opened(session.user, str(session.visit), session.beat_at, intended)
        if self._risky:
            self._may_expire(session)

    def mute(self, session: Session) -> None:
        """The user stops beating, its connection open: its lease will end."""
        if session.is_open and not session.muted:
            session.muted = True
            self._may_expire(session)

    def unmute(self, session: Session, intended: float) -> None:
        """The user beats again, now."""
        session.muted = False
        self.beat(session, intended)

    def stall(self, session: Session) -> None:
        """The user neither reads nor sends anything more: nobody can say what it has been told."""
        if session.conn is not None and session.is_open:
            session.muted = True
            session.conn.freeze()
            now = self.engine.now()
            self._count_unanswered(session, now - self._late)
            self.ledger.watcher_gone(session.user, now)

    def count_unanswered(self) -> None:
        """Counts what has been without an answer for too long; to be called once, at the end."""
        before = self.engine.now() - self._late
        for session in self.sessions:
            self._count_unanswered(session, before)

    def _count_unanswered(self, session: Session, before: float) -> None:
        """Counts what was asked before a moment and not answered; no more of it is awaited."""
        self.counts["beats unanswered"] += sum(due <= before for due in session.beats_due)
        self.counts["watches asked"] += 0.0 < session.watch_from <= before
        session.beats_due, session.watch_from = (), 0.0

    def _may_expire(self, session: Session) -> None:
        end = session.beat_at + self.target.lease
        self.ledger.session_ended(session.user, str(session.visit), end, "expiry")

    def _lost(self, session: Session, at: float, intended: float | None = None) -> None:
        if self.target.grace:
            self._shortened(session, at + self.target.grace)
        else:
            self.ledger.session_ended(session.user, str(session.visit), at, "lost", intended)

    def _shortened(self, session: Session, end: float) -> None:
        end = min(end, session.beat_at + self.target.lease)
        self.ledger.session_ended(session.user, str(session.visit), end, "shortened")

    # Connecting.

    def _dial(self, session: Session, intended: float) -> None:
        if session.conn is not None or not session.wanted or self.quiet:
            return
        self.counts["begun"] += not session.intended  # not so who tries again, or returns
        self.counts["connects"] += 1
        session.intended = intended
        number = session.number % len(self._addresses)
        path = self.target.instances[number].path
        dial = partial(self.engine.connect, self._addresses[number], path, self)
        token_in, token = self.target.token_in, partial(self.target.token, session.user)
        if token_in == "upgrade":  # noqa: S105
            conn = dial(token="", upgrade={"Authorization": f"Bearer {token()}"})
        elif token_in == "passcode":  # noqa: S105
            conn = dial(token="", connect={"login": session.user, "passcode": token()})
        else:
            conn = dial(token=token)
        conn.owner = session
        session.conn = conn
        now = self.engine.now()
        self._dialling[conn] = now + CONNECT_LIMIT
        self.ledger.connecting(session.user, now)

    def _redial(self, session: Session, at: float) -> None:
        """Tries again, ever more rarely, and at random: all who lost their connection shall not return together."""
        if not session.wanted or self.quiet:
            return
        when = at + self._dice.uniform(0.0, min(LONGEST_PAUSE, 2.0**session.tries))
        session.tries += 1
        self.counts["reconnects"] += 1
        self.engine.at(when, self._retry, session, when)

    def _retry(self, session: Session, when: float) -> None:
        self._dial(session, when if session.lost_at else session.intended)

    def _sweep(self) -> None:
        now = self.engine.now()
        for conn in [conn for conn, limit in self._dialling.items() if limit <= now]:
            conn.drop()
            self._failed(conn, TimedOut(f"not connected within {CONNECT_LIMIT:g} s"), now)
        self.engine.at(now + _SWEEP, self._sweep)

    def _failed(self, conn: Connection, error: Exception, at: float) -> None:
        del self._dialling[conn]
        session: Session = conn.owner
        session.conn = conn.owner = None
        self.ledger.connect_failed(session.user, at, conn.upgraded_at or None)
        self.counts["connect failures"] += 1
        self.counts[f"refused: {error}"] += 1
        if not self._sheltered:
            self.metrics.failed("STOMP CONNECTED" if conn.upgraded_at else "WS connect", error, at - session.intended)
        self._redial(session, at)

    # What the connections tell.

    def on_connected(self, conn: Connection, at: float) -> None:
        del self._dialling[conn]
        session: Session = conn.owner
        session.visit += 1
        session.tries = 0
        session.beat_at = conn.upgraded_at
        self.counts["connected"] += 1
        self.ledger.session_opened(session.user, str(session.visit), at, session.intended, conn.upgraded_at)
        self.metrics.record("WS connect", conn.upgraded_at - session.intended)
        self.metrics.record("STOMP CONNECTED", at - session.intended)
        if session.lost_at:
            self.metrics.record("STOMP back", at - session.lost_at)
            session.lost_at = 0.0
        if not session.wanted:
            return self.leave(session, at)
        if self._risky:
            self._may_expire(session)
        conn.send_prepared(self._subscribe)
        friends = [self.sessions[number].user for number in self.watches.get(session.number, ())]
        session.watch_from = at if friends else 0.0
        for start in range(0, len(friends), _IDS):
            last = start + _IDS >= len(friends)
            headers = {"destination": "/app/presence.subscribe", **_JSON} | ({"receipt": "w"} if last else {})
            conn.send("SEND", headers, json.dumps({"userIds": friends[start : start + _IDS]}))

    def on_receipt(self, conn: Connection, receipt_id: str, at: float) -> None:
        session: Session | None = conn.owner
        if session is None:
            return
        if receipt_id == "b":
            self.counts["receipts got"] += 1
            if session.beats_due:
                due, *later = session.beats_due
                session.beats_due = tuple(later)
                self.metrics.record("STOMP heartbeat", at - due)
        elif receipt_id == "w":
            if session.watch_from:
                self.counts["watches asked"] += 1
                self.counts["watches confirmed"] += 1
                self.metrics.record("STOMP watch", at - session.watch_from)
                session.watch_from = 0.0
            for number in self.watches[session.number]:
                self.ledger.watching(session.user, self.sessions[number].user, at)

    def on_message(self, conn: Connection, headers: Mapping[str, str], body: str, at: float) -> None:
        session: Session | None = conn.owner
        if session is None:
            return
        notice = json.loads(body)
        user, online, snapshot = notice["userId"], notice["online"], "snapshot" in notice
        self.counts["messages"] += 1
        edge = self.ledger.told(session.user, user, online, notice["version"], snapshot, at)
        if edge is None:
            return
        if edge.how != EARLY:
            name = "PUSH online" if online else _OFFLINE.get(edge.how, "PUSH offline")
            self.metrics.record(name, at - edge.intended, length=len(body))
        elif (of := self.by_user.get(user)) is None:
            return
        elif online and of.conn in self._dialling:
            # The watcher reads of it before the user itself reads CONNECTED.
            self.metrics.record("PUSH online", at - of.intended, length=len(body))
        elif not online and 0.0 <= of.beat_at + self.target.lease - at <= ROUNDED:
            self.metrics.record("PUSH offline-by-expiry", 0.0, length=len(body))

    def on_error(self, conn: Connection, message: str, at: float) -> None:
        self.counts[f"ERROR: {message}"] += 1
        self.metrics.failed("STOMP session", StompError(message))

    def on_closed(self, conn: Connection, code_or_reason: str, at: float) -> None:
        session: Session | None = conn.owner
        if session is None:
            return
        session.conn = conn.owner = None
        self.counts[f"closed: {code_or_reason}"] += 1
        self.ledger.watcher_gone(session.user, at)
        planned = self._sheltered and code_or_reason == "1001"
        self._count_unanswered(session, -inf if planned else inf)
        if code_or_reason == "1001":
            self._shortened(session, at + max(DRAIN, self.target.grace))
        elif code_or_reason.isdigit():
            self._lost(session, at)
        else:
            # The server was killed, as far as one can see from here: then it is the lease that ends the session.
            self._may_expire(session)
        if not planned:
            self.metrics.failed("STOMP session", Closed(code_or_reason))
        session.muted = False
        session.lost_at = at
        self._redial(session, at)

    def on_refused(self, conn: Connection, reason: str, at: float) -> None:
        self._failed(conn, Refused(reason), at)
