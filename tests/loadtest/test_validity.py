"""A run that is not to be believed says so, and a sound one is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest import validity
from loadtest.run import Phase, Run, Step, Summary
from loadtest.validity import is_valid, judge

PUSH = Summary(20_000, p50=2.0, p95=8.0, p99=20.0, p999=50.0, max=90.0)


def lag(p99: float | None) -> Summary:
    return Summary(5_000 if p99 else 50, p99=p99)


def a_run(**changes) -> Run:
    """A sound run of one step; names of the step's fields go to the step, dicts are merged into it."""
    step = Step(
        sessions=1000,
        seconds=60.0,
        offered=100.0,
        achieved=99.5,
        metrics={"PUSH online": PUSH, validity.LAG: lag(1.0)},
        ledger={"expected": 20_000, "received": 19_990, "missing": 4, "cancelled": 6, "duplicated": 300},
        resources={"generator_cpu_percent": 40.0},
        counts={
            "connected": 1000,
            "begun": 1000,
            "connects": 1200,
            "connect_failures": 3,
            "server_restarts": 1,
            "planned_restarts": 1,
        },
    )
    run = Run(
        title="sound",
        seconds=70.0,
        slo="p99<250ms, lost=0, false-offline=0",
        workload={"seconds": 65},
        machine={"cores": 2, "load_before": 0.1},
        harness={"workers": [{"wanted": 500, "connected": 500}] * 2},
        steps=[step],
    )
    for name, value in changes.items():
        owner = run if hasattr(run, name) else step
        setattr(owner, name, getattr(owner, name) | value if isinstance(value, dict) else value)
    return run


def test_a_sound_run_is_left_alone():
    """Even when the server is bad: notices that are missing or repeated are the verdict's business."""
    assert judge(a_run()) == []


def test_a_run_without_figures_of_its_surroundings_is_judged_by_the_rest():
    step = Step(sessions=10, seconds=1.0)
    assert judge(Run(title="bare", steps=[step])) == []


FAILURES = {"WS connect: Refused": 3, "REST batch: ProbeError": 9}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fatal", "no session was connected", {"counts": {"connected": 0, "connects": 0, "connect_failures": 0}}),
    ("fatal", "only 0 of 1,000 sessions", {"counts": {"connected": 0}}),
    ("fatal", "12 s after the beginning of its storm", {"counts": {"storm_cut_short": 12}}),
    ("fatal", "only 980 of 1,000 sessions", {"counts": {"connected": 980, "connect_failures": 0}}),
    ("fatal", "only 1,000 of 1,500 sessions had begun", {"counts": {"asked": 1500}}),
    ("fatal", "13 clients failed silently", {"counts": {"watches_unconfirmed": 13}}),
    ("fatal", "failed 2 times", {"counts": {"harness_errors": 2}}),
    ("warning", "12 failures: REST batch: ProbeError (9), WS connect: Refused (3)", {"errors": FAILURES}),
    ("fatal", "One of 2 workers", {"faults": ["One of 2 workers did not report."]}),
    ("warning", "12 of 1,200 attempts", {"counts": {"connect_failures": 12}}),
    ("fatal", "only 98.9 %", {"achieved": 98.9}),
    ("fatal", "generator was the limit", {"resources": {"generator_cpu_percent": 96.0}}),
    ("warning", "generator used 71 %", {"resources": {"generator_cpu_percent": 71.0}}),
    ("fatal", "generator was late", {"metrics": {validity.LAG: lag(11.0)}}),
    ("fatal", "late: its lag was 251 ms", {"metrics": {"PUSH online": Summary(0), validity.LAG: lag(251.0)}}),
    ("warning", "lag was 249.0 ms", {"metrics": {"PUSH online": Summary(0), validity.LAG: lag(249.0)}}),
    ("warning", "lag was 6.0 ms", {"metrics": {validity.LAG: lag(6.0)}}),
    ("warning", "is a part of PUSH online", {"metrics": {validity.LAG: lag(2.1)}}),
    ("warning", "lag is not known", {"metrics": {validity.LAG: lag(None)}}),
    ("fatal", "ran out of ports or open files", {"counts": {"address_errors": 1}}),
    ("fatal", "negative", {"counts": {"negative_latencies": 1}}),
    ("fatal", "20,120 notices were received", {"ledger": {"received": 20_120}}),
    ("fatal", "does not balance", {"ledger": {"received": 19_991}}),
    ("fatal", "restarted 2 times", {"counts": {"server_restarts": 2, "planned_restarts": 0}}),
    ("warning", "full accept queue", {"counts": {"listen_overflows": 1}}),
    ("warning", "dropped by the kernel", {"counts": {"listen_drops": 1}}),
    ("warning", "timeouts", {"counts": {"tcp_timeouts": 1}}),
    ("warning", "swapped", {"counts": {"swapped_pages": 1}}),
    ("warning", "PUSH offline has 999", {"metrics": {"PUSH offline": Summary(999, p50=1.0)}}),
    ("fatal", "Nothing was measured", {"steps": []}),
    ("fatal", "No change of status", {"ledger": {"expected": 0, "received": 0, "missing": 0, "cancelled": 0}}),
    ("fatal", "before its storm", {"workload": {"storm": {}}, "phases": [Phase("hold before the storm", 5, 13)]}),
    ("fatal", "took 100 s", {"seconds": 100.0, "workload": {"seconds": 60}}),
    ("fatal", "Every worker stopped at 400", {"harness": {"workers": [{"wanted": 500, "connected": 400}] * 2}}),
    ("warning", "busy before the start", {"machine": {"load_before": 0.6}}),
]


@pytest.mark.parametrize(("level", "words", "change"), CASES, ids=[words for _, words, _ in CASES])
def test_each_reason_is_found_and_alone(level, words, change):
    findings = judge(a_run(**change))
    assert [(found, words in sentence) for found, sentence in findings] == [(level, True)]
    assert is_valid(findings) == (level == "warning")


def test_every_rule_has_a_case():
    rules = {rule.__name__ for rule in [*validity._RUN_RULES, *validity._STEP_RULES]}
    caught = set()
    for _, _, change in CASES:
        run = a_run(**change)
        caught |= {rule.__name__ for rule in validity._RUN_RULES if list(rule(run))}
        caught |= {rule.__name__ for step in run.steps for rule in validity._STEP_RULES if list(rule(step))}
    assert caught == rules


def test_a_storm_that_came_is_believed():
    assert judge(a_run(workload={"storm": {}}, phases=[Phase("storm with jitter", 20, 30)])) == []


def test_fatal_comes_first_and_says_where():
    findings = judge(a_run(counts={"listen_drops": 5}, achieved=50.0))
    assert [level for level, _ in findings] == ["fatal", "warning"]
    assert findings[0][1].startswith("at 1,000 sessions: only 50.0 %")


def test_no_changes_without_a_word_about_them_in_the_slo_is_a_warning():
    quiet = {"expected": 0, "received": 0, "missing": 0, "cancelled": 0}
    assert [level for level, _ in judge(a_run(slo=None, ledger=quiet))] == ["warning"]
