"""The crowd as a Locust user: one `FleetUser` in each process owns as many sessions as the options ask for.

A scenario is a subclass in a locustfile: it says what the crowd does by itself (`actions`), whom it watches
(`watches`), and what happens to it, in the order in which it happens (`script`).
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import gevent  # type: ignore[import-untyped]
from locust import User, events, task
from locust.dispatch import UsersDispatcher
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest import preflight, slo, target, workload
from loadtest.crowd import Crowd, Session
from loadtest.engine import Engine, freeze_heap
from loadtest.ledger import Ledger, LedgerResult
from loadtest.options import number
from loadtest.recording import Recording

_LOOK = 0.1  # s between two looks whether what is waited for has come

_PATIENCE = 5.0  # s for forked workers to report
_HERE = "loadtest here"
_SHARES = ("share", "watchers", "beat-receipts")

log = logging.getLogger(__name__)


class FleetUser(User):
    """A crowd of sessions; subclass it in a locustfile.

    The defaults of `--stay`, `--away`, `--period`, `--share` and `--every` are here: a scenario may have others.
    """

    abstract = True
    fixed_count = 1  # in each process: see `_Dispatcher`

    period: ClassVar[float] = 30.0
    """Seconds between two heartbeats of a session."""
    stay: ClassVar[float] = 0.0
    """Mean seconds for which a session stays; 0: for ever."""
    away: ClassVar[float] = 30.0
    """Mean seconds until it is back."""
    share: ClassVar[float] = 0.3
    """Share of the sessions that a disturbance takes."""
    every: ClassVar[float] = 30.0
    """Seconds between two disturbances."""
    ramps: ClassVar[float] = 1.0
    """How long the crowd takes to connect, against `--sessions` at `--connect-rate`."""
    sheltered: ClassVar[bool] = False
    """The scenario restarts the server: that is no failure."""

    crowd: Crowd

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options: Any = environment.parsed_options
        self.options = options
        self.recording = Recording.of(environment)
        self.dice = random.Random(self.options.seed)
        self._script: gevent.Greenlet | None = None

    # What a scenario may say.

    def script(self) -> None:
        """What happens, in its order; the run may end at any moment. By default the crowd is left to itself."""
        self.arrive()
        self.phase("hold")
        self.wait_for_ever()

    def actions(self) -> Iterator[workload.Action]:
        """What each session does by itself, from the start of the run on."""
        return workload.schedule(
            self.size,
            math.inf,
            ramp=self.ramp,
            period=self.setting("period"),
            jitter=self.options.jitter,
            churn=self.size / self.setting("stay") if self.setting("stay") else 0.0,
            away=self.setting("away"),
            seed=self.seed,
        )

    def watches(self) -> Mapping[int, Sequence[int]]:
        """Whom each session watches, by their numbers."""
        graph = workload.friend_graph(self.size, mean=self.options.friends, most=self.options.most, seed=self.seed)
        return workload.watch_lists(graph, share=self.options.watchers, seed=self.seed)

    def lacking(self) -> str | None:
        """Why a run that ends now is not to be believed: what it is for has not happened. None: it has."""
        return None

    # What it may use.

    @property
    def place(self) -> int:
        """Which of the processes this is, from 0."""
        runner = self.environment.runner
        indexes: list[int] = getattr(self.options, "worker_indexes", None) or [0]
        index = runner.worker_index if isinstance(runner, WorkerRunner) else 0
        return indexes.index(index) if index in indexes else index

    @property
    def processes(self) -> int:
        """In how many processes the crowd is."""
        return len(getattr(self.options, "worker_indexes", None) or [0])

    @property
    def size(self) -> int:
        """Sessions of this process."""
        return workload.part(self.options.sessions, self.place, self.processes)

    @property
    def seed(self) -> int:
        """Every process draws differently."""
        return int(self.options.seed) * 1000 + self.place

    @property
    def ramp(self) -> float:
        """Seconds in which the crowd connects."""
        return float(self.ramps * self.options.sessions / self.options.connect_rate)

    def setting(self, name: str) -> float:
        """An option that the scenario has a default for."""
        value = number(getattr(self.options, name), getattr(self, name))
        return min(value, 1.0) if name in _SHARES else value  # the web page takes any number

    def phase(self, name: str) -> None:
        """A stretch of the run begins."""
        self.recording.phase(name)

    def pause(self, seconds: float) -> None:
        """Lets the crowd go on for so many seconds."""
        gevent.sleep(seconds)

    def wait_for_ever(self) -> None:
        """Until the run ends."""
        while True:
            gevent.sleep(3600)

    def wait_for(self, condition: Callable[[], bool], limit: float) -> bool:
        """Waits until `condition` holds, at most `limit` seconds; returns whether it does."""
        end = self.crowd.engine.now() + limit
        while not condition() and self.crowd.engine.now() < end:
            gevent.sleep(_LOOK)
        return condition()

    def arrive(self) -> None:
        """The whole crowd connects, and begins with what it does by itself."""
        self.phase("ramp")
        self.crowd.follow(self.actions(), self.crowd.engine.now())
        # Every one of them has to come; some may have left again by then.
        wanted = self.size
        everyone = self.wait_for(lambda: self.crowd.counts["begun"] >= wanted, self.ramp + 10.0)
        if not (everyone and self.wait_for(self.is_complete, 30.0)):
            log.warning("%d of %d sessions are connected", self.crowd.present, self.crowd.wanted)
        freeze_heap()

    def is_complete(self) -> bool:
        """Whether nearly all who are to be there are; some come and go at any moment."""
        return self.crowd.present >= 0.99 * self.crowd.wanted

    def is_back(self) -> bool:
        """Whether, besides, nearly all have been told of those whom they watch."""
        return self.is_complete() and self.crowd.unaware <= 0.01 * self.crowd.wanted

    def come_back(self, sessions: Iterable[Session], within: float = 0.0) -> None:
        """They connect again, at random moments within so many seconds from now."""
        moments = ((self.dice.uniform(0.0, within), session.number) for session in sessions)
        actions = (workload.Action(at, "connect", number) for at, number in sorted(moments))
        self.crowd.follow(actions, self.crowd.engine.now())

    def flip(self, session: Session, times: float = math.inf) -> None:
        """The user signs off and on in turn, `--every` seconds apart."""
        due = self.crowd.engine.now()
        change = itertools.cycle((self.crowd.sign_off, self.crowd.sign_on))
        while times > 0:
            self.crowd.engine.at(due, next(change), session, due)
            due += self.setting("every")
            times -= 1
            gevent.sleep(max(0.0, due - self.crowd.engine.now()))

    def some(self, share: float | None = None) -> list[Session]:
        """A share of the sessions that are connected, drawn at random; by default the setting's."""
        present = [session for session in self.crowd.sessions if session.is_open]
        return self.dice.sample(present, round(len(present) * (self.setting("share") if share is None else share)))

    # Locust's side.

    def on_start(self) -> None:
        server = target.load(self.options.target or None, host=self.environment.host or None)
        # The engine takes addresses: a name would be looked up again and again, and in the hub.
        addresses = [(socket.gethostbyname(one.host), one.port) for one in server.instances]
        name = type(self).__name__.lower()
        users = workload.crowd_ids(name, self.options.sessions, self.place, self.processes)
        for user in users if server.command else ():
            # Made before they are needed: the command blocks the hub.
            server.token(user)
            gevent.sleep(0)
        # Locust's run time counts already: who starts it from outside, and has waited before, says so.
        if not self.options.no_wait and (
            left := preflight.await_offline(server, users, f"{preflight.USER}-{self.place}")
        ):
            self.recording.fail(left)
        sources = preflight.source_addresses(self.options.sources, self.options.sessions, server.instances)
        engine = Engine(sources=sources, fresh_masks=not self.options.fixed_masks)
        self.ledger = Ledger(late=self.options.late)
        period = self.setting("period")
        self.crowd = Crowd(
            engine,
            server,
            self.ledger,
            self.recording.metrics,
            users,
            self.watches(),
            addresses=addresses,
            beat_receipts=self.options.beat_receipts,
            period=period * (1 + self.options.jitter),
            late=self.options.late,
            sheltered=self.sheltered,
            seed=self.seed,
        )
        self._told: Counter[str] = Counter()
        self._last_look: Counter[str] = Counter()
        self._worst_lag = 0.0
        self.recording.add(self)

    @task
    def live(self) -> None:
        """Runs the script, once: Locust would begin it again, and so double the load."""
        self._script = gevent.spawn(self._play)
        self._script.get()
        self.wait_for_ever()

    def _play(self) -> None:
        try:
            self.script()
        except Exception as error:  # noqa: BLE001 (whatever it is, the run says so)
            self.recording.fail(f"The script of {type(self).__name__.lower()} ended early: {error!r}.")

    def on_stop(self) -> None:
        if self._script is not None:
            self._script.kill(block=False)
        self.crowd.engine.close()

    # The recording's side.

    def settle(self) -> None:
        self.crowd.quiet = True
        # What is asked until now is to be answered by then; the recording waits a little longer.
        engine = self.crowd.engine
        engine.at(engine.now() + self.options.late, self.crowd.count_unanswered)
        if self._script is not None:
            with suppress(Exception):
                self._script.kill()
        if self.place == 0 and (why := self.lacking()):
            self.recording.fail(why)

    def take(self, *, last: bool = False) -> tuple[LedgerResult, Counter[str]]:
        counts = self.crowd.tally()
        counts["engine errors"] = self.crowd.engine.errors
        new, self._told = counts - self._told, counts
        self._note_lag()
        return self.ledger.take(self.crowd.engine.now(), last=last), new

    def look(self) -> Mapping[str, float]:
        counts = self.crowd.tally()
        since, self._last_look = counts - self._last_look, counts
        self._note_lag()
        worst, self._worst_lag = self._worst_lag, 0.0
        return {
            "sessions": self.crowd.present,
            "sessions_wanted": self.crowd.wanted,
            "sessions_coming": self.crowd.coming,
            "offered": since["offered"],
            "achieved": since["made"],
            "messages": since["messages"],
            "generator_lag_ms": 1000 * worst,
        }

    def _note_lag(self) -> None:
        lags = self.crowd.engine.take_lag()
        self.recording.metrics.record_own("generator lag", lags)
        self._worst_lag = max(self._worst_lag, max(lags, default=0.0))

    def workload(self) -> Mapping[str, Any]:
        watched = sorted(len(friends) for friends in self.crowd.watches.values())
        return {
            type(self).__name__.lower(): {
                "question": (type(self).__doc__ or "").partition("\n")[0],
                "schedule": f"open, jitter {100 * self.options.jitter:g} %",
                "sessions": self.options.sessions,
                "heartbeat_seconds": self.setting("period"),
                "connects_per_second": self.options.connect_rate,
                "stay_seconds": self.setting("stay") or None,
                "away_seconds": self.setting("away"),
                "watchers_per_process": len(watched),
                "friends": {"p50": watched[len(watched) // 2], "max": watched[-1]} if watched else {},
                "processes": self.processes,
            }
        }


class _Dispatcher(UsersDispatcher):
    """Gives every process its crowd; the users that `-u` asks for beyond that are probes."""

    def new_dispatch(self, target_user_count: int, *args: Any, **kwargs: Any) -> None:
        fleets = [cls for cls in self._user_classes if issubclass(cls, FleetUser)]
        for cls in fleets:
            cls.fixed_count = len(self._worker_nodes)
        if target_user_count:
            target_user_count = max(target_user_count, len(fleets) * len(self._worker_nodes))
        self._try_dispatch_fixed = True
        super().new_dispatch(target_user_count, *args, **kwargs)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _on_init(environment: Environment, **_: Any) -> None:
    """Looks at everything before the run; and before each start, tells the workers of one another."""
    runner: Any = environment.runner
    options: Any = environment.parsed_options
    environment.dispatcher_class = _Dispatcher
    if isinstance(runner, WorkerRunner):
        runner.send_message(_HERE)
        return
    here: list[str] = []
    """The workers that are made in full."""
    if isinstance(runner, MasterRunner):
        runner.register_message(_HERE, lambda msg, **_: here.append(msg.node_id))
    # With the web page the address may be given there.
    if options.headless or options.autostart or environment.host or options.target:
        _look_first(environment, options, here)

    def on_test_start(**_: Any) -> None:
        indexes = [0]
        if isinstance(runner, MasterRunner):
            indexes = sorted(runner.get_worker_index(client.id) for client in runner.clients.ready)  # type: ignore[no-untyped-call]
        # The workers get the options with the order to start.
        options.worker_indexes = indexes
        fleets = sum(issubclass(cls, FleetUser) for cls in environment.user_classes)
        runner.target_user_count = max(runner.target_user_count, fleets * len(indexes))

    environment.events.test_start.add_listener(on_test_start)  # type: ignore[no-untyped-call]


def _look_first(environment: Environment, options: Any, here: Sequence[str]) -> None:
    try:
        server = target.load(options.target or None, host=environment.host or None)
        processes = int(options.processes or (options.master and options.expect_workers) or 1)
        elsewhere = bool(options.master and not options.processes)
        named = options.sources.split(",") if options.sources else []
        preflight.check_shares({name: getattr(options, name.replace("-", "_")) for name in _SHARES})
        preflight.check_sources(() if elsewhere else named)
        preflight.check(server, options.sessions, processes=processes, sources=len(named) or None, elsewhere=elsewhere)
        if options.slo:
            slo.parse(options.slo)
        if options.run_json:
            preflight.check_output(Path(options.run_json))
    except (target.TargetError, preflight.PreflightError, slo.SloError) as error:
        log.error(error)
        if options.processes and isinstance(environment.runner, MasterRunner):
            _dismiss(environment.runner, options.processes, here)
        sys.exit(2)


def _dismiss(master: MasterRunner, workers: int, here: Sequence[str]) -> None:
    """Ends the processes that Locust has forked: without a word they would look for their master for minutes.

    One that hears it before it is made in full goes on for ever: its last greenlets come after the word.
    """
    end = time.monotonic() + _PATIENCE
    while len(here) < workers and time.monotonic() < end:
        gevent.sleep(_LOOK)
    master.quit()
