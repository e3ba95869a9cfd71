"""Clients under orders: where they are, and how they are told what to do.

Each is driven by a small program around the unmodified library. It reads orders, one a line, as JSON,
``{"client": name, "do": verb, …}``, and writes what its clients see, ``{"client": name, "saw": what, …}``. Those of the
client matrix (`drivers/`, `java/`) know the orders

- ``connect`` with ``url`` and ``token``; the name may be used again after the connection was lost,
- ``watch`` with ``users``, also anew whenever it has come back,
- ``beat`` and ``leave``,

and tell of ``connected``, ``message`` with what the server says in it, ``refused`` with ``text``, ``closed``, ``left``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support import versions
from tests.support.server import ROOT

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
Sight = dict[str, Any]


class Clients:
    """The clients that one process drives."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.sights: list[Sight] = []
        """All that the clients saw, in order."""
        self._taken: list[Sight] = []

    async def do(self, client: str, verb: str, **more: Any) -> None:
        """Have ``client`` do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"client": client, "do": verb, **more}).encode() + b"\n")
        await self.process.stdin.drain()

    async def saw(self, client: str, what: str, timeout: float = 5.0, **like: Any) -> Sight:
        """Wait until ``client`` sees something ``like`` this; return the first such that was not returned before."""
        wanted = {"client": client, "saw": what, **like}
        try:
            async with asyncio.timeout(timeout):
                while True:
                    for sight in self.sights:
                        if not any(sight is one for one in self._taken) and wanted.items() <= sight.items():
                            self._taken.append(sight)
                            return sight
                    await self._read()
        except TimeoutError:
            raise AssertionError(f"no {wanted} within {timeout} s; seen: {self.sights}") from None

    async def saw_change(self, client: str, user: str, online: bool, timeout: float = 5.0) -> Sight:
        """Wait for the next message about ``user``, which must be a change to ``online``."""
        sight = await self.saw(client, "message", timeout, userId=user)
        assert (sight["online"], "snapshot" in sight) == (online, False), sight
        return sight

    async def watching(self, client: str, timeout: float = 5.0) -> list[Sight]:
        """Wait until ``client`` has the receipt of what it watches; return the messages that came before."""
        await self.saw(client, "watching", timeout)
        came = [one for one in self.sights if one["client"] == client and one["saw"] == "message"]
        self._taken += came
        return came

    async def _read(self) -> None:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        assert line, f"the driver ended; seen: {self.sights}"
        self.sights.append(json.loads(line))


def node_version() -> str:
    """The version of Node, which has the clients at hand; skips the test without."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("JavaScript clients: there is no Node (18 or newer, with npm)")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < 18:
        pytest.skip(f"JavaScript clients: Node {version} is older than 18")
    if not MODULES.exists():
        pytest.skip("JavaScript clients: not installed; `make test` does it where there is npm")
    return version


def note_modules(*names: str) -> None:
    """Remember that Node and these of its packages took part."""
    versions.note("Node", node_version())
    for name in names:
        versions.note(name, json.loads((MODULES / name / "package.json").read_text())["version"])


def java() -> tuple[str, ...]:
    """The command for Spring's client; skips the test where there is none."""
    if not (shutil.which("java") and (HERE / "java/target/installed").exists()):
        pytest.skip("Spring's client: not installed; `make test` does it where there are Java 17 (JDK) and Maven")
    return (
        "java",
        "-Xshare:auto",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        f"{HERE}/java/target/classes:{HERE}/java/target/lib/*",
        "Driver",
    )


@contextmanager
def chromium() -> Iterator[tuple[str, ...]]:
    """The command for pages in Chromium; skips the test where there is none."""
    node_version()
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("pages: there is no Chromium on PATH")
    about = subprocess.run([browser, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    versions.note("Chromium", about.removeprefix("Chromium ").split()[0])
    with tempfile.TemporaryDirectory(prefix="ps-", dir="/tmp", ignore_cleanup_errors=True) as profile:
        yield ("node", str(HERE / "drivers/chromium.mjs"), browser, profile)


@asynccontextmanager
async def driven(*command: str) -> AsyncIterator[Clients]:
    """Start a driver; end it and all that it started."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    try:
        yield Clients(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # at the end of its orders it ends by itself
        with suppress(TimeoutError):
            await asyncio.wait_for(process.communicate(), 5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@pytest_asyncio.fixture
async def node_clients() -> AsyncIterator[Clients]:
    """Clients of `@stomp/stompjs` under the orders of `stompjs.mjs`, all in one Node process."""
    node_version()
    async with driven("node", str(HERE / "stompjs.mjs")) as clients:
        yield clients
    note_modules("@stomp/stompjs", "sockjs-client")


@pytest_asyncio.fixture
async def pages() -> AsyncIterator[Clients]:
    """Pages in Chromium under the orders of `drivers/chromium.mjs`."""
    with chromium() as command:
        async with driven(*command) as clients:
            yield clients
