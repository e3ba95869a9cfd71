"""presence.adapters.patience: a time limit in which one's own delay does not count."""

from __future__ import annotations

import asyncio
import time

import pytest

from presence.adapters.patience import LOOKS, Patience


async def test_who_has_time_to_look_gives_up():
    async with asyncio.timeout(5) as long:
        with pytest.raises(TimeoutError):
            async with Patience(0.1):
                await asyncio.Event().wait()
    assert not long.expired()


async def test_what_is_done_in_time_is_left_alone():
    wrong = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    async with Patience(0.1):
        await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    assert wrong == []


async def test_an_error_of_the_work_goes_through():
    with pytest.raises(TimeoutError, match="of its own"):
        async with Patience(5):
            raise TimeoutError("of its own")


async def test_a_cancellation_goes_through():
    async def wait() -> None:
        async with Patience(5):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)


@pytest.mark.parametrize(("turns", "in_time"), [(LOOKS - 2, True), (2 * LOOKS, False)])
async def test_each_turn_of_a_loop_that_is_busy_counts_as_one_look(turns, in_time):
    """The answer comes after so many turns of the loop, each of which takes longer than the whole limit."""
    loop, answer = asyncio.get_running_loop(), asyncio.Event()

    def be_busy(left: int) -> None:
        time.sleep(0.06)
        loop.call_soon(be_busy, left - 1) if left else answer.set()

    loop.call_soon(be_busy, turns)
    try:
        async with Patience(0.05):
            await answer.wait()
    except TimeoutError:
        assert not in_time
    else:
        assert in_time
    await answer.wait()
