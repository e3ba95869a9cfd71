"""WIRE §1, Identity: who is asking, over both doors, and until when that holds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.support.process import free_port
from tests.support.server import SECRET, ServerProcess, run_presence
from tests.support.stomp_client import StompClient
from tests.support.waiting import wait_until

LEEWAY = 10.0  # s
GOOD_IDS = ("a", "0", "f1f8f884-a8aa-44ec-9313-e234860c5e41", "A.b_c~d@e-f", "x" * 128)
BAD_IDS = ("", ".a", "_a", "-a", "~a", "@a", "a:b", "a b", " a", "a/b", "a\n", "a\0", "a*", "é", "٣", "x" * 129)


async def refusal(server: ServerProcess, token: str | None, **options: Any) -> str:
    """Connect, which must be refused as WIRE §6 has it for tokens; return what the ERROR says."""
    client = await StompClient.connect(server.ws, token, handshake=False)
    try:
        headers = {"accept-version": "1.2", "host": "localhost"} | options.pop("headers", {})
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        await client.send_frame("CONNECT", headers)
        code, error = await client.closed()
        assert code == 1008
        assert error is not None
        return error.headers["message"]
    finally:
        await client.dispose()


async def assert_refused(server: ServerProcess, token: str) -> None:
    """Both doors refuse the token."""
    answer = await server.get("/api/presence/friends", token=token)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert "Authorization" in await refusal(server, token)


async def assert_accepted(server: ServerProcess, token: str, user: str) -> None:
    """Both doors accept the token, as one of ``user``."""
    answer = await server.get("/api/presence/friends", token=token)
    assert answer.status == 200, answer.body
    client = await StompClient.connect(server.ws, token)
    try:
        assert client.connected is not None
        assert client.connected.headers["user-name"] == user
    finally:
        await client.dispose()


# Ids.


@pytest.mark.parametrize("name", GOOD_IDS, ids=lambda name: name[:12])
async def test_what_the_pattern_allows_is_an_id(server, connect, name):
    """WIRE §1: "User and conversation ids: `[A-Za-z0-9][A-Za-z0-9._~@-]{0,127}` (UUIDs are the usual case)"."""
    await connect(server, name)
    assert await server.is_online(name)
    assert (await server.post("/api/presence/batch", name, json=[name])).json()[name]["isOnline"]
    # No such conversation: the id was understood.
    assert (await server.get(f"/api/presence/conversation/{name}", name)).status == 403


@pytest.mark.parametrize("name", BAD_IDS, ids=ascii)
async def test_what_the_pattern_does_not_allow_is_none(server, user, name):
    """WIRE §1: "User and conversation ids: `[A-Za-z0-9][A-Za-z0-9._~@-]{0,127}`. No colon"."""
    await assert_refused(server, server.token(name))
    assert (await server.post("/api/presence/batch", user, json=[name])).status == 400
    # An encoded slash makes it another path, an empty name none.
    expected = 404 if name in ("", "a/b") else 400
    assert (await server.get(f"/api/presence/check/{quote(name, safe='')}", user)).status == expected
    assert (await server.get(f"/api/presence/conversation/{quote(name, safe='')}", user)).status == expected


# Claims.


@pytest.mark.parametrize("claim", ("sub", "exp"))
async def test_a_token_needs_sub_and_exp(server, user, claim):
    """WIRE §1: "`sub` = user id, `exp` required"."""
    await assert_refused(server, server.token(user, **{claim: None}))


@pytest.mark.parametrize("exp", ("soon", True, [], 1e300))
async def test_an_exp_that_is_no_time_is_refused(server, user, exp):
    """WIRE §1: "`exp` required"."""
    await assert_refused(server, server.token(user, exp=exp))


async def test_exp_has_ten_seconds_of_leeway(server, user):
    """WIRE §1: "10 s of leeway"."""
    await assert_accepted(server, server.token(user, ttl=-LEEWAY + 5), user)
    await assert_refused(server, server.token(user, ttl=-LEEWAY - 0.1))


async def test_nbf_is_checked_when_present_with_ten_seconds_of_leeway(server, user):
    """WIRE §1: "`nbf` checked when present [...]; 10 s of leeway"."""
    await assert_accepted(server, server.token(user, nbf=int(time.time() + LEEWAY - 5)), user)
    await assert_refused(server, server.token(user, nbf=int(time.time() + 60)))
    await assert_refused(server, server.token(user, nbf="now"))


async def test_iss_and_aud_are_not_looked_at_unless_configured(server, user):
    """WIRE §1: "`iss` and `aud` when configured"."""
    await assert_accepted(server, server.token(user, iss="somebody", aud=["something"]), user)


async def test_iss_and_aud_are_checked_when_configured(start_server, user):
    """WIRE §1: "`iss` and `aud` when configured"; "a secret of at least 32 bytes": 32 do."""
    server = await start_server(jwt_issuer="idp", jwt_audience="chat", jwt_secret="s" * 32)
    await assert_accepted(server, server.token(user, iss="idp", aud="chat"), user)
    await assert_accepted(server, server.token(user, iss="idp", aud=["mail", "chat"]), user)
    for wrong in ({"iss": "other", "aud": "chat"}, {"iss": "idp", "aud": "mail"}, {"iss": "idp"}, {"aud": "chat"}):
        await assert_refused(server, server.token(user, **wrong))


# Keys and algorithms.


async def test_a_token_of_another_secret_or_algorithm_is_refused(server, user):
    """WIRE §1: "`alg: none` and whatever is not configured is refused"."""
    claims = {"sub": user, "exp": time.time() + 60}
    await assert_refused(server, jwt.encode(claims, "another secret of 32 bytes and more", "HS256"))
    await assert_refused(server, jwt.encode(claims, "", "none"))
    for algorithm in ("HS384", "HS512"):
        with pytest.warns(jwt.InsecureKeyLengthWarning):
            token = jwt.encode(claims, SECRET, algorithm)
        await assert_refused(server, token)
    await assert_refused(server, jwt.encode(claims, ed25519.Ed25519PrivateKey.generate(), "EdDSA"))
    await assert_refused(server, server.token(user)[:-4] + "AAAA")


async def test_a_secret_of_31_bytes_is_refused_at_the_start(tmp_path):
    """WIRE §1: "HS256 with a secret of at least 32 bytes"."""
    code, _, error = await run_presence("serve", data_dir=tmp_path, port=free_port(), jwt_secret="s" * 31)
    assert code == 2
    assert "PRESENCE_JWT_SECRET" in error
    assert len(error.splitlines()) == 1


async def test_with_no_secret_configured_a_random_one_is_made_in_the_data_folder(start_server, user):
    """WIRE §1.

    "There is no default secret: with none configured, the embedded mode makes a random one in its data folder".
    """
    server = await start_server(jwt_secret=None)
    file = server.data_dir / "jwt-secret"
    secret = file.read_bytes()
    assert len(secret) >= 32
    assert file.stat().st_mode & 0o077 == 0
    claims = {"sub": user, "exp": time.time() + 60}
    await assert_accepted(server, jwt.encode(claims, secret, "HS256"), user)
    code, made, _ = await run_presence("token", user, data_dir=server.data_dir)
    assert code == 0
    await assert_accepted(server, made.strip(), user)
    for guess in ("presence", "secret", "x" * 32):
        await assert_refused(server, sign(claims, guess))

    other = await start_server(jwt_secret=None)
    assert (other.data_dir / "jwt-secret").read_bytes() != secret
    await assert_refused(other, made.strip())


def sign(claims: dict[str, Any], secret: str) -> str:
    """An HS256 token, whatever PyJWT thinks of the secret."""
    head, _, _ = jwt.encode(claims, "x" * 32, "HS256").rpartition(".")
    signature = jwt.get_algorithm_by_name("HS256").sign(head.encode(), secret.encode())
    return f"{head}.{jwt.utils.base64url_encode(signature).decode()}"


KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def key_set() -> str:
    """A JWKS with one key of each type, called by its algorithm, and an `oct` key."""
    keys = [
        jwt.get_algorithm_by_name(name).to_jwk(key.public_key(), as_dict=True) | {"kid": name}
        for name, key in KEYS.items()
    ]
    keys.append({"kty": "oct", "kid": "oct", "k": jwt.utils.base64url_encode(SECRET.encode()).decode()})
    return json.dumps({"keys": keys})


def signed(user: str, algorithm: str, kid: str | None, key: Any = None) -> str:
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode({"sub": user, "exp": time.time() + 60}, key or KEYS[algorithm], algorithm, headers)


async def test_the_keys_of_a_jwks_file_decide_each_for_its_own_algorithm(start_server, user, tmp_path):
    """WIRE §1: "RS256/ES256/EdDSA from a JWKS file [...] (algorithm bound to the key's type, `oct` keys ignored"."""
    file = tmp_path / "jwks.json"
    file.write_text(key_set())
    server = await start_server(jwt_secret=None, jwks=file)
    for name in KEYS:
        await assert_accepted(server, signed(user, name, name), user)
        await assert_accepted(server, signed(user, name, None), user)
    await assert_refused(server, signed(user, "RS256", "ES256"))
    await assert_refused(server, signed(user, "ES256", "ES256", ec.generate_private_key(ec.SECP256R1())))
    await assert_refused(server, signed(user, "HS256", "oct", SECRET))
    await assert_refused(server, jwt.encode({"sub": user, "exp": time.time() + 60}, "", "none"))
    # The public key taken for a secret.
    pem = (
        KEYS["RS256"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for kid in ("RS256", "oct"):
        head = jwt.encode({"sub": user, "exp": time.time() + 60}, "x" * 32, "HS256", {"kid": kid}).rpartition(".")[0]
        forged = jwt.utils.base64url_encode(jwt.get_algorithm_by_name("HS256").sign(head.encode(), pem)).decode()
        await assert_refused(server, f"{head}.{forged}")


@pytest.fixture
def key_server() -> Iterator[ThreadingHTTPServer]:
    """Answers with `key_set`; `requests` counts how often it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests += 1  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(key_set().encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


async def test_keys_from_a_url_are_fetched_at_most_once_a_minute_for_unknown_kids(start_server, user, key_server):
    """WIRE §1: "from a JWKS [...] URL ([...] an unknown `kid` fetched again at most once a minute)"."""
    server = await start_server(jwt_secret=None, jwks=f"http://127.0.0.1:{key_server.server_port}/keys")
    await assert_accepted(server, signed(user, "ES256", "ES256"), user)
    for kid in ("new", "newer", "newest"):
        await assert_refused(server, signed(user, "ES256", kid))
    assert key_server.requests == 1


async def test_with_no_keys_to_be_had_it_is_unknown_whether_a_token_is_good(start_server, user):
    """WIRE §2: "503 with `Retry-After`"; §6: "1013: [...] try again"."""
    server = await start_server(jwt_secret=None, jwks=f"http://127.0.0.1:{free_port()}/keys")
    token = signed(user, "ES256", "ES256")
    answer = await server.get("/api/presence/friends", token=token)
    assert answer.status == 503
    assert answer.headers["Retry-After"]
    assert b"127.0.0.1" not in answer.body
    client = await StompClient.connect(server.ws, handshake=False)
    try:
        await client.send_frame("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {token}"})
        assert (await client.closed())[0] == 1013
    finally:
        await client.dispose()


# Where a token may be.


async def test_rest_wants_a_bearer_token_in_the_authorization_header(server, user):
    """WIRE §1: "REST: `Authorization: Bearer <token>`"."""
    token = server.token(user)
    for good in (f"Bearer {token}", f"bearer {token}"):
        assert (await server.get("/api/presence/friends", headers={"Authorization": good})).status == 200
    for bad in ("Bearer", "Basic YTpi", token, f"Token {token}", f"Bearer {token} {token}", "Bearer ��"):
        sent = {"Authorization": bad.encode().decode("latin-1")}
        assert (await server.get("/api/presence/friends", headers=sent)).status == 401
    assert (await server.get("/api/presence/friends")).status == 401


@pytest.mark.parametrize("name", ("token", "access_token", "authorization", "Authorization", "jwt"))
async def test_a_token_in_the_url_is_not_looked_at(server, connect, user, name):
    """WIRE §1: "Never in the URL"."""
    for query in (f"?{name}={server.token(user)}", f"?{name}=Bearer%20{server.token(user)}"):
        assert (await server.get(f"/api/presence/friends{query}")).status == 401
        client = await connect(server, url=server.ws + query, handshake=False)
        await client.send_frame("CONNECT", {"accept-version": "1.2", "host": "localhost"})
        assert (await client.closed())[0] == 1008


@pytest.mark.parametrize("command", ("CONNECT", "STOMP"))
@pytest.mark.parametrize("where", ("Authorization", "authorization", "passcode", "passcode with Bearer", "upgrade"))
async def test_stomp_takes_the_token_from_three_places(server, connect, user, command, where):
    """WIRE §1.

    "STOMP: the same header on CONNECT/STOMP; else `passcode` (clients that know only login/passcode; `login` is not
    looked at); else the `Authorization` header of the HTTP upgrade".
    """
    token = server.token(user)
    bearer = f"Bearer {token}"
    options: dict[str, Any] = {
        "Authorization": {"headers": {"Authorization": bearer}},
        "authorization": {"headers": {"authorization": bearer}},
        "passcode": {"headers": {"login": "somebody-else", "passcode": token}},
        "passcode with Bearer": {"headers": {"login": server.token("somebody-else"), "passcode": bearer}},
        "upgrade": {"upgrade_headers": {"Authorization": bearer}},
    }[where]
    client = await connect(server, command=command, **options)
    assert client.connected.headers["user-name"] == user


async def test_the_first_of_the_three_places_decides(server, connect, users):
    """WIRE §1.

    "the same header on CONNECT/STOMP; else `passcode` [...]; else the `Authorization` header of the HTTP upgrade".
    """
    first, second, third = users("first"), users("second"), users("third")
    upgrade = {"Authorization": f"Bearer {server.token(third)}"}
    client = await connect(server, first, headers={"passcode": server.token(second)}, upgrade_headers=upgrade)
    assert client.connected.headers["user-name"] == first
    client = await connect(server, headers={"passcode": server.token(second)}, upgrade_headers=upgrade)
    assert client.connected.headers["user-name"] == second
    # A bad one is not rescued by a good one further on.
    for bad in ({"Authorization": "Bearer x"}, {"Authorization": "Basic YTpi"}):
        client = await connect(server, handshake=False, upgrade_headers=upgrade)
        await client.send_frame("CONNECT", {"accept-version": "1.2", "passcode": server.token(second), **bad})
        assert (await client.closed())[0] == 1008
    client = await connect(server, handshake=False, upgrade_headers=upgrade)
    await client.send_frame("CONNECT", {"accept-version": "1.2", "passcode": "wrong"})
    assert (await client.closed())[0] == 1008


async def test_login_alone_is_not_looked_at(server, user):
    """WIRE §1: "`login` is not looked at"."""
    assert "Authorization" in await refusal(server, None, headers={"login": server.token(user)})
    assert "Authorization" in await refusal(server, None, headers={"login": server.token(user), "passcode": ""})


# Renewal, and the end of a token.


def ending(server: ServerProcess, user: str, seconds: float) -> str:
    """A token that is accepted for so many seconds more: its `exp` has passed, its leeway has not."""
    return server.token(user, ttl=seconds - LEEWAY)


async def test_a_connection_ends_with_its_token(server, connect, user):
    """WIRE §1.

    "A connection whose token ends (at `exp` + 10 s) without renewal gets ERROR `token expired` and close 1008".
    """
    client = await connect(server, token=ending(server, user, 1.5))
    until = time.monotonic() + 1.4
    code, error = await client.closed(timeout=4)
    assert time.monotonic() >= until
    assert code == 1008
    assert error is not None
    assert error.headers["message"] == "token expired"


async def test_a_heartbeat_with_a_new_token_renews(server, connect, user):
    """WIRE §1.

    "Renewal: an `Authorization` header on SEND `/app/heartbeat`, same `sub`, extends the connection's life to the new
    `exp`".
    """
    client = await connect(server, token=ending(server, user, 2))
    await client.send("/app/heartbeat", headers={"Authorization": f"Bearer {ending(server, user, 4)}"})
    until = time.monotonic() + 3.5
    code, error = await client.closed(timeout=8)
    assert time.monotonic() >= until
    assert (code, error and error.headers["message"]) == (1008, "token expired")


async def test_renewal_is_for_heartbeats_alone(server, connect, user):
    """WIRE §1: "Renewal: an `Authorization` header on SEND `/app/heartbeat`": on no other frame."""
    client = await connect(server, token=ending(server, user, 1.5))
    renewed = {"Authorization": f"Bearer {server.token(user)}"}
    await client.send("/app/online-status", {"online": True}, headers=renewed)
    await client.send("/app/presence.subscribe", {"userIds": []}, headers=renewed)
    assert (await client.closed(timeout=4))[0] == 1008


async def test_renewal_is_for_the_same_user_alone(server, connect, users):
    """WIRE §1: "same `sub`"; §6: "1008: content and limits: token"."""
    client = await connect(server, users("one"))
    other = {"destination": "/app/heartbeat", "Authorization": f"Bearer {server.token(users('other'))}"}
    await client.send_frame("SEND", {**other, "receipt": "r"})
    code, error = await client.closed()
    assert code == 1008
    assert error is not None
    assert "sub" in error.headers["message"]
    assert error.headers["receipt-id"] == "r"


@pytest.mark.parametrize("given", ("Bearer x", "Bearer", "Basic YTpi", "expired"))
async def test_a_bad_token_on_a_heartbeat_ends_the_connection(server, connect, user, given):
    """WIRE §6: "1008: content and limits: token"."""
    client = await connect(server, user)
    header = f"Bearer {server.token(user, ttl=-60)}" if given == "expired" else given
    await client.send_frame("SEND", {"destination": "/app/heartbeat", "Authorization": header})
    code, error = await client.closed()
    assert code == 1008
    assert error is not None
    assert "Authorization" in error.headers["message"]


async def test_a_client_that_comes_back_with_a_new_token_causes_no_change(start_server, connect, users):
    """WIRE §1.

    "its session's lease becomes min(rest, max(grace, drain)), so that a client that reconnects causes no change": here
    drain.
    """
    server = await start_server(lease_seconds=60, drain_seconds=2)
    alice, bob, watcher = users("alice"), users("bob"), await connect(server, users("watcher"))
    await watcher.subscribe()
    clients = {user: await connect(server, token=ending(server, user, 2)) for user in (alice, bob)}
    await watcher.watch([alice, bob])
    store = server.redis()

    def is_short(key: str) -> bool:
        return int(store.pttl(key)) <= 2000

    for user, client in clients.items():
        key = f"presence:user:{user}:online:{client.connected.headers['session']}"
        await client.closed(timeout=5)
        await wait_until(partial(is_short, key), what="the lease to be shortened to the drain time")
    await connect(server, alice)
    await watcher.expect_event(bob, online=False, timeout=4)
    # Alice's first session ends no later than Bob's did, give or take a sweep.
    old = clients[alice].connected.headers["session"]
    await wait_until(lambda: not store.zscore(f"presence:user:{alice}:sessions", old), 4)
    assert await server.is_online(alice)
    assert watcher.changes(alice) == []
    assert watcher.changes(bob) == [False]


async def test_the_lease_left_by_an_ended_token_is_never_longer_than_it_was(server, connect, user):
    """WIRE §1: "its session's lease becomes min(rest, max(grace, drain))": here the rest, of a lease of 2 s."""
    client = await connect(server, token=ending(server, user, 1.5))
    key = f"presence:user:{user}:online:{client.connected.headers['session']}"
    before = server.redis().pexpiretime(key)
    await client.closed(timeout=4)
    assert server.redis().pexpiretime(key) in (before, -2)  # -2: it has ended meanwhile
    await server.wait_online(user, False, timeout=4)


async def test_grace_counts_when_it_is_longer_than_drain(start_server, connect, user):
    """WIRE §1: "its session's lease becomes min(rest, max(grace, drain))": here grace."""
    server = await start_server(lease_seconds=60, grace_seconds=30, drain_seconds=1)
    client = await connect(server, token=ending(server, user, 1))
    key = f"presence:user:{user}:online:{client.connected.headers['session']}"
    await client.closed(timeout=4)
    store = server.redis()
    await wait_until(lambda: store.pttl(key) <= 30_000, what="the lease to be shortened to the grace")
    assert store.pttl(key) > 20_000
