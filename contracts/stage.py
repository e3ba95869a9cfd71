"""Who may use the target at the same time: many cases together, or one by itself that disturbs others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

Idle = Callable[[], AbstractAsyncContextManager[None]]
"""What a case does while it needs nothing of the target: `Stage.idle`, or `nullcontext` where nobody waits for that."""


class Stage:
    """Gives a case the target for itself as soon as all others are over, or idle.

    Args:
        together: how many cases disturb nobody; each says when it is `over`.
    """

    def __init__(self, together: int) -> None:
        self.turns = 0
        """How many have had the target for themselves, the one that has it included."""
        self._playing = together
        """Those that have begun or are to begin, without those that are idle."""
        self._taken = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Have the target for oneself."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._playing and not self._taken)
        self.turns += 1
        self._taken = True
        try:
            yield
        finally:
            self._taken = False
            await self._tell()

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Need nothing of the target for a while; go on when nobody has it for himself."""
        self._playing -= 1
        await self._tell()
        try:
            yield
        finally:
            self._playing += 1
        async with self._changed:
            await self._changed.wait_for(lambda: not self._taken)

    async def over(self) -> None:
        """Say that one of those that disturb nobody is over."""
        self._playing -= 1
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
