"""The ledger finds nothing wrong with a perfect server, and exactly what is wrong with a doctored one."""

from __future__ import annotations

import heapq
import itertools
import json
import random
import time
from bisect import bisect
from collections import defaultdict
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.ledger import EARLY, Edge, Ledger, LedgerResult
from loadtest.metrics import Histogram

LEASE = 60.0
FAULTS = ("late", "missing", "duplicated", "out_of_order", "unexpected")


def faults(result: LedgerResult) -> dict[str, int]:
    return {name: getattr(result, name) for name in FAULTS if getattr(result, name)}


class PerfectServer:
    """A server of the contract, its clients and the way between them; writes down the calls of the ledger."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.calls: list[tuple] = []
        self.times: list[float] = []
        self._due: list[tuple] = []
        self._order = itertools.count()
        self._read_at: dict[str, float] = defaultdict(float)
        self._arrives: dict[str, float] = defaultdict(float)
        # What the server knows.
        self.leases: dict[str, dict[str, float]] = defaultdict(dict)
        self.lapsed: dict[str, set[str]] = defaultdict(set)
        self.online: dict[str, bool] = defaultdict(bool)
        self.version: dict[str, int] = defaultdict(int)
        self.versions = itertools.count(1)
        self.watches: dict[str, set[str]] = defaultdict(set)
        # What the clients know.
        self.open: dict[tuple[str, str], float] = {}
        self.revived: dict[str, float] = {}
        self.asked: set = set()
        self.connection: dict[str, int] = defaultdict(int)

    def later(self, at: float, do, *args) -> None:
        heapq.heappush(self._due, (at, next(self._order), do, args))

    def run_until(self, at: float) -> None:
        while self._due and self._due[0][0] <= at:
            self.now, _, do, args = heapq.heappop(self._due)
            do(*args)
        self.now = at

    def call(self, name: str, *args) -> None:
        self.calls.append((name, *args))
        self.times.append(self.now)

    def send(self, client: str, do, *args) -> None:
        """Frames of one client arrive in order."""
        self._arrives[client] = max(self.now + self.random.uniform(0.0001, 0.04), self._arrives[client])
        self.later(self._arrives[client], do, *args)

    def read(self, client: str, do, *args) -> None:
        """So do those to it."""
        self._read_at[client] = max(self.now + self.random.uniform(0.0001, 0.04), self._read_at[client])
        self.later(self._read_at[client], do, *args)

    # The server.

    def change(self, user: str) -> None:
        online = bool(self.leases[user])
        if online == self.online[user]:
            return
        self.online[user] = online
        self.version[user] = next(self.versions)
        for watcher, watched in self.watches.items():
            if user in watched:
                self.tell(watcher, user, snapshot=False)

    def tell(self, watcher: str, user: str, snapshot: bool) -> None:
        news = (self.connection[watcher], watcher, user, self.online[user], self.version[user], snapshot)
        self.read(watcher, self.told, *news)

    def renew(self, user: str, session: str) -> None:
        end = self.now + LEASE
        self.lapsed[user].discard(session)
        self.leases[user][session] = end
        self.later(end + self.random.uniform(0, 0.25), self.expire, user, session, end)
        self.change(user)

    def expire(self, user: str, session: str, end: float) -> None:
        if self.leases[user].get(session) == end:
            del self.leases[user][session]
            self.lapsed[user].add(session)
            self.change(user)

    def connect(self, user: str, session: str) -> None:
        self.renew(user, session)
        self.read(user + session, self.connected, user, session, self.leases[user][session] - LEASE)

    def heartbeat(self, user: str, session: str) -> None:
        if session in self.leases[user] or session in self.lapsed[user]:
            self.renew(user, session)

    def end(self, user: str, session: str) -> None:
        self.leases[user].pop(session, None)
        self.lapsed[user].discard(session)
        self.change(user)

    def watch(self, connection: int, watcher: str, user: str) -> None:
        if connection == self.connection[watcher]:
            self.watches[watcher].add(user)
            self.tell(watcher, user, snapshot=True)
            self.read(watcher, self.confirmed, connection, "watching", watcher, user)

    # The clients.

    def connected(self, user: str, session: str, since: float) -> None:
        self.open[user, session] = since + LEASE
        self.call("session_opened", user, session, self.now)
        self.call("session_ended", user, session, since + LEASE, "expiry")

    def told(self, connection: int, watcher: str, *news) -> None:
        if connection == self.connection[watcher]:
            self.call("told", watcher, *news, self.now)

    def confirmed(self, connection: int, name: str, watcher: str, user: str) -> None:
        if connection == self.connection[watcher]:
            self.call(name, watcher, user, self.now)

    def act(self, kind: str, user: str, session: str, watcher: str) -> None:
        key = (user, session)
        if kind == "connect" and key not in self.asked:
            self.asked.add(key)
            self.send(user + session, self.connect, user, session)
        elif kind == "beat" and key in self.open and not self.open[key] - 0.2 < self.now < self.open[key]:
            # A beat on its way when the lease ends is a matter of luck. One that is sent after it is not.
            if self.open[key] <= self.now:
                self.revived[user] = self.now
            self.open[key] = self.now + LEASE
            self.call("beat", user, session, self.now)
            self.call("session_ended", user, session, self.now + LEASE, "expiry")
            self.send(user + session, self.heartbeat, user, session)
        elif kind in {"disconnect", "signed-off", "lost"} and key in self.open:
            if self.now < self.revived.get(user, -1.0) + 0.2:
                return  # which comes first, this or the beat that revives another session, is a matter of luck, too
            del self.open[key]
            self.asked.discard(key)
            self.call("session_ended", user, session, self.now, kind)
            self.send(user + session, self.end, user, session)
        elif kind == "watch":
            self.send(watcher, self.watch, self.connection[watcher], watcher, user)
        elif kind == "gone":
            self.connection[watcher] += 1
            self.watches[watcher].clear()
            self.call("watcher_gone", watcher, self.now)


KINDS = ["connect", "connect", "beat", "beat", "disconnect", "signed-off", "lost", "watch", "watch", "gone"]
actions = st.tuples(
    st.sampled_from([0.0, 0.001, 0.03, 0.5, 4.0, 7.0, 30.0, 59.9, 60.01, 61.0]),
    st.sampled_from(KINDS),
    st.sampled_from("ab"),
    st.sampled_from("12"),
    st.sampled_from("wx"),
)


def history(acts, seed: int) -> tuple[list[tuple], list[float], float]:
    server = PerfectServer(seed)
    for gap, *act in acts:
        server.run_until(server.now + gap)
        server.act(*act)
    server.run_until(server.now + LEASE * 2)
    return server.calls, server.times, server.now


def judged(calls, end: float, **options) -> LedgerResult:
    ledger = Ledger(**options)
    for name, *args in calls:
        getattr(ledger, name)(*args)
    return ledger.close(end)


@given(st.lists(actions, min_size=5, max_size=60), st.integers(0, 1000))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_of_a_perfect_server_nothing_is_wrong(acts, seed):
    calls, _, end = history(acts, seed)
    result = judged(calls, end)
    assert faults(result) == {}
    assert result.expected == result.received + result.cancelled
    assert sum(len(h) for h in result.notice.values()) == result.received
    # Leases are swept 250 ms late at most, and frames need 80 ms: no pair is wrong for longer, per edge.
    assert result.ghost_seconds + result.false_offline_seconds <= 0.35 * result.expected + 0.1


@given(st.lists(actions, min_size=5, max_size=60), st.integers(0, 1000), st.integers(3, 15))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_taken_in_parts_the_result_is_the_same(acts, seed, every):
    calls, times, end = history(acts, seed)
    ledger = Ledger()
    total = LedgerResult()
    for n, ((name, *args), at) in enumerate(zip(calls, times, strict=True)):
        if n % every == 0:
            total += ledger.take(at)
        getattr(ledger, name)(*args)
    total += ledger.close(end)
    whole = judged(calls, end)
    assert (total.expected, total.received, faults(total)) == (whole.expected, whole.received, {})
    assert total.ghost_seconds == pytest.approx(whole.ghost_seconds)
    assert total.false_offline_seconds == pytest.approx(whole.false_offline_seconds)


# Doctored streams: a crowd that comes and goes, each change more than `late` apart.


def crowd(
    seed: int = 1, users: int = 12, watchers: int = 6, changes: int = 12
) -> tuple[list[tuple], list[float], float]:
    server = PerfectServer(seed)
    for watcher in range(watchers):
        for user in range(users):
            server.act("watch", f"u{user}", "1", f"w{watcher}")
    server.run_until(1.0)
    for change in range(changes):
        for user in range(users):
            kinds = ["disconnect", "lost", "signed-off"]
            server.act(server.random.choice(kinds) if change % 2 else "connect", f"u{user}", "1", "")
        server.run_until(server.now + server.random.uniform(6, 30))
    server.run_until(server.now + 10)
    return server.calls, server.times, server.now


CALLS, TIMES, END = crowd()
NOTICES = [n for n, call in enumerate(CALLS) if call[0] == "told" and not call[5]]


def chosen(k: int, seed: int) -> list[int]:
    """Some notices, no two of them neighbours in what a watcher is told of a user: two lost in turn leave one gap."""
    order = defaultdict(list)
    for n in NOTICES:
        order[CALLS[n][1:3]].append(n)
    parity = random.Random(seed).randrange(2)
    free = [n for told in order.values() for i, n in enumerate(told) if i % 2 == parity]
    return random.Random(seed).sample(free, k)


def test_the_crowd_is_told_everything():
    result = judged(CALLS, END)
    assert faults(result) == {}
    assert result.expected == result.received == len(NOTICES) == 12 * 6 * 12
    assert {kind: len(h) for kind, h in result.notice.items()}["connect"] == 12 * 6 * 6


ks = st.integers(0, 60)
seeds = st.integers(0, 1000)


@given(ks, seeds)
@settings(max_examples=25, deadline=None)
def test_k_dropped_notices_are_k_missing(k, seed):
    dropped = set(chosen(k, seed))
    result = judged([call for n, call in enumerate(CALLS) if n not in dropped], END)
    assert faults(result) == ({"missing": k} if k else {})
    assert result.expected == len(NOTICES)
    if k:
        assert result.ghost_seconds + result.false_offline_seconds > 6 * k


@given(ks, seeds)
@settings(max_examples=25, deadline=None)
def test_k_repeated_notices_are_k_duplicates(k, seed):
    repeated = set(chosen(k, seed))
    result = judged([call for n, call in enumerate(CALLS) for _ in range(1 + (n in repeated))], END)
    assert faults(result) == ({"duplicated": k} if k else {})
    assert result.received == len(NOTICES)


@given(st.integers(1, 60), seeds, st.sampled_from([0.5, 4.9, 5.5]))
@settings(max_examples=25, deadline=None)
def test_k_notices_delayed_by_d_are_seen_in_the_percentiles(k, seed, d):
    delayed = set(chosen(k, seed))
    timed = [
        (at + d, (*call[:-1], at + d)) if n in delayed else (at, call)
        for n, (at, call) in enumerate(zip(TIMES, CALLS, strict=True))
    ]
    samples: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Histogram, "record", lambda _, us: samples.append(us))
        result = judged([call for _, call in sorted(timed, key=lambda pair: pair[0])], END)
    assert faults(result) == ({"late": k} if d > 5 else {})
    assert sum(us > (d - 0.05) * 1e6 for us in samples) == k
    healthy = judged(CALLS, END)
    came = sum(CALLS[n][3] for n in delayed)
    # A notice that came before the harness itself knew counts as immediate, so a few ms of the delay may not be seen.
    assert result.ghost_seconds == pytest.approx(healthy.ghost_seconds + (k - came) * d, abs=k * 0.05)
    # Who comes is not falsely offline while the notice of it is on its way, as long as it is not late.
    assert result.false_offline_seconds == pytest.approx(came * max(0.0, d - 5), abs=k * 0.05)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_one_lie_is_one_lie(seed):
    """A notice whose state was turned round: the truth was not told, and what was told was untrue or no news."""
    lie = chosen(1, seed)[0]
    calls = [(*c[:3], not c[3], *c[4:]) if n == lie else c for n, c in enumerate(CALLS)]
    result = judged(calls, END)
    assert result.missing == 1
    assert result.unexpected + result.duplicated == 1
    assert result.late == result.out_of_order == 0
    assert result.ghost_seconds + result.false_offline_seconds > 6


@given(seeds, st.sampled_from([0, 0.5]))
@settings(max_examples=25, deadline=None)
def test_one_invented_notice_is_one_unexpected(seed, shift):
    n = chosen(1, seed)[0]
    _, watcher, user, online, version, _, at = CALLS[n]
    invented = ("told", watcher, user, not online, version + shift, False, at + 1.0)
    place = bisect(TIMES, at + 1.0)
    result = judged([*CALLS[:place], invented, *CALLS[place:]], END)
    assert faults(result) == {"unexpected": 1}


def test_workers_results_add_up_and_travel_as_json():
    result = judged([call for n, call in enumerate(CALLS) if n != NOTICES[0]], END)
    back = LedgerResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert back == result
    twice = back + result
    assert (twice.expected, twice.missing) == (2 * result.expected, 2)
    assert len(twice.notice["connect"]) == 2 * len(result.notice["connect"])


# Single rules.


@pytest.fixture
def ledger() -> Ledger:
    """Of w, who watches the online user u and was told version 1."""
    ledger = Ledger()
    ledger.session_opened("u", "s", 0.0)
    ledger.told("w", "u", True, 1, True, 1.0)
    ledger.watching("w", "u", 1.0, True)
    return ledger


def test_time_to_notice_counts_from_the_end_of_the_lease(ledger):
    ledger.session_ended("u", "s", 60.0, "expiry")
    ledger.told("w", "u", False, 2, False, 60.2)
    result = ledger.close(70.0)
    assert result.notice["expiry"].max() == pytest.approx(200, rel=1e-3)
    assert result.ghost_seconds == pytest.approx(0.2)
    assert faults(result) == {}


def test_time_to_notice_counts_from_when_the_change_was_intended(ledger):
    """Also where the notice came before the harness itself knew of the change."""
    ledger.session_ended("u", "s", 10.0, "disconnect", 9.5)
    ledger.told("w", "u", False, 2, False, 10.1)
    ledger.told("w", "u", True, 3, False, 20.0)
    ledger.session_opened("u", "s", 20.1, 19.0)
    result = ledger.close(30.0)
    assert result.notice["disconnect"].max() == pytest.approx(600, rel=1e-3)
    assert result.notice["connect"].max() == pytest.approx(1000, rel=1e-3)
    assert faults(result) == {}


def test_a_lost_notice_is_ghost_time_until_the_end(ledger):
    ledger.session_ended("u", "s", 10.0, "lost")
    result = ledger.close(25.0)
    assert faults(result) == {"missing": 1}
    assert result.ghost_seconds == pytest.approx(15.0)


def test_offline_while_beating_is_false(ledger):
    ledger.told("w", "u", False, 2, False, 10.0)
    ledger.beat("u", "s", 11.0)
    ledger.told("w", "u", True, 3, False, 18.0)
    result = ledger.close(30.0)
    assert result.unexpected == 1
    assert result.false_offline_seconds == pytest.approx(8.0)


def test_a_beat_before_the_end_of_the_lease_undoes_it(ledger):
    ledger.session_ended("u", "s", 60.0, "expiry")
    ledger.beat("u", "s", 59.0)
    assert ledger.close(70.0).expected == 0
    assert ledger.is_online("u")


def test_a_beat_after_it_revives(ledger):
    ledger.session_ended("u", "s", 60.0, "expiry")
    ledger.told("w", "u", False, 2, False, 60.1)
    ledger.beat("u", "s", 80.0)
    ledger.told("w", "u", True, 3, False, 80.1)
    result = ledger.close(90.0)
    assert (result.received, faults(result)) == (2, {})
    assert set(result.notice) == {"expiry", "revived"}


@pytest.mark.parametrize("how", ["disconnect", "signed-off", "lost"])
def test_no_beat_revives_what_was_ended(ledger, how):
    ledger.session_ended("u", "s", 10.0, how)
    ledger.beat("u", "s", 11.0)
    assert not ledger.is_online("u")
    assert ledger.close(20.0).missing == 1


def test_a_second_session_keeps_the_user_online(ledger):
    ledger.session_opened("u", "s2", 2.0)
    ledger.session_ended("u", "s", 3.0, "disconnect")
    assert ledger.close(20.0).expected == 0


def test_a_planned_stop_changes_nothing_for_who_is_back_in_time(ledger):
    ledger.session_ended("u", "s", 25.0, "shortened")
    ledger.session_opened("u", "s2", 20.0)
    ledger.session_opened("v", "s", 20.0)
    ledger.watching("w", "v", 21.0, True)
    ledger.session_ended("v", "s", 36.0, "shortened")
    ledger.told("w", "v", False, 9, False, 36.1)
    result = ledger.close(50.0)
    assert (result.received, faults(result)) == (1, {})
    assert result.notice["shortened"].max() == pytest.approx(100, rel=1e-3)


def test_a_change_may_be_told_before_the_client_has_read_connected(ledger):
    ledger.watching("w", "v", 1.0, False)
    ledger.told("w", "v", True, 2, False, 2.0)
    ledger.session_opened("v", "s", 3.0)
    result = ledger.close(20.0)
    assert (result.received, faults(result), result.ghost_seconds) == (1, {}, 0.0)


def played(ledger: Ledger, *acts: tuple, end: float, every: float = 4.0) -> LedgerResult:
    """What comes of calls ``(method, arguments)``, taken every so many s as in a run."""
    total, taken = LedgerResult(), 0.0
    for name, *arguments in acts:
        at = arguments[{"told": 5, "checked": 3, "connecting": 1, "connect_failed": 1}.get(name, 2)]
        while taken + every < at:
            total += ledger.take(taken := taken + every)
        getattr(ledger, name)(*arguments)
    while taken + every < end:
        total += ledger.take(taken := taken + every)
    return total + ledger.close(end)


WATCHED = ("watching", "w", "v", 1.0, False)
CONNECTING = ("connecting", "v", 10.0)


GAVE_UP = ("connect_failed", "v", 40.0, 11.0)
"""The CONNECT was sent at 11."""


def told(online: bool, version: int, at: float) -> tuple:
    return ("told", "w", "v", online, version, False, at)


def test_a_server_may_take_its_time_between_online_and_connected(ledger):
    """WIRE §3: whoever has read CONNECTED is online; for how long it has been nobody says."""
    opened = ("session_opened", "v", "1", 35.0, 10.0, 11.0)
    result = played(ledger, WATCHED, CONNECTING, told(True, 2, 12.0), opened, end=50.0)
    assert (result.received, faults(result), result.ghost_seconds) == (1, {}, 0.0)


@pytest.mark.parametrize(
    "acts",
    [
        [told(True, 2, 20.0), GAVE_UP, told(False, 3, 40.5)],
        [GAVE_UP, told(True, 2, 41.0), told(False, 3, 41.5)],
        [told(True, 2, 20.0), told(False, 3, 39.9), GAVE_UP],
        [told(True, 2, 12.0), told(False, 3, 13.0), told(True, 4, 20.0), GAVE_UP, told(False, 5, 42.0)],
        [GAVE_UP, ("connecting", "v", 41.0), told(True, 2, 50.0), ("session_opened", "v", "1", 70.0, 41.0, 42.0)],
        [
            GAVE_UP,
            ("connecting", "v", 41.0),
            told(True, 2, 50.0),
            ("connect_failed", "v", 71.0, 42.0),
            told(False, 3, 71.2),
        ],
        [
            GAVE_UP,
            ("connecting", "v", 41.0),
            ("connect_failed", "v", 71.0, 42.0),
            told(True, 2, 71.2),
            told(False, 3, 71.4),
        ],
        [
            told(True, 2, 12.0),
            ("connect_failed", "v", 13.0, 11.0),
            ("connecting", "v", 14.0),
            ("session_opened", "v", "1", 15.0, 14.0, 14.1),
        ],
        [GAVE_UP],
    ],
    ids=[
        "seen before",
        "seen after",
        "gone before",
        "twice",
        "second try, seen at it",
        "two tries, seen at the second",
        "two tries, seen after",
        "planned stop",
        "never seen",
    ],
)
@pytest.mark.parametrize("every", [0.7, 4.0, inf])
def test_who_gave_up_may_have_been_online_or_not(ledger, acts, every):
    """Of 30,000 who came back at once 284 gave up on the server's answer, and their watchers were told of them."""
    result = played(ledger, WATCHED, CONNECTING, *acts, end=75.0, every=every)
    assert (faults(result), result.ghost_seconds, result.false_offline_seconds) == ({}, 0.0, 0.0)


def test_a_watch_that_begins_when_one_gives_up_may_show_it(ledger):
    acts = [CONNECTING, GAVE_UP, ("watching", "w", "v", 40.2, False), told(True, 2, 40.5), told(False, 3, 40.6)]
    assert faults(played(ledger, *acts, end=60.0)) == {}


def test_the_way_back_of_who_gave_up_may_be_told_after_the_second_try(ledger):
    opened = ("session_opened", "v", "1", 41.0, 41.0, 40.6)
    acts = [WATCHED, CONNECTING, GAVE_UP, opened, told(True, 2, 41.01), told(False, 3, 41.02), told(True, 4, 41.03)]
    assert faults(played(ledger, *acts, end=60.0)) == {}


def test_what_was_lost_before_is_not_made_up_for_by_who_gave_up(ledger):
    ledger.session_ended("u", "s", 10.0, "lost")
    for asked, failed in ((10.5, 10.6), (12.0, 12.1), (15.0, 15.1), (22.0, 22.1), (40.0, 40.1)):
        ledger.connecting("u", asked - 0.1)
        ledger.connect_failed("u", failed, asked)
    ledger.told("w", "u", False, 2, False, 41.0)
    result = ledger.close(60.0)
    assert faults(result) == {"late": 1}
    assert result.notice["lost"].max() == pytest.approx(31_000, rel=1e-3)


@pytest.mark.parametrize("back", [40.2, 45.0])
def test_who_comes_at_the_second_try_is_told_once(ledger, back):
    again = ("connecting", "v", back - 0.1)
    opened = ("session_opened", "v", "1", back, back, back - 0.05)
    acts = [WATCHED, CONNECTING, GAVE_UP, again, opened, told(True, 2, back + 0.1)]
    result = played(ledger, *acts, end=200.0)
    assert (result.expected, result.received, faults(result)) == (1, 1, {})
    assert result.notice["connect"].max() == pytest.approx(100, rel=1e-3)


def test_who_gave_up_and_stays_online_is_a_ghost(ledger):
    result = played(ledger, WATCHED, CONNECTING, told(True, 2, 20.0), GAVE_UP, end=140.0)
    assert result.ghost_seconds == pytest.approx(95.0), "from when the server should have noticed"


@pytest.mark.parametrize("asked", [None, 30.0])
def test_before_its_connect_was_sent_nobody_was_online(ledger, asked):
    failed = ("connect_failed", "v", 40.0, asked)
    result = played(ledger, WATCHED, told(True, 2, 9.0), CONNECTING, failed, end=60.0)
    assert faults(result)["unexpected"] == 1


@pytest.mark.parametrize(("asked", "contradicted"), [(11.0, 1), (None, 2)])
def test_rest_may_know_of_who_is_connecting_and_of_nobody_else(ledger, asked, contradicted):
    acts = [
        CONNECTING,
        ("checked", "v", True, 19.9, 20.0),
        ("connect_failed", "v", 40.0, asked),
        ("checked", "v", True, 59.9, 60.0),
    ]
    assert played(ledger, *acts, end=80.0).contradicted == contradicted


def test_rest_may_know_long_before_connected_is_read(ledger):
    acts = [CONNECTING, ("checked", "v", True, 19.9, 20.0), ("session_opened", "v", "1", 38.0, 10.0, 11.0)]
    assert played(ledger, *acts, end=80.0).contradicted == 0


def test_a_short_absence_may_go_untold_a_long_one_may_not(ledger):
    for start, away in ((10.0, 0.9), (30.0, 1.1)):
        ledger.session_ended("u", "s", start, "disconnect")
        ledger.session_opened("u", "s", start + away)
    result = ledger.close(50.0)
    assert (result.missing, result.cancelled, result.expected) == (1, 3, 4)
    assert result.ghost_seconds == pytest.approx(2.0)


def flip(ledger, n, at):
    """`u`, who was online, signs off and on in turn: this is the change of number `n`, from 0."""
    if n % 2:
        ledger.session_opened("u", "s", at)
    else:
        ledger.session_ended("u", "s", at, "signed-off")


def flipped(ledger, every, flips, takes=()):
    """`u` flips; `w` is told nothing, and `x` all of it. The sum of all that is taken, at these moments and at last."""
    ledger.told("x", "u", True, 1, True, 1.0)
    ledger.watching("x", "u", 1.0, True)
    calls = [(at, None) for at in takes] + [(10.0 + n * every, n) for n in range(flips)]
    total = LedgerResult()
    for at, n in sorted(calls):
        if n is None:
            total += ledger.take(at)
        else:
            flip(ledger, n, at)
            ledger.told("x", "u", n % 2 == 1, 2 + n, False, at + 0.001)
    return total + ledger.close(1000.0)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize(("every", "missing"), [(2.0, 30), (0.5, 25)])
def test_a_muted_watcher_is_found_while_others_are_told(ledger, every, missing, taken):
    """As often as `fanout` and `slow` flip by default. Of the quick ones the first ten might have been spared it."""
    result = flipped(ledger, every, 60, takes=[12.3 + 3 * n for n in range(40)] if taken else ())
    assert (result.expected, result.received) == (120, 60)
    assert faults(result) == {"missing": missing}
    assert result.cancelled == 60 - missing


def test_a_burst_may_be_told_as_what_it_comes_to(ledger):
    assert faults(flipped(ledger, 0.01, 60)) == {}


def test_who_is_told_now_and_then_is_not_forgotten(ledger):
    """Each tenth change or so is told: the quick ones between were spared the watcher."""
    for n in range(60):
        at = 10.0 + n * 0.5
        flip(ledger, n, at)
        if n % 9 == 8:
            ledger.told("w", "u", n % 2 == 1, 2 + n, False, at + 0.001)
    result = ledger.close(1000.0)
    assert (faults(result), result.received) == ({}, 6)


def test_only_the_newest_of_several_changes_may_be_told(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.session_opened("u", "s", 11.0)
    ledger.session_ended("u", "s", 12.0, "disconnect")
    ledger.told("w", "u", False, 4, False, 12.5)
    result = ledger.close(20.0)
    assert (result.received, result.cancelled, faults(result)) == (1, 2, {})


@pytest.mark.parametrize(("stayed", "missing"), [(0.5, 0), (1.5, 1)])
@pytest.mark.parametrize("known", [12.9, 13.1])
@pytest.mark.parametrize("taken", [12.95, 13.05, 15.6, 17.0, 18.05, 25.0])
def test_a_word_may_be_about_the_second_coming_when_the_first_was_short(ledger, stayed, missing, known, taken):
    """The first was taken back before it was told; the answer to the second CONNECT may be read after the notice."""
    ledger.session_ended("u", "s", 5.0, "disconnect")
    ledger.told("w", "u", False, 2, False, 5.1)
    ledger.session_opened("u", "s", 10.0)
    ledger.session_ended("u", "s", 10.0 + stayed, "disconnect")
    total = LedgerResult()
    for at, what in sorted([(known, "connect"), (13.0, "notice"), (taken, "take")]):
        if what == "connect":
            ledger.session_opened("u", "s", at)
        elif what == "notice":
            ledger.told("w", "u", True, 5, False, at)
        else:
            total += ledger.take(at)
    result = total + ledger.close(30.0)
    assert (result.received, result.missing, result.cancelled, result.late) == (2, missing, 2 - missing, 0)


@pytest.mark.parametrize(("known", "missing"), [(12.99, 0), (13.01, 0), (18.01, 1)])
def test_a_snapshot_may_be_of_a_coming_that_is_not_known_yet(ledger, known, missing):
    """Or of what was before the user went, 3 s ago; then that it went is to be told."""
    ledger.session_ended("u", "s", 10.0, "disconnect")
    if known < 13.0:
        ledger.session_opened("u", "s", known)
    ledger.told("x", "u", True, 5, True, 12.9)
    ledger.watching("x", "u", 13.0)
    ledger.watcher_gone("w", 13.0)
    total = ledger.take(15.5)
    if known > 13.0:
        ledger.session_opened("u", "s", known)
    total += ledger.close(30.0)
    assert (faults(total).get("missing", 0), total.received) == (missing, 0)


def test_an_older_version_is_out_of_order(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.told("w", "u", False, 7, False, 10.1)
    ledger.told("w", "u", True, 6, False, 10.2)
    assert faults(ledger.close(20.0)) == {"out_of_order": 1}


def test_a_newer_version_that_does_not_flip_is_a_duplicate(ledger):
    ledger.told("w", "u", True, 7, False, 10.0)
    assert faults(ledger.close(20.0)) == {"duplicated": 1}


def test_snapshots_may_repeat_and_settle_what_is_due(ledger):
    ledger.told("w", "u", True, 1, True, 2.0)
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.told("w", "u", False, 2, True, 10.5)
    result = ledger.close(20.0)
    assert (result.received, faults(result)) == (1, {})


def test_a_watcher_that_reconnects_is_owed_nothing_for_the_time_between(ledger):
    ledger.watcher_gone("w", 10.0)
    ledger.session_ended("u", "s", 11.0, "disconnect")
    ledger.told("w", "u", False, 2, True, 12.0)
    ledger.watching("w", "u", 12.0, False)
    ledger.session_opened("u", "s", 20.0)
    ledger.told("w", "u", True, 3, False, 20.1)
    result = ledger.close(30.0)
    assert (result.expected, result.received, faults(result)) == (1, 1, {})


def test_a_watcher_that_leaves_long_after_a_change_was_owed_it(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.watcher_gone("w", 16.0)
    assert faults(ledger.close(30.0)) == {"missing": 1}


def test_what_is_late_is_missing_when_nothing_more_is_awaited(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    assert faults(ledger.take(16.0)) == {}
    ledger.session_opened("u", "s", 16.5)
    assert faults(ledger.take(20.0, last=True)) == {"missing": 1}


def test_what_comes_after_it_was_judged_missing_is_late(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    assert faults(ledger.take(69.0)) == {}
    assert faults(ledger.take(71.0)) == {"missing": 1}
    ledger.told("w", "u", False, 2, False, 72.0)
    assert faults(ledger.close(80.0)) == {"late": 1}


@pytest.mark.parametrize(("every", "delay"), [(7.0, 5.5), (20.0, 16.0), (7.0, 40.0)])
def test_however_late_all_are_told_nothing_is_missing(ledger, every, delay):
    """They are told in order, while every 3 s is taken what came of it."""
    changes = [(10.0 + every * n, n) for n in range(8)]
    calls = [(at, "flip", n) for at, n in changes] + [(at + delay, "told", n) for at, n in changes]
    calls += [(3.0 * n, "take", 0) for n in range(1, 70)]
    total = LedgerResult()
    for at, what, n in sorted(calls):
        if what == "flip":
            flip(ledger, n, at)
        elif what == "told":
            ledger.told("w", "u", n % 2 == 1, 2 + n, False, at)
        else:
            total += ledger.take(at)
    assert faults(total) == {"late": 8}
    assert total.received == total.expected == 8
    assert sum(len(one) for one in total.notice.values()) == 8


def test_a_server_that_was_behind_has_told_all_when_it_is_not_any_more(ledger):
    """The third change was made a moment ago, but what is told is still the first and the second."""
    for n, at in enumerate((10.0, 17.0, 24.0, 31.0)):
        flip(ledger, n, at)
    for n in range(4):
        ledger.told("w", "u", n % 2 == 1, 2 + n, False, 32.0 + n / 10)
    result = ledger.close(50.0)
    assert faults(result) == {"late": 3}
    assert (result.received, result.expected) == (4, 4)


def test_half_of_what_was_given_up_is_not_all_of_it(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.session_opened("u", "s", 13.0)
    total = ledger.take(24.0)
    ledger.told("w", "u", False, 2, False, 26.0)
    total += ledger.close(100.0)
    assert faults(total) == {"late": 1, "missing": 1}


def test_what_was_lost_is_not_paid_for_by_a_later_notice_that_came_early(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.session_opened("u", "s", 13.0)
    total = ledger.take(24.0) + ledger.take(90.0)
    assert faults(total) == {"missing": 1}
    ledger.told("w", "u", False, 4, False, 300.1)
    ledger.session_ended("u", "s", 300.12, "disconnect")
    result = ledger.close(320.0)
    assert faults(result) == {}
    assert result.received == 1


def test_a_lie_soon_after_a_loss_may_pass_for_what_was_lost(ledger):
    """It cannot be known; the server is found to have lost one in any case."""
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.session_opened("u", "s", 30.0)
    ledger.told("w", "u", False, 2, False, 30.1)
    assert faults(ledger.close(90.0)) == {"late": 1, "missing": 1}


@pytest.mark.parametrize("at", [30.0, 3600.0])
def test_a_lie_is_not_what_was_lost(ledger, at):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.session_opened("u", "s", 11.5)
    total = ledger.take(at - 6)
    ledger.told("w", "u", True, 5, False, at - 5)
    ledger.told("w", "u", False, 6, False, at)
    total += ledger.close(4000.0)
    assert faults(total).get("unexpected") == 1


def test_a_state_from_rest_is_compared_with_the_truth(ledger):
    ledger.checked("u", True, 10.0, 10.1)
    ledger.session_ended("u", "s", 20.0, "disconnect")
    ledger.checked("u", True, 19.9, 20.1)
    ledger.checked("u", True, 30.0, 30.1)
    result = ledger.close(30.1)
    assert (result.checked, result.contradicted) == (3, 1)


@pytest.mark.parametrize(("known", "contradicted"), [(20.001, 0), (24.9, 0), (25.2, 1)])
@pytest.mark.parametrize("taken", [20.0005, 22.0, 27.0])
def test_rest_may_know_of_who_has_not_read_connected_yet(ledger, known, contradicted, taken):
    """Whoever has read CONNECTED is online for every reader; nothing says that nobody may know before."""
    ledger.checked("v", True, 19.9, 20.0)
    total = LedgerResult()
    for at in sorted([known, taken]):
        if at == known:
            ledger.session_opened("v", "s", at)
        else:
            total += ledger.take(at)
    total += ledger.close(30.0)
    assert (total.checked, total.contradicted) == (1, contradicted)


def test_who_never_comes_was_not_online(ledger):
    ledger.checked("v", True, 19.9, 20.0)
    assert ledger.take(24.0).contradicted == 0
    assert ledger.close(24.5).contradicted == 1


def test_rest_cannot_know_of_a_beat_before_it_is_sent(ledger):
    ledger.session_ended("u", "s", 60.0, "expiry")
    ledger.checked("u", True, 69.9, 70.0)
    ledger.beat("u", "s", 71.0)
    assert ledger.close(80.0).contradicted == 1


def test_a_change_costs_the_same_whoever_watches():
    """10,000 watchers, and no loop over them: the engine's own lag depends on it."""
    ledger = Ledger()
    ledger.session_opened("star", "s", 0.0)
    for n in range(10_000):
        ledger.watching(f"w{n}", "star", 1.0, True)

    def flip(n: int) -> float:
        before = time.perf_counter()
        ledger.session_ended("star", "s", 2.0 + n, "disconnect")
        ledger.session_opened("star", "s", 2.5 + n)
        return time.perf_counter() - before

    assert min(flip(n) for n in range(20)) < 0.0005
    assert ledger.close(100.0).expected == 20 * 2 * 10_000


# Rare, but each has its rule.


def test_what_has_ended_with_its_connection_is_not_revived(ledger):
    ledger.session_ended("u", "s", 20.0, "shortened")
    ledger.told("w", "u", False, 2, False, 20.1)
    ledger.beat("u", "s", 30.0)
    assert ledger.close(40.0).expected == 1


def test_a_drain_does_not_lengthen_a_lease(ledger):
    ledger.session_ended("u", "s", 20.0, "expiry")
    ledger.session_ended("u", "s", 30.0, "shortened")
    ledger.told("w", "u", False, 2, False, 20.1)
    assert set(ledger.close(40.0).notice) == {"expiry"}


def test_a_snapshot_that_was_never_true_is_unexpected(ledger):
    ledger.watching("x", "u", 20.0, False)
    assert faults(ledger.close(40.0)) == {"unexpected": 1}


def test_a_snapshot_made_just_before_a_change_is_not(ledger):
    """The last edge is known even when all who watched then have been told, and a step has been closed."""
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.told("w", "u", False, 2, False, 10.1)
    assert ledger.take(11.0).received == 1
    ledger.watching("x", "u", 11.5, True)
    ledger.told("x", "u", False, 2, False, 11.6)
    result = ledger.close(30.0)
    assert (result.received, faults(result)) == (1, {})


def test_snapshots_of_an_earlier_connection_are_forgotten(ledger):
    ledger.told("x", "v", True, 5, True, 2.0)
    ledger.watcher_gone("x", 3.0)
    ledger.watching("x", "v", 20.0, False)
    assert faults(ledger.close(40.0)) == {}


def test_a_snapshot_with_an_older_version_is_out_of_order_but_for_version_0(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.told("w", "u", False, 5, False, 10.1)
    ledger.told("w", "u", False, 3, True, 10.2)
    ledger.told("w", "u", False, 0, True, 10.3)
    assert faults(ledger.close(20.0)) == {"out_of_order": 1}


@pytest.mark.parametrize(("delay", "late"), [(2.5, 0), (9.0, 3)])
def test_what_piled_up_is_told_in_order(ledger, delay, late):
    for at, online in ((10.0, False), (11.0, True), (12.0, False)):
        if online:
            ledger.session_opened("u", "s", at)
        else:
            ledger.session_ended("u", "s", at, "disconnect")
    for n, online in enumerate((False, True, False)):
        ledger.told("w", "u", online, 2 + n, False, 10.0 + n * 0.1 + delay)
    result = ledger.close(40.0)
    assert (result.received, result.late) == (3, late)
    assert result.notice["disconnect"].max() == pytest.approx(delay * 1000, rel=1e-3)


def test_offline_seconds_before_the_lease_ends_is_false(ledger):
    ledger.told("w", "u", False, 2, False, 57.0)
    ledger.session_ended("u", "s", 60.0, "expiry")
    assert ledger.close(80.0).unexpected == 1


@pytest.mark.parametrize(("early", "unexpected"), [(0.95, 1), (0.003, 1), (0.0015, 0)])
def test_a_lease_may_end_early_by_what_it_was_rounded_by(ledger, early, unexpected):
    ledger.session_ended("u", "s", 60.0, "expiry")
    ledger.told("w", "u", False, 2, False, 60.0 - early)
    result = ledger.close(80.0)
    assert (result.unexpected, result.received) == (unexpected, 1 - unexpected)
    assert result.missing == 0
    assert result.false_offline_seconds == pytest.approx(early * unexpected)


def test_a_drain_that_is_guessed_may_end_early_by_more(ledger):
    ledger.session_ended("u", "s", 25.0, "shortened")
    ledger.told("w", "u", False, 2, False, 24.1)
    assert faults(ledger.close(40.0)) == {}


def test_a_step_may_end_between_a_notice_and_what_it_is_about(ledger):
    ledger.watching("w", "v", 1.0, False)
    ledger.told("w", "v", True, 2, False, 2.0)
    first = ledger.take(2.5)
    ledger.session_opened("v", "s", 3.0)
    second = ledger.close(20.0)
    assert (faults(first), faults(second), second.received) == ({}, {}, 1)


def test_the_log_of_a_restless_user_does_not_grow(ledger):
    for n in range(1000):
        ledger.session_ended("u", "s", 10.0 + 20 * n, "disconnect")
        ledger.session_opened("u", "s", 20.0 + 20 * n)
    assert len(ledger._users["u"].edges) <= 64
    result = ledger.close(20_100.0)
    assert (result.missing, result.cancelled) == (1000, 1000)
    assert result.ghost_seconds == pytest.approx(10_000)


def test_a_watch_that_is_repeated_changes_nothing_that_is_due(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.watching("w", "u", 10.05)
    ledger.told("w", "u", False, 2, False, 10.1)
    result = ledger.close(20.0)
    assert (result.received, faults(result)) == (1, {})


def test_notices_of_quick_changes_may_come_after_the_watch_is_confirmed(ledger):
    ledger.told("w", "v", False, 0, True, 2.0)
    ledger.session_opened("v", "s", 2.01)
    ledger.session_ended("v", "s", 2.02, "disconnect")
    ledger.watching("w", "v", 2.03)
    ledger.told("w", "v", True, 1, False, 2.03)
    ledger.told("w", "v", False, 2, False, 2.04)
    assert faults(ledger.close(20.0)) == {}


def test_two_changes_that_cancel_are_judged_together(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    ledger.session_opened("u", "s", 11.0)
    ledger.watcher_gone("w", 15.5)
    assert faults(ledger.close(20.0)) == {}


# What a notice was about.


def test_a_notice_is_about_its_edge_and_when_that_was_intended(ledger):
    ledger.session_ended("u", "s", 10.0, "signed-off", 9.5)
    assert ledger.told("w", "u", False, 2, False, 10.1) == Edge(10.0, False, "signed-off", 9.5)
    ledger.session_opened("u", "s", 20.0, 19.0)
    assert ledger.told("w", "u", True, 3, False, 20.1) == Edge(20.0, True, "connect", 19.0)
    ledger.session_ended("u", "s", 40.0, "expiry")
    assert ledger.told("w", "u", False, 4, False, 40.1) == Edge(40.0, False, "expiry", 40.0)
    ledger.beat("u", "s", 50.0, 49.9)
    assert ledger.told("w", "u", True, 5, False, 50.1) == Edge(50.0, True, "revived", 49.9)


def test_a_notice_before_its_edge_is_early(ledger):
    ledger.session_ended("u", "s", 10.0, "lost")
    ledger.told("w", "u", False, 2, False, 10.1)
    assert ledger.told("w", "u", True, 3, False, 20.0) == Edge(20.0, True, EARLY, 20.0)
    ledger.session_opened("u", "s", 20.1)
    assert ledger.close(30.0).received == 2


def test_what_is_no_news_is_about_no_edge(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    assert ledger.told("w", "u", False, 5, True, 10.1) is None, "a snapshot"
    assert ledger.told("w", "u", False, 5, False, 10.2) is None, "known"
    assert ledger.told("w", "u", False, 6, False, 10.3) is None, "no turn"
    assert ledger.told("w", "u", True, 4, False, 10.4) is None, "of long ago"
    assert ledger.told("x", "u", True, 4, False, 10.5) is None, "nobody's"


@pytest.mark.parametrize("settled", [False, True])
def test_what_puts_a_lie_right_is_about_no_edge(ledger, settled):
    ledger.session_ended("u", "s", 5.0, "disconnect")
    ledger.told("w", "u", False, 2, False, 5.1)
    ledger.told("w", "u", True, 3, False, 20.0)
    if settled:
        assert ledger.take(30.0).unexpected == 1
    assert ledger.told("w", "u", False, 4, False, 31.0) is None


def test_a_notice_given_up_is_about_its_edge_and_timed_in_full(ledger):
    ledger.session_ended("u", "s", 10.0, "disconnect")
    assert ledger.take(71.0).missing == 1
    assert ledger.told("w", "u", False, 2, False, 72.0) == Edge(10.0, False, "disconnect", 10.0)
    result = ledger.close(80.0)
    assert faults(result) == {"late": 1}
    assert result.notice["disconnect"].max() == pytest.approx(62_000, rel=1e-3)


@pytest.mark.parametrize("taken", [None, 0.9, 3.0])
@pytest.mark.parametrize(("every", "behind"), [(0.5, 3.0), (2.0, 3.0), (2.0, 4.5), (3.0, 4.9)])
def test_of_a_server_that_is_behind_each_notice_is_about_its_own_edge(ledger, every, behind, taken):
    changes = [(10.0 + n * every, n % 2 == 1) for n in range(20)]
    calls = [(at, "change", n) for n, (at, _) in enumerate(changes)]
    calls += [(at + behind, "notice", n) for n, (at, _) in enumerate(changes)]
    calls += [(n * taken, "take", 0) for n in range(1, 80)] if taken else []
    total = LedgerResult()
    for at, what, n in sorted(calls):
        made, online = changes[n]
        if what == "take":
            total += ledger.take(at)
        elif what == "notice":
            how = "connect" if online else "lost"
            assert ledger.told("w", "u", online, 2 + n, False, at) == Edge(made, online, how, made)
        elif online:
            ledger.session_opened("u", "s", at)
        else:
            ledger.session_ended("u", "s", at, "lost")
    total += ledger.close(300.0)
    assert (total.received, faults(total)) == (20, {})


@pytest.mark.parametrize("taken", [False, True])
def test_a_short_absence_told_seconds_later_is_told(ledger, taken):
    ledger.session_ended("u", "s", 10.0, "lost")
    ledger.session_opened("u", "s", 10.5)
    total = ledger.take(12.0) if taken else LedgerResult()
    ledger.told("w", "u", False, 2, False, 14.0)
    ledger.told("w", "u", True, 3, False, 14.5)
    total += ledger.close(30.0)
    assert (total.received, faults(total)) == (2, {})


# One change has one version, whoever is told of it.


@pytest.mark.parametrize("snapshot", [0, 1])
def test_who_comes_while_a_user_flips_is_owed_nothing_that_the_snapshot_shows(ledger, snapshot):
    """A snapshot of the last edge, or of the one before; others have been told of both."""
    for n in range(10):
        at = 10.0 + n * 0.4
        flip(ledger, n, at)
        ledger.told("w", "u", n % 2 == 1, 2 + n, False, at + 0.002)
        if n == 4 + snapshot:
            ledger.told("x", "u", snapshot == 1, 6 + snapshot, True, at + 0.003)
            ledger.watching("x", "u", at + 0.004)
        elif n > 4 + snapshot:
            assert ledger.told("x", "u", n % 2 == 1, 2 + n, False, at + 0.002).at == at
    assert faults(ledger.close(30.0)) == {}


def test_a_snapshot_of_what_others_were_told_early_shows_it(ledger):
    """They read of the connect a moment before the user itself read CONNECTED."""
    ledger.session_ended("u", "s", 10.0, "lost")
    ledger.told("w", "u", False, 2, False, 10.1)
    ledger.told("w", "u", True, 3, False, 10.4)
    ledger.session_opened("u", "s", 10.401)
    ledger.told("x", "u", True, 3, True, 10.9)
    ledger.watching("x", "u", 10.9)
    ledger.session_ended("u", "s", 11.6, "lost")
    assert ledger.told("x", "u", False, 4, False, 11.7).at == 11.6
    ledger.told("w", "u", False, 4, False, 11.7)
    assert faults(ledger.close(30.0)) == {}


def test_a_notice_is_about_the_edge_of_which_others_were_told_with_its_version(ledger):
    """A short absence may be spared a watcher, who is told of the next one."""
    ledger.told("x", "u", True, 1, True, 1.0)
    ledger.watching("x", "u", 1.0)
    for n, at in enumerate((10.0, 10.3, 10.6)):
        if n % 2:
            ledger.told("w", "u", True, 2 + n, False, at - 0.001)
            ledger.session_opened("u", "s", at)
        else:
            ledger.session_ended("u", "s", at, "signed-off")
            ledger.told("w", "u", False, 2 + n, False, at + 0.001)
    assert ledger.told("x", "u", False, 4, False, 10.7).at == 10.6
    assert faults(ledger.close(30.0)) == {}
    assert not ledger._users["u"].versions, "they would need memory"


def test_a_wrong_guess_about_a_version_accuses_nobody_else(ledger):
    """The server is 3 s behind. What is on its way to x is of edges that are older than its watch is believed to be."""
    ledger.session_ended("u", "s", 10.0, "lost")
    ledger.session_opened("u", "s", 11.5)
    ledger.session_ended("u", "s", 13.0, "lost")
    ledger.told("x", "u", True, 1, True, 13.0)
    ledger.watching("x", "u", 13.1)
    assert ledger.told("x", "u", False, 2, False, 13.2).at == 13.0, "a wrong guess"
    told = [ledger.told("w", "u", n % 2 == 1, 2 + n, False, at) for n, at in enumerate((13.2, 14.5, 16.0))]
    assert [edge.at for edge in told] == [10.0, 11.5, 13.0]
    assert faults(ledger.close(30.0)) == {}
