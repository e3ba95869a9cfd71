"""Latencies as HdrHistograms of microseconds, one to a metric name; they merge without loss, and Locust shows the same.

Percentiles are never averaged: workers send encoded histograms, the master adds them up and reads the percentile once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from hdrh.codec import HdrHistogramEncoder  # type: ignore[import-untyped]
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from loadtest.run import Summary

MAX_US = 600_000_000
"""Ten minutes: what took longer is recorded as this."""
DIGITS = 3
"""Significant digits that are kept."""
BEYOND = 10
"""A percentile is quoted when at least so many samples lie beyond it: p99 from 1,000 samples, p99.9 from 10,000."""


class Histogram:
    """Microseconds from 0 to `MAX_US`, three significant digits."""

    __slots__ = ("_hdr",)

    def __init__(self) -> None:
        self._hdr = HdrHistogram(1, MAX_US, DIGITS)

    def __del__(self) -> None:
        # It and its encoder hold each other: its 180 KiB would wait for a full collection.
        self._hdr.encoder = None

    def __len__(self) -> int:
        return int(self._hdr.get_total_count())

    def __bool__(self) -> bool:
        return len(self) > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __add__(self, other: Histogram) -> Histogram:
        total = Histogram()
        total.add(self)
        total.add(other)
        return total

    def record(self, us: float) -> None:
        """Adds one sample. Less than nothing counts as nothing, more than `MAX_US` as that: no sample is lost."""
        self._hdr.record_value(min(max(round(us), 0), MAX_US))

    def add(self, other: Histogram) -> None:
        """Adds all samples of `other`."""
        if other:
            self._hdr.add(other._hdr)

    def percentile(self, p: float) -> float | None:
        """The p-th percentile in milliseconds (p from 0 to 100), or None when too few samples lie beyond it."""
        # A hundredth of a percent as an integer: 100 - 99.9 is 0.09999999999999432, and 10,000 samples would not do.
        if len(self) * round(100 * (100 - p)) < BEYOND * 10_000:
            return None
        return float(self._hdr.get_value_at_percentile(p)) / 1000

    def max(self) -> float | None:
        """The greatest sample in milliseconds, as precise as the histogram; None when there is none."""
        return float(self._hdr.get_max_value()) / 1000 if self else None

    def summary(self) -> Summary:
        """The usual figures, in milliseconds."""
        p50, p95, p99, p999 = (self.percentile(p) for p in (50, 95, 99, 99.9))
        return Summary(len(self), p50=p50, p95=p95, p99=p99, p999=p999, max=self.max())

    def encode(self) -> str:
        """The histogram as base64 text, in HdrHistogram's own format: its tools can read it."""
        return str(self._hdr.encode().decode("ascii"))

    @classmethod
    def decode(cls, text: str) -> Self:
        """The histogram back from `encode`."""
        hdr = HdrHistogram(1, MAX_US, DIGITS, hdr_payload=HdrHistogramEncoder.decode(text.encode("ascii")))
        histogram = cls.__new__(cls)
        histogram._hdr = hdr  # noqa: SLF001 (its own)
        return histogram


class Metrics:
    """The histograms and errors of one process, by metric name.

    Args:
        fire: Locust's `environment.events.request.fire`, so that its web page shows the same under the same names.
        wall: Seconds since the epoch, for Locust's `start_time`.
    """

    def __init__(self, fire: Callable[..., Any] | None = None, *, wall: Callable[[], float] = time.time) -> None:
        self._fire = fire
        self._wall = wall
        self.histograms: dict[str, Histogram] = {}
        self.errors: Counter[tuple[str, str]] = Counter()
        """(metric name, cause) to count."""
        self.negative = 0
        """Latencies below zero: a sign that the harness counts from the wrong moment."""

    def record(self, name: str, seconds: float, *, length: int = 0) -> None:
        """One success, `seconds` after the moment it was intended for."""
        self.record_own(name, (seconds,))
        if self._fire is not None:
            self._tell(name, seconds, length, None)

    def record_own(self, name: str, samples: Iterable[float]) -> None:
        """Latencies of the harness itself, in s: no requests, and so nothing to tell Locust of."""
        histogram = self.histograms.get(name)
        if histogram is None:
            histogram = self.histograms[name] = Histogram()
        for seconds in samples:
            self.negative += seconds < 0
            histogram.record(seconds * 1e6)

    def failed(self, name: str, error: Exception, seconds: float | None = None, *, length: int = 0) -> None:
        """One failure. It is counted by the error's type and stays out of the latencies."""
        self.errors[name, type(error).__name__] += 1
        if self._fire is not None:
            self._tell(name, seconds, length, error)

    def take(self) -> Metrics:
        """What was recorded since the last `take`; begins anew (one step of a run, one report of a worker)."""
        taken = Metrics()
        taken.histograms, self.histograms = self.histograms, {}
        taken.errors, self.errors = self.errors, Counter()
        taken.negative, self.negative = self.negative, 0
        return taken

    def merge(self, other: Metrics) -> None:
        """Adds all that `other` recorded."""
        for name, histogram in other.histograms.items():
            self.histograms.setdefault(name, Histogram()).add(histogram)
        self.errors.update(other.errors)
        self.negative += other.negative

    def summaries(self) -> dict[str, Summary]:
        """The usual figures by metric name."""
        return {name: histogram.summary() for name, histogram in sorted(self.histograms.items())}

    def encoded(self) -> dict[str, str]:
        """The encoded histograms by metric name."""
        return {name: histogram.encode() for name, histogram in sorted(self.histograms.items())}

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's own types, for a worker's report to the master."""
        errors = [[name, cause, count] for (name, cause), count in sorted(self.errors.items())]
        return {"histograms": self.encoded(), "errors": errors, "negative": self.negative}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The metrics back from `to_dict`."""
        metrics = cls()
        metrics.histograms = {name: Histogram.decode(text) for name, text in data["histograms"].items()}
        metrics.errors = Counter({(name, cause): count for name, cause, count in data["errors"]})
        metrics.negative = data["negative"]
        return metrics

    def _tell(self, name: str, seconds: float | None, length: int, error: Exception | None) -> None:
        assert self._fire is not None
        request_type, _, rest = name.partition(" ")
        # Locust's own listener demands the first four and loses the event, with a line in the log, when one is missing.
        self._fire(
            request_type=request_type,
            name=rest or request_type,
            response_time=None if seconds is None else seconds * 1000,
            response_length=length,
            exception=error,
            context={},
            response=None,
            start_time=self._wall() - (seconds or 0.0),
        )


def bucket_response_time(ms: float) -> float:
    """To put in the place of Locust's function of this name: it rounds 0.14 ms to 0, this keeps three digits."""
    return float(f"{ms:.3g}")
