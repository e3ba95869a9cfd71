"""Node and its clients, where they are."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support import versions

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
Sight = dict[str, Any]


class NodeClients:
    """The clients that `stompjs.mjs` drives in one Node process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.sights: list[Sight] = []
        """All that the clients saw, in order; see `stompjs.mjs`."""
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
        assert line, f"Node ended; seen: {self.sights}"
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


@pytest_asyncio.fixture
async def node_clients() -> AsyncIterator[NodeClients]:
    """JavaScript clients under orders, all in one Node process."""
    version = node_version()
    process = await asyncio.create_subprocess_exec(
        "node", str(HERE / "stompjs.mjs"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield NodeClients(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
    versions.note("Node", version)
    for name in ("@stomp/stompjs", "sockjs-client"):
        versions.note(name, json.loads((MODULES / name / "package.json").read_text())["version"])
