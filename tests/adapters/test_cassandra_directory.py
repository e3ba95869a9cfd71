"""presence.adapters.cassandra: friends and conversations in Cassandra."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from presence.adapters import answers as cache
from presence.adapters import cassandra as adapter
from presence.adapters.cassandra import CassandraDirectory
from presence.ports import DirectoryUnavailable


class People:
    """The host application, which fills the tables."""

    def __init__(self, session) -> None:
        self.session = session

    async def befriend(self, user: str, *friends: str) -> None:
        await self._put("friends_by_user (user_id, friend_id)", [(user, friend) for friend in friends])
        await self._put("users_by_friend (friend_id, user_id)", [(friend, user) for friend in friends])

    async def join(self, conversation: str, *users: str) -> None:
        await self._put("members_by_conversation (conversation_id, user_id)", [(conversation, one) for one in users])
        await self._put("conversations_by_user (user_id, conversation_id)", [(one, conversation) for one in users])

    async def leave(self, conversation: str, user: str) -> None:
        cql = "DELETE FROM presence.members_by_conversation WHERE conversation_id = ? AND user_id = ?"
        await self.session.ask([(cql, [conversation, user])])

    async def _put(self, table: str, rows: list[tuple[str, str]]) -> None:
        await self.session.ask([(f"INSERT INTO presence.{table} VALUES (?, ?)", row) for row in rows])


@pytest_asyncio.fixture
async def people(session) -> People:
    return People(session)


@pytest.fixture
def directory(session) -> CassandraDirectory:
    return CassandraDirectory(session, cache=0)


async def test_friends_are_those_the_user_lists(directory, people, users):
    a, b, c = users("a"), users("b"), users("c")
    await people.befriend(a, b, c)
    assert set(await directory.friends(a)) == {b, c}
    assert list(await directory.friends(b)) == []


async def test_members_are_those_of_the_conversation(directory, people, users):
    """ports.Directory: "None when there is no such conversation"."""
    a, b, talk = users("a"), users("b"), users("c")
    await people.join(talk, a, b)
    assert set(await directory.members(talk) or ()) == {a, b}
    assert await directory.members(users("none")) is None


async def test_contacts_are_the_user_who_lists_the_user_and_who_shares_a_conversation(directory, people, users):
    """WIRE §5: "X sees Y if and only if Y lists X as a friend, or they share a conversation, or X = Y"."""
    x, lists, listed, shares, other, stranger = (users(name) for name in "xyzabs")
    await people.befriend(lists, x)
    await people.befriend(x, listed)
    await people.join(users("one"), x, shares)
    await people.join(users("two"), x, other, shares)
    await people.join(users("three"), stranger, other)
    assert await directory.contacts(x) == {x, lists, shares, other}
    assert await directory.contacts(listed) == {listed, x}
    assert await directory.contacts(users("nobody")) != set()


async def test_a_large_conversation_is_read_to_its_end(directory, people, users):
    """More than a page."""
    talk, me = users("talk"), users("me")
    everybody = {me, *(users("u") for _ in range(adapter.PAGE * 2))}
    await people.join(talk, *everybody)
    assert set(await directory.members(talk) or ()) == everybody
    assert await directory.contacts(me) == everybody


async def test_more_ids_than_are_sane_are_an_error(directory, people, users, monkeypatch):
    monkeypatch.setattr(adapter, "MAX_IDS", 10)
    talk = users("talk")
    await people.join(talk, *(users("u") for _ in range(11)))
    with pytest.raises(DirectoryUnavailable, match="more than 10 ids"):
        await directory.members(talk)


async def test_an_answer_is_used_for_so_long(session, people, users):
    """ports.Directory: "at most 10 s old"."""
    a, b, c = users("a"), users("b"), users("c")
    directory = CassandraDirectory(session, cache=0.5)
    await people.befriend(a, b)
    asked = asyncio.get_running_loop().time()
    assert await directory.contacts(b) == {a, b}
    await people.befriend(c, b)
    while await directory.contacts(b) != {a, b, c}:
        assert asyncio.get_running_loop().time() - asked < 2
        await asyncio.sleep(0.02)
    assert asyncio.get_running_loop().time() - asked >= 0.5


async def test_contacts_are_not_made_of_members_that_are_old_already(session, people, users):
    a, b, talk = users("a"), users("b"), users("talk")
    directory = CassandraDirectory(session, cache=5)
    await people.join(talk, a, b)
    assert set(await directory.members(talk) or ()) == {a, b}
    await people.leave(talk, b)
    assert await directory.contacts(a) == {a}


async def test_many_who_ask_the_same_are_one_question(session, people, users, monkeypatch):
    a, b = users("a"), users("b")
    await people.befriend(a, b)
    directory = CassandraDirectory(session, cache=5)
    asked = []
    pages = session.pages

    def counted(cql, values):
        asked.append(cql)
        return pages(cql, values)

    monkeypatch.setattr(session, "pages", counted)
    answers = await asyncio.gather(*(directory.friends(a) for _ in range(100)))
    assert answers == [(b,)] * 100
    assert len(asked) == 1


async def test_the_cache_has_a_bound(session, people, users, monkeypatch):
    monkeypatch.setattr(cache, "CACHED", 5)
    directory = CassandraDirectory(session, cache=5)
    for number in range(20):
        await directory.friends(f"nobody-{number}")
    assert len(directory._answers._known) == 5


async def test_without_cassandra_it_is_unavailable_and_what_is_cached_is_not(session, people, users):
    a, b = users("a"), users("b")
    await people.befriend(a, b)
    directory = CassandraDirectory(session, cache=5)
    assert list(await directory.friends(a)) == [b]
    await session.close()
    assert list(await directory.friends(a)) == [b]
    with pytest.raises(DirectoryUnavailable):
        await directory.contacts(a)
