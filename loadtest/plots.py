"""The plots of a report. One that has no data is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from loadtest.metrics import BEYOND
from loadtest.readings import (
    NOTICES,
    Distribution,
    against_sessions,
    best,
    decode,
    fit,
    limit_of,
    notices,
    recovery,
)
from loadtest.run import Run
from loadtest.svg import (
    COLOUR,
    LEVELS,
    SHADES,
    STYLE,
    latency_axis,
    new_axes,
    phases,
    sessions_axis,
    short,
    thinned,
    thousands,
    time_axis,
    to_svg,
)

_COLUMNS = 120
"""Columns of a heat map, at most."""
_PER_DECADE = 10
"""Rows of a heat map, for each power of ten."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture with its words."""

    name: str
    title: str
    caption: str
    svg: str


def plots(run: Run) -> list[Plot]:
    """All plots of a run that have data."""
    return _drawn(
        lambda: _knee([("", run)]),
        lambda: _percentiles(_curves(run), run, "sessions"),
        lambda: _heat(run),
        lambda: _offered(run),
        lambda: _sessions(run),
        lambda: _recovery(run),
        lambda: _usage([("", run)], "cpu_percent", "CPU against sessions", "% of one core", 1),
        lambda: _usage([("", run)], "rss_bytes", "Memory against sessions", "MiB", 2**20),
        lambda: _expiry(run),
        lambda: _lag(run),
        lambda: _cpu_over_time(run),
    )


def plots_of_both(a: tuple[str, Run], b: tuple[str, Run]) -> list[Plot]:
    """The plots that lay two labelled runs over each other."""
    curves = []
    for (label, run), colour, style in ((a, "c1", "-"), (b, "c2", "--")):
        step = best(run)
        if step is not None and (seen := notices(step)).total:
            curves.append((f"{label}: {step.sessions:,}", colour, style, seen))
    return _drawn(
        lambda: _knee([a, b]),
        lambda: _percentiles(curves, b[1], "run: sessions"),
        lambda: _usage([a, b], "cpu_percent", "Server's CPU against sessions", "% of one core", 1, only="server"),
        lambda: _usage([a, b], "rss_bytes", "Server's memory against sessions", "MiB", 2**20, only="server"),
    )


def _drawn(*makers: Callable[[], Plot | None]) -> list[Plot]:
    with rc_context(STYLE):
        return [plot for maker in makers if (plot := maker()) is not None]


def _curves(run: Run) -> list[tuple[str, str, str, Distribution]]:
    """For each step: label, colour, line style, distribution."""
    steps = sorted((step for step in run.steps if notices(step).total), key=lambda step: step.sessions)
    made = []
    for n, step in enumerate(steps):
        shade = SHADES if len(steps) == 1 else 1 + round(n * (SHADES - 1) / (len(steps) - 1))
        colour, style = ("bad", "--") if step.breach else (f"step{shade}", "-")
        made.append((step.label + (" (breach)" if step.breach else ""), colour, style, notices(step)))
    return made


def _percentiles(curves: list[tuple[str, str, str, Distribution]], run: Run, legend: str) -> Plot | None:
    if not curves:
        return None
    figure, axes = new_axes()
    most = max(seen.total for *_, seen in curves)
    for label, colour, style, seen in curves:
        nines = np.linspace(np.log10(2), np.log10(seen.total), 160) if seen.total > 2 else np.array([np.log10(2)])
        values = [seen.at(1 - 10**-x) for x in nines]
        sure = int(np.searchsorted(nines, np.log10(max(seen.total / BEYOND, 2)), side="right"))
        axes.plot(nines[:sure], values[:sure], style, color=COLOUR[colour], label=label)
        axes.plot(nines[max(sure - 1, 0) :], values[max(sure - 1, 0) :], ":", color=COLOUR[colour], linewidth=1)
    allowed = limit_of(run.slo)
    if allowed and allowed[0] < 1:
        x = -np.log10(1 - allowed[0])
        axes.plot([x, x], [allowed[1], allowed[1] * 1.0001], "v", color=COLOUR["bad"], markersize=8, zorder=5)
        axes.annotate(
            f"SLO {short(allowed[1])}",
            (x, allowed[1]),
            (0, 7),
            textcoords="offset points",
            ha="center",
            color=COLOUR["bad"],
        )
    latency_axis(axes)
    marks = [
        (0.5, "50 %"),
        (0.9, "90 %"),
        (0.99, "99 %"),
        (0.999, "99.9 %"),
        (0.9999, "99.99 %"),
        (0.99999, "99.999 %"),
    ]
    marks = [(p, label) for p, label in marks if 1 / (1 - p) <= most * 1.2]
    axes.set_xticks([-np.log10(1 - p) for p, _ in marks], [label for _, label in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of notices that were at least this fast")
    figure.legend(title=legend, loc="outside right upper", alignment="left", reverse=True)
    return Plot(
        "percentiles",
        "Time to notice, by percentile",
        f"All notices, not an average: each further step right is ten times rarer. Dotted where fewer than {BEYOND} "
        "notices lie beyond. ▼ is the SLO: a curve must pass below it.",
        to_svg(figure, "percentiles", "Percentile curves of the time to notice, one a step"),
    )


def _knee(runs: Sequence[tuple[str, Run]]) -> Plot | None:
    figure, axes = new_axes()
    several = len(runs) > 1
    quantiles = [(0.5, "p50", "c3", ":"), (0.99, "p99", "c1", "-"), (0.999, "p99.9", "c2", "--")]
    drawn = 0
    for n, (label, run) in enumerate(runs):
        steps = sorted(run.steps, key=lambda step: step.sessions)
        seen = [(step, found) for step in steps if (found := notices(step)).total]
        for q, name, hue, style in quantiles if not several else [(0.99, "p99", ("c1", "c2")[n], ("-", "--")[n])]:
            points = [(step, found.at(q)) for step, found in seen if found.holds(q)]
            if len({step.sessions for step, _ in points}) < 2:
                continue
            drawn += 1
            axes.plot([s.sessions for s, _ in points], [y for _, y in points], style, color=COLOUR[hue], zorder=2)
            for broken, marker in ((False, "o"), (True, "X")):
                some = [(s.sessions, y) for s, y in points if bool(s.breach) is broken]
                colour = COLOUR["bad" if broken else hue]
                axes.plot([x for x, _ in some], [y for _, y in some], marker, color=colour, zorder=3)
            axes.plot([], [], style, marker="o", color=COLOUR[hue], label=f"{label} {name}".strip())
    if not drawn:
        return None
    allowed = limit_of(runs[-1][1].slo)
    if allowed:
        axes.axhline(allowed[1], color=COLOUR["bad"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"SLO {short(allowed[1])}", (0.35, allowed[1]), (0, 4), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", color=COLOUR["bad"],
        )  # fmt: skip
    latency_axis(axes)
    sessions_axis(axes)
    axes.legend(loc="upper left")
    return Plot(
        "knee",
        "Time to notice against sessions",
        "Where the line bends up, the server is full. ✕ marks a step that broke the SLO.",
        to_svg(figure, "knee", "Time to notice at several percentiles against the number of sessions"),
    )


def _heat(run: Run) -> Plot | None:
    parts = sorted((t, text) for name in NOTICES for t, text in run.intervals.get(name, ()))
    if len({t for t, _ in parts}) < 3:
        return None
    # A column is a whole number of intervals, or some would have more in them than others.
    interval = float(np.median(np.diff(sorted({t for t, _ in parts}))))
    width = interval * int(np.ceil(max(run.seconds, parts[-1][0]) / interval / _COLUMNS))
    columns: dict[int, list[str]] = {}
    for t, text in parts:
        columns.setdefault(int(t / width + 1e-6), []).append(text)
    seen = {n: decode(texts) for n, texts in columns.items()}
    seen = {n: found for n, found in seen.items() if found.total}
    cells: dict[tuple[int, int], int] = {}
    for n, found in seen.items():
        for row, count in zip(np.floor(np.log10(found.values) * _PER_DECADE), found.counts, strict=True):
            cells[n, int(row)] = cells.get((n, int(row)), 0) + int(count)
    if not cells:
        return None
    figure, axes = new_axes()
    axes.grid(visible=False)
    top = np.log(max(cells.values()) + 1)
    for level in range(1, LEVELS + 1):
        corners = [
            (n * width, 10 ** (row / _PER_DECADE), (n + 1) * width, 10 ** ((row + 1) / _PER_DECADE))
            for (n, row), count in sorted(cells.items())
            if min(LEVELS, 1 + int(np.log(count + 1) / top * LEVELS)) == level
        ]
        if corners:
            shapes = [Outline([(a, b), (c, b), (c, d), (a, d), (a, b)], closed=True) for a, b, c, d in corners]
            shape = PathPatch(Outline.make_compound_path(*shapes), facecolor=COLOUR[f"heat{level}"], linewidth=0)
            shape.set_antialiased(False)
            axes.add_patch(shape)
    # NaN leaves the line out where nothing was to be noticed.
    line = [seen[n].at(0.99) if n in seen else np.nan for n in range(min(seen), max(seen) + 1)]
    axes.plot(
        [(n + 0.5) * width for n in range(min(seen), max(seen) + 1)],
        line,
        color=COLOUR["c2"],
        linewidth=1.3,
        label="p99",
    )
    latency_axis(axes)
    time_axis(axes, run)
    figure.legend(loc="outside upper right")
    return Plot(
        "heat",
        "Time to notice over time",
        f"Each column is {width:.3g} s; the stronger a cell's colour, the more notices took that long (logarithmic).",
        to_svg(figure, "heat", "Heat map of the time to notice over the run"),
    )


def _offered(run: Run) -> Plot | None:
    figure, axes = new_axes()
    steps = [step for step in run.steps if step.offered]
    if len({step.offered for step in steps}) > 1:
        most = max(step.offered for step in steps) * 1.05
        axes.plot([0, most], [0, most], "--", color=COLOUR["soft"], linewidth=1)
        axes.annotate(
            "all that was asked", (most * 0.3, most * 0.3), (-8, 8), textcoords="offset points",
            color=COLOUR["soft"], ha="right",
        )  # fmt: skip
        for broken, marker, colour in ((False, "o", "c1"), (True, "X", "bad")):
            some = [step for step in steps if bool(step.breach) is broken]
            axes.plot([s.offered for s in some], [s.achieved for s in some], marker, color=COLOUR[colour], markersize=7)
        axes.set_xlabel("offered, actions/s")
        axes.set_ylabel("achieved, actions/s")
        axes.set_xlim(0)
        thousands(axes.xaxis)
        caption = "One point a step. Below the line: actions came late or not at all, and the load was less than said."
    elif "offered" in run.series and "achieved" in run.series:
        for name, colour, style in (("offered", "c2", "--"), ("achieved", "c1", "-")):
            axes.plot(*thinned(run.series[name]), style, color=COLOUR[colour], label=name)
        axes.set_ylabel("actions/s")
        axes.legend(loc="lower right")
        time_axis(axes, run)
        phases(axes, run)
        caption = "What the schedule asked for, and what was done. A gap: the load was less than said."
    else:
        return None
    axes.set_ylim(0)
    thousands(axes.yaxis)
    return Plot(
        "offered",
        "Offered against achieved",
        caption,
        to_svg(figure, "offered", "Offered and achieved actions a second"),
    )


def _sessions(run: Run) -> Plot | None:
    if len(run.series.get("sessions", ())) < 2:
        return None
    figure, axes = new_axes()
    times, values = thinned(run.series["sessions"])
    axes.plot(times, values, color=COLOUR["c1"])
    axes.fill_between(times, values, color=COLOUR["c1"], alpha=0.12, linewidth=0)
    axes.set_ylim(0)
    thousands(axes.yaxis)
    time_axis(axes, run)
    phases(axes, run, named=True)
    return Plot(
        "sessions",
        "Sessions over time",
        "Sessions that are connected, with the phases of the run.",
        to_svg(figure, "sessions", "Connected sessions over the run, phases shaded"),
    )


def _recovery(run: Run) -> Plot | None:
    found = recovery(run)
    if found is None or len(found[1]) < 2:
        return None
    name, points = found
    figure, axes = new_axes()
    back = next((t for t, share in points if share >= 95), None)
    full = next((t for t, share in points if share >= 99.9), points[-1][0])
    points = [(t, share) for t, share in points if t <= max(full * 1.5, 5)]
    axes.plot(*thinned(points), color=COLOUR["c1"])
    axes.axhline(95, color=COLOUR["c2"], linewidth=1, linestyle="--")
    if back is not None:
        axes.plot([back], [95], "o", color=COLOUR["c2"])
        axes.annotate(f"95 % after {back:.1f} s", (back, 95), (9, -16), textcoords="offset points", color=COLOUR["ink"])
    axes.set_ylim(0, 105)
    axes.set_ylabel("% of the sessions before")
    axes.set_xlabel("seconds since they were dropped")
    said = f"95 % were back after {back:.1f} s." if back is not None else "95 % never came back."
    return Plot(
        "recovery",
        f"Recovery after the {name}",
        said,
        to_svg(figure, "recovery", "Share of the sessions that is back over time"),
    )


def _usage(
    runs: Sequence[tuple[str, Run]], suffix: str, title: str, unit: str, scale: float, *, only: str = ""
) -> Plot | None:
    figure, axes = new_axes()
    said = []
    drawn: list[tuple[str, list[tuple[float, float]]]] = []
    for label, run in runs:
        names = {name for step in run.steps for name in step.resources} | set(run.series)
        for name in sorted((n for n in names if n.endswith(suffix) and n.startswith(only)), reverse=True):
            who = name.removesuffix(suffix).strip("_") or "all"
            drawn.append((f"{label} {who}".strip(), [(x, y / scale) for x, y in against_sessions(run, name)]))
    for n, (who, points) in enumerate(drawn):
        line = fit(points)
        if line is None:
            continue
        colour = COLOUR[f"c{n % 4 + 1}"]
        thin = points[:: max(1, len(points) // 150)]
        axes.plot([x for x, _ in thin], [y for _, y in thin], "os^D"[n % 4], color=colour, label=who)
        ends = [0.0, max(x for x, _ in points)]
        axes.plot(ends, [line[1] + line[0] * x for x in ends], "--", color=colour, linewidth=1.2)
        per = f"{line[0] * 1024:.2f} KiB a session" if suffix.endswith("bytes") else f"{line[0] * 1000:.2f} % per 1,000"
        said.append(f"{who} {per}")
    if not said:
        return None
    axes.set_ylim(0)
    axes.set_ylabel(unit)
    thousands(axes.yaxis)
    sessions_axis(axes)
    axes.set_xlim(0)
    axes.legend(loc="upper left")
    return Plot(
        suffix.split("_", maxsplit=1)[0],
        title,
        f"Slope of the fit: {'; '.join(said)}.",
        to_svg(figure, suffix, f"{title}, with the fit"),
    )


def _expiry(run: Run) -> Plot | None:
    seen = decode(s.histograms["PUSH offline-by-expiry"] for s in run.steps if "PUSH offline-by-expiry" in s.histograms)
    if seen.total < BEYOND:
        return None
    figure, axes = new_axes()
    # The last half percent would press all others into the first bar.
    edges = np.linspace(0, max(seen.at(0.995) * 1.05, 0.001), 41)
    heights, _ = np.histogram(np.minimum(seen.values, edges[-1]), bins=edges, weights=seen.counts)
    axes.bar(edges[:-1], heights, width=np.diff(edges) * 0.92, align="edge", color=COLOUR["c1"], linewidth=0)
    for q, label in ((0.5, "p50"), (0.99, "p99")):
        if seen.holds(q):
            axes.axvline(seen.at(q), color=COLOUR["c2"], linestyle="--", linewidth=1.2)
            axes.annotate(
                f"{label} {short(seen.at(q))}", (seen.at(q), 1.0), (-5, -2), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", va="top", ha="right", color=COLOUR["ink"],
            )  # fmt: skip
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, heights.max() * 1.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("after the end of the lease")
    axes.set_ylabel("notices")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    thousands(axes.yaxis)
    return Plot(
        "expiry",
        "Expiry lag",
        f"How long after the lease ended the watchers were told. {seen.total:,} notices, the slowest after "
        f"{short(float(seen.values[-1]))}.",
        to_svg(figure, "expiry", "Histogram of the time from the end of a lease to the notice"),
    )


def _lag(run: Run) -> Plot | None:
    figure, axes = new_axes()
    parts = sorted(run.intervals.get("generator lag", ()))
    if len(parts) > 1:
        seen = [(t, found) for t, text in parts if (found := decode([text])).total]
        for q, label, colour, style in ((0.99, "p99", "c1", "-"), (1.0, "worst", "c2", ":")):
            axes.plot(*thinned([(t, found.at(q)) for t, found in seen]), style, color=COLOUR[colour], label=label)
    elif len(run.series.get("generator_lag_ms", ())) > 1:
        axes.plot(*thinned(run.series["generator_lag_ms"]), color=COLOUR["c1"], label="lag")
    else:
        return None
    axes.axhline(5, color=COLOUR["bad"], linewidth=1, linestyle=(0, (4, 3)), label="5 ms")
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    time_axis(axes, run)
    phases(axes, run)
    figure.legend(loc="outside upper right", ncols=3)
    return Plot(
        "lag",
        "Generator lag",
        "How late the generator itself was. Above 5 ms at p99 the figures are partly its own.",
        to_svg(figure, "lag", "Lag of the load generator over the run"),
    )


def _cpu_over_time(run: Run) -> Plot | None:
    names = sorted((name for name in run.series if name.endswith("cpu_percent")), reverse=True)
    if not any(len(run.series[name]) > 1 for name in names):
        return None
    figure, axes = new_axes()
    for n, name in enumerate(names):
        who = name.removesuffix("cpu_percent").strip("_") or "all"
        axes.plot(*thinned(run.series[name]), ("-", "--", ":", "-.")[n % 4], color=COLOUR[f"c{n % 4 + 1}"], label=who)
    axes.set_ylim(0)
    axes.set_ylabel("% of one core")
    time_axis(axes, run)
    phases(axes, run)
    figure.legend(loc="outside upper right", ncols=3)
    return Plot(
        "cpu-time",
        "CPU over time",
        "Server and generator on one axis: who was busy when.",
        to_svg(figure, "cpu-time", "CPU of server and generator over the run"),
    )
