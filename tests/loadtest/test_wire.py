from __future__ import annotations

import json

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Ping, Request, TextMessage

from loadtest import wire
from loadtest.wire import Control, Reader, Refused, WireError
from presence.stomp.frames import Frame

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ANSWER = b"HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
CONNECTED = b"CONNECTED\nversion:1.2\n\n\0"


def served(payload: bytes, opcode: int = wire.TEXT, *, last: bool = True) -> bytes:
    size = len(payload)
    first = bytes([(0x80 if last else 0) | opcode])
    if size < 126:
        return first + bytes([size]) + payload
    if size < 1 << 16:
        return first + b"\x7e" + size.to_bytes(2, "big") + payload
    return first + b"\x7f" + size.to_bytes(8, "big") + payload


def message(body: str, **headers: str) -> bytes:
    return wire.stomp("MESSAGE", headers, body)


def upgraded() -> Reader:
    reader = Reader(KEY)
    assert reader.feed(ANSWER) == []
    return reader


def test_the_accept_is_that_of_the_rfc():
    assert wire.accept_of(KEY) == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_an_independent_server_understands_what_is_sent():
    server = WSConnection(ConnectionType.SERVER)
    key = wire.new_key()
    server.receive_data(wire.upgrade_request("localhost:80", "/ws", key, {"User-Agent": "me"}))
    [request] = server.events()
    assert isinstance(request, Request)
    assert (request.host, request.target, request.subprotocols) == ("localhost:80", "/ws", ["v12.stomp"])
    assert (b"user-agent", b"me") in request.extra_headers
    reader = Reader(key)
    assert not reader.upgraded
    assert reader.feed(server.send(AcceptConnection(subprotocol="v12.stomp"))) == []
    assert reader.upgraded

    for size in (0, 1, 3, 4, 125, 126, 65_535, 65_536, 70_001):
        text = "ü" * (size // 2) + "x" * (size % 2)
        server.receive_data(wire.frame(text.encode(), b"\x01\xfe\x80\x7f"))
        got = [event for event in server.events() if isinstance(event, TextMessage)]
        assert "".join(event.data for event in got) == text and got[-1].message_finished
    server.receive_data(wire.frame(b"hey", wire.FIXED_KEY, wire.PING))
    assert [type(event) for event in server.events()] == [Ping]
    assert reader.feed(server.send(Ping(b"you"))) == [Control(wire.PING, b"you")]
    server.receive_data(wire.frame((1000).to_bytes(2, "big"), wire.FIXED_KEY, wire.CLOSE))
    [close] = server.events()
    assert isinstance(close, CloseConnection) and close.code == 1000


def test_a_header_of_the_owner_replaces_ours():
    text = wire.upgrade_request("h", "/", KEY, {"sec-websocket-protocol": "v10.stomp", "Host": "other"}).decode()
    assert "v12.stomp" not in text and "v10.stomp" in text
    assert text.lower().count("host:") == 1 and "Host: other" in text


def test_what_is_masked_with_another_key_looks_different():
    one, other = wire.frame(b"secret", b"abcd"), wire.frame(b"secret", b"wxyz")
    assert one != other and b"secret" not in one


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_frames_are_found_however_the_bytes_are_cut(piece: int):
    bodies = ["", "x", "y" * 125, "z" * 300, "ü" * 40_000]
    data = ANSWER + served(CONNECTED)
    for body in bodies:
        data += served(message(body, destination="/q")) + served(b"\n") + served(b"p", wire.PING)
    reader = Reader(KEY)
    found = [one for at in range(0, len(data), piece) for one in reader.feed(data[at : at + piece])]
    frames = [one for one in found if isinstance(one, Frame)]
    assert [one.command for one in frames] == ["CONNECTED", *["MESSAGE"] * len(bodies)]
    assert [one.body.decode() for one in frames[1:]] == bodies
    assert [one for one in found if isinstance(one, Control)] == [Control(wire.PING, b"p")] * len(bodies)


def test_many_frames_in_a_message_and_a_frame_over_several():
    packed = b"".join(message(json.dumps(number), n=str(number)) for number in range(5))
    first, second, third = packed[:40], packed[40:41], packed[41:]
    data = (
        served(first, last=False)
        + served(b"", wire.PING)
        + served(second, wire.CONTINUATION)  # the end of one message …
        + served(third, wire.BINARY)  # … and the rest in the next
    )
    found = upgraded().feed(data)
    assert [one.headers["n"] for one in found if isinstance(one, Frame)] == list("01234")
    assert sum(isinstance(one, Control) for one in found) == 1


@pytest.mark.parametrize(
    ("version", "value"), [("version:1.2\n", "a\nb:c\\d\r"), ("version:1.1\n", None), ("", "a\\nb\\cc\\\\d\\r")]
)
def test_headers_are_unescaped_as_connected_says_even_in_the_same_message(version: str, value: str | None):
    reader = upgraded()
    data = served(f"CONNECTED\n{version}\n\0RECEIPT\nreceipt-id:a\\nb\\cc\\\\d\\r\n\n\0".encode())
    if value is None:  # \r is not defined in 1.1
        with pytest.raises(WireError, match="undefined escape"):
            reader.feed(data)
    else:
        _, receipt = reader.feed(data)
        assert isinstance(receipt, Frame) and receipt.headers["receipt-id"] == value


@pytest.mark.parametrize(("payload", "code"), [(b"", "1005"), (b"\x03\xe9", "1001"), (b"\x03\xf0why", "1008")])
def test_the_close_code(payload: bytes, code: str):
    [close] = upgraded().feed(served(payload, wire.CLOSE))
    assert isinstance(close, Control) and close.code == code


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n{}", "^503 Service Unavailable$"),
        (b"HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: bm8=\r\n\r\n", "wrong Sec-WebSocket-Accept"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "wrong Sec-WebSocket-Accept"),
        (b"x" * 70_000, "no end"),
    ],
)
def test_an_upgrade_that_is_refused(answer: bytes, why: str):
    with pytest.raises(Refused, match=why):
        Reader(KEY).feed(answer)


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1\x01x",  # compressed: was not agreed
        wire.frame(b"x", b"abcd"),  # masked
        b"\x81\x7f" + (1 << 40).to_bytes(8, "big"),
        served(b"NO BLANK LINE\0"),
        served(b"CONNECTED\nversion:9.9\n\n\0RECEIPT\na:\\n\n\n\0"),
    ],
)
def test_a_server_that_breaks_the_grammar(data: bytes):
    with pytest.raises(WireError):
        upgraded().feed(data)
