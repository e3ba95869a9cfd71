"""presence.server.health: readiness, from the state of what the server depends on."""

from __future__ import annotations

import pytest

from presence.ports import Health
from presence.server.health import readiness


def health(state: str, detail: str | None = None) -> Health:
    one = Health()
    one.note(state, detail)
    one.since = 1_752_748_200.123
    return one


@pytest.mark.parametrize(
    ("store", "history", "stopping", "status", "code"),
    (
        ("up", "up", False, "ready", 200),
        ("up", "down", False, "ready", 200),  # WIRE §2: "When only the history store is down, answers go on"
        ("down", "up", False, "not ready", 503),
        ("unknown", "up", False, "not ready", 503),
        ("up", "up", True, "stopping", 503),
        ("down", "up", True, "stopping", 503),
    ),
)
def test_the_server_is_ready_while_its_store_is_up_and_it_does_not_stop(store, history, stopping, status, code):
    body, answered = readiness({"store": health(store), "history": health(history)}, stopping=stopping)
    assert (body["status"], answered) == (status, code)


def test_each_dependency_is_told_with_its_state_and_since_when():
    body, _ = readiness({"store": health("up"), "history": health("down", "disk full")}, stopping=False)
    assert body["dependencies"] == {
        "store": {"state": "up", "since": "2025-07-17T10:30:00.123Z"},
        "history": {"state": "down", "since": "2025-07-17T10:30:00.123Z"},  # no detail: whoever asks is unknown
    }


def test_a_state_is_news_once_and_keeps_its_beginning():
    one = Health()
    assert one.note("down", "no answer")
    since = one.since
    assert not one.note("down", "no answer yet")
    assert (one.since, one.detail) == (since, "no answer yet")
    assert one.note("up")
    assert one.detail is None


@pytest.mark.parametrize(("lag", "state"), ((0.04, "up"), (5.0, "up"), (5.1, "degraded"), (3_600.0, "degraded")))
def test_a_sink_that_is_far_behind_is_degraded(lag, state):
    behind = health("up")
    behind.lag = lag
    behind.unread = 3
    body, answered = readiness({"store": health("up"), "bus": behind}, stopping=False)
    assert body["dependencies"]["bus"] == {  # type: ignore[index]
        "state": state,
        "since": "2025-07-17T10:30:00.123Z",
        "lagSeconds": round(lag, 1),
        "unread": 3,
    }
    assert answered == 200


def test_a_sink_that_is_away_is_down_however_far_it_is_behind():
    away = health("down")
    away.lag = 60.0
    body, answered = readiness({"store": health("up"), "bus": away}, stopping=False)
    assert body["dependencies"]["bus"]["state"] == "down"  # type: ignore[index]
    assert answered == 200
