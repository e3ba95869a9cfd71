"""What a session and a beat cost three load generators, against the null server: ``python -m benchmarks.generators``.

Ours, a plain Locust user with websocket-client, and Artillery's ``ws`` engine hold the same sessions with the same
beats, in turn. Each beat asks for a receipt, which is read. The null server counts what arrives. A beat's cost is the
difference of CPU between many beats and few; a session's is the difference of memory between many sessions and few.

``python -m benchmarks.generators engine`` measures ours alone, with 15,000 sessions that beat every 30 s.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from loadtest import floor
from loadtest.engine import sources_for
from loadtest.run import Run

ROOT = Path(__file__).parents[2]
ARTILLERY = Path(__file__).parent / "node_modules/.bin/artillery"
SESSIONS, FEW = int(os.environ.get("SESSIONS", "2000")), 100
OFTEN, RARELY = 1.0, 5.0
"""Seconds between two beats."""
WINDOW = 20.0
"""Seconds that are measured, once all are connected."""
ROUNDS = int(os.environ.get("ROUNDS", "3"))
RATE = 100
"""Connects a second."""
DATA = Path(tempfile.gettempdir()) / f"generators-{os.getpid()}.json"
_LIMIT = 60.0  # s until all are connected


@dataclass(frozen=True, slots=True)
class Reading:
    """What one generator used while it held its sessions."""

    beats: int
    """That arrived in the window."""
    cpu: float
    """Seconds of CPU in the window."""
    memory: int
    """Resident bytes at its end."""
    connects: float
    """A second, from the first to the last."""


class Seen:
    """What arrived at the null server. It is shared between the server's process and ours."""

    def __init__(self) -> None:
        self.beats: Any = multiprocessing.Value("Q", 0)
        self.connects: Any = multiprocessing.Value("Q", 0)
        self._first: Any = multiprocessing.Value("d", 0.0)
        self._last: Any = multiprocessing.Value("d", 0.0)

    @property
    def rate(self) -> float:
        """Connects a second, from the first to the last."""
        return float((self.connects.value - 1) / (self._last.value - self._first.value))

    def note(self, payload: bytes) -> None:
        """Count a STOMP frame; of the crowd's there are others, such as SUBSCRIBE after each CONNECTED."""
        if payload.startswith(b"SEND\n"):
            self.beats.value += 1
        elif payload.startswith((b"CONNECT\n", b"STOMP\n")):
            self._last.value = time.monotonic()
            self._first.value = self._first.value or self._last.value
            self.connects.value += 1


def ours(address: str, sessions: int, period: float, rate: float = RATE) -> tuple[list[str], dict[str, str]]:
    """Our engine, as `hold` uses it; nobody watches anybody."""
    command = [*_locust(), str(ROOT / "loadtest/scenarios/hold.py"), "--host", f"http://{address}"]
    command += ["--sessions", str(sessions), "--connect-rate", str(rate), "--period", str(period)]
    command += ["--watchers", "0", "--beat-receipts", "1", "--sources", ",".join(sources_for(sessions))]
    return command, {"LOADTEST_SECRET": "x" * 32, "PYTHONPATH": str(ROOT)}


def alone(address: str, sessions: int, period: float) -> tuple[list[str], dict[str, str]]:
    """Our engine as fast as it can connect."""
    command, env = ours(address, sessions, period, rate=100_000)
    return [*command, "--late", "0.2", "--run-json", str(DATA)], env


def plain(address: str, sessions: int, period: float) -> tuple[list[str], dict[str, str]]:
    """A greenlet and a websocket-client connection to each session."""
    command = [*_locust(), str(Path(__file__).parent / "plain.py"), "-u", str(sessions), "-r", str(RATE)]
    return command, {"ADDRESS": f"ws://{address}/ws", "PERIOD": str(period)}


def artillery(address: str, sessions: int, period: float) -> tuple[list[str], dict[str, str]]:
    """Artillery's engine `ws`."""
    beat = {
        "payload": "SEND\ndestination:/app/heartbeat\nreceipt:b\n\n\0",
        "match": {"regexp": "RECEIPT", "value": "RECEIPT"},  # it waits for the answer
    }
    beats = {"loop": [{"think": period}, {"send": beat}], "count": 1_000}
    hello = {"send": "CONNECT\naccept-version:1.2\nhost:localhost\nAuthorization:Bearer x\n\n\0"}
    script = {
        "config": {
            "target": f"ws://{address}/ws",
            "phases": [{"duration": max(1, sessions // RATE), "arrivalRate": min(RATE, sessions)}],
            "ws": {"subprotocols": ["v12.stomp"]},
        },
        "scenarios": [{"engine": "ws", "flow": [hello, beats]}],
    }
    path = Path(tempfile.gettempdir()) / f"artillery-{os.getpid()}.json"
    path.write_text(json.dumps(script))
    return [str(ARTILLERY), "run", "--quiet", str(path)], {"ARTILLERY_DISABLE_TELEMETRY": "true"}


Command = Callable[[str, int, float], tuple[list[str], dict[str, str]]]
GENERATORS: dict[str, Command] = {
    "ours": ours,
    "Locust + websocket-client": plain,
    "Artillery": artillery,
}


def main() -> None:
    """Measure all, and print the table."""
    if not ARTILLERY.exists():
        folder = Path(__file__).parent
        subprocess.run(
            ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"],
            cwd=folder,
            check=True,
        )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in GENERATORS}
    for _ in range(ROUNDS):
        for name, of in GENERATORS.items():
            few, rarely, often = (
                measured(of, n, period) for n, period in ((FEW, RARELY), (SESSIONS, RARELY), (SESSIONS, OFTEN))
            )
            beat = 1e6 * (often.cpu - rarely.cpu) / (often.beats - rarely.beats)
            session = (rarely.memory - few.memory) / 1024 / (SESSIONS - FEW)
            found[name].append((session, beat))
            print(f"{name}: {session:.2f} KiB, {beat:.0f} µs ({often.beats} beats in {WINDOW:g} s)", file=sys.stderr)
    print(f"{SESSIONS:,} sessions, beats every {OFTEN:g} and {RARELY:g} s; median of {ROUNDS} (range)\n")
    print("| generator | KiB a session | µs of CPU a beat | beats a second a core could send |\n|---|---|---|---|")
    for name, pairs in found.items():
        sessions, beats = ([pair[n] for pair in pairs] for n in (0, 1))
        per_second = 1e6 / statistics.median(beats)
        print(f"| {name} | {_spread(sessions, 2)} | {_spread(beats, 0)} | {per_second:,.0f} |")


def engine() -> None:
    """Measure ours alone, and print what it came to."""
    few = measured(alone, FEW, 30.0)
    found = []
    for _ in range(ROUNDS):
        many = measured(alone, 15_000, 30.0)
        lag = Run.load(DATA).steps[0].metrics["generator lag"]
        assert lag.p99 is not None
        session = (many.memory - few.memory) / 1024 / (15_000 - FEW)
        found.append((session, 100 * many.cpu / WINDOW, lag.p99, many.connects))
        print("{:.2f} KiB, {:.1f} %, lag {:.2f} ms, {:,.0f} connects/s".format(*found[-1]), file=sys.stderr)
    print("| KiB a session | % of a core | lag p99, ms | connects a second |\n|---|---|---|---|")
    columns = zip(zip(*found, strict=True), (2, 1, 2, 0), strict=True)
    print(f"| {' | '.join(_spread(list(values), digits) for values, digits in columns)} |")


def measured(of: Command, sessions: int, period: float) -> Reading:
    """Run a generator until all are connected, and then for the window."""
    seen = Seen()
    ours_end, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=_serve, args=(theirs, seen), daemon=True)
    server.start()
    name = of.__name__
    command, env = of(f"127.0.0.1:{ours_end.recv()}", sessions, period)
    with tempfile.TemporaryFile() as log:
        generator = psutil.Popen(command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _LIMIT + sessions / RATE
            while seen.connects.value < sessions:
                if time.monotonic() > deadline or generator.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{name}: {seen.connects.value} of {sessions} connected: {log.read().decode()[-500:]}")
                time.sleep(0.005)
            rate = seen.rate
            time.sleep(min(2 * period, 10.0))  # to be past the work of connecting
            before = time.monotonic(), seen.beats.value, _cpu(generator)
            time.sleep(WINDOW)
            share = WINDOW / (time.monotonic() - before[0])
            reading = Reading(
                round((seen.beats.value - before[1]) * share),
                (_cpu(generator) - before[2]) * share,
                sum(one.memory_info().rss for one in _family(generator)),
                rate,
            )
            generator.terminate()  # it may have something to write
            psutil.wait_procs([generator], 20)
        finally:
            for one in _family(generator):
                one.kill()
            generator.wait(20)
            server.kill()
            server.join(20)
    expected = sessions * WINDOW / period
    if abs(reading.beats - expected) > 0.05 * expected:
        sys.exit(f"{name}: {reading.beats} beats arrived, {expected:.0f} were due: it is no measurement")
    return reading


def _locust() -> list[str]:
    return [sys.executable, "-m", "locust", "--headless", "--only-summary", "--loglevel", "ERROR", "-t", "10m", "-f"]


def _serve(pipe: Any, seen: Seen) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    answer = floor._answer

    def counted(payload: bytes) -> bytes:
        seen.note(payload)
        return answer(payload)

    floor._answer = counted
    null_server = floor.Floor()
    pipe.send(null_server.port)
    null_server.serve()


def _family(process: Any) -> list[Any]:
    return [process, *process.children(recursive=True)] if process.is_running() else []


def _cpu(process: Any) -> float:
    times = [one.cpu_times() for one in _family(process)]
    return float(sum(one.user + one.system for one in times))


def _spread(values: list[float], digits: int) -> str:
    middle = statistics.median(values)
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


if __name__ == "__main__":
    engine() if sys.argv[1:] == ["engine"] else main()
