"""presence.core.ago: `lastActiveAgo` and its language (WIRE §2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presence.core.ago import language_of, last_active_ago

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
NOW = 1_752_748_200_123


@pytest.mark.parametrize(
    ("passed", "vi", "en"),
    (
        (0, "vừa xong", "just now"),
        (MINUTE - 1, "vừa xong", "just now"),
        (MINUTE, "1 phút trước", "1 minute ago"),
        (2 * MINUTE - 1, "1 phút trước", "1 minute ago"),
        (2 * MINUTE, "2 phút trước", "2 minutes ago"),
        (HOUR - 1, "59 phút trước", "59 minutes ago"),
        (HOUR, "1 giờ trước", "1 hour ago"),
        (3 * HOUR - 1, "2 giờ trước", "2 hours ago"),
        (DAY - 1, "23 giờ trước", "23 hours ago"),
        (DAY, "1 ngày trước", "1 day ago"),
        (400 * DAY + HOUR, "400 ngày trước", "400 days ago"),
    ),
)
def test_the_time_passed_is_told_in_the_largest_unit_rounded_down(passed, vi, en):
    """WIRE §2: "under 60 s `vừa xong`, then `N phút trước`, `N giờ trước`, `N ngày trước`, rounded down"."""
    assert last_active_ago(NOW - passed, NOW, "vi") == vi
    assert last_active_ago(NOW - passed, NOW, "en") == en


@pytest.mark.parametrize("ahead", (1, MINUTE, 10 * DAY))
def test_a_moment_ahead_of_our_clock_is_just_now(ahead):
    assert last_active_ago(NOW + ahead, NOW, "vi") == "vừa xong"
    assert last_active_ago(NOW + ahead, NOW, "en") == "just now"


@pytest.mark.parametrize(
    ("header", "language"),
    (
        (None, "vi"),
        ("", "vi"),
        ("en", "en"),
        ("EN-us", "en"),
        ("vi", "vi"),
        ("vi-VN", "vi"),
        ("fr", "vi"),
        ("fr, en;q=0.1", "en"),
        ("en-US,en;q=0.9,vi;q=0.8", "en"),
        ("en-US;q=0.5,en;q=0.7,vi;q=0.6", "en"),
        ("en;q=0.7,en-US;q=0.5,vi;q=0.6", "en"),
        ("vi-VN,vi;q=0.9,en-US;q=0.8", "vi"),
        ("en;q=0.4,vi;q=0.5", "vi"),
        ("en ; q=0.8 , vi;q=0.801", "vi"),
        ("en;Q=1.000", "en"),
        ("en,,", "en"),
    ),
)
def test_the_higher_q_of_vi_and_en_wins(header, language):
    """WIRE §2: "the higher q of `vi`/`en` wins, `vi` by default"."""
    assert language_of(header) == language


@pytest.mark.parametrize("header", ("en, vi", "vi;q=0.5, en;q=0.5", "*"))
def test_vietnamese_wins_a_tie(header):
    assert language_of(header) == "vi"


@pytest.mark.parametrize(("header", "language"), (("en;q=0", "vi"), ("vi;q=0, *", "en"), ("en;q=0.000, *;q=0.1", "vi")))
def test_q_0_excludes_a_language(header, language):
    """RFC 9110 §12.4.2: "a value of 0 means 'not acceptable'"; §12.5.4: `*` is every language not named."""
    assert language_of(header) == language


@pytest.mark.parametrize(
    "header", ("en;q=2", "en;q=", "en;q=x", "en;level=1", "en q=1", "en;q=0.1234", "en;q=1.001", "en_US", "en;q=٠", ";")
)
def test_a_header_that_is_not_understood_counts_as_none(header):
    assert language_of(header) == "vi"


@given(st.text())
def test_no_header_makes_it_raise(header):
    assert language_of(header) in ("vi", "en")


@given(st.integers(), st.integers(), st.sampled_from(("vi", "en")))
def test_no_moment_makes_it_raise(active, now, language):
    assert last_active_ago(active, now, language)
