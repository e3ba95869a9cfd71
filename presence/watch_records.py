"""Who watches whom, recorded for whoever looks at `presence:user:{userId}:watchers` (DESIGN §4).

Our own delivery never reads it, so nobody waits for it: neither while the store is away, nor when thousands come or go
at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection

from presence.core.model import Session
from presence.ports import PresenceStore, StoreUnavailable

log = logging.getLogger(__name__)

RECORDERS = 8  # sessions recorded at once: few, so that connects and the sweep get through to the store
RETRY = 1.0  # s
GONE = 5_000  # sessions without a connection that wait for a recorder, at most; the cleanup does what is beyond


class WatchRecords:
    """Makes the records of this instance's sessions, each session's one after the other."""

    def __init__(self, store: PresenceStore) -> None:
        self._recorders = [_Recorder(store) for _ in range(RECORDERS)]

    def __len__(self) -> int:
        """The sessions of which not all is recorded yet."""
        return sum(map(len, self._recorders))

    def note(self, session: Session, users: Collection[str]) -> None:
        """Record soon whether the session watches ``users``: by then its `watched` and `closed` say it."""
        if users:
            self._recorders[hash(session.id) % RECORDERS].note(session, users)

    async def run(self) -> None:
        """Record, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for recorder in self._recorders:
                tasks.create_task(recorder.run())


class _Recorder:
    """Records some of the sessions, one at a time. Its queue is bounded by the open connections, and by `GONE`."""

    def __init__(self, store: PresenceStore) -> None:
        self._store = store
        self._changed: OrderedDict[Session, set[str]] = OrderedDict()
        self._some = asyncio.Event()
        self._busy = False

    def __len__(self) -> int:
        return len(self._changed) + self._busy

    def note(self, session: Session, users: Collection[str]) -> None:
        if session.closed and session not in self._changed and len(self._changed) >= GONE:
            return
        self._changed.setdefault(session, set()).update(() if session.closed else users)
        self._some.set()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            session, users = self._changed.popitem(last=False)
            if not self._changed:
                self._some.clear()
            try:
                await self._record(session, users)
            except StoreUnavailable as error:
                log.info("watches of %s are recorded later: %s", session.user, error)
                await asyncio.sleep(RETRY)

    async def _record(self, session: Session, users: set[str]) -> None:
        begun, ended = users & session.watched, users - session.watched
        self._busy = True
        try:
            if session.closed:
                await self._store.unwatch(session)
                return
            if begun:
                await self._store.watch(session, begun)
            if ended:
                await self._store.unwatch(session, ended)
        except BaseException:
            self.note(session, users)  # behind the others
            raise
        finally:
            self._busy = False
