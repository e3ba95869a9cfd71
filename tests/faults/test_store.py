"""The store is away and comes back: with its data, empty, frozen (WIRE §4, "store away"; DESIGN §3.6).

The lease is short and the amnesty shorter, so that each fault outlasts what it has to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from websockets.exceptions import ConnectionClosed

from tests.conftest import Connect
from tests.support.rest import Response
from tests.support.server import ServerProcess
from tests.support.stomp_client import StompClient
from tests.support.store import ValkeyProcess
from tests.support.truth import Truth, last_seen, ms, nothing_more, row, wait_row
from tests.support.waiting import wait_until
from tests.support.witness import changes_told, told_truly

LEASE = 2.0
AMNESTY = 2.0
SLACK = 2.0
"""Room for a loaded machine, s."""
SETTLED = AMNESTY + LEASE + SLACK + 3.0
"""By then after a fault everything is as it should be."""
SETTINGS: dict[str, Any] = {
    "lease_seconds": LEASE,
    "amnesty_seconds": AMNESTY,
    "store_timeout_seconds": 0.5,
    "drain_seconds": 1.5,
}


@dataclass
class Pair:
    """Two servers on one store, and on each somebody who watches."""

    store: ValkeyProcess
    servers: list[ServerProcess]
    watchers: list[StompClient]
    marker: StompClient
    beating: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def truth(self) -> Truth:
        return Truth(self.servers[0])

    async def beats(self, *clients: StompClient) -> None:
        """Have these clients renew their leases from now on."""
        for client in clients:
            await self.beating.enter_async_context(client.beating(0.4))

    async def watch(self, *users: str) -> None:
        for watcher in self.watchers:
            await watcher.watch(users)

    async def all_told(self) -> None:
        """Return once the watchers have all that happened until now."""
        await nothing_more(self.marker, *self.watchers)


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of the pair; a test may have others."""
    return SETTINGS


@pytest_asyncio.fixture
async def pair(start_server, valkey, connect: Connect, users, settings) -> AsyncIterator[Pair]:
    store = await valkey()
    servers = await asyncio.gather(*(start_server(redis_url=store.url, **settings) for _ in range(2)))
    watchers = [await connect(server, users("watcher")) for server in servers]
    for watcher in watchers:
        await watcher.subscribe()
    made = Pair(store, list(servers), watchers, await connect(servers[0], users("marker")))
    async with made.beating:
        await made.beats(*watchers, made.marker)
        await settled(*servers)
        yield made


async def settled(*servers: ServerProcess, timeout: float = SETTLED) -> None:
    """Wait until "offline" is certain again."""

    async def certain() -> bool:
        answers = [await server.get("/api/presence/check/nobody", "nobody") for server in servers]
        return all(answer.status == 200 for answer in answers)

    await wait_until(certain, timeout, what="the store to have settled")


async def refused(connect: Connect, server: ServerProcess, user: str) -> None:
    """WIRE §4: "new CONNECTs get ERROR `store unavailable`, close 1013"."""
    client = await connect(server, handshake=False)
    headers = {"accept-version": "1.2", "host": "localhost", "Authorization": f"Bearer {server.token(user)}"}
    await client.send_frame("CONNECT", headers)
    assert (await client.expect("ERROR", 1.0 + SLACK)).headers["message"] == "store unavailable"
    code, _ = await client.closed()
    assert code == 1013


def is_unknown(answer: Response) -> None:
    """WIRE §2: "503 with `Retry-After`", a problem document."""
    assert answer.status == 503, answer
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == 503


async def sign_off(client: StompClient) -> None:
    await client.send_frame("SEND", {"destination": "/app/online-status"}, '{"online": false}')


async def all_leave(left: StompClient, gone: StompClient, off: StompClient) -> None:
    """Leave in three ways, without waiting for an effect."""
    await left.close()
    await gone.send_frame("DISCONNECT")
    await sign_off(off)


@dataclass(frozen=True)
class Fault:
    seconds: float
    begin: Callable[[ValkeyProcess], Awaitable[object]]
    end: Callable[[ValkeyProcess], Awaitable[object]]
    empty: bool = False


FAULTS = {
    "killed": Fault(2.6, ValkeyProcess.kill9, ValkeyProcess.start),
    "killed and empty": Fault(2.6, ValkeyProcess.kill9, lambda store: store.start(empty=True), empty=True),
    "empty at once": Fault(0.0, ValkeyProcess.kill9, lambda store: store.start(empty=True), empty=True),
    "frozen for less than a lease": Fault(1.0, ValkeyProcess.freeze, ValkeyProcess.thaw),
    "frozen for a little more than a lease": Fault(2.6, ValkeyProcess.freeze, ValkeyProcess.thaw),
    "frozen for two leases": Fault(4.0, ValkeyProcess.freeze, ValkeyProcess.thaw),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_whoever_kept_beating_stays_online_and_who_left_goes_offline_once(pair: Pair, connect, users, name):
    """WIRE §4: "store away | open connections stay; [...] ends are kept and done later".

    "New CONNECTs get ERROR `store unavailable`, close 1013 | none, if it comes back and the client kept beating".
    """
    fault = FAULTS[name]
    a, b = pair.servers
    on_a, on_b, both, left, gone, off, mute, before, late, early = (
        users(name) for name in ("on-a", "on-b", "both", "left", "gone", "off", "mute", "before", "late", "early")
    )
    await (await connect(a, before)).disconnect()
    stay = [await connect(a, on_a), await connect(b, on_b), await connect(a, both), await connect(b, both)]
    leaving = {left: await connect(a, left), gone: await connect(b, gone), off: await connect(a, off)}
    kept = (on_a, on_b, both)
    await pair.beats(*stay)
    await pair.watch(on_a, on_b, both, *leaving, mute, before, late, early)
    await pair.all_told()
    for client in leaving.values():
        await client.beat()
    mute_client = await connect(b, mute)  # which is online for one lease
    for watcher in pair.watchers:
        await watcher.expect_event(mute, True)
    versions = {user: pair.truth.versions(user)[-1] for user in (*leaving, mute)}

    await fault.begin(pair.store)
    began = time.monotonic()
    if fault.seconds > LEASE:
        await all_leave(*leaving.values())
        await refused(connect, a, early)
    await asyncio.sleep(max(0.0, fault.seconds - (time.monotonic() - began)))
    await fault.end(pair.store)
    if fault.seconds <= LEASE:
        await all_leave(*leaving.values())

    for watcher in pair.watchers:
        for user in (left, gone, off, mute):
            event = (await watcher.expect_event(user, False, SETTLED)).json
            assert event["version"] > versions[user]
            assert ms(event["timestamp"]) == event["version"] // 1000
    late_client = await connect(b, late)
    await pair.beats(late_client)
    for watcher in pair.watchers:
        await watcher.expect_event(late, True)
    await settled(a, b)
    await pair.all_told()

    expected = {
        on_a: [], on_b: [], both: [], before: [], early: [],
        left: [False], gone: [False], off: [False],
        late: [True], mute: [True, False],
    }  # fmt: skip
    await told_truly(pair.watchers, pair.truth, expected)
    for server in pair.servers:
        answer = (await server.post("/api/presence/batch", "anyone", json=list(expected))).json()
        assert {user for user in expected if answer[user]["isOnline"]} == {on_a, on_b, both, late}
    changes = {user: pair.truth.changes(user) for user in expected}
    reasons = ("restored", "revived") if fault.empty else ("connected",)
    assert all(len(changes[user]) == 1 and changes[user][0] in [(True, one) for one in reasons] for user in kept)
    for user, reason in ((left, "disconnected"), (gone, "disconnected"), (off, "signed-off"), (mute, "expired")):
        (offline,) = [one for one in changes[user] if not one[0]]
        assert offline[1] in ({reason, "restored"} if fault.empty else {reason})
    assert [online for online, _ in changes[early]] in ([], [True, False]), "a CONNECT that was refused leaves nothing"
    for client in (*stay, mute_client, leaving[off]):
        await client.beat()  # its connection stayed


# One clause each


async def test_the_servers_heart_beats_go_on_while_a_receipt_waits(start_server, valkey, connect: Connect, user):
    """WIRE §4: "open connections stay", "receipts [...] wait"; §3: "the server [...] sends each beat".

    Also while the store is away, or the client would take its connection for lost.
    """
    store = await valkey()
    server = await start_server(redis_url=store.url, beat_seconds=0.3, **SETTINGS)
    client = await connect(server, user, heart_beat="300,300")
    await store.kill9()
    await client.send_frame("SEND", {"destination": "/app/heartbeat", "receipt": "beaten"})
    for _ in range(5):
        await client.expect_beat(0.3 + SLACK)
        await client.raw("\n")
    assert not client.frames[1:], "the receipt waits"
    await store.start()
    assert (await client.expect("RECEIPT", SETTLED)).headers["receipt-id"] == "beaten"


async def test_receipts_and_snapshots_wait_and_come_in_the_order_of_the_frames(pair: Pair, connect: Connect, users):
    """WIRE §4: "receipts and snapshots wait"; §5: "the receipt [...] comes after all its snapshots"."""
    (a, _), (ann, bob) = pair.servers, (users("ann"), users("bob"))
    await pair.beats(await connect(a, ann))
    client = await connect(a, users("client"))
    await pair.beats(client)
    await client.subscribe("other")
    await pair.store.kill9()
    watching = {"destination": "/app/presence.subscribe"}
    await client.send_frame("SEND", watching | {"receipt": "1"}, json.dumps({"userIds": [ann, bob]}))
    await client.send_frame("SUBSCRIBE", {"id": "s", "destination": "/user/queue/online-status", "receipt": "2"})
    await client.send_frame("SEND", {"destination": "/app/heartbeat", "receipt": "3"})
    unwatching = {"destination": "/app/presence.unsubscribe", "receipt": "4"}
    await client.send_frame("SEND", unwatching, json.dumps({"userIds": [bob]}))
    await client.expect_nothing(1.0)
    await pair.store.start()

    def receipts() -> list[str]:
        return [frame.headers["receipt-id"] for frame in client.frames if frame.command == "RECEIPT"][1:]

    await wait_until(lambda: "4" in receipts(), SETTLED, what="the receipts")
    assert receipts() == ["1", "2", "3", "4"]
    assert [event["online"] for event in client.events(ann, "s")] == [True]
    assert [event["online"] for event in client.events(ann, "other")] == [True]
    assert client.events(bob) == [], "unwatched before its snapshot could be read"
    second = next(frame for frame in client.frames if frame.headers.get("receipt-id") == "2")
    snapshot = next(frame for frame in client.frames if frame.command == "MESSAGE")
    assert client.frames.index(snapshot) < client.frames.index(second)


async def test_heartbeats_count_from_when_they_came(start_server, valkey, connect: Connect, users):
    """WIRE §4: "heartbeats count from when they came".

    Also where the store has lost all (DESIGN §3.6: "lease = L minus the age of the last beat").
    """
    store = await valkey()
    server = await start_server(redis_url=store.url, **SETTINGS | {"lease_seconds": 8})
    truth = Truth(server)

    async def leases_of(user: str) -> dict[str, int]:
        found: dict[str, int] = await wait_until(lambda: truth.leases(user), SETTLED)
        return found

    for empty in (False, True):
        beaten, silent = users("beaten"), users("silent")
        client = await connect(server, beaten)
        await connect(server, silent)
        connected = truth.leases(silent)
        await store.kill9()
        await client.send_frame("SEND", {"destination": "/app/heartbeat", "receipt": "beaten"})
        at = time.time() * 1000
        await client.expect_nothing(1.2)
        await store.start(empty=empty)
        await client.expect("RECEIPT", SETTLED)
        (till,) = (await leases_of(beaten)).values()
        assert at + 8_000 - 300 <= till <= at + 8_000 + 300, "not from when the store was back"
        left = await leases_of(silent)
        assert list(left) == list(connected)
        assert abs(sum(left.values()) - sum(connected.values())) < 100, "one that did not beat gains nothing"


async def test_ends_are_kept_and_done_later_with_the_time_at_which_they_came(pair: Pair, connect: Connect, users):
    """WIRE §4: "ends are kept and done later"; §2: "`lastSeen` is the last activity"."""
    a, b = pair.servers
    closed, off = users("closed"), users("off")
    clients = [await connect(a, closed), await connect(b, off)]
    await pair.store.kill9()
    await clients[0].close()
    await sign_off(clients[1])
    ended = time.time() * 1000
    await asyncio.sleep(1.2)
    await pair.store.start()
    await wait_until(lambda: not pair.truth.leases(closed) and not pair.truth.leases(off), SETTLED)
    await settled(a, b)
    for user in (closed, off):
        assert await last_seen(a, user) <= ended + 300
    assert await last_seen(a, off) >= ended - 1000
    assert pair.truth.changes(closed)[-1] == (False, "disconnected")
    assert pair.truth.changes(off)[-1] == (False, "signed-off")


async def test_one_who_signed_off_and_on_while_it_was_away_is_online(pair: Pair, connect: Connect, users):
    """WIRE §4: ""online": true [...] also revives after `false`"; what was said last holds."""
    a, _ = pair.servers
    on, off = users("on"), users("off")
    clients = {user: await connect(a, user) for user in (on, off)}
    await pair.watch(on, off)
    for empty in (False, True):
        await pair.store.kill9()
        for user, sent in ((on, (False, True)), (off, (False, True, False))):
            for online in sent:
                body = json.dumps({"online": online})
                await clients[user].send_frame("SEND", {"destination": "/app/online-status"}, body)
        await pair.store.start(empty=empty)
        await pair.beats(clients[on]) if not empty else None
        for watcher in pair.watchers:
            if not empty:
                await watcher.expect_event(off, False, SETTLED)
        await settled(*pair.servers)
        await wait_until(lambda: pair.truth.online(on) and not pair.truth.online(off), SETTLED)
    await pair.all_told()
    for watcher in pair.watchers:
        assert changes_told(watcher, off) == [False]
        assert changes_told(watcher, on) in ([], [False, True], [False, True] * 2), "it did sign off"
        assert watcher.events(on)[-1]["online"]


# REST


@pytest.mark.parametrize("how", ("killed", "frozen"))
async def test_rest_does_not_know_while_it_is_away(pair: Pair, connect: Connect, users, how):
    """WIRE §2: "When the presence store cannot be asked, [...] an answer that would be "offline" is a 503"."""
    a, b = pair.servers
    ann, bob = users("ann"), users("bob")
    await pair.beats(await connect(a, ann))
    await a.know(friends={bob: [ann]}, conversations={"c": [ann, bob]})
    await (pair.store.kill9() if how == "killed" else pair.store.freeze())
    requests = [
        a.get(f"/api/presence/check/{ann}", bob),
        b.get(f"/api/presence/check/{bob}", ann),
        a.post("/api/presence/batch", bob, json=[ann, bob]),
        a.get("/api/presence/friends", bob),
        a.get("/api/presence/conversation/c", bob),
    ]
    for answer in await asyncio.gather(*requests):
        is_unknown(answer)
    ready = await a.get("/health/ready")
    assert ready.status == 503
    assert ready.json()["dependencies"]["store"]["state"] == "down"
    assert (await a.get("/health/live")).status == 200, "a restart would not help"
    assert (await a.post("/api/presence/batch", bob, json=[])).json() == {}, "nobody is asked"
    await (pair.store.start() if how == "killed" else pair.store.thaw())

    async def ready_again() -> bool:
        return (await a.get("/health/ready")).status == 200

    await wait_until(ready_again, SETTLED, what="readiness")


async def known_at(server: ServerProcess, user: str) -> float:
    """Ask of the user again and again; return when there was an answer at last, Unix epoch in ms."""
    while True:
        if (await server.get(f"/api/presence/check/{user}", user)).status == 200:
            return time.time() * 1000
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("empty", (False, True))
async def test_rest_knows_who_is_online_and_not_who_is_offline_during_the_amnesty(
    start_server, valkey, connect: Connect, users, empty
):
    """WIRE §2: "or has just come back and is still settling, [...] an answer that would be "offline" is a 503"."""
    store = await valkey()
    server = await start_server(redis_url=store.url, **SETTINGS | {"lease_seconds": 6, "amnesty_seconds": 4})
    ann, bob = users("ann"), users("bob")
    ann_client = await connect(server, ann)
    async with ann_client.beating(0.3):
        await settled(server)
        await store.kill9()
        first_known = asyncio.create_task(known_at(server, bob))
        await store.start(empty=empty)
        await wait_until(lambda: server.log.count("the store has come back") == 1, 3, what="the amnesty")
        await wait_until(lambda: store.redis().sismember("presence:online", ann), 3, what="ann to be reported")
        (till,) = store.redis().hmget("presence:amnesty", "till")
        is_unknown(await server.get(f"/api/presence/check/{bob}", ann))
        is_unknown(await server.post("/api/presence/batch", ann, json=[ann, bob]))
        assert (await server.get(f"/api/presence/check/{ann}", bob)).json() == {"isOnline": True}
        entry = (await server.post("/api/presence/batch", bob, json=[ann])).json()[ann]
        assert entry["isOnline"] is True
        assert time.time() * 1000 < int(till), "the amnesty is on"
        assert await asyncio.wait_for(first_known, SETTLED) >= int(till), "from its first moment on"
        assert (await server.get(f"/api/presence/check/{bob}", ann)).json() == {"isOnline": False}


async def test_connections_from_before_an_outage_are_not_used_after_it(start_server, valkey, connect: Connect, user):
    """WIRE §2: a 503 is for a store that "cannot be asked"; and no reader's turn may be lost to a closed connection."""
    store = await valkey()
    server = await start_server(redis_url=store.url, **SETTINGS | {"lease_seconds": 30, "store_timeout_seconds": 5})
    await connect(server, user)

    async def ask_at_once() -> list[int]:
        await store.freeze()
        asking = [asyncio.create_task(server.get(f"/api/presence/check/{user}", user)) for _ in range(16)]
        await asyncio.sleep(0.5)  # in which all of them have begun
        await store.thaw()
        return [answer.status for answer in await asyncio.gather(*asking)]

    assert await ask_at_once() == [200] * 16
    await store.restart()
    await wait_until(lambda: "the store has come back" in server.log, SETTLED, what="the store to be reached")
    assert await ask_at_once() == [200] * 16


# Loss


@pytest.mark.parametrize("empty", (False, True))
async def test_who_was_on_an_instance_that_died_meanwhile_goes_offline_once(pair: Pair, connect: Connect, users, empty):
    """DESIGN §3.6: "whoever is not in the set gets an offline change with a fresh version (reason `restored`)".

    With its data the leases end (`expired`).
    """
    a, b = pair.servers
    lost, twice, nobody = users("lost"), users("twice"), users("nobody")
    for user in (lost, twice, nobody):
        await connect(b, user)
    await pair.beats(await connect(a, twice))
    watcher, other = pair.watchers[0], await connect(a, users("other"))
    await pair.beats(other)
    await other.subscribe()
    for one in (watcher, other):
        await one.watch([lost, twice])  # `nobody` is watched by nobody: the history alone knows
    versions = {user: pair.truth.versions(user)[-1] for user in (lost, nobody)}
    await wait_row(a, lost, online=True) if row(a, lost) else await wait_row(b, lost, online=True)
    await pair.store.kill9()
    await b.kill9()
    await pair.store.start(empty=empty)
    for one in (watcher, other):
        event = (await one.expect_event(lost, False, SETTLED)).json
        assert event["version"] > versions[lost]
    await settled(a)
    await nothing_more(pair.marker, watcher, other)
    await told_truly([watcher, other], pair.truth, {lost: [False], twice: []})
    offline = [one for one in pair.truth.changes(lost) if not one[0]]
    assert offline == [(False, "restored" if empty else "expired")]
    assert (await a.get(f"/api/presence/check/{lost}", "x")).json() == {"isOnline": False}
    assert (await a.get(f"/api/presence/check/{nobody}", "x")).json() == {"isOnline": False}


async def test_versions_go_on_rising_when_a_new_servers_clock_is_slower(pair: Pair, connect: Connect, users):
    """DESIGN §3: "*floor* [...] (so that a new primary with a slower clock or lost writes can never go back)"."""
    a, b = pair.servers
    stays, comes = users("stays"), users("comes")
    await pair.beats(await connect(b, stays))
    ahead = (pair.truth.now() + 3_600_000) * 1000  # the old one's clock was an hour ahead
    pair.truth.redis.set("presence:version", ahead)
    await pair.watch(stays, comes)
    client = await connect(a, comes)
    for watcher in pair.watchers:
        assert (await watcher.expect_event(comes, True)).json["version"] > ahead
    last = pair.truth.versions(comes)[-1]
    await pair.store.restart(empty=True)
    await settled(a, b)
    await client.set_online(True)
    await client.set_online(False)
    for watcher in pair.watchers:
        event = (await watcher.expect_event(comes, False, SETTLED)).json
        assert event["version"] > last
    await pair.all_told()
    await told_truly(pair.watchers, pair.truth, {stays: []})
    assert pair.truth.versions(stays)[-1] > last
    assert all(version > last for version, _ in pair.truth.stream()), "each of the new server's is above all of the old"


async def test_a_second_outage_right_after_the_first_changes_nothing(pair: Pair, connect: Connect, users):
    """WIRE §4: "none, if it comes back and the client kept beating": during the amnesty, too."""
    a, b = pair.servers
    stays, left = users("stays"), users("left")
    clients = [await connect(a, stays), await connect(b, left)]
    await pair.beats(*clients)
    await pair.watch(stays, left)
    await pair.store.restart(empty=True)
    await wait_until(lambda: pair.truth.online(stays), SETTLED)
    await pair.store.kill9()
    await clients[1].close()
    await asyncio.sleep(1.0)
    await pair.store.start(empty=True)
    await wait_until(lambda: pair.truth.online(stays), SETTLED)
    await pair.store.freeze()
    await asyncio.sleep(LEASE + 0.5)
    await pair.store.thaw()
    for watcher in pair.watchers:
        await watcher.expect_event(left, False, SETTLED)
    await settled(a, b)
    await pair.all_told()
    await told_truly(pair.watchers, pair.truth, {stays: [], left: [False]})


async def test_a_session_that_ends_before_all_have_reported_is_not_taken_for_the_last(
    pair: Pair, connect: Connect, users
):
    """DESIGN §3.6: nobody is called offline before all instances can have reported: here one is slow."""
    a, b = pair.servers
    both, left = users("both"), users("left")
    on_a, on_b = await connect(a, both), await connect(b, both)
    await pair.beats(on_a, on_b)
    leaver = await connect(a, left)
    await pair.beats(leaver)
    await pair.watch(both, left)
    await pair.store.kill9()
    await b.freeze()
    await pair.store.start(empty=True)
    await wait_until(lambda: pair.truth.online(both) and pair.truth.online(left), SETTLED)
    await sign_off(on_a)
    await leaver.close()
    await asyncio.sleep(0.7)  # so slow is the other
    await b.thaw()
    for watcher in pair.watchers:
        await watcher.expect_event(left, False, SETTLED)
    await settled(a, b)
    await pair.all_told()
    await told_truly(pair.watchers, pair.truth, {both: [], left: [False]})


async def test_a_sign_off_during_the_amnesty_is_undone_by_a_sign_on(pair: Pair, connect: Connect, users):
    """WIRE §4: ""online": true [...] also revives after `false`"; what ends the session later has its own reason."""
    a, b = pair.servers
    ann = users("ann")
    client = await connect(a, ann)
    await pair.watch(ann)
    await pair.store.restart()
    await wait_until(lambda: "the store has come back" in a.log, SETTLED, what="the amnesty")
    await client.set_online(False)
    await client.set_online(True)
    await settled(a, b)
    for watcher in pair.watchers:
        await watcher.expect_event(ann, False, LEASE + SLACK)
    assert pair.truth.changes(ann) == [(True, "connected"), (False, "expired")]


async def test_who_begins_to_watch_during_the_amnesty_is_told_the_truth(pair: Pair, connect: Connect, users):
    """WIRE §4: "snapshots wait"; a snapshot is never a false "offline"."""
    a, b = pair.servers
    online, offline = users("online"), users("offline")
    await pair.beats(await connect(b, online))
    await (await connect(b, offline)).disconnect()
    client = await connect(a, users("client"))
    await pair.beats(client)
    await client.subscribe()
    await pair.store.restart(empty=True)
    snapshots = await client.watch([online, offline], timeout=SETTLED)
    assert {user: snapshot["online"] for user, snapshot in snapshots.items()} == {online: True, offline: False}
    await client.expect_nothing(AMNESTY, online)


async def test_what_others_see_of_the_watchers_is_there_again_after_a_loss(pair: Pair, connect: Connect, users):
    """DESIGN §3, `presence:user:{userId}:watchers`; §4: "must be right again"."""
    ann = users("ann")
    await pair.watch(ann)
    names = {watcher.connected.headers["user-name"] for watcher in pair.watchers if watcher.connected}
    await wait_until(lambda: pair.truth.watchers(ann) == names, what="the watchers")
    await pair.store.restart(empty=True)
    await wait_until(lambda: pair.truth.watchers(ann) == names, SETTLED, what="the watchers")


# At the start and at the stop


async def test_a_server_whose_store_is_away_at_the_start_waits_for_it(start_server, valkey, connect: Connect, users):
    """WIRE §4 and DESIGN §7: "A failed dependency is reported as unknown (503)"."""
    store = await valkey()
    ann = users("ann")
    await store.kill9()
    server = await start_server(ready=False, redis_url=store.url, **SETTINGS)

    async def answers() -> bool:
        assert server.running, server.log
        with contextlib.suppress(OSError):
            await server.get("/health/live", timeout=1)
            return True
        return False

    await wait_until(answers, 20, what="it to listen")
    assert (await server.get("/health/ready")).status == 503
    is_unknown(await server.get(f"/api/presence/check/{ann}", ann))
    await refused(connect, server, ann)
    assert server.log.count("store away: ") == 1, "one line, not one for each try"
    await store.start()
    await server.ready()
    assert "store reached" in server.log
    client = await connect(server, ann)
    await settled(server)
    await client.beat()
    assert await server.is_online(ann)


@pytest.mark.parametrize("how", ("killed", "frozen"))
async def test_a_server_can_be_stopped_while_the_store_is_away(start_server, valkey, connect: Connect, users, how):
    """WIRE §4: "planned server stop | [...] then close 1001, no ERROR frame", at the latest after its time limits."""
    store = await valkey()
    server = await start_server(redis_url=store.url, **SETTINGS)
    clients = [await connect(server, users("u")) for _ in range(3)]
    waits = await connect(server, users("waits"))
    await (store.kill9() if how == "killed" else store.freeze())
    await waits.send_frame("SEND", {"destination": "/app/heartbeat", "receipt": "1"})
    await waits.send_frame(
        "SEND", {"destination": "/app/presence.subscribe", "receipt": "2"}, json.dumps({"userIds": ["ann"]})
    )
    os.kill(server.pid, signal.SIGTERM)
    for client in (*clients, waits):
        assert await client.closed(10) == (1001, None)
    assert await server.exited(15) == 0
    assert "sessions are left to their leases" in server.log
    if how == "frozen":
        await store.thaw()


async def test_a_connect_that_was_refused_is_undone_when_it_takes_effect_later(
    start_server, valkey, connect: Connect, user
):
    """DESIGN §3.5: "A connect whose outcome is unknown (time-out, cancelled) is followed by an end until [...]"."""
    store = await valkey()
    server = await start_server(redis_url=store.url, **SETTINGS | {"lease_seconds": 60})
    await (await connect(server, "anyone")).disconnect()  # now the store knows the script
    await settled(server)
    await store.freeze()
    await refused(connect, server, user)
    await store.thaw()
    truth = Truth(server)
    await settled(server)
    await wait_until(lambda: not truth.leases(user), SETTLED, what="the session to end, long before its lease")
    assert truth.changes(user) == [(True, "connected"), (False, "disconnected")], "what was sent took effect"


@pytest.mark.parametrize("settings", [SETTINGS | {"lease_seconds": 5}])
async def test_sockets_that_close_while_they_connect_and_the_store_restarts_leave_nothing(
    pair: Pair, connect: Connect, users
):
    """DESIGN §3.5: "A connect whose outcome is unknown (time-out, cancelled) is followed by an end until [...]"."""
    stays = users("stays")
    await pair.beats(await connect(pair.servers[1], stays))
    await pair.watch(stays)
    names = [users("hasty") for _ in range(200)]

    async def hasty(number: int, user: str) -> None:
        server = pair.servers[number % 2]
        await asyncio.sleep(number * 0.008)
        with contextlib.suppress(OSError, ConnectionClosed):
            client = await StompClient.connect(server.ws, handshake=False)
            headers = {"accept-version": "1.2", "host": "x", "Authorization": f"Bearer {server.token(user)}"}
            await client.send_frame("CONNECT", headers)
            await asyncio.sleep((number * 37 % 100) / 100 * 0.1)
            await (client.vanish() if number % 3 else client.close())

    tasks = [asyncio.create_task(hasty(number, user)) for number, user in enumerate(names)]
    await asyncio.sleep(0.4)
    await pair.store.restart(empty=True)
    await asyncio.sleep(0.3)
    await pair.store.freeze()
    await asyncio.sleep(0.8)
    await pair.store.thaw()
    await asyncio.gather(*tasks)
    await wait_until(
        lambda: not pair.truth.all_online() & set(names),
        5 + SETTLED,
        what="all of them to be offline",
    )
    await settled(*pair.servers)
    # Read at one go: clients that beat are not to be kept waiting.
    assert not {name for name in pair.truth.redis.scan_iter(count=5000) if name.endswith(":sessions")} & {
        f"presence:user:{user}:sessions" for user in names
    }
    stream = list(pair.truth.stream())
    for user in names:
        changes = [(one["online"], one["reason"]) for _, one in stream if one["user"] == user]
        assert all(before[0] != after[0] for before, after in itertools.pairwise(changes))
        if changes:
            assert changes[0][0] == "1" or changes[0][1] == "restored", "the history knew of those before the loss"
            assert changes[-1][0] == "0"
    await pair.all_told()
    await told_truly(pair.watchers, pair.truth, {stays: []})


# The embedded store


async def test_a_kill_of_the_embedded_store_changes_nothing_for_who_is_there(start_server, connect: Connect, users):
    """DESIGN §5 and §3.6: it is started again, empty, and all is as it was; last seen comes from the history."""
    server = await start_server(**SETTINGS | {"lease_seconds": 3})
    truth = Truth(server)
    stays, left, earlier = users("stays"), users("left"), users("earlier")
    watcher, client, leaver = [await connect(server, user) for user in (users("watcher"), stays, left)]
    await (await connect(server, earlier)).disconnect()
    seen = await last_seen(server, earlier)
    await watcher.subscribe()
    await watcher.watch([stays, left, earlier])
    async with watcher.beating(), client.beating(), leaver.beating():
        await wait_row(server, earlier, online=False)
        (valkey,) = [pid for pid, name in server.family().items() if name.startswith("valkey")]
        await server.kill9(valkey)
        await leaver.close()
        await wait_until(lambda: "it is started again" in server.log, 5, what="a line in the log")
        event = (await watcher.expect_event(left, False, SETTLED)).json
        assert event["version"] > watcher.events(left)[0]["version"]
        await settled(server)
        assert await last_seen(server, earlier) == seen
        assert await server.is_online(stays)
        assert changes_told(watcher, stays) == []
        assert changes_told(watcher, earlier) == []
        assert changes_told(watcher, left) == [False]
        assert truth.changes(stays) in ([(True, "restored")], [(True, "revived")])
    assert {name for name in server.family().values() if name.startswith("valkey")} == {"valkey-server"}
