"""A way to a server: a long one, as a runner on another continent has it, or one in TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def far(port: int, delay: float = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Forward to a port of this machine; the port to connect to instead.

    Args:
        delay: s, each way; a new connection is there and back once before it carries anything.
        tls: spoken on the port that is given.
    """
    at_work: set[asyncio.Task[None]] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        at_work.add(task)
        task.add_done_callback(at_work.discard)
        try:
            await asyncio.sleep(2 * delay)
            there, back = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(_late(reader, back, delay), _late(there, writer, delay))
            finally:
                back.close()
        except asyncio.CancelledError:
            pass  # at the end; the library would tell of it
        finally:
            writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(at_work):
            task.cancel()
        await asyncio.gather(*at_work, return_exceptions=True)


async def _late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Forward one direction to its end: all that is read is on its way at the same time."""
    loop = asyncio.get_running_loop()
    coming: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def read() -> None:
        data = b"not yet its end"
        while data:
            try:
                data = await reader.read(65_536)
            except OSError:
                data = b""
            coming.put_nowait((loop.time() + delay, data))

    reading = asyncio.create_task(read())
    try:
        while True:
            due, data = await coming.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                break
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()  # TLS has no end of one direction
    except OSError:
        pass  # the other end is gone
    finally:
        reading.cancel()
