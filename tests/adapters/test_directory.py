"""presence.adapters.directory: friends and conversations from a JSON file (DESIGN §5)."""

from __future__ import annotations

import asyncio
import json
import logging
import os

import pytest

from presence.adapters import directory
from presence.adapters.directory import DirectoryError, FileDirectory, demo_path
from presence.core.model import ID


@pytest.fixture
def file(tmp_path):
    return tmp_path / "directory.json"


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(directory, "time", clock)
    return clock


def write(file, friends=None, conversations=None):
    file.write_text(json.dumps({"friends": friends or {}, "conversations": conversations or {}}))


def error_of(file, text):
    file.write_text(text) if isinstance(text, str) else file.write_bytes(text)
    with pytest.raises(DirectoryError) as caught:
        FileDirectory(file)
    line = str(caught.value)
    assert line.startswith(f"{file}: ")
    assert "\n" not in line
    return line.removeprefix(f"{file}: ")


async def test_friends_come_in_the_files_order_each_once(file):
    write(file, friends={"a": ["c", "b", "c"], "b": []})
    people = FileDirectory(file)
    assert list(await people.friends("a")) == ["c", "b"]
    assert list(await people.friends("b")) == []


async def test_an_unknown_user_has_no_friends(file):
    """ports.Directory: "empty for an unknown user"."""
    write(file)
    assert list(await FileDirectory(file).friends("nobody")) == []


async def test_members_are_those_of_the_conversation(file):
    """ports.Directory: "None when there is no such conversation"."""
    write(file, conversations={"c1": ["a", "b"], "c2": []})
    people = FileDirectory(file)
    assert list(await people.members("c1") or ()) == ["a", "b"]
    assert list(await people.members("c2") or ()) == []
    assert await people.members("c3") is None


async def test_a_user_may_see_those_who_list_the_user_as_a_friend(file):
    """WIRE §5: "X sees Y if and only if Y lists X as a friend, or they share a conversation, or X = Y"."""
    write(file, friends={"y": ["x"], "x": ["z"]})
    people = FileDirectory(file)
    assert await people.contacts("x") == {"x", "y"}
    assert await people.contacts("z") == {"z", "x"}
    assert await people.contacts("y") == {"y"}


async def test_a_user_may_see_those_in_the_same_conversations(file):
    """WIRE §5: "or they share a conversation"."""
    write(file, conversations={"c1": ["x", "a"], "c2": ["x", "b"], "c3": ["d"]})
    assert await FileDirectory(file).contacts("x") == {"x", "a", "b"}


async def test_a_stranger_may_see_only_the_stranger(file):
    write(file, friends={"y": ["x"]}, conversations={"c1": ["x", "y"]})
    assert await FileDirectory(file).contacts("s") == {"s"}


async def test_a_change_of_the_file_is_seen_within_a_second(file, clock):
    """DESIGN §5: "re-read when it changes"."""
    write(file, friends={"a": ["b"]}, conversations={"c1": ["a"]})
    people = FileDirectory(file)
    write(file, friends={"a": ["b", "c"]}, conversations={"c2": ["a"]})
    clock.now += 0.9
    assert list(await people.friends("a")) == ["b"]
    clock.now += 0.1
    assert list(await people.friends("a")) == ["b", "c"]
    assert await people.members("c1") is None
    assert await people.contacts("c") == {"c", "a"}
    write(file, friends={"a": ["d"]})
    assert list(await people.friends("a")) == ["b", "c"]  # nor is it looked at more often


@pytest.mark.parametrize("change", (lambda file: file.write_text('{"friends": 7}'), lambda file: file.unlink()))
async def test_a_file_that_broke_keeps_the_old_content_and_is_logged_once(file, clock, caplog, change):
    write(file, friends={"a": ["b"]})
    people = FileDirectory(file)
    change(file)
    for _ in range(3):
        clock.now += 1
        assert list(await people.friends("a")) == ["b"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "\n" not in caplog.messages[0]
    write(file, friends={"a": ["d"]})
    clock.now += 1
    assert list(await people.friends("a")) == ["d"]


async def test_a_file_replaced_by_another_of_the_same_size_and_time_is_seen(file, tmp_path, clock):
    write(file, friends={"a": ["b"]})
    people = FileDirectory(file)
    other = tmp_path / "other"
    write(other, friends={"a": ["c"]})
    stat = file.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    clock.now += 1
    assert list(await people.friends("a")) == ["c"]


async def test_a_large_file_is_read_without_holding_up_the_loop(file, clock):
    write(file, friends={"a": ["b"]})
    people = FileDirectory(file)
    write(file, friends={f"u{number}": [f"u{number + other}" for other in range(20)] for number in range(20_000)})
    clock.now += 1
    reading, turns = asyncio.create_task(people.friends("u7")), 0
    while not reading.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len(await reading) == 20
    assert turns > 3  # 1, were it read in the loop


@pytest.mark.parametrize(
    ("text", "line"),
    (
        ("{", "not JSON: "),
        ("", "not JSON: "),
        (b"\xff", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("[]", "must be an object with friends and conversations"),
        ('{"freinds": {}}', '"freinds" is neither friends nor conversations'),
        ('{"": {}}', '"" is neither friends nor conversations'),
        ('{"friends": []}', "friends must be an object of lists"),
        ('{"friends": {"a b": []}}', 'friends: "a b" is not an id'),
        ('{"friends": {"a": "b"}}', "friends.a must be a list of user ids"),
        ('{"friends": {"a": ["b", "c:d"]}}', 'friends.a[1]: "c:d" is not a user id'),
        ('{"friends": {"a": ["b\\n"]}}', 'friends.a[0]: "b\\n" is not a user id'),
        ('{"friends": {"a": [7]}}', "friends.a[0]: 7 is not a user id"),
        ('{"conversations": null}', "conversations must be an object of lists"),
        ('{"conversations": {"c:1": []}}', 'conversations: "c:1" is not an id'),
        ('{"conversations": {"c": [["a"]]}}', 'conversations.c[0]: ["a"] is not a user id'),
    ),
)
def test_a_wrong_file_is_named_with_the_place(file, text, line):
    assert error_of(file, text).startswith(line)


def test_a_file_that_is_not_there_is_named(file):
    with pytest.raises(DirectoryError, match=r"directory\.json: No such file"):
        FileDirectory(file)


async def test_either_part_may_be_missing(file):
    file.write_text("{}")
    people = FileDirectory(file)
    assert list(await people.friends("a")) == []
    assert await people.members("c") is None


async def test_the_demo_has_friends_both_ways_one_one_way_and_two_conversations():
    people = FileDirectory(demo_path())
    everybody = ("alice", "bob", "carol", "dave", "erin", "frank")
    friends = {user: set(await people.friends(user)) for user in everybody}
    one_way = {(a, b) for a in everybody for b in friends[a] if a not in friends[b]}
    assert one_way == {("erin", "frank")}
    assert set(await people.members("team") or ()) == {"alice", "bob", "carol", "dave"}
    assert set(await people.members("family") or ()) == {"alice", "erin", "frank"}
    assert all(ID.fullmatch(user) for user in everybody)
