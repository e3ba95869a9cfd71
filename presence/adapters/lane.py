"""The ordered lane: store commands of many sessions to a call, those of one session strictly in order (DESIGN §3.5)."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from presence.core.model import Reason, Session
from presence.ports import StoreUnavailable, TooManyConnections

log = logging.getLogger(__name__)


class Kind(IntEnum):
    """The transitions, in the order in which one batch applies them: who comes is there before another goes."""

    CONNECT = 0
    REFRESH = 1
    SHORTEN = 2
    END = 3


# By each kind: what waits and has not been sent yet has no effect beside it.
_SUPERSEDED = ((), (Kind.REFRESH,), (Kind.SHORTEN,), (Kind.REFRESH, Kind.END))


@dataclass(slots=True, eq=False)
class Command:
    """One transition of one session. Times are monotonic, in s."""

    kind: Kind
    session: Session
    reason: Reason
    active_at: float | None
    """The user's last activity; None: this is none."""
    rest: float = 0.0
    """SHORTEN: lease left, in s."""
    limit: int = 0
    """CONNECT: open connections the user may have; 0: any number."""
    without_lease: int = 0
    """CONNECT: of these the ones here that have no lease."""
    give_up_at: float | None = None
    """CONNECT of a client that waits: when it is told that the store is away. None: kept until it is done."""
    urgent: bool = True
    tried: bool = False
    """It has been sent, so that it may have taken effect."""
    done: list[Future[None]] = field(default_factory=list)

    def resolve(self, error: Exception | None = None) -> None:
        for future in self.done:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

    def abandon(self) -> None:
        """Nothing comes of it: a client that waits for its connect is told, others go on."""
        self.resolve(StoreUnavailable() if self.give_up_at is not None else None)


Call = Callable[[Kind, Sequence[Command]], Awaitable[Sequence[int]]]
"""Runs one script for commands of one kind; returns its answer to each; raises `StoreUnavailable`."""


class Lane:
    """Queues commands and runs them in batches: one batch at a time, no session twice in a batch.

    The queue is bounded by the sessions: behind the command under way at most one of each kind waits.
    """

    def __init__(self, call: Call, *, linger: float = 0.025, batch: int = 500) -> None:
        self._call = call
        self._linger = linger  # s that a heartbeat nobody waits for may wait for company
        self._batch = batch
        self._waiting: dict[str, deque[Command]] = {}
        self._some = asyncio.Event()
        self._urgent = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, command: Command) -> Future[None]:
        """Queue the command; the future tells when it has taken effect. Supersedes what is waiting and not yet sent."""
        future: Future[None] = asyncio.get_running_loop().create_future()
        command.done.append(future)
        queue = self._waiting.setdefault(command.session.id, deque())
        while queue and not queue[-1].tried and queue[-1].kind in _SUPERSEDED[command.kind]:
            older = queue.pop()
            command.done += older.done
            command.urgent |= older.urgent
            if older.active_at is not None:
                command.active_at = max(older.active_at, command.active_at or 0.0)
        if command.kind is Kind.END and queue and queue[-1].kind is Kind.CONNECT and not queue[-1].tried:
            queue.pop().abandon()  # its client has left, or has signed off, before it began
        queue.append(command)
        self._idle.clear()
        self._some.set()
        if command.urgent:
            self._urgent.set()
        return future

    async def drained(self) -> None:
        """Wait until nothing is queued."""
        await self._idle.wait()

    async def run(self) -> None:
        """Run the batches, for ever."""
        pause = 0.0
        while True:
            await self._some.wait()
            if not self._urgent.is_set():
                try:
                    async with asyncio.timeout(self._linger):
                        await self._urgent.wait()
                except TimeoutError:
                    pass
            self._urgent.clear()
            batch = [queue[0] for _, queue in zip(range(self._batch), self._waiting.values(), strict=False)]
            for command in batch:
                command.tried = True  # from now on, also while other kinds go first: what follows it may not replace it
            up = True
            for kind in Kind:
                commands = [command for command in batch if command.kind is kind]
                if commands and up:
                    up = await self._run(kind, commands)
            if any(queue[0].urgent for queue in self._waiting.values()):
                self._urgent.set()
            if not self._waiting:
                self._some.clear()
                self._idle.set()
            if not up:
                self._give_up()
                pause = min(1.0, pause * 2 or 0.05)
                await asyncio.sleep(pause)
            else:
                pause = 0.0

    async def _run(self, kind: Kind, commands: Sequence[Command]) -> bool:
        try:
            answers = await self._call(kind, commands)
        except StoreUnavailable:
            return False  # all are kept, to be sent again
        for command, answer in zip(commands, answers, strict=True):
            self._answered(command, answer)
        return True

    def _answered(self, command: Command, answer: int) -> None:
        queue = self._waiting[command.session.id]
        queue.popleft()
        if (
            command.kind is Kind.REFRESH
            and answer == 0
            and not command.session.closed
            and not command.session.signed_off
        ):
            # It had lapsed: revive it. An end that comes meanwhile is queued behind, so nothing stays online.
            command.kind, command.reason, command.tried = Kind.CONNECT, Reason.REVIVED, False
            command.urgent = True
            queue.appendleft(command)
            return
        command.resolve(TooManyConnections() if answer < 0 else None)
        del self._waiting[command.session.id]
        if queue:  # behind the others, or those who come often would keep them out
            self._waiting[command.session.id] = queue

    def _give_up(self) -> None:
        """Drop the connects whose client has left, or has waited long enough and is told. All else is kept.

        One that was sent may have taken effect, so it is followed by an end until that is answered (DESIGN §3.5).
        """
        now = asyncio.get_running_loop().time()
        for queue in list(self._waiting.values()):
            first = queue[0]
            if first.kind is Kind.CONNECT and len(queue) > 1 and queue[1].kind is Kind.END:
                queue.popleft().abandon()
            elif first.give_up_at is not None and now >= first.give_up_at:
                queue.popleft().abandon()
                if first.tried:
                    queue.appendleft(Command(Kind.END, first.session, Reason.DISCONNECTED, None))
                elif not queue:
                    del self._waiting[first.session.id]
