"""A run survives the way to disk and back, whole."""

from __future__ import annotations

import json

import pytest

from loadtest.run import Phase, Run, Step, Summary


def a_run() -> Run:
    step = Step(
        sessions=2000,
        seconds=60.0,
        offered=66.7,
        achieved=66.6,
        metrics={"PUSH online": Summary(120, p50=0.4, p95=1.1, p99=None, p999=None, max=3.25)},
        histograms={"PUSH online": "HISTFAAAA"},
        ledger={"expected": 120, "missing": 0},
        resources={"server_cpu_percent": 12.5},
        counts={"connects": 2000},
        errors={"WS connect: ConnectionRefusedError": 1},
        breach="p99 of PUSH online: 300 ms > 250 ms",
    )
    return Run(
        title="steady",
        question="Does it hold 2,000?",
        started="2026-11-24T20:00:00Z",
        seconds=61.5,
        seed=7,
        harness={"locust": "2.47.0"},
        phases=[Phase("ramp", 0.0, 1.5), Phase("hold", 1.5, 61.5)],
        steps=[step],
        series={"sessions": [(0.0, 0.0), (1.0, 2000.0)]},
        intervals={"PUSH online": [(10.0, "HISTFAAAA")]},
        validity=[("warning", "few samples")],
        verdict="trước đây",
        slo="lost=0",
        ok=True,
    )


def test_json_and_back_is_the_same_run(tmp_path):
    run = a_run()
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run


def test_the_least_run_survives_too():
    assert Run.from_json(Run(title="empty").to_json()) == Run(title="empty")


def test_the_text_is_human_and_stable():
    text = a_run().to_json()
    assert "trước đây" in text
    assert text == Run.from_json(text).to_json()


def test_a_file_of_a_newer_version_is_read():
    data = json.loads(a_run().to_json())
    data["weather"] = data["steps"][0]["weather"] = data["phases"][0]["weather"] = "rain"
    data["steps"][0]["metrics"]["PUSH online"]["p9999"] = 3.0
    assert Run.from_dict(data) == a_run()


def test_what_is_no_json_is_refused_at_once():
    with pytest.raises(ValueError, match="JSON"):
        Run(title="x", seconds=float("nan")).to_json()
