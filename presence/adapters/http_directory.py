"""The directory of the host application, asked over HTTP (DESIGN §5).

``GET {base}/friends/{user}``, ``/conversations/{conversation}`` and ``/contacts/{user}`` each answer 200 with a JSON
array of ids; 404 for a conversation that does not exist, and for a user without friends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from functools import partial

import aiohttp

from presence.adapters.answers import Answers
from presence.core.model import no_ids
from presence.ports import DirectoryUnavailable, Health

log = logging.getLogger(__name__)

CONNECTIONS = 32
ANSWER_BYTES = 4 * 2**20
PAUSE = 1.0  # s after a failure in which nothing is asked: else each of many look-ups would wait for the time limit
AWAY = (502, 503, 504)  # what a proxy answers, or the application itself, when it cannot; 500 may be of one user alone

Ids = tuple[str, ...]


class HttpDirectory:
    """See `presence.ports.Directory`. An answer is used for ``cache`` s, also when the application is away since."""

    def __init__(self, base: str, *, timeout: float = 2.0, cache: float = 5.0) -> None:
        """Connect when first asked.

        Args:
            base: URL of the application, with or without a slash at its end.
            timeout: of one question, s.
            cache: how old an answer may be, s.
        """
        self.health = Health()
        self._base = base.rstrip("/")
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._answers = Answers(cache)
        self._paused_until = 0.0

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def friends(self, user: str) -> Sequence[str]:
        return await self._ids(f"friends/{user}") or ()

    async def members(self, conversation: str) -> Sequence[str] | None:
        return await self._ids(f"conversations/{conversation}")

    async def _ids(self, path: str) -> Ids | None:
        return await self._answers.get(path, partial(self._ask, path))

    async def contacts(self, user: str) -> frozenset[str]:
        return await self._answers.get(f"contacts/{user}", partial(self._contacts, user))

    async def _contacts(self, user: str) -> frozenset[str]:
        return frozenset({user}).union(await self._ask(f"contacts/{user}") or ())

    async def _ask(self, path: str) -> Ids | None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._paused_until:
            raise DirectoryUnavailable(self.health.detail)
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._get(path)
        except ValueError as error:  # of this answer: the others may be good
            raise DirectoryUnavailable(f"{self._base}/{path}: {error}") from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = f"{self._base}: {str(error) or f'no answer within {self._timeout:g} s'}"
            self._paused_until = loop.time() + PAUSE
            if self.health.note("down", reason):
                log.warning("directory away: %s", reason)
            raise DirectoryUnavailable(reason) from None
        if self.health.note("up"):
            log.info("directory reached")
        return answer

    async def _get(self, path: str) -> Ids | None:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=CONNECTIONS)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        headers = {"Accept": "application/json"}
        async with self._session.get(f"{self._base}/{path}", headers=headers, allow_redirects=False) as response:
            if response.status == 404:
                return None
            if response.status in AWAY:
                raise aiohttp.ClientError(f"status {response.status}")
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            body = b""
            async for chunk in response.content.iter_chunked(65_536):
                body += chunk
                if len(body) > ANSWER_BYTES:
                    raise ValueError(f"more than {ANSWER_BYTES} bytes")
        try:
            ids = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        if not isinstance(ids, list) or no_ids(ids):
            raise ValueError("not a JSON array of ids")
        return tuple(dict.fromkeys(ids))
