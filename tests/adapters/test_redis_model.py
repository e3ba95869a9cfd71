"""Whatever happens to sessions, in whatever order, the store agrees with a model of a few lines (DESIGN §3).

The model knows each session's connection and lease, and from them each user's edges. The store is three instances of
the adapter, with the real scripts, on a real Valkey. Time passes by moving leases' ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from presence.adapters.lane import Kind
from presence.adapters.redis import RedisStore
from presence.core.model import Reason, Session, Status
from presence.ports import StoreUnavailable
from tests.support.deployment import Deployment, session

LEASE_MS = 60_000
GRACE_MS = 30_000
USERS = ("ann", "bob", "cid")
INSTANCES = 3
SLACK_MS = 30  # for rounding, and for what the store does between two looks at its clock

Span = tuple[int, int]

users = st.sampled_from(USERS)
instances = st.integers(0, INSTANCES - 1)
indexes = st.integers(0, 1000)


@dataclass(eq=False)
class Modelled:
    """One session as the model knows it. Spans are of ms of the store's clock: from when to when it may have been."""

    session: Session
    instance: int
    stored: bool = False
    """The store has it: it has a lease, which may be over."""
    overdue: bool = False
    """Its lease is over, and no sweep has seen that yet."""
    reason: str = "expired"
    """Why its user will be offline when the lease is over."""
    beat: Span = (0, 0)
    """The last heartbeat."""
    till: Span = (0, 0)
    """The end of the lease."""

    @property
    def open(self) -> bool:
        return not self.session.closed


class FlakyStores:
    """Instances whose answers can be lost after the script has run."""

    def __init__(self, stores: list[RedisStore]) -> None:
        self.stores = stores
        self.lose = 0
        for store in stores:
            for lane in store._lanes:
                lane._call = self._flaky(lane._call)

    def _flaky(self, call: Any) -> Any:
        async def flaky(kind: Kind, commands: Any) -> Any:
            answers = await call(kind, commands)
            if self.lose:
                self.lose -= 1
                raise StoreUnavailable("the answer is lost")
            return answers

        return flaky


class PresenceMachine(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, deployment: Deployment, flaky: FlakyStores) -> None:
        super().__init__()
        self._runner = runner
        self.deployment = deployment
        self.flaky = flaky
        self.stores = flaky.stores
        self.sessions: list[Modelled] = []
        """Those that are stored, or whose connection is open."""
        self.edges: dict[str, list[tuple[bool, str]]] = {user: [] for user in USERS}
        self.active: dict[str, Span] = {}
        """User → last activity."""
        self.floor = 0
        """The highest version before the store was lost."""
        self.ahead: list[float] = []
        """By how many ms the store's clock was ahead of this process's monotonic one, at each look."""

    @initialize(ahead=st.booleans())
    def start(self, ahead: bool) -> None:
        """``ahead``: an earlier primary's clock was ahead, so that all versions come from what was seen before."""
        self.deployment.redis.flushall()
        for store in self.stores:
            store.floor = (self.deployment.now_ms() + 3_600_000) * 1000 if ahead else 0
            self.run(self.deployment.sweep, store)

    def run(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(10):
                return await work(*args)

        return self._runner.run(limited())

    def timed(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Span:
        before = self.now_ms()
        self.run(work, *args)
        return before, self.now_ms()

    def now_ms(self) -> int:
        now = self.deployment.now_ms()
        self.ahead.append(now - time.monotonic() * 1000)
        return now

    def slack(self) -> float:
        """What an age may be off, in ms: a machine's wall clock is set now and then, its monotonic clock is not."""
        self.now_ms()
        return SLACK_MS + max(self.ahead) - min(self.ahead)

    def choose(self, index: int, which: Callable[[Modelled], bool]) -> Modelled | None:
        candidates = [one for one in self.sessions if which(one)]
        return candidates[index % len(candidates)] if candidates else None

    # The model

    def stored(self, user: str) -> list[Modelled]:
        return [one for one in self.sessions if one.stored and one.session.user == user]

    def renewed(self, one: Modelled, reason: str, span: Span) -> None:
        """It was made, renewed or revived at a heartbeat."""
        user = one.session.user
        if not self.stored(user):
            self.edges[user].append((True, reason))
        if one not in self.sessions:
            self.sessions.append(one)
        one.stored, one.overdue = True, False
        one.beat, one.till = span, (span[0] + LEASE_MS, span[1] + LEASE_MS)
        self.active_at(user, span)

    def ended(self, one: Modelled, reason: str, span: Span | None = None) -> None:
        """It was ended, by an activity of that time; a no-op for one that had ended already."""
        if one.stored:
            one.stored = one.overdue = False
            user = one.session.user
            if span:
                self.active_at(user, span)
            if not self.stored(user):
                self.edges[user].append((False, reason))
        self.forget()

    def forget(self) -> None:
        self.sessions = [one for one in self.sessions if one.stored or one.open]

    def active_at(self, user: str, span: Span) -> None:
        known = self.active.get(user, (0, 0))
        self.active[user] = (max(known[0], span[0]), max(known[1], span[1]))

    # What a client does

    async def _connect(self, one: Modelled) -> None:
        one.session.last_beat = one.session.last_input = time.monotonic()
        await self.stores[one.instance].connect(one.session, limit=0, without_lease=0)

    async def _beat(self, one: Modelled) -> None:
        one.session.last_beat = one.session.last_input = time.monotonic()
        await self.stores[one.instance].refresh(one.session, urgent=True)

    async def _end(self, one: Modelled, reason: Reason) -> None:
        await self.stores[one.instance].end(one.session, reason, time.monotonic())

    @precondition(lambda self: len(self.sessions) < 12)
    @rule(user=users, instance=instances)
    def connect(self, user: str, instance: int) -> None:
        one = Modelled(session(user), instance)
        self.renewed(one, "connected", self.timed(self._connect, one))

    @rule(user=users, instance=instances)
    def connect_whose_outcome_is_unknown(self, user: str, instance: int) -> None:
        """DESIGN §3.5: it "is followed by an end until that is answered"."""
        one = Modelled(session(user), instance)
        store = self.stores[instance]

        async def give_up() -> None:
            now = asyncio.get_running_loop().time()
            with pytest.raises(StoreUnavailable):
                await store._add(Kind.CONNECT, one.session, Reason.CONNECTED, now, give_up_at=now)
            await store._lanes[store.partition_of(user)].drained()

        self.flaky.lose = 1
        self.renewed(one, "connected", self.timed(give_up))
        one.session.closed = True
        self.ended(one, "disconnected")

    @rule(index=indexes)
    def heartbeat(self, index: int) -> None:
        one = self.choose(index, lambda one: one.open and not one.session.signed_off)
        if one:
            self.renewed(one, "revived", self.timed(self._beat, one))

    @rule(index=indexes)
    def sign_off(self, index: int) -> None:
        one = self.choose(index, lambda one: one.open and not one.session.signed_off)
        if one:
            one.session.signed_off = True
            self.ended(one, "signed-off", self.timed(self._end, one, Reason.SIGNED_OFF))

    @rule(index=indexes)
    def sign_on(self, index: int) -> None:
        one = self.choose(index, lambda one: one.open and one.session.signed_off)
        if one:
            one.session.signed_off = False
            self.renewed(one, "revived", self.timed(self._beat, one))

    @rule(index=indexes)
    def disconnect(self, index: int) -> None:
        one = self.choose(index, lambda one: one.open)
        if one:
            one.session.closed = True
            self.ended(one, "disconnected", self.timed(self._end, one, Reason.DISCONNECTED))

    @rule(index=indexes, reason=st.sampled_from([Reason.DISCONNECTED, Reason.DRAINED]))
    def lose_the_connection_with_grace(self, index: int, reason: Reason) -> None:
        """DESIGN §3.4: "A lost connection with grace is a shortened lease"."""
        one = self.choose(index, lambda one: one.open)
        if one:
            one.session.closed = True
            shorten = self.stores[one.instance].shorten

            async def lose(one: Modelled) -> None:
                await shorten(one.session, reason, one.session.last_input, GRACE_MS / 1000)

            low, high = self.timed(lose, one)
            one.reason = reason.value
            one.till = (min(one.till[0], low + GRACE_MS), min(one.till[1], high + GRACE_MS))
            self.forget()

    @rule(number=st.integers(1, 2), index=indexes, end=st.booleans())
    def answers_are_lost(self, number: int, index: int, end: bool) -> None:
        """What has been done is asked once more, and may have no second effect."""
        self.flaky.lose = number
        if end:
            self.disconnect(index)
        else:
            self.heartbeat(index)
        self.flaky.lose = 0

    # What time does

    @rule(index=indexes)
    def most_of_the_lease_passes(self, index: int) -> None:
        one = self.choose(index, lambda one: one.stored and not one.overdue)
        if one:
            till = self.now_ms() + GRACE_MS // 2
            self.deployment.move_deadline(one.session, till)
            one.till = (till, till)

    @rule(index=indexes, siblings=st.booleans())
    def lapse(self, index: int, siblings: bool) -> None:
        one = self.choose(index, lambda one: one.stored)
        for other in self.stored(one.session.user) if one else ():
            if siblings or other is one:
                self.deployment.lapse(other.session)
                other.overdue = True

    @rule(instance=instances)
    def sweep(self, instance: int) -> None:
        self.run(self.deployment.sweep, self.stores[instance])
        self.swept()

    async def _sweep_everywhere(self) -> None:
        for base in self.deployment.bases:
            self.deployment.redis.set(f"{base}swept", self.deployment.now_ms() - 100, xx=True)
        await asyncio.gather(*(one.sweep(partition) for one in self.stores for partition in range(one.partitions)))

    @rule()
    def all_sweep_at_once(self) -> None:
        self.run(self._sweep_everywhere)
        self.swept()

    def swept(self) -> None:
        for user in USERS:
            due = [one for one in self.stored(user) if one.overdue]
            for one in due:
                self.ended(one, one.reason)
            if due and not self.stored(user):
                # Of those that are due together the last one swept says why.
                last = self.deployment.edges(user)[-1]
                assert last in {(False, one.reason) for one in due}
                self.edges[user][-1] = last

    # Much at once

    @rule(data=st.data(), coming=st.sets(users), sweep=st.booleans())
    def much_at_once(self, data: st.DataObject, coming: set[str], sweep: bool) -> None:
        """Several instances, several sessions of the same users: each edge is made once, in whatever order."""
        doing = {one: data.draw(st.sampled_from(["nothing", "beat", "end"])) for one in self.sessions if one.open}
        beating = [one for one, what in doing.items() if what == "beat" and not one.session.signed_off]
        ending = [one for one, what in doing.items() if what == "end"]
        connecting = [Modelled(session(user), data.draw(instances)) for user in sorted(coming)]
        for one in ending:
            one.session.closed = True

        async def all_at_once() -> None:
            work = [self._connect(one) for one in connecting]
            work += [self._beat(one) for one in beating]
            work += [self._end(one, Reason.DISCONNECTED) for one in ending]
            work += [self._sweep_everywhere()] if sweep else []
            await asyncio.gather(*work)

        before = {user: list(edges) for user, edges in self.edges.items()}
        due = [one for one in self.sessions if one.overdue]
        self.deployment.steady = not sweep  # else a sweep that happens to be later would be one too many
        span = self.timed(all_at_once)
        self.deployment.steady = True
        for one in [*connecting, *beating]:
            self.renewed(one, "", span)
        for one in ending:
            if one.overdue and sweep:  # whether its end was an activity depends on who came first
                known = self.active[one.session.user]
                self.active[one.session.user] = (known[0], max(known[1], span[1]))
                self.ended(one, "")
            else:
                self.ended(one, "", span)
        for one in due if sweep else ():
            if one.overdue:
                self.ended(one, "")
        for user, old in before.items():
            edges = self.deployment.edges(user)
            new = edges[len(old) :]
            assert edges[: len(old)] == old
            assert {reason for _, reason in new} <= {
                "connected",
                "revived",
                "disconnected",
                *(one.reason for one in due),
            }
            online = [bool(old) and old[-1][0], *(online for online, _ in new)]
            assert all(earlier is not later for earlier, later in pairwise(online)), f"{user}: {edges}"
            assert online[-1] is bool(self.stored(user))
            self.edges[user] = edges

    # The store is lost (DESIGN §3.6)

    @rule(empty=st.booleans(), overdue=indexes, dead=st.sampled_from([None, *range(INSTANCES)]))
    def the_store_comes_back(self, empty: bool, overdue: int, dead: int | None) -> None:
        """Late or empty; an instance may have died meanwhile. Nobody goes offline until all have reported."""
        for store in self.stores:  # as each does ten times a second
            self.run(self.deployment.sweep, store)
        self.swept()
        told = [self.told(user) for user in USERS if self.stored(user)]
        for one in self.sessions:
            one.session.closed |= one.instance == dead
        kept = [one for one in self.sessions if one.stored and one.open]
        self.lose_the_store(empty)
        for store in self.stores:
            store._amnesty = 60.0
            for partition in range(store.partitions):
                assert self.run(store.sweep, partition).settling > 0
        if not empty and overdue % 2:
            self.lapse(overdue, siblings=True)

        for one in kept:
            if not one.overdue:
                self.run(self._restore, one)
                self.renewed(one, "restored", one.beat)
        self.forget()
        assert all(self.run(store.settle, told) == [] for store in self.stores)
        self.run(self._sweep_everywhere)
        self.who_has_a_session_is_online()  # that is to say: nobody has gone offline

        for base in self.deployment.bases:
            self.deployment.redis.hset(f"{base}amnesty", "till", self.deployment.now_ms() - 500)
        for store in self.stores:
            store._amnesty = 0.0
        self.run(self._sweep_everywhere)
        self.swept()
        answers = [self.run(store.settle, told) for store in self.stores]
        assert answers[0] == answers[1] == answers[2]
        assert [status.user for status in answers[0]] == [one.user for one in told if not self.stored(one.user)]
        for status in told:
            if empty and not self.stored(status.user):
                self.edges[status.user].append((False, "restored"))
                assert status.last_active
                self.active_at(status.user, (status.last_active, status.last_active))

    def lose_the_store(self, empty: bool) -> None:
        if empty:
            self.floor = max([self.floor, *(store.floor for store in self.stores)])
            self.deployment.redis.flushall()
            self.edges = {user: [] for user in USERS}
            self.active = {}
            for one in self.sessions:
                one.stored = False
        else:
            self.deployment.pass_time(3_100)

    async def _restore(self, one: Modelled) -> None:
        self.now_ms()
        await self.stores[one.instance].restore(one.session)

    def told(self, user: str) -> Status:
        return Status(user, True, self.deployment.changes(user)[-1].version, self.deployment.last_active(user))

    # What is looked at after each step

    @invariant()
    def each_edge_is_one_change(self) -> None:
        """DESIGN §3.2: none is missing, none is repeated; versions rise over the stream, and beyond a loss."""
        by_user: dict[str, list[tuple[bool, str]]] = {user: [] for user in USERS}
        last = dict.fromkeys(self.deployment.bases, self.floor)
        for change in self.deployment.changes():
            base = self.deployment.base(change.user)
            assert change.version > last[base]
            last[base] = change.version
            by_user[change.user].append((change.online, change.reason.value))
        assert by_user == self.edges

    @invariant()
    def who_has_a_session_is_online(self) -> None:
        assert self.deployment.online() == {user for user in USERS if self.stored(user)}

    @invariant()
    def each_session_has_its_lease_in_three_places(self) -> None:
        """DESIGN §3: session key "PXAT = lease end", `sessions`, and `deadlines` "over all users"."""
        redis, deployment = self.deployment.redis, self.deployment
        stored = {f"{one.session.user}:{one.session.id}": one for one in self.sessions if one.stored}
        deadlines = {member: till for base in deployment.bases for member, till in _scores(redis, f"{base}deadlines")}
        sessions = {f"{u}:{name}": till for u in USERS for name, till in _scores(redis, deployment.key(u, "sessions"))}
        assert deadlines == sessions
        assert set(deadlines) == set(stored)
        for member, one in stored.items():
            if not one.overdue:
                assert one.till[0] - self.slack() <= deadlines[member] <= one.till[1] + self.slack()
                key = deployment.key(one.session.user, f"online:{one.session.id}")
                assert redis.pexpiretime(key) == deadlines[member]
        assert len(redis.keys("*presence:user:*:online:*")) == sum(not one.overdue for one in stored.values())

    @invariant()
    def last_active_is_the_last_activity(self) -> None:
        for user in USERS:
            low, high = self.active.get(user, (0, 0))
            if high:
                assert low - self.slack() <= (self.deployment.last_active(user) or 0) <= high + self.slack(), user
            else:
                assert self.deployment.last_active(user) is None


def _scores(redis: Any, key: str) -> list[tuple[str, float]]:
    return [(member, till) for member, till in redis.zrange(key, 0, -1, withscores=True)]


@pytest.mark.parametrize("partitions", [1, 12], ids=["partitions=1", "partitions=12"])
def test_the_store_agrees_with_the_model(shared_valkey, partitions):
    with asyncio.Runner() as runner:
        deployment = Deployment(shared_valkey, partitions)

        async def start() -> FlakyStores:
            return FlakyStores([await deployment.instance(lease=LEASE_MS / 1000) for _ in range(INSTANCES)])

        flaky = runner.run(start())
        try:
            run_state_machine_as_test(
                lambda: PresenceMachine(runner, deployment, flaky),  # type: ignore[arg-type] # any that makes one
                settings=settings(
                    max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck), deadline=None
                ),
            )
        finally:
            runner.run(deployment.close())
