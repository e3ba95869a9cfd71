"""WIRE §4, Session and lease: each row of the table, what follows it, and several sessions of one user."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import statistics
import time

import pytest

from tests.support.stomp_client import StompClient
from tests.support.truth import Truth, entry, last_seen, ms, nothing_more, told, wait_row
from tests.support.waiting import wait_until

LEASE = 2.0
"""Of the server that the tests share, s."""
SLACK = 2.0
"""Room for a loaded machine, s."""
LAPSED = LEASE + SLACK


def session_of(client: StompClient) -> str:
    assert client.connected is not None
    return client.connected.headers["session"]


def lease_of(truth: Truth, client: StompClient) -> int | None:
    """The end of the client's lease, Unix epoch in ms; None when its session has ended."""
    assert client.connected is not None
    return truth.leases(client.connected.headers["user-name"]).get(session_of(client))


async def lapse(truth: Truth, user: str) -> None:
    """Wait until no session of the user is left."""
    await wait_until(lambda: not truth.leases(user), LAPSED, what=f"the leases of {user} to lapse")


async def ended(truth: Truth, client: StompClient) -> None:
    """Wait for the end of the client's session."""
    await wait_until(lambda: lease_of(truth, client) is None, what="the session to end")


# CONNECT accepted


async def test_connect_makes_a_session_with_a_whole_lease(server, connect, user, truth):
    """WIRE §4: "CONNECT accepted | made, lease L"; DESIGN §3: the session key's TTL is the lease."""
    before = truth.now()
    client = await connect(server, user)
    till = truth.leases(user)[session_of(client)]
    assert before + LEASE * 1000 - 2 <= till <= truth.now() + LEASE * 1000
    assert truth.redis.pexpiretime(f"presence:user:{user}:online:{session_of(client)}") == till


async def test_the_user_is_online_with_the_first_session_only(server, connect, user, truth, watcher, marker):
    """WIRE §4: "online if this is the first session"."""
    await watcher.watch([user])
    first = await connect(server, user)
    await watcher.expect_event(user, True)
    second = await connect(server, user)
    assert set(truth.leases(user)) == {session_of(first), session_of(second)}
    await nothing_more(marker, watcher)
    assert watcher.changes(user) == [True]
    assert truth.changes(user) == [(True, "connected")]


async def test_a_connect_that_is_refused_makes_nobody_online(server, connect, user, truth):
    """WIRE §4: "CONNECT *accepted*" makes a session, no other."""
    with pytest.raises(AssertionError, match="Authorization"):
        await connect(server, user, token=server.token(user, ttl=-60))
    assert truth.leases(user) == {}
    assert not await server.is_online(user)


# Heartbeats


@pytest.mark.parametrize("body", ["", "{}", "no JSON", "[1, 2]", '{"online": false}', "ê"])
async def test_a_heartbeat_with_any_body_or_none_renews_the_lease_from_now(server, connect, user, truth, body):
    """WIRE §4: "SEND `/app/heartbeat` (any or no body) | lease = L from now, last active = now"."""
    client = await connect(server, user)
    await client.expect_nothing(0.3)
    before = truth.now()
    await client.send("/app/heartbeat", body)
    after = truth.now()
    till = lease_of(truth, client)
    active = truth.last_active(user)
    assert till is not None
    assert active is not None
    assert before + LEASE * 1000 - 2 <= till <= after + LEASE * 1000
    assert before - 2 <= active <= after


async def test_heartbeats_keep_a_user_online_longer_than_a_lease(server, connect, user, truth, watcher):
    """WIRE §4: "lease = L from now", again and again, and that is no change."""
    client = await connect(server, user)
    await watcher.watch([user])
    async with client.beating(LEASE / 5):
        await watcher.expect_nothing(1.5 * LEASE, user)
    assert await server.is_online(user)
    assert truth.changes(user) == [(True, "connected")]


@pytest.mark.parametrize("how", ["heartbeat", "online-status"])
async def test_what_lapsed_is_revived(server, connect, user, truth, watcher, how):
    """WIRE §4.

    WIRE §4: heartbeat: "revived if the lease had lapsed", "online again if it had lapsed"; `{"online": true}`: "as a
    heartbeat". "L without a heartbeat": "connection stays".
    """
    client = await connect(server, user)
    await watcher.watch([user])
    await watcher.expect_event(user, False, LAPSED)
    before = truth.now()
    await (client.beat() if how == "heartbeat" else client.set_online(True))
    event = (await watcher.expect_event(user, True)).json
    assert await server.is_online(user)
    assert truth.changes(user) == [(True, "connected"), (False, "expired"), (True, "revived")]
    assert ms(event["timestamp"]) >= before
    till = lease_of(truth, client)
    assert till is not None
    assert before + LEASE * 1000 - 2 <= till


async def test_online_true_is_a_heartbeat(server, connect, user, truth, watcher, marker):
    """WIRE §4: "`{"online": true}` | as a heartbeat": lease and last active from now, no change."""
    client = await connect(server, user)
    await watcher.watch([user])
    await client.expect_nothing(0.3)
    before = truth.now()
    await client.set_online(True)
    till, active = lease_of(truth, client), truth.last_active(user)
    assert till is not None
    assert active is not None
    assert till >= before + LEASE * 1000 - 2
    assert active >= before - 2
    await nothing_more(marker, watcher)
    assert watcher.changes(user) == []


# Signing off


async def test_a_sign_off_ends_the_session_at_once_and_leaves_the_connection(
    server, connect, user, users, truth, watcher
):
    """WIRE §4: "`{"online": false}` | ended at once, connection stays", "offline if it was the last"."""
    client = await connect(server, user)
    await client.subscribe()
    await watcher.watch([user])
    before = truth.now()
    await client.set_online(False)
    assert truth.leases(user) == {}, "the receipt comes after the effect"
    assert not await server.is_online(user)
    await watcher.expect_event(user, False)
    assert truth.changes(user) == [(True, "connected"), (False, "signed-off")]
    assert before - 2 <= await last_seen(server, user) <= truth.now()
    # It stays, and goes on to be told.
    other = users("other")
    await client.watch([other])
    await connect(server, other)
    await client.expect_event(other, True)


async def test_after_a_sign_off_nothing_but_online_true_has_an_effect(
    server, connect, user, truth, watcher, marker, users
):
    """WIRE §4.

    WIRE §4: "later heartbeats do not revive it and change nothing, `lastSeen` included; a second sign-off [...] changes
    nothing"; `{"online": true}` "also revives after `false`".
    """
    client = await connect(server, user)
    await watcher.watch([user])
    await client.set_online(False)
    seen = await last_seen(server, user)
    await client.expect_nothing(0.1)  # so that whatever counts as activity now is told from then
    for step in ("/app/heartbeat", "/app/heartbeat", "false"):
        await (client.set_online(False) if step == "false" else client.send(step))
        assert await last_seen(server, user) == seen, step
        assert truth.leases(user) == {}, step
        assert not await server.is_online(user), step
    await nothing_more(marker, watcher)
    assert watcher.changes(user) == [False]
    await client.set_online(True)
    assert await server.is_online(user)
    assert truth.changes(user) == [(True, "connected"), (False, "signed-off"), (True, "revived")]
    # It is a session as before: heartbeats count again, and so does a sign-off.
    await client.beat()
    await client.set_online(False)
    assert not await server.is_online(user)
    assert await last_seen(server, user) > seen


@pytest.mark.parametrize("leaving", ["disconnect", "close", "vanish", "abort"])
async def test_leaving_after_a_sign_off_changes_nothing(server, connect, user, truth, watcher, marker, leaving):
    """WIRE §4, WIRE §2.

    WIRE §4: "DISCONNECT of an ended session, changes nothing"; WIRE §2: "an already ended session that closes later
    does not move it" (`lastSeen`).
    """
    client = await connect(server, user)
    await client.set_online(False)
    seen = await last_seen(server, user)
    await watcher.watch([user])
    await client.expect_nothing(0.1)
    await getattr(client, leaving)()
    await nothing_more(marker, watcher)
    assert await last_seen(server, user) == seen
    assert watcher.changes(user) == []
    assert truth.changes(user) == [(True, "connected"), (False, "signed-off")]


@pytest.mark.parametrize("leaving", ["disconnect", "sign off", "close", "vanish"])
async def test_leaving_after_the_lease_lapsed_changes_nothing(server, connect, user, truth, watcher, marker, leaving):
    """WIRE §4, WIRE §2.

    WIRE §4: "DISCONNECT of an ended session, changes nothing"; WIRE §2: "`lastSeen` is the last activity: last
    heartbeat [...]; never the moment a timeout was noticed, and an already ended session that closes later does not
    move it".
    """
    client = await connect(server, user)
    await client.beat()
    active = truth.last_active(user)
    assert active is not None
    await client.raw("\n")  # a sign of life of the connection, not of the user
    await lapse(truth, user)
    assert await last_seen(server, user) == active
    await watcher.watch([user])
    await (client.set_online(False) if leaving == "sign off" else getattr(client, leaving)())
    await nothing_more(marker, watcher)
    assert await last_seen(server, user) == active
    assert watcher.changes(user) == []
    assert truth.changes(user) == [(True, "connected"), (False, "expired")]


async def test_a_sign_off_after_the_lease_lapsed_holds(server, connect, user, truth):
    """WIRE §4: "later heartbeats do not revive it", also when the sign-off came after the lease had lapsed."""
    client = await connect(server, user)
    await lapse(truth, user)
    await client.set_online(False)
    await client.beat()
    assert truth.leases(user) == {}
    assert not await server.is_online(user)
    await client.set_online(True)
    assert await server.is_online(user)


@pytest.mark.parametrize(
    ("frames", "online"),
    [
        ("off on", True),
        ("off on off", False),
        ("beat off beat", False),
        ("off on beat", True),
        ("beat off", False),
        ("off on off on beat", True),
        ("off off on off beat off", False),
    ],
)
async def test_frames_sent_at_one_go_take_effect_in_order(server, connect, user, truth, frames, online):
    """WIRE §6: "Frames of one connection take effect strictly in order"; WIRE §4, both `/app/online-status` rows."""
    client = await connect(server, user)
    await client.subscribe()
    bodies = {
        "off": ("/app/online-status", '{"online": false}'),
        "on": ("/app/online-status", '{"online": true}'),
        "beat": ("/app/heartbeat", ""),
    }
    for _ in range(10):
        *first, last = frames.split()
        for name in first:
            destination, body = bodies[name]
            await client.send_frame("SEND", {"destination": destination}, body)
        destination, body = bodies[last]
        receipt = {"destination": destination, "receipt": "last"}
        await client.send_frame("SEND", receipt, body)
        watching = {"destination": "/app/presence.subscribe", "receipt": "watching"}
        await client.send_frame("SEND", watching, json.dumps({"userIds": [user]}))
        await client.expect("RECEIPT")
        assert truth.online(user) is online, "the receipt comes after the effects"
        await client.expect_snapshot(user, online)
        await client.expect("RECEIPT")
        await client.unwatch([user])
        await client.set_online(True)
    changes = [one for one, _ in truth.changes(user)]
    assert all(one != other for one, other in itertools.pairwise(changes)), "changes flip"


async def test_a_snapshot_of_oneself_knows_of_the_frame_before_it(server, connect, user):
    """WIRE §6: "Frames of one connection take effect strictly in order", with no receipt asked for."""
    client = await connect(server, user)
    await client.subscribe()
    for online in (False, True) * 10:
        off = {"destination": "/app/online-status"}
        await client.send_frame("SEND", off, json.dumps({"online": online}))
        assert (await client.watch([user]))[user]["online"] is online
        await client.unwatch([user])


# DISCONNECT, and connections that are lost


async def test_disconnect_ends_the_session_at_once(server, connect, user, truth, watcher):
    """WIRE §4: "DISCONNECT | ended at once | offline if it was the last"."""
    client = await connect(server, user)
    await watcher.watch([user])
    before = truth.now()
    await client.receipt("DISCONNECT")
    assert truth.leases(user) == {}, "the receipt comes after the effect"
    assert not await server.is_online(user)
    await watcher.expect_event(user, False)
    assert truth.changes(user) == [(True, "connected"), (False, "disconnected")]
    assert before - 2 <= await last_seen(server, user) <= truth.now()


async def test_disconnect_without_a_receipt_ends_the_session_too(server, connect, user, watcher):
    """WIRE §4: "DISCONNECT | ended at once"; WIRE §6: close 1000 "after DISCONNECT"."""
    client = await connect(server, user)
    await watcher.watch([user])
    await client.send_frame("DISCONNECT")
    await watcher.expect_event(user, False)
    assert await client.closed() == (1000, None)


@pytest.mark.parametrize("leaving", ["close", "vanish", "abort"])
async def test_a_lost_connection_ends_the_session_at_once_without_grace(server, connect, user, truth, watcher, leaving):
    """WIRE §4.

    WIRE §4: "close without DISCONNECT, lost TCP connection [...] | lease shortened to the grace (default 0: ended at
    once) | offline if it was the last".
    """
    client = await connect(server, user)
    await watcher.watch([user])
    await client.beat()
    till = lease_of(truth, client)
    assert till is not None
    await getattr(client, leaving)()
    event = (await watcher.expect_event(user, False)).json
    assert ms(event["timestamp"]) < till, "not when the lease would have ended"
    assert truth.leases(user) == {}
    assert truth.changes(user) == [(True, "connected"), (False, "disconnected")]


async def test_the_last_byte_before_a_lost_connection_is_the_last_activity(start_server, connect, user, watcher, truth):
    """WIRE §2: `lastSeen` is the "last inbound STOMP byte before a lost connection (pongs do not count)"."""
    server = await start_server(ping_seconds=0.1, lease_seconds=5)
    client = await connect(server, user)
    started = Truth(server).now()
    await client.expect_nothing(0.7)
    await client.raw("\n")  # an EOL between frames
    byte = Truth(server).now()
    await client.expect_nothing(1.2)  # during which the client's library answers a dozen pings
    closing = Truth(server).now()
    await client.vanish()
    await server.wait_online(user, False)
    seen = await last_seen(server, user)
    assert started + 600 < seen, "the EOL counts"
    assert seen < closing - 500, "neither pongs nor the end do"
    assert abs(seen - byte) < 500


# A lease that is not renewed


async def test_a_session_ends_within_250_ms_of_its_leases_end(start_server, connect, users):
    """WIRE §4: "ended within 250 ms of the lease's end": half of 20 that end one after another, whatever the load."""
    server = await start_server(lease_seconds=1)
    truth = Truth(server)
    ends: dict[str, int] = {}
    for number in range(20):
        user = users(f"lapsing-{number}")
        client = await connect(server, user)
        till = truth.redis.zscore("presence:deadlines", f"{user}:{session_of(client)}")
        assert till is not None
        ends[user] = int(till)
        await asyncio.sleep(0.09)  # so that they lapse one after another
    await wait_until(lambda: not truth.all_online(), LAPSED, what="all to lapse")
    late: list[float] = []
    for user, end in ends.items():
        assert truth.changes(user) == [(True, "connected"), (False, "expired")]
        late.append(truth.versions(user)[-1] / 1000 - end)
    assert min(late) >= 0
    assert statistics.median(late) < 250, late


async def test_a_session_ends_with_its_lease_and_the_connection_stays(server, connect, user, users, truth, watcher):
    """WIRE §4, WIRE §5.

    WIRE §4: "L without a heartbeat | ended within 250 ms of the lease's end [...]; connection stays as long as it is
    not silent | offline if it was the last". What it watches goes on as well (WIRE §5).
    """
    client = await connect(server, user)
    await client.subscribe()
    await watcher.watch([user])
    till = lease_of(truth, client)
    assert till is not None
    event = (await watcher.expect_event(user, False, LAPSED)).json
    ended = event["version"] / 1000
    assert till <= ended, "not before its end"
    assert ended < till + SLACK * 1000
    assert truth.changes(user) == [(True, "connected"), (False, "expired")]
    assert truth.leases(user) == {}
    assert truth.device(user, session_of(client)) is None
    assert not await server.is_online(user)
    other = users("other")
    await client.watch([other])
    await connect(server, other)
    await client.expect_event(other, True)


async def test_last_seen_is_the_last_heartbeat_not_the_moment_of_the_timeout(server, connect, user, truth):
    """WIRE §2: "last heartbeat [...]; never the moment a timeout was noticed"."""
    client = await connect(server, user)
    await client.expect_nothing(0.3)
    await client.beat()
    active = truth.last_active(user)
    await lapse(truth, user)
    assert await last_seen(server, user) == active
    assert (await wait_row(server, user, online=False))["last_active"] == active


async def test_neither_bytes_nor_other_frames_renew_a_lease(server, connect, user, truth, users):
    """WIRE §4: only heartbeats (and `{"online": true}`) renew: "L *without a heartbeat*" ends."""
    client = await connect(server, user)
    till = lease_of(truth, client)
    await client.expect_nothing(0.3)
    await client.raw("\n")
    await client.subscribe()
    await client.watch([users("other")])
    await client.receipt("BEGIN", {"transaction": "t"})
    await wait_until(lambda: lease_of(truth, client) != till, LAPSED, what="the lease to end, or to be renewed")
    assert lease_of(truth, client) is None


async def test_overdue_sessions_end_in_the_order_of_their_leases(server, users, truth):
    """WIRE §4: "ended within 250 ms [...] (up to 10,000 a second, beyond that in the order of their leases)"."""
    crowd = [f"{users('crowd')}-{number}" for number in range(1_500)]
    now = truth.now()
    pipe = truth.redis.pipeline(transaction=True)
    shuffled = sorted(crowd, key=lambda name: name[::-1])
    for name in shuffled:
        till = now - 1 - crowd.index(name)  # the last of the crowd was due first
        pipe.sadd("presence:online", name)
        pipe.zadd(f"presence:user:{name}:sessions", {"s": till})
        pipe.zadd("presence:deadlines", {f"{name}:s": till})
    pipe.execute()
    await wait_until(lambda: not truth.online(crowd[0]), 10, what="the crowd to end")
    ours = set(crowd)
    ended = [one["user"] for _, one in truth.stream() if one["user"] in ours]
    assert ended == crowd[::-1]


# Grace


async def test_within_the_grace_a_reconnect_changes_nothing_and_after_it_the_session_ends(start_server, connect, users):
    """WIRE §4, WIRE §2.

    WIRE §4: "close without DISCONNECT, lost TCP connection, silence | lease shortened to the grace". WIRE §2: the
    `lastSeen` of a lost connection is its "last inbound STOMP byte", not the end of the grace. "DISCONNECT | ended at
    once" all the same.
    """
    server = await start_server(lease_seconds=6, grace_seconds=1.5, silence_seconds=1)
    truth = Truth(server)
    back, gone, silent, polite = (users(name) for name in ("back", "gone", "silent", "polite"))
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe()
    await watcher.watch([back, gone, silent, polite])
    async with watcher.beating(0.3):
        quiet = await connect(server, silent)
        clients = {name: await connect(server, name) for name in (back, gone, polite)}
        leaving = truth.now()
        await clients[polite].disconnect()
        assert not await server.is_online(polite), "no grace after DISCONNECT"
        await clients[back].vanish()
        await clients[gone].close()
        await wait_until(
            lambda: all(till <= truth.now() + 1_500 for name in (back, gone) for till in truth.leases(name).values()),
            what="the leases to be shortened",
        )
        assert await server.is_online(back), "the grace is a lease"
        shortened = truth.leases(gone)[session_of(clients[gone])]
        assert leaving + 1_500 <= shortened + 2
        again = await connect(server, back)
        async with again.beating(0.3):
            code, error = await quiet.closed()
            assert (code, error and error.headers["message"]) == (1002, "silence")
            assert await server.is_online(silent), "silence is a lost connection: there is the grace"
            await watcher.expect_event(polite, True)
            await watcher.expect_event(polite, False)
            await watcher.expect_event(gone, True)
            event = (await watcher.expect_event(gone, False, 1.5 + SLACK)).json
            assert event["version"] / 1000 >= shortened
            await watcher.expect_event(silent, True)
            await watcher.expect_event(silent, False, 3 + SLACK)
            assert abs(await last_seen(server, gone) - leaving) < 1_000, "not the end of the grace"
            assert truth.changes(gone) == [(True, "connected"), (False, "disconnected")]
            assert truth.changes(silent) == [(True, "connected"), (False, "disconnected")]
            assert set(truth.leases(back)) == {session_of(again)}, "what was lost has ended by itself"
            assert truth.changes(back) == [(True, "connected")], "a reconnect within the grace is no change"
            assert told(watcher, back) == [(False, True), (True, False)]


async def test_the_grace_never_makes_a_lease_longer(start_server, connect, user):
    """WIRE §4: "lease *shortened* to the grace"."""
    server = await start_server(lease_seconds=2, grace_seconds=1.9)
    truth = Truth(server)
    client = await connect(server, user)
    till = lease_of(truth, client)
    await client.expect_nothing(0.5)
    await client.vanish()
    await wait_until(lambda: truth.redis.exists(f"presence:user:{user}:lost"), what="the loss to be noted")
    assert lease_of(truth, client) == till


# Processes that end


async def test_the_sessions_of_a_killed_server_end_with_their_leases(start_server, valkey, connect, users):
    """WIRE §4: "server process killed | its sessions end when their leases end | offline if none is left"."""
    store = await valkey()
    first = await start_server(redis_url=store.url, amnesty_seconds=0)
    second = await start_server(redis_url=store.url, amnesty_seconds=0)
    truth = Truth(second)
    alone, twice = users("alone"), users("twice")
    watcher = await connect(second, users("watcher"))
    await watcher.subscribe()
    lost = await connect(first, alone)
    await connect(first, twice)
    kept = await connect(second, twice)
    await watcher.watch([alone, twice])
    async with kept.beating(0.3):
        till = lease_of(truth, lost)
        assert till is not None
        await first.kill9()
        event = (await watcher.expect_event(alone, False, LAPSED)).json
        assert event["version"] / 1000 >= till, "not before"
        await wait_until(lambda: set(truth.leases(twice)) == {session_of(kept)}, LAPSED, what="the lost one to end")
        assert await second.is_online(twice)
        assert truth.changes(alone) == [(True, "connected"), (False, "expired")]
        assert truth.changes(twice) == [(True, "connected")]


async def test_a_planned_stop_leaves_the_drain_time_and_closes_with_1001(start_server, valkey, connect, users):
    """WIRE §4.

    WIRE §4: "planned server stop | first all its leases become min(rest, max(drain, grace)) [...]; then close 1001, no
    ERROR frame | none if the client is back in time".
    """
    store = await valkey()
    first = await start_server(redis_url=store.url, amnesty_seconds=0, lease_seconds=4, drain_seconds=1.5)
    second = await start_server(redis_url=store.url, amnesty_seconds=0, lease_seconds=4)
    truth = Truth(second)
    back, gone, late, off = (users(name) for name in ("back", "gone", "late", "off"))
    watcher = await connect(second, users("watcher"))
    await watcher.subscribe()
    late_client = await connect(first, late)  # which does not beat: its lease is nearly over when the server stops
    off_client = await connect(first, off)
    await off_client.set_online(False)
    await watcher.watch([back, gone, late, off])
    await late_client.expect_nothing(3.0)
    late_till = lease_of(truth, late_client)
    clients = [await connect(first, back), await connect(first, gone)]
    before = truth.now()
    os.kill(first.pid, signal.SIGTERM)
    for client in [*clients, late_client, off_client]:
        assert await client.closed() == (1001, None)
    closed = truth.now()
    assert lease_of(truth, late_client) in (late_till, None), "min(rest, drain): never longer"
    till = truth.leases(gone)[session_of(clients[1])]
    assert before + 1_500 - 2 <= till <= closed + 1_500, "before the sockets closed"
    again = await connect(second, back)
    async with again.beating(0.5):
        await watcher.expect_event(gone, True)
        event = (await watcher.expect_event(gone, False, 1.5 + SLACK)).json
        assert event["version"] / 1000 >= till
        await wait_until(lambda: set(truth.leases(back)) == {session_of(again)}, LAPSED, what="the old one to end")
        assert truth.changes(back) == [(True, "connected")], "back in time: no change"
        assert truth.changes(gone) == [(True, "connected"), (False, "drained")]
        assert await last_seen(second, gone) <= closed, "not the end of the drain time"
        assert [online for online, _ in truth.changes(late)] == [True, False]
        assert truth.changes(off) == [(True, "connected"), (False, "signed-off")]
    assert await first.exited() == 0


async def test_a_planned_stop_leaves_the_grace_if_that_is_longer(start_server, valkey, connect, user):
    """WIRE §4: "min(rest, *max(drain, grace)*)"."""
    store = await valkey()
    settings = {"redis_url": store.url, "amnesty_seconds": 0, "lease_seconds": 5}
    server = await start_server(**settings, drain_seconds=0, grace_seconds=1.5)
    client = await connect(server, user)
    before: int = store.redis().time()[0] * 1000
    await server.stop()
    (till,) = [till for _, till in store.redis().zrange(f"presence:user:{user}:sessions", 0, -1, withscores=True)]
    assert before + 1_500 <= till <= (time.time() + 1.5) * 1000 + 10
    assert await client.closed() == (1001, None)


# The store is away


async def test_while_the_store_is_away_nothing_is_lost(start_server, valkey, connect, users):
    """WIRE §4.

    WIRE §4: "store away | open connections stay; heartbeats count from when they came; ends are kept and done later;
    receipts and snapshots wait; new CONNECTs get ERROR `store unavailable`, close 1013 | none, if it comes back and the
    client kept beating".
    """
    store = await valkey()
    server = await start_server(redis_url=store.url, lease_seconds=6, store_timeout_seconds=0.5, amnesty_seconds=0.5)
    truth = Truth(server)
    beats, leaves, signs_off, goes_on = (users(name) for name in ("beats", "leaves", "signs-off", "goes-on"))
    clients = {name: await connect(server, name) for name in (beats, leaves, signs_off, goes_on)}
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe()
    await watcher.watch(list(clients))
    await store.kill9()

    beating = clients[beats]
    receipt = {"destination": "/app/heartbeat", "receipt": "beaten"}
    await beating.send_frame("SEND", receipt)
    beaten = int(time.time() * 1000)
    await clients[leaves].close()
    left = int(time.time() * 1000)
    off = {"destination": "/app/online-status", "receipt": "off"}
    await clients[signs_off].send_frame("SEND", off, '{"online": false}')
    await clients[goes_on].send_frame("SEND", {"destination": "/app/online-status"}, '{"online": false}')
    await clients[goes_on].send_frame("SEND", {"destination": "/app/heartbeat", "receipt": "after it"})
    watching = {"destination": "/app/presence.subscribe", "receipt": "watching"}
    await watcher.send_frame("SEND", watching, json.dumps({"userIds": [beats]}))

    newcomer = users("newcomer")
    refused = await connect(server, handshake=False)
    await refused.send_frame(
        "CONNECT", {"accept-version": "1.2", "host": "localhost", "Authorization": f"Bearer {server.token(newcomer)}"}
    )
    error = await refused.expect("ERROR", 0.5 + SLACK)
    assert error.headers["message"] == "store unavailable"
    assert (await refused.closed())[0] == 1013
    for client in (beating, clients[signs_off], clients[goes_on], watcher):
        await client.expect_nothing(0.2)  # receipts and snapshots wait, the connections stay

    await store.start()
    assert (await beating.expect("RECEIPT", 10)).headers["receipt-id"] == "beaten"
    assert (await clients[signs_off].expect("RECEIPT", 10)).headers["receipt-id"] == "off"
    # Nothing comes of a heartbeat after a sign-off, but it comes after it (WIRE §6, "strictly in order").
    assert (await clients[goes_on].expect("RECEIPT", 10)).headers["receipt-id"] == "after it"
    snapshot = await watcher.expect_snapshot(beats, True, 10)
    told_of = await watcher.expect_event(leaves, False, 10)
    await watcher.expect_event(signs_off, False, 10)
    assert [frame.headers["receipt-id"] for frame in watcher.frames if frame.headers.get("receipt-id") == "watching"]
    assert snapshot.json["version"] < told_of.json["version"]
    till = lease_of(truth, beating)
    assert till is not None
    assert beaten + 6_000 - 1_000 < till < beaten + 6_000 + 1_000, "from when the heartbeat came"
    assert truth.changes(beats) == [(True, "connected")]
    assert truth.changes(leaves) == [(True, "connected"), (False, "disconnected")]
    assert truth.changes(signs_off) == [(True, "connected"), (False, "signed-off")]
    assert truth.changes(newcomer) in ([], [(True, "connected"), (False, "disconnected")])
    assert truth.leases(newcomer) == {}

    async def is_settled() -> bool:
        answer = await server.post("/api/presence/batch", leaves, json=[leaves])
        return bool(answer.status == 200)

    await wait_until(is_settled, 10, what="the store to have settled")
    assert abs(await last_seen(server, leaves) - left) < 1_000, "when it left, not when that was noted"


# Connections that renew their leases themselves


async def test_open_connections_renew_their_leases_themselves_if_so_configured(start_server, connect, users):
    """WIRE §4.

    WIRE §4: "With `PRESENCE_LEASE_RENEWED_BY=connection` an open, live connection renews the lease itself, without
    `/app/heartbeat` [...]; sign-off still ends it."
    """
    server = await start_server(lease_seconds=1.5, lease_renewed_by="connection", silence_seconds=3)
    truth = Truth(server)
    lives, off, silent, lost = (users(name) for name in ("lives", "off", "silent", "lost"))
    clients = {name: await connect(server, name) for name in (lives, off, silent, lost)}
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe()
    await watcher.watch(list(clients))
    active = truth.last_active(lives)
    first_lease = lease_of(truth, clients[lives])
    assert first_lease is not None
    await clients[off].set_online(False)
    seen = await last_seen(server, off)
    await clients[lost].vanish()
    await watcher.expect_event(lost, False)
    assert truth.changes(lost)[-1] == (False, "disconnected")

    async def signs_of_life() -> None:
        while True:
            for client in (clients[lives], clients[off], watcher):
                await client.raw("\n")
            await asyncio.sleep(0.3)

    living = asyncio.create_task(signs_of_life())
    try:
        assert (await clients[silent].closed(3 + SLACK))[0] == 1002, "it lived longer than two leases, and was not live"
        await watcher.expect_event(silent, False)
        till = lease_of(truth, clients[lives])
        assert till is not None
        assert till > first_lease + 1_000
        assert truth.changes(lives) == [(True, "connected")]
        assert truth.changes(silent) == [(True, "connected"), (False, "disconnected")]
        assert truth.last_active(lives) == active, "the connection is active, not its user"
        assert truth.changes(off) == [(True, "connected"), (False, "signed-off")], "nothing has renewed it"
        assert await last_seen(server, off) == seen
        await clients[off].set_online(True)
        assert await server.is_online(off)
        await clients[lives].set_online(False)
        await watcher.expect_event(lives, False)
    finally:
        living.cancel()


# Devices


IPAD = "Mozilla/5.0 (iPad; CPU OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile/15E148 Safari/604.1"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile Safari/604.1"
PIXEL = "Mozilla/5.0 (Linux; Android 14; Pixel 8) AppleWebKit/537.36 Chrome/126.0.0.0 Mobile Safari/537.36"
TAB = "Mozilla/5.0 (Linux; Android 13; SM-X710) AppleWebKit/537.36 Chrome/126.0.0.0 Safari/537.36"
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0"


@pytest.mark.parametrize(
    ("agent", "header", "device"),
    [
        (IPAD, None, "tablet"),
        (TAB, None, "tablet"),
        (IPHONE, None, "mobile"),
        (PIXEL, None, "mobile"),
        (FIREFOX, None, "web"),
        ("", None, "web"),
        (None, None, "web"),
        (FIREFOX, "tablet", "tablet"),
        (IPAD, "mobile", "mobile"),
        (IPHONE, "web", "web"),
        (IPAD, "fridge", "tablet"),
        (IPHONE, "Tablet", "mobile"),
        (IPHONE, "", "mobile"),
    ],
)
async def test_the_device_comes_from_the_user_agent_or_the_device_header(
    server, connect, user, truth, agent, header, device
):
    """WIRE §4.

    WIRE §4: "Device, from the User-Agent of the upgrade: `tablet`, `mobile`, else `web`; a CONNECT header `device` with
    one of the three wins."
    """
    client = await connect(server, user, user_agent=agent, headers={"device": header})
    assert truth.device(user, session_of(client)) == device
    assert (await wait_row(server, user, online=True))["device"] == device


async def test_a_change_has_the_device_of_its_own_session(server, connect, user, truth):
    """WIRE §4: the device is that of the session; guide, Multi-Device Support."""
    phone = await connect(server, user, headers={"device": "mobile"})
    tablet = await connect(server, user, headers={"device": "tablet"})
    assert truth.device(user, session_of(phone)) == "mobile"
    assert truth.device(user, session_of(tablet)) == "tablet"
    await phone.beat()
    assert truth.device(user, session_of(phone)) == "mobile", "a heartbeat leaves it"
    await phone.disconnect()
    await tablet.disconnect()
    devices = [(one["online"], one["device"]) for _, one in truth.stream() if one["user"] == user]
    assert devices == [("1", "mobile"), ("0", "tablet")]
    assert (await wait_row(server, user, online=False))["device"] == "tablet"


# Several sessions of one user


@pytest.mark.parametrize("leaving", ["disconnect", "close", "vanish", "sign off"])
async def test_the_last_of_several_sessions_decides(server, connect, user, truth, watcher, marker, leaving):
    """WIRE §4: "offline if it was the last", in each row."""
    clients = [await connect(server, user) for _ in range(3)]
    await watcher.watch([user])

    async def leave(client: StompClient) -> None:
        await (client.set_online(False) if leaving == "sign off" else getattr(client, leaving)())

    for client in clients[:2]:
        await leave(client)
        await ended(truth, client)
        assert await server.is_online(user)
        await clients[2].beat()
    await nothing_more(marker, watcher)
    assert watcher.changes(user) == []
    await leave(clients[2])
    await watcher.expect_event(user, False)
    assert [online for online, _ in truth.changes(user)] == [True, False]


async def test_leases_of_one_user_are_independent(server, connect, user, truth, watcher, marker):
    """WIRE §4, Guide.

    WIRE §4: a heartbeat renews the lease of its session; guide: "Each session has independent TTL. User stays online
    while any session is active". One session expires while the other beats.
    """
    beats, lapses = await connect(server, user), await connect(server, user)
    await watcher.watch([user])
    till = lease_of(truth, lapses)
    async with beats.beating(LEASE / 5):
        await wait_until(lambda: (lease_of(truth, beats) or 0) > (till or 0), what="the heartbeats")
        assert lease_of(truth, lapses) == till
        await wait_until(lambda: set(truth.leases(user)) == {session_of(beats)}, LAPSED, what="one lease to lapse")
        assert truth.device(user, session_of(lapses)) is None
        await nothing_more(marker, watcher)
        assert watcher.changes(user) == []
        assert await server.is_online(user)
    await watcher.expect_event(user, False, LAPSED)
    await lapses.beat()
    await watcher.expect_event(user, True)
    assert set(truth.leases(user)) == {session_of(lapses)}, "a heartbeat revives its own session only"
    assert truth.changes(user) == [(True, "connected"), (False, "expired"), (True, "revived")]


async def test_a_new_socket_that_overlaps_the_old_one_is_no_change(server, connect, user, truth, watcher, marker):
    """WIRE §4.

    WIRE §4: "online if this is the first session", "offline if it was the last": a client that reconnects before its
    old connection is found lost was never away.
    """
    await watcher.watch([user])
    client = await connect(server, user)
    for leaving in ("vanish", "abort", "close", "disconnect"):
        newer = await connect(server, user)
        await getattr(client, leaving)()
        await ended(truth, client)
        client = newer
    await nothing_more(marker, watcher)
    assert watcher.changes(user) == [True]
    assert truth.changes(user) == [(True, "connected")]
    assert set(truth.leases(user)) == {session_of(client)}


async def test_the_sign_off_of_one_session_is_that_of_one_session(server, connect, user, truth):
    """WIRE §4: the *session* is ended: heartbeats of another one count, those of the signed-off one do not."""
    off, beats = await connect(server, user), await connect(server, user)
    await off.set_online(False)
    await beats.beat()
    active = truth.last_active(user)
    till = truth.leases(user)
    assert set(till) == {session_of(beats)}
    await off.expect_nothing(0.1)
    await off.beat()
    assert truth.leases(user) == till
    assert truth.last_active(user) == active
    await beats.set_online(False)
    assert (await entry(server, user))["status"] == "OFFLINE"
