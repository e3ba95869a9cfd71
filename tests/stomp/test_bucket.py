from __future__ import annotations

import pytest

from presence.stomp.bucket import TokenBucket


def test_a_burst_passes_at_once_and_not_one_unit_more():
    bucket = TokenBucket(rate=10, burst=3)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [True, True, True, False]


def test_units_come_back_at_the_rate():
    bucket = TokenBucket(rate=10, burst=3)
    assert bucket.take(3, 5.0)
    assert not bucket.take(1, 5.09)
    assert bucket.take(1, 5.11)
    assert not bucket.take(1, 5.11)


def test_what_is_not_used_is_kept_up_to_one_burst():
    bucket = TokenBucket(rate=10, burst=3)
    assert bucket.take(3, 0.0)
    assert not bucket.take(4, 1000.0)
    assert bucket.take(3, 1000.0)


def test_a_refusal_takes_nothing():
    bucket = TokenBucket(rate=10, burst=3)
    assert not bucket.take(4, 0.0)
    assert bucket.take(3, 0.0)


def test_wait_is_the_time_until_the_units_are_there():
    bucket = TokenBucket(rate=10, burst=3)
    assert bucket.wait(3) == 0
    bucket.take(3, 0.0)
    assert bucket.wait(2) == pytest.approx(0.2)
    assert bucket.take(2, 0.2)


def test_wait_for_more_than_a_burst_is_the_time_until_the_bucket_is_full():
    bucket = TokenBucket(rate=10, burst=3)
    bucket.take(3, 0.0)
    assert bucket.wait(50) == pytest.approx(0.3)
