"""presence.service: the guide's flows, with the real store and the real history (guide, Flow Diagrams; WIRE §4, §5)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio

from presence.adapters.sqlite import SqliteHistory
from presence.core.model import Change, Reason, Session, Status
from presence.fanout import Fanout, Watcher
from presence.ports import DirectoryUnavailable, HistoryUnavailable, StoreUnavailable, TooManyConnections
from presence.service import PAGE, SNAPSHOTS, PresenceService, Rules
from tests.support.deployment import Deployment
from tests.support.recording import recording
from tests.support.waiting import wait_until


class Contacts:
    """A directory as a test says it."""

    def __init__(self) -> None:
        self.friends_of: dict[str, list[str]] = {}
        self.conversations: dict[str, list[str]] = {}
        self.seen_by: dict[str, frozenset[str]] = {}
        self.away = False

    async def friends(self, user: str) -> Sequence[str]:
        return self.friends_of.get(user, ())

    async def members(self, conversation: str) -> Sequence[str] | None:
        return self.conversations.get(conversation)

    async def contacts(self, user: str) -> frozenset[str]:
        if self.away:
            raise DirectoryUnavailable("away")
        return self.seen_by.get(user) or frozenset({user})


class Recorded:
    """Passes all on, and notes the name and the sizes of what each method is asked."""

    def __init__(self, port: Any) -> None:
        self.port = port
        self.calls: list[tuple[str, list[int]]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.port, name)
        if not callable(found):
            return found

        def call(*args: Any, **more: Any) -> Any:
            self.calls.append((name, [len(arg) if hasattr(arg, "__len__") else -1 for arg in args]))
            return found(*args, **more)

        return call

    def take(self) -> list[tuple[str, list[int]]]:
        calls, self.calls = self.calls, []
        return calls


class Rig:
    """One instance's service, and what it stands on."""

    def __init__(self, deployment: Deployment, store: Any, history: SqliteHistory, directory: Contacts) -> None:
        self.deployment = deployment
        self.store = Recorded(store)
        self.history = Recorded(history)
        self.contacts = directory
        self.directory = Recorded(directory)
        self.fanout = Fanout()
        self._numbers = iter(range(1_000_000))

    def service(self, **rules: Any) -> PresenceService:
        return PresenceService(self.store, self.history, self.directory, self.fanout, Rules(**rules))

    async def online(self, service: PresenceService, user: str, device: str = "web") -> Session:
        return await service.set_user_online(user, device, f"{user}-{next(self._numbers)}")

    async def swept(self) -> None:
        await self.deployment.sweep(self.store.port)

    def forget_change(self, user: str) -> None:
        """All that the store remembers of an offline user lapses."""
        self.deployment.redis.delete(self.deployment.key(user, "change"), self.deployment.key(user, "last_active"))

    def unsettle(self) -> None:
        for base in self.deployment.bases:
            self.deployment.redis.delete(f"{base}swept")


@pytest.fixture(params=[1, 12], ids=lambda number: f"partitions={number}")
def partitions(request):
    return request.param


@pytest_asyncio.fixture
async def rig(deployment, tmp_path):
    history = await SqliteHistory.open(tmp_path / "history.db")
    store = await deployment.instance(lease=60.0)
    yield Rig(deployment, store, history, Contacts())
    with suppress(HistoryUnavailable):  # a test may have closed it
        await history.close()


async def done(effect):
    async with asyncio.timeout(5):
        return await effect


# Online Flow


async def test_whoever_was_set_online_is_online_for_every_reader(rig):
    """WIRE §3: "CONNECTED is sent only once the session is recorded: whoever has read CONNECTED is online"."""
    service = rig.service()
    session = await rig.online(service, "alice", "tablet")
    other = await rig.deployment.instance()
    await rig.swept()
    assert (await other.read(["alice"])).statuses["alice"].online
    assert await service.is_user_online("bob", "alice")
    assert await service.get_user_active_sessions("alice") == {session.id}
    assert await service.get_all_online_user_ids() == {"alice"}
    assert rig.deployment.changes()[0].device == "tablet"
    assert service.open_sessions() == [session]


async def test_of_a_client_that_left_while_it_connected_nothing_is_left(rig):
    """DESIGN §3.5: a connect that is "cancelled … is followed by an end until that is answered"."""
    service = rig.service()
    lane = rig.store.port._lanes[rig.store.port.partition_of("alice")]
    call, sent = lane._call, asyncio.Event()

    async def slow(kind, commands):
        answers = await call(kind, commands)
        sent.set()
        await asyncio.sleep(0.01)
        return answers

    lane._call = slow
    task = asyncio.create_task(rig.online(service, "alice"))
    await done(sent.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await done(lane.drained())
    assert rig.deployment.edges("alice") == [(True, "connected"), (False, "disconnected")]
    assert rig.deployment.sessions("alice") == set()
    assert service.open_sessions() == []


async def test_a_connect_that_the_store_does_not_answer_leaves_no_open_session(rig):
    store = await rig.deployment.instance(timeout=1.0)
    service = PresenceService(store, rig.history, rig.directory, rig.fanout, Rules())
    async with rig.deployment.frozen():
        with pytest.raises(StoreUnavailable):
            await rig.online(service, "alice")
    assert service.open_sessions() == []


async def test_open_connections_of_a_user_are_limited(rig):
    """WIRE §6: "50 open connections a user": one that signed off or lapsed is open; one left in grace is not."""
    service = rig.service(user_connections=3, grace=30)
    signed_off, lapsed, lost = [await rig.online(service, "alice") for _ in range(3)]
    await done(service.sign_off(signed_off))
    lapsed.last_beat -= 61
    rig.deployment.lapse(lapsed)
    await rig.swept()
    with pytest.raises(TooManyConnections):
        await rig.online(service, "alice")
    await done(service.connection_lost(lost))
    await rig.online(service, "alice")
    with pytest.raises(TooManyConnections):
        await rig.online(service, "alice")
    assert len(service.open_sessions()) == 3


# Heartbeat Flow


async def test_a_heartbeat_renews_and_revives(rig):
    """WIRE §4: "lease = L from now, last active = now; revived if the lease had lapsed"."""
    service = rig.service()
    session = await rig.online(service, "alice")
    session.last_beat -= 50
    rig.deployment.move_deadline(session, rig.deployment.now_ms() + 10_000)
    await done(service.refresh_user_session(session, wait=True))
    assert rig.deployment.lease_left(session) > 59
    rig.deployment.lapse(session)
    await rig.swept()
    rig.deployment.redis.delete(rig.deployment.key("alice", "last_active"))
    before = rig.deployment.now_ms()
    await done(service.refresh_user_session(session, wait=True))
    assert rig.deployment.edges("alice")[1:] == [(False, "expired"), (True, "revived")]
    active = rig.deployment.last_active("alice")
    assert active is not None
    assert before - 2 <= active <= rig.deployment.now_ms()
    assert rig.deployment.lease_left(session) > 59


async def test_after_a_sign_off_heartbeats_change_nothing(rig):
    """WIRE §4: "ended at once, connection stays; later heartbeats do not revive it and change nothing, `lastSeen`"."""
    service = rig.service()
    session = await rig.online(service, "alice")
    await done(service.sign_off(session))
    active = rig.deployment.last_active("alice")
    assert service.refresh_user_session(session, wait=True) is None
    assert service.sign_off(session) is None
    assert service.open_sessions() == [session]
    assert service.set_user_offline(session) is None
    assert rig.deployment.edges("alice") == [(True, "connected"), (False, "signed-off")]
    assert rig.deployment.last_active("alice") == active


async def test_sign_on_also_revives_after_a_sign_off(rig):
    """WIRE §4: `{"online": true}` "as a heartbeat; also revives after `false`"."""
    service = rig.service()
    session = await rig.online(service, "alice")
    await done(service.sign_off(session))
    await done(service.sign_on(session, wait=True))
    await done(service.refresh_user_session(session, wait=True))
    assert rig.deployment.edges("alice") == [(True, "connected"), (False, "signed-off"), (True, "revived")]


async def test_an_open_connection_can_renew_the_lease_itself(rig):
    """WIRE §4: `PRESENCE_LEASE_RENEWED_BY=connection`: "without `/app/heartbeat` …; sign-off still ends it"."""
    service = rig.service()
    session, signed_off = await rig.online(service, "alice"), await rig.online(service, "bob")
    await done(service.sign_off(signed_off))
    active = rig.deployment.last_active("alice")
    rig.deployment.move_deadline(session, rig.deployment.now_ms() + 10_000)
    session.last_beat -= 50
    await wait_until(lambda: rig.deployment.now_ms() > active + 5)
    service.renew_open_sessions()
    await wait_until(lambda: rig.deployment.lease_left(session) > 55)
    assert rig.deployment.last_active("alice") == active
    assert rig.deployment.online() == {"alice"}


# Offline Flow


async def test_disconnect_ends_the_session_at_once(rig):
    """WIRE §4: DISCONNECT: "ended at once", whatever the grace."""
    service = rig.service(grace=30)
    session = await rig.online(service, "alice")
    await done(service.set_user_offline(session))
    assert rig.deployment.edges("alice") == [(True, "connected"), (False, "disconnected")]
    assert service.open_sessions() == []


async def test_a_lost_connection_without_grace_ends_the_session_at_its_last_input(rig):
    """WIRE §4: "lease shortened to the grace (default 0: ended at once)"; §2: "last inbound STOMP byte"."""
    service = rig.service()
    session = await rig.online(service, "alice")
    rig.deployment.redis.delete(rig.deployment.key("alice", "last_active"))
    session.last_input = time.monotonic() - 7
    await done(service.connection_lost(session))
    change = rig.deployment.changes()[-1]
    assert (change.online, change.reason) == (False, Reason.DISCONNECTED)
    assert -8_000 < change.last_active - rig.deployment.now_ms() <= -7_000


async def test_a_lost_connection_with_a_grace_leaves_the_last_input_as_the_last_activity(rig):
    """WIRE §2: `lastSeen` is the "last inbound STOMP byte before a lost connection"; §4: "shortened to the grace"."""
    service = rig.service(grace=10)
    session = await rig.online(service, "alice")
    rig.deployment.redis.delete(rig.deployment.key("alice", "last_active"))
    before = rig.deployment.now_ms()
    session.last_input = time.monotonic() - 7
    await done(service.connection_lost(session))
    assert rig.deployment.is_online("alice")
    active = rig.deployment.last_active("alice")
    assert active is not None
    assert before - 2 <= active + 7_000 <= rig.deployment.now_ms() + 2
    rig.deployment.lapse(session)
    await rig.swept()
    change = rig.deployment.changes()[-1]
    assert (change.online, change.reason, change.last_active) == (False, Reason.DISCONNECTED, active)


@pytest.mark.parametrize(
    ("rules", "lose", "rest", "reason"),
    [
        ({"grace": 20}, "connection_lost", 20, "disconnected"),
        ({"grace": 5, "drain": 15}, "token_expired", 15, "disconnected"),
        ({"grace": 25, "drain": 15}, "token_expired", 25, "disconnected"),
        ({"grace": 5, "drain": 15}, "drain", 15, "drained"),
        ({"grace": 25, "drain": 15}, "drain", 25, "drained"),
    ],
)
async def test_what_is_left_of_the_lease(rig, rules, lose, rest, reason):
    """WIRE §4: lost: "the grace"; planned stop: "max(drain, grace)"; §1, token's end: "max(grace, drain)"."""
    service = rig.service(**rules)
    session = await rig.online(service, "alice")
    if lose == "drain":
        await service.drain(5)
    else:
        await done(getattr(service, lose)(session))
    assert rest - 2 < rig.deployment.lease_left(session) <= rest
    assert rig.deployment.redis.hget(rig.deployment.key("alice", "lost"), session.id) == reason
    assert rig.deployment.is_online("alice")
    assert service.open_sessions() == []


@pytest.mark.parametrize("close", ["set_user_offline", "connection_lost", "token_expired"])
async def test_a_closed_session_is_closed_for_good(rig, close):
    service = rig.service()
    session = await rig.online(service, "alice")
    await done(service.set_user_offline(session))
    assert getattr(service, close)(session) is None
    assert service.refresh_user_session(session) is None
    assert service.sign_on(session) is None
    assert service.sign_off(session) is None
    assert rig.deployment.edges("alice") == [(True, "connected"), (False, "disconnected")]


async def test_a_stop_shortens_all_leases_before_it_goes_on(rig):
    """WIRE §4: "first all its leases become min(rest, max(drain, grace))"."""
    service = rig.service(drain=15)
    sessions = [await rig.online(service, f"user-{number}") for number in range(40)]
    await done(service.sign_off(sessions[0]))
    await service.drain(5)
    assert all(13 < rig.deployment.lease_left(session) <= 15 for session in sessions[1:])
    assert len(rig.deployment.online()) == 39
    assert service.open_sessions() == []


async def test_a_stop_does_not_wait_for_ever_for_a_store_that_is_away(rig):
    service = rig.service()
    await rig.online(service, "alice")
    async with rig.deployment.frozen():
        await done(service.drain(0.1))
    await wait_until(lambda: rig.deployment.redis.exists(rig.deployment.key("alice", "lost")))


# Reading


async def test_last_seen_comes_from_the_store(rig):
    service = rig.service()
    session = await rig.online(service, "alice")
    await done(service.set_user_offline(session))
    await rig.swept()
    rig.history.take()
    answer = await service.get_presence("bob", ["alice"])
    change = rig.deployment.changes()[-1]
    assert dict(answer.statuses) == {"alice": Status("alice", False, change.version, change.last_active)}
    assert not answer.degraded
    assert rig.history.take() == []  # there was no need to ask


async def test_last_seen_falls_back_to_the_history(rig):
    """Guide: "Fallback to Cassandra for historical data"; DESIGN §4: "the version is that of the Cassandra row"."""
    service = rig.service()
    await rig.history.port.write([Change("alice", False, 7_000, 5), Change("bob", True, 8_000, 6)])
    await rig.online(service, "here")
    await rig.swept()
    answer = await service.get_presence("carol", ["alice", "bob", "nobody", "here"])
    assert answer.statuses["alice"] == Status("alice", False, 7_000, 5)
    # A row that still says online is late, or newer than what the store was asked: its version is none of an offline.
    assert answer.statuses["bob"] == Status("bob", False, 0, 6)
    assert answer.statuses["nobody"] == Status("nobody")
    assert answer.statuses["here"].online
    assert not answer.degraded


async def test_what_the_store_still_knows_is_not_taken_from_the_history(rig):
    service = rig.service()
    session = await rig.online(service, "alice")
    await done(service.set_user_offline(session))
    change = rig.deployment.changes()[-1]
    await rig.history.port.write([Change("alice", False, 5, 5)])
    await rig.swept()
    rig.deployment.redis.delete(rig.deployment.key("alice", "last_active"))
    assert (await service.get_presence("bob", ["alice"])).statuses["alice"] == Status("alice", False, change.version, 5)
    rig.forget_change("alice")
    rig.deployment.redis.set(rig.deployment.key("alice", "last_active"), 9)
    assert (await service.get_presence("bob", ["alice"])).statuses["alice"] == Status("alice", False, 5, 9)


async def test_when_the_history_is_down_answers_go_on_and_say_so(rig):
    """WIRE §2: "answers go on with `lastSeen: null` where the time is only there, and say so"."""
    service = rig.service()
    session = await rig.online(service, "alice")
    await done(service.set_user_offline(session))
    await rig.online(service, "bob")
    await rig.history.port.close()
    await rig.swept()
    known = await service.get_presence("carol", ["alice", "bob"])
    assert not known.degraded
    assert known.statuses["alice"].last_active is not None
    unknown = await service.get_presence("carol", ["alice", "nobody"])
    assert unknown.degraded
    assert unknown.statuses["nobody"] == Status("nobody")
    assert unknown.statuses["alice"] == known.statuses["alice"]


async def test_while_the_store_settles_no_answer_is_offline(rig):
    """WIRE §2: "or has just come back and is still settling, an answer that would be "offline" is a 503"."""
    service = rig.service()
    await rig.online(service, "alice")
    rig.unsettle()
    assert (await service.get_presence("bob", ["alice"])).statuses["alice"].online
    with pytest.raises(StoreUnavailable):
        await service.get_presence("bob", ["alice", "nobody"])
    with pytest.raises(StoreUnavailable):
        await service.is_user_online("bob", "nobody")


async def test_a_store_that_does_not_answer_is_no_offline(rig):
    store = await rig.deployment.instance(timeout=1.0)
    service = PresenceService(store, rig.history, rig.directory, rig.fanout, Rules())
    async with rig.deployment.frozen():
        with pytest.raises(StoreUnavailable):
            await service.is_user_online("bob", "alice")


async def test_of_nobody_nothing_is_asked(rig):
    service = rig.service()
    rig.store.take()
    assert dict((await service.get_presence("alice", [])).statuses) == {}
    assert rig.store.take() == []


async def test_friends_and_members_are_read(rig):
    """Guide, Get Friends Presence, Get Conversation Members Presence; WIRE §2: "all members, the caller included"."""
    service = rig.service()
    rig.contacts.friends_of = {"alice": ["bob", "carol"]}
    rig.contacts.conversations = {"room": ["alice", "bob"]}
    await rig.online(service, "bob")
    await rig.swept()
    friends = await service.get_friends_presence("alice")
    assert {user: status.online for user, status in friends.statuses.items()} == {"bob": True, "carol": False}
    assert dict((await service.get_friends_presence("nobody")).statuses) == {}
    members = await service.get_conversation_presence("alice", "room")
    assert members is not None
    assert set(members.statuses) == {"alice", "bob"}
    assert await service.get_conversation_presence("carol", "room") is None
    assert await service.get_conversation_presence("alice", "no room") is None


async def test_a_row_that_is_newer_than_what_was_read_swallows_no_change(rig, monkeypatch):
    """Found by the runs of the fleet: a snapshot said "offline" with the version of a change to "online"."""
    service = rig.service()
    watcher = watch(rig, "viewer", "alice")
    read = rig.history.port.read

    async def late(users: Collection[str]) -> Mapping[str, Status]:
        """Meanwhile the user connects, and the relay writes the row."""
        await rig.online(service, "alice")
        await rig.history.port.write(rig.deployment.changes())
        return await read(users)  # type: ignore[no-any-return]

    monkeypatch.setattr(rig.history.port, "read", late)
    ((status, _),) = await service.snapshot(watcher, ["alice"])
    assert (status.online, status.version) == (False, 0)
    [change] = rig.deployment.changes()
    rig.fanout.deliver(change)
    assert watcher.flips() == [change]


# The policy `contacts`


async def contacts_service(rig):
    """``viewer`` may see ``friend``; ``hidden`` is online, ``asleep`` is in the store and the history, both hidden."""
    service = rig.service(contacts_only=True)
    rig.contacts.seen_by = {"viewer": frozenset({"viewer", "friend"})}
    await rig.online(service, "hidden")
    await rig.online(service, "friend")
    await done(service.set_user_offline(await rig.online(service, "asleep")))
    await rig.history.port.write([Change("asleep", False, 5, 5), Change("hidden", True, 6, 6)])
    await rig.swept()
    for port in (rig.store, rig.history, rig.directory):
        port.take()
    return service


@pytest.mark.parametrize("hidden", ["hidden", "asleep"])
async def test_a_hidden_user_is_like_one_never_seen_and_costs_the_same_look_ups(rig, hidden):
    """WIRE §5: "answered exactly like watching a user never seen: REST, batch, snapshot, … and the look-ups made"."""
    service = await contacts_service(rig)
    seen = []
    for user in (hidden, "nobody"):
        answer = await service.get_presence("viewer", ["friend", user])
        assert answer.statuses[user] == Status(user)
        assert answer.statuses["friend"].online
        watcher = watch(rig, "viewer", user)
        assert await service.snapshot(watcher, [user]) == [(Status(user), None)]
        seen.append((answer.degraded, rig.store.take(), rig.history.take(), rig.directory.take()))
    assert seen[0] == seen[1]
    assert ("read", [1]) in seen[0][2]  # also the history is asked


@pytest.mark.parametrize("trouble", ["settling", "no history"])
async def test_trouble_looks_the_same_for_a_hidden_user_and_one_never_seen(rig, trouble):
    """WIRE §5: "REST, batch, snapshot, headers and the look-ups made are the same", in trouble too."""
    service = await contacts_service(rig)
    if trouble == "settling":
        rig.unsettle()
    else:
        await rig.history.port.close()
    seen = []
    for user in ("hidden", "asleep", "nobody"):
        if trouble == "settling":
            with pytest.raises(StoreUnavailable) as refused:
                await service.get_presence("viewer", [user])
            said = str(refused.value)
        else:
            answer = await service.get_presence("viewer", [user])
            assert answer.degraded
            assert answer.statuses == {user: Status(user)}
            said = ""
        seen.append((said, rig.store.take(), rig.history.take(), rig.directory.take()))
    assert seen[0] == seen[1] == seen[2]


async def test_without_the_directory_nobody_is_shown(rig):
    service = await contacts_service(rig)
    rig.contacts.away = True
    with pytest.raises(DirectoryUnavailable):
        await service.get_presence("viewer", ["friend"])


def watch(rig, user: str, *users: str) -> Watcher:
    watcher = Watcher(Session(user, f"watching-{user}", "web", time.monotonic(), time.monotonic()), lambda: None)
    rig.fanout.watch(watcher, users)
    return watcher


async def test_on_revocation_the_session_is_told_once_and_when_it_may_see_again_anew(rig):
    """WIRE §5: "On revocation the session is told `online: false`, `timestamp: null`, `version: 0` … once"."""
    service = await contacts_service(rig)
    watcher = watch(rig, "viewer", "friend", "hidden")
    ((friend, _),) = await service.snapshot(watcher, ["friend"])
    assert friend.online
    assert await service.revise(watcher) == ([], [])
    rig.contacts.seen_by = {"viewer": frozenset({"viewer"})}
    assert await service.revise(watcher) == ([Status("friend")], [])
    assert await service.revise(watcher) == ([], [])
    rig.fanout.deliver(Status("friend", False, friend.version + 1))
    assert watcher.flips() == []
    rig.contacts.seen_by = {"viewer": frozenset({"viewer", "friend"})}
    assert await service.revise(watcher) == ([], ["friend"])
    await rig.swept()
    assert [status.online for status, _ in await service.snapshot(watcher, ["friend"])] == [True]
    assert await service.revise(watcher) == ([], [])


async def test_under_the_policy_anyone_there_is_nothing_to_revise(rig):
    service = rig.service()
    watcher = watch(rig, "viewer", "friend")
    assert await service.revise(watcher) == ([], [])
    assert rig.directory.take() == []


# Watching


async def test_a_snapshot_of_many_is_read_in_pages(rig):
    service = rig.service()
    users = [f"user-{number}" for number in range(PAGE + 1)]
    watcher = watch(rig, "viewer", *users)
    await rig.swept()
    rig.store.take()
    assert {status.user for status, _ in await service.snapshot(watcher, users)} == set(users)
    assert [call for call in rig.store.take() if call[0] == "read"] == [("read", [PAGE]), ("read", [1])]


@pytest.mark.parametrize("trouble", ["settling", "directory"])
async def test_a_snapshot_waits_while_the_store_or_the_directory_is_away(rig, trouble):
    """WIRE §4, store away: "receipts and snapshots wait"."""
    service = rig.service(contacts_only=True)
    watcher = watch(rig, "viewer", "viewer")
    rig.unsettle()
    rig.contacts.away = trouble == "directory"
    task = asyncio.create_task(service.snapshot(watcher, ["viewer"]))
    await wait_until(lambda: len(rig.directory.calls) > 2)  # it is asking again and again
    assert not task.done()
    rig.contacts.away = False
    await rig.swept()
    assert await done(task) == [(Status("viewer"), None)]


def reads(rig) -> list[tuple[str, list[int]]]:
    return [call for call in rig.store.calls if call[0] == "read"]


async def test_while_a_partition_settles_snapshots_do_not_ask_it(rig):
    """All clients that come back together would keep the store from settling."""
    service, other = rig.service(), rig.service()
    await rig.swept()
    partition = rig.store.partition_of("alice")
    service.note_settled(partition, settled=False)
    rig.store.take()
    task = asyncio.create_task(service.snapshot(watch(rig, "viewer", "alice"), ["alice"]))
    await other.snapshot(watch(rig, "other", "alice"), ["alice"])  # began later, and is answered
    assert not task.done()
    assert reads(rig) == [("read", [1])]
    service.note_settled(partition, settled=True)
    assert await done(task) == [(Status("alice"), None)]
    assert reads(rig) == [("read", [1])] * 2


class Gate:
    """In place of a method of the store: calls wait until it is opened, and are counted."""

    def __init__(self, rig, name, monkeypatch):
        self._call = getattr(rig.store.port, name)
        self._open = asyncio.Event()
        self.under_way = self.most = 0
        monkeypatch.setattr(rig.store, name, self, raising=False)

    async def __call__(self, *arguments):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self._open.wait()
        self.under_way -= 1
        return await self._call(*arguments)

    def open(self):
        self._open.set()


async def test_a_few_snapshots_only_are_read_at_once(rig, monkeypatch):
    service = rig.service()
    await rig.swept()
    gate = Gate(rig, "read", monkeypatch)
    watchers = [watch(rig, f"viewer-{number}", "alice") for number in range(2 * SNAPSHOTS + 1)]
    tasks = [asyncio.create_task(service.snapshot(watcher, ["alice"])) for watcher in watchers]
    await wait_until(lambda: gate.under_way >= SNAPSHOTS)
    gate.open()
    await done(asyncio.gather(*tasks))
    assert gate.most == SNAPSHOTS


# The store came back (DESIGN §3.6)


async def test_only_sessions_that_kept_beating_are_asserted_again(rig):
    """DESIGN §3.6: "open sockets that kept beating …; not the signed-off or lapsed ones"."""
    service = rig.service(grace=30)
    beating, signed_off, lapsed, closed = [await rig.online(service, f"user-{number}") for number in range(4)]
    await done(service.sign_off(signed_off))
    await done(service.connection_lost(closed))
    lapsed.last_beat -= 61
    beating.last_beat -= 20
    rig.deployment.redis.flushall()
    for partition in range(rig.deployment.partitions):
        service.restore(partition)
    await wait_until(rig.deployment.online)
    await done(asyncio.gather(*(lane.drained() for lane in rig.store.port._lanes)))
    assert rig.deployment.online() == {beating.user}
    assert 38 < rig.deployment.lease_left(beating) <= 40


async def test_each_partition_asserts_its_own(rig):
    service = rig.service()
    for number in range(24):
        await rig.online(service, f"user-{number}")
    rig.deployment.redis.flushall()
    rig.store.take()
    service.restore(rig.deployment.partitions - 1)
    restored = sum(name == "restore" for name, _ in rig.store.take())
    of_it = [s for s in service.open_sessions() if rig.store.partition_of(s.user) == rig.deployment.partitions - 1]
    assert restored == len(of_it) > 0


async def settle(rig, service, epoch=1):
    await rig.swept()
    for partition in range(rig.deployment.partitions):
        await service.settle(partition)
    await settle_history(rig, service, epoch)


async def settle_history(rig, service, epoch):
    partitions = range(rig.deployment.partitions)
    await asyncio.gather(*(service.settle_history(partition, epoch) for partition in partitions))


async def test_settling_tells_watchers_of_those_who_did_not_come_back(rig):
    """DESIGN §3.6: "every instance hands over the users it has told its watchers are online"."""
    service = rig.service()
    await rig.online(service, "here")
    gone = await rig.online(service, "gone")
    watcher = watch(rig, "viewer", "here", "gone", "nobody")
    await rig.swept()
    await service.snapshot(watcher, ["here", "gone", "nobody"])
    told = dict(watcher.told)
    rig.deployment.redis.flushall()
    gone.closed = True
    service._open.pop("gone")
    for partition in range(rig.deployment.partitions):
        service.restore(partition)
    await wait_until(rig.deployment.online)
    await settle(rig, service)
    (flip,) = watcher.flips()
    assert (flip.user, flip.online, flip.last_active) == ("gone", False, told["gone"].last_active)
    assert flip.version > told["gone"].version
    assert rig.deployment.edges("gone") == [(False, "restored")]
    await settle(rig, service)
    assert watcher.flips() == []
    assert len(rig.deployment.changes("gone")) == 1


async def test_settling_tells_watchers_of_changes_that_were_lost_with_the_store(rig):
    service = rig.service()
    watcher = watch(rig, "viewer", "alice")
    await rig.swept()
    await service.snapshot(watcher, ["alice"])
    await rig.online(service, "alice")  # and nobody has read it when the store is lost
    rig.deployment.redis.flushall()
    for partition in range(rig.deployment.partitions):
        service.restore(partition)
    await wait_until(rig.deployment.online)
    await settle(rig, service)
    assert [status.online for status in watcher.flips()] == [True]


async def test_settling_sets_right_what_the_history_says(rig):
    """DESIGN §3.6: "after a loss of the store the cleanup also settles rows that the history still says are online"."""
    service = rig.service()
    await rig.online(service, "here")
    await rig.history.port.write([Change("gone", True, 7_000, 5, "tablet"), Change("here", True, 8_000, 6)])
    await settle(rig, service)
    rows = await rig.history.port.read(["gone", "here"])
    change = rig.deployment.changes("gone")[-1]
    assert rows["gone"] == Status("gone", False, change.version, 5)
    assert rows["here"].online
    assert rig.deployment.edges("gone") == [(False, "restored")]


async def test_one_look_at_the_history_settles_all_partitions_for_all_instances(rig, monkeypatch):
    """Found in review: each instance read all rows once for each partition, at every start and after every loss."""
    looks = []
    online_users = rig.history.port.online_users

    async def counted():
        looks.append(1)
        async for page in online_users():
            yield page

    monkeypatch.setattr(rig.history.port, "online_users", counted)
    service = rig.service()
    await settle_history(rig, service, epoch=1)
    assert len(looks) == 1
    rig.store = Recorded(await rig.deployment.instance())
    starts = rig.service()
    await settle_history(rig, starts, epoch=1)
    assert len(looks) == 1, "it was done since the loss"
    await settle_history(rig, starts, epoch=2)
    assert len(looks) == 2


async def test_a_look_at_the_history_that_fails_is_none(rig, monkeypatch):
    async def fail():
        raise HistoryUnavailable("away")
        yield

    service = rig.service()
    online_users = rig.history.port.online_users
    monkeypatch.setattr(rig.history.port, "online_users", fail)
    tries = await asyncio.gather(*(service.settle_history(0, 1) for _ in range(2)), return_exceptions=True)
    assert [type(one) for one in tries] == [HistoryUnavailable] * 2
    monkeypatch.setattr(rig.history.port, "online_users", online_users)
    await rig.history.port.write([Change("gone", True, 7_000)])
    await rig.swept()
    await service.settle_history(0, 1)
    assert rig.deployment.edges("gone") == [(False, "restored")]


async def test_settling_records_the_watches_again(rig):
    service = rig.service()
    session = await rig.online(service, "viewer")
    session.watched.update({"alice", "bob"})
    await rig.store.record_watches(session)
    rig.deployment.redis.flushall()
    await settle(rig, service)
    async with recording(service.records):
        await wait_until(lambda: len(service.records) == 0)
        assert rig.deployment.redis.smembers(rig.deployment.key("alice", "watchers")) == {"viewer"}


async def test_settling_records_the_watchers_that_only_the_partition_of_the_watched_has_lost(rig):
    """DESIGN §4: the watchers of a user "must be right again one cleanup period after any crash"."""
    service = rig.service()
    watched = [f"user-{number}" for number in range(24)]
    watcher = watch(rig, "viewer", *watched)
    await rig.store.record_watches(watcher.session)
    lost = rig.store.partition_of("user-0")
    for key in rig.deployment.redis.keys(f"{rig.deployment.bases[lost]}*"):
        rig.deployment.redis.delete(key)
    await rig.swept()
    await service.settle(lost)
    recorded = [rig.deployment.redis.smembers(rig.deployment.key(user, "watchers")) for user in watched]
    assert recorded == [{"viewer"}] * 24


async def test_each_partition_records_the_watches_of_its_own_users_alone(rig):
    service = rig.service()
    for number in range(24):
        await rig.online(service, f"user-{number}")
    await rig.swept()
    rig.store.take()
    for partition in range(rig.deployment.partitions):
        await service.settle(partition)
    renewed = [sizes[0] for name, sizes in rig.store.take() if name == "renew_watches"]
    assert sum(renewed) == 24
    assert len(renewed) == rig.deployment.partitions


async def test_missed_changes_are_made_good_by_reading_all_who_are_watched(rig):
    """WIRE §5: "a resynchronisation leaves …": what was missed is told as a flip."""
    service = rig.service()
    session = await rig.online(service, "alice")
    watcher = watch(rig, "viewer", "alice", "bob")
    await rig.swept()
    await service.snapshot(watcher, ["alice", "bob"])
    await done(service.set_user_offline(session))
    await rig.online(service, "bob")
    await rig.swept()
    for partition in range(rig.deployment.partitions):
        await service.resync(partition)
    assert {status.user: status.online for status in watcher.flips()} == {"alice": False, "bob": True}


async def test_what_is_not_certain_is_not_told(rig):
    """DESIGN §3.6: during the amnesty "offline" answers are unknown": nobody is told of one."""
    service = rig.service()
    session = await rig.online(service, "alice")
    watcher = watch(rig, "viewer", "alice", "bob")
    await rig.swept()
    await service.snapshot(watcher, ["alice", "bob"])
    await done(service.set_user_offline(session))
    await rig.online(service, "bob")
    rig.unsettle()
    for partition in range(rig.deployment.partitions):
        await service.resync(partition)
    assert {status.user: status.online for status in watcher.flips()} == {"bob": True}


# Maintenance


async def test_the_cleanup_makes_rows_and_store_agree_both_ways(rig):
    """Guide, Cleanup Task: "sync Redis/Cassandra"; its counts say what was repaired."""
    service = rig.service()
    for user in ("known", "unknown", "late"):
        await rig.online(service, user, "mobile")
    online = {change.user: change for change in rig.deployment.changes()}
    await rig.history.port.write(
        [online["known"], Change("late", False, 5, 5), Change("gone", True, 7, 7), Change("asleep", False, 8, 8)]
    )
    await rig.swept()
    repaired = await service.cleanup()
    assert {name: number for name, number in repaired.items() if number} == {"rows_offline": 1, "rows_online": 2}
    assert set(repaired) == {"offline", "online", "deadlines", "orphans", "watchers", "rows_offline", "rows_online"}
    rows = await rig.history.port.read(["known", "unknown", "late", "gone", "asleep"])
    assert {user for user, row in rows.items() if row.online} == {"known", "unknown", "late"}
    assert rows["unknown"].version == online["unknown"].version
    assert rows["asleep"] == Status("asleep", False, 8, 8)
    assert {n: number for n, number in (await service.cleanup()).items() if number} == {}


async def test_a_row_that_is_only_late_gets_the_values_of_its_change(rig):
    """DESIGN §4: "written `USING TIMESTAMP` the version with exactly the values of that change"."""
    service = rig.service()
    session = await rig.online(service, "alice", "tablet")
    await rig.history.port.write(rig.deployment.changes())
    session.last_beat += 0.001
    await done(service.refresh_user_session(session, wait=True))
    await done(service.set_user_offline(session))
    change = rig.deployment.changes()[-1]
    await rig.swept()
    await service.cleanup()  # before the relay had brought the change
    rows = await rig.history.port._select("SELECT user_id, is_online, last_active, device, version FROM user_presence")
    assert rows == [("alice", 0, change.last_active, "tablet", change.version)]


async def test_the_cleanup_during_the_amnesty_takes_nobody_offline(rig):
    service = rig.service()
    await rig.history.port.write([Change("gone", True, 7, 7)])
    rig.unsettle()
    repaired = await service.cleanup()
    assert repaired["rows_offline"] == 0
    assert (await rig.history.port.read(["gone"]))["gone"].online
