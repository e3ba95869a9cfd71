"""The search for the capacity: steps up, bisects at the first breach, confirms the winner. Pure: it is given what runs.

A step that cannot be believed (the generator was the limit, say) ends the way up as a breach does. Where one is what
keeps the answer from being more, the answer is a floor: the server may hold more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from loadtest.run import Step

Kind = Literal["step", "long hold", "storm"]

_FULL = 85.0
"""% of a core from which on it counts as full."""


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
    """What keeps it from being more, in words."""
    bound: Step | None = None
    """The step that `stopped` is about, where it is about one."""
    confirmed: bool = False
    interrupted: bool = False
    trials: list[Trial] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether nothing is known of the server: no load was confirmed, and no breach is why."""
        return self.floor and not self.confirmed

    @property
    def winner(self) -> Step | None:
        """The step that the capacity was held in, for long."""
        held = (one.step for one in self.trials if one.kind == "long hold" and one.sessions == self.sessions)
        return next(held, None) if self.confirmed else None

    def cut_short(self, plan: Plan, why: str) -> None:
        """Take it that the search ended before its time: nothing is confirmed."""
        kept = max((one.sessions for one in self.trials if one.kind == "step" and one.kept), default=0)
        seen = f"; {kept:,} sessions were kept for {plan.hold:g} s" if kept else ""
        self.sessions, self.floor = 0, True
        self.bound, self.stopped = None, f"{why}{seen}"

    def bounded(self, by: Trial) -> None:
        """Take it that a trial which was not kept is what keeps the capacity from being more."""
        self.bound, self.floor = by.step, by.invalid is not None
        what = f"the {by.kind} at {by.sessions:,} sessions was not"
        if by.invalid:
            what += " to be believed:"
        else:
            what = f"at {by.sessions:,} sessions" if by.kind == "step" else f"{what} kept:"
        self.stopped = f"{what} {_lower(by.why)}"


RunStep = Callable[[int, float, Kind], Trial]
"""Runs so many sessions for so many s; raises `ServerGone` where it could not begin."""


class ServerGone(Exception):
    """A load could not be run: one line that says why."""


def least_hold(lease: float, beat: float) -> float:
    """How long a step is held at least: whatever ends with a lease is seen, and each session has beaten twice. In s."""
    return lease + 2 * beat


def search(plan: Plan, run: RunStep) -> Found:
    """Find the greatest load that keeps the SLO.

    Ctrl-C ends the search, and so does a server that is gone: what was found till then is given back.

    Raises:
        ServerGone: the first load could not be run.
    """
    found = Found()

    def tried(sessions: int, seconds: float, kind: Kind) -> Trial:
        trial = run(sessions, seconds, kind)
        found.trials.append(trial)
        return trial

    try:
        good, bad = _up(plan, tried)
        if bad is None:
            found.floor, found.stopped = True, f"{good:,} sessions were the most that was asked for"
        else:
            good, bad = _bisected(plan, tried, good, bad)
            found.bounded(bad)
        _confirm(plan, tried, found, good)
    except KeyboardInterrupt:
        found.interrupted = True
        found.cut_short(plan, "the search was interrupted")
    except ServerGone as gone:
        if not found.trials:
            raise
        last = found.trials[-1]
        found.cut_short(plan, f"the server was gone after {last.sessions:,} sessions: {gone}")
        # Of one that went under a load it broke down at, that load is the limit.
        found.floor = last.invalid is not None or last.step.breach is None
    return found


def _up(plan: Plan, run: RunStep) -> tuple[int, Trial | None]:
    """The last load that was kept (0: none) and the first trial that was not (None: all were)."""
    good, sessions = 0, min(plan.start, plan.maximum)
    while True:
        trial = run(sessions, plan.hold, "step")
        if not trial.kept:
            return good, trial
        good = sessions
        if sessions >= plan.maximum:
            return good, None
        sessions = min(max(rounded(sessions * plan.growth), sessions + 1), plan.maximum)


def _bisected(plan: Plan, run: RunStep, good: int, bad: Trial) -> tuple[int, Trial]:
    """The greatest load that is kept (0: none) and the least trial that is not, as near as the plan's resolution."""
    while bad.sessions - good > plan.resolution * bad.sessions:
        middle = rounded((good + bad.sessions) / 2)
        if not good < middle < bad.sessions:
            break
        trial = run(middle, plan.hold, "step")
        if trial.kept:
            good = middle
        else:
            bad = trial
        if good == 0 and bad.sessions <= plan.start / 16:
            break  # far below what was thought possible: this is another kind of fault than the load
    return good, bad


def _confirm(plan: Plan, run: RunStep, found: Found, sessions: int) -> None:
    """Hold the load long, then let all drop and return; with a breach try less."""
    for _ in range(plan.attempts):
        if sessions <= 0:
            break
        held = run(sessions, plan.long_hold, "long hold")
        last = run(sessions, plan.storm, "storm") if held.kept else held
        if last.kept:
            found.sessions, found.confirmed = sessions, True
            return
        # What was kept for a while and not for long is the better answer to what the limit is.
        found.bounded(last)
        sessions = rounded(sessions * 0.9)


def rounded(sessions: float) -> int:
    """A load with two digits, for readers: 3375 is 3400."""
    whole = round(sessions)
    return round(whole, 2 - len(str(whole))) if whole > 99 else whole


class Limit(NamedTuple):
    """What was full. Where that is not the server's own doing, it may hold more."""

    words: str
    of_server: bool = True


def limited_by(step: Step, cores: int | None = None) -> Limit | None:
    """What was full in a step, by the figures read in it; None when nothing stands out.

    Args:
        cores: of the machine; the server's processes together, and the generator's beside them, are held against all
            of them.
    """
    busiest, generator = (step.resources.get(f"{name}_cpu_percent", 0.0) for name in ("server_busiest", "generator"))
    if busiest >= _FULL:
        return Limit(f"the CPU of a process of the server ({busiest:.0f} % of a core)")
    if generator >= _FULL:
        return Limit(f"the CPU of the generator ({generator:.0f} % of a core)", of_server=False)
    return _machine_full(step, cores) or _queue_full(step)


def _machine_full(step: Step, cores: int | None) -> Limit | None:
    """The server's CPU is known only where it is on the same machine: then both share its cores."""
    server = step.resources.get("server_cpu_percent")
    generator = step.resources.get("generator_all_cpu_percent", step.resources.get("generator_cpu_percent", 0.0))
    if not cores or server is None or server + generator < _FULL * cores:
        return None
    words = f"the CPU of the machine (the server used {server:.0f} %, the generator {generator:.0f} % on {cores} cores)"
    return Limit(words, of_server=server >= _FULL * cores)


def _queue_full(step: Step) -> Limit | None:
    overflows = step.counts.get("listen_overflows", 0)
    return Limit(f"the queue of the listening socket ({overflows:,} overflows)") if overflows else None


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")
