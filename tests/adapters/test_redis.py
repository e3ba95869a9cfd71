"""presence.adapters.redis: the rules of DESIGN §3, each on a real Valkey, over one partition and over several."""

from __future__ import annotations

import asyncio
import random
import re
import time
import zlib
from collections import Counter
from contextlib import asynccontextmanager
from importlib import resources
from itertools import pairwise
from typing import Any, Self

import pytest
from redis.crc import key_slot

import presence.adapters.redis as adapter
from presence.adapters.lane import Kind
from presence.adapters.redis import PIPED, RedisStore, tags
from presence.core.model import Change, Reason, Status
from presence.ports import StoreUnavailable, Sweep, TooManyConnections
from tests.support.deployment import Deployment, connect, session
from tests.support.waiting import wait_until

LONG_MS = 90 * 24 * 3600 * 1000
SCRIPTS = sorted(
    path.name for path in (resources.files("presence.adapters") / "redis_lua").iterdir() if path.name.endswith(".lua")
)


@pytest.fixture(params=[1, 12], ids=lambda number: f"partitions={number}")
def partitions(request):
    return request.param


one_partition = pytest.mark.parametrize("partitions", [1], ids=["partitions=1"])
many_users = [f"user-{number}" for number in range(24)]


async def within(seconds: float, awaitable):
    async with asyncio.timeout(seconds):
        return await awaitable


async def end(store, one, reason=Reason.DISCONNECTED, active_at=None):
    await within(5, store.end(one, reason, time.monotonic() if active_at is None else active_at))


async def refresh(store, one, **more):
    one.last_beat = time.monotonic()
    await within(5, store.refresh(one, urgent=True, **more))


def assert_alternating(deployment: Deployment) -> None:
    """Of each user the changes alternate, the first is online; versions rise, over each stream too."""
    changes = deployment.changes()
    for user in {change.user for change in changes}:
        own = [change for change in changes if change.user == user]
        assert [change.online for change in own] == [number % 2 == 0 for number in range(len(own))], own
        assert all(older.version < newer.version for older, newer in pairwise(own))
        assert own[-1].online == deployment.is_online(user)


# The keys


@one_partition
async def test_with_one_partition_the_keys_are_the_guides(deployment):
    """DESIGN §3: "Keys of the guide, exactly as written there"; §3.7: "With 1 (the default)"."""
    store = await deployment.instance()
    one = await connect(store, "alice", "s1", "mobile")
    await watch(store, one, ["bob"])
    await store.backlog("history", 0, 0, 10)
    await store.hold("relay", 5)
    redis = deployment.redis
    assert redis.smembers("presence:online") == {"alice"}
    assert redis.get("presence:user:alice:online:s1") == "mobile"
    assert re.fullmatch(r"\d{13}", redis.get("presence:user:alice:last_active"))
    assert redis.smembers("presence:user:bob:watchers") == {"alice"}
    assert set(redis.keys("*")) == {
        "presence:online",
        "presence:user:alice:online:s1",
        "presence:user:alice:last_active",
        "presence:user:alice:sessions",
        "presence:user:alice:change",
        "presence:user:alice:watching",
        "presence:user:alice:watching:s1",
        "presence:user:bob:watchers",
        "presence:deadlines",
        "presence:changes",
        "presence:version",
        "presence:swept",
        "presence:amnesty",
        "presence:cursor:history",
        "presence:cursors",
        "presence:holder:relay",
    }


@one_partition
async def test_the_guides_troubleshooting_commands_answer(deployment):
    """WIRE §7: "`KEYS presence:user:*:online:*` … answer as the guide's troubleshooting section expects"."""
    store = await deployment.instance()
    await asyncio.gather(connect(store, "alice", "s1"), connect(store, "alice", "s2"), connect(store, "bob", "s3"))
    assert set(deployment.redis.keys("presence:user:*:online:*")) == {
        "presence:user:alice:online:s1",
        "presence:user:alice:online:s2",
        "presence:user:bob:online:s3",
    }


@pytest.mark.parametrize("partitions", [12], ids=["partitions=12"])
async def test_all_keys_of_a_user_and_of_its_partition_share_a_slot(deployment):
    """DESIGN §3.7: "All keys of one user and their partition's online set, deadlines … share a slot"."""
    store = await deployment.instance()
    for user in many_users:
        one = await connect(store, user)
        await watch(store, one, many_users)
        store.partition_of(user)
    for partition in range(12):
        await store.backlog("history", partition, 0, 10)
    slots: dict[str, set[int]] = {}
    for key in deployment.redis.keys("*"):
        tag = re.match(r"\{\d+\}", key)
        assert tag, key
        slots.setdefault(tag[0], set()).add(key_slot(key.encode()))
        if found := re.search(r":user:([^:]+):", key):
            assert key.startswith(deployment.base(found[1])), key
    assert len(slots) == 12
    assert all(len(found) == 1 for found in slots.values())


@pytest.mark.parametrize("count", [2, 3, 6, 12, 16, 64])
def test_the_tags_lie_evenly_over_the_slots(count):
    """DESIGN §3.7: "Tags are chosen so that their slots are spread evenly": one in each equal part of the slots."""
    slots = [key_slot(f"{tag}presence:online".encode()) for tag in tags(count)]
    assert [slot * count // 16384 for slot in slots] == list(range(count))


def test_the_tags_0_to_11_would_not_lie_evenly():
    """DESIGN §3.7: "the tags "0".."P-1" are not (m)"."""
    assert {key_slot(str(number).encode()) * 12 // 16384 for number in range(12)} != set(range(12))


def test_a_single_partition_has_no_tag():
    assert tags(1) == [""]


async def test_users_keep_their_partition_for_ever(deployment):
    """DESIGN §3.7: "partition = hash(user) mod P"; another hash would lose all users at an update."""
    store = await deployment.instance()
    for user in many_users:
        assert store.partition_of(user) == zlib.crc32(user.encode()) % deployment.partitions


# The scripts (DESIGN §3.8)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_takes_and_returns(name):
    """notes/style §4.6: "a header of KEYS, ARGV, units, types, return"."""
    text = (resources.files("presence.adapters") / "redis_lua" / name).read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("--"))
    code = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("--"))
    named = set(re.findall(r"\[(\d+)\]", header)) | set(re.findall(r"ARGV\[(\d+)…\]", header))
    for list_name, number in re.findall(r"\b(KEYS|ARGV)\[(\d+)\]", code):
        assert number in named, f"{list_name}[{number}]"
    assert name == "common.lua" or "Returns: " in header or "Returns per " in header


async def test_no_number_is_written_with_an_exponent(deployment):
    """DESIGN §3.8: "Large numbers: `string.format('%.0f', v)`, never `tostring`, `..` or cjson"."""
    store = await deployment.instance(lease=90.0)
    one, two = await connect(store, "alice"), await connect(store, "alice")
    await within(5, store.shorten(two, Reason.DISCONNECTED, time.monotonic(), 5))
    await end(store, one)
    partition = store.partition_of("alice")
    for done in (0, store.floor):
        await store.backlog("history", partition, done, 10)
    await store.settle([Status("alice", True, store.floor)])
    await store.trim(0, 0)
    redis = deployment.redis
    numbers = [
        *(redis.get(deployment.base("alice") + name) for name in ("version", "swept", "trimmed", "cursor:history")),
        *(redis.hget(deployment.base("alice") + "amnesty", name) for name in ("epoch", "till")),
        redis.get(deployment.key("alice", "last_active")),
        redis.hget(deployment.key("alice", "change"), "version"),
    ]
    assert all(re.fullmatch(r"\d{13}|\d{16}", str(number)) for number in numbers), numbers


async def test_what_can_fail_comes_before_what_decides(deployment):
    """DESIGN §3.8: "Scripts do not roll back: read and XADD first, then SADD/SREM"."""
    store = await deployment.instance(timeout=1.0)
    gone = await connect(store, "alice")
    far = f"{2**60}-0"  # nothing can be appended behind it
    deployment.redis.xadd(f"{deployment.base('alice')}changes", {"user": "nobody"}, id=far)
    _ = store.end(gone, Reason.DISCONNECTED, time.monotonic())
    with pytest.raises(StoreUnavailable):
        await connect(store, next(u for u in many_users if store.partition_of(u) == store.partition_of("alice")))
    assert deployment.online() == {"alice"}  # who was told of nothing


# Versions


async def test_the_version_is_the_entry_id_and_the_stores_time(deployment):
    """DESIGN §3: "`max(last + 1, floor + 1, Redis TIME in µs)` … It is the stream's entry id (`ms-µs`)"."""
    store = await deployment.instance()
    before = deployment.now_ms()
    await connect(store, "alice")
    after = deployment.now_ms()
    (change,) = deployment.changes()
    assert before <= change.version // 1000 <= after
    assert change.version < 2**53
    assert int(deployment.redis.get(f"{deployment.base('alice')}version")) == change.version
    assert int(deployment.redis.hget(deployment.key("alice", "change"), "version")) == change.version
    assert (await store.read(["alice"])).statuses["alice"].version == change.version
    assert store.floor == change.version


async def test_each_change_has_a_version_above_the_last(deployment):
    """DESIGN §3: "`max(last + 1, …`", also when the clock has stepped back."""
    store = await deployment.instance()
    ahead = (deployment.now_ms() + 3_600_000) * 1000 + 998
    for base in deployment.bases:
        deployment.redis.set(f"{base}version", ahead)
    for _ in range(2):
        await end(store, await connect(store, "alice"))
    # over the border of a millisecond, 999 → 1000, too
    assert [change.version for change in deployment.changes()] == [ahead + number for number in (1, 2, 3, 4)]


async def test_a_new_primary_with_a_slower_clock_can_never_go_back(deployment):
    """DESIGN §3, floor: "so that a new primary with a slower clock or lost writes can never go back"."""
    store = await deployment.instance()
    store.floor = told = (deployment.now_ms() + 3_600_000) * 1000
    await connect(store, "alice")
    assert deployment.changes()[-1].version == told + 1
    deployment.redis.flushall()
    await connect(store, "alice")
    assert deployment.changes()[-1].version > told + 1


async def test_what_one_instance_has_seen_binds_the_others(deployment):
    store, other = await deployment.instance(), await deployment.instance()
    store.floor = told = (deployment.now_ms() + 3_600_000) * 1000
    await deployment.sweep(store)
    await connect(other, "alice")
    assert deployment.changes()[-1].version == told + 1
    third = await deployment.instance()  # which has done nothing but to sweep
    assert third.floor == told + 1


# The set is the gate (DESIGN §3.2)


async def test_8_callers_at_once_make_exactly_one_change_of_each_edge(deployment):
    """DESIGN §3.2: "8 instances each running the script for every event … exactly one change per edge"."""
    stores = [await deployment.instance() for _ in range(8)]
    for _ in range(2):
        groups = [[(store, session(user)) for store in stores] for user in many_users]
        both = [pair for group in groups for pair in group]
        random.shuffle(both)
        await asyncio.gather(*(store.connect(one, limit=0, without_lease=0) for store, one in both))
        assert deployment.online() == set(many_users)
        random.shuffle(both)
        await asyncio.gather(*(end(store, one) for store, one in both))
        assert deployment.online() == set()
    assert Counter(change.user for change in deployment.changes()) == dict.fromkeys(many_users, 4)
    assert_alternating(deployment)


async def test_8_sweeps_at_once_make_exactly_one_change_of_each_edge(deployment):
    stores = [await deployment.instance() for _ in range(8)]
    deployment.lapse(*[await connect(stores[0], user) for user in many_users])
    deployment.pass_time(100)
    await asyncio.gather(*(store.sweep(partition) for store in stores for partition in range(deployment.partitions)))
    assert [deployment.edges(user) for user in many_users] == [[(True, "connected"), (False, "expired")]] * 24


async def test_sessions_of_one_user_that_come_and_go_at_once_leave_no_change_over(deployment):
    stores = [await deployment.instance() for _ in range(3)]
    open_: list = []
    for number in range(30):
        coming = [(random.choice(stores), session("alice")) for _ in range(number % 3)]
        going, open_ = open_, coming
        work = [store.connect(one, limit=0, without_lease=0) for store, one in coming]
        work += [end(store, one) for store, one in going]
        await asyncio.gather(*work, deployment.sweep(stores[0]))
        assert deployment.is_online("alice") == bool(open_)
    assert_alternating(deployment)


async def test_without_an_edge_of_the_set_there_is_no_change(deployment):
    """DESIGN §3.2: "A change exists if and only if `SADD presence:online` or `SREM presence:online` returned 1"."""
    store = await deployment.instance()
    one, two = await connect(store, "alice"), await connect(store, "bob")
    deployment.redis.srem(f"{deployment.base('alice')}online", "alice")
    deployment.redis.srem(f"{deployment.base('bob')}online", "bob")
    await end(store, one)
    deployment.lapse(two)
    await deployment.sweep(store)
    assert deployment.edges("alice") == deployment.edges("bob") == [(True, "connected")]
    deployment.redis.sadd(f"{deployment.base('alice')}online", "alice")
    await connect(store, "alice")
    assert deployment.edges("alice") == [(True, "connected")]


# Sessions and leases


async def test_a_session_has_its_lease_in_three_places(deployment):
    """DESIGN §3: session key "PXAT = lease end" with the device, `sessions` and `deadlines` with the lease end (ms)."""
    store = await deployment.instance(lease=60.0)
    before = deployment.now_ms()
    one = await connect(store, "alice", "s1", "tablet")
    redis = deployment.redis
    till = redis.zscore(deployment.key("alice", "sessions"), "s1")
    assert before + 59_000 <= till <= deployment.now_ms() + 60_000
    assert redis.pexpiretime(deployment.key("alice", "online:s1")) == till
    assert redis.get(deployment.key("alice", "online:s1")) == "tablet"
    assert redis.zscore(f"{deployment.base('alice')}deadlines", "alice:s1") == till
    assert await store.sessions_of("alice") == {"s1": "tablet"}
    await end(store, one)
    assert await store.sessions_of("alice") == {}
    assert deployment.deadlines() == set()
    assert not redis.exists(deployment.key("alice", "online:s1"), deployment.key("alice", "sessions"))


async def test_the_user_is_online_with_the_first_session_and_offline_with_the_last(deployment):
    """WIRE §4: "online if this is the first session", "offline if it was the last"."""
    store, other = await deployment.instance(), await deployment.instance()
    one, two = await connect(store, "alice", device="mobile"), await connect(other, "alice")
    await end(store, one)
    assert deployment.is_online("alice")
    await end(other, two, Reason.SIGNED_OFF)
    assert deployment.edges("alice") == [(True, "connected"), (False, "signed-off")]
    assert [change.device for change in deployment.changes()] == ["mobile", "web"]


async def test_what_is_remembered_of_an_offline_user_lapses_after_a_long_time(deployment):
    """DESIGN §3: `last_active` "long TTL", `change` "long TTL once offline"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    assert deployment.redis.pttl(deployment.key("alice", "change")) == -1
    assert LONG_MS - 60_000 < deployment.redis.pttl(deployment.key("alice", "last_active")) <= LONG_MS
    await end(store, one)
    assert LONG_MS - 60_000 < deployment.redis.pttl(deployment.key("alice", "change")) <= LONG_MS
    await connect(store, "alice")
    assert deployment.redis.pttl(deployment.key("alice", "change")) == -1


async def test_ending_twice_is_ending_once(deployment):
    """WIRE §4: "a second sign-off, or DISCONNECT of an ended session, changes nothing", `lastSeen` included."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    await end(store, one, Reason.SIGNED_OFF)
    active = deployment.last_active("alice")
    await wait_until(lambda: deployment.now_ms() > active + 5)
    await end(store, one)
    await end(store, session("bob"))
    await within(5, store.shorten(one, Reason.DISCONNECTED, time.monotonic(), 30))
    assert deployment.last_active("alice") == active
    assert deployment.deadlines() == set()
    assert len(deployment.changes()) == 2


async def test_a_heartbeat_renews_the_lease_and_the_last_activity(deployment):
    """WIRE §4: "lease = L from now, last active = now"; guide, Heartbeat Flow."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    deployment.move_deadline(one, deployment.now_ms() + 10_000)
    before = deployment.now_ms()
    await refresh(store, one)
    assert 59 < deployment.lease_left(one) <= 60
    assert before - 50 <= deployment.last_active("alice") <= deployment.now_ms()
    till = deployment.redis.zscore(deployment.key("alice", "sessions"), one.id)
    assert deployment.redis.zscore(f"{deployment.base('alice')}deadlines", f"alice:{one.id}") == till
    assert deployment.redis.pexpiretime(deployment.key("alice", f"online:{one.id}")) == till
    assert len(deployment.changes()) == 1


async def test_a_renewal_by_the_connection_is_no_activity(deployment):
    store = await deployment.instance()
    one = await connect(store, "alice")
    deployment.move_deadline(one, deployment.now_ms() + 10_000)
    deployment.redis.set(deployment.key("alice", "last_active"), 12345)
    await refresh(store, one, active=False)
    assert deployment.lease_left(one) > 59
    assert deployment.last_active("alice") == 12345


async def test_heartbeats_count_from_when_they_came(deployment):
    """WIRE §4, store away: "heartbeats count from when they came"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    one.last_beat -= 20
    before = deployment.now_ms()
    deployment.redis.delete(deployment.key("alice", "last_active"))
    await within(5, store.refresh(one, urgent=True))
    assert 38 < deployment.lease_left(one) <= 40
    assert before - 20_500 < deployment.last_active("alice") <= deployment.now_ms() - 20_000


async def test_a_refresh_never_creates(deployment):
    """DESIGN §3.5: "a refresh never creates, it reports the lapsed"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    await end(store, one)
    keys = set(deployment.redis.keys("*"))
    one.closed = True
    await refresh(store, one)
    assert set(deployment.redis.keys("*")) == keys
    assert not deployment.is_online("alice")


async def test_a_lapsed_session_is_revived_by_its_heartbeat(deployment):
    """WIRE §4: "revived if the lease had lapsed"; "online again if it had lapsed"."""
    store = await deployment.instance()
    one = await connect(store, "alice", device="mobile")
    deployment.lapse(one)
    await deployment.sweep(store)
    assert not deployment.is_online("alice")
    await refresh(store, one)
    assert deployment.edges("alice") == [(True, "connected"), (False, "expired"), (True, "revived")]
    assert 59 < deployment.lease_left(one) <= 60
    assert deployment.changes()[-1].device == "mobile"


async def test_a_heartbeat_before_the_sweep_leaves_no_change(deployment):
    """DESIGN §3.4: "Only the sweep ends overdue sessions"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    deployment.lapse(one)
    await refresh(store, one)
    await deployment.sweep(store)
    assert deployment.edges("alice") == [(True, "connected")]


async def test_a_revival_whose_connection_has_gone_meanwhile_is_ended_again(deployment):
    """DESIGN §3.5: "a revival checks that the socket is still open before *and after*, ending the session again"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    deployment.lapse(one)
    await deployment.sweep(store)
    lane = store._lanes[store.partition_of("alice")]
    call, ends = lane._call, []

    async def close_meanwhile(kind, commands):
        answers = await call(kind, commands)
        if kind is Kind.CONNECT:
            one.closed = True
            ends.append(store.end(one, Reason.DISCONNECTED, one.last_input))
        return answers

    lane._call = close_meanwhile
    await refresh(store, one)
    await within(5, *ends)
    assert deployment.edges("alice")[2:] == [(True, "revived"), (False, "disconnected")]
    assert deployment.sessions("alice") == set()


async def test_100_heartbeats_are_one_call(deployment):
    """DESIGN §3.5: "Heartbeats are coalesced": of one partition all that come within some ms."""
    store = await deployment.instance()
    sessions = await asyncio.gather(*(connect(store, f"user-{number}") for number in range(100)))
    deployment.reset_calls()
    await within(5, asyncio.gather(*(store.refresh(one) for one in sessions for _ in range(3))))
    assert deployment.calls()["evalsha"] <= 2 * deployment.partitions  # once, and once more to make the script known


async def test_what_is_asked_of_one_session_at_once_is_done_in_that_order(deployment):
    """ports.PresenceStore: "All commands of one session take effect in the order of the calls"."""
    store = await deployment.instance()
    rng = random.Random(7)
    last = {}
    for user in many_users:
        one = session(user)
        work = [asyncio.ensure_future(store.connect(one, limit=0, without_lease=0))]
        await asyncio.sleep(0)
        work += [store.refresh(one, urgent=rng.random() < 0.5) for _ in range(rng.randrange(4))]
        if ended := rng.random() < 0.6:
            one.closed = True
            work.append(store.end(one, Reason.DISCONNECTED, time.monotonic()))
            work.append(store.refresh(one))
        last[user] = not ended
        await asyncio.gather(*work, return_exceptions=True)
    assert deployment.online() == {user for user, online in last.items() if online}


async def test_an_end_supersedes_a_heartbeat_that_waits(deployment):
    """DESIGN §3.5: "an end takes the session out of the pending batch"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    deployment.reset_calls()
    beat = store.refresh(one)
    await end(store, one)
    await within(5, beat)
    assert "zrem" in deployment.calls()  # by the script of the end
    assert "zscore" not in deployment.calls()  # by that of the heartbeat
    assert not deployment.is_online("alice")


async def test_the_last_activity_of_a_lost_connection_is_its_last_input(deployment):
    """WIRE §2: "last inbound STOMP byte before a lost connection …; never the moment a timeout was noticed"."""
    store = await deployment.instance()
    one = session("alice")
    one.last_beat -= 30
    await store.connect(one, limit=0, without_lease=0)
    await end(store, one, active_at=time.monotonic() - 10)
    change = deployment.changes()[-1]
    assert change.last_active == deployment.last_active("alice")
    assert -10_500 < change.last_active - deployment.now_ms() <= -10_000


async def test_the_last_activity_never_moves_backwards(deployment):
    store = await deployment.instance()
    one, other = await connect(store, "alice"), await connect(store, "alice")
    active = deployment.last_active("alice")
    await end(store, one, active_at=time.monotonic() - 10)
    await within(5, store.shorten(other, Reason.DRAINED, time.monotonic() - 5, 1))
    assert deployment.last_active("alice") == active


# Grace and drain (DESIGN §3.4)


@pytest.mark.parametrize("reason", [Reason.DISCONNECTED, Reason.DRAINED])
async def test_a_lost_connection_with_grace_is_a_shortened_lease(deployment, reason):
    """DESIGN §3.4: "and expiry does the rest (reason and time of the loss are kept with it)"."""
    store = await deployment.instance()
    one = await connect(store, "alice", device="mobile")
    deployment.redis.delete(deployment.key("alice", "last_active"))
    await within(5, store.shorten(one, reason, time.monotonic() - 4, 5))
    assert 4 < deployment.lease_left(one) <= 5
    lost_at = deployment.last_active("alice")
    assert lost_at <= deployment.now_ms() - 4_000
    assert deployment.redis.get(deployment.key("alice", f"online:{one.id}")) == "mobile"
    assert len(deployment.changes()) == 1
    deployment.lapse(one)
    await deployment.sweep(store)
    change = deployment.changes()[-1]
    assert (change.online, change.reason, change.last_active, change.device) == (False, reason, lost_at, "mobile")
    assert not deployment.redis.exists(deployment.key("alice", "lost"))


async def test_a_user_who_reconnects_within_the_grace_causes_no_change(deployment):
    """DESIGN §3.4: "a user who reconnects within the grace causes no change at all"."""
    store = await deployment.instance()
    lost = await connect(store, "alice")
    await within(5, store.shorten(lost, Reason.DISCONNECTED, time.monotonic(), 5))
    back = await connect(store, "alice")
    deployment.lapse(lost)
    await deployment.sweep(store)
    assert deployment.sessions("alice") == {back.id}
    assert deployment.edges("alice") == [(True, "connected")]
    await end(store, back, Reason.SIGNED_OFF)
    assert deployment.edges("alice")[1:] == [(False, "signed-off")]


async def test_grace_never_makes_a_lease_longer(deployment):
    """WIRE §4: "all its leases become min(rest, max(drain, grace))"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    deployment.move_deadline(one, deployment.now_ms() + 2_000)
    await within(5, store.shorten(one, Reason.DRAINED, time.monotonic(), 30))
    assert deployment.lease_left(one) <= 2


async def test_ending_one_session_never_purges_its_siblings(deployment):
    """DESIGN §3.4: "Only the sweep ends overdue sessions; ending one session never purges its siblings"."""
    store = await deployment.instance()
    overdue, one = await connect(store, "alice"), await connect(store, "alice")
    deployment.lapse(overdue)
    await end(store, one)
    assert deployment.sessions("alice") == {overdue.id}
    assert deployment.is_online("alice")
    await deployment.sweep(store)
    assert deployment.edges("alice") == [(True, "connected"), (False, "expired")]


# The limit of connections of a user (WIRE §6)


async def test_over_the_limit_a_session_is_refused_and_nothing_is_made(deployment):
    """WIRE §6: "50 open connections a user (over all instances …)"; ports: "nothing was made"."""
    store, other = await deployment.instance(), await deployment.instance()
    await store.connect(session("alice"), limit=2, without_lease=0)
    await other.connect(session("alice"), limit=2, without_lease=0)
    keys = set(deployment.redis.keys("*"))
    with pytest.raises(TooManyConnections):
        await store.connect(session("alice"), limit=2, without_lease=0)
    assert set(deployment.redis.keys("*")) == keys
    await store.connect(session("bob"), limit=2, without_lease=0)


async def test_a_connect_that_is_tried_again_is_not_refused_because_of_itself(deployment):
    store = await deployment.instance()
    lane = store._lanes[store.partition_of("alice")]
    call, kinds = lane._call, []

    async def lose_the_first_answer(kind, commands):
        kinds.append(kind)
        answers = await call(kind, commands)
        if len(kinds) == 1:
            raise StoreUnavailable("the answer is lost")
        return answers

    lane._call = lose_the_first_answer
    await store.connect(session("alice"), limit=1, without_lease=0)
    assert kinds == [Kind.CONNECT, Kind.CONNECT]
    assert deployment.edges("alice") == [(True, "connected")]


async def test_connections_without_a_lease_count_towards_the_limit(deployment):
    """WIRE §6: open *connections*: those that have signed off or lapsed are open as well."""
    store = await deployment.instance()
    with pytest.raises(TooManyConnections):
        await store.connect(session("alice"), limit=2, without_lease=2)
    await store.connect(session("alice"), limit=2, without_lease=1)
    with pytest.raises(TooManyConnections):
        await store.connect(session("alice"), limit=2, without_lease=1)


async def test_a_connection_that_lapsed_a_moment_ago_counts_once(deployment):
    """It is in the store until the sweep comes, and already among the caller's own without a lease."""
    store = await deployment.instance()
    lapsed = session("alice")
    await store.connect(lapsed, limit=2, without_lease=0)
    deployment.redis.zadd(f"{deployment.base('alice')}user:alice:sessions", {lapsed.id: deployment.now_ms() - 1})
    await store.connect(session("alice"), limit=2, without_lease=1)
    with pytest.raises(TooManyConnections):
        await store.connect(session("alice"), limit=2, without_lease=1)


@pytest.mark.parametrize("reason", [Reason.DISCONNECTED, Reason.DRAINED])
async def test_sessions_left_in_grace_or_drain_do_not_count_towards_the_limit(deployment, reason):
    """WIRE §6: "sessions left in grace or drain do not count"."""
    store = await deployment.instance()
    lost = session("alice")
    await store.connect(lost, limit=1, without_lease=0)
    await within(5, store.shorten(lost, reason, time.monotonic(), 30))
    await store.connect(session("alice"), limit=1, without_lease=0)
    with pytest.raises(TooManyConnections):
        await store.connect(session("alice"), limit=1, without_lease=0)
    await end(store, lost)
    with pytest.raises(TooManyConnections):
        await store.connect(session("alice"), limit=1, without_lease=0)


# The deadline index is the truth (DESIGN §3.3)


async def test_the_sweep_ends_what_is_overdue_and_nothing_else(deployment):
    store = await deployment.instance()
    overdue = [await connect(store, user) for user in many_users[:12]]
    for user in many_users[12:]:
        await connect(store, user)
    deployment.lapse(*overdue)
    await deployment.sweep(store)
    assert deployment.online() == set(many_users[12:])
    assert len(deployment.deadlines()) == 12
    assert_alternating(deployment)


async def test_the_sweep_of_an_expired_session_leaves_the_last_activity(deployment):
    """WIRE §2: "never the moment a timeout was noticed"."""
    store = await deployment.instance()
    one = session("alice")
    one.last_beat -= 50
    await store.connect(one, limit=0, without_lease=0)
    active = deployment.last_active("alice")
    deployment.lapse(one)
    await deployment.sweep(store)
    assert deployment.changes()[-1].last_active == deployment.last_active("alice") == active


@one_partition
async def test_a_sweep_takes_500_at_a_time_and_repeats_at_once(deployment):
    """DESIGN §3.3: "It takes at most 500 due sessions a call and repeats at once"."""
    store = await deployment.instance()
    sessions = await asyncio.gather(*(connect(store, f"user-{number}") for number in range(1_100)))
    pipe = deployment.redis.pipeline()
    for one in sessions:
        pipe.zadd("presence:deadlines", {f"{one.user}:{one.id}": 1})
    pipe.execute()
    deployment.pass_time(100)
    swept = [await store.sweep(0) for _ in range(3)]
    assert [one.more for one in swept] == [True, True, False]
    assert deployment.online() == set()


async def test_a_sweep_returns_at_once_when_another_instance_swept_just_before(deployment, monkeypatch):
    """DESIGN §3.3: "with many instances a call returns at once when another swept just before"."""
    assert adapter.SWEEP_ENOUGH_MS <= 100  # else sessions would end late
    monkeypatch.setattr(adapter, "SWEEP_ENOUGH_MS", 2_000)  # however slow this test is
    store, other = await deployment.instance(swept=False), await deployment.instance(swept=False)
    one = await connect(store, "alice")
    partition = store.partition_of("alice")
    await store.sweep(partition)
    deployment.lapse(one)
    assert not (await other.sweep(partition)).more
    assert deployment.sessions("alice") == {one.id}
    deployment.pass_time(2_100)
    await other.sweep(partition)
    assert deployment.sessions("alice") == set()


@pytest.mark.parametrize("loss", ["delete", "persist"])
async def test_no_rule_reads_a_session_keys_existence(deployment, loss):
    """DESIGN §3.3: events are lost "on eviction: none of that may matter. No rule reads a session key's existence"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    getattr(deployment.redis, loss)(deployment.key("alice", f"online:{one.id}"))
    await deployment.sweep(store)
    assert deployment.is_online("alice")
    assert set(await store.sessions_of("alice")) == {one.id}
    deployment.redis.zadd(f"{deployment.base('alice')}deadlines", {f"alice:{one.id}": 1})
    await deployment.sweep(store)
    assert deployment.edges("alice") == [(True, "connected"), (False, "expired")]
    assert not deployment.redis.exists(deployment.key("alice", f"online:{one.id}"))


@asynccontextmanager
async def no_active_expiry(deployment):
    """Redis deletes expired keys only when somebody looks at them, as with very many keys."""
    deployment.redis.execute_command("DEBUG", "SET-ACTIVE-EXPIRE", "0")
    yield
    deployment.redis.execute_command("DEBUG", "SET-ACTIVE-EXPIRE", "1")


async def test_the_sweep_makes_redis_publish_the_guides_expired_events(deployment):
    """DESIGN §3.3: "it touches the due session keys …, so that `PSUBSCRIBE …:expired` shows real events"; WIRE §7."""
    store = await deployment.instance(lease=0.1)
    with deployment.redis.pubsub(ignore_subscribe_messages=True) as events:
        events.psubscribe("__keyevent@*__:expired")
        async with no_active_expiry(deployment):
            one = await connect(store, "alice")

            async def ended():
                await deployment.sweep(store)
                return not deployment.sessions("alice")

            await wait_until(ended)
            key = deployment.key("alice", f"online:{one.id}")
            await wait_until(lambda: (found := events.get_message()) and found["data"] == key, what=f"expired {key}")


async def test_an_expired_event_wakes_the_sweep(deployment):
    """DESIGN §3.3: "the listener only wakes the sweep"."""
    store = await deployment.instance(lease=0.1)
    await wait_until(deployment.redis.pubsub_numpat)
    await store.overdue(0)
    await connect(store, "alice")
    await within(5, store.overdue(60))


async def test_foreign_keys_that_expire_do_not_wake_the_sweep(deployment, monkeypatch):
    store = await deployment.instance(lease=0.5)
    await wait_until(deployment.redis.pubsub_numpat)
    one = await connect(store, "alice")
    wake, lives = store._expired.set, []

    def note() -> None:
        lives.append(deployment.redis.exists(deployment.key("alice", f"online:{one.id}")))
        wake()

    monkeypatch.setattr(store._expired, "set", note)
    deployment.redis.set("x", 1, px=10)
    await wait_until(lambda: not deployment.redis.exists("x"))
    await within(5, store.overdue(60))
    assert lives == [0]  # it was the session's key that woke it


async def test_without_an_event_the_sweep_does_not_wait_longer(deployment):
    store = await deployment.instance()
    await within(5, store.overdue(0.01))


async def test_a_deadline_too_far_ahead_is_clamped(deployment):
    """DESIGN §3.6: "no deadline may lie more than L ahead; the sweep clamps those that do"."""
    store = await deployment.instance()
    late, fine = await connect(store, "alice", device="tablet"), await connect(store, "bob")
    deployment.move_deadline(late, deployment.now_ms() + 3_600_000)
    deployment.move_deadline(fine, deployment.now_ms() + 30_000)
    await deployment.sweep(store)
    assert 59 < deployment.lease_left(late) <= 60
    assert 29 < deployment.lease_left(fine) <= 30
    key = deployment.key("alice", f"online:{late.id}")
    assert deployment.redis.get(key) == "tablet"
    assert 59_000 < deployment.redis.pttl(key) <= 60_000
    assert len(deployment.changes()) == 2


async def test_an_orphan_deadline_is_swept_and_makes_no_session(deployment):
    store = await deployment.instance()
    base = deployment.base("alice")
    deployment.redis.zadd(f"{base}deadlines", {"alice:gone": 1, "alice:far": deployment.now_ms() + 3_600_000})
    await deployment.sweep(store)
    assert deployment.sessions("alice") == set()
    assert deployment.deadlines() == set()
    assert deployment.changes() == []


# The store cannot be asked


async def test_while_the_store_does_not_answer_it_is_unavailable(deployment):
    """ports: raise "when the thing behind it cannot be asked within its time limit"."""
    store = await deployment.instance(timeout=1.0)
    await connect(store, "alice")
    assert store.health.state == "up"
    async with deployment.frozen():
        for question in (
            store.read(["alice"]),
            store.sweep(0),
            store.online_count(),
            store.sessions_of("alice"),
            watch(store, session("alice"), ["bob"]),
            store.repair(),
            store.hold("work", 1),
            store.backlog("history", 0, 0, 1),
            store.trim(0, 0),
            store.settle([Status("alice", True, 1)]),
        ):
            with pytest.raises(StoreUnavailable):
                await within(5, question)
        assert store.health.state == "down"
    assert (await store.read(["alice"])).statuses["alice"].online
    assert store.health.state == "up"


@one_partition
async def test_a_store_that_is_busy_is_not_away(deployment):
    """Who waits so long for the questions of others that its own is not answered in time has seen no outage."""
    store = await deployment.instance(timeout=2.0)
    since, keys, at_once = store.health.since, store._keys[0], store._servers.nodes[0].turns._value
    questions = (store._pipe(keys, ("BLPOP", f"{keys.base}nothing", 1.2)) for _ in range(2 * at_once))
    answers = await asyncio.gather(*questions, return_exceptions=True)
    assert [type(one) for one in answers] == [list] * at_once + [StoreUnavailable] * at_once
    assert (store.health.state, store.health.since) == ("up", since)


async def test_an_answer_that_comes_while_nothing_is_read_is_in_time(deployment):
    """Who was frozen, or too busy to look, for longer than the time limit has seen no outage."""
    store = await deployment.instance(timeout=0.5)
    await connect(store, "alice")
    since = store.health.since
    asked = asyncio.create_task(store.read(["alice"]))
    await asyncio.sleep(0)  # it is sent
    time.sleep(1.0)  # noqa: ASYNC251
    assert (await asked).statuses["alice"].online
    assert (store.health.state, store.health.since) == ("up", since)


async def test_who_is_busy_has_the_time_to_connect(deployment):
    """Each turn of the loop takes half of the time limit, and to connect takes a dozen."""
    store = await deployment.instance(timeout=0.2)
    await store._servers.close()  # all connections
    since, loop, asked = store.health.since, asyncio.get_running_loop(), asyncio.create_task(store.read(["alice"]))

    def be_busy() -> None:
        if not asked.done():
            time.sleep(0.1)
            loop.call_soon(be_busy)

    loop.call_soon(be_busy)
    assert not (await asked).statuses["alice"].online
    assert (store.health.state, store.health.since) == ("up", since)


async def test_of_a_connect_whose_outcome_is_unknown_nothing_is_left(deployment):
    """DESIGN §3.5: "A connect whose outcome is unknown (time-out …) is followed by an end until that is answered"."""
    store = await deployment.instance(timeout=1.0)
    await connect(store, "bob")
    async with deployment.frozen():
        with pytest.raises(StoreUnavailable):
            await within(10, connect(store, "alice"))
    await within(10, store._lanes[store.partition_of("alice")].drained())
    assert deployment.sessions("alice") == set()
    assert deployment.online() == {"bob"}
    assert_alternating(deployment)


async def test_of_a_connect_whose_answer_is_lost_nothing_is_left(deployment):
    store = await deployment.instance(timeout=0.2)
    lane = store._lanes[store.partition_of("alice")]
    call, kinds = lane._call, []

    async def lose_answers(kind, commands):
        kinds.append(kind)
        answers = await call(kind, commands)
        if kind is Kind.CONNECT or kinds.count(Kind.END) < 3:
            raise StoreUnavailable("the answer is lost")
        return answers

    lane._call = lose_answers
    with pytest.raises(StoreUnavailable):
        await connect(store, "alice")
    await within(5, lane.drained())
    assert kinds[-3:] == [Kind.END] * 3
    assert deployment.sessions("alice") == set()
    assert deployment.edges("alice") == [(True, "connected"), (False, "disconnected")]


async def test_what_is_asked_while_the_store_is_away_is_done_when_it_is_back(deployment):
    """WIRE §4, store away: "ends are kept and done later"; ports: "they are kept, and done when it is back"."""
    store = await deployment.instance(timeout=1.0)
    going, beating, lost = [await connect(store, user) for user in ("going", "beating", "lost")]
    deployment.move_deadline(beating, deployment.now_ms() + 30_000)
    async with deployment.frozen():
        kept = [
            store.end(going, Reason.SIGNED_OFF, time.monotonic()),
            store.refresh(beating, urgent=True),
            store.shorten(lost, Reason.DISCONNECTED, time.monotonic(), 5),
        ]
        with pytest.raises(StoreUnavailable):
            await within(10, connect(store, "new"))
        assert not any(future.done() for future in kept)
    await within(10, asyncio.gather(*kept))
    assert deployment.online() - {"new"} == {"beating", "lost"}
    assert deployment.lease_left(beating) > 50
    assert deployment.lease_left(lost) <= 5
    assert deployment.edges("going") == [(True, "connected"), (False, "signed-off")]


async def test_closed_it_leaves_no_connection(deployment):
    def connections():
        return len(deployment.redis.client_list())

    before = connections()
    store = await deployment.instance()
    await connect(store, "alice")
    assert connections() > before
    deployment._running.pop().cancel()
    await store.close()
    await wait_until(lambda: connections() == before)


# The store came back (DESIGN §3.6)


async def sweep_once(deployment: Deployment, store: RedisStore) -> Sweep:
    """Sweep alice's partition, 100 ms after the last sweep."""
    deployment.redis.set(f"{deployment.base('alice')}swept", deployment.now_ms() - 100, xx=True)
    return await store.sweep(store.partition_of("alice"))


async def notice(deployment: Deployment, store: RedisStore) -> None:
    """Sweep each partition, and find what has happened."""
    for partition in range(deployment.partitions):
        await store.sweep(partition)
    deployment.steady = True


def late(deployment):
    deployment.steady = False
    deployment.pass_time(3_100)


def empty(deployment):
    deployment.redis.flushall()


def never_swept(deployment):
    for base in deployment.bases:
        deployment.redis.delete(f"{base}swept")


def other_run_id(deployment):
    for base in deployment.bases:
        deployment.redis.hset(f"{base}amnesty", "server", "another")


def clock_stepped_back(deployment):
    deployment.steady = False
    deployment.pass_time(-3_600_000)


def amnesty_of_another_clock(deployment):
    for base in deployment.bases:
        deployment.redis.hincrby(f"{base}amnesty", "till", 3_600_000)


@pytest.mark.parametrize("loss", [late, empty, never_swept, other_run_id, clock_stepped_back, amnesty_of_another_clock])
async def test_when_the_store_came_back_an_amnesty_begins(deployment, loss):
    """DESIGN §3.6: "Noticed by a gap of more than 3 s since `presence:swept`, its absence, or a new `run_id`"."""
    store, other = await deployment.instance(amnesty_at_start=0.0, amnesty=5.0), await deployment.instance()
    before = await sweep_once(deployment, store)
    assert before.settling == 0
    loss(deployment)
    after = await store.sweep(store.partition_of("alice"))
    assert after.epoch > before.epoch
    assert 4 < after.settling <= 5
    assert (await other.sweep(store.partition_of("alice"))).epoch == after.epoch  # all know of the same one
    assert (await sweep_once(deployment, store)).epoch == after.epoch


async def test_a_short_gap_is_none(deployment):
    store = await deployment.instance()
    before = await sweep_once(deployment, store)
    deployment.pass_time(1_000)
    assert (await store.sweep(store.partition_of("alice"))).epoch == before.epoch


async def test_with_short_leases_a_shorter_gap_is_one(deployment):
    """Who beats twice a lease may have lapsed in a gap of half a lease."""
    store = await deployment.instance(lease=2.0)
    before = await sweep_once(deployment, store)
    deployment.pass_time(1_100)
    assert (await store.sweep(store.partition_of("alice"))).epoch > before.epoch


async def test_during_the_amnesty_nobody_is_swept_and_offline_is_unknown(deployment):
    """DESIGN §3.6: "for 5 s … nothing is swept and "offline" answers are unknown"."""
    store = await deployment.instance(amnesty_at_start=0.0, amnesty=60.0)
    one = await connect(store, "alice")
    assert (await store.read(["alice", "bob"])).unsettled == frozenset()
    late(deployment)
    deployment.lapse(one)
    await notice(deployment, store)
    await deployment.sweep(store)
    assert deployment.is_online("alice")
    reading = await store.read(["alice"])
    assert reading.statuses["alice"].online
    assert reading.unsettled == {"alice"}
    end_amnesty(deployment)
    await deployment.sweep(store)
    assert deployment.edges("alice") == [(True, "connected"), (False, "expired")]
    assert (await store.read(["alice"])).unsettled == frozenset()


async def test_an_end_during_the_amnesty_waits_for_those_who_are_still_to_report(deployment):
    """DESIGN §3.6: nobody goes offline because only some of the user's sessions have been reported yet."""
    store, other = await deployment.instance(amnesty_at_start=0.0, amnesty=60.0), await deployment.instance()
    one, two = await connect(store, "alice"), await connect(other, "alice")
    alone = await connect(store, "bob")
    deployment.redis.flushall()
    await deployment.sweep(store)
    for lost in (one, alone):
        await within(5, store.restore(lost))
        deployment.redis.delete(deployment.key(lost.user, "last_active"))
        await end(store, lost, Reason.SIGNED_OFF, active_at=time.monotonic() - 1)
    assert deployment.online() == {"alice", "bob"}
    signed_off_at, ended_at = deployment.last_active("bob"), deployment.now_ms()
    await within(5, other.restore(two))
    await wait_until(lambda: deployment.now_ms() > ended_at)
    end_amnesty(deployment)
    await deployment.sweep(store)
    assert deployment.sessions("alice") == {two.id}
    assert deployment.edges("alice") == [(True, "restored")]
    assert deployment.edges("bob") == [(True, "restored"), (False, "signed-off")]
    assert deployment.changes("bob")[-1].last_active == signed_off_at is not None


async def test_an_end_during_the_amnesty_of_one_of_several_sessions_is_done_at_once(deployment):
    store = await deployment.instance(amnesty_at_start=60.0)
    one, two = await connect(store, "alice"), await connect(store, "alice")
    await end(store, one)
    assert deployment.sessions("alice") == {two.id}


async def test_a_sign_on_during_the_amnesty_takes_back_the_sign_off_that_waits(deployment):
    """WIRE §4: `{"online": true}` "also revives after `false`"; the reason for the end goes as well."""
    store = await deployment.instance(amnesty_at_start=60.0)
    one = await connect(store, "alice")
    await end(store, one, Reason.SIGNED_OFF)
    await refresh(store, one)
    end_amnesty(deployment)
    await deployment.sweep(store)
    assert deployment.edges("alice") == [(True, "connected")]
    deployment.lapse(one)
    await deployment.sweep(store)
    assert deployment.edges("alice")[1:] == [(False, "expired")]


def end_amnesty(deployment):
    """Let it be over by now."""
    for base in deployment.bases:
        deployment.redis.hset(f"{base}amnesty", "till", deployment.now_ms() - 1)


@pytest.mark.parametrize("loss", [late, empty, never_swept])
async def test_before_anybody_noticed_the_loss_offline_is_unknown_already(deployment, loss):
    store = await deployment.instance()
    await deployment.sweep(store)
    loss(deployment)
    assert (await store.read(["alice"])).unsettled == {"alice"}


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
async def test_a_restart_begins_an_amnesty(valkey, partitions, empty):
    """DESIGN §3.6: "Redis came back: late, empty, or another primary … a new `run_id` on a new connection"."""
    server = await valkey()
    deployment = Deployment(server, partitions)
    store = await deployment.instance(amnesty_at_start=0.0, amnesty=60.0)
    try:
        one = await connect(store, "alice")
        before = await sweep_once(deployment, store)
        deployment.steady = False
        await server.restart(empty=empty)

        async def answers() -> Sweep | None:
            try:
                return await store.sweep(store.partition_of("alice"))
            except StoreUnavailable:
                return None

        after = await wait_until(answers, 10)
        assert after.epoch > before.epoch
        assert after.settling > 0
        assert deployment.is_online("alice") == (not empty)
        if not empty:
            deployment.lapse(one)
        for partition in range(partitions):
            await store.sweep(partition)
        assert deployment.is_online("alice") == (not empty)
        assert (await store.read(["alice"])).unsettled == {"alice"}
        await within(10, store.restore(one))
        assert deployment.edges("alice")[-1:] == [(True, "restored" if empty else "connected")]
    finally:
        await deployment.close()


async def test_before_anybody_noticed_another_server_offline_is_unknown_already(valkey, partitions):
    """DESIGN §3.6: "a new `run_id` on a new connection": also when it came back within 3 s, and nobody swept since."""
    server = await valkey()
    deployment = Deployment(server, partitions)
    try:
        store = await deployment.instance()
        await connect(store, "alice")
        await deployment.sweep(store)
        assert (await store.read(["alice"])).unsettled == frozenset()
        deployment.steady = False
        await server.restart()
        now = deployment.now_ms()
        for base in deployment.bases:  # however long the restart took
            deployment.redis.set(f"{base}swept", now)

        async def reading():
            try:
                return await store.read(["alice"])
            except StoreUnavailable:
                return None

        assert (await wait_until(reading, 10)).unsettled == {"alice"}
        await deployment.sweep(store)
        assert (await store.read(["alice"])).unsettled == frozenset()
    finally:
        await deployment.close()


async def test_before_anybody_noticed_another_server_nobody_goes_offline(valkey, partitions):
    """Found in review: an end that waited for the fail-over took offline whose other session the replica had lost."""
    server = await valkey()
    deployment = Deployment(server, partitions)
    try:
        store = await deployment.instance()
        one = await connect(store, "alice")  # her session on another instance is what was lost
        deployment.steady = False
        await server.restart()
        now = deployment.now_ms()
        for base in deployment.bases:  # however long the restart took
            deployment.redis.set(f"{base}swept", now)
        await end(store, one)
        assert deployment.edges("alice") == [(True, "connected")]
        assert await store.settle([Status("bob", True, 1)]) == []
        deployment.redis.sadd(f"{deployment.base('cid')}online", "cid")
        assert (await store.repair())["offline"] == 0
    finally:
        await deployment.close()


async def test_a_private_store_needs_no_amnesty_at_the_start(deployment):
    """DESIGN §3.6: "A private embedded store needs no amnesty, but settles at start"."""
    store = await deployment.instance(swept=False, amnesty_at_start=0.0, amnesty=60.0)
    found = await sweep_once(deployment, store)
    assert found.settling == 0
    assert (await store.read(["alice"])).unsettled == frozenset()
    late(deployment)
    assert (await store.sweep(store.partition_of("alice"))).settling > 0


async def test_an_instance_that_starts_finds_no_amnesty_while_others_sweep(deployment):
    first = await deployment.instance()
    before = await sweep_once(deployment, first)
    second = await deployment.instance(swept=False, amnesty=60.0)
    assert await sweep_once(deployment, second) == before


async def test_a_restored_session_has_what_is_left_of_its_lease(deployment):
    """DESIGN §3.6: "re-assert the sessions … (lease = L minus the age of the last beat"; WIRE §7: reason `restored`."""
    store = await deployment.instance()
    one = await connect(store, "alice", device="mobile")
    version = deployment.changes()[-1].version
    empty(deployment)
    one.last_beat -= 40
    await within(5, store.restore(one))
    assert 18 < deployment.lease_left(one) <= 20
    assert deployment.edges("alice") == [(True, "restored")]
    assert deployment.changes()[-1].version > version
    assert deployment.changes()[-1].device == "mobile"


async def test_restoring_what_is_still_there_is_no_change(deployment):
    store = await deployment.instance()
    one = await connect(store, "alice")
    await within(5, store.restore(one))
    assert deployment.edges("alice") == [(True, "connected")]


async def test_a_heartbeat_older_than_the_lease_brings_nobody_back(deployment):
    """DESIGN §3.6: "not the signed-off or lapsed ones"; WIRE §4: "heartbeats count from when they came"."""
    store = await deployment.instance()
    one = await connect(store, "alice")
    empty(deployment)
    one.last_beat -= 61
    await within(5, store.restore(one))
    await within(5, store.refresh(one, urgent=True))
    assert deployment.changes() == []
    assert deployment.deadlines() == set()


async def test_whoever_was_told_is_online_and_is_not_gets_an_offline_change(deployment):
    """DESIGN §3.6: "whoever is not in the set gets an offline change with a fresh version (reason `restored`)"."""
    store = await deployment.instance()
    await connect(store, "here")
    await deployment.sweep(store)
    told = (deployment.now_ms() + 60_000) * 1000
    (offline,) = await store.settle([Status("here", True, told, 5), Status("gone", True, told, 1234)])
    assert (offline.user, offline.online, offline.last_active) == ("gone", False, 1234)
    assert offline.version > told
    assert deployment.edges("gone") == [(False, "restored")]
    assert deployment.changes("gone")[0].version == offline.version
    assert deployment.changes("gone")[0].last_active == deployment.last_active("gone") == 1234
    assert deployment.edges("here") == [(True, "connected")]


async def test_settling_twice_or_by_two_instances_is_one_change(deployment):
    store, other = await deployment.instance(), await deployment.instance()
    await deployment.sweep(store)
    said = [Status(user, True, 5) for user in many_users]
    first, second = await asyncio.gather(store.settle(said), other.settle(said))
    assert {s.user: s.version for s in first} == {s.user: s.version for s in second}
    assert len(deployment.changes()) == len(first) == 24


async def test_a_client_that_waits_for_its_connect_gets_a_full_lease(deployment):
    """WIRE §4: "CONNECT accepted: made, lease L", also when the store was slow."""
    store = await deployment.instance()
    one = session("alice")
    one.last_beat -= 61
    await store.connect(one, limit=0, without_lease=0)
    assert 59 < deployment.lease_left(one) <= 60


async def test_an_old_heartbeat_of_a_session_that_is_still_there_lets_it_end(deployment):
    store = await deployment.instance()
    one = await connect(store, "alice")
    one.last_beat -= 61
    await within(5, store.refresh(one, urgent=True))
    await deployment.sweep(store)
    assert deployment.edges("alice") == [(True, "connected"), (False, "expired")]


async def test_who_is_known_to_have_gone_offline_since_is_told_so_as_it_was(deployment):
    """DESIGN §4: "written with exactly the values of that change": they are those of the change, not of the asker."""
    store = await deployment.instance()
    one = await connect(store, "alice", device="tablet")
    told = deployment.changes()[-1]
    await end(store, one, Reason.SIGNED_OFF)
    change = deployment.changes()[-1]
    await deployment.sweep(store)
    (offline,) = await store.settle([Status("alice", True, told.version, 1234)])
    assert isinstance(offline, Change)
    assert (offline.version, offline.last_active, offline.device) == (change.version, change.last_active, "tablet")
    assert len(deployment.changes()) == 2


async def test_who_is_said_to_be_online_under_the_version_of_an_offline_change_gets_no_second_one(deployment):
    store = await deployment.instance()
    await end(store, await connect(store, "alice"))
    change = deployment.changes()[-1]
    await deployment.sweep(store)
    (offline,) = await store.settle([Status("alice", True, change.version)])
    assert offline.version == change.version
    assert deployment.edges("alice") == [(True, "connected"), (False, "disconnected")]


async def test_during_the_amnesty_nobody_is_settled(deployment):
    store = await deployment.instance(amnesty_at_start=60.0)
    assert await store.settle([Status("alice", True, 5)]) == []
    assert deployment.changes() == []


# Watching


async def watch(store, session, users):
    session.watched |= set(users)
    await store.record_watches(session)


async def unwatch(store, session, users):
    session.watched -= set(users)
    await store.record_watches(session)


def watchers(deployment, user):
    return deployment.redis.smembers(deployment.key(user, "watchers"))


async def test_watchers_are_recorded_for_whoever_looks(deployment):
    """DESIGN §4: "`presence:user:{userId}:watchers` is what the guide promises to whoever looks"."""
    store = await deployment.instance(watch_ttl=600.0)
    one = await connect(store, "alice")
    await watch(store, one, many_users)
    for user in many_users:
        assert watchers(deployment, user) == {"alice"}
    assert deployment.redis.smembers(deployment.key("alice", f"watching:{one.id}")) == set(many_users)
    assert 590 < deployment.redis.ttl(deployment.key("alice", f"watching:{one.id}")) <= 600
    await unwatch(store, one, many_users[:20])
    watched = {user for user in many_users if deployment.redis.exists(deployment.key(user, "watchers"))}
    assert watched == set(many_users[20:])
    one.closed = True
    await store.record_watches(one)
    assert deployment.redis.keys("*watchers") == []


@pytest.mark.parametrize(("number", "again"), [(PIPED, 2), (PIPED + 1, 0)])
async def test_what_is_recorded_is_not_recorded_again(deployment, number, again):
    """Of the few that a session watches its own two keys are, which spares a trip."""
    store = await deployment.instance()
    one = session("alice")
    await watch(store, one, [f"user-{number}" for number in range(number)])
    before = deployment.redis.info("commandstats")["cmdstat_sadd"]["calls"]
    await store.record_watches(one)
    assert deployment.redis.info("commandstats")["cmdstat_sadd"]["calls"] == before + again


async def test_of_two_sessions_of_one_watcher_the_last_one_takes_it_away(deployment):
    """DESIGN §4: "w leaves u's watchers when no `watching` set of w holds u"."""
    store, other = await deployment.instance(), await deployment.instance()
    one, two = session("alice"), session("alice")
    await watch(store, one, ["bob", "carol"])
    await watch(other, two, ["bob"])
    await unwatch(store, one, ["bob", "carol"])
    assert watchers(deployment, "bob") == {"alice"}
    assert not deployment.redis.exists(deployment.key("carol", "watchers"))
    await unwatch(other, two, ["bob"])
    assert not deployment.redis.exists(deployment.key("bob", "watchers"))


async def test_a_watcher_with_another_session_is_never_missing(deployment, monkeypatch):
    """Whatever a removal is interrupted by."""
    store = await deployment.instance()
    one, two = session("alice"), session("alice")
    await watch(store, one, ["bob"])
    await watch(store, two, ["bob"])
    asked = []

    async def note(*asks: object) -> None:
        asked.append(asks)

    monkeypatch.setattr(store, "_each_watched", note)
    await unwatch(store, one, ["bob"])
    assert asked == []
    await unwatch(store, two, ["bob"])
    assert asked == [("SREM", "alice", {"bob"})]


async def test_watching_and_unwatching_at_once_leaves_the_watchers_right(deployment):
    stores = [await deployment.instance() for _ in range(3)]
    rng = random.Random(11)
    sessions = [session("alice") for _ in stores]
    for _ in range(40):
        for one in sessions:
            one.watched = set(rng.sample(["bob", "carol"], rng.randrange(3)))
        await asyncio.gather(*(store.record_watches(one) for store, one in zip(stores, sessions, strict=True)))
        for user in ("bob", "carol"):
            watched = any(user in one.watched for one in sessions)
            assert watchers(deployment, user) == ({"alice"} if watched else set())


async def test_watching_nobody_is_a_no_op(deployment):
    store = await deployment.instance()
    await store.record_watches(session("alice"))
    assert store.health.state == "up"
    assert deployment.redis.keys("*watch*") == []


async def test_a_record_that_failed_half_way_is_made_good(deployment, monkeypatch):
    store = await deployment.instance()
    one = session("alice")

    async def fail(*_: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(store, "_each_watched", fail)
        with pytest.raises(StoreUnavailable):
            await watch(store, one, ["bob"])
    await store.record_watches(one)
    assert watchers(deployment, "bob") == set(), "all seems to be recorded"
    await store.record_watches(one, anew=True)
    assert watchers(deployment, "bob") == {"alice"}


async def test_an_interrupted_removal_puts_back_who_began_to_watch_meanwhile(deployment, monkeypatch):
    store = await deployment.instance()
    one, two = session("alice"), session("alice")
    two.watched = {"bob"}
    await watch(store, one, ["bob"])
    each_watched = store._each_watched

    async def interrupted(command, watcher, users):
        await each_watched(command, watcher, users)
        if command == "SREM":
            monkeypatch.setattr(store, "_each_watched", each_watched)
            await store.record_watches(two)
            await each_watched(command, watcher, users)
            raise StoreUnavailable("away")

    monkeypatch.setattr(store, "_each_watched", interrupted)
    with pytest.raises(StoreUnavailable):
        await unwatch(store, one, ["bob"])
    assert watchers(deployment, "bob") == {"alice"}


async def test_a_session_that_is_not_listed_any_more_is_recorded_anew(deployment):
    store = await deployment.instance()
    one = session("alice")
    await watch(store, one, ["bob"])
    deployment.redis.delete(deployment.key("alice", "watching"))
    assert await renewed(store, one) == [one]
    await store.record_watches(one, anew=True)
    assert deployment.redis.smembers(deployment.key("alice", "watching")) == {one.id}


async def test_to_watch_one_user_less_not_all_are_read(deployment):
    """However many sessions there are, and whatever they watch."""
    store = await deployment.instance()
    sessions = [session("alice") for _ in range(5)]
    for one in sessions:
        await watch(store, one, many_users)
    before = deployment.redis.info("commandstats")["cmdstat_smembers"]["calls"]
    await unwatch(store, sessions[0], many_users[:1])
    own_and_sessions = deployment.redis.info("commandstats")["cmdstat_smembers"]["calls"] - before
    assert own_and_sessions == 2


def lose(store, monkeypatch, *names):
    """Have the partition of the first user away: for all commands, or those on keys with these names. Returns it."""
    pipe, lost = store._pipe, store.partition_of(many_users[0])

    async def piped(keys, *commands):
        if keys.partition == lost and (not names or commands[0][1].endswith(names)):
            raise StoreUnavailable("away")
        return await pipe(keys, *commands)

    monkeypatch.setattr(store, "_pipe", piped)
    return lost


async def test_a_partition_that_is_away_keeps_nobody_out_of_the_others(deployment, monkeypatch):
    store = await deployment.instance()
    lost = lose(store, monkeypatch, ":watchers")
    with pytest.raises(StoreUnavailable):
        await watch(store, session("alice"), many_users)
    recorded = {user for user in many_users if watchers(deployment, user)}
    assert recorded == {user for user in many_users if store.partition_of(user) != lost}


async def renewed(store, *sessions, into=None):
    found = [] if into is None else into
    async for lost in store.renew_watches(sessions):
        found += lost
    return found


async def test_records_of_watches_are_kept_while_the_connection_lives(deployment):
    """DESIGN §3: "TTL of two cleanup periods, renewed while the connection lives"."""
    store = await deployment.instance(watch_ttl=600.0)
    one, lost, less, idle = [session("alice") for _ in range(4)]
    for own in (one, lost, less):
        await watch(store, own, ["bob", own.id])
    keys = {own.id: deployment.key("alice", f"watching:{own.id}") for own in (one, lost, less)}
    deployment.redis.expire(keys[one.id], 5)
    deployment.redis.expire(deployment.key("alice", "watching"), 5)
    deployment.redis.delete(keys[lost.id])
    deployment.redis.srem(keys[less.id], "bob")
    assert await renewed(store, one, lost, less, idle) == [lost, less]
    assert deployment.redis.ttl(keys[one.id]) > 590
    assert deployment.redis.ttl(deployment.key("alice", "watching")) > 590
    await store.record_watches(lost)
    await store.record_watches(less)
    assert await renewed(store, one, lost, less, idle) == []


async def test_where_a_partition_is_away_the_other_records_are_kept(deployment, monkeypatch):
    store = await deployment.instance()
    sessions = [session(user) for user in many_users]
    for one in sessions:
        one.watched = {"bob"}
    away = lose(store, monkeypatch)
    found: list[Any] = []
    with pytest.raises(StoreUnavailable):
        await renewed(store, *sessions, into=found)
    assert {one.user for one in found} == {user for user in many_users if store.partition_of(user) != away}


async def test_the_records_of_what_one_user_watches_do_not_grow_for_ever(deployment):
    """DESIGN §4: "must not grow for ever": a user with one lasting session and many short ones."""
    store = await deployment.instance()
    lasting = session("alice")
    await watch(store, lasting, ["bob"])
    for _ in range(20):
        short = session("alice")
        await watch(store, short, ["bob", "carol"])
        await unwatch(store, short, ["carol"])
        await unwatch(store, short, ["bob"])
    assert deployment.redis.smembers(deployment.key("alice", "watching")) == {lasting.id}


# The cleanup


NOTHING = {"offline": 0, "online": 0, "deadlines": 0, "orphans": 0, "watchers": 0}


async def test_where_all_agrees_the_cleanup_repairs_nothing(deployment):
    store = await deployment.instance()
    for user in many_users:
        one = await connect(store, user)
        await watch(store, one, many_users)
    for user in many_users[:5]:
        await end(store, await connect(store, f"gone-{user}"))
    await deployment.sweep(store)
    assert await store.repair() == NOTHING
    assert len(deployment.changes()) == 24 + 10


async def test_the_cleanup_takes_offline_who_has_no_session(deployment):
    """Guide, Stale Detection: "Removes orphaned presence records"."""
    store = await deployment.instance()
    one = await connect(store, "alice", device="mobile")
    await connect(store, "bob")
    redis = deployment.redis
    redis.delete(deployment.key("alice", "sessions"), deployment.key("alice", f"online:{one.id}"))
    redis.zrem(f"{deployment.base('alice')}deadlines", f"alice:{one.id}")
    await deployment.sweep(store)
    assert await store.repair() == NOTHING | {"offline": 1}
    assert deployment.edges("alice") == [(True, "connected"), (False, "restored")]
    assert deployment.changes("alice")[-1].device == "mobile"
    assert deployment.online() == {"bob"}


@pytest.mark.parametrize("deadline", [True, False], ids=["with a deadline", "without"])
async def test_the_cleanup_takes_online_who_has_a_session(deployment, deadline):
    store = await deployment.instance()
    one = await connect(store, "alice", device="mobile")
    deployment.redis.srem(f"{deployment.base('alice')}online", "alice")
    if not deadline:
        deployment.redis.zrem(f"{deployment.base('alice')}deadlines", f"alice:{one.id}")
    await deployment.sweep(store)
    assert await store.repair() == NOTHING | {"online": 1, "deadlines": 0 if deadline else 1}
    assert deployment.edges("alice")[1:] == [(True, "restored")]
    assert deployment.changes("alice")[-1].device == "mobile"
    assert deployment.online() == {"alice"}


async def test_the_cleanup_adds_a_missing_deadline(deployment):
    store = await deployment.instance()
    one = await connect(store, "alice")
    till = deployment.redis.zscore(deployment.key("alice", "sessions"), one.id)
    deployment.redis.zrem(f"{deployment.base('alice')}deadlines", f"alice:{one.id}")
    await deployment.sweep(store)
    assert await store.repair() == NOTHING | {"deadlines": 1}
    assert deployment.redis.zscore(f"{deployment.base('alice')}deadlines", f"alice:{one.id}") == till


async def test_the_cleanup_removes_an_orphan_deadline(deployment):
    store = await deployment.instance()
    await connect(store, "alice", "s1")
    future = deployment.now_ms() + 30_000
    deployment.redis.zadd(f"{deployment.base('alice')}deadlines", {"alice:gone": future})
    deployment.redis.zadd(f"{deployment.base('bob')}deadlines", {"bob:gone": future})
    await deployment.sweep(store)
    assert await store.repair() == NOTHING | {"orphans": 2}
    assert deployment.deadlines() == {"alice:s1"}


async def test_the_cleanup_removes_watchers_that_no_longer_watch(deployment):
    """DESIGN §4: "It must be right again one cleanup period after any crash"."""
    store = await deployment.instance()
    one, crashed = session("alice"), session("dave")
    await watch(store, one, ["bob", "carol"])
    await watch(store, crashed, ["bob"])
    deployment.redis.delete(deployment.key("dave", f"watching:{crashed.id}"))  # lapsed
    deployment.redis.sadd(deployment.key("eve", "watchers"), "alice", "nobody")
    await deployment.sweep(store)
    assert await store.repair() == NOTHING | {"watchers": 3}
    assert deployment.redis.smembers(deployment.key("bob", "watchers")) == {"alice"}
    assert deployment.redis.smembers(deployment.key("carol", "watchers")) == {"alice"}
    assert not deployment.redis.exists(deployment.key("eve", "watchers"))


async def test_the_cleanup_asks_for_many_watchers_at_once(deployment, monkeypatch):
    """Else, of 13,000 users with 50 friends each, it takes minutes and half of a core."""
    store = await deployment.instance()
    watchers = [session(f"watcher-{number}") for number in range(250)]
    for one in watchers:
        await watch(store, one, ["bob", "carol"])
    await deployment.sweep(store)
    asked = []
    ask = store._pipe

    async def counted(keys, *commands):
        asked.append(len(commands))
        return await ask(keys, *commands)

    monkeypatch.setattr(store, "_pipe", counted)
    assert await store.repair() == NOTHING
    assert len(asked) < len(watchers) / 2
    assert max(asked) <= adapter.PIPED


async def test_the_cleanup_forgets_sessions_whose_watches_have_lapsed(deployment):
    """DESIGN §4: "must not grow for ever": one lasting session keeps the list of a user's sessions."""
    store = await deployment.instance()
    lasting, crashed = session("alice"), session("alice")
    await watch(store, lasting, ["bob"])
    await watch(store, crashed, ["bob"])
    deployment.redis.delete(deployment.key("alice", f"watching:{crashed.id}"))
    await deployment.sweep(store)
    assert await store.repair() == NOTHING
    assert deployment.redis.smembers(deployment.key("alice", "watching")) == {lasting.id}


async def test_during_the_amnesty_the_cleanup_takes_nobody_offline(deployment):
    store = await deployment.instance(amnesty_at_start=60.0)
    deployment.redis.sadd(f"{deployment.base('alice')}online", "alice")
    assert await store.repair() == NOTHING
    assert deployment.online() == {"alice"}


async def test_keys_is_never_used_and_scan_by_the_cleanup_only(deployment):
    """DESIGN §3: "so that nothing ever needs `KEYS` or `SCAN` on a hot path"."""
    store = await deployment.instance()
    changes = asyncio.create_task(anext(aiter(store.follow(0))))
    one = await connect(store, "alice")
    await refresh(store, one)
    await watch(store, one, ["bob"])
    await renewed(store, one)
    await store.read(["alice", "bob"])
    await store.online_count()
    await store.sessions_of("alice")
    await store.backlog("history", 0, 0, 10)
    await unwatch(store, one, ["bob"])
    await within(5, store.shorten(one, Reason.DISCONNECTED, time.monotonic(), 1))
    deployment.lapse(one)
    await deployment.sweep(store)
    await store.settle([Status("bob", True, 5)])
    await store.trim(60, 100)
    await end(store, await connect(store, "carol"))
    await within(5, changes)
    calls = deployment.calls()
    assert not {"keys", "scan", "sscan", "zscan", "hscan"} & set(calls)
    await store.repair()
    calls = deployment.calls()
    assert "scan" in calls
    assert "keys" not in calls


# Reading


async def test_statuses_are_read(deployment):
    store = await deployment.instance()
    one = await connect(store, "alice")
    await connect(store, "bob")
    await end(store, one)
    await deployment.sweep(store)
    changes = {change.user: change for change in deployment.changes()}
    reading = await store.read(["alice", "bob", "nobody"])
    assert dict(reading.statuses) == {
        "alice": Status("alice", False, changes["alice"].version, changes["alice"].last_active),
        "bob": Status("bob", True, changes["bob"].version, changes["bob"].last_active),
        "nobody": Status("nobody"),
    }
    assert reading.unsettled == frozenset()


async def test_many_statuses_are_one_question_to_each_partition(deployment):
    store = await deployment.instance()
    await asyncio.gather(*(connect(store, user) for user in many_users))
    await store.read(many_users)
    deployment.reset_calls()
    await store.read(many_users)
    assert deployment.calls()["evalsha"] <= deployment.partitions


async def test_all_who_are_online_come_each_with_the_change_that_made_them_so(deployment):
    store = await deployment.instance()
    users = [f"user-{number}" for number in range(1_200)]
    await asyncio.gather(*(connect(store, user, device="mobile") for user in users))
    pages = [page async for page in store.online_users()]
    found = {change.user: change for page in pages for change in page}
    changes = {change.user: change for change in deployment.changes()}
    assert found == changes
    assert await store.online_count() == 1_200


async def test_who_has_left_since_the_page_was_read_is_not_among_those_who_are_online(deployment):
    """Else the cleanup would write a row that says so."""
    store = await deployment.instance()
    await connect(store, "here")
    await end(store, await connect(store, "gone"))
    deployment.redis.sadd(f"{deployment.base('gone')}online", "gone")  # as the page that was read said
    assert [change.user async for page in store.online_users() for change in page] == ["here"]


async def test_of_an_empty_store_nothing_is_read(deployment):
    store = await deployment.instance()
    assert [page async for page in store.online_users() if page] == []
    assert await store.online_count() == 0
    assert await store.sessions_of("alice") == {}


# The stream of changes (DESIGN §4)


class Reader:
    """Follows one user's partition."""

    def __init__(self, store: RedisStore, user: str = "alice") -> None:
        self.seen: list[Change | None] = []
        self._partition = store.partition_of(user)
        self._task = asyncio.create_task(self._read(store))

    async def _read(self, store: RedisStore) -> None:
        async for changes in store.follow(self._partition):
            self.seen.extend([None] if changes is None else changes)

    async def __aenter__(self) -> Self:
        # It begins with a look at all statuses, once more when it sees which amnesty was the last one.
        await wait_until(lambda: self.seen, what="the first resynchronisation")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self._task.done()
        self._task.cancel()

    def changes(self) -> list[Change]:
        return [change for change in self.seen if change is not None]


async def test_a_follower_begins_with_a_look_at_all_and_then_sees_each_change_in_order(deployment):
    """DESIGN §4, snapshot: "Without it there is always a gap"."""
    store, other = await deployment.instance(), await deployment.instance()
    await end(other, await connect(other, "alice"))
    async with Reader(store) as reader:
        assert reader.seen == [None]
        for _ in range(10):
            await end(other, await connect(other, "alice"))
        await wait_until(lambda: len(reader.changes()) == 20)
        assert reader.changes() == deployment.changes()[2:]
        assert reader.seen.count(None) == 1
        assert store.floor == deployment.changes()[-1].version


async def test_who_is_online_by_a_change_that_is_older_than_an_offline_that_was_told_is_announced_anew(deployment):
    """Found in review: the store had lost the offline with its last writes, and the user came back within the lease."""
    store = await deployment.instance()
    await connect(store, "alice")
    [before] = deployment.changes()
    said = Status("alice", False, before.version + 1_000_000, 1)
    (online,) = await store.settle([said])
    assert (online.online, online.reason) == (True, Reason.RESTORED)
    assert online.version > said.version
    assert deployment.changes()[-1] == online
    assert await store.settle([said]) == [], "it is known now"
    assert await store.settle([Status("alice", True, said.version, 1)]) == [], "they agree"
    assert len(deployment.changes()) == 2


async def test_the_lag_of_a_cursor_is_the_age_of_the_oldest_change_behind_it(deployment):
    store = await deployment.instance()
    assert await store.lag("sink") == 0.0
    await connect(store, "alice")
    await connect(store, "bob")
    await asyncio.sleep(0.05)
    first, last = deployment.changes()
    now_us = deployment.now_ms() * 1000
    assert (now_us - first.version) / 1e6 - 0.002 <= await store.lag("sink") < 5
    for change in (first, last):
        for done in (0, change.version):
            await store.backlog("sink", store.partition_of(change.user), done, 10)
    assert await store.lag("sink") == 0.0
    assert await store.lag("another") > 0.05


async def test_the_newest_are_the_last_changes_of_everybody(deployment):
    store = await deployment.instance()
    for user in ("alice", "bob", "cid"):
        one = await connect(store, user)
        if user != "bob":
            await store.end(one, Reason.DISCONNECTED, one.last_beat)
    await connect(store, "cid")
    pages = [store.newest(partition, store.floor) for partition in range(store.partitions)]
    found = [change for one in pages async for page in one for change in page]
    last = {change.user: (change.online, change.version, change.last_active) for change in deployment.changes()}
    assert {one.user: (one.online, one.version, one.last_active) for one in found} == last
    assert len(found) == 3
    [before] = [
        change
        async for page in store.newest(store.partition_of("bob"), last["bob"][1] - 1)
        for change in page
        if change.user == "bob"
    ] or [None]
    assert before is None, "it is newer than asked for"
    assert {change.user: change.reason for change in found} == {
        change.user: change.reason for change in deployment.changes()
    }


@one_partition
async def test_after_a_fail_over_the_newest_are_looked_for_anew(deployment, valkey, monkeypatch):
    """Redis, SCAN: a cursor is good for the server that gave it: each has its keys in an order of its own."""
    other = Deployment(await valkey())
    users = {f"user-{number}" for number in range(3000)}
    try:
        store, promoted = await deployment.instance(), await other.instance()
        for server in (deployment, other):
            pipe = server.redis.pipeline()
            for user in users:
                pipe.hset(server.key(user, "change"), mapping={"version": 1, "online": 1})
            pipe.execute()
        found: set[str] = set()
        async for page in store.newest(0, 1):
            found.update(change.user for change in page)
            monkeypatch.setattr(store._servers, "nodes", promoted._servers.nodes)
        monkeypatch.undo()  # each closes its own connections
        assert found == users
    finally:
        await other.close()


async def test_a_follower_that_was_overtaken_by_the_trim_is_told_so(deployment):
    """DESIGN §3.8: "XTRIM leaves no mark that a reader could see: hence `presence:trimmed`"."""
    store, other = await deployment.instance(), await deployment.instance()
    blocking = store._servers.all()[0].blocking
    read = blocking.xread
    gate = asyncio.Event()

    async def slow(*args, **options):
        await gate.wait()
        return await read(*args, **options)

    async with Reader(store) as reader:
        await end(other, await connect(other, "alice"))
        await wait_until(lambda: len(reader.changes()) == 2)
        await wait_until(lambda: deployment.redis.info("clients")["blocked_clients"] == 1, what="it to wait for more")
        blocking.xread = slow
        await connect(other, "alice")  # ends the reading under way
        await wait_until(lambda: len(reader.changes()) == 3)
        await connect(other, next(u for u in many_users if other.partition_of(u) == other.partition_of("alice")))
        await other.trim(0, 0)
        assert deployment.changes() == []
        gate.set()
        await wait_until(lambda: reader.seen[-1] is None)
        assert len(reader.changes()) == 3
        await end(other, await connect(other, "alice"))  # a second session: no change
        trimmed = deployment.redis.get(f"{deployment.base('alice')}trimmed")
        assert int(trimmed) >= reader.changes()[-1].version
        assert reader.seen.count(None) == 2


async def test_after_a_loss_of_the_store_a_follower_looks_at_all_again(deployment):
    store, other = await deployment.instance(), await deployment.instance()
    async with Reader(store) as reader:
        await connect(other, "alice")
        await wait_until(lambda: len(reader.changes()) == 1)
        empty(deployment)
        await deployment.sweep(store)
        await wait_until(lambda: reader.seen[-1] is None)
        await connect(other, "alice")
        await wait_until(lambda: len(reader.changes()) == 2)


async def test_a_follower_goes_on_when_the_store_answers_again(deployment):
    store, other = await deployment.instance(timeout=1.0), await deployment.instance()
    async with Reader(store) as reader:
        async with deployment.frozen():
            await wait_until(lambda: store.health.state == "down")
        await connect(other, "alice")
        await wait_until(lambda: len(reader.changes()) == 1)


async def backlog(store, done=0, limit=100, cursor="history"):
    partition = store.partition_of("alice")
    if done:
        await store.backlog(cursor, partition, 0, limit)  # what is done was read before
    changes, gap = await store.backlog(cursor, partition, done, limit)
    assert not gap
    return changes


async def gap(store, done=0):
    changes, gap = await store.backlog("history", store.partition_of("alice"), done, 100)
    assert changes == []
    return gap


async def test_a_relay_reads_on_from_its_cursor(deployment):
    """DESIGN §4: "reads from the stored position … and moves the cursor once the sink has acknowledged"."""
    store, other = await deployment.instance(), await deployment.instance()
    for _ in range(3):
        await end(store, await connect(store, "alice"))
    changes = deployment.changes()
    assert await backlog(store, limit=4) == changes[:4]
    assert await backlog(store, limit=4) == changes[:4]  # not acknowledged: once more
    assert await backlog(store, done=changes[3].version) == changes[4:]
    assert await backlog(other) == changes[4:]
    assert await backlog(other, done=changes[-1].version) == []
    assert await backlog(store, cursor="kafka") == changes  # "one cursor per sink"


async def test_a_cursor_never_moves_back(deployment):
    """DESIGN §4: "a stale holder's repeats are harmless"."""
    store = await deployment.instance()
    await end(store, await connect(store, "alice"))
    first, second = deployment.changes()
    await backlog(store, done=second.version)
    assert await backlog(store, done=first.version) == []


async def test_a_relay_that_was_overtaken_is_told_so_until_it_is_behind_the_gap(deployment):
    """ports: "the version up to which changes were trimmed before the cursor reached them"."""
    store = await deployment.instance()
    await end(store, await connect(store, "alice"))
    first, second = deployment.changes()
    await backlog(store, done=first.version)
    await store.trim(0, 0)
    for _ in range(2):
        assert await gap(store, done=first.version) == second.version
    await connect(store, "alice")
    assert await backlog(store, done=second.version) == deployment.changes()
    assert deployment.changes()[0].version > second.version


async def test_a_new_sink_of_a_stream_that_was_trimmed_is_told_so(deployment):
    store = await deployment.instance()
    await connect(store, "alice")
    [change] = deployment.changes()
    await store.trim(0, 0)
    assert await gap(store) >= change.version


async def test_changes_are_kept_until_every_cursor_has_passed_them(deployment):
    """DESIGN §4: "Trimmed at the lowest cursor"."""
    store = await deployment.instance()
    for _ in range(3):
        await end(store, await connect(store, "alice"))
    changes = deployment.changes()
    await backlog(store, done=changes[1].version)
    await backlog(store, done=changes[4].version, cursor="kafka")
    await store.trim(0, 1_000)
    assert deployment.changes() == changes[2:]
    assert int(deployment.redis.get(f"{deployment.base('alice')}trimmed")) == changes[1].version
    assert await backlog(store) == changes[2:]


async def test_young_changes_are_kept_for_slow_readers(deployment):
    store = await deployment.instance()
    one = await connect(store, "alice")
    await backlog(store, done=store.floor)
    await store.trim(60, 1_000)
    assert len(deployment.changes()) == 1
    assert not deployment.redis.exists(f"{deployment.base('alice')}trimmed")
    await end(store, one)
    await store.trim(0, 1_000)
    assert len(deployment.changes()) == 1  # behind no cursor yet


async def test_above_the_cap_the_oldest_go_whatever_the_cursors_say(deployment):
    """DESIGN §4: "above a cap (setting) the newest state per user is published instead of the backlog"."""
    store = await deployment.instance()
    for _ in range(5):
        await end(store, await connect(store, "alice"))
    changes = deployment.changes()
    await backlog(store)
    await store.trim(3_600, 3)
    assert deployment.changes() == changes[-3:]
    assert int(deployment.redis.get(f"{deployment.base('alice')}trimmed")) == changes[-4].version
    assert await gap(store) == changes[-4].version
    assert await backlog(store, done=changes[-4].version) == changes[-3:]


async def test_work_is_held_by_one_instance_and_passes_on_when_its_lease_lapses(deployment):
    """DESIGN §4: "Whoever holds the cursor's lease"; §3: "which instance runs it (a lease)"."""
    store, other = await deployment.instance(), await deployment.instance()
    assert await store.hold("relay", 60)
    assert await store.hold("relay", 0.3)  # kept, and shortened for this test
    assert not await other.hold("relay", 60)
    assert await other.hold("other work", 60)
    assert await other.hold("relay", 60, store.partitions - 1) == (store.partitions > 1)
    await wait_until(lambda: not deployment.redis.exists(f"{deployment.bases[0]}holder:relay"))
    assert await other.hold("relay", 60)
    assert not await store.hold("relay", 60)
