"""presence.server.auth: access tokens (WIRE §1), and the problem documents they may end in (WIRE §2)."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from presence.ports import Unavailable
from presence.server import auth
from presence.server.auth import (
    InvalidToken,
    KeysUnavailable,
    SecretError,
    Token,
    TokenVerifier,
    bearer,
    make_token,
    secret_of,
)
from presence.server.problems import Problem

SECRET = b"correct-horse-battery-staple-0123456789"
KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def public_jwk(key, kid: str | None, **more) -> dict:
    for algorithm in ("RS256", "ES256", "EdDSA"):
        try:
            jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
        except (AttributeError, TypeError, jwt.InvalidKeyError):
            continue
        jwk.pop("key_ops", None)
        return jwk | ({"kid": kid} if kid else {}) | more
    raise AssertionError(key)


def jwks(*keys: dict) -> bytes:
    return json.dumps({"keys": keys}).encode()


def claims(**more) -> dict:
    return {"sub": "alice", "exp": int(time.time()) + 60} | more


def hs256(**more) -> str:
    return jwt.encode({name: value for name, value in claims(**more).items() if value is not None}, SECRET, "HS256")


def signed(algorithm: str, kid: str | None = None, key=None, **more) -> str:
    return jwt.encode(claims(**more), key or KEYS[algorithm], algorithm, {"kid": kid} if kid else None)


def raw(header: dict, payload: bytes, signature: bytes = b"") -> str:
    parts = (json.dumps(header).encode(), payload, signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


async def reason(verifier: TokenVerifier, token: str) -> str:
    with pytest.raises(InvalidToken) as caught:
        await verifier.verify(token)
    return str(caught.value)


@pytest.fixture
def verifier() -> TokenVerifier:
    return TokenVerifier(secret=SECRET)


class KeyServer:
    """Answers with `body` (status `status`), after `hold` is set; counts the requests."""

    def __init__(self) -> None:
        self.body, self.status, self.requests = b"", 200, 0
        self.drips = False  # sends a header, a byte at a time and without end
        self.hold = threading.Event()
        self.hold.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                outer.hold.wait(10)
                while outer.drips:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.hold.set()
        self.drips = False
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def keys() -> Iterator[KeyServer]:
    server = KeyServer()
    server.body = jwks(*(public_jwk(key, f"k-{name}") for name, key in KEYS.items()))
    yield server
    server.close()


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of the module, to be put forward."""

    class Clock:
        now = 1_000.0

        def monotonic(self) -> float:
            return self.now

        def time(self) -> float:
            return time.time()

    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


# Claims.


async def test_a_good_token_says_its_user_and_its_end(verifier):
    """WIRE §1: "`sub` = user id, `exp` required"."""
    token = make_token(SECRET, "alice", 60, now=time.time())
    got = await verifier.verify(token)
    assert got.user == "alice"
    assert got.expires_at == pytest.approx(time.time() + 60, abs=5)


@pytest.mark.parametrize("claim", ("exp", "sub"))
async def test_a_token_without_a_required_claim_is_refused(verifier, claim):
    """WIRE §1: "`sub` = user id, `exp` required"."""
    assert await reason(verifier, hs256(**{claim: None})) == f"{claim} is missing"


async def test_an_expired_token_is_accepted_for_10_s_more(verifier):
    """WIRE §1: "10 s of leeway"."""
    now = time.time()
    assert await verifier.verify(make_token(SECRET, "alice", -9, now=now)) == Token("alice", now - 9)
    assert await reason(verifier, make_token(SECRET, "alice", -10, now=now)) == "token expired"


async def test_a_fraction_of_a_second_in_exp_counts(verifier, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_000_000_010.4)
    assert (await verifier.verify(hs256(exp=1_000_000_000.5))).expires_at == 1_000_000_000.5


async def test_a_token_holds_from_its_nbf_on_with_10_s_of_leeway(verifier):
    """WIRE §1: "`nbf` checked when present"."""
    assert await verifier.verify(hs256(nbf=int(time.time()) + 8))
    assert await reason(verifier, hs256(nbf=int(time.time()) + 30)) == "token not valid yet"


@pytest.mark.parametrize("exp", ("tomorrow", "9999999999", True, 2**60, 1e300, [], {}))
async def test_an_exp_that_is_no_time_is_refused(verifier, exp):
    assert await reason(verifier, hs256(exp=exp)) == "exp is not a time"


@pytest.mark.parametrize("exp", (b"NaN", b"Infinity", b"1e999", b"9" * 5000))
async def test_an_exp_that_is_no_number_at_all_is_refused(verifier, exp):
    header = raw({"alg": "HS256"}, b'{"sub":"alice","exp":' + exp + b"}").rpartition(".")[0]
    signature = jwt.get_algorithm_by_name("HS256").sign(header.encode(), SECRET)
    token = f"{header}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    assert await reason(verifier, token) in ("exp is not a time", "malformed token")


@pytest.mark.parametrize("sub", ("", "a:b", "a b", "alice\n", "x" * 129, 7, ["alice"]))
async def test_a_sub_that_is_no_user_id_is_refused(verifier, sub):
    """WIRE §1: "`sub` = user id"."""
    assert await reason(verifier, hs256(sub=sub)) == "sub is not a user id"


async def test_iss_and_aud_are_checked_when_configured():
    """WIRE §1: "`iss` and `aud` when configured"."""
    verifier = TokenVerifier(secret=SECRET, issuer="idp", audience="chat")
    assert await verifier.verify(hs256(iss="idp", aud="chat"))
    assert await verifier.verify(hs256(iss="idp", aud=["mail", "chat"]))
    assert await reason(verifier, hs256(iss="other", aud="chat")) == "wrong iss"
    assert await reason(verifier, hs256(aud="chat")) == "iss is missing"
    assert await reason(verifier, hs256(iss="idp", aud="mail")) == "wrong aud"
    assert await reason(verifier, hs256(iss="idp")) == "aud is missing"


async def test_iss_aud_iat_and_jti_are_not_looked_at_otherwise(verifier):
    """WIRE §1: "`iss` and `aud` when configured"; of `iat` and `jti` it says nothing."""
    assert await verifier.verify(hs256(iss="any", aud="any", iat=int(time.time()) + 3600, jti=7))


# Signatures.


async def test_another_secret_is_refused(verifier):
    assert await reason(verifier, make_token(SECRET + b"!", "alice", 60, now=time.time())) == "bad signature"


async def test_alg_none_is_refused(verifier, keys):
    """WIRE §1: "`alg: none` and whatever is not configured is refused"."""
    token = raw({"alg": "none"}, json.dumps(claims()).encode())
    assert await reason(verifier, token) == "algorithm not accepted"
    assert await reason(TokenVerifier(jwks=keys.url), token) == "algorithm not accepted"


@pytest.mark.parametrize("algorithm", ("HS384", "HS512"))
async def test_other_algorithms_of_the_same_secret_are_refused(verifier, algorithm):
    """WIRE §1: "whatever is not configured is refused"."""
    token = jwt.encode(claims(), SECRET * 2, algorithm)
    assert await reason(TokenVerifier(secret=SECRET * 2), token) == "algorithm not accepted"


@pytest.mark.parametrize(
    "token",
    ("", "x", "a.b", "a.b.c", "....", "é.é.é", "\ud800.a.b", "e30.e30.", raw({"alg": 7}, b"{}"), raw([], b"{}")),  # type: ignore[arg-type]
)
async def test_what_is_no_token_is_refused(verifier, keys, token):
    await reason(verifier, token)
    await reason(TokenVerifier(jwks=keys.url), token)


@pytest.mark.parametrize("header", ({"alg": ["RS256"]}, {"alg": {}}, {"kid": []}, {"alg": "RS256", "kid": 7}))
async def test_a_header_of_the_wrong_shape_is_refused(keys, header):
    await reason(TokenVerifier(jwks=keys.url), raw({"alg": "RS256"} | header, b"{}", b"x"))


async def test_a_reason_never_holds_the_token(verifier):
    token = hs256(sub="a:secret-user")
    for bad in (token, token[:-4] + "AAAA", "secret-user.x.y", raw({"alg": "secret-user"}, b"{}")):
        text = await reason(verifier, bad)
        assert "secret-user" not in text
        assert len(text) < 40


@pytest.mark.parametrize("algorithm", KEYS)
async def test_the_three_asymmetric_algorithms_are_accepted(keys, algorithm):
    """WIRE §1: "RS256/ES256/EdDSA from a JWKS file or URL"."""
    assert (await TokenVerifier(jwks=keys.url).verify(signed(algorithm, f"k-{algorithm}"))).user == "alice"


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_signature_of_another_key_is_refused(keys, algorithm):
    other = {
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
    }[algorithm]()
    keys.body = jwks(public_jwk(KEYS[algorithm], "k"))
    assert await reason(TokenVerifier(jwks=keys.url), signed(algorithm, "k", other)) == "bad signature"


async def test_the_algorithm_is_bound_to_the_keys_type(keys):
    """WIRE §1: "algorithm bound to the key's type"."""
    verifier = TokenVerifier(jwks=keys.url)
    assert await reason(verifier, signed("RS256", "k-ES256")) == "unknown key"
    token = jwt.encode(claims(), KEYS["RS256"], "RS512", {"kid": "k-RS256"})
    assert await reason(verifier, token) == "algorithm not accepted"


async def test_a_public_key_is_no_hs256_secret(keys):
    """The classic confusion: an HS256 token whose secret is the text of the public RSA key."""
    pem = (
        KEYS["RS256"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    header = raw({"alg": "HS256", "kid": "k-RS256"}, json.dumps(claims()).encode()).rpartition(".")[0]
    signature = jwt.get_algorithm_by_name("HS256").sign(header.encode(), pem)
    token = f"{header}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    assert await reason(TokenVerifier(jwks=keys.url), token) == "algorithm not accepted"


async def test_oct_keys_in_a_jwks_are_ignored(keys):
    """WIRE §1: "`oct` keys ignored"."""
    octet = {"kty": "oct", "kid": "o", "k": base64.urlsafe_b64encode(SECRET).decode()}
    keys.body = jwks(octet, public_jwk(KEYS["RS256"], "k-RS256"))
    verifier = TokenVerifier(jwks=keys.url)
    token = jwt.encode(claims(), SECRET, "HS256", {"kid": "o"})
    assert await reason(verifier, token) == "algorithm not accepted"
    assert await verifier.verify(signed("RS256", "k-RS256"))


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize(
    "unusable",
    (
        {"use": "enc"},
        {"alg": "RS512"},
        {"kty": "EC"},
        {"n": "!"},
        {"n": 7},
        {"kty": ["RSA"]},
        {"crv": []},
        public_jwk(rsa.generate_private_key(65537, 1024), "k"),
    ),
)
async def test_keys_that_are_not_for_us_are_ignored(keys, unusable):
    other = public_jwk(KEYS["EdDSA"], "e")
    keys.body = jwks(public_jwk(KEYS["RS256"], "k") | unusable, other, 7, "x", None)  # type: ignore[arg-type]
    verifier = TokenVerifier(jwks=keys.url)
    assert await reason(verifier, signed("RS256", "k")) == "unknown key"
    assert await verifier.verify(signed("EdDSA", "e"))


async def test_a_token_without_kid_needs_the_only_key_of_its_algorithm(keys):
    verifier = TokenVerifier(jwks=keys.url)
    assert await verifier.verify(signed("ES256"))
    second = ec.generate_private_key(ec.SECP256R1())
    keys.body = jwks(public_jwk(KEYS["ES256"], "1"), public_jwk(second, "2"))
    assert await reason(TokenVerifier(jwks=keys.url), signed("ES256")) == "unknown key"


# Where the keys come from.


async def test_keys_are_fetched_once(keys):
    verifier = TokenVerifier(jwks=keys.url)
    await asyncio.gather(*(verifier.verify(signed(algorithm, f"k-{algorithm}")) for algorithm in [*KEYS] * 5))
    assert keys.requests == 1


async def test_an_unknown_kid_is_fetched_again_at_most_once_a_minute(keys, clock):
    """WIRE §1: "an unknown `kid` fetched again at most once a minute"."""
    verifier = TokenVerifier(jwks=keys.url)
    await verifier.verify(signed("RS256", "k-RS256"))
    clock.now += 60
    for _ in range(3):
        assert await reason(verifier, signed("RS256", "new")) == "unknown key"
    assert keys.requests == 2
    keys.body = jwks(public_jwk(KEYS["RS256"], "new"))
    clock.now += 59.9
    assert await reason(verifier, signed("RS256", "new")) == "unknown key"
    clock.now += 0.1
    assert await verifier.verify(signed("RS256", "new"))
    assert keys.requests == 3


async def test_a_client_that_leaves_does_not_end_the_fetch_of_the_others(keys):
    verifier = TokenVerifier(jwks=keys.url)
    keys.hold.clear()
    leaver = asyncio.create_task(verifier.verify(signed("RS256", "k-RS256")))
    while not keys.requests:
        await asyncio.sleep(0.005)
    stayer = asyncio.create_task(verifier.verify(signed("RS256", "k-RS256")))
    await asyncio.sleep(0)
    leaver.cancel()
    keys.hold.set()
    assert (await stayer).user == "alice"
    assert keys.requests == 1


async def test_with_no_keys_at_all_it_is_unknown_whether_a_token_is_good(keys, clock):
    keys.status = 500
    verifier = TokenVerifier(jwks=keys.url)
    with pytest.raises(KeysUnavailable) as caught:
        await verifier.verify(signed("RS256", "k-RS256"))
    assert isinstance(caught.value, Unavailable)
    with pytest.raises(KeysUnavailable):
        await verifier.verify(signed("RS256", "k-RS256"))
    assert keys.requests == 1  # not again within a second
    keys.status = 200
    clock.now += 1
    assert await verifier.verify(signed("RS256", "k-RS256"))


@pytest.mark.parametrize("body", (b"", b"{", b"[]", b'{"keys": []}', b'{"keys": 7}', b"[" * 100_000, b"\xff"))
async def test_an_answer_without_keys_leaves_it_unknown(keys, body):
    keys.body = body
    with pytest.raises(KeysUnavailable):
        await TokenVerifier(jwks=keys.url).verify(signed("RS256", "k-RS256"))


@pytest.mark.parametrize("drips", (False, True))
async def test_an_answer_that_does_not_end_is_given_up(keys, monkeypatch, drips):
    """Each byte in time is not enough: urllib's own limit is for one read."""
    monkeypatch.setattr(auth, "FETCH_SECONDS", 0.2)
    keys.drips = drips
    if not drips:
        keys.hold.clear()
    try:
        with pytest.raises(KeysUnavailable):
            async with asyncio.timeout(5):
                await TokenVerifier(jwks=keys.url).verify(signed("RS256", "k-RS256"))
    finally:
        keys.drips = False  # the loop's end waits for the thread


async def test_an_answer_without_end_in_size_is_given_up(keys, monkeypatch):
    monkeypatch.setattr(auth, "MAX_JWKS_BYTES", 10)
    with pytest.raises(KeysUnavailable):
        await TokenVerifier(jwks=keys.url).verify(signed("RS256", "k-RS256"))


async def test_old_keys_are_kept_when_a_fetch_fails(keys, clock, caplog):
    verifier = TokenVerifier(jwks=keys.url)
    await verifier.verify(signed("RS256", "k-RS256"))
    keys.status = 500
    clock.now += 60
    assert await reason(verifier, signed("RS256", "new")) == "unknown key"
    assert keys.requests == 2
    assert await verifier.verify(signed("RS256", "k-RS256"))
    assert "3 known keys are kept" in caplog.text


async def test_a_key_that_was_withdrawn_does_not_hold_for_ever(keys, clock):
    verifier = TokenVerifier(jwks=keys.url)
    await verifier.verify(signed("RS256", "k-RS256"))
    keys.body = jwks(public_jwk(KEYS["ES256"], "k-ES256"))
    keys.hold.clear()
    clock.now += auth.STALE_KEYS_SECONDS
    assert await verifier.verify(signed("RS256", "k-RS256"))  # nobody waits for it
    keys.hold.set()
    deadline = time.monotonic() + 5
    while len(verifier._key._keys) != 1:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    assert await reason(verifier, signed("RS256", "k-RS256")) == "unknown key"


async def test_a_jwks_file_is_read_again_when_it_changes(tmp_path):
    """WIRE §1: "from a JWKS file or URL"."""
    file = tmp_path / "keys.json"
    file.write_bytes(jwks(public_jwk(KEYS["RS256"], "1")))
    verifier = TokenVerifier(jwks=str(file))
    assert await verifier.verify(signed("RS256", "1"))
    file.write_bytes(jwks(public_jwk(KEYS["ES256"], "2"), public_jwk(KEYS["EdDSA"], "3")))
    assert await verifier.verify(signed("ES256", "2"))
    assert await reason(verifier, signed("RS256", "1")) == "unknown key"


@pytest.mark.parametrize("change", (lambda file: file.write_text("{"), lambda file: file.unlink()))
async def test_a_jwks_file_that_broke_keeps_its_old_keys_and_is_logged_once(tmp_path, caplog, change):
    file = tmp_path / "keys.json"
    file.write_bytes(jwks(public_jwk(KEYS["RS256"], "1")))
    verifier = TokenVerifier(jwks=str(file))
    change(file)
    for _ in range(3):
        assert await verifier.verify(signed("RS256", "1"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    file.write_bytes(jwks(public_jwk(KEYS["ES256"], "2")))
    assert await verifier.verify(signed("ES256", "2"))


@pytest.mark.parametrize("content", (None, "", "{}", "{"))
def test_a_jwks_file_that_is_broken_from_the_start_is_said_at_once(tmp_path, content):
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(KeysUnavailable, match=r"JWKS .*keys\.json cannot be read") as caught:
        TokenVerifier(jwks=str(file))
    assert "\n" not in str(caught.value)


# The secret.


def test_a_secret_below_32_bytes_is_refused():
    """WIRE §1: "HS256 with a secret of at least 32 bytes"."""
    TokenVerifier(secret=b"x" * 32)
    with pytest.raises(SecretError, match="32 bytes"):
        TokenVerifier(secret=b"x" * 31)


def test_a_certificate_is_no_secret():
    pem = (
        KEYS["RS256"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(SecretError, match="JWKS"):
        TokenVerifier(secret=pem)


def test_a_secret_is_made_once_for_the_owner_alone(tmp_path):
    """WIRE §1: "with none configured, the embedded mode makes a random one in its data folder"."""
    data_dir = tmp_path / "a" / "b"
    secret = secret_of(None, data_dir)
    assert len(secret) >= 32
    assert stat.S_IMODE((data_dir / "jwt-secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    assert secret_of(None, data_dir) == secret
    assert secret_of(None, tmp_path / "other") != secret
    assert [file.name for file in data_dir.iterdir()] == ["jwt-secret"]


def test_an_explicit_secret_wins_and_nothing_is_written(tmp_path):
    assert secret_of(SECRET.decode(), tmp_path) == SECRET
    assert secret_of("\udcff" * 32, tmp_path) == b"\xff" * 32  # as os.environ has a byte that is no UTF-8
    assert not list(tmp_path.iterdir())


def test_a_secret_file_that_cannot_be_used_is_named_in_one_line(tmp_path):
    (tmp_path / "jwt-secret").write_text("short\n")
    with pytest.raises(SecretError, match=r"jwt-secret: .* 32 bytes"):
        secret_of(None, tmp_path)
    with pytest.raises(SecretError, match="jwt-secret cannot be used"):
        secret_of(None, tmp_path / "jwt-secret")


def test_two_processes_that_make_the_secret_at_once_have_the_same(tmp_path):
    script = (
        "import sys; from pathlib import Path; from presence.server.auth import secret_of; "
        "print('ready', flush=True); sys.stdin.readline(); print(secret_of(None, Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=20)[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 4


# Small things.


@pytest.mark.parametrize(
    ("header", "token"),
    (
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER   abc ", "abc"),
        ("Basic abc", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("abc", None),
        ("", None),
        (None, None),
    ),
)
def test_the_token_is_what_follows_the_word_bearer(header, token):
    """WIRE §1: "`Authorization: Bearer <token>`"; RFC 9110 §11.1: the scheme's case does not matter."""
    assert bearer(header) == token


def test_a_made_token_says_what_was_asked():
    token = make_token(SECRET, "bob", 90, "idp", "chat", now=1_000)
    said = jwt.decode(token, options={"verify_signature": False})
    assert said == {"sub": "bob", "exp": 1_090, "iss": "idp", "aud": "chat"}
    said = jwt.decode(make_token(SECRET, "bob", 90, now=1_000), options={"verify_signature": False})
    assert said == {"sub": "bob", "exp": 1_090}


def test_a_problem_document_has_its_four_members():
    """WIRE §2: "RFC 9457 problem documents (`application/problem+json`: `type`, `title`, `status`, `detail`)"."""
    problem = Problem(503, "the presence store cannot be asked", {"Retry-After": "1"})
    assert problem.body() == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "the presence store cannot be asked",
    }
    assert problem.headers == {"Retry-After": "1"}
    assert Problem(404, "no such path").headers == {}
