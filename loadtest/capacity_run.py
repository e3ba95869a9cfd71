"""What the runs of a search say of their loads, and the one run that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loadtest import launch, validity, verdict
from loadtest.capacity import Found, Kind, Trial, limited_by
from loadtest.launch import LaunchError
from loadtest.run import Run


def trial_of(sessions: int, kind: Kind, run: Run) -> Trial:
    """What a run says of its load. Its step is named after what was asked for, not after the most there were."""
    if not run.steps:
        raise LaunchError(f"at {sessions:,} sessions nothing was measured")
    step = run.steps[-1]
    seen = f"at {step.sessions:,} sessions"
    asked = f"in the storm of {sessions:,} sessions" if kind == "storm" else f"at {sessions:,} sessions"
    for one, other in ((seen, asked), (seen.capitalize(), asked.capitalize())):
        run.validity = [(level, text.replace(one, other, 1)) for level, text in run.validity]
    step.sessions, step.kind = sessions, kind
    if kind == "storm":
        # No latency is asked of it; and that thousands of actions are due at one moment is what it is.
        late = {text for _, text in validity.generator_late(step)}
        run.validity = [(level, text) for level, text in run.validity if text.partition(": ")[2] not in late]
    if step.breach:
        other_cause = verdict.other_cause(step, may_be_late=kind == "storm")
        return Trial(sessions, kind, step, other_cause or next(iter(run.faults), None))
    fatal = [text for level, text in run.validity if level == "fatal"]
    return Trial(sessions, kind, step, fatal[0].removeprefix(f"{asked}: ") if fatal else None)


def made_of(found: Found, runs: Sequence[Run], slo: str) -> Run:
    """The whole search as one run. What cannot be believed is left out of its steps, and said.

    Args:
        runs: those of `found.trials`, in their order; at least one.
    """
    tried = list(zip(runs, found.trials, strict=True))
    used = [(run, trial) for run, trial in tried if not trial.invalid] or tried
    whole = launch.joined("Capacity", [run for run, _ in used])
    whole.question = f"How many sessions keep {slo}?"
    whole.verdict, whole.slo = "", slo
    whole.steps = [trial.step for _, trial in used]
    for step in whole.steps:
        if step.sessions > found.sessions and not step.breach and not found.open:
            step.breach = f"kept for a while, but {found.stopped}"
    held = [step for step in whole.steps if step.kind != "storm"]
    findings = [("fatal", f"There is no verdict: {found.stopped}.")] if found.open else []
    findings += verdict.findings(replace(whole, steps=held))
    for run, trial in used:
        if trial.kind == "storm":
            # As with the other steps: of what is beyond the limit it need not be known how much beyond.
            findings += [("warning" if trial.step.breach else level, text) for level, text in run.validity]
    findings += [
        ("warning", f"At {one.sessions:,} sessions the run was not to be believed: {one.invalid}")
        for one in found.trials
        if one.invalid
    ]
    whole.validity = list(dict.fromkeys(findings))
    whole.ok = found.confirmed and validity.is_valid(whole.validity)
    if found.winner is None:
        whole.verdict = f"No load was confirmed: {found.stopped}"
    else:
        limit = limited_by(found.bound, whole.machine.get("cores")) if found.bound else None
        bound = f", limited by {limit.words}" if limit else ""
        is_floor = found.floor or (limit is not None and not limit.of_server)
        floor = " (a floor: the server may hold more)" if is_floor else ""
        # Of the long hold: in a storm there may be more at a time, and no latency is asked of it.
        best = verdict.sentence(replace(whole, steps=[found.winner]))
        whole.verdict = f"{best}{bound}{floor}; {found.stopped}"
    return whole
