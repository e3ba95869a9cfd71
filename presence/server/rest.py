"""The REST API (guide, PresenceController; WIRE §2)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence

from quart import Blueprint, Response, request

from presence.core.ago import language_of, last_active_ago
from presence.core.model import ID, Status, no_ids, rfc3339
from presence.server.auth import InvalidToken, TokenVerifier, bearer
from presence.server.budget import IdBudget
from presence.server.problems import Problem
from presence.service import Answer, PresenceService


def presence_api(service: PresenceService, verifier: TokenVerifier, budget: IdBudget, max_ids: int) -> Blueprint:
    """Return the routes below ``/api/presence``.

    Args:
        max_ids: most distinct ids in one batch.
    """
    api = Blueprint("presence", __name__, url_prefix="/api/presence")

    async def caller() -> str:
        token = bearer(request.headers.get("Authorization"))
        if token is None:
            raise Problem(401, "Authorization must be a bearer token", {"WWW-Authenticate": "Bearer"})
        try:
            return (await verifier.verify(token, again=True)).user
        except InvalidToken as error:
            challenge = f'Bearer error="invalid_token", error_description="{error}"'
            raise Problem(401, f"Authorization: {error}", {"WWW-Authenticate": challenge}) from None

    def spend(user: str, ids: int) -> None:
        wait = budget.take(user, ids, time.monotonic())
        if wait:
            raise Problem(429, "too many ids a second", {"Retry-After": str(math.ceil(wait))})

    @api.get("/friends")
    async def friends() -> Response:
        user = await caller()
        spend(user, 1)
        return _entries(await service.get_friends_presence(user))

    @api.get("/conversation/<conversation>")
    async def conversation(conversation: str) -> Response:
        user = await caller()
        _check(conversation, "conversationId")
        spend(user, 1)
        answer = await service.get_conversation_presence(user, conversation)
        if answer is None:
            raise Problem(403, "not a member of this conversation")
        return _entries(answer)

    @api.get("/check/<user_id>")
    async def check(user_id: str) -> Response:
        user = await caller()
        _check(user_id, "userId")
        spend(user, 1)
        return _json(json.dumps({"isOnline": await service.is_user_online(user, user_id)}, separators=(",", ":")))

    @api.post("/batch")
    async def batch() -> Response:
        user = await caller()
        users = await _ids(max_ids)
        spend(user, len(users))
        return _entries(await service.get_presence(user, users))

    return api


async def _ids(most: int) -> Sequence[str]:
    """Return the distinct ids in the body, a bare JSON array."""
    if request.mimetype != "application/json":
        raise Problem(415, "Content-Type must be application/json")
    try:
        ids = json.loads(await request.get_data(cache=False))
    except (ValueError, RecursionError):
        raise Problem(400, "body is not JSON") from None
    if not isinstance(ids, list):
        raise Problem(400, "body must be a JSON array of user ids")
    if wrong := no_ids(ids):
        raise _no_id(wrong[0], "userId")
    distinct = list(dict.fromkeys(ids))
    if len(distinct) > most:
        raise Problem(413, f"more than {most} user ids")
    return distinct


def _check(value: str, name: str) -> None:
    if not ID.fullmatch(value):
        raise _no_id(value, name)


def _no_id(value: object, name: str) -> Problem:
    return Problem(400, f"{name} {str(value)[:64]!r} is not an id")


def _entries(answer: Answer) -> Response:
    language = language_of(request.headers.get("Accept-Language"))
    now_ms = int(time.time() * 1000)

    def entry(status: Status) -> str:  # ids and times need no escapes, and formatting takes a third of encoding objects
        user, seen = status.user, status.last_active
        if status.online:
            rest = '"status":"ONLINE","isOnline":true,"lastSeen":null,"lastActiveAgo":null'
        elif seen is None:
            rest = '"status":"OFFLINE","isOnline":false,"lastSeen":null,"lastActiveAgo":null'
        else:
            ago = last_active_ago(seen, now_ms, language)
            rest = f'"status":"OFFLINE","isOnline":false,"lastSeen":"{rfc3339(seen)}","lastActiveAgo":"{ago}"'
        return f'"{user}":{{"userId":"{user}",{rest}}}'

    headers = {"Presence-Degraded": "last-seen"} if answer.degraded else {}
    return _json(f"{{{','.join(map(entry, answer.statuses.values()))}}}", headers)


def _json(text: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text, content_type="application/json", headers=dict(headers or {}))
