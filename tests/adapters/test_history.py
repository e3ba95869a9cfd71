"""ports.HistoryStore, over each of its adapters."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from itertools import permutations

import pytest
import pytest_asyncio

from presence.adapters.cassandra import CassandraHistory
from presence.adapters.sqlite import SqliteHistory
from presence.core.model import Change, Reason, Status
from presence.ports import HistoryStore

NOW = time.time_ns() // 1000
DAY = 86_400_000_000


@pytest_asyncio.fixture
async def sqlite(tmp_path) -> AsyncIterator[SqliteHistory]:
    store = await SqliteHistory.open(tmp_path / "history.db")
    yield store
    await store.close()


@pytest.fixture
def in_cassandra(session) -> CassandraHistory:
    return CassandraHistory(session)


@pytest.fixture(params=(pytest.param("sqlite", id="sqlite"), pytest.param("in_cassandra", id="cassandra")))
def history(request) -> HistoryStore:
    store: HistoryStore = request.getfixturevalue(request.param)
    return store


def change(user: str, version: int, online: bool = True, **more) -> Change:
    return Change(user, online, version, version // 1000, **more)


def status(one: Change) -> Status:
    return Status(one.user, one.online, one.version, one.last_active)


async def test_what_was_written_is_read(history, users):
    one, other = change(users("a"), NOW), change(users("b"), NOW + 1, online=False)
    await history.write([one, other])
    assert await history.read([one.user, other.user]) == {one.user: status(one), other.user: status(other)}


async def test_those_never_seen_are_not_in_the_answer(history, users):
    """ports.HistoryStore: "those never seen are not in the answer"."""
    known = change(users("a"), NOW)
    await history.write([known])
    assert await history.read([users("b"), known.user, users("c")]) == {known.user: status(known)}


async def test_nothing_is_read_and_written_as_well(history):
    await history.write([])
    assert await history.read([]) == {}


async def test_a_last_activity_that_is_not_known_stays_unknown(history, user):
    await history.write([Change(user, False, NOW, None)])
    assert await history.read([user]) == {user: Status(user, False, NOW, None)}
    assert [one.last_active for one in await history.changes(user, 9)] == [None]


@pytest.mark.parametrize("calls", (1, 2, 3))
async def test_the_highest_version_wins_whatever_the_order(history, users, calls):
    """ports.HistoryStore: "Of one user's changes the highest version wins, whatever the order"."""
    for order in permutations(range(3)):
        user = users("a")
        versions = [change(user, NOW), change(user, NOW + 1), change(user, NOW + 2, online=False)]
        written = [versions[index] for index in order]
        for call in range(calls):
            await history.write(written[call::calls])
        assert await history.read([user]) == {user: status(versions[2])}
        assert await history.changes(user, 9) == versions[::-1]


async def test_repeats_are_harmless(history, user):
    """ports.Sink: "Repeats are harmless"."""
    old, new = change(user, NOW), change(user, NOW + 5, online=False, reason=Reason.EXPIRED)
    await history.write([old, new])
    await history.write([old])
    await history.write([old, new, new])
    assert await history.read([user]) == {user: status(new)}
    assert await history.changes(user, 9) == [new, old]


async def test_1000_users_are_written_and_read_at_once(history, users):
    changes = [change(users(f"u{number}"), NOW + number, online=number % 2 == 0) for number in range(1_000)]
    await history.write(changes)
    assert await history.read([one.user for one in changes]) == {one.user: status(one) for one in changes}


async def test_all_online_users_come_each_once_and_no_others(history, users):
    changes = [change(users("u"), NOW + number) for number in range(2_300)]
    gone = [change(one.user, one.version + 10_000, online=False) for one in changes[::3]]
    await history.write(changes)
    await history.write(gone)
    pages = [page async for page in history.online_users()]
    found = [one for page in pages for one in page]
    mine = {one.user for one in changes}
    expected = {one.user: status(one) for one in changes if one.user not in {left.user for left in gone}}
    assert {one.user: one for one in found if one.user in mine} == expected
    assert len(found) == len({one.user for one in found})
    assert len(pages) > 1
    assert all(0 < len(page) <= 1_000 for page in pages)


async def test_changes_come_the_newest_first_and_limited(history, user):
    """ports.HistoryStore: "the user's last ``limit`` changes that are still kept, the newest first"."""
    reasons, devices = list(Reason), ("web", "mobile", "tablet")
    kept = [
        change(user, NOW + n, online=n % 2 == 0, device=devices[n % 3], reason=reasons[n % len(reasons)])
        for n in range(20)
    ]
    await history.write(kept)
    assert await history.changes(user, 100) == kept[::-1]
    assert await history.changes(user, 3) == kept[:-4:-1]
    assert [type(one.online) for one in await history.changes(user, 1)] == [bool]
    assert isinstance((await history.changes(user, 1))[0].reason, Reason)


async def test_of_many_changes_none_is_left_out(history, user):
    """Found in review: of each day the first thousand came, and then the day before."""
    kept = [change(user, NOW - DAY), *(change(user, NOW + number) for number in range(1_100))]
    await history.write(kept)
    assert await history.changes(user, 1_050) == kept[:-1_051:-1]
    assert await history.changes(user, 2_000) == kept[::-1]


async def test_a_user_never_seen_has_no_changes(history, user):
    assert list(await history.changes(user, 10)) == []


async def test_changes_reach_back_over_days(history, user):
    kept = [change(user, NOW - days * DAY) for days in (0, 1, 2, 7, 29)]
    await history.write(kept)
    assert await history.changes(user, 100) == kept
    assert await history.changes(user, 2) == kept[:2]


async def test_changes_across_midnight_are_in_order(history, user):
    midnight = NOW // DAY * DAY
    kept = [change(user, midnight + offset) for offset in (1, 0, -1, -2)]
    await history.write(kept)
    assert await history.changes(user, 100) == kept


async def test_a_clock_that_was_ahead_hides_no_change(history, user):
    """A version is never lower than one before (DESIGN §3), so what comes after a leap of the clock still wins."""
    leapt = change(user, NOW + 3 * DAY)
    after = change(user, NOW + 3 * DAY + 1, online=False)
    await history.write([change(user, NOW), leapt])
    await history.write([after])
    assert await history.read([user]) == {user: status(after)}
    assert await history.changes(user, 10) == [after, leapt, change(user, NOW)]
