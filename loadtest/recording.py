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
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import gevent  # type: ignore[import-untyped]
from locust import events, stats
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from loadtest import sampling, slo
from loadtest.ledger import LedgerResult
from loadtest.metrics import Metrics, bucket_response_time
from loadtest.run import Run, Step
from loadtest.total import Total

REPORT = 3.0
"""Seconds between two reports, as Locust's workers make them."""
_PATIENCE = 15.0  # s that the master waits for its workers, beyond the time they need to settle
_KEY = "loadtest"
_HELD = ("sessions", "sessions_wanted")
_SETTLE, _SETTLED = "loadtest settle", "loadtest settled"

log = logging.getLogger(__name__)
_recordings: WeakKeyDictionary[Environment, Recording] = WeakKeyDictionary()


class Source(Protocol):
    """What is recorded of: the crowd of one scenario."""

    def settle(self) -> None:
        """No more changes from now on."""

    def take(self) -> tuple[LedgerResult, Counter[str]]:
        """What came of it since the last call."""

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
        self._begin()

    @staticmethod
    def of(environment: Environment) -> Recording:
        """The recording of the process that this environment is in."""
        return _recordings[environment]

    def _begin(self) -> None:
        self.metrics = Metrics(self.environment.events.request.fire)
        self._sources: list[Source] = []
        self._phases: dict[str, float] = {}
        self._points: list[tuple[int, str, float]] = []
        self._settled = False
        self._started = time.time()
        self._ended: float | None = None
        self._total = Total()
        self._awaited: set[str] = set()
        self._machine = sampling.machine()

    def add(self, source: Source) -> None:
        """Records of this as well, until the run is over."""
        self._sources.append(source)

    def phase(self, name: str) -> None:
        """A stretch of the run begins, and the one before ends."""
        self._phases.setdefault(name, time.time())

    # The run's moments, as Locust tells them.

    def on_test_start(self) -> None:
        self._begin()
        if not isinstance(self.environment.runner, MasterRunner):
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
            if self._awaited:
                log.error("%d workers did not report what their sessions came to", len(self._awaited))
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
        ledger, counts = LedgerResult(), Counter[str]()
        workload: dict[str, Any] = {}
        for source in self._sources:
            came, counted = source.take()
            ledger += came
            counts += counted
            workload |= source.workload()
        points, self._points = self._points, []
        return {
            "at": time.time(),
            "metrics": self.metrics.take().to_dict(),
            "ledger": ledger.to_dict(),
            "counts": dict(counts),
            "points": points,
            "phases": dict(self._phases),
            "workload": workload,
        }

    @property
    def _late(self) -> float:
        return float(self.options.late)

    def _settle(self) -> dict[str, Any] | None:
        for source in self._sources:
            source.settle()
        self.phase("drain")
        if self._sources:
            gevent.sleep(self._late + 0.1)  # to be past it, whatever the clocks' grain
        last = self.batch(last=True)
        if self._sampler is not None:
            self._sampler.kill(block=False)
        return last

    def _sample(self) -> None:
        before = time.monotonic(), _cpu_seconds()
        due = before[0]
        is_local = isinstance(self.environment.runner, LocalRunner)
        reported = due
        while True:
            due += 1.0
            gevent.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic(), _cpu_seconds()
            figures = Counter[str]()
            for source in self._sources:
                figures.update(source.look())
            # One core is all that a process has.
            figures["generator_cpu_percent"] = 100 * (now[1] - before[1]) / (now[0] - before[0])  # type: ignore[assignment]
            figures["generator_rss_bytes"] = _rss()
            before = now
            second = int(time.time())
            self._points += ((second, name, value) for name, value in figures.items())
            if is_local and now[0] - reported >= REPORT:
                reported = now[0]
                self._total.add("local", self.batch())

    # What it came to.

    def _made(self) -> Run:
        total, options = self._total, self.options
        ended = time.time()
        # The last seconds only wait for notices: what is offered is offered before.
        seconds = (self._ended or ended) - self._started
        series = total.series(self._started)
        counts = total.counts
        # Those who are away on purpose are not missed: what was to be held at once is what counts.
        most = {name: int(max((value for _, value in series.get(name, ())), default=0)) for name in _HELD}
        step = Step(sessions=most["sessions_wanted"] or options.sessions, seconds=round(seconds, 1))
        step.offered, step.achieved = (round(counts[name] / seconds, 3) for name in ("offered", "made"))
        step.metrics, step.histograms = total.metrics.summaries(), total.metrics.encoded()
        step.ledger = total.ledger.to_dict()
        step.resources = sampling.between(series, 0.0, seconds)
        step.counts = {
            "connected": most["sessions"],
            "connects": counts["connects"],
            "connect_failures": counts["connect failures"],
            "address_errors": sum(n for cause, n in counts.items() if "EADDRNOTAVAIL" in cause or "EMFILE" in cause),
            "negative_latencies": total.metrics.negative,
            "planned_restarts": counts["planned restarts"],
        }
        title = " and ".join(sorted(total.workload)) or "Load"
        run = Run(
            title=title,
            started=datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            seconds=round(ended - self._started, 1),
            seed=options.seed,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            harness=sampling.harness() | {"workers": total.workers()},
            machine=self._machine,
            limits=sampling.limits() | {"source_addresses": options.sources.split(",")},
            workload={**total.workload, "seconds": seconds + self._late, "counts": dict(sorted(counts.items()))},
            phases=total.phases(self._started, ended),
            steps=[step],
            series=series,
            intervals=total.intervals(self._started),
            slo=options.slo or None,
        )
        run.target = {"address": self.environment.host or "", "file": options.target or ""}
        if run.slo:
            step.breach = slo.breach(slo.check(slo.parse(run.slo), step))
        run.ok = step.breach is None
        return run

    def _publish(self, run: Run) -> None:
        options, step = self.options, run.steps[0]
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in step.ledger.items() if name != "notice")
        log.info("Notices: %s", said)
        if step.breach:
            log.error("The SLO was not kept: %s", step.breach)
            self.environment.process_exit_code = 1
        if options.run_json:
            run.save(Path(options.run_json))


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
