"""What the system speaks of: sessions, statuses and changes (DESIGN §1). Values only: no I/O, no clock."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~@-]{0,127}")
"""User and conversation ids (WIRE §1). No colon, so that Redis keys stay unambiguous. Use with ``fullmatch``."""

_IDS = re.compile(rf"(?:{ID.pattern}\n)*+")


def no_ids(values: Sequence[Any]) -> Sequence[Any]:
    """Return the first of some JSON values that is no id; empty: all are ids.

    They are looked at all at once, in a third of the time.
    """
    with suppress(TypeError):  # not all are texts
        lines = "\n".join((*values, ""))
        if lines.count("\n") == len(values) and _IDS.fullmatch(lines):
            return ()
    return [next(value for value in values if not isinstance(value, str) or not ID.fullmatch(value))]


class Reason(StrEnum):
    """Why a user's status changed (WIRE §7)."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    SIGNED_OFF = "signed-off"
    EXPIRED = "expired"
    REVIVED = "revived"
    DRAINED = "drained"
    RESTORED = "restored"


_FRACTIONS = [f".{ms:03}Z" for ms in range(1000)]  # to format one takes longer than all else


def rfc3339(ms: int) -> str:
    """The moment ``ms`` (Unix epoch, milliseconds) as RFC 3339 in UTC with ``Z``."""
    return _second(ms // 1000) + _FRACTIONS[ms % 1000]


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")


@dataclass
class Status:
    """What is known of one user at one moment. Nobody changes it; a frozen one takes thrice as long to make."""

    user: str
    online: bool = False
    version: int = 0
    """Names the user's last change and orders it (µs of the change, made unique); 0: no change is known."""
    last_active: int | None = None
    """Last activity, Unix epoch in ms; None for a user never seen."""

    @cached_property
    def event(self) -> bytes:
        """The body of the MESSAGE that tells of this change, `OnlineStatusEvent` (WIRE §5)."""
        return json.dumps(self._event(), separators=(",", ":")).encode()

    @cached_property
    def snapshot(self) -> bytes:
        """The same body as a snapshot."""
        return json.dumps(self._event() | {"snapshot": True}, separators=(",", ":")).encode()

    def _event(self) -> dict[str, object]:
        timestamp = rfc3339(self.version // 1000) if self.version else None
        return {"userId": self.user, "online": self.online, "timestamp": timestamp, "version": self.version}


@dataclass
class Change(Status):
    """An edge of a user's status, offline→online or online→offline."""

    device: str = "web"
    reason: Reason = Reason.CONNECTED


@dataclass(slots=True, eq=False)
class Session:
    """One live connection of one user on one device, as its instance knows it. Times are monotonic, in s."""

    user: str
    id: str
    device: str
    last_beat: float
    """When the lease was last renewed."""
    last_input: float
    """When the last STOMP byte came in."""
    signed_off: bool = False
    closed: bool = False
    """The connection is gone: nothing may revive this session."""
    watched: set[str] = field(default_factory=set)
    """The users this session watches."""
