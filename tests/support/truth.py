"""What is true of a user, read from the stores behind the server's back, and how to know that no more comes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from typing import Any

import redis

from tests.support.server import ServerProcess
from tests.support.stomp_client import Frame, StompClient
from tests.support.waiting import wait_until


class Truth:
    """The presence store of one server, or of several that share it (one partition)."""

    def __init__(self, server: ServerProcess) -> None:
        self.redis: redis.Redis = server.redis()

    def now(self) -> int:
        """The store's clock, Unix epoch in ms."""
        seconds, us = self.redis.time()
        return int(seconds * 1000 + us // 1000)

    def online(self, user: str) -> bool:
        """The user is in the online set."""
        return bool(self.redis.sismember("presence:online", user))

    def all_online(self) -> set[str]:
        """Everybody in the online set."""
        found: Any = self.redis.smembers("presence:online")
        return set(found)

    def leases(self, user: str) -> dict[str, int]:
        """The user's sessions: id → end of the lease, Unix epoch in ms."""
        found: Any = self.redis.zrange(f"presence:user:{user}:sessions", 0, -1, withscores=True)
        return {session: int(till) for session, till in found}

    def device(self, user: str, session: str) -> str | None:
        """The device in the session's key; None when there is no such key."""
        found: Any = self.redis.get(f"presence:user:{user}:online:{session}")
        return found if found is None else str(found)

    def last_active(self, user: str) -> int | None:
        """The user's last activity, Unix epoch in ms."""
        found: Any = self.redis.get(f"presence:user:{user}:last_active")
        return found if found is None else int(found)

    def stream(self) -> Iterator[tuple[int, dict[str, str]]]:
        """All changes kept, in order: version and fields."""
        entries: Any = self.redis.xrange("presence:changes")
        for entry, fields in entries:
            ms, us = entry.split("-")
            yield int(ms) * 1000 + int(us), fields

    def changes(self, user: str) -> list[tuple[bool, str]]:
        """All changes of the user, in order: online, and the reason."""
        return [(one["online"] == "1", one["reason"]) for _, one in self.stream() if one["user"] == user]

    def versions(self, user: str) -> list[int]:
        """The versions of all changes of the user, in order."""
        return [version for version, one in self.stream() if one["user"] == user]

    def watchers(self, user: str) -> set[str]:
        """Who watches the user, as the guide's key has it."""
        found: Any = self.redis.smembers(f"presence:user:{user}:watchers")
        return set(found)


def row(server: ServerProcess, user: str) -> dict[str, Any] | None:
    """The user's row of `user_presence` in the server's history."""
    with closing(sqlite3.connect(f"file:{server.data_dir}/history.db?mode=ro", uri=True, timeout=5)) as db:
        db.row_factory = sqlite3.Row
        found = db.execute("SELECT * FROM user_presence WHERE user_id = ?", (user,)).fetchone()
    return None if found is None else dict(found)


async def wait_row(server: ServerProcess, user: str, *, online: bool) -> dict[str, Any]:
    """Wait for the row that says so; return it."""

    def so() -> dict[str, Any] | None:
        found = row(server, user)
        return found if found and bool(found["is_online"]) is online else None

    found: dict[str, Any] = await wait_until(so, what=f"the row of {user} to say online: {online}")
    return found


async def entry(server: ServerProcess, user: str) -> dict[str, Any]:
    """What REST says of the user to the user."""
    answer: dict[str, Any] = (await server.post("/api/presence/batch", user, json=[user])).json()[user]
    return answer


async def last_seen(server: ServerProcess, user: str) -> int:
    """The `lastSeen` of a user who is offline, over REST, as Unix epoch in ms."""
    return ms((await entry(server, user))["lastSeen"])


def ms(timestamp: str) -> int:
    """A timestamp of the wire, RFC 3339 in UTC with ``Z`` and milliseconds, as Unix epoch in ms."""
    moment = datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%S.%f%z")
    assert timestamp.endswith("Z")
    assert len(timestamp) == len("2025-07-17T10:30:00.123Z")
    return round(moment.timestamp() * 1000)


async def nothing_more(marker: StompClient, *watchers: StompClient) -> None:
    """Return once every watcher has all that happened until now.

    The marker is a client whose user nobody else needs. The user goes and comes: as changes are told in order, whatever
    came before is there when these are.
    """
    assert marker.connected is not None
    user = marker.connected.headers["user-name"]
    await marker.set_online(True)
    for watcher in watchers:
        await watcher.watch([user])
    for online in (False, True):
        await marker.set_online(online)
        for watcher in watchers:
            for subscription in watcher.subscriptions:
                await watcher.expect_event(user, online, 10, subscription=subscription)


def told(client: StompClient, user: str, subscription: str | None = None) -> list[tuple[bool, bool]]:
    """All MESSAGEs about the user that ever came, in order: online, and whether it was a snapshot."""
    return [(event["online"], event.get("snapshot", False)) for event in client.events(user, subscription)]


def messages(client: StompClient, subscription: str | None = None) -> list[Frame]:
    """All MESSAGEs that ever came, in order."""
    return [
        frame
        for frame in client.frames
        if frame.command == "MESSAGE" and subscription in (None, frame.headers.get("subscription"))
    ]
