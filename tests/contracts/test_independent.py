"""A server that shares nothing with ours, not even the language, holds what the guide says: `server.mjs`."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest
import pytest_asyncio

from tests.contracts.javascript import HERE, node
from tests.support.process import Process, free_port
from tests.support.server import ROOT, SECRET
from tests.support.waiting import wait_until

LEASE = 2
TWO_INSTANCES = {
    "fault-killed",
    "inst-asked-anywhere",
    "inst-changes-reach-all",
    "inst-friends-asked-anywhere",
    "inst-lease-end-reaches-all",
    "inst-one-lapses",
    "inst-online-while-either-lasts",
    "store-last-seen-is-kept",
}
"""The cases of class `guide` that one server cannot meet: the only ones that are not run."""
TARGET = f"""class = "guide"
lease = {LEASE}
[[instances]]
http = "http://127.0.0.1:{{port}}"
[token]
secret = "{SECRET}"
[directory]
loaded = true
"""


async def contracts(*arguments):
    """Run the command; return its exit code and what it printed."""
    command = [sys.executable, "-m", "contracts", *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert not err, err.decode()
    return process.returncode, out.decode()


@pytest_asyncio.fixture
async def target(tmp_path):
    """The target file of an independent server, which runs and has the directory that the cases need."""
    program, port = node("ws"), free_port()
    file, directory = tmp_path / "target.toml", tmp_path / "directory.json"
    file.write_text(TARGET.format(port=port))
    code, fixture = await contracts("directory", "--target", file)
    assert code == 0
    directory.write_text(fixture)
    settings = {"PORT": str(port), "SECRET": SECRET, "LEASE": str(LEASE), "DIRECTORY": str(directory)}
    server = Process()
    try:
        server.spawn([program, str(HERE / "server.mjs")], os.environ | settings)
        await wait_until(
            lambda: "listening" in server.log or not server.running, 10, what="the server to listen", every=0.05
        )
        assert server.running, server.log
        yield file
        assert await server.stop() == 0
        assert server.log.count("\n") == 1, server.log  # it listens; and no fault of its own since
    finally:
        server.close()


@pytest.mark.timeout(180)  # "1 phút trước" takes its minute
async def test_a_server_written_from_the_guide_alone_holds_every_must_of_the_guide(target, tmp_path):
    code, told = await contracts("run", "--target", target, "--class", "guide", "--json", tmp_path / "run.json")
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    of = {name: [one for one in results if one["outcome"] == name] for name in ("passed", "error", "unsupported")}
    assert (code, of["error"], of["unsupported"]) == (0, [], []), told
    sys.stdout.write("".join(f"{one['case']}  {one['title']}\n" for one in of["passed"]))
    not_run = {one["case"] for one in results if one["outcome"] == "not run" and one["class"] == "guide"}
    assert not_run == TWO_INSTANCES, told
    assert {one["class"] for one in of["passed"]} == {"guide"}
