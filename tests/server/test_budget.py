"""presence.server.budget: how many ids a user may ask for (WIRE §6)."""

from __future__ import annotations

import pytest

from presence.server import budget
from presence.server.budget import IdBudget


def test_a_burst_is_let_through_and_then_the_rate_counts():
    """WIRE §6: "5,000 ids a second and user with bursts of 10,000"."""
    ids = IdBudget(5_000, 10_000)
    assert ids.take("alice", 10_000, 0.0) == 0
    assert ids.take("alice", 1_000, 0.0) == pytest.approx(0.2)
    assert ids.take("alice", 1_000, 0.19) > 0
    assert ids.take("alice", 1_000, 0.2) == 0


def test_each_user_has_a_budget_of_their_own():
    """WIRE §6: "5,000 ids a second and user"."""
    ids = IdBudget(1, 10)
    assert ids.take("alice", 10, 0.0) == 0
    assert ids.take("bob", 10, 0.0) == 0
    assert ids.take("alice", 1, 0.0) == pytest.approx(1)


def test_what_is_refused_costs_nothing():
    ids = IdBudget(1, 10)
    assert ids.take("alice", 6, 0.0) == 0
    assert ids.take("alice", 5, 0.0) == pytest.approx(1)
    assert ids.take("alice", 4, 0.0) == 0


def test_more_than_a_whole_burst_counts_as_a_burst():
    """So that the wait that is told does end."""
    ids = IdBudget(1, 10)
    assert ids.take("alice", 50, 0.0) == 0
    assert ids.take("alice", 50, 0.0) == pytest.approx(10)
    assert ids.take("alice", 50, 10.0) == 0


def test_a_refusal_always_says_to_wait():
    ids = IdBudget(1e9, 1)
    assert ids.take("alice", 1, 0.0) == 0
    assert ids.take("alice", 1, 0.0) > 0


def test_users_whose_budget_is_full_again_are_forgotten(monkeypatch):
    """DESIGN §7, and the rule that what one client costs does not grow."""
    monkeypatch.setattr(budget, "MANY", 3)
    ids = IdBudget(1, 10)
    for name in ("a", "b", "c"):
        ids.take(name, 5, 0.0)
    ids.take("busy", 10, 8.0)
    assert set(ids._buckets) == {"busy"}
    # Forgetting gives nobody more than their due.
    assert ids.take("busy", 5, 9.0) > 0


def test_users_whose_budget_is_not_full_are_remembered(monkeypatch):
    monkeypatch.setattr(budget, "MANY", 3)
    ids = IdBudget(1, 10)
    for number in range(10):
        assert ids.take(f"user{number}", 10, 0.0) == 0
    for number in range(10):
        assert ids.take(f"user{number}", 1, 0.5) > 0
