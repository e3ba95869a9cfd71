"""What the machine says while a run is on: once a second the server's processes, the generator's, and the kernel.

A thread of the command that started the run, never of the generator: reading `/proc` must not make the load late.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from loadtest.run import Series

PERIOD = 1.0
"""s"""

_SYSCTL = Path("/proc/sys/net")
_KERNEL = {"ListenOverflows": "listen_overflows", "ListenDrops": "listen_drops", "TCPTimeouts": "tcp_timeouts"}
"""Counters of `/proc/net/netstat`, by their names there."""

COUNTERS = frozenset({*_KERNEL.values(), "swapped_pages"})
"""The names of what is counted since the start of the sampling, and is no level."""


class Processes:
    """Some processes and all that they start, read together.

    Args:
        name: what the figures are called after: `server` gives `server_cpu_percent`.
        roots: the process ids, asked for again while there are fewer than there once were: a restarted server has a
            new one, and may take a while to come.
        busiest: `…_cpu_percent` is that of the busiest process, as its one core is what stops first; else of all.
    """

    def __init__(self, name: str, roots: Callable[[], Iterable[int]], *, busiest: bool = False) -> None:
        self.name = name
        self.busiest = busiest
        self.changed = 0
        """How often processes were gone, and others came: roots, and children that had lasted for a while."""
        self._roots = roots
        self._asked: set[int] = set()
        self._ever: set[int] = set()
        self._most = 0
        self._children: set[int] = set()
        self._lasting: set[int] = set()
        """The children that were there twice in a row: no helpers that a server starts for a moment."""
        self._vacant = 0
        """How many of these are gone, and nobody has come for them yet."""
        self._known: dict[int, psutil.Process] = {}
        self._used: dict[int, tuple[float, float]] = {}
        self._read = 0

    def read(self, now: float) -> dict[str, float]:
        """The figures of now; CPU is since the read before. Empty while there are no processes."""
        if self._read % 5 == 0 or not self._known:  # a worker may be replaced; to walk the tree is dear
            self._find()
        self._read += 1
        cpu: list[float] = []
        rss = files = 0
        for pid, process in list(self._known.items()):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    rss += process.memory_info().rss
                    files = max(files, process.num_fds())  # their limit is one of a process
            except psutil.Error:
                self._known.pop(pid)
                self._used.pop(pid, None)
                continue
            used = times.user + times.system
            before = self._used.get(pid)
            self._used[pid] = (now, used)
            if before is not None and now > before[0]:
                cpu.append(100 * (used - before[1]) / (now - before[0]))
        if not self._known:
            return {}
        found = {f"{self.name}_rss_bytes": float(rss), f"{self.name}_open_files": float(files)}
        if cpu and self.busiest:
            found[f"{self.name}_cpu_percent"] = max(cpu)
            if len(cpu) > 1:
                found[f"{self.name}_all_cpu_percent"] = sum(cpu)
        elif cpu:
            found |= {f"{self.name}_cpu_percent": sum(cpu), f"{self.name}_busiest_cpu_percent": max(cpu)}
        return found

    @property
    def open_files(self) -> list[int]:
        """Open files of each process that is known, the most first: how evenly its connections are spread."""
        counts = []
        for process in self._known.values():
            with contextlib.suppress(psutil.Error):
                counts.append(process.num_fds())
        return sorted(counts, reverse=True)

    def _find(self) -> None:
        """Look for new processes. The roots are asked for while one is missing: that may mean to walk all sockets."""
        if not self._most or len(self._asked & self._known.keys()) < self._most:
            self._asked = set(self._roots())
            # Against all there ever were: between the old one and the new one there may have been none for long.
            if self._ever and self._asked - self._ever:
                self.changed += 1
                self._children, self._lasting, self._vacant = set(), set(), 0  # with it, its children are others
            self._ever |= self._asked
            self._most = max(self._most, len(self._asked))
        children: set[int] = set()
        for pid in self._asked:
            with contextlib.suppress(psutil.Error):
                root = self._known.setdefault(pid, psutil.Process(pid))
                for process in root.children(recursive=True):
                    self._known.setdefault(process.pid, process)
                    children.add(process.pid)
        self._compare(children - self._asked)

    def _compare(self, children: set[int]) -> None:
        """A supervisor that restarts a worker stays: all that is seen is that one is gone, and another has come."""
        came = children - self._children
        self._vacant += len(self._lasting - children)
        if self._vacant and came:
            self.changed += 1
            self._vacant = max(0, self._vacant - len(came))
        self._children, self._lasting = children, children & self._children


class Sampler:
    """Reads all of it each second, from `start` to `stop`. Times are s since the epoch, as `Run.started` is."""

    def __init__(self, groups: Sequence[Processes]) -> None:
        self.groups = groups
        self.points: dict[str, list[tuple[float, float]]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._kernel = kernel_counters()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def series(self, started: float) -> Series:
        """The points with t in s since `started` (s since the epoch); those from before it are left out."""
        return {
            name: [(round(at - started, 2), round(value, 2)) for at, value in points if at >= started]
            for name, points in self.points.items()
        }

    def sample(self) -> None:
        """Read all once."""
        wall = time.time()
        found: dict[str, float] = {}
        for group in self.groups:
            found |= group.read(time.monotonic())
        for name, count in kernel_counters().items():
            found[name] = count - self._kernel.get(name, 0)
        for name, value in found.items():
            self.points.setdefault(name, []).append((wall, value))

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self.sample()
            due = max(due + PERIOD, time.monotonic())
            if self._over.wait(max(0.0, due - time.monotonic())):
                return


def between(series: Mapping[str, Sequence[tuple[float, float]]], start: float, end: float) -> dict[str, float]:
    """One figure of each series for the stretch from `start` to `end` (s): the mean of a rate, and else the greatest.

    The counters of the kernel are what was added in that time.
    """
    found = {}
    for name, points in series.items():
        values = [value for t, value in points if start <= t <= end]
        if not values:
            continue
        if name.endswith("_percent"):
            found[name] = round(sum(values) / len(values), 2)
        elif name in COUNTERS:
            found[name] = values[-1] - values[0]
        else:
            found[name] = max(values)
    return found


class GcWatch:
    """How long the garbage collector stops this process; for the generator, which must not be late by it."""

    def __init__(self) -> None:
        self.collections = 0
        self.total = 0.0
        """s"""
        self.longest = 0.0
        """s"""
        self._began = 0.0
        gc.callbacks.append(self._told)

    def close(self) -> None:
        gc.callbacks.remove(self._told)

    def _told(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
            return
        took = time.perf_counter() - self._began
        self.collections += 1
        self.total += took
        self.longest = max(self.longest, took)


def listeners(host: str, port: int) -> list[int]:
    """The processes of this machine that listen on a port; none when the server is elsewhere, or another user's."""
    if not is_local(host):
        return []
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return []
    found = {one.pid for one in connections if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid}
    return sorted(found)


def is_local(host: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return False
    if str(address).startswith("127.") or address == "::1":
        return True
    return any(one.address == address for several in psutil.net_if_addrs().values() for one in several)


def kernel_counters() -> dict[str, float]:
    """What the kernel counts of connections lost before the server saw them; empty where it counts nothing."""
    try:
        lines = Path("/proc/net/netstat").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        pairs = zip(names.split()[1:], values.split()[1:], strict=False)
        found |= {_KERNEL[name]: float(value) for name, value in pairs if name in _KERNEL}
    with contextlib.suppress(OSError, ValueError):
        vmstat = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        found["swapped_pages"] = float(vmstat["pswpin"]) + float(vmstat["pswpout"])
    return found


def machine() -> dict[str, Any]:
    """What the machine is."""
    load = os.getloadavg()
    return {
        "cpu": _cpu(),
        "cores": psutil.cpu_count() or 0,
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(load[0], 2),
    }


def limits() -> dict[str, Any]:
    """The limits and values of the kernel as they are now."""
    found: dict[str, Any] = {"nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[1], "ip_local_port_range": ports()}
    names = ("core/somaxconn", "ipv4/tcp_max_syn_backlog", "ipv4/tcp_max_tw_buckets", "netfilter/nf_conntrack_max")
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            found[name.rpartition("/")[2]] = int((_SYSCTL / name).read_text())
    return found


def ports() -> list[int]:
    """The first and the last port that the system gives to clients."""
    try:
        first, last = (int(word) for word in (_SYSCTL / "ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return [49_152, 65_535]  # what IANA says
    return [first, last]


def harness() -> dict[str, Any]:
    """The versions of the load test and of what it is made of."""
    found: dict[str, Any] = {"commit": _commit(), "python": platform.python_version()}
    for name in ("locust", "gevent", "hdrhistogram"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the folder that this file is in, with `+` when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
