"""A primary, its replica, and three sentinels that watch them."""

from __future__ import annotations

import contextlib
from typing import Any

import redis
from redis.asyncio import Redis as AsyncioRedis

from tests.support.process import Process, free_port
from tests.support.redis_process import RedisProcess
from tests.support.store import valkey_binary
from tests.support.waiting import wait_until

NAME = "mymaster"
CONFIGURATION = """\
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor {name} 127.0.0.1 {primary} 2
sentinel down-after-milliseconds {name} 1000
sentinel failover-timeout {name} 5000
sentinel parallel-syncs {name} 1
"""


class OneSentinel(Process):
    """One sentinel. It writes into its configuration what it has learnt, so that a restart keeps it."""

    def __init__(self, primary: int) -> None:
        super().__init__()
        self.port = free_port()
        self._configuration = self.root / "sentinel.conf"
        self._configuration.write_text(
            CONFIGURATION.format(port=self.port, folder=self.root, name=NAME, primary=primary)
        )
        self._client = redis.Redis(port=self.port, decode_responses=True, socket_timeout=5)

    async def start(self) -> OneSentinel:
        """Start it, also again after it was killed."""
        self.spawn([valkey_binary(), str(self._configuration), "--sentinel"])
        await wait_until(lambda: self.about() is not None, 10, what="a sentinel to answer")
        return self

    def about(self) -> dict[str, Any] | None:
        """What it knows of the primary; None: it does not answer."""
        assert self.running, f"a sentinel ended:\n{self.log}"
        with contextlib.suppress(redis.RedisError):
            answer: Any = self._client.execute_command("SENTINEL MASTER", NAME)
            return answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
        return None

    def close(self) -> None:
        """Remove all of it."""
        self._client.close()
        super().close()


class SentinelProcess:
    """Three `sentinels` over two `servers`, of which the first is the primary to begin with.

    A server and a sentinel are killed, frozen and started by their own methods. The replica's clock may be so many s
    ``behind`` the primary's.
    """

    def __init__(self, *options: str, behind: float = 0.0) -> None:
        replication = ("--repl-diskless-sync-delay", "0")
        primary = RedisProcess(*replication, *options)
        following = ("--replicaof", f"127.0.0.1 {primary.port}")
        replica = RedisProcess(*replication, *following, *options, behind=behind)
        self.servers = [primary, replica]
        self.sentinels = [OneSentinel(primary.port) for _ in range(3)]
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{addresses}/{NAME}"
        self.version = ""

    async def start(self) -> SentinelProcess:
        """Start all; wait until a fail-over would work: the replica in sync, the sentinels known to one another."""
        for server in self.servers:
            await server.start()
        await self._synced(self.servers[1])
        for sentinel in self.sentinels:
            await sentinel.start()

        def ready() -> bool:
            known = [sentinel.about() or {} for sentinel in self.sentinels]
            return all(
                int(one.get("num-other-sentinels", 0)) == 2 and int(one.get("num-slaves", 0)) == 1 for one in known
            )

        await wait_until(ready, 20, what="the sentinels to know one another and the replica")
        self.version = self.servers[0].version
        return self

    def primary(self) -> RedisProcess | None:
        """The server that most sentinels take for the primary, if they agree."""
        ports = [str((sentinel.about() or {}).get("port")) for sentinel in self.sentinels if sentinel.running]
        port = max(set(ports), key=ports.count)
        if ports.count(port) < 2:
            return None
        return next((server for server in self.servers if str(server.port) == port), None)

    def redis(self) -> redis.Redis:
        """A client of the primary as it is now."""
        return self._known().redis()

    def asyncio_redis(self) -> AsyncioRedis:
        """A client for asyncio of the primary as it is now, that tries once; to be closed."""
        return self._known().asyncio_redis()

    def _known(self) -> RedisProcess:
        primary = self.primary()
        if primary is None:
            raise redis.ConnectionError("the sentinels do not agree on a primary")
        return primary

    def _beside(self, server: RedisProcess) -> RedisProcess:
        first, second = self.servers
        return second if server is first else first

    async def hold_back(self) -> None:
        """From now on the replica gets nothing of what is written, until the fail-over."""
        primary = self._known()
        await self._beside(primary).freeze()
        primary.redis().execute_command("CLIENT", "KILL", "TYPE", "REPLICA")

    async def fail_over(self, timeout: float = 15.0) -> RedisProcess:
        """Kill the primary; wait until the other is it, and says so itself, in about 2.5 s; return it."""
        old = self._known()
        await old.kill9()
        await self._beside(old).thaw()

        def another() -> RedisProcess | None:
            primary = self.primary()
            if primary is None or primary is old:
                return None
            with contextlib.suppress(redis.RedisError):
                replication: Any = primary.redis().info("replication")
                return primary if replication["role"] == "master" else None
            return None

        found = await wait_until(another, timeout, what="a fail-over")
        assert isinstance(found, RedisProcess)
        return found

    async def _synced(self, replica: RedisProcess) -> None:
        def synced() -> bool:
            replication: Any = replica.redis().info("replication")
            return bool(replication.get("master_link_status") == "up")

        await wait_until(synced, 10, what="the replica to be in sync")

    def close(self) -> None:
        """Remove all of it."""
        for one in (*self.sentinels, *self.servers):
            one.close()
