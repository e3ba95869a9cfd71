"""The search, over a made-up server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.capacity import Plan, ServerGone, Trial, least_hold, limited_by, rounded, search
from loadtest.run import Step

PLAN = Plan(start=1_000, maximum=20_000, growth=1.5, resolution=0.08, hold=120, long_hold=900, storm=180)


def server(holds, *, long=None, storm=None, generator=10**9):
    """A server that holds so many, fewer for long or through a storm; its generator can do so many."""
    limits = {"step": holds, "long hold": long or holds, "storm": storm or holds}

    def run(sessions, seconds, kind):
        broken = f"p99 was 2 s at {sessions}" if sessions > limits[kind] else None
        invalid = "The generator was the limit." if sessions > generator else None
        return Trial(sessions, kind, Step(sessions=sessions, seconds=seconds, breach=broken), invalid)

    return run


def faulty(run, doubtful):
    """The same, but one load cannot be believed."""

    def instead(sessions, seconds, kind):
        trial = run(sessions, seconds, kind)
        return replace(trial, invalid="It was in doubt.") if sessions == doubtful else trial

    return instead


def loads(found, kind="step"):
    return [trial.sessions for trial in found.trials if trial.kind == kind]


@pytest.mark.parametrize("holds", [1_000, 1_300, 4_700, 9_999, 15_000])
def test_finds_what_the_server_holds(holds):
    found = search(PLAN, server(holds))

    assert found.confirmed and not found.floor
    assert holds * (1 - PLAN.resolution) * 0.98 <= found.sessions <= holds


def test_steps_up_then_bisects_then_confirms():
    found = search(PLAN, server(4_000))

    assert loads(found) == [1_000, 1_500, 2_200, 3_300, 5_000, 4_200, 3_800, 4_000]
    assert [(one.kind, one.sessions) for one in found.trials[-2:]] == [("long hold", 4_000), ("storm", 4_000)]
    assert {one.step.seconds for one in found.trials[:-2]} == {120}
    assert [one.step.seconds for one in found.trials[-2:]] == [900, 180]
    assert found.stopped == "at 4,200 sessions p99 was 2 s at 4200", "of what broke it, the nearest"


def test_the_most_that_was_asked_for_is_a_floor():
    found = search(PLAN, server(10**6))

    assert (found.sessions, found.floor, found.confirmed) == (20_000, True, True)
    assert "most that was asked for" in found.stopped


def test_a_generator_at_its_limit_makes_it_a_floor():
    found = search(PLAN, server(10**6, generator=3_000))

    assert found.floor and found.confirmed and found.sessions <= 3_000
    assert found.stopped == "the step at 3,200 sessions was not to be believed: the generator was the limit"


def test_a_doubt_in_the_bisection_makes_it_a_floor():
    """Above it the server broke, but between that and what was kept nothing is known of it."""
    found = search(PLAN, faulty(server(4_800), 4_200))

    assert loads(found)[:6] == [1_000, 1_500, 2_200, 3_300, 5_000, 4_200]
    assert found.floor and found.confirmed and 3_800 <= found.sessions < 4_200
    assert found.stopped == "the step at 4,200 sessions was not to be believed: it was in doubt"


def test_a_breach_below_a_doubt_is_what_bounds_it():
    found = search(PLAN, faulty(server(4_000), 5_000))

    assert found.confirmed and not found.floor
    assert found.stopped == "at 4,200 sessions p99 was 2 s at 4200"


def test_a_search_that_is_interrupted_gives_back_what_it_has():
    runs = server(10**6)

    def run(sessions, seconds, kind):
        if sessions > 2_000:
            raise KeyboardInterrupt
        return runs(sessions, seconds, kind)

    found = search(PLAN, run)

    assert (found.interrupted, found.confirmed, found.sessions, loads(found)) == (True, False, 0, [1_000, 1_500])
    assert found.stopped == "the search was interrupted; 1,500 sessions were kept for 120 s"


def dies(run, beyond):
    """The same, but after the first load above so many it is gone."""
    tried: list[int] = []

    def until(sessions, seconds, kind):
        if any(one > beyond for one in tried):
            raise ServerGone("it is down")
        tried.append(sessions)
        return run(sessions, seconds, kind)

    return until


@pytest.mark.parametrize(("holds", "no_verdict"), [(2_000, False), (10**6, True)])
def test_a_server_that_dies_ends_the_search(holds, no_verdict):
    """Where the last load had broken the SLO that is what it died of; else nobody knows."""
    found = search(PLAN, dies(server(holds), 2_000))

    assert (found.confirmed, found.sessions, found.open) == (False, 0, no_verdict)
    kept = "1,500" if holds == 2_000 else "2,200"
    assert found.stopped == (
        f"the server was gone after 2,200 sessions: it is down; {kept} sessions were kept for 120 s"
    )
    assert loads(found) == [1_000, 1_500, 2_200]


def test_a_server_that_was_never_there_is_a_mistake():
    def gone(*_):
        raise ServerGone("it is down")

    with pytest.raises(ServerGone, match="it is down"):
        search(PLAN, gone)


def test_what_is_not_held_long_is_tried_with_less():
    found = search(PLAN, server(4_000, long=3_500))

    assert loads(found, "long hold") == [4_000, 3_600, 3_200]
    assert found.sessions == 3_200 and found.confirmed
    assert found.stopped.startswith("the long hold at 3,600 sessions was not kept")


def test_a_storm_that_breaks_it_lowers_it_too():
    found = search(PLAN, server(4_000, storm=3_700))

    assert (found.sessions, loads(found, "storm")) == (3_600, [4_000, 3_600])


def test_a_first_step_too_high_is_searched_downwards():
    found = search(PLAN, server(400))

    assert found.confirmed and 350 <= found.sessions <= 400


def test_a_server_that_holds_nothing_is_given_up_soon():
    found = search(PLAN, server(0))

    assert (found.sessions, found.confirmed) == (0, False)
    assert len(found.trials) <= 6 and not loads(found, "long hold")


def test_what_is_never_confirmed_is_no_capacity():
    found = search(PLAN, server(4_000, long=100))

    assert (found.sessions, found.confirmed) == (0, False)
    assert len(loads(found, "long hold")) == PLAN.attempts


def test_a_step_is_held_for_a_lease_and_two_heartbeats():
    assert least_hold(60, 30) == 120


def test_loads_are_round_numbers():
    assert [rounded(n) for n in (7, 84.4, 104, 3_375, 16_800)] == [7, 84, 100, 3_400, 17_000]


def test_says_what_was_full():
    def full(cores=None, overflows=0, **used):
        resources = {f"{name}_cpu_percent": value for name, value in used.items()}
        step = Step(sessions=1, seconds=1, resources=resources, counts={"listen_overflows": overflows})
        return limited_by(step, cores)

    assert full(server=60, server_busiest=97, generator=90) == (
        "the CPU of a process of the server (97 % of a core)",
        True,
    )
    assert full(server=10, generator=86) == ("the CPU of the generator (86 % of a core)", False)
    assert full(server=172, server_busiest=66) is None and full(4, server=172, server_busiest=66) is None
    whole = "the CPU of the machine (the server used {} %, the generator {} % on 2 cores)"
    assert full(2, server=172, server_busiest=66, generator=20) == (whole.format(172, 20), True)
    assert full(2, server=130, server_busiest=66, generator=45) == (whole.format(130, 45), False)
    assert full(2, server=90, generator=41, generator_all=80) == (whole.format(90, 80), False)
    assert full(2, server=130, generator=20) is None
    assert full(2, generator=80, generator_all=180) is None, "a server elsewhere shares no core"
    assert full(server=10, overflows=12) == ("the queue of the listening socket (12 overflows)", True)
