"""What the data of a run holds: distributions, fits and moments, read once here for the plots and for the text."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from loadtest.metrics import BEYOND
from loadtest.run import Run, Step

NOTICES = ("PUSH online", "PUSH offline")
"""What a watcher waits for: the metrics that are meant by "notices"."""

STORMS = re.compile(r"storm|reconnect|restart|rolling", re.IGNORECASE)
"""Phases after which sessions have to come back."""

Points = Sequence[tuple[float, float]]
"""`(x, y)`, x rising."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Latencies and how often each was seen: `values` in ms, rising, and `counts`, both of the same length."""

    values: np.ndarray[Any, np.dtype[np.float64]]
    counts: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def holds(self, quantile: float) -> bool:
        """Whether enough samples lie beyond a quantile to quote it."""
        return self.total * (1 - quantile) >= BEYOND - 1e-6

    def at(self, quantile: float) -> float:
        """The latency in ms that the share `quantile` (0 to 1) does not exceed."""
        rank = max(1, int(np.ceil(quantile * self.total - 1e-9)))
        return float(self.values[np.searchsorted(np.cumsum(self.counts), rank)])


def decode(texts: Iterable[str]) -> Distribution:
    """The sum of encoded histograms of microseconds."""
    seen: Counter[float] = Counter()
    for text in texts:
        seen.update(_counts(text))
    values = sorted(seen)
    return Distribution(np.array(values, dtype=float), np.array([seen[value] for value in values], dtype=np.int64))


@functools.lru_cache(maxsize=2048)
def _counts(text: str) -> Mapping[float, int]:
    histogram = HdrHistogram.decode(text)
    # The package walks over all its 20,000 counters for each percentile; few of them are set.
    indices = np.flatnonzero(np.frombuffer(histogram.counts, dtype=f"i{histogram.word_size}"))
    values = (histogram.get_highest_equivalent_value(histogram.get_value_from_index(int(n))) / 1000 for n in indices)
    return {value: int(histogram.counts[n]) for n, value in zip(indices, values, strict=True)}


def recorded(step: Step, *names: str) -> Distribution:
    """All samples of these metrics since the ramp; where there are none (all sessions stay), those of the ramp."""
    held = decode(step.histograms[name] for name in names if name in step.histograms)
    return held if held.total else decode(step.ramp[name] for name in names if name in step.ramp)


def successes(step: Step, name: str) -> int:
    """How often a metric was recorded, in the ramp and since."""
    return decode(of[name] for of in (step.ramp, step.histograms) if name in of).total


def notices(step: Step) -> Distribution:
    """Time to notice, of all notices of a step that no loss or expiry preceded."""
    return recorded(step, *NOTICES)


def held(step: Step) -> bool:
    """Whether `notices` are of the time after the ramp."""
    return any(name in step.histograms for name in NOTICES)


def fit(points: Points) -> tuple[float, float] | None:
    """The straight line through points, as (slope, value at 0); None with fewer than two different x."""
    if len({x for x, _ in points}) < 2:
        return None
    slope, base = np.polyfit([x for x, _ in points], [y for _, y in points], 1)
    return float(slope), float(base)


def against_sessions(run: Run, name: str) -> list[tuple[float, float]]:
    """A resource against the sessions held: one point a step. Of one step alone, memory while the sessions came."""
    steps = [step for step in run.steps if name in step.resources]
    if len({step.sessions for step in steps}) > 1:
        return [(float(step.present), step.resources[name]) for step in steps]
    points = [(float(step.sessions), step.resources[name]) for step in steps]  # what differs by chance is no slope
    held = run.series.get("sessions", [])
    seen = run.series.get(name, [])
    ramp = next((phase for phase in run.phases if phase.name == "ramp"), None)
    if not held or not seen or ramp is None or not name.endswith("_bytes"):
        return points  # connecting takes CPU that holding does not: that says nothing of a session
    times, counts = zip(*held, strict=True)
    return [(float(np.interp(t, times, counts)), value) for t, value in seen if ramp.start <= t <= ramp.end]


def limit_of(slo: str | None) -> tuple[float, float] | None:
    """The latency an SLO allows, as (quantile, ms): `p99<250ms` gives (0.99, 250)."""
    found = re.search(r"p(\d+(?:\.\d+)?)\s*<=?\s*(\d+(?:\.\d+)?)\s*(ms|s)\b", slo or "")
    if not found:
        return None
    digits, value, unit = found.groups()
    percent = float(digits)
    # p999 is how some write p99.9.
    while percent > 100:
        percent /= 10
    return percent / 100, float(value) * (1000 if unit == "s" else 1)


def recovery(run: Run) -> tuple[str, list[tuple[float, float]]] | None:
    """The share of sessions that is back, in %, by seconds since they were dropped; with the name of the phase.

    It is read within that phase: in a later one sessions may be taken away on purpose.
    """
    held = run.series.get("sessions", [])
    storm = next((phase for phase in run.phases if STORMS.search(phase.name)), None)
    if storm is None:
        return None
    before = [value for t, value in held if storm.start - 10 <= t < storm.start]
    after = [(t - storm.start, value) for t, value in held if storm.start <= t <= storm.end]
    if not before or not after or not max(before):
        return None
    whole = float(np.median(before))
    # The fall itself is no recovery: the curve starts at the lowest point.
    lowest = min(range(len(after)), key=lambda n: after[n][1])
    return storm.name, [(t, 100 * value / whole) for t, value in after[lowest:]]


def best(run: Run) -> Step | None:
    """The step that the figures on top are from: the largest that kept the SLO, or else the last.

    Of a storm no latency is asked: it says less than what was held.
    """
    kept = [step for step in run.steps if not step.breach]
    kept = [step for step in kept if step.kind != "storm"] or kept
    return max(kept, key=lambda step: (step.sessions, step.seconds)) if kept else run.steps[-1] if run.steps else None
