"""Drives clients of stompman, over its WebSocket connection."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any
from urllib.parse import urlsplit

import stompman
from stompman.connection_ws import WebSocketConnection

from tests.clients.drivers import orders

QUEUE = "/user/queue/online-status"


class One:
    """One client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.leaving = asyncio.Event()
        self.client: stompman.Client
        self.watched: list[str] = []
        self.task: asyncio.Task[None]

    async def run(self, url: str, token: str) -> None:
        """Be connected until ordered to leave."""
        parts = urlsplit(url)
        server = stompman.ConnectionParameters(
            parts.hostname or "", parts.port or 0, self.name, "", parts.path, {"Authorization": f"Bearer {token}"}
        )
        self.client = stompman.Client(
            [server],
            connection_class=WebSocketConnection,
            connect_retry_attempts=1,
            keep_alive_on_connection_failure=True,  # else it gives up while the server starts
            on_error_frame=lambda frame: orders.tell(self.name, "refused", text=frame.headers["message"]),
        )
        try:
            async with self.client:
                subscription = await self.client.subscribe(QUEUE, self.take, on_suppressed_exception=print)
                orders.tell(self.name, "connected")
                await self.leaving.wait()
                await subscription.unsubscribe()
            orders.tell(self.name, "left")
        except* stompman.FailedAllConnectAttemptsError as errors:
            orders.tell(self.name, "refused", text=str(errors.exceptions[0]))

    async def take(self, frame: stompman.MessageFrame) -> None:
        orders.tell(self.name, "message", **json.loads(frame.body))

    async def send(self, destination: str, body: Any = "") -> None:
        await self.client.send(body.encode(), destination)

    async def back(self) -> None:
        """Subscribed again it is by itself; what is watched is watched anew, as an application does it."""
        await self.watch(self.watched)
        orders.tell(self.name, "connected")

    async def watch(self, users: list[str]) -> None:
        self.watched = users
        await self.send("/app/presence.subscribe", json.dumps({"userIds": users}))


class Log(logging.Handler):
    """stompman tells of a lost and a new connection in its log only. It names the login, which is the client's name."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        for one in clients.values():
            if f"login={one.name!r}" not in said:
                continue
            if said.startswith("connection lost"):
                orders.tell(one.name, "closed")
            elif said.startswith("reconnected"):
                asyncio.get_running_loop().create_task(one.back())


clients: dict[str, One] = {}


async def main() -> None:
    """Obey."""
    logging.getLogger("stompman").addHandler(Log())
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        order = json.loads(line)
        name = order["client"]
        match order["do"]:
            case "connect":
                clients[name] = one = One(name)
                one.task = asyncio.create_task(one.run(order["url"], order["token"]))
            case "watch":
                await clients[name].watch(order["users"])
            case "beat":
                await clients[name].send("/app/heartbeat")
            case "leave":
                clients[name].leaving.set()


asyncio.run(main())
