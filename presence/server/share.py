"""A share of the event loop for each connection's input, whatever it is made of: nobody's delays that of others."""

from __future__ import annotations

import asyncio
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

STRETCH = 0.001  # s of work on one connection's input, after which others have their turn
MODEST = 0.01  # of the time: who takes no more never waits; 100 frames a second take less
GREEDY = 0.3  # of the time: what all others get together, however many they are
LONGEST = 0.5  # s that anybody waits for a turn, however many others do
SLIGHT = STRETCH / 5  # s of work, above which one waits for a turn of the loop that no other such one has


class Turns:
    """One piece of work in each turn of the loop: all that are ready at once would else come before any other.

    Nobody waits when there is nobody else, and the loop is never idle while somebody waits. It is not for what every
    client does when it connects: in a storm the stores are asked for many at once, and a third would be lost.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # the one whose turn is taken
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self) -> None:
        """Wait for a turn of the loop that nobody has taken."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.call_soon(self._next)
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _next(self) -> None:
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else it was cancelled
                first.set_result(None)
                first.get_loop().call_soon(self._next)
                return
        self._loop = None


turn = Turns()
"""For HTTP requests, and for the input of who has taken more than a modest share: await it before a piece of work."""


class Share:
    """How much of the time the input of one connection has taken, and when it may go on."""

    __slots__ = ("_at", "_worked")

    _turn: ClassVar[float] = 0.0  # when the next of the greedy may go on

    def __init__(self) -> None:
        self._worked = 0.0  # s, of which the modest share of the time that goes by is taken off
        self._at = 0.0  # by `time.perf_counter`

    async def take(self, work: Coroutine[Any, Any, T]) -> T:
        """Do some work on the connection's input; leave others their turn when it has had more than its share."""
        if self._taken(time.perf_counter()) > SLIGHT:
            try:
                await turn()
            except asyncio.CancelledError:
                work.close()  # it has not begun: Python would complain that it never did
                raise
        took = [0.0]
        done = await _timed(work, took)
        if pause := self.note(took[0], time.perf_counter()):
            await asyncio.sleep(pause)
        return done

    def note(self, took: float, now: float) -> float:
        """Return for how many s to leave others their turn, after work of ``took`` s that has ended ``now``."""
        self._worked = self._taken(now - took) + took
        self._at = now
        if self._worked < STRETCH:
            return 0.0
        begins = min(max(now, Share._turn), now + LONGEST)
        Share._turn = begins + self._worked / GREEDY
        self._worked = 0.0
        return min(Share._turn - now, LONGEST)

    def _taken(self, now: float) -> float:
        return max(0.0, self._worked - (now - self._at) * MODEST)


@types.coroutine
def _timed(work: Coroutine[Any, Any, T], took: list[float]) -> Generator[Any, Any, T]:
    """Await ``work``; add to ``took`` the s of CPU that it took itself: what it waits for is not its doing."""
    step: Callable[[Any], Any] = work.send
    said: Any = None
    while True:
        began = time.thread_time()
        try:
            waits_for = step(said)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            took[0] += time.thread_time() - began
        try:
            said = yield waits_for
            step = work.send
        except BaseException as error:  # noqa: BLE001 (a cancellation, too, is the work's to handle)
            said, step = error, work.throw
