"""Runs a scenario: Locust as a process of its own, the machine sampled beside it, and both made into one `Run`."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtest import sampling, slo, validity
from loadtest.engine import sources_for
from loadtest.report import sentence
from loadtest.run import Phase, Run, Step
from loadtest.sampling import Processes, Sampler
from loadtest.target import TARGET, Target

SCENARIOS = Path(__file__).parent / "scenarios"

CONNECT_RATE = 200.0
"""Connects a second, unless the options say otherwise."""

_GRACE = 120.0
"""s: that a run may take longer than asked, before it is ended: for the last notices, and for Locust to start."""


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
        return self.seconds + self.sessions / float(self.options.get("connect-rate", CONNECT_RATE))

    @property
    def sources(self) -> str:
        """Source addresses, separated by commas: one to each 12,000 connections, where the server is on loopback."""
        if "sources" in self.options:
            return self.options["sources"]
        instances = self.target.instances
        if not all(sampling.is_local(one.host) for one in instances):
            return ""
        return ",".join(sources_for(math.ceil(self.sessions / len(instances))))


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
    made += ["--sessions", str(job.sessions), "--run-json", str(output)]
    if job.processes > 1:
        port = str(_free_port())  # Locust's own, 5557, may be another run's
        made += ["--processes", str(job.processes), "--master-bind-port", port, "--master-port", port]
    options = dict(job.options) | ({"sources": job.sources} if job.sources else {})
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
    if not output.is_file():
        raise LaunchError(f"{job.scenario} did not run (exit code {process.returncode}): {_last(log)}; see {log}")
    done = Run.load(output)
    _add(done, job, sampler, *before)
    done.command = done.command or shlex.join(line)
    judge(done, job.slo)
    done.save(output)
    return done


def judge(run: Run, text: str) -> None:
    """Hold a run against its SLO, and against what makes it worth believing; the verdict is set."""
    clauses = slo.parse(text)
    run.slo = text
    untold = []
    for step in run.steps:
        checks = slo.check(clauses, step)
        step.breach = slo.breach(checks)
        if reason := slo.untold(checks):
            untold.append(("fatal", f"At {step.sessions:,} sessions {reason}."))
    run.validity = findings(run)
    # What the rules say of the same lack of samples is enough.
    if validity.is_valid(run.validity):
        run.validity = [*untold, *run.validity]
    run.ok = validity.is_valid(run.validity) and not any(step.breach for step in run.steps)
    run.verdict = run.verdict or sentence(run)


def findings(run: Run) -> list[tuple[str, str]]:
    """What speaks against a run. Of a step that broke its SLO among others that kept it, it is a warning only.

    A server that is beyond its limit answers late and takes no connections: it need not be known how much beyond.
    """
    broken = [step for step in run.steps if step.breach]
    if len(run.steps) == 1 or not broken:
        return validity.judge(run)
    found: list[tuple[str, str]] = []
    for steps, level in (([step for step in run.steps if not step.breach], None), (broken, "warning")):
        if steps:
            part = replace(run, steps=steps)
            found += [(level or before, text) for before, text in validity.judge(part)]
    return list(dict.fromkeys(found))


def generator_at_fault(step: Step, *, may_be_late: bool = False) -> str | None:
    """Why a step says nothing of the server, though it broke the SLO: the generator may have been what broke it."""
    rules = [validity.generator_busy, validity.out_of_addresses]
    if not may_be_late:
        rules.append(validity.generator_late)
    return next((text for rule in rules for level, text in rule(step) if level == "fatal"), None)


def exit_code(run: Run) -> int:
    """0: kept; 1: the SLO is breached; 2: it cannot be believed."""
    if not validity.is_valid(run.validity):
        return 2
    return 0 if run.ok else 1


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
        if configured := run.workload.get("seconds"):
            whole.workload["seconds"] = shift + configured
    return whole


def server_processes(target: Target) -> Callable[[], list[int]]:
    """Finds the processes of this machine that listen where the target says."""
    return lambda: [pid for one in target.instances for pid in sampling.listeners(one.host, one.port)]


def back(run: Run) -> float:
    """The least share of the sessions, in %, that were there again at the end of a storm; 100 where there was none."""
    held = run.series.get("sessions", [])
    shares = [100.0]
    for phase in run.phases:
        if phase.name.startswith("storm"):
            before = [value for t, value in held if t < phase.start]
            # One point a second: the phase may end, all being back, before the next one.
            after = [value for t, value in held if t <= phase.end + 2]
            if before and before[-1]:
                shares.append(100 * after[-1] / before[-1])
    return min(shares)


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


def windows(run: Run) -> list[tuple[float, float]]:
    """For each step the stretch of time, s since the start, over which its resources are read: its phase of holding.

    A run whose phases do not go with its steps is read from the end of its first phase (the ramp) on.
    """
    held = [phase for phase in run.phases if phase.name.startswith(("hold", "steady"))]
    if len(held) == len(run.steps):
        return [(phase.start, phase.end) for phase in held]
    start = run.phases[0].end if len(run.phases) > 1 else 0.0
    return [(start, run.seconds or math.inf)] * len(run.steps)


def _wait(process: subprocess.Popen[bytes], job: Job, said: Callable[[str], None]) -> None:
    began = time.monotonic()
    deadline = began + job.whole + _GRACE
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
