"""A server of our own to put under load, when no other is named: `presence serve` with stores of its own, as a process.

It is told apart from any other: a free port, an empty data folder and a known secret. What it is asked over is the
contract only; the one thing that is special is that the harness starts and ends it.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
_START = 30.0
"""s: until it is ready."""
_STOP = 30.0
"""s: until it has ended by itself."""


class EmbeddedError(Exception):
    """The server did not start: one line with what it said last."""


class Embedded:
    """A running server. Use it as a context manager; with the context it ends, and its data goes.

    Args:
        workers: processes on its port.
        lease: s.
        settings: further settings, such as `{"grace_seconds": 5}`.
    """

    def __init__(self, workers: int = 1, lease: float = 60.0, settings: Mapping[str, object] | None = None) -> None:
        self.workers = workers
        self.lease = lease
        self.port = _free_port()
        self.settings = dict(settings or {})
        # A short path: the store listens on a Unix socket in it, and those have about 100 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="load-", dir="/tmp"))
        self._log = self._folder / "log"
        self._secret = secrets.token_hex(32)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the process that started the others: the workers and the store."""
        assert self._process is not None
        return self._process.pid

    @property
    def target(self) -> Path:
        """The target file that describes it; there once it has started."""
        return self._folder / "target.toml"

    @property
    def facts(self) -> dict[str, object]:
        """What a report says of it; no secrets."""
        configuration = {"workers": self.workers, "lease_seconds": self.lease, "stores": "embedded", **self.settings}
        return {"file": "made for this run", "processes": self.workers, "configuration": configuration}

    def start(self) -> Self:
        """Start it, and return once it is ready.

        Raises:
            EmbeddedError: it ended, or was not ready in time.
        """
        settings = {
            "host": HOST,
            "port": self.port,
            "workers": self.workers,
            "lease_seconds": self.lease,
            "data_dir": self._folder / "data",
            "jwt_secret": self._secret,
            "log_level": "warning",
            **self.settings,
        }
        # Settings that the caller's own server has are not those of this one.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PRESENCE_")}
        env |= {f"PRESENCE_{name.upper()}": str(value) for name, value in settings.items()}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "presence", "serve"],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the harness: it ends the server when the load has ended.
                start_new_session=True,
            )
        self.target.touch(mode=0o600)
        self.target.write_text(
            f"lease = {self.lease}\ngrace = {self.settings.get('grace_seconds', 0)}\n"
            f'[[instances]]\nhttp = "{self.http}"\n[token]\nsecret = "{self._secret}"\n'
        )
        self._until_ready()
        return self

    def stop(self) -> None:
        """End it, and remove its data."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EmbeddedError(
                    f"the embedded server ended with exit code {self._process.returncode}: {self._said()}"
                )
            try:
                with urllib.request.urlopen(f"{self.http}/health/ready", timeout=2):
                    return
            except urllib.error.HTTPError:
                pass  # it answers, and is not ready
            except OSError:
                pass  # nobody listens yet
            time.sleep(0.05)
        raise EmbeddedError(f"the embedded server was not ready within {_START:g} s: {self._said()}")

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _free_port() -> int:
    """A port that nobody listens on, below those that the system gives to clients: the load's own would take it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port
