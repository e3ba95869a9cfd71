"""What runs beside the connections: the sweep, the reader of changes, and the guide's scheduled tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from presence.ports import PresenceStore, StoreUnavailable, Unavailable
from presence.service import PresenceService

log = logging.getLogger(__name__)

SWEEP_EVERY = 0.1  # s
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
            settling = asyncio.create_task(_settle(service, partition, found.settling))
        if not found.more:
            await asyncio.sleep(SWEEP_PAUSE)
            await store.overdue(SWEEP_EVERY - SWEEP_PAUSE)


async def _settle(service: PresenceService, partition: int, amnesty: float) -> None:
    await asyncio.sleep(amnesty)
    while True:
        try:
            if not (await service.store.sweep(partition)).settling:
                return await service.settle(partition)
        except Unavailable as error:
            log.info("settling partition %d waits: %s", partition, error)
        except Exception:
            log.exception("settling partition %d failed; it is tried again", partition)
        await asyncio.sleep(SWEEP_EVERY)


async def follow(service: PresenceService, partition: int) -> None:
    """Take every change to the sessions that watch, for ever (guide, OnlineStatusEventConsumer)."""
    async for changes in service.store.follow(partition):
        missed = changes is None
        while missed:
            try:
                await service.resync(partition)
                missed = False
            except StoreUnavailable:
                await asyncio.sleep(SWEEP_EVERY)
        for change in changes or ():
            service.fanout.deliver(change)


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
        await job()


async def cleanup(service: PresenceService) -> None:
    """The guide's Cleanup Task and Stale Detection."""
    repaired = await service.cleanup()
    log.info("cleanup repaired %s", ", ".join(f"{name}={number}" for name, number in repaired.items()))


async def stats(service: PresenceService) -> None:
    """The guide's Stats Logging."""
    log.info("online users=%d sessions here=%d", await service.store.online_count(), len(service.open_sessions()))


async def renew_watches(service: PresenceService) -> None:
    """Keep the records of what open sessions watch."""
    await service.store.renew_watches(service.open_sessions())


async def renew_open_sessions(service: PresenceService) -> None:
    """Renew the leases of open connections (`PRESENCE_LEASE_RENEWED_BY=connection`)."""
    service.renew_open_sessions()
