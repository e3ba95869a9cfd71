"""WIRE §5, Policy: with `PRESENCE_WATCH_POLICY=contacts` a session is told of its contacts and of nobody else."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Self, cast

import pytest
import pytest_asyncio

from presence.core.model import Session, Status
from presence.fanout import Fanout, Watcher
from presence.ports import Directory, HistoryStore, PresenceStore
from presence.server.auth import TokenVerifier, make_token
from presence.server.budget import IdBudget
from presence.server.origins import Origins
from presence.server.websocket import Endpoint, EndpointLimits
from presence.service import PresenceService, Rules
from tests.support.server import SECRET, ServerProcess, running
from tests.support.stomp_client import StompClient
from tests.support.stub_store import StubStore
from tests.support.truth import Truth, nothing_more, told
from tests.support.waiting import wait_until

CACHED = 10.0
"""Contacts are at most so old, s (WIRE §5)."""
SLACK = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def contacts_server() -> AsyncIterator[ServerProcess]:
    """A server with the policy `contacts`, on which a session watches at most 10 users."""
    async with running(lease_seconds=30, watch_policy="contacts", max_watches=10) as process:
        yield process


@pytest_asyncio.fixture
async def x(contacts_server, connect, users) -> StompClient:
    """Somebody who is subscribed, X in WIRE §5."""
    client: StompClient = await connect(contacts_server, users("x"))
    await client.subscribe()
    return client


@pytest_asyncio.fixture
async def marker(contacts_server, connect, users, x) -> StompClient:
    """For `nothing_more`; X may see it."""
    name = users("marker")
    await contacts_server.know(friends={name: [name_of(x)]})
    client: StompClient = await connect(contacts_server, name)
    return client


def name_of(client: StompClient) -> str:
    assert client.connected is not None
    return client.connected.headers["user-name"]


HIDDEN = {"online": False, "timestamp": None, "version": 0, "snapshot": True}


async def test_x_sees_y_if_y_lists_x_or_they_share_a_conversation_or_are_the_same(
    contacts_server, connect, x, users, marker
):
    """WIRE §5: "X sees Y if and only if Y lists X as a friend, or they share a conversation, or X = Y"."""
    lists_x, listed_by_x, shares, stranger = (users(name) for name in ("lists-x", "listed", "shares", "stranger"))
    me = name_of(x)
    await contacts_server.know(
        friends={lists_x: ["somebody", me], me: [listed_by_x], stranger: [lists_x]},
        conversations={users("c"): [shares, me], users("c"): [shares, stranger, listed_by_x]},
    )
    visible = {lists_x, shares, me}
    everybody = [lists_x, listed_by_x, shares, stranger, me]
    clients = [await connect(contacts_server, name) for name in everybody[:4]]
    snapshots = await x.watch(everybody)
    assert {name for name in everybody if snapshots[name]["online"]} == visible
    for name in (listed_by_x, stranger):
        assert snapshots[name] == {"userId": name, **HIDDEN}
    batch = (await contacts_server.post("/api/presence/batch", me, json=everybody)).json()
    assert {name for name in everybody if batch[name]["isOnline"]} == visible
    for name in everybody:
        assert (await contacts_server.get(f"/api/presence/check/{name}", me)).json() == {"isOnline": name in visible}
    for client in clients:
        await client.disconnect()
    for name in (lists_x, shares):
        await x.expect_event(name, False)
    await x.set_online(False)
    await x.expect_event(me, False)
    await nothing_more(marker, x)
    for name in (listed_by_x, stranger):
        assert told(x, name) == [(False, True)], "not a word more"


@pytest.mark.parametrize("known", ["to nobody", "to a friend"])
async def test_one_sees_oneself(contacts_server, connect, users, known):
    """WIRE §5: "or X = Y", whatever the directory has of X."""
    me = users("me")
    if known == "to a friend":
        await contacts_server.know(friends={users("friend"): [me]})
    client = await connect(contacts_server, me)
    await client.subscribe()
    assert (await client.watch([me]))[me]["online"] is True
    assert await contacts_server.is_online(me)
    await client.set_online(False)
    await client.expect_event(me, False)


async def test_a_hidden_user_is_answered_exactly_like_one_never_seen(contacts_server, connect, x, users):
    """WIRE §5.

    WIRE §5: "Watching a hidden user is accepted, counted, and answered exactly like watching a user never seen: REST,
    batch, snapshot, headers and the look-ups made are the same."
    """
    me, online, offline, never = name_of(x), users("online-"), users("offline"), users("never--")
    await connect(contacts_server, online)
    left = await connect(contacts_server, offline)
    await left.disconnect()
    redis = Truth(contacts_server).redis

    async def answers(name: str) -> tuple[str, list[str], set[str]]:
        """All that is answered, and what the store is asked about the user meanwhile."""
        await contacts_server.know(friends={me: [name]})
        with redis.monitor() as monitor:
            snapshot = (await x.watch([name]))[name]
            batch = await contacts_server.post("/api/presence/batch", me, json=[name])
            check = await contacts_server.get(f"/api/presence/check/{name}", me)
            friends = await contacts_server.get("/api/presence/friends", me)
            await wait_until(lambda: Truth(contacts_server).watchers(name) == {me}, what="the watch to be recorded")
            redis.echo("the end")
            commands = list(itertools.takewhile(lambda one: one != "ECHO the end", commands_of(monitor)))
        rest = (batch, check, friends)
        assert [answer.status for answer in rest] == [200, 200, 200]
        headers = [[one for one in answer.headers.items() if one[0] != "date"] for answer in rest]
        text = json.dumps([snapshot, [answer.body.decode() for answer in rest], headers])
        # The one number that differs is the highest version that the server has seen.
        asked = [re.sub(r"\b\d{16}\b", "", one).replace(name, "NAME") for one in commands if name in one]
        asked = list(dict.fromkeys(asked))  # on a busy machine one may be asked twice
        # Who watches whom is recorded beside all else, and with whom else it watches.
        beside = {" ".join(one.split()[:2]) for one in asked if "watch" in one}
        return text.replace(name, "NAME"), [one for one in asked if "watch" not in one], beside

    as_never = await answers(never)
    assert len(as_never[1]) > 3
    assert await answers(online) == as_never
    assert await answers(offline) == as_never
    assert x.events(online)[-1] == {"userId": online, **HIDDEN}
    for name in (online, offline, never):
        assert Truth(contacts_server).watchers(name) == {me}, "accepted"


def commands_of(monitor: Any) -> Iterator[str]:
    """The commands that a MONITOR shows."""
    while True:
        yield str(monitor.next_command()["command"])


async def test_hidden_users_count_among_the_watched(contacts_server, connect, x, users):
    """WIRE §5: "Watching a hidden user is accepted, *counted*"."""
    await x.watch([users("hidden") for _ in range(10)])
    await x.send_frame("SEND", {"destination": "/app/presence.subscribe"}, json.dumps({"userIds": [users("one")]}))
    code, error = await x.closed()
    assert code == 1008
    assert error is not None
    assert "watched" in error.headers["message"]


async def test_on_revocation_the_session_is_told_once_and_then_nothing(contacts_server, connect, x, users, marker):
    """WIRE §5.

    WIRE §5: "looked up with a cache of at most 10 s, at each delivery"; "On revocation the session is told `online:
    false`, `timestamp: null`, `version: 0`, `snapshot: true` once"; on every subscription.
    """
    y = users("y")
    await contacts_server.know(friends={y: [name_of(x)]})
    await x.subscribe("b")
    client = await connect(contacts_server, y)
    await x.watch([y])
    await contacts_server.know(friends={y: []})
    for subscription in ("sub-0", "b"):
        revoked = await x.expect_snapshot(y, False, CACHED + SLACK, subscription=subscription)
        assert revoked.json == {"userId": y, **HIDDEN}
    count = len(x.events(y))
    await client.set_online(False)
    await client.set_online(True)
    await nothing_more(marker, x)
    # Even when the policy is applied again, for others.
    other = users("other")
    await contacts_server.know(friends={other: [name_of(x)]})
    await connect(contacts_server, other)
    await x.watch([other])
    await contacts_server.know(friends={other: []})
    await x.expect_snapshot(other, False, CACHED + SLACK, subscription="b")
    assert len(x.events(y)) == count, "once"
    # A new subscription is told the same as of a user never seen.
    assert (await x.subscribe("c"))[y] == {"userId": y, **HIDDEN}


async def test_a_change_after_the_revocation_is_not_told(contacts_server, connect, x, users, marker):
    """WIRE §5: "looked up [...] at each delivery": not only now and then."""
    y = users("y")
    for _ in range(3):
        await contacts_server.know(friends={y: [name_of(x)]})
        client = await connect(contacts_server, y)
        await x.watch([y])
        await contacts_server.know(friends={y: []})  # on return the server knows
        await client.disconnect()
        await x.expect_snapshot(y, False, CACHED + SLACK)
        await nothing_more(marker, x)
        assert told(x, y)[-1] == (False, True)
        assert (False, False) not in told(x, y)
        await x.unwatch([y])


async def test_on_becoming_visible_there_is_a_snapshot_and_changes_go_on(contacts_server, connect, x, users, marker):
    """WIRE §5.

    WIRE §5: "on becoming visible, a snapshot"; "version 0 stands outside the order of versions". After it changes flip
    what the snapshot said.
    """
    y, other = users("y"), users("other")
    client = await connect(contacts_server, y)
    assert (await x.watch([y, other]))[y] == {"userId": y, **HIDDEN}
    await contacts_server.know(friends={y: [name_of(x)]}, conversations={users("c"): [other, name_of(x)]})
    revealed = await x.expect_snapshot(y, True, CACHED + SLACK)
    assert revealed.json["version"] == Truth(contacts_server).versions(y)[-1]
    assert (await x.expect_snapshot(other, False)).json["version"] == 0
    await client.set_online(False)
    await x.expect_event(y, False)
    await contacts_server.know(friends={y: []})
    await x.expect_snapshot(y, False, CACHED + SLACK)
    await client.set_online(True)
    await contacts_server.know(friends={y: [name_of(x)]})
    back = await x.expect_snapshot(y, True, CACHED + SLACK)
    assert back.json["version"] == Truth(contacts_server).versions(y)[-1]
    await client.disconnect()
    await x.expect_event(y, False)
    await nothing_more(marker, x)
    versions = [event["version"] for event in x.events(y) if event["version"]]
    assert versions == sorted(versions), "version 0 left out, they never go down"
    assert x.changes(y) == [False, False]
    assert [snapshot for _, snapshot in told(x, y)] == [True, True, False, True, True, False]


async def test_a_conversation_left_while_one_watches_hides_and_one_joined_reveals(
    contacts_server, connect, x, users, marker
):
    """WIRE §5: "or they share a conversation"; X listing Y "as a friend" meanwhile is the wrong way round."""
    y, name = users("y"), users("conversation")
    client = await connect(contacts_server, y)
    await contacts_server.know(conversations={name: [y, name_of(x)]})
    assert (await x.watch([y]))[y]["online"] is True
    await contacts_server.know(friends={name_of(x): [y]}, conversations={name: [y]})
    assert (await x.expect_snapshot(y, False, CACHED + SLACK)).json == {"userId": y, **HIDDEN}
    await client.set_online(False)
    await client.set_online(True)
    await nothing_more(marker, x)
    await contacts_server.know(conversations={name: [y, name_of(x)]})
    await x.expect_snapshot(y, True, CACHED + SLACK)
    await client.disconnect()
    await x.expect_event(y, False)
    assert told(x, y) == [(True, True), (False, True), (True, True), (False, False)]


async def test_under_the_policy_anyone_strangers_are_seen(server, connect, users):
    """WIRE §5: "`anyone` (default, as the guide's API)"."""
    stranger, me = users("stranger"), users("x")
    await connect(server, stranger)
    client = await connect(server, me)
    await client.subscribe()
    assert (await client.watch([stranger]))[stranger]["online"] is True
    assert (await server.get(f"/api/presence/check/{stranger}", me)).json() == {"isOnline": True}


async def test_the_friends_list_is_no_way_round_the_policy(contacts_server, connect, users):
    """WIRE §5: the policy holds for "REST" too: one's own list of friends makes nobody visible."""
    me, y, z = users("me"), users("y"), users("z")
    await contacts_server.know(friends={me: [y, z], z: [me]})
    for name in (y, z):
        await connect(contacts_server, name)
    friends = (await contacts_server.get("/api/presence/friends", me)).json()
    assert {name: one["isOnline"] for name, one in friends.items()} == {y: False, z: True}
    assert friends[y] == {"userId": y, "status": "OFFLINE", "isOnline": False, "lastSeen": None, "lastActiveAgo": None}


# A directory that changes its mind, or takes its time, in the midst of a look-up: no server can be made to meet that at
# will.


class Fickle:
    """A directory that answers each look-up of contacts with what is next, when it may; the last answer stays."""

    def __init__(self, *answers: Collection[str]) -> None:
        self.answers = [frozenset(answer) for answer in answers]
        self.asked = asyncio.Event()
        self.may = asyncio.Event()
        self.may.set()

    async def friends(self, user: str) -> Sequence[str]:
        return ()

    async def members(self, conversation: str) -> Sequence[str] | None:
        return None

    async def contacts(self, user: str) -> frozenset[str]:
        self.asked.set()
        await self.may.wait()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class NoHistory:
    """A history that knows nobody, and notes who was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def read(self, users: Collection[str]) -> Mapping[str, Status]:
        self.asked.append(list(users))
        return {}


def service_on(directory: Fickle, history: NoHistory | None = None) -> PresenceService:
    """A service under the policy, whose store knows that Y is online."""
    store = StubStore()
    store.statuses["y"] = Status("y", True, 7, 1)
    make: Callable[..., Any] = cast
    ports = make(PresenceStore, store), make(HistoryStore, history or NoHistory()), make(Directory, directory)
    return PresenceService(*ports, Fanout(), Rules(contacts_only=True))


@pytest.mark.parametrize(
    "answers", [({"x", "y"}, {"x"}), ({"x"}, {"x", "y"}), ({"x"}, {"x"}), ({"x", "y"}, {"x", "y"})]
)
async def test_a_snapshot_is_of_one_mind(answers):
    """WIRE §5.

    WIRE §5: a hidden user is "answered exactly like watching a user never seen", and whoever is visible with "its
    present state", also when the directory changes between two look-ups.
    """
    service = service_on(Fickle(*answers))
    watcher = Watcher(Session("x", "s", "web", 0, 0), lambda: None)
    service.fanout.watch(watcher, ["y"])
    ((status, _),) = await service.snapshot(watcher, ["y"])
    if status.online:
        assert "y" not in watcher.hidden
    else:
        assert (status.version, status.last_active) == (0, None)
        assert "y" in watcher.hidden, "or it would never be told when Y becomes visible"
    told_now, revealed = await service.revise(watcher)
    if "y" in answers[1]:
        assert (told_now, revealed) == ([], [] if status.online else ["y"])
    else:
        assert ([one.version for one in told_now], revealed) == ([0] if status.online else [], [])


async def test_the_history_is_asked_for_hidden_users_as_for_those_never_seen():
    """WIRE §5: "the look-ups made are the same"."""
    asked = []
    for user in ("y", "never"):
        history = NoHistory()
        await service_on(Fickle({"x"}), history).get_presence("x", [user])
        asked.append(history.asked)
    assert asked == [[["y"]], [["never"]]]


class Served:
    """X, connected and subscribed, at an endpoint in this process, where nothing happens by itself."""

    def __init__(self, directory: Fickle) -> None:
        self.service = service_on(directory)
        app: Any = None
        verifier, origins = TokenVerifier(secret=SECRET.encode()), Origins((), loopback_only=True)
        self.endpoint = Endpoint(app, self.service, verifier, origins, IdBudget(10, 10), EndpointLimits())
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.outbox: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        scope: dict[str, Any] = {"type": "websocket", "path": "/ws", "headers": [], "subprotocols": []}
        put: Callable[[MutableMapping[str, Any]], Awaitable[None]] = self.outbox.put
        self.inbox.put_nowait({"type": "websocket.connect"})
        self.running = asyncio.create_task(self.endpoint(scope, self.inbox.get, put))
        token = make_token(SECRET.encode(), "x", 60, now=time.time())
        self.sends(f"CONNECT\naccept-version:1.2\nAuthorization:Bearer {token}\n\n")
        self.sends("SUBSCRIBE\nid:0\ndestination:/queue/online-status\nreceipt:subscribed\n\n")
        await self.gets("subscribed")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.inbox.put_nowait({"type": "websocket.disconnect"})
        await asyncio.wait_for(self.running, 5)

    def sends(self, frame: str) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "text": frame + "\0"})

    async def watches(self, user: str) -> str:
        """Watch the user; return all that was sent up to the receipt."""
        self.sends(f'SEND\ndestination:/app/presence.subscribe\nreceipt:watched\n\n{{"userIds":["{user}"]}}')
        return await self.gets("watched")

    async def gets(self, what: str) -> str:
        """Wait until something with ``what`` in it is sent; return all that was sent up to it."""
        sent = ""
        async with asyncio.timeout(5):
            while what not in sent:
                sent += (await self.outbox.get()).get("text", "")
        return sent


async def test_what_is_due_while_the_directory_is_asked_is_sent_when_it_has_answered():
    """WIRE §6: "RECEIPT for every frame that asks", also when nothing comes of the look-up "at each delivery" (§5)."""
    directory = Fickle({"x", "y"})
    async with Served(directory) as x:
        await x.watches("y")
        directory.may.clear()
        directory.asked.clear()
        x.service.fanout.deliver(Status("y", False, 9))
        await asyncio.wait_for(directory.asked.wait(), 5)
        x.sends("BEGIN\ntransaction:t\nreceipt:begun\n\n")
        while not x.inbox.empty():
            await asyncio.sleep(0)
        directory.may.set()
        await x.gets("begun")


async def test_nothing_tells_that_a_hidden_user_has_changed():
    """WIRE §5: "the look-ups made are the same"; else X's own receipts, held while the directory is asked, tell it."""
    directory = Fickle({"x"})
    async with Served(directory) as x:
        await x.watches("y")
        directory.may.clear()
        directory.asked.clear()
        for version in (9, 10):
            x.service.fanout.deliver(Status("y", version == 10, version))
            x.sends(f"BEGIN\ntransaction:{version}\nreceipt:begun-{version}\n\n")
            await x.gets(f"begun-{version}")
        assert not directory.asked.is_set()
        directory.answers = [frozenset({"x", "y"})]
        directory.may.set()
        await x.endpoint.revise()
        assert '"userId":"y","online":true' in await x.gets('"y"'), "what came meanwhile is not lost"


async def test_who_was_revealed_between_two_revisions_is_revoked_by_the_next():
    """WIRE §5: "On revocation the session is told", also when the contacts are again those of the last revision."""
    directory = Fickle({"x"})
    async with Served(directory) as x:
        await x.watches("z")
        await x.endpoint.revise()
        await x.watches("z")
        directory.answers = [frozenset({"x", "y"})]
        assert '"userId":"y","online":true' in await x.watches("y")
        directory.answers = [frozenset({"x"})]
        await x.endpoint.revise()
        assert '{"userId":"y","online":false,"timestamp":null,"version":0,"snapshot":true}' in await x.gets('"y"')


async def test_revisions_without_news_tell_nothing():
    """WIRE §5: "told [...] *once*"."""
    directory = Fickle({"x", "y"})
    async with Served(directory) as x:
        await x.watches("y")
        for answer in ({"x"}, {"x"}, {"x", "z"}):
            directory.answers = [frozenset(answer)]
            await x.endpoint.revise()
        sent = await x.watches("z")
        assert sent.count('"userId":"y"') == 1
        assert '"userId":"y","online":false,"timestamp":null,"version":0,"snapshot":true' in sent
