"""Clients that break the rules, beside a healthy crowd: they are to be refused, and the crowd is to notice nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import gevent  # type: ignore[import-untyped]

from loadtest import wire
from loadtest.fleet import FleetUser
from loadtest.probe import ProbeError, ProbeUser, StompClient, timed

__all__ = ["Hostile", "ProbeUser"]

_WATCH = {"destination": "/app/presence.subscribe"}
_FRAMES: dict[str, tuple[bytes, str]] = {
    "unknown command": (b"NONSENSE\n\n\0", "1002"),
    "bad header line": (b"SEND\nno colon\n\n\0", "1002"),
    "false content-length": (b"SEND\ndestination:/app/heartbeat\ncontent-length:2\n\nfour\0", "1002"),
    "unknown destination": (wire.stomp("SEND", {"destination": "/app/nothing"}), "1008"),
    "bad JSON": (wire.stomp("SEND", _WATCH, '{"userIds": ['), "1008"),
    "bad ids": (wire.stomp("SEND", _WATCH, '{"userIds": ["no:id"]}'), "1008"),
    "too large": (wire.stomp("SEND", _WATCH, " " * 100_000), "1009"),
}
"""By name: what is sent once connected, and the close code that must come."""


class Hostile(FleetUser):
    """Does the crowd notice clients that break the rules?"""

    every = 0.2

    def script(self) -> None:
        self.arrive()
        self.phase("hostile")
        number = itertools.count()
        due = self.crowd.engine.now()
        while True:
            gevent.spawn(self._attack, f"load-hostile-{self.place}-{next(number)}")
            due += self.setting("every")
            self.pause(max(0.0, due - self.crowd.engine.now()))

    def _attack(self, user: str) -> None:
        attacks: dict[str, Callable[[StompClient], None]] = {
            "bad token": lambda client: _refused(client, "nonsense"),
            "unmasked frame": lambda client: self._unmasked(client, user),
            "half a frame": lambda client: self._half(client, user),
        }
        name = self.dice.choice([*attacks, *_FRAMES])
        attack = attacks.get(name) or (lambda client: self._frame(client, user, *_FRAMES[name]))
        with StompClient(self.dice.choice(self.crowd.target.instances)) as client:
            timed(self.recording.metrics, f"HOSTILE {name}", lambda: attack(client))

    def _begin(self, client: StompClient, user: str) -> None:
        client.upgrade()
        client.connect(self.crowd.target.token(user))

    def _frame(self, client: StompClient, user: str, payload: bytes, code: str) -> None:
        self._begin(client, user)
        client.send_text(payload)
        _ended(client, code)

    def _unmasked(self, client: StompClient, user: str) -> None:
        self._begin(client, user)
        client.write(b"\x81\x02hi")
        _ended(client)

    def _half(self, client: StompClient, user: str) -> None:
        """It goes in the middle of a frame."""
        self._begin(client, user)
        client.write(wire.frame(wire.stomp("SEND", _WATCH, "{}"), random.randbytes(4))[:20])


def _refused(client: StompClient, token: str) -> None:
    client.upgrade()
    try:
        client.connect(token)
    except ProbeError:
        return _ended(client, "1008")
    raise ProbeError("it was let in")


def _ended(client: StompClient, code: str | None = None) -> None:
    """The server must close, with this code where the contract names one."""
    came = client.expect_end()
    if code is not None and came != code:
        raise ProbeError(f"closed with {came}, not {code}")
