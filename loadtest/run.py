"""The data of one run: what was asked, of whom, with what, and what came of it. Plain JSON on disk, read back whole.

Everything later reads only this: the report, the comparison of two runs, the judgement of validity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

Series = dict[str, list[tuple[float, float]]]
"""Name to points `(t, value)`, t in seconds since the start of the run."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One metric in a few numbers, in milliseconds. A percentile that too few samples stand behind is None."""

    count: int
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A named stretch of the run, in seconds since its start."""

    name: str
    start: float
    end: float


@dataclass(slots=True, kw_only=True)
class Step:
    """One load, held for a while."""

    sessions: int
    """Sessions that were asked for, by which the step is named."""
    seconds: float
    """How long they were held, without the ramp."""
    held: int | None = None
    """Sessions that were connected, in the median over that time: some come and go. None: not known."""
    kind: str = "step"
    """Of a search for the capacity: `step`, `long hold` or `storm`."""
    offered: float = 0.0
    """Actions a second that the schedule asked for in that time."""
    achieved: float = 0.0
    """Actions a second that were made in that time."""
    metrics: dict[str, Summary] = field(default_factory=dict)
    """By metric name, such as `PUSH online`; since the ramp was over."""
    histograms: dict[str, str] = field(default_factory=dict)
    """By metric name: the encoded HdrHistogram of microseconds (base64)."""
    ramp: dict[str, str] = field(default_factory=dict)
    """The histograms of the ramp: what was recorded while the sessions came."""
    ledger: dict[str, Any] = field(default_factory=dict)
    """`LedgerResult.to_dict()` of the whole run; its times to notice since the ramp was over."""
    resources: dict[str, float] = field(default_factory=dict)
    """What was used, the unit in the name: `server_cpu_percent`, `generator_rss_bytes`, `open_files`."""
    counts: dict[str, int] = field(default_factory=dict)
    """What happened, how often; `loadtest.validity` lists the names that it judges by."""
    errors: dict[str, int] = field(default_factory=dict)
    """Failures by metric name and cause: `WS connect: ConnectionRefusedError`."""
    breach: str | None = None
    """Which clause of the SLO was not kept, in words."""

    @property
    def present(self) -> int:
        """Sessions that were there; where it is not known, those that were asked for."""
        return self.sessions if self.held is None else self.held

    @property
    def label(self) -> str:
        """What tells the step from others, for readers: `20,000`, `20,000, storm`."""
        return f"{self.sessions:,}{self.of_kind}"

    @property
    def of_kind(self) -> str:
        """What is said after the sessions, for readers: nothing of a step, `, storm`."""
        return f", {self.kind}" if self.kind != "step" else ""

    @property
    def sessions_said(self) -> str:
        """How many were there, and of how many, for readers: `9,077 sessions of 10,000`."""
        of = f" of {self.sessions:,}" if self.present != self.sessions else ""
        return f"{self.present:,} sessions{of}"


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of the load test."""

    title: str
    question: str = ""
    started: str = ""
    """RFC 3339, UTC."""
    seconds: float = 0.0
    seed: int = 0
    command: str = ""
    """The command that repeats it."""
    harness: dict[str, Any] = field(default_factory=dict)
    """Versions and commit of the load test."""
    target: dict[str, Any] = field(default_factory=dict)
    """Address, version, configuration; never a secret."""
    machine: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    """Limits and kernel values, as read at run time."""
    workload: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    series: Series = field(default_factory=dict)
    intervals: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    """By metric name: `(t, histogram)` of each stretch of time, t its start; encoded as in `Step.histograms`."""
    validity: list[tuple[str, str]] = field(default_factory=list)
    """`(level, sentence)`, level `fatal` or `warning`."""
    faults: list[str] = field(default_factory=list)
    """What went wrong in the load test itself, in sentences: each makes the run invalid."""
    verdict: str = ""
    slo: str | None = None
    ok: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON's own types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The run back from JSON. Names that this version does not know are left out: newer files can be read."""
        run = cls(**_known(cls, data))
        run.phases = [Phase(**_known(Phase, phase)) for phase in data.get("phases", ())]
        run.steps = [_step(step) for step in data.get("steps", ())]
        run.series = {name: [(t, value) for t, value in points] for name, points in data.get("series", {}).items()}
        run.intervals = {name: [(t, text) for t, text in parts] for name, parts in data.get("intervals", {}).items()}
        run.validity = [(level, sentence) for level, sentence in data.get("validity", ())]
        return run

    def to_json(self) -> str:
        """The run as text, one key a line, in an order that does not change: two runs can be compared with `diff`."""
        # NaN and infinity are no JSON: better to fail here than in the reader's browser.
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The run back from `to_json`."""
        return cls.from_dict(json.loads(text))

    def save(self, path: Path) -> None:
        """Writes the run to `path`."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads the run at `path`."""
        return cls.from_json(path.read_text(encoding="utf-8"))


def _step(data: Mapping[str, Any]) -> Step:
    step = Step(**_known(Step, data))
    step.metrics = {name: Summary(**_known(Summary, summary)) for name, summary in data.get("metrics", {}).items()}
    return step


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in (f.name for f in fields(cls)) if key in data}
