"""What every test may ask for: real servers, stores and clients, and users of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import hypothesis
import pytest
import pytest_asyncio
from _pytest.terminal import TerminalReporter  # what the hook's argument is; pytest names it nowhere else

pytest.register_assert_rewrite("tests.support")

from tests.support import services, versions  # noqa: E402 - its asserts are to be rewritten
from tests.support.deployment import Deployment  # noqa: E402
from tests.support.raw_websocket import RawWebSocket  # noqa: E402
from tests.support.redis_cluster import RedisClusterProcess  # noqa: E402
from tests.support.sentinel import SentinelProcess  # noqa: E402
from tests.support.server import ServerProcess, running  # noqa: E402
from tests.support.stomp_client import StompClient  # noqa: E402
from tests.support.store import ValkeyProcess  # noqa: E402
from tests.support.tls_store import TlsRedisProcess, tls_binary  # noqa: E402

# How long an example takes depends on what else the machine does. A failing one is printed, so that it can be repeated.
hypothesis.settings.register_profile("presence", deadline=None, print_blob=True)
hypothesis.settings.load_profile("presence")


def pytest_collection_finish() -> None:
    """Let no garbage collection go through four thousand tests: it takes a quarter of a second of some test's time."""
    gc.collect()
    gc.freeze()


# Services that the whole run shares, and those of one test.


@pytest.fixture(scope="session")
def kafka() -> services.Kept:
    """The Kafka of this test run (`url`: its bootstrap address); each test has topics of its own."""
    return _shared("kafka")


@pytest.fixture(scope="session")
def cassandra() -> services.Kept:
    """The Cassandra of this test run (`url`: its contact point); each test has a keyspace of its own."""
    return _shared("cassandra")


@pytest_asyncio.fixture
async def start_kafka() -> AsyncIterator[StartService]:
    """Start brokers for this test alone, which may kill and freeze them."""
    async with _starting("kafka") as start:
        yield start


@pytest_asyncio.fixture
async def start_cassandra() -> AsyncIterator[StartService]:
    """Start Cassandra nodes for this test alone, which may kill and freeze them."""
    async with _starting("cassandra") as start:
        yield start


@pytest_asyncio.fixture
async def start_container() -> AsyncIterator[StartService]:
    """Start services for this test alone in containers: ``redis``, ``kafka`` or ``cassandra``, and its options."""
    async with _starting(provider="container") as start:
        yield start


@pytest_asyncio.fixture
async def start_cluster() -> AsyncIterator[Callable[..., Awaitable[RedisClusterProcess]]]:
    """Start Redis Clusters of three primaries, with ``replicas=True`` and a replica of each."""
    async with _closing(RedisClusterProcess) as start:
        yield start


@pytest_asyncio.fixture
async def start_sentinel() -> AsyncIterator[Callable[..., Awaitable[SentinelProcess]]]:
    """Start pairs of a primary and its replica under three sentinels."""
    async with _closing(SentinelProcess) as start:
        yield start


@pytest_asyncio.fixture
async def start_tls() -> AsyncIterator[Callable[..., Awaitable[TlsRedisProcess]]]:
    """Start Redis servers that speak TLS only and have an ACL."""
    if tls_binary() is None:
        pytest.skip("Redis with TLS: there is no redis-server on PATH that was built with it")
    async with _closing(TlsRedisProcess) as start:
        yield start


class StartService(Protocol):
    def __call__(self, *options: str) -> Awaitable[services.Service]: ...


def _shared(kind: str) -> services.Kept:
    try:
        kept = _run[0].shared(kind)
    except services.Lacking as reason:
        pytest.skip(str(reason))
    versions.note(kind.capitalize(), f"{kept.version} ({kept.provider})")
    return kept


@asynccontextmanager
async def _starting(*first: str, provider: str | None = None) -> AsyncIterator[StartService]:
    started: list[services.Service] = []

    async def start(*options: str) -> services.Service:
        kind, *more = *first, *options
        try:
            by = provider or services.provider_of(kind)
        except services.Lacking as reason:
            pytest.skip(str(reason))
        if lacks := services.lacking(kind, by):
            pytest.skip(f"{kind.capitalize()} as a {by}: {lacks}")
        service = services.make(kind, *more, provider=by)
        started.append(service)
        await service.start()
        versions.note(kind.capitalize(), f"{service.version} ({by})")
        return service

    try:
        yield start
    finally:
        for service in started:
            service.close()


@asynccontextmanager
async def _closing(kind: Callable[..., Any]) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    started = []

    async def start(*options: Any, **more: Any) -> Any:
        started.append(kind(*options, **more))
        return await started[-1].start()

    try:
        yield start
    finally:
        for one in started:
            one.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a loaded machine a Java server takes its time to start."""
    slow = {"kafka", "cassandra", "start_kafka", "start_cassandra", "start_container"}
    for item in items:
        if slow.intersection(getattr(item, "fixturenames", ())) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(180))


_run: list[services.Run] = []


def pytest_configure(config: pytest.Config) -> None:
    _run.append(services.Run.join() if hasattr(config, "workerinput") else services.Run.begin())


def pytest_unconfigure(config: pytest.Config) -> None:
    while _run:
        _run.pop().end()


# Servers, stores, clients.


class StartServer(Protocol):
    def __call__(self, *, ready: bool = True, **settings: Any) -> Awaitable[ServerProcess]: ...


class Connect(Protocol):
    def __call__(self, server: ServerProcess, user: str | None = None, **options: Any) -> Awaitable[StompClient]: ...


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[ServerProcess]:
    """A server with a lease of 2 s and an embedded store, shared by the tests of a module, each with its own users."""
    async with running(lease_seconds=2) as process:
        yield process


@pytest_asyncio.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Start servers for this test alone, with a lease of 2 s and whatever settings are given (see `ServerProcess`).

    With ``ready=False`` it is not waited for. At the end each that runs is stopped, which must go well.
    """
    processes: list[ServerProcess] = []

    async def start(*, ready: bool = True, **settings: Any) -> ServerProcess:
        process = ServerProcess(**{"lease_seconds": 2} | settings)
        processes.append(process)
        process.start()
        return await process.ready() if ready else process

    yield start
    try:
        # The last one first: a server may live on the data folder of one before it.
        for process in reversed(processes):
            await process.finish()
    finally:
        for process in processes:
            process.close()


@pytest_asyncio.fixture
async def valkey() -> AsyncIterator[Callable[..., Awaitable[ValkeyProcess]]]:
    """Start outside stores, of which a server is told with ``redis_url=store.url``."""
    processes: list[ValkeyProcess] = []

    async def start(*options: str) -> ValkeyProcess:
        process = ValkeyProcess(*options)
        processes.append(process)
        return await process.start()

    yield start
    for process in processes:
        process.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_valkey() -> AsyncIterator[ValkeyProcess]:
    """An outside store, set up as the guide says, shared by the tests of a module, each of which empties it."""
    process = ValkeyProcess("--notify-keyspace-events", "Ex", "--enable-debug-command", "local")
    yield await process.start()
    process.close()


@pytest.fixture
def partitions() -> int:
    """Of the keys of a `deployment`. A module runs over several by a fixture of its own with this name."""
    return 1


@pytest_asyncio.fixture
async def deployment(shared_valkey: ValkeyProcess, partitions: int) -> AsyncIterator[Deployment]:
    """Instances of the store adapter, on an empty store."""
    stores = Deployment(shared_valkey, partitions)
    yield stores
    await stores.close()


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connect clients: a server, a user, and the options of `StompClient.connect`, ``url`` and ``token`` too."""
    clients: list[StompClient] = []

    async def connect_one(server: ServerProcess, user: str | None = None, **options: Any) -> StompClient:
        url = options.pop("url", server.ws)
        token = options.pop("token", server.token(user) if user else None)
        client = await StompClient.connect(url, token, **options)
        clients.append(client)
        return client

    yield connect_one
    for client in clients:
        await client.dispose()


@pytest_asyncio.fixture
async def raw() -> AsyncIterator[Callable[..., Awaitable[RawWebSocket]]]:
    """Connect by hand: the arguments of `RawWebSocket.connect`."""
    sockets: list[RawWebSocket] = []

    async def connect_one(url: str, headers: Any = None, **options: Any) -> RawWebSocket:
        sockets.append(await RawWebSocket.connect(url, headers, **options))
        return sockets[-1]

    yield connect_one
    for one in sockets:
        one.abort()
    await asyncio.sleep(0)  # in which the transports are closed


@pytest.fixture
def users() -> Callable[[str], str]:
    """Makes ids of users whom no other test knows: ``users("alice")``."""
    return lambda name: f"{name}-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def user(users: Callable[[str], str]) -> str:
    """The id of a user whom no other test knows."""
    return users("user")


@pytest.fixture(autouse=True)
def _server_logs() -> Iterator[None]:
    """No test may have made a server log a traceback, unless it said so."""
    yield
    for process in ServerProcess.alive:
        process.check_log()


# Reports.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _no_skip(report)
    if report.failed:
        for process in ServerProcess.alive:
            report.sections.append((f"the end of the log of the server on port {process.port}", process.log[-20_000:]))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _no_skip(report)
    return report


def _no_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """With PRESENCE_TEST_REQUIRE=all, as in CI, a skip is a failure. An expected failure is none."""
    if os.environ.get("PRESENCE_TEST_REQUIRE") == "all" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"{reason}\nPRESENCE_TEST_REQUIRE=all: nothing may be skipped"


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["versions"] = versions.dump()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of pytest-xdist's workers has ended: take over what it met."""
    versions.merge(getattr(node, "workeroutput", {}).get("versions", {}))


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    terminalreporter.section("tested with")
    for line in versions.lines():
        terminalreporter.line(line)
