"""Drives clients of stomp.py, over its WebSocket adapter."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import stomp

from tests.clients.drivers import orders

QUEUE = "/user/queue/online-status"


class Listener(stomp.ConnectionListener):
    """Tells what one client sees."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_connected(self, frame):
        client = clients[self.name]
        client.subscribe(QUEUE, id="sub-0")
        if watched.get(self.name):
            watch(self.name, watched[self.name])
        orders.tell(self.name, "connected")

    def on_message(self, frame):
        orders.tell(self.name, "message", **json.loads(frame.body))

    def on_error(self, frame):
        orders.tell(self.name, "refused", text=frame.headers["message"])

    def on_disconnected(self):
        orders.tell(self.name, "closed")


def watch(name: str, users: list[str]) -> None:
    watched[name] = users
    clients[name].send("/app/presence.subscribe", json.dumps({"userIds": users}))


clients: dict[str, stomp.WSStompConnection] = {}
watched: dict[str, list[str]] = {}
for order in orders.read():
    name = order["client"]
    match order["do"]:
        case "connect":
            url = urlsplit(order["url"])
            clients[name] = stomp.WSStompConnection([(url.hostname, url.port)], ws_path=url.path)
            clients[name].set_listener("", Listener(name))
            clients[name].connect(headers={"Authorization": f"Bearer {order['token']}"})
        case "watch":
            watch(name, order["users"])
        case "beat":
            clients[name].send("/app/heartbeat", "")
        case "leave":
            clients[name].disconnect()
            orders.tell(name, "left")
