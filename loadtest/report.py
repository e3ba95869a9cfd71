"""What a run says: one HTML file that works offline, and the comparison of two runs side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loadtest import plots
from loadtest.metrics import BEYOND, Histogram
from loadtest.readings import against_sessions, best, fit, notices
from loadtest.run import Run, Step, Summary
from loadtest.svg import clock
from loadtest.verdict import milliseconds, sentence

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
SPREAD = 0.05
"""Differences between two runs below this share are not marked: the same run repeated differs as much."""

LEDGER = {
    "expected": "Changes times watchers that had to be told of them",
    "received": "Told, by itself or by a newer one",
    "late": "Told, but later than the limit",
    "missing": "Never told",
    "duplicated": "Told again without a change",
    "out_of_order": "Told with a version that did not rise",
    "unexpected": "Told a status that was never true in that time",
    "cancelled": "Undone by the opposite change before it was told",
    "checked": "States from REST that were compared with the truth",
    "contradicted": "Of these: neither true when asked nor when answered",
    "ghost_seconds": "Shown online after the truth was offline, summed over all watchers",
    "false_offline_seconds": "Shown offline while beating, summed over all watchers",
}
KINDS = {"lost": "loss", "revived": "revival", "shortened": "shortened lease"}
"""What had happened, in the ledger's word and as a noun."""

FAULTS = {"contradicted", "late", "missing", "duplicated", "out_of_order", "unexpected", "false_offline_seconds"}
"""What should be 0. What is cancelled the contract allows, and a storm cancels thousands; an SLO may limit it."""

_LESS_IS_BETTER = re.compile(
    r"^(p\d+|max)$|missing|late|duplicated|cancelled|order|unexpected|seconds$|cpu|rss|slope|file", re.IGNORECASE
)
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Status:
    """What the run comes to: `OK`, `breached` or `INVALID`, and why."""

    word: str
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class Slope:
    """What one more session costs: the fit over the steps."""

    name: str
    per_session: str
    at_zero: str
    points: int


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two runs; `mark` is `better`, `worse`, `changed` or nothing."""

    name: str
    a: str
    b: str
    change: str = ""
    mark: str = ""


def status(run: Run) -> Status:
    """Judge a run. A run that cannot be believed is neither kept nor breached."""
    fatal = [sentence for level, sentence in run.validity if level == "fatal"]
    if fatal:
        return Status("INVALID", fatal)
    broken = [f"At {step.sessions:,} sessions: {step.breach.rstrip('.')}." for step in run.steps if step.breach]
    if run.ok:
        return Status("OK", [])
    return Status("breached", broken or ["The run says that its SLO was not kept, and names no step."])


def slopes(run: Run) -> list[Slope]:
    """What one more session costs, for each resource that was read at two loads or more."""
    made = []
    for name in dict.fromkeys(name for step in run.steps for name in step.resources):
        points = against_sessions(run, name)
        line = fit(points)
        if line is None:
            continue
        slope, base = line
        if name.endswith("_bytes"):
            per = f"{slope / 1024:,.2f} KiB"
        elif name.endswith("_percent"):
            per = f"{slope * 1000:,.2f} % per 1,000"
        else:
            per = f"{slope:,.3g}"
        made.append(Slope(name, per, quantity(base, name), len(points)))
    return made


def bottleneck(run: Run) -> list[str]:
    """The evidence for what was the limit: how full each thing was at the highest load."""
    if not run.steps:
        return []
    step = max(run.steps, key=lambda step: step.sessions)
    said = [f"At {step.sessions:,} sessions, the highest load: {(step.breach or 'the SLO was kept').rstrip('.')}."]
    full = ("server_cpu_percent", "server_busiest_cpu_percent", "generator_cpu_percent")
    said += [f"{label(name)}: {step.resources[name]:.0f} % of a core." for name in full if name in step.resources]
    files, allowed = step.resources.get("open_files"), run.limits.get("nofile")
    if files and isinstance(allowed, int):
        said.append(f"Open files: {files:,.0f} of {allowed:,} ({100 * files / allowed:.0f} %).")
    if step.offered and step.achieved < 0.99 * step.offered:
        said.append(f"Only {100 * step.achieved / step.offered:.1f} % of the actions that were due were made.")
    if not any(one.breach for one in run.steps):
        said.append("No step broke the SLO: the capacity is at least this, the limit was not met.")
    return said


def rows(step: Step) -> dict[str, Summary]:
    """All latencies of a step: the metrics, then the ledger's time to notice by what had happened."""
    after = step.ledger.get("notice", {})
    return step.metrics | {
        f"notice after {KINDS.get(kind, kind)}": Histogram.decode(text).summary() for kind, text in after.items()
    }


def came(step: Step) -> dict[str, Summary]:
    """The latencies of the ramp, which are not among those of the step."""
    return {name: Histogram.decode(text).summary() for name, text in sorted(step.ramp.items())}


def to_html(run: Run, *, data: str = "") -> str:
    """The report. `data` is the name of the JSON file beside it, to be linked."""
    return _page(
        mode="report",
        title=f"{status(run).word} · {run.title}",
        run=run,
        data=data,
        plots=plots.plots(run),
        resources=list(dict.fromkeys(name for step in run.steps for name in step.resources)),
        slopes={one.name: one for one in slopes(run)},
        bottleneck=bottleneck(run),
        facts=_facts(run),
    )


def compare(a: Run, b: Run) -> str:
    """Two runs side by side, `a` the older or the base; what differs is marked."""
    figures, settings = _figures(a, b), _settings(a, b)
    return _page(
        mode="compare",
        title=f"{a.title} against {b.title}" if a.title != b.title else f"{a.title}: two runs",
        a=a,
        b=b,
        plots=plots.plots_of_both(("A", a), ("B", b)),
        figures=figures,
        marked=_marked(figures),
        settings=settings,
        changed=_marked(settings),
    )


def write(run: Run, path: Path) -> None:
    """Writes the report to `path` and its data as JSON beside it."""
    data = path.with_suffix(".json")
    run.save(data)
    path.write_text(to_html(run, data=data.name), encoding="utf-8")


def _page(**values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "value": value,
        "label": label,
        "quantity": quantity,
        "ms": milliseconds,
        "day": _day,
        "clock": clock,
    }
    environment.globals |= {
        "status": status, "rows": rows, "came": came, "best": best, "sentence": sentence, "percentile": _percentile,
        "p99": _p99, "ledger": LEDGER, "faults": FAULTS, "quantiles": QUANTILES, "spread": SPREAD, "svg": Markup,
    }  # fmt: skip
    return environment.get_template("report.html.jinja").render(values)


def label(name: str) -> str:
    """`server_rss_bytes` as `server RSS`."""
    words = re.sub(r"_(bytes|percent|ms|us|seconds)$", "", name).replace("_", " ")
    words = re.sub(r"\b(cpu|rss|pss|tls|tcp|gc|ip|fds|url)\b", lambda found: found[0].upper(), words)
    return words[:1].upper() + words[1:]


def quantity(number: float, name: str) -> str:
    """A number with the unit that the end of its name says."""
    if name.endswith("_bytes"):
        size, unit = float(number), 0
        while abs(size) >= 1024 and unit < len(_BINARY) - 1:
            size, unit = size / 1024, unit + 1
        return f"{size:,.4g} {_BINARY[unit]}"
    for end, unit_name in (("_percent", "%"), ("_ms", "ms"), ("_us", "µs"), ("_seconds", "s")):
        if name.endswith(end):
            return f"{number:,.1f}".removesuffix(".0") + f" {unit_name}"
    return f"{number:,.2f}".removesuffix(".00")


def value(found: Any, name: str = "") -> str:
    """A setting as text."""
    if isinstance(found, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {value(one, key)}" for key, one in found.items())
    if isinstance(found, (list, tuple)):
        return ", ".join(value(one, name) for one in found)
    if found is None or found == "":
        return "not known"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, (int, float)) and not re.search(r"port|pid|seed|version", name):
        return quantity(found, name)
    return str(found)


def _day(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%d %B %Y, %H:%M UTC}".lstrip("0")
    except ValueError:
        return started


def _percentile(count: int, name: str) -> str:
    """Why a percentile is not there."""
    need = round(BEYOND / (1 - QUANTILES[name])) if name != "max" else 1
    return f"{count:,} samples are too few: this percentile wants {need:,}"


def _p99(step: Step) -> float | None:
    """The p99 of a step's notices in ms, when enough were seen."""
    seen = notices(step)
    return seen.at(0.99) if seen.holds(0.99) else None


def _facts(run: Run) -> list[tuple[str, dict[str, Any]]]:
    groups = [
        ("Workload", run.workload | {"seed": run.seed}),
        ("Machine", run.machine),
        ("Limits as read", run.limits),
        ("Server", run.target),
        ("Load test", run.harness),
    ]
    return [(name, facts) for name, facts in groups if facts]


def _flat(facts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, found in facts.items():
        name = f"{path}{key}"
        if isinstance(found, Mapping):
            yield from _flat(found, f"{name}: ")
        else:
            yield name, value(found, key)


def _settings(a: Run, b: Run) -> list[tuple[str, list[Difference]]]:
    """All settings of both runs, by group; `changed` where they differ."""
    groups = []
    for (group, of_a), (_, of_b) in zip(_groups(a), _groups(b), strict=True):
        left, right = dict(_flat(of_a)), dict(_flat(of_b))
        lines = [
            Difference(
                label(name),
                left.get(name, "–"),
                right.get(name, "–"),
                mark="changed" if left.get(name) != right.get(name) else "",
            )
            for name in dict.fromkeys([*left, *right])
        ]
        if lines:
            groups.append((group, lines))
    return groups


def _marked(groups: list[tuple[str, list[Difference]]]) -> list[tuple[str, list[Difference]]]:
    kept = [(group, [line for line in lines if line.mark]) for group, lines in groups]
    return [(group, lines) for group, lines in kept if lines]


def _groups(run: Run) -> list[tuple[str, dict[str, Any]]]:
    asked = {"SLO": run.slo, "command": run.command, "seed": run.seed}
    facts = [("Workload", run.workload), ("Machine", run.machine), ("Limits as read", run.limits)]
    return [("Asked", asked), *facts, ("Server", run.target), ("Load test", run.harness)]


def _figures(a: Run, b: Run) -> list[tuple[str, list[Difference]]]:
    """What was measured: the best step of each, then the steps of the same load, then the slopes."""
    groups = []
    best_a, best_b = best(a), best(b)
    if best_a and best_b:
        groups.append(("Best step of each", [_difference("sessions", best_a.sessions, best_b.sessions)]))
        if best_a.sessions != best_b.sessions:
            groups[-1][1].extend(_of_steps(best_a, best_b))
    rest = list(b.steps)
    for step in a.steps:
        same = next((other for other in rest if (other.kind, other.sessions) == (step.kind, step.sessions)), None)
        if same is not None:
            rest = [other for other in rest if other is not same]  # the same load may be tried again
            groups.append((f"{step.sessions:,} sessions{step.of_kind}", list(_of_steps(step, same))))
    lines = []
    for name in dict.fromkeys(name for step in [*a.steps, *b.steps] for name in step.resources):
        left, right = (fit(against_sessions(run, name)) for run in (a, b))
        if left and right:
            scale = 1000 if name.endswith("_percent") else 1
            found = _difference(name, left[0] * scale, right[0] * scale)
            lines.append(Difference(f"{label(name)}{', per 1,000' if scale > 1 else ''}", *_rest(found)))
    if lines:
        groups.append(("Slope per session", lines))
    return groups


def _of_steps(a: Step, b: Step) -> Iterator[Difference]:
    if a.held is not None and b.held is not None:
        yield _difference("sessions held", a.held, b.held)
    yield _difference("achieved, actions/s", round(a.achieved, 1), round(b.achieved, 1))
    for metric in a.metrics:
        if metric in b.metrics:
            for name in QUANTILES:
                left, right = getattr(a.metrics[metric], name), getattr(b.metrics[metric], name)
                # The worst of many is chance: it is in the reports, but makes no difference between runs.
                if left is not None and right is not None and name != "max":
                    found = _difference(name, left, right)
                    shown = f"{metric} {name.replace('p999', 'p99.9')}"
                    yield Difference(
                        shown, f"{milliseconds(left)} ms", f"{milliseconds(right)} ms", found.change, found.mark
                    )
    for kind, names in ((a.ledger, LEDGER), (a.resources, a.resources)):
        of_b = b.ledger if kind is a.ledger else b.resources
        for name in names:
            if name in kind and name in of_b and name not in {"expected", "received"}:
                found = _difference(name, kind[name], of_b[name])
                yield Difference(label(name), *_rest(found))


def _rest(found: Difference) -> tuple[str, str, str, str]:
    return found.a, found.b, found.change, found.mark


def _difference(name: str, a: float, b: float) -> Difference:
    share = (b - a) / a if a else (0.0 if not b else float("inf"))
    if a == b:
        change = ""
    elif not a:
        change = "from 0"
    else:
        change = f"{100 * share:+.0f} %" if abs(share) < 1 else f"× {b / a:.1f}"
    mark = ""
    if abs(share) >= SPREAD:
        mark = "better" if (share < 0) == bool(_LESS_IS_BETTER.search(name)) else "worse"
    return Difference(
        label(name), quantity(a, name), quantity(b, name), change if change not in {"+0 %", "-0 %"} else "", mark
    )
