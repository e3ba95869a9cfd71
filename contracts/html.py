"""A run as one HTML file that a person reads: no scripts, no other files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from contracts.model import Clause, Level, Outcome, Result, Run
from contracts.report import State, counts, failures, inline, label, printable, states, verdict, written

AREAS = {
    "AUTH": "Identity and tokens",
    "REST": "REST",
    "CONN": "Connection",
    "STOMP": "STOMP",
    "SESS": "Session and lease",
    "WATCH": "Watching",
    "INST": "Several instances",
    "FAULT": "Faults",
    "STORE": "Stores",
}
"""What the areas of the clauses are called; one that is not named here is called by its id."""


def to_html(run: Run, *, strict: bool = False) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": _prose, "inline": inline, "printable": printable, "written": written}
    state = states(run)
    by_area: dict[str, list[Clause]] = {}
    for clause in run.clauses.values():
        by_area.setdefault(clause.area, []).append(clause)
    by_clause: dict[str, list[Result]] = {}
    for one in run.results:
        for name in one.case.clauses:
            by_clause.setdefault(name, []).append(one)
    troubles = [*failures(run), *(one for one in run.results if one.outcome is Outcome.ERROR)]
    return environment.get_template("report.html.jinja").render(
        run=run,
        verdict=verdict(run, strict=strict),
        strict=strict,
        counts=counts(run),
        state=state,
        of_states={one: list(state.values()).count(one) for one in State},
        kind={name: _kind(run.clauses[name], state[name], strict) for name in run.clauses},
        areas=[(area, AREAS.get(area, area), clauses) for area, clauses in by_area.items()],
        by_clause=by_clause,
        troubles=troubles,
        troubled={one.case.id for one in troubles},
        label=label,
        failing=_failing,
        Outcome=Outcome,
    )


def _kind(clause: Clause, state: State, strict: bool) -> str:
    """The class of a clause's cell."""
    binding = clause.level is Level.MUST or (strict and clause.level is Level.SHOULD)
    if state is State.BROKEN and not binding:
        return "warned"
    return state.value.replace(" ", "-")


def _failing(results: Sequence[Result]) -> Result | None:
    """The case that broke a clause."""
    return next((one for one in results if one.outcome is Outcome.FAILED), None)


def _prose(text: str) -> Markup:
    """Text in which `…` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text)))))  # noqa: S704 (escaped)
