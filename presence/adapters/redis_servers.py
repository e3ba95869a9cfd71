"""The Redis servers behind the URL: one, the primaries of a cluster, or the one Sentinel names (DESIGN §3.7)."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from asyncio import Task
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from presence.adapters.patience import Patience
from presence.core import redis_url
from presence.ports import Health

log = logging.getLogger(__name__)

CLUSTER_CONNECTIONS = 16  # to one primary, besides those that wait for changes
ASKED = 5  # nodes of a cluster asked at a time where the primaries are
LOOK_LIMIT = 0.5  # s in which they must say so: what is frozen must not keep the others from being found
FORGOTTEN_AFTER = 60.0  # s after which the connections to a server that holds nothing any more are closed
PUBSUB_BYTES = 64 * 1024 * 1024  # of events, each 120, that Redis is to keep for a listener that is late

Address = tuple[str, int]


class Node:
    """One server, known by its address, and the connections to it."""

    def __init__(self, options: dict[str, Any], connections: int, partitions: int, *, primary: bool) -> None:
        """Connect when first asked.

        Args:
            options: of redis-py's connections.
            connections: open at once for questions.
            primary: refuse it when it is a replica; a cluster's nodes say so themselves.
        """
        self.name = str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")
        self.run_id = ""
        """What the newest connection has reached: another run id is another memory (DESIGN §3.6)."""
        self.away: str | None = ""
        """Why it could not be asked; None when it answered; empty when it was not asked yet."""
        self.used_at = 0.0  # monotonic s
        self._primary = primary
        self.turns = asyncio.Semaphore(connections)
        """One for each question at a time: whoever has it need not wait for a connection."""
        self.redis = self._client(options, connections)
        self.blocking = self._client(options, partitions + 1)  # a reader each, and a listener

    def _client(self, options: dict[str, Any], connections: int) -> Any:
        own: dict[str, Any] = {"max_connections": connections, "redis_connect_func": self._connected}
        return Redis.from_pool(BlockingConnectionPool(**own | options))  # which owns it, and so closes it

    async def _connected(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        if self._primary:
            await connection.send_command("INFO", "replication")
        found = re.search(r"run_id:(\w+)", str(await connection.read_response()))
        if self._primary and "role:master" not in str(await connection.read_response()):
            raise RedisConnectionError(f"{self.name} is a replica")
        self.run_id = found[1] if found else ""

    async def close(self) -> None:
        for client in (self.redis, self.blocking):
            await client.aclose()


class Servers:
    """Which server holds which partition, as far as is known. It follows fail-overs and moved slots."""

    def __init__(self, url: str, keys: Sequence[str], *, connections: int, timeout: float) -> None:
        """Connect when first asked.

        Args:
            url: see `core.redis_url`.
            keys: one key of each partition, all whose keys share its slot.
            connections: open at once to a server.
            timeout: of finding a server, and of connecting to it, s.

        Raises:
            ValueError: of the URL.
        """
        self.health = Health()
        self.nodes: list[Node | None] = [None] * len(keys)
        """By partition; None: not found yet, see `found`."""
        self._parsed = redis_url.parse(url)
        self._slots = [key_slot(key.encode()) for key in keys]
        # Each costs four round trips to open; when many readers come at once, more of them to every primary do harm.
        self._connections = min(connections, CLUSTER_CONNECTIONS) if self._parsed.kind == "cluster" else connections
        self._timeout = timeout
        self._known: dict[Address, Node] = {}
        self._members: set[Address] = set(self._parsed.addresses)
        self._looking: Task[None] | None = None
        self._trouble = "not found yet"
        self._sentinels: list[Any] = []
        self._closed = False
        if self._parsed.kind == "server":
            self.nodes = [self._node()] * len(keys)
        elif self._parsed.kind == "sentinel":
            for host, port in self._parsed.addresses:
                options = self._options(self._parsed.sentinel_url) | {"host": host, "port": port}
                self._sentinels.append(Redis.from_pool(BlockingConnectionPool(max_connections=2, **options)))

    def _options(self, url: str) -> dict[str, Any]:
        return {
            "timeout": self._timeout,
            "socket_timeout": None,  # `_asking` has one; this uses `wait_for`, which in 3.11 may lose a cancellation
            "socket_connect_timeout": 5 * self._timeout,  # where `Patience` does not rule: it gives a busy loop time
            "decode_responses": True,
            "retry": Retry(NoBackoff(), 0),  # we know better what may be sent twice
            # With them, the pool hands out connections that the server has closed meanwhile.
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        } | dict(parse_url(url))

    def _node(self, address: Address | None = None) -> Node:
        options = self._options(self._parsed.url)
        if address is None:
            return Node(options, self._connections, len(self.nodes), primary=False)
        if address not in self._known:
            options |= {"host": address[0], "port": address[1]}
            primary = self._parsed.kind == "sentinel"
            self._known[address] = Node(options, self._connections, len(self.nodes), primary=primary)
        return self._known[address]

    def all(self) -> list[Node]:
        """Return the servers that hold partitions."""
        return list(dict.fromkeys(node for node in self.nodes if node))

    async def found(self, partition: int) -> Node:
        """Return the partition's server.

        Raises:
            ConnectionError: it was not found.
        """
        node = self.nodes[partition]
        if node is None:
            await self.look()
            node = self.nodes[partition]
        if node is None:
            raise RedisConnectionError(self._trouble)
        return node

    def note(self, node: Node | None, reason: str | None) -> None:
        """Note that the server answered, or why it did not (None: there is none); and what that makes of the whole."""
        if node:
            node.away = reason
        if reason:
            _ = self.look()
        nodes = self.all()
        away = [one for one in nodes if one.away]
        if len(away) < len(nodes) and node:
            state, detail = ("degraded", f"{away[0].name}: {away[0].away}") if away else ("up", None)
        else:
            state, detail = "down", reason
        if self.health.note(state, detail):
            match state:
                case "up":
                    log.info("store reached")
                case "degraded":
                    log.warning("store away in part: %s", detail)
                case _:
                    log.warning("store away: %s", detail)

    # Finding them

    def look(self) -> asyncio.Future[None]:
        """Find out which server holds which partition, unless that is under way. It does not fail."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return asyncio.shield(self._looking)

    async def _look(self) -> None:
        if self._parsed.kind == "server" or self._closed:
            return
        votes = await (self._ask_cluster() if self._parsed.kind == "cluster" else self._ask_sentinels())
        now = asyncio.get_running_loop().time()
        for partition, found in enumerate(votes):
            if found:
                ((address, _),) = found.most_common(1)
                node = self._node(address)
                if node is not self.nodes[partition] and self.nodes[partition]:
                    log.info("partition %d is now on %s", partition, node.name)
                self.nodes[partition] = node
        for node in self.all():
            node.used_at = now
        for address, node in list(self._known.items()):
            if address not in self._members and now - node.used_at > FORGOTTEN_AFTER:
                del self._known[address]
                await node.close()

    async def _ask_cluster(self) -> list[Counter[Address]]:
        """Ask some nodes, and count who says what: one that was cut off may still hold itself for a primary."""
        members = random.sample(sorted(self._members), min(ASKED, len(self._members)))
        answers = await self._answers((self._node(one).redis, one, "CLUSTER", "SLOTS") for one in members)
        votes: list[Counter[Address]] = [Counter() for _ in self.nodes]
        seen = set(self._parsed.addresses)
        for (asked, _), ranges in answers:
            for first, last, *servers in ranges:
                # A node that does not know its own address says nothing for it.
                there = [(asked if host in (None, "", "?") else host, int(port)) for host, port, *_ in servers]
                seen.update(there)
                for partition, slot in enumerate(self._slots):
                    if first <= slot <= last:
                        votes[partition][there[0]] += 1
        if answers:
            self._members = seen
        if not all(votes):
            self._trouble = "no primary holds all its slots" if answers else self._trouble
        return votes

    async def _ask_sentinels(self) -> list[Counter[Address]]:
        service = self._parsed.service
        answers = await self._answers(
            (client, address, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            for client, address in zip(self._sentinels, self._parsed.addresses, strict=True)
        )
        votes: Counter[Address] = Counter((host, int(port)) for _, found in answers if found for host, port in [found])
        if answers and not votes:
            self._trouble = "the sentinels know no service of that name"
        return [votes] * len(self.nodes)

    async def _answers(self, questions: Iterable[tuple[Any, ...]]) -> list[tuple[Address, Any]]:
        """Ask all at once; return what those say that answer in time, with their addresses."""

        async def answer(client: Any, address: Address, *command: str) -> tuple[Address, Any] | None:
            try:
                async with Patience(min(LOOK_LIMIT, self._timeout)):
                    return address, await client.execute_command(*command)
            except (RedisError, OSError, TimeoutError) as error:
                reason = str(error) or "no answer in time"
                self._trouble = f"{address[0]}:{address[1]}: {reason}"
                return None

        return [one for one in await asyncio.gather(*(answer(*question) for question in questions)) if one]

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        if self._looking:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        for node in {*self._known.values(), *self.all()}:
            await node.close()
        for client in self._sentinels:
            await client.aclose()

    # The checks of the start

    async def check(self) -> Sequence[str]:
        """Look at the settings of the servers; return what is wrong, a line with the remedy each.

        Raises:
            RedisError, OSError: one of them cannot be asked.
        """
        found: dict[str, list[str]] = {}
        for node in self.all():
            for line in await _check(node):
                found.setdefault(line, []).append(node.name)
        return [f"{line} ({', '.join(names)})" for line, names in found.items()]


async def _check(node: Node) -> list[str]:
    lines = []
    server = await node.redis.info("server")
    version = str(server.get("redis_version", "0"))
    if int(version.partition(".")[0]) < 7:
        lines.append(f"Redis {version} is older than 7 and not tried: use Redis 7 or Valkey")
    settings: dict[str, str] = {}
    try:
        for name in ("notify-keyspace-events", "maxmemory-policy", "client-output-buffer-limit"):
            settings |= await node.redis.config_get(name)
    except RedisError as error:  # a managed Redis, or an ACL
        lines.append(
            "cannot look at its settings, see that notify-keyspace-events has Ex, maxmemory-policy is noeviction and "
            f"client-output-buffer-limit gives pubsub 64 MB: {error}"
        )
        return lines
    events = settings.get("notify-keyspace-events", "")
    if "E" not in events or not {"x", "A"}.intersection(events):
        lines.append(
            "notify-keyspace-events lacks Ex, so sessions that end wait for the next sweep: "
            f"CONFIG SET notify-keyspace-events {events}Ex"
        )
    if (policy := settings.get("maxmemory-policy", "noeviction")) != "noeviction":
        lines.append(
            f"maxmemory-policy {policy} throws sessions away when memory is short: "
            "CONFIG SET maxmemory-policy noeviction"
        )
    limit = re.search(r"pubsub (\d+)", settings.get("client-output-buffer-limit", ""))
    if limit and 0 < int(limit[1]) < PUBSUB_BYTES:
        lines.append(
            f"client-output-buffer-limit pubsub {int(limit[1]) // 2**20}mb is little when many sessions end at once: "
            "CONFIG SET client-output-buffer-limit 'pubsub 256mb 64mb 60'"
        )
    return lines
