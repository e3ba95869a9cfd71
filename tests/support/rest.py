"""HTTP as plain as it goes: one request, one answer, on a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json as jsonlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Response:
    """An answer; names of headers count in any case."""

    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        """The body, which must be JSON."""
        return jsonlib.loads(self.body)


async def request(
    method: str,
    url: str,
    *,
    token: str | None = None,
    json: object = None,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 10.0,
) -> Response:
    """Send one request.

    Args:
        method: any method.
        url: ``http://host:port/path?query``; the path is sent as it is.
        token: sent as ``Authorization: Bearer``.
        json: sent as the body, with its content type.
        body: sent as the body as it is.
        headers: further headers; they win.
        timeout: of each step, in s.

    Raises:
        OSError: no connection, or no answer in time.
    """
    given = {name.lower(): value for name, value in (headers or {}).items()}
    if json is not None:
        body = jsonlib.dumps(json).encode()
        given.setdefault("content-type", "application/json")
    if token is not None:
        given.setdefault("authorization", f"Bearer {token}")
    return await asyncio.to_thread(_request, method, url, body, given, timeout)


def _request(method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float) -> Response:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body, dict(headers))
        answer = connection.getresponse()
        return Response(answer.status, answer.headers, answer.read())
    except http.client.HTTPException as error:
        raise OSError(f"{method} {url}: {error!r}") from error
    finally:
        connection.close()


async def raw(url: str, *chunks: bytes, head: bool = False, timeout: float = 20.0) -> Response:
    """Send bytes as they are, on a connection of their own, and read the answer, which may come before all are sent.

    Args:
        head: the request is a HEAD, whose answer has no body.

    Raises:
        OSError: no connection, no answer in time, or one that is no HTTP.
    """
    return await asyncio.to_thread(_raw, url, chunks, head, timeout)


def _raw(url: str, chunks: tuple[bytes, ...], head: bool, timeout: float) -> Response:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout) as connection:
        with contextlib.suppress(ConnectionError):  # it has read enough, and has answered
            for chunk in chunks:
                connection.sendall(chunk)
        answer = http.client.HTTPResponse(connection, method="HEAD" if head else "GET")
        try:
            answer.begin()
            return Response(answer.status, answer.headers, answer.read())
        except http.client.HTTPException as error:
            raise OSError(f"{chunks[0][:200]!r}: {error!r}") from error
        finally:
            answer.close()
