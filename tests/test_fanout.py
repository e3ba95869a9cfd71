"""presence.fanout: from a change to what a session is told (WIRE §5; DESIGN §4, Fan-out and Snapshot). Pure."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest

from presence.core.model import Session, Status
from presence.fanout import Fanout, Watcher


@pytest.fixture
def fanout():
    return Fanout()


def watching(fanout: Fanout, *users: str, read: bool | None = False) -> Watcher:
    """A watcher of these users, who have been told of (offline, version 0) unless ``read`` is None."""
    watcher = Watcher(Session("me", "s1", "web", 0, 0), lambda: None)
    fanout.watch(watcher, users)
    if read is not None:
        watcher.snapshot([Status(user, read, 1) for user in users])
    return watcher


def on(user: str, version: int) -> Status:
    return Status(user, True, version)


def off(user: str, version: int) -> Status:
    return Status(user, False, version)


# Changes flip


def test_a_change_reaches_every_session_that_watches(fanout):
    """WIRE §5: "Every change of a watched user reaches every session that watches it"."""
    watchers = [watching(fanout, "a"), watching(fanout, "a", "b"), watching(fanout, "b")]
    fanout.deliver(on("a", 5))
    assert [watcher.flips() for watcher in watchers] == [[on("a", 5)], [on("a", 5)], []]
    assert [watcher.flips() for watcher in watchers] == [[], [], []]


def test_who_is_told_is_woken(fanout):
    woken: list[str] = []
    for user in ("a", "b"):
        watcher = Watcher(Session("me", user, "web", 0, 0), partial(woken.append, user))
        fanout.watch(watcher, [user])
    fanout.deliver(on("a", 5))
    assert woken == ["a"]
    fanout.deliver(on("a", 5))
    assert woken == ["a"]


def test_changes_of_several_users_are_told_in_the_order_they_came(fanout):
    watcher = watching(fanout, "a", "b", "c")
    for change in (on("b", 5), on("c", 6), on("a", 7)):
        fanout.deliver(change)
    assert [status.user for status in watcher.flips()] == ["b", "c", "a"]


def test_a_status_that_changed_several_times_arrives_as_its_newest_state(fanout):
    """WIRE §5: "A status that changed several times while a client was slow MAY arrive as only its newest state"."""
    watcher = watching(fanout, "a")
    for change in (on("a", 5), off("a", 6), on("a", 7)):
        fanout.deliver(change)
    assert watcher.flips() == [on("a", 7)]


def test_where_no_flip_is_left_to_tell_nothing_is_sent(fanout):
    """WIRE §5: "Where a slow reader … leaves no flip to tell, nothing is sent": and the version goes on."""
    watcher = watching(fanout, "a")
    fanout.deliver(on("a", 5))
    fanout.deliver(off("a", 6))
    assert watcher.flips() == []
    fanout.deliver(on("a", 6))
    assert watcher.flips() == []
    fanout.deliver(on("a", 7))
    assert watcher.flips() == [on("a", 7)]


@pytest.mark.parametrize("version", [4, 5])
def test_a_change_that_is_not_newer_is_dropped(fanout, version):
    """DESIGN §4: "every consumer drops a change whose version is not newer than the one it knows"."""
    watcher = watching(fanout, "a")
    fanout.deliver(on("a", 5))
    assert watcher.flips() == [on("a", 5)]
    fanout.deliver(off("a", version))
    assert watcher.pending == {}
    assert watcher.flips() == []


def test_a_late_change_does_not_replace_the_pending_one(fanout):
    watcher = watching(fanout, "a")
    fanout.deliver(on("a", 7))
    fanout.deliver(off("a", 6))
    assert watcher.flips() == [on("a", 7)]


def test_whatever_order_changes_come_in_flips_alternate_and_versions_rise(fanout):
    """WIRE §5: "A MESSAGE without `snapshot` always turns round what this session was last told"."""
    rng = random.Random(3)
    for _ in range(300):
        watcher = watching(fanout, "a")
        told = [off("a", 1)]
        changes = [Status("a", version % 2 == 0, version) for version in range(2, 12)] * 2
        rng.shuffle(changes)
        for change in changes:
            fanout.deliver(change)
            if rng.random() < 0.4:
                told += watcher.flips()
            elif rng.random() < 0.2:
                read = rng.choice(changes)
                ((newest, news),) = watcher.snapshot([read])
                assert news == (newest.event if newest.online != told[-1].online else None)
                assert newest.version >= told[-1].version
                told += [newest] if news else []
        told += watcher.flips()
        assert all(older.online != newer.online for older, newer in pairwise(told))
        assert all(older.version < newer.version for older, newer in pairwise(told))
        assert told[-1].online is (max(changes, key=lambda change: change.version)).online
        fanout.unwatch(watcher, ["a"])


def test_a_slow_client_costs_no_memory_beyond_the_users_it_watches(fanout):
    """DESIGN §4: "A slow client is never sent a backlog, and never costs memory beyond the number of users"."""
    watcher = watching(fanout, "a", "b")
    for version in range(2, 10_000):
        fanout.deliver(Status("ab"[version % 2], version % 4 < 2, version))
        fanout.deliver(on("c", version))
    assert len(watcher.pending) + len(watcher.told) <= 4


# Snapshots


def test_before_the_snapshot_no_change_is_told(fanout):
    """WIRE §5: "the first MESSAGE about a newly watched user … is its present state"."""
    watcher = watching(fanout, "a", read=None)
    fanout.deliver(on("a", 5))
    assert watcher.flips() == []
    assert watcher.snapshot([off("a", 3)]) == [(on("a", 5), None)]
    assert watcher.flips() == []
    fanout.deliver(off("a", 6))
    assert watcher.flips() == [off("a", 6)]


def test_after_the_snapshot_only_newer_changes_get_through(fanout):
    """DESIGN §4: "register first, then read …, and only then let changes of those users through that are newer"."""
    watcher = watching(fanout, "a", read=None)
    fanout.deliver(on("a", 5))
    assert watcher.snapshot([off("a", 6)]) == [(off("a", 6), None)]
    fanout.deliver(on("a", 5))
    assert watcher.flips() == []


def test_a_repeated_snapshot_says_what_it_turns_round(fanout):
    """WIRE §5: "A repeated `presence.subscribe` snapshots again"; other subscriptions are told the flip as a change."""
    watcher = watching(fanout, "a")
    assert watcher.snapshot([off("a", 1)]) == [(off("a", 1), None)]
    assert watcher.snapshot([on("a", 5)]) == [(on("a", 5), on("a", 5).event)]
    fanout.deliver(off("a", 6))
    assert watcher.snapshot([on("a", 5)]) == [(off("a", 6), off("a", 6).event)]
    assert watcher.flips() == []


def test_a_snapshot_read_before_what_was_told_meanwhile_does_not_go_back(fanout):
    """WIRE §5: "Per subscription and user the versions never go down"."""
    watcher = watching(fanout, "a")
    fanout.deliver(on("a", 5))
    assert watcher.flips() == [on("a", 5)]
    assert watcher.snapshot([off("a", 4)]) == [(on("a", 5), None)]


def test_of_users_no_longer_watched_there_is_no_snapshot(fanout):
    """WIRE §5: "after the receipt of `presence.unsubscribe` nothing about those users follows"."""
    watcher = watching(fanout, "a", "b", read=None)
    fanout.unwatch(watcher, ["a"])
    assert watcher.snapshot([on("a", 5), on("b", 6)]) == [(on("b", 6), None)]
    assert "a" not in watcher.told


def test_a_user_no_store_knows_is_told_offline_with_version_0_and_then_its_first_change(fanout):
    watcher = watching(fanout, "a", read=None)
    assert watcher.snapshot([Status("a")]) == [(Status("a"), None)]
    fanout.deliver(on("a", 5))
    assert watcher.flips() == [on("a", 5)]


# Hidden users (policy `contacts`)


def test_of_a_hidden_user_nothing_but_version_0_is_told(fanout):
    """WIRE §5: "Watching a hidden user is … answered exactly like watching a user never seen"."""
    watcher = watching(fanout, "a", read=None)
    fanout.deliver(on("a", 5))
    assert watcher.snapshot([Status("a")], hidden=["a"]) == [(Status("a"), None)]
    fanout.deliver(on("a", 6))
    assert watcher.flips() == []
    assert watcher.pending == {}


def test_a_hidden_users_change_is_kept_and_wakes_nobody(fanout):
    """WIRE §5: "the look-ups made are the same". It is kept for the snapshot that is read as the user is revealed."""
    woken: list[str] = []
    watcher = Watcher(Session("me", "s1", "web", 0, 0), lambda: woken.append("me"))
    fanout.watch(watcher, ["a", "b"])
    watcher.snapshot([Status("a"), Status("b")], hidden=["a"])
    fanout.deliver(on("a", 5))
    assert (woken, watcher.has_news) == ([], False)
    fanout.deliver(on("b", 6))
    assert (woken, watcher.has_news) == (["me"], True)
    assert watcher.snapshot([off("a", 4)]) == [(on("a", 5), on("a", 5).snapshot)]


def test_on_revocation_version_0_stands_outside_the_order(fanout):
    """WIRE §5: "(version 0 stands outside the order of versions)"; "on becoming visible, a snapshot"."""
    watcher = watching(fanout, "a")
    fanout.deliver(on("a", 5))
    assert watcher.flips() == [on("a", 5)]
    assert watcher.snapshot([Status("a")], hidden=["a"]) == [(Status("a"), Status("a").snapshot)]
    fanout.deliver(on("a", 6))
    assert watcher.flips() == []
    assert watcher.snapshot([on("a", 7)]) == [(on("a", 7), on("a", 7).snapshot)]
    assert watcher.hidden == set()
    fanout.deliver(off("a", 8))
    assert watcher.flips() == [off("a", 8)]


def test_a_change_that_was_pending_at_the_revocation_is_not_told(fanout):
    watcher = watching(fanout, "a")
    fanout.deliver(on("a", 5))
    watcher.snapshot([Status("a")], hidden=["a"])
    assert watcher.flips() == []


# Watching and forgetting


def test_who_does_not_watch_any_more_is_told_nothing(fanout):
    watcher, other = watching(fanout, "a", "b"), watching(fanout, "a")
    fanout.deliver(on("a", 5))
    fanout.unwatch(watcher, ["a"])
    fanout.deliver(off("a", 6))
    fanout.deliver(on("b", 7))
    assert watcher.flips() == [on("b", 7)]
    assert watcher.session.watched == {"b"}
    assert other.flips() == []  # on and off again
    fanout.deliver(on("a", 8))
    assert other.flips() == [on("a", 8)]


def test_unwatching_what_is_not_watched_is_a_no_op(fanout):
    """WIRE §6: "unwatching what is not watched" is a no-op."""
    watcher = watching(fanout, "a")
    fanout.unwatch(watcher, ["b", "c"])
    assert fanout.watched() == ["a"]


def test_watching_again_begins_with_a_snapshot_again(fanout):
    watcher = watching(fanout, "a")
    fanout.unwatch(watcher, ["a"])
    fanout.watch(watcher, ["a"])
    fanout.deliver(on("a", 5))
    assert watcher.flips() == []
    assert watcher.snapshot([on("a", 5)]) == [(on("a", 5), None)]


def test_watching_twice_is_watching_once(fanout):
    watcher = watching(fanout, "a")
    fanout.watch(watcher, ["a"])
    fanout.deliver(on("a", 5))
    assert watcher.flips() == [on("a", 5)]
    fanout.unwatch(watcher, ["a"])
    assert fanout.watched() == []


def test_when_all_have_gone_nothing_is_left(fanout):
    """DESIGN §7: what one client does never grows the cost of another: nor what it leaves behind."""
    watchers = [watching(fanout, *(f"u{number}" for number in range(50))) for _ in range(10)]
    fanout.deliver(on("u0", 5))
    for watcher in watchers:
        fanout.unwatch(watcher, list(watcher.session.watched))
        assert (watcher.told, watcher.pending, watcher.hidden, watcher.session.watched) == ({}, {}, set(), set())
    assert fanout._watchers == {}


def test_without_a_subscription_what_was_told_is_forgotten_and_the_watches_stay(fanout):
    """WIRE §5: a snapshot comes "also for ids watched before SUBSCRIBE, once subscribed"."""
    watcher = watching(fanout, "a")
    watcher.forget(["a"])
    fanout.deliver(on("a", 5))
    assert watcher.flips() == []
    assert watcher.snapshot([on("a", 5)]) == [(on("a", 5), None)]


# What is settled after a loss of the store (DESIGN §3.6)


def test_what_somebody_was_told_comes_with_the_newest_version_told(fanout):
    """DESIGN §3.6: "every instance hands over the users it has told its watchers are online"."""
    first, second = watching(fanout, "a", "b", "c"), watching(fanout, "a", "c", read=None)
    for change in (on("a", 5), on("b", 5), off("c", 5)):
        fanout.deliver(change)
    first.flips()
    second.snapshot([on("a", 7)])
    assert sorted(fanout.told(), key=lambda status: status.user) == [on("a", 7), on("b", 5), off("c", 5)]


def test_what_is_pending_is_settled_as_well(fanout):
    """Found in review: a change that the store had lost was told after the settling, and never corrected."""
    watching(fanout, "a")
    watching(fanout, "b", read=None)
    fanout.deliver(on("a", 5))
    fanout.deliver(on("b", 5))
    assert list(fanout.told()) == [on("a", 5), on("b", 5)]
