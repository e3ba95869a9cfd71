"""`PresenceManager`, the frontend class: its rules on clients that are played, and all of it on real ones."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.clients.conftest import HERE, Clients, driven, node_version, note_modules
from tests.support.server import ROOT, ServerProcess

FOLDER = ROOT / "presence/server/static/presence-manager"
TOLD = 10.0
"""Time limit for what is told at once, s."""


def node(*arguments: str, timeout: float = 45) -> str:
    """Run Node to its end, which must be a good one; return what it said."""
    node_version()
    done = subprocess.run(["node", *arguments], check=False, capture_output=True, text=True, cwd=HERE, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_rules_hold_on_clients_that_are_played():
    """The tests in `presence-manager.test.mjs`, each with a sentence for a name; all of them were run."""
    said = node("--test", "--test-reporter=tap", "presence-manager.test.mjs")
    written = re.findall(r"^ {0,2}test\(", (HERE / "presence-manager.test.mjs").read_text(), re.MULTILINE)
    counts = {name: int(count) for name, count in re.findall(r"^# (tests|pass|skipped|todo) (\d+)", said, re.MULTILINE)}
    assert counts["pass"] == counts["tests"] >= len(written) > 0, said


def test_its_types_are_strict_and_fit_the_real_client():
    """Issue, point 1: "TypeScript types beside it"."""
    options = (
        "--strict",
        "--noEmit",
        "--target",
        "es2022",
        "--module",
        "nodenext",
        "--lib",
        "es2022,dom",
        "--types",
        "",
    )
    node("node_modules/typescript/bin/tsc", *options, "presence-manager.types.ts")


def test_it_is_a_package_without_dependencies_that_holds_all_it_needs():
    """It is installed from its folder with npm (package.json of these tests): what it exports is there."""
    node("--input-type=module", "-e", "import { PresenceManager } from 'presence-manager'; new PresenceManager({});")
    listed = subprocess.run(
        ["npm", "pack", "--dry-run", "--json", str(FOLDER)],
        check=False,
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=45,
    )
    assert listed.returncode == 0, listed.stderr
    packed = set(re.findall(r'"path": "(.+)"', listed.stdout))
    assert packed == {"package.json", "presence-manager.js", "presence-manager.d.ts"}
    assert "dependencies" not in (FOLDER / "package.json").read_text().lower()


def test_its_beats_keep_no_process_alive():
    """In Node the timer is unref'ed: a program whose work is done ends."""
    node(
        "--input-type=module",
        "-e",
        """
        import { PresenceManager } from "presence-manager";
        const client = { send() {}, subscribe: () => ({ unsubscribe() {} }) };
        new PresenceManager(client, { heartbeatInterval: 10 }).start();
        """,
        timeout=20,
    )


async def test_the_server_serves_it(server):
    """Issue, point 1: "served by the server": as JavaScript, or browsers do not load it as a module."""
    answer = await server.get("/static/presence-manager/presence-manager.js")
    assert answer.status == 200
    content_type = answer.headers["content-type"].partition(";")[0]
    assert content_type in ("text/javascript", "application/javascript")
    assert answer.body == (FOLDER / "presence-manager.js").read_bytes()


# On real clients.


@pytest.fixture(params=["stompjs", "stompjs-2"])
def library(request) -> str:
    return str(request.param)


@pytest_asyncio.fixture
async def managers(library: str) -> AsyncIterator[Clients]:
    """Managers on real clients, all in one Node process."""
    node_version()
    async with driven("node", str(HERE / "drivers/manager.mjs"), library) as clients:
        yield clients
    note_modules("@stomp/stompjs" if library == "stompjs" else "stompjs")


async def start(managers: Clients, server: ServerProcess, user: str, watch: list[str], **options: object) -> None:
    """Connect ``user`` and have the manager watch."""
    await managers.do(user, "connect", **{"url": server.ws, "token": server.token(user)} | options)
    await managers.do(user, "subscribeToUsers", given=[watch])
    await managers.saw(user, "connected", TOLD)


async def test_it_tells_of_both_edges_and_stops(server, managers, users):
    """Guide, "Frontend Integration"."""
    alice, bob = users("alice"), users("bob")
    await start(managers, server, alice, [bob])
    await managers.saw(alice, "change", TOLD, userId=bob, online=False, snapshot=True)
    await start(managers, server, bob, [])
    await managers.saw(alice, "change", TOLD, userId=bob, online=True, snapshot=False)
    await managers.do(bob, "stop")
    await managers.saw(alice, "change", TOLD, userId=bob, online=False, snapshot=False)
    await managers.do(bob, "start")
    await managers.saw(alice, "change", TOLD, userId=bob, online=True, snapshot=False)


async def test_it_beats(server, managers, connect, users):
    """WIRE §4: SEND `/app/heartbeat`: "lease = L from now", which is 2 s here."""
    alice, bob = await connect(server, users("alice")), users("bob")
    await start(managers, server, bob, [], beat=400)
    await server.wait_online(bob)
    await alice.subscribe()
    await alice.watch([bob])
    await alice.expect_nothing(4, bob)


async def test_through_a_restart_it_never_tells_what_is_not_so(start_server, managers, users):
    """WIRE §5: "Watches last as long as the connection"; unknown in between, and then as it is."""
    alice, bob, carol = users("alice"), users("bob"), users("carol")
    server = await start_server(lease_seconds=60)
    await start(managers, server, bob, [])
    await start(managers, server, alice, [bob, carol])
    for user, online in ((bob, True), (carol, False)):
        await managers.saw(alice, "change", TOLD, userId=user, online=online)
    assert await server.stop() == 0
    for user in (bob, carol):
        await managers.saw(alice, "change", TOLD, userId=user, online=None)
    await server.start().ready()
    for user, online in ((bob, True), (carol, False)):
        await managers.saw(alice, "change", 2 * TOLD, userId=user, online=online, snapshot=True)
    told = [one["online"] for one in managers.sights if one["client"] == alice and one.get("userId") == bob]
    assert told == [True, None, True]


async def test_a_list_that_is_refused_costs_one_connection_only(start_server, managers, users):
    """WIRE §6: "`receipt-id` when the bad frame asked for a receipt"; then the server closes."""
    alice, bob = users("alice"), users("bob")
    server = await start_server(max_watches=2)
    await start(managers, server, alice, [bob])
    await managers.saw(alice, "change", TOLD, userId=bob, online=False)
    await managers.do(alice, "subscribeToUsers", given=[["carol", "dave"]])
    refused = await managers.saw(alice, "refused", TOLD)
    assert refused["userIds"] == ["carol", "dave"] and "more than 2 users watched" in refused["reason"]
    await managers.saw(alice, "change", TOLD, userId=bob, online=None)
    await managers.saw(alice, "connected", TOLD)
    await managers.saw(alice, "change", TOLD, userId=bob, online=False)
    assert len([one for one in managers.sights if one["saw"] == "error"]) == 1


async def test_it_watches_thousands(server, managers, users):
    """WIRE §5: "at most 1,000 ids in one frame"; §6: "frame 64 KiB". Short ids meet the one, long the other."""
    alice, bob = users("alice"), users("bob")
    short = [users("x") for _ in range(1_500)]
    await start(managers, server, alice, [*short, *(user.ljust(128, "x") for user in short), bob])
    await managers.saw(alice, "change", 2 * TOLD, userId=bob, online=False)
    assert not [one for one in managers.sights if one["saw"] in ("error", "refused", "closed")]


async def test_a_renewed_token_keeps_the_connection(server, managers, users):
    """WIRE §1: "an `Authorization` header on SEND `/app/heartbeat`, same `sub`, extends the connection's life"."""
    renewing, ending = users("renewing"), users("ending")
    tokens = {name: server.token(name, ttl=-7) for name in (renewing, ending)}  # of the leeway 3 s are left
    await start(managers, server, ending, [], token=tokens[ending])
    await start(managers, server, renewing, [], token=tokens[renewing], fresh=server.token(renewing))
    assert "token expired" in (await managers.saw(ending, "error", TOLD))["text"]
    await asyncio.sleep(1)  # not waited for: the other's would end at the same time
    assert not [one for one in managers.sights if one["client"] == renewing and one["saw"] in ("error", "closed")]
