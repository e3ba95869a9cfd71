"""The composition root: which adapter serves which port, and what runs in which process (DESIGN §5, §8)."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import multiprocessing
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config

from presence import jobs, stomp
from presence.adapters.directory import DirectoryError, FileDirectory, demo_path
from presence.adapters.embedded import AlreadyRunning, DataDirError, EmbeddedError, EmbeddedStore, end_with, locked
from presence.adapters.redis import RedisStore
from presence.adapters.sqlite import SqliteHistory
from presence.core.model import Change
from presence.fanout import Fanout
from presence.logs import configure_logging
from presence.ports import Directory, Health, HistoryStore, Sink, StoreUnavailable, Unavailable
from presence.relay import Relay
from presence.server.app import create_app
from presence.server.auth import KeysUnavailable, SecretError, TokenVerifier, make_token, secret_of
from presence.server.budget import IdBudget
from presence.server.listener import BACKLOG, ListenerConfig
from presence.server.origins import Origins, is_loopback
from presence.server.rest import presence_api
from presence.server.transport import log_dropped
from presence.server.websocket import ASGIApp, Endpoint, EndpointLimits
from presence.service import PresenceService, Rules
from presence.settings import Settings

# The libraries of what is not set up are not loaded: they take a quarter of a start's CPU.
if TYPE_CHECKING:
    from presence.adapters.cassandra import CassandraSession
    from presence.adapters.http_directory import HttpDirectory
    from presence.adapters.kafka import KafkaBus

log = logging.getLogger(__name__)

SPARE_FILES = 512  # open files left to all but clients
RESTART_SECONDS = 1.0  # pause before something that ended is started again
LAG_SECONDS = 5.0  # between two looks how far the sinks are behind
REVISE_SECONDS = 2.0  # between two looks whether somebody may still be seen
STOP_SECONDS = 5.0  # for closing all sockets at a planned stop
GC_THRESHOLDS = (10_000, 4, 1_000)
"""Of the garbage collector. At Python's 700 new objects it takes a fifth of a connect. Of the middle generation 40,000
take some 30 ms; all of them, with 15,000 sessions, seconds in which nobody is served, and a closed connection leaves
nothing that needs it (`server.transport`): so it is to come as rarely as never."""


class StartError(Exception):
    """The server cannot start. One line; ``code`` is the exit code, 2 for a wrong setting."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


# The `presence` command


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, with the embedded store and the workers that the settings ask for.

    Raises:
        StartError: it cannot.
    """
    keeps_data = not (settings.redis_url and settings.cassandra_contact_points)  # else nothing but a secret is there
    with _start_errors(), locked(settings.data_dir) if keeps_data else nullcontext():
        if settings.directory != "cassandra" and "://" not in (settings.directory or ""):
            _file_directory(settings)  # what would fail in every instance fails here, once
        _verifier(settings)
        sock = _listen(settings, shared=settings.workers > 1)
        store = None if settings.redis_url else EmbeddedStore(settings.data_dir)
        if store:
            store.start()
        try:
            asyncio.run(_main(settings, sock, store))
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # it stops already, and the store is to save its data
            if store:
                store.stop()


def token(settings: Settings, user: str, ttl_seconds: float) -> str:
    """Return a token for ``user`` that a server with these settings accepts."""
    if settings.jwks is not None:
        raise StartError("PRESENCE_JWKS is set: tokens are made by whoever has its private keys", 2)
    with _start_errors():
        secret = secret_of(settings.jwt_secret, settings.data_dir)
    return make_token(secret, user, ttl_seconds, settings.jwt_issuer, settings.jwt_audience, now=time.time())


async def cleanup(settings: Settings) -> Mapping[str, int]:
    """Run the cleanup once, beside the running server; return how many of each kind were repaired."""
    url = settings.redis_url or EmbeddedStore(settings.data_dir).url
    with _start_errors():
        try:
            async with _parts(settings, url, name="cleanup") as parts:
                if parts.cassandra:
                    await parts.cassandra.connect()
                return await _service(settings, parts).cleanup()
        except StoreUnavailable as error:
            hint = "see PRESENCE_REDIS_URL" if settings.redis_url else f"is the server of {settings.data_dir} running?"
            raise StartError(f"no stores to clean up, {hint} {error}") from None


async def init(settings: Settings, *, partitions: int, replication: int, retention_seconds: float) -> Sequence[str]:
    """Make the topic, the keyspace and the tables that are missing; return a line for each.

    Raises:
        StartError: nothing is set up that would need it, or it cannot be reached.
    """
    done = []
    try:
        if bus := _bus(settings):
            try:
                await bus.create_topic(partitions, round(retention_seconds * 1000), replication)
            finally:
                await bus.close()
            done.append(f"topic {settings.kafka_topic} is there")
        if cassandra := _cassandra(settings):
            strategy = {"class": "NetworkTopologyStrategy", settings.cassandra_datacenter: replication}
            try:
                await cassandra.create_schema(strategy)
            finally:
                await cassandra.close()
            done.append(f"keyspace {settings.cassandra_keyspace} and its tables are there")
    except Unavailable as error:
        raise StartError(str(error)) from None
    if not done:
        raise StartError(
            "nothing to do without PRESENCE_KAFKA_BOOTSTRAP_SERVERS or PRESENCE_CASSANDRA_CONTACT_POINTS", 2
        )
    return done


async def history(settings: Settings, user: str, limit: int) -> Sequence[Change]:
    """Return the user's last changes, the newest first.

    Raises:
        StartError: the history store cannot be asked.
    """
    if not settings.cassandra_contact_points and not (settings.data_dir / "history.db").exists():
        raise StartError(f"no history in {settings.data_dir}: see PRESENCE_DATA_DIR")
    try:
        async with _history(settings) as (store, cassandra):
            if cassandra:
                await cassandra.connect()
            return await store.changes(user, limit)
    except Unavailable as error:
        raise StartError(str(error)) from None


@contextmanager
def _start_errors() -> Iterator[None]:
    """Name the setting behind an error."""
    try:
        yield
    except DirectoryError as error:
        raise StartError(f"PRESENCE_DIRECTORY: {error}", 2) from None
    except SecretError as error:
        raise StartError(f"PRESENCE_JWT_SECRET: {error}", 2) from None
    except KeysUnavailable as error:
        raise StartError(f"PRESENCE_JWKS: {error}", 2) from None
    except DataDirError as error:
        raise StartError(str(error), 2) from None
    except AlreadyRunning as error:
        raise StartError(f"PRESENCE_DATA_DIR: {error}") from None
    except (EmbeddedError, Unavailable) as error:
        raise StartError(str(error)) from None


# Processes


async def _main(settings: Settings, sock: socket.socket, store: EmbeddedStore | None) -> None:
    """Run the one instance here, or several in processes of their own; keep the embedded store alive."""
    url = settings.redis_url or (store.url if store else "")
    if not settings.cassandra_contact_points:
        await (await _open_history(settings)).close()  # as in `serve`: fails here, once
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    keeper = asyncio.create_task(_keep(store)) if store else None
    host, port = sock.getsockname()[:2]
    where = "an embedded Valkey" if store else "PRESENCE_REDIS_URL"
    log.info("presence server on http://%s:%d, store: %s, data: %s", host, port, where, settings.data_dir)
    try:
        if settings.workers == 1:
            await _instance(settings, url, sock, stop)
        else:
            sock.close()
            await _supervise(settings, url, stop)
    finally:
        if keeper:
            keeper.cancel()


async def _keep(store: EmbeddedStore) -> None:
    while True:
        await store.wait()
        log.error("the embedded store has died; it is started again")
        try:
            store.start()
        except (EmbeddedError, OSError) as error:
            log.error("%s", error)
        await asyncio.sleep(RESTART_SECONDS)


async def _supervise(settings: Settings, url: str, stop: asyncio.Event) -> None:
    """Keep the workers alive; end them when asked to."""
    context = multiprocessing.get_context("spawn")

    def start() -> BaseProcess:
        worker = context.Process(target=_worker, args=(settings, url))
        worker.start()
        return worker

    workers = [start() for _ in range(settings.workers)]
    while not stop.is_set():
        for index, worker in enumerate(workers):
            if not worker.is_alive():
                log.error("worker %s has ended with %s; another is started", worker.pid, worker.exitcode)
                workers[index] = start()
        with suppress(TimeoutError):
            async with asyncio.timeout(RESTART_SECONDS):
                await stop.wait()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        await asyncio.to_thread(worker.join, 2 * STOP_SECONDS + settings.store_timeout_seconds)
        worker.kill()


def _worker(settings: Settings, url: str) -> None:
    parent = multiprocessing.parent_process()
    end_with(parent.pid if parent and parent.pid else 0)
    configure_logging(settings.log_level, settings.log_format)

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C reaches all; the main process says when
        await _instance(settings, url, _listen(settings, shared=True), stop)

    try:
        with _start_errors():
            asyncio.run(run())
    except StartError as error:
        log.error("%s", error)
        sys.exit(error.code)


# One instance


@dataclass(frozen=True)
class _Parts:
    """The adapters of one instance."""

    store: RedisStore
    history: HistoryStore
    directory: Directory
    bus: KafkaBus | None
    cassandra: CassandraSession | None
    http: HttpDirectory | None
    """The directory, if it is the host application over HTTP."""

    @property
    def sinks(self) -> Sequence[Sink]:
        return [self.history, *([self.bus] if self.bus else [])]

    @property
    def health(self) -> Mapping[str, Health]:
        parts = {"store": self.store.health, "history": self.history.health}
        parts |= {"bus": self.bus.health} if self.bus else {}
        return parts | ({"directory": self.http.health} if self.http else {})


@asynccontextmanager
async def _parts(settings: Settings, url: str, name: str) -> AsyncIterator[_Parts]:
    async with AsyncExitStack() as stack:
        store = RedisStore(
            url,
            instance=name,
            partitions=settings.redis_partitions,
            lease=settings.lease_seconds,
            amnesty=settings.amnesty_seconds,
            amnesty_at_start=None if settings.redis_url else 0.0,
            watch_ttl=max(1.0, 2 * settings.cleanup_seconds),
            timeout=settings.store_timeout_seconds,
        )
        stack.push_async_callback(store.close)
        history, cassandra = await stack.enter_async_context(_history(settings))
        directory: Directory
        http: HttpDirectory | None = None
        if settings.directory == "cassandra" and cassandra:
            from presence.adapters.cassandra import CassandraDirectory

            directory = CassandraDirectory(cassandra, cache=settings.directory_cache_seconds)
        elif settings.directory and "://" in settings.directory:
            from presence.adapters.http_directory import HttpDirectory

            limits = {"timeout": settings.store_timeout_seconds, "cache": settings.directory_cache_seconds}
            directory = http = HttpDirectory(settings.directory, **limits)
            stack.push_async_callback(http.close)
        else:
            directory = _file_directory(settings)
        bus = _bus(settings)
        if bus:
            stack.push_async_callback(bus.close)
        yield _Parts(store, history, directory, bus, cassandra, http)


def _service(settings: Settings, parts: _Parts) -> PresenceService:
    rules = Rules(
        lease=settings.lease_seconds,
        grace=settings.grace_seconds,
        drain=settings.drain_seconds,
        renewed_by_connection=settings.lease_renewed_by == "connection",
        contacts_only=settings.watch_policy == "contacts",
        user_connections=settings.max_user_connections,
    )
    return PresenceService(parts.store, parts.history, parts.directory, Fanout(), rules)


def _cassandra(settings: Settings) -> CassandraSession | None:
    if not settings.cassandra_contact_points:
        return None
    from presence.adapters.cassandra import DIRECTORY_TABLES, HISTORY_TABLES, CassandraSession

    return CassandraSession(
        settings.cassandra_contact_points,
        keyspace=settings.cassandra_keyspace,
        datacenter=settings.cassandra_datacenter,
        user=settings.cassandra_user,
        password=settings.cassandra_password,
        timeout=settings.store_timeout_seconds,
        tables=(*HISTORY_TABLES, *(DIRECTORY_TABLES if settings.directory == "cassandra" else ())),
    )


@asynccontextmanager
async def _history(settings: Settings) -> AsyncIterator[tuple[HistoryStore, CassandraSession | None]]:
    """Open the history store; with it what it is in, if that is Cassandra, which is still to be connected."""
    if cassandra := _cassandra(settings):
        from presence.adapters.cassandra import CassandraHistory

        try:
            yield CassandraHistory(cassandra, history_days=settings.history_days), cassandra
        finally:
            await cassandra.close()
    else:
        sqlite = await _open_history(settings)
        try:
            yield sqlite, None
        finally:
            await sqlite.close()


def _bus(settings: Settings) -> KafkaBus | None:
    if not settings.kafka_bootstrap_servers:
        return None
    from presence.adapters.kafka import KafkaBus

    servers = settings.kafka_bootstrap_servers
    return KafkaBus(servers, topic=settings.kafka_topic, timeout=settings.store_timeout_seconds)


def _file_directory(settings: Settings) -> FileDirectory:
    return FileDirectory(Path(settings.directory) if settings.directory else demo_path())


async def _instance(settings: Settings, url: str, sock: socket.socket, stop: asyncio.Event) -> None:
    """Serve on the socket until ``stop``, then stop as planned (WIRE §4)."""
    asyncio.get_running_loop().set_exception_handler(log_dropped)
    gc.freeze()  # what is there now stays
    gc.set_threshold(*GC_THRESHOLDS)
    async with _parts(settings, url, name=secrets.token_hex(8)) as parts:
        service = _service(settings, parts)
        verifier = _verifier(settings)
        origins = Origins(settings.allowed_origins, loopback_only=is_loopback(settings.host))
        budget = IdBudget(settings.max_ids_per_second, settings.max_ids_burst)
        api = presence_api(service, verifier, budget, settings.max_ids_per_request)
        app = create_app(api, origins, parts.health, settings.max_body_bytes)
        endpoint = Endpoint(cast("ASGIApp", app.asgi_app), service, verifier, origins, budget, _limits(settings))
        app.asgi_app = endpoint  # type: ignore[method-assign, assignment]
        closed = asyncio.Event()
        tasks = [asyncio.create_task(_lasting(job, name)) for name, job in _jobs(settings, parts, service, endpoint)]
        server = asyncio.create_task(hypercorn_serve(app, _config(settings, sock), shutdown_trigger=closed.wait))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({server, stopping}, return_when=asyncio.FIRST_COMPLETED)
        app.config["STOPPING"] = True
        await endpoint.stop(STOP_SECONDS)
        closed.set()
        await server
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:], timeout=STOP_SECONDS)
        await parts.store.flushed()
        tasks[0].cancel()  # the store's own work last


def _jobs(
    settings: Settings, parts: _Parts, service: PresenceService, endpoint: Endpoint
) -> Sequence[tuple[str, Callable[[], Awaitable[object]]]]:
    """Return what runs beside the connections, the store's own work first."""
    store, bus = parts.store, parts.bus
    work: list[tuple[str, Callable[[], Awaitable[object]]]] = [("store", store.run)]

    def every(seconds: float, name: str, job: Callable[[], Awaitable[object]], *, shared: bool = False) -> None:
        if shared:  # one instance of those that share the history
            job = partial(jobs.on_one_instance, store, f"{name}.{service.history.name}", 1.5 * seconds, job)
        work.append((name, partial(jobs.every, seconds, job, name)))

    work.append(("watch records", service.records.run))
    if settings.redis_url:
        work.append(("redis check", partial(_check_redis, store)))
    if parts.cassandra:
        work.append(("cassandra", parts.cassandra.run))
    if bus:
        work.append(("bus", partial(jobs.follow_bus, service, bus)))
        work.append(("bridge", partial(jobs.bridge_bus, service, bus, settings.kafka_fallback_seconds)))
    for partition in range(store.partitions):
        work.append((f"sweep {partition}", partial(jobs.sweep, service, partition)))
        relays = [Relay(store, sink, partition) for sink in parts.sinks]
        work += [(f"relay {partition} to {sink.name}", one.run) for sink, one in zip(parts.sinks, relays, strict=True)]

        def wake(relays: Sequence[Relay] = relays) -> None:
            for one in relays:
                one.wake()

        follow = partial(jobs.follow, service, partition, bus, settings.kafka_fallback_seconds, wake)
        work.append((f"follow {partition}", follow))
    every(settings.cleanup_seconds, "cleanup", partial(jobs.cleanup, service), shared=True)
    every(settings.stats_seconds, "stats", partial(jobs.stats, service))
    every(settings.cleanup_seconds, "watches", partial(jobs.renew_watches, service))
    every(LAG_SECONDS, "lag", partial(jobs.lag, store, parts.sinks, bus))
    every(10.0, "trim", partial(store.trim, settings.changes_keep_seconds, settings.changes_cap))
    if settings.lease_renewed_by == "connection":
        every(settings.lease_seconds / 3, "renewal", partial(jobs.renew_open_sessions, service))
    if settings.watch_policy == "contacts":
        every(REVISE_SECONDS, "revision", endpoint.revise)
    return work


async def _check_redis(store: RedisStore) -> None:
    """Say once what is wrong with the settings of Redis, as soon as it can be asked."""
    while True:
        try:
            for line in await store.check():
                log.warning("PRESENCE_REDIS_URL: %s", line)
            break
        except Unavailable:
            await asyncio.sleep(RESTART_SECONDS)
    await asyncio.Event().wait()  # a job does not end


async def _lasting(job: Callable[[], Awaitable[object]], name: str) -> None:
    """Run a job that should not end; when it does all the same, say so and start it again."""
    while True:
        try:
            await job()
            log.error("%s has ended; it is started again", name)
        except Exception:
            log.exception("%s has failed; it is started again", name)
        await asyncio.sleep(RESTART_SECONDS)


def _limits(settings: Settings) -> EndpointLimits:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return EndpointLimits(
        frames=stomp.Limits(
            frame_bytes=settings.max_frame_bytes,
            header_lines=settings.max_header_lines,
            header_line_bytes=settings.max_header_line_bytes,
            subscriptions=settings.max_subscriptions,
            held_sends=settings.max_held_sends,
            frames_per_second=settings.max_frames_per_second,
            frames_burst=settings.max_frames_burst,
            connect_seconds=settings.connect_seconds,
        ),
        connections=settings.max_connections or max(1, files - SPARE_FILES),
        ids=settings.max_ids_per_request,
        watches=settings.max_watches,
        subscribes_per_second=settings.max_subscribes_per_second,
        send_seconds=settings.send_seconds,
        beat_seconds=settings.beat_seconds,
        silence_seconds=settings.silence_seconds,
        ping_seconds=settings.ping_seconds,
    )


def _config(settings: Settings, sock: socket.socket) -> Config:
    config = ListenerConfig()
    config.bind = [f"fd://{sock.detach()}"]
    config.websocket_max_message_size = settings.max_message_bytes
    config.graceful_timeout = 1.0
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn")
    return config


async def _open_history(settings: Settings) -> SqliteHistory:
    return await SqliteHistory.open(
        settings.data_dir / "history.db",
        timeout_seconds=settings.store_timeout_seconds,
        history_days=settings.history_days,
    )


def _verifier(settings: Settings) -> TokenVerifier:
    secret = None if settings.jwks else secret_of(settings.jwt_secret, settings.data_dir)
    issuer, audience = settings.jwt_issuer, settings.jwt_audience
    return TokenVerifier(secret=secret, jwks=settings.jwks, issuer=issuer, audience=audience)


def _listen(settings: Settings, *, shared: bool) -> socket.socket:
    """Return a bound socket; ``shared``: each worker has one of its own, so that connections spread (DESIGN §5)."""
    try:
        families = {found[0] for found in socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)}
        sock = socket.socket(min(families), socket.SOCK_STREAM)  # IPv4 if there is one: `localhost` has both
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no host name"
        raise StartError(f"PRESENCE_HOST={settings.host}: {reason}", 2) from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared and multiprocessing.parent_process() is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sys.platform == "linux":
        # Hypercorn pings and never looks for the answer: so the kernel does. Accepted sockets inherit it (DESIGN §6).
        timeout_ms = round(settings.tcp_user_timeout_seconds * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    try:
        sock.bind((settings.host, settings.port))
        if not shared:
            sock.listen(BACKLOG)  # now, as SO_REUSEADDR lets two sockets have a port until one of them listens
    except OSError as error:
        sock.close()
        code = 1 if error.errno == errno.EADDRINUSE else 2
        reason = os.strerror(error.errno or 0).lower()
        message = f"PRESENCE_HOST={settings.host} PRESENCE_PORT={settings.port}: {reason}"
        raise StartError(message, code) from None
    return sock
