"""A time limit for another's answer, in which one's own delay does not count."""

from __future__ import annotations

import asyncio
from types import TracebackType

LOOKS = 20  # turns of the loop that have to pass, at least: to connect, and then be answered, takes a dozen


class Patience:
    """Give up after so many seconds, unless the loop was too busy to look for an answer so often as it should have.

    `asyncio.timeout` would also give up when the answer is there and has only not been read: a server that is frozen or
    overloaded would hold another for away. Like that it raises `TimeoutError`.
    """

    __slots__ = ("_left", "_limit", "_loop", "_pause", "_timer")

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._pause = seconds / LOOKS
        self._left = LOOKS

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._timer = self._loop.call_later(self._pause, self._look)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, where)

    def _look(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._pause, self._look)
        else:
            self._limit.reschedule(self._loop.time())
