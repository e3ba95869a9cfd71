"""Histograms merge without loss, quote no percentile that too few samples stand behind, and Locust is told the same."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.metrics import MAX_US, Histogram, Metrics, bucket_response_time

samples = st.lists(st.floats(0, MAX_US * 1.1, allow_nan=False), max_size=50)


def histogram_of(values) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.lists(samples, max_size=4))
def test_merged_encoded_histograms_are_the_histogram_of_all_samples(parts):
    merged = Histogram()
    for part in parts:
        merged.add(Histogram.decode(histogram_of(part).encode()))
    whole = histogram_of(value for part in parts for value in part)
    assert merged == whole
    assert merged.summary() == whole.summary()


def test_different_samples_make_different_histograms():
    assert histogram_of([1, 2]) != histogram_of([1, 3])
    assert histogram_of([1]) != histogram_of([1, 1])


def test_percentiles_are_those_of_the_samples_in_milliseconds():
    summary = histogram_of(range(1000, 10_001_000, 1000)).summary()
    assert summary.count == 10_000
    assert summary.p50 == pytest.approx(5_000, rel=1e-3)
    assert summary.p95 == pytest.approx(9_500, rel=1e-3)
    assert summary.p99 == pytest.approx(9_900, rel=1e-3)
    assert summary.p999 == pytest.approx(9_990, rel=1e-3)
    assert summary.max == pytest.approx(10_000, rel=1e-3)


@pytest.mark.parametrize(("p", "enough"), [(50, 20), (95, 200), (99, 1_000), (99.9, 10_000)])
def test_a_percentile_needs_ten_samples_beyond_it(p, enough):
    histogram = histogram_of([5] * (enough - 1))
    assert histogram.percentile(p) is None
    histogram.record(5)
    assert histogram.percentile(p) == 0.005


def test_of_nothing_nothing_is_said():
    summary = Histogram().summary()
    assert (summary.count, summary.p50, summary.max) == (0, None, None)
    assert Histogram.decode(Histogram().encode()) == Histogram()


def test_no_sample_is_lost_at_the_ends():
    histogram = histogram_of([-5, MAX_US * 3])
    assert len(histogram) == 2
    assert histogram.max() == pytest.approx(600_000, rel=1e-3)


def test_locust_is_told_under_the_same_name():
    told = []
    metrics = Metrics(lambda **event: told.append(event), wall=lambda: 1000.0)
    metrics.record("PUSH offline-by-loss", 0.25, length=99)
    error = TimeoutError("no receipt")
    metrics.failed("STOMP watch", error)
    common: dict[str, object] = {"context": {}, "response": None}
    assert told == [
        common
        | {"request_type": "PUSH", "name": "offline-by-loss", "response_time": 250.0, "response_length": 99}
        | {"exception": None, "start_time": 999.75},
        common
        | {"request_type": "STOMP", "name": "watch", "response_time": None, "response_length": 0}
        | {"exception": error, "start_time": 1000.0},
    ]
    assert metrics.errors == {("STOMP watch", "TimeoutError"): 1}
    assert list(metrics.histograms) == ["PUSH offline-by-loss"]


def test_locust_counts_what_it_is_told():
    # In a process of its own: Locust patches the standard library.
    program = """
        import json
        from locust.env import Environment
        from loadtest.metrics import Metrics
        env = Environment()
        env.create_local_runner()
        metrics = Metrics(env.events.request.fire)
        metrics.record("WS connect", 0.5, length=10)
        metrics.failed("WS connect", TimeoutError("no"))
        entry = env.stats.get("connect", "WS")
        print(json.dumps([entry.num_requests, entry.num_failures, entry.num_none_requests, entry.max_response_time]))
    """
    command = [sys.executable, "-W", "ignore", "-c", inspect.cleandoc(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert json.loads(done.stdout) == [2, 1, 1, 500.0]


def test_a_worker_s_report_adds_up_at_the_master():
    master = Metrics()
    for latency in (0.001, 0.002):
        worker = Metrics()
        worker.record("WS connect", latency)
        worker.record("generator lag", -latency)
        worker.failed("WS connect", ConnectionRefusedError())
        master.merge(Metrics.from_dict(json.loads(json.dumps(worker.to_dict()))))
    assert master.histograms["WS connect"] == histogram_of([1000, 2000])
    assert master.errors == {("WS connect", "ConnectionRefusedError"): 2}
    assert master.negative == 2
    assert master.summaries()["WS connect"].count == 2


def test_taking_begins_anew():
    metrics = Metrics()
    metrics.record("WS connect", 0.001)
    assert metrics.take().summaries()["WS connect"].count == 1
    assert metrics.take().summaries() == {}


@pytest.mark.parametrize(("ms", "bucket"), [(0.1404, 0.14), (12.345, 12.3), (1234.5, 1230.0), (0, 0.0)])
def test_locust_s_buckets_keep_three_digits(ms, bucket):
    assert bucket_response_time(ms) == bucket
