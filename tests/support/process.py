"""A real server process under a test's thumb: ended, killed, frozen, and never left behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.support.fork_server import Forked
from tests.support.waiting import wait_until

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on, below those that the system gives to clients.

    It is this test process's own as long as that lives: another, also of another checkout, that looks for a port before
    anybody listens on this one passes it by.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0presence-tests-port-{port}")  # an abstract name: it goes with the process
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            mark.close()
            continue
        _reserved.append(mark)
        return port


class Process:
    """One program and all that it starts. Its folder is `root`, where `log_file` holds all that it said."""

    def __init__(self) -> None:
        # Short, and not under TMPDIR: the path of a Unix socket may have about 100 bytes only.
        self.root = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
        self.log_file = self.root / "log"
        self.log_file.touch()
        self.process: subprocess.Popen[bytes] | Forked | None = None

    def spawn(self, command: list[str], env: dict[str, str] | None = None) -> Self:
        """Start the program, with its folder as its own, by which it and its children are known."""
        assert not self.running, "still running"
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=env,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        """The id of the program's main process."""
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def running(self) -> bool:
        """The main process lives."""
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """All that the program said, over all its starts."""
        return self.log_file.read_text(errors="replace")

    def family(self) -> dict[int, str]:
        """All live processes in this program's folder, whatever became of the main one: id → name."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "cwd").readlink().is_relative_to(self.root):
                    found[int(folder.name)] = (folder / "comm").read_text().strip()
        return found

    async def exited(self, timeout: float = 15.0) -> int:
        """Wait for the end of the main process; return its exit code (negative: the signal that ended it)."""
        await wait_until(lambda: not self.running, timeout, what=f"the end of process {self.pid}\n{self.log}")
        assert self.process is not None
        assert self.process.returncode is not None
        return self.process.returncode

    async def stop(self, timeout: float = 15.0) -> int:
        """Ask the program to stop (SIGTERM); return its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return await self.exited(timeout)

    async def kill9(self, pid: int | None = None) -> None:
        """Kill the main process, or one of the family. Nothing of its own is done any more."""
        victim = pid or self.pid
        os.kill(victim, signal.SIGKILL)
        if victim == self.pid:
            await self.exited()
        else:
            await wait_until(lambda: victim not in self.family(), what=f"the end of process {victim}")

    async def freeze(self) -> None:
        """Stop the program's processes where they are (SIGSTOP). Its sockets stay open, nothing is answered."""
        frozen = self._freezable()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        await wait_until(
            lambda: all(state(Path(f"/proc/{pid}")) == "T" for pid in frozen), what="the processes' state T"
        )

    async def thaw(self) -> None:
        """Let the frozen processes go on (SIGCONT)."""
        for pid in self._freezable():
            os.kill(pid, signal.SIGCONT)

    def _freezable(self) -> list[int]:
        return list(self.family())

    def close(self) -> None:
        """Kill what still lives and remove the folder."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait(5)
        shutil.rmtree(self.root, ignore_errors=True)


def state(folder: Path) -> str:
    """The state letter of a process, R, S, D, T, Z and so on, from its folder in /proc."""
    # The name of the program, in brackets, may hold anything.
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]
