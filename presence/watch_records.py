"""Who watches whom, recorded for whoever looks at `presence:user:{userId}:watchers` (DESIGN §4).

Our own delivery never reads it, so nobody waits for it: neither while the store is away, nor when thousands come or go
at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from presence.core.model import Session
from presence.ports import PresenceStore, StoreUnavailable

log = logging.getLogger(__name__)

RECORDERS = 8  # sessions recorded at once: few, so that connects and the sweep get through to the store
RETRY = 1.0  # s between two tries, at most
GONE = 5_000  # sessions that wait for a recorder; behind more, who goes is left to the cleanup


class WatchRecords:
    """Makes the records of this instance's sessions, those of one session one after the other."""

    def __init__(self, store: PresenceStore) -> None:
        self._recorders = [_Recorder(store) for _ in range(RECORDERS)]

    def __len__(self) -> int:
        """How many records are to be made and have not been tried yet."""
        return sum(map(len, self._recorders))

    def note(self, session: Session, *, anew: bool = False) -> None:
        """Have it recorded soon what the session watches then; nothing once it is closed.

        Args:
            anew: all of it, whatever seems to be recorded.
        """
        self._recorders[hash(session.id) % RECORDERS].note(session, anew=anew)

    async def run(self) -> None:
        """Record, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for recorder in self._recorders:
                tasks.create_task(recorder.run())


class _Recorder:
    """Records some of the sessions, one at a time. Its queues are bounded by the open connections and `GONE`."""

    def __init__(self, store: PresenceStore) -> None:
        self._store = store
        self._due: OrderedDict[Session, bool] = OrderedDict()  # and whether all of it is to be recorded anew
        self._failed: OrderedDict[Session, bool] = OrderedDict()  # these wait for the others
        self._some = asyncio.Event()
        self._busy = False

    def __len__(self) -> int:
        return len(self._due) + self._busy

    def note(self, session: Session, *, anew: bool = False) -> None:
        failed = self._failed.pop(session, False)
        if not self._left_out(session):
            self._due[session] = self._due.get(session, False) or anew or failed
            self._some.set()

    def _left_out(self, session: Session) -> bool:
        """Leave its record to the cleanup if it has gone and too many wait. Returns whether that is so."""
        if left := session.closed and len(self._due) + len(self._failed) >= GONE:
            self._due.pop(session, None)
        return left

    async def run(self) -> None:
        pause = 0.0
        while True:
            await self._some.wait()
            queue = self._due or self._failed
            if not queue:
                self._some.clear()
                continue
            session, anew = queue.popitem(last=False)
            self._busy = True
            try:
                await self._store.record_watches(session, anew=anew)
                pause = 0.0
            except StoreUnavailable as error:
                if not pause:
                    log.info("what %s watches is recorded later: %s", session.user, error)
                pause = min(RETRY, pause * 2 or 0.05)
                if session in self._due:
                    self._due[session] = True
                elif not self._left_out(session):
                    self._failed[session] = True
            except BaseException:
                self.note(session, anew=True)
                raise
            finally:
                self._busy = False
            if not self._due:
                await asyncio.sleep(pause)
