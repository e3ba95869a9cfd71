from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presence.stomp import StompError, sockjs


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ('["a"]', ["a"]),
        ('["a","b\\n\\u0000"]', ["a", "b\n\0"]),
        ('"a"', ["a"]),
        (' [ "a" ] ', ["a"]),
        ("", []),
        ("[]", []),
        ('["\\ud83d\\ude00"]', ["😀"]),
    ],
)
def test_a_message_is_an_array_of_strings_or_one_string(text, messages):
    assert sockjs.unwrap(text) == messages


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "a",
        "{}",
        "null",
        "1",
        "true",
        '["a",1]',
        '[["a"]]',
        "[null]",
        '{"a":"b"}',
        '["\\ud83d"]',
        '"\\udc00"',
        "[" * 100_000,
        "1" * 10_000,
        "NaN",
    ],
)
def test_anything_else_is_an_error(text):
    """WIRE §6: 1002 for a "SockJS message that is no array of strings"."""
    with pytest.raises(StompError, match="SockJS message is no array of strings") as caught:
        sockjs.unwrap(text)
    assert caught.value.code == 1002


@given(st.text())
def test_any_text_is_either_unwrapped_to_texts_or_an_error(text):
    try:
        messages = sockjs.unwrap(text)
    except StompError:
        return
    assert all(isinstance(message, str) for message in messages)


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_texts_come_through_whatever_is_in_them(texts):
    assert sockjs.unwrap(json.dumps(texts)) == texts
    for text in texts:
        assert sockjs.unwrap(sockjs.wrap(text)[1:]) == [text]


def test_a_text_is_wrapped_as_an_array_of_one():
    assert sockjs.wrap('ERROR\nmessage:"x"\n\nđ\u2028\0') == 'a["ERROR\\nmessage:\\"x\\"\\n\\n\\u0111\\u2028\\u0000"]'


def test_a_close_tells_code_and_reason():
    """WIRE §6: "`c[code,"reason"]` precedes the close"."""
    assert sockjs.closing(1002, 'no "text"') == 'c[1002,"no \\"text\\""]'


def test_open_and_heartbeat_frames_are_one_letter():
    assert sockjs.OPEN == "o"
