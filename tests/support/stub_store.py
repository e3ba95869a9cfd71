"""A presence store without rules: it notes what it is asked, and answers as the test says. For tests of who asks it."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

from presence.core.model import Reason, Session, Status
from presence.fanout import Fanout
from presence.ports import Directory, Health, HistoryStore, PresenceStore, Reading
from presence.service import PresenceService, Rules


class StubStore:
    """See `presence.ports.PresenceStore`; what no connection asks for is left out."""

    partitions = 1

    def __init__(self) -> None:
        self.health = Health()
        self.commands: list[tuple[str, str]] = []
        """What was asked: the name of the method, and the user."""
        self.live: set[str] = set()
        """Sessions that were made and not ended."""
        self.statuses: dict[str, Status] = {}
        self.reachable = asyncio.Event()
        """While it is not set, nothing is answered."""
        self.reachable.set()
        self.fails: Exception | None = None
        """What `connect` raises."""

    def partition_of(self, user: str) -> int:
        return 0

    async def connect(self, session: Session, *, limit: int, without_lease: int) -> None:
        self.commands.append(("connect", session.user))
        await self.reachable.wait()
        if self.fails:
            raise self.fails
        self.live.add(session.id)

    def refresh(self, session: Session, *, active: bool = True, urgent: bool = False) -> Future[None]:
        return self._note("refresh", session)

    def end(self, session: Session, reason: Reason, active_at: float) -> Future[None]:
        self.live.discard(session.id)
        return self._note("end", session)

    def shorten(self, session: Session, reason: Reason, active_at: float, rest: float) -> Future[None]:
        self.live.discard(session.id)
        return self._note("shorten", session)

    async def read(self, users: Collection[str]) -> Reading:
        await self.reachable.wait()
        return Reading({user: self.statuses.get(user, Status(user)) for user in users}, frozenset())

    async def record_watches(self, session: Session, *, anew: bool = False) -> None:
        self.commands.append(("unwatch" if session.closed else "watch", session.user))
        await self.reachable.wait()

    def _note(self, name: str, session: Session) -> Future[None]:
        self.commands.append((name, session.user))
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future


class _Empty:
    """A history and a directory that know nobody."""

    name = "stub"

    def __init__(self) -> None:
        self.health = Health()

    async def read(self, users: Collection[str]) -> Mapping[str, Status]:
        return {}

    async def friends(self, user: str) -> Sequence[str]:
        return ()

    async def members(self, conversation: str) -> Sequence[str] | None:
        return None

    async def contacts(self, user: str) -> frozenset[str]:
        return frozenset({user})


def service_on(store: StubStore, rules: Rules | None = None) -> PresenceService:
    """The real service on the stub."""
    empty = _Empty()
    return PresenceService(
        cast("PresenceStore", store),
        cast("HistoryStore", empty),
        cast("Directory", empty),
        Fanout(),
        rules or Rules(),
    )


def tell(service: PresenceService, statuses: Iterable[Status]) -> None:
    """Have the service's watchers told of these statuses, as `jobs.follow` does."""
    for status in statuses:
        service.fanout.deliver(status)
