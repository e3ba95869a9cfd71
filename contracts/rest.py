"""One REST request, and the answer as it came: status, headers in their order, bytes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from contracts.faults import Failed, Unreachable, Untrusted
from contracts.match import ABSENT


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    reason: str
    headers: Sequence[tuple[str, str]]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    @property
    def json(self) -> Any:
        """The body as JSON; `ABSENT` when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return ABSENT

    def header(self, name: str) -> Any:
        """The header's value; several are joined by a comma; `ABSENT`: there is none."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        return ", ".join(values) if values else ABSENT

    def __str__(self) -> str:
        head = "".join(f"{name}: {value}\n" for name, value in self.headers)
        return f"{self.status} {self.reason}\n{head}\n{self.text}"


async def request(
    base: str,
    method: str,
    path: str,
    headers: Sequence[tuple[str, str]],
    body: bytes | None,
    *,
    limit: float,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Ask.

    Args:
        base: "http://host:port".
        limit: s until the answer must be there.
        tls: for https.

    Raises:
        Failed: it was not answered, or not in HTTP.
        Unreachable: no TCP connection came up; Untrusted: its certificate is not trusted.
    """
    expected = f"an answer to {method} {path} within {limit:g} s"
    exchange = _Exchange(base, limit, tls)
    try:
        # The limit of the socket counts each read; the one around it counts them all.
        async with asyncio.timeout(limit):
            return await asyncio.to_thread(exchange.run, method, path, headers, body)
    except ssl.SSLCertVerificationError as error:
        raise Untrusted(base, error.verify_message) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and not exchange.connected:
            raise Unreachable.after(error, base, limit) from error
        if isinstance(error, TimeoutError):
            raise Failed(expected, "none came") from error
        raise Failed(expected, f"the connection broke: {type(error).__name__}: {error}") from error
    finally:
        exchange.end()


class _Exchange:
    """One request and its answer, in a thread; it ends when another thread says so, whatever the server does.

    Args:
        limit: s, of each read.
    """

    def __init__(self, base: str, limit: float, tls: ssl.SSLContext | None) -> None:
        self._url = urlsplit(base)
        self._limit = limit
        self._tls = (tls or ssl.create_default_context()) if self._url.scheme == "https" else None
        self._connection = (
            http.client.HTTPSConnection(self._url.netloc, context=self._tls)
            if self._tls
            else http.client.HTTPConnection(self._url.netloc)
        )
        self._socket: socket.socket | None = None
        self._over = False

    @property
    def connected(self) -> bool:
        """Whether the TCP connection came up."""
        return self._socket is not None

    def run(self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes | None) -> Answer:
        connection = self._connection
        try:
            # Here and not by the connection, which would not tell a fault of TCP from one of TLS.
            connection.sock = socket.create_connection((connection.host, connection.port), self._limit)
            # Kept: the connection forgets it when the answer is the last one over it.
            self._socket = connection.sock
            if self._over:
                raise TimeoutError
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                self._socket = connection.sock = self._tls.wrap_socket(self._socket, server_hostname=connection.host)
            names = {name.lower() for name, _ in headers}
            connection.putrequest(method, self._url.path + path, skip_host="host" in names, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value.encode())
            if body is not None and not names & {"content-length", "transfer-encoding"}:
                connection.putheader("Content-Length", str(len(body)))
            # A body that is too large may be refused before it is sent: the answer is there all the same.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.reason, response.getheaders(), response.read())
        finally:
            connection.close()

    def end(self) -> None:
        """Wake the thread that waits for the server; nothing when the exchange is over."""
        self._over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # The plain shutdown, for TLS too: it ends a read in another thread, which a close does not.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
