from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from presence.stomp import StompError
from presence.stomp.frames import Frame, Limits, Parser, encode

VERSIONS = ("1.0", "1.1", "1.2")
LIMITS = Limits()
NEXT = b"ABORT\ntransaction:t\n\n\0"


def parse(*chunks: bytes, version: str | None = "1.2", limits: Limits = LIMITS):
    """Return the frames in the chunks, and the error that ended them, if one did."""
    parser = Parser(limits)
    parser.version = version
    frames = []
    try:
        for chunk in chunks:
            parser.feed(chunk)
            for frame in iter(parser.next_frame, None):
                frames.append(frame)  # noqa: PERF402 (an error ends it)
            assert len(parser._buffer) < limits.frame_bytes
    except StompError as error:
        return frames, (error.code, error.receipt, error.message)
    return frames, None


def split(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# What is read.

GOOD = [
    # Grammar of 1.2: "frame = command EOL *( header EOL ) EOL *OCTET NULL *( EOL )"
    ("1.2", b"SEND\ndestination:/a\n\nhello\0", Frame("SEND", {"destination": "/a"}, b"hello")),
    ("1.2", b"ABORT\n\n\0", Frame("ABORT", {}, b"")),
    ("1.2", b"NO-SUCH\n\n\0", Frame("NO-SUCH", {}, b"")),
    ("1.2", b"SEND\n\n\n\nhello\n\0", Frame("SEND", {}, b"\n\nhello\n")),
    # "The NULL octet can be optionally followed by multiple EOLs", and heart-beats are EOLs
    ("1.2", b"\n\r\n\n\nABORT\n\n\0", Frame("ABORT", {}, b"")),
    ("1.0", b"\nABORT\n\n\0", Frame("ABORT", {}, b"")),
    # "an OPTIONAL carriage return (octet 13) followed by a REQUIRED line feed": in 1.2, and taken in every version
    ("1.2", b"SEND\r\na:b\r\nc:d\r\n\r\nhello\r\n\0", Frame("SEND", {"a": "b", "c": "d"}, b"hello\r\n")),
    ("1.1", b"SEND\r\na:b\r\n\r\n\0", Frame("SEND", {"a": "b"}, b"")),
    ("1.0", b"SEND\r\na: b\r\n\r\n\0", Frame("SEND", {"a": "b"}, b"")),
    (None, b"CONNECT\r\na:b\r\n\r\n\0", Frame("CONNECT", {"a": "b"}, b"")),
    ("1.2", b"SEND\na:b\r\n\r\n\0", Frame("SEND", {"a": "b"}, b"")),
    ("1.2", b"SEND\r\na:b\n\nx\n\r\ny\0", Frame("SEND", {"a": "b"}, b"x\n\r\ny")),
    ("1.2", b"SEND\na:b\n\r\n\nx\n\ny\0", Frame("SEND", {"a": "b"}, b"\nx\n\ny")),
    ("1.2", b"SEND\na:b\r\r\n\n\0", Frame("SEND", {"a": "b\r"}, b"")),
    # "Value Encoding"
    ("1.2", rb"SEND|\c\n\r\\:\\n\\c\c\n\r||".replace(b"|", b"\n") + b"\0",
     Frame("SEND", {":\n\r\\": "\\n\\c:\n\r"}, b"")),
    ("1.1", rb"SEND|\c\n\\:\\n\\r\c\n||".replace(b"|", b"\n") + b"\0", Frame("SEND", {":\n\\": "\\n\\r:\n"}, b"")),
    ("1.0", rb"SEND|a\c:b\t\n||".replace(b"|", b"\n") + b"\0", Frame("SEND", {r"a\c": r"b\t\n"}, b"")),
    (None, rb"CONNECT|a\c:b\t\n||".replace(b"|", b"\n") + b"\0", Frame("CONNECT", {r"a\c": r"b\t\n"}, b"")),
    (None, rb"SEND|receipt:\c||".replace(b"|", b"\n") + b"\0", Frame("SEND", {"receipt": r"\c"}, b"")),
    ("1.2", rb"STOMP|a:\c\t||".replace(b"|", b"\n") + b"\0", Frame("STOMP", {"a": r"\c\t"}, b"")),
    ("1.2", rb"CONNECTED|a:\c\t||".replace(b"|", b"\n") + b"\0", Frame("CONNECTED", {"a": r"\c\t"}, b"")),
    ("1.2", "SEND\nđ:ế\n\n\0".encode(), Frame("SEND", {"đ": "ế"}, b"")),
    # Values with a colon: split on the first (CONNECT never escapes; elsewhere old clients do not)
    (None, b"CONNECT\nhost:localhost:8080\nAuthorization:Bearer a:b\n\n\0",
     Frame("CONNECT", {"host": "localhost:8080", "Authorization": "Bearer a:b"}, b"")),
    ("1.1", b"SEND\ndestination:/a:b\n\n\0", Frame("SEND", {"destination": "/a:b"}, b"")),
    ("1.2", b"SEND\na:\n\n\0", Frame("SEND", {"a": ""}, b"")),
    # "clients and servers MUST never trim or pad headers with spaces": but in 1.0 examples are padded
    ("1.2", b"SEND\n a : b \n\n\0", Frame("SEND", {" a ": " b "}, b"")),
    ("1.1", b"SEND\na: b\n\n\0", Frame("SEND", {"a": " b"}, b"")),
    ("1.0", b"SEND\n a : b\t\n\n\0", Frame("SEND", {"a": "b"}, b"")),
    (None, b"CONNECT\na: b\n\n\0", Frame("CONNECT", {"a": " b"}, b"")),
    # "If a client or a server receives repeated frame header entries, only the first header entry SHOULD be used"
    ("1.2", b"SEND\nfoo:World\nfoo:Hello\n\n\0", Frame("SEND", {"foo": "World"}, b"")),
    # With a content-length "this number of octets MUST be read, regardless of whether or not there are NULL octets"
    ("1.2", b"SEND\ncontent-length:5\n\na\0b\0\0\0", Frame("SEND", {"content-length": "5"}, b"a\0b\0\0")),
    ("1.0", b"SEND\ncontent-length: 3\n\n\0\0\0\0", Frame("SEND", {"content-length": "3"}, b"\0\0\0")),
    ("1.2", b"SEND\ncontent-length:1\ncontent-length:x\n\n\0\0", Frame("SEND", {"content-length": "1"}, b"\0")),
    ("1.2", b"SEND\ncontent-length:0\n\n\0", Frame("SEND", {"content-length": "0"}, b"")),
    ("1.2", b"ABORT\ncontent-length:000\n\n\0", Frame("ABORT", {"content-length": "000"}, b"")),
    # Bodies
    ("1.2", b"SEND\n\n\xff\xfe\0", Frame("SEND", {}, b"\xff\xfe")),
    ("1.2", b"MESSAGE\n\nhello\0", Frame("MESSAGE", {}, b"hello")),
    ("1.2", b"ERROR\n\nhello\0", Frame("ERROR", {}, b"hello")),
    # 1.0: "The body of the SUBSCRIBE command is ignored."
    ("1.0", b"SUBSCRIBE\na:b\n\nhello\0", Frame("SUBSCRIBE", {"a": "b"}, b"")),
    ("1.0", b"SUBSCRIBE\ncontent-length:2\n\n\0\0\0", Frame("SUBSCRIBE", {"content-length": "2"}, b"")),
]  # fmt: skip


@pytest.mark.parametrize(("version", "data", "frame"), GOOD)
def test_a_frame_is_read_however_it_comes(version, data, frame):
    assert parse(data, version=version) == ([frame], None)
    assert parse(*split(data), version=version) == ([frame], None)
    following = Frame("ABORT", {"transaction": "t"}, b"")
    assert parse(data + b"\r\n\n" + NEXT, version=version) == ([frame, following], None)
    assert parse(data + NEXT[:5], NEXT[5:], version=version) == ([frame, following], None)
    assert parse(data[:-1], data[-1:] + NEXT, version=version) == ([frame, following], None)


def test_a_frame_is_not_there_before_its_last_byte():
    for data in (b"SEND\na:b\n\nhello\0", b"SEND\ncontent-length:3\n\n\0\0\0\0"):
        for end in range(len(data)):
            assert parse(data[:end]) == ([], None)


# What is refused: version, bytes, code, receipt, part of the message.

BAD = [
    ("1.2", b"SEND\ndestination\n\n\0", 1002, None, "destination"),
    ("1.2", b"SEND\n:x\n\n\0", 1002, None, "name:value"),
    ("1.0", b"SEND\n : x\n\n\0", 1002, None, "name:value"),
    (None, b"CONNECT\nhost\n\n\0", 1002, None, "host"),
    # A NUL within the headers
    ("1.2", b"DISCONNECT\n\0", 1002, None, "blank line"),
    ("1.2", b"DISCONNECT\nreceipt:77\n\0", 1002, "77", "blank line"),
    ("1.2", b"DISCONNECT\nreceipt:77\0", 1002, "77", "blank line"),
    ("1.2", b"\0", 1002, None, "blank line"),
    ("1.2", b"SEND\na:\0\nreceipt:7\n\n\0", 1002, None, "blank line"),
    # Undefined escape sequences "MUST be treated as a fatal protocol error"
    ("1.2", b"SEND\nreceipt:7\na:\\t\n\n\0", 1002, "7", "escape"),
    ("1.2", b"SEND\na\\t:b\n\n\0", 1002, None, "escape"),
    ("1.2", b"SEND\na:b\\\n\n\0", 1002, None, "escape"),
    ("1.2", b"SEND\na:\\\\\\\n\n\0", 1002, None, "escape"),
    ("1.2", b"SEND\na:\\N\n\n\0", 1002, None, "escape"),
    # 1.1: undefined "such as \r"
    ("1.1", b"SEND\na:\\r\n\n\0", 1002, None, "escape"),
    ("1.1", b"SEND\na:\\t\n\n\0", 1002, None, "escape"),
    ("1.2", b"SEND\na:\xff\nreceipt:7\n\n\0", 1002, "7", "UTF-8"),
    ("1.2", b"SEND\nreceipt:\xff\n\n\0", 1002, None, "UTF-8"),
    ("1.2", b"SEND\n\xc0\xaf:x\n\n\0", 1002, None, "UTF-8"),
    (None, b"CONNECT\na:\xff\n\n\0", 1002, None, "UTF-8"),
    ("1.2", b"\xff\n\n\0", 1002, None, "UTF-8"),
    *(
        ("1.2", b"SEND\ncontent-length:" + length + b"\n\n\0", 1002, None, "content-length is no number")
        for length in (b"", b"abc", b"-1", b"+1", b" 1", b"1 ", b"1.0", b"0x1", b"1_0", "\u0661".encode(), "²".encode())
    ),
    ("1.2", b"SEND\nreceipt:7\ncontent-length:4\n\nhello\0", 1002, "7", "content-length does not end at a NUL"),
    ("1.2", b"SEND\ncontent-length:0\n\nhello\0", 1002, None, "content-length does not end at a NUL"),
    ("1.2", b"SEND\ncontent-length:6\n\nhello\0" + NEXT, 1002, None, "content-length does not end at a NUL"),
    ("1.2", b"SEND\nreceipt:7\ncontent-length:65536\n\n\0", 1009, "7", "content-length"),
    ("1.2", b"SEND\ncontent-length:" + b"9" * 5000 + b"\n\n\0", 1009, None, "content-length"),
    # "All other frames MUST NOT have a body."
    ("1.2", b"SUBSCRIBE\nreceipt:7\n\nx\0", 1002, "7", "SUBSCRIBE with a body"),
    ("1.1", b"DISCONNECT\n\n\n\0", 1002, None, "DISCONNECT with a body"),
    ("1.2", b"NO-SUCH\n\nx\0", 1002, None, "NO-SUCH with a body"),
    (None, b"CONNECT\n\nx\0", 1002, None, "CONNECT with a body"),
    ("1.0", b"CONNECT\n\nx\0", 1002, None, "CONNECT with a body"),
    ("1.0", b"STOMP\n\nx\0", 1002, None, "STOMP with a body"),
    # Receipts are read as their version writes them, and only from headers.
    ("1.2", b"SEND\r\nreceipt:a\\cb\r\nx\r\n\r\n\0", 1002, "a:b", "x"),
    ("1.0", b"SEND\nreceipt: a\\cb\nx\n\n\0", 1002, "a\\cb", "x"),
    (None, b"SEND\nreceipt:a\\cb\nx\n\n\0", 1002, "a\\cb", "x"),
    ("1.2", b"SEND\nreceipt:\\t\n\n\0", 1002, None, "escape"),
    ("1.2", b"SEND\na:\xff\nreceipt:\\t\n\n\0", 1002, None, "UTF-8"),
    ("1.2", b"SEND\nreceipts:1\nreceipt:2\nreceipt:3\nx\n\n\0", 1002, "2", "x"),
    ("1.2", b"SEND\nx\n\nreceipt:7\n\0", 1002, None, "x"),
    ("1.2", b"receipt:7\nx\n\n\0", 1002, None, "x"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "data", "code", "receipt", "message"), BAD)
def test_bad_grammar_is_an_error_however_it_comes(version, data, code, receipt, message):
    """WIRE §6: 1002 for frame grammar, 1009 for too large a frame; "`receipt-id` when the bad frame asked for one"."""
    for chunks in ([data], split(data), [data + NEXT], [data[:7], data[7:]]):
        frames, error = parse(*chunks, version=version)
        assert frames == []
        assert error is not None
        assert error[:2] == (code, receipt)
        assert message in error[2]


def test_frames_before_a_bad_one_are_read_first():
    assert parse(NEXT + NEXT + b"SEND\nx\n\n\0")[0] == [Frame("ABORT", {"transaction": "t"}, b"")] * 2


def test_a_version_set_between_two_frames_of_one_chunk_applies_to_the_second():
    parser = Parser(Limits())
    parser.feed(b"CONNECT\na:\\c\n\n\0SEND\na:\\c\n\n\0")
    first = parser.next_frame()
    parser.version = "1.2"
    second = parser.next_frame()
    assert first == Frame("CONNECT", {"a": "\\c"}, b"")
    assert second == Frame("SEND", {"a": ":"}, b"")


# Limits (WIRE §6): the limit passes, one more does not.


def test_a_frame_of_the_limit_passes_and_a_larger_one_does_not():
    head = b"SEND\nreceipt:7\n\n"
    fits = head + b"x" * (65536 - len(head) - 1) + b"\0"
    assert len(fits) == 65536
    frames, error = parse(b"\n" * 10 + fits + NEXT)
    assert len(frames) == 2
    assert error is None
    for chunks in ([head + b"x" + fits[len(head) :]], [fits[:-1], b"x"], [fits[:-1] + b"x" * 1_000_000]):
        assert parse(*chunks) == ([], (1009, "7", "frame larger than 65536 bytes"))


def test_a_frame_of_the_limit_by_content_length_passes_and_a_larger_one_does_not():
    head = b"SEND\ncontent-length:%d\nreceipt:7\n\n"
    rest = 65536 - len(head % 65500) - 1
    frames, error = parse(head % rest + bytes(rest + 1))
    assert (len(frames[0].body), error) == (rest, None)
    frames, error = parse(head % (rest + 1) + b"\0")
    assert error is not None
    assert error[:2] == (1009, "7")


def test_a_receipt_that_is_cut_off_by_the_limit_is_not_made_up():
    limits = Limits(frame_bytes=20)
    assert parse(b"SEND\na:b\nreceipt:12345\n\n\0", limits=limits) == ([], (1009, None, "frame larger than 20 bytes"))


def test_as_many_header_lines_as_the_limit_pass_and_one_more_does_not():
    fits = b"SEND\nreceipt:7\n" + b"a:b\n" * 63
    assert len(parse(fits + b"\n\0")[0]) == 1
    frames, error = parse(fits + b"a:b\n\n\0")
    assert frames == []
    assert error == (1008, "7", "SEND with more than 64 headers")


@pytest.mark.parametrize("character", ["a", "ế", "😀"])
def test_a_header_line_of_the_limit_passes_and_a_longer_one_does_not(character):
    size = len(character.encode())
    line = b"x" * (8189 % size) + b"x::" + character.encode() * (8189 // size)
    assert len(line) == 8192
    assert len(parse(b"SEND\r\n" + line + b"\r\n\r\n\0")[0]) == 1
    frames, error = parse(b"SEND\nreceipt:7\nx" + line + b"\n\n\0")
    assert frames == []
    assert error is not None
    assert error[:2] == (1008, "7")
    assert "header line longer than 8192 bytes" in error[2]


def test_errors_quote_no_more_than_a_line():
    for data in (
        b"SEND\n" + b"a" * 8000 + b"\n\n\0",
        b"a" * 60000 + b"\n\nx\0",
        b"SEND\na:\\t" + b"a" * 8000 + b"\n\n\0",
    ):
        _, error = parse(data)
        assert error is not None
        assert len(error[2]) < 120


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_millions_of_heart_beats_cost_no_memory(eol):
    flood = eol * 2_000_000
    parser = Parser(Limits())
    for _ in range(3):
        parser.feed(flood)
        assert parser.next_frame() is None
        assert len(parser._buffer) == 0
    tracemalloc.start()
    for _ in range(10_000):
        parser.feed(eol)
        assert parser.next_frame() is None
    assert tracemalloc.get_traced_memory()[0] < 100_000
    tracemalloc.stop()


class CountingBuffer(bytearray):
    """Counts the octets that are searched."""

    searched = 0

    def find(self, sub, start=0, end=None):
        end = len(self) if end is None else min(end, len(self))
        CountingBuffer.searched += max(0, end - start)
        return super().find(sub, start, end)


@pytest.mark.parametrize("head", [b"SEND\n\n", b"SEND\ncontent-length:50000\n\n\0\0"])
def test_no_octet_is_searched_twice(head):
    parser = Parser(Limits())
    parser._buffer = CountingBuffer()
    CountingBuffer.searched = 0
    parser.feed(head)
    for _ in range(40_000):
        assert parser.next_frame() is None
        parser.feed(b"x")
    assert CountingBuffer.searched <= 40_000 + len(head)


# What is written.


@pytest.mark.parametrize(
    ("version", "written"),
    [
        ("1.0", b"SEND\na:\\\r:b\n\n\0"),
        ("1.1", b"SEND\na:\\\\\r\\cb\n\n\0"),
        ("1.2", b"SEND\na:\\\\\\r\\cb\n\n\0"),
    ],
)
def test_headers_are_escaped_by_version(version, written):
    assert encode("SEND", {"a": "\\\r:b"}, version=version) == written


@pytest.mark.parametrize("command", ["CONNECT", "STOMP", "CONNECTED"])
@pytest.mark.parametrize("version", VERSIONS)
def test_frames_of_the_handshake_are_never_escaped(command, version):
    """STOMP: "All frames except the CONNECT and CONNECTED frames will also escape any [...] colon"."""
    assert encode(command, [("host", "a:\\b")], version=version) == command.encode() + b"\nhost:a:\\b\n\n\0"


def test_names_are_escaped_as_well_and_line_feeds():
    assert encode("SEND", {"a:b": "c\nd"}, version="1.2") == b"SEND\na\\cb:c\\nd\n\n\0"


def test_a_body_comes_with_its_length_in_octets():
    assert encode("SEND", [("a", "b"), ("a", "c")], "ế".encode(), version="1.2") == (
        b"SEND\na:b\na:c\ncontent-length:3\n\n\xe1\xba\xbf\0"
    )


def test_a_lone_surrogate_out_of_json_does_not_break_the_frame():
    assert encode("ERROR", {"message": "id \ud800"}, version="1.2") == b"ERROR\nmessage:id ?\n\n\0"


# Properties.

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
NAMES = {
    None: TEXT.filter(lambda s: s and not set(s) & set(":\r\n")),
    "1.0": TEXT.map(lambda s: s.strip(" \t")).filter(lambda s: s and not set(s) & set(":\r\n")),
    "1.1": TEXT.filter(lambda s: s and "\r" not in s),
    "1.2": TEXT.filter(bool),
}
VALUES = {
    None: TEXT.filter(lambda s: not set(s) & set("\r\n")),
    "1.0": TEXT.map(lambda s: s.strip(" \t")).filter(lambda s: not set(s) & set("\r\n")),
    "1.1": TEXT.filter(lambda s: "\r" not in s),
    "1.2": TEXT,
}


@pytest.mark.parametrize("version", VERSIONS)
@given(data=st.data())
def test_what_is_written_is_read_wherever_it_is_split(version, data):
    headers = data.draw(st.dictionaries(NAMES[version], VALUES[version], max_size=4))
    headers.pop("content-length", None)
    body = data.draw(st.binary(max_size=12))
    written = encode("SEND", headers, body, version=version)
    expected = Frame("SEND", headers | ({"content-length": str(len(body))} if body else {}), body)
    for at in range(len(written)):
        assert parse(written[:at], written[at:], version=version) == ([expected], None)
    assert parse(*split(written * 2), version=version) == ([expected] * 2, None)


@given(st.dictionaries(NAMES[None], VALUES[None], max_size=4))
def test_a_connect_frame_that_is_written_is_read(headers):
    headers.pop("content-length", None)
    assert parse(encode("CONNECT", headers, version="1.2"), version=None) == ([Frame("CONNECT", headers, b"")], None)


PIECES = st.lists(
    st.sampled_from((
        b"SEND", b"SUBSCRIBE", b"CONNECT", b"\n", b"\n", b"\n\n", b"\r\n", b"\r", b"\0", b"\0", b":", b"\\", b"\\n",
        b"\\t", b"a:b\n", b"receipt:7\n", b"content-length:", b"content-length:3\n", b"3", b" ", b"\xff", b"x" * 30,
    ))
    | st.binary(max_size=4),
    max_size=30,
)  # fmt: skip
SMALL = Limits(frame_bytes=60, header_lines=3, header_line_bytes=16)


@settings(max_examples=500)
@given(pieces=PIECES, version=st.sampled_from((None, *VERSIONS)))
def test_any_bytes_give_the_same_frames_and_error_however_they_come(pieces, version):
    """And nothing but StompError is raised, and no more is held than one frame (`parse` asserts it)."""
    whole = parse(b"".join(pieces), version=version, limits=SMALL)
    assert parse(*pieces, version=version, limits=SMALL) == whole
    assert parse(*split(b"".join(pieces)), version=version, limits=SMALL) == whole
    frames, error = whole
    for frame in frames:
        assert len(frame.headers) <= SMALL.header_lines
        assert len(frame.body) < SMALL.frame_bytes
        assert frame.command[:1] not in {"", "\r", "\n"}
    assert error is None or error[0] in {1002, 1008, 1009}
