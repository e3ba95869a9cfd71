"""A locustfile as most would write it: one greenlet and one websocket-client connection to each session."""

from __future__ import annotations

import os

import gevent  # type: ignore[import-untyped]
import websocket
from locust import User, task

PERIOD = float(os.environ["PERIOD"])


class Plain(User):
    """A session that connects and beats; nobody reads its notices, as the others' do not either."""

    @task
    def live(self) -> None:
        """Connect, and beat until the end of the run."""
        ws = websocket.create_connection(os.environ["ADDRESS"], subprotocols=["v12.stomp"], timeout=30)
        ws.send("CONNECT\naccept-version:1.2\nhost:localhost\nAuthorization:Bearer x\n\n\0")
        ws.recv()
        while True:
            gevent.sleep(PERIOD)
            ws.send("SEND\ndestination:/app/heartbeat\n\n\0")
