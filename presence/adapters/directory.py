"""The directory in a JSON file: ``{"friends": {"u1": ["u2"]}, "conversations": {"c1": ["u1", "u2"]}}`` (DESIGN §5)."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from presence.core.model import ID

STAT_SECONDS = 1.0

log = logging.getLogger(__name__)


class DirectoryError(Exception):
    """The file cannot be used. One line: the file, the place in it, and what is wrong there."""


class FileDirectory:
    """See `presence.ports.Directory`. Re-read when the file changes; a broken new version changes nothing.

    Raises:
        DirectoryError: the file is broken already when this is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._looked = time.monotonic()
        self._content = _Content(path)

    async def friends(self, user: str) -> Sequence[str]:
        return (await self._current()).friends.get(user, ())

    async def members(self, conversation: str) -> Sequence[str] | None:
        return (await self._current()).members.get(conversation)

    async def contacts(self, user: str) -> frozenset[str]:
        return (await self._current()).contacts(user)

    async def _current(self) -> _Content:
        now = time.monotonic()
        if now - self._looked >= STAT_SECONDS:
            self._looked = now
            if (stamp := _stamp(self._path)) != self._stamp:
                self._stamp = stamp
                try:
                    self._content = await asyncio.to_thread(_Content, self._path)
                except DirectoryError as error:
                    log.warning("the directory stays as it was: %s", error)
        return self._content


class _Content:
    """What one version of the file says, and the same the other way round."""

    def __init__(self, path: Path) -> None:
        self.friends, self.members = _parse(path)
        self._listed_by: dict[str, list[str]] = {}
        self._conversations_of: dict[str, list[str]] = {}
        for forward, backward in ((self.friends, self._listed_by), (self.members, self._conversations_of)):
            for one, others in forward.items():
                for other in others:
                    backward.setdefault(other, []).append(one)
        self._contacts: dict[str, frozenset[str]] = {}

    def contacts(self, user: str) -> frozenset[str]:
        if user not in self._contacts and (user in self._listed_by or user in self._conversations_of):
            shared = (self.members[conversation] for conversation in self._conversations_of.get(user, ()))
            self._contacts[user] = frozenset({user}).union(self._listed_by.get(user, ()), *shared)
        return self._contacts.get(user) or frozenset({user})


def demo_path() -> Path:
    """Return the file with the people to try the server with."""
    return Path(__file__).with_name("directory_demo.json")


def _parse(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DirectoryError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DirectoryError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DirectoryError(f"{path}: must be an object with friends and conversations")
    for key in document:
        if key not in ("friends", "conversations"):
            raise DirectoryError(f"{path}: {_shown(key)} is neither friends nor conversations")
    return _table(path, document, "friends"), _table(path, document, "conversations")


def _table(path: Path, document: dict[str, object], name: str) -> dict[str, tuple[str, ...]]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise DirectoryError(f"{path}: {name} must be an object of lists")
    for key, ids in table.items():
        if not ID.fullmatch(key):
            raise DirectoryError(f"{path}: {name}: {_shown(key)} is not an id")
        if not isinstance(ids, list):
            raise DirectoryError(f"{path}: {name}.{key} must be a list of user ids")
        for place, user in enumerate(ids):
            if not isinstance(user, str) or not ID.fullmatch(user):
                raise DirectoryError(f"{path}: {name}.{key}[{place}]: {_shown(user)} is not a user id")
    return {key: tuple(dict.fromkeys(ids)) for key, ids in table.items()}


def _shown(value: object) -> str:
    return json.dumps(value)[:80]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when the file does; None while there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
