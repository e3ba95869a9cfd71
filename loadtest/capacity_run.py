"""What the runs of a search say of their loads, and the one run that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loadtest import launch, validity, verdict
from loadtest.capacity import Found, Kind, Trial, limited_by
from loadtest.launch import LaunchError
from loadtest.run import Run

BACK = 95.0
"""% of the sessions that have to be back at the end of a storm."""


def trial_of(sessions: int, kind: Kind, run: Run) -> Trial:
    """What a run says of its load."""
    if not run.steps:
        raise LaunchError(f"at {sessions:,} sessions nothing was measured")
    step = run.steps[-1]
    if kind == "storm" and not step.breach and (back := launch.back(run)) < BACK:
        step.breach = f"only {back:.0f} % of the sessions were back at the end of the storm"
    if kind == "storm":
        # No latency is asked of it; and that thousands of actions are due at one moment is what it is.
        late = {text for _, text in validity.generator_late(step)}
        run.validity = [(level, text) for level, text in run.validity if text.partition(": ")[2] not in late]
    if step.breach:
        return Trial(sessions, kind, step, verdict.generator_at_fault(step, may_be_late=kind == "storm"))
    fatal = [text for level, text in run.validity if level == "fatal"]
    return Trial(sessions, kind, step, fatal[0].removeprefix(f"at {sessions:,} sessions: ") if fatal else None)


def made_of(found: Found, runs: Sequence[Run], slo: str) -> Run:
    """The whole search as one run. What cannot be believed is left out of its steps, and said.

    Args:
        runs: those of `found.trials`, in their order.
    """
    believed = [(run, trial) for run, trial in zip(runs, found.trials, strict=True) if not trial.invalid]
    broken = next((trial.step for trial in found.trials if not trial.kept), None)
    whole = launch.joined("Capacity", [run for run, _ in believed] or runs)
    whole.question = f"How many sessions keep {slo}?"
    for step in whole.steps:
        if step.sessions > found.sessions and not step.breach:
            step.breach = f"kept for a while, but {found.stopped}"
    storms = [run for run, trial in believed if trial.kind == "storm"]
    others = [step for step in whole.steps if not any(step in run.steps for run in storms)]
    whole.verdict, whole.slo = "", slo
    findings = [*verdict.findings(replace(whole, steps=others)), *(one for run in storms for one in run.validity)]
    doubts = [(one.sessions, one.invalid) for one in found.trials if one.invalid]
    findings += [
        ("warning", f"At {sessions:,} sessions the run was not to be believed: {why}") for sessions, why in doubts
    ]
    whole.validity = list(dict.fromkeys(findings))
    whole.ok = found.confirmed and validity.is_valid(whole.validity)
    limit = limited_by(broken, int(whole.target.get("processes", 1) or 1)) if broken else None
    if not found.confirmed:
        whole.verdict = f"No load was confirmed: {found.stopped}"
    else:
        bound = f", limited by {limit}" if limit else ""
        floor = " (a floor: the server may hold more)" if found.floor else ""
        whole.verdict = f"{verdict.sentence(whole)}{bound}{floor}; {found.stopped}"
    return whole
