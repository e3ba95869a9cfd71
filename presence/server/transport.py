"""What ASGI has no word for: WebSocket pings, and an end without waiting for the client.

Hypercorn's own pings hold each closed connection until the next ping would be due, as its task group waits for the task
that sleeps between them. So we send them, by way of its objects; `pyproject.toml` pins the version they are of. Under
another server there are none, and connections end when that server ends them.
"""

from __future__ import annotations

from typing import Any

from hypercorn.protocol.ws_stream import WSStream
from wsproto.events import Ping


class Transport:
    """The connection behind an ASGI ``send``."""

    __slots__ = ("_stream",)

    def __init__(self, send: Any) -> None:
        stream = getattr(send, "__self__", None)
        self._stream: Any = stream if isinstance(stream, WSStream) else None

    async def ping(self) -> None:
        """Send a ping. Nobody waits for the pong: the kernel waits for its acknowledgement (TCP_USER_TIMEOUT)."""
        if self._stream is not None and not self._stream.closed:
            await self._stream._send_wsproto_event(Ping())

    def abort(self) -> None:
        """Drop the TCP connection, and what has not been sent."""
        if self._stream is not None:
            self._stream.send.__self__.send.__self__.writer.transport.abort()
