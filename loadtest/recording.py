"""What a run comes to. Each process gathers; the workers report to the master, which adds up and writes the run.

Workers send encoded histograms and counts every few seconds, with Locust's own reports. At the end the master asks all
of them to settle: no more comings and goings, and then time for the last notices to arrive.
"""

from __future__ import annotations

import logging
import resource
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import gevent  # type: ignore[import-untyped]
from locust import events, stats
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from loadtest import sampling
from loadtest.ledger import LedgerResult
from loadtest.metrics import Metrics, bucket_response_time
from loadtest.run import Run, Step
from loadtest.total import DRAIN, RAMP, Part, Total
from loadtest.verdict import exit_code, judge

REPORT = 3.0
"""Seconds between two reports, as Locust's workers make them."""
_PATIENCE = 15.0  # s that the master waits for its workers, beyond the time they need to settle
_KEY = "loadtest"
_HELD = ("sessions", "sessions_wanted", "sessions_coming")
_SETTLE, _SETTLED = "loadtest settle", "loadtest settled"

log = logging.getLogger(__name__)
_recordings: WeakKeyDictionary[Environment, Recording] = WeakKeyDictionary()


class Source(Protocol):
    """What is recorded of: the crowd of one scenario."""

    def settle(self) -> None:
        """No more changes from now on."""

    def take(self, *, last: bool = False) -> tuple[LedgerResult, Counter[str]]:
        """What came of it since the last call; the `last` call is when nothing more is awaited."""

    def look(self) -> Mapping[str, float]:
        """Figures of this second, by the name of their series."""

    def workload(self) -> Mapping[str, Any]:
        """What is offered, for the report."""


class Recording:
    """Of one process; `Recording.of(environment)` finds it."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.options: Any = environment.parsed_options
        self.run: Run | None = None
        """The data of the last run; in a worker always None."""
        self._sampler: gevent.Greenlet | None = None
        self._gc = sampling.GcWatch()
        self._begin()

    @staticmethod
    def of(environment: Environment) -> Recording:
        """The recording of the process that this environment is in."""
        return _recordings[environment]

    def _begin(self) -> None:
        self.metrics = Metrics(self.environment.events.request.fire)
        self._sources: list[Source] = []
        self._phases: dict[str, float] = {}
        self._phase = ""
        self._parts: dict[str, Part] = {}
        self._points: list[tuple[int, str, float]] = []
        self._settled = False
        self._started = time.time()
        self._ended: float | None = None
        self._total = Total()
        self._awaited: set[str] = set()
        self._workers = self._reported = 0
        self._faults: list[str] = []
        self._machine = sampling.machine()

    def add(self, source: Source) -> None:
        """Records of this as well, until the run is over."""
        self._sources.append(source)

    def phase(self, name: str) -> None:
        """A stretch of the run begins, and the one before ends: what was recorded until now belongs to that."""
        self._cut()
        self._phase = name
        self._phases.setdefault(name, time.time())

    def fail(self, reason: str) -> None:
        """Something went wrong in the load test itself, in a sentence: the run is invalid."""
        log.error(reason)
        self._faults.append(reason)

    # The run's moments, as Locust tells them.

    def on_test_start(self) -> None:
        self._begin()
        runner = self.environment.runner
        if isinstance(runner, MasterRunner):
            self._workers = len(runner.clients.ready)
        else:
            self._sampler = gevent.spawn(self._sample)

    def on_test_stopping(self) -> None:
        """Lets the last notices come, and gathers what they make."""
        runner = self.environment.runner
        if isinstance(runner, WorkerRunner) or self._ended is not None:
            return
        self._ended = time.time()
        if isinstance(runner, MasterRunner):
            self._awaited = {client.id for client in runner.clients.all if client.state != "missing"}
            runner.send_message(_SETTLE)
            deadline = time.monotonic() + self._late + _PATIENCE
            while self._awaited and time.monotonic() < deadline:
                gevent.sleep(0.05)
            silent = max(self._workers, len(self._awaited) + self._reported) - self._reported
            if silent:
                self.fail(f"{silent} of {self._workers} workers did not report what their sessions came to.")
        else:
            self._total.add("local", self._settle())
        self.run = self._made()
        self._publish(self.run)

    def on_settle(self) -> None:
        """The master asks this worker to come to an end."""
        runner = self.environment.runner
        assert isinstance(runner, WorkerRunner)
        runner.send_message(_SETTLED, self._settle())

    def on_settled(self, client: str, batch: dict[str, Any]) -> None:
        """A worker has come to its end."""
        self._total.add(client, batch)
        self._reported += client in self._awaited
        self._awaited.discard(client)

    def on_report(self, client_id: str, data: dict[str, Any]) -> None:
        """A worker reports to the master."""
        if batch := data.get(_KEY):
            self._total.add(client_id, batch)

    def batch(self, *, last: bool = False) -> dict[str, Any] | None:
        """All that was recorded since the last time, in JSON's own types; None once settled."""
        if self._settled:
            return None
        self._settled = last
        self._cut(last=last)
        parts, self._parts = self._parts, {}
        points, self._points = self._points, []
        faults, self._faults = self._faults, []
        workload: dict[str, Any] = {}
        for source in self._sources:
            workload |= source.workload()
        return {
            "at": time.time(),
            "parts": {phase: part.to_dict() for phase, part in parts.items()},
            "points": points,
            "phases": dict(self._phases),
            "workload": workload,
            "faults": faults,
        }

    def _cut(self, *, last: bool = False) -> None:
        part = self._parts.setdefault(self._phase, Part())
        for source in self._sources:
            ledger, counts = source.take(last=last)
            part.ledger += ledger
            part.counts += counts
        part.metrics.merge(self.metrics.take())

    @property
    def _late(self) -> float:
        return float(self.options.late)

    def _settle(self) -> dict[str, Any] | None:
        for source in self._sources:
            source.settle()
        self.phase(DRAIN)
        if self._sources:
            gevent.sleep(self._late + 0.1)  # to be past it, whatever the clocks' grain
        last = self.batch(last=True)
        if self._sampler is not None:
            self._sampler.kill(block=False)
        return last

    def _sample(self) -> None:
        before = time.monotonic(), _cpu_seconds()
        due, second = before[0], int(time.time())
        collected = self._gc.total
        is_local = isinstance(self.environment.runner, LocalRunner)
        reported = due
        while True:
            due, second = due + 1.0, second + 1  # each second has its point, however late this is
            gevent.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic(), _cpu_seconds()
            figures = Counter[str]()
            for source in self._sources:
                figures.update(source.look())
            # One core is all that a process has.
            figures["generator_cpu_percent"] = 100 * (now[1] - before[1]) / (now[0] - before[0])  # type: ignore[assignment]
            figures["generator_rss_bytes"] = _rss()
            figures["generator_gc_ms"] = 1000 * (self._gc.total - collected)  # type: ignore[assignment]
            before, collected = now, self._gc.total
            self._points += ((second, name, value) for name, value in figures.items())
            if is_local and now[0] - reported >= REPORT:
                reported = now[0]
                self._total.add("local", self.batch())

    # What it came to.

    def _made(self) -> Run:
        total, options = self._total, self.options
        ended = time.time()
        series, phases = total.series(self._started), total.phases(self._started, ended)
        whole = total.whole()
        counts = whole.counts
        # No load is held while the sessions come, and none is offered while the last notices do. Notices that come in
        # the drain are of changes before it: without them the slowest would be missing.
        ramp = total.parts.get(RAMP, Part()) if any(phase.name not in {RAMP, DRAIN} for phase in phases) else Part()
        aside = {RAMP, DRAIN} if ramp.counts else {DRAIN}
        held, offered = total.whole(without=aside - {DRAIN}), total.whole(without=aside).counts
        begun = min((phase.start for phase in phases if phase.name not in aside), default=0.0)
        seconds = max((self._ended or ended) - self._started - begun, 0.001)
        # Those who are away on purpose are not missed: what was to be held at once is what counts.
        most = int(max((value for _, value in series.get("sessions_wanted", ())), default=0))
        last = {name: _last(series.get(name, ()), begun + seconds) for name in _HELD}
        step = Step(sessions=most or options.sessions, seconds=round(seconds, 1))
        step.held = _median(series.get("sessions", ()), begun, begun + seconds)
        step.offered, step.achieved = (round(offered[name] / seconds, 3) for name in ("offered", "made"))
        step.metrics, step.histograms = held.metrics.summaries(), held.metrics.encoded()
        step.ramp = ramp.metrics.encoded()
        step.ledger = whole.ledger.to_dict() | {"notice": held.ledger.to_dict()["notice"]}
        step.resources = sampling.between(series, begun, begun + seconds)
        step.errors = {f"{name}: {cause}": count for (name, cause), count in sorted(whole.metrics.errors.items())}
        step.counts = {
            "asked": options.sessions if most else 0,
            "connected": last["sessions"],
            "wanted": last["sessions_wanted"] - last["sessions_coming"],
            "begun": counts["begun"],
            "connects": counts["connects"],
            "connect_failures": counts["connect failures"],
            "prevented": offered["prevented"],
            "watches_unconfirmed": counts["watches asked"] - counts["watches confirmed"],
            "receipts": counts["receipts asked"],
            "receipts_unanswered": counts["beats unanswered"],
            "harness_errors": counts["engine errors"],
            "address_errors": sum(n for cause, n in counts.items() if "EADDRNOTAVAIL" in cause or "EMFILE" in cause),
            "negative_latencies": whole.metrics.negative,
            "planned_restarts": counts["planned restarts"],
        }
        asked = {"seconds": options.run_time + self._late} if options.run_time else {}
        title = " and ".join(sorted(total.workload)) or "Load"
        run = Run(
            title=title,
            started=datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            seconds=round(ended - self._started, 1),
            seed=options.seed,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            harness=sampling.harness() | {"workers": total.workers()},
            machine=self._machine,
            limits=sampling.limits()
            | {"source_addresses": options.sources.split(",") if options.sources else "as many as needed"},
            workload=total.workload | asked | {"counts": dict(sorted(counts.items()))},
            phases=phases,
            steps=[step],
            series=series,
            intervals=total.intervals(self._started),
            faults=[*total.faults, *self._faults],
        )
        run.target = {"address": self.environment.host or "", "file": options.target or ""}
        judge(run, options.slo)
        return run

    def _publish(self, run: Run) -> None:
        options, step = self.options, run.steps[0]
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in step.ledger.items() if name != "notice")
        log.info("Notices: %s", said)
        if step.breach:
            log.error("Not kept: %s", step.breach)
        for level, text in run.validity:
            log.log(logging.ERROR if level == "fatal" else logging.WARNING, "%s", text)
        if options.slo:
            # Also 0: else any failure, which the SLO may allow, would be the 1 of Locust's --exit-code-on-error.
            self.environment.process_exit_code = exit_code(run)
        if options.run_json:
            run.save(Path(options.run_json))


def _last(points: Sequence[tuple[float, float]], before: float) -> int:
    """The last value of a series, of those before a moment."""
    return int(next((value for t, value in reversed(points) if t <= before), 0))


def _median(points: Sequence[tuple[float, float]], start: float, end: float) -> int | None:
    """Of the values of a series from `start` to `end`; None where there are none."""
    values = [value for t, value in points if start <= t <= end]
    return round(median(values)) if values else None


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@events.init.add_listener  # type: ignore[untyped-decorator]
def _on_init(environment: Environment, **_: Any) -> None:
    recording = _recordings[environment] = Recording(environment)
    # Locust rounds 0.14 ms to 0; this keeps three digits. Every process counts by itself.
    stats.bucket_response_time = bucket_response_time  # type: ignore[assignment]
    moments: Any = environment.events
    runner = environment.runner
    moments.test_start.add_listener(lambda **_: recording.on_test_start())
    moments.test_stopping.add_listener(lambda **_: recording.on_test_stopping())
    if isinstance(runner, WorkerRunner):
        moments.report_to_master.add_listener(lambda data, **_: data.update({_KEY: recording.batch()}))
        runner.register_message(_SETTLE, lambda **_: recording.on_settle(), concurrent=True)
    elif isinstance(runner, MasterRunner):
        moments.worker_report.add_listener(recording.on_report)
        runner.register_message(_SETTLED, lambda msg, **_: recording.on_settled(msg.node_id, msg.data))
