"""The guide's flows, step by step as it numbers them, its key features, and its health checks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from presence.adapters.directory import FileDirectory
from presence.adapters.redis import RedisStore
from presence.adapters.sqlite import SqliteHistory
from presence.fanout import Fanout
from presence.service import PresenceService, Rules
from tests.support.server import ServerProcess
from tests.support.stomp_client import StompClient
from tests.support.truth import Truth, entry, last_seen, ms, told, wait_row
from tests.support.waiting import wait_until

LEASE = 2.0
SLACK = 2.0


def session_of(client: StompClient) -> str:
    assert client.connected is not None
    return client.connected.headers["session"]


# Flow Diagrams


async def test_online_flow(server, connect, user, watcher):
    """Guide, Online Flow [1]–[8]."""
    truth = Truth(server)
    await watcher.watch([user])
    before = truth.now()
    # [1] Client connects WebSocket, [2] WebSocketPresenceHandler detects connection, [3] setUserOnline(…)
    client = await connect(server, user, headers={"device": "mobile"})
    # [4] Redis: Create session key with TTL + Add to online set
    key = f"presence:user:{user}:online:{session_of(client)}"
    assert truth.redis.get(key) == "mobile"
    assert 0 < int(truth.redis.pttl(key)) <= LEASE * 1000
    assert truth.redis.sismember("presence:online", user)
    # [5] Cassandra (here what is embedded for it): Update is_online = true, last_active
    kept = await wait_row(server, user, online=True)
    assert kept["device"] == "mobile"
    assert before - 2 <= kept["last_active"] <= truth.now()
    # [6] Kafka (here the stream): Send OnlineStatusEvent(online=true)
    assert truth.changes(user) == [(True, "connected")]
    # [7] OnlineStatusEventConsumer processes event, [8] WebSocket: Notify all watchers via /queue/online-status
    event = (await watcher.expect_event(user, True)).json
    assert event["version"] == truth.versions(user)[0] == kept["version"]


async def test_offline_flow_disconnect(server, connect, user, watcher):
    """Guide, Offline Flow (Disconnect) [1]–[8]."""
    truth = Truth(server)
    await watcher.watch([user])
    first, last = await connect(server, user), await connect(server, user)
    await watcher.expect_event(user, True)
    # [1] Client disconnects, [2] the handler detects it, [3] setUserOffline(…)
    await first.disconnect()
    # [4] Redis: Remove session key, check remaining sessions
    assert truth.redis.exists(f"presence:user:{user}:online:{session_of(first)}") == 0
    assert truth.redis.exists(f"presence:user:{user}:online:{session_of(last)}") == 1
    assert truth.redis.sismember("presence:online", user), "there is one left"
    before = truth.now()
    await last.disconnect()
    # [5] If no more sessions: Remove from online set + Update last_active
    assert not truth.redis.sismember("presence:online", user)
    assert truth.redis.keys(f"presence:user:{user}:online:*") == []
    active = truth.last_active(user)
    assert active is not None
    assert active >= before - 2
    # [6] Cassandra: Update is_online = false, last_active = now()
    assert (await wait_row(server, user, online=False))["last_active"] == active
    # [7] Kafka: Send OnlineStatusEvent(online=false), [8] Notify all watchers
    assert truth.changes(user) == [(True, "connected"), (False, "disconnected")]
    await watcher.expect_event(user, False)


async def test_offline_flow_timeout(server, connect, user, watcher):
    """Guide, Offline Flow (Timeout) [1]–[6], with the event that Redis publishes of the expired key."""
    truth = Truth(server)
    expired: list[str] = []
    listening = truth.redis.pubsub()
    listening.psubscribe("__keyevent@*__:expired")
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            message = listening.get_message(timeout=0.1)
            if message and message["type"] == "pmessage":
                expired.append(message["data"])

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        await watcher.watch([user])
        lapses, beats = await connect(server, user), await connect(server, user)
        await watcher.expect_event(user, True)
        async with beats.beating(LEASE / 5):
            # [1] Redis session key expires, [2] RedisKeyExpirationListener detects expired key
            key = f"presence:user:{user}:online:{session_of(lapses)}"
            await wait_until(lambda: key in expired, LEASE + SLACK, what="the expired event")
            # [3] Check if user has other active sessions
            await wait_until(lambda: len(truth.leases(user)) == 1, what="the session to end")
            assert truth.redis.sismember("presence:online", user)
            assert truth.changes(user) == [(True, "connected")]
        # [4] If no more sessions: Remove from online set
        await wait_until(lambda: not truth.redis.sismember("presence:online", user), LEASE + SLACK)
        active = truth.last_active(user)
        # [5] Kafka: Send OnlineStatusEvent(online=false), [6] Follow same notification flow as manual disconnect
        assert truth.changes(user) == [(True, "connected"), (False, "expired")]
        await watcher.expect_event(user, False)
        assert (await wait_row(server, user, online=False))["last_active"] == active
        key = f"presence:user:{user}:online:{session_of(beats)}"
        await wait_until(lambda: key in expired, what="the expired event of the last one")
    finally:
        stop.set()
        thread.join()
        listening.close()


async def test_heartbeat_flow(server, connect, user):
    """Guide, Heartbeat Flow [1]–[5]."""
    truth = Truth(server)
    client = await connect(server, user)
    key = f"presence:user:{user}:online:{session_of(client)}"
    till, active = truth.redis.pexpiretime(key), truth.last_active(user)
    assert active is not None
    await client.expect_nothing(0.2)
    # [1] Client sends periodic heartbeat (/app/heartbeat), [2], [3] refreshUserSession(…)
    await client.beat()
    # [4] Redis: Extend session key TTL, [5] Update last_active timestamp
    assert truth.redis.pexpiretime(key) >= till + 200 - 2
    renewed = truth.last_active(user)
    assert renewed is not None
    assert renewed >= active + 200 - 2
    assert truth.changes(user) == [(True, "connected")], "and nobody is told"


# Frontend Integration


async def test_the_example_of_a_frontend(server, connect, users):
    """Guide, Frontend Integration: `start`, `subscribeToUsers`, `stop`, frame by frame as it sends them."""
    alice, bob = users("alice"), users("bob")
    manager, other = await connect(server, alice), await connect(server, bob)
    await other.subscribe()
    await other.watch([alice])
    # start()
    await manager.send_frame("SEND", {"destination": "/app/online-status"}, json.dumps({"online": True}))
    await manager.send_frame("SEND", {"destination": "/app/heartbeat"})
    await manager.send_frame("SUBSCRIBE", {"id": "sub-0", "destination": "/user/queue/online-status"})
    # subscribeToUsers()
    await manager.send_frame("SEND", {"destination": "/app/presence.subscribe"}, json.dumps({"userIds": [bob]}))
    event = (await manager.expect_snapshot(bob, True)).json
    assert f"User {event['userId']} is now {'online' if event['online'] else 'offline'}" == f"User {bob} is now online"
    # stop()
    await manager.send_frame("SEND", {"destination": "/app/online-status"}, json.dumps({"online": False}))
    await other.expect_event(alice, False)
    await other.send_frame("SEND", {"destination": "/app/online-status"}, json.dumps({"online": False}))
    await manager.expect_event(bob, False)


# Key Features


async def test_sessions_are_tracked_each_by_itself(server, connect, user):
    """Guide.

    Guide, Session-Based Tracking: "Multiple sessions per user (web, mobile, tablet). Each session has independent TTL.
    User stays online while any session is active"; Multi-Device Support: "Device type detection from User-Agent".
    """
    truth = Truth(server)
    agents = {
        "web": "Mozilla/5.0 (X11; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0",
        "mobile": "Mozilla/5.0 (Linux; Android 14; Pixel 8) Chrome/126.0.0.0 Mobile Safari/537.36",
        "tablet": "Mozilla/5.0 (iPad; CPU OS 17_5 like Mac OS X) Version/17.5 Mobile/15E148 Safari/604.1",
    }
    clients = {device: await connect(server, user, user_agent=agent) for device, agent in agents.items()}
    keys = {device: f"presence:user:{user}:online:{session_of(client)}" for device, client in clients.items()}
    assert {device: truth.redis.get(key) for device, key in keys.items()} == {device: device for device in agents}
    assert len({truth.redis.pexpiretime(key) for key in keys.values()}) > 1
    for device in ("tablet", "web"):
        await clients[device].disconnect()
        assert await server.is_online(user)
    assert truth.redis.keys(f"presence:user:{user}:online:*") == [keys["mobile"]]
    await clients["mobile"].disconnect()
    assert not await server.is_online(user)


async def test_who_stays_silent_goes_offline_without_being_polled(server, connect, user, watcher):
    """Guide, Automatic Timeout: "TTL on session keys", "Graceful offline detection without client polling"."""
    await watcher.watch([user])
    client = await connect(server, user, heart_beat="10000,10000")
    await watcher.expect_event(user, True)
    await watcher.expect_event(user, False, LEASE + SLACK)
    assert [frame.command for frame in client.frames] == ["CONNECTED"], "nothing was asked of the client"
    assert client.beats == []


async def test_notifications_go_to_those_who_are_interested_and_to_nobody_else(server, connect, user, users, watcher):
    """Guide, Real-Time Notifications: "WebSocket notifications to interested users", "Subscription management"."""
    bystander = await connect(server, users("bystander"))
    await bystander.subscribe()
    await watcher.watch([user])
    client = await connect(server, user)
    await watcher.expect_event(user, True)
    await watcher.unwatch([user])
    await bystander.watch([user])
    await client.disconnect()
    await bystander.expect_event(user, False)
    assert told(watcher, user) == [(False, True), (True, False)]
    assert told(bystander, user) == [(True, True), (False, False)]


async def test_last_active_is_in_milliseconds_shown_as_text_and_found_in_the_history(start_server, connect, user):
    """Guide.

    Guide, "Last Active" Tracking: "Redis stores millisecond-precision timestamps", "Formatted display", "Fallback to
    Cassandra for historical data".
    """
    server = await start_server()
    truth = Truth(server)
    client = await connect(server, user)
    await client.disconnect()
    active = truth.last_active(user)
    assert active is not None
    assert len(str(active)) == 13
    said = await entry(server, user)
    assert ms(said["lastSeen"]) == active
    assert said["lastActiveAgo"] == "vừa xong"
    await wait_row(server, user, online=False)
    truth.redis.set(f"presence:user:{user}:last_active", active - 3 * 3_600_000)
    assert (await entry(server, user))["lastActiveAgo"] == "3 giờ trước"
    truth.redis.delete(f"presence:user:{user}:last_active", f"presence:user:{user}:change")
    assert await last_seen(server, user) == active, "from the history"


async def test_instances_keep_nothing_that_another_would_miss(start_server, valkey, connect, user, users):
    """Guide, Scalable Architecture: "Stateless service instances", "cross-instance communication"."""
    store = await valkey()
    first, second = [await start_server(redis_url=store.url, amnesty_seconds=0) for _ in range(2)]
    watcher = await connect(second, users("watcher"))
    await watcher.subscribe()
    await watcher.watch([user])
    client = await connect(first, user)
    await watcher.expect_event(user, True)
    assert await second.is_online(user)
    await first.kill9()
    again = await connect(second, user)
    async with again.beating(LEASE / 5):
        await wait_until(lambda: len(Truth(second).leases(user)) == 1, LEASE + SLACK, what="the lost session to end")
        assert await second.is_online(user)
    assert client.connected
    await again.disconnect()
    await watcher.expect_event(user, False)
    assert told(watcher, user) == [(False, True), (True, False), (False, False)]


# Health Checks


@asynccontextmanager
async def service_beside(server: ServerProcess) -> AsyncIterator[PresenceService]:
    """The guide's `presenceService`, on the stores of a running server."""
    store = RedisStore(f"unix://{server.data_dir}/valkey.sock", instance="health-check", lease=30)
    await store.sweep(0)  # before an instance has swept, it knows nothing for certain
    history = await SqliteHistory.open(server.data_dir / "history.db")
    try:
        yield PresenceService(store, history, FileDirectory(server.directory_file), Fanout(), Rules())
    finally:
        await store.close()
        await history.close()


async def test_health_checks(start_server, connect, users):
    """Guide, Health Checks: `getAllOnlineUserIds().size()`, `getUserActiveSessions(userId)`, `isUserOnline(userId)`."""
    server = await start_server(lease_seconds=30)
    alice, bob, nobody = users("alice"), users("bob"), users("nobody")
    async with service_beside(server) as service:
        assert await service.get_all_online_user_ids() == set()
        phone, laptop = await connect(server, alice), await connect(server, alice)
        other = await connect(server, bob)
        assert await service.get_all_online_user_ids() == {alice, bob}
        assert await service.get_user_active_sessions(alice) == {session_of(phone), session_of(laptop)}
        assert await service.get_user_active_sessions(bob) == {session_of(other)}
        assert await service.get_user_active_sessions(nobody) == set()
        answers: list[Any] = await asyncio.gather(*(service.is_user_online(bob, name) for name in (alice, bob, nobody)))
        assert answers == [True, True, False]
        await phone.disconnect()
        await other.set_online(False)
        assert await service.get_all_online_user_ids() == {alice}
        assert await service.get_user_active_sessions(alice) == {session_of(laptop)}
        assert await service.get_user_active_sessions(bob) == set()
        assert await service.is_user_online(bob, bob) is False
        assert await service.is_user_online(bob, alice) is True
