"""SockJS 0.3 framing of a WebSocket: what the ``websocket`` transport puts round each text. Pure functions."""

from __future__ import annotations

import json
import re

from presence.stomp.errors import StompError

OPEN = "o"
"""First frame of a connection."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def unwrap(text: str) -> list[str]:
    """Return the messages in what the client sent: a JSON array of strings, or one JSON string.

    Raises:
        StompError: 1002, it is neither.
    """
    if not text:
        return []  # sockjs-protocol: "Empty messages should be ignored"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    messages = [value] if isinstance(value, str) else value
    # A lone surrogate can be escaped in JSON but not written in UTF-8: it is no text.
    if not isinstance(messages, list) or not all(isinstance(m, str) and not _SURROGATE.search(m) for m in messages):
        raise StompError("SockJS message is no array of strings", 1002)
    return messages


def wrap(text: str) -> str:
    """Return the frame with ``text`` as its one message. ASCII only, as some browsers garble other characters."""
    return f"a[{json.dumps(text)}]"


def closing(code: int, reason: str) -> str:
    """Return the frame that goes before the close of the WebSocket."""
    return f"c[{code},{json.dumps(reason)}]"
