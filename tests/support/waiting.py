"""Waiting for what must come, with a deadline. Tests never sleep and hope."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any


async def wait_until(predicate: Callable[[], Any], timeout: float = 5.0, *, what: str = "", every: float = 0.02) -> Any:
    """Ask ``predicate``, which may be a coroutine function, every ``every`` s until it says yes; return its answer.

    Raises:
        AssertionError: not within ``timeout`` s; it says ``what`` was waited for, and the last answer.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {timeout} s: {what or inspect.getsource(predicate).strip()}; last: {value!r}"
            )
        await asyncio.sleep(every)
