"""The client matrix: unmodified clients of STOMP and SockJS, each through all that a presence client does.

`docs/clients.md` shows it as a table, which `test_the_table_says_what_is_tested` compares with what is here.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.clients.conftest import HERE, Clients, chromium, driven, java, node_version, note_modules
from tests.support import versions
from tests.support.server import ROOT, ServerProcess, running
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLD = 10.0
"""Time limit for what is told at once, s; a Java client or a browser under load starts slowly. Less than the grace."""


@dataclass(frozen=True)
class Kind:
    """One row of the matrix."""

    id: str
    driver: str
    """`node LIBRARY`, `chromium`, `java`, or a script in Python."""
    package: str
    """Whose version is told; for JavaScript and Python the name in the registry."""
    transport: str
    reconnects: bool
    """By itself; else its user connects anew."""
    reason: bool = True
    """Its user is told why a token is refused; else only that there is no connection."""
    modules: tuple[str, ...] = ()
    """Further packages of JavaScript that take part."""

    @property
    def version(self) -> str:
        """As pinned in this repository."""
        if self.driver == "java":
            found = re.search(r"<spring.version>(.+)</", (HERE / "java/pom.xml").read_text())
            assert found
            return found[1]
        if self.driver.endswith(".py"):
            return importlib.metadata.version(self.package)
        lock = json.loads((HERE / "package-lock.json").read_text())
        version = lock["packages"][f"node_modules/{self.package}"]["version"]
        assert isinstance(version, str)
        return version


KINDS = (
    Kind("stompjs-node", "node stompjs", "@stomp/stompjs", "WebSocket (ws, in Node)", True, modules=("ws",)),
    Kind("stompjs-chromium", "chromium", "@stomp/stompjs", "WebSocket, in Chromium", True),
    Kind("rx-stomp", "node rx-stomp", "@stomp/rx-stomp", "WebSocket", True, modules=("rxjs", "@stomp/stompjs")),
    Kind("stompjs-2", "node stompjs-2", "stompjs", "WebSocket (its `overWS`)", False, modules=("websocket",)),
    Kind("webstomp", "node webstomp", "webstomp-client", "WebSocket", False),
    Kind("sockjs", "node sockjs", "sockjs-client", "SockJS, stompjs 7 on top", True, modules=("@stomp/stompjs",)),
    Kind("stomp.py", "stomp_py.py", "stomp.py", "WebSocket (`WSStompConnection`)", False),
    Kind("stompman", "stompman_ws.py", "stompman", "WebSocket (`WebSocketConnection`)", True, reason=False),
    Kind("spring", "java", "spring-websocket", "WebSocket (`WebSocketStompClient`)", False),
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.id)
def kind(request) -> Kind:
    assert isinstance(request.param, Kind)
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients(kind: Kind) -> AsyncIterator[Clients]:
    """Clients of one kind, all in one process, for all tests of that kind: each has its own users."""
    with ExitStack() as stack:
        if kind.driver == "java":
            command = java()
        elif kind.driver == "chromium":
            command = stack.enter_context(chromium())
        elif kind.driver.endswith(".py"):
            command = (sys.executable, "-m", f"tests.clients.drivers.{kind.driver.removesuffix('.py')}")
        else:
            node_version()
            command = ("node", str(HERE / "drivers/node.mjs"), kind.driver.removeprefix("node "))
        async with driven(*command) as driver:
            yield driver
    if kind.driver == "java":
        versions.note("Spring", kind.version)
    elif kind.driver.endswith(".py"):
        versions.note_package(kind.package)
    else:
        note_modules(kind.package, *kind.modules)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[ServerProcess]:
    """Leases and grace outlast a test: a session that is over at once was ended by its client's word."""
    async with running(lease_seconds=60, grace_seconds=40) as process:
        yield process


async def connect(clients: Clients, server: ServerProcess, *names: str) -> None:
    for name in names:
        await clients.do(name, "connect", url=server.ws, token=server.token(name))
    for name in names:
        await clients.saw(name, "connected", TOLD)


async def watch(clients: Clients, watcher: str, user: str) -> bool:
    """Have ``watcher`` watch; return what the snapshot says."""
    await clients.do(watcher, "watch", users=[user])
    snapshot = await clients.saw(watcher, "message", TOLD, userId=user, snapshot=True)
    return bool(snapshot["online"])


async def test_it_connects_watches_and_is_told_of_both_edges(clients, server, users):
    """WIRE §5: "Every change of a watched user reaches every session that watches it"."""
    alice, bob = users("alice"), users("bob")
    await connect(clients, server, alice)
    await server.wait_online(alice)
    assert await watch(clients, alice, bob) is False
    await connect(clients, server, bob)
    online = await clients.saw_change(alice, bob, True, TOLD)
    await clients.do(bob, "leave")
    offline = await clients.saw_change(alice, bob, False, TOLD)
    assert offline["version"] > online["version"]


async def test_its_beats_renew_the_lease(clients, server, user):
    """WIRE §4: SEND `/app/heartbeat`: "lease = L from now"."""
    await connect(clients, server, user)
    store = server.redis()
    (session,) = store.zrange(f"presence:user:{user}:sessions", 0, -1)
    key = f"presence:user:{user}:sessions"
    before = store.zscore(key, session)
    await clients.do(user, "beat")
    await wait_until(lambda: store.zscore(key, session) > before, TOLD, what="the lease to begin anew")


async def test_it_leaves_cleanly(clients, server, user):
    """WIRE §4: DISCONNECT: "ended at once"; a connection that is merely lost would keep its session for the grace."""
    await connect(clients, server, user)
    await server.wait_online(user)
    await clients.do(user, "leave")
    await server.wait_online(user, False, TOLD)
    await clients.saw(user, "left", TOLD)


async def test_a_bad_token_is_refused_in_a_way_its_user_sees(clients, server, user, kind):
    """WIRE §6: "ERROR frame: `message` (one line, names the field or destination)"."""
    await clients.do(user, "connect", url=server.ws, token="none")
    refused = await clients.saw(user, "refused", TOLD)
    assert ("Authorization" in refused["text"]) is kind.reason, refused
    assert not await server.is_online(user)


async def test_it_comes_back_after_a_planned_stop(clients, start_server, users, kind):
    """WIRE §4, planned server stop: "all its leases become min(rest, max(drain, grace))": no change for who is back."""
    alice, bob = users("alice"), users("bob")
    server = await start_server(lease_seconds=60)
    await connect(clients, server, alice, bob)
    assert await watch(clients, alice, bob) is True
    assert await server.stop() == 0
    for name in (alice, bob):
        await clients.saw(name, "closed", TOLD)
    await server.start().ready()
    if not kind.reconnects:
        assert not [one for one in clients.sights if one["saw"] == "connected" and one["client"] == alice][1:]
        for name in (alice, bob):
            await clients.do(name, "connect", url=server.ws, token=server.token(name))
    for name in (alice, bob):
        await clients.saw(name, "connected", 2 * TOLD)
    again = await clients.saw(alice, "message", TOLD, userId=bob)
    assert (again["online"], again.get("snapshot")) == (True, True)
    assert server.redis().xlen("presence:changes") == 2  # the two came online, once
    for name in (alice, bob):
        await clients.do(name, "leave")
        await clients.saw(name, "left", TOLD)


# The page.


def table() -> str:
    """The matrix, as `docs/clients.md` shows it; the tests above fill the columns."""
    head = ("client", "version", "transport", "connects, watches, both edges", "beats", "leaves cleanly")
    lines = [(*head, "bad token", "back after a planned stop"), ("---",) * 8]
    for kind in KINDS:
        refused = "told why" if kind.reason else "told that it failed"
        back = "by itself" if kind.reconnects else "its user reconnects"
        name = f"`{kind.id}`: {kind.package}"
        lines.append((name, kind.version, kind.transport, "yes", "yes", "yes", refused, back))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


async def test_the_table_says_what_is_tested():
    """Issue, "It must show" 1: the client matrix as a table in `docs/clients.md`, each cell from a test that runs."""
    page = (ROOT / "docs/clients.md").read_text()
    assert table() in page, f"docs/clients.md is to have this table:\n\n{table()}"
