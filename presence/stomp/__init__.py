"""STOMP 1.0, 1.1 and 1.2 without I/O: a codec, and the server's side of a connection."""

from __future__ import annotations

from presence.stomp.bucket import TokenBucket
from presence.stomp.connection import (
    VERSIONS,
    Connect,
    Connection,
    Disconnect,
    Event,
    Nothing,
    Send,
    Subscribe,
    Subscription,
    Unsubscribe,
)
from presence.stomp.errors import StompError
from presence.stomp.frames import Frame, Limits, Parser, encode

__all__ = [
    "VERSIONS",
    "Connect",
    "Connection",
    "Disconnect",
    "Event",
    "Frame",
    "Limits",
    "Nothing",
    "Parser",
    "Send",
    "StompError",
    "Subscribe",
    "Subscription",
    "TokenBucket",
    "Unsubscribe",
    "encode",
]
