"""The endpoint between a server and a store of the test's own: what is queued, packed, bounded, and left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any, cast

import pytest
import pytest_asyncio

from presence import stomp
from presence.core.model import Status
from presence.ports import Directory, DirectoryUnavailable, StoreUnavailable, TooManyConnections
from presence.server import websocket
from presence.server.auth import TokenVerifier, make_token
from presence.server.budget import IdBudget
from presence.server.origins import Origins
from presence.server.websocket import OUT_LIMIT, PACK_BYTES, Endpoint, EndpointLimits
from presence.service import Rules
from tests.support.recording import recording
from tests.support.stomp_client import QUEUE, Frame, decode, encode
from tests.support.stub_store import StubStore, service_on, tell
from tests.support.turns import counted_turns
from tests.support.waiting import wait_until

SECRET = b"a secret of the tests, of 32 bytes and more"
MANY = stomp.Limits(frames_per_second=1e6, frames_burst=1_000_000)
Message = MutableMapping[str, Any]


class Peer:
    """One WebSocket as an ASGI server hands it to the endpoint."""

    def __init__(self, endpoint: Endpoint, path: str = "/ws", headers: dict[str, str] | None = None) -> None:
        self.sent: list[Message] = []
        """All that the endpoint sent."""
        self.taking = asyncio.Event()
        """While it is not set, nothing that is sent gets through."""
        self.taking.set()
        self.incoming: asyncio.Queue[Message] = asyncio.Queue(10)
        self.taken = 0
        """How many messages the endpoint took."""
        self.scope: Message = {
            "type": "websocket",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
            "subprotocols": ["v12.stomp"],
        }
        self.incoming.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.create_task(endpoint(self.scope, self._receive, self._send))

    async def _receive(self) -> Message:
        message = await self.incoming.get()
        self.taken += 1
        return message

    async def _send(self, message: Message) -> None:
        await self.taking.wait()
        self.sent.append(message)

    async def put(self, *frames: str) -> None:
        """Send these frames in one message, as soon as there is room."""
        await self.incoming.put({"type": "websocket.receive", "bytes": None, "text": "".join(frames)})

    def leave(self) -> None:
        """End the connection, as a server reports it."""
        self.incoming.put_nowait({"type": "websocket.disconnect", "code": 1006})

    @property
    def texts(self) -> list[str]:
        """The texts that were sent."""
        return [message["text"] for message in self.sent if message["type"] == "websocket.send"]

    @property
    def frames(self) -> list[Frame]:
        """The frames that were sent."""
        return [frame for text in self.texts if text != "\n" for frame in decode(text)]

    async def receipt(self, name: str) -> None:
        """Wait for a receipt."""
        await wait_until(lambda: any(f.headers.get("receipt-id") == name for f in self.frames), what=f"receipt {name}")

    async def closed(self) -> int:
        """Wait for the close; return its code."""
        last = await wait_until(
            lambda: next((one for one in self.sent if one["type"] == "websocket.close"), None), what="the close"
        )
        assert self.sent[-1] is last
        return int(last["code"])

    async def ended(self, timeout: float = 5.0) -> None:
        """Wait until the endpoint is through with it."""
        await asyncio.wait_for(asyncio.shield(self.task), timeout)


class Stage:
    """An endpoint, its store, and who talks to it."""

    def __init__(self) -> None:
        self.store = StubStore()
        self.requests: list[Message] = []
        """What the endpoint passed on."""
        self.on_request: Callable[[], object] = lambda: None
        self.peers: list[Peer] = []
        self.set_up()

    def set_up(self, rules: Rules | None = None, **limits: Any) -> None:
        """Have an endpoint with these limits."""
        self.service = service_on(self.store, rules)

        async def app(scope: Message, receive: Any, send: Any) -> None:
            self.requests.append(scope)
            self.on_request()

        self.endpoint = Endpoint(
            app,
            self.service,
            TokenVerifier(secret=SECRET),
            Origins((), loopback_only=False),
            IdBudget(1e9, 1e9),
            EndpointLimits(**{"frames": MANY} | limits),
        )

    def peer(self, path: str = "/ws", headers: dict[str, str] | None = None) -> Peer:
        """A connection that has said nothing yet."""
        self.peers.append(Peer(self.endpoint, path, headers))
        return self.peers[-1]

    async def connected(self, user: str = "u", heart_beat: str = "0,0", subscribed: bool = True) -> Peer:
        """A connection with a session, and unless said otherwise one subscription."""
        peer = self.peer()
        await peer.put(connecting(user, heart_beat))
        if subscribed:
            await peer.put(frame("SUBSCRIBE", id="0", destination=QUEUE))
        await wait_until(lambda: peer.frames, what="CONNECTED")
        return peer

    def tell(self, online: bool, users: list[str], version: int) -> None:
        """Have a change of these users known."""
        statuses = [Status(user, online, version) for user in users]
        self.store.statuses |= {status.user: status for status in statuses}
        tell(self.service, statuses)


@pytest_asyncio.fixture
async def stage() -> AsyncIterator[Stage]:
    """What is left behind at the end fails the test."""
    before = asyncio.all_tasks()
    stage = Stage()
    yield stage
    stage.store.reachable.set()
    for peer in stage.peers:
        peer.taking.set()
        if not peer.task.done():
            while peer.incoming.full():
                peer.incoming.get_nowait()
            peer.leave()
    await wait_until(
        lambda: not {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()},
        what="no task to be left",
    )
    assert not stage.endpoint.clients
    assert not stage.service.open_sessions()
    assert not stage.service.fanout.watched()
    assert not stage.store.live
    for peer in stage.peers:
        assert not peer.task.cancelled()
        assert peer.task.exception() is None


def frame(command: str, body: str = "", **headers: str) -> str:
    return encode(Frame(command, headers, body))


def connecting(user: str = "u", heart_beat: str = "0,0") -> str:
    token = make_token(SECRET, user, 3600, None, None, now=time.time())
    return encode(
        Frame("CONNECT", {"accept-version": "1.2", "heart-beat": heart_beat, "Authorization": f"Bearer {token}"})
    )


def watching(users: list[str], **headers: str) -> str:
    return frame("SEND", json.dumps({"userIds": users}), destination="/app/presence.subscribe", **headers)


def beating(**headers: str) -> str:
    return frame("SEND", destination="/app/heartbeat", **headers)


def ids(count: int) -> list[str]:
    return [f"user-{number}" for number in range(count)]


# The upgrade


async def test_what_is_no_websocket_goes_to_the_app(stage):
    async def nothing(*_: object) -> Any:
        raise AssertionError("the app does that")

    await stage.endpoint({"type": "http", "path": "/ws"}, nothing, nothing)
    assert stage.requests == [{"type": "http", "path": "/ws"}]


@pytest.mark.parametrize(
    ("path", "headers", "limit", "status"),
    [
        ("/ws/other", {}, 1, 404),
        ("/ws", {"origin": "http://evil.example", "host": "presence.example"}, 1, 403),
        ("/ws", {}, 0, 503),
    ],
)
async def test_what_is_refused_is_answered_before_the_upgrade(stage, path, headers, limit, status):
    """WIRE §3: "403 before the upgrade", "503 before the upgrade"."""
    stage.set_up(connections=limit)
    peer = stage.peer(path, headers)
    await peer.ended()
    start, body = peer.sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", status)
    assert (b"content-type", b"application/problem+json") in start["headers"]
    assert json.loads(body["body"])["status"] == status


async def test_a_server_that_stops_takes_nobody_on(stage):
    await stage.endpoint.stop(1)
    peer = stage.peer()
    await peer.ended()
    assert peer.sent[0]["status"] == 503


# Packing


async def test_snapshots_are_packed_into_messages_of_whole_frames(stage):
    """WIRE §5: "Snapshots SHOULD be packed, many frames to a WebSocket message."; §6: "one or more whole frames"."""
    peer = await stage.connected()
    await peer.put(watching(ids(1_000), receipt="r"))
    await peer.receipt("r")
    packs = [text for text in peer.texts if text.startswith("MESSAGE")]
    assert sum(len(decode(text)) for text in packs) == 1_000
    assert all(len(text) < PACK_BYTES + 1_000 for text in packs)
    assert all(len(text) >= PACK_BYTES for text in packs[:-1])


async def test_changes_are_packed_as_well(stage):
    peer = await stage.connected()
    await peer.put(watching(ids(300), receipt="r"))
    await peer.receipt("r")
    before = len(peer.texts)
    stage.tell(True, ids(300), 1)
    await wait_until(lambda: len(peer.frames) >= 602, what="300 changes")
    assert len(peer.texts) - before <= 3


# A client that does not read


async def test_for_a_slow_reader_only_the_newest_of_each_user_waits(stage):
    """DESIGN §4.

    "A slow client is never sent a backlog, and never costs memory beyond the number of users that it watches:
    presence is state, so only the newest counts."; WIRE §5: "A status that changed several times while a client was
    slow MAY arrive as only its newest state."
    """
    peer, healthy = await stage.connected("slow"), await stage.connected("healthy")
    for one in (peer, healthy):
        await one.put(watching(ids(300), receipt="r"))
        await one.receipt("r")
    peer.taking.clear()
    clients = {one._session.user: one for one in stage.endpoint.clients}
    client, reader = clients["slow"], clients["healthy"]
    for version in range(1, 102):
        stage.tell(version % 2 == 1, ids(300), version)
        await wait_until(lambda: not reader._watcher.pending, what="the one who reads to be told")
        assert len(client._out) == 0
        assert len(client._watcher.pending) <= 300
    told = len(peer.frames)
    peer.taking.set()
    # What was on its way says "online" with version 1; all after it was taken together, to what changed nothing.
    await wait_until(lambda: len(peer.frames) == told + 300, what="one change of each")
    last = {frame.json["userId"]: frame.json for frame in peer.frames if frame.command == "MESSAGE"}
    assert {(event["online"], "snapshot" in event) for event in last.values()} == {(True, False)}
    changes = [f.json["online"] for f in healthy.frames if f.command == "MESSAGE" and f.json["userId"] == "user-0"]
    assert changes[1:] == [True, False] * 50 + [True], "who reads is told each time"


async def test_a_client_that_takes_nothing_in_is_dropped_after_the_send_time(stage, caplog):
    """WIRE §6: "1008 | [...] slow reader (or a reset where nothing can be written)"."""
    caplog.set_level(logging.INFO)
    stage.set_up(send_seconds=0.2)
    peer = await stage.connected()
    await peer.put(watching(["other"], receipt="r"))
    await peer.receipt("r")
    peer.taking.clear()
    began = time.monotonic()
    stage.tell(True, ["other"], 1)
    await peer.ended()
    assert time.monotonic() - began >= 0.15
    assert not stage.store.live
    assert "a client is dropped: slow reader" in caplog.text
    assert stage.store.commands.count(("end", "u")) == 1


async def test_a_client_whose_effects_wait_is_no_slow_reader(stage):
    """WIRE §4: "store away | open connections stay; [...] receipts and snapshots wait"."""
    stage.set_up(send_seconds=0.1)
    peer = await stage.connected()
    stage.store.reachable.clear()
    await peer.put(watching(["other"], receipt="r"))
    await asyncio.sleep(0.3)
    assert not peer.task.done()
    assert len(stage.store.live) == 1
    stage.store.reachable.set()
    await peer.receipt("r")


# What waits for the store


async def test_while_receipts_wait_heartbeats_take_effect_and_beats_are_sent(stage):
    """WIRE §4.

    "store away | open connections stay; heartbeats count from when they came"; §3: transport heart-beats.
    """
    stage.set_up(beat_seconds=0.1)
    peer = await stage.connected(heart_beat="0,100")
    stage.store.reachable.clear()
    await peer.put(watching(["other"], receipt="r1"), beating(receipt="r2"), beating())
    await wait_until(lambda: stage.store.commands.count(("refresh", "u")) == 2, what="two heartbeats")
    before = peer.texts.count("\n")
    await wait_until(lambda: peer.texts.count("\n") >= before + 3, what="three beats")
    assert not any(frame.command == "RECEIPT" for frame in peer.frames)
    stage.store.reachable.set()
    await peer.receipt("r2")
    assert [f.headers["receipt-id"] for f in peer.frames if f.command == "RECEIPT"] == ["r1", "r2"]


async def test_who_has_too_much_waiting_is_read_no_further(stage):
    """DESIGN §6: "a flooding client would grow our memory; ASGI `receive` is bounded": so are the frames to send."""
    peer = await stage.connected()
    stage.store.reachable.clear()
    await peer.put(watching(["other"]))

    async def flood() -> None:
        for number in range(2_000):
            await peer.put(beating(receipt=str(number)))

    flooding = asyncio.create_task(flood())
    [client] = stage.endpoint.clients
    await wait_until(lambda: peer.incoming.full() and len(client._out) > OUT_LIMIT, what="the queue to be full")
    taken = peer.taken
    for _ in range(100):
        await asyncio.sleep(0)
    assert peer.taken == taken < 1_100
    assert len(client._out) <= OUT_LIMIT + 2
    stage.store.reachable.set()
    await flooding
    await peer.receipt("1999")
    assert [f.headers["receipt-id"] for f in peer.frames if f.command == "RECEIPT"] == list(map(str, range(2_000)))


@pytest.mark.parametrize("end", ["stop", "silence", "slow", "leave"])
async def test_who_is_read_no_further_can_still_end(stage, monkeypatch, end):
    """It neither reads nor is it read, and all the same nothing of it is left."""
    monkeypatch.setattr(websocket, "LINGER", 0.1)
    stage.set_up(silence_seconds=0.5 if end == "silence" else 90, send_seconds=0.5 if end == "slow" else 30)
    peer = await stage.connected()
    peer.taking.clear()
    await peer.put(*(beating(receipt=str(number)) for number in range(OUT_LIMIT + 50)))
    [client] = stage.endpoint.clients
    await wait_until(lambda: client._room is not None, what="it to be read no further")
    if end == "stop":
        await stage.endpoint.stop(2)
    elif end == "leave":
        peer.leave()
        peer.taking.set()
    await peer.ended()
    await wait_until(lambda: not stage.store.live, what="the session to end")


async def test_an_error_is_told_though_a_receipt_before_it_waits(stage, monkeypatch):
    """WIRE §6: "An error is an ERROR frame: [...]; then close."."""
    monkeypatch.setattr(websocket, "LINGER", 0.1)
    peer = await stage.connected()
    stage.store.reachable.clear()
    await peer.put(watching(["other"], receipt="r"), frame("NO-SUCH", receipt="bad"))
    assert await peer.closed() == 1002
    error = peer.frames[-1]
    assert (error.command, error.headers["receipt-id"]) == ("ERROR", "bad")
    peer.leave()
    await peer.ended()


# Coming and going


async def test_connected_is_sent_only_once_the_session_is_recorded(stage):
    """WIRE §3: "CONNECTED is sent only once the session is recorded"."""
    stage.store.reachable.clear()
    peer = stage.peer()
    await peer.put(connecting(), frame("SUBSCRIBE", id="0", destination=QUEUE, receipt="r"))
    await wait_until(lambda: stage.store.commands == [("connect", "u")], what="the store to be asked")
    for _ in range(50):
        await asyncio.sleep(0)
    assert peer.texts == []
    stage.store.reachable.set()
    await peer.receipt("r")
    assert [frame.command for frame in peer.frames] == ["CONNECTED", "RECEIPT"]


async def test_who_leaves_while_the_session_is_recorded_is_ended_when_it_is(stage):
    stage.store.reachable.clear()
    peer = stage.peer()
    await peer.put(connecting())
    await wait_until(lambda: stage.store.commands == [("connect", "u")], what="the store to be asked")
    peer.leave()
    stage.store.reachable.set()
    await peer.ended()
    assert stage.store.commands[:2] == [("connect", "u"), ("end", "u")]


async def test_a_stop_while_the_session_is_recorded_ends_it(stage, monkeypatch):
    monkeypatch.setattr(websocket, "LINGER", 0.1)
    stage.store.reachable.clear()
    peer = stage.peer()
    await peer.put(connecting())
    await wait_until(lambda: stage.store.commands == [("connect", "u")], what="the store to be asked")
    stopping = asyncio.create_task(stage.endpoint.stop(2))
    assert await peer.closed() == 1001
    peer.leave()
    await stopping
    await peer.ended()
    assert ("end", "u") in stage.store.commands


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TooManyConnections(), 1008, "too many connections of this user"),
        (StoreUnavailable("away"), 1013, "store unavailable"),
    ],
)
async def test_a_session_that_cannot_be_made_is_an_error(stage, error, code, message):
    stage.store.fails = error
    peer = stage.peer()
    await peer.put(connecting())
    assert await peer.closed() == code
    assert peer.frames[-1].headers["message"] == message
    peer.leave()
    await peer.ended()
    assert stage.store.commands == [("connect", "u")]


async def test_a_lost_connection_ends_its_session_and_what_it_watched_once(stage):
    peer = await stage.connected()
    await peer.put(watching(ids(3), receipt="r"))
    await peer.receipt("r")
    peer.leave()
    await peer.ended()
    async with recording(stage.service.records):
        await wait_until(lambda: ("unwatch", "u") in stage.store.commands, what="the watches to be removed")
    assert stage.store.commands.count(("end", "u")) == 1


async def test_after_disconnect_the_session_is_not_ended_again(stage):
    peer = await stage.connected()
    await peer.put(frame("DISCONNECT"))
    assert await peer.closed() == 1000
    peer.leave()
    await peer.ended()
    assert stage.store.commands.count(("end", "u")) == 1


async def test_who_answers_no_close_is_left_after_a_moment(stage, monkeypatch):
    monkeypatch.setattr(websocket, "LINGER", 0.1)
    peer = await stage.connected()
    await peer.put(frame("NO-SUCH"))
    assert await peer.closed() == 1002
    assert not stage.store.live, "the session ends with the error, whenever the connection does"
    assert not peer.task.done()
    await peer.ended()


async def test_a_mistake_of_ours_drops_the_client_and_is_logged(stage, caplog):
    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    peer = await stage.connected()
    stage.service.snapshot = broken
    await peer.put(watching(["other"]))
    await wait_until(lambda: not stage.store.live, what="the session to end")
    assert "writing to a client failed" in caplog.text
    peer.leave()
    await peer.ended()


async def test_each_frame_of_a_message_is_taken_before_the_next(stage):
    """WIRE §6: "Frames of one connection take effect strictly in order."."""
    calls: list[str] = []
    service = stage.service

    def noted(name: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(name)

    service.refresh_user_session = noted("beat")
    service.sign_off = noted("off")
    service.sign_on = noted("on")
    peer = await stage.connected(subscribed=False)
    off = frame("SEND", '{"online": false}', destination="/app/online-status")
    on = frame("SEND", '{"online": true}', destination="/app/online-status")
    begin, commit = frame("BEGIN", transaction="t"), frame("COMMIT", transaction="t", receipt="r")
    held = frame("SEND", '{"online": false}', destination="/app/online-status", transaction="t")
    await peer.put(beating(), off, begin, held, on, beating(), commit, beating())
    await peer.receipt("r")
    assert calls == ["beat", "off", "on", "beat", "off", "beat"]


async def test_after_the_receipt_of_a_disconnect_nothing_is_told(stage):
    """WIRE §6: "DISCONNECT | RECEIPT, then the client closes"."""
    peer = await stage.connected()
    stage.tell(True, ["other"], 1)
    await peer.put(watching(["other"]))
    await peer.put(frame("DISCONNECT", receipt="bye"))
    await peer.receipt("bye")
    stage.tell(False, ["other"], 2)
    assert await peer.closed() == 1000
    assert peer.frames[-1].command == "RECEIPT"


async def test_a_mistake_of_ours_with_one_client_keeps_nothing_from_the_others(stage):
    class Broken:
        def flush(self) -> None:
            raise ZeroDivisionError

    peer = await stage.connected()
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    for _ in range(2):
        stage.endpoint.ready(Broken())
    await peer.put(beating(receipt="r"))
    await peer.receipt("r")


# The policy `contacts`


class Contacts:
    """A directory whose contacts of everybody are these."""

    def __init__(self, *users: str) -> None:
        self.users = frozenset(users)
        self.away = False

    async def contacts(self, user: str) -> frozenset[str]:
        if self.away:
            raise DirectoryUnavailable
        return self.users


async def watching_y_and_z(stage: Stage, **limits: Any) -> tuple[Peer, Contacts]:
    """A connection that watches Y, who is visible, and Z, who is not. Both are online."""
    stage.set_up(Rules(contacts_only=True), **limits)
    contacts = Contacts("y")
    stage.service.directory = cast("Directory", contacts)
    peer = await stage.connected(heart_beat="0,100")
    stage.tell(True, ["y", "z"], 1)
    await peer.put(watching(["y", "z"], receipt="watched"))
    await peer.receipt("watched")
    await stage.endpoint.revise()
    [client] = stage.endpoint.clients
    await wait_until(lambda: client._watcher and client._watcher.visible, what="the revision")
    assert told(peer, "y") == [(True, 1, True)]
    assert told(peer, "z") == [(False, 0, True)]
    return peer, contacts


def told(peer: Peer, user: str, subscription: str = "0") -> list[tuple[bool, int, bool]]:
    """What a subscription was told of a user: online, version, and whether it was a snapshot."""
    bodies = [f.json for f in peer.frames if f.headers.get("subscription") == subscription]
    return [(b["online"], b["version"], "snapshot" in b) for b in bodies if b["userId"] == user]


async def test_who_is_hidden_or_shown_by_the_snapshot_of_a_new_subscription_is_so_for_the_others(stage):
    """WIRE §5: what a session may see is one, whichever subscription learns of it first."""
    peer, contacts = await watching_y_and_z(stage)
    contacts.users = frozenset({"z"})
    await peer.put(frame("SUBSCRIBE", id="1", destination=QUEUE))
    await wait_until(lambda: told(peer, "z", "1"), what="the snapshot")
    await stage.endpoint.revise()
    stage.tell(False, ["y", "z"], 2)
    await wait_until(lambda: len(told(peer, "z")) == 3, what="the change")
    assert told(peer, "y") == [(True, 1, True), (False, 0, True)]
    assert told(peer, "z") == [(False, 0, True), (True, 1, True), (False, 2, False)]
    assert told(peer, "z", "1") == told(peer, "z")[1:]
    assert told(peer, "y", "1") == told(peer, "y")[1:]


async def test_while_a_snapshot_of_the_revealed_waits_beats_are_sent_and_a_hidden_change_is_not(stage):
    """WIRE §4: "store away | open connections stay"; §5: "looked up [...] at each delivery"."""
    peer, contacts = await watching_y_and_z(stage, beat_seconds=0.1)
    stage.store.reachable.clear()
    contacts.users = frozenset({"y", "z"})
    stage.tell(True, ["y"], 2)
    before = peer.texts.count("\n")
    await wait_until(lambda: peer.texts.count("\n") >= before + 3, what="three beats")
    contacts.users = frozenset({"z"})
    stage.tell(False, ["y"], 3)
    stage.store.reachable.set()
    await wait_until(lambda: len(told(peer, "z")) > 1, what="the snapshot of Z")
    await wait_until(lambda: len(told(peer, "y")) > 1, what="the revocation of Y")
    assert told(peer, "y") == [(True, 1, True), (False, 0, True)]


async def test_however_often_the_policy_is_looked_at_one_revision_waits(stage):
    """Else a client would be read no further while the store is away, and be dropped for its silence."""
    peer, contacts = await watching_y_and_z(stage)
    stage.store.reachable.clear()
    await peer.put(watching(["y"]))
    contacts.users = frozenset({"y", "z"})
    [client] = stage.endpoint.clients
    await wait_until(lambda: client._waiting, what="the watch to wait")
    for _ in range(50):
        await stage.endpoint.revise()
    assert len(client._out) == 1
    stage.store.reachable.set()
    await wait_until(lambda: len(told(peer, "z")) > 1, what="the snapshot of Z")


async def test_what_could_not_be_told_while_the_directory_was_away_is_told_when_it_is_back(stage):
    """DESIGN §7: "nothing lost"."""
    peer, contacts = await watching_y_and_z(stage)
    contacts.away = True
    stage.tell(False, ["y"], 2)
    await stage.endpoint.revise()
    await asyncio.sleep(0.05)
    assert told(peer, "y") == [(True, 1, True)]
    contacts.away = False
    await stage.endpoint.revise()
    await wait_until(lambda: told(peer, "y")[1:], what="the change")
    assert told(peer, "y")[1:] == [(False, 2, False)]


async def test_of_many_requests_at_once_one_is_begun_in_each_turn_of_the_loop(stage):
    """Red where all are: who waits for an answer to a heartbeat waits for all of them."""
    begun: list[int] = []
    scopes = [{"type": "http", "path": f"/{number}"} for number in range(20)]
    with counted_turns() as turn:
        stage.on_request = lambda: begun.append(turn())
        await asyncio.gather(*(stage.endpoint(scope, None, None) for scope in scopes))
    assert stage.requests == scopes
    assert len(set(begun)) == 20
