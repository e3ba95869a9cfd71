"""Matchers (`cases/README.md`, "Matchers"): what an expectation says of a value."""

from __future__ import annotations

import json
import math
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()
"""The value of a field or header that is not there."""

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
}
_COMPARISON = re.compile(r"(>=|<=|>|<|!=) (.*)", re.DOTALL)
LEEWAY = 10.0
"""s: how far two clocks may be apart."""


class Mismatch(NamedTuple):
    """What is wrong with a value, in words: "online: ", "true", "false"."""

    place: str
    expected: str
    actual: str


def mismatch(expected: Any, actual: Any, *, since: float | None = None, at: str = "") -> Mismatch | None:
    """What is wrong with a value.

    Args:
        expected: a matcher, as it stands in a case.
        actual: JSON, a header's text, or `ABSENT`.
        since: Unix time in s: when the run began, for `$recent`; None: now.
        at: where the value stands, for the answer.

    Returns:
        None when it holds.
    """
    if isinstance(expected, Mapping):
        return _object(expected, actual, since, at)
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return _wrong(f"an array of {len(expected)}", actual, at)
        pairs = enumerate(zip(expected, actual, strict=True))
        found = (mismatch(one, other, since=since, at=f"{at}[{i}]") for i, (one, other) in pairs)
        return next(filter(None, found), None)
    if isinstance(expected, str):
        return None if _text(expected, actual, since) else _wrong(expected, actual, at)
    # JSON's true is not its 1, whatever Python says.
    same = isinstance(expected, bool) == isinstance(actual, bool) and expected == actual
    return None if same else _wrong(expected, actual, at)


def _object(expected: Mapping[str, Any], actual: Any, since: float | None, at: str) -> Mismatch | None:
    if "$exactly" in expected:
        exact = expected["$exactly"]
        if isinstance(actual, Mapping) and (more := set(actual) - set(exact)):
            return _wrong(f"no other fields than {', '.join(sorted(exact)) or 'none'}", sorted(more), at)
        return _object(exact, actual, since, at)
    if not isinstance(actual, Mapping):
        return _wrong("an object", actual, at)
    found = (
        mismatch(matcher, actual.get(name, ABSENT), since=since, at=f"{at}.{name}" if at else name)
        for name, matcher in expected.items()
    )
    return next(filter(None, found), None)


def _text(expected: str, actual: Any, since: float | None) -> bool:
    """Whether a matcher that is written as text holds."""
    if expected in NAMED:
        return NAMED[expected](actual, time.time() if since is None else since)
    if actual is ABSENT:
        return False
    if expected.startswith("~ "):
        return isinstance(actual, str | int) and re.search(expected[2:], str(actual)) is not None
    if expected.startswith("!~ "):
        return isinstance(actual, str | int) and re.search(expected[3:], str(actual)) is None
    if expected.startswith("in "):
        return str(actual) in expected.split()[1:]
    if comparison := _COMPARISON.fullmatch(expected):
        return _compare(comparison[1], comparison[2], actual)
    return bool(expected == actual)


def _compare(sign: str, operand: str, actual: Any) -> bool:
    left, right = _number(actual), _number(operand)
    if left is not None and right is not None:
        return _COMPARE[sign](left, right)
    if (moments := _moments(actual, operand)) is not None:
        return _COMPARE[sign](*moments)
    if isinstance(actual, str):
        return _COMPARE[sign](actual, operand)
    return sign == "!=" and json.dumps(actual) != operand


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d+\.\d+", value):
        return float(value)
    return None


def _moment(value: Any) -> float | None:
    """Unix time in s of RFC 3339 UTC with `Z`; None: it is none."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return None
    try:
        # Some servers write nanoseconds; Python reads six places.
        whole, _, fraction = value[:-1].partition(".")
        return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return None


def _moments(one: Any, other: str) -> tuple[float, float] | None:
    """Two times, as exact as the one that is less so; None: they are not both times."""
    found = [_moment(one), _moment(other)]
    if found[0] is None or found[1] is None:
        return None
    if "." in one and "." in other:
        return found[0], found[1]
    # Whole seconds, rounded down: nothing is known of what came after them.
    return math.floor(found[0]), math.floor(found[1])


def _recent(value: Any, since: float) -> bool:
    moment = _moment(value)
    return moment is not None and since - 60 <= moment <= time.time() + LEEWAY


NAMED: dict[str, Callable[[Any, float], bool]] = {
    "$any": lambda value, _: value is not ABSENT,
    "$absent": lambda value, _: value is ABSENT,
    "$null": lambda value, _: value is None,
    "$time": lambda value, _: _moment(value) is not None,
    "$time-ms": lambda value, _: _moment(value) is not None and re.search(r"\.\d{3}Z$", value) is not None,
    "$integer": lambda value, _: isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53,
    "$text": lambda value, _: isinstance(value, str) and value != "",
    "$recent": _recent,
}
"""The matchers with a name: of the value and of the time when the run began."""


def _wrong(expected: Any, actual: Any, at: str) -> Mismatch:
    return Mismatch(f"{at}: " if at else "", shown(expected), shown(actual))


def shown(value: Any) -> str:
    """A value as a report writes it: JSON, not too long."""
    text = (
        repr(value) if value is ABSENT else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"
