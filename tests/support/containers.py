"""Redis, Kafka and Cassandra in containers (testcontainers), of the image of `images`, under a test's thumb.

Each is told to its clients on a port of this machine that stays the same, however often it is killed and started.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shlex
import socket
from typing import Any

# Before testcontainers is imported, which reads them then: the engine is this machine's own, and the image with which
# testcontainers cleans up after a killed test run would have to come from a registry.
if os.environ.get("DOCKER_HOST", "unix://").startswith("unix://"):
    os.environ.setdefault("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
    os.environ.setdefault("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")

import docker  # type: ignore[import-untyped]
import docker.errors  # type: ignore[import-untyped]
import redis
from redis.asyncio import Redis as AsyncRedis
from testcontainers.core.container import DockerContainer

from tests.support import cassandra, images, kafka
from tests.support.process import free_port
from tests.support.waiting import wait_until

ENGINE_SECONDS = 30
"""Within which the engine has to answer."""


@functools.cache
def engine() -> Any:
    """The client of the Docker engine that ``DOCKER_HOST`` or the usual socket reaches."""
    return docker.from_env(timeout=ENGINE_SECONDS)


@functools.cache
def no_engine() -> str | None:
    """Why there is no Docker engine, or None."""
    where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    try:
        if where.startswith("unix://"):
            with socket.socket(socket.AF_UNIX) as probe:  # the client would leave its own open
                probe.connect(where.removeprefix("unix://"))
        engine().ping()
    except (OSError, docker.errors.DockerException) as error:
        return f"no Docker engine answers on {where} ({type(error).__name__})"
    return None


def has_image() -> bool:
    """The image is there."""
    return any(images.name() in image.tags for image in engine().images.list(images.REPOSITORY))


@functools.cache
def lacking(kind: str) -> str | None:
    """Why a service cannot be had in a container, or None."""
    if reason := no_engine():
        return reason
    if not has_image():
        return "its image is not there: `python -m tests.support.images` makes it"
    return None


class Container:
    """One service in a container of its own.

    Args:
        port: where it listens inside.
        command: what runs there.
        environment: for the command.
    """

    version = ""

    def __init__(self, port: int, command: list[str], **environment: str) -> None:
        made = DockerContainer(images.name()).with_bind_ports(port, self.port).with_command(command)
        made = made.with_env("PATH", f"{images.JAVA}/bin:/bin")
        for name, value in environment.items():
            made = made.with_env(name, value)
        self._made = made
        self._begun = False

    @functools.cached_property
    def port(self) -> int:
        """Of this machine, on which it is reached."""
        return free_port()

    @property
    def url(self) -> str:
        """How it is reached."""
        return f"127.0.0.1:{self.port}"

    @property
    def _container(self) -> Any:
        return self._made.get_wrapped_container()

    @property
    def log(self) -> str:
        """The end of what it said."""
        return str(self._container.logs(tail=100).decode(errors="replace"))

    async def start(self) -> Any:
        """Start it, also again after it was killed, with its data."""
        if self._begun:
            await asyncio.to_thread(self._container.start)
        else:
            await asyncio.to_thread(self._made.start)
            self._begun = True
        try:
            await wait_until(self._answers, 120, what=f"{type(self).__name__} to answer", every=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        return self

    async def _answers(self) -> bool:
        raise NotImplementedError

    async def kill9(self) -> None:
        """Kill what runs in it."""
        await asyncio.to_thread(self._container.kill)
        await asyncio.to_thread(self._container.wait, timeout=15)

    async def freeze(self) -> None:
        """Pause it: its sockets stay open, nothing is answered."""
        await asyncio.to_thread(self._container.pause)

    async def thaw(self) -> None:
        """Let it go on."""
        await asyncio.to_thread(self._container.unpause)

    async def restart(self) -> Any:
        """Kill it and start it again, with its data."""
        await self.kill9()
        return await self.start()

    def close(self) -> None:
        """Remove it, with its data."""
        if self._begun:
            self._made.stop(force=True, delete_volume=True)
            self._begun = False
        self._made.get_docker_client().client.close()


class RedisContainer(Container):
    """A Redis, each write in its append-only file before it is answered, with expired events.

    Args:
        options: of its command line.
    """

    def __init__(self, *options: str) -> None:
        command = (
            f"{images.REDIS} --port 6379 --bind 0.0.0.0 --protected-mode no --dir {images.ROOT} "
            "--appendonly yes --appendfsync no --notify-keyspace-events Ex"
        )
        super().__init__(6379, [*command.split(), *options])
        self._client = redis.Redis(**self._reached())

    @property
    def url(self) -> str:
        """How it is reached."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _reached(self) -> dict[str, Any]:
        return {"port": self.port, "decode_responses": True, "socket_timeout": 5}

    def redis(self) -> redis.Redis:
        """A client, good for all starts."""
        return self._client

    def asyncio_redis(self) -> AsyncRedis:
        """A client for asyncio, which its user closes."""
        return AsyncRedis(**self._reached())

    async def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            info: Any = await asyncio.to_thread(self._client.info, "server")
            valkey = info.get("valkey_version")
            self.version = f"Valkey {valkey}" if valkey else f"Redis {info['redis_version']}"
            return True
        return False

    def close(self) -> None:
        """Remove it, with its data."""
        self._client.close()
        super().close()


class KafkaContainer(Container):
    """A Kafka broker.

    Args:
        options: further lines of its configuration, ``name=value``.
    """

    def __init__(self, *options: str) -> None:
        self.version = kafka.version()
        text = kafka.configuration(images.ROOT, "0.0.0.0:9092", self.url, 9093, options)
        prepare, serve = map(shlex.join, kafka.commands(images.jars("kafka"), images.ROOT))
        script = (
            f'printf %s "$CONFIGURATION" >{images.ROOT / kafka.CONFIGURATION_FILE}; '
            f"[ -e {images.ROOT / kafka.FORMATTED} ] || {prepare} || exit; exec {serve}"
        )
        super().__init__(9092, [images.SHELL, "-c", script], CONFIGURATION=text)

    async def _answers(self) -> bool:
        return await kafka.answers(self.url)


class CassandraContainer(Container):
    """A Cassandra node.

    Args:
        options: further lines of its configuration, ``name: value``.
    """

    def __init__(self, *options: str) -> None:
        self.version = cassandra.version()
        files = cassandra.configuration(images.ROOT, "0.0.0.0", 9042, 7000, options)
        write = "".join(f'printf %s "$FILE_{number}" >{images.ROOT / name}; ' for number, name in enumerate(files))
        serve = shlex.join(cassandra.command(images.jars("cassandra"), images.ROOT))
        environment = {f"FILE_{number}": text for number, text in enumerate(files.values())}
        super().__init__(9042, [images.SHELL, "-c", f"{write} exec {serve}"], **environment)

    async def _answers(self) -> bool:
        return await cassandra.answers(self.url)


KINDS = {"redis": RedisContainer, "kafka": KafkaContainer, "cassandra": CassandraContainer}
