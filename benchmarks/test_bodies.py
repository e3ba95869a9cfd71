"""What JSON costs, in and out, and one change to so many sessions."""

from __future__ import annotations

import json

import pytest

from benchmarks.test_growth import tell_sessions, write_bodies
from presence.core.model import ID

BODY = json.dumps({"userIds": [f"f1f8f884-a8aa-44ec-9313-{number:012d}" for number in range(1_000)]}).encode()


@pytest.mark.parametrize("count", [10, 100, 1_000])
def test_fan_out_to_so_many_sessions(benchmark, count):
    assert benchmark(tell_sessions, count)


def test_write_a_thousand_bodies(benchmark):
    assert len(benchmark(write_bodies, 1_000)) == 1_000


def test_read_a_body_of_a_thousand_ids(benchmark):
    assert len(benchmark(lambda: [user for user in json.loads(BODY)["userIds"] if ID.fullmatch(user)])) == 1_000
