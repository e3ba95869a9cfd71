"""README's walk, run as printed, against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.support.server import ROOT, environment

WALK = re.compile(r"^## A walk.*?(?=^## )", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def walk() -> list[str]:
    """The shell commands of the walk, but for those that start another server or need redis-cli."""
    found = WALK.search((ROOT / "README.md").read_text())
    assert found
    return [block for block in BLOCK.findall(found[0]) if "make run" not in block and "redis-cli" not in block]


@pytest.mark.timeout(180)
@pytest.mark.skipif(shutil.which("npm") is None, reason="no Node with npm, so the walk's JavaScript client cannot run")
async def test_the_walk_works_as_printed(start_server: StartServer, tmp_path: Path) -> None:
    """README, "A walk through everything it does": only the address and the place of the command differ."""
    server = await start_server(jwt_secret=None, directory=None, lease_seconds=None)
    script = "set -eu\n" + "\n".join(walk()) + "\nkill %1\n"
    script = script.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
    script = script.replace('("127.0.0.1", 8080)', f'("127.0.0.1", {server.port})')
    script = script.replace(".venv/bin/presence", f"{sys.executable} -m presence").replace(
        "python3 -m venv", f"{sys.executable} -m venv"
    )
    assert "8080" not in script
    env = environment(server.settings)
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, cwd=tmp_path, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 150)
    text = out.decode()
    assert process.returncode == 0, text
    told = re.findall(r"bob is (?:now )?\w+", text)
    assert told == [
        "bob is offline",
        "bob is now online",
        "bob is now offline",
        "bob is now online",
        "bob is now offline",
    ], text
    answers = [json.loads(answer) for answer in re.findall(r"\{.*?\}(?=\{|\n|bob is|$)", text.replace("}}{", "}}\n{"))]
    assert [set(answers[0]), set(answers[3])] == [{"bob", "carol", "dave"}, {"bob", "carol"}]
    assert answers[2] == {"isOnline": False}
    first, last = answers[0]["bob"], answers[-1]["bob"]
    assert (first["status"], first["lastSeen"]) == ("OFFLINE", None)
    assert last["lastSeen"] is not None and last["lastActiveAgo"] == "just now"
