"""The whole suite against our server, which passes all of it, and against servers that are none."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import ssl
import sys
from contextlib import asynccontextmanager

import pytest

from contracts import runner
from contracts.cases import fixture, load_cases
from contracts.clauses import load_clauses
from contracts.faults import TargetUnusable
from contracts.model import Class, Outcome
from contracts.target import HOOKS, Instance, Target, load_target
from tests.contracts import verified
from tests.contracts.far import far
from tests.support.process import Process, free_port
from tests.support.server import ROOT, SECRET, ServerProcess, running
from tests.support.tls_store import certify
from tests.support.waiting import wait_until

# Our server.


@pytest.mark.timeout(400)
async def test_our_server_passes_every_case(tmp_path, capfd):
    code = await verified.main(["--patient", "--strict", "--json", str(tmp_path / "run.json")])
    told = capfd.readouterr().out
    assert code in {0, 1}, told
    for policy, name in (("anyone", "run.json"), ("contacts", "run-contacts.json")):
        ran = json.loads((tmp_path / name).read_text())
        keys = ("case", "step", "expected", "actual", "reason")
        wrong = [[one[key] for key in keys] for one in ran["results"] if one["outcome"] not in {"passed", "not run"}]
        assert wrong == [], told
        assert ran["verdict"]["word"] == "PASS"
        passed = {one["case"] for one in ran["results"] if one["outcome"] == "passed"}
        assert passed == {case.id for case in verified.cases_of(policy)}
    assert code == 0


def test_with_the_two_policies_no_case_is_left_out():
    of = {policy: {case.id for case in verified.cases_of(policy)} for policy in verified.POLICIES}
    assert of["anyone"] | of["contacts"] == {case.id for case in load_cases(load_clauses())}


LIMITS = {"rest-too-many-ids", "stomp-limit-ids-user"}
"""A limit on ids refills while requests go one by one."""
LEASES = {"rest-batch-by-id", "sess-online-true", "sess-reload-is-no-news", "sess-true-after-false", "stomp-ack"}
"""A lease ends while requests go one by one."""


@pytest.mark.parametrize(("names", "lease"), [(LIMITS, 10), (LEASES, 2)], ids=["limits", "leases"])
async def test_a_server_that_is_far_away_passes(names, lease):
    clauses = load_clauses()
    cases = [case for case in load_cases(clauses) if case.id in names]
    async with running(lease_seconds=lease) as server, far(server.port, 0.1) as port:
        instance = Instance(f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}")
        target = Target("far", Class.FULL, [instance], lease=float(lease), slack=1.0, secret=SECRET)
        results = (await runner.run(target, cases, clauses)).results
    told = {one.case.id: (one.outcome, one.step, one.expected, one.actual) for one in results}
    assert told == {case.id: (Outcome.PASSED, None, None, None) for case in cases}


async def test_a_server_in_tls_is_verified_by_the_authority_that_the_target_names(tmp_path):
    certify(tmp_path / "ca.crt", tmp_path / "server.crt", tmp_path / "server.key")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    clauses = load_clauses()
    file = tmp_path / "target.toml"

    async def ran(port: int, ca: str) -> list[Outcome]:
        instances = f'{ca}\n[[instances]]\nhttp = "https://127.0.0.1:{port}"'
        file.write_text(
            verified.TARGET.format(
                lease=10, slack=1, policy="anyone", secret=SECRET, claims="{}", hooks="", instances=instances
            )
        )
        found = await runner.run(load_target(file), load_cases(clauses), clauses, only=["watch-both-edges"])
        return [one.outcome for one in found.results if one.outcome is not Outcome.NOT_RUN]

    async with running() as server, far(server.port, tls=tls) as port:
        assert await ran(port, 'ca = "ca.crt"') == [Outcome.PASSED]
        with pytest.raises(TargetUnusable, match=r"its certificate is not trusted: .*; see ca in the target file"):
            await ran(port, "")


# Servers that accept, and answer nothing.


async def silent(reader, writer):
    """Take whatever comes."""
    while await reader.read(65_536):
        pass


async def upgrading(reader, writer):
    """Answer the upgrade as RFC 6455 says; all else is as `silent`."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    key = re.search(r"(?im)^sec-websocket-key: (\S+)", head)
    if key:
        accept = hashlib.sha1(f"{key[1]}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        lines.append(f"Sec-WebSocket-Accept: {base64.b64encode(accept).decode()}")
        offered = re.search(r"(?im)^sec-websocket-protocol: ([^,\r]+)", head)
        if offered:
            lines.append(f"Sec-WebSocket-Protocol: {offered[1]}")
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    await silent(reader, writer)


@asynccontextmanager
async def listening(handler):
    """The port of a server that does with each connection what the handler does."""
    at_work: list[asyncio.Task[None]] = []

    async def handle(reader, writer):
        if task := asyncio.current_task():
            at_work.append(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await handler(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(handle, "127.0.0.1", free_port(), backlog=2_000) as server:
        yield server.sockets[0].getsockname()[1]
    for task in at_work:
        task.cancel()
    await asyncio.gather(*at_work)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("handler", [silent, upgrading])
async def test_no_case_passes_a_server_that_accepts_and_answers_nothing(handler):
    clauses = load_clauses()
    # All at once, whatever they need: nothing can disturb them.
    cases = [dataclasses.replace(case, policy="any", alone=False) for case in load_cases(clauses)]
    async with listening(handler) as port:
        target = Target(
            "nothing",
            Class.FULL,
            [Instance(f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}")] * 2,
            lease=1.0,
            slack=0.0,
            parallel=len(cases),
            secret=SECRET,
            claims=verified.CLAIMS,
            directory_loaded=True,
            hooks={name: ["true"] for name in HOOKS},
        )
        results = (await runner.run(target, cases, clauses, patient=True, probe=False)).results
    assert {one.case.id: one.reason for one in results if one.outcome is not Outcome.FAILED} == {}


# What is no presence server for us, by the command: exit code 2, and one line.


async def complaint(tmp_path, port):
    """What the command says of a server on this port."""
    target = tmp_path / "target.toml"
    text = verified.TARGET.format(
        lease=2,
        slack=1,
        policy="anyone",
        secret=SECRET,
        claims="{}",
        hooks="",
        instances=f'[[instances]]\nhttp = "http://127.0.0.1:{port}"',
    )
    target.write_text(text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "contracts", "run", "--target", str(target)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    (line,) = err.decode().splitlines()
    return line.removeprefix("presence-contracts: ")


async def test_a_server_that_is_down_cannot_be_reached(tmp_path):
    port = free_port()
    said = await complaint(tmp_path, port)
    assert said.startswith("the server cannot be reached: ")
    assert str(port) in said


async def test_a_plain_web_server_is_no_presence_server(tmp_path):
    server, port = Process(), free_port()
    try:
        server.spawn([sys.executable, "-u", "-m", "http.server", str(port), "--bind", "127.0.0.1"])
        await wait_until(lambda: "Serving HTTP" in server.log, 10, what="http.server to listen")
        assert (await complaint(tmp_path, port)).startswith("no presence server: 404 for GET ")
    finally:
        server.close()


async def test_a_server_with_another_secret_refuses_the_token(tmp_path):
    async with running(jwt_secret="another secret, of 32 bytes and more") as server:
        said = await complaint(tmp_path, server.port)
    assert said.startswith("the token is refused: 401 for GET ")
    assert "[token]" in said


@pytest.mark.parametrize("lacks", [(), ("friends",)], ids=["friends", "conversations"])
async def test_a_directory_that_is_not_loaded_or_of_another_suite_is_told_before_the_run(tmp_path, lacks):
    clauses = load_clauses()
    cases = load_cases(clauses)
    chosen = ["rest-friends", "rest-conversation"]

    async def ran(server: ServerProcess) -> list[Outcome]:
        instance = Instance(server.http, f"ws://127.0.0.1:{server.port}")
        target = Target(
            "t", Class.GUIDE, [instance], secret=SECRET, directory_loaded=True, unsupported=frozenset(lacks)
        )
        found = await runner.run(target, cases, clauses, only=chosen)
        return [one.outcome for one in found.results if one.outcome not in {Outcome.NOT_RUN, Outcome.UNSUPPORTED}]

    async with running() as server:

        async def load(directory: dict[str, dict[str, list[str]]]) -> None:
            server.directory_file.write_text(json.dumps(directory))
            await server.stop()
            await server.start().ready()

        unloaded = pytest.raises(TargetUnusable, match=r"^directory: that of this suite is not loaded: ")
        with unloaded:
            await ran(server)
        await load(fixture([case for case in cases if case.id != "rest-friends"]))
        with unloaded:
            await ran(server)
        await load(fixture(cases))
        assert await ran(server) == [Outcome.PASSED] * (2 - len(lacks))


@pytest.mark.parametrize("handler", [silent, upgrading])
async def test_a_server_that_answers_nothing_is_no_presence_server(tmp_path, handler):
    async with listening(handler) as port:
        assert (await complaint(tmp_path, port)).startswith("no presence server at ")
