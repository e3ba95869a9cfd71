"""Problem documents, RFC 9457 (WIRE §2). Quart is wired to them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus


class Problem(Exception):
    """An HTTP error to be answered with.

    Args:
        status: HTTP status code.
        detail: one sentence for the client, which names the field or parameter.
        headers: extra headers of the answer, such as ``Retry-After``.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = int(status)
        self.detail = detail
        self.headers = dict(headers or {})

    @property
    def title(self) -> str:
        """The status's own phrase: RFC 9457 §4.2.1 wants just that with ``about:blank``."""
        return HTTPStatus(self.status).phrase

    def body(self) -> dict[str, object]:
        """Return the document, to be sent as ``application/problem+json``."""
        return {"type": "about:blank", "title": self.title, "status": self.status, "detail": self.detail}
