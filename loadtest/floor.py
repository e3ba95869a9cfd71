"""A server that does nothing: it answers CONNECT and receipts, and so shows the floor of what the harness measures.

Its readings are what the harness, the kernel and this machine need for themselves: ``python -m loadtest.floor --port
8080``. It checks no token and no grammar, and tells nobody of anything.
"""

from __future__ import annotations

import resource
from _socket import socket as Socket  # noqa: N812 # half the size of socket.socket
from contextlib import suppress
from select import EPOLLIN, EPOLLOUT, epoll
from socket import AF_INET, IPPROTO_TCP, SO_REUSEADDR, SO_REUSEPORT, SOCK_STREAM, SOL_SOCKET, TCP_NODELAY

import click

from loadtest.wire import CLOSE, PING, PONG, accept_of

_BACKLOG = 4096
_CONNECTED = b"CONNECTED\nversion:1.2\nheart-beat:0,0\n\n\0"
_NOBODY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\nConnection: close\r\n\r\n"
    b'{"isOnline":false}'
)


def _frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return a WebSocket frame of a server, of at most 64 KiB."""
    size = len(payload)
    head = bytes((0x80 | opcode, size)) if size < 126 else bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    return head + payload


def _answer(payload: bytes) -> bytes:
    """Return what a STOMP frame is answered with: CONNECTED, the receipt it asks for, or nothing."""
    if payload.startswith((b"CONNECT\n", b"STOMP\n")):
        return _frame(_CONNECTED)
    head = payload[: payload.find(b"\n\n") + 1]
    at = head.find(b"\nreceipt:")
    if at < 0:
        return b""
    return _frame(b"RECEIPT\nreceipt-id:" + head[at + 9 : head.find(b"\n", at + 1)] + b"\n\n\0")


class Floor:
    """The server, on one epoll set."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, share: bool = False) -> None:
        """Listen.

        Args:
            host: IPv4 address.
            port: 0 for any that is free.
            share: Whether other processes may listen on the same port; the kernel spreads the connections over them.
        """
        self._listener = Socket(AF_INET, SOCK_STREAM)
        self._listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        if share:
            self._listener.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
        self._listener.bind((host, port))
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._epoll = epoll()
        self._epoll.register(self._listener.fileno(), EPOLLIN)
        self._open: dict[int, Socket] = {}
        self._rest: dict[int, bytes] = {}  # what came of a frame, or of an upgrade, that is not whole yet
        self._out: dict[int, bytes] = {}  # what the socket did not take
        self._upgrading: set[int] = set()

    def serve(self) -> None:
        """Serve until the process ends."""
        listener = self._listener.fileno()
        while True:
            for fd, event in self._epoll.poll(-1, 1024):
                if fd == listener:
                    self._accept()
                else:
                    try:
                        if event & EPOLLOUT:
                            self._write(fd, b"")
                        if event & ~EPOLLOUT:
                            self._read(fd)
                    except OSError:
                        self._close(fd)

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionError):
            for _ in range(256):
                number, _ = self._listener._accept()  # type: ignore[attr-defined] # noqa: SLF001 # a bare _socket has no accept
                one = Socket(fileno=number)
                one.setblocking(False)
                one.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
                self._open[number] = one
                self._upgrading.add(number)
                self._epoll.register(number, EPOLLIN)

    def _read(self, fd: int) -> None:
        with suppress(BlockingIOError):
            data = self._open[fd].recv(32_768)
            if not data:
                return self._close(fd)
            if fd in self._rest:
                data = self._rest.pop(fd) + data
            data = self._upgrade(fd, data) if fd in self._upgrading else self._read_frames(fd, data)
            if data and fd in self._open:
                self._rest[fd] = data

    def _upgrade(self, fd: int, data: bytes) -> bytes:
        """Answer the upgrade, and return what is not read of ``data``."""
        head, blank, rest = data.partition(b"\r\n\r\n")
        if not blank:
            return data
        at = head.lower().find(b"\r\nsec-websocket-key:")
        if at < 0 and head.startswith(b"GET /api/presence/check/"):  # what is looked at before a run
            self._write(fd, _NOBODY)
            self._close(fd)
            return b""
        if at < 0:
            self._write(fd, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self._close(fd)
            return b""
        key = head[at + 20 :].split(b"\r\n", 1)[0].strip()
        self._upgrading.discard(fd)
        self._write(
            fd,
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Protocol: v12.stomp\r\nSec-WebSocket-Accept: " + accept_of(key) + b"\r\n\r\n",
        )
        return self._read_frames(fd, rest) if rest else rest

    def _read_frames(self, fd: int, data: bytes) -> bytes:
        """Answer the frames in ``data``, and return what is not read of it."""
        start, size, out = 0, len(data), b""
        while size - start >= 6:
            opcode, length, at = data[start] & 0x0F, data[start + 1] & 0x7F, start + 2
            if length > 125:
                at += 2 if length == 126 else 8
                length = int.from_bytes(data[start + 2 : at], "big")
            end = at + 4 + length
            if end > size:
                break
            mask = int.from_bytes((data[at : at + 4] * (length // 4 + 1))[:length], "big")
            payload = (int.from_bytes(data[at + 4 : end], "big") ^ mask).to_bytes(length, "big")
            start = end
            if opcode < CLOSE:
                out += _answer(payload)
            elif opcode == PING:
                out += _frame(payload, PONG)
            elif opcode == CLOSE:
                self._write(fd, out + _frame(payload[:2], CLOSE))
                self._close(fd)
                return b""
        if out:
            self._write(fd, out)
        return data[start:]

    def _write(self, fd: int, data: bytes) -> None:
        before = self._out.pop(fd, b"")
        data = before + data
        with suppress(BlockingIOError):
            data = data[self._open[fd].send(data) :]
        if data:
            self._out[fd] = data
        if data or before:
            self._epoll.modify(fd, EPOLLIN | EPOLLOUT if data else EPOLLIN)

    def _close(self, fd: int) -> None:
        self._open.pop(fd).close()
        self._rest.pop(fd, None)
        self._out.pop(fd, None)
        self._upgrading.discard(fd)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="IPv4 address to listen on.")
@click.option("--port", default=0, type=click.IntRange(0, 65_535), help="Port; 0 for any that is free.")
@click.option("--share", is_flag=True, help="Let several such processes listen on the port.")
def main(host: str, port: int, share: bool) -> None:
    """A server that answers and does nothing else: the floor of what the harness measures."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        floor = Floor(host, port, share=share)
        click.echo(f"listening on {host}:{floor.port}")
        with suppress(KeyboardInterrupt):
            floor.serve()
    except OSError as error:  # the port is taken, or there are more connections than files
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
