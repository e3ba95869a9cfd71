"""Who had to be told of which change of status, and what they were told. Pure: no clock, no I/O.

The truth is made by the harness itself: it knows when it connected, beat and left. Each edge of a user's truth is due
at everyone who watches the user then. It is *received* as itself, *cancelled* by a later opposite edge or replaced by a
newer one before it could be told, or *missing*; these three make up *expected*.

An edge costs no more for a user with many watchers: it is written once to the user's log, and a watcher's place in the
log moves on when it is told something. Watchers who know the same share one object, so that a pair of watcher and user
costs little more than its entry in a dict.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf
from sys import intern
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self

from loadtest.metrics import Histogram

_KINDS = {"signed-off": "disconnect"}  # both end a session at once, and are one number in the report
_DATED_AHEAD = frozenset({"expiry", "shortened"})  # a lease ends without anyone doing anything: it is told beforehand
_EARLY_OFFLINE = 1.0
"""Seconds that "offline" may come before the harness has noticed the loss itself. "online" has `late`: under load the
answer to the CONNECT may wait behind others while the watchers have long been told."""
_EARLY_EXPIRY = 0.002
"""The same where a lease is what ended: that is dated, not noticed, and servers keep leases in whole ms."""
_UNDER_WAY = 1.0
"""Seconds that notices of several quick changes may be under way when a watch is confirmed. And in which a server may
take two of them for none: who is not slow to read may be spared a change that was soon taken back, not every one."""
_SPARED = 10
"""Changes of which a watcher may be told nothing at all, one after the other: a server that tells of none forgot it."""
EARLY = "early"
"""The kind of an edge that a notice told before the harness itself knew of it."""
_AWAITED = 60.0
"""Seconds for which what is late may still come, while the run goes on: until then it is not missing."""
_LOG = 64
"""Edges of one user that are kept before those that nobody waits for are dropped."""


@dataclass(slots=True)
class LedgerResult:
    """What came of it; the results of several workers, or of several steps, add up."""

    expected: int = 0
    """Edges times watchers: received + missing + cancelled."""
    received: int = 0
    late: int = 0
    """Of the received: more than `late` seconds after the edge. And what came after all, when it had been given up."""
    missing: int = 0
    duplicated: int = 0
    """Notices that did not turn the state round."""
    out_of_order: int = 0
    """Notices with a version below the one before."""
    unexpected: int = 0
    """Told a state that the truth did not have, or of a user that is not watched."""
    cancelled: int = 0
    ghost_seconds: float = 0.0
    """Shown online while the truth was offline; over all pairs of watcher and user."""
    false_offline_seconds: float = 0.0
    """Shown offline while the truth was online; over all pairs. Not while a notice of coming was on its way."""
    checked: int = 0
    """States from REST that were compared with the truth."""
    contradicted: int = 0
    """Of these: neither true when asked nor when answered, nor "online" of who has read CONNECTED within `late`."""
    notice: dict[str, Histogram] = field(default_factory=dict)
    """Time to notice in µs from when the change was intended; by `connect`, `revived`, `disconnect`, `lost`, `expiry`,
    `shortened`."""

    def __add__(self, other: LedgerResult) -> LedgerResult:
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "notice"}
        kinds = sorted({*self.notice, *other.notice})
        nothing = Histogram()
        notice = {kind: self.notice.get(kind, nothing) + other.notice.get(kind, nothing) for kind in kinds}
        return LedgerResult(**numbers, notice=notice)

    def to_dict(self) -> dict[str, Any]:
        """JSON's own types; the histograms encoded."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "notice"}
        return numbers | {"notice": {kind: histogram.encode() for kind, histogram in sorted(self.notice.items())}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The result back from `to_dict`."""
        notice = {kind: Histogram.decode(text) for kind, text in data["notice"].items()}
        return cls(**{**data, "notice": notice})


class Edge(NamedTuple):
    """A change of a user's status."""

    at: float
    """When it was made, as far as the harness knows; s."""
    online: bool
    how: str
    """What made it: a kind of `LedgerResult.notice`, `signed-off`, or `EARLY`."""
    intended: float
    """When it was to be made: latencies of an open schedule count from there; s."""
    asked: float = inf
    """When the CONNECT of which it comes was sent: since then the server may have told of it; s."""


class _Pair(NamedTuple):
    """What one watcher knows of one user. Never changed, so that watchers who know the same share it."""

    next: int
    """Number of the first edge that is not settled here."""
    online: bool
    version: int
    since: float = 0.0
    """From when a wrong state counts, when it is wrong already; s."""
    early: bool = False
    """The state is ahead of the truth: an edge must follow soon, or it was none."""
    owed: bool = False
    """The last edge was judged missing: what says it after all is late."""
    untold: int = 0
    """Settled edges that were made since the watcher was told anything."""
    silent: float = 0.0
    """When the first of these was made, or, while there is none, the last word came; s."""
    excused: bool = False
    """The state is ahead of the truth for a client that gave up before it had read CONNECTED."""
    about: float = -inf
    """When the edge was made of which the watcher was told last, as is believed, and others followed; s."""

    @property
    def word(self) -> float:
        """When the last word came, where that is known; s."""
        return -inf if self.untold else self.silent

    @property
    def delay(self) -> float:
        """How long after its edge the last word came, where that is known; s."""
        return max(0.0, self.word - self.about) if self.about > -inf else 0.0


_NEW: Final = _Pair(0, online=False, version=-1)
_NOBODY: Final[Mapping[str, _Pair]] = MappingProxyType({})
_NO_VERSIONS: Final[Mapping[int, int]] = MappingProxyType({})
_NEVER: Final = (inf, -inf)


class _User:
    __slots__ = (
        "base",
        "changed",
        "connecting",
        "edges",
        "end",
        "gave_up",
        "heard",
        "sessions",
        "shared",
        "versions",
        "watchers",
    )

    def __init__(self) -> None:
        self.connecting = inf
        """Since when a session connects, which may be made any moment; s."""
        self.gave_up = _NEVER
        """From when to when a CONNECT was sent that was given up before its answer was read; s."""
        self.sessions: dict[str, float | None] = {}
        """Session to the end of its lease, where that is known; s. One that is past may still be revived."""
        self.heard = False
        self.changed = -inf
        """When `heard` changed last; s."""
        self.edges: list[Edge] = []
        self.base = 0
        """Number of the first edge that is kept."""
        self.end = 0
        """Number of the next edge."""
        self.watchers: Mapping[str, _Pair] = _NOBODY
        self.shared = _NEW
        self.versions: Mapping[int, int] = _NO_VERSIONS
        """Version to the number of the edge that it is believed to be of: a change has the same for all watchers. Of a
        notice that came early it is the next edge.
        That of the first edge is left out: no older one is there to be confused with it."""

    def keep(self, watcher: str, pair: _Pair) -> None:
        if pair.next == self.end and pair.online == self.heard:
            silent = pair.silent if pair.untold else 0.0
            pair = _Pair(pair.next, pair.online, pair.version, untold=pair.untold, silent=silent)
        if pair != self.shared:
            self.shared = pair
        if not isinstance(self.watchers, dict):
            self.watchers = {}  # a dict for each of thousands whom nobody watches is too large
        self.watchers[watcher] = self.shared

    def believe(self, version: int, n: int) -> None:
        """The first belief stays: when the first watcher was told, there were the fewest edges to choose from."""
        if n > self.base and version not in self.versions:
            if not isinstance(self.versions, dict):
                self.versions = {}
            self.versions[version] = n

    def forget(self, upto: int) -> None:
        """Drops the edges before the one of this number."""
        del self.edges[: upto - self.base]
        self.base = upto
        self.versions = {version: n for version, n in self.versions.items() if n > upto} or _NO_VERSIONS

    def drop(self, watcher: str) -> _Pair | None:
        return self.watchers.pop(watcher, None) if isinstance(self.watchers, dict) else None


class Ledger:
    """The truth, and who was told what.

    Times are `time.monotonic()` seconds. Calls come in the order in which things happened to the harness; a moment may
    lie a little before the one of the call before. Only the end of a lease may lie ahead.

    Args:
        late: Seconds after which a notice that came is late.
    """

    def __init__(self, *, late: float = 5.0) -> None:
        self._late = late
        self._users: dict[str, _User] = {}
        self._watched: dict[str, list[str]] = {}
        self._snapshots: dict[str, dict[str, tuple[bool, int]]] = {}
        """Watcher to user to `(online, version)`: told before the receipt that confirms the watch."""
        self._ends: list[tuple[float, str, str, str]] = []
        """Heap of `(at, user, session, how)`; one that no longer holds is passed over."""
        self._ahead: dict[str, list[float]] = {}
        """User to when REST said "online" of it and the truth did not: it may have been ahead of CONNECTED."""
        self._unsettled: set[str] = set()
        self._result = LedgerResult()

    # The truth.

    def connecting(self, user: str, at: float) -> None:
        """A session begins to connect: from its CONNECT on the server may have it before the answer is read."""
        self._pass_to(at)
        record = self._user(user)
        record.connecting = min(record.connecting, at)

    def connect_failed(self, user: str, at: float, asked: float | None = None) -> None:
        """No answer to the CONNECT was read, and none will be: the server may have had the session, and told of it.

        Args:
            asked: When the CONNECT was sent; None: it was not.
        """
        self._pass_to(at)
        record = self._user(user)
        record.connecting = inf
        if asked is not None:
            before, till = record.gave_up
            record.gave_up = (before if asked <= till + self._late else asked, at)

    def session_opened(
        self, user: str, session: str, at: float, intended: float | None = None, asked: float = inf
    ) -> None:
        """CONNECTED was read, or a session that had signed off says it is online again.

        Args:
            intended: When it was to be, if not `at`; likewise below.
            asked: When the CONNECT was sent.
        """
        self._pass_to(at)
        record = self._user(user)
        record.connecting = inf
        record.sessions[intern(session)] = None  # of thousands it is the first
        self._edge(user, record, at, "connect", intended, asked)

    def session_ended(self, user: str, session: str, at: float, how: str, intended: float | None = None) -> None:
        """The session is over.

        Args:
            how: `disconnect`, `signed-off`, `lost` (TCP); `expiry`, with `at` = last beat + lease; or `shortened`, with
                `at` = the end of the lease that a planned stop left to it (the drain), or a lost connection (the
                grace). These two may lie ahead, and a beat or a new session undoes them till then.
        """
        self._pass_to(at if how not in _DATED_AHEAD else -inf)
        record = self._user(user)
        if session not in record.sessions:
            return
        if how in _DATED_AHEAD:
            rest = record.sessions[session]
            if rest is not None and rest <= at:
                return  # a lease grows by beats alone
            record.sessions[session] = at
            heapq.heappush(self._ends, (at, user, session, how))
        else:
            del record.sessions[session]
            self._edge(user, record, at, how, intended)

    def beat(self, user: str, session: str, at: float, intended: float | None = None) -> None:
        """A heartbeat was sent. It keeps a lease, or revives the session when the lease is over."""
        self._pass_to(at)
        record = self._user(user)
        if record.sessions.get(session) is None:
            return  # nothing of this lease's end is known; or the session has ended for good
        record.sessions[session] = None
        self._edge(user, record, at, "revived", intended)

    def is_online(self, user: str) -> bool:
        """The truth, as far as it is known."""
        return user in self._users and self._users[user].heard

    def checked(self, user: str, online: bool, asked: float, at: float) -> None:
        """REST said so at `at`, asked at `asked`: right if the truth had this state in between."""
        self._pass_to(at)
        record = self._user(user)
        self._result.checked += 1
        if record.heard == online or record.changed >= asked - _EARLY_OFFLINE:
            return
        if online:
            self._ahead.setdefault(user, []).append(at)
        else:
            self._result.contradicted += 1

    # Watching.

    def watching(self, watcher: str, user: str, at: float, online: bool | None = None) -> None:
        """The receipt of the watch came: from now on changes are due.

        Args:
            online: The snapshot's state. What `told` heard of this user since then is newer, and goes first.
        """
        self._pass_to(at)
        record = self._user(user)
        known = self._snapshots.get(watcher, {}).pop(user, None)
        if watcher in record.watchers:
            return
        state, version = known or (record.heard if online is None else online, -1)
        self._watched.setdefault(watcher, []).append(user)
        first = self._first_after(record, state, at)
        if version > 0:
            # What the snapshot reflects is not to be told again.
            first = max(first, min(record.versions.get(version, -1) + 1, record.end))
        early = first == record.end and state != record.heard
        # Whatever the snapshot is about, nothing from before it was to be told.
        record.keep(watcher, _Pair(first, state, version, at, early, silent=at, about=inf))
        if early or first < record.end:
            self._unsettled.add(user)

    def watcher_gone(self, watcher: str, at: float) -> None:
        """The watcher's connection is over. What it could still have been told in time was never due."""
        self._pass_to(at)
        self._snapshots.pop(watcher, None)
        for user in self._watched.pop(watcher, ()):
            self._drop(watcher, user, at)

    def told(self, watcher: str, user: str, online: bool, version: int, snapshot: bool, at: float) -> Edge | None:
        """A MESSAGE came; snapshots are told here too, also those before the receipt of the watch.

        Returns:
            The edge that the notice was about: the oldest it may be that is not late; one of kind `EARLY` when the
            harness does not know of it yet. None when it was about none (a duplicate, a state that was not so, one that
            was put right), or is a snapshot.
        """
        self._pass_to(at)
        record = self._user(user)
        pair = record.watchers.get(watcher)
        if pair is None:
            known = self._snapshots.get(watcher, {}).get(user)
            if not snapshot and (known is None or known[0] == online):
                self._result.unexpected += known is None
                self._result.duplicated += known is not None
                return None
            self._snapshots.setdefault(watcher, {})[user] = (online, version)
            # What changed between the snapshot and the receipt is not due yet: of it nothing is known.
            return None
        if version <= pair.version and not (snapshot and version == 0 < pair.version):
            if version < pair.version:
                self._result.out_of_order += 1
            elif online != pair.online:
                self._result.unexpected += 1
            else:
                self._result.duplicated += not snapshot
            return None
        self._unsettled.add(user)
        pair = self._resolved(record, pair, at, inf)
        self._count_wrong(record, pair, at)
        pair = self._judge(record, pair, self._first_to_come(record, pair, at))
        pair, about = self._after(record, pair, online, version, snapshot, at)
        record.keep(watcher, pair)
        return None if snapshot else about

    # The result.

    def take(self, at: float, *, last: bool = False) -> LedgerResult:
        """What came of it since the last time; begins anew.

        What may still come is judged next time. A notice that comes after it was judged missing counts as late, too.

        Args:
            last: Nothing more is awaited, save for what is not late yet: of that nothing can be said.
        """
        return self._settle_all(at, at - (self._late if last else max(self._late, _AWAITED)))

    def close(self, at: float) -> LedgerResult:
        """The same for good: whatever has not come is missing. Wait for `late` seconds without a change before."""
        return self._settle_all(at, inf)

    def _settle_all(self, at: float, before: float) -> LedgerResult:
        self._pass_to(at)
        unsettled, self._unsettled = self._unsettled, set()
        for user in unsettled:
            self._settle_user(user, self._users[user], at, before)
        for user in list(self._ahead):
            self._settle_ahead(user, max(before, at - self._late))
        result, self._result = self._result, LedgerResult()
        return result

    def _settle_ahead(self, user: str, before: float) -> None:
        """Judges what REST said of a user before `before`; of what it said since, the CONNECTED may still be read."""
        said, record = self._ahead.pop(user), self._user(user)
        later = [at for at in said if at > before or record.connecting <= at]
        self._result.contradicted += sum(not self._is_excused(record, at) for at in said if at not in later)
        if later:
            self._ahead[user] = later

    def _settle_user(self, user: str, record: _User, at: float, before: float) -> None:
        for watcher, pair in record.watchers.items():
            if pair.next == record.end and pair.online == record.heard:
                continue
            settled = self._settled(record, pair, at, before)
            record.keep(watcher, settled)
            if settled.next < record.end or settled.online != record.heard:
                self._unsettled.add(user)
        done = min((pair.next for pair in record.watchers.values()), default=record.end)
        # The last one stays, for who is told of it after all. What is young stays: notices of it may be under way to
        # someone whose watch is confirmed only now.
        done = min(done, record.end - bool(record.watchers))
        while done > record.base and record.edges[done - 1 - record.base].at > at - self._late:
            done -= 1
        if done > record.base:
            record.forget(done)
        if record.end - bool(record.watchers) > record.base:
            self._unsettled.add(user)

    def _first_after(self, record: _User, state: bool, at: float) -> int:
        """The first edge that a snapshot of `state`, confirmed at `at`, may have been made before."""
        first = record.end
        for n in range(record.end - 1, record.base - 1, -1):
            edge = record.edges[n - record.base]
            if at - edge.at > (self._late if n == record.end - 1 else _UNDER_WAY):
                break
            if edge.online != state:
                first = n
        return first

    def _settled(self, record: _User, pair: _Pair, at: float, before: float) -> _Pair:
        pair = self._resolved(record, pair, at, max(before, at - self._late))
        if pair.early:
            return pair
        self._count_wrong(record, pair, at)
        upto = pair.next
        while upto < record.end and record.edges[upto - record.base].at <= before:
            upto += 1
        if pair.next < upto and before < inf:
            edge = record.edges[upto - 1 - record.base]
            back = record.edges[upto - record.base].at if upto < record.end else inf
            soon = back - edge.at <= _UNDER_WAY or self._is_unsure(pair, edge, min(back, at))
            if edge.online != pair.online and soon:
                upto -= 1  # the two are judged together
        return self._judge(record, pair, upto)._replace(since=at, owed=pair.owed or pair.next < upto)

    def _first_to_come(self, record: _User, pair: _Pair, at: float) -> int:
        """The first edge that may still be told, after those from before the last word that soon took each other back.

        What did not come soon after that word will not come. Of slower ones it may: then the server is behind.
        """
        n = pair.next
        word = max(at - self._late, pair.word)
        while n + 1 < record.end and word < at - _UNDER_WAY - pair.delay:
            edge, opposite = record.edges[n - record.base : n + 2 - record.base]
            if opposite.at >= min(word, edge.at + _UNDER_WAY):
                break
            n += 2
        return n

    def _after(
        self, record: _User, pair: _Pair, online: bool, version: int, snapshot: bool, at: float
    ) -> tuple[_Pair, Edge | None]:
        """The pair after a state with a new version was told, and the edge that it is about, if any."""
        same = [n for n in range(pair.next, record.end) if record.edges[n - record.base].online == online]
        if same:
            # The oldest that is not late: older ones were replaced. If all are late the server is, and tells in order;
            # so it is if it was a moment ago.
            behind = pair.delay > self._late >= at - pair.word
            n = next((n for n in same if behind or at - record.edges[n - record.base].at <= self._late), same[0])
            n = self._by_version(record, n, version)
            record.believe(version, n)
            self._judge(record, pair, n)
            edge = record.edges[n - record.base]
            self._receive(edge, at)
            return _Pair(n + 1, online, version, at, silent=at, about=edge.at), edge
        if online == pair.online and (snapshot or (online == record.heard and pair.next == record.end)):
            self._result.duplicated += not snapshot
            return pair._replace(version=version, since=at, untold=0, silent=at), None
        # Edges that led away from the state just told were passed over, or this state is false.
        self._judge(record, pair, record.end)
        if online == record.heard:
            self._result.late += not (snapshot or pair.early or pair.excused)
            about = record.edges[-1] if pair.owed and record.edges else None
            if about is not None and not snapshot:
                self._time(about, at)
            return _Pair(record.end, online, version), about
        record.believe(version, record.end)
        return _Pair(record.end, online, version, at, early=True), Edge(at, online, EARLY, at)

    def _by_version(self, record: _User, n: int, version: int) -> int:
        """The edge of which others were told with this version; `n` if that is not a later one of the same kind.

        What others were told of may be a wrong guess: it is not followed if that would call an edge missing.
        """
        believed = record.versions.get(version, -1)
        if not n < believed < record.end:
            return n
        skipped = record.edges[n - record.base : believed - record.base]
        if len(skipped) % 2:
            return n
        spared = all(back.at - edge.at <= _UNDER_WAY for edge, back in zip(skipped[::2], skipped[1::2], strict=True))
        return believed if spared else n

    def _resolved(self, record: _User, pair: _Pair, at: float, before: float) -> _Pair:
        """The pair once it is known whether an early notice had its edge; what is younger than `before` can wait."""
        if not pair.early:
            return pair
        if pair.next < record.end:
            edge = record.edges[pair.next - record.base]
            early = _EARLY_EXPIRY if edge.how == "expiry" else _EARLY_OFFLINE
            allowed = self._late if pair.online else early
            if edge.online == pair.online and (edge.at - pair.since <= allowed or edge.asked <= pair.since):
                self._receive(edge, pair.since)
                return _Pair(pair.next + 1, pair.online, pair.version, edge.at)
        elif pair.since > before or (pair.online and record.connecting <= pair.since):
            return pair
        excused = self._is_excused(record, pair.since)
        self._result.unexpected += not excused
        return pair._replace(early=False, excused=excused)

    def _is_excused(self, record: _User, at: float) -> bool:
        """What was said then may have been of a session whose client had given up."""
        asked, till = record.gave_up
        return asked <= at <= till + self._late

    def _judge(self, record: _User, pair: _Pair, upto: int) -> _Pair:
        """Settles the edges from the pair's next up to `upto`, none of which was told; returns the pair after them."""
        if pair.next >= upto:
            return pair
        edges = record.edges[pair.next - record.base : upto - record.base]
        untold, silent = pair.untold, pair.silent
        for i, edge in enumerate(edges):
            back = edges[i + 1].at if i + 1 < len(edges) else inf
            # A burst may be told as what it comes to; ten changes and more that take longer are no burst.
            forgotten = untold >= _SPARED and edge.at - silent > _UNDER_WAY
            spared = (back - edge.at <= _UNDER_WAY and not forgotten) or (i == 0 and self._is_unsure(pair, edge, back))
            if edge.at > silent:
                silent = silent if untold else edge.at
                untold += 1
            # An edge back to what the watcher is shown needs no telling; one away from it must be taken back soon.
            if edge.online == pair.online or spared:
                self._result.cancelled += 1
            else:
                self._result.missing += 1
            self._result.expected += 1
        return pair._replace(next=upto, untold=untold, silent=silent)

    def _is_unsure(self, pair: _Pair, edge: Edge, back: float) -> bool:
        """The last word may have been about the way `back` from `edge`: just made then, or not known here yet.

        Then what it was taken to be about went untold with `edge`, which soon took it back.
        """
        untold = pair.untold == 0 and edge.at - pair.about <= _UNDER_WAY
        return untold and edge.at < pair.silent and back - pair.silent <= self._late

    def _receive(self, edge: Edge, at: float) -> None:
        self._result.expected += 1
        self._result.received += 1
        self._result.late += at - edge.at > self._late
        self._time(edge, at)

    def _time(self, edge: Edge, at: float) -> None:
        kind = _KINDS.get(edge.how, edge.how)
        histogram = self._result.notice.get(kind)
        if histogram is None:
            histogram = self._result.notice[kind] = Histogram()
        histogram.record(max(0.0, at - edge.intended) * 1e6)

    def _count_wrong(self, record: _User, pair: _Pair, at: float) -> None:
        """Adds the time up to `at` for which the pair showed what was not so."""
        if pair.early:
            return  # whether it is wrong is still to be seen
        edges = record.edges[pair.next - record.base :]
        truth, since = (not edges[0].online if edges else record.heard), pair.since
        if pair.excused:
            since = max(since, record.gave_up[1] + self._late)
        wrong = 0.0
        for edge in edges:
            if truth != pair.online:
                wrong += max(0.0, edge.at - since)
            # That somebody came is on its way until it is late: nobody is falsely offline meanwhile.
            truth, since = edge.online, max(since, edge.at + (self._late if edge.online and not pair.online else 0.0))
        if truth != pair.online:
            wrong += max(0.0, at - since)
        if pair.online:
            self._result.ghost_seconds += wrong
        else:
            self._result.false_offline_seconds += wrong

    def _drop(self, watcher: str, user: str, at: float) -> None:
        record = self._users[user]
        pair = record.drop(watcher)
        if pair is not None and (pair.next < record.end or pair.online != record.heard):
            self._settled(record, pair, at, at - self._late)

    def _edge(
        self, user: str, record: _User, at: float, how: str, intended: float | None = None, asked: float = inf
    ) -> None:
        online = any(end is None or end > at for end in record.sessions.values())
        if online == record.heard:
            return
        record.heard, record.changed = online, at
        if online and user in self._ahead:
            # A beat is known here before it is known to the server.
            self._settle_ahead(user, min(at - self._late, asked) if how == "connect" else inf)
            self._ahead.pop(user, None)  # the rest was right
        record.edges.append(Edge(at, online, how, at if intended is None else intended, asked))
        record.end += 1
        self._unsettled.add(user)
        if len(record.edges) >= _LOG:
            self._settle_user(user, record, at, at - self._late)

    def _pass_to(self, at: float) -> None:
        """Ends the leases that are over by `at`."""
        while self._ends and self._ends[0][0] <= at:
            end, user, session, how = heapq.heappop(self._ends)
            record = self._users[user]
            if record.sessions.get(session) != end:
                continue  # a beat kept it, or it ended otherwise
            if how != "expiry":
                del record.sessions[session]  # its connection is gone: nothing revives it
            self._edge(user, record, end, how)

    def _user(self, user: str) -> _User:
        record = self._users.get(user)
        if record is None:
            record = self._users[user] = _User()
        return record
