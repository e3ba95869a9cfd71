"""Matchers, as `contracts/cases/README.md` lists them."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from contracts.match import ABSENT, mismatch


def ago(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() - seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def at(seconds: str, minute: int = 30) -> str:
    return f"2025-07-17T10:{minute}:{seconds}Z"


@pytest.mark.parametrize(
    ("matcher", "good", "bad"),
    [
        (True, [True], [1, "true", None, ABSENT]),
        (1, [1, 1.0], [True, "1", 2]),
        ("text", ["text"], ["Text", 0, None, ABSENT]),
        ("$any", [None, 0, ""], [ABSENT]),
        ("$absent", [ABSENT], [None, ""]),
        ("$null", [None], [ABSENT, 0, ""]),
        ("$text", ["x"], ["", 1, None, ABSENT]),
        ("$integer", [0, 2**53 - 1], [2**53, 1.5, True, "1"]),
        ("$time", ["2025-07-17T10:30:00Z", "2025-07-17T10:30:00.12Z"], ["2025-07-17T10:30:00+00:00", "2025-13-17T10Z"]),
        ("$time-ms", ["2025-07-17T10:30:00.123Z"], ["2025-07-17T10:30:00Z", "2025-02-30T10:30:00.12Z"]),
        ("~ ^a+$", ["aa"], ["ab", None, ABSENT]),
        ("!~ a", ["b"], ["ba", None, ABSENT]),
        ("> 400", [401, "401"], [400, "400", None, ABSENT, True]),
        (">= 2025-07", ["2025-08"], ["2025-06"]),
        ("> 2025-07-17T10:30:00.9Z", [at("00.91"), at("01")], [at("00.900"), at("00")]),
        (">= 2025-07-17T10:30:00.500Z", [at("00.5"), at("00")], [at("00.49"), at("59", 29)]),
        ("< 2025-07-17T10:30:00Z", [at("59.999", 29)], [at("00.500")]),
        ("< 9007199254740993", [9007199254740992], [9007199254740993]),
        ("!= null", [1, "x"], [None, ABSENT]),
        ("in 1002 1008", [1002, "1008"], [1000, 100, ABSENT]),
        ([1, "$any"], [[1, 2]], [[1], [1, 2, 3], [2, 2], {}, "12"]),
        ({"a": 1, "b": "$absent"}, [{"a": 1, "c": 2}], [{"a": 1, "b": None}, {}, [], None]),
        ({"$exactly": {"a": 1}}, [{"a": 1}], [{"a": 1, "b": 2}, {"a": 2}, {}, []]),
    ],
    ids=str,
)  # fmt: skip
def test_what_holds_and_what_does_not(matcher, good, bad):
    assert [value for value in good if mismatch(matcher, value) is not None] == []
    assert [value for value in bad if mismatch(matcher, value) is None] == []


def test_a_mismatch_names_the_place():
    assert mismatch({"a": [{"b": True}]}, {"a": [{"b": False}]}) == ("a[0].b: ", "true", "false")


def test_recent_is_of_the_last_minute_and_not_of_the_future():
    assert [text for text in (ago(30), ago(-5)) if mismatch("$recent", text) is not None] == []
    assert [text for text in (ago(90), ago(-30), "now", None) if mismatch("$recent", text) is None] == []


def test_recent_counts_from_the_begin_of_the_run():
    assert mismatch("$recent", ago(600)) is not None
    assert mismatch("$recent", ago(600), since=time.time() - 590) is None
