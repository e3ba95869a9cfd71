"""WIRE §5, Watching: what a session is told of the users it watches. The policy `contacts` has a module of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.support.server import ServerProcess
from tests.support.stomp_client import QUEUE, StompClient
from tests.support.store import ValkeyProcess
from tests.support.truth import Truth, messages, ms, nothing_more, told
from tests.support.waiting import wait_until

LEASE = 2.0
SLACK = 2.0
LAPSED = LEASE + SLACK


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that share an outside store."""
    store = ValkeyProcess()
    servers: list[ServerProcess] = []
    try:
        await store.start()
        servers += [ServerProcess(lease_seconds=2, redis_url=store.url, amnesty_seconds=0).start() for _ in range(2)]
        for server in servers:
            await server.ready()
        yield servers[0], servers[1]
        for server in servers:
            await server.finish()
    finally:
        for server in servers:
            server.close()
        store.close()


def receipt_after_snapshots(client: StompClient) -> Iterator[tuple[str, int]]:
    """All RECEIPTs that came: their id, and how many MESSAGEs came before them."""
    count = 0
    for frame in client.frames:
        count += frame.command == "MESSAGE"
        if frame.command == "RECEIPT":
            yield frame.headers["receipt-id"], count


def ids_body(ids: object) -> str:
    return json.dumps({"userIds": ids})


# Destinations, and the shape of a MESSAGE


@pytest.mark.parametrize("destination", ["/user/queue/online-status", "/queue/online-status"])
async def test_both_destinations_are_the_queue_and_messages_name_the_one_subscribed(
    server, connect, user, users, destination
):
    """WIRE §5, Guide.

    WIRE §5: "SUBSCRIBE `/user/queue/online-status` (and, as the guide lists it, `/queue/online-status`; the MESSAGE's
    `destination` is the one subscribed)".
    """
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe("mine", destination)
    await watcher.watch([user])
    client = await connect(server, user)
    event = await watcher.expect_event(user, True, subscription="mine")
    assert event.headers["destination"] == destination
    await client.disconnect()
    assert {frame.headers["destination"] for frame in messages(watcher)} == {destination}


async def test_each_subscription_of_the_two_destinations_has_its_own(server, connect, user, users):
    """WIRE §5: "the MESSAGE's `destination` is the one subscribed", with both at once."""
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe("long", "/user/queue/online-status")
    await watcher.subscribe("short", "/queue/online-status")
    await watcher.watch([user])
    await connect(server, user)
    for id_, destination in (("long", "/user/queue/online-status"), ("short", "/queue/online-status")):
        event = await watcher.expect_event(user, True, subscription=id_)
        assert event.headers["destination"] == destination


@pytest.mark.parametrize("id_", ["sub-0", "a:b\\c\nd ê"])
async def test_a_message_looks_as_described_byte_by_byte(server, connect, user, users, id_):
    """WIRE §5.

    WIRE §5: the MESSAGE, `destination`, `content-type`, `subscription`, `message-id`, `content-length`, and the body
    with `userId`, `online`, `timestamp` ("RFC 3339 UTC, milliseconds"), `version`; a snapshot "in the same shape plus
    `"snapshot": true`"; §3: "Header values that we make contain no colon or backslash".
    """
    escaped = id_.replace("\\", "\\\\").replace(":", "\\c").replace("\n", "\\n")
    async with ws_connect(server.ws, subprotocols=[Subprotocol("v12.stomp")], proxy=None) as ws:
        token = server.token(users("watcher"))
        await ws.send(f"CONNECT\naccept-version:1.2\nhost:localhost\nAuthorization:Bearer {token}\n\n\0")
        await asyncio.wait_for(ws.recv(), 5)
        await ws.send(f"SUBSCRIBE\nid:{escaped}\ndestination:{QUEUE}\n\n\0")
        await ws.send(f"SEND\ndestination:/app/presence.subscribe\n\n{ids_body([user])}\0")
        snapshot = str(await asyncio.wait_for(ws.recv(), 5))
        await connect(server, user)
        change = str(await asyncio.wait_for(ws.recv(), 5))
    for text, body in [
        (snapshot, rf'{{"userId":"{user}","online":false,"timestamp":null,"version":0,"snapshot":true}}'),
        (
            change,
            rf'{{"userId":"{user}","online":true,"timestamp":"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z","version":\d{{16}}}}',
        ),
    ]:
        match = re.fullmatch(
            f"MESSAGE\ndestination:{QUEUE}\ncontent-type:application/json\nsubscription:{re.escape(escaped)}\n"
            f"message-id:([^\n:\\\\]+)\ncontent-length:(\\d+)\n\n({body})\0",
            text,
        )
        assert match, text
        assert int(match[2]) == len(match[3].encode())


async def test_message_ids_are_unique_in_a_connection(server, connect, users):
    """WIRE §5: "message-id:<unique per connection>"."""
    watcher = await connect(server, users("watcher"))
    for id_ in ("a", "b"):
        await watcher.subscribe(id_)
    subjects = [users("subject") for _ in range(20)]
    await watcher.watch(subjects)
    await watcher.watch(subjects)
    client = await connect(server, subjects[0])
    await watcher.expect_event(subjects[0], True, subscription="b")
    await client.disconnect()
    names = [frame.headers["message-id"] for frame in messages(watcher)]
    assert len(names) >= 82
    assert len(set(names)) == len(names)


async def test_timestamp_and_version_name_the_moment_of_the_change(server, connect, user, truth, watcher):
    """WIRE §5.

    WIRE §5: "`timestamp`: when the status changed, RFC 3339 UTC, milliseconds. `version`: an integer below 2^53,
    strictly increasing per user (microseconds of the change, made unique)."
    """
    await watcher.watch([user])
    client = await connect(server, user)
    versions: list[int] = []
    for online in (True, False) * 3:
        before = truth.now()
        if versions:
            await client.set_online(online)
        event = (await watcher.expect_event(user, online)).json
        assert type(event["version"]) is int
        assert event["version"] < 2**53
        assert ms(event["timestamp"]) == event["version"] // 1000
        if versions:
            assert before <= ms(event["timestamp"]) <= truth.now()
        versions.append(event["version"])
    assert sorted(set(versions)) == versions
    assert truth.versions(user) == versions, "the versions that everybody sees"


# Snapshots


async def test_the_first_message_is_a_snapshot_of_the_present_state(server, connect, users, truth, watcher):
    """WIRE §5.

    WIRE §5: "the first MESSAGE about a newly watched user [...] is its present state, in the same shape plus
    `"snapshot": true`; a user no store knows has `online: false`, `timestamp: null`, `version: 0`."
    """
    online, offline, never = users("online"), users("offline"), users("never")
    await connect(server, online)
    left = await connect(server, offline)
    await left.disconnect()
    snapshots = await watcher.watch([online, offline, never])
    for name, is_online in ((online, True), (offline, False)):
        version = truth.versions(name)[-1]
        timestamp = snapshots[name]["timestamp"]
        assert ms(timestamp) == version // 1000
        expected = {"userId": name, "online": is_online, "timestamp": timestamp, "version": version, "snapshot": True}
        assert snapshots[name] == expected
    assert snapshots[never] == {"userId": never, "online": False, "timestamp": None, "version": 0, "snapshot": True}


async def test_users_watched_before_subscribe_are_told_of_once_subscribed(server, connect, user, users):
    """WIRE §5: "(also for ids watched before SUBSCRIBE, once subscribed)". Before that nothing is sent."""
    never = users("never")
    watcher = await connect(server, users("watcher"))
    client = await connect(server, user)
    assert await watcher.watch([user, never]) == {}
    await client.disconnect()
    back = await connect(server, user)
    assert messages(watcher) == []
    snapshots = await watcher.subscribe()
    assert {name: (one["online"], one["snapshot"]) for name, one in snapshots.items()} == {
        user: (True, True),
        never: (False, True),
    }
    await back.disconnect()
    await watcher.expect_event(user, False)
    assert told(watcher, user) == [(True, True), (False, False)]


async def test_a_repeated_subscribe_snapshots_again(server, connect, user, watcher, marker):
    """WIRE §5: "A repeated `presence.subscribe` snapshots again"; a repeated id in one frame is one watch."""
    client = await connect(server, user)
    assert (await watcher.watch([user]))[user]["online"] is True
    assert (await watcher.watch([user, user]))[user]["online"] is True
    await client.disconnect()
    await watcher.expect_event(user, False)
    assert (await watcher.watch([user]))[user]["online"] is False
    assert told(watcher, user) == [(True, True), (True, True), (False, False), (False, True)]
    await connect(server, user)
    await watcher.expect_event(user, True)
    await nothing_more(marker, watcher)
    assert watcher.changes(user) == [False, True], "watched twice is told once"


async def test_snapshots_are_packed_and_the_receipt_comes_after_all_of_them(server, connect, users):
    """WIRE §5.

    WIRE §5: "Snapshots SHOULD be packed, many frames to a WebSocket message. The receipt of `presence.subscribe` (or of
    SUBSCRIBE) comes after all its snapshots, and so marks their end".
    """
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe("a")
    crowd = [f"{users('crowd')}-{number}" for number in range(1_000)]
    snapshots = await watcher.watch(crowd)
    assert set(snapshots) == set(crowd)
    again = await watcher.subscribe("b")
    assert set(again) == set(crowd)
    counts = dict(receipt_after_snapshots(watcher))
    assert list(counts.values()) == [0, 1_000, 2_000], "each after all its snapshots"
    at = [frame.at for frame in messages(watcher, "a")]
    assert len(set(at)) <= 20, "frames to a message: those that came in one have one time"


async def test_unwatched_users_are_told_of_no_more(server, connect, user, users, truth, watcher, marker):
    """WIRE §5.

    WIRE §5: "`/app/presence.unsubscribe` [...] removes from what this session watches"; "after the receipt of
    `presence.unsubscribe` nothing about those users follows". Who stays watched is told of.
    """
    stays = users("stays")
    await watcher.watch([user, stays])
    await watcher.unwatch([user])
    count = len(watcher.events(user))
    client = await connect(server, user)
    await connect(server, stays)
    await client.disconnect()
    await watcher.expect_event(stays, True)
    await nothing_more(marker, watcher)
    assert len(watcher.events(user)) == count
    assert watcher.connected is not None
    name = watcher.connected.headers["user-name"]
    await wait_until(lambda: name not in truth.watchers(user), what="the record that it watches no more")
    await wait_until(lambda: name in truth.watchers(stays), what="the record that it watches")
    # Watched again it is as new.
    assert (await watcher.watch([user]))[user]["online"] is False
    await connect(server, user)
    await watcher.expect_event(user, True)


async def test_nothing_follows_the_receipt_of_unsubscribe_in_the_midst_of_changes(server, connect, user, watcher):
    """WIRE §5.

    WIRE §5: "after the receipt of `presence.unsubscribe` nothing about those users follows", whatever is under way.
    """
    client = await connect(server, user)

    async def flip() -> None:
        while True:
            for online in (False, True):
                body = json.dumps({"online": online})
                await client.send_frame("SEND", {"destination": "/app/online-status"}, body)
                await asyncio.sleep(0.012)

    flipping = asyncio.create_task(flip())
    try:
        for _ in range(30):
            await watcher.watch([user])
            await asyncio.sleep(random.uniform(0, 0.02))
            await watcher.unwatch([user])
            end = len(watcher.frames)
            await watcher.receipt("BEGIN", {"transaction": f"{end}"})
            assert [frame for frame in watcher.frames[end:] if frame.command == "MESSAGE"] == []
    finally:
        flipping.cancel()
    assert watcher.changes(user), "there were changes to tell of"


# Changes


async def test_every_session_that_watches_is_told_once_per_subscription(server, connect, user, users, marker):
    """WIRE §5.

    WIRE §5: "Every change of a watched user reaches every session that watches it [...], once per subscription"; and
    "what this *session* watches": another session of the same user watches nothing.
    """
    one, both = await connect(server, users("one")), users("both")
    first, second = await connect(server, both), await connect(server, both)
    await one.subscribe("a")
    await one.subscribe("b")
    await first.subscribe()
    await second.subscribe()
    await one.watch([user])
    await first.watch([user])
    await second.watch([users("another")])
    client = await connect(server, user)
    await client.disconnect()
    for subscription in ("a", "b"):
        await one.expect_event(user, True, subscription=subscription)
        await one.expect_event(user, False, subscription=subscription)
    await first.expect_event(user, True)
    await first.expect_event(user, False)
    await nothing_more(marker, one, first, second)
    assert one.changes(user, "a") == one.changes(user, "b") == first.changes(user) == [True, False]
    assert second.events(user) == [], "it is the session that watches"
    bodies = {json.dumps(event) for event in one.events(user) + first.events(user)}
    assert len(bodies) == 3, "all are told the same"


async def test_one_may_watch_oneself(server, connect, user, marker):
    """WIRE §5: watched users are any, oneself included (policy `contacts`: "or X = Y")."""
    client, other = await connect(server, user), await connect(server, user)
    await client.subscribe()
    assert (await client.watch([user]))[user]["online"] is True
    await client.set_online(False)
    await other.disconnect()
    await client.expect_event(user, False)
    await client.set_online(True)
    await client.expect_event(user, True)
    await nothing_more(marker, client)
    assert client.changes(user) == [False, True]


async def test_watches_last_as_long_as_the_connection(server, connect, user, users, truth, watcher):
    """WIRE §5: "Watches last as long as the connection": not the lease, not the sign-off; and no longer."""
    name = users("other")
    other = await connect(server, name)
    await other.subscribe()
    await other.watch([user])
    await other.set_online(False)
    client = await connect(server, user)
    await other.expect_event(user, True)
    await client.disconnect()
    await other.expect_event(user, False)
    await wait_until(lambda: truth.watchers(user) == {name}, what="the record that it watches")
    await other.disconnect()
    await wait_until(lambda: truth.watchers(user) == set(), what="the watch to end with the connection")
    back = await connect(server, name)
    assert await back.subscribe() == {}, "the new connection watches nothing"


async def test_a_second_subscription_gets_snapshots_and_the_first_gets_nothing(server, connect, users, user, marker):
    """WIRE §5.

    WIRE §5: "SUBSCRIBE snapshots to the new subscription only; flips and the order of versions hold per subscription."
    """
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe("a")
    client = await connect(server, user)
    await watcher.watch([user])
    assert (await watcher.subscribe("b"))[user]["online"] is True
    assert told(watcher, user, "a") == [(True, True)]
    assert told(watcher, user, "b") == [(True, True)]
    await client.disconnect()
    for subscription in ("a", "b"):
        await watcher.expect_event(user, False, subscription=subscription)
    await watcher.unsubscribe("a")
    await connect(server, user)
    await watcher.expect_event(user, True, subscription="b")
    await nothing_more(marker, watcher)
    assert told(watcher, user, "a") == [(True, True), (False, False)], "nothing more after UNSUBSCRIBE"
    # A repeated presence.subscribe snapshots to all there are.
    await watcher.subscribe("c")
    await watcher.watch([user])
    assert told(watcher, user, "b")[-1] == told(watcher, user, "c")[-1] == (True, True)
    assert [len(told(watcher, user, id_)) for id_ in "abc"] == [2, 4, 2]


async def test_without_a_subscription_nothing_is_told_and_a_new_one_begins_with_snapshots(
    server, connect, user, users, marker
):
    """WIRE §5: "once subscribed": also again, after an UNSUBSCRIBE; the watches stay ("as long as the connection")."""
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe("a")
    await watcher.watch([user])
    await watcher.unsubscribe("a")
    client = await connect(server, user)
    await nothing_more(marker, watcher)  # which tells of nothing as there is no subscription
    assert told(watcher, user) == [(False, True)]
    assert (await watcher.subscribe("b"))[user]["online"] is True
    await client.disconnect()
    await watcher.expect_event(user, False, subscription="b")
    assert told(watcher, user, "b") == [(True, True), (False, False)]


async def test_what_happens_before_subscribe_is_no_change_after_it(server, connect, user, users, marker):
    """WIRE §5: "A MESSAGE without `snapshot` always turns round what this session was last told of that user"."""
    watcher = await connect(server, users("watcher"))
    await watcher.watch([user])
    client = await connect(server, user)
    await client.disconnect()
    await watcher.subscribe()
    await nothing_more(marker, watcher)
    assert told(watcher, user) == [(False, True)]


async def test_changes_flip_for_subscriptions_that_come_and_go_in_the_midst_of_changes(server, connect, user, users):
    """WIRE §5.

    WIRE §5: "Changes flip. A MESSAGE without `snapshot` always turns round what this session was last told of that
    user, with a higher version"; "Per subscription and user the versions never go down"; "flips and the order of
    versions hold per subscription"; the first MESSAGE on a subscription is a snapshot.
    """
    client = await connect(server, user)
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe("stays")
    await watcher.watch([user])

    async def flip() -> None:
        while True:
            for online in (False, True):
                body = json.dumps({"online": online})
                await client.send_frame("SEND", {"destination": "/app/online-status"}, body)
                await asyncio.sleep(0.0105)

    flipping = asyncio.create_task(flip())
    ids = ["stays"]
    try:
        before: list[str] = []
        for number in range(60):
            new = [f"a{number}", f"b{number}", f"c{number}"]
            ids += new
            frames = [f"UNSUBSCRIBE\nid:{id_}\n\n\0" for id_ in before]
            frames += [f"SUBSCRIBE\nid:{id_}\ndestination:{QUEUE}\n\n\0" for id_ in new]
            await watcher.raw("".join(frames))
            before = new
            await asyncio.sleep(random.uniform(0.0, 0.06))
    finally:
        flipping.cancel()
    await watcher.receipt("BEGIN", {"transaction": "end"})
    assert len(told(watcher, user, "stays")) > 50
    for id_ in ids:
        check_subscription(watcher, user, id_)


def check_subscription(
    watcher: StompClient, user: str, subscription: str, truth: tuple[bool, int] | None = None
) -> None:
    """Assert what WIRE §5 says of the MESSAGEs about one user on one subscription; of the last one, that it is true."""
    last: tuple[bool, int] | None = None
    for event in watcher.events(user, subscription):
        where = f"{event} after {last} on {subscription}"
        if "snapshot" in event:
            assert event["snapshot"] is True, where
            assert last is None or event["version"] >= last[1], f"versions never go down: {where}"
        else:
            assert last is not None, f"the first is a snapshot: {where}"
            assert event["online"] != last[0], f"changes flip: {where}"
            assert event["version"] > last[1], f"with a higher version: {where}"
        last = event["online"], event["version"]
    if truth is not None:  # its version, or one before, where the changes between left no flip to tell
        assert last is not None
        assert last[0] == truth[0], f"the last word about {user} on {subscription}"
        assert last[1] <= truth[1], f"no version is made up: {user} on {subscription}"


async def test_a_late_change_is_not_told(server, connect, user, truth, watcher, marker):
    """WIRE §5: "Where [...] a late change [...] leaves no flip to tell, nothing is sent"; "versions never go down"."""
    client = await connect(server, user)
    # The watcher is told of a version that the changes after it do not reach: to the watcher they are late.
    version = truth.versions(user)[0]
    truth.redis.hset(f"presence:user:{user}:change", "version", version + 3_600_000_000)
    assert (await watcher.watch([user]))[user]["version"] == version + 3_600_000_000
    await client.set_online(False)
    await client.set_online(True)
    await client.set_online(False)
    await nothing_more(marker, watcher)
    assert len(truth.versions(user)) == 4
    assert told(watcher, user) == [(True, True)]


async def test_a_slow_reader_is_told_of_the_newest_state_and_of_flips_only(start_server, connect, users, user):
    """WIRE §5.

    WIRE §5: "Where a slow reader [...] leaves no flip to tell, nothing is sent"; "A status that changed several times
    while a client was slow MAY arrive as only its newest state". The last word is the truth.
    """
    server = await start_server(lease_seconds=30, max_ids_per_second=100_000, max_ids_burst=100_000)
    # Little room on the way, so that the server meets a full socket early.
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    ws = await ws_connect(server.ws, sock=sock, proxy=None, compression=None, max_size=None, max_queue=None)
    watcher = StompClient(ws)
    await watcher.login(server.token(users("watcher")))
    await watcher.subscribe()
    crowd = [f"{users('crowd')}-{number}" for number in range(999)]
    await watcher.watch([*crowd, user])
    watcher.stop_reading()
    for _ in range(40):  # some MB of snapshots
        await watcher.send_frame("SEND", {"destination": "/app/presence.subscribe"}, ids_body(crowd))
    client = await connect(server, user)
    for online in (False, True) * 10:
        await client.set_online(online)
    await client.set_online(False)
    watcher.go_on_reading()
    await watcher.receipt("BEGIN", {"transaction": "t"}, timeout=30)
    await client.set_online(True)
    await watcher.expect_event(user, True, 10)
    check_subscription(watcher, user, "sub-0")
    assert watcher.changes(user) != [True, False] * 11 + [True], "it was slow"
    await watcher.dispose()


# Limits


async def test_a_thousand_ids_to_a_frame_and_five_thousand_to_a_session(server, connect, users):
    """WIRE §5, WIRE §6.

    WIRE §5: "at most 1,000 ids in one frame and 5,000 watched per session"; WIRE §6: 1008, "too many ids/watches".
    """
    watcher = await connect(server, users("watcher"))
    prefix = users("crowd")
    crowd = [f"{prefix}-{number}" for number in range(5_000)]
    for start in range(0, 5_000, 1_000):
        await watcher.watch(crowd[start : start + 1_000])
    await watcher.watch(crowd[:1_000])  # watched already: they count once
    await watcher.unwatch(crowd[:1])
    await watcher.watch([f"{prefix}-one-more"])
    await watcher.send_frame("SEND", {"destination": "/app/presence.subscribe", "receipt": "r"}, ids_body([crowd[0]]))
    code, error = await watcher.closed()
    assert code == 1008
    assert error is not None
    assert error.headers["receipt-id"] == "r"
    assert "userIds" in error.headers["message"]


@pytest.mark.parametrize("destination", ["/app/presence.subscribe", "/app/presence.unsubscribe"])
async def test_more_than_a_thousand_ids_in_a_frame_are_too_many(server, connect, users, destination):
    """WIRE §5: "at most 1,000 ids in one frame"; WIRE §6: "all ids in a frame" count, repeated ones too."""
    watcher = await connect(server, users("watcher"))
    await watcher.send(destination, {"userIds": ["same"] * 1_000})
    await watcher.send_frame("SEND", {"destination": destination}, ids_body(["same"] * 1_001))
    code, error = await watcher.closed()
    assert code == 1008
    assert error is not None
    assert "userIds" in error.headers["message"]


@pytest.mark.parametrize("destination", ["/app/presence.subscribe", "/app/presence.unsubscribe"])
@pytest.mark.parametrize(
    "body",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"userIds": "alice"}',
        '{"userIds": null}',
        '{"userIds": {"alice": 1}}',
        '{"userIds": ["a b"]}',
        '{"userIds": ["ok", "a:b"]}',
        '{"userIds": [""]}',
        '{"userIds": [7]}',
        '{"userIds": [null]}',
        '{"userIds": ["' + "x" * 129 + '"]}',
    ],
)
async def test_a_body_that_is_no_list_of_ids_is_refused(server, connect, users, destination, body):
    """WIRE §5: "with `{"userIds": [...]}`"; WIRE §6: 1008, "bad or missing JSON, ids that are no ids"."""
    watcher = await connect(server, users("watcher"))
    await watcher.send_frame("SEND", {"destination": destination}, body)
    code, error = await watcher.closed()
    assert code == 1008
    assert error is not None
    assert "userIds" in error.headers["message"] or destination in error.headers["message"]


async def test_an_empty_list_and_unwatching_what_is_not_watched_are_no_ops(server, connect, user, users, watcher):
    """WIRE §5: `{"userIds": [...]}` may be empty; WIRE §6: "unwatching what is not watched" is a no-op."""
    assert await watcher.watch([]) == {}
    await watcher.unwatch([])
    await watcher.unwatch([user, users("other")])
    await watcher.watch([user])
    await connect(server, user)
    await watcher.expect_event(user, True)


async def test_the_longest_and_oddest_ids_are_watched_as_any(server, connect, watcher, users):
    """WIRE §1: `[A-Za-z0-9][A-Za-z0-9._~@-]{0,127}`, in the bodies of WIRE §5."""
    tail = users("")
    names = [f"A.b_~@-{tail}", "x" * (128 - len(tail)) + tail]
    for name in names:
        assert (await watcher.watch([name]))[name]["version"] == 0
        await connect(server, name)
        await watcher.expect_event(name, True)


async def test_subscribes_are_limited_once_many_users_are_watched(server, connect, users):
    """WIRE §6: "4 SUBSCRIBEs a second once more than 1,000 users are watched"; up to 1,000 they are not."""
    watcher = await connect(server, users("watcher"))
    prefix = users("crowd")
    await watcher.watch([f"{prefix}-{number}" for number in range(1_000)])
    for number in range(6):
        await watcher.send_frame("SUBSCRIBE", {"id": f"few-{number}", "destination": QUEUE})
    await watcher.receipt("BEGIN", {"transaction": "t"}, timeout=10)
    await watcher.watch([f"{prefix}-more"])
    for number in range(6):
        await watcher.send_frame("SUBSCRIBE", {"id": f"many-{number}", "destination": QUEUE})
    code, error = await watcher.closed(10)
    assert code == 1008
    assert error is not None
    assert "SUBSCRIBE" in error.headers["message"]


# Several instances


@pytest.mark.parametrize("at", [0, 1])
async def test_every_change_reaches_every_session_on_every_instance(pair, connect, user, users, at):
    """WIRE §5.

    WIRE §5: "Every change of a watched user reaches every session that watches it, on every server instance, once per
    subscription", with the same event for all; REST of every instance agrees.
    """
    watchers = [await connect(server, users("watcher")) for server in pair for _ in range(2)]
    for watcher in watchers:
        await watcher.subscribe("a")
        await watcher.subscribe("b")
        await watcher.watch([user])
    here, there = pair[at], pair[1 - at]

    async def all_are_told(online: bool, timeout: float = 5) -> None:
        bodies = {
            (await watcher.expect_event(user, online, timeout, subscription=subscription)).body
            for watcher in watchers
            for subscription in ("a", "b")
        }
        assert len(bodies) == 1
        for server in pair:
            assert await server.is_online(user) is online

    first = await connect(here, user)
    await all_are_told(True)
    second = await connect(there, user)
    await first.disconnect()
    await second.set_online(False)
    await all_are_told(False)
    await second.beat()
    await second.set_online(True)
    await all_are_told(True)
    await second.vanish()
    await all_are_told(False)
    third = await connect(there, user)
    await all_are_told(True)
    await all_are_told(False, LAPSED)
    await third.beat()
    await all_are_told(True)
    marker = await connect(here, users("marker"))
    await nothing_more(marker, *watchers)
    for watcher in watchers:
        for subscription in ("a", "b"):
            check_subscription(watcher, user, subscription)
            assert watcher.changes(user, subscription) == [True, False] * 3 + [True]


async def test_a_user_with_sessions_on_two_instances_is_online_until_the_last_ends(pair, connect, user, users):
    """WIRE §4 and §5 over two instances: "online if this is the first session", "offline if it was the last"."""
    watcher = await connect(pair[0], users("watcher"))
    await watcher.subscribe()
    await watcher.watch([user])
    one, two = await connect(pair[0], user), await connect(pair[1], user)
    await watcher.expect_event(user, True)
    async with two.beating(LEASE / 5):
        await one.vanish()
        truth = Truth(pair[0])
        await wait_until(lambda: len(truth.leases(user)) == 1, what="the first session to end")
        three = await connect(pair[0], user)  # which lapses
        await wait_until(lambda: len(truth.leases(user)) == 2, what="the third session")
        await wait_until(lambda: len(truth.leases(user)) == 1, LAPSED, what="the third session to lapse")
        marker = await connect(pair[1], users("marker"))
        await nothing_more(marker, watcher)
        assert watcher.changes(user) == [True]
    await two.disconnect()
    await watcher.expect_event(user, False)
    assert not await pair[0].is_online(user)
    assert three.connected


async def test_a_snapshot_on_one_instance_knows_of_a_connect_on_another(pair, connect, users):
    """WIRE §3, WIRE §5.

    WIRE §3: "whoever has read CONNECTED is online for every reader"; WIRE §5: the snapshot "is its present state".
    """
    watcher = await connect(pair[1], users("watcher"))
    await watcher.subscribe()
    for _ in range(20):
        name = users("subject")
        client = await connect(pair[0], name)
        assert (await watcher.watch([name]))[name]["online"] is True
        assert await pair[1].is_online(name)
        await client.receipt("DISCONNECT")
        assert (await watcher.watch([name]))[name]["online"] is False
        assert not await pair[1].is_online(name)
        check_subscription(watcher, name, "sub-0")


def worker_of(server: ServerProcess, client: StompClient) -> int:
    """The id of the process that has the server's end of the client's connection."""
    port = client.ws.local_address[1]
    ends = f"{server.port:04X}", f"{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (fields[1].split(":")[1], fields[2].split(":")[1]) == ends:
            inode = fields[9]
            for pid in server.family():
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(link.readlink()) == f"socket:[{inode}]":
                            return pid
    raise AssertionError("nobody has the other end")


async def test_every_change_reaches_every_session_on_every_worker(start_server, connect, user, users):
    """WIRE §5, DESIGN §5, WIRE §4.

    WIRE §5: "on every server instance"; DESIGN §5: `PRESENCE_WORKERS`, "processes on that port; each is an instance";
    WIRE §4: "server process killed | its sessions end when their leases end", and all others go on.
    """
    server = await start_server(workers=2)
    by_worker: dict[int, StompClient] = {}
    while len(by_worker) < 2:
        client = await connect(server, users("watcher"))
        by_worker[worker_of(server, client)] = client
    watchers = list(by_worker.values())
    for watcher in watchers:
        await watcher.subscribe()
        await watcher.watch([user])
    by_home: dict[int, StompClient] = {}
    for _ in range(40):
        client = await connect(server, user)
        for watcher in watchers:
            await watcher.expect_event(user, True)
        assert await server.is_online(user)
        by_home[worker_of(server, client)] = client
        if len(by_home) == 2:
            break
        await client.disconnect()
        for watcher in watchers:
            await watcher.expect_event(user, False)
    assert len(by_home) == 2, "connections are spread"
    victim = worker_of(server, client)
    stays = next(watcher for pid, watcher in by_worker.items() if pid != victim)
    os.kill(victim, signal.SIGKILL)
    await stays.expect_event(user, False, LAPSED)
    assert Truth(server).changes(user)[-1] == (False, "expired")
    await wait_until(lambda: victim not in server.family(), what="the dead worker to be gone")
    await connect(server, user)
    await stays.expect_event(user, True, 10)
    server.check_log()


# At random


RUN_SECONDS = 10.0
USERS = 20
LASTING = 2.5
"""A status that lasted so long, in s, must have been told: nobody is so slow."""


class Actor:
    """A user with one to three sessions who does what the dice say; notes when a session was certainly alive."""

    def __init__(
        self, name: str, pair: tuple[ServerProcess, ServerProcess], dice: random.Random, now: Callable[[], int]
    ):
        self.name, self.pair, self.dice, self.now = name, pair, dice, now
        self.alive: list[tuple[int, int]] = []
        """From when to when, Unix epoch in ms, a session had certainly a lease."""
        self._sessions: list[StompClient] = []
        self._since: dict[StompClient, int] = {}
        self._beaten: dict[StompClient, int] = {}
        self._off: set[StompClient] = set()

    async def act(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        beating = asyncio.create_task(self._beat())
        try:
            while loop.time() < until:
                await self._step()
                await asyncio.sleep(self.dice.choice([0, 0, 0.05, 0.3, 1.0, 3.0]))
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating

    async def end(self, online: bool) -> None:
        """Be online, or offline, at the end."""
        if online and not self._sessions:
            await self._connect()
        for client in self._sessions:
            await client.set_online(online)
        self._off = set() if online else set(self._sessions)

    async def rest(self) -> None:
        """Keep the leases of those who are online."""
        for client in self._sessions:
            if client not in self._off:
                await client.beat()

    def check(self, changes: list[tuple[int, bool]]) -> None:
        """Assert that the changes (version, online) are edges, and that none is a lie."""
        assert [online for _, online in changes] == [i % 2 == 0 for i in range(len(changes))], "changes are edges"
        for version, online in changes:
            alive = [one for one in self.alive if one[0] < version / 1000 < one[1]]
            assert online or not alive, f"{self.name} went offline at {version} with a session alive {alive}"

    async def close(self) -> None:
        for client in self._sessions:
            await client.dispose()

    async def _step(self) -> None:
        if not self._sessions or (len(self._sessions) < 3 and self.dice.random() < 0.35):
            return await self._connect()
        client = self.dice.choice(self._sessions)
        action = self.dice.choice(["off", "on", "on", "disconnect", "close", "vanish", "abort", "sleep"])
        if action == "on":
            await client.set_online(True)
            self._off.discard(client)
            if client not in self._since:
                self._begin(client)
        elif action == "off":
            self._end(client)
            self._off.add(client)
            await client.set_online(False)
        elif action == "sleep":  # its lease lapses, unless it wakes before
            self._end(client)
            self._off.add(client)
        else:
            self._end(client)
            self._sessions.remove(client)
            self._off.discard(client)
            await getattr(client, action)()

    async def _connect(self) -> None:
        server = self.dice.choice(self.pair)
        client = await StompClient.connect(server.ws, server.token(self.name))
        self._sessions.append(client)
        self._begin(client)
        assert await self.dice.choice(self.pair).is_online(self.name), "who has read CONNECTED is online"

    def _begin(self, client: StompClient) -> None:
        self._since[client] = self._beaten[client] = self.now()

    def _end(self, client: StompClient) -> None:
        """The session may end from now on, or has ended with its lease."""
        if client in self._since:
            end = min(self.now(), self._certain(client))
            self.alive.append((self._since.pop(client), end))

    def _certain(self, client: StompClient) -> int:
        """Until when the session has a lease if there is no further heartbeat."""
        return self._beaten[client] + round(LEASE * 1000) - 100

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            for client in list(self._sessions):
                if client not in self._since:
                    continue
                sent = self.now()
                try:
                    await client.beat()
                except (AssertionError, ConnectionClosed):
                    if client in self._since:
                        raise
                if client in self._since:
                    if self.now() > self._certain(client):  # it was late: the lease may have been over
                        self._end(client)
                        self._begin(client)
                    self._beaten[client] = sent


async def watch_at_random(watcher: StompClient, names: list[str], dice: random.Random, until: float) -> set[str]:
    """Subscribe, unsubscribe, watch and unwatch as the dice say; watch all in the end. Return the ids used."""
    loop = asyncio.get_running_loop()
    ids = {"sub-0"}
    while loop.time() < until:
        await asyncio.sleep(dice.choice([0.05, 0.3, 0.6]))
        some = dice.sample(names, 5)
        if dice.random() < 0.5:
            new = [f"s{len(ids)}", f"s{len(ids) + 1}"]
            ids.update(new)
            await watcher.raw("".join(f"SUBSCRIBE\nid:{id_}\ndestination:{QUEUE}\n\n\0" for id_ in new))
            await asyncio.sleep(dice.choice([0, 0.02, 0.3]))
            await watcher.raw("".join(f"UNSUBSCRIBE\nid:{id_}\n\n\0" for id_ in new))
        elif dice.random() < 0.5:
            await watcher.watch(some)
        else:
            await watcher.unwatch(some)
            await watcher.watch(some)
    return ids


def check_nothing_is_missing(
    watcher: StompClient, user: str, changes: list[tuple[int, bool]], since: int, until: int
) -> None:
    """Assert that whatever had to be told on `sub-0` was: it watched all the time from ``since`` to ``until`` (µs).

    A status that lasted is what was told last up to its version. The version itself need not be told: where the user
    left and came back at once, there is no flip to tell ("nothing is sent").
    """
    events = watcher.events(user, "sub-0")
    ends = [version for version, _ in changes[1:]]
    for (version, online), end in zip(changes, [*ends, until], strict=True):
        if version > since and end - version > LASTING * 1_000_000:
            told = [event["online"] for event in events if event["version"] <= version]
            lasted = (end - version) / 1e6
            assert told[-1] == online, f"{user} was online: {online} for {lasted:.1f} s from {version}, never told"


@pytest.mark.timeout(120)
async def test_whatever_happens_every_watcher_is_told_the_truth(pair):
    """WIRE §4, WIRE §5.

    At random: "Every change of a watched user reaches every session that watches it, on every server instance"; "Per
    subscription and user the versions never go down"; "Changes flip"; and the last word is the truth.
    """
    seed = int(os.environ.get("PRESENCE_TEST_SEED") or random.randrange(2**32))
    print(f"PRESENCE_TEST_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
    truth = Truth(pair[0])
    actors = {
        name: Actor(name, pair, random.Random(f"{seed} {name}"), truth.now)
        for name in (f"random-{seed}-{number}" for number in range(USERS))
    }
    names = list(actors)
    watchers = [
        await StompClient.connect(server.ws, server.token(f"watcher-{seed}-{number}"))
        for number, server in enumerate([*pair, *pair])
    ]
    steady, restless = watchers[:2], watchers[2:]
    try:
        for watcher in watchers:
            await watcher.subscribe("sub-0")
            await watcher.watch(names)
        since = truth.now() * 1000
        until = asyncio.get_running_loop().time() + RUN_SECONDS
        acting = asyncio.gather(*(actor.act(until) for actor in actors.values()))
        used = await asyncio.gather(
            *(watch_at_random(one, names, random.Random(f"{seed} {i}"), until) for i, one in enumerate(restless))
        )
        await acting
        dice = random.Random(f"{seed} end")
        expected = {name: dice.random() < 0.5 for name in names}
        await asyncio.gather(*(actor.end(expected[name]) for name, actor in actors.items()))
        until_us = truth.now() * 1000
        async with resting(list(actors.values())):
            marker = await StompClient.connect(pair[0].ws, pair[0].token(f"marker-{seed}"))
            await nothing_more(marker, *steady)
            for watcher in restless:
                await watcher.subscribe("last")
                await nothing_more(marker, watcher)
            await marker.dispose()
            for server in pair:
                batch = (await server.post("/api/presence/batch", names[0], json=names)).json()
                assert {name: batch[name]["isOnline"] for name in names} == expected, "REST"
            assert {name: truth.online(name) for name in names} == expected, "Redis"

        stream = list(truth.stream())
        for name, actor in actors.items():
            changes = [(version, one["online"] == "1") for version, one in stream if one["user"] == name]
            actor.check(changes)
            last = (expected[name], changes[-1][0] if changes else 0)
            for watcher in steady:
                check_subscription(watcher, name, "sub-0", last)
                check_nothing_is_missing(watcher, name, changes, since, until_us)
            for watcher, ids in zip(restless, used, strict=True):
                check_subscription(watcher, name, "sub-0", last)
                check_subscription(watcher, name, "last", last)
                assert watcher.events(name, "last")[0]["version"] == last[1], "a snapshot is the newest status"
                for id_ in ids:
                    check_subscription(watcher, name, id_)
    finally:
        for actor in actors.values():
            await actor.close()
        for watcher in watchers:
            await watcher.dispose()


@contextlib.asynccontextmanager
async def resting(actors: list[Actor]) -> AsyncIterator[None]:
    """Meanwhile all that are online stay so."""

    async def keep() -> None:
        while True:
            await asyncio.gather(*(actor.rest() for actor in actors))
            await asyncio.sleep(0.3)

    keeping = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
