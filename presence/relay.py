"""From the stream of changes to a sink that must get them all, in order per user, at least once (DESIGN §4, Relay)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from presence.ports import HistoryStore, PresenceStore, Unavailable

log = logging.getLogger(__name__)

LEASE = 5.0  # s after which another instance takes over from one that died
POLL = 0.2  # s between two looks at an empty backlog
PAGE = 500  # changes to a write


async def relay(
    store: PresenceStore, sink: HistoryStore, partition: int, *, overtaken: Callable[[], Awaitable[object]]
) -> None:
    """Bring one partition's changes to the sink, for ever, while no other instance does.

    Args:
        overtaken: called when changes were trimmed before they were relayed, to bring the newest state instead.
    """
    cursor = f"{sink.name}.{partition}"
    held_until = 0.0
    done = 0
    behind = False
    while True:
        try:
            now = asyncio.get_running_loop().time()
            if now > held_until - LEASE / 2:
                if not await store.hold(f"relay.{cursor}", LEASE):
                    done = 0  # whoever holds it moves the cursor now
                    await asyncio.sleep(LEASE / 5)
                    continue
                held_until = now + LEASE
            if behind:
                await overtaken()
                behind = False
            changes = await store.backlog(sink.name, partition, done, PAGE)
            if changes is None:
                log.warning("changes were trimmed before %s had them: bringing the newest state instead", sink.name)
                behind = True
            elif changes:
                await sink.write(changes)
                done = changes[-1].version
            else:
                await asyncio.sleep(POLL)
        except Unavailable as error:
            log.debug("relay to %s waits: %s", sink.name, error)
            await asyncio.sleep(POLL * 2)
