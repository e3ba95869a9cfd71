"""Several instances of the store adapter on one real Valkey, and a look behind them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from presence.adapters.redis import Keys, RedisStore, tags
from presence.core.model import Change, Reason, Session
from tests.support.store import ValkeyProcess

_numbers = itertools.count()


class SteadyStore(RedisStore):
    """The adapter under test; a test that is slow for whatever reason is no loss of the store to it."""

    deployment: Deployment

    async def _ask(self, name: str, keys: Keys, *args: object) -> Any:
        if self.deployment.steady:
            self.deployment.redis.set(f"{keys.base}swept", self.deployment.now_ms(), xx=True)
        return await super()._ask(name, keys, *args)


class Deployment:
    """The stores of several instances on one Valkey, which is emptied first.

    It is looked at, and time is made to pass in it, by commands of the tests' own: never by those of the adapter.
    """

    steady = True
    """What is asked finds that some instance has just swept, as in real life, if any has swept before at all."""

    def __init__(self, server: ValkeyProcess, partitions: int = 1) -> None:
        self.server = server
        self.partitions = partitions
        self.bases = [f"{tag}presence:" for tag in tags(partitions)]
        self.stores: list[RedisStore] = []
        self._running: list[asyncio.Task[None]] = []
        self.redis: Any = server.redis()
        self.redis.flushall()
        self.redis.config_resetstat()

    async def instance(self, *, swept: bool = True, **options: Any) -> RedisStore:
        """Start one more instance, without an amnesty unless it is asked for; ``swept``: it has swept everywhere."""
        options = {"partitions": self.partitions, "lease": 60.0, "amnesty": 0.0} | options
        store = SteadyStore(self.server.url, instance=f"instance-{next(_numbers)}", **options)
        store.deployment = self
        self.stores.append(store)
        self._running.append(asyncio.create_task(store.run()))
        if swept:
            await self.sweep(store)
        return store

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for store in self.stores:
            await store.close()

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """The Valkey answers nothing meanwhile; what it is sent it does afterwards."""
        steady, self.steady = self.steady, False
        await self.server.freeze()
        try:
            yield
        finally:
            await self.server.thaw()
            self.steady = steady

    # Making time pass

    def now_ms(self) -> int:
        """The store's clock."""
        seconds, micros = self.redis.time()
        return int(seconds * 1000 + micros // 1000)

    def pass_time(self, ms: int) -> None:
        """Let the last sweep be so much longer ago."""
        for base in self.bases:
            if self.redis.exists(f"{base}swept"):
                self.redis.decrby(f"{base}swept", ms)

    async def sweep(self, store: RedisStore) -> None:
        """Have the instance sweep each partition, until nothing is due; the last sweep was 100 ms ago."""
        for partition, base in enumerate(self.bases):
            more = True
            while more:
                if self.steady:
                    self.redis.set(f"{base}swept", self.now_ms() - 100, xx=True)
                more = (await store.sweep(partition)).more

    def move_deadline(self, session: Session, till_ms: int) -> None:
        """Let the session's lease end at ``till_ms``."""
        assert self.redis.zscore(self.key(session.user, "sessions"), session.id) is not None, "no such session"
        self.redis.zadd(self.key(session.user, "sessions"), {session.id: till_ms})
        self.redis.zadd(f"{self.base(session.user)}deadlines", {f"{session.user}:{session.id}": till_ms})
        self.redis.pexpireat(self.key(session.user, f"online:{session.id}"), till_ms)

    def lapse(self, *sessions: Session) -> None:
        """Let the sessions' leases be over."""
        for session in sessions:
            self.move_deadline(session, self.now_ms() - 500)  # over, though the machine's clock be set back a little

    # Looking behind the port

    def base(self, user: str) -> str:
        return self.bases[RedisStore.partition_of(self, user)]  # type: ignore[arg-type] # it asks for `partitions` only

    def key(self, user: str, name: str) -> str:
        return f"{self.base(user)}user:{user}:{name}"

    def online(self) -> set[str]:
        return {user for base in self.bases for user in self.redis.smembers(f"{base}online")}

    def is_online(self, user: str) -> bool:
        return bool(self.redis.sismember(f"{self.base(user)}online", user))

    def sessions(self, user: str) -> set[str]:
        return set(self.redis.zrange(self.key(user, "sessions"), 0, -1))

    def deadlines(self) -> set[str]:
        return {member for base in self.bases for member in self.redis.zrange(f"{base}deadlines", 0, -1)}

    def lease_left(self, session: Session) -> float:
        """What is left of the session's lease, s."""
        till = self.redis.zscore(self.key(session.user, "sessions"), session.id)
        assert till is not None, "no such session"
        return float(till - self.now_ms()) / 1000

    def last_active(self, user: str) -> int | None:
        active = self.redis.get(self.key(user, "last_active"))
        return None if active is None else int(active)

    def changes(self, *users: str) -> list[Change]:
        """All changes in the streams, or those of ``users``: each partition's in order."""
        found = []
        for base in self.bases:
            for entry_id, fields in self.redis.xrange(f"{base}changes"):
                ms, us = map(int, entry_id.split("-"))
                active = int(fields["lastActive"]) if fields["lastActive"] else None
                reason = Reason(fields["reason"])
                version = ms * 1000 + us
                change = Change(fields["user"], fields["online"] == "1", version, active, fields["device"], reason)
                if not users or change.user in users:
                    found.append(change)
        return found

    def edges(self, user: str) -> list[tuple[bool, str]]:
        """The user's changes as (online, reason)."""
        return [(change.online, change.reason.value) for change in self.changes(user)]

    def calls(self) -> dict[str, int]:
        """How often each command was called, also by scripts, since the beginning or `reset_calls`."""
        statistics = self.redis.info("commandstats")
        return {name.removeprefix("cmdstat_"): counts["calls"] for name, counts in statistics.items()}

    def reset_calls(self) -> None:
        self.redis.config_resetstat()


def session(user: str, session_id: str | None = None, device: str = "web") -> Session:
    """A session that has just begun."""
    now = time.monotonic()
    return Session(user, session_id or f"s{next(_numbers)}", device, last_beat=now, last_input=now)


async def connect(store: RedisStore, user: str, session_id: str | None = None, device: str = "web") -> Session:
    """Connect a session of the user, without a limit."""
    made = session(user, session_id, device)
    await store.connect(made, limit=0, without_lease=0)
    return made
