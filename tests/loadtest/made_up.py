"""A made-up capacity run: six steps, the last one breaks the SLO, then a mass expiry and a storm at the best one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from loadtest.metrics import Histogram
from loadtest.run import Phase, Run, Step, Summary

Values = np.ndarray[Any, np.dtype[np.float64]]
HOLD = 120.0
BEST, BROKEN = 12_000, 14_000


def encode(values: Values) -> str:
    """Values in ms as an encoded histogram of microseconds."""
    histogram = Histogram()
    for value in values:
        histogram.record(value * 1000)
    return histogram.encode()


def summary(values: Values) -> Summary:
    def at(quantile: float) -> float | None:
        return round(float(np.quantile(values, quantile)), 3) if values.size * (1 - quantile) >= 10 else None

    return Summary(values.size, at(0.5), at(0.95), at(0.99), at(0.999), round(float(values.max()), 3))


def latencies(rng: np.random.Generator, load: float, count: int) -> Values:
    """Times to notice in ms of a server that is used to the share `load`."""
    wait = 0.9 / max(1 - load, 0.012)
    return rng.lognormal(np.log(1.6 + wait * 0.6), 0.55, count) + rng.exponential(wait, count)


@functools.cache
def _made(factor: float, storm: bool) -> str:
    rng = np.random.default_rng(7)
    run = Run(
        title="Capacity of the embedded server, one process",
        question="How many sessions does one process hold with notices within 250 ms at p99, and none lost?",
        started="2026-03-02T09:14:07Z",
        seed=7,
        command='python -m loadtest capacity --target target.toml --slo "p99<250ms, lost=0, false-offline=0" --seed 7',
        slo="p99<250ms, lost=0, false-offline=0",
        harness={"version": "0.1.0", "commit": "34b9242", "python": "3.11.9", "locust": "2.47.0", "gevent": "26.9.0"},
        target={
            "address": "http://127.0.0.1:8080",
            "version": "0.1.0",
            "processes": 1,
            "configuration": {"PRESENCE_STORE": "embedded", "PRESENCE_LEASE": "60s"},
            "lease": 60,
        },
        machine={
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_bytes": 8_321_499_136,
            "kernel": "6.8.0",
            "network": "loopback",
        },
        limits={
            "nofile": 20_000,
            "somaxconn": 4096,
            "tcp_max_syn_backlog": 512,
            "ip_local_port_range": [32_768, 60_999],
            "source_addresses": ["127.0.1.1", "127.0.1.2"],
        },
        workload={
            "schedule": "open, jitter ±10 %",
            "heartbeat_seconds": 30,
            "friends": {"p50": 12, "p99": 180, "max": 900},
            "watchers": "40 % of the sessions",
            "comings_and_goings": "0.5 % of the sessions a minute",
            "tls": False,
        },
        ok=True,
        verdict=f"{BEST:,} sessions at 400 heartbeats/s, notices within 44 ms at p99, none lost, limited by the server",
        validity=[("warning", "The generator used 74 % of its core at 14,000 sessions.")],
    )
    clock = 0.0
    held = 0.0

    def second(sessions: float, load: float) -> None:
        nonlocal clock, held
        held = sessions
        made = {
            "sessions": sessions,
            "server_cpu_percent": min(100.0, 100 * load) + rng.normal(0, 1.5),
            "generator_cpu_percent": 4 + sessions * 0.005 + rng.normal(0, 1),
            "server_rss_bytes": 48e6 + sessions * 11_400 * factor + rng.normal(0, 2e5),
        }
        for name, value in made.items():
            run.series.setdefault(name, []).append((round(clock, 1), round(float(value), 1)))
        clock += 1

    def interval(name: str, t: float, values: Values) -> None:
        run.intervals.setdefault(name, []).append((t, encode(values)))

    for sessions in (2_000, 4_000, 6_000, 9_000, BEST, BROKEN):
        load = sessions / 13_600 * factor
        start, before = clock, held
        for n in range(20):
            second(before + (sessions - before) * (n + 1) / 20, load * 0.9)
        run.phases.append(Phase("ramp", start, clock))
        start = clock
        online, offline = (latencies(rng, load, int(sessions * 0.55)) for _ in range(2))
        if sessions == BROKEN:
            online, offline = online * 6, offline * 7
        for n in range(int(HOLD)):
            second(sessions, load)
            if n % 10 == 0:
                part = slice(n * online.size // int(HOLD), (n + 10) * online.size // int(HOLD))
                interval("PUSH online", start + n, online[part])
                interval("PUSH offline", start + n, offline[part])
                interval("generator lag", start + n, rng.exponential(0.05 + sessions / 40_000, 400))
        run.phases.append(Phase(f"hold {sessions:,}", start, clock))
        beats = rng.lognormal(np.log(0.5), 0.4, sessions // 4)
        lost = rng.normal(12, 2, 60).clip(1)
        expiry = rng.gamma(2.2, 110, sessions // 50)
        metrics = {
            "STOMP CONNECTED": rng.lognormal(np.log(2.4), 0.4, max(sessions // 6, 300)),
            "STOMP watch": rng.lognormal(np.log(1.1), 0.4, max(sessions // 10, 300)),
            "STOMP heartbeat": beats,
            "PUSH online": online,
            "PUSH offline": offline,
            "PUSH offline-by-loss": lost,
            "PUSH offline-by-expiry": expiry,
            "REST friends": rng.lognormal(np.log(3.2), 0.5, 4_000),
        }
        missing = 41 if sessions == BROKEN else 0
        due = online.size + offline.size + lost.size + expiry.size + missing
        run.steps.append(
            Step(
                sessions=sessions,
                seconds=HOLD,
                offered=sessions / 30 * 1.05,
                achieved=sessions / 30 * (1.05 if sessions < BROKEN else 0.97),
                metrics={name: summary(values) for name, values in metrics.items()},
                histograms={name: encode(values) for name, values in metrics.items()},
                ledger={
                    "expected": due,
                    "received": due - missing,
                    "late": 380 if missing else 0,
                    "missing": missing,
                    "duplicated": 0,
                    "out_of_order": 0,
                    "unexpected": 0,
                    "cancelled": sessions // 600,
                    "notice": {"connect": encode(online), "lost": encode(lost)},
                    "ghost_seconds": round(due * 0.011, 1),
                    "false_offline_seconds": 96.4 if missing else 0.0,
                },
                resources={
                    "server_cpu_percent": min(99.0, 100 * load),
                    "server_rss_bytes": 48e6 + sessions * 11_400 * factor,
                    "generator_cpu_percent": 4 + sessions * 0.005,
                    "generator_rss_bytes": 95e6 + sessions * 1_500,
                    "open_files": sessions + 41,
                },
                breach="p99 was 2.7 s, allowed are 250 ms; 41 notices were lost" if missing else None,
            )
        )
    if storm:
        start = clock
        for _ in range(30):
            second(BEST, 0.88 * factor)
        run.phases.append(Phase("settle", start, clock))
        start = clock
        for n in range(60):
            second(BEST * (1 - np.exp(-max(n - 2, 0) / 7)), 0.97)
        run.phases.append(Phase("storm", start, clock))
    run.seconds = clock
    return run.to_json()


def made_up(*, factor: float = 1.0, storm: bool = True) -> Run:
    """The run; `factor` is what a session costs the server, against the usual."""
    return Run.from_json(_made(factor, storm))
