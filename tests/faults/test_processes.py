"""Processes that end: clients, servers, workers, the main process; by a kill, and as planned (WIRE §4, DESIGN §5)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.conftest import Connect, StartServer
from tests.support.server import ROOT, ServerProcess, environment
from tests.support.stomp_client import StompClient
from tests.support.truth import Truth, last_seen, nothing_more, wait_row
from tests.support.waiting import wait_until
from tests.support.witness import changes_told, told_truly

LEASE = 2.0
SLACK = 2.0
"""Room for a loaded machine, s."""
ENDED = 15.0
"""By then whatever is to end has ended, s: the time limits of a stop, and a bit."""


def workers_of(server: ServerProcess) -> list[int]:
    """The ids of the processes that serve, of a server with several workers."""
    return [pid for pid in server.family() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def valkeys_of(server: ServerProcess) -> list[int]:
    return [pid for pid, name in server.family().items() if name.startswith("valkey")]


def connections_of(pid: int, port: int) -> int:
    """How many open connections to the port the process has."""
    sockets = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "01"
    }
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            count += bool(found and found[1] in sockets)
    return count


async def start_workers(start_server: StartServer, **settings: Any) -> ServerProcess:
    """A server with two workers, both of which listen."""
    server = await start_server(workers=2, **settings)
    await wait_until(lambda: listening(server.port) == 2, 15, what="both workers to listen")
    return server


def listening(port: int) -> int:
    """How many sockets listen on the port."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines)


async def beat_all(clients: Iterable[StompClient]) -> contextlib.AsyncExitStack:
    stack = contextlib.AsyncExitStack()
    for client in clients:
        await stack.enter_async_context(client.beating(0.4))
    return stack


# Clients

CLIENT = """
import asyncio, sys
from tests.support.stomp_client import StompClient

async def main():
    client = await StompClient.connect(sys.argv[1], sys.argv[2])
    async with client.beating(0.3):
        print("connected", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_client_that_is_killed_is_offline_at_once(server, connect: Connect, users):
    """WIRE §4: "close without DISCONNECT, lost TCP connection [...] | [...] (default 0: ended at once)"."""
    killed = users("killed")
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, server.ws, server.token(killed),
        env=environment({}), stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 15) == b"connected\n"
        assert (await watcher.watch([killed]))[killed]["online"] is True
        process.kill()
        await watcher.expect_event(killed, False, LEASE - 0.5)  # not by its lease
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    assert Truth(server).changes(killed) == [(True, "connected"), (False, "disconnected")]


async def test_two_hundred_sockets_that_close_while_they_connect_leave_nothing(server, connect: Connect, users):
    """DESIGN §3.5: "A connect whose outcome is unknown (time-out, cancelled) is followed by an end"."""
    names = [users("hasty") for _ in range(200)]
    watcher = await connect(server, users("watcher"))
    async with watcher.beating():
        await watcher.subscribe()
        await watcher.watch(names)

        async def hasty(number: int, user: str) -> None:
            client = await StompClient.connect(server.ws, handshake=False)
            headers = {"accept-version": "1.2", "host": "x", "Authorization": f"Bearer {server.token(user)}"}
            await client.send_frame("CONNECT", headers)
            await asyncio.sleep((number * 37 % 100) / 100 * 0.05)
            await (client.vanish, client.abort, client.close)[number % 3]()

        for start in range(0, 200, 40):
            await asyncio.gather(*(hasty(number, names[number]) for number in range(start, start + 40)))
        truth = Truth(server)
        await wait_until(lambda: not truth.all_online() & set(names), LEASE + SLACK)
        marker = await connect(server, users("marker"))
        await nothing_more(marker, watcher)
        stream = [one["user"] for _, one in truth.stream()]
        for user in names:
            assert changes_told(watcher, user) in ([], [True, False])
            assert stream.count(user) in (0, 2)
            assert not truth.leases(user)


# Servers that are killed


async def test_the_users_of_a_killed_server_go_offline_when_their_leases_end(
    start_server: StartServer, valkey, connect: Connect, users
):
    """WIRE §4: "server process killed | its sessions end when their leases end | offline if none is left".

    Exactly once, not before, and whoever watches elsewhere is told.
    """
    store = await valkey()
    settings = {"redis_url": store.url, "amnesty_seconds": 0, "lease_seconds": 3}
    first, second = await asyncio.gather(start_server(**settings), start_server(**settings))
    truth = Truth(second)
    lost = [users("lost") for _ in range(20)]
    twice, back = users("twice"), users("back")
    watchers = [await connect(second, users("watcher")) for _ in range(2)]
    for watcher in watchers:
        await watcher.subscribe()
        await watcher.watch([*lost, twice, back])
    clients = [await connect(first, user) for user in [*lost, twice, back]]
    kept = await connect(second, twice)
    marker = await connect(second, users("marker"))
    async with await beat_all([*watchers, kept, marker]):
        await asyncio.gather(*(client.beat() for client in clients))
        tills = {user: next(iter(truth.leases(user).values())) for user in lost}
        await first.kill9()
        async with (await connect(second, back)).beating():
            for watcher in watchers:
                for user in lost:
                    await watcher.expect_event(user, True)
                    event = (await watcher.expect_event(user, False, 3 + SLACK)).json
                    assert event["version"] / 1000 >= tills[user], "not before its lease ended"
            await wait_until(lambda: len(truth.leases(back)) == len(truth.leases(twice)) == 1, 3 + SLACK)
            await nothing_more(marker, *watchers)
            expected = {**{user: [True, False] for user in lost}, twice: [True], back: [True]}
            await told_truly(watchers, truth, expected)
            assert {truth.changes(user)[-1] for user in lost} == {(False, "expired")}


# Servers that stop


async def test_a_planned_stop_is_no_change_for_who_comes_back_and_an_end_for_who_does_not(
    start_server: StartServer, valkey, connect: Connect, users
):
    """WIRE §4: "planned server stop | first all its leases become min(rest, max(drain, grace)), drain = 15 s".

    "Then close 1001, no ERROR frame | none if the client is back in time".
    """
    store = await valkey()
    settings = {"redis_url": store.url, "amnesty_seconds": 0, "lease_seconds": 10, "drain_seconds": 2}
    first, second = await asyncio.gather(start_server(**settings), start_server(**settings))
    truth = Truth(second)
    back, gone = [users("back") for _ in range(30)], [users("gone") for _ in range(10)]
    watcher, marker = await connect(second, users("watcher")), await connect(second, users("marker"))
    await watcher.subscribe()
    clients = {user: await connect(first, user) for user in [*back, *gone]}
    stuck = await connect(first, users("stuck"))
    stuck.stop_reading()  # it does not answer the close, so that the server waits for it for a moment
    await watcher.watch([*back, *gone])
    at = truth.now()
    os.kill(first.pid, signal.SIGTERM)

    async def is_stopping() -> bool:
        answer = await first.get("/health/ready", timeout=2)
        return answer.status == 503 and answer.json()["status"] == "stopping"

    await wait_until(is_stopping, 2, what="readiness to say so", every=0.005)

    async def come_back(user: str) -> StompClient:
        assert await clients[user].closed(10) == (1001, None)
        return await connect(second, user)

    again = await asyncio.gather(*(come_back(user) for user in back))
    for user in gone:
        assert await clients[user].closed(10) == (1001, None)
    stuck.go_on_reading()
    assert await first.exited(ENDED) == 0
    for user in gone:
        event = (await watcher.expect_event(user, False, 2 + SLACK)).json
        assert event["version"] / 1000 >= at + 2000, "not before the drain time was over"
    await wait_until(lambda: all(len(truth.leases(user)) == 1 for user in back), 2 + SLACK, what="the old ones to end")
    await nothing_more(marker, watcher)
    await told_truly([watcher], truth, {**{user: [] for user in back}, **{user: [False] for user in gone}})
    assert {tuple(truth.changes(user)) for user in back} == {((True, "connected"),)}
    assert {tuple(truth.changes(user)) for user in gone} == {((True, "connected"), (False, "drained"))}
    assert await last_seen(second, gone[0]) <= at + 1000, "not the end of the drain time"
    for client in again:
        await client.beat()


async def test_clients_that_connect_while_it_stops_are_no_change_or_refused(
    start_server: StartServer, valkey, connect: Connect, users
):
    """WIRE §4, "planned server stop": whoever has read CONNECTED has a lease of the drain time, too."""
    store = await valkey()
    settings = {"redis_url": store.url, "amnesty_seconds": 0, "lease_seconds": 30, "drain_seconds": 1.5}
    server = await start_server(**settings)
    other = await start_server(**settings)
    truth = Truth(other)
    names = [users("hasty") for _ in range(60)]
    sockets = [await StompClient.connect(server.ws, handshake=False) for _ in names]

    async def log_in(number: int) -> None:
        await asyncio.sleep(number * 0.004)
        with contextlib.suppress(AssertionError, ConnectionClosed):
            await sockets[number].login(server.token(names[number]))
        await sockets[number].closed(10)

    tasks = [asyncio.create_task(log_in(number)) for number in range(60)]
    await asyncio.sleep(0.1)
    assert await server.stop(ENDED) == 0
    await asyncio.gather(*tasks)
    for client in sockets:
        _, error = await client.closed()
        assert error is None
        await client.dispose()
    assert any(client.connected for client in sockets), "the stop came in the midst of them"
    await wait_until(
        lambda: not truth.all_online() & set(names),
        1.5 + SLACK,
        what="all to be offline when the drain time is over, long before the lease is",
    )


async def test_a_stop_does_not_wait_for_clients_that_are_frozen(start_server: StartServer, connect: Connect, users):
    server = await start_server()
    clients = [await connect(server, users("u")) for _ in range(20)]
    for client in clients:
        client.stop_reading()
    assert await server.stop(ENDED) == 0
    for client in clients:
        client.go_on_reading()


@pytest.mark.parametrize("workers", (1, 2))
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
async def test_both_signals_stop_it_as_planned_and_a_second_one_does_no_harm(
    start_server: StartServer, connect: Connect, user, number, workers
):
    server = await (start_server() if workers == 1 else start_workers(start_server))
    client = await connect(server, user)
    os.killpg(server.pid, number) if number == signal.SIGINT else os.kill(server.pid, number)  # Ctrl-C reaches all
    assert await client.closed(10) == (1001, None)
    os.kill(server.pid, number)
    assert await server.exited(ENDED) == 0
    await wait_until(lambda: not server.family(), ENDED, what=f"nobody to be left: {server.family()}")
    assert "Traceback" not in server.log


async def test_signals_while_the_embedded_store_saves_do_not_cut_the_stop_short(start_server: StartServer):
    """A large store takes its time; here it is frozen for a moment."""
    server = await start_server()
    (valkey,) = valkeys_of(server)
    os.kill(valkey, signal.SIGSTOP)
    for number in [signal.SIGTERM, signal.SIGINT] * 20:
        os.kill(server.pid, number)
        await asyncio.sleep(0.1)
        assert server.running, f"ended with {server.process and server.process.returncode}\n{server.log}"
    os.kill(valkey, signal.SIGCONT)
    assert await server.exited(ENDED) == 0
    assert (server.data_dir / "presence.rdb").exists()


# The embedded server: restarts


async def test_after_a_planned_restart_of_the_embedded_server_all_is_as_it_was(
    start_server: StartServer, connect: Connect, users
):
    """WIRE §4: "none if the client is back in time"; DESIGN §5: the dump is taken up at the next start."""
    server = await start_server(lease_seconds=60, drain_seconds=8)
    back, gone, left = users("back"), users("gone"), users("left")
    clients = {user: await connect(server, user) for user in (back, gone, left)}
    await clients[left].disconnect()
    seen = await last_seen(server, left)
    truth = Truth(server)
    before = truth.versions(back)
    await server.restart()
    assert len(truth.leases(back)) == len(truth.leases(gone)) == 1, "their sessions are there again"
    again = await connect(server, back)
    watcher = await connect(server, users("watcher"))
    await watcher.subscribe()
    snapshots = await watcher.watch([back, gone, left])
    assert [snapshots[user]["online"] for user in (back, gone, left)] == [True, True, False]
    await watcher.expect_event(gone, False, 8 + SLACK)
    assert truth.versions(back) == before
    assert truth.changes(gone) == [(True, "connected"), (False, "drained")]
    assert await last_seen(server, left) == seen
    assert changes_told(watcher, back) == []
    assert len(truth.leases(back)) == 1
    await again.beat()


async def test_last_seen_survives_a_kill_of_the_embedded_server(start_server: StartServer, connect: Connect, users):
    """WIRE §2, `lastSeen`: of who had left, and of who was there when it was killed."""
    server = await start_server(lease_seconds=2)
    left, there = users("left"), users("there")
    await (await connect(server, left)).disconnect()
    seen = await last_seen(server, left)
    client = await connect(server, there)
    await client.beat()
    beaten = Truth(server).last_active(there)
    await wait_row(server, left, online=False)
    await server.kill9()
    await wait_until(lambda: not server.family(), ENDED, what="Valkey to end")
    await server.start().ready()
    assert await last_seen(server, left) == seen
    await server.wait_online(there, False, LEASE + SLACK + 3)
    assert await last_seen(server, there) == beaten


@pytest.mark.parametrize("workers", (1, 2))
async def test_a_kill_of_the_main_process_leaves_nothing_behind_and_the_next_start_works(
    start_server: StartServer, connect: Connect, users, workers
):
    """DESIGN §5: "kill -9 of the main process leaves no orphan Valkey behind"; nor a worker, nor the lock."""
    server = await (start_server() if workers == 1 else start_workers(start_server))
    clients = [await connect(server, users("u")) for _ in range(10)]
    await server.kill9()
    for client in clients:
        code, error = await client.closed(ENDED)
        assert (code, error) in ((1006, None), (1001, None))
    await wait_until(lambda: not server.family(), ENDED, what=f"nobody to be left: {server.family()}")
    await server.start().ready()
    client = await connect(server, users("next"))
    await client.beat()


async def test_a_start_right_after_a_kill_of_the_main_process_works_in_the_end(
    start_server: StartServer, connect: Connect, user
):
    """As a service manager does it: again and again until the port is free. No try may leave anything broken."""
    server = await start_workers(start_server)
    await server.kill9()
    deadline = time.monotonic() + ENDED + 5
    while True:
        server.start()
        try:
            await server.ready()
            break
        except AssertionError:
            assert time.monotonic() < deadline, server.log
            assert not server.running, server.log
            assert f"PRESENCE_PORT={server.port}: address already in use" in server.log
    await wait_until(lambda: len(workers_of(server)) == 2, ENDED, what="the workers of the first to end")
    client = await connect(server, user)
    await client.beat()
    assert await server.is_online(user)
    assert len(valkeys_of(server)) == 1


# Workers


async def test_connections_spread_over_the_workers_and_all_are_told_of_one_another(
    start_server: StartServer, connect: Connect, users
):
    """DESIGN §5: "each has a listening socket of its own (SO_REUSEPORT), so that connections spread"."""
    server = await start_workers(start_server)
    clients = [await connect(server, users("u")) for _ in range(40)]
    spread = [connections_of(pid, server.port) for pid in workers_of(server)]
    assert len(spread) == 2
    assert sum(spread) >= 40
    assert min(spread) >= 4, "2 of 10,000 times it is less"
    assert connections_of(server.pid, server.port) == 0
    ann = users("ann")
    for client in clients:
        await client.subscribe()
        await client.watch([ann])
    ann_client = await connect(server, ann)
    for client in clients:
        await client.expect_event(ann, True)
    await ann_client.disconnect()
    for client in clients:
        await client.expect_event(ann, False)


async def test_a_worker_that_is_killed_is_started_again_and_the_others_go_on(
    start_server: StartServer, connect: Connect, users
):
    """DESIGN §5: "a worker that dies is started again"; WIRE §4: "its sessions end when their leases end"."""
    server = await start_workers(start_server, lease_seconds=3)
    truth = Truth(server)
    names = [users("u") for _ in range(24)]
    clients = {user: await connect(server, user) for user in names}
    first, second = workers_of(server)
    ended: set[str] = set()
    watcher = await connect(server, users("watcher"))

    def all_noticed() -> bool:
        ended.update(user for user, client in clients.items() if client.ws.close_code is not None)
        others = watcher.ws.close_code is None
        return connections_of(second, server.port) == len(names) - len(ended) + others

    async with await beat_all(clients.values()):
        await server.kill9(first)
        await wait_until(all_noticed, 5, what="the killed worker's clients to be thrown out")
        assert 0 < len(ended) < len(names)
        if watcher.ws.close_code is not None:
            watcher = await connect(server, users("watcher"))
        await watcher.subscribe()
        snapshots = await watcher.watch(names)
        for user in ended:
            if snapshots[user]["online"]:
                await watcher.expect_event(user, False, 3 + SLACK)
        await wait_until(lambda: len(workers_of(server)) == 2 and listening(server.port) == 2, ENDED, what="another")
        assert second in workers_of(server)
        assert re.search(rf"worker {first} has ended with -9; another is started", server.log)
        kept = [user for user in names if user not in ended]
        assert {tuple(truth.changes(user)) for user in kept} == {((True, "connected"),)}
        assert {tuple(truth.changes(user)) for user in ended} == {((True, "connected"), (False, "expired"))}
        for user in kept:
            await clients[user].beat()
            assert changes_told(watcher, user) == []
        (new,) = set(workers_of(server)) - {second}
        for _ in range(40):  # as many as it takes: the kernel decides who gets which
            await connect(server, users("new"))
            if connections_of(new, server.port):
                break
        assert connections_of(new, server.port), "the new one serves"


async def test_a_kill_of_a_worker_and_of_the_store_together_is_no_change_for_the_others(
    start_server: StartServer, connect: Connect, users
):
    """DESIGN §3.6: whoever kept beating on the other worker is not called offline by the one that starts."""
    server = await start_workers(start_server, amnesty_seconds=1.5, lease_seconds=3, store_timeout_seconds=0.5)
    names = [users("u") for _ in range(16)]
    clients = {user: await connect(server, user) for user in names}
    async with contextlib.AsyncExitStack() as stack:
        for client in clients.values():
            await stack.enter_async_context(client.beating(0.4))
        first, second = workers_of(server)
        os.kill(first, signal.SIGSTOP)
        os.kill(second, signal.SIGSTOP)  # so that all happens at one moment
        (valkey,) = valkeys_of(server)
        await server.kill9(valkey)
        await server.kill9(first)
        os.kill(second, signal.SIGCONT)
        await wait_until(lambda: connections_of(second, server.port) and len(workers_of(server)) == 2, ENDED)
        await wait_until(lambda: listening(server.port) == 2, ENDED, what="another worker")
        await wait_until(lambda: server.log.count("settled partition 0") >= 4, ENDED, what="all to have settled")
        truth = Truth(server)
        kept = [user for user, client in clients.items() if not client._reader.done()]
        assert kept
        for user in kept:
            await clients[user].beat()
            assert [online for online, _ in truth.changes(user)] == [True], truth.changes(user)


async def test_a_stop_ends_all_workers_as_planned(start_server: StartServer, connect: Connect, users):
    """WIRE §4, "planned server stop": on each of them."""
    server = await start_workers(start_server, lease_seconds=60, drain_seconds=30)
    names = [users("u") for _ in range(20)]
    clients = [await connect(server, user) for user in names]
    assert min(connections_of(pid, server.port) for pid in workers_of(server)) > 0
    assert await server.stop(ENDED) == 0
    for client in clients:
        assert await client.closed() == (1001, None)
    await wait_until(lambda: not server.family(), ENDED, what=f"nobody to be left: {server.family()}")
    assert "another is started" not in server.log
    await server.start().ready()
    truth = Truth(server)
    assert all(len(truth.leases(user)) == 1 for user in names), "they might come back yet"
    assert all(till <= truth.now() + 30_000 for user in names for till in truth.leases(user).values())
