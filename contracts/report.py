"""What a run says: the verdict, the state of each clause, and both as text and as JSON."""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from contracts.cases import has_other_ids
from contracts.model import (
    NOT_CHOSEN,
    SHORT_LEASE,
    STOPPED,
    TOO_LONG,
    Case,
    Class,
    Clause,
    Entry,
    Level,
    Outcome,
    Result,
    Run,
)

SHOWN = 40
"""Entries of a transcript that the text shows: the last ones, where the failure is."""

_COLOURS = {
    "PASS": "green",
    "FAIL": "red",
    "WARN": "yellow",
    "NOTE": "yellow",
    "ERROR": "magenta",
    "NO VERDICT": "magenta",
}
# All that XML 1.0 does not allow, and what would move a terminal's cursor.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class State(enum.Enum):
    """What a run says of one clause."""

    BROKEN = "broken"
    """A case of it failed."""
    HOLDS = "holds"
    """All of its cases passed."""
    IN_PART = "holds in part"
    """Some of its cases passed; the others were not run, or are about features that the target does not support."""
    UNSUPPORTED = "unsupported"
    """Its cases are about features that the target declares as unsupported."""
    UNVERIFIED = "not verified"
    """No case of it came to an end, or there is none."""


@dataclass(frozen=True)
class Verdict:
    """What the whole run comes to."""

    word: str
    """`PASS`, `FAIL` or `NO VERDICT`."""
    sentence: str
    code: int
    """The exit code: 0, 1 or 2."""
    partial: str | None = None
    """How much was looked at, where cases that apply were left out: "1 of 39 cases chosen"."""

    @property
    def head(self) -> str:
        """The word, and whether it is about a part only."""
        return f"{self.word} ({self.partial})" if self.partial else self.word


def verdict(run: Run, *, strict: bool = False) -> Verdict:
    """Judge a run. With ``strict`` a SHOULD counts like a MUST."""
    word, sentence, code = _judged(run, strict)
    return Verdict(word, sentence, code, partial(run))


def _judged(run: Run, strict: bool) -> tuple[str, str, int]:
    of = counts(run)
    binding = {Level.MUST, Level.SHOULD} if strict else {Level.MUST}
    broken = [one for one in failures(run) if one.case.level in binding]
    warnings = of[Outcome.FAILED] - len(broken)
    levels = "MUST and SHOULD" if strict else "MUST"
    if broken:
        fails = "1 case fails" if len(broken) == 1 else f"{len(broken)} cases fail"
        return "FAIL", f"Not every {levels} holds: {fails}.", 1
    if of[Outcome.ERROR]:
        ends = "1 case" if of[Outcome.ERROR] == 1 else f"{of[Outcome.ERROR]} cases"
        return "NO VERDICT", f"No case breaks a {levels}, but {ends} could not be played to the end.", 2
    if not of[Outcome.PASSED] and not warnings:
        return "NO VERDICT", "Nothing was verified: no case passed.", 2
    but = "" if not warnings else ", with 1 warning" if warnings == 1 else f", with {warnings} warnings"
    if not of[Outcome.PASSED]:
        return "NO VERDICT", f"No {levels} was verified: no case passed{but}.", 2
    unverified, by_policy = _unverified(run)
    if unverified:
        which, whose = ("1 clause was", "its") if unverified == 1 else (f"{unverified} clauses were", "their")
        why = f"as {whose} cases need the policy anyone" if by_policy else "for the reasons given"
        but += f"; {which} not verified, {why}"
    return "PASS", f"Every {levels} that was verified holds{but}.", 0


def _unverified(run: Run) -> tuple[int, bool]:
    """How many clauses bind the target and were not verified, and whether its policy `contacts` is all that kept them.

    Not those of cases that were not chosen, or that are about what the target does not claim: a class, a feature, or
    the policy `contacts`. (With `contacts` it is bound by most of the others: only their cases are about strangers.)
    """
    of, state = run.summary, states(run)
    hidden: dict[str, bool] = {}
    for one in run.results:
        case = one.case
        claimed = _claims(run, case) and (case.policy != "contacts" or of.get("policy") == "contacts")
        if one.outcome is Outcome.NOT_RUN and claimed and not _left_out(one):
            by_policy = case.policy == "anyone" and of.get("policy") == "contacts"
            for clause in case.clauses:
                if state[clause] is State.UNVERIFIED:
                    hidden[clause] = hidden.get(clause, True) and by_policy
    return len(hidden), all(hidden.values())


def partial(run: Run) -> str | None:
    """How many of the cases that apply to the target were chosen: "1 of 39 cases chosen"; None: all of them.

    What only a patient run plays counts as chosen: it is left out of every other run, and its clauses tell.
    """
    left = [one for one in run.results if one.outcome is Outcome.NOT_RUN and _left_out(one) and _applies(one, run)]
    if not left:
        return None
    of = counts(run)
    done = of[Outcome.PASSED] + of[Outcome.FAILED] + of[Outcome.ERROR]
    patient = sum(one.outcome is Outcome.NOT_RUN and one.reason == TOO_LONG for one in run.results)
    if any(one.reason == STOPPED for one in left):
        return f"stopped after {done} of {done + len(left)} cases"
    return f"{done + patient} of {done + patient + len(left)} cases chosen"


def _left_out(result: Result) -> bool:
    """Whether a case was not run because of how the run was started, or of how it went."""
    reason = result.reason or ""
    return reason.endswith(NOT_CHOSEN) or reason == STOPPED


def _applies(result: Result, run: Run) -> bool:
    """Whether a case that was not chosen would have been run, as far as the target's summary tells."""
    case, of = result.case, run.summary
    lacking = {
        "instances": len(of.get("instances", ())) < 2,
        "short-lease": of.get("lease", 0) > SHORT_LEASE,
        "directory": not of.get("directory", True),
        "secret": of.get("token") == "command",
    }
    named = [f"hook:{name}" for name in of.get("hooks", ())] + [f"claim:{name}" for name in of.get("claims", ())]
    return (
        _claims(run, case)
        and case.policy in {"any", of.get("policy", case.policy)}
        and not any(lacking.get(need) for need in case.needs)
        and all(need in named for need in case.needs if ":" in need)
        and not (of.get("ids") == "uuid" and has_other_ids(case))
    )


def _claims(run: Run, case: Case) -> bool:
    """Whether the target is of the case's class, and has what it is about."""
    return _binds(run, case.conformance) and not case.features & set(run.summary.get("unsupported", ()))


def _binds(run: Run, conformance: Class) -> bool:
    """Whether what is of a class is asked of the target."""
    return conformance is Class.GUIDE or run.summary.get("class") != Class.GUIDE.value


def counts(run: Run) -> Mapping[Outcome, int]:
    """How many cases had each outcome; all outcomes are there."""
    return dict.fromkeys(Outcome, 0) | Counter(one.outcome for one in run.results)


def failures(run: Run) -> list[Result]:
    """The cases that failed, the strictest first."""
    order = list(Level)
    return sorted(
        (one for one in run.results if one.outcome is Outcome.FAILED), key=lambda one: order.index(one.case.level)
    )


def states(run: Run) -> dict[str, State]:
    """The state of each clause, by its id."""
    outcomes: dict[str, set[Outcome]] = {clause: set() for clause in run.clauses}
    for one in run.results:
        for clause in one.case.clauses:
            outcomes.setdefault(clause, set()).add(one.outcome)
    return {clause: _state(found) for clause, found in outcomes.items()}


def _state(outcomes: set[Outcome]) -> State:
    if Outcome.FAILED in outcomes:
        return State.BROKEN
    if Outcome.ERROR in outcomes:
        return State.UNVERIFIED
    if Outcome.PASSED in outcomes:
        return State.HOLDS if outcomes == {Outcome.PASSED} else State.IN_PART
    return State.UNSUPPORTED if Outcome.UNSUPPORTED in outcomes else State.UNVERIFIED


def label(result: Result) -> str:
    """The word before a case that failed or ended in an error: only a MUST's failure is called one."""
    if result.outcome is Outcome.ERROR:
        return "ERROR"
    return {Level.MUST: "FAIL", Level.SHOULD: "WARN", Level.MAY: "NOTE"}[result.case.level]


def printable(text: str) -> str:
    """A text of the server's, without what a terminal would obey or XML forbid; lines stay lines."""
    return _CONTROL.sub(lambda found: _picture(ord(found[0])), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # ␛ and its like
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def inline(value: Any) -> str:
    """A value of the target's summary as text: "yes", "2 s", "a, b"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g} s"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(one) for one in value) or "–"
    return str(value)


def reasons(run: Run) -> list[tuple[Outcome, str, int]]:
    """Why cases say nothing: outcome, reason and how many, the most first."""
    found = Counter(
        (one.outcome, one.reason or "") for one in run.results if one.outcome in {Outcome.UNSUPPORTED, Outcome.NOT_RUN}
    )
    return [(outcome, reason, count) for (outcome, reason), count in found.most_common()]


def totals(run: Run) -> str:
    """One line: the cases by outcome, the clauses that hold of those that bind the target and can be seen, the time."""
    of = counts(run)
    cases = ", ".join(f"{count} {outcome.value}" for outcome, count in of.items() if count) or "none"
    bound = {name for name, one in run.clauses.items() if not one.unseen and _binds(run, one.conformance)}
    of_class = "" if _binds(run, Class.FULL) else " of class guide"
    found = Counter(state for clause, state in states(run).items() if clause in bound)
    hold = f"{found[State.HOLDS]} of {len(bound)} clauses{of_class} hold"
    if found[State.IN_PART]:
        hold += f", {found[State.IN_PART]} in part"
    return f"{len(run.results)} cases: {cases}. {hold}. {run.seconds:.1f} s."


def text(run: Run, *, strict: bool = False) -> str:
    """The report for a terminal: the verdict, then what a reader has to act on. Styled as `click.echo` takes it."""
    judged = verdict(run, strict=strict)
    of = run.summary
    target = f"{run.target}: class {of.get('class', '?')}, {inline(of.get('instances', ()))}"
    target += "".join(f", {name} {inline(of[name])}" for name in ("lease", "slack") if name in of)
    lines = [f"{_word(judged.word, judged.head)}  {judged.sentence}", f"  {totals(run)}", f"  {printable(target)}"]
    for one in [*failures(run), *(one for one in run.results if one.outcome is Outcome.ERROR)]:
        lines += ["", *_told(one, run.clauses)]
    if why := reasons(run):
        lines += ["", *(f"{outcome.value:>11}  {count:>4}  {reason}" for outcome, reason, count in why)]
        if patient := [one.case.id for one in run.results if one.reason == TOO_LONG]:
            lines += ["", f"Only with --patient: {', '.join(patient)}"]
    return "\n".join(lines)


def failure(result: Result, clauses: Mapping[str, Clause], *, shown: int | None = None) -> str:
    """One failure or error: its clauses with their sentences, what was expected and what came, the transcript.

    Args:
        shown: how many entries of the transcript, counted from its end; None: all.
    """
    return "\n".join([*_facts(result, clauses), *_tail(result, shown)])


def _told(result: Result, clauses: Mapping[str, Clause]) -> Iterator[str]:
    case, at = result.case, "" if result.step is None else f", step {result.step}"
    yield f"{_word(label(result))}  {click.style(case.id, bold=True)}  {case.title}  ({case.file}.toml{at})"
    for line in failure(result, clauses, shown=SHOWN).splitlines():
        yield f"  {line}" if line else ""


def _facts(result: Result, clauses: Mapping[str, Clause]) -> Iterator[str]:
    for name in result.case.clauses:
        clause = clauses.get(name)
        yield from _hanging(f"{name} {clause.level.value}" if clause else name, clause.sentence if clause else "")
    step = result.step
    if step is not None and 0 < step <= len(result.case.steps):
        yield from _hanging(f"step {step}", written(result.case.steps[step - 1]))
    for name, value in (("expected", result.expected), ("actual", result.actual), ("reason", result.reason)):
        if value:
            yield from _hanging(name, value)


def _tail(result: Result, shown: int | None) -> Iterator[str]:
    everything = list(result.transcript)
    entries = everything if shown is None else everything[max(0, len(everything) - shown) :]
    if not entries:
        return
    left = len(result.transcript) - len(entries)
    yield "transcript" + (f" (its last {len(entries)} entries; --html or --json has the {left} before)" if left else "")
    yield from transcript(entries)


def transcript(entries: Sequence[Entry]) -> Iterator[str]:
    """Lines of a transcript: seconds, actor, direction, text; the text's further lines below its first."""
    width = max((len(one.actor) for one in entries), default=0)
    for one in entries:
        head = f"  {one.at:8.3f} s  {one.actor:<{width}}  {one.direction} "
        first, *more = printable(one.text).rstrip("\n").split("\n")
        yield (head + first).rstrip()
        yield from ((" " * len(head) + line).rstrip() for line in more)


def written(step: Mapping[str, Any]) -> str:
    """A step in one line, much as it stands in its file."""
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False, default=str)}" for name, value in step.items())


def _hanging(name: str, value: str) -> Iterator[str]:
    first, *more = printable(value).split("\n")
    yield f"{name:<14} {first}"
    yield from (" " * 15 + line for line in more)


def _word(word: str, shown: str = "") -> str:
    return click.style(shown or word, fg=_COLOURS[word], bold=True)


def to_json(run: Run, *, strict: bool = False) -> str:
    """The whole run, in the shape that README.md describes."""
    judged, state = verdict(run, strict=strict), states(run)
    document = {
        "format": 1,
        "verdict": {
            "word": judged.word,
            "sentence": judged.sentence,
            "exit": judged.code,
            "strict": strict,
            "partial": judged.partial,
        },
        "target": run.target,
        "summary": dict(run.summary),
        "version": run.version,
        "started": run.started,
        "seconds": run.seconds,
        "counts": {outcome.value: count for outcome, count in counts(run).items()},
        "states": {one.value: list(state.values()).count(one) for one in State},
        "clauses": {
            name: {
                "area": clause.area,
                "level": clause.level.value,
                "class": clause.conformance.value,
                "sentence": clause.sentence,
                "source": clause.source,
                "unseen": clause.unseen,
                "state": state[name].value,
            }
            for name, clause in run.clauses.items()
        },
        "results": [_result(one) for one in run.results],
    }
    return json.dumps(document, indent=1, default=str) + "\n"


def _result(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "case": case.id,
        "title": case.title,
        "file": case.file,
        "clauses": list(case.clauses),
        "class": case.conformance.value,
        "level": case.level.value,
        "outcome": result.outcome.value,
        "seconds": result.seconds,
        "step": result.step,
        "expected": result.expected,
        "actual": result.actual,
        "reason": result.reason,
        "transcript": [
            {"at": one.at, "actor": one.actor, "direction": one.direction, "text": one.text}
            for one in result.transcript
        ],
    }
