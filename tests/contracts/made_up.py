"""Runs that never took place: what the reports are tried with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from contracts.model import Case, Class, Clause, Entry, Level, Outcome, Result, Run

SUMMARY = {
    "class": "full",
    "lease": 2.0,
    "slack": 1.0,
    "policy": "anyone",
    "instances": ["http://127.0.0.1:8080"],
    "unsupported": ["cors"],
    "directory": False,
}

TRANSCRIPT = (
    Entry(0.0, "-", "·", "1. connect = 'ann'"),
    Entry(0.0012, "ann", "→", "CONNECT\naccept-version:1.2\n\n␀"),
    Entry(0.0131, "ann", "←", "CONNECTED\nversion:1.2\nserver:\x1b[31mred\ufffe & <b>bold</b>\n\n␀"),
    Entry(2.5, "-", "·", "2. expect = 'ann', about = 'bob', online = True"),
)


def clause(name: str, level: Level = Level.MUST, sentence: str = "", **more: Any) -> Clause:
    return Clause(name, name.partition("-")[0], level, Class.FULL, sentence or f"Says {name}.", "the guide", **more)


def case(name: str, clauses: Sequence[str] = ("WATCH-01",), level: Level = Level.MUST, **more: Any) -> Case:
    steps = ({"connect": "ann"}, {"expect": "ann", "about": "bob", "online": True})
    fields: dict[str, Any] = {"title": f"The story of {name}", "conformance": Class.FULL, "file": "watching"} | more
    return Case(id=name, clauses=clauses, level=level, steps=steps, **fields)


def passed(name: str = "good", **more: Any) -> Result:
    return Result(case(name, **more), Outcome.PASSED, seconds=0.5, transcript=TRANSCRIPT[:2])


def failed(name: str = "bad", **more: Any) -> Result:
    return Result(
        case(name, **more),
        Outcome.FAILED,
        seconds=2.5,
        step=2,
        expected="MESSAGE about bob, within 3 s",
        actual="nothing came; <script>alert(1)</script>",
        transcript=TRANSCRIPT,
    )


def broken(name: str = "odd", **more: Any) -> Result:
    return Result(case(name, **more), Outcome.ERROR, step=1, reason="the server cannot be reached: it hung up")


def unsupported(name: str = "cors", **more: Any) -> Result:
    return Result(case(name, **more), Outcome.UNSUPPORTED, reason="the target does not support cors")


def not_run(name: str = "far", **more: Any) -> Result:
    return Result(case(name, **more), Outcome.NOT_RUN, reason="the target lacks instances")


def run(*results: Result, clauses: Iterable[Clause] = ()) -> Run:
    known = {one.id: one for one in clauses or [clause("WATCH-01")]}
    return Run("target.toml", SUMMARY, "0.1.0", "2026-01-02T03:04:05Z", 4.25, results, known)
