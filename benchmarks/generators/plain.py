"""A locustfile as most would write it: one greenlet and one websocket-client connection to each session."""

from __future__ import annotations

import os
import time

import gevent  # type: ignore[import-untyped]
import websocket
from locust import User, task

PERIOD = float(os.environ["PERIOD"])


class Plain(User):
    """A session that connects and beats; each beat asks for a receipt, and Locust is told how long that took."""

    @task
    def live(self) -> None:
        """Connect, and beat until the end of the run."""
        ws = websocket.create_connection(os.environ["ADDRESS"], subprotocols=["v12.stomp"], timeout=30)
        ws.send("CONNECT\naccept-version:1.2\nhost:localhost\nAuthorization:Bearer x\n\n\0")
        ws.recv()
        while True:
            gevent.sleep(PERIOD)
            begun = time.perf_counter()
            ws.send("SEND\ndestination:/app/heartbeat\nreceipt:b\n\n\0")
            size = len(ws.recv())
            self.environment.events.request.fire(
                request_type="STOMP",
                name="heartbeat",
                response_time=1000 * (time.perf_counter() - begun),
                response_length=size,
                exception=None,
                context={},
            )
