"""STOMP 1.0, 1.1 and 1.2 frames to bytes and back, for either side of a connection. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from presence.stomp.errors import StompError

# "The CONNECT and CONNECTED frames do not escape [...] in order to remain backward compatible with STOMP 1.0", and
# "STOMP servers MUST handle a STOMP frame in the same manner as a CONNECT frame."
_VERBATIM = frozenset({"CONNECT", "STOMP", "CONNECTED"})
# "Only the SEND, MESSAGE, and ERROR frames MAY have a body."
_WITH_BODY = frozenset({"SEND", "MESSAGE", "ERROR"})

_UNESCAPED: Mapping[str, Mapping[str, str]] = {
    "1.1": {"n": "\n", "c": ":", "\\": "\\"},
    "1.2": {"r": "\r", "n": "\n", "c": ":", "\\": "\\"},
}
_ESCAPED: Mapping[str, dict[int, str]] = {
    version: str.maketrans({character: f"\\{letter}" for letter, character in letters.items()})
    for version, letters in _UNESCAPED.items()
}

_CONTENT = re.compile(rb"[^\r\n]")
_HEAD_END = re.compile(rb"\n\r?\n")
_HEAD_END_OR_NUL = re.compile(rb"\n\r?\n|\0")
_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may send (WIRE §6)."""

    frame_bytes: int = 65536
    """Octets of one frame, from its command to its NUL, both included."""
    header_lines: int = 64
    """Header lines of one frame."""
    header_line_bytes: int = 8192
    """Octets of one header line, without its end of line."""
    subscriptions: int = 16
    """Subscriptions of one connection."""
    held_sends: int = 100
    """SENDs that one connection holds in transactions; also how many transactions may be open."""
    frames_per_second: float = 100.0
    """Frames a second, sustained."""
    frames_burst: int = 400
    """Frames at one go."""
    connect_seconds: float = 10.0
    """Seconds within which the CONNECT frame must come."""


@dataclass(slots=True)
class Frame:
    """One frame: headers are unescaped, and of repeated ones hold the first."""

    command: str
    headers: dict[str, str]
    body: bytes


def encode(
    command: str,
    headers: Iterable[tuple[str, str]] | Mapping[str, str],
    body: bytes = b"",
    *,
    version: str,
) -> bytes:
    """Return the frame as ``version`` ("1.0", "1.1", "1.2") writes it, with a ``content-length`` if it has a body.

    Lines end with LF alone, and nothing precedes the command: old clients know no other form.
    """
    escapes = {} if command in _VERBATIM else _ESCAPED.get(version, {})
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    lines = [command, *(f"{name.translate(escapes)}:{value.translate(escapes)}" for name, value in pairs)]
    if body:
        lines.append(f"content-length:{len(body)}")
    # An error may quote an id out of JSON, where lone surrogates can be written: those become question marks.
    return "\n".join(lines).encode(errors="replace") + b"\n\n" + body + b"\0"


class Parser:
    """Bytes in, frames out. Never holds more than the limit for one frame, besides what was just fed."""

    __slots__ = ("_begun", "_buffer", "_limits", "_searched", "version")

    def __init__(self, limits: Limits) -> None:
        self.version: str | None = None
        """STOMP version of the connection; None until it is agreed, and headers are taken verbatim so long."""
        self._limits = limits
        self._buffer = bytearray()
        self._searched = 0  # how many octets of the buffer are known to hold no NUL
        self._begun: tuple[Frame, int, int] | None = None  # headers read; where the body begins, where the NUL must be

    def feed(self, data: bytes) -> None:
        """Take in bytes; call `next_frame` until it returns None."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next frame, or None when it is not there yet.

        A frame is read only when it is asked for, so ``version`` may be changed between frames.

        Raises:
            StompError: 1002 for bad grammar, 1008 for too many or too long headers, 1009 for too large a frame. No
                frame can be read after that.
        """
        try:
            return self._next_frame()
        except StompError as error:
            error.receipt = self._receipt()
            raise

    def _next_frame(self) -> Frame | None:
        buffer, limit = self._buffer, self._limits.frame_bytes
        if self._begun is None:
            # "The NULL octet can be optionally followed by multiple EOLs", and heart-beats are EOLs. A CR that lacks
            # its LF is let pass with them: it may be half of an EOL whose other half is still to come.
            if buffer and buffer[0] in b"\r\n":
                content = _CONTENT.search(buffer)
                del buffer[: content.start() if content else len(buffer)]
            nul = buffer.find(0, self._searched, limit)
            if nul < 0:
                if len(buffer) >= limit:
                    raise StompError(f"frame larger than {limit} bytes", 1009)
                self._searched = len(buffer)
                return None
            self._begun = self._read_head(nul)
        frame, start, end = self._begun
        if end >= len(buffer):
            return None
        if buffer[end]:
            raise StompError("content-length does not end at a NUL", 1002)
        # "The body of the SUBSCRIBE command is ignored" in 1.0, and of what else has none, likewise.
        if frame.command in _WITH_BODY:
            frame.body = bytes(buffer[start:end])
        del buffer[: end + 1]
        self._begun, self._searched = None, 0
        return frame

    def _read_head(self, nul: int) -> tuple[Frame, int, int]:
        """Read command and headers of the frame whose first NUL is at ``nul``."""
        limits = self._limits
        blank = _HEAD_END.search(self._buffer, 0, nul)
        if blank is None:
            raise StompError("frame without a blank line after its headers", 1002)
        try:
            head = self._buffer[: blank.start()].decode()
        except UnicodeDecodeError:
            raise StompError("headers are not UTF-8", 1002) from None
        # Lines end with [CR] LF in 1.2 only, but nobody means a CR there to be part of a value in 1.0 or 1.1 either,
        # and a client that writes CRLF does so in CONNECT, before there is a version.
        command, *lines = head.replace("\r\n", "\n").removesuffix("\r").split("\n")
        if len(lines) > limits.header_lines:
            raise StompError(f"{command[:32]} with more than {limits.header_lines} headers", 1008)
        version = None if command in _VERBATIM else self.version
        headers: dict[str, str] = {}
        for line in lines:
            # No character takes more than four octets: most lines need not be measured.
            if len(line) * 4 > limits.header_line_bytes < len(line.encode()):
                raise StompError(f"header line longer than {limits.header_line_bytes} bytes, {line[:32]}", 1008)
            name, value = _split(line, version)
            # "If a client or a server receives repeated frame header entries, only the first header entry SHOULD be
            # used as the value of header entry."
            headers.setdefault(name, value)

        start, end = blank.end(), nul
        length = headers.get("content-length")
        if length is not None:
            if not (length.isascii() and length.isdigit()):
                raise StompError("content-length is no number", 1002)
            end = start + int(length) if len(length) <= 18 else limits.frame_bytes
            if end >= limits.frame_bytes:
                raise StompError(f"content-length makes the frame larger than {limits.frame_bytes} bytes", 1009)
        if end > start and command not in _WITH_BODY and version != "1.0":
            raise StompError(f"{command[:32]} with a body", 1002)
        return Frame(command, headers, b""), start, end

    def _receipt(self) -> str | None:
        """Return the receipt id that the frame at hand, which cannot be read, asks for, as far as can be made out."""
        head_end = _HEAD_END_OR_NUL.search(self._buffer, 0, self._limits.frame_bytes)
        end = head_end.start() if head_end else self._buffer.rfind(b"\n", 0, self._limits.frame_bytes)
        for line in self._buffer[: max(end, 0)].split(b"\n")[1:]:
            if line.startswith(b"receipt"):
                with suppress(StompError, UnicodeDecodeError):
                    name, value = _split(line.decode().removesuffix("\r"), self.version)
                    if name == "receipt":
                        return value
        return None


def _split(line: str, version: str | None) -> tuple[str, str]:
    """Return name and value of a header line. A value may hold colons: what follows the first one is taken as it is."""
    name, colon, value = line.partition(":")
    if version == "1.0":
        # "The STOMP 1.0 specification included many example frames with padding in the headers and many servers and
        # clients were implemented to trim or pad header values." From 1.1 on they "MUST never trim or pad".
        name, value = name.strip(" \t"), value.strip(" \t")
    elif version is not None and "\\" in line:
        name, value = _unescape(name, version), _unescape(value, version)
    if not colon or not name:
        raise StompError(f"header line is no name:value, {line[:64]}", 1002)
    return name, value


def _unescape(text: str, version: str) -> str:
    letters = _UNESCAPED[version]
    try:
        return _ESCAPE.sub(lambda escape: letters[escape[1]], text)
    except KeyError:
        # The spec has these "be treated as a fatal protocol error".
        raise StompError(f"undefined escape in header, {text[:64]}", 1002) from None
