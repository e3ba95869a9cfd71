"""Runs cases against a target: many at once, and one by one those that disturb others."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata

from contracts.cases import has_other_ids, marks
from contracts.client import Refused
from contracts.faults import Failed, Misused, NotUndone, TargetUnusable, Unreachable
from contracts.model import NOT_CHOSEN, SHORT_LEASE, STOPPED, TOO_LONG, Case, Class, Clause, Level, Outcome, Result, Run
from contracts.stage import Stage
from contracts.steps import take
from contracts.story import Story, seconds
from contracts.target import Target, TokenMaker

__all__ = ["TargetUnusable", "look_at", "run"]

LONG = 70.0
"""s: what waits longer than this, for all that the lease is, is left to patient runs. What shows only after a minute
("1 minute ago") is not: a MUST would be verified by few."""
_LIMIT = 30.0
_LIMIT_LEASES = 8
"""s, and leases: the longest a case may take besides the waits that it states, and the slack of each step."""
_LATE = 1.0
"""s: when that limit is noticed later than this, the runner itself was held up."""
_HELD_UP = 0.25
"""s: a case that fails while the runner itself was held up for longer may have failed of that, and says so."""
_PULSE = 0.05
"""s: between two looks whether it was."""
_CLOSE_LIMIT = 75.0
"""s: for the end of a case: at most one command of the target, and its connections."""
_BACK_LEASES = 5
"""Leases: how soon an instance answers again after a case has broken something, plus the limit of an answer."""
_POLL = 0.1
"""s: between two questions whether it does."""


async def run(
    target: Target,
    cases: Sequence[Case],
    clauses: Mapping[str, Clause],
    *,
    only: Collection[str] = (),
    conformance: Class | None = None,
    levels: Collection[Level] = (),
    fail_fast: bool = False,
    patient: bool = False,
    finished: Callable[[Result], None] | None = None,
    probe: bool = True,
) -> Run:
    """Run all cases that apply.

    Args:
        only: ids of cases or clauses; empty: all.
        conformance: cases of this class only; None: all that the target's class asks for.
        levels: cases of these levels only; empty: all.
        fail_fast: the first failure or error is the last case.
        patient: run also what waits for longer than a minute.
        finished: told of each case, in the order in which they end.
        probe: look first whether the target can be used at all.

    Raises:
        TargetUnusable: it cannot.
    """
    # Requests of REST wait in threads: as many as there can be at once, so that none waits for another.
    at_once = sum(step.get("at-once", 0) for case in cases for step in case.steps)
    executor = ThreadPoolExecutor(target.parallel + at_once + 8, thread_name_prefix="contracts")
    asyncio.get_running_loop().set_default_executor(executor)
    begun, started = time.monotonic(), time.time()
    left_out = {
        case.id: _not_chosen(case, only, conformance, levels) or _not_applying(case, target) or _too_long(case, patient)
        for case in cases
    }
    applying = [case for case in cases if left_out[case.id] is None]
    if probe:
        await look_at(target, cases if any("directory" in case.needs for case in applying) else ())
    playing = _Playing(target, started, fail_fast, finished)
    for not_run in filter(None, left_out.values()):
        playing.note(not_run)
    await playing.play_all(applying)
    return Run(
        target=target.file,
        summary=target.summary,
        version=_version(),
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        seconds=round(time.monotonic() - begun, 3),
        results=[playing.results[case.id] for case in cases],
        clauses=clauses,
    )


class _Playing:
    """The cases of a run, and what became of them."""

    def __init__(
        self, target: Target, started: float, fail_fast: bool, finished: Callable[[Result], None] | None
    ) -> None:
        self.results: dict[str, Result] = {}
        self._target = target
        self._started = started
        self._fail_fast = fail_fast
        self._finished = finished
        self._name = secrets.token_hex(4)
        self._tokens = TokenMaker(target)
        self._places = asyncio.Semaphore(target.parallel)
        self._stop = asyncio.Event()
        self._left: list[str] = []
        """What cases have left broken: whoever came after that would blame a server that is not whole."""
        self._disturbed: list[Case] = []
        """Those that did not pass, maybe for what others broke while they were idle."""
        self._held_up: list[tuple[float, float]] = []
        """When the runner itself came too late, and by how much, s."""

    def note(self, result: Result) -> None:
        self.results[result.case.id] = result
        if result.left:
            self._left.append(result.left)
        if self._fail_fast and result.outcome in {Outcome.FAILED, Outcome.ERROR}:
            self._stop.set()
        if self._finished is not None:
            self._finished(result)

    async def play_all(self, cases: Sequence[Case]) -> None:
        """Play them: together, as many as may be at once; those that disturb others one by one."""
        pulse = asyncio.create_task(self._feel_pulse())
        try:
            await self._play_in_turn(cases)
        finally:
            pulse.cancel()

    async def _feel_pulse(self) -> None:
        while True:
            due = time.monotonic() + _PULSE
            await asyncio.sleep(_PULSE)
            now = time.monotonic()
            if now - due > _HELD_UP:
                self._held_up.append((now, now - due))

    async def _play_in_turn(self, cases: Sequence[Case]) -> None:
        # The longest first: then the run takes hardly longer than they do.
        together = sorted((case for case in cases if not case.alone), key=lambda case: -waits(case, self._target.lease))
        # Those that break something last: maybe who is idle is back by then.
        alone = sorted((case for case in cases if case.alone), key=_breaks)
        await self._play_some(together, alone)
        again, self._disturbed = self._disturbed, []
        self._name = secrets.token_hex(4)
        await self._play_some(again, [])
        for case in cases:
            if case.id not in self.results:
                self.note(Result(case, Outcome.NOT_RUN, reason=self._left[0] if self._left else STOPPED))

    async def _play_some(self, together: Sequence[Case], alone: Sequence[Case]) -> None:
        stage = Stage(len(together))
        plays = [*(self._play_together(case, stage) for case in together), self._play_alone(alone, stage)]
        await _all([asyncio.create_task(play) for play in plays], self._stop)

    async def _play_together(self, case: Case, stage: Stage) -> None:
        try:
            async with self._places:
                await self._play(case, stage)
        finally:
            await stage.over()

    async def _play_alone(self, cases: Sequence[Case], stage: Stage) -> None:
        for case in cases:
            async with stage.alone():
                await self._play(case, stage)

    async def _play(self, case: Case, stage: Stage) -> None:
        if self._left or self._stop.is_set():
            return
        turns, begun = stage.turns, time.monotonic()
        story = Story(case, self._target, self._name, self._started, self._tokens, stage.idle)
        result = await _run_case(story)
        late = max((length for at, length in self._held_up if at >= begun), default=0.0)
        if late and result.outcome is Outcome.FAILED:
            told = f"the runner was held up for {late:.1f} s meanwhile: on one machine the server may have been, too"
            result = replace(result, reason="; ".join(filter(None, [result.reason, told])))
        if stage.turns > turns and result.outcome is not Outcome.PASSED and result.left is None:
            self._disturbed.append(case)
        else:
            self.note(result)


async def _all(tasks: Sequence[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Wait for all tasks; when told to stop, no longer."""
    stopped = asyncio.create_task(stop.wait())
    try:
        left: set[asyncio.Task[None]] = set(tasks)
        while left and not stop.is_set():
            done, _ = await asyncio.wait([*left, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done & left:
                task.result()
            left -= done
    finally:
        for task in [*tasks, stopped]:
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)


def waits(case: Case, lease: float) -> float:
    """How long a case waits whatever the server does, s."""
    total = 0.0
    for step in case.steps:
        if "wait" in step:
            length = seconds(step["wait"], lease)
            total = max(total, length) if "since" in step else total + length
    return total


def _breaks(case: Case) -> bool:
    return any(need.startswith("hook:") for need in case.needs)


async def _run_case(story: Story) -> Result:
    """One case, to its end: whatever happens it leaves no connection behind."""
    case, target = story.case, story.target
    begun = time.monotonic()
    taken = sum(step.get("times", 1) for step in case.steps)
    limit = _LIMIT + _LIMIT_LEASES * target.lease + waits(case, target.lease) + target.slack * taken
    starts: list[float] = []
    outcome, expected, actual, reason = Outcome.PASSED, None, None, None
    try:
        async with asyncio.timeout(limit) as story.clock:
            for story.index, step in enumerate(case.steps):
                starts.append(story.now)
                story.log("-", "·", f"{story.index + 1}. {_as_written(step)}")
                await take(story, step)
            story.alarm()
    except Failed as fault:
        outcome, expected, actual = Outcome.FAILED, fault.expected, fault.actual
    except Refused as fault:
        outcome, expected, actual = Outcome.FAILED, "a WebSocket", str(fault)
    except Unreachable as fault:
        outcome, reason = Outcome.ERROR, f"the server cannot be reached: {fault}"
    except Misused as fault:
        outcome, reason = Outcome.ERROR, str(fault)
    except TimeoutError:
        outcome, reason = Outcome.ERROR, "TimeoutError"
        if story.clock is not None and story.clock.expired():
            slowest = _slowest(case, [*starts, story.now])
            if story.now - (story.clock.when() or 0) > _LATE:
                reason = f"the runner was held up, and the case not over after {limit:g} s: {slowest}"
            else:
                # What the case and the target's commands take is not counted: the rest is the server's time.
                outcome, reason = Outcome.FAILED, None
                expected, actual = f"answers that let the case end within {limit:g} s", f"it did not: {slowest}"
    except Exception as fault:  # noqa: BLE001 (a fault of the suite is an outcome, too)
        outcome, reason = Outcome.ERROR, f"{type(fault).__name__}: {fault}"
    finally:
        story.clock = None
        wrong, left = await _end(story)
    if story.broke and left is None:
        left = await _missing(story)
    passed = outcome is Outcome.PASSED
    if wrong or left:
        # What the server did wrong before stays its fault.
        outcome = Outcome.ERROR if passed else outcome
        reason = "; ".join(one for one in dict.fromkeys([reason, wrong, left]) if one)
    return Result(
        case,
        outcome,
        seconds=round(time.monotonic() - begun, 3),
        step=None if passed else story.index + 1,
        expected=story.without_tokens(expected) if expected else None,
        actual=story.without_tokens(actual) if actual else None,
        reason=story.without_tokens(reason) if reason else None,
        transcript=tuple(story.transcript),
        left=story.without_tokens(left) if left else None,
    )


async def _end(story: Story) -> tuple[str | None, str | None]:
    """Close a story, also when the run is stopped.

    Returns:
        what went wrong, and what of the target stays broken, in one line each.
    """
    try:
        async with asyncio.timeout(_CLOSE_LIMIT):
            # Shielded, so that a second stop cannot leave sockets open.
            await asyncio.shield(story.close())
    except NotUndone as fault:
        return str(fault), str(fault)
    except TimeoutError:
        return "its connections could not be closed", None
    except Exception as fault:  # noqa: BLE001 (a fault of the suite is an outcome, too)
        return f"its end went wrong: {type(fault).__name__}: {fault}", None
    return None, None


async def _missing(story: Story) -> str | None:
    """Wait until each instance answers again; which one does not, in one line."""
    limit = _BACK_LEASES * story.target.lease + story.limit
    for number in range(1, len(story.target.instances) + 1):
        try:
            async with asyncio.timeout(limit):
                while not await _answers(story, number):
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            return f"instance {number} does not answer again, {limit:g} s after {story.case.id}"
        except Misused as fault:
            return str(fault)
    return None


async def _answers(story: Story, number: int) -> bool:
    user = story.user("probe")
    path, token = f"/api/presence/check/{user}", await story.token(user)
    try:
        answer = await story.request("GET", path, caller=user, token=token, instance=number, quiet=True)
    except (Failed, Unreachable):
        return False
    return answer.status == 200


def _slowest(case: Case, times: Sequence[float]) -> str:
    """The step that took longest.

    Args:
        times: s, when each step began, and the end of the last.
    """
    length, number = max((end - start, at) for at, (start, end) in enumerate(itertools.pairwise(times), 1))
    return f"step {number} ({next(iter(case.steps[number - 1]))}) took {length:.1f} s"


def _as_written(step: Mapping[str, object]) -> str:
    """A step much as it stands in the file."""
    return ", ".join(f"{name} = {value!r}" for name, value in step.items())


def _not_chosen(
    case: Case, only: Collection[str], conformance: Class | None, levels: Collection[Level]
) -> Result | None:
    reason = None
    if only and case.id not in only and not set(case.clauses) & set(only):
        reason = NOT_CHOSEN
    elif conformance is not None and case.conformance is not conformance:
        reason = f"of class {case.conformance.value}, {NOT_CHOSEN}"
    elif levels and case.level not in levels:
        reason = f"of level {case.level.value}, {NOT_CHOSEN}"
    return Result(case, Outcome.NOT_RUN, reason=reason) if reason else None


def _not_applying(case: Case, target: Target) -> Result | None:
    """Why a case says nothing of this target."""
    if case.conformance is Class.FULL and target.conformance is Class.GUIDE:
        return Result(case, Outcome.NOT_RUN, reason="of class full; the target is of class guide")
    if unsupported := sorted(case.features & target.unsupported):
        return Result(case, Outcome.UNSUPPORTED, reason=f"the target does not support {', '.join(unsupported)}")
    if case.policy not in {"any", target.policy}:
        reason = f"about the watch policy {case.policy!r}; the target has {target.policy!r}"
        return Result(case, Outcome.NOT_RUN, reason=reason)
    if target.ids == "uuid" and has_other_ids(case):
        return Result(case, Outcome.NOT_RUN, reason="it has ids that are no UUIDs; those of the target are")
    if lacking := sorted(need for need in case.needs if not _has(target, need)):
        return Result(case, Outcome.NOT_RUN, reason=f"the target lacks {', '.join(lacking)}")
    return None


def _too_long(case: Case, patient: bool) -> Result | None:
    wait = waits(case, 0)  # whatever the lease
    if patient or wait < LONG:
        return None
    return Result(case, Outcome.NOT_RUN, reason=TOO_LONG)


def _has(target: Target, need: str) -> bool:
    kind, _, name = need.partition(":")
    return {
        "instances": len(target.instances) > 1,
        "short-lease": target.lease <= SHORT_LEASE,
        "directory": target.directory_loaded,
        "secret": target.secret is not None,
        "claim": name in target.claims,
        "hook": name in target.hooks,
    }[kind]


async def look_at(target: Target, directory: Sequence[Case] = ()) -> None:
    """See whether cases can be run at all: every instance is there, is a presence server, and takes our tokens.

    Args:
        directory: the cases whose directory must be loaded; none: it does not matter.

    Raises:
        TargetUnusable: with the reason, in one line.
    """
    case = Case("probe", "", (), Class.GUIDE, Level.MUST, ({"connect": "probe"},), "")
    for number, instance in enumerate(target.instances, 1):
        story = Story(case, target, secrets.token_hex(4), time.time())
        try:
            await _look_at(story, number)
            if directory:
                await _look_at_directory(story, number, directory)
        except Unreachable as fault:
            raise TargetUnusable(f"the server cannot be reached: {fault}") from fault
        except Failed as fault:
            said = f"{instance.http}: expected {fault.expected}, but {fault.actual}"
            if isinstance(fault.__cause__, Refused):
                asks = fault.__cause__.status in {401, 403}
                said += f"; see {'in of [token]' if asks else 'path in [connection]'} of the target file"
            raise TargetUnusable(story.without_tokens(f"no presence server at {said}")) from fault
        except Misused as fault:
            raise TargetUnusable(str(fault)) from fault
        except TargetUnusable:
            raise
        except Exception as fault:
            said = story.without_tokens(f"{type(fault).__name__}: {fault}")
            raise TargetUnusable(f"{instance.http} could not be looked at: {said}") from fault
        finally:
            with contextlib.suppress(Exception):
                await story.close()


async def _look_at(story: Story, number: int) -> None:
    user = story.user("probe")
    path = f"/api/presence/check/{user}"
    token = await story.token(user)
    answer = await story.request("GET", path, caller=user, token=token, instance=number)
    where = f"{story.target.instances[number - 1].http}{path}"
    if answer.status in {401, 403}:
        raise TargetUnusable(f"the token is refused: {answer.status} for GET {where}; see [token] in the target file")
    if answer.status != 200 or not isinstance(answer.json, dict):
        raise TargetUnusable(f"no presence server: {answer.status} for GET {where}, where 200 and JSON were expected")
    await take(story, {"connect": "probe", "instance": number})


async def _look_at_directory(story: Story, number: int, cases: Sequence[Case]) -> None:
    """Ask for friends that it has, or where there are none for a conversation; what else is wrong the cases tell."""
    target = story.target
    user, friend, conversation = (target.spelled(name) for name in marks(cases))
    if "friends" not in target.unsupported:
        path = "/api/presence/friends"
    elif "conversations" not in target.unsupported:
        path = f"/api/presence/conversation/{conversation}"
    else:
        return
    try:
        answer = await story.request("GET", path, caller=user, token=await story.token(user), instance=number)
    except Failed:
        return
    unknown = answer.status == 200 and isinstance(answer.json, dict) and friend not in answer.json
    if unknown or answer.status in {403, 404}:
        at = f"{target.instances[number - 1].http}{path}"
        raise TargetUnusable(
            f"directory: that of this suite is not loaded: for {user} GET {at} has no {friend}; "
            f"load what `presence-contracts directory` prints, or say loaded = false"
        )


def _version() -> str:
    for name in ("presence-contracts", "online-status"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "0"
