"""Drawing with matplotlib for a page: the style, the axes, and SVG that takes its colours from the page's CSS.

Matplotlib knows no CSS. It draws with stand-in colours, one for each role; `to_svg` puts the page's custom properties
in their place, and leaves the text as text in the page's own font. So one picture is readable in light and in dark.
"""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from loadtest.readings import Points
from loadtest.run import Run

LEVELS = 7
"""Colours of a heat map."""
SHADES = 6
"""Colours of a row of steps."""
_ROLES = ["ink", "soft", "line", "tint", "c1", "c2", "c3", "c4", "bad", "sheet"]
_ROLES += [f"heat{n}" for n in range(1, LEVELS + 1)] + [f"step{n}" for n in range(1, SHADES + 1)]
COLOUR = {role: f"#0{n:02x}0fe" for n, role in enumerate(_ROLES, 16)}
_ROLE = {colour: role for role, colour in COLOUR.items()}
_STAND_IN = re.compile("|".join(_ROLE))
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOUR["line"],
    "axes.labelcolor": COLOUR["soft"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a phase may be called "$5"
    "axes.xmargin": 0.02,
    "grid.color": COLOUR["line"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOUR["line"],
    "ytick.color": COLOUR["line"],
    "xtick.labelcolor": COLOUR["soft"],
    "ytick.labelcolor": COLOUR["soft"],
    "text.color": COLOUR["ink"],
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.title_fontsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.6,
}
_POINTS = 500
"""Points of a line; more are thinned."""


def new_axes() -> tuple[Figure, Axes]:
    """An empty picture, without a background of its own."""
    figure = Figure(figsize=(7.6, 4.3), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def thinned(points: Points) -> tuple[list[float], list[float]]:
    """Points as x and y, thinned such that the peaks stay."""
    if len(points) <= _POINTS:
        return [x for x, _ in points], [y for _, y in points]
    size = -(-len(points) * 2 // _POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return [x for x, _ in kept], [y for _, y in kept]


def time_axis(axes: Axes, run: Run) -> None:
    """The whole run on the x axis, so that all plots over time can be held against each other."""
    end = max([run.seconds, *(points[-1][0] for points in run.series.values() if points)])
    axes.set_xlim(0, end or 1)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 1.2, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: clock(t)))
    axes.set_xlabel("since the start, min:s")


def latency_axis(axes: Axes) -> None:
    """A logarithmic axis of ms."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within two decades, labels at powers of ten alone would be too few to read a value.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def sessions_axis(axes: Axes) -> None:
    """Sessions on the x axis."""
    thousands(axes.xaxis)
    axes.set_xlabel("sessions")


def thousands(axis: Any) -> None:
    """Labels such as 12,000."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value == int(value) else f"{value:,g}"))


def phases(axes: Axes, run: Run, *, named: bool = False) -> None:
    """Shades every other phase; with `named`, each has its name where there is room for it."""
    end = axes.get_xlim()[1]
    for n, phase in enumerate(run.phases):
        if n % 2 == 0:
            axes.axvspan(phase.start, phase.end, color=COLOUR["tint"], linewidth=0, zorder=0)
        room = (phase.end - phase.start) / end * 480
        if not named or room < 11:
            continue
        lies = room > 7 * len(phase.name)
        axes.text(
            (phase.start + phase.end) / 2, 1.02 if lies else 0.04, phase.name, rotation=0 if lies else 90,
            transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=COLOUR["soft"], fontsize=10,
            bbox=None if lies else {"facecolor": COLOUR["sheet"], "alpha": 0.75, "linewidth": 0, "pad": 1.5},
        )  # fmt: skip


def clock(t: float) -> str:
    """Seconds as minutes and seconds."""
    return f"{round(t) // 60}:{round(t) % 60:02}"


def short(value: float) -> str:
    """A latency with the unit that suits it."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if value >= 1 or not value else f"{value * 1000:.3g} µs"


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element to put into a page; `name` keeps its ids apart from those of others."""
    written = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg")
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"\n\s*(?=<)", "", re.sub(r" \n(?=[MLCQzZ])", " ", svg))
    return _STAND_IN.sub(lambda found: f"var(--{_ROLE[found[0]]})", svg)
