"""The checker itself: an honest history passes, one that was doctored is caught, and no excuse covers too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.fleet.checker import check
from tests.fleet.history import Event, History, HistoryError, Setup

A, B = "instance a", "instance b"
Predicate = Callable[[Event], bool]


class Story:
    """A small run, to be told and doctored. The store's clock is the record's, so that versions are its µs.

    Alice comes to A, leaves at 4, comes again at 7 and stays. Wendy watches her, on B; her own lease is over at 2.3.
    """

    def __init__(self, *, relayed: bool = True) -> None:
        self.setup = Setup(lease=2.0, amnesty=2.0, drain=2.0, relayed=relayed, instances=(A, B), histories=("",))
        self.events: list[Event] = []
        self.come("a1", "alice", 0.0)
        self.come("w", "wendy", 0.2, instance=B)
        self.change("wendy", 2.35, online=False)
        self.add(0.4, "subscribed", session="w", subscription="s")
        self.add(0.41, "watching", session="w", users=("alice",))
        self.tell(0.5, at=0.05, online=True, snapshot=True)
        self.add(0.5, "watched", session="w", users=("alice",))
        self.beats("a1", 0.8, 3.9)
        self.add(4.0, "left", session="a1")
        self.change("alice", 4.01, online=False)
        self.tell(4.05, at=4.01, online=False)
        self.come("a2", "alice", 7.0)
        self.tell(7.1, at=7.05, online=True)
        self.beats("a2", 7.8, 20.0)
        self.add(20.0, "end")
        self.add(20.1, "store", user="alice", online=True)
        self.add(20.3, "row", user="alice", online=True, version=version(7.05))
        self.add(20.3, "row", user="wendy", online=False, version=version(2.35))

    def add(self, at: float, what: str, **rest: Any) -> None:
        self.events.append(Event(at, what, **rest))
        self.events.sort(key=lambda event: event.at)

    def come(self, session: str, user: str, at: float, *, instance: str = A, change: bool = True) -> None:
        self.add(at, "connecting", session=session, user=user, instance=instance)
        self.add(at + 0.1, "connected", session=session)
        if change:
            self.change(user, at + 0.05, online=True)

    def beats(self, session: str, since: float, till: float, *, receipts: bool = True) -> None:
        ref = 1
        while since < till:
            self.add(since, "beat", session=session, ref=ref if receipts else 0)
            if receipts:
                self.add(since + 0.01, "receipt", session=session, ref=ref)
            since, ref = since + 0.8, ref + 1

    def change(self, user: str, at: float, *, online: bool) -> None:
        self.add(at, "change", user=user, online=online, version=version(at))
        self.add(20.4, "kept", user=user, online=online, version=version(at))
        if self.setup.relayed:
            self.add(at + 100, "log", user=user, online=online, version=version(at))
        last = [event for event in self.events if of("change", user=user)(event)][-1]
        self.events = [event for event in self.events if not of("rest", user=user)(event)]
        for instance in (A, B):
            self.add(20.2, "rest", user=user, online=last.online, instance=instance)

    def tell(self, when: float, *, at: float, online: bool, snapshot: bool = False, subscription: str = "s") -> None:
        self.add(
            when, "told", session="w", subscription=subscription, user="alice", online=online, version=version(at),
            snapshot=snapshot,
        )  # fmt: skip

    def broken(self, on: str, how: str, since: float, till: float) -> None:
        self.add(since, "fault", on=on, how=how)
        self.add(till, "mended", on=on)

    def drop(self, which: Predicate) -> None:
        count = len(self.events)
        self.events = [event for event in self.events if not which(event)]
        assert len(self.events) < count

    def alter(self, which: Predicate, **values: Any) -> None:
        assert any(map(which, self.events))
        self.events = [replace(event, **values) if which(event) else event for event in self.events]
        self.events.sort(key=lambda event: event.at)

    def findings(self) -> set[tuple[str, str]]:
        """Rule and user of all that the checker finds."""
        return {(finding.rule, finding.user) for finding in check(self.history()).findings}

    def history(self) -> History:
        return History(self.setup, self.events)


def version(at: float) -> int:
    return round(at * 1e6)


def of(what: str, at: float | None = None, **fields: Any) -> Predicate:
    """The events of this kind: at this time, with these fields."""
    return lambda event: (
        event.what == what
        and (at is None or abs(event.at - at) < 1e-6)
        and all(getattr(event, name) == value for name, value in fields.items())
    )


@pytest.fixture
def story() -> Story:
    return Story()


def test_an_honest_history_passes(story):
    report = check(story.history())
    assert not report.findings
    assert report.slowest == pytest.approx(0.05)
    assert report.counts["told"] == 3


def test_a_history_survives_its_file(story):
    history = story.history()
    again = History.parse(list(history.lines()))
    assert again.setup == history.setup
    assert list(again.lines()) == list(history.lines())
    assert [replace(event, at=0.0) for event in again.events] == [replace(event, at=0.0) for event in history.events]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "line 1"),
        (["{}", "nothing"], "line 2"),
        (["{}", '{"at": 1, "what": "danced"}'], "line 2: there is no event 'danced'"),
        (["{}", '{"at": 1, "what": "told", "colour": 1}'], "line 2"),
        (["[]"], "line 1"),
    ],
)
def test_a_file_that_is_no_history_is_refused_in_a_line(lines, says):
    with pytest.raises(HistoryError, match=f"^{says}"):
        History.parse(lines)


def test_a_finding_names_the_lines_that_show_it(story):
    story.drop(of("told", 4.05))
    story.drop(of("told", 7.1))
    (finding,) = [finding for finding in check(story.history()).findings if finding.rule == "missed"][:1]
    lines = list(story.history().lines())
    assert [lines[number - 1] for number in finding.lines] == [
        f"{event}\n" for event in story.events if of("change", 4.01)(event) or of("told", 0.5)(event)
    ]
    assert "alice to w at 4.010" in str(finding)


# What watchers are told


def test_a_change_that_did_not_come_is_found(story):
    story.drop(of("told", 4.05))
    story.drop(of("told", 7.1))
    assert story.findings() == {("missed", "alice")}


def test_a_change_that_came_too_late_is_found(story):
    story.alter(of("told", 7.1), at=9.5)
    assert story.findings() == {("missed", "alice")}


def test_a_change_that_was_cancelled_in_time_need_not_come(story):
    """The offline at 8 and the online at 8.1 leave no flip to tell."""
    story.change("alice", 8.0, online=False)
    story.change("alice", 8.1, online=True)
    story.alter(of("row", user="alice"), version=version(8.1))
    assert story.findings() == {("false offline", "alice")}  # which is another matter: she was there


def test_a_newer_version_is_as_good(story):
    """She leaves, comes and leaves again, and only the last offline is told."""
    story.drop(of("told", 4.05))
    story.come("a3", "alice", 5.2)
    story.add(5.4, "left", session="a3")
    story.change("alice", 5.41, online=False)
    story.tell(5.5, at=5.41, online=False)
    assert story.findings() == set()


def test_who_was_not_connected_long_enough_is_owed_nothing(story):
    story.drop(of("told", 7.1))
    story.add(7.2, "lost", session="w")
    assert story.findings() == set()


def test_a_change_told_twice_is_found(story):
    story.tell(7.2, at=7.05, online=True)
    assert story.findings() == {("repeated", "alice")}


def test_a_snapshot_may_repeat_and_another_subscription_stands_for_itself(story):
    story.tell(7.2, at=7.05, online=True, snapshot=True)
    story.tell(7.3, at=7.05, online=True, snapshot=True, subscription="other")
    assert story.findings() == set()


def test_a_change_that_is_no_flip_is_found(story):
    story.come("a3", "alice", 8.0, change=False)
    story.change("alice", 8.05, online=True)
    story.tell(8.1, at=8.05, online=True)
    story.alter(of("row", user="alice"), version=version(8.05))
    assert story.findings() == {("repeated", "alice")}


def test_a_version_that_falls_is_found_in_snapshots_too(story):
    story.tell(8.0, at=4.01, online=False, snapshot=True)
    story.tell(8.1, at=7.05, online=True, snapshot=True)
    assert story.findings() == {("order", "alice")}


def test_version_0_stands_outside_the_order(story):
    story.tell(8.0, at=0.0, online=False, snapshot=True)
    story.tell(8.1, at=7.05, online=True, snapshot=True)
    assert story.findings() == set()


def test_a_change_before_any_snapshot_is_found(story):
    story.alter(of("told", 0.5), snapshot=False)
    assert story.findings() == {("order", "alice")}


@pytest.mark.parametrize("at", (7.3, 7.05))
def test_what_nobody_made_is_found(story, at):
    story.tell(7.4, at=at, online=False)
    story.tell(7.5, at=at + 0.01, online=True)
    assert ("invented", "alice") in story.findings()


def test_a_wrong_last_word_is_found(story):
    """Told at 19.9 what was not so: too late for the rule of lost changes."""
    story.tell(19.9, at=19.8, online=False)
    assert ("last word", "alice") in story.findings()


def walt(story: Story, **told: Any) -> None:
    """Walt comes to B at 9, and asks for Alice at 9.4; what he is told of her at 9.5."""
    story.come("w2", "walt", 9.0, instance=B)
    story.beats("w2", 9.8, 20.0)
    story.add(9.4, "subscribed", session="w2", subscription="s")
    story.add(9.41, "watching", session="w2", users=("alice",))
    values = {"online": True, "version": version(7.05), "snapshot": True} | told
    story.add(9.5, "told", session="w2", subscription="s", user="alice", **values)
    story.add(9.51, "watched", session="w2", users=("alice",))
    story.add(20.1, "store", user="walt", online=True)
    story.add(20.3, "row", user="walt", online=True, version=version(9.05))


def test_another_watcher_passes(story):
    walt(story)
    assert story.findings() == set()


FALSE = {("false offline", "alice")}
BOB = {("false offline", "bob")}


@pytest.mark.parametrize(("last", "expected"), [(0.0, FALSE), (4.01, FALSE)])
def test_a_first_snapshot_that_says_offline_of_somebody_who_is_there_is_found(story, last, expected):
    walt(story, online=False, version=version(last))
    story.add(9.7, "told", session="w2", subscription="s", user="alice", online=True, version=version(7.05))
    assert story.findings() == expected


@pytest.mark.parametrize(("at", "expected"), [(9.4, FALSE), (9.42, set())])
def test_a_first_snapshot_was_true_if_she_came_after_it_was_asked_for(story, at, expected):
    """Her first receipt is at ``at``: from then on it is certain that she is there."""
    walt(story, online=False, version=version(4.01))
    story.drop(lambda event: event.session == "a2" and event.what in {"beat", "receipt"} and event.at < 9.5)
    story.alter(of("connected", session="a2"), at=at)
    story.alter(of("connecting", session="a2"), at=9.0)
    story.add(9.7, "told", session="w2", subscription="s", user="alice", online=True, version=version(7.05))
    assert story.findings() - {("ghost", "alice")} == expected


@pytest.mark.parametrize("broken", ["redis", B, "kafka"])
def test_a_first_snapshot_has_no_excuse(story, broken):
    """It may come late, but then it says what is so."""
    walt(story, online=False, version=version(4.01))
    story.broken(broken, "frozen", 9.42, 9.45)
    story.add(9.7, "told", session="w2", subscription="s", user="alice", online=True, version=version(7.05))
    assert story.findings() == FALSE


@pytest.mark.parametrize(
    ("at", "broken", "expected"),
    [
        (9.3, "", set()),  # there since 7.1
        (9.4, "", FALSE),
        (11.2, B, set()),
        (11.4, B, FALSE),
        (11.2, A, FALSE),
    ],
)
def test_a_later_snapshot_that_says_offline_is_late_at_most(story, at, broken, expected):
    """Version 0 stands outside the order, so that no other rule sees it."""
    if broken:
        story.broken(broken, "frozen", 7.2, 9.2)
    story.tell(at, at=0.0, online=False, snapshot=True)
    story.tell(at + 0.1, at=7.05, online=True, snapshot=True)
    assert story.findings() == expected


UNANSWERED = {("unanswered", "alice")}


def test_a_watch_that_is_never_answered_is_found(story):
    walt(story)
    story.drop(of("watched", session="w2"))
    assert story.findings() == UNANSWERED
    story.drop(of("told", session="w2"))
    assert story.findings() == UNANSWERED


def test_a_watch_that_is_answered_without_a_snapshot_is_found(story):
    walt(story)
    story.alter(of("told", session="w2"), at=9.6)
    assert story.findings() == UNANSWERED


@pytest.mark.parametrize(("at", "expected"), [(11.6, set()), (11.7, UNANSWERED)])
def test_a_watch_that_is_answered_late_is_found(story, at, expected):
    walt(story)
    story.alter(of("watched", session="w2"), at=at)
    assert story.findings() == expected


@pytest.mark.parametrize("how", ["lost", "unwatched"])
@pytest.mark.parametrize(("at", "expected"), [(11.6, set()), (11.7, UNANSWERED)])
def test_whoever_does_not_wait_for_the_answer_is_owed_none(story, how, at, expected):
    walt(story)
    story.drop(of("watched", session="w2"))
    story.drop(of("told", session="w2"))
    story.drop(lambda event: event.session == "w2" and event.what in {"beat", "receipt"})
    story.drop(of("store", user="walt"))
    story.add(at, how, session="w2", users=("alice",) if how == "unwatched" else ())
    story.change("walt", 11.2, online=False)
    story.alter(of("row", user="walt"), online=False, version=version(11.2))
    assert story.findings() == expected


@pytest.mark.parametrize(
    ("on", "answered", "expected"),
    [
        ("redis", 15.6, set()),  # 11.66, away for 2 s, and 2 s of amnesty
        ("redis", 15.7, UNANSWERED),
        (B, 13.6, set()),
        (B, 13.8, UNANSWERED),
        ("cassandra", 13.6, set()),
        ("cassandra", 13.8, UNANSWERED),
        (A, 11.8, UNANSWERED),
        ("kafka", 11.8, UNANSWERED),
    ],
)
def test_an_answer_is_late_as_long_as_its_way_is_broken(story, on, answered, expected):
    walt(story)
    story.broken(on, "frozen", 9.45, 11.45)
    story.alter(of("watched", session="w2"), at=answered)
    story.alter(of("told", session="w2"), at=answered - 0.01)
    assert story.findings() == expected


# Who is there


def test_an_offline_of_somebody_who_is_there_is_found(story):
    story.change("alice", 10.0, online=False)
    story.tell(10.1, at=10.0, online=False)
    story.change("alice", 10.5, online=True)
    story.tell(10.6, at=10.5, online=True)
    story.alter(of("row", user="alice"), version=version(10.5))
    assert story.findings() == {("false offline", "alice")}


@pytest.mark.parametrize(
    ("at", "seconds", "expected"),
    [
        (2.0, 0.1, FALSE),
        (4.05, 0.1, set()),  # she leaves meanwhile
        (6.0, 0.1, set()),
        (7.15, 0.1, set()),  # she comes meanwhile
        (7.25, 0.1, FALSE),
        (16.0, 2.0, FALSE),
    ],
)
def test_rest_that_says_offline_of_somebody_who_is_there_is_found(story, at, seconds, expected):
    story.add(at, "polled", instance=B, user="alice", online=False, seconds=seconds)
    assert story.findings() == expected


@pytest.mark.parametrize(
    ("at", "expected"),
    [(2.0, set()), (6.3, set()), (6.4, {("ghost", "alice")}), (7.05, set())],  # she leaves at 4; 250 ms and 2 s
)
def test_rest_that_says_online_of_somebody_who_has_left_is_found(story, at, expected):
    story.add(at, "polled", instance=B, user="alice", online=True, seconds=0.1)
    assert story.findings() == expected


def test_rest_that_says_online_of_somebody_who_never_was_there_is_found(story):
    story.add(3.0, "polled", instance=B, user="bob", online=True, seconds=0.1)
    assert story.findings() == {("ghost", "bob")}


def test_rest_that_cannot_tell_may_say_so(story):
    story.add(2.0, "polled", instance=B, how="unknown", seconds=0.1)
    assert story.findings() == set()


@pytest.mark.parametrize(("on", "how"), [("redis", "emptied"), ("redis", "failed over"), (B, "frozen"), (A, "killed")])
def test_rest_has_no_excuse_for_an_offline(story, on, how):
    story.broken(on, how, 9.7, 9.9)
    story.add(10.0, "polled", instance=B, user="alice", online=False, seconds=0.1)
    assert story.findings() == FALSE


def flap(story: Story, off: float, on: float) -> None:
    """Alice is shown offline meanwhile, and everybody told."""
    for at, online in ((off, False), (on, True)):
        story.change("alice", at, online=online)
        story.tell(at + 0.05, at=at, online=online)
    story.alter(of("row", user="alice"), version=version(on))


def silent(story: Story, since: float, till: float) -> None:
    """Alice's beats have no receipts meanwhile."""
    story.drop(lambda event: event.what == "receipt" and since <= event.at <= till)


def test_an_instance_frozen_for_longer_than_a_lease_takes_no_beats(story):
    """The last beat with a receipt is at 9.4."""
    story.broken(A, "frozen", 9.5, 15.0)
    silent(story, 9.5, 15.0)
    flap(story, 11.5, 15.02)
    assert story.findings() == set()


@pytest.mark.parametrize(
    ("off", "how"),
    [
        (11.3, "frozen"),  # before the lease of the beat at 9.4 is over
        (17.5, "frozen"),  # it takes beats again
    ],
)
def test_a_frozen_instance_is_no_excuse_for_more(story, off, how):
    story.broken(A, how, 9.5, 15.0)
    silent(story, 9.5, 15.0)
    flap(story, off, max(15.02, off + 0.1))
    assert story.findings() == {("false offline", "alice")}


def test_another_instance_that_is_frozen_is_no_excuse(story):
    story.broken(B, "frozen", 9.5, 15.0)
    flap(story, 11.5, 15.02)
    assert ("false offline", "alice") in story.findings()


@pytest.mark.parametrize("how", ("killed", "frozen", "emptied"))
def test_the_store_is_no_excuse_for_an_offline(story, how):
    story.broken("redis", how, 9.5, 13.0)
    flap(story, 13.5, 14.0)
    assert ("false offline", "alice") in story.findings()


@pytest.mark.parametrize(
    ("off", "excused"),
    [
        (9.1, False),  # the lease of the beat at 8.6 goes on
        (11.0, True),
    ],
)
def test_a_killed_instance_leaves_the_lease(story, off, excused):
    story.drop(lambda event: event.session == "a2" and event.at > 9.0)
    story.broken(A, "killed", 9.0, 16.0)
    story.add(9.01, "lost", session="a2")
    story.come("a3", "alice", 12.0, change=False)
    story.beats("a3", 12.5, 20.0)
    flap(story, off, 12.05)
    assert story.findings() == (set() if excused else {("false offline", "alice")})


def test_a_store_that_lost_its_data_forgets_the_sessions_of_a_killed_instance(story):
    story.drop(lambda event: event.session == "a2" and event.at > 9.0)
    story.broken(A, "killed", 9.0, 16.0)
    story.broken("redis", "emptied", 9.0, 9.2)
    story.add(9.01, "lost", session="a2")
    story.come("a3", "alice", 12.0, change=False)
    story.beats("a3", 12.5, 20.0)
    flap(story, 10.0, 12.05)
    assert story.findings() == set()


@pytest.mark.parametrize(
    ("off", "drain", "excused"),
    [
        (10.5, 2.0, False),  # the rest of the lease of the beat at 8.6
        (10.7, 2.0, True),  # the beat after the stop began, at 9.4, counts no more
        (10.5, 1.0, True),
        (10.0, 1.0, False),
    ],
)
def test_a_planned_stop_leaves_the_rest_of_the_lease_or_the_drain_time(story, off, drain, excused):
    story.setup = replace(story.setup, drain=drain)
    story.drop(lambda event: event.session == "a2" and event.at > 9.45)
    story.broken(A, "stopped", 9.05, 12.0)
    story.add(9.6, "lost", session="a2")
    story.come("a3", "alice", 12.5, change=False)
    story.beats("a3", 13.0, 20.0)
    flap(story, off, 12.55)
    assert story.findings() == (set() if excused else {("false offline", "alice")})


@pytest.mark.parametrize(("how", "expected"), [("on", set()), ("connecting", {("false offline", "alice")})])
def test_whoever_has_connected_while_it_stopped_has_the_drain_time(story, how, expected):
    """A sign-on is a beat; CONNECTED is a promise."""
    story.drop(lambda event: event.session == "a2" and event.at > 9.0)
    story.add(9.0, "off", session="a2")
    story.broken(A, "stopped", 9.05, 12.0)
    if how == "on":
        story.add(9.1, "on", session="a2", ref=50)
        story.add(9.2, "receipt", session="a2", ref=50)
    else:
        story.come("a3", "alice", 9.1, change=False)
        story.add(9.3, "lost", session="a3")
    story.add(9.3, "lost", session="a2")
    story.come("a4", "alice", 12.5, change=False)
    story.beats("a4", 13.0, 20.0)
    flap(story, 10.9, 12.55)
    assert story.findings() == expected


def haunted(how: str, off: float) -> Story:
    """Bob comes to A at 0, his last beat is at 3.2, he is gone at 4 and offline at ``off``."""
    story = Story()
    story.come("b", "bob", 0.0)
    story.beats("b", 0.8, 3.5)
    if how:
        story.add(4.0, how, session="b")
    story.change("bob", off, online=False)
    story.add(20.3, "row", user="bob", online=False, version=version(off))
    return story


GHOST = {("ghost", "bob")}


@pytest.mark.parametrize(
    ("how", "off", "expected"),
    [
        ("left", 6.2, set()),
        ("left", 6.3, GHOST),
        ("died", 6.3, GHOST),
        ("closed", 6.3, GHOST),
        ("off", 6.3, GHOST),
        ("cut", 7.4, set()),  # 3.21 + lease + 250 ms + slack
        ("cut", 7.6, GHOST),
        ("", 7.4, set()),
        ("", 7.6, GHOST),
    ],
)
def test_how_long_somebody_may_be_online_afterwards(how, off, expected):
    story = haunted(how, off)
    assert story.findings() == expected
    gone = {"cut": 3.2 + 2.0, "": 3.2 + 2.0}.get(how, 4.0)
    assert check(story.history()).longest_ghost == pytest.approx(off - gone)


@pytest.mark.parametrize(
    ("on", "how", "off", "expected"),
    [
        ("redis", "frozen", 11.7, set()),  # gone at 4, away until 7.5, and 2 s of amnesty
        ("redis", "frozen", 11.8, GHOST),
        ("redis", "killed", 11.8, GHOST),
        (A, "frozen", 9.7, set()),  # his last words reach it when it goes on, at 7.5
        (A, "frozen", 9.8, GHOST),
        (A, "killed", 7.4, set()),  # nobody hears him: his lease
        (A, "killed", 7.6, GHOST),
        (B, "frozen", 6.3, GHOST),
        ("kafka", "frozen", 6.3, GHOST),
        ("cassandra", "killed", 6.3, GHOST),
    ],
)
def test_an_outage_adds_its_length_and_no_more(on, how, off, expected):
    story = haunted("left", off)
    story.broken(on, how, 3.5, 7.5)
    assert story.findings() == expected


def test_somebody_online_for_ever_is_found(story):
    story.come("b", "bob", 1.0)
    story.add(2.0, "left", session="b")
    story.add(20.1, "store", user="bob", online=True)
    story.add(20.3, "row", user="bob", online=True, version=version(1.05))
    assert story.findings() == {("ghost", "bob"), ("store", "bob"), ("rest", "bob"), ("row", "bob")}


def test_somebody_online_without_any_session_is_found(story):
    story.change("bob", 3.0, online=True)
    story.change("bob", 3.1, online=False)
    story.add(20.3, "row", user="bob", online=False, version=version(3.1))
    assert story.findings() == GHOST


# What the stores say


def test_kafka_s_log_may_repeat(story):
    story.add(120.0, "log", user="alice", online=True, version=version(7.05))
    story.add(120.1, "log", user="alice", online=False, version=version(4.01))
    assert story.findings() == set()


def test_kafka_s_log_out_of_order_is_found(story):
    story.alter(of("log", version=version(4.01)), at=110.0)
    assert story.findings() == {("log", "alice")}


def test_a_change_that_kafka_does_not_have_is_found(story):
    story.drop(of("log", version=version(4.01)))
    assert story.findings() == {("log", "alice")}


def test_a_record_that_says_otherwise_is_found(story):
    story.alter(of("log", version=version(4.01)), online=True)
    assert story.findings() == {("log", "alice")}


INVENTED = [(9.9, False), (9.9, True), (0.0, False)]


@pytest.mark.parametrize(("at", "online"), INVENTED)
def test_a_record_of_a_version_that_nobody_made_is_found(story, at, online):
    story.add(100.0, "log", user="alice", online=online, version=version(at))
    assert story.findings() == {("log", "alice")}


@pytest.mark.parametrize(
    ("at", "expected"), [(9.4, {("log", "alice")}), (9.6, set()), (10.01, set()), (10.1, {("log", "alice")})]
)
@pytest.mark.parametrize("how", ["emptied", "failed over"])
def test_a_record_may_be_of_a_change_that_nobody_could_read_any_more(story, how, at, expected):
    story.broken("redis", how, 10.0, 10.2)
    story.broken("kafka", "frozen", 9.0, 10.5)  # which keeps no change from being read
    story.add(120.0, "log", user="alice", online=False, version=version(at))
    assert story.findings() == expected


@pytest.mark.parametrize("at", (7.06, 12.0))
def test_a_row_of_a_version_that_nobody_made_is_found(story, at):
    story.alter(of("row", user="alice"), version=version(at))
    assert story.findings() == {("row", "alice")}


def test_a_row_that_says_otherwise_than_its_change_is_found(story):
    """A row of somebody who may be there or not, so that the truth does not tell."""
    story.come("b", "bob", 17.0)
    story.add(20.3, "row", user="bob", online=False, version=version(17.05))
    assert story.findings() == {("row", "bob")}


def test_without_kafka_there_is_no_log():
    assert Story(relayed=False).findings() == set()


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("row", {"online": False}),
        ("row", {"version": version(4.01)}),
        ("rest", {"online": False}),
        ("store", {"online": False}),
    ],
)
def test_a_store_that_does_not_say_the_truth_at_the_end_is_found(story, what, values):
    story.alter(of(what, user="alice"), **values)
    assert story.findings() == {(what, "alice")}


def test_a_row_that_is_missing_is_found(story):
    story.drop(of("row", user="wendy"))
    assert story.findings() == {("row", "wendy")}


@pytest.mark.parametrize("setup", [{}, {"instances": (), "histories": ()}])
@pytest.mark.parametrize("what", ["rest", "row", "kept"])
def test_a_store_that_was_not_asked_is_found(story, what, setup):
    story.setup = replace(story.setup, **setup)
    story.drop(of(what))
    assert story.findings() == {(what, "alice"), (what, "wendy")}


def test_an_instance_that_was_not_asked_is_found(story):
    story.drop(of("rest", instance=B))
    assert story.findings() == {("rest", "alice"), ("rest", "wendy")}


def test_an_instance_that_says_nothing_of_somebody_is_found(story):
    story.drop(of("rest", instance=B, user="wendy"))
    assert story.findings() == {("rest", "wendy")}


def test_a_history_store_that_was_not_read_is_found(story):
    story.setup = replace(story.setup, histories=("", "cassandra"))
    assert story.findings() == {(what, user) for what in ("row", "kept") for user in ("alice", "wendy")}


def test_a_change_that_a_history_store_does_not_keep_is_found(story):
    story.drop(of("kept", version=version(4.01)))
    assert story.findings() == {("kept", "alice")}


@pytest.mark.parametrize(("at", "online"), [*INVENTED, (4.01, True)])
def test_a_kept_change_that_nobody_made_is_found(story, at, online):
    story.add(20.4, "kept", user="alice", online=online, version=version(at))
    assert story.findings() == {("kept", "alice")}


@pytest.mark.parametrize(
    ("on", "at", "excused"),
    [("", 7.6, True), ("", 7.4, False), ("cassandra", 5.5, True), ("kafka", 5.5, False), (A, 5.5, False)],
)
def test_changes_that_waited_for_a_history_store_are_lost_with_the_store_s_data(story, on, at, excused):
    story.setup = replace(story.setup, histories=("cassandra",))
    story.events = [replace(e, instance="cassandra") if e.what in {"row", "kept"} else e for e in story.events]
    lost_at(story, at)
    story.drop(of("kept", user="bob"))
    if on:
        story.broken(on, "killed", 5.4, 9.0)
    assert ((("kept", "bob") in story.findings()), (("row", "bob") in story.findings())) == (not excused, not excused)


@pytest.mark.parametrize(("on", "excused"), [(A, True), (B, False)])
def test_an_instance_s_own_history_waits_for_it(story, on, excused):
    story.setup = replace(story.setup, histories=(A,))
    story.events = [replace(e, instance=A) if e.what in {"row", "kept"} else e for e in story.events]
    lost_at(story, 5.5)
    story.drop(of("kept", user="bob"))
    story.broken(on, "killed", 5.4, 9.0)
    assert (("kept", "bob") in story.findings()) is not excused


def lost_at(story: Story, at: float) -> None:
    """The store's data are lost at 8; of the change made at ``at`` nobody is told, and Kafka has it not."""
    story.come("b", "alice", at - 0.05, instance=B, change=False)
    story.change("bob", at, online=True)
    story.drop(of("log", user="bob"))
    story.broken("redis", "emptied", 8.0, 8.2)


@pytest.mark.parametrize(("at", "expected"), [(7.6, set()), (7.4, {("log", "bob")})])
def test_a_store_that_lost_its_data_has_lost_the_changes_of_the_last_moment(story, at, expected):
    lost_at(story, at)
    assert {finding for finding in story.findings() if finding[0] == "log"} == expected


@pytest.mark.parametrize(("at", "expected"), [(7.6, set()), (7.4, {("log", "bob")})])
def test_a_fail_over_has_lost_the_changes_of_the_last_moment(story, at, expected):
    lost_at(story, at)
    story.alter(of("fault", how="emptied"), how="failed over")
    assert {finding for finding in story.findings() if finding[0] == "log"} == expected


@pytest.mark.parametrize(("at", "excused"), [(7.6, True), (7.4, False)])
def test_who_comes_at_a_fail_over_may_be_forgotten(story, at, excused):
    """The change is lost, so that none says when its user was no more online."""
    story.come("b", "bob", at - 0.05, instance=B, change=False)
    story.change("bob", at, online=True)
    story.add(at + 0.05, "left", session="b")
    story.broken("redis", "failed over", 8.0, 8.2)
    assert (("ghost", "bob") in story.findings()) is not excused


def behind(story: Story, by: float) -> None:
    """At 8 the store fails over to one whose clock is so many s behind. Bob, who has come by then, goes on beating."""
    story.setup = replace(story.setup, behind=by)
    story.broken("redis", "failed over", 8.0, 8.5)
    story.come("b", "bob", 7.0)
    story.beats("b", 7.8, 13.5)


def gone_at(story: Story, stamp: float, seen: float) -> None:
    """Bob's change to offline, and the time by the store's clock; it was not there when looked at 50 ms before."""
    story.change("bob", stamp, online=False)
    story.alter(of("change", user="bob", version=version(stamp)), at=seen, seconds=0.05)
    story.add(20.3, "row", user="bob", online=False, version=version(stamp))


@pytest.mark.parametrize(("by", "left", "expected"), [(5.0, 13.98, set()), (5.0, 20.5, BOB), (0.0, 13.98, BOB)])
def test_after_a_fail_over_to_a_clock_behind_a_change_was_made_that_much_later(story, by, left, expected):
    behind(story, by)
    story.add(left, "left", session="b")
    gone_at(story, 9.0, seen=14.01)
    assert story.findings() & BOB == expected


@pytest.mark.parametrize(
    ("left", "back", "expected"),
    [
        (9.98, 30.0, set()),
        (9.95, 9.86, set()),  # connected again at 9.96: when it was made he may have been away
        (9.93, 9.84, BOB),
        (20.5, 30.0, BOB),
    ],
)
def test_as_long_as_that_clock_stands_still_a_change_was_made_since_the_last_look(story, left, back, expected):
    """Its stamp follows the last from before the fail-over."""
    behind(story, 5.0)
    story.add(left, "left", session="b")
    story.come("b2", "bob", back, change=False)
    gone_at(story, 7.99, seen=10.0)
    assert story.findings() & BOB == expected


@pytest.mark.parametrize(("back", "expected"), [(5.2, set()), (5.3, GHOST)])
def test_a_ghost_is_one_though_it_comes_back(story, back, expected):
    """Bob leaves at 3; the store has him online until he comes again, leaves at 12, and is offline."""
    story.come("b", "bob", 0.0)
    story.add(3.0, "left", session="b")
    story.come("b2", "bob", back, change=False)
    story.beats("b2", back + 0.8, 11.9)
    story.add(12.0, "left", session="b2")
    story.change("bob", 12.1, online=False)
    story.add(20.3, "row", user="bob", online=False, version=version(12.1))
    assert story.findings() == expected


@pytest.mark.parametrize(("again", "expected"), [(7.4, set()), (7.5, GHOST)])
def test_a_ghost_is_one_though_it_wakes_up(story, again, expected):
    """Bob beats at 3.2, and then not until his lease is over."""
    story = haunted("", 18.0)
    story.beats("b", again, 15.9)
    assert story.findings() == expected


def test_a_ghost_before_the_store_lost_its_data_is_no_less_one(story):
    forgotten(story, "emptied", till=18.0)
    story.alter(of("fault"), at=9.0)
    story.alter(of("mended"), at=9.2)
    story.come("b1", "bob", 8.0, change=False)
    story.beats("b1", 8.8, 17.5)
    assert [finding.watcher for finding in check(story.history()).findings if finding.rule == "ghost"] == [""]


def forgotten(story: Story, how: str, *, told: float | None = None, till: float = 18.0) -> None:
    """Bob leaves at 3, and the store's data are lost; Wendy, who knew him online, is told otherwise at ``told``.

    He comes again at ``till``.
    """
    story.come("b", "bob", 0.0)
    story.add(3.0, "left", session="b")
    story.broken("redis", how, 3.1, 3.3)
    story.come("b2", "bob", till)
    story.beats("b2", till + 0.8, 20.0)
    story.add(2.0, "watching", session="w", users=("bob",))
    values = {"session": "w", "subscription": "s", "user": "bob", "snapshot": True}
    story.add(2.1, "told", online=True, version=version(0.05), **values)
    story.add(2.1, "watched", session="w", users=("bob",))
    if told is not None:
        story.add(told, "told", online=False, version=0, **values)
    story.add(till + 0.1, "told", online=True, version=version(till + 0.05), **values)
    story.add(20.1, "store", user="bob", online=True)
    story.add(20.3, "row", user="bob", online=True, version=version(till + 0.05))


@pytest.mark.parametrize(
    ("told", "till", "expected"),
    [
        (9.6, 18.0, set()),  # 3, 250 ms and 2 s; 0.2 s away, 2 s of amnesty: 7.45; and 2.25 s to tell it
        (9.8, 18.0, GHOST),
        (None, 18.0, GHOST),
        (None, 9.6, set()),  # he is back before
    ],
)
def test_a_ghost_that_the_store_has_forgotten_is_found_by_what_is_shown(story, told, till, expected):
    forgotten(story, "emptied", told=told, till=till)
    assert story.findings() == expected


def test_a_ghost_that_no_watcher_sees_is_forgotten_with_the_store(story):
    forgotten(story, "emptied")
    story.add(8.0, "unwatched", session="w", users=("bob",))
    story.drop(lambda event: event.what == "told" and event.user == "bob" and event.at > 8.0)
    assert story.findings() == set()


def test_changes_that_waited_for_kafka_are_lost_with_the_store_s_data(story):
    lost_at(story, 5.5)
    story.broken("kafka", "killed", 5.4, 9.0)
    assert not {finding for finding in story.findings() if finding[0] == "log"}


def test_a_store_that_kept_its_data_has_lost_nothing(story):
    lost_at(story, 7.6)
    story.alter(of("fault", how="emptied"), how="killed")
    assert ("log", "bob") in story.findings()


@pytest.mark.parametrize(
    ("on", "excused"),
    [("redis", True), ("kafka", True), (B, True), (A, False), ("cassandra", False)],
)
def test_a_change_is_late_as_long_as_its_way_is_broken(story, on, excused):
    story.broken(on, "frozen", 7.06, 10.0)
    story.alter(of("told", 7.1), at=12.0)
    assert story.findings() == (set() if excused else {("missed", "alice")})


@pytest.mark.parametrize(("late", "excused"), [(11.2, True), (11.4, False)])
def test_a_change_is_late_as_long_as_the_clients_were_stalled(story, late, excused):
    story.add(7.06, "stalled", seconds=2.0)
    story.alter(of("told", 7.1), at=late)
    assert story.findings() == (set() if excused else {("missed", "alice")})


@pytest.mark.parametrize(
    ("on", "late", "takeover", "excused"),
    [(A, 12.2, 3.0, True), (A, 12.4, 3.0, False), (A, 12.2, 0.0, False), ("cassandra", 12.2, 3.0, False)],
)
def test_a_change_is_late_until_another_instance_relays(story, on, late, takeover, excused):
    story.setup = replace(story.setup, takeover=takeover)
    story.broken(on, "frozen", 7.06, 7.5)
    story.alter(of("told", 7.1), at=late)
    assert story.findings() == (set() if excused else {("missed", "alice")})


@pytest.mark.parametrize(
    ("on", "late", "excused"), [("kafka", 13.2, True), ("kafka", 13.4, False), ("redis", 13.2, False)]
)
def test_a_change_is_late_until_the_return_of_kafka_was_noticed(story, on, late, excused):
    story.setup = replace(story.setup, retry=1.0)
    story.broken(on, "frozen", 7.06, 10.0)
    story.alter(of("told", 7.1), at=late)
    assert story.findings() == (set() if excused else {("missed", "alice")})


def test_a_change_may_not_be_later_than_that(story):
    story.broken("kafka", "frozen", 7.06, 10.0)
    story.alter(of("told", 7.1), at=12.5)
    assert story.findings() == {("missed", "alice")}
    assert check(story.history()).recovery == pytest.approx(2.5)


def test_recovery_lasts_until_every_instance_is_sure(story):
    story.broken("redis", "frozen", 9.0, 9.5)
    story.add(12.0, "recovered")
    report = check(story.history())
    assert not report.findings
    assert report.recovery == pytest.approx(2.5)
