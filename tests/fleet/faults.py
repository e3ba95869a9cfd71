"""What is broken in a run (`world`), by name, and one run with it from the start to the checker's report."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.fleet.checker import UNREAD, Report, check
from tests.fleet.world import LEASE, Service, Store, World
from tests.support.redis_cluster import RedisClusterProcess
from tests.support.redis_process import RedisProcess
from tests.support.sentinel import SentinelProcess

BEHIND = 5.0
"""How much the clock of a replica may be behind its primary's, s: more than a lease and an amnesty."""

BEFORE, AFTER = 2.0, 3.0
"""How long the run goes on before and after what is broken, s."""


@dataclass(frozen=True)
class Fault:
    """Something that is broken for a while."""

    run: Callable[[World], Awaitable[None]]
    needs: str = ""
    """Only in a deployment with it: kafka, cassandra."""
    world: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `World`."""
    store: Callable[[], Store] = RedisProcess


# Instances


async def instance_killed(world: World) -> None:
    name, server = world.random.choice(sorted(world.instances.items()))
    async with world.broken(name, "killed"):
        await server.kill9()
        await asyncio.sleep(2 * LEASE)
        await server.start().ready()


async def instance_frozen(world: World) -> None:
    name, server = world.random.choice(sorted(world.instances.items()))
    async with world.broken(name, "frozen"):
        await server.freeze()
        await asyncio.sleep(10)
        await server.thaw()


async def rolling_restart(world: World) -> None:
    for name, server in world.instances.items():
        async with world.broken(name, "stopped"):
            assert await server.stop() == 0, server.log
            await server.start().ready()


async def network_cut(world: World) -> None:
    assert world.cut() > 10
    await asyncio.sleep(2 * LEASE)


async def nothing(world: World) -> None:
    await asyncio.sleep(6)


async def events_killed(world: World) -> None:
    client = world.store.redis()
    for _ in range(10):
        await asyncio.to_thread(client.execute_command, "CLIENT", "KILL", "TYPE", "pubsub")
        await asyncio.sleep(0.5)


async def swept_at_once(world: World) -> None:
    """No sweep finds that another has just swept: so every instance ends the same sessions at the same time."""
    client = world.store.redis()
    until = time.monotonic() + 6
    while time.monotonic() < until:
        await asyncio.to_thread(client.decrby, "presence:swept", 40)
        await asyncio.sleep(0.01)


# Services


def restarted(on: str, seconds: float, **options: Any) -> Callable[[World], Awaitable[None]]:
    """Kill it, and start it again after so many s."""

    async def run(world: World) -> None:
        service = service_of(world, on)
        async with world.broken(on, "emptied" if options else "killed"):
            await service.kill9()
            await asyncio.sleep(seconds)
            await service.start(**options)

    return run


def frozen(on: str, seconds: float) -> Callable[[World], Awaitable[None]]:
    async def run(world: World) -> None:
        service = service_of(world, on)
        async with world.broken(on, "frozen"):
            await service.freeze()
            await asyncio.sleep(seconds)
            await service.thaw()

    return run


def service_of(world: World, on: str) -> Any:
    return {"redis": world.store, "kafka": world.kafka, "cassandra": world.cassandra}[on]


def both(*faults: Callable[[World], Awaitable[None]]) -> Callable[[World], Awaitable[None]]:
    """Break several things at once."""

    async def run(world: World) -> None:
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                group.create_task(fault(world))  # type: ignore[arg-type]

    return run


async def primary_fails_over(world: World) -> None:
    store = world.store
    assert isinstance(store, SentinelProcess | RedisClusterProcess)
    async with world.broken("redis", "failed over"):
        await store.fail_over()


async def fails_over_without_the_last_writes(world: World) -> None:
    """The replica had got nothing for a while when the primary died."""
    store = world.store
    assert isinstance(store, SentinelProcess)
    await store.hold_back()
    await asyncio.sleep(UNREAD / 2)
    await primary_fails_over(world)


async def cassandra_away_at_the_start(world: World) -> None:
    """Every instance is started while it is away."""
    async with world.broken("cassandra", "killed"):
        await service_of(world, "cassandra").kill9()
        for name, server in world.instances.items():
            async with world.broken(name, "stopped"):
                assert await server.stop() == 0, server.log
                await server.start().ready()
        await asyncio.sleep(2)
        await service_of(world, "cassandra").start()


FAULTS: dict[str, Fault] = {
    "nothing": Fault(nothing),
    "instance killed": Fault(instance_killed),
    "instance frozen 10 s": Fault(instance_frozen),
    "rolling restart": Fault(rolling_restart),
    "instance's clock 30 s ahead": Fault(nothing, world={"skewed": 30.0}),
    "redis killed, with its data": Fault(restarted("redis", 2.6)),
    "redis killed, empty": Fault(restarted("redis", 2.6, empty=True)),
    "redis empty at once": Fault(restarted("redis", 0.0, empty=True)),
    "redis frozen for less than a lease": Fault(frozen("redis", 0.6 * LEASE)),
    "redis frozen for more than a lease": Fault(frozen("redis", 2 * LEASE)),
    "network cut": Fault(network_cut, world={"proxied": True}),
    "expired events killed": Fault(events_killed),
    "all sweep at once": Fault(swept_at_once),
    "redis empty, instance killed": Fault(both(restarted("redis", 1.0, empty=True), instance_killed)),
    "redis frozen, instance killed": Fault(both(frozen("redis", 2 * LEASE), instance_killed)),
    "sentinel fails over": Fault(primary_fails_over, store=SentinelProcess),
    "sentinel fails over to a clock 5 s behind, last writes lost, instance killed": Fault(
        both(fails_over_without_the_last_writes, instance_killed),
        store=partial(SentinelProcess, behind=BEHIND),
        world={"behind": BEHIND},
    ),
    "cluster fails over": Fault(
        primary_fails_over,
        store=partial(RedisClusterProcess, replicas=True),
        world={"settings": {"redis_partitions": 12}},
    ),
    "kafka killed": Fault(restarted("kafka", 5.0), "kafka"),
    "kafka frozen 30 s": Fault(frozen("kafka", 30.0), "kafka"),
    "kafka restarted": Fault(restarted("kafka", 0.0), "kafka"),
    "kafka killed, instance killed": Fault(both(restarted("kafka", 5.0), instance_killed), "kafka"),
    "cassandra killed": Fault(restarted("cassandra", 3.0), "cassandra"),
    "cassandra frozen": Fault(frozen("cassandra", 5.0), "cassandra"),
    "cassandra away at the start": Fault(cassandra_away_at_the_start, "cassandra"),
}


async def run_fault(
    name: str,
    seed: str,
    file: Path,
    *,
    redis: Store | None = None,
    kafka: Service | None = None,
    cassandra: Service | None = None,
    **world: Any,
) -> tuple[Report, World]:
    """One run with this fault; its history is left in ``file``. With no ``redis`` it has its own."""
    fault = FAULTS[name]
    store = redis or fault.store()
    made: World | None = None
    try:
        await store.start()
        made = World(store, seed, name, kafka=kafka, cassandra=cassandra, **fault.world | world)
        try:
            await made.start()
            await made.settle_in()
            await asyncio.sleep(BEFORE)
            await fault.run(made)
            await made.recover()
            await asyncio.sleep(AFTER)
            history = await made.finish()
        finally:
            with file.open("w") as out:
                out.writelines(made.recorder.history.lines())
        report = await asyncio.to_thread(check, history)
        if not report.findings:
            await made.stop()  # and all is well: else what the instances logged is kept
        return report, made
    finally:
        if made is not None:
            for one, server in made.instances.items():
                with contextlib.suppress(FileNotFoundError):  # stopped, and removed
                    file.with_suffix(f".{one.split()[1]}.log").write_text(server.log)
            made.close()
        store.close()
