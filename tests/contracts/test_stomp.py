"""The runner's own STOMP codec."""

from __future__ import annotations

import pytest

from contracts.stomp import Decoder, Malformed, encode


def test_a_frame_in_pieces_of_one_byte_is_the_same_as_in_one():
    data = "MESSAGE\nsubscription:0\ncontent-length:5\n\né\0ab\0\n\nRECEIPT\nreceipt-id:1\n\n\0".encode()
    whole = Decoder().feed(data)
    decoder = Decoder()
    pieces = [frame for at in range(len(data)) for frame in decoder.feed(data[at : at + 1])]
    assert pieces == whole
    assert [(frame.command, frame.body) for frame in whole] == [("MESSAGE", "é\0ab"), ("RECEIPT", "")]
    assert not decoder.within_frame


def test_only_the_first_of_repeated_headers_counts():
    (frame,) = Decoder().feed(b"ERROR\nmessage:first\nmessage:second\n\n\0")
    assert frame.get("message") == "first"


@pytest.mark.parametrize(
    ("version", "value"),
    [("1.0", r"a\cb"), ("1.1", "a:b"), ("1.2", "a:b")],
)
def test_headers_are_unescaped_as_the_version_says(version, value):
    decoder = Decoder()
    decoder.feed(f"CONNECTED\nversion:{version}\n\n\0".encode())
    (frame,) = decoder.feed(b"MESSAGE\nx:a\\cb\n\n\0")
    assert frame.get("x") == value


def test_a_line_end_of_cr_lf_is_taken_and_told():
    (frame,) = Decoder().feed(b"MESSAGE\r\nsubscription:0\r\n\r\nbody\0")
    assert (frame.get("subscription"), frame.body, frame.crlf) == ("0", "body", True)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"SEND\n\n\0", "the command 'SEND'"),
        (b"MESSAGE\nno colon\n\n\0", "no colon"),
        (b"MESSAGE\n:x\n\n\0", "header line"),
        (b"MESSAGE\nsubscription:0\0", "without a blank line"),
        (b"RECEIPT\nreceipt-id:1\n\nbody\0", "with a body"),
        (b"MESSAGE\ncontent-length:-1\n\n\0", "content-length:-1"),
        (b"MESSAGE\ncontent-length:1\n\nab\0", "no NUL"),
        (b"MESSAGE\n\n\xff\0", "not UTF-8"),
        (b"CONNECTED\nversion:1.1\n\n\0MESSAGE\nx:\\r\n\n\0", "the escape"),
    ],
)
def test_broken_stomp_is_told(data, told):
    with pytest.raises(Malformed, match=told):
        Decoder().feed(data)


@pytest.mark.parametrize(
    ("command", "version", "line"),
    [
        ("SEND", "1.2", r"k\c:\\\n\r"),
        ("SEND", "1.1", "k\\c:\\\\\\n\r"),
        ("SEND", "1.0", "k::\\\n\r"),
        ("CONNECT", "1.2", "k::\\\n\r"),
    ],
)
def test_what_goes_out_is_escaped_as_the_version_says(command, version, line):
    assert encode(command, [("k:", "\\\n\r")], version=version) == f"{command}\n{line}\n\n\0"
