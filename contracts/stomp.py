"""STOMP 1.0, 1.1 and 1.2 as a client sees it. It shares nothing with any server, so that no bug hides another.

Out, whatever a case asks for is encoded. In, the grammar is strict; but for what a clause must be able to speak of
(line ends, frames split over messages), which is taken as it comes and told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COMMANDS = frozenset({"CONNECTED", "MESSAGE", "RECEIPT", "ERROR"})
"""All that a server may send."""
WITH_BODY = frozenset({"MESSAGE", "ERROR"})

Headers = tuple[tuple[str, str], ...]


class Malformed(Exception):
    """What the server sent is no STOMP."""


@dataclass(frozen=True)
class Frame:
    """One frame from the server, with its headers in their order."""

    command: str
    headers: Headers
    body: str
    crlf: bool = False
    """Some line of its head ended in CR LF."""

    def get(self, name: str) -> str | None:
        """The header's value: of repeated ones "only the first header entry SHOULD be used"."""
        return next((value for key, value in self.headers if key == name), None)

    def __str__(self) -> str:
        head = "".join(f"{name}:{value}\n" for name, value in self.headers)
        return f"{self.command}\n{head}\n{self.body}␀"


def encode(command: str, headers: Iterable[tuple[str, str]], body: str = "", *, version: str | None = "1.2") -> str:
    r"""A frame with its NUL.

    Args:
        version: decides what is escaped: nothing in 1.0, and never in CONNECT; CR is `\r` in 1.2 only. None: not agreed
            yet.
    """
    escapes = {} if command in {"CONNECT", "STOMP"} else _ESCAPES.get(version or "1.2", {})
    table = {ord(plain): escaped for escaped, plain in escapes.items()}
    lines = [f"{name.translate(table)}:{value.translate(table)}\n" for name, value in headers]
    return f"{command}\n{''.join(lines)}\n{body}\0"


class Decoder:
    """Frames out of what the server sends, in pieces of any size."""

    def __init__(self) -> None:
        self.version: str | None = None
        """As CONNECTED says; None before."""
        self._rest = b""

    @property
    def within_frame(self) -> bool:
        """Some frame has begun and not ended."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[Frame]:
        """Take more.

        Returns:
            the frames that are whole now; LFs between frames are passed over.

        Raises:
            Malformed: with what is wrong and where.
        """
        self._rest += data
        frames: list[Frame] = []
        while True:
            self._rest = self._rest.lstrip(b"\r\n")
            frame = self._next()
            if frame is None:
                return frames
            if frame.command == "CONNECTED":
                self.version = frame.get("version") or "1.0"
            frames.append(frame)

    def _next(self) -> Frame | None:
        """The first frame of the rest, taken off it; None: it is not whole yet."""
        ends = [
            (at, at + len(mark)) for mark in (b"\n\n", b"\n\r\n") if (at := self._rest.find(mark)) >= 0
        ]  # the blank line
        first_nul = self._rest.find(b"\0")
        if not ends or 0 <= first_nul < min(ends)[0]:
            if first_nul >= 0:
                raise Malformed(
                    f"a frame without a blank line after its headers: {_shown(self._rest[: first_nul + 1])}"
                )
            return None
        head_end, body_start = min(ends)
        try:
            lines = self._rest[:head_end].decode().split("\n")
        except UnicodeDecodeError as error:
            raise Malformed(f"a frame's head is not UTF-8: {error}") from error
        crlf = self._rest[head_end + 1 : body_start].startswith(b"\r") or any(line.endswith("\r") for line in lines)
        command, *header_lines = [line.removesuffix("\r") for line in lines]
        if command not in COMMANDS:
            raise Malformed(f"the command {command[:80]!r}, which no server sends")
        headers = tuple(self._header(command, line) for line in header_lines)
        body_end = self._body_end(headers, body_start)
        if body_end is None:
            return None
        try:
            body = self._rest[body_start:body_end].decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"the body of a {command} is not UTF-8: {error}") from error
        if body and command not in WITH_BODY:
            raise Malformed(f"a {command} with a body: {body[:80]!r}")
        self._rest = self._rest[body_end + 1 :]
        return Frame(command, headers, body, crlf)

    def _header(self, command: str, line: str) -> tuple[str, str]:
        name, colon, value = line.partition(":")
        if not colon or not name:
            raise Malformed(f"the header line {line[:80]!r} in a {command}")
        if command == "CONNECTED" or self.version is None:
            return name, value
        return self._unescaped(name), self._unescaped(value)

    def _unescaped(self, text: str) -> str:
        escapes = _ESCAPES.get(self.version or "1.2", {})
        if not escapes or "\\" not in text:
            return text
        plain = []
        at = 0
        while at < len(text):
            if text[at] == "\\":
                pair = text[at : at + 2]
                if pair not in escapes:
                    raise Malformed(f"the escape {pair!r}, which STOMP {self.version} does not have")
                plain.append(escapes[pair])
                at += 2
            else:
                plain.append(text[at])
                at += 1
        return "".join(plain)

    def _body_end(self, headers: Headers, start: int) -> int | None:
        """Where the NUL stands; None: it has not come yet."""
        length = next((value for name, value in headers if name == "content-length"), None)
        if length is None:
            end = self._rest.find(b"\0", start)
            return end if end >= 0 else None
        if not (length.isascii() and length.isdigit()):
            raise Malformed(f"content-length:{length[:80]}")
        end = start + int(length)
        if len(self._rest) <= end:
            return None
        if self._rest[end] != 0:
            raise Malformed(f"content-length:{length}, but no NUL stands after so many bytes")
        return end


_ESCAPES = {
    "1.0": {},
    "1.1": {"\\\\": "\\", "\\n": "\n", "\\c": ":"},
    "1.2": {"\\\\": "\\", "\\r": "\r", "\\n": "\n", "\\c": ":"},
}


def _shown(data: bytes) -> str:
    return repr(data[:120].decode(errors="replace"))
