"""`@stomp/stompjs` in Node, unmodified, through all that a presence client does."""

from __future__ import annotations

import asyncio

import pytest

LEASE = 2
SLACK = 2
"""Room for a loaded machine, s."""


async def test_it_is_told_of_both_edges_of_whom_it_watches(server, node_clients, users):
    """WIRE §5: "Every change of a watched user reaches every session that watches it"."""
    alice, bob = users("alice"), users("bob")
    await node_clients.do("a", "activate", url=server.ws, token=server.token(alice), watch=[bob])
    connected = await node_clients.saw("a", "connected")
    assert connected["version"] == "1.2"
    assert connected["user-name"] == alice
    snapshots = await node_clients.watching("a")
    assert {(one["userId"], one["online"], one["snapshot"]) for one in snapshots} == {(bob, False, True)}

    await node_clients.do("b", "activate", url=server.ws, token=server.token(bob))
    await node_clients.saw("b", "connected")
    online = await node_clients.saw_change("a", bob, True)
    await node_clients.do("b", "deactivate")
    offline = await node_clients.saw_change("a", bob, False)
    assert offline["version"] > online["version"]


async def test_it_leaves_cleanly(server, node_clients, user):
    """WIRE §6: "DISCONNECT with receipt: RECEIPT, then the client closes"; `deactivate` waits for that."""
    await node_clients.do("a", "activate", url=server.ws, token=server.token(user))
    await node_clients.saw("a", "connected")
    await server.wait_online(user)
    await node_clients.do("a", "deactivate")
    # It closes by itself and without a code, before the server does.
    assert (await node_clients.saw("a", "closed"))["code"] == 1005
    await node_clients.saw("a", "deactivated")
    await server.wait_online(user, False)


async def test_beating_it_stays_online_and_silent_it_does_not(server, node_clients, users):
    """WIRE §4: SEND `/app/heartbeat`: "lease = L from now"; "L without a heartbeat": "ended within 250 ms"."""
    alice, bob = users("alice"), users("bob")
    await node_clients.do("b", "activate", url=server.ws, token=server.token(bob))
    await node_clients.saw("b", "connected")
    await node_clients.do("a", "activate", url=server.ws, token=server.token(alice), watch=[bob])
    assert (await node_clients.watching("a"))[-1]["online"] is True

    for beat in range(2 * 2 * LEASE):
        await node_clients.do("b", "send", destination="/app/heartbeat", receipt=f"beat-{beat}")
        await node_clients.saw("b", "receipt", receipt=f"beat-{beat}")
        await asyncio.sleep(0.5)  # the pace of the beats, not a wait: they go on for two leases
    assert not [sight for sight in node_clients.sights if sight.get("online") is False]

    await node_clients.saw_change("a", bob, False, timeout=LEASE + SLACK)
    assert not [sight for sight in node_clients.sights if sight["client"] == "b" and sight["saw"] == "closed"]


async def test_it_signs_off_and_on_again(server, node_clients, users):
    """WIRE §4: `{"online": false}`: "ended at once, connection stays"; `true`: "also revives after `false`"."""
    alice, bob = users("alice"), users("bob")
    await node_clients.do("a", "activate", url=server.ws, token=server.token(alice), watch=[bob])
    await node_clients.watching("a")
    await node_clients.do("b", "activate", url=server.ws, token=server.token(bob))
    await node_clients.saw("b", "connected")
    await node_clients.saw_change("a", bob, True)
    await node_clients.do("b", "send", destination="/app/online-status", body='{"online": false}')
    await node_clients.saw_change("a", bob, False)
    await node_clients.do("b", "send", destination="/app/online-status", body='{"online": true}')
    await node_clients.saw_change("a", bob, True)


async def test_it_comes_back_by_itself_after_a_planned_stop(start_server, node_clients, users):
    """WIRE §4, planned server stop: "close 1001, no ERROR frame"."""
    alice, bob = users("alice"), users("bob")
    server = await start_server()
    await node_clients.do("b", "activate", url=server.ws, token=server.token(bob))
    await node_clients.saw("b", "connected")
    await node_clients.do("a", "activate", url=server.ws, token=server.token(alice), watch=[bob])
    assert (await node_clients.watching("a"))[-1]["online"] is True

    assert await server.stop() == 0
    for client in "ab":
        assert (await node_clients.saw(client, "closed"))["code"] == 1001
    await server.start().ready()

    for client in "ab":
        await node_clients.saw(client, "connected", timeout=15)
    await node_clients.saw("a", "message", userId=bob, online=True, timeout=15)
    assert not [sight for sight in node_clients.sights if sight["saw"] == "error"]


async def test_a_refused_token_is_told_in_an_error(server, node_clients):
    """WIRE §6: "1008: content and limits: token"."""
    await node_clients.do("a", "activate", url=server.ws, token="none", options={"reconnectDelay": 0})
    assert "token" in (await node_clients.saw("a", "error"))["message"]
    assert (await node_clients.saw("a", "closed"))["code"] == 1008


async def test_the_servers_heart_beats_reach_it(start_server, node_clients, user):
    """WIRE §3: the server "sends each beat as a message of its own, one LF"."""
    server = await start_server(beat_seconds=0.5)
    options = {"heartbeatIncoming": 500, "heartbeatOutgoing": 500}
    await node_clients.do("a", "activate", url=server.ws, token=server.token(user), options=options)
    await node_clients.saw("a", "connected")
    for _ in range(3):
        await node_clients.saw("a", "beat", timeout=0.5 + SLACK)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"forceBinaryWSFrames": True}, id="binary-messages"),
        pytest.param({"splitLargeFrames": True, "maxWebSocketChunkSize": 16}, id="frames-in-pieces"),
    ],
)
async def test_its_ways_to_send_are_understood(server, node_clients, users, options):
    """WIRE §6: "binary in is accepted; STOMP frames may be split over several WebSocket messages"."""
    alice, bob = users("alice"), users("bob")
    await node_clients.do("a", "activate", url=server.ws, token=server.token(alice), watch=[bob], options=options)
    assert (await node_clients.watching("a"))[-1]["userId"] == bob


async def test_it_comes_over_sockjs(server, node_clients, users):
    """WIRE §3: "the same path is a SockJS base": `sockjs-client`, unmodified, finds its way from `/ws/info`."""
    alice, bob = users("alice"), users("bob")
    url = f"{server.http}/ws"
    await node_clients.do("a", "activate", url=url, token=server.token(alice), watch=[bob], sockjs=True)
    await node_clients.watching("a", timeout=10)
    await node_clients.do("b", "activate", url=url, token=server.token(bob), sockjs=True)
    await node_clients.saw("b", "connected", timeout=10)
    await node_clients.saw_change("a", bob, True, timeout=10)
    await node_clients.do("b", "deactivate")
    await node_clients.saw_change("a", bob, False)
