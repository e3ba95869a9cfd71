"""What is asked of a server, as text like `p99<250ms, lost=0, false-offline=0`, and whether a step kept it. Pure.

A clause is `NAME OPERATOR VALUE`, with `<`, `<=` or `=`:

- `p50`, `p99`, `p99.9`, `max` in `ms` or `s`: time to notice, of the notices of connects and disconnects;
  with a metric before it (`STOMP CONNECTED p99<1s`) the latency of that. Of what was recorded since the ramp; where
  nothing was (all stay, once they are there), in it;
- `lost`, `late`, `duplicated`, `out-of-order`, `unexpected`, `contradicted`, `cancelled`: counts, or with `%` a share
  of those due;
- `false-offline`, `ghost`: seconds for which users were shown offline while online, or online while offline, summed
  over all who watch. Not while a notice of a connect was on its way, in time: percentiles judge that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loadtest.readings import Distribution, notices, recorded
from loadtest.run import Step

DEFAULT = "p99<250ms, lost=0, false-offline=0"

COUNTS = {
    "lost": ("missing", "notices were lost"),
    "late": ("late", "notices were late"),
    "duplicated": ("duplicated", "notices came twice"),
    "out-of-order": ("out_of_order", "notices came out of order"),
    "unexpected": ("unexpected", "notices were never true"),
    "contradicted": ("contradicted", "answers of REST were never true"),
    "cancelled": ("cancelled", "notices were undone before they were told"),
}
"""By name: the count of the ledger, and how a sentence says it."""

_TELLING = {"lost": "no notice was due", "contradicted": "no answer of REST was compared with the truth"}
"""Counts of which 0 says nothing where there was nothing to count, and how a sentence says that."""

TIMES = {"false-offline": ("false_offline_seconds", "false-offline"), "ghost": ("ghost_seconds", "ghost")}
"""By name: the seconds of the ledger, and how a sentence says it."""

_LATENESS = {"late", *TIMES}

_LATENCY = re.compile(r"(?:(?P<metric>[A-Za-z].*?)\s+)?(?:p(?P<percent>\d+(?:\.\d+)?)|max)")
_CLAUSE = re.compile(r"(?P<name>[^<>=]+?)\s*(?P<operator><=|<|=)\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|%)?")


class SloError(ValueError):
    """The text is no SLO: one line that names the clause."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand. `quantile` is 0 to 1 for a latency and else None; `value` is in ms for latencies."""

    text: str
    name: str
    operator: str
    value: float
    unit: str
    metric: str | None = None
    quantile: float | None = None

    def allows(self, found: float) -> bool:
        """Whether `found`, in the unit of the value, keeps it."""
        if self.operator == "<":
            return found < self.value
        return found <= self.value if self.operator == "<=" else found == self.value

    @property
    def allowed(self) -> str:
        """The demand in words."""
        words = {"<": "less than ", "<=": "at most ", "=": ""}[self.operator]
        return f"allowed {'is' if self.quantile is not None else 'are'} {words}{self.value:,g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Check:
    """A clause held against a step. `kept` is None where what was measured does not tell."""

    clause: Clause
    kept: bool | None
    said: str


def parse(text: str) -> list[Clause]:
    """The clauses of an SLO.

    Raises:
        SloError: a clause is none.
    """
    clauses = [_clause(part.strip()) for part in text.split(",") if part.strip()]
    if not clauses:
        raise SloError(f"the SLO is empty; for example: {DEFAULT}")
    return clauses


def without_latencies(text: str) -> str:
    """The same SLO without its latencies; where nothing else is asked, that nothing is lost.

    For how long somebody is shown as what he is not any more is one, too: it is how late the notice comes.
    """
    asked = (one for one in parse(text) if one.quantile is None and one.name not in _LATENESS)
    return ", ".join(one.text for one in asked) or "lost=0"


def check(clauses: Iterable[Clause], step: Step) -> list[Check]:
    """What a step says to each clause."""
    return [_latency(one, step) if one.quantile is not None else _ledger(one, step) for one in clauses]


def breach(checks: Iterable[Check]) -> str | None:
    """The clauses that were not kept in one sentence; None when there is none."""
    return "; ".join(one.said for one in checks if one.kept is False) or None


def untold(checks: Iterable[Check]) -> str | None:
    """The clauses that could not be judged in one sentence; None when there is none."""
    return "; ".join(one.said for one in checks if one.kept is None) or None


def _clause(text: str) -> Clause:
    found = _CLAUSE.fullmatch(text)
    if not found:
        raise SloError(f"SLO: {text!r} is no clause such as p99<250ms, lost=0, lost<0.1% or false-offline<1s")
    name, operator, value, unit = found["name"], found["operator"], float(found["value"]), found["unit"] or ""
    latency = _LATENCY.fullmatch(name)
    if latency:
        if unit not in {"ms", "s"} or operator == "=":
            raise SloError(f"SLO: {text!r}: a latency is below so many ms or s, such as {name}<250ms")
        percent = float(latency["percent"] or 100)
        while percent > 100:  # p999 is how some write p99.9
            percent /= 10
        ms = value * 1000 if unit == "s" else value
        return Clause(text, name, operator, ms, " ms", latency["metric"], percent / 100)
    if name in COUNTS:
        if unit not in {"", "%"}:
            raise SloError(f"SLO: {text!r}: a count has no unit, or %")
        return Clause(text, name, operator, value, " %" if unit else "")
    if name in TIMES:
        if unit not in {"", "s"}:
            raise SloError(f"SLO: {text!r}: must be in s")
        return Clause(text, name, operator, value, " s")
    raise SloError(f"SLO: {name!r} is none of p99 (any percentile), max, {', '.join([*COUNTS, *TIMES])}")


def _latency(clause: Clause, step: Step) -> Check:
    assert clause.quantile is not None
    if clause.metric is None:
        seen, what = notices(step), "notices"
    else:
        seen, what = recorded(step, clause.metric), clause.metric
    if not seen.total:
        return Check(clause, None, f"{clause.name} cannot be told: there were no samples of {what}")
    if clause.quantile == 1 or seen.holds(clause.quantile):
        value = seen.at(clause.quantile)
        kept = clause.allows(value)
        return Check(clause, kept, f"{clause.name} was {_ms(value)}, {clause.allowed}")
    return _by_worst(clause, seen, what)


def _by_worst(clause: Clause, seen: Distribution, what: str) -> Check:
    """Too few samples for the percentile: it is kept if even the worst keeps it, and else nobody can tell."""
    worst = seen.at(1.0)
    if clause.allows(worst):
        return Check(clause, True, f"the worst of {seen.total:,} {what} was {_ms(worst)}, {clause.allowed}")
    return Check(clause, None, f"{clause.name} cannot be told from {seen.total:,} samples of {what}")


def _ledger(clause: Clause, step: Step) -> Check:
    field, words = COUNTS[clause.name] if clause.name in COUNTS else TIMES[clause.name]
    found = step.ledger.get(field)
    if found is None:
        return Check(clause, None, f"{clause.name} cannot be told: nothing was recorded of it")
    if clause.unit == " s":
        found = round(found, 3)  # a sum of many floats
        return Check(clause, clause.allows(found), f"{found:,.1f} s {words}, {clause.allowed}")
    of = step.ledger.get("checked" if clause.name == "contradicted" else "expected", 0)
    if not of and (clause.name in _TELLING or clause.unit == " %"):
        return Check(clause, None, f"{clause.name} cannot be told: {_TELLING.get(clause.name, _TELLING['lost'])}")
    if clause.unit == " %":
        share = 100 * found / of
        return Check(clause, clause.allows(share), f"{share:.3g} % ({found:,} of {of:,}) {words}, {clause.allowed}")
    return Check(clause, clause.allows(found), f"{found:,} {words}, {clause.allowed}")


def _ms(value: float) -> str:
    return f"{value / 1000:,.2f} s" if value >= 1000 else f"{value:,.3g} ms" if value < 100 else f"{value:,.0f} ms"
