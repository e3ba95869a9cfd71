"""The one error of this package (no I/O): `StompError`, for whatever ends a connection with an ERROR frame."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")


class StompError(Exception):
    """The client cannot be served any more: an ERROR frame is due, then a close (WIRE §6)."""

    def __init__(
        self,
        message: str,
        code: int,
        *,
        receipt: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Make the error.

        Args:
            message: names the field or the destination. It may quote the client, so control characters are made
                spaces: the message stays one line, and no NUL ends the ERROR frame early.
            code: WebSocket close code: 1002 grammar and state, 1008 content and limits, 1009 too large, 1013 try again.
            receipt: receipt id of the frame in error, if it asked for a receipt; inside a COMMIT the COMMIT's.
            headers: further headers of the ERROR frame.
        """
        self.message = _CONTROLS.sub(" ", message)
        self.code = code
        self.receipt = receipt
        self.headers = headers
        super().__init__(self.message)
