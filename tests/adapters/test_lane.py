"""presence.adapters.lane: commands of many sessions to a call, those of one session in order (DESIGN §3.5)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from presence.adapters.lane import Command, Kind, Lane
from presence.core.model import Reason, Session
from presence.ports import StoreUnavailable, TooManyConnections
from tests.support.waiting import wait_until


class Script:
    """What a lane calls: notes each call, and answers as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Kind, list[str]]] = []
        self.live: set[str] = set()
        """Sessions that have a lease, so that a refresh finds them."""
        self.away = False
        self.lose_answers = 0
        """So many calls take effect, and their answers do not come."""
        self.refused: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = 0

    async def __call__(self, kind: Kind, commands: Sequence[Command]) -> Sequence[int]:
        ids = [command.session.id for command in commands]
        self.calls.append((kind, ids))
        assert len(set(ids)) == len(ids), "a session twice in a batch"
        self.under_way += 1
        assert self.under_way == 1, "two calls at a time"
        try:
            await self.gate.wait()
            if self.away:
                raise StoreUnavailable("away")
            answers = [self._apply(kind, command) for command in commands]
            if self.lose_answers:
                self.lose_answers -= 1
                raise StoreUnavailable("no answer")
            return answers
        finally:
            self.under_way -= 1

    def _apply(self, kind: Kind, command: Command) -> int:
        session = command.session.id
        if session in self.refused:
            return -1
        match kind:
            case Kind.CONNECT:
                self.live.add(session)
            case Kind.END:
                self.live.discard(session)
            case _:
                return int(session in self.live)
        return 0

    def kinds(self, session: str) -> list[Kind]:
        """The commands that were sent of one session, in order."""
        return [kind for kind, ids in self.calls if session in ids]


@asynccontextmanager
async def running(script: Script, **options: Any):
    lane = Lane(script, **options)
    task = asyncio.create_task(lane.run())
    try:
        yield lane
    finally:
        assert not task.done()
        task.cancel()


def a_session(name: str = "s") -> Session:
    return Session("user", name, "web", 0.0, 0.0)


def command(kind: Kind, session: Session, active_at: float | None = 1.0, **more: Any) -> Command:
    return Command(kind, session, Reason.CONNECTED, active_at, **more)


def connect(session: Session, *, patience: float | None = None) -> Command:
    """Patience, in s: of the client that waits for it."""
    give_up_at = None if patience is None else asyncio.get_running_loop().time() + patience
    return command(Kind.CONNECT, session, give_up_at=give_up_at)


async def soon(*futures: Any) -> Any:
    async with asyncio.timeout(5):
        return await asyncio.gather(*futures)


@asynccontextmanager
async def under_way(script: Script, lane: Lane, first: Command):
    """Has ``first`` sent and its answer held back for the time of the block; then all that was queued is done."""
    script.gate.clear()
    future = lane.add(first)
    await wait_until(lambda: script.under_way)
    yield future
    script.gate.set()
    await soon(lane.drained())


async def test_commands_of_many_sessions_go_in_one_call():
    """DESIGN §3.5: "Collect for a few ms, refresh all in one call"."""
    script = Script()
    async with running(script) as lane:
        script.live = {f"s{number}" for number in range(100)}
        await soon(*(lane.add(command(Kind.REFRESH, a_session(name), urgent=False)) for name in sorted(script.live)))
    assert [(kind, len(ids)) for kind, ids in script.calls] == [(Kind.REFRESH, 100)]


async def test_a_heartbeat_nobody_waits_for_waits_for_company():
    script = Script()
    script.live = {"a", "b"}
    async with running(script, linger=0.5) as lane:
        await soon(lane.add(connect(a_session("c"))))  # for which nobody else waits any more
        first = lane.add(command(Kind.REFRESH, a_session("a"), urgent=False))
        await asyncio.sleep(0.01)
        assert script.kinds("a") == []
        await soon(first, lane.add(command(Kind.REFRESH, a_session("b"), urgent=False)))
    assert script.calls == [(Kind.CONNECT, ["c"]), (Kind.REFRESH, ["a", "b"])]


async def test_a_command_somebody_waits_for_takes_all_along_at_once():
    script = Script()
    script.live = {"a"}
    async with running(script, linger=60) as lane:
        beat = lane.add(command(Kind.REFRESH, a_session("a"), urgent=False))
        await soon(beat, lane.add(connect(a_session("b"))))
    assert script.calls == [(Kind.CONNECT, ["b"]), (Kind.REFRESH, ["a"])]


async def test_a_call_takes_no_more_than_the_batch_and_all_get_their_turn():
    script = Script()
    async with running(script, batch=10) as lane:
        await soon(*(lane.add(connect(a_session(f"s{number}"))) for number in range(35)))
    assert [len(ids) for _, ids in script.calls] == [10, 10, 10, 5]
    assert len(script.live) == 35


async def test_those_who_come_often_keep_nobody_out():
    """Found in review: 500 sessions that beat as fast as they may filled every call, and nobody could connect."""
    script = Script()
    script.live = {"a", "b"}
    often = [a_session(name) for name in sorted(script.live)]
    async with running(script, batch=2) as lane:
        script.gate.clear()
        new = asyncio.create_task(soon(*(lane.add(command(Kind.REFRESH, session)) for session in often)))
        await wait_until(lambda: script.under_way)
        for session in often:
            _ = lane.add(command(Kind.REFRESH, session))
        connected = lane.add(connect(a_session("new")))
        script.gate.set()
        await new
        await soon(connected, lane.drained())
    assert [ids for _, ids in script.calls] == [["a", "b"], ["new"], ["a"], ["b"]]


async def test_in_one_batch_who_comes_is_there_before_another_goes():
    """So a user who changes devices is not offline in between."""
    script = Script()
    script.live = {"old", "beating", "lost"}
    async with running(script) as lane:
        await soon(
            lane.add(command(Kind.END, a_session("old"))),
            lane.add(command(Kind.SHORTEN, a_session("lost"))),
            lane.add(command(Kind.REFRESH, a_session("beating"))),
            lane.add(connect(a_session("new"))),
        )
    assert [kind for kind, _ in script.calls] == [Kind.CONNECT, Kind.REFRESH, Kind.SHORTEN, Kind.END]


async def test_commands_of_one_session_go_one_after_the_other():
    """DESIGN §3.5: "all store commands of one session go through one ordered lane"."""
    script, session = Script(), a_session()
    async with running(script) as lane, under_way(script, lane, connect(session)):
        lane.add(command(Kind.SHORTEN, session))
        lane.add(command(Kind.END, session))
        lane.add(command(Kind.REFRESH, session))
        session.signed_off = True
    assert script.kinds("s") == [Kind.CONNECT, Kind.SHORTEN, Kind.END, Kind.REFRESH]


async def test_an_end_takes_the_session_out_of_the_pending_batch():
    """DESIGN §3.5: "an end takes the session out of the pending batch"; the heartbeat's time is kept."""
    script, session = Script(), a_session()
    script.live = {"s"}
    async with running(script, linger=60) as lane:
        beat = lane.add(command(Kind.REFRESH, session, active_at=7.0, urgent=False))
        end = command(Kind.END, session, active_at=3.0)
        await soon(lane.add(end), beat)
    assert script.kinds("s") == [Kind.END]
    assert end.active_at == 7.0


@pytest.mark.parametrize("kind", [Kind.REFRESH, Kind.SHORTEN, Kind.END])
async def test_an_end_that_comes_while_its_batch_is_under_way_is_sent_behind_it(kind):
    """DESIGN §3.5: an end is never lost, also when the batch has taken the session and is busy with those who come."""
    script, session = Script(), a_session()
    script.live = {"s"}
    async with running(script, linger=60) as lane:
        first = lane.add(command(kind, session, urgent=False))
        async with under_way(script, lane, connect(a_session("new"))):
            session.closed = True
            end = lane.add(command(Kind.END, session))
        await soon(first, end)
    assert script.calls == [(Kind.CONNECT, ["new"]), (kind, ["s"]), (Kind.END, ["s"])]
    assert script.live == {"new"}


async def test_many_heartbeats_of_one_session_are_one():
    script, session = Script(), a_session()
    async with running(script) as lane, under_way(script, lane, connect(session)):
        beats = [lane.add(command(Kind.REFRESH, session, active_at=float(number))) for number in range(100)]
        assert len(lane._waiting["s"]) == 2  # "The queue is bounded by the sessions"
    await soon(*beats)
    assert script.kinds("s") == [Kind.CONNECT, Kind.REFRESH]


async def test_a_heartbeat_that_is_no_activity_keeps_the_activity_it_supersedes():
    session, lane = a_session(), Lane(Script())
    lane.add(command(Kind.REFRESH, session, active_at=5.0))
    renewal = command(Kind.REFRESH, session, active_at=None, urgent=False)
    lane.add(renewal)
    assert renewal.active_at == 5.0
    assert renewal.urgent


async def test_what_is_in_the_batch_is_not_replaced_while_others_go_first():
    script, session = Script(), a_session("s")
    script.live = {"s"}
    async with running(script) as lane:
        beat = lane.add(command(Kind.REFRESH, session))
        async with under_way(script, lane, connect(a_session("other"))):
            assert script.calls == [(Kind.CONNECT, ["other"])]
            end = lane.add(command(Kind.END, session))
        await soon(beat, end)
    assert script.kinds("s") == [Kind.REFRESH, Kind.END]
    assert script.live == {"other"}


async def test_a_heartbeat_does_not_supersede_an_end():
    """WIRE §4: `{"online": true}` "also revives after `false`": both take effect, in order."""
    script, session = Script(), a_session()
    async with running(script) as lane, under_way(script, lane, connect(session)):
        lane.add(command(Kind.END, session))
        lane.add(command(Kind.REFRESH, session))
    assert script.kinds("s") == [Kind.CONNECT, Kind.END, Kind.REFRESH, Kind.CONNECT]
    assert script.live == {"s"}


async def test_a_shortened_lease_does_not_supersede_a_heartbeat():
    """A lease that has lapsed cannot be shortened: the heartbeat before it is to revive it."""
    script, session = Script(), a_session()
    async with running(script) as lane, under_way(script, lane, connect(session)):
        lane.add(command(Kind.REFRESH, session))
        lane.add(command(Kind.SHORTEN, session))
    assert script.kinds("s") == [Kind.CONNECT, Kind.REFRESH, Kind.SHORTEN]


async def test_a_lapsed_session_is_revived():
    """DESIGN §3.5: "a refresh never creates, it reports the lapsed"; then the session is made again."""
    script, session = Script(), a_session()
    async with running(script) as lane:
        beat = command(Kind.REFRESH, session)
        await soon(lane.add(beat))
    assert script.kinds("s") == [Kind.REFRESH, Kind.CONNECT]
    assert beat.reason is Reason.REVIVED


@pytest.mark.parametrize("flag", ["closed", "signed_off"])
async def test_a_lapsed_session_whose_connection_is_gone_or_signed_off_is_not_revived(flag):
    """DESIGN §3.5: "a revival checks that the socket is still open before"."""
    script, session = Script(), a_session()
    async with running(script) as lane, under_way(script, lane, command(Kind.REFRESH, session)) as beat:
        setattr(session, flag, True)
    await soon(beat)
    assert script.kinds("s") == [Kind.REFRESH]


async def test_a_connection_that_goes_during_the_revival_is_ended_after_it():
    """DESIGN §3.5: "… *and after*, ending the session again if not"."""
    script, session = Script(), a_session()
    async with running(script) as lane:
        async with under_way(script, lane, command(Kind.REFRESH, session)):
            script.gate.set()
            await wait_until(lambda: script.kinds("s") == [Kind.REFRESH], every=0)
            script.gate.clear()
            await wait_until(lambda: script.kinds("s") == [Kind.REFRESH, Kind.CONNECT], every=0)
            session.closed = True
            end = lane.add(command(Kind.END, session))
        await soon(end)
    assert script.kinds("s") == [Kind.REFRESH, Kind.CONNECT, Kind.END]
    assert script.live == set()


async def test_an_end_before_its_connect_was_sent_leaves_nothing_to_send_but_the_end():
    script, session = Script(), a_session()
    async with running(script) as lane:
        waiting = lane.add(connect(session, patience=60))
        await soon(lane.add(command(Kind.END, session)))
        with pytest.raises(StoreUnavailable):
            await waiting
    assert script.kinds("s") == [Kind.END]


async def test_a_refused_connect_is_told_and_leaves_nothing():
    script = Script()
    script.refused = {"s"}
    async with running(script) as lane:
        with pytest.raises(TooManyConnections):
            await lane.add(connect(a_session(), patience=60))
        assert len(lane) == 0


async def test_what_fails_is_sent_again_until_it_is_answered():
    """WIRE §4, store away: "ends are kept and done later"."""
    script, sessions = Script(), [a_session(name) for name in "abc"]
    script.live = {"a", "b", "c"}
    script.away = True
    async with running(script) as lane:
        kept = [lane.add(command(Kind.END, session)) for session in sessions]
        await wait_until(lambda: len(script.calls) >= 2)
        assert not any(future.done() for future in kept)
        script.away = False
        await soon(*kept)
    assert script.live == set()


async def test_a_store_that_is_away_is_not_asked_without_a_pause():
    script = Script()
    script.away = True
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with running(script) as lane:
        _ = lane.add(command(Kind.END, a_session()))
        await wait_until(lambda: len(script.calls) == 4)
        assert loop.time() - began > 0.05 + 0.1 + 0.2


async def test_a_connect_that_waited_too_long_is_told_and_followed_by_an_end_until_that_is_answered():
    """DESIGN §3.5: "A connect whose outcome is unknown … is followed by an end until that is answered"."""
    script = Script()
    script.lose_answers = 3  # those of the connect and of two ends
    async with running(script) as lane:
        with pytest.raises(StoreUnavailable):
            await lane.add(connect(a_session(), patience=0))
        await soon(lane.drained())
    assert script.kinds("s") == [Kind.CONNECT, Kind.END, Kind.END, Kind.END]
    assert script.live == set()


async def test_a_connect_is_tried_again_while_its_client_has_patience():
    script = Script()
    script.lose_answers = 2
    async with running(script) as lane:
        await soon(lane.add(connect(a_session(), patience=60)))
    assert script.kinds("s") == [Kind.CONNECT] * 3
    assert script.live == {"s"}


async def test_a_connect_whose_client_left_is_not_tried_again():
    script, session = Script(), a_session()
    async with running(script) as lane:
        async with under_way(script, lane, connect(session, patience=60)) as waiting:
            script.lose_answers = 1
            lane.add(command(Kind.END, session))
        with pytest.raises(StoreUnavailable):
            await waiting
    assert script.kinds("s") == [Kind.CONNECT, Kind.END]
    assert script.live == set()


async def test_a_heartbeat_whose_answer_was_lost_is_not_superseded_but_followed():
    """What may have taken effect stays in its place: the next command is another one."""
    script, session = Script(), a_session()
    script.live = {"s"}
    async with running(script) as lane, under_way(script, lane, command(Kind.REFRESH, session)):
        script.lose_answers = 1
        lane.add(command(Kind.REFRESH, session))
    assert script.kinds("s") == [Kind.REFRESH, Kind.REFRESH, Kind.REFRESH]


async def test_while_the_store_does_not_answer_a_batch_waits_for_one_time_limit_only():
    """The other kinds are asked when the store is back: else a new client would wait for four time limits."""
    script = Script()
    script.away = True
    script.live = {"beating", "going"}
    async with running(script) as lane:
        lane.add(command(Kind.END, a_session("going")))
        lane.add(command(Kind.REFRESH, a_session("beating")))
        lane.add(connect(a_session("coming")))
        await wait_until(lambda: len(script.calls) == 3)
        assert [kind for kind, _ in script.calls] == [Kind.CONNECT] * 3
        script.away = False
        await soon(lane.drained())
    assert script.live == {"beating", "coming"}


async def test_while_the_store_is_away_a_new_client_is_told_however_many_wait():
    """WIRE §4, store away: "new CONNECTs get ERROR `store unavailable`"."""
    script = Script()
    script.away = True
    script.live = {"s0", "s1", "s2"}
    async with running(script, batch=1) as lane:
        for name in sorted(script.live):
            lane.add(command(Kind.REFRESH, a_session(name)))
        with pytest.raises(StoreUnavailable):
            await soon(lane.add(connect(a_session("new"), patience=0.01)))
        script.away = False
        await soon(lane.drained())
    assert script.kinds("new") == []  # it was never sent, so nothing is left to end
    assert len(lane) == 0


async def test_a_caller_that_left_disturbs_nobody():
    script = Script()
    async with running(script) as lane:
        async with under_way(script, lane, connect(a_session("a"))) as future:
            future.cancel()
        await soon(lane.add(connect(a_session("b"))))
    assert script.live == {"a", "b"}


async def test_drained_waits_for_all():
    script = Script()
    async with running(script) as lane:
        await soon(lane.drained())
        async with under_way(script, lane, connect(a_session())):
            done: Callable[[], bool] = (task := asyncio.create_task(lane.drained())).done
            await asyncio.sleep(0)
            assert not done()
        await soon(task)
