"""Real services: who provides them, one of each for a whole test run, and `make services` for a person.

A service has a `url`, a `version`, and `start`, `kill9`, `freeze`, `thaw`, `restart`, `close`. It comes from the first
of its providers that is there:

1. an address given from outside (``PRESENCE_TEST_REDIS``, ``_KAFKA``, ``_CASSANDRA``), for tests that do it no harm,
2. a process of this machine,
3. a container.

``PRESENCE_TEST_PROVIDER`` (``process`` or ``container``) takes one of the latter two only.

What outlives the test that asked for it has a keeper, a process of this module that ends it together with the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import click

from tests.support import jvm

ROOT = Path(__file__).parents[2]
KINDS = ("redis", "kafka", "cassandra")
START_SECONDS = 150.0
STOP_SECONDS = 20.0
RUN_FOLDER = "PRESENCE_TEST_RUN"
"""The environment variable that tells the workers of a test run where its services are noted."""

EXPORTS = {
    "redis": "PRESENCE_REDIS_URL",
    "kafka": "PRESENCE_KAFKA_BOOTSTRAP_SERVERS",
    "cassandra": "PRESENCE_CASSANDRA_CONTACT_POINTS",
}
MODULE = "tests.support.services"  # this one: the program that a keeper is
HAND_FOLDER = ROOT / ".services"
"""Where `make services` notes what it started."""


class Lacking(Exception):
    """The service cannot be had here. One line that says why."""


class NotStarted(Exception):
    """The service did not start."""


class Service(Protocol):
    """A real server under a test's thumb, whoever provides it."""

    @property
    def url(self) -> str:
        """How it is reached; the same over all its starts."""

    @property
    def version(self) -> str:
        """Known once it runs."""

    async def start(self) -> Any: ...
    async def kill9(self) -> None: ...
    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...
    async def restart(self) -> Any: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Kept:
    """A service that others use, too: it is neither killed nor frozen."""

    kind: str
    url: str
    version: str
    provider: str
    keeper: int = 0
    """The process that ends it; 0: somebody else."""
    folder: str = ""
    """Its data and its log."""


# Providers


def provider_of(kind: str) -> str:
    """Who provides this kind of service here: ``process`` or ``container``.

    Raises:
        Lacking: with the reason for each provider.
    """
    wanted = os.environ.get("PRESENCE_TEST_PROVIDER") or None
    if wanted not in (None, "process", "container"):
        raise Lacking(f"PRESENCE_TEST_PROVIDER must be process or container, not {wanted!r}")
    reasons = []
    for provider in (wanted,) if wanted else ("process", "container"):
        reason = lacking(kind, provider)
        if reason is None:
            return provider
        reasons.append(f"as a {provider}: {reason}")
    raise Lacking(f"{kind.capitalize()} cannot be had: {'; '.join(reasons)}")


def lacking(kind: str, provider: str) -> str | None:
    """Why the service cannot be had from the provider, or None."""
    if provider == "process":
        return None if kind == "redis" else jvm.lacking(kind)
    from tests.support import containers  # takes its time, and the others do not need it

    return containers.lacking(kind)


def make(kind: str, *options: str, provider: str) -> Service:
    """Return a service that is not started yet, of a provider that does not lack it."""
    if provider == "container":
        from tests.support import containers

        return containers.KINDS[kind](*options)
    if kind == "redis":
        from tests.support.redis_process import RedisProcess

        return RedisProcess(*options)
    if kind == "kafka":
        from tests.support.kafka import KafkaProcess

        return KafkaProcess(*options)
    from tests.support.cassandra import CassandraProcess

    return CassandraProcess(*options)


# One for many: started by whoever comes first, ended by its keeper


def shared(kind: str, folder: Path, watched: int | None) -> Kept:
    """Return the service that is noted in ``folder``, started if need be; it ends with the process ``watched``.

    Raises:
        Lacking: it cannot be had.
        NotStarted: it should, but did not start.
    """
    if url := os.environ.get(f"PRESENCE_TEST_{kind.upper()}"):
        return Kept(kind, url, f"at {url}", "outside")
    provider_of(kind)
    folder.mkdir(exist_ok=True)
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := noted(kind, folder):
            return found
        log = folder / f"{kind}.log"
        keeper = _spawn([sys.executable, "-m", MODULE, "keep", kind, str(folder), str(watched or 0)], log)
        (folder / f"{kind}.pid").write_text(str(keeper))
        deadline = time.monotonic() + START_SECONDS
        while not (found := noted(kind, folder)):
            if os.waitpid(keeper, os.WNOHANG)[0]:
                raise NotStarted(log.read_text(errors="replace").strip() or f"{kind}: its keeper ended")
            if time.monotonic() > deadline:
                os.kill(keeper, signal.SIGTERM)
                raise NotStarted(f"{kind} did not start within {START_SECONDS:g} s; see {log}")
            time.sleep(0.02)
    return found


def _spawn(command: list[str], log: Path) -> int:
    """Start a program that goes on when this process has ended; return its id. What it says is in ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        # `subprocess` would complain of a child that is still there at the end.
        return os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True)
    finally:
        os.close(output)


def noted(kind: str, folder: Path) -> Kept | None:
    """The service that runs according to ``folder``, if its keeper lives."""
    try:
        kept = Kept(**json.loads((folder / f"{kind}.json").read_text()))
    except FileNotFoundError:
        return None
    return kept if alive(kept.keeper) else None


def alive(keeper: int) -> bool:
    """It has not ended, whether or not somebody has taken note of its end; and its id is not another's by now."""
    try:
        return MODULE.encode() in Path(f"/proc/{keeper}/cmdline").read_bytes()
    except OSError:
        return False


def end(folder: Path) -> list[str]:
    """End all services of ``folder``, also those that are just starting, and wait for that; return their kinds."""
    handles = {}
    for kind in KINDS:
        with contextlib.suppress(OSError, ValueError):
            keeper = int((folder / f"{kind}.pid").read_text())
            if alive(keeper):
                handles[kind] = os.pidfd_open(keeper)
                os.kill(keeper, signal.SIGTERM)
    for handle in handles.values():
        select.select([handle], [], [], STOP_SECONDS)
        os.close(handle)
    for kind in KINDS:
        (folder / f"{kind}.json").unlink(missing_ok=True)
    return list(handles)


def keep(kind: str, folder: Path, watched: int) -> None:
    """Run a service until this process is told to end (SIGTERM), or ``watched`` has ended (0: nobody is)."""
    signal.signal(signal.SIGTERM, _leave)
    handle = os.pidfd_open(watched) if watched else None
    provider = provider_of(kind)
    service = make(kind, provider=provider)
    try:
        asyncio.run(service.start())
        where = str(getattr(service, "root", ""))
        kept = Kept(kind, service.url, service.version, provider, os.getpid(), where)
        note = folder / f"{kind}.json"
        new = note.with_suffix(".new")
        new.write_text(json.dumps(asdict(kept)))
        new.replace(note)
        select.select([handle] if handle is not None else [], [], [])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        service.close()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


class Run:
    """The services of one test run. Its workers find them through the environment."""

    def __init__(self, folder: Path, watched: int, *, own: bool) -> None:
        self.folder = folder
        self.watched = watched
        self._own = own

    @classmethod
    def begin(cls) -> Self:
        """Of the process that leads the run."""
        folder = Path(tempfile.mkdtemp(prefix="ps-run-", dir="/tmp"))
        os.environ[RUN_FOLDER] = f"{folder}:{os.getpid()}"
        return cls(folder, os.getpid(), own=True)

    @classmethod
    def join(cls) -> Self:
        """Of a worker."""
        folder, _, watched = os.environ[RUN_FOLDER].rpartition(":")
        return cls(Path(folder), int(watched), own=False)

    def shared(self, kind: str) -> Kept:
        """The run's own service of this kind. Raises `Lacking`."""
        return shared(kind, self.folder, self.watched)

    def end(self) -> None:
        """End the services, if this process leads the run."""
        if self._own:
            end(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)


# For a person


def start_by_hand() -> int:
    """Start all three at once, those that do not run yet; print what to export."""
    HAND_FOLDER.mkdir(exist_ok=True)
    (HAND_FOLDER / ".gitignore").write_text("*\n")
    failed = 0
    with ThreadPoolExecutor() as threads:
        starting = {kind: threads.submit(shared, kind, HAND_FOLDER, None) for kind in KINDS}
        for kind, one in starting.items():
            try:
                kept = one.result()
            except (Lacking, NotStarted) as reason:
                click.echo(f"make services: {reason}", err=True)
                failed = 1
                continue
            click.echo(f"# {kind} {kept.version} ({kept.provider}), data and log in {kept.folder or 'its container'}")
            click.echo(f"export {EXPORTS[kind]}={kept.url}")
    if any(noted(kind, HAND_FOLDER) for kind in KINDS):
        click.echo("# `make services-stop` ends them and removes their data")
    return failed


def main() -> int:
    """Obey the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.services")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("start", help="start Redis, Kafka and Cassandra in the background (the default)")
    commands.add_parser("stop", help="end them")
    keeper = commands.add_parser("keep", help="run one of them, in the foreground")
    keeper.add_argument("kind", choices=KINDS)
    keeper.add_argument("folder", type=Path)
    keeper.add_argument("watched", type=int)
    arguments = parser.parse_args()
    if arguments.command == "stop":
        click.echo(f"ended: {', '.join(end(HAND_FOLDER)) or 'nothing was running'}")
        return 0
    if arguments.command == "keep":
        keep(arguments.kind, arguments.folder, arguments.watched)
        return 0
    return start_by_hand()


if __name__ == "__main__":
    sys.exit(main())
