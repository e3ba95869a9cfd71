"""Coverage-guided fuzzing of the STOMP codec: `make fuzz TARGET=codec SECONDS=60`. Needs atheris (Linux, wheels)."""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["presence.stomp"]):
    from presence.stomp import Connection, Limits, StompError
    from presence.stomp.frames import Parser, encode

VERSIONS = (None, "1.0", "1.1", "1.2")


def _parse(data: bytes, version: str | None, step: int) -> tuple[list[object], object]:
    parser = Parser(Limits())
    parser.version = version
    frames: list[object] = []
    try:
        for at in range(0, len(data), step):
            parser.feed(data[at : at + step])
            frames += iter(parser.next_frame, None)
    except StompError as error:
        return frames, (error.code, error.message)
    return frames, None


def _events(data: bytes, step: int) -> tuple[list[object], object]:
    connection = Connection(now=0.0)
    events: list[object] = []
    try:
        for at in range(0, len(data), step):
            for event in connection.receive(data[at : at + step], 0.0):
                events.append(event)
                if type(event).__name__ == "Connect":
                    connection.connected(session="s", server="p", user="u", now=0.0)
    except StompError as error:
        connection.error(error)
        return events, (error.code, error.message, error.receipt)
    return events, None


def one(data: bytes) -> None:
    """However it is cut, the same bytes mean the same; what was read and written again is read the same."""
    if len(data) < 2:
        return
    version, step, text = VERSIONS[data[0] % 4], data[1] % 16 + 1, data[2:]
    whole = _parse(text, version, max(len(text), 1))
    assert _parse(text, version, step)[0] == whole[0]
    assert _events(text, step)[0] == _events(text, max(len(text), 1))[0]
    if version in ("1.1", "1.2"):
        for frame in whole[0]:
            headers = {name: value for name, value in frame.headers.items() if name != "content-length"}  # type: ignore[attr-defined]
            if frame.command in ("CONNECT", "STOMP", "CONNECTED") or (version == "1.1" and "\r" in repr(headers)):  # type: ignore[attr-defined]
                continue
            if any("\r" in text for pair in headers.items() for text in pair):
                continue
            written = encode(frame.command, headers, frame.body, version=version)  # type: ignore[attr-defined]
            again = _parse(written, version, len(written))[0]
            assert again, written
            assert (again[0].headers | {"content-length": ""}) == (headers | {"content-length": ""}), written  # type: ignore[attr-defined]
            assert again[0].body == frame.body  # type: ignore[attr-defined]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
