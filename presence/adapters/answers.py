"""Answers that are kept for a while."""

from __future__ import annotations

import asyncio
from asyncio import Task
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

CACHED = 50_000  # answers

T = TypeVar("T")


class Answers:
    """Answers of a directory: each is used for some time after it was asked for, also when the directory is away."""

    def __init__(self, seconds: float) -> None:
        """Keep none yet.

        Args:
            seconds: how old an answer may be; 0: none is kept.
        """
        self._seconds = seconds
        self._known: OrderedDict[str, tuple[float, Any]] = OrderedDict()  # question → when asked, answer
        self._asking: dict[str, Task[Any]] = {}

    async def get(self, question: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Return the answer that is known, or ask. Many who ask the same wait for one answer."""
        asked_at, answer = self._known.get(question, (-self._seconds, None))
        if asyncio.get_running_loop().time() - asked_at < self._seconds:
            return answer  # type: ignore[no-any-return]
        task = self._asking.get(question)
        if task is None:
            task = self._asking[question] = asyncio.create_task(self._ask(question, ask))
            task.add_done_callback(lambda done: self._asked(question, done))
        known: T = await asyncio.shield(task)
        return known

    async def _ask(self, question: str, ask: Callable[[], Awaitable[T]]) -> T:
        began = asyncio.get_running_loop().time()
        answer = await ask()
        if self._seconds:
            self._known[question] = began, answer
            self._known.move_to_end(question)
            while len(self._known) > CACHED or next(iter(self._known.values()))[0] <= began - self._seconds:
                self._known.popitem(last=False)  # nor is kept what is too old
        return answer

    def _asked(self, question: str, task: Task[Any]) -> None:
        del self._asking[question]
        if not task.cancelled():
            task.exception()  # whoever waits gets it, if anybody still does
