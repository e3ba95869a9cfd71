"""A share of the loop for each connection, by times that are made up."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from presence.server.share import LONGEST, STRETCH, Share, Turns, turn
from tests.support.turns import counted_turns


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch):
    """No other test's connections wait for a turn."""
    monkeypatch.setattr(Share, "_turn", 0.0)


def test_whose_input_takes_little_is_never_held_up():
    share = Share()
    assert not any(share.note(0.000_09, at / 100) for at in range(1, 10_000))


@pytest.mark.parametrize("piece", [0.000_05, 0.000_3, 0.002, 0.027])
@pytest.mark.parametrize("greedy", [1, 2, 16, 48])
def test_all_the_greedy_get_three_tenths_of_the_time_together(piece, greedy):
    """Whatever the pieces are in which the input comes; no two have a turn at once."""
    shares = [Share() for _ in range(greedy)]
    ready = [1.0] * greedy  # when each has input again: at once
    now, work, turns = 1.0, [0.0] * greedy, []
    while now < 11.0:
        at, who = min((at, who) for who, at in enumerate(ready))
        now = max(now, at) + piece
        work[who] += piece
        pause = shares[who].note(piece, now)
        ready[who] = now + pause
        if 0 < pause < LONGEST:
            turns.append(now + pause)
    if greedy * piece / 0.3 < LONGEST:
        assert 10 * 0.2 < sum(work) < 10 * (0.34 + 0.01 * greedy)
        assert max(work) < 2 * min(work) + piece
        assert min(later - sooner for sooner, later in itertools.pairwise(sorted(turns))) > 0.003


def test_nobody_waits_for_thousands_who_have_gone_long_since():
    """Red where each of them keeps its turn: the next one would wait for 12 s, and its lease with it."""
    for number in range(3_000):
        Share().note(0.001_2, 1.0 + number / 1_000)
    assert 0 < Share().note(0.001_2, 4.0) <= LONGEST
    assert Share().note(0.000_9, 4.0) == 0.0


async def test_a_wait_is_no_work():
    share = Share()

    async def waits() -> str:
        await asyncio.sleep(0.05)
        return "done"

    began = time.monotonic()
    for _ in range(4):
        assert await share.take(waits()) == "done"
    assert share.note(0.0, time.perf_counter()) == 0.0
    assert time.monotonic() - began < 4 * 0.05 + 0.15, "of waiting 0.2 s, a turn would come 0.6 s later"


async def test_work_of_one_who_ends_while_waiting_for_a_turn_is_let_go():
    """Else Python complains in the server's log of what was never awaited: here that is an error."""
    share = Share()
    share.note(STRETCH * 0.9, time.perf_counter())
    begun = []

    async def works() -> None:
        begun.append(True)

    first = asyncio.create_task(turn())
    waiting = asyncio.create_task(share.take(works()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await first
    assert not begun


async def test_work_that_holds_the_loop_is_followed_by_a_pause():
    async def works() -> None:
        await asyncio.sleep(0)
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass

    began = time.perf_counter()
    await Share().take(works())
    assert time.perf_counter() - began > 0.02 / 0.3


async def test_what_goes_wrong_in_the_work_comes_out_and_a_cancellation_goes_in():
    ended = []

    async def works(event: asyncio.Event) -> None:
        try:
            await event.wait()
            raise KeyError("wrong")
        finally:
            ended.append(True)

    event = asyncio.Event()
    event.set()
    with pytest.raises(KeyError, match="wrong"):
        await Share().take(works(event))
    task = asyncio.create_task(Share().take(works(asyncio.Event())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True, True]


# Turns of the loop.


async def counted(work) -> list[int]:
    """In which turn of the loop each piece of the work was done; ``work`` gets what it calls at each of them."""
    done: list[int] = []
    with counted_turns() as turn:
        await work(lambda: done.append(turn()))
    return done


async def test_who_is_alone_waits_for_no_turn():
    turn = Turns()
    await turn()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    coroutine = turn()
    with pytest.raises(StopIteration):
        coroutine.send(None)


@pytest.mark.parametrize("cancelled", [(), (3, 4), (9,)])
async def test_there_is_one_in_each_turn_of_the_loop(cancelled):
    turn, order = Turns(), []

    async def work(done) -> None:
        async def one(number: int) -> None:
            await turn()
            order.append(number)
            done()

        tasks = [asyncio.create_task(one(number)) for number in range(10)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.wait(tasks)

    in_turn = await counted(work)
    assert len(set(in_turn)) == len(in_turn) == 10 - len(cancelled)
    assert in_turn[-1] - in_turn[0] <= 10, "no turn is left out"
    assert order == [number for number in range(10) if number not in cancelled]


def test_a_loop_that_has_ended_in_its_turn_holds_up_no_other():
    turn = Turns()
    for _ in range(2):
        asyncio.run(asyncio.wait_for(turn(), 5))


async def test_those_who_have_had_more_than_a_modest_share_have_no_turn_in_common():
    """Red where each is looked at alone: the 0.3 ms of all twenty come before anybody else."""
    shares = [Share() for _ in range(20)]
    now = time.perf_counter()
    assert not any(share.note(STRETCH / 2, now) for share in shares)

    async def work(done) -> None:
        async def piece() -> None:
            done()

        await asyncio.gather(*(share.take(piece()) for share in shares))

    in_turn = await counted(work)
    assert len(set(in_turn)) == 20


async def test_who_has_taken_little_waits_for_none_of_them():
    async def work(done) -> None:
        async def piece() -> None:
            done()

        await asyncio.gather(*(Share().take(piece()) for _ in range(20)))

    assert len(set(await counted(work))) == 1
