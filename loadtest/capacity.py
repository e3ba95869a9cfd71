"""The search for the capacity: steps up, bisects at the first breach, confirms the winner. Pure: it is given what runs.

A step that cannot be believed (the generator was the limit, say) ends the way up as a breach does, but what is found
then is a floor: the server may hold more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loadtest.run import Step

Kind = Literal["step", "long hold", "storm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the search goes. Loads are in sessions, times in s."""

    start: int = 1_000
    maximum: int = 20_000
    growth: float = 1.5
    """Each step up is so many times the one before."""
    resolution: float = 0.08
    """The bisection ends when the kept and the broken load differ by no more than this share."""
    hold: float = 120.0
    """Of a step: at least a lease and two heartbeat periods, or else an expiry could not show."""
    long_hold: float = 900.0
    storm: float = 180.0
    attempts: int = 3
    """How many loads are tried for the confirmation, each a tenth below the one before."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One load that was run. `invalid` says why it cannot be believed; `step.breach` which clause was not kept."""

    sessions: int
    kind: Kind
    step: Step
    invalid: str | None = None

    @property
    def kept(self) -> bool:
        return self.invalid is None and self.step.breach is None

    @property
    def why(self) -> str:
        """Why it was not kept."""
        return self.invalid or self.step.breach or ""


@dataclass(slots=True)
class Found:
    """What the search came to. `sessions` is 0 when no load was confirmed."""

    sessions: int = 0
    floor: bool = False
    """The server may hold more: the search ended for another reason than a breach."""
    stopped: str = ""
    """What ended the way up, in words."""
    confirmed: bool = False
    trials: list[Trial] = field(default_factory=list)


RunStep = Callable[[int, float, Kind], Trial]
"""Runs so many sessions for so many s."""


def least_hold(lease: float, beat: float) -> float:
    """How long a step is held at least: whatever ends with a lease is seen, and each session has beaten twice. In s."""
    return lease + 2 * beat


def search(plan: Plan, run: RunStep) -> Found:
    """Find the greatest load that keeps the SLO."""
    found = Found()

    def tried(sessions: int, seconds: float, kind: Kind) -> Trial:
        trial = run(sessions, seconds, kind)
        found.trials.append(trial)
        return trial

    good, bad = _up(plan, tried, found)
    if bad is not None:
        good = _bisected(plan, tried, good, bad)
    _confirm(plan, tried, found, good)
    return found


def _up(plan: Plan, run: RunStep, found: Found) -> tuple[int, int | None]:
    """The last load that was kept (0: none) and the first that was not (None: all were)."""
    good, sessions = 0, min(plan.start, plan.maximum)
    while True:
        trial = run(sessions, plan.hold, "step")
        if not trial.kept:
            found.floor = trial.invalid is not None
            found.stopped = f"at {sessions:,} sessions {_lower(trial.why)}"
            return good, sessions
        good = sessions
        if sessions >= plan.maximum:
            found.floor = True
            found.stopped = f"{sessions:,} sessions were the most that was asked for"
            return good, None
        sessions = min(max(rounded(sessions * plan.growth), sessions + 1), plan.maximum)


def _bisected(plan: Plan, run: RunStep, good: int, bad: int) -> int:
    """The greatest load between that is kept, to the plan's resolution; 0: none."""
    while bad - good > plan.resolution * bad:
        middle = rounded((good + bad) / 2)
        if not good < middle < bad:
            break
        if run(middle, plan.hold, "step").kept:
            good = middle
        else:
            bad = middle
        if good == 0 and bad <= plan.start / 16:
            break  # far below what was thought possible: this is another kind of fault than the load
    return good


def _confirm(plan: Plan, run: RunStep, found: Found, sessions: int) -> None:
    """Hold the load long, then let all drop and return; with a breach try less."""
    found.sessions = sessions
    for _ in range(plan.attempts):
        if sessions <= 0:
            break
        held = run(sessions, plan.long_hold, "long hold")
        last = run(sessions, plan.storm, "storm") if held.kept else held
        if last.kept:
            found.sessions, found.confirmed = sessions, True
            return
        # What was kept for a while and not for long is the better answer to what the limit is.
        found.stopped = f"the {last.kind} at {sessions:,} sessions was not kept: {_lower(last.why)}"
        found.floor = last.invalid is not None
        sessions = rounded(sessions * 0.9)
    found.sessions = 0


def rounded(sessions: float) -> int:
    """A load with two digits, for readers: 3375 is 3400."""
    whole = round(sessions)
    return round(whole, 2 - len(str(whole))) if whole > 99 else whole


def limited_by(step: Step, processes: int = 1) -> str | None:
    """What was full in a step, by the figures read in it; None when nothing stands out.

    Args:
        processes: of the server that take connections.
    """
    used: Sequence[tuple[str, str, float]] = (
        ("server_busiest_cpu_percent", "the CPU of a process of the server", 85),
        ("server_cpu_percent", "the CPU of the server", 85 * processes),
        ("generator_cpu_percent", "the CPU of the generator", 85),
    )
    for name, words, full in used:
        found = step.resources.get(name)
        if found is not None and found >= full:
            return f"{words} ({found:.0f} % of a core)"
    if step.counts.get("listen_overflows", 0) > 0:
        return f"the queue of the listening socket ({step.counts['listen_overflows']:,} overflows)"
    return None


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
