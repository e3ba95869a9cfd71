"""A run as a JUnit file, which CI systems show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from xml.etree import ElementTree as ET

from contracts.model import Level, Outcome, Result, Run
from contracts.report import failure, partial, printable, transcript


def to_junit(run: Run, *, strict: bool = False) -> str:
    """The run as XML: a suite for each file of cases, a test case for each case.

    JUnit knows no warnings. A case that fails without changing the exit code is `skipped`, with all that is known of
    it: the file and the exit code must not contradict each other.
    """
    binding = {Level.MUST, Level.SHOULD} if strict else {Level.MUST}
    root = ET.Element("testsuites", _numbers(run.results, binding) | {"name": "presence-contracts"})
    root.set("time", f"{run.seconds:.3f}")
    part = partial(run)
    if part:
        root.set("name", f"presence-contracts (partial: {part})")
    for file, found in groupby(run.results, key=lambda one: one.case.file):
        results = list(found)
        suite = ET.SubElement(root, "testsuite", _numbers(results, binding) | {"name": f"contracts.{file}"})
        suite.set("time", f"{sum(one.seconds for one in results):.3f}")
        suite.set("timestamp", run.started.removesuffix("Z"))
        if part:
            ET.SubElement(ET.SubElement(suite, "properties"), "property", name="partial", value=part)
        for one in results:
            _case(suite, one, run, binding)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _kind(result: Result, binding: set[Level]) -> str | None:
    """The name of the element that says what became of a case; None: it passed."""
    if result.outcome is Outcome.PASSED:
        return None
    if result.outcome is Outcome.ERROR:
        return "error"
    return "failure" if result.outcome is Outcome.FAILED and result.case.level in binding else "skipped"


def _numbers(results: Sequence[Result], binding: set[Level]) -> dict[str, str]:
    kinds = [_kind(one, binding) for one in results]
    found = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    return {"tests": str(len(results))} | {name: str(kinds.count(kind)) for name, kind in found.items()}


def _case(suite: ET.Element, result: Result, run: Run, binding: set[Level]) -> None:
    case = result.case
    element = ET.SubElement(suite, "testcase", classname=f"contracts.{case.file}", name=f"{case.id}: {case.title}")
    element.set("time", f"{result.seconds:.3f}")
    kind = _kind(result, binding)
    if kind is not None:
        told = ET.SubElement(element, kind, message=_message(result))
        if result.outcome in {Outcome.FAILED, Outcome.ERROR}:
            told.set("type", case.level.value if result.outcome is Outcome.FAILED else "error")
            told.text = failure(result, run.clauses, shown=0)
    if result.transcript:
        ET.SubElement(element, "system-out").text = "\n".join(transcript(result.transcript)) + "\n"


def _message(result: Result) -> str:
    """One line."""
    if result.outcome is Outcome.FAILED:
        said = f"{', '.join(result.case.clauses)}: expected {result.expected}; actual: {result.actual}"
        if result.case.level is not Level.MUST:
            said = f"{result.case.level.value} fails: {said}"
    else:
        said = f"{result.outcome.value}: {result.reason}"
    return " ".join(printable(said).split())
