"""From the stream of changes to a sink that must get them all, in order per user, at least once (DESIGN §4, Relay)."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from presence.ports import PresenceStore, Sink, StoreUnavailable, Unavailable

log = logging.getLogger(__name__)

LEASE = 5.0  # s after which another instance takes over from one that died
LOOKS = 10  # times in a lease that the others look whether it is to be had
POLL = 0.2  # s between two looks at an empty backlog
PAGE = 500  # changes to a write
TOLD_LAG = 5.0  # s of waiting that are worth a line in the log


class Relay:
    """Brings one partition's changes to the sink, while no other instance does.

    One that wakes late brings some again, which is harmless; the cursor never goes back (`backlog.lua`).
    """

    def __init__(self, store: PresenceStore, sink: Sink, partition: int) -> None:
        """Do nothing yet."""
        self._store = store
        self._sink = sink
        self._partition = partition
        self._news = asyncio.Event()
        self._lease = f"relay.{sink.name}.{partition}"
        self._held_until = 0.0
        self._done = 0  # the version up to which the sink has all, until the cursor is moved on to it
        self._waits_since: float | None = None
        self._fails_since: float | None = None

    @property
    def lag(self) -> float:
        """Age of the oldest change that the sink has not got yet, s; 0 when there is none, or another instance relays.

        By this process's own clock since it met the change, and by the store's before that.
        """
        return 0.0 if self._waits_since is None else _now() - self._waits_since

    def wake(self) -> None:
        """There are changes: have them brought at once, not at the next look."""
        self._news.set()

    async def run(self) -> None:
        """Relay, for ever. When it is cancelled another instance need not wait for the lease to end."""
        try:
            while True:
                await self._turn()
        finally:
            if _now() < self._held_until:
                await self._release()

    async def _turn(self) -> None:
        try:
            if not await self._hold():
                await asyncio.sleep(LEASE / LOOKS)
            elif not await self._bring():
                await self._news_or(POLL)
        except StoreUnavailable as error:
            log.debug("relay to %s waits: %s", self._sink.name, error)
            await asyncio.sleep(POLL * 2)
        except Unavailable as error:
            log.debug("relay to %s waits: %s", self._sink.name, error)
            await asyncio.sleep(POLL * 2)
            await self._leave_it_to_others()

    async def _hold(self) -> bool:
        now = _now()
        if now <= self._held_until - LEASE / 2:
            return True
        if await self._store.hold(self._lease, LEASE, self._partition):
            self._held_until = now + LEASE
            return True
        self._done, self._waits_since, self._fails_since = 0, None, None  # whoever holds it moves the cursor now
        return False

    async def _bring(self) -> bool:
        """Bring one page. False: there is none."""
        changes, gap = await self._store.backlog(self._sink.name, self._partition, self._done, PAGE)
        self._done = 0  # the cursor has it, or is not to have it
        if gap:
            log.warning("changes were trimmed before %s had them: bringing the newest state instead", self._sink.name)
            async for page in self._store.newest(self._partition, gap):
                if not await self._hold():
                    return True
                await self._sink.write(page)
            self._done = gap  # only now: whoever takes over before has it all to do again
            return True
        if changes:
            if self._waits_since is None:
                self._waits_since = _now() - (changes[-1].version - changes[0].version) / 1e6
            await self._sink.write(changes)
            self._done = changes[-1].version
        if self.lag > TOLD_LAG:
            log.info("%s has got changes that waited for %.1f s", self._sink.name, self.lag)
        self._waits_since = self._fails_since = None
        return bool(changes)

    async def _news_or(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    async def _leave_it_to_others(self) -> None:
        """Give the lease away after a while in vain: perhaps it is only this instance that cannot reach the sink."""
        if self._fails_since is None:
            self._fails_since = _now()
        elif _now() - self._fails_since > LEASE:
            self._fails_since = None
            await self._release()
            await asyncio.sleep(LEASE / LOOKS * 1.5)  # so that another has looked

    async def _release(self) -> None:
        self._held_until = 0.0
        try:
            await self._store.hold(self._lease, 0.001, self._partition)
        except StoreUnavailable as error:
            log.debug("the lease %s is left to its end: %s", self._lease, error)


def _now() -> float:
    return asyncio.get_running_loop().time()
