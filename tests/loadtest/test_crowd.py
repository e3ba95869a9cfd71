"""What a crowd counts and times, by a clock and connections that the test moves."""

from __future__ import annotations

import heapq
import itertools
import json
from typing import Any, cast

import pytest

from loadtest.crowd import Crowd
from loadtest.ledger import Ledger
from loadtest.target import Instance, Target
from loadtest.workload import Action

LEASE = 60.0
LATE = 5.0
START = 1000.0


class FakeConnection:
    """Open once the test says so; keeps what is sent."""

    def __init__(self):
        self.owner = None
        self.is_open = False
        self.upgraded_at = 0.0
        self.sent = []

    def send_prepared(self, frame):
        self.sent.append(frame)

    def send(self, command, headers, body=""):
        self.sent.append((command, headers, body))

    def close(self):
        self.is_open = False

    drop = freeze = close


class FakeEngine:
    """Timers are called by `run_to`."""

    def __init__(self):
        self.time = START
        self.made = []
        self._due = []
        self._order = itertools.count()

    def now(self):
        return self.time

    def at(self, when, call, *args):
        heapq.heappush(self._due, (when, next(self._order), call, args))

    def run_to(self, when):
        while self._due and self._due[0][0] <= when:
            self.time, _, call, args = heapq.heappop(self._due)
            call(*args)
        self.time = when

    def prepare(self, command, headers, body=""):
        return (command, headers, body)

    def connect(self, *_, **__):
        self.made.append(FakeConnection())
        return self.made[-1]


class FakeMetrics:
    """Samples in seconds, by metric."""

    def __init__(self):
        self.samples = {}
        self.failures = []

    def record(self, name, seconds, **_):
        self.samples.setdefault(name, []).append(pytest.approx(seconds, abs=1e-6))

    def failed(self, name, *_):
        self.failures.append(name)


class Stage:
    """`star`, whom `fan` watches: session 0 and session 1."""

    def __init__(self, grace=0.0):
        self.engine = cast(Any, FakeEngine())
        self.metrics = cast(Any, FakeMetrics())
        self.crowd = Crowd(
            self.engine,
            Target(instances=[Instance("http://h", "h", 1, "/ws")], lease=LEASE, grace=grace, secret="s" * 32),
            Ledger(late=LATE),
            self.metrics,
            ["star", "fan"],
            {1: [0]},
            addresses=[("127.0.0.1", 1)],
            late=LATE,
            beat_receipts=1.0,
        )
        people: list[Any] = self.crowd.sessions
        self.star, self.fan = people
        self.versions = itertools.count(1)

    def to(self, at):
        """Lets time pass until so long after the start."""
        self.engine.run_to(START + at)

    def connected(self, session):
        conn = session.conn
        conn.is_open, conn.upgraded_at = True, self.engine.now()
        self.crowd.on_connected(conn, self.engine.now())

    def come(self, session):
        self.crowd.connect(session, self.engine.now())
        self.connected(session)

    def told(self, online, version=None):
        body = {"userId": "star", "online": online, "version": next(self.versions) if version is None else version}
        self.crowd.on_message(self.fan.conn, {}, json.dumps(body), self.engine.now())

    def receipt(self, session, name):
        self.crowd.on_receipt(session.conn, name, self.engine.now())

    def closed(self, session, why):
        conn = session.conn
        conn.is_open = False
        self.crowd.on_closed(conn, why, self.engine.now())

    def take(self):
        """What was recorded since."""
        taken, self.metrics.samples = self.metrics.samples, {}
        return taken


def begun(**settings):
    """The star has come, and the fan's watch is confirmed."""
    stage = Stage(**settings)
    stage.come(stage.star)
    stage.come(stage.fan)
    body = {"userId": "star", "online": True, "version": next(stage.versions), "snapshot": True}
    stage.crowd.on_message(stage.fan.conn, {}, json.dumps(body), stage.engine.now())
    stage.receipt(stage.fan, "w")
    stage.take()
    return stage


@pytest.fixture
def stage():
    return begun()


def test_a_server_that_is_behind_shows_by_how_much(stage):
    """Three seconds behind a star that changes every half second: not the half second since the last change."""
    changes = []
    for n in range(10):
        stage.to(1 + n / 2)
        (stage.crowd.sign_on if n % 2 else stage.crowd.sign_off)(stage.star, stage.engine.now())
        changes.append(n % 2 == 1)
        if n >= 6:
            stage.told(changes[n - 6])
    for n in range(4, 10):
        stage.to(4 + n / 2)
        stage.told(changes[n])
    assert stage.take() == {"PUSH offline": [3.0] * 5, "PUSH online": [3.0] * 5}


def test_a_notice_that_was_given_up_is_timed_in_full(stage):
    stage.to(1)
    stage.crowd.sign_off(stage.star, stage.engine.now())
    stage.to(62)
    assert stage.crowd.ledger.take(stage.engine.now()).missing == 1
    stage.to(65)
    stage.told(False)
    assert stage.take() == {"PUSH offline": [64.0]}


def test_what_is_about_no_change_is_not_timed(stage):
    stage.to(2)
    stage.told(True)  # known
    stage.told(False)  # a lie
    stage.told(True)  # put right
    stage.to(3)
    stage.told(True, version=0)  # of long ago
    assert stage.take() == {}
    assert stage.crowd.counts["messages"] == 5


def test_a_change_counts_from_when_it_was_intended(stage):
    stage.to(2)
    stage.crowd.leave(stage.star, stage.engine.now() - 0.7)
    stage.told(False)
    stage.to(3)
    stage.crowd.connect(stage.star, stage.engine.now() - 0.4)
    stage.to(3.5)
    stage.connected(stage.star)
    stage.to(4)
    stage.told(True)
    taken = stage.take()
    assert (taken["PUSH offline"], taken["PUSH online"]) == ([0.7], [1.4])


def test_who_is_seen_before_it_reads_connected_counts_from_when_it_was_to_come(stage):
    stage.crowd.leave(stage.star, stage.engine.now())
    stage.told(False)
    stage.to(1)
    stage.crowd.connect(stage.star, stage.engine.now())
    stage.take()
    stage.to(1.2)
    stage.told(True)
    assert stage.take() == {"PUSH online": [0.2]}


@pytest.mark.parametrize(
    ("how", "metric"),
    [
        ("disconnect", "PUSH offline"),
        ("signed-off", "PUSH offline"),
        ("lost", "PUSH offline-by-loss"),
        ("1011", "PUSH offline-by-loss"),
        ("1001", "PUSH offline-by-expiry"),
        ("reset", "PUSH offline-by-expiry"),
    ],
)
def test_what_made_a_user_offline_names_the_metric(stage, how, metric):
    stage.to(1)
    if how in {"disconnect", "signed-off", "lost"}:
        stage.crowd.leave(stage.star, stage.engine.now(), how)
    else:
        stage.closed(stage.star, how)
    stage.star.wanted = False  # it shall not come back
    stage.to({"1001": 16, "reset": 60}.get(how, 1) + 0.25)
    stage.told(False)
    assert stage.take() == {metric: [0.25]}


def test_a_lease_counts_from_connect_and_not_from_when_its_answer_was_read(stage):
    """The server may have made the session long before."""
    stage.to(1)
    stage.crowd.leave(stage.star, stage.engine.now())
    stage.told(False)
    stage.crowd.connect(stage.star, stage.engine.now())
    conn = stage.star.conn
    conn.is_open, conn.upgraded_at = True, stage.engine.now()
    stage.told(True)
    stage.to(3.5)
    stage.crowd.on_connected(conn, stage.engine.now())
    stage.crowd.mute(stage.star)
    stage.to(61)
    stage.told(False)
    result = stage.crowd.ledger.close(START + 80)
    assert (result.unexpected, result.missing, result.notice["expiry"].max()) == (0, 0, 0)
    assert result.false_offline_seconds == 0


def test_beats_that_the_server_prevents_are_neither_offered_nor_made(stage):
    stage.crowd.counts.clear()
    stage.closed(stage.star, "1011")
    stage.crowd.beat(stage.star, stage.engine.now())
    stage.to(5)  # it tries again meanwhile, and nothing is answered
    assert stage.star.conn is not None
    stage.crowd.beat(stage.star, stage.engine.now())
    assert {name: stage.crowd.counts[name] for name in ("prevented", "offered", "made")} == {
        "prevented": 2,
        "offered": 0,
        "made": 0,
    }
    assert (stage.crowd.present, stage.crowd.wanted) == (1, 2)


def test_who_has_just_begun_to_connect_is_coming():
    stage = Stage()
    stage.crowd.connect(stage.star, START)
    assert (stage.crowd.coming, stage.crowd.wanted, stage.crowd.present) == (1, 1, 0)
    stage.to(6)
    assert stage.crowd.coming == 0, "it should have been there long ago"
    stage.crowd.on_refused(stage.star.conn, "connection refused", stage.engine.now())
    stage.to(10)
    assert stage.star.conn is not None and stage.crowd.coming == 0, "that was its second try"
    stage.connected(stage.star)
    assert (stage.crowd.coming, stage.crowd.present) == (0, 1)


def test_a_beat_of_one_that_connects_for_the_first_time_is_no_action():
    stage = Stage()
    stage.crowd.connect(stage.star, START)
    stage.crowd.beat(stage.star, START)
    assert (stage.crowd.counts["offered"], stage.crowd.counts["made"], stage.crowd.counts["prevented"]) == (1, 1, 0)


def there_at_the_fourth_try() -> Stage:
    """The star has been refused three times, and is connected 12 s after it was to come."""
    stage = Stage()
    stage.crowd.connect(stage.star, START)
    for attempt in range(3):
        stage.crowd.on_refused(stage.star.conn, "connection refused", stage.engine.now())
        stage.to(4 * (attempt + 1))
    stage.connected(stage.star)
    return stage


def test_who_was_refused_counts_from_when_it_was_to_come():
    stage = there_at_the_fourth_try()
    assert stage.take() == {"WS connect": [12.0], "STOMP CONNECTED": [12.0]}


def test_who_tries_again_or_returns_has_begun_once():
    stage = there_at_the_fourth_try()
    stage.crowd.leave(stage.star, stage.engine.now())
    stage.come(stage.star)
    assert (stage.crowd.counts["begun"], stage.crowd.counts["connects"]) == (1, 5)
    stage.come(stage.fan)
    assert (stage.crowd.counts["begun"], stage.crowd.counts["connects"]) == (2, 6)


def test_who_lost_its_connection_is_timed_until_it_is_back(stage):
    stage.to(1)
    stage.closed(stage.star, "1011")
    stage.to(3)
    assert stage.star.conn is not None
    tried = stage.star.intended
    stage.to(4)
    stage.connected(stage.star)
    took = stage.engine.now() - tried
    assert START + 1 <= tried <= START + 2
    assert stage.take() == {"WS connect": [took], "STOMP CONNECTED": [took], "STOMP back": [3.0]}


@pytest.mark.parametrize(("lost", "told"), [("here", 5.01), ("there", 5.01), ("there", 4.97)])
def test_with_a_grace_a_lost_connection_ends_the_session_later(lost, told):
    """What the server has closed it may have closed some time before that was read here."""
    stage = begun(grace=4.0)
    stage.to(1)
    if lost == "here":
        stage.crowd.leave(stage.star, stage.engine.now(), "lost")
    else:
        stage.crowd.quiet = True  # it does not come back
        stage.closed(stage.star, "1011")
    stage.to(told)
    stage.told(False)
    assert stage.take() == ({"PUSH offline-by-expiry": [0.01]} if told > 5 else {})
    result = stage.crowd.ledger.close(START + 20)
    assert (result.expected, result.received, result.late, result.unexpected) == (1, 1, 0, 0)


def test_who_is_back_within_the_grace_was_never_offline():
    stage = begun(grace=4.0)
    stage.to(1)
    stage.crowd.leave(stage.star, stage.engine.now(), "lost")
    stage.to(4)
    stage.come(stage.star)
    stage.to(9)
    assert stage.crowd.ledger.close(START + 9).expected == 0


def test_the_grace_makes_no_lease_longer():
    stage = begun(grace=3 * LEASE)
    stage.to(1)
    stage.crowd.leave(stage.star, stage.engine.now(), "lost")
    stage.to(LEASE + 0.01)
    stage.told(False)
    assert stage.take() == {"PUSH offline-by-expiry": [0.01]}


def unanswered(stage):
    return {name: stage.crowd.counts[name] for name in ("beats unanswered", "watches asked", "watches confirmed")}


def test_what_the_server_does_not_answer_is_counted_at_the_end(stage):
    stage.to(1)
    for session in (stage.star, stage.star, stage.fan):
        stage.crowd.beat(session, stage.engine.now())
    stage.receipt(stage.star, "b")
    stage.to(5)
    stage.crowd.beat(stage.star, stage.engine.now())  # there is still time for this one
    stage.to(1 + LATE)
    stage.crowd.count_unanswered()
    assert unanswered(stage) == {"beats unanswered": 2, "watches asked": 1, "watches confirmed": 1}


def test_what_a_lost_connection_leaves_unanswered_is_counted(stage):
    stage.to(1)
    stage.crowd.beat(stage.fan, stage.engine.now())
    stage.closed(stage.fan, "1011")
    stage.to(4)
    stage.connected(stage.fan)
    stage.closed(stage.fan, "1011")
    assert unanswered(stage) == {"beats unanswered": 1, "watches asked": 2, "watches confirmed": 1}


def test_who_leaves_at_once_leaves_nothing_unanswered(stage):
    stage.to(1)
    stage.crowd.beat(stage.fan, stage.engine.now())
    stage.crowd.leave(stage.fan, stage.engine.now())
    stage.to(2)
    stage.come(stage.fan)
    stage.crowd.leave(stage.fan, stage.engine.now())
    stage.to(20)
    stage.crowd.count_unanswered()
    assert unanswered(stage) == {"beats unanswered": 0, "watches asked": 1, "watches confirmed": 1}


def test_a_watch_that_is_never_confirmed_is_counted():
    stage = Stage()
    stage.come(stage.fan)
    stage.to(LATE)
    stage.crowd.count_unanswered()
    missed = {"beats unanswered": 0, "watches asked": 1, "watches confirmed": 0}
    assert unanswered(stage) == missed
    stage.receipt(stage.fan, "w")
    assert unanswered(stage) == missed, "after it was counted"


def test_who_is_to_be_told_of_those_whom_it_watches_is_unaware_until_then():
    stage = Stage()
    stage.come(stage.star)
    stage.come(stage.fan)
    assert stage.crowd.unaware == 1, "the star watches nobody"
    stage.receipt(stage.fan, "w")
    assert stage.crowd.unaware == 0


def actions(crowd):
    counts = crowd.tally()
    return counts["offered"], counts["made"]


def every_second(stage):
    """The star beats on and on, from one second after the start."""
    stage.crowd.counts.clear()
    stage.crowd.follow((Action(float(n), "beat", 0) for n in itertools.count(1)), START)


def test_what_the_generator_had_no_time_for_was_offered_and_not_made(stage):
    every_second(stage)
    stage.to(10.5)
    assert actions(stage.crowd) == (10, 10)
    stage.engine.time = START + 20.5  # and nothing is called meanwhile
    assert actions(stage.crowd) == (20, 10)
    stage.crowd.quiet = True
    assert actions(stage.crowd) == (20, 10), "the end"


def test_what_is_made_after_all_is_offered_once(stage):
    every_second(stage)
    stage.engine.time = START + 20.5
    assert actions(stage.crowd) == (20, 0)
    stage.to(20.5)
    assert actions(stage.crowd) == (20, 20)


def test_what_is_a_moment_behind_is_not_missed_yet(stage):
    every_second(stage)
    stage.engine.time = START + 1.2
    assert actions(stage.crowd) == (0, 0)


def test_schedules_that_are_over_are_forgotten(stage):
    stage.crowd.counts.clear()
    stage.crowd.follow(iter([Action(1.0, "beat", 0), Action(2.0, "leave", 0)]), START)
    stage.to(3)
    assert (actions(stage.crowd), stage.crowd._schedules) == ((2, 2), [])


def test_what_could_not_be_written_was_not_made(stage, monkeypatch):
    def fails(*_):
        raise RuntimeError("on purpose")

    stage.crowd.counts.clear()
    for name in ("send", "send_prepared"):
        monkeypatch.setattr(FakeConnection, name, fails)
    for act in (stage.crowd.beat, stage.crowd.sign_off):
        with pytest.raises(RuntimeError):
            act(stage.star, stage.engine.now())
    stage.crowd.quiet = True
    stage.star.muted = False
    stage.crowd.leave(stage.star, stage.engine.now())
    stage.crowd.connect(stage.star, stage.engine.now())
    assert actions(stage.crowd) == (4, 1), "of four only the leave was"
