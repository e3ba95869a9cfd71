"""The recorders of who watches whom, for a test that has no whole server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from presence.watch_records import WatchRecords


@asynccontextmanager
async def recording(records: WatchRecords) -> AsyncIterator[None]:
    """Have the records made meanwhile."""
    task = asyncio.create_task(records.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
