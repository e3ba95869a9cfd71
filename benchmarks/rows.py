"""The rows of the table in docs/performance.md: what the server does, beside what its stack could do at best."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from asyncio import Future
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter

from benchmarks.client import HEARTBEAT, Socket, frame, send
from benchmarks.measure import Bare, Row, Server, Servers, cpu, in_waves, pairs, percentile, rss
from presence.adapters.redis import RedisStore
from presence.core.model import Reason, Session
from tests.support.process import Process
from tests.support.server import ROOT
from tests.support.store import ValkeyProcess

KIB = 1024
Started = tuple[int, Callable[[int], Awaitable[list[Socket]]]]  # process id, and what connects so many more


def users(count: int, kind: int = 0) -> list[str]:
    """Return ids as long as a UUID is."""
    return [f"{number:08x}-0000-4000-8000-{kind:012x}" for number in range(count)]


async def sessions(server: Server, names: Sequence[str]) -> list[Socket]:
    """Connect a session of each of these users."""
    return await in_waves([partial(Socket.connect, server.port, server.token(name)) for name in names])


async def sockets(server: Bare, count: int) -> list[Socket]:
    """Connect to a baseline."""
    return await in_waves([partial(Socket.open, server.port)] * count)


async def close(opened: Sequence[Socket]) -> None:
    """Drop the connections."""
    for socket in opened:
        socket.abort()
    await asyncio.gather(*(socket.closed for socket in opened))


async def paced(opened: Sequence[Socket], data: bytes, rate: float, seconds: float) -> int:
    """Send ``data`` on one connection after the other, ``rate`` times a second. Returns how often."""
    began, sent, total = perf_counter(), 0, round(rate * seconds)
    while sent < total:
        due = min(total, int((perf_counter() - began) * rate))
        for number in range(sent, due):
            opened[number % len(opened)].write(data)
        sent = due
        await asyncio.sleep(0.002)
    return sent


# The rows


async def _heartbeats(row: Row, ours: Server, theirs: Server | Bare, of_theirs: list[Socket]) -> None:
    mine = await sessions(ours, users(1_000))
    store: list[float] = []

    async def run(server: Server | Bare, opened: list[Socket]) -> Sequence[float]:
        began, before = time.time(), cpu(server.pid)
        store_before = cpu(server.store_pid) if isinstance(server, Server) else 0.0
        sent = await paced(opened, frame(HEARTBEAT), rate=4_000, seconds=4)
        if isinstance(server, Server):
            oldest = [("", 0.0)]
            redis = server.redis()
            while oldest[0][1] < (began + 60) * 1000:  # each lease was renewed in this run
                oldest = redis.zrange("presence:deadlines", 0, 0, withscores=True)  # type: ignore[assignment]
                assert time.time() - began < 30, "heartbeats were lost"
                await asyncio.sleep(0.01)
            store.append((cpu(server.store_pid) - store_before) / sent * 1e6)
        return [sent / (cpu(server.pid) - before)]

    await pairs([row], partial(run, ours, mine), partial(run, theirs, of_theirs))
    row.notes.append(f"Redis: {percentile(store, 0.5):.1f} µs a heartbeat")


async def heartbeats() -> list[Row]:
    """4,000 heartbeats a second on 1,000 connections; each lease must have been renewed in Redis."""
    row = Row("heartbeats per CPU-second of the server, lease renewed", "/s", "≥ 0.7")
    async with Servers() as servers:
        bare = await servers.bare("drop")
        await _heartbeats(row, await servers.presence(), bare, await sockets(bare, 1_000))
    return [row]


async def uvicorn() -> list[Row]:
    """The same server under uvicorn; the baseline is it under Hypercorn."""
    beats = Row("heartbeats per CPU-second, under uvicorn (baseline: under Hypercorn)", "/s", "reported")
    connect = Row("server CPU per connect, under uvicorn (baseline: under Hypercorn)", "µs", "reported")
    async with Servers() as servers:
        ours, theirs = await servers.presence("benchmarks.under_uvicorn"), await servers.presence()
        await _heartbeats(beats, ours, theirs, await sessions(theirs, users(1_000)))
        await pairs([connect], partial(_connect, ours), partial(_connect, theirs))
    return [beats, connect]


async def memory() -> list[Row]:
    """Resident memory between 1,000 and 8,000 idle connections, of a new process each time."""
    row = Row("RSS per idle STOMP session", "KiB", "≤ 1.3")

    async def run(start: Callable[[Servers], Awaitable[Started]]) -> Sequence[float]:
        async with Servers() as servers:
            pid, more = await start(servers)
            some = await more(1_000)
            await asyncio.sleep(1)
            low = rss(pid)
            rest = await more(7_000)
            await asyncio.sleep(1)
            high = rss(pid)
            await close(some + rest)
        return [(high - low) / 7_000 / KIB]

    async def ours(servers: Servers) -> Started:
        server = await servers.presence()
        return server.pid, lambda count: sessions(server, users(count, kind=count))

    async def bare(servers: Servers) -> Started:
        server = await servers.bare("drop")
        return server.pid, partial(sockets, server)

    await pairs([row], partial(run, ours), partial(run, bare), warm_up=False)
    return [row]


async def _connect(server: Server | Bare) -> Sequence[float]:
    names = [server.token(name) for name in users(1_000, kind=1)] if isinstance(server, Server) else []
    makers = [partial(Socket.connect, server.port, token) for token in names]
    makers = makers or [partial(Socket.open, server.port)] * 1_000
    before = cpu(server.pid)
    opened = await in_waves(makers)
    used = cpu(server.pid) - before
    await close(opened)
    await asyncio.sleep(0.5)  # in which the server clears them away; not part of the figure
    return [used / len(opened) * 1e6]


async def connects() -> list[Row]:
    """1,000 connects, 50 at a time, until CONNECTED has come, or the answer to the upgrade."""
    row = Row("server CPU per connect, token check and CONNECTED included", "µs", "≤ 1.6")
    async with Servers() as servers:
        ours, bare = await servers.presence(), await servers.bare("drop")
        await pairs([row], partial(_connect, ours), partial(_connect, bare))
    return [row]


async def edges() -> list[Row]:
    """400 changes, one after the other, told to one watcher; the baseline is an echo of as many bytes."""
    rows = [
        Row("change → MESSAGE at one watcher, p50 (baseline: WebSocket echo)", "ms", "≤ 6"),
        Row("… p99", "ms", "≤ 6"),
    ]
    async with Servers() as servers:
        server, bare = await servers.presence(), await servers.bare("echo")
        [alice, bob] = await sessions(server, ["alice", "bob"])
        bob.subscribe()
        await bob.watch(["alice"])
        [echo] = await sockets(bare, 1)

        async def run(sender: Socket, receiver: Socket, *words: bytes) -> Sequence[float]:
            times = []
            for number in range(400):
                told: Future[float] = asyncio.get_running_loop().create_future()
                receiver.on_message = lambda _, now, told=told: told.set_result(now)
                began = perf_counter()
                sender.write(words[number % len(words)])
                async with asyncio.timeout(10):
                    times.append(await told - began)
                await asyncio.sleep(0.012)  # a client may send 100 frames a second
            return [percentile(times, share) * 1000 for share in (0.5, 0.99)]

        words = [send("/app/online-status", {"online": online}) for online in (False, True)]
        await pairs(rows, partial(run, alice, bob, *words), partial(run, echo, echo, words[0]))
    return rows


async def deliveries() -> list[Row]:
    """20 changes of a user whom 2,000 sessions watch; the baseline sends the same bytes to 2,000 sockets."""
    row = Row("deliveries per CPU-second, one user watched by 2,000 sessions", "/s", "≥ 0.7")
    got = 0
    text = b""
    everybody: Future[None]

    def take(message: bytes, _now: float) -> None:
        nonlocal got, text
        got, text = got + 1, message
        if got == 2_000:
            everybody.set_result(None)

    async def run(pid: int, words: Sequence[bytes], sender: Socket) -> Sequence[float]:
        nonlocal got, everybody
        before = cpu(pid)
        for number in range(20):
            got, everybody = 0, asyncio.get_running_loop().create_future()
            sender.write(words[number % len(words)])
            async with asyncio.timeout(30):
                await everybody
        return [20 * 2_000 / (cpu(pid) - before)]

    async with Servers() as servers:
        server, bare = await servers.presence(), await servers.bare("broadcast")
        [alice] = await sessions(server, ["alice"])
        watchers = await sessions(server, users(2_000))
        for watcher in watchers:
            watcher.subscribe()
        await in_waves([partial(watcher.watch, ["alice"]) for watcher in watchers])
        others = await sockets(bare, 2_000)
        for one in watchers + others:
            one.on_message = take
        words = [send("/app/online-status", {"online": online}) for online in (False, True)]
        ours = partial(run, server.pid, words, alice)
        await ours()
        await pairs([row], ours, partial(run, bare.pid, [frame(text)], others[0]))
    return [row]


async def batches() -> list[Row]:
    """400 requests of 100 ids each on 4 connections; half of the users are online."""
    row = Row("batch of 100 ids, requests per CPU-second (baseline: Quart route with the same bytes)", "/s", "≥ 0.5")
    async with Servers() as servers:
        server = await servers.presence()
        names = users(100)
        opened = await sessions(server, names)
        for one in opened[50:]:
            one.write(frame(b"DISCONNECT\n\n\0"))
        await asyncio.gather(*(one.closed for one in opened[50:]))
        body = str(names).replace("'", '"').encode()
        headers = {"content-type": "application/json"}
        answer = await server.post("/api/presence/batch", "alice", body=body, headers=headers)
        assert sum(one["isOnline"] for one in answer.json().values()) == 50
        kept = server.root / "answer"
        kept.write_bytes(answer.body)
        bare = await servers.bare("batch", ANSWER=str(kept))
        token = server.token("alice")

        async def run(target: Server | Bare) -> Sequence[float]:
            request = (
                f"POST /api/presence/batch HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n"
                f"Authorization: Bearer {token}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode() + body

            async def ask(count: int) -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
                for _ in range(count):
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                    assert head.startswith(b"HTTP/1.1 200 "), head
                    assert size == len(answer.body)
                    await reader.readexactly(size)
                writer.close()

            before = cpu(target.pid)
            await asyncio.gather(*(ask(100) for _ in range(4)))
            return [400 / (cpu(target.pid) - before)]

        await pairs([row], partial(run, server), partial(run, bare))
    return [row]


@asynccontextmanager
async def running(url: str, lease: float) -> AsyncIterator[RedisStore]:
    """The store adapter by itself."""
    store = RedisStore(url, instance="benchmark", lease=lease, amnesty=0.0, timeout=30.0)
    task = asyncio.create_task(store.run())
    try:
        yield store
    finally:
        task.cancel()
        await store.close()


async def fill(store: RedisStore, names: Sequence[str]) -> list[Session]:
    """Make a session of each of these users."""
    made = [Session(name, f"{name[:8]}-session-id-22", "web", time.monotonic(), time.monotonic()) for name in names]
    await in_waves([partial(store.connect, one, limit=50, without_lease=0) for one in made], width=1_000)
    return made


LIVE = 100_000
ENDS = 200  # of leases, in each run
WAIT = 10.0  # s that the guide's design is given beyond the end of the last lease


async def lease_ends() -> list[Row]:
    """Ends of leases while 100,000 live and 2,000 heartbeats a second go on; the baseline is on the same store."""
    rows = [
        Row(f"end of lease → MESSAGE with 100,000 leases, {share} (baseline: expired events alone)", "ms", aim)
        for share, aim in (("p50", ""), ("p99", "≤ 250 ms"), ("max", ""))
    ]
    async with Servers() as servers:
        server = await servers.presence(lease_seconds=3600, grace_seconds=1)
        redis = server.redis()
        beating = await sessions(server, users(2_000))
        [watcher] = await sessions(server, ["watcher"])
        watcher.subscribe()
        async with running(f"unix://{server.data_dir}/valkey.sock", 3600) as store:
            await fill(store, users(LIVE - len(beating), kind=1))
        listener = Process()
        servers.callback(listener.close)
        url = f"unix://{server.data_dir}/valkey.sock"
        listener.spawn([sys.executable, str(ROOT / "benchmarks/baselines/expired_events.py"), url])
        beats = asyncio.create_task(paced(beating, frame(HEARTBEAT), 2_000, 3_600))
        await _quiet(server)
        lost = 0
        round_number = 0

        async def ours() -> Sequence[float]:
            nonlocal round_number
            round_number += 1
            names = [f"leaves-{round_number}-{number}" for number in range(ENDS)]
            leaving = await sessions(server, names)
            told: dict[str, float] = {}
            done = asyncio.Event()

            def take(message: bytes, _now: float) -> None:
                for name in names:
                    if name not in told and f'"userId":"{name}","online":false'.encode() in message:
                        told[name] = time.time()
                if len(told) == ENDS:
                    done.set()

            await watcher.watch(names)
            watcher.on_message = take
            ends: dict[str, float] = {}
            for name, one in zip(names, leaving, strict=True):
                one.abort()
                ends[name] = time.time() + 3600
                while ends[name] > time.time() + 2:  # until the server has seen it go, and made a grace of its lease
                    await asyncio.sleep(random.uniform(0.0, 0.04))
                    before_end = redis.zrange(f"presence:user:{name}:sessions", 0, 0, withscores=True)
                    assert isinstance(before_end, list)
                    ends[name] = float(before_end[0][1]) / 1000
            async with asyncio.timeout(30):
                await done.wait()
            late = [(told[name] - ends[name]) * 1000 for name in names]
            return [percentile(late, 0.5), percentile(late, 0.99), max(late)]

        async def expired() -> Sequence[float]:
            nonlocal lost
            began = time.time()
            due = {f"guide:user:{number}:{began}": began + 1 + 5 * random.random() for number in range(ENDS)}
            for key, at in due.items():
                redis.set(key, "web", pxat=round(at * 1000))
            await asyncio.sleep(6 + WAIT)
            seen = dict(line.split() for line in listener.log.splitlines() if line.startswith("guide:"))
            redis.delete(*due)
            lost += sum(key not in seen for key in due)
            late = [(float(seen[key]) - at) * 1000 if key in seen else WAIT * 1000 for key, at in due.items()]
            return [percentile(late, 0.5), percentile(late, 0.99), max(late)]

        await pairs(rows, ours, expired, warm_up=False)
        beats.cancel()
        total = ENDS * len(rows[0].base)
        rows[0].notes.append(f"baseline: {lost} of {total} not told within {WAIT:.0f} s, and counted as that")
    return rows


async def _quiet(server: Server) -> None:
    """Wait until the server has worked off what it was given."""
    began = time.monotonic()
    while True:
        before = cpu(server.pid)
        await asyncio.sleep(1)
        if cpu(server.pid) - before < 0.5:
            return
        assert time.monotonic() - began < 120, "the server does not come to rest"


async def _refresh(store: RedisStore, some: Sequence[Session]) -> None:
    await asyncio.gather(*(store.refresh(one) for one in some))


async def _leave_and_come(store: RedisStore, some: Sequence[Session]) -> None:
    now = time.monotonic()
    await asyncio.gather(*(store.end(one, Reason.DISCONNECTED, now) for one in some))
    await asyncio.gather(*(store.connect(one, limit=50, without_lease=0) for one in some))


async def _read(store: RedisStore, some: Sequence[Session]) -> None:
    for start in range(0, len(some), 100):
        await store.read([one.user for one in some[start : start + 100]])


async def _sweep(store: RedisStore, some: Sequence[Session]) -> None:
    for _ in some:
        await store.sweep(0)


WORK = {
    "Redis CPU per heartbeat": _refresh,
    "Redis CPU per leave and connect": _leave_and_come,
    "Redis CPU per status read": _read,
    "Redis CPU per sweep with nothing due": _sweep,
}


async def store_costs() -> list[Row]:
    """Memory and CPU of Redis with 1,000 and with 100,000 sessions, one a user; the baseline is 1,000."""
    store_process = ValkeyProcess("--appendonly", "no", "--save", "")
    redis = (await store_process.start()).redis()

    def used() -> float:
        return float(redis.info("memory")["used_memory"])

    found: dict[str, list[float]] = {}
    try:
        for count in (1_000, 100_000):
            redis.flushall()
            redis.config_resetstat()
            async with running(store_process.url, 3600) as store:
                await store.sweep(0)
                empty = used()
                made = await fill(store, users(count))
                redis.delete("presence:changes")  # trimmed after a minute
                found.setdefault("Redis memory per online session", []).append((used() - empty) / count / KIB)
                watching = made[:1_000]
                before = used()
                for one in watching:
                    one.watched = set(users(100, kind=2))
                await in_waves([partial(store.record_watches, one) for one in watching])
                found.setdefault("Redis memory per watch", []).append((used() - before) / 100_000 / KIB)
                some = random.sample(made, 1_000)
                for what, work in WORK.items():
                    times = []
                    for _ in range(5):
                        before = cpu(store_process.pid)
                        await work(store, some)
                        times.append((cpu(store_process.pid) - before) / 1_000 * 1e6)
                    found.setdefault(what, []).append(percentile(times, 0.5))
    finally:
        store_process.close()
    rows = []
    for what, (at_1_000, at_100_000) in found.items():
        unit = "KiB" if "memory" in what else "µs"
        aim = "≤ 1.25 KiB; flat" if what == "Redis memory per online session" else "flat"
        rows.append(Row(f"{what}, 100,000 sessions (baseline: 1,000)", unit, aim, [at_100_000], [at_1_000]))
    return rows


async def churn() -> list[Row]:
    """100,000 connects and ends, half of them clean; the baseline is the memory after the first 20,000."""
    row = Row("RSS after 100,000 connections have come and gone (baseline: after 20,000)", "MiB", "flat")
    async with Servers() as servers:
        server = await servers.presence()
        tokens = [server.token(name) for name in users(500)]
        for number in range(200):
            opened = await in_waves([partial(Socket.connect, server.port, token) for token in tokens])
            for one in opened[::2]:
                one.write(frame(b"DISCONNECT\n\n\0"))
            await asyncio.gather(*(one.closed for one in opened[::2]))
            await close(opened[1::2])
            if number == 39:
                row.base.append(rss(server.pid) / KIB**2)
        row.ours.append(rss(server.pid) / KIB**2)
    return [row]


ROWS = {
    row.__name__: row
    for row in (heartbeats, memory, connects, edges, deliveries, lease_ends, batches, store_costs, uvicorn, churn)
}
