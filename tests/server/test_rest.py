"""presence.server.rest: what is not to be provoked over the wire. The rest: tests/wire/test_2_rest.py."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pytest
from quart import Quart

from presence.core.model import Status
from presence.fanout import Fanout
from presence.ports import Directory, DirectoryUnavailable, HistoryStore, HistoryUnavailable, PresenceStore, Reading
from presence.server.app import create_app
from presence.server.auth import TokenVerifier, make_token
from presence.server.budget import IdBudget
from presence.server.origins import Origins
from presence.server.rest import presence_api
from presence.service import PresenceService, Rules

SECRET = b"a secret of the tests, of 32 bytes and more"


class World:
    """A store, a history and a directory that say what they are told to, and remember what they were asked."""

    def __init__(self) -> None:
        self.online: set[str] = set()
        self.rows: dict[str, Status] = {}
        self.seen_by: frozenset[str] = frozenset()
        self.unsettled = False
        self.away: type[Exception] | None = None
        self.asked: list[tuple[str, list[str]]] = []

    async def friends(self, user: str) -> Sequence[str]:
        if self.away is DirectoryUnavailable:
            raise DirectoryUnavailable
        return sorted(self.online)

    async def members(self, conversation: str) -> Sequence[str] | None:
        if self.away is DirectoryUnavailable:
            raise DirectoryUnavailable
        return None

    async def contacts(self, user: str) -> frozenset[str]:
        if self.away is DirectoryUnavailable:
            raise DirectoryUnavailable
        return self.seen_by | {user}


class Store:
    partitions = 1

    def partition_of(self, user: str) -> int:
        return 0

    def __init__(self, world: World) -> None:
        self.world = world

    async def read(self, users: Collection[str]) -> Reading:
        self.world.asked.append(("store", list(users)))
        statuses = {
            user: Status(user, user in self.world.online, 5 if user in self.world.online else 0) for user in users
        }
        return Reading(statuses, frozenset(users if self.world.unsettled else ()))


class History:
    def __init__(self, world: World) -> None:
        self.world = world

    async def read(self, users: Collection[str]) -> Mapping[str, Status]:
        self.world.asked.append(("history", list(users)))
        if self.world.away is HistoryUnavailable:
            raise HistoryUnavailable
        return {user: self.world.rows[user] for user in users if user in self.world.rows}


@pytest.fixture
def world() -> World:
    return World()


def app_of(world: World, *, contacts_only: bool) -> Quart:
    service = PresenceService(
        cast("PresenceStore", Store(world)),
        cast("HistoryStore", History(world)),
        cast("Directory", world),
        Fanout(),
        Rules(contacts_only=contacts_only),
    )
    api = presence_api(service, TokenVerifier(secret=SECRET), IdBudget(5_000, 10_000), 1_000)
    return create_app(api, Origins((), loopback_only=True), {}, 262_144)


async def batch(app: Quart, users: Any) -> tuple[int, Any, dict[str, str]]:
    token = make_token(SECRET, "viewer", 60, now=time.time())
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = users if isinstance(users, bytes) else json.dumps(users)
    answer = await app.test_client().post("/api/presence/batch", headers=headers, data=data)
    return answer.status_code, json.loads(await answer.get_data(as_text=False)), dict(answer.headers)


async def get(app: Quart, path: str) -> int:
    token = make_token(SECRET, "viewer", 60, now=time.time())
    answer = await app.test_client().get(f"/api/presence/{path}", headers={"Authorization": f"Bearer {token}"})
    return answer.status_code


async def test_the_same_is_looked_up_for_the_hidden_and_for_those_never_seen(world):
    """WIRE §5: "answered exactly like watching a user never seen: [...] the look-ups made are the same"."""
    world.online = {"hidden-online"}
    world.rows = {"hidden-offline": Status("hidden-offline", False, 7, 7_000)}
    app = app_of(world, contacts_only=True)
    seen = []
    for user in ("hidden-online", "hidden-offline", "never"):
        world.asked.clear()
        status, body, _ = await batch(app, [user])
        assert status == 200
        seen.append(([(where, len(users)) for where, users in world.asked], body[user] | {"userId": ""}))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] == [("store", 1), ("history", 1)]


@pytest.mark.parametrize("away", (None, HistoryUnavailable))
@pytest.mark.parametrize("unsettled", (False, True))
async def test_hidden_and_never_seen_are_unknown_alike(world, away, unsettled):
    """WIRE §5: "answered exactly like [...] REST, batch, snapshot, headers": also while something is away."""
    world.online, world.away, world.unsettled = {"hidden"}, away, unsettled
    app = app_of(world, contacts_only=True)
    answers = []
    for user in ("hidden", "nobody"):
        status, body, headers = await batch(app, [user])
        answers.append((status, json.dumps(body).replace(user, ""), sorted(headers.items())))
    assert answers[0] == answers[1]
    assert answers[0][0] == (503 if unsettled else 200)
    degraded = {name.lower(): value for name, value in answers[0][2]}.get("presence-degraded")
    assert degraded == ("last-seen" if away and not unsettled else None)


async def test_while_the_store_settles_only_online_is_known(world):
    """WIRE §2: "is still settling (DESIGN §3.6), an answer that would be "offline" is a 503"."""
    world.online, world.unsettled = {"online"}, True
    app = app_of(world, contacts_only=False)
    status, body, _ = await batch(app, ["online"])
    assert (status, body["online"]["isOnline"]) == (200, True)
    for users in (["offline"], ["online", "offline"]):
        status, _, headers = await batch(app, users)
        assert status == 503
        assert "retry-after" in map(str.lower, headers)


async def test_without_the_directory_nothing_that_needs_it_is_known(world):
    """DESIGN §7: "A failed dependency is reported as unknown (503)"."""
    world.online, world.away = {"online"}, DirectoryUnavailable
    app = app_of(world, contacts_only=False)
    assert await get(app, "friends") == 503
    assert await get(app, "conversation/c") == 503
    assert await get(app, "check/online") == 200
    app = app_of(world, contacts_only=True)
    assert await get(app, "check/online") == 503
    assert (await batch(app, ["online"]))[0] == 503


@pytest.mark.parametrize("opening", ("[", '{"a":'))
async def test_no_depth_of_nesting_makes_it_fail(world, opening):
    """WIRE §2: "400 bad JSON, bad id": every depth around Python's limit of recursion."""
    app = app_of(world, contacts_only=False)
    closing = {"[": "]", '{"a":': "}"}[opening]
    for depth in (*range(1, 1_000, 20), 5_000, 20_000):
        status, _, _ = await batch(app, f"[{opening * depth}1{closing * depth}]".encode())
        assert status == 400, depth
