"""STOMP 1.0, 1.1 and 1.2 without I/O: a codec, and the server's side of a connection."""

from __future__ import annotations

from presence.stomp.connection import (
    Connect,
    Connection,
    Disconnect,
    Event,
    Send,
    Subscribe,
    Subscription,
    Unsubscribe,
)
from presence.stomp.errors import StompError
from presence.stomp.frames import Limits

__all__ = [
    "Connect",
    "Connection",
    "Disconnect",
    "Event",
    "Limits",
    "Send",
    "StompError",
    "Subscribe",
    "Subscription",
    "Unsubscribe",
]
