"""The directory over HTTP, against a real application in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from presence.adapters import answers, http_directory
from presence.adapters.http_directory import HttpDirectory
from presence.ports import DirectoryUnavailable

PEOPLE = {
    "/base/friends/ann": ["bob", "cid", "bob"],
    "/base/conversations/team": ["ann", "bob"],
    "/base/contacts/ann": ["bob"],
}


class Application:
    """The host application: answers what `answers` has, and counts what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = dict(PEOPLE)
        self.asked: Counter[str] = Counter()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked[request.path] += 1
        await self.may_answer.wait()
        answer = self.answers.get(request.path)
        if isinstance(answer, int):
            return web.Response(status=answer, headers={"Location": "/elsewhere"})
        if answer is None:
            return web.Response(status=404)
        return web.Response(text=answer if isinstance(answer, str) else json.dumps(answer))


@pytest_asyncio.fixture
async def application() -> AsyncIterator[Application]:
    app = Application()
    await app.start()
    yield app
    app.may_answer.set()
    await app.stop()


@pytest_asyncio.fixture
async def directory(application) -> AsyncIterator[Callable[..., HttpDirectory]]:
    made: list[HttpDirectory] = []

    def make(**options: Any) -> HttpDirectory:
        made.append(HttpDirectory(f"http://127.0.0.1:{application.port}/base/", **{"timeout": 0.5} | options))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_what_the_application_says(directory):
    people = directory()
    assert await people.friends("ann") == ("bob", "cid")
    assert await people.members("team") == ("ann", "bob")
    assert await people.contacts("ann") == {"ann", "bob"}
    assert people.health.state == "up"


async def test_who_and_what_it_does_not_know(directory):
    people = directory()
    assert await people.friends("nobody") == ()
    assert await people.members("nothing") is None
    assert await people.contacts("nobody") == {"nobody"}


async def test_an_answer_is_used_as_long_as_stated_and_no_longer(application, directory):
    people = directory(cache=0.3)
    first = await people.contacts("ann")
    application.answers["/base/contacts/ann"] = ["cid"]
    assert await people.contacts("ann") is first
    assert application.asked == {"/base/contacts/ann": 1}
    await asyncio.sleep(0.35)
    assert await people.contacts("ann") == {"ann", "cid"}


async def test_without_a_cache_each_question_is_asked(application, directory):
    people = directory(cache=0.0)
    for _ in range(3):
        await people.friends("ann")
    assert application.asked == {"/base/friends/ann": 3}


async def test_many_who_ask_the_same_wait_for_one_answer(application, directory):
    people = directory()
    application.may_answer.clear()
    tasks = [asyncio.create_task(people.friends("ann")) for _ in range(20)]
    await asyncio.sleep(0.05)
    tasks[0].cancel()
    application.may_answer.set()
    assert await asyncio.gather(*tasks[1:]) == [("bob", "cid")] * 19
    assert application.asked == {"/base/friends/ann": 1}


async def test_away_is_unknown_but_for_what_is_known_still(application, directory):
    people = directory(cache=0.5)
    await people.friends("ann")
    await application.stop()
    assert await people.friends("ann") == ("bob", "cid")
    with pytest.raises(DirectoryUnavailable):
        await people.friends("bob")
    assert people.health.state == "down"
    await asyncio.sleep(0.5)
    with pytest.raises(DirectoryUnavailable):
        await people.friends("ann")
    await application.start()


async def test_who_is_silent_is_away_after_the_time_limit_and_not_asked_at_once_again(application, directory):
    people = directory()
    application.may_answer.clear()
    began = time.monotonic()
    for user in ("ann", "bob", "cid", "dan"):
        with pytest.raises(DirectoryUnavailable, match=r"/base: no answer within 0\.5 s"):
            await people.friends(user)
    assert time.monotonic() - began < 1.4, "one time limit, not four"
    assert application.asked == {"/base/friends/ann": 1}


async def test_it_is_asked_again_once_it_is_back(application, directory, monkeypatch):
    monkeypatch.setattr(http_directory, "PAUSE", 0.1)
    people = directory()
    await application.stop()
    with pytest.raises(DirectoryUnavailable):
        await people.friends("ann")
    await application.start()
    await asyncio.sleep(0.15)
    assert await people.friends("ann") == ("bob", "cid")
    assert people.health.state == "up"


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_an_application_that_says_it_cannot_answer_is_away(application, directory, status):
    """Found in review: behind a proxy it was never down, and each question was asked."""
    application.answers["/base/friends/ann"] = status
    people = directory()
    for user in ("ann", "bob"):
        with pytest.raises(DirectoryUnavailable, match=f"/base: status {status}"):
            await people.friends(user)
    assert people.health.state == "down"
    assert application.asked == {"/base/friends/ann": 1}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (500, "status 500"),
        (302, "status 302"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"friends": []}', "not a JSON array of ids"),
        (["bob", 7], "not a JSON array of ids"),
        (["bob", "c:d"], "not a JSON array of ids"),
        (json.dumps(["x" * 100] * 50_000), "more than 4194304 bytes"),
    ],
)
async def test_a_wrong_answer_is_none(application, directory, answer, reason):
    application.answers["/base/friends/ann"] = answer
    with pytest.raises(DirectoryUnavailable, match=reason):
        await directory().friends("ann")


async def test_a_wrong_answer_of_one_user_is_no_outage_for_the_others(application, directory):
    application.answers["/base/friends/ann"] = 500
    people = directory()
    for _ in range(3):
        with pytest.raises(DirectoryUnavailable, match="status 500"):
            await people.friends("ann")
        assert await people.contacts("ann") == {"ann", "bob"}
    assert people.health.state == "up"


async def test_what_is_too_old_is_not_kept(directory):
    people = directory(cache=0.1)
    for number in range(20):
        await people.friends(f"u{number}")
    await asyncio.sleep(0.15)
    await people.friends("ann")
    assert list(people._answers._known) == ["friends/ann"]


async def test_the_cache_is_bounded(directory, monkeypatch):
    monkeypatch.setattr(answers, "CACHED", 10)
    people = directory()
    for number in range(30):
        await people.friends(f"u{number}")
        await people.contacts(f"u{number}")
    assert len(people._answers._known) <= 10
