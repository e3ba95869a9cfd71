"""A run of one step, in which 2,000 notices took the same time."""

from __future__ import annotations

from loadtest.metrics import Histogram
from loadtest.run import Phase, Run, Step

LEDGER = {"expected": 2_000, "received": 2_000, "missing": 0, "cancelled": 0, "false_offline_seconds": 0.0}


def one_step(*, started="2026-03-02T09:00:00Z", sessions=100, ms=10, seconds=30.0, **ledger):
    seen = Histogram()
    for _ in range(2_000):
        seen.record(ms * 1000)
    step = Step(sessions=sessions, seconds=20, offered=100, achieved=100, ledger=LEDGER | ledger)
    step.histograms = {"PUSH online": seen.encode()}
    step.metrics = {"PUSH online": seen.summary()}
    run = Run(title="steady", started=started, seconds=seconds, steps=[step], workload={"seconds": seconds})
    run.phases = [Phase("ramp", 0, 5), Phase("hold", 5, 25), Phase("drain", 25, 30)]
    run.series = {"sessions": [(0, 0), (5, 100)]}
    run.intervals = {"PUSH online": [(10, seen.encode())]}
    return run
