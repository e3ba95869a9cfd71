"""presence.core.model: ids, statuses and what is told of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presence.core.model import ID, Change, Reason, Session, Status, no_ids, rfc3339


@pytest.mark.parametrize(
    "good", ("a", "7", "f1f8f884-a8aa-44ec-9313-e234860c5e41", "bob@example.com", "A.b_c~d-e", "x" * 128)
)
def test_an_id_may_hold_letters_digits_and_a_few_marks(good):
    """WIRE §1: "User and conversation ids: `[A-Za-z0-9][A-Za-z0-9._~@-]{0,127}`"."""
    assert ID.fullmatch(good)


@pytest.mark.parametrize("bad", ("", "a:b", "-a", ".a", "@a", "a b", "a\n", "ä", "a/b", "{a}", "x" * 129, "a\0"))
def test_what_could_blur_a_key_is_no_id(bad):
    """WIRE §1: "No colon, so keys stay unambiguous"."""
    assert not ID.fullmatch(bad)


@pytest.mark.parametrize(
    "values",
    [
        [],
        ["alice"],
        ["alice", "bob", "c" * 128],
        ["alice\nbob"],
        ["alice", "bob\n"],
        ["\nalice"],
        ["alice", "", "bob"],
        ["c" * 129, "alice", "a b"],
        ["alice", None, 7, ["bob"], {"carol": 1}, "bob", "é"],
        ["a:b"] * 3,
    ],
)
def test_the_first_that_is_no_id_is_found_as_one_by_one(values):
    assert list(no_ids(values)) == [one for one in values if not (isinstance(one, str) and ID.fullmatch(one))][:1]


@given(st.lists(st.text("aZ0._~@-\n :é", max_size=4) | st.none(), max_size=5))
def test_no_list_makes_a_difference(values):
    assert list(no_ids(values)) == [one for one in values if one is None or not ID.fullmatch(one)][:1]


def test_a_change_is_told_as_the_event_of_the_guide():
    """WIRE §5: `{"userId":"…","online":true,"timestamp":"2025-07-17T10:30:00.123Z","version":1752748200123456}`."""
    told = Change("u1", True, 1_752_748_200_123_456, 1_752_748_200_000, "mobile", Reason.CONNECTED).event
    assert told == b'{"userId":"u1","online":true,"timestamp":"2025-07-17T10:30:00.123Z","version":1752748200123456}'


def test_a_snapshot_is_the_same_shape_marked_as_one():
    """WIRE §5: "in the same shape plus `"snapshot": true`"."""
    status = Status("u1", False, 1_752_748_200_123_456)
    assert json.loads(status.snapshot) == json.loads(status.event) | {"snapshot": True}


def test_of_a_user_whom_no_store_knows_there_is_no_time():
    """WIRE §5: "a user no store knows has `online: false`, `timestamp: null`, `version: 0`"."""
    assert json.loads(Status("u1").event) == {"userId": "u1", "online": False, "timestamp": None, "version": 0}


@pytest.mark.parametrize(
    ("ms", "text"),
    (
        (1_752_748_200_123, "2025-07-17T10:30:00.123Z"),
        (1_752_748_200_000, "2025-07-17T10:30:00.000Z"),
        (0, "1970-01-01T00:00:00.000Z"),
    ),
)
def test_moments_are_rfc_3339_in_utc(ms, text):
    """WIRE §2 and §5: "RFC 3339 UTC with `Z`"."""
    assert rfc3339(ms) == text


def test_every_millisecond_survives_the_way_into_text():
    for ms in range(1_752_748_200_000, 1_752_748_201_000):
        assert rfc3339(ms)[-4:-1] == f"{ms % 1000:03}"


def test_sessions_are_told_apart_by_identity():
    one, other = (Session("u1", "s1", "web", 0.0, 0.0) for _ in range(2))
    assert one != other
    assert len({one, other}) == 2


def test_the_reasons_are_those_of_the_topic():
    """WIRE §7: `connected`, `disconnected`, `signed-off`, `expired`, `revived`, `drained`, `restored`."""
    words = "connected disconnected signed-off expired revived drained restored"
    assert " ".join(Reason) == words
