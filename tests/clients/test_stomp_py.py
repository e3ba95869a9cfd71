"""stomp.py's WebSocket adapter, unmodified, through all that a presence client does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest_asyncio
from stomp import ConnectionListener, WSStompConnection
from stomp.utils import Frame

from tests.support import versions
from tests.support.server import ServerProcess

LEASE = 2
SLACK = 2
"""Room for a loaded machine, s."""


class Client(ConnectionListener):
    """One connection, and what its listener was told: (what, headers, body)."""

    def __init__(self, server: ServerProcess, user: str, heartbeats: tuple[int, int] = (0, 0)) -> None:
        self.server, self.user = server, user
        self.told: queue.Queue[tuple[str, dict[str, str], str]] = queue.Queue()
        address = [("127.0.0.1", server.port)]
        self.connection = WSStompConnection(address, ws_path="/ws", heartbeats=heartbeats)
        self.connection.set_listener("", self)

    async def connect(self) -> dict[str, str]:
        """Log in; return the headers of CONNECTED."""
        token = self.server.token(self.user)
        await asyncio.to_thread(self.connection.connect, headers={"Authorization": f"Bearer {token}"})
        headers, _ = await self.saw("connected")
        return headers

    async def watch(self, user: str) -> dict[str, Any]:
        """Subscribe and watch, as an application does; return what it was told last of ``user`` before the receipt."""
        await asyncio.to_thread(self.connection.subscribe, "/user/queue/online-status", id="sub-0")
        await self.send("/app/presence.subscribe", json.dumps({"userIds": [user]}), receipt="watching")
        last: dict[str, Any] = {}
        while True:
            told, headers, body = await self.next()
            if told == "receipt":
                return last
            assert told == "message", (told, headers, body)
            last = json.loads(body)

    async def send(self, destination: str, body: str = "", **headers: str) -> None:
        await asyncio.to_thread(self.connection.send, destination, body, **headers)

    async def leave(self) -> None:
        """DISCONNECT; the library drops the connection once it has the receipt."""
        await asyncio.to_thread(self.connection.disconnect, receipt="bye")

    async def next(self, timeout: float = 5.0) -> tuple[str, dict[str, str], str]:
        """Wait for the next thing told, heart-beats left out."""
        try:
            return await asyncio.to_thread(self.told.get, timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"nothing told within {timeout} s") from None

    async def saw(self, what: str, timeout: float = 5.0) -> tuple[dict[str, str], str]:
        """Wait for the next thing told, which must be ``what``."""
        told, headers, body = await self.next(timeout)
        assert told == what, (told, headers, body)
        return headers, body

    async def saw_change(self, user: str, online: bool, timeout: float = 5.0) -> dict[str, Any]:
        """Wait for the next thing told, which must be a change of ``user`` to ``online``."""
        _, body = await self.saw("message", timeout)
        event: dict[str, Any] = json.loads(body)
        assert (event["userId"], event["online"], "snapshot" in event) == (user, online, False)
        return event

    def on_connected(self, frame: Frame) -> None:
        self.told.put(("connected", frame.headers, frame.body))

    def on_message(self, frame: Frame) -> None:
        self.told.put(("message", frame.headers, frame.body))

    def on_error(self, frame: Frame) -> None:
        self.told.put(("error", frame.headers, frame.body))

    def on_receipt(self, frame: Frame) -> None:
        self.told.put(("receipt", frame.headers, frame.body))

    def on_disconnected(self) -> None:
        self.told.put(("disconnected", {}, ""))


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Callable[..., Client]]:
    """Makes clients of stomp.py: ``client(server, user)``."""
    clients: list[Client] = []

    def make(*arguments: Any, **options: Any) -> Client:
        clients.append(Client(*arguments, **options))
        return clients[-1]

    yield make
    versions.note_package("stomp.py")
    for one in clients:
        with contextlib.suppress(Exception):
            await one.leave()


async def test_it_is_told_of_both_edges_of_whom_it_watches(server, client, users):
    """WIRE §5: "Every change of a watched user reaches every session that watches it"."""
    alice, bob = client(server, users("alice")), client(server, users("bob"))
    connected = await alice.connect()
    assert connected["version"] == "1.2"
    assert connected["user-name"] == alice.user
    snapshot = await alice.watch(bob.user)
    assert (snapshot["userId"], snapshot["online"], snapshot["snapshot"]) == (bob.user, False, True)
    await bob.connect()
    online = await alice.saw_change(bob.user, True)
    await bob.leave()
    offline = await alice.saw_change(bob.user, False)
    assert offline["version"] > online["version"]


async def test_it_leaves_cleanly(server, client, user):
    """WIRE §6: "DISCONNECT with receipt: RECEIPT, then the client closes"; it drops the TCP connection."""
    leaver = client(server, user)
    await leaver.connect()
    await server.wait_online(user)
    await leaver.leave()
    # With the receipt in its hands it first drops the connection, then tells of both.
    await leaver.saw("disconnected")
    headers, _ = await leaver.saw("receipt")
    assert headers["receipt-id"] == "bye"
    await server.wait_online(user, False)


async def test_beating_it_stays_online_and_silent_it_does_not(server, client, users):
    """WIRE §4: SEND `/app/heartbeat`: "lease = L from now"; "L without a heartbeat": "ended within 250 ms"."""
    alice, bob = client(server, users("alice")), client(server, users("bob"))
    await alice.connect()
    await alice.watch(bob.user)
    await bob.connect()
    await alice.saw_change(bob.user, True)
    for _ in range(2 * 2 * LEASE):
        await bob.send("/app/heartbeat")
        await asyncio.sleep(0.5)  # the pace of the beats, not a wait: they go on for two leases
    assert alice.told.empty()
    await alice.saw_change(bob.user, False, LEASE + SLACK)
    assert bob.told.empty()


async def test_it_comes_back_after_a_planned_stop(start_server, client, users):
    """WIRE §4, planned server stop: "close 1001, no ERROR frame"."""
    server = await start_server()
    alice, bob = client(server, users("alice")), client(server, users("bob"))
    await bob.connect()
    await alice.connect()
    assert (await alice.watch(bob.user))["online"] is True
    assert await server.stop() == 0
    await alice.saw("disconnected")
    await bob.saw("disconnected")
    await server.start().ready()
    await bob.connect()
    await alice.connect()
    assert (await alice.watch(bob.user))["online"] is True


async def test_heart_beats_keep_it_connected_both_ways(start_server, client, user):
    """WIRE §3: "Any STOMP byte counts"; the library gives up after 1.5 intervals without one of the server's beats."""
    server = await start_server(beat_seconds=0.5, silence_seconds=1)
    steady = client(server, user, heartbeats=(500, 500))
    connected = await steady.connect()
    assert connected["heart-beat"] == "500,500"
    await asyncio.sleep(4)  # several times what either side tolerates
    assert steady.told.empty()
    await steady.leave()
    await steady.saw("disconnected")
    await steady.saw("receipt")


async def test_a_refused_token_is_told_in_an_error(server, client, user):
    """WIRE §6: "1008: content and limits: token"."""
    stranger = client(server, user)
    await asyncio.to_thread(stranger.connection.connect, headers={"Authorization": "Bearer none"})
    headers, _ = await stranger.saw("error")
    assert "token" in headers["message"]
    await stranger.saw("disconnected")
