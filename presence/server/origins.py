"""Which web pages may talk to the server (WIRE §2 CORS, §3 Origin)."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit


class Origins:
    """Decides on ``Origin`` headers.

    Args:
        listed: allowed origins, in lower case.
        loopback_only: the server listens on loopback only, so that any loopback origin is allowed.
    """

    def __init__(self, listed: Collection[str], *, loopback_only: bool) -> None:
        self._listed = frozenset(listed)
        self._loopback_only = loopback_only

    def allow(self, origin: str, host: str) -> bool:
        """Return whether the origin is allowed in a request to ``host`` (the `Host` header)."""
        origin = origin.lower()
        if origin in self._listed:
            return True
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if not parts.scheme or not name:
            return False  # `null` among others
        # "the host and port of the request (scheme not compared)"
        default = (":80", ":443")
        own = parts.netloc.removesuffix(default[0]).removesuffix(default[1])
        if own == host.lower().removesuffix(default[0]).removesuffix(default[1]):
            return True
        return self._loopback_only and is_loopback(name)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
