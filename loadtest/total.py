"""The reports of all processes of a run, added up: pure data, of JSON's own types as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from loadtest.ledger import LedgerResult
from loadtest.metrics import Histogram, Metrics
from loadtest.run import Phase

_SLOT = 5  # s of one interval of `Run.intervals`
_WORST = frozenset({"generator_cpu_percent", "generator_lag_ms", "generator_gc_ms"})
"""Series of which the worst process counts; of all else the sum."""

RAMP, DRAIN = "ramp", "drain"
"""The phases in which sessions come, and in which the last notices do: no load is held in them."""


@dataclass(slots=True)
class Part:
    """What was recorded in one phase."""

    metrics: Metrics = field(default_factory=Metrics)
    ledger: LedgerResult = field(default_factory=LedgerResult)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Part) -> None:
        """Adds all that `other` recorded."""
        self.metrics.merge(other.metrics)
        self.ledger += other.ledger
        self.counts += other.counts

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's own types."""
        return {"metrics": self.metrics.to_dict(), "ledger": self.ledger.to_dict(), "counts": dict(self.counts)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The part back from `to_dict`."""
        counts = Counter(data["counts"])
        return cls(Metrics.from_dict(data["metrics"]), LedgerResult.from_dict(data["ledger"]), counts)


class Total:
    """What all processes reported, added up."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        """By the phase in which it was recorded."""
        self.workload: dict[str, Any] = {}
        self.faults: list[str] = []
        self._points: dict[str, dict[int, dict[str, float]]] = {}
        self._phases: dict[str, float] = {}
        self._slots: dict[str, dict[int, str]] = {}
        """Metric to interval to its histogram, encoded: a plain one takes 180 KiB, and there are more each interval."""

    def add(self, process: str, batch: dict[str, Any] | None) -> None:
        """Adds one report. It is None when the process had settled before."""
        if batch is None:
            return
        slot = int(batch["at"]) // _SLOT
        for phase, data in batch["parts"].items():
            for name, text in data["metrics"]["histograms"].items():
                slots = self._slots.setdefault(name, {})
                slots[slot] = _merged(slots[slot], text) if slot in slots else text
            self.parts.setdefault(phase, Part()).add(Part.from_dict(data))
        self.workload |= batch["workload"]
        self.faults += batch["faults"]
        for second, name, value in batch["points"]:
            self._points.setdefault(name, {}).setdefault(second, {})[process] = value
        for name, at in batch["phases"].items():
            self._phases[name] = min(at, self._phases.get(name, at))

    def whole(self, *, without: Collection[str] = ()) -> Part:
        """All phases together, or all but those named."""
        whole = Part()
        for phase, part in self.parts.items():
            if phase not in without:
                whole.add(part)
        return whole

    def series(self, started: float) -> dict[str, list[tuple[float, float]]]:
        """The points of all processes together, t in s since `started`."""
        return {
            name: [
                (round(max(0.0, second - started), 2), round((max if name in _WORST else sum)(of.values()), 2))
                for second, of in sorted(seconds.items())
            ]
            for name, seconds in sorted(self._points.items())
        }

    def workers(self) -> list[dict[str, float]]:
        """The most sessions that each process was to hold, and held."""
        wanted, connected = (self._points.get(name, {}) for name in ("sessions_wanted", "sessions"))
        found: dict[str, dict[str, float]] = {}
        for name, seconds in (("wanted", wanted), ("connected", connected)):
            for of in seconds.values():
                for process, value in of.items():
                    figures = found.setdefault(process, {"wanted": 0, "connected": 0})
                    figures[name] = max(figures[name], value)
        return [found[process] for process in sorted(found)]

    def phases(self, started: float, ended: float) -> list[Phase]:
        """The phases in their order; each ends where the next begins."""
        begun = sorted(self._phases.items(), key=lambda item: item[1])
        ends = [at for _, at in begun[1:]] + [ended]
        return [
            Phase(name, round(max(0.0, at - started), 2), round(end - started, 2))
            for (name, at), end in zip(begun, ends, strict=True)
        ]

    def intervals(self, started: float) -> dict[str, list[tuple[float, str]]]:
        """Each metric's histograms over time."""
        return {
            name: [(round(max(0.0, slot * _SLOT - started), 2), text) for slot, text in sorted(slots.items())]
            for name, slots in sorted(self._slots.items())
        }


def _merged(one: str, other: str) -> str:
    return (Histogram.decode(one) + Histogram.decode(other)).encode()
