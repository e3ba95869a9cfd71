"""Populations and schedules: the same from the same seed, and of the shape that is asked for."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.workload import arrivals, beats, friend_graph, schedule, user_ids, watch_lists


def test_users_of_workers_do_not_meet():
    assert not set(user_ids(100)) & set(user_ids(100, first=100))


@given(st.integers(0, 60), st.floats(0, 30), st.integers(1, 20), st.integers(0, 5))
def test_friendship_is_mutual_and_capped(users, mean, most, seed):
    graph = friend_graph(users, mean=mean, most=most, seed=seed)
    assert len(graph) == users
    for user, friends in enumerate(graph):
        assert friends == sorted(set(friends))
        assert user not in friends
        assert len(friends) <= most
        assert all(user in graph[friend] for friend in friends)


@pytest.mark.parametrize("mean", [10, 50])
def test_friends_are_as_many_as_asked_for_and_skewed(mean):
    degrees = sorted(map(len, friend_graph(3000, mean=mean, most=1000, seed=3)))
    assert fmean(degrees) == pytest.approx(mean, rel=0.01)
    assert degrees[-1] > 5 * mean
    assert median(degrees) < fmean(degrees)
    assert degrees[len(degrees) // 20] > 0  # the tail is not lonely


def test_without_skew_all_are_alike():
    degrees = list(map(len, friend_graph(2000, mean=50, exponent=0.0)))
    assert max(degrees) < 100


def test_celebrities_are_everywhere():
    degrees = list(map(len, friend_graph(2000, mean=20, seed=1)))
    top = sorted(range(2000), key=degrees.__getitem__)[-50:]
    assert 10 < sum(user < 1000 for user in top) < 40


def test_the_seed_makes_the_graph_and_the_schedule():
    assert friend_graph(200, mean=10, seed=1) == friend_graph(200, mean=10, seed=1)
    assert friend_graph(200, mean=10, seed=1) != friend_graph(200, mean=10, seed=2)
    one, same, other = (list(schedule(50, 100.0, churn=1.0, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_watchers_see_their_friends():
    graph = friend_graph(1000, mean=10)
    assert watch_lists(graph) == {user: friends for user, friends in enumerate(graph) if friends}
    assert 400 < len(watch_lists(graph, share=0.5)) < 600


@given(st.floats(0.5, 100), st.floats(0, 1), st.integers(0, 100))
def test_beats_keep_their_period(period, jitter, seed):
    moments = list(beats(10.0, 10.0 + 50 * period, period=period, jitter=jitter, dice=random.Random(seed)))
    assert len(moments) in {49, 50, 51}
    assert all(10.0 <= moment < 10.0 + 50 * period for moment in moments)
    assert moments == sorted(moments)
    gaps = [b - a for a, b in pairwise(moments)]
    assert max(gaps) <= period * (1 + jitter) * 1.0001
    assert fmean(gaps) == pytest.approx(period, rel=0.05)


def test_first_beats_are_spread_over_the_period():
    dice = random.Random(1)
    firsts = [next(beats(0.0, 100.0, period=30.0, dice=dice)) for _ in range(2000)]
    assert fmean(firsts) == pytest.approx(15.0, abs=1.0)
    assert 0 <= min(firsts) < 1
    assert 29 < max(firsts) < 32


def test_arrivals_are_poisson():
    moments = list(arrivals(50.0, 100.0, 300.0, dice=random.Random(1)))
    assert all(100 <= moment < 300 for moment in moments)
    assert len(moments) == pytest.approx(10_000, rel=0.04)
    counts = Counter(int(moment) for moment in moments)
    # As many as expected and as uneven: the variance of a Poisson count is its mean.
    variance = fmean((counts[second] - 50) ** 2 for second in range(100, 300))
    assert variance == pytest.approx(50, rel=0.35)
    assert list(arrivals(0.0, 0.0, 10.0, dice=random.Random(1))) == []


@given(st.integers(1, 20), st.floats(0, 20), st.floats(0, 3), st.floats(0, 20), st.integers(0, 100))
def test_sessions_beat_while_they_are_there_and_only_then(sessions, ramp, churn, away, seed):
    there: set[int] = set()
    last = 0.0
    for at, kind, session in schedule(sessions, 120.0, ramp=ramp, period=10.0, churn=churn, away=away, seed=seed):
        assert last <= at < 120.0
        last = at
        if kind == "connect":
            assert session not in there
            there.add(session)
        elif kind == "leave":
            there.remove(session)
        else:
            assert session in there


def test_a_crowd_offers_what_was_asked_for():
    actions = list(schedule(1000, 300.0, ramp=10.0, period=30.0, churn=5.0, away=20.0, seed=1))
    counts = Counter(action.kind for action in actions)
    assert counts["leave"] == pytest.approx(5 * 290, rel=0.1)
    assert [action.session for action in actions if action.kind == "connect"][:5] == [0, 1, 2, 3, 4]
    # 5 a second are away for 20 s each: 900 are there, and each beats twice a minute.
    settled = sum(action.kind == "beat" and 100 <= action.at < 300 for action in actions)
    assert settled == pytest.approx(900 / 30 * 200, rel=0.05)
