"""Reports of all processes add up, and a run may last for hours."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from loadtest.ledger import LedgerResult
from loadtest.metrics import Histogram, Metrics
from loadtest.total import Total


def report(at, **samples):
    metrics = Metrics()
    for name, ms in samples.items():
        metrics.record(name, ms / 1000)
    parts = {"hold": {"metrics": metrics.to_dict(), "ledger": LedgerResult().to_dict(), "counts": {}}}
    return {"at": at, "parts": parts, "points": [], "phases": {}, "workload": {}, "faults": []}


def test_what_processes_report_in_one_interval_is_merged():
    total = Total()
    for process, at, ms in (("a", 100.0, 10), ("b", 104.9, 20), ("a", 105.0, 30), ("b", 109.0, 40), ("a", 104.0, 50)):
        total.add(process, report(at, beat=ms))
    parts = total.intervals(100.0)["beat"]
    assert [t for t, _ in parts] == [0.0, 5.0]
    assert [len(Histogram.decode(text)) for _, text in parts] == [3, 2]
    assert [Histogram.decode(text).max() for _, text in parts] == pytest.approx([50, 40], rel=1e-3)


def test_an_interval_that_is_over_takes_little():
    """An hour of ten metrics, plain, would be more than a gigabyte. Nor does anything wait for the collector."""
    total = Total()
    reports = [report(5.0 * n, one=n, two=2 * n) for n in range(200)]
    total.add("local", reports[0])
    gc.disable()
    tracemalloc.start()
    try:
        for one in reports:
            total.add("local", one)
        assert tracemalloc.get_traced_memory()[0] < 200 * 2 * 4096
    finally:
        tracemalloc.stop()
        gc.enable()
