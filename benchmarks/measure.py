"""What is measured and how: processes on cores of their own, their CPU and memory, and pairs of runs."""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.support.process import Process, free_port
from tests.support.server import ROOT, ServerProcess, environment
from tests.support.waiting import wait_until

T = TypeVar("T")
Run = Callable[[], Awaitable[Sequence[float]]]
PAIRS = int(os.environ.get("PAIRS", "5"))
SERVER_CORE, DRIVER_CORE = sorted(os.sched_getaffinity(0))[:2] if len(os.sched_getaffinity(0)) > 1 else (0, 0)


def pin(pid: int, core: int) -> None:
    """Let the process, with all its threads, run on this core only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that has ended
            os.sched_setaffinity(int(task.name), {core})


def cpu(pid: int) -> float:
    """CPU time of the process so far, in s, of all its threads that live."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def rss(pid: int) -> int:
    """Resident memory of the process in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


class Server(ServerProcess):
    """A presence server on its core; its Redis shares the driver's. Nobody is hindered by a limit."""

    def __init__(self, command: Sequence[str], **settings: object) -> None:
        self._command = command
        free: dict[str, Any] = {"max_ids_per_second": 10**7, "max_ids_burst": 10**7, "silence_seconds": 3600}
        super().__init__(**free | settings)

    def start(self) -> Server:
        self.spawn([sys.executable, "-m", *self._command], environment(self.settings))
        return self

    async def ready(self, timeout: float = 20.0) -> Server:
        await super().ready(timeout)
        pin(self.pid, SERVER_CORE)
        if "+" not in str(self.settings.get("redis_url")):  # a cluster has no one store
            pin(self.store_pid, DRIVER_CORE)
        return self

    @property
    def store_pid(self) -> int:
        """The process id of its Redis."""
        info = self.redis().info("server")
        assert isinstance(info, dict)
        return int(info["process_id"])


class Bare(Process):
    """One of the baselines, under Hypercorn as the presence server has it."""

    def __init__(self, app: str, **env: str) -> None:
        super().__init__()
        self.port = free_port()
        command = [sys.executable, "-m", "benchmarks.bare", app, str(self.port)]
        self.spawn(command, {**os.environ, "PYTHONPATH": str(ROOT), **env})

    async def ready(self) -> Bare:
        """Wait until it takes connections."""

        async def listens() -> bool:
            assert self.running, self.log
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return True
            return False

        await wait_until(listens, 20, what="the baseline to listen")
        pin(self.pid, SERVER_CORE)
        return self

    async def finish(self) -> None:
        """Kill it."""
        self.close()


class Servers(AsyncExitStack):
    """Servers that are stopped at the end."""

    async def presence(self, *command: str, **settings: object) -> Server:
        """Start a presence server; ``command``: the module that does, and its arguments."""
        server = Server(command or ("presence", "serve"), **settings)
        self.push_async_callback(server.finish)
        return await server.start().ready()

    async def bare(self, app: str, **env: str) -> Bare:
        """Start a baseline."""
        server = Bare(app, **env)
        self.push_async_callback(server.finish)
        return await server.ready()


@dataclass
class Row:
    """One line of the table: five pairs of figures, and their ratios."""

    what: str
    unit: str
    aim: str
    ours: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [ours / base for ours, base in zip(self.ours, self.base, strict=True)]

    def line(self) -> str:
        """The row in Markdown."""
        ratio = ""
        if self.base:
            ratio = f"**{statistics.median(self.ratios):.2f}** ({min(self.ratios):.2f}–{max(self.ratios):.2f})"
        base = f"{statistics.median(self.base):.4g}" if self.base else ""
        ours = f"{statistics.median(self.ours):.4g} {self.unit}"
        return f"| {self.what} | {ours} | {base} | {ratio} | {self.aim} | {'; '.join(self.notes)} |"


async def pairs(rows: Sequence[Row], ours: Run, base: Run, *, warm_up: bool = True) -> None:
    """Run A B A B …; each gives one figure for each of the rows. ``warm_up``: one pair more, which does not count."""
    if warm_up:
        await ours()
        await base()
    for _ in range(PAIRS):
        for row, figure in zip(rows, await ours(), strict=True):
            row.ours.append(figure)
        for row, figure in zip(rows, await base(), strict=True):
            row.base.append(figure)


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which ``share`` of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def in_waves(makers: Sequence[Callable[[], Awaitable[T]]], width: int = 50) -> list[T]:
    """Await what these make, ``width`` at a time."""
    out: list[T] = []
    for start in range(0, len(makers), width):
        out += await asyncio.gather(*(make() for make in makers[start : start + width]))
    return out
