"""The history store of the embedded mode: what Cassandra would hold, in one SQLite file."""

from __future__ import annotations

import asyncio
import json
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from presence.core.model import Change, Reason, Status
from presence.ports import Health, HistoryUnavailable

PAGE = 500
PRUNED = 1000  # rows of the history that one write removes at most
DAY = 86_400_000_000  # µs

T = TypeVar("T")
Row = tuple[Any, ...]

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS user_presence (
        user_id TEXT PRIMARY KEY, is_online INTEGER NOT NULL, last_active INTEGER, device TEXT NOT NULL,
        version INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS user_presence_online ON user_presence (user_id) WHERE is_online;
    CREATE TABLE IF NOT EXISTS presence_history (
        user_id TEXT NOT NULL, version INTEGER NOT NULL, is_online INTEGER NOT NULL, last_active INTEGER,
        device TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (user_id, version)
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS presence_history_version ON presence_history (version);
    CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_WRITE = """
    INSERT INTO user_presence (user_id, is_online, last_active, device, version) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (user_id) DO UPDATE SET
        is_online = excluded.is_online, last_active = excluded.last_active, device = excluded.device,
        version = excluded.version
    WHERE excluded.version > version
"""
_KEEP = """
    INSERT INTO presence_history (user_id, is_online, last_active, device, version, reason) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (user_id, version) DO NOTHING
"""
_PRUNE = """
    DELETE FROM presence_history WHERE (user_id, version) IN (
        SELECT user_id, version FROM presence_history WHERE version < ? ORDER BY version LIMIT ?
    )
"""
_CHANGES = """
    SELECT user_id, is_online, version, last_active, device, reason FROM presence_history
    WHERE user_id = ? ORDER BY version DESC LIMIT ?
"""
_READ = """
    SELECT user_id, is_online, version, last_active FROM user_presence
    WHERE user_id IN (SELECT value FROM json_each(?))
"""
_ONLINE = """
    SELECT user_id, is_online, version, last_active FROM user_presence
    WHERE is_online AND user_id > ? ORDER BY user_id LIMIT ?
"""


class SqliteHistory:
    """See `presence.ports.HistoryStore`. Several processes may have the file open.

    SQLite blocks, so it has a thread of its own, which is never given a second piece of work before it is done with
    the first.
    """

    name: str

    def __init__(
        self,
        db: sqlite3.Connection,
        thread: ThreadPoolExecutor,
        name: str,
        timeout_seconds: float,
        history_days: int,
    ) -> None:
        self.name = name
        self.health = Health()
        self.health.note("up")
        self._db = db
        self._thread = thread
        self._timeout = timeout_seconds
        self._keep_us = history_days * DAY
        self._turn = asyncio.Lock()
        self._work: asyncio.Future[Any] | None = None

    @classmethod
    async def open(cls, path: Path, *, timeout_seconds: float = 2.0, history_days: int = 30) -> SqliteHistory:
        """Open the file, and make what is missing in it.

        Args:
            path: the file.
            timeout_seconds: of one question.
            history_days: how long a user's changes are kept.

        Raises:
            HistoryUnavailable: it is no such file, or cannot be made.
        """
        thread = ThreadPoolExecutor(1, "history")
        try:
            async with asyncio.timeout(timeout_seconds):
                db, name = await asyncio.get_running_loop().run_in_executor(thread, _open, path, timeout_seconds)
        except (sqlite3.Error, TimeoutError) as error:
            thread.shutdown(wait=False)
            raise HistoryUnavailable(f"{path}: {str(error) or 'no answer in time'}") from None
        return cls(db, thread, name, timeout_seconds, history_days)

    async def close(self) -> None:
        """Close the file, once what is under way is done or out of time."""
        try:
            await self._run(self._db.close)
        finally:
            self._thread.shutdown(wait=False)

    async def write(self, changes: Sequence[Change]) -> None:
        rows = [(one.user, one.online, one.last_active, one.device, one.version) for one in changes]
        kept = [(*row, one.reason) for row, one in zip(rows, changes, strict=True)]
        oldest = time.time_ns() // 1000 - self._keep_us

        def work() -> None:
            with self._db:  # one transaction
                self._db.executemany(_WRITE, rows)
                self._db.executemany(_KEEP, kept)
                self._db.execute(_PRUNE, (oldest, PRUNED))

        await self._run(work)

    async def changes(self, user: str, limit: int) -> Sequence[Change]:
        rows = await self._select(_CHANGES, user, limit)
        return [
            Change(user, bool(online), version, last_active, device, Reason(reason))
            for _, online, version, last_active, device, reason in rows
        ]

    async def read(self, users: Collection[str]) -> Mapping[str, Status]:
        return {row[0]: _status(row) for row in await self._select(_READ, json.dumps(list(users)))}

    async def online_users(self) -> AsyncIterator[Sequence[Status]]:
        last = ""
        while rows := await self._select(_ONLINE, last, PAGE):
            yield [_status(row) for row in rows]
            last = rows[-1][0]

    async def _select(self, sql: str, *values: object) -> list[Row]:
        return await self._run(lambda: self._db.execute(sql, values).fetchall())

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                if self._work is not None:
                    await asyncio.wait([self._work])  # what ran out of time may still be at it
                future: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
                self._work = future
                answer = await asyncio.shield(future)
        except (sqlite3.Error, TimeoutError, RuntimeError) as error:  # RuntimeError: the thread has been shut down
            self.health.note("down", str(error) or f"no answer within {self._timeout:g} s")
            raise HistoryUnavailable(self.health.detail) from None
        self.health.note("up")
        return answer


def _open(path: Path, timeout_seconds: float) -> tuple[sqlite3.Connection, str]:
    db = sqlite3.connect(path, timeout=timeout_seconds, isolation_level="IMMEDIATE", check_same_thread=False)
    try:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError:  # SQLite does not wait here for another process that does the same
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        db.executescript(_SCHEMA)
        with db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('name', ?)", (f"sqlite-{secrets.token_hex(8)}",))
        (name,) = db.execute("SELECT value FROM meta WHERE key = 'name'").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db, name


def _status(row: Row) -> Status:
    user, online, version, last_active = row
    return Status(user, bool(online), version, last_active)
