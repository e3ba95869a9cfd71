"""A Redis Cluster on this machine: three primaries, and a replica of each if asked for."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import redis
from redis.cluster import ClusterNode as ClusterAddress

from tests.support.process import Process, free_port
from tests.support.store import KEPT, valkey_binary
from tests.support.waiting import wait_until

PRIMARIES = 3
SLOTS = 16384


class ClusterNode(Process):
    """One server of a cluster. Each write is in its append-only file before it is answered."""

    def __init__(self, *options: str) -> None:
        super().__init__()
        # The bus has a port of its own, too: the default, 10,000 above, may belong to somebody else.
        self.port, self.bus_port = free_port(), free_port()
        self.data = self.root / "data"
        self._options = options
        self._client = redis.Redis(port=self.port, decode_responses=True, socket_timeout=5)

    async def start(self) -> ClusterNode:
        """Start it, also again after it was killed, with its data and what it knew of the cluster."""
        self.data.mkdir(exist_ok=True)
        settings = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--dir": str(self.data),
            **KEPT,
            "--save": "",
            "--cluster-enabled": "yes",
            "--cluster-port": str(self.bus_port),
            "--cluster-announce-ip": "127.0.0.1",
            "--cluster-node-timeout": "1000",
            "--cluster-require-full-coverage": "no",
            # A replica must have had its first sync, and may take over however long it was cut off.
            "--cluster-replica-validity-factor": "0",
            "--repl-diskless-sync-delay": "0",
            "--notify-keyspace-events": "Ex",
        }
        arguments = [word for option in settings.items() for word in option]
        self.spawn([valkey_binary(), *arguments, *self._options])

        def answers() -> bool:
            assert self.running, f"a node of the cluster ended:\n{self.log}"
            with contextlib.suppress(redis.RedisError):
                return bool(self._client.ping())
            return False

        await wait_until(answers, 10, what="a node of the cluster to answer a ping")
        return self

    async def restart(self) -> ClusterNode:
        """Kill it and start it again, with its data."""
        await self.kill9()
        return await self.start()

    def redis(self) -> redis.Redis:
        """A client of this node alone, good for all starts."""
        return self._client

    def ask(self, *command: object) -> Any:
        """Give it a command."""
        return self._client.execute_command(*command)

    def state(self) -> dict[str, str]:
        """What CLUSTER INFO says."""
        answer = self.ask("CLUSTER INFO")
        if isinstance(answer, dict):
            return {str(name): str(value) for name, value in answer.items()}
        return dict(line.split(":", 1) for line in answer.splitlines() if ":" in line)

    def role(self) -> str:
        """Whether it is a ``master`` or a ``slave`` now."""
        return str(self._replication()["role"])

    def synced(self) -> bool:
        """As a replica, it has all of its primary."""
        return self._replication().get("master_link_status") == "up"

    def _replication(self) -> dict[str, Any]:
        info = self._client.info("replication")
        assert isinstance(info, dict)
        return info

    def close(self) -> None:
        """Remove all of it."""
        self._client.close()
        super().close()


class InThreads:
    """A cluster's client for asyncio: that of redis-py forgets to close its connections to a node that is gone."""

    def __init__(self, client: redis.RedisCluster) -> None:
        self._client = client

    async def xrange(self, name: str, least: str) -> Any:
        """The entries of a stream from ``least`` on."""
        return await asyncio.to_thread(self._client.xrange, name, least)

    async def hgetall(self, name: str) -> Any:
        """A hash."""
        return await asyncio.to_thread(self._client.hgetall, name)

    async def aclose(self) -> None:
        """It is not this one's."""


class RedisClusterProcess:
    """Three primaries that share the slots, `nodes[0:3]`, and with ``replicas`` one replica of each, `nodes[3:6]`.

    A node is killed, frozen and started by its own methods.
    """

    def __init__(self, *options: str, replicas: bool = False) -> None:
        self.nodes = [ClusterNode(*options) for _ in range(PRIMARIES * (2 if replicas else 1))]
        self.primaries, self.replicas = self.nodes[:PRIMARIES], self.nodes[PRIMARIES:]
        self.url = f"redis+cluster://127.0.0.1:{self.nodes[0].port}"
        self.version = ""
        self._client: redis.RedisCluster | None = None

    async def start(self) -> RedisClusterProcess:
        """Start all nodes and make them a cluster that serves all slots."""
        for node in self.nodes:
            await node.start()
        share = SLOTS // PRIMARIES
        for number, node in enumerate(self.primaries):
            last = SLOTS - 1 if number == PRIMARIES - 1 else (number + 1) * share - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", number * share, last)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        first = self.nodes[0]
        for node in self.nodes[1:]:
            first.ask("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus_port)
        await wait_until(
            lambda: all(int(node.state()["cluster_known_nodes"]) == len(self.nodes) for node in self.nodes),
            15, what="the nodes of the cluster to know one another",
        )  # fmt: skip
        for replica, primary in zip(self.replicas, self.primaries, strict=False):
            await self._replicate(replica, primary)
        await self.settled()
        info: Any = first.redis().info("server")
        self.version = (
            f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
        )
        return self

    async def settled(self, timeout: float = 15.0) -> None:
        """Wait until all nodes that run agree that all slots are served, and each replica is in sync."""

        def settled() -> bool:
            running = [node for node in self.nodes if node.running]
            with contextlib.suppress(redis.RedisError):
                return all(
                    node.state()["cluster_state"] == "ok"
                    and int(node.state()["cluster_slots_ok"]) == SLOTS
                    and (node.role() == "master" or node.synced())
                    for node in running
                )
            return False

        await wait_until(settled, timeout, what="the cluster to serve all slots")

    async def _replicate(self, replica: ClusterNode, primary: ClusterNode) -> None:
        name = primary.ask("CLUSTER MYID")

        def accepted() -> bool:
            with contextlib.suppress(redis.ResponseError):  # not known yet
                return bool(replica.ask("CLUSTER", "REPLICATE", name))
            return False

        await wait_until(accepted, 10, what="a node to become a replica")

    def redis(self) -> redis.RedisCluster:
        """A client of the cluster."""
        if self._client is None:
            nodes = [ClusterAddress("127.0.0.1", node.port) for node in self.nodes]
            self._client = redis.RedisCluster(startup_nodes=nodes, decode_responses=True, socket_timeout=5)
        return self._client

    def asyncio_redis(self) -> InThreads:
        """The same for asyncio."""
        return InThreads(self.redis())

    async def fail_over(self) -> None:
        """Kill the first primary; wait until its replica has taken its place."""
        replica = self.replicas[0]
        await self.kill9()
        await wait_until(lambda: replica.role() == "master", 15, what="a replica to take over")
        await self.settled()

    async def kill9(self, number: int = 0) -> None:
        """Kill one node; with replicas its own takes over within about 1.5 s."""
        await self.nodes[number].kill9()

    async def restart(self) -> RedisClusterProcess:
        """Kill all nodes and start them again, with their data."""
        for node in self.nodes:
            await node.kill9()
        for node in self.nodes:
            await node.start()
        await self.settled()
        return self

    async def freeze(self) -> None:
        """Stop all nodes where they are."""
        for node in self.nodes:
            await node.freeze()

    async def thaw(self) -> None:
        """Let them go on."""
        for node in self.nodes:
            await node.thaw()

    def close(self) -> None:
        """Remove all of it."""
        if self._client is not None:
            self._client.close()
        for node in self.nodes:
            node.close()
