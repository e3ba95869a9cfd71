"""What must be true of a run, decided from its history alone (`history`). No I/O and no clock.

Rules, by the names that findings bear:

- ``order``: per watcher, subscription and user the first MESSAGE is a snapshot, and versions never fall; version 0
  stands outside the order.
- ``repeated``: a MESSAGE without ``snapshot`` turns round what was told last on that subscription, with a higher
  version.
- ``unanswered``: a watch is answered within `DELIVERY`, and what was broken on its way; before the answer each user's
  snapshot has come.
- ``invented``: what is told of a version is what the stream, or the log, holds of it.
- ``missed``: each change reached every watcher who was connected throughout, as itself, as a newer one, or cancelled by
  a later opposite one: within `DELIVERY`, and what was broken on its way.
- ``last word``: at the end each watcher was told the truth last.
- ``false offline``: no offline for a user with a session whose beats an instance could take: neither a change, nor a
  snapshot or an answer over REST about somebody who has been there since it was asked for, nor a later snapshot once
  they have been there for longer than a change may take.
- ``ghost``: nobody is online for longer than lease + outage + amnesty + 250 ms after the last sign of life, whether or
  not they come back, nor does REST say so; after an end that an instance could see, the lease is no excuse.
- ``log``: Kafka's log holds each change once or more, and no other, in rising order per key after dropping repeats.
- ``kept``: every history store keeps each change, and no other.
- ``row``, ``rest``, ``store``: these say the truth at the end; every history store and every instance of everybody.

Where the truth is out of reach, the rules say so, and cover no more:

- An instance that is killed takes no beat from a moment before (`FLIGHT`) that has no receipt. One that is stopped as
  planned takes none from then on, and leaves the rest of the lease, the drain time at most. One that is frozen takes
  them when it goes on: so a user whose beats all went to an instance frozen for longer than a lease may be shown
  offline, until it has gone on.
- A store that lost its data has lost the changes of the last moment (`UNREAD`), those that waited in it for Kafka or a
  history store, and the sessions of an instance that was killed before it could assert them again. One that failed over
  to a replica has lost what was written in the last moment.
- Whoever brings the changes to Kafka may have been the instance that is killed, stopped or frozen: until another takes
  over (`Setup.takeover`) they are late. That Kafka is back, the next try notices (`Setup.retry`).
- While the clients themselves were stalled (a loaded machine) they could read nothing.
- What takes the store's place may have a clock that is behind (`Setup.behind`); until that has come to the last version
  of before, it does not say when a change was made, but the look at the stream in which it was met.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from tests.fleet.history import EVENTS, Event, History

SWEEP = 0.25
"""By then a lease that is over has ended its session, s."""
SLACK = 2.0
"""Room for a loaded machine, s."""
DELIVERY = SWEEP + SLACK
"""By then a change is told, s."""
FLIGHT = 1.0
"""By then a frame that was sent to an instance at work has had its effect, s."""
UNREAD = 0.5
"""A change may be lost with the store's data if it was made so shortly before, s."""
EXACT = 0.02
"""How well the record's clock and the store's go together, s."""
TICK = 1e-6
"""Just before, s."""

SERVICES = {"redis", "kafka", "cassandra"}
CLEAN = {"left", "closed", "died", "off"}
"""Ends that an instance at work sees at once."""


@dataclass(frozen=True)
class Finding:
    """A rule was broken."""

    rule: str
    user: str
    watcher: str
    at: float
    says: str
    lines: tuple[int, ...]
    """Lines of the history's file that show it."""

    def __str__(self) -> str:
        whom = f"{self.user} to {self.watcher}" if self.watcher else self.user
        return f"{self.rule}: {whom} at {self.at:.3f}: {self.says}; lines {', '.join(map(str, self.lines))}"


@dataclass
class Report:
    """What the checker found; all times in s."""

    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How many events of each kind there were."""
    longest_ghost: float = 0.0
    """How long somebody was online after the last session had ended, or its lease was over."""
    slowest: float = 0.0
    """How long a change took to the watcher who was told of it last."""
    recovery: float = 0.0
    """After the mend, how long until every instance was sure again, and the last change made before was told."""

    def of(self, *rules: str) -> int:
        """How many findings the rules have."""
        return sum(finding.rule in rules for finding in self.findings)


@dataclass(frozen=True)
class Outage:
    """Something cannot be reached."""

    on: str
    how: str
    since: float
    till: float

    def meets(self, since: float, till: float) -> bool:
        return self.since <= till and since <= self.till


@dataclass
class Span:
    """A session from CONNECT, or a sign-on, to its end or a sign-off."""

    session: str
    user: str
    instance: str
    begun: float
    line: int
    sent: list[float] = field(default_factory=list)
    """When what renews the lease was sent."""
    taken: list[float] = field(default_factory=list)
    """For each, when its receipt came; inf: never, or none was asked for."""
    signed_on: bool = False
    """It began with a sign-on, and not with CONNECT."""
    ended: float = inf
    how: str = ""
    end_line: int = 0


@dataclass(frozen=True)
class Change:
    """A change in the store's stream."""

    made: float
    since: float
    """It was not made before: earlier than `made` where the store's clock cannot tell."""
    online: bool
    version: int
    line: int


@dataclass
class Ask:
    """A watch that a session has asked for."""

    session: str
    instance: str
    users: tuple[str, ...]
    at: float
    line: int
    answered: float = inf
    till: float = inf
    """When the connection ended, or the session wanted it no more."""


@dataclass
class Watch:
    """A user watched by a session through a subscription."""

    session: str
    instance: str
    subscription: str
    user: str
    asked: float = -inf
    """From then on the first snapshot can have been read; -inf: nobody asked for it."""
    since: float = inf
    """From then on (a receipt) all changes are to be told."""
    till: float = inf
    told: list[tuple[float, Event, int]] = field(default_factory=list)


def check(history: History) -> Report:
    """Hold the history against all rules."""
    return _Check(history).run()


class _Record:
    """The history in the terms of the rules: sessions and changes by user, watches, outages, what was said last."""

    def __init__(self, history: History) -> None:
        self.setup = history.setup
        self.counts: dict[str, int] = defaultdict(int)
        self.spans: dict[str, list[Span]] = defaultdict(list)  # by user
        self.changes: dict[str, list[Change]] = defaultdict(list)  # by user, in the order of versions
        self.watches: list[Watch] = []
        self.asks: list[Ask] = []
        self.silent: list[tuple[Watch, float, int]] = []  # at the answer nothing had been told
        self.outages: list[Outage] = []
        self.amnesties: list[Outage] = []
        self.stalls: list[Outage] = []
        self.polls: list[tuple[Event, int]] = []
        self.recovered = 0.0
        self.final: dict[str, list[tuple[Event, int]]] = defaultdict(list)  # store, rest, row, kept, log
        self.end = history.events[-1].at if history.events else 0.0
        self.is_ended = False
        self._behind = 0.0  # the store's clock, by now
        self._current: dict[str, Span] = {}  # by session, while it is neither ended nor signed off
        self._first: dict[str, Span] = {}
        self._asked: dict[tuple[str, int], tuple[Span, int]] = {}
        self._watches: dict[str, dict[tuple[str, str], Watch]] = defaultdict(dict)
        self._asks: dict[str, list[Ask]] = defaultdict(list)  # by session, while they have no answer
        self._subscriptions: dict[str, dict[str, float]] = defaultdict(dict)  # and since when
        self._wanted: dict[tuple[str, str], float] = {}  # by session and user, since when
        self._faults: dict[str, Event] = {}
        self._readers = {what: getattr(self, f"_{what}") for what in EVENTS}
        for line, event in enumerate(history.events, 2):
            self.counts[event.what] += 1
            self._readers[event.what](event, line)
        self.outages += [Outage(on, begun.how, begun.at, inf) for on, begun in self._faults.items()]
        for changes in self.changes.values():
            changes.sort(key=lambda change: change.version)

    # Sessions

    def _begin(self, event: Event, user: str, instance: str, line: int) -> Span:
        span = Span(event.session, user, instance, event.at, line, [event.at], [inf])
        self._current[event.session] = span
        self.spans[user].append(span)
        return span

    def _connecting(self, event: Event, line: int) -> None:
        self._first[event.session] = self._begin(event, event.user, event.instance, line)

    def _connected(self, event: Event, line: int) -> None:
        self._current[event.session].taken[0] = event.at

    def _beat(self, event: Event, line: int) -> None:
        span = self._current.get(event.session)
        if span is not None:  # after a sign-off it changes nothing
            span.sent.append(event.at)
            span.taken.append(inf)
            self._asked[event.session, event.ref] = span, len(span.sent) - 1

    def _on(self, event: Event, line: int) -> None:
        if event.session in self._current:
            return self._beat(event, line)
        first = self._first[event.session]
        span = self._begin(event, first.user, first.instance, line)
        span.signed_on = True
        self._asked[event.session, event.ref] = span, 0

    def _receipt(self, event: Event, line: int) -> None:
        if event.ref and (found := self._asked.pop((event.session, event.ref), None)):
            span, index = found
            span.taken[index] = event.at

    def _off(self, event: Event, line: int) -> None:
        if span := self._current.pop(event.session, None):
            span.ended, span.how, span.end_line = event.at, event.what, line

    def _left(self, event: Event, line: int) -> None:
        self._off(event, line)
        for watch in self._watches[event.session].values():
            watch.till = event.at
        for ask in self._asks.pop(event.session, ()):
            ask.till = event.at

    _closed = _died = _cut = _lost = _refused = _left

    # Watchers

    def _subscribed(self, event: Event, line: int) -> None:
        self._subscriptions[event.session][event.subscription] = event.at

    def _watch(self, session: str, subscription: str, user: str) -> Watch:
        found = self._watches[session].get((subscription, user))
        if found is None:
            asked = self._wanted.get((session, user)), self._subscriptions[session].get(subscription)
            found = Watch(session, self._first[session].instance, subscription, user)
            found.asked = max((at for at in asked if at is not None), default=-inf)
            self._watches[session][subscription, user] = found
            self.watches.append(found)
        return found

    def _watching(self, event: Event, line: int) -> None:
        ask = Ask(event.session, self._first[event.session].instance, event.users, event.at, line)
        self.asks.append(ask)
        self._wanted.update(((event.session, user), event.at) for user in event.users)
        self._asks[event.session].append(ask)

    def _watched(self, event: Event, line: int) -> None:
        asks = self._asks[event.session]
        if ask := next((ask for ask in asks if ask.users == event.users), None):
            ask.answered = event.at
            asks.remove(ask)
        for user in event.users:
            for subscription in self._subscriptions[event.session]:
                watch = self._watch(event.session, subscription, user)
                watch.since = min(watch.since, event.at)
                if not watch.told:
                    self.silent.append((watch, event.at, line))

    def _unwatched(self, event: Event, line: int) -> None:
        for ask in self._asks[event.session]:
            if not set(ask.users).isdisjoint(event.users):
                ask.till = min(ask.till, event.at)
        for user in event.users:
            for subscription in self._subscriptions[event.session]:
                if watch := self._watches[event.session].pop((subscription, user), None):
                    watch.till = event.at

    def _told(self, event: Event, line: int) -> None:
        self._watch(event.session, event.subscription, event.user).told.append((event.at, event, line))

    # The world

    def _polled(self, event: Event, line: int) -> None:
        self.polls.append((event, line))

    def _change(self, event: Event, line: int) -> None:
        made = since = event.version / 1e6 - self.setup.unix + self._behind
        if self._behind and made > event.at:  # versions went on from the last before the fail-over
            made, since = event.at, event.at - event.seconds
        self.changes[event.user].append(Change(made, since, event.online, event.version, line))

    def _amnesty(self, event: Event, line: int) -> None:
        begun = event.at + self._behind
        self.amnesties.append(Outage("redis", "amnesty", begun, begun + event.seconds))

    def _stalled(self, event: Event, line: int) -> None:
        self.stalls.append(Outage("clients", "stalled", event.at, event.at + event.seconds))

    def _fault(self, event: Event, line: int) -> None:
        self._faults[event.on] = event
        if event.how == "failed over":
            self._behind = self.setup.behind

    def _mended(self, event: Event, line: int) -> None:
        begun = self._faults.pop(event.on)
        self.outages.append(Outage(event.on, begun.how, begun.at, event.at))

    def _recovered(self, event: Event, line: int) -> None:
        self.recovered = event.at

    def _end(self, event: Event, line: int) -> None:
        self.end, self.is_ended = event.at, True

    def _said(self, event: Event, line: int) -> None:
        self.final[event.what].append((event, line))

    _store = _rest = _row = _kept = _log = _said


class _Check:
    def __init__(self, history: History) -> None:
        record = _Record(history)
        self.record, self.setup, self.end = record, record.setup, record.end
        self.spans, self.changes = record.spans, record.changes
        self.report = Report(counts=record.counts)
        self.store_outages = [o for o in record.outages if o.on == "redis"]
        self.instance_outages = [o for o in record.outages if o.on not in SERVICES] if self.setup.takeover else []
        self._lost: dict[str, list[tuple[float, float]]] = {}  # by sink
        self.online_in_store = {event.user for event, _ in record.final["store"] if event.online}
        self._present: dict[str, list[tuple[float, float, Span]]] = {}
        self.known = {(u, c.version): c.online for u, changes in self.changes.items() for c in changes}

    def _lost_windows(self, sink: str) -> Iterator[tuple[float, float]]:
        """From when till when a change may have been lost with the store's data before the sink had it."""
        for lost in self.store_outages:
            if lost.how == "emptied":
                waiting = [o.since for o in self.record.outages if o.on == sink and o.meets(lost.since, lost.since)]
                yield min([lost.since - UNREAD, *waiting]), lost.since + EXACT
            elif lost.how == "failed over":
                yield lost.since - UNREAD, lost.since + EXACT

    def _may_be_lost(self, made: float, sink: str = "kafka") -> bool:
        """Whether Kafka, or the history store of this name, may lack a change: an instance's own is away with it."""
        if sink not in self._lost:
            self._lost[sink] = list(self._lost_windows(sink))
        return any(since <= made <= till for since, till in self._lost[sink])

    def _nobody_made(self, user: str, version: int) -> bool:
        """It is not in the stream, and cannot have been lost with it before the record had read it."""
        made = version / 1e6 - self.setup.unix
        return (user, version) not in self.known and not any(
            o.how in {"emptied", "failed over"} and o.since - UNREAD <= made <= o.since + EXACT
            for o in self.store_outages
        )

    # What is broken when

    def _out(self, on: str, since: float, till: float, *hows: str) -> Outage | None:
        """The first outage of an instance or a service that meets the time."""
        found = [o for o in self.record.outages if o.on == on and (not hows or o.how in hows) and o.meets(since, till)]
        return min(found, key=lambda outage: outage.since, default=None)

    def _prolonged(
        self,
        since: float,
        deadline: float,
        *others: str,
        amnesty: bool = False,
        relay: bool = False,
        clients: bool = False,
    ) -> float:
        """The deadline, put off for as long as something on the way was away.

        The store always is (``amnesty``: and its amnesty), with ``relay`` whoever brings the changes to Kafka, with
        ``clients`` those who read; and the others named.
        """
        rest = min(self.setup.amnesty, self.setup.lease) if amnesty else 0.0
        away = [(o.since, o.till + rest) for o in self.store_outages]
        away += [(o.since, o.till) for o in self.record.amnesties if amnesty]
        retry = {"kafka": self.setup.retry}
        away += [(o.since, o.till + retry.get(o.on, 0.0)) for o in self.record.outages if o.on in others]
        away += [(o.since, o.till) for o in self.record.stalls if clients]
        away += [(o.since, o.since + self.setup.takeover) for o in self.instance_outages if relay]
        counted = since
        for begun, till in sorted(away):
            if begun <= deadline and till > counted:
                deadline += till - max(begun, counted)
                counted = till
        return deadline

    # Who is there

    def _stop(self, span: Span) -> Outage | None:
        """The planned stop of the instance that the session was on."""
        for one in self.record.outages:
            if one.on == span.instance and one.how == "stopped" and one.since <= span.ended:
                before = span.begun <= one.since
                if before or (span.begun <= one.till and span.how == "lost" and span.ended <= one.till):
                    return one
        return None

    def _sure(self, span: Span) -> list[tuple[float, float]]:
        """From when till when it certainly lasts: a lease from each beat that an instance took, until it ends."""
        stop = self._stop(span)
        till = inf if stop is None else max(stop.since, stop.since + self.setup.drain - EXACT)
        # Its lease goes on when its instance was killed or stopped: not when the store has forgotten it, too.
        killed = self._out(span.instance, span.ended - FLIGHT, span.ended, "killed")
        emptied = any(o.how == "emptied" and o.till >= span.ended - FLIGHT for o in self.store_outages)
        if span.how != "lost" or not (killed or stop) or emptied:
            till = min(till, span.ended)
        sure = []
        for index, (sent, taken) in enumerate(zip(span.sent, span.taken, strict=True)):
            if stop is not None and sent >= stop.since and (index or span.signed_on):
                continue
            since = taken
            # Without a receipt a beat counts when nothing hindered the instance from taking it.
            if index and taken > sent + FLIGHT and not self._out(span.instance, sent - EXACT, sent + FLIGHT):
                since = sent + FLIGHT
            ends = min(till, sent + self.setup.lease - EXACT)
            if since < ends:
                sure.append((since, ends))
        return sure

    def _presence(self, user: str) -> list[tuple[float, float, Span]]:
        """From when till when the user is certainly there, in order and without overlap; with a session."""
        if user not in self._present:
            sure = [(*times, span) for span in self.spans.get(user, ()) for times in self._sure(span)]
            found: list[tuple[float, float, Span]] = []
            for one in sorted(sure, key=lambda one: one[:2]):
                if not found or found[-1][1] < one[0]:
                    found.append(one)
                elif found[-1][1] < one[1]:
                    found[-1] = found[-1][0], *one[1:]
            self._present[user] = found
        return self._present[user]

    def _there(self, user: str, at: float) -> tuple[float, Span] | None:
        """Since when the user has certainly been there without a break, and a session; None: it is not certain."""
        presence = self._presence(user)
        index = bisect_right(presence, at, key=lambda one: one[0]) - 1
        if index < 0 or presence[index][1] <= at:
            return None
        return presence[index][0], presence[index][2]

    def _gone(self, span: Span, at: float) -> float:
        """When the session was over, seen from ``at``: its end, or the end of its lease; inf: it is not."""
        last = span.sent[bisect_right(span.sent, at) - 1]
        if span.how == "cut" and span.ended <= at:
            return last + self.setup.lease
        gone = min(span.ended, last + self.setup.lease)
        return inf if gone > at else gone

    def _may_last(self, span: Span, at: float) -> float:
        """Until when the user may be online because of this session, seen from ``at``."""
        index = bisect_right(span.sent, min(at, span.ended)) - 1
        last = span.sent[index]
        if span.taken[index] < inf:
            last = span.taken[index]  # a CONNECT, or a beat, that had to wait
        elif not index and not span.signed_on:
            last = min(at, span.ended)  # a CONNECT takes effect at any time until it is given up
        elif frozen := self._out(span.instance, last, last + FLIGHT, "frozen"):
            last = frozen.till  # what was sent to a frozen instance takes effect when it goes on
        base = last + self.setup.lease
        if span.ended <= at and span.how in CLEAN:
            out = self._out(span.instance, span.ended - EXACT, span.ended + FLIGHT)
            if out is None:
                last = base = span.ended
            elif out.how == "frozen":
                base = max(base, out.till)
        return self._prolonged(last, base + SWEEP + SLACK, amnesty=True)

    def _truth(self, user: str) -> bool | None:
        """Whether the user is online at the end; None: it is open."""
        spans = self.spans[user]
        if any(
            span.ended > self.end and any(since <= self.end < till for since, till in self._sure(span))
            for span in spans
        ):
            return True
        if all(self._may_last(span, self.end) < self.end for span in spans):
            return False
        return None

    # The rules

    def run(self) -> Report:
        for watch in self.record.watches:
            self._order(watch)
            self._missed(watch)
            self._told_offline(watch)
        self._unanswered()
        self._polls()
        for user in self.changes:
            self._lives(user)
        if self.setup.relayed:
            self._log()
        if self.record.is_ended:
            self._finally()
        self._recovery()
        self.report.findings.sort(key=lambda finding: finding.at)
        return self.report

    def _find(self, rule: str, user: str, at: float, says: str, lines: Iterable[int], watcher: str = "") -> None:
        self.report.findings.append(
            Finding(rule, user, watcher, at, says, tuple(sorted({line for line in lines if line})))
        )

    def _order(self, watch: Watch) -> None:
        before: tuple[float, Event, int] | None = None
        highest = 0
        for at, event, line in watch.told:
            said = f"{'online' if event.online else 'offline'} {event.version}"
            lines = [before[2] if before else 0, line]
            if before is None:
                if not event.snapshot:
                    self._find("order", watch.user, at, f"a change, {said}, before any snapshot", lines, watch.session)
            elif not event.snapshot and event.online == before[1].online:
                self._find("repeated", watch.user, at, f"{said} again", lines, watch.session)
            elif not event.snapshot and event.version <= highest:
                self._find("repeated", watch.user, at, f"{said} after version {highest}", lines, watch.session)
            elif event.version and event.version < highest:
                self._find("order", watch.user, at, f"{said} after version {highest}", lines, watch.session)
            if event.version:
                if self.known.get((watch.user, event.version), event.online) is not event.online:
                    self._find("invented", watch.user, at, f"{said}, which says otherwise", lines, watch.session)
                elif self._nobody_made(watch.user, event.version):
                    self._find("invented", watch.user, at, f"{said}, which nobody made", lines, watch.session)
            highest = max(highest, event.version)
            before = at, event, line

    def _missed(self, watch: Watch) -> None:
        changes = self.changes.get(watch.user, ())
        times = [at for at, _, _ in watch.told]
        for index, change in enumerate(changes):
            made = max(change.made, watch.since)
            by = self._prolonged(made, made + DELIVERY, watch.instance, "kafka", relay=True, clients=True)
            if made >= watch.till or by >= min(watch.till, self.end):
                continue  # not connected for long enough; at the end the last word is looked at
            said = bisect_right(times, by) - 1
            last = watch.told[said][1] if said >= 0 else None
            newest = max((told.version for _, told, _ in watch.told[: said + 1]), default=-1)
            cancelled = last is not None and any(
                later.online is last.online for later in changes[index:] if later.made <= by
            )
            if newest < change.version and not cancelled and not self._may_be_lost(change.made):
                was = f"told last: {last.online} {last.version}" if last else "nothing was told"
                says = f"{'online' if change.online else 'offline'} {change.version} did not come by {by:.3f}, {was}"
                lines = [change.line, watch.told[said][2] if said >= 0 else 0]
                self._find("missed", watch.user, change.made, says, lines, watch.session)
            first = next((at for at, told, _ in watch.told if told.version == change.version), None)
            if first is not None and change.made >= watch.since:
                self.report.slowest = max(self.report.slowest, first - change.since)

    def _told_offline(self, watch: Watch) -> None:
        """Whether the watcher was told offline of somebody who was there when that was read.

        A change of the stream is looked at where it was made (`_lives`), and its delay by `_missed`.
        """
        for index, (at, event, line) in enumerate(watch.told):
            is_change = not event.snapshot and (watch.user, event.version) in self.known
            if event.online or is_change or not (found := self._there(watch.user, at)):
                continue
            since, alive = found
            # The first is read once it has been asked for; what follows is as late as a change may be.
            by = self._prolonged(since, since + DELIVERY, watch.instance, "kafka", relay=True, clients=True)
            if by < at or (index == 0 and since <= watch.asked):
                says = (
                    f"told offline {event.version} with session {alive.session} on {alive.instance} since {since:.3f}"
                )
                self._find("false offline", watch.user, at, says, [line, alive.line, alive.end_line], watch.session)

    def _unanswered(self) -> None:
        """Snapshots wait for the store and its amnesty; last seen is asked of Cassandra, up to its time limit."""
        for ask in self.record.asks:
            by = self._prolonged(ask.at, ask.at + DELIVERY, ask.instance, "cassandra", amnesty=True, clients=True)
            if by < min(ask.answered, ask.till, self.end):
                user = ask.users[0] if ask.users else ""
                says = f"the watch of {len(ask.users)} users was not answered by {by:.3f}"
                self._find("unanswered", user, ask.at, says, [ask.line], ask.session)
        for watch, at, line in self.record.silent:
            self._find("unanswered", watch.user, at, "watched, and no snapshot before", [line], watch.session)

    def _polls(self) -> None:
        """Whether REST said what was not so at any time between question and answer."""
        for event, line in self.record.polls:
            user, asked = event.user, event.at - event.seconds
            if event.how:
                continue  # who cannot tell says so
            if event.online:
                spans = [span for span in self.spans.get(user, ()) if span.begun <= event.at]
                may = max((self._may_last(span, event.at) for span in spans), default=-inf)
                if may < asked:
                    says = f"{event.instance} says online, but no session lasts beyond {may:.3f}"
                    lines = [line, *(span.end_line or span.line for span in spans[-3:])]
                    self._find("ghost", user, event.at, says, lines)
            elif (found := self._there(user, event.at)) and found[0] <= asked:
                since, alive = found
                says = (
                    f"{event.instance} says offline with session {alive.session} on {alive.instance} since {since:.3f}"
                )
                self._find("false offline", user, event.at, says, [line, alive.line, alive.end_line])

    def _lives(self, user: str) -> None:
        """Whether the user was offline, or online, when nothing of the kind could be."""
        changes = self.changes[user]
        for change, following in zip(changes, [*changes[1:], None], strict=True):
            if not change.online:
                if (found := self._there(user, change.made)) and found[0] <= change.since:
                    alive = found[1]
                    says = f"offline with session {alive.session} on {alive.instance}"
                    self._find("false offline", user, change.made, says, [change.line, alive.line, alive.end_line])
                continue
            self._haunts(user, change, following)

    def _haunts(self, user: str, change: Change, following: Change | None) -> None:
        """Whether the user was online for longer than there was a session, at the end of the time or on the way."""
        till = following.made if following else self.end
        spans = [span for span in self.spans.get(user, ()) if span.begun <= till]
        signs = {at for span in spans for at in (*span.sent, span.ended) if change.made < at < till}
        before = change.made
        for sign in sorted(signs):
            if sign - before > SWEEP + SLACK:  # else nobody is a ghost yet
                there = [span for span in spans if span.begun < sign]
                self._ghost(user, change, there, sign, self._forgotten(change, sign))
            before = sign
        forgotten = self._forgotten(change, inf)
        unsaid = forgotten and (following.online if following else user not in self.online_in_store)
        self._ghost(user, change, spans, till, unsaid, following)
        gone = max((self._gone(span, till) for span in spans), default=change.made)
        if gone < inf and not unsaid:
            self.report.longest_ghost = max(self.report.longest_ghost, till - max(gone, change.made))

    def _forgotten(self, change: Change, till: float) -> bool:
        """The store has lost its data since the change, or the change itself."""
        emptied = any(o.how == "emptied" and change.made <= o.till and o.since <= till for o in self.store_outages)
        return emptied or self._may_be_lost(change.made)

    def _ghost(
        self,
        user: str,
        change: Change,
        spans: Sequence[Span],
        till: float,
        forgotten: bool,
        following: Change | None = None,
    ) -> None:
        """Whether the user, online until ``till``, had none of these sessions any more.

        Args:
            forgotten: when the store lost its data the user was no more online in it, and no change says when: what
                does say it is what watchers were told.
        """
        seen = till if following or till == self.end else till - TICK
        may = max((self._may_last(span, seen) for span in spans), default=change.made - EXACT)
        if may >= till:
            return
        lines = [
            change.line,
            *(span.end_line or span.line for span in spans[-3:]),
            following.line if following else 0,
        ]
        if not forgotten:
            self._find("ghost", user, may, f"online until {till:.3f}, but no session lasts beyond {may:.3f}", lines)
            return
        for watch in self.record.watches:
            if watch.user != user:
                continue
            by = self._prolonged(may, may + DELIVERY, watch.instance, "kafka", relay=True, clients=True)
            last = next(((told, line) for at, told, line in reversed(watch.told) if at <= by), None)
            if last is not None and last[0].online and by < min(till, watch.till, self.end):
                says = f"still shown online at {by:.3f}, but no session lasts beyond {may:.3f}"
                self._find("ghost", user, may, says, [*lines, last[1]], watch.session)

    def _log(self) -> None:
        highest: dict[str, int] = {}
        seen: dict[str, dict[int, bool]] = defaultdict(dict)
        for event, line in self.record.final["log"]:
            user, version = event.user, event.version
            if version in seen[user]:
                if seen[user][version] is not event.online:
                    self._find("log", user, event.at, f"two records of version {version} differ", [line])
                continue
            seen[user][version] = event.online
            if version < highest.get(user, 0):
                self._find("log", user, event.at, f"version {version} comes after {highest[user]}", [line])
            highest[user] = max(version, highest.get(user, 0))
            if self.known.get((user, version), event.online) is not event.online:
                self._find("log", user, event.at, f"version {version} says otherwise in the stream", [line])
            elif self._nobody_made(user, version):
                self._find("log", user, event.at, f"version {version}, which nobody made", [line])
        for user, changes in self.changes.items():
            for change in changes:
                if change.version not in seen[user] and not self._may_be_lost(change.made):
                    self._find("log", user, change.made, f"version {change.version} is not in the log", [change.line])

    def _finally(self) -> None:
        truths = {user: self._truth(user) for user in {*self.spans, *self.changes}}

        def wrong(user: str, online: bool) -> str:
            truth = truths.get(user, False)
            return "" if truth is None or truth is online else f"says {'online' if online else 'offline'}"

        for watch in self.record.watches:
            if watch.till > self.end and watch.since + DELIVERY < self.end:
                told = [one for one in watch.told if one[0] <= self.end]
                if not told or (says := wrong(watch.user, told[-1][1].online)):
                    lines = [told[-1][2]] if told else []
                    says = f"the last word {says}" if told else "nothing was told"
                    self._find("last word", watch.user, self.end, says, lines + self._shows(watch.user), watch.session)
        online = {event.user: line for event, line in self.record.final["store"] if event.online}
        for user, truth in truths.items():
            if truth is not None and truth is not (user in online):
                says = f"says {'online' if user in online else 'offline'}"
                self._find("store", user, self.end, says, [online.get(user, 0), *self._shows(user)])
        for rule in ("rest", "row"):
            for event, line in self.record.final[rule]:
                if says := wrong(event.user, event.online):
                    self._find(
                        rule, event.user, self.end, f"{event.instance} {says}".strip(), [line, *self._shows(event.user)]
                    )
        self._asked(truths)
        self._rows()

    def _asked(self, users: Iterable[str]) -> None:
        """At the end every instance answers, of everybody: nothing is broken any more that excuses a 503."""
        said = {(event.instance, event.user) for event, _ in self.record.final["rest"]}
        for name in {*self.setup.instances, *(instance for instance, _ in said)} or {""}:
            for user in users:
                if (name, user) not in said:
                    self._find("rest", user, self.end, f"{name} says nothing".strip(), self._shows(user))

    def _rows(self) -> None:
        """Each history store has a row of everybody who ever changed, of the last change; and keeps every change."""
        stores: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        kept: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for event, line in self.record.final["row"]:
            stores[event.instance][event.user] = event.version, line
            self._made_up(event, line)
        for event, line in self.record.final["kept"]:
            kept[event.instance].add((event.user, event.version))
            self._made_up(event, line)
        for name in {*self.setup.histories, *stores, *kept} or {""}:
            for user, changes in self.changes.items():
                for change in changes:
                    if (user, change.version) not in kept[name] and not self._may_be_lost(change.made, name):
                        says = f"{name} does not keep version {change.version}"
                        self._find("kept", user, change.made, says.strip(), [change.line])
                last = changes[-1]
                version, line = stores[name].get(user, (-1, 0))
                if version < last.version and not self._may_be_lost(last.made, name):
                    says = f"{name} has version {version} and not {last.version}" if line else f"{name} has none"
                    self._find("row", user, self.end, says.strip(), [line, last.line])

    def _made_up(self, event: Event, line: int) -> None:
        """Whether a history store has a change that there was not."""
        says = ""
        if self._nobody_made(event.user, event.version):
            says = f"{event.instance} has version {event.version}, which nobody made"
        elif self.known.get((event.user, event.version), event.online) is not event.online:
            says = f"{event.instance} says otherwise of version {event.version}"
        if says:
            self._find(event.what, event.user, self.end, says.strip(), [line])

    def _shows(self, user: str) -> list[int]:
        changes: Sequence[Change] = self.changes.get(user, ())
        return [change.line for change in changes[-1:]] + [
            span.end_line or span.line for span in self.spans.get(user, [])[-2:]
        ]

    def _recovery(self) -> None:
        mended = max((o.till for o in self.record.outages if o.till < inf), default=None)
        if mended is None:
            return
        self.report.recovery = max(0.0, self.record.recovered - mended)
        for watch in self.record.watches:
            made = {change.version: change.made for change in self.changes.get(watch.user, ())}
            for at, event, _ in watch.told:
                if not event.snapshot and made.get(event.version, inf) <= mended < at:
                    self.report.recovery = max(self.report.recovery, at - mended)
