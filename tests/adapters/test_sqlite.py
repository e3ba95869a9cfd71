"""presence.adapters.sqlite: the history store in a file."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import pytest_asyncio

from presence.adapters.sqlite import DAY, PAGE, PRUNED, SqliteHistory
from presence.core.model import Change, Reason, Status
from presence.ports import HistoryUnavailable


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.db"


@pytest_asyncio.fixture
async def history(path):
    store = await SqliteHistory.open(path)
    yield store
    await store.close()


def change(user: str, version: int, online: bool = True, **more) -> Change:
    return Change(user, online, version, version // 1000, **more)


def now_us() -> int:
    return time.time_ns() // 1000


def status(one: Change) -> Status:
    return Status(one.user, one.online, one.version, one.last_active)


def rows(path):
    with sqlite3.connect(path) as db:
        return db.execute("SELECT user_id, is_online, last_active, device, version FROM user_presence").fetchall()


async def test_what_was_written_is_read(history):
    one, other = change("a", 5_000), change("b", 6_000, online=False)
    await history.write([one, other])
    assert await history.read(["a", "b"]) == {"a": status(one), "b": status(other)}


async def test_those_never_seen_are_not_in_the_answer(history):
    """ports.HistoryStore: "those never seen are not in the answer"."""
    await history.write([change("a", 1)])
    assert await history.read(["b", "a", "c"]) == {"a": status(change("a", 1))}
    assert await history.read([]) == {}


async def test_a_last_activity_that_is_not_known_stays_unknown(history):
    await history.write([Change("a", False, 1, None)])
    assert (await history.read(["a"]))["a"].last_active is None


async def test_the_table_is_the_guides(history, path):
    """The guide, Cassandra layer: `user_presence` with `user_id`, `is_online`, `last_active`, `device`."""
    await history.write([Change("a", True, 1_752_748_200_123_456, 1_752_748_200_100, "tablet", Reason.CONNECTED)])
    assert rows(path) == [("a", 1, 1_752_748_200_100, "tablet", 1_752_748_200_123_456)]


async def test_the_highest_version_wins_whatever_the_order(tmp_path):
    """ports.HistoryStore: "Of one user's the highest version wins, whatever the order"."""
    versions = [change("a", 1), change("a", 2, online=False), change("a", 3, device="mobile")]
    for number, order in enumerate(permutations(versions)):
        store = await SqliteHistory.open(tmp_path / f"{number}.db")
        await store.write(order[:2])
        await store.write(order[2:])
        await store.close()
        assert rows(tmp_path / f"{number}.db") == [("a", 1, 0, "mobile", 3)]


async def test_repeats_are_harmless(history, path):
    """ports.HistoryStore: "repeats are harmless"; an equal version changes nothing."""
    await history.write([change("a", 7)])
    await history.write([change("a", 7), change("a", 7, online=False, device="mobile")])
    assert rows(path) == [("a", 1, 0, "web", 7)]


@pytest.mark.parametrize("missing", ("device", "reason"))
async def test_of_a_write_that_fails_nothing_is_kept(history, path, missing):
    """Neither the status nor the history: both are one transaction."""
    bad = change("b", 2)
    setattr(bad, missing, None)
    with pytest.raises(HistoryUnavailable, match="NOT NULL"):
        await history.write([change("a", now_us()), bad])
    assert rows(path) == []
    assert kept(path) == []
    await history.write([change("a", 1)])
    assert len(rows(path)) == 1


async def test_1000_users_are_read_at_once(history):
    changes = [change(f"u{number}", number + 1) for number in range(2_000)]
    await history.write(changes)
    asked = [f"u{number}" for number in range(500, 1_500)]
    assert await history.read(asked) == {one.user: status(one) for one in changes[500:1_500]}


@pytest.mark.parametrize("count", (0, 1, PAGE, PAGE + 1, 2 * PAGE))
async def test_all_online_users_come_in_pages(history, count):
    online = [change(f"u{number:05}", number + 1) for number in range(count)]
    await history.write([*online, *(change(f"v{number}", 1, online=False) for number in range(10))])
    pages = [page async for page in history.online_users()]
    assert [one for page in pages for one in page] == [status(one) for one in online]
    assert all(len(page) <= PAGE for page in pages)


async def test_a_write_between_two_pages_loses_no_other_user(history):
    await history.write([change(f"u{number:05}", 1) for number in range(2 * PAGE)])
    seen = []
    async for page in history.online_users():
        seen += [one.user for one in page]
        await history.write([change(one.user, 2, online=False) for one in page])
    assert len(seen) == len(set(seen)) == 2 * PAGE


def kept(path):
    with sqlite3.connect(path) as db:
        return db.execute("SELECT user_id, version, reason FROM presence_history ORDER BY version").fetchall()


async def test_changes_are_kept_for_so_many_days_and_the_last_status_for_ever(path):
    store = await SqliteHistory.open(path, history_days=2)
    old, older, young = (now_us() - round(days * DAY) for days in (2.01, 3, 1.99))
    await store.write([change("a", older), change("a", old), change("b", young)])
    await store.write([change("c", now_us())])
    assert [row[:2] for row in kept(path)[:1]] == [("b", young)]
    assert list(await store.changes("a", 9)) == []
    assert (await store.read(["a"]))["a"].version == old
    await store.close()


async def test_of_many_old_changes_each_write_removes_some(path):
    """So that no write takes long."""
    store = await SqliteHistory.open(path)
    with sqlite3.connect(path) as db:
        old = ((f"u{number}", number) for number in range(PRUNED + 10))
        db.executemany("INSERT INTO presence_history VALUES (?, ?, 1, NULL, 'web', 'connected')", old)
    await store.write([])
    assert [row[1] for row in kept(path)] == list(range(PRUNED, PRUNED + 10))
    await store.write([])
    assert kept(path) == []
    await store.close()


async def test_a_file_from_before_there_was_a_history_gets_one(path):
    store = await SqliteHistory.open(path)
    await store.write([change("a", 1)])
    await store.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE presence_history")
    again = await SqliteHistory.open(path)
    later = change("a", now_us(), reason=Reason.EXPIRED)
    await again.write([later])
    assert list(await again.changes("a", 9)) == [later]
    assert again.name == store.name
    await again.close()


async def test_the_file_outlives_its_user(path):
    store = await SqliteHistory.open(path)
    await store.write([change("a", 1)])
    await store.close()
    again = await SqliteHistory.open(path)
    assert await again.read(["a"]) == {"a": status(change("a", 1))}
    await again.close()


async def test_the_name_is_the_files(path, tmp_path):
    """ports.HistoryStore: "stores that share their content share the name"."""
    one, same, other = [await SqliteHistory.open(file) for file in (path, path, tmp_path / "other.db")]
    assert one.name.startswith("sqlite-")
    assert one.name == same.name != other.name
    for store in (one, same, other):
        await store.close()


async def test_the_journal_is_written_ahead(history, path):
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


WRITER = """
import asyncio, sys
from pathlib import Path
from presence.adapters.sqlite import SqliteHistory
from presence.core.model import Change

async def work(first):
    store = await SqliteHistory.open(Path(sys.argv[1]), timeout_seconds=10)
    for number in range(first, first + 50):
        await store.write([Change(f"u{number}", True, 1, 0), Change("all", True, number + 1, 0)])
    await store.close()
    print(store.name)

print("ready", flush=True)
sys.stdin.readline()
asyncio.run(work(int(sys.argv[2])))
"""


def test_several_processes_share_the_file(path):
    commands = [[sys.executable, "-c", WRITER, str(path), str(first)] for first in range(0, 200, 50)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers: list[Any] = [subprocess.Popen(command, **pipes) for command in commands]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 4
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()  # all at once: making the file is a race as well
    assert len({writer.communicate(timeout=20)[0] for writer in writers}) == 1
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(rows(path)) == 201
    assert ("all", 1, 0, "web", 200) in rows(path)


@contextmanager
def writing(path):
    """Another process' long transaction."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.close()


async def test_a_write_that_must_wait_too_long_is_unavailable(path):
    """ports: "when the thing behind it cannot be asked within its time limit"."""
    store = await SqliteHistory.open(path, timeout_seconds=0.2)
    with writing(path):
        began = time.monotonic()
        with pytest.raises(HistoryUnavailable):
            await store.write([change("a", 1)])
        assert 0.15 < time.monotonic() - began < 2
    assert store.health.state == "down"
    await store.write([change("a", 1)])
    assert store.health.state == "up"
    await store.close()


async def test_while_another_writes_it_is_read(history, path):
    with writing(path):
        assert await history.read(["a"]) == {}


async def test_work_that_ran_out_of_time_is_waited_for_before_the_next(path):
    """The thread's queue has a bound: it never holds more than one piece of work."""
    store = await SqliteHistory.open(path, timeout_seconds=0.1)
    store._db.create_function("pause", 0, lambda: time.sleep(0.5))
    with pytest.raises(HistoryUnavailable, match=r"no answer within 0\.1 s"):
        await store._select("SELECT pause()")
    for _ in range(3):
        with pytest.raises(HistoryUnavailable):
            await store.read(["a"])
    assert store._thread._work_queue.qsize() == 0
    deadline = time.monotonic() + 5
    while store.health.state == "down":
        assert time.monotonic() < deadline
        try:
            assert await store.read(["a"]) == {}
        except HistoryUnavailable:
            continue
    await store.close()


async def test_a_caller_that_leaves_does_not_disturb_the_next(path):
    store = await SqliteHistory.open(path)
    store._db.create_function("pause", 0, lambda: time.sleep(0.1))
    leaver = asyncio.create_task(store._select("SELECT pause()"))
    await asyncio.sleep(0.02)
    leaver.cancel()
    assert await store.read(["a"]) == {}
    await store.close()


async def test_a_file_that_is_no_database_is_unavailable(path):
    path.write_text("no database at all, but long enough to be looked at as one" * 20)
    with pytest.raises(HistoryUnavailable, match=r"history\.db: file is not a database"):
        await SqliteHistory.open(path)


async def test_a_folder_that_is_not_there_is_unavailable(tmp_path):
    with pytest.raises(HistoryUnavailable, match="unable to open"):
        await SqliteHistory.open(tmp_path / "none" / "history.db")


async def test_after_the_close_it_is_unavailable(path):
    store = await SqliteHistory.open(path)
    await store.close()
    with pytest.raises(HistoryUnavailable):
        await store.read(["a"])
