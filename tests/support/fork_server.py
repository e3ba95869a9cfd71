"""`presence` as a process of its own, forked from one that has loaded its modules: half a second of CPU less a start.

The test run starts hundreds of servers. What is forked does what `python -m presence ARGUMENTS` does from its first
line on, in an environment, a folder and a session of its own, and is a child of the test process. Where the start
itself is the point (its first import, its memory) a test spawns Python as users do.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36
LONGEST_ANSWER = 64
LONGEST_REQUEST = 1 << 20
FORK_SECONDS = 60.0
"""A fork takes a millisecond; the first waits for the imports."""


class Forked:
    """A child of the test process, with as much of `subprocess.Popen` as tests need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended (negative: the signal that ended it)."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("presence", timeout)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, 9)


def fork_presence(
    arguments: list[str], env: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path, source: Path | None = None
) -> Forked:
    """Start `python -m presence ARGUMENTS`; what it says is added to the two files.

    Args:
        source: the folder of another `presence` to run; nothing of ours is kept in it, only what both import.
    """
    request = {
        "arguments": arguments, "env": dict(env), "cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr),
        "source": str(source) if source else None,
    }  # fmt: skip
    server, _ = _fork_server()
    server.sendall(json.dumps(request).encode())
    answer = server.recv(LONGEST_ANSWER)
    assert answer, "the fork server has ended"
    return Forked(int(answer))


@functools.cache
def _fork_server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """This test process's own. It ends with it, when its socket closes."""
    # What the fork server forks twice becomes a child of this process, which can wait for it.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    ours.settimeout(FORK_SECONDS)
    return ours, process


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns its request in a process that was forked, and at the end None in this one."""
    while request := requests.recv(LONGEST_REQUEST):
        read, write = os.pipe()
        middle = os.fork()
        if not middle:
            pid = os.fork()
            if not pid:
                os.close(read)
                os.close(write)
                return dict(json.loads(request))
            os.write(write, str(pid).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(middle, 0)  # now the other is an orphan, and the test process its parent
        requests.sendall(os.read(read, LONGEST_ANSWER))
        os.close(read)
    return None


def _become(
    arguments: list[str], env: Mapping[str, str], cwd: str, stdout: str, stderr: str, source: str | None
) -> None:
    os.setsid()
    os.chdir(cwd)
    for fd, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, fd)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    if source is not None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "presence"]:
            del sys.modules[name]
        sys.path.insert(0, source)


def main() -> None:
    """Load what `presence` needs, and fork for each request."""
    for module in ("cli", "adapters.cassandra", "adapters.http_directory", "adapters.kafka"):
        __import__(f"presence.{module}")
    gc.collect()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = _serve(requests)
    if request:
        _become(**request)
        runpy.run_module("presence", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
