"""What ASGI has no word for: WebSocket pings, and an end without waiting for the client.

Hypercorn's own pings hold each closed connection until the next ping would be due, as its task group waits for the task
that sleeps between them. So we send them, by way of its objects; `pyproject.toml` pins the version they are of. Under
another server there are none, and connections end when that server ends them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from wsproto.events import Message, Ping

log = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0  # that a client has to read the close of a message that is too large


class Transport:
    """The connection behind an ASGI ``receive`` and ``send``."""

    __slots__ = ("_queue", "_stream")

    def __init__(self, receive: Any, send: Any) -> None:
        self._queue: Any = getattr(receive, "__self__", None)
        stream = getattr(send, "__self__", None)
        self._stream: Any = stream if isinstance(stream, WSStream) else None
        if self._stream is not None:
            # No permessage-deflate, which all browsers offer: its state takes 300 KB a connection, and 64 KB from a
            # client would be inflated to 64 MB at one go, before any limit is looked at. It counts before the accept.
            self._stream.handshake.extensions = None
            self._stream.buffer = _Buffer(self._stream.buffer.max_length, self.abort)

    async def ping(self) -> None:
        """Send a ping. Nobody waits for the pong: the kernel waits for its acknowledgement (TCP_USER_TIMEOUT)."""
        if self._stream is not None and not self._stream.closed:
            await self._stream._send_wsproto_event(Ping())  # noqa: SLF001 - see above

    def abort(self) -> None:
        """Drop the TCP connection, and what has not been sent."""
        if self._stream is not None:
            self._stream.send.__self__.send.__self__.writer.transport.abort()

    def leave(self) -> None:
        """Take no more messages. Hypercorn would keep the connection until there is room for all that it has read."""
        if self._stream is not None:
            self._stream.app_put = _drop
            while not self._queue.empty():
                self._queue.get_nowait()


async def _drop(message: object) -> None:
    pass


class _Buffer(WebsocketBuffer):
    """Of a message that is too large it keeps nothing; Hypercorn's own keeps it all, though it has sent 1009."""

    def __init__(self, max_length: int, abort: Callable[[], None]) -> None:
        super().__init__(max_length)
        self._abort: Callable[[], None] | None = abort

    def extend(self, event: Message[Any]) -> None:
        if self._abort is not None and self.length + len(event.data) <= self.max_length:
            return super().extend(event)
        if self._abort is not None:  # the client has a moment to read the close
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._abort)
            self._abort = self.value = None
        raise FrameTooLargeError


_answer_error = WSStream._send_error_response  # noqa: SLF001 (as above)


async def _answer_error_and_close(stream: WSStream, status: int) -> None:
    """What Hypercorn answers to a broken handshake; it would keep the connection, uncounted, as long as the client."""
    await _answer_error(stream, status)
    await stream.send(StreamClosed(stream.stream_id))


WSStream._send_error_response = _answer_error_and_close  # type: ignore[method-assign, assignment]  # noqa: SLF001


def log_dropped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exception handler of the loop: a client whose bytes make Hypercorn raise is dropped, with one line in the log."""
    error = context.get("exception")
    if context["message"] != "Unhandled exception in client_connected_cb":
        return loop.default_exception_handler(context)
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    log.info("a client is dropped: %s %.200r", type(error).__name__, str(error))
    return None
