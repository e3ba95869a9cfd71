"""A time limit for another's answer, in which one's own delay does not count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LOOKS = 8  # turns of the loop that have to pass, at least: an answer takes two or three to be read


@asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[None]:
    """Give up after ``seconds``, unless the loop was too busy to look for an answer so often as it should have.

    `asyncio.timeout` would also give up when the answer is there and has only not been read: a server that is frozen or
    overloaded would hold another for away.

    Raises:
        TimeoutError: there was time enough.
    """
    loop = asyncio.get_running_loop()
    left = LOOKS
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as limit:

        def look() -> None:
            nonlocal left, timer
            left -= 1
            if left:
                timer = loop.call_later(seconds / LOOKS, look)
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(seconds / LOOKS, look)
        try:
            yield
        finally:
            timer.cancel()
