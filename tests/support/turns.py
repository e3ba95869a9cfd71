"""Turns of the event loop: which it is, and that nothing else is measured in one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counted_turns() -> Iterator[Callable[[], int]]:
    """Count the turns of the running loop; what is given says in which one it is called."""
    loop = asyncio.get_running_loop()
    number = 0
    next_one: asyncio.Handle

    def turn() -> None:
        nonlocal number, next_one
        number += 1
        next_one = loop.call_soon(turn)

    next_one = loop.call_soon(turn)
    try:
        yield lambda: number
    finally:
        next_one.cancel()


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile: to go through all that the tests hold takes longer than any turn."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
