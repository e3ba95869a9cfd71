"""Runs a scenario: Locust as a process of its own, the machine sampled beside it, and both made into one `Run`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from loadtest import preflight, sampling, slo
from loadtest.run import Phase, Run
from loadtest.sampling import Processes, Sampler
from loadtest.target import TARGET, TOKENS, Target, TargetError
from loadtest.total import DRAIN, RAMP
from loadtest.validity import RETURN, STORM
from loadtest.verdict import judge
from loadtest.workload import RISING, crowd_ids

SCENARIOS = Path(__file__).parent / "scenarios"

CONNECT_RATE = 200.0
"""Connects a second, unless the options say otherwise."""

_RAMPS = {"ramp": RISING}
"""Scenarios whose rate rises from 0; to read it from them Locust would have to be loaded."""

_SECONDS = 60.0
_EXPIRY = 20.0
"""s: for the hold before a lease that is to end, and for the notices after it."""

_GRACE = 120.0
"""s: that a run may take longer than asked, before it is ended: for Locust to start, and for its workers to report."""


class LaunchError(Exception):
    """The scenario did not run: one line with what Locust said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of one scenario. Times are in s; `seconds` counts from when all are connected."""

    scenario: str
    target: Target
    sessions: int
    seconds: float
    processes: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of the scenario, by their names: `{"stay": "60"}`; a switch has no value."""
    slo: str = slo.DEFAULT
    folder: Path
    """For the data of the run and for Locust's log."""
    name: str
    """Of the files in the folder."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the server beside its address."""

    @property
    def whole(self) -> float:
        """How long it takes, with the ramp."""
        return self.seconds + _RAMPS.get(self.scenario, 1.0) * self.sessions / self.connect_rate

    @property
    def connect_rate(self) -> float:
        """Connects a second."""
        return float(self.options.get("connect-rate", CONNECT_RATE))

    @property
    def users(self) -> list[str]:
        """Those of all processes."""
        parts = (crowd_ids(self.scenario, self.sessions, place, self.processes) for place in range(self.processes))
        return [user for users in parts for user in users]

    @property
    def sources(self) -> str:
        """Source addresses, separated by commas: one to each 12,000 connections, where the server is on loopback."""
        named = self.options.get("sources", "")
        return ",".join(preflight.source_addresses(named, self.sessions, self.target.instances))


def seconds(scenario: str, target: Target) -> float:
    """How long a run takes unless it is said: a minute, or until the leases of those who freeze have ended."""
    return max(_SECONDS, target.lease + _EXPIRY) if scenario == "expiry" else _SECONDS


def scenarios() -> list[str]:
    """The names of those there are."""
    return sorted(path.stem for path in SCENARIOS.glob("[!_]*.py"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(job: Job, output: Path) -> list[str]:
    """The Locust command of a job; it writes its data to `output`."""
    made = [sys.executable, "-m", "locust", "-f", str(SCENARIOS / f"{job.scenario}.py"), "--headless"]
    made += ["--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0", "--run-time", f"{job.whole:.0f}s"]
    made += ["--sessions", str(job.sessions), "--run-json", str(output), "--no-wait"]
    if job.processes > 1:
        port = str(_free_port())  # Locust's own, 5557, may be another run's
        made += ["--processes", str(job.processes), "--master-bind-port", port, "--master-port", port]
    options = {"connect-rate": f"{job.connect_rate:g}", **job.options}
    options |= {"sources": job.sources} if job.sources else {}
    for name, value in options.items():
        made += [f"--{name}", value] if value else [f"--{name}"]
    return made


def run(job: Job, server: Callable[[], Iterable[int]], *, said: Callable[[str], None] = lambda _: None) -> Run:
    """Run a job to its end.

    Args:
        server: the process ids of the server, as far as they are on this machine.
        said: is told of the progress, a line at a time.

    Raises:
        LaunchError: it did not run.
    """
    output = job.folder / f"{job.name}.json"
    output.unlink(missing_ok=True)
    log = job.folder / f"{job.name}.log"
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCENARIOS.parent.parent), env.get("PYTHONPATH")]))
    if job.target.file:
        env[TARGET] = str(Path(job.target.file).resolve())
    line = command(job, output)
    if not job.target.file:
        line += ["--host", job.target.instances[0].http]
    # Not in Locust, whose time runs from its start: it would be missing from the hold.
    left = preflight.await_offline(job.target, job.users)
    tokens = _tokens(job, said)
    env |= {TOKENS: str(tokens)} if tokens else {}
    before = sampling.machine(), sampling.limits()
    groups = [Processes("server", server), Processes("generator", lambda: [process.pid], busiest=True)]
    with log.open("wb") as sink:
        process = subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        sampler = Sampler(groups)
        sampler.start()
        try:
            _wait(process, job, said)
        finally:
            sampler.stop()
            _end(process)
            if tokens:
                tokens.unlink()
    if not output.is_file():
        raise LaunchError(f"{job.scenario} did not run (exit code {process.returncode}): {_last(log)}; see {log}")
    done = Run.load(output)
    _add(done, job, sampler, *before)
    done.faults += [left] if left else []
    done.command = done.command or shlex.join(line)
    judge(done, job.slo)
    done.save(output)
    return done


def _tokens(job: Job, said: Callable[[str], None]) -> Path | None:
    """The file with the tokens of all users, where the target has a command for them: not in the time of the run."""
    if not job.target.command:
        return None
    said(f"  {len(job.users):,} tokens by the target's command")
    try:
        made = job.target.printed(job.users)
    except TargetError as error:
        raise LaunchError(str(error)) from error
    path = job.folder / f"{job.name}.tokens"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(made), encoding="utf-8")
    return path.resolve()


def joined(title: str, runs: Sequence[Run]) -> Run:
    """Several runs, one after the other, as one: with all steps, on one axis of time."""
    whole = Run.from_dict(runs[0].to_dict())
    whole.title = title
    for run in runs[1:]:
        shift = _epoch(run.started) - _epoch(whole.started)
        whole.steps += run.steps
        whole.phases += [Phase(phase.name, phase.start + shift, phase.end + shift) for phase in run.phases]
        for name, points in run.series.items():
            whole.series.setdefault(name, []).extend((round(t + shift, 2), value) for t, value in points)
        for name, parts in run.intervals.items():
            whole.intervals.setdefault(name, []).extend((round(t + shift, 2), text) for t, text in parts)
        whole.seconds = shift + run.seconds
        configured = run.workload.get("seconds")
        counts = Counter(whole.workload.get("counts", {})) + Counter(run.workload.get("counts", {}))
        whole.workload |= run.workload | ({"counts": dict(sorted(counts.items()))} if counts else {})
        if configured:
            whole.workload["seconds"] = shift + configured
        whole.faults += run.faults
    return whole


def server_processes(target: Target) -> Callable[[], list[int]]:
    """Finds the processes of this machine that listen where the target says."""
    return lambda: [pid for one in target.instances for pid in sampling.listeners(one.host, one.port)]


def back(run: Run) -> float | None:
    """The least share of the sessions, in %, that were there again at the end of a storm; None where there was none.

    Not of one that the end of the run cut short.
    """
    held = run.series.get("sessions", [])
    cut = cut_short(run)
    shares = []
    for phase in run.phases:
        if phase.name.startswith(STORM) and phase is not cut:
            before = [value for t, value in held if t < phase.start]
            # One point a second: the phase may end, all being back, before the next one.
            after = [value for t, value in held if t <= phase.end + 2]
            # Of several generators one begins a moment before the others.
            if were := max(before[-3:], default=0):
                shares.append(100 * after[-1] / were)
    return min(shares, default=None)


def cut_short(run: Run) -> Phase | None:
    """The storm that was going on when the run ended, with time left to be back."""
    for phase, following in pairwise(run.phases):
        if phase.name.startswith(STORM) and following.name == DRAIN and phase.end - phase.start < RETURN:
            return phase
    return None


def _add(run: Run, job: Job, sampler: Sampler, machine: dict[str, object], limits: dict[str, object]) -> None:
    """Put what was sampled into a run that the generator wrote."""
    began = _epoch(run.started)
    # What the generator says of itself is nearer than what is seen from outside.
    run.series = {**sampler.series(began), **run.series}
    run.machine |= {**machine, **run.machine}
    run.limits |= {**limits, **run.limits}
    for workload in run.workload.values():
        if isinstance(workload, Mapping):
            run.question = run.question or workload.get("question", "")
    run.harness |= {**sampling.harness(), **run.harness}
    run.target |= {**job.target.summary, **job.facts}
    counted = sampling.between(run.series, 0, math.inf)
    for step, (start, end) in zip(run.steps, windows(run), strict=True):
        figures = sampling.between(run.series, start, end)
        step.resources |= {name: value for name, value in figures.items() if name.startswith(("server_", "generator_"))}
        step.counts |= {name: int(counted[name]) for name in sampling.COUNTERS if name in counted}
        files = [
            step.resources[name] for name in ("server_open_files", "generator_open_files") if name in step.resources
        ]
        if files:
            step.resources["open_files"] = max(files)
        step.counts.setdefault("server_restarts", sampler.groups[0].changed)
        if (share := back(run)) is not None:
            step.counts["back_percent"] = int(share)
        if cut := cut_short(run):
            step.counts["storm_cut_short"] = round(cut.end - cut.start)


def windows(run: Run) -> list[tuple[float, float]]:
    """For each step the stretch of time, s since the start, over which its resources are read: from ramp to drain."""
    start = next((phase.end for phase in run.phases if phase.name == RAMP), 0.0)
    end = next((phase.start for phase in run.phases if phase.name == DRAIN), run.seconds or math.inf)
    return [(start, end) if start < end else (0.0, end)] * len(run.steps)


def _wait(process: subprocess.Popen[bytes], job: Job, said: Callable[[str], None]) -> None:
    began = time.monotonic()
    deadline = began + job.whole + float(job.options.get("late", 0)) + _GRACE
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return
        now = time.monotonic()
        left = job.whole - (now - began)
        said(f"  {now - began:.0f} s of {job.whole:.0f} s" if left > 0 else "  the last notices")
        if now > deadline:
            raise LaunchError(f"{job.scenario} had not ended {_GRACE:.0f} s after its time")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return (errors or lines or ["it said nothing"])[-1].strip()


def _epoch(started: str) -> float:
    return datetime.fromisoformat(started).timestamp()
