"""How long ago, in words, and in which language (WIRE §2). No I/O, no clock."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["vi", "en"]

_RANGE = re.compile(  # RFC 9110 §12.5.4 and §12.4.2: a language range with an optional weight
    r"[ \t]*(\*|[a-z]{1,8}(?:-[a-z0-9]{1,8})*)[ \t]*(?:;[ \t]*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[ \t]*)?",
    re.IGNORECASE | re.ASCII,
)


def last_active_ago(last_active_ms: int, now_ms: int, language: Language) -> str:
    """Return ``2 giờ trước`` or ``2 hours ago``, rounded down. Both moments are Unix epoch in ms."""
    minutes = (now_ms - last_active_ms) // 60_000
    if minutes < 1:  # clocks that disagree make no future either
        return "vừa xong" if language == "vi" else "just now"
    if minutes < 60:
        count, vi, en = minutes, "phút", "minute"
    elif minutes < 1_440:
        count, vi, en = minutes // 60, "giờ", "hour"
    else:
        count, vi, en = minutes // 1_440, "ngày", "day"
    return f"{count} {vi} trước" if language == "vi" else f"{count} {en}{'s' * (count > 1)} ago"


def language_of(accept_language: str | None) -> Language:
    """Return the one of ``vi`` and ``en`` with the higher q; ``vi`` when equal, absent or not understood."""
    weights: dict[str, float] = {}
    for part in (accept_language or "").split(","):
        if not part.strip(" \t"):
            continue  # RFC 9110 §5.6.1.2: a recipient MUST accept empty list elements
        if (match := _RANGE.fullmatch(part)) is None:
            return "vi"
        language = match[1].lower().partition("-")[0]
        weights[language] = max(weights.get(language, 0.0), float(match[2] or 1))
    rest = weights.get("*", 0.0)
    return "en" if weights.get("en", rest) > weights.get("vi", rest) else "vi"
