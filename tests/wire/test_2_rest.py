"""WIRE §2, REST: every row, every error, CORS, languages, and what is said when something is away."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.rest import Response, raw
from tests.support.server import ServerProcess
from tests.support.stomp_client import QUEUE
from tests.support.waiting import wait_until

ORIGIN = "http://localhost:3000"  # allowed, since the server listens on loopback only
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
FIELDS = {"userId", "status", "isOnline", "lastSeen", "lastActiveAgo"}


# What the tests share.


def assert_problem(answer: Response, status: int) -> dict[str, Any]:
    """The answer is a problem document, with the headers of all answers, to a request with the Origin `ORIGIN`."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert_cors(answer)
    document = answer.json()
    assert set(document) == {"type", "title", "status", "detail"}
    assert document["status"] == status
    assert all(isinstance(document[name], str) and document[name] for name in ("type", "title", "detail"))
    assert "\n" not in document["detail"]
    assert isinstance(document, dict)
    return document


def assert_cors(answer: Response) -> None:
    """The answer may be read by a page of `ORIGIN`."""
    assert answer.headers.get_all("Access-Control-Allow-Origin") == [ORIGIN]
    assert "Origin" in answer.headers["Vary"]
    assert "Access-Control-Allow-Credentials" not in answer.headers


def entry(user: str, online: bool, last_seen: object = None, ago: object = None) -> dict[str, object]:
    status = "ONLINE" if online else "OFFLINE"
    return {"userId": user, "status": status, "isOnline": online, "lastSeen": last_seen, "lastActiveAgo": ago}


def epoch(moment: str) -> float:
    """A `lastSeen` as Unix time in s."""
    assert RFC3339.fullmatch(moment)
    return datetime.fromisoformat(moment).timestamp()


async def ask(server: ServerProcess, viewer: str, user: str, **options: Any) -> dict[str, Any]:
    """The entry of ``user``, by way of batch."""
    answer = await server.post("/api/presence/batch", viewer, json=[user], **options)
    assert answer.status == 200, answer.body
    found = answer.json()[user]
    assert isinstance(found, dict)
    return found


def bytes_of(server: ServerProcess, method: str, path: str, user: str, body: bytes = b"", *headers: str) -> bytes:
    """A request as it goes over the wire."""
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        f"Origin: {ORIGIN}",
        f"Authorization: Bearer {server.token(user)}",
        "Connection: close",
        *headers,
    ]
    if body and not any("Transfer-Encoding" in header or "Content-Length" in header for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    if body and not any("Content-Type" in header for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def send_batch(server: ServerProcess, user: str, body: bytes, *headers: str) -> Response:
    return await raw(server.http, bytes_of(server, "POST", "/api/presence/batch", user, body, *headers))


@contextmanager
def history(server: ServerProcess) -> Iterator[sqlite3.Connection]:
    """The history of a server with an embedded store."""
    with closing(sqlite3.connect(server.data_dir / "history.db", timeout=10, isolation_level=None)) as db:
        yield db


async def in_history(server: ServerProcess, user: str) -> None:
    """Wait until the history has the user as offline."""
    query = "SELECT 1 FROM user_presence WHERE user_id = ? AND NOT is_online"
    with history(server) as db:
        await wait_until(lambda: db.execute(query, (user,)).fetchone(), what=f"{user} in the history")


# Rows.


async def test_friends_are_the_callers_one_entry_each(server, connect, users):
    """WIRE §2: "`GET /api/presence/friends`: object keyed by user id, one entry per friend of the caller"."""
    alice, bob, carol = users("alice"), users("bob"), users("carol")
    await server.know(friends={alice: [bob, carol], carol: [alice]})
    await connect(server, bob)
    answer = await server.get("/api/presence/friends", alice)
    assert answer.status == 200
    assert answer.json() == {bob: entry(bob, True), carol: entry(carol, False)}
    assert list((await server.get("/api/presence/friends", carol)).json()) == [alice]
    assert (await server.get("/api/presence/friends", users("stranger"))).json() == {}


async def test_a_conversation_is_all_its_members(server, connect, users):
    """WIRE §2: "the same, for all members, the caller included"."""
    alice, bob, conversation = users("alice"), users("bob"), users("conversation")
    await server.know(conversations={conversation: [alice, bob]})
    await connect(server, alice)
    answer = await server.get(f"/api/presence/conversation/{conversation}", alice)
    assert answer.status == 200
    assert answer.json() == {alice: entry(alice, True), bob: entry(bob, False)}


async def test_who_is_no_member_cannot_tell_whether_there_is_such_a_conversation(server, users):
    """WIRE §2: "403 if the caller is no member or there is no such conversation (byte for byte the same answer)"."""
    alice, mallory, conversation = users("alice"), users("mallory"), users("conversation")
    await server.know(conversations={conversation: [alice]})
    answers = []
    for name in (conversation, users("conversation")):
        answer = await server.get(f"/api/presence/conversation/{name}", mallory, headers={"Origin": ORIGIN})
        assert_problem(answer, 403)
        del answer.headers["Date"]
        answers.append((answer.headers.items(), answer.body))
    assert answers[0] == answers[1]


async def test_check_says_whether_one_user_is_online(server, connect, users):
    """WIRE §2: "`GET /api/presence/check/{userId}`: `{"isOnline": true}`"."""
    alice, bob = users("alice"), users("bob")
    await connect(server, alice)
    assert (await server.get(f"/api/presence/check/{alice}", bob)).json() == {"isOnline": True}
    assert (await server.get(f"/api/presence/check/{bob}", bob)).json() == {"isOnline": False}


async def test_batch_is_keyed_by_id_and_repeats_count_once(server, connect, users):
    """WIRE §2.

    "`POST /api/presence/batch` with a bare JSON array of ids: object keyed by id; repeated ids count once; at most
    1,000 ids"; §6: "Limits on ids count distinct ids in a batch".
    """
    alice, bob = users("alice"), users("bob")
    await connect(server, alice)
    answer = await server.post("/api/presence/batch", bob, json=[bob, alice, bob])
    assert answer.status == 200
    assert answer.json() == {bob: entry(bob, False), alice: entry(alice, True)}
    assert (await server.post("/api/presence/batch", bob, json=[])).json() == {}
    many = [f"{bob}-{number}" for number in range(1000)]
    assert list((await server.post("/api/presence/batch", bob, json=many + many)).json()) == many
    answer = await server.post("/api/presence/batch", bob, json=[*many, alice], headers={"Origin": ORIGIN})
    assert "1000" in assert_problem(answer, 413)["detail"]


# Entries.


async def test_an_entry_has_five_fields_always(server, connect, users):
    """WIRE §2.

    "Entry: `userId`, `status` `"ONLINE"`/`"OFFLINE"`, `isOnline`, `lastSeen`, `lastActiveAgo`; always these five.
    Online: the last two are `null`. Offline: `lastSeen` is RFC 3339 UTC with `Z`, `lastActiveAgo` is text; both `null`
    for a user never seen".
    """
    online, offline, never = users("online"), users("offline"), users("never")
    await connect(server, online)
    await (await connect(server, offline)).disconnect()
    found = (await server.post("/api/presence/batch", online, json=[online, offline, never])).json()
    assert found[online] == entry(online, True)
    assert found[never] == entry(never, False)
    assert set(found[offline]) == FIELDS
    assert found[offline] | {"lastSeen": None} == entry(offline, False, None, "vừa xong")
    assert abs(epoch(found[offline]["lastSeen"]) - time.time()) < 5


@pytest.mark.parametrize("leave", ("signs off", "disconnects"))
async def test_last_seen_is_the_sign_off(server, connect, user, leave):
    """WIRE §2: "`lastSeen` is the last activity: last heartbeat, sign-off"."""
    client = await connect(server, user)
    await client.expect_nothing(0.3)
    before = time.time()
    await (client.set_online(False) if leave == "signs off" else client.disconnect())
    seen = epoch((await ask(server, user, user))["lastSeen"])
    assert before - 0.01 <= seen <= time.time()


async def test_last_seen_is_the_last_heartbeat_and_not_when_the_timeout_was_noticed(server, connect, user):
    """WIRE §2: "`lastSeen` is the last activity: last heartbeat [...]; never the moment a timeout was noticed"."""
    client = await connect(server, user)
    await client.expect_nothing(0.3)
    before = time.time()
    await client.beat()
    after = time.time()
    await server.wait_online(user, False, timeout=4)
    assert before - 0.01 <= epoch((await ask(server, user, user))["lastSeen"]) <= after


async def test_last_seen_is_the_last_stomp_byte_before_a_lost_connection(start_server, connect, users):
    """WIRE §2: "last inbound STOMP byte before a lost connection (pongs do not count)"."""
    server = await start_server(ping_seconds=0.1, lease_seconds=60)
    for index, last in enumerate(("\n", f"SUBSCRIBE\nid:1\ndestination:{QUEUE}\n\n\0")):
        user = users(f"user{index}")
        client = await connect(server, user)
        await client.expect_nothing(0.3)
        before = time.time()
        await client.raw(last)
        after = time.time() + 0.2  # until it has been read
        await client.expect_nothing(0.6)  # and pongs go back all the while
        await client.vanish()
        await server.wait_online(user, False)
        assert before - 0.01 <= epoch((await ask(server, user, user))["lastSeen"]) <= after


async def test_an_ended_session_that_closes_later_does_not_move_last_seen(server, connect, users):
    """WIRE §2: "an already ended session that closes later does not move it"."""
    signed_off, expired = users("signed-off"), users("expired")
    one, other = await connect(server, signed_off), await connect(server, expired)
    await one.set_online(False)
    await server.wait_online(expired, False, timeout=4)
    before = [(await ask(server, user, user))["lastSeen"] for user in (signed_off, expired)]
    for client in (one, other):
        await client.raw("\n")
        await client.expect_nothing(0.1)
    await one.disconnect()
    await other.vanish()
    # Whoever comes now comes after they are gone.
    for _ in (one, other):
        await (await connect(server, users("later"))).disconnect()
    assert [(await ask(server, user, user))["lastSeen"] for user in (signed_off, expired)] == before


@pytest.mark.parametrize(
    ("minutes", "vi", "en"),
    (
        (0.5, "vừa xong", "just now"),
        (1.5, "1 phút trước", "1 minute ago"),
        (59.5, "59 phút trước", "59 minutes ago"),
        (60.5, "1 giờ trước", "1 hour ago"),
        (179.5, "2 giờ trước", "2 hours ago"),
        (24 * 60 - 0.5, "23 giờ trước", "23 hours ago"),
        (36 * 60, "1 ngày trước", "1 day ago"),
        (72 * 60 - 0.5, "2 ngày trước", "2 days ago"),
    ),
)
async def test_how_long_ago_is_told_in_words(server, user, minutes, vi, en):
    """WIRE §2.

    "`lastActiveAgo`: under 60 s `vừa xong`, then `N phút trước`, `N giờ trước`, `N ngày trước`, rounded down; with
    `Accept-Language: en`: `just now`, `1 minute ago`, `N minutes ago`, and so with hours and days".
    """
    seen_ms = int((time.time() - minutes * 60) * 1000)
    server.redis().set(f"presence:user:{user}:last_active", seen_ms)
    found = await ask(server, user, user)
    assert found["lastActiveAgo"] == vi
    assert round(epoch(found["lastSeen"]) * 1000) == seen_ms
    assert (await ask(server, user, user, headers={"Accept-Language": "en"}))["lastActiveAgo"] == en


@pytest.mark.parametrize(
    ("header", "language"),
    (
        ("vi", "vi"),
        ("fr", "vi"),
        ("en-GB,en;q=0.9", "en"),
        ("vi;q=0.8,en;q=0.9", "en"),
        ("en;q=0.8,vi;q=0.9", "vi"),
        ("en,vi", "vi"),
        ("en;q=nonsense", "vi"),
        ("\xff", "vi"),
    ),
)
async def test_the_higher_weight_of_the_two_languages_wins(server, user, header, language):
    """WIRE §2: "the higher q of `vi`/`en` wins, `vi` by default"."""
    server.redis().set(f"presence:user:{user}:last_active", int(time.time() * 1000) - 90_000)
    found = await ask(server, user, user, headers={"Accept-Language": header})
    assert found["lastActiveAgo"] == {"vi": "1 phút trước", "en": "1 minute ago"}[language]


async def test_what_only_the_history_knows_is_told(server, user):
    """Guide, "Last Active" Tracking: "Fallback to Cassandra for historical data"."""
    seen = datetime(2025, 7, 17, 10, 30, tzinfo=UTC)
    with history(server) as db:
        db.execute("INSERT INTO user_presence VALUES (?, 0, ?, 'web', 1)", (user, round(seen.timestamp() * 1000)))
    found = await ask(server, user, user)
    assert epoch(found["lastSeen"]) == seen.timestamp()
    assert found["lastActiveAgo"].endswith(" ngày trước")


# Headers.


async def test_answers_are_json_that_nobody_stores(server, users):
    """WIRE §2: "Answers carry `Content-Type: application/json` and `Cache-Control: no-store`"."""
    alice, conversation = users("alice"), users("conversation")
    await server.know(conversations={conversation: [alice]})
    for method, path, body in (
        ("GET", "/api/presence/friends", None),
        ("GET", f"/api/presence/conversation/{conversation}", None),
        ("GET", f"/api/presence/check/{alice}", None),
        ("POST", "/api/presence/batch", [alice]),
    ):
        answer = await server.request(method, path, alice, json=body, headers={"Origin": ORIGIN})
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Cache-Control"] == "no-store"
        assert_cors(answer)


async def test_head_has_the_headers_of_get_and_no_body(server, user):
    """RFC 9110 §9.3.2."""
    answer = await raw(server.http, bytes_of(server, "HEAD", f"/api/presence/check/{user}", user), head=True)
    assert answer.status == 200
    assert answer.headers["Content-Length"] == str(len('{"isOnline":false}'))
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body == b""
    answer = await raw(server.http, bytes_of(server, "HEAD", "/api/presence/batch", user), head=True)
    assert answer.status == 405


# CORS.


async def test_allowed_origins_are_echoed_on_answers_and_errors_alike(server, user):
    """WIRE §2.

    "CORS: allowed origins are echoed with `Vary: Origin`, on errors too; [...]; `Presence-Degraded` and `Retry-After`
    are exposed"; §3: "REST answers never carry that header", `Access-Control-Allow-Credentials`.
    """
    sent = {"Origin": ORIGIN}
    for answer in (
        await server.get("/api/presence/friends", user, headers=sent),
        await server.get("/api/presence/friends", headers=sent),
        await server.get("/nowhere", headers=sent),
        await server.post("/api/presence/friends", user, headers=sent),
        await server.post("/api/presence/batch", user, body=b"x", headers=sent),
    ):
        assert_cors(answer)
        exposed = {name.strip().lower() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
        assert {"presence-degraded", "retry-after"} <= exposed


@pytest.mark.parametrize("origin", ("https://evil.example", "null", "http://localhost.evil.example", "x", ""))
async def test_other_origins_are_not_echoed(server, user, origin):
    """WIRE §2: "CORS: allowed origins are echoed": others are not, and the answer is told to depend on it."""
    for path in ("/api/presence/friends", "/nowhere"):
        answer = await server.get(path, user, headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Origin" in answer.headers["Vary"]
    preflight = {"Origin": origin, "Access-Control-Request-Method": "GET"}
    assert (
        "Access-Control-Allow-Origin" not in (await server.options("/api/presence/friends", headers=preflight)).headers
    )


async def test_an_answer_without_origin_still_varies_with_it(server, user):
    """WIRE §2: "with `Vary: Origin`"."""
    answer = await server.get("/api/presence/friends", user)
    assert "Origin" in answer.headers["Vary"]
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_preflight_needs_no_token(server, user):
    """WIRE §2: "preflight needs no token"; §3: "REST answers never carry that header", see `assert_cors`."""
    for method, path in (
        ("GET", "friends"),
        ("GET", f"conversation/{user}"),
        ("GET", f"check/{user}"),
        ("POST", "batch"),
    ):
        asked = {
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        answer = await server.options(f"/api/presence/{path}", headers={"Origin": ORIGIN, **asked})
        assert answer.status in (200, 204)
        assert_cors(answer)
        assert method in answer.headers["Access-Control-Allow-Methods"]
        allowed = {name.strip().lower() for name in answer.headers["Access-Control-Allow-Headers"].split(",")}
        assert {"authorization", "content-type"} <= allowed


async def test_the_listed_origins_are_allowed_and_loopback_is_not_when_others_can_reach_the_server(start_server, user):
    """WIRE §3: "or one of a configured list, or, when the server listens on loopback only, any loopback origin"."""
    server = await start_server(host="0.0.0.0", allowed_origins="https://app.example, https://chat.example:8443")
    own = f"http://127.0.0.1:{server.port}"
    for origin in ("https://app.example", "HTTPS://APP.example", "https://chat.example:8443", own):
        answer = await server.get("/api/presence/friends", user, headers={"Origin": origin})
        assert answer.headers["Access-Control-Allow-Origin"] == origin
    for origin in (ORIGIN, "http://127.0.0.1:1", "http://app.example", "https://chat.example", "https://x.app.example"):
        answer = await server.get("/api/presence/friends", user, headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in answer.headers


# Errors.


BAD_BODIES = {
    "no JSON": b"{",
    "empty": b" ",
    "NaN": b"[NaN]",
    "Infinity": b"[-Infinity]",
    "1e999": b"[1e999]",
    "a number": b"[7]",
    "a number of 4,000 digits": b"[" + b"9" * 4_000 + b"]",
    "a number of 100,000 digits": b"[" + b"9" * 100_000 + b"]",
    "null": b"null",
    "null inside": b'["a", null]',
    "true inside": b"[true]",
    "a string": b'"a"',
    "an object": b'{"userIds": ["a"]}',
    "an object with a key twice": b'[{"a": 1, "a": 2}]',
    "an array inside": b'[["a"]]',
    "100,000 arrays inside": b"[" * 100_000 + b"]" * 100_000,
    "something behind": b'["a"] x',
    "two arrays": b'["a"]["b"]',
    "a comment": b'["a" /* b */]',
    "single quotes": b"['a']",
    "invalid UTF-8": b'["\xff"]',
    "an overlong NUL": b'["\xc0\x80"]',
    "a lone surrogate, escaped": b'["\\ud800"]',
    "a lone surrogate": b'["\xed\xa0\x80"]',
    "NUL in an id": b'["a\\u0000"]',
    "LF in an id": b'["a\\n"]',
    "an id of 200,000 characters": b'["' + b"x" * 200_000 + b'"]',
    "a BOM and no array": b"\xef\xbb\xbf{}",
    "UTF-16 and no array": "{}".encode("utf-16"),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_body_that_is_no_array_of_ids_is_400(server, user, body):
    """WIRE §2: "400 bad JSON, bad id, not an array"."""
    assert_problem(await send_batch(server, user, body), 400)


async def test_no_depth_of_nesting_is_too_much(server, users):
    """WIRE §2: "400 bad JSON, bad id": also where Python's limit of recursion lies."""
    deep = [
        b"[" + o * depth + b"1" + c * depth + b"]" for depth in (900, 940, 960, 980, 990, 1000) for o, c in BRACKETS
    ]
    answers = await asyncio.gather(*(send_batch(server, users("user"), body) for body in deep))
    for answer in answers:
        assert_problem(answer, 400)


BRACKETS = ((b"[", b"]"), (b'{"a":', b"}"))


async def test_json_with_a_mark_of_its_encoding_is_no_worse(server, user):
    """RFC 8259 §8.1: parsers "MAY ignore the presence of a byte order mark rather than treating it as an error"."""
    answer = await send_batch(server, user, b"\xef\xbb\xbf" + json.dumps([user]).encode())
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert list(answer.json()) == [user]


@pytest.mark.parametrize("path", ("check", "conversation"))
@pytest.mark.parametrize(
    "name",
    ("a:b", "a%00", "a%0A", "%FF", "%ED%A0%80", "a%", "a%zz", "..", "%2e%2e", "a%20b", "%F0%9F%98%80", "x" * 9000),
)
async def test_what_is_no_id_in_a_path_is_400(server, user, path, name):
    """WIRE §2: "400 [...] bad id"."""
    problem = assert_problem(await raw(server.http, bytes_of(server, "GET", f"/api/presence/{path}/{name}", user)), 400)
    assert {"check": "userId", "conversation": "conversationId"}[path] in problem["detail"]


async def test_an_id_may_be_percent_encoded(server, connect, users):
    """RFC 3986 §2.3: encoded or not, it is the same path."""
    user = users("a@b~c")
    await connect(server, user)
    for name in (user, user.replace("@", "%40").replace("~", "%7e"), "".join(f"%{ord(letter):02X}" for letter in user)):
        answer = await raw(server.http, bytes_of(server, "GET", f"/api/presence/check/{name}", user))
        assert answer.json() == {"isOnline": True}


async def test_no_token_or_a_bad_one_is_401_with_a_challenge(server, user):
    """WIRE §2: "401 with `WWW-Authenticate: Bearer`"."""
    for token in (None, "x", server.token(user, ttl=-60), server.token("a:b"), "\xff"):
        answer = await server.get("/api/presence/friends", token=token, headers={"Origin": ORIGIN})
        assert_problem(answer, 401)
        assert answer.headers["WWW-Authenticate"].split()[0] == "Bearer"
    # It comes before whatever else is wrong.
    for method, path in (("POST", "/api/presence/batch"), ("GET", "/api/presence/check/a:b")):
        assert (await server.request(method, path, body=b"x")).status == 401


@pytest.mark.parametrize(
    "path",
    (
        "/nowhere",
        "/api",
        "/api/presence",
        "/api/presence/friends/",
        "/api//presence/friends",
        "/API/presence/friends",
        "/api/presence/check",
        "/api/presence/check/",
        "/api/presence/check/a/b",
        "/api/presence/check/a%2Fb",
        "/%FF",
        "/..",
        "*",
        "x",
        "/api/presence/conversation/",
        "/api/presence/%E2%80%AE",
        "//",
        "//api/presence/friends",
        "?userIds=a",
    ),
)
async def test_an_unknown_path_is_404(server, user, path):
    """WIRE §2: "404 unknown path"."""
    assert_problem(await raw(server.http, bytes_of(server, "GET", path, user)), 404)


@pytest.mark.parametrize("method", ("POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "X-!#$"))
@pytest.mark.parametrize("path", ("friends", "check/a", "conversation/a"))
async def test_another_method_is_405(server, user, method, path):
    """WIRE §2: "405"; RFC 9110 §15.5.6: with `Allow`."""
    answer = await raw(server.http, bytes_of(server, method, f"/api/presence/{path}", user))
    assert_problem(answer, 405)
    assert "GET" in answer.headers["Allow"]


async def test_batch_is_for_post_alone(server, user):
    """WIRE §2: "405"."""
    answer = await raw(server.http, bytes_of(server, "GET", "/api/presence/batch", user))
    assert_problem(answer, 405)
    assert "POST" in answer.headers["Allow"]


LIMIT = 262_144


def chunked(body: bytes, size: int = 10_000) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def test_a_body_of_256_kib_is_the_largest(server, users):
    """WIRE §2: "413 body over 256 KiB"."""
    user = users("user")
    ids = json.dumps([user]).encode()
    largest = b" " * (LIMIT - len(ids)) + ids
    assert list((await send_batch(server, user, largest)).json()) == [user]
    assert_problem(await send_batch(server, user, b" " + largest), 413)
    in_pieces = "Transfer-Encoding: chunked"
    assert list((await send_batch(server, user, chunked(largest), in_pieces)).json()) == [user]
    assert_problem(await send_batch(server, user, chunked(b" " + largest), in_pieces), 413)


async def test_a_body_that_is_much_too_large_is_not_read_to_its_end(server, user):
    """WIRE §2: "413 body over 256 KiB": whether its length is told before or not."""
    assert_problem(await send_batch(server, user, b" ", "Content-Length: 999999999999"), 413)
    assert_problem(await send_batch(server, user, chunked(b" " * 3_000_000), "Transfer-Encoding: chunked"), 413)
    assert_problem(await send_batch(server, user, b" " * 3_000_000), 413)
    # Where no body is wanted it does not matter.
    answer = await raw(server.http, bytes_of(server, "GET", f"/api/presence/check/{user}", user, b" " * 3_000_000))
    assert answer.status == 200


@pytest.mark.parametrize(
    "given",
    ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application/vnd.api+json", "json", ";"),
)
async def test_another_content_type_is_415(server, user, given):
    """WIRE §2: "415"."""
    assert_problem(await send_batch(server, user, json.dumps([user]).encode(), f"Content-Type: {given}"), 415)


async def test_a_body_without_content_type_is_415(server, user):
    """WIRE §2: "415"."""
    head = bytes_of(server, "POST", "/api/presence/batch", user, b"", "Content-Length: 2")
    assert_problem(await raw(server.http, head + b"[]"), 415)


@pytest.mark.parametrize("given", ("application/json", "Application/JSON", "application/json; charset=utf-8"))
async def test_json_may_have_parameters(server, user, given):
    """RFC 9110 §8.3.1: types are case-insensitive and may have parameters."""
    answer = await send_batch(server, user, json.dumps([user]).encode(), f"Content-Type: {given}")
    assert list(answer.json()) == [user]


async def test_a_compressed_body_is_no_json(server, user):
    """WIRE §2: "400 bad JSON"."""
    body = gzip.compress(json.dumps([user]).encode())
    assert_problem(await send_batch(server, user, body, "Content-Encoding: gzip"), 400)


async def test_a_body_that_does_not_come_is_given_up(server, user):
    """DESIGN §7: every limit; a client that sends half a body and waits is told so within 10 s."""
    request = bytes_of(server, "POST", "/api/presence/batch", user, b'["a', "Content-Length: 50")
    assert_problem(await raw(server.http, request, timeout=20), 408)


@pytest.mark.parametrize(
    "host",
    ("", "x" * 64, "x" * 5_000, "a..b", ".a", "[::1", "a b", "<>", "a:99999999", "\xff", "xn--" + "a" * 60, "%00"),
)
async def test_no_host_is_too_odd(server, user, host):
    """DESIGN §7: "What bad input gets: A clear error, and nothing lost"."""
    request = bytes_of(server, "GET", f"/api/presence/check/{user}", user)
    own = f"Host: 127.0.0.1:{server.port}".encode()
    answer = await raw(server.http, request.replace(own, b"Host: " + host.encode("latin-1")))
    assert answer.json() == {"isOnline": False}
    assert_cors(answer)


@pytest.mark.parametrize(
    "header",
    (
        "Cookie: \xff=\xff",
        "Range: bytes=0-1",
        "If-None-Match: *",
        "X-HTTP-Method-Override: DELETE",
        "Accept: text/html",
        "Accept-Encoding: gzip",
        "X-Forwarded-Host: \xff",
        "Authorization: Bearer x",
    ),
)
async def test_headers_that_do_not_concern_us_change_nothing(server, user, header):
    """DESIGN §7: "What bad input gets"; a second Authorization is not looked at."""
    answer = await raw(server.http, bytes_of(server, "GET", f"/api/presence/check/{user}", user, b"", header))
    assert (answer.status, answer.json()) == (200, {"isOnline": False})


@pytest.mark.parametrize(
    "request_bytes",
    (
        b"\x00\xff\x16\x03\x01\r\n\r\n",
        b"GET /api/presence/check/\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /api/presence/batch HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST /api/presence/batch HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/presence/batch HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    ),
    ids=lambda data: ascii(data[:20]),
)
async def test_what_is_no_http_is_refused_and_the_server_goes_on(server, user, request_bytes):
    """DESIGN §7: "What one client does never delays, disconnects or grows the cost of another"; no traceback."""
    assert (await raw(server.http, request_bytes)).status in (400, 431, 501)
    assert not await server.is_online(user)


# Limits on ids.


async def test_too_many_ids_a_second_are_429_over_both_doors_together(start_server, connect, users):
    """WIRE §6.

    "5,000 ids a second and user with bursts of 10,000 (REST and STOMP together; REST answers 429)"; §2: "429 [...] with
    `Retry-After`"; "CORS: allowed origins are echoed with `Vary: Origin`, on errors too".
    """
    server = await start_server(max_ids_per_second=1, max_ids_burst=30, max_ids_per_request=10)
    alice, bob = users("alice"), users("bob")
    ids = [f"id{number}" for number in range(10)]
    client = await connect(server, alice)
    await client.send("/app/presence.subscribe", {"userIds": ids})
    for _ in range(2):
        assert (await server.post("/api/presence/batch", alice, json=ids)).status == 200
    answer = await server.post("/api/presence/batch", alice, json=ids, headers={"Origin": ORIGIN})
    assert_problem(answer, 429)
    assert 1 <= int(answer.headers["Retry-After"]) <= 10
    # Each has limits of their own; and one id is soon there again.
    assert (await server.post("/api/presence/batch", bob, json=ids)).status == 200
    await client.send_frame("SEND", {"destination": "/app/presence.subscribe"}, json.dumps({"userIds": ids}))
    assert (await client.closed())[0] == 1008

    async def allowed() -> bool:
        return bool((await server.get(f"/api/presence/check/{bob}", alice)).status == 200)

    await wait_until(allowed)


# When something is away.


async def test_while_the_store_is_away_the_answer_is_unknown(start_server, valkey, connect, users):
    """WIRE §2.

    "When the presence store cannot be asked [...] an answer that would be "offline" is a 503, never a false "offline"";
    "503 with `Retry-After`"; "CORS: allowed origins are echoed with `Vary: Origin`, on errors too"; DESIGN §7: "A
    failed dependency is reported as unknown (503)".
    """
    store = await valkey()
    server = await start_server(redis_url=store.url, store_timeout_seconds=0.5, amnesty_seconds=1)
    online, offline, conversation = users("online"), users("offline"), users("conversation")
    await server.know(friends={online: [offline]}, conversations={conversation: [online, offline]})
    client = await connect(server, online)

    async def known() -> bool:
        return bool((await server.get(f"/api/presence/check/{offline}", online)).status == 200)

    async with client.beating():
        await wait_until(known, 15)
        await store.freeze()
        for method, path, body in (
            ("GET", "friends", None),
            ("GET", f"conversation/{conversation}", None),
            ("GET", f"check/{offline}", None),
            ("GET", f"check/{online}", None),
            ("POST", "batch", [offline]),
        ):
            asked = {"json": body, "headers": {"Origin": ORIGIN}}
            answer = await server.request(method, f"/api/presence/{path}", online, **asked)
            assert str(store.port) not in assert_problem(answer, 503)["detail"]
            assert int(answer.headers["Retry-After"]) >= 1
        await store.thaw()
        await wait_until(known, 15)
        assert await server.is_online(online)
    assert not await server.is_online(offline)


async def test_while_the_store_settles_nobody_is_called_offline(start_server, valkey, connect, users):
    """WIRE §2.

    "When the presence store [...] has just come back and is still settling (DESIGN §3.6), an answer that would be
    "offline" is a 503, never a false "offline""; "CORS: allowed origins are echoed with `Vary: Origin`, on errors too".
    """
    store = await valkey()
    server = await start_server(redis_url=store.url, store_timeout_seconds=0.5, amnesty_seconds=3, lease_seconds=5)
    online, offline = users("online"), users("offline")
    # The store was somebody's before: at the start, too, it settles first.
    assert_problem(await server.get(f"/api/presence/check/{offline}", online, headers={"Origin": ORIGIN}), 503)
    client = await connect(server, online)

    async def known() -> bool:
        return bool((await server.get(f"/api/presence/check/{offline}", online)).status == 200)

    async with client.beating():
        await wait_until(known, 15)
        await (await connect(server, offline)).disconnect()
        await in_history(server, offline)
        before = await ask(server, online, offline)
        await store.restart(empty=True)
        # Nobody is in the store: whoever asks it now would be told that all are offline.
        assert_problem(await server.get(f"/api/presence/check/{offline}", online, headers={"Origin": ORIGIN}), 503)
        said = set()

        async def settled() -> bool:
            for user in (online, offline):
                answer = await server.get(f"/api/presence/check/{user}", online)
                assert answer.status in (200, 503)
                said.add((user, answer.json().get("isOnline")))
            both = await server.post("/api/presence/batch", online, json=[online, offline])
            assert both.status == 200 or (offline, False) not in said
            return (offline, False) in said

        await wait_until(settled, 20, what="the store to be settled")
    assert (online, False) not in said
    assert (online, True) in said
    # What the store has lost the history knows.
    assert (await ask(server, online, offline))["lastSeen"] == before["lastSeen"]


async def test_without_the_history_answers_go_on_and_say_so(start_server, connect, users):
    """WIRE §2.

    "When only the history store is down, answers go on with `lastSeen: null` where the time is only there, and say so
    in the header `Presence-Degraded: last-seen`".
    """
    server = await start_server()
    online, recent, old, never = users("online"), users("recent"), users("old"), users("never")
    await connect(server, online)
    await (await connect(server, recent)).disconnect()
    await in_history(server, recent)
    with history(server) as db:
        db.execute("INSERT INTO user_presence VALUES (?, 0, 1000, 'web', 1)", (old,))
        answer = await server.post("/api/presence/batch", online, json=[online, recent, old, never])
        assert "Presence-Degraded" not in answer.headers
        assert answer.json()[old]["lastSeen"] is not None
        before = answer.json()

        db.execute("ALTER TABLE user_presence RENAME TO away")
        asked = [online, recent, old, never]
        answer = await server.post("/api/presence/batch", online, json=asked, headers={"Origin": ORIGIN})
        assert answer.status == 200
        assert answer.headers["Presence-Degraded"] == "last-seen"
        assert_cors(answer)
        after = answer.json()
        assert after[online] == before[online]
        assert after[recent]["lastSeen"] == before[recent]["lastSeen"]
        assert after[old] == entry(old, False)
        assert after[never] == entry(never, False)
        # Where the time is not only there nothing is missing.
        answer = await server.post("/api/presence/batch", online, json=[online, recent])
        assert "Presence-Degraded" not in answer.headers
        answer = await server.get(f"/api/presence/check/{old}", online)
        assert (answer.status, answer.json()) == (200, {"isOnline": False})

        db.execute("ALTER TABLE away RENAME TO user_presence")
        assert (await ask(server, online, old))["lastSeen"] == before[old]["lastSeen"]


# The policy `contacts`.


async def test_hidden_is_exactly_like_never_seen(start_server, connect, users):
    """WIRE §5.

    "Watching a hidden user is [...] answered exactly like watching a user never seen: REST, batch, snapshot, headers
    and the look-ups made are the same".
    """
    server = await start_server(watch_policy="contacts", lease_seconds=60)
    viewer, other, hidden, left, never = map(users, ("viewer1", "viewer2", "hidden", "leaver", "nobody"))
    fresh = users("fresh")  # who may be seen, and never was
    conversation = users("conversation")
    # That the viewer lists them does not make them visible; and neither does somebody else's conversation.
    friends = {viewer: [hidden], other: [never], fresh: [viewer]}
    await server.know(friends=friends, conversations={conversation: [hidden, left]})
    await connect(server, hidden)
    await (await connect(server, left)).disconnect()
    await in_history(server, left)

    async def seen(method: str, path: str, asks: str, about: str, body: bytes = b"") -> bytes:
        answer = await raw(server.http, bytes_of(server, method, f"/api/presence/{path}", asks, body))
        del answer.headers["Date"]
        text = f"{answer.status}\n{answer.headers}\n".encode() + answer.body
        return re.sub(rf"(?<![\w-]){re.escape(about)}(?![\w-])".encode(), b"<%d>" % len(about), text)

    unknown: dict[str, list[bytes]] = {}
    with history(server) as db:
        for state in ("well", "degraded"):
            if state == "degraded":
                db.execute("ALTER TABLE user_presence RENAME TO away")
            for user in (hidden, left, never, fresh):
                size = f"<{len(user)}>".encode()
                check = await seen("GET", f"check/{user}", viewer, user)
                batch = await seen("POST", "batch", viewer, user, json.dumps([user]).encode())
                conversations = await seen("GET", f"conversation/{conversation}", viewer, user)
                both = await seen("POST", "batch", viewer, user, json.dumps([user, viewer]).encode())
                answers = [part.replace(size, b"<id>") for part in (check, batch, conversations, both)]
                # What is left of the length of an id is in Content-Length.
                answers = [re.sub(rb"(?i)content-length: \d+", b"", part) for part in answers]
                assert unknown.setdefault(state, answers) == answers
            lists = [await seen("GET", "friends", viewer, hidden), await seen("GET", "friends", other, never)]
            assert lists[0] == lists[1]
        assert unknown["well"] != unknown["degraded"]
        db.execute("ALTER TABLE away RENAME TO user_presence")
    assert b'"isOnline":false' in unknown["well"][0]
    assert b'"lastSeen":null' in unknown["well"][1]


async def test_who_may_see_whom(start_server, connect, users):
    """WIRE §5: "`contacts`: X sees Y if and only if Y lists X as a friend, or they share a conversation, or X = Y"."""
    server = await start_server(watch_policy="contacts", lease_seconds=60)
    viewer, friendly, listed, member, stranger = map(users, ("viewer", "friendly", "listed", "member", "stranger"))
    conversation = users("conversation")
    friends = {friendly: [viewer], viewer: [listed]}
    await server.know(friends=friends, conversations={conversation: [viewer, member]})
    for user in (viewer, friendly, listed, member, stranger):
        await connect(server, user)
    everybody = [viewer, friendly, listed, member, stranger]
    found = (await server.post("/api/presence/batch", viewer, json=everybody)).json()
    assert [found[user]["isOnline"] for user in everybody] == [True, True, False, True, False]
    assert found[listed] == entry(listed, False)
    assert not (await server.get("/api/presence/friends", viewer)).json()[listed]["isOnline"]
    assert (await server.get("/api/presence/friends", friendly)).json()[viewer]["isOnline"] is False
    members = (await server.get(f"/api/presence/conversation/{conversation}", viewer)).json()
    assert members == {viewer: entry(viewer, True), member: entry(member, True)}
    # On revocation, and on becoming visible, REST follows: at most 10 s later.
    await server.know(friends={friendly: [], listed: [viewer]})
    found = (await server.post("/api/presence/batch", viewer, json=everybody)).json()
    assert [found[user]["isOnline"] for user in everybody] == [True, False, True, True, False]


async def test_under_the_policy_anyone_everybody_is_seen(server, connect, users):
    """WIRE §5: "Policy, `PRESENCE_WATCH_POLICY`: `anyone` (default, as the guide's API)"."""
    alice, stranger = users("alice"), users("stranger")
    await connect(server, alice)
    assert (await ask(server, stranger, alice))["isOnline"]
