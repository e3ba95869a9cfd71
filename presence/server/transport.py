"""What ASGI has no word for: WebSocket pings, and an end without waiting for the client.

Hypercorn's own pings hold each closed connection until the next ping would be due, as its task group waits for the task
that sleeps between them. So we send them, by way of its objects; `pyproject.toml` pins the version they are of. Under
another server there are none, and connections end when that server ends them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from h11 import LocalProtocolError
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h11 import H11Protocol, H11WSConnection
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from wsproto.connection import ConnectionState
from wsproto.events import Message, Ping

from presence.server.share import Share

log = logging.getLogger(__name__)

_TEXT, _BINARY = 0x81, 0x82  # first octet of a frame that is a whole message
_MASKED = 0x80  # in its second octet
SLICE = 512  # octets that wsproto gets at a time: tiny fragments take it 20 µs each
CLOSE_SECONDS = 1.0  # that a client has to read the close of a message that is too large


class Transport:
    """The connection behind an ASGI ``receive`` and ``send``."""

    __slots__ = ("_queue", "_server", "_stream", "_take", "share")

    def __init__(self, receive: Any, send: Any) -> None:
        self.share = Share()
        """Of the time, for the work on what comes in."""
        self._queue: Any = getattr(receive, "__self__", None)
        self._take: Callable[[bytes], Awaitable[bool]] = _drop
        stream = getattr(send, "__self__", None)
        self._stream: Any = stream if isinstance(stream, WSStream) else None
        if self._stream is not None:
            # No permessage-deflate, which all browsers offer: its state takes 300 KB a connection, and 64 KB from a
            # client would be inflated to 64 MB at one go, before any limit is looked at. It counts before the accept.
            self._stream.handshake.extensions = None
            self._stream.buffer = _Buffer(self._stream.buffer.max_length, self._abort_later)
        protocol: Any = getattr(getattr(self._stream, "send", None), "__self__", None)
        self._server: Any = getattr(protocol.send, "__self__", None) if isinstance(protocol, H11Protocol) else None

    @property
    def clear(self) -> bool:
        """Nothing is in the way of a message, so that `write` would send one."""
        server = self._server
        if server is None or self._stream.closed or server.send_lock.locked():
            return False
        wire = self._wire
        idle = not wire.get_write_buffer_size() and not wire.is_closing()
        return idle and self._stream.connection.state is ConnectionState.OPEN

    def write(self, text: bytes) -> bool:
        """Send a text message without waiting, which takes a third of the CPU of ``send``.

        Returns:
            Whether it was sent. Not if it would have to wait, be it for a client that does not read.
        """
        if not self.clear:
            return False
        size = len(text)  # RFC 6455 §5.2: FIN, text, unmasked
        length = (
            b"%c" % size if size < 126 else b"\x7e" + size.to_bytes(2) if size < 2**16 else b"\x7f" + size.to_bytes(8)
        )
        self._wire.write(b"%c%b%b" % (_TEXT, length, text))
        return True

    def divert(self, take: Callable[[bytes], Awaitable[bool]]) -> None:
        """Give each message to ``take`` as it comes in, unless others wait before it; what it refuses, to ``receive``.

        ``take`` runs as part of reading from the connection, which saves a change of tasks for each message. A message
        of one whole frame, as nearly all are, is read here, which takes a fifth of the CPU that wsproto takes.
        """
        if self._server is not None:
            self._take = take
            self._stream.app_put = self._put
            self._server.protocol.handle = self._handle

    async def _handle(self, event: Any) -> None:
        """What Hypercorn has read from the connection; it does itself what is no whole message, or wrong."""
        handle = partial(type(self._server.protocol).handle, self._server.protocol)
        if not isinstance(event, RawData):
            await handle(event)
            return
        data, at = event.data, 0
        if self._stream is not None and self._stream.buffer.overflown:
            return
        most = self._stream.buffer.max_length if self._between_messages else -1
        while at < len(data):
            at, most = await self.share.take(self._piece(data, at, most, handle))

    async def _piece(
        self, data: bytes, at: int, most: int, handle: Callable[[Any], Awaitable[None]]
    ) -> tuple[int, int]:
        """Handle the message at ``at``, or give Hypercorn a slice. Returns where to go on, and the new ``most``."""
        if self._stream is not None and (found := _message(data, at, most)):
            message, at = found
            await self._give(message)
            return at, most
        await handle(RawData(data[at : at + SLICE]))
        return at + SLICE, -1  # what follows is Hypercorn's, too

    @property
    def _between_messages(self) -> bool:
        connection = self._stream.connection
        frames, messages = connection._proto._frame_decoder, connection._proto._message_decoder  # noqa: SLF001
        begun = frames.header is not None or len(frames.buffer) or messages.opcode is not None
        return connection.state is ConnectionState.OPEN and not begun

    async def _put(self, message: Any) -> None:
        if message["type"] != "websocket.receive":
            await self._queue.put(message)
        else:
            await self._give(message["bytes"] if message["text"] is None else message["text"].encode())

    async def _give(self, data: bytes) -> None:
        if not self._queue.empty() or not await self._take(data):
            await self._queue.put({"type": "websocket.receive", "bytes": data, "text": None})

    async def ping(self) -> None:
        """Send a ping. Nobody waits for the pong: the kernel waits for its acknowledgement (TCP_USER_TIMEOUT)."""
        if self._stream is not None and not self._stream.closed:
            await self._stream._send_wsproto_event(Ping())  # noqa: SLF001 - see above

    def abort(self) -> None:
        """Drop the TCP connection, and what has not been sent."""
        if self._stream is not None:
            self._wire.abort()

    @property
    def _wire(self) -> asyncio.WriteTransport:
        wire: asyncio.WriteTransport = self._stream.send.__self__.send.__self__.writer.transport
        return wire

    def _abort_later(self) -> None:
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._wire.abort)

    def leave(self) -> None:
        """Take no more messages. Hypercorn would keep the connection until there is room for all that it has read."""
        if self._stream is not None:
            self._stream.app_put = _drop
            if self._server is not None:
                vars(self._server.protocol).pop("handle", None)
                connection = getattr(self._stream, "connection", None)  # there is none before the accept
                self._server.frames = connection and connection._proto  # noqa: SLF001 (for its end, below)
            while not self._queue.empty():
                self._queue.get_nowait()
            self._stream = self._server = None
            self._take = _drop  # no circle that only the garbage collector could break


async def _drop(message: object) -> bool:
    return True


def _message(data: bytes, at: int, most: int) -> tuple[bytes, int] | None:
    """Return the message that is one whole frame at ``at``, and where the frame ends (RFC 6455 §5.2).

    Args:
        most: octets of a message.

    Returns:
        None for a control frame, part of a frame or message, and whatever breaks the rules.
    """
    if len(data) < at + 6 or data[at] not in (_TEXT, _BINARY):
        return None
    size, start = data[at + 1] - _MASKED, at + 2
    if size == 126:
        size, start = int.from_bytes(data[start : start + 2]), start + 2
        if size < 126:
            return None
    elif not 0 <= size < 126:
        return None
    key, begin = data[start : start + 4], start + 4
    end = begin + size
    if end > len(data) or size > most:
        return None
    keys = (key * (size // 4 + 1))[:size]
    message = (int.from_bytes(data[begin:end]) ^ int.from_bytes(keys)).to_bytes(size)
    if data[at] == _TEXT:
        try:
            message.decode()
        except UnicodeDecodeError:
            return None
    return message, end


class _Buffer(WebsocketBuffer):
    """Of a message that is too large it keeps nothing; Hypercorn's own keeps it all, though it has sent 1009."""

    def __init__(self, max_length: int, abort: Callable[[], None]) -> None:
        super().__init__(max_length)
        self._abort: Callable[[], None] | None = abort

    @property
    def overflown(self) -> bool:
        """There was a message that is too large: nothing more is read."""
        return self._abort is None

    def extend(self, event: Message[Any]) -> None:
        if self._abort is not None and self.length + len(event.data) <= self.max_length:
            return super().extend(event)
        if self._abort is not None:  # the client has a moment to read the close
            self._abort()
            self._abort = self.value = None
        raise FrameTooLargeError


_answer_error = WSStream._send_error_response  # noqa: SLF001 (as above)


async def _answer_error_and_close(stream: WSStream, status: int) -> None:
    """What Hypercorn answers to a broken handshake; it would keep the connection, uncounted, as long as the client."""
    await _answer_error(stream, status)
    await stream.send(StreamClosed(stream.stream_id))


WSStream._send_error_response = _answer_error_and_close  # type: ignore[method-assign, assignment]  # noqa: SLF001

_handle = H11Protocol.handle


async def _handle_and_let_go(protocol: H11Protocol, event: Any) -> None:
    await _handle(protocol, event)
    if isinstance(event, Closed):
        server: Any = getattr(protocol.send, "__self__", None)
        await server.idle_task.stop()  # else it is waited for: 5 s in which all of the connection is kept
        # One that pipelines and leaves: its next request would wait for ever.
        protocol.connection = H11WSConnection(protocol.connection)  # type: ignore[arg-type]  # asks to go on reading
        await protocol.can_read.set()


H11Protocol.handle = _handle_and_let_go  # type: ignore[method-assign, assignment]


async def _http_1(protocol: H11Protocol, request: Any) -> None:
    """Nobody gets HTTP/2: over plain TCP no browser speaks it, and nothing limits what it lets a client do."""


H11Protocol._check_protocol = _http_1  # type: ignore[method-assign, assignment]  # noqa: SLF001

_send = H11Protocol._send_h11_event  # noqa: SLF001


async def _send_if_it_fits(protocol: H11Protocol, event: Any) -> None:
    """What is answered to a request whose client has broken the grammar since is dropped, without a traceback."""
    with suppress(LocalProtocolError):
        await _send(protocol, event)


H11Protocol._send_h11_event = _send_if_it_fits  # type: ignore[method-assign, assignment]  # noqa: SLF001

_run = TCPServer.run


async def _run_and_forget(server: TCPServer) -> None:
    """Let go of what belonged to the connection. Else it waits, 30 KB in circles, for a full garbage collection."""
    reader, wire = server.reader, server.writer.transport
    try:
        await _run(server)
    finally:
        if frames := vars(server).get("frames"):
            frames._parse_more.close()  # noqa: SLF001 (its own generator, which goes on as long as it does)
        vars(server).clear()
        if error := reader.exception():
            error.__traceback__ = None  # a reset: the frames that it went through hold the reader, which holds it
        if wire.is_closing() and "_read_ready_cb" in vars(wire):
            vars(wire)["_read_ready_cb"] = None  # a method of its own, which asyncio never lets go of


TCPServer.run = _run_and_forget  # type: ignore[method-assign, assignment]


def log_dropped(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exception handler of the loop: a client whose bytes make Hypercorn raise is dropped, with one line in the log."""
    error = context.get("exception")
    if context["message"] != "Unhandled exception in client_connected_cb":
        return loop.default_exception_handler(context)
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    log.info("a client is dropped: %s %.200r", type(error).__name__, str(error))
    return None
