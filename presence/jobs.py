"""What runs beside the connections: the sweep, the reader of changes, and the guide's scheduled tasks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from presence.ports import Bus, PresenceStore, Sink, StoreUnavailable, Sweep, Unavailable
from presence.service import PresenceService

log = logging.getLogger(__name__)

SWEEP_EVERY = 0.1  # s
HISTORY_EVERY = 5.0  # s between two tries to settle with a history that is away
TOLD_UNREAD = 1000  # changes in the bus that are worth a line in the log
SWEEP_PAUSE = 0.03  # s between two sweeps, however many keys expire


async def sweep(service: PresenceService, partition: int) -> None:
    """End overdue sessions, for ever; and follow the store through an amnesty (guide, Offline Flow (Timeout))."""
    store = service.store
    epoch: int | None = None
    settling: asyncio.Task[None] | None = None
    while True:
        try:
            found = await store.sweep(partition)
        except StoreUnavailable:
            service.note_settled(partition, settled=False)
            await asyncio.sleep(SWEEP_EVERY)
            continue
        service.note_settled(partition, settled=not found.settling)
        if found.epoch != epoch:
            if epoch is not None:
                log.warning(
                    "the store has come back (partition %d): nobody goes offline for %.1f s", partition, found.settling
                )
            epoch = found.epoch
            service.restore(partition)
            if settling:
                settling.cancel()
            settling = asyncio.create_task(_settle(service, partition, found))
        if not found.more:
            await asyncio.sleep(SWEEP_PAUSE)
            await store.overdue(SWEEP_EVERY - SWEEP_PAUSE)


async def _settle(service: PresenceService, partition: int, found: Sweep) -> None:
    async def settled() -> None:
        while (await service.store.sweep(partition)).settling:
            await asyncio.sleep(SWEEP_EVERY)
        await service.settle(partition)

    await asyncio.sleep(found.settling)
    await _until_done(settled, SWEEP_EVERY, f"settling partition {partition}")
    history = partial(service.settle_history, partition, found.epoch)
    await _until_done(history, HISTORY_EVERY, f"settling partition {partition}")


async def _until_done(step: Callable[[], Awaitable[None]], pause: float, name: str) -> None:
    told = False
    while True:
        try:
            return await step()
        except Unavailable as error:
            if not told:
                log.info("%s waits: %s", name, error)
            told = True
        except Exception:
            log.exception("%s failed; it is tried again", name)
        await asyncio.sleep(pause)


async def follow(
    service: PresenceService,
    partition: int,
    bus: Bus | None = None,
    fallback: float = 0.0,
    wake: Callable[[], None] = lambda: None,
) -> None:
    """Take every change to the sessions that watch, for ever (guide, OnlineStatusEventConsumer).

    Args:
        service: whose store is followed.
        partition: of the store.
        bus: is to bring them instead (`follow_bus`): here it is only noticed when the store has been lost.
        fallback: s for which the bus may be away until they are taken from the store all the same; 0: for ever.
        wake: called when there are changes; wakes the relay to the bus.
    """
    async for changes in service.store.follow(partition):
        wake()
        if changes is None:
            await _read_anew(service, [partition])
        elif bus is None or 0 < fallback <= _away_for(bus):
            for change in changes:
                service.fanout.deliver(change)


async def follow_bus(service: PresenceService, bus: Bus) -> None:
    """Take every change that the bus brings to the sessions that watch, for ever."""
    async for changes in bus.follow(service.fanout.watches):
        if changes is None:
            await _read_anew(service, range(service.store.partitions))
        for change in changes or ():
            service.fanout.deliver(change)


async def bridge_bus(service: PresenceService, bus: Bus, fallback: float) -> None:
    """Read the statuses anew, for ever, when the bus does not bring them: at the begin of a fallback, and at its end.

    When the bus is back it brings what it was given meanwhile, but of that the oldest may have been trimmed.

    Args:
        fallback: as for `follow`.
    """
    everywhere = range(service.store.partitions)
    away = fell_back = False
    while True:
        await asyncio.sleep(SWEEP_EVERY)
        was_away, away = away, bus.health.state == "down"
        fell_back_before, fell_back = fell_back, 0 < fallback <= _away_for(bus)
        if fell_back and not fell_back_before:
            log.warning("%s is away for %g s: changes are told straight from the store", bus.name, fallback)
            await _read_anew(service, everywhere)
        elif (was_away and not away) or (fell_back_before and not fell_back):
            await _read_anew(service, everywhere)


def _away_for(bus: Bus) -> float:
    """For how long the bus has been away, or changes have waited for it, s.

    Of an outage that is one of writing alone only the instance that relays would know.
    """
    away = time.time() - bus.health.since if bus.health.state == "down" else 0.0
    return max(away, bus.health.lag or 0.0)


async def _read_anew(service: PresenceService, partitions: Iterable[int]) -> None:
    """Tell the present statuses of all who are watched, however long the store may be away."""
    for partition in partitions:
        while True:
            try:
                await service.resync(partition)
                break
            except StoreUnavailable:
                await asyncio.sleep(SWEEP_EVERY)


async def every(seconds: float, job: Callable[[], Awaitable[object]], name: str) -> None:
    """Run the job every so often, for ever."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await job()
        except Unavailable as error:
            log.warning("%s is put off: %s", name, error)


async def on_one_instance(
    store: PresenceStore, name: str, seconds: float, job: Callable[[], Awaitable[object]]
) -> None:
    """Run the job unless another instance ran it within ``seconds``."""
    if await store.hold(name, seconds):
        try:
            await job()
        except Unavailable:
            await store.hold(name, 0.001)  # perhaps it is only this instance that cannot
            raise


async def cleanup(service: PresenceService) -> None:
    """The guide's Cleanup Task and Stale Detection."""
    repaired = await service.cleanup()
    log.info("cleanup repaired %s", ", ".join(f"{name}={number}" for name, number in repaired.items()))


async def stats(service: PresenceService) -> None:
    """The guide's Stats Logging."""
    log.info("online users=%d sessions here=%d", await service.store.online_count(), len(service.open_sessions()))


async def renew_watches(service: PresenceService) -> None:
    """Keep the records of what open sessions watch."""
    await service.renew_watches(service.open_sessions())


async def renew_open_sessions(service: PresenceService) -> None:
    """Renew the leases of open connections (`PRESENCE_LEASE_RENEWED_BY=connection`)."""
    service.renew_open_sessions()


async def lag(store: PresenceStore, sinks: Iterable[Sink], bus: Bus | None = None) -> None:
    """Note for the health page how far each sink is behind the changes, and this instance behind the bus."""
    if bus:
        bus.health.unread = unread = bus.unread()
        if unread and unread > TOLD_UNREAD:
            log.info("%d changes in %s are still to be read", unread, bus.name)
    for sink in sinks:
        sink.health.lag = await store.lag(sink.name)
