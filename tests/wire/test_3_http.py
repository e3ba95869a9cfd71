"""WIRE §3, its HTTP part: who may upgrade and where, the SockJS base, 503 before the upgrade; and health."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from os import kill
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as ws_connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from tests.support.rest import Response, raw
from tests.support.server import ServerProcess, environment
from tests.support.waiting import wait_until

PATHS = ("/ws", "/ws/websocket", "/ws/000/abcdefgh/websocket")
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
KEY = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
HANDSHAKE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", KEY)


def upgrade(server: ServerProcess, path: str = "/ws", **options: Any) -> ws_connect:
    url = f"ws://127.0.0.1:{server.port}{path}"
    return ws_connect(url, proxy=None, compression=None, open_timeout=10, close_timeout=1, **options)


async def open_socket(server: ServerProcess, path: str = "/ws", **options: Any) -> None:
    """Open a WebSocket and close it again."""
    async with upgrade(server, path, **options) as ws:
        assert isinstance(ws, ClientConnection)


async def refused(server: ServerProcess, path: str = "/ws", **options: Any) -> Response:
    """Ask for a WebSocket, which must be refused before the upgrade with a problem document."""
    with pytest.raises(InvalidStatus) as caught:
        await open_socket(server, path, **options)
    answer = caught.value.response
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = json.loads(answer.body or b"")
    assert problem["status"] == answer.status_code
    assert set(problem) == {"type", "title", "status", "detail"}
    return Response(answer.status_code, answer.headers, bytes(answer.body or b""))  # type: ignore[arg-type]


async def handshake(server: ServerProcess, *lines: str, tail: bytes = b"") -> Response:
    """Send the lines after `GET /ws`, and what follows with them; return the answer's head."""
    request = "\r\n".join(["GET /ws HTTP/1.1", "Host: a", *lines, "", ""]).encode("latin-1")
    return await raw(server.http, request + tail, head=True)


# Where.


@pytest.mark.parametrize("path", PATHS)
async def test_three_paths_take_upgrades(server, connect, user, path):
    """WIRE §3.

    "`/ws`: WebSocket upgrade [...]. Without an upgrade the same path is a SockJS base: `/ws/info`,
    `/ws/{server}/{session}/websocket`, `/ws/websocket`".
    """
    is_sockjs = path.endswith("abcdefgh/websocket")
    client = await connect(server, user, url=f"ws://127.0.0.1:{server.port}{path}", sockjs=is_sockjs)
    assert client.connected.headers["user-name"] == user
    assert client.sockjs_frames == (["o"] if is_sockjs else [])


@pytest.mark.parametrize(
    "path",
    (
        "/",
        "/ws/",
        "/ws/info",
        "/ws/x",
        "/ws/a/websocket",
        "/ws/a/b/c/websocket",
        "/ws/a/b/xhr_streaming",
        "/ws/a.b/c/websocket",
        "/ws/a/c.d/websocket",
        "//ws",
        "/WS",
        "/api/presence/friends",
        "/%FF%0A%00",
    ),
)
async def test_elsewhere_an_upgrade_is_404(server, path):
    """WIRE §2: "404 unknown path"; §3 lists the paths of WebSockets."""
    assert (await refused(server, path)).status == 404


async def test_the_sockjs_base_greets(server):
    """WIRE §3: "Without an upgrade the same path is a SockJS base" (SockJS 0.3.3, "Base URL Tests")."""
    for path in ("/ws", "/ws/"):
        answer = await server.get(path)
        assert (answer.status, answer.body) == (200, b"Welcome to SockJS!\n")
        assert answer.headers["Content-Type"].startswith("text/plain")


async def test_sockjs_info_says_what_its_clients_ask_for(server):
    """WIRE §3: "`/ws/info`" (SockJS 0.3.3, "Info test")."""
    first, second = [await server.get(path) for path in ("/ws/info", "/ws/info?t=1752748200123")]
    assert first.status == 200
    assert first.headers["Content-Type"].partition(";")[0] == "application/json"
    assert first.headers["Cache-Control"] == "no-store"
    info = first.json()
    assert info | {"entropy": 0} == {"websocket": True, "cookie_needed": False, "origins": ["*:*"], "entropy": 0}
    assert 0 <= info["entropy"] < 2**32
    assert second.json()["entropy"] != info["entropy"]


async def test_sockjs_info_is_for_pages_of_allowed_origins_with_credentials(server, user):
    """WIRE §3.

    "SockJS `/info` echoes allowed origins with `Access-Control-Allow-Credentials: true` (its client asks with
    credentials); REST answers never carry that header".
    """
    for origin, is_allowed in (("http://localhost:3000", True), ("https://evil.example", False), ("null", False)):
        answer = await server.get("/ws/info", headers={"Origin": origin})
        assert answer.status == 200
        assert "Origin" in answer.headers["Vary"]
        assert answer.headers["Access-Control-Allow-Origin"] == (origin if is_allowed else None)
        assert answer.headers["Access-Control-Allow-Credentials"] == ("true" if is_allowed else None)
        for path in ("/ws", "/ws/x", "/api/presence/friends", "/health/live"):
            answer = await server.get(path, user, headers={"Origin": origin})
            assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_sockjs_info_answers_options_for_a_year(server):
    """WIRE §3: "`/ws/info`" (SockJS 0.3.3, "Info test", test_options)."""
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "GET"}
    answer = await server.options("/ws/info", headers=asked)
    assert answer.status == 204
    assert answer.body == b""
    assert answer.headers["Cache-Control"] == "public, max-age=31536000"
    assert answer.headers["Access-Control-Max-Age"] == "31536000"
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    methods = answer.headers["Access-Control-Allow-Methods"]
    assert "GET" in methods
    assert "OPTIONS" in methods


@pytest.mark.parametrize("path", ("/ws/x", "/ws/a/b/xhr", "/ws/a/b/eventsource", "/ws/iframe.html", "/ws/a/b"))
async def test_other_sockjs_transports_are_not_there(server, path):
    """WIRE §3: the base has three paths; "404 unknown path" (§2)."""
    for method in ("GET", "POST"):
        answer = await server.request(method, path)
        assert answer.status == 404
        assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("path", PATHS[1:])
async def test_without_an_upgrade_a_websocket_path_says_so(server, path):
    """WIRE §2: "Errors are RFC 9457 problem documents"."""
    answer = await server.get(path)
    assert answer.status == 400
    assert "upgrade" in answer.json()["detail"]
    assert (await server.post(path)).status == 405


# Who.


@pytest.mark.parametrize("path", PATHS)
async def test_only_allowed_origins_may_upgrade(server, path):
    """WIRE §3.

    "`Origin`: the host and port of the request (scheme not compared), or [...], when the server listens on loopback
    only, any loopback origin; all else, and `null`, 403 before the upgrade. No `Origin`: a native client, allowed".
    """
    await open_socket(server, path)
    for origin in (
        f"http://127.0.0.1:{server.port}",
        f"https://127.0.0.1:{server.port}",
        "http://localhost:3000",
        "http://LOCALHOST",
        "https://127.8.9.1:1",
        "http://[::1]:8080",
    ):
        await open_socket(server, path, origin=Origin(origin))
    for origin in (
        "null",
        "https://evil.example",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "file://",
    ):
        assert (await refused(server, path, origin=Origin(origin))).status == 403


async def test_the_scheme_of_an_origin_is_not_compared_but_its_host_and_port(server):
    """WIRE §3: "`Origin`: the host and port of the request (scheme not compared)"."""
    for host, origin, status in (
        ("chat.example", "http://chat.example", 101),
        ("chat.example", "https://CHAT.example", 101),
        ("chat.example:8443", "https://chat.example:8443", 101),
        ("chat.example:443", "https://chat.example", 101),
        ("chat.example:8443", "https://chat.example", 403),
        ("chat.example:8443", "https://chat.example:8444", 403),
        ("chat.example", "https://x.chat.example", 403),
        ("chat.example", "chat.example", 403),
        ("", "https://", 403),
        ("", "null", 403),
        ("\xff", "http://evil.example", 403),
    ):
        lines = "\r\n".join(["GET /ws HTTP/1.1", f"Host: {host}", f"Origin: {origin}", *HANDSHAKE, "", ""])
        answer = await raw(server.http, lines.encode("latin-1"), head=True)
        assert answer.status == status, (host, origin)


async def test_where_others_can_reach_the_server_loopback_is_no_excuse(start_server):
    """WIRE §3.

    "or one of a configured list, or, when the server listens on loopback only, any loopback origin; all else [...]
    403".
    """
    server = await start_server(host="0.0.0.0", allowed_origins="https://app.example")
    for origin in ("https://app.example", "https://APP.example", f"http://127.0.0.1:{server.port}"):
        await open_socket(server, origin=Origin(origin))
    for origin in (
        "http://localhost:3000",
        "http://127.0.0.1:3000",
        "http://app.example",
        "https://app.example:8443",
        "null",
    ):
        assert (await refused(server, origin=Origin(origin))).status == 403
    info = await server.get("/ws/info", headers={"Origin": "https://app.example"})
    assert info.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert info.headers["Access-Control-Allow-Credentials"] == "true"


# How many.


async def test_more_connections_than_configured_are_503_before_the_upgrade(start_server, connect, users):
    """WIRE §3.

    "More than the configured connections in a process (default: open-file limit − 512): 503 before the upgrade"; §2:
    "503 with `Retry-After`".
    """
    server = await start_server(max_connections=2)
    first, _ = [await connect(server, users("user")) for _ in range(2)]
    answer = await refused(server)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    # REST goes on; and one that leaves makes room.
    assert (await server.get("/api/presence/friends", users("user"))).status == 200
    await first.disconnect()

    async def has_room() -> bool:
        try:
            await open_socket(server)
        except InvalidStatus:
            return False
        return True

    await wait_until(has_room)


async def test_the_open_file_limit_decides_when_nothing_is_configured(connect, users):
    """WIRE §3: "(default: open-file limit − 512)"."""
    server = ServerProcess()
    try:
        program = f"ulimit -n 514 && exec {sys.executable} -m presence serve"
        await server.spawn(["sh", "-c", program], environment(server.settings)).ready()
        for _ in range(2):
            await connect(server, users("user"))
        assert (await refused(server)).status == 503
        await server.finish()
    finally:
        server.close()


# Broken handshakes.


@pytest.mark.parametrize(
    "lines",
    (
        HANDSHAKE[:3],
        (*HANDSHAKE[:2], KEY),
        (*HANDSHAKE[:2], "Sec-WebSocket-Version: 8", KEY),
        (*HANDSHAKE, "Content-Length: 5"),
    ),
    ids=("no key", "no version", "an old version", "a body"),
)
async def test_a_broken_handshake_is_refused_and_the_connection_closed(server, lines):
    """DESIGN §7: "What one client does never [...] grows the cost of another": it does not stay, uncounted."""

    def ask() -> bytes:
        request = "\r\n".join(["GET /ws HTTP/1.1", "Host: a", *lines, "", ""]).encode() + b"hello"
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(65_536):  # to the end of the connection
                answer += part
            return answer

    assert (await asyncio.to_thread(ask)).startswith(b"HTTP/1.1 400")


async def test_what_comes_before_the_server_has_accepted_is_refused(server):
    """RFC 6455 §4.1: a client waits for the server's handshake; no traceback."""
    for tail in (b"\xff" * 100, b"\x81\x85\x00\x00\x00\x00hello"):
        assert (await handshake(server, *HANDSHAKE, tail=tail)).status in (101, 400)


@pytest.mark.parametrize("name", ("Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol"))
async def test_a_header_that_cannot_be_read_costs_its_client_the_connection_alone(server, user, name):
    """DESIGN §7: "What bad input gets": a line in the log, and no traceback."""
    before = server.log.count("a client is dropped")
    with pytest.raises(OSError, match=r"RemoteDisconnected|Connection reset"):
        await handshake(server, *HANDSHAKE, f"{name}: \xff")
    await wait_until(lambda: server.log.count("a client is dropped") > before, what="the log to say so")
    assert not await server.is_online(user)


@pytest.mark.parametrize(
    "extensions",
    (
        "x-unknown",
        ";;,",
        "permessage-deflate; client_max_window_bits=x",
        "permessage-deflate; server_max_window_bits=99",
    ),
)
async def test_what_is_not_known_is_not_taken(server, extensions):
    """RFC 6455 §4.2.2: of extensions and subprotocols that are not ours none is chosen."""
    offered = (f"Sec-WebSocket-Extensions: {extensions}", "Sec-WebSocket-Protocol: ,, chat")
    answer = await handshake(server, *HANDSHAKE, *offered)
    assert answer.status == 101
    assert "Sec-WebSocket-Extensions" not in answer.headers
    assert "Sec-WebSocket-Protocol" not in answer.headers


# Health.


async def test_the_server_says_that_it_lives_and_is_ready(server):
    """DESIGN §8, `health.py`: liveness, and each dependency with its state and since when."""
    answer = await server.get("/health/live")
    assert (answer.status, answer.json()) == (200, {"status": "live"})
    answer = await server.get("/health/ready")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    ready = answer.json()
    assert ready["status"] == "ready"
    assert set(ready["dependencies"]) == {"store", "history"}
    for dependency in ready["dependencies"].values():
        assert dependency["state"] == "up"
        assert RFC3339.fullmatch(dependency["since"])
    assert (await server.post("/health/ready")).status == 405


async def test_without_its_store_the_server_lives_and_is_not_ready(start_server, valkey):
    """DESIGN §7: "A failed dependency is reported"."""
    store = await valkey()
    server = await start_server(redis_url=store.url, store_timeout_seconds=0.3)
    await store.freeze()

    async def is_ready() -> bool:
        return bool((await server.get("/health/ready")).status == 200)

    async def is_down() -> bool:
        return not await is_ready()

    await wait_until(is_down)
    answer = await server.get("/health/ready")
    assert answer.status == 503
    assert answer.json()["status"] == "not ready"
    assert answer.json()["dependencies"]["store"]["state"] == "down"
    assert set(answer.json()["dependencies"]["store"]) == {"state", "since"}  # where it is, is no client's business
    assert answer.json()["dependencies"]["history"]["state"] == "up"
    assert (await server.get("/health/live")).status == 200
    await store.thaw()
    await wait_until(is_ready)


async def test_a_server_that_stops_is_not_ready_and_takes_no_more_connections(start_server, valkey, connect, user):
    """WIRE §4: "planned server stop"; §3: "503 before the upgrade"."""
    store = await valkey()
    server = await start_server(redis_url=store.url, store_timeout_seconds=0.3)
    await connect(server, user)
    # The leases cannot be shortened, so that the stop takes some seconds.
    await store.freeze()
    kill(server.pid, signal.SIGTERM)

    async def is_stopping() -> bool:
        answer = await server.get("/health/ready")
        return bool((answer.status, answer.json()["status"]) == (503, "stopping"))

    await wait_until(is_stopping)
    assert (await refused(server)).status == 503
    assert (await server.get("/health/live")).status == 200
    await store.thaw()
    assert await server.exited() == 0
