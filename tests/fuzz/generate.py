"""What the fuzzer sends. Pure: the same seed and number give the same case (but for the tokens' times and RSA keys).

A `Case` is all that one connection sends, with what WIRE lets it be answered. Generators know what they broke, so that
an answer can be held against the close code or status of that very mistake; only what is mutated byte by byte
is held against the little that always holds: an ERROR and a close, or a status of WIRE §2, and never silence.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import string
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jwt

LEVELS = ("http", "websocket", "stomp", "rest", "token")
JWKS = "jwks"  # tokens again, of a server that knows public keys in place of a secret
QUEUES = ("/user/queue/online-status", "/queue/online-status")
ACTIONS = ("heartbeat", "online-status", "presence.subscribe", "presence.unsubscribe")
USERS = 400  # of a level, who take turns
PROBE = "the-last-receipt"
FLUSH = b"\0" * 66_000  # ends whatever frame is under way, and is an error itself

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
ODD = (
    "", " ", "é", "日本語", "😀", "\u202e", "\ufeff", "\x7f", "\x01", "a" * 300, "../..", "'\"`", "<b>", "%s%n", "{}[]",
    "null", "-1", "0", "1e999", "\u2028", "ß" * 50, "__proto__", "*", "?", "#", "a b", "\t", "%00", "%2e%2e", "$(x)",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """What the generators need to know of the server: how its tokens are made, and the time (Unix epoch, s)."""

    secret: bytes
    now: float
    keys: Mapping[str, Any] = field(default_factory=dict)  # algorithm → private key, whose kid is its name; else secret


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one connection sends."""

    kind: str
    messages: int
    """How many messages, frames or requests are in it."""


# Bytes and texts


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A few changes anywhere: bits, lengths, cuts, repeats, splices."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        at = rng.randrange(len(out))
        match rng.randrange(8):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice(b"\0\n\r:\\\x7f\x80\xc3\xff ,0")
            case 2:
                del out[at:]
            case 3:
                del out[at : at + rng.randrange(1, 20)]
            case 4:
                out[at:at] = out[at : at + rng.randrange(1, 100)] * rng.choice((1, 2, 50))
            case 5:
                out[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 6:
                out[at:at] = rng.choice(
                    (b"\r\n", b"\n\n", b"\0", b"\\", b":", b"\xed\xa0\x80", b"\xc0\x80", b"\\u0000")
                )
            case _:
                other = rng.randrange(len(out))
                out[at : at + 10] = out[other : other + 10]
    return bytes(out)


def json_text(rng: random.Random, depth: int = 0) -> str:
    """JSON of all shapes, and what only looks like it."""
    inner = depth + 1
    match rng.randrange(14 if depth < 4 else 8):
        case 0:
            return rng.choice(
                ("NaN", "Infinity", "-Infinity", "nul", "undefined", "'x'", "\ufeff1", "1 2", "0x1", "01")
            )
        case 1:
            return rng.choice(("1e999", "-0", "9" * 4_000, "9" * 5_000, "1." + "3" * 400, "-1e-999", "3.0"))
        case 2:
            return rng.choice(
                ('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\x01"', '"\\x"', '"', '"\\uD83D\\uDE00"')
            )
        case 3:
            return json.dumps(rng.choice(ODD), ensure_ascii=rng.random() < 0.5)
        case 4:
            return rng.choice(("true", "false", "null", "", " "))
        case 5:
            return rng.choice(("[", "{", '{"a":', "[[[[", "]", "[1,]", '{"a":1,}', "[1 2]"))
        case 6:
            return rng.choice("[{").replace("{", '{"a":') * rng.choice((100, 1_500, 9_000))
        case 7:
            return "[" * (many := rng.choice((100, 900, 20_000))) + "]" * many
        case 8 | 9 | 10:
            return "[" + ",".join(json_text(rng, inner) for _ in range(rng.randrange(4))) + "]"
        case _:
            names = ("userIds", "online", "userIds", rng.choice(ODD))
            members = (f"{json.dumps(rng.choice(names))}:{json_text(rng, inner)}" for _ in range(rng.randrange(4)))
            return "{" + ",".join(members) + "}"


def an_id(rng: random.Random) -> str:
    """A user's id of any shape that WIRE §1 allows, out of a few hundred."""
    number = rng.randrange(300)
    return rng.choice((f"peer-{number}", f"p.{number}~@-_", f"{number:0128}", f"{number:032x}"))


def bad_id(rng: random.Random) -> str:
    """What is no id."""
    return rng.choice(("", " ", "a b", "a:b", "-a", ".a", "_a", "a" * 129, "é", "a/b", "a\n", "\x00", "😀", "a%"))


def pieces(rng: random.Random, data: bytes, most: int) -> list[bytes]:
    """The data, cut anywhere into at most so many."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(most)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


# Tokens


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(secret: bytes, header: object, claims: object, digest: str = "sha256") -> str:
    """A token of any header and claims; texts are taken as they are."""
    parts = (part if isinstance(part, str) else json.dumps(part) for part in (header, claims))
    text = ".".join(_b64(part.encode(errors="surrogatepass")) for part in parts)
    return f"{text}.{_b64(hmac.digest(secret, text.encode(), digest))}"


@cache
def _good(secret: bytes, now: float, user: str) -> str:
    return signed(secret, {"alg": "HS256", "typ": "JWT"}, {"sub": user, "exp": now + 86_400})


def good_token(world: World, user: str) -> str:
    """A token that holds for a day."""
    for algorithm, key in world.keys.items():
        return jwt.encode({"sub": user, "exp": world.now + 86_400}, key, algorithm, headers={"kid": algorithm})
    return _good(world.secret, world.now, user)


@dataclass(frozen=True, kw_only=True)
class TokenCase(Case):
    """One token, how it is shown, and whether it holds."""

    token: str
    user: str
    good: bool | None
    """None: WIRE leaves it open."""
    by: str
    """``rest``, ``connect`` or ``renew``: what it is shown on."""


def token(rng: random.Random, world: World, user: str) -> TokenCase:
    """A good token, or one with something wrong."""
    by = rng.choices(("rest", "connect", "renew"), (8, 1, 1))[0]
    text, good, kind = (_asymmetric if world.keys else _symmetric)(rng, world, user)
    # What a header cannot carry says nothing of tokens. REST takes all that is not a control, STOMP likewise.
    text = "".join(c for c in text if " " < c < "\x7f")[:8_000]  # nor more than a header line
    return TokenCase(kind=f"{kind} {by}", messages=1, token=text, user=user, good=good, by=by)


def _claims(rng: random.Random, world: World, user: str) -> tuple[object, bool | None, str]:
    good: dict[str, Any] = {"sub": user, "exp": world.now + rng.choice((3_000, 1e6, 2**31))}
    now = world.now
    odd = rng.choice((None, True, [], {}, "", "x", -1, 1.5, [user], {"a": user}, 2**70, 1e300, float("nan"), "9" * 20))
    match rng.randrange(12):
        case 0 | 1:
            extra = {rng.choice(("iat", "jti", "aud", "iss", "scope", "x")): odd}
            # `iss` and `aud` count "when configured", which they are not; iat and jti nowhere.
            return good | extra, True, "good with another claim"
        case 2:
            del good[rng.choice(("sub", "exp"))]
            return good, False, "claim missing"
        case 3:
            return good | {"exp": rng.choice((now - 60, 0, -1, -1e18, now - 11))}, False, "over"
        case 4:
            return good | {"exp": odd if odd not in (2**70, 1e300) else None}, False, "exp odd"
        case 5:
            return good | {"sub": rng.choice((None, 7, [user], {}, True, bad_id(rng)))}, False, "sub odd"
        case 6:
            return good | {"nbf": rng.choice((now + 1e6, now + 1e9))}, False, "not yet"
        case 7:
            return good | {"nbf": odd}, None, "nbf odd"
        case 8:
            return json_text(rng), False, "claims of any shape"
        case 9:
            return f'{{"sub":"{user}","sub":7,"exp":{now + 1e3}}}', False, "claims twice"
        case 10:
            return good | {"x": "y" * rng.choice((100, 2_000))}, True, "good and long"
        case _:
            return good, True, "good"


_HEADERS: tuple[object, ...] = (
    {"alg": "none"}, {"alg": "None"}, {"alg": "nOnE", "typ": "JWT"}, {"alg": ""}, {"alg": None}, {"alg": 7}, {"alg": ["HS256"]},  # noqa: E501
    {}, [], "7", "null", '"HS256"', {"alg": "HS512"}, {"alg": "HS384"}, {"alg": "RS256"}, {"alg": "ES256"}, {"alg": "EdDSA"},  # noqa: E501
    {"alg": "hs256"}, {"alg": "HS256 "}, {"typ": "JWT"}, {"alg": "HS256", "b64": False, "crit": ["b64"]},
    {"alg": "HS256", "crit": ["x"]}, {"alg": "HS256", "crit": []}, '{"alg":"HS256","alg":"none"}', {"alg": "PS256"},
)  # fmt: skip


def _broken(rng: random.Random, text: str) -> tuple[str, bool, str]:
    """A good token with something of its text wrong."""
    head, body, mac = text.split(".")
    flipped = mac[:4] + ("A" if mac[4] != "A" else "B") + mac[5:]
    other = body[:4] + ("A" if body[4] != "A" else "B") + body[5:]
    choices = (
        f"{head}.{body}.", f"{head}.{body}", f"{head}.{body}.{flipped}", f"{head}.{other}.{mac}", f"{head}..{mac}",
        f"..{mac}", "..", ".", "x", f"{head}.{body}.{mac}.{mac}", f".{head}.{body}.{mac}", f"{head}.{body}.{mac[:-6]}",
        f"{head}.{body}.{mac}AAAA", f"{body}.{head}.{mac}", "A" * rng.choice((500, 7_000)), "." * 300,
        f"{head}.{body}.{'A' * len(mac)}", f"{head}.{body}.{mac[::-1]}", f"{'A' * 4_000}.{body}.{mac}",
    )  # fmt: skip
    return rng.choice(choices), False, "text"


def _symmetric(rng: random.Random, world: World, user: str) -> tuple[str, bool | None, str]:
    claims, good, kind = _claims(rng, world, user)
    roll = rng.random()
    if roll < 0.5:
        kids: dict[str, Any] = {"kid": rng.choice((7, None, [], {}, "", "../../etc/passwd", "' or 1=1", "x" * 1_000))}
        # A kid that is no string makes the header one that is no JOSE header (RFC 7515 §4.1.4).
        extra = kids if rng.random() < 0.2 else {}
        if extra and not isinstance(extra["kid"], str):
            good = None if good else good
        return signed(world.secret, {"alg": "HS256"} | extra, claims), good, kind
    if roll < 0.7:
        header = rng.choice(_HEADERS)
        text = signed(world.secret, header, {"sub": user, "exp": world.now + 1e3})
        is_open = isinstance(header, dict) and header.get("crit") == []
        return (
            text if rng.random() < 0.5 or is_open else text.rpartition(".")[0] + ".",
            None if is_open else False,
            "header",
        )
    if roll < 0.8:
        keys = (b"", b"secret", world.secret[:-1], world.secret + b"1", world.secret[::-1])  # NULs would change no MAC
        return signed(rng.choice(keys), {"alg": "HS256"}, claims), False, "key"
    if roll < 0.83:
        digest = rng.choice(("sha384", "sha512", "sha1"))
        return signed(world.secret, {"alg": "HS256"}, claims, digest), False, "digest"
    if roll < 0.87:
        return signed(world.secret, json_text(rng), {"sub": user, "exp": world.now + 1e3}), False, "header of any shape"
    return _broken(rng, good_token(world, user))


def _asymmetric(rng: random.Random, world: World, user: str) -> tuple[str, bool | None, str]:
    algorithm = rng.choice(tuple(world.keys))
    header: Any
    payload = {"sub": user, "exp": world.now + 1e3}
    roll = rng.random()
    if roll < 0.4:
        claims, good, kind = _claims(rng, world, user)
        if not isinstance(claims, dict):
            claims, good, kind = payload, True, "good"
        header = {"kid": algorithm} if rng.random() < 0.8 else {}
        data = json.dumps(claims).encode()  # PyJWT's own `encode` takes no odd claims
        return jwt.PyJWS().encode(data, world.keys[algorithm], algorithm, headers=header), good, f"{algorithm} {kind}"
    if roll < 0.6:
        other = rng.choice([name for name in world.keys if name != algorithm] + ["none-such", "", "../x", "x" * 999])
        text = jwt.encode(payload, world.keys[algorithm], algorithm, headers={"kid": other})
        return text, False, "another kid"
    if roll < 0.8:  # a public key is no secret, and a header alone makes no algorithm
        secret = rng.choice((b"", world.secret, algorithm.encode()))
        header = rng.choice((*_HEADERS, {"alg": "HS256", "kid": algorithm}, {"alg": algorithm, "kid": algorithm}))
        return signed(secret, header, payload), False, "mac for a signature"
    if roll < 0.85:
        header = {"alg": algorithm, "kid": rng.choice((7, None, [], {}, True, 1e9))}
        text = signed(b"x", header, payload)
        return text, False, "kid odd"
    return _broken(rng, jwt.encode(payload, world.keys[algorithm], algorithm, headers={"kid": algorithm}))


# REST


@dataclass(frozen=True, kw_only=True)
class Request(Case):
    """One request, and the statuses that it may be answered with."""

    data: bytes
    statuses: frozenset[int]
    method: str = "GET"


ROUTES = (
    "/", "/health/live", "/health/ready", "/ws", "/ws/", "/ws/info", "/ws/websocket", "/ws/a/b/websocket",
    "/api/presence/friends", "/api/presence/conversation/{}", "/api/presence/check/{}", "/api/presence/batch",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get", "PROPFIND", "LINK")


def _quoted(text: str) -> str:
    safe = set(string.ascii_letters + string.digits + "-._~@")
    return "".join(c if c in safe else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)


def rest(rng: random.Random, world: World, user: str) -> Request:
    """A request to the API: right, or with one thing wrong, whose status WIRE §2 fixes; or with anything wrong."""
    headers = {"Host": "localhost", "Authorization": f"Bearer {good_token(world, user)}"}
    for name, values in (
        (
            "Accept-Language",
            ("en", "vi", "en;q=0.3, vi;q=x", "*" * 500, "en;q=", ",,;;==", "\xff", "en;q=9e999", "q=" * 99),
        ),
        ("Accept", ("*/*", "text/html", "x")),
        (
            "Origin",
            (
                "null",
                "http://localhost:3000",
                "https://evil.example",
                "http://[",
                "http://[::1",
                "\xe9",
                "//",
                "x" * 999,
            ),
        ),
        ("Cookie", ("a=b", "=" * 400, "a" * 2_000)),
        ("Range", ("bytes=0-", "bytes=9-1", "x")),
        ("If-None-Match", ("*", '"x"')),
        ("X-Forwarded-For", ("1.2.3.4", "\xff")),
        ("Access-Control-Request-Method", ("GET", "\xff")),
        ("Access-Control-Request-Headers", ("x", "," * 99)),
        ("Expect", ("100-continue",)),
        ("Accept-Encoding", ("gzip", "br;q=9", "*")),
        ("If-Modified-Since", ("x", "Thu, 01 Jan 1970 00:00:00 GMT")),
    ):
        if rng.random() < 0.06:
            headers[name] = rng.choice(values)
    if headers.get("Range") or headers.get("If-None-Match") or headers.get("If-Modified-Since"):
        extra = {206, 304, 416}  # of the page at /, a static file
    else:
        extra = set()
    method, target, body, kind, statuses = rng.choice(_KINDS)(rng, headers, user)
    if rng.random() < 0.3:
        target += "?" + rng.choice(
            ("", "a", "a=b&a=c", "%", "%FF%00", "=" * 500, "userIds=a", "access_token=x", "?" * 50)
        )
    if body is not None and "Content-Length" not in headers and "Transfer-Encoding" not in headers:
        headers["Content-Length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    data = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + (body or b"")
    if target.partition("?")[0] == "/":
        statuses = statuses | extra
    return Request(kind=kind, messages=1, data=data, statuses=frozenset(statuses), method=method)


_Kind = tuple[str, str, bytes | None, str, set[int]]


def _get(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    target = rng.choice(("/api/presence/friends", f"/api/presence/check/{_quoted(an_id(rng))}"))
    return rng.choice(("GET", "GET", "HEAD")), target, None, "good", {200, 429}


def _conversation(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    return "GET", f"/api/presence/conversation/{_quoted(an_id(rng))}", None, "no member", {403, 429}


def _bad_id(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    name = next(one for one in iter(lambda: bad_id(rng), None) if one and "/" not in one)
    return "GET", f"/api/presence/{rng.choice(('check', 'conversation'))}/{_quoted(name)}", None, "bad id", {400}


def _batch(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    headers["Content-Type"] = rng.choice(("application/json", "application/json; charset=utf-8", "APPLICATION/JSON"))
    ids = [an_id(rng) for _ in range(rng.choice((0, 1, 3, 20, 100)))]
    body = json.dumps(ids).encode()
    if rng.random() < 0.2:
        headers["Transfer-Encoding"] = "chunked"
        parts = pieces(rng, body, 5)
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return "POST", "/api/presence/batch", body, "good batch", {200, 429}


def _bad_batch(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    headers["Content-Type"] = "application/json"
    body, status = rng.choice((
        (b"[", 400), (b"", 400), (b"\xff", 400), (b'{"userIds":[]}', 400), (b"null", 400), (b"7", 400), (b'"a"', 400),
        (json.dumps(["ok", bad_id(rng)]).encode(), 400), (b'[["a"]]', 400), (b"[null]", 400), (b'["\\ud800"]', 400),
        (b"[" * 50_000, 400), (b"[" + b"9" * 5_000 + b"]", 400), (b"[NaN]", 400), (b'[{"a":1}]', 400),
        (json.dumps([f"a{number}" for number in range(1_001)]).encode(), 413), (b" " * 262_145, 413),
    ))  # fmt: skip
    return "POST", "/api/presence/batch", body, "bad batch", {status}


def _any_json(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    headers["Content-Type"] = "application/json"
    body = json_text(rng).encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-32")), errors="surrogatepass")
    return "POST", "/api/presence/batch", body, "any JSON", {200, 400, 413, 429}


def _media(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    media = rng.choice(
        (None, "text/plain", "x", "", "application/xml", "multipart/form-data; boundary=x", "json", "\xff")
    )
    if media is not None:
        headers["Content-Type"] = media
    return "POST", "/api/presence/batch", b'["a"]', "media type", {415}


def _no_token(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    del headers["Authorization"]
    value = rng.choice(
        (None, "", "Bearer", "Bearer ", "Basic YTpi", "bearer x", "Bearer x y", "\xff", "Bearer " + "x" * 3_000)
    )
    if value is not None:
        headers["Authorization"] = value
    target = rng.choice(ROUTES[8:11]).format("a")
    return "GET", target, None, "no token", {401}


def _path(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    odd = rng.choice(
        ("/x", "//", "//api/presence/friends", "/api", "/api/presence", "/api/presence/", "/api/presence/friends/",
         "/API/presence/friends", "/api//presence/friends",
         "/health", "/ws/x", "/static", "/static/../x", "/api/presence/check", "/favicon.ico",
         "/%2e%2e/%2e%2e/etc/passwd", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/a" * 1_000, "/%FF%FE", "/%00")
    )  # fmt: skip
    return "GET", odd, None, "unknown path", {404}


def _method(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    target = rng.choice(ROUTES).format("a")
    right = {"POST"} if target.endswith("batch") else {"GET", "HEAD"}
    method = rng.choice([name for name in METHODS if name.upper() not in {*right, "OPTIONS"}])
    return method, target, rng.choice((None, b"", b"[]")), "method", {405}


def _preflight(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    return "OPTIONS", rng.choice(ROUTES).format("a"), None, "preflight", {200, 204}


def _public(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    return (
        rng.choice(("GET", "HEAD")),
        rng.choice(("/", "/health/live", "/health/ready", "/ws", "/ws/", "/ws/info")),
        None,
        "public",
        {200},
    )


def _anything(rng: random.Random, headers: dict[str, str], user: str) -> _Kind:
    printable = [chr(c) for c in range(33, 127)]
    path = rng.choice(ROUTES).format("".join(rng.choices(printable, k=rng.randrange(1, 40))))
    path = "".join(rng.choice(printable) if rng.random() < 0.02 else c for c in path) or "/"
    body = rng.choice((None, json_text(rng).encode(errors="replace"), rng.randbytes(50)))
    if rng.random() < 0.5:
        headers["Content-Type"] = (
            rng.choice(("application/json", "text/plain", rng.choice(ODD[10:20]))).encode().decode("latin-1")
        )
        headers["Content-Type"] = "".join(c for c in headers["Content-Type"] if c >= " ")
    return rng.choice(METHODS), path, body, "anything", {200, 204, 400, 401, 403, 404, 405, 413, 415, 429}


_KINDS: Sequence[Callable[[random.Random, dict[str, str], str], _Kind]] = (
    _get, _get, _conversation, _bad_id, _batch, _batch, _bad_batch, _any_json, _media, _no_token, _path, _method,
    _preflight, _public, _anything, _anything,
)  # fmt: skip


# Bytes before the upgrade


@dataclass(frozen=True, kw_only=True)
class Bytes(Case):
    """Bytes as they are, in pieces, and how the client goes."""

    chunks: tuple[bytes, ...]
    ending: str
    """``end``: says that it sends no more, once it was answered; ``abort``: is gone at once; ``wait``: stays."""


_UPGRADE = [
    "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",  # noqa: E501
]  # fmt: skip
_LINES = (
    "Host: a", "Host:", "Host: \xff", "Host: a\r\nHost: b", "Content-Length: 5", "Content-Length: -1", "Content-Length: 5, 6",  # noqa: E501
    "Content-Length: 5, 5", "Content-Length: 99999999999999999999", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked",  # noqa: E501
    "Transfer-Encoding: identity", "Expect: 100-continue", "Expect: x", "Connection: close", "Connection: keep-alive, Upgrade, x",  # noqa: E501
    "Upgrade: h2c", "Upgrade: websocket, h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA", "HTTP2-Settings: !!!", "HTTP2-Settings:",  # noqa: E501
    "Sec-WebSocket-Version: 8", "Sec-WebSocket-Version: x", "Sec-WebSocket-Key: x", "Sec-WebSocket-Key: \xe9",
    "Sec-WebSocket-Protocol: v12.stomp", "Sec-WebSocket-Protocol: ,,", "Sec-WebSocket-Protocol: \xff", "Sec-WebSocket-Protocol: x, v10.stomp",  # noqa: E501
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=99", "Sec-WebSocket-Extensions: ;;==,", "Origin: null",  # noqa: E501
    "Origin: http://[", "Authorization: Bearer x", "X: " + "y" * 9_000, "X: " + "y" * 70_000, "no colon", ": empty", "a b: c", " folded",  # noqa: E501
    "\tfolded", "X:\0", "X: \x01", "X\xe9: y", "Connection: \xff", "Cookie: " + "a=b;" * 300, "Trailer: x", "TE: trailers",  # noqa: E501
)  # fmt: skip


def _http2(rng: random.Random) -> bytes:
    """The preface of HTTP/2, then frames of its grammar, right and wrong."""

    def one(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        size = len(payload) if rng.random() < 0.9 else rng.randrange(2**24)
        return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def header(name: bytes, value: bytes) -> bytes:  # HPACK, "Literal Header Field without Indexing", no Huffman
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    path = rng.choice((b"/", b"/ws", b"/api/presence/friends", b"", b"x", b"/%00", b"*"))
    fields = (
        header(b":path", path) + header(b":scheme", b"http") + header(b":authority", rng.choice((b"a", b"", b"\xff")))
    )
    connect = header(b":method", b"CONNECT") + header(b":protocol", rng.choice((b"websocket", b"x"))) + fields
    upgrade = connect + header(b"sec-websocket-version", rng.choice((b"13", b"1")))
    out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + one(4, 0, 0, b"")
    stream = 1
    for _ in range(rng.randrange(8)):
        block = rng.choice(
            (
                header(b":method", rng.choice((b"GET", b"POST", b"x", b"PUT"))) + fields,
                connect,
                upgrade,
                rng.randbytes(30),
            )
        )
        out += rng.choice((
            one(1, rng.choice((4, 5, 0, 0x25)), stream, block), one(0, rng.choice((0, 1, 8)), stream, b"x" * rng.randrange(99)),  # noqa: E501
            one(4, rng.choice((0, 1)), 0, struct.pack("!HI", rng.randrange(10), rng.randrange(2**32))), one(6, 0, 0, b"12345678"),  # noqa: E501
            one(3, 0, stream, b"\0\0\0\x08"), one(8, 0, rng.choice((0, stream)), struct.pack("!I", rng.choice((0, 1, 2**31 - 1)))),  # noqa: E501
            one(7, 0, 0, b"\0" * 8), one(9, 4, stream, block), one(2, 0, stream, b"\0\0\0\0\1"), one(rng.randrange(256), 0, stream, b"z"),  # noqa: E501
            one(0, 0, stream, b"\x81\x85\0\0\0\0hello"),
        ))  # fmt: skip
        stream += rng.choice((0, 2, 2))
    return out


def http(rng: random.Random, world: World, user: str) -> Bytes:
    """What a server may meet before any WebSocket is there."""
    roll = rng.random()
    if roll < 0.05:
        first = (
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"\0",
            b"\r\n" * 50,
            b"*1\r\n$4\r\nPING\r\n",
            b"GET /\r\n",
        )
        data, count, kind = rng.choice(first) + rng.randbytes(rng.randrange(60)), 1, "no HTTP"
    elif roll < 0.15:
        data, count, kind = _http2(rng), 1, "HTTP/2"
        if rng.random() < 0.4:
            data = data[:24] + mutate(rng, data[24:])
    else:
        requests = [_request(rng, world, user) for _ in range(rng.choice((1, 1, 1, 2, 3, 10)))]
        data, count, kind = b"".join(requests), len(requests), "HTTP"
        if rng.random() < 0.5:
            data, kind = mutate(rng, data), "HTTP mutated"
    ending = rng.choices(("end", "abort", "wait"), (84, 15, 1))[0]
    return Bytes(kind=f"{kind} {ending}", messages=count, chunks=tuple(pieces(rng, data, 4)), ending=ending)


def _request(rng: random.Random, world: World, user: str) -> bytes:
    method = rng.choice(("GET", "GET", "GET", "POST", "HEAD", "OPTIONS", "G\xc9T", "", "GET GET", "A" * 200))
    target = rng.choice(
        (
            *ROUTES,
            "/ws",
            "*",
            "http://a/ws",
            "x",
            "",
            "/\xff",
            "/" + "a" * 9_000,
            "a:1",
            "/ws HTTP/1.1\r\nX: y",
            "/ws#x",
        )
    )
    version = rng.choice(("HTTP/1.1",) * 8 + ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "http/1.1", ""))
    lines = ["Host: localhost", *(_UPGRADE if rng.random() < 0.6 else ())]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_LINES))
    if rng.random() < 0.2:
        del lines[rng.randrange(len(lines))]
    if rng.random() < 0.02:
        lines += [f"X{number}: y" for number in range(rng.choice((100, 1_000)))]
    eol = rng.choice(("\r\n",) * 9 + ("\n",))
    head = eol.join([f"{method} {target} {version}", *lines, "", ""]).encode("latin-1")
    bodies = (
        b"",
        b"",
        b"hello",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"zz\r\n",
        b"FFFFFFFFFFFFFFFF\r\n",
        b"-1\r\nx\r\n",
        b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    )
    return head + rng.choice(bodies)


# WebSocket frames


def ws(rng: random.Random, opcode: int, payload: bytes = b"", flags: int = 8) -> bytes:
    """A frame from a client, as RFC 6455 wants it. Most masks are zeros, which changes nothing for the server."""
    size = len(payload)
    if size < 126:
        extended = struct.pack("!B", 0x80 | size)
    else:
        extended = struct.pack("!BH", 254, size) if size < 65_536 else struct.pack("!BQ", 255, size)
    head = bytes([flags << 4 | opcode]) + extended
    if not 0 < size < 65_536 or rng.random() < 0.7:
        return head + bytes(4) + payload
    mask = rng.randbytes(4)
    stream = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ stream).to_bytes(size, "big")


@dataclass(frozen=True, kw_only=True)
class Socket(Case):
    """What is sent after the upgrade, and what must come of it."""

    path: str
    chunks: tuple[bytes, ...]
    ends: bool
    """The server must end the connection; else it answers all and lives on."""
    codes: frozenset[int] = frozenset()
    """With one of these codes, unless there are none: then any of WIRE §6, or without a close frame."""
    pongs: tuple[bytes, ...] = ()
    """Payloads of the pongs that must come, if it lives on."""
    receipts: tuple[str, ...] = ()
    """Receipts that must come, in this order; before the end only some of them, if it ends."""
    receipt: str | None = None
    """The receipt-id that the ERROR must have."""
    leaves: str = "close"
    """How the client goes from a connection that lives on: ``close``, ``abort`` or ``DISCONNECT``."""
    version: str = "1.2"


def connect_frame(world: World, user: str, version: str = "1.2") -> bytes:
    """A CONNECT that is accepted."""
    return frame(
        "CONNECT", [("accept-version", version), ("host", "a"), ("Authorization", f"Bearer {good_token(world, user)}")]
    )


def websocket(rng: random.Random, world: World, user: str) -> Socket:
    """Frames in the grammar of RFC 6455, at the end perhaps one that is not."""
    out = [ws(rng, TEXT, connect_frame(world, user))] if rng.random() < 0.7 else []
    connected = bool(out)
    pongs: list[bytes] = []
    beat = frame("SEND", [("destination", "/app/heartbeat")])
    sends = 0
    for _ in range(rng.choice((1, 5, 20, 60, 150))):
        match rng.randrange(8):
            case 0 | 1 | 2:
                pongs.append(rng.randbytes(rng.choice((0, 1, 4, 125))))
                out.append(ws(rng, PING, pongs[-1]))
            case 3:
                out.append(ws(rng, PONG, rng.randbytes(rng.randrange(126))))
            case 4:
                out.append(ws(rng, rng.choice((TEXT, BINARY)), rng.choice((b"", b"\n", b"\r\n", b"\n" * 100))))
            case 5:
                out.append(ws(rng, TEXT, b"\n", 0))
                for _ in range(rng.randrange(4)):
                    pongs.append(rng.randbytes(3))
                    out += [ws(rng, PING, pongs[-1]), ws(rng, 0, rng.choice((b"", b"\n")), 0)]
                out.append(ws(rng, 0, b""))
            case _ if connected and sends < 150:
                sends += 1
                parts = pieces(rng, beat, 4)
                out += [ws(rng, rng.choice((TEXT, BINARY)), part) for part in parts]
            case _:
                out.append(ws(rng, BINARY, b"\n"))
    if rng.random() < 0.4:
        pongs.append(b"the last one")
        out.append(ws(rng, PING, pongs[-1]))
        chunks = tuple(pieces(rng, b"".join(out), 6))
        leaves = rng.choice(("close", "abort"))
        return Socket(
            kind=f"grammar kept, {leaves}",
            messages=len(out),
            path="/ws",
            chunks=chunks,
            ends=False,
            pongs=tuple(pongs),
            leaves=leaves,
        )
    if rng.random() < 0.3:
        data = mutate(rng, b"".join(out))
        # It may ask for more bytes than we would ever send: so the client goes, and only what comes back is looked at.
        return Socket(
            kind="mutated",
            messages=len(out),
            path="/ws",
            chunks=tuple(pieces(rng, data, 6)),
            ends=False,
            leaves="abort",
        )
    name, last, codes = _breach(rng)
    chunks = tuple(pieces(rng, b"".join([*out, last]), 6))
    return Socket(kind=name, messages=len(out) + 1, path="/ws", chunks=chunks, ends=True, codes=frozenset(codes))


def _breach(rng: random.Random) -> tuple[str, bytes, set[int]]:
    """A frame that RFC 6455 does not allow, and the close codes that it may be answered with; none: any."""
    code = rng.choice((0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535))
    breaches: tuple[tuple[str, bytes, set[int]], ...] = (
        ("RSV", ws(rng, rng.choice((TEXT, PING)), b"\n", 8 | rng.randrange(1, 8)), {1002}),
        ("opcode", ws(rng, rng.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15)), b"x"), {1002}),
        ("unmasked", bytes([0x81, 1]) + b"\n", {1002}),
        ("control too long", bytes([0x80 | rng.choice((8, 9, 10)), 254, 0, 126]) + bytes(130), {1002}),
        ("control in pieces", ws(rng, rng.choice((8, 9, 10)), b"", 0), {1002}),
        ("continues nothing", ws(rng, 0, b"x", rng.choice((0, 8))), {1002}),
        ("text in a text", ws(rng, TEXT, b"\n", 0) + ws(rng, TEXT, b"\n"), {1002}),
        (
            "no UTF-8",
            ws(rng, TEXT, rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\n\xe2\x82"))),
            {1007},
        ),
        ("no UTF-8 in pieces", ws(rng, TEXT, b"\xe2", 0) + ws(rng, 0, b"\x82", 0) + ws(rng, 0, b"x"), {1007}),
        ("close of one byte", ws(rng, CLOSE, b"\x03"), {1002}),
        ("close code", ws(rng, CLOSE, struct.pack("!H", code)), {1002}),
        ("close reason", ws(rng, CLOSE, b"\x03\xe8\xff\xfe"), {1002, 1007}),
        ("length in more bytes than needed", bytes([0x82, 254, 0, 1]) + bytes(4) + b"\n", {1002}),
        ("length with the high bit", bytes([0x82, 255, 0x80]) + bytes(11), {1002}),
        ("message too large", ws(rng, BINARY, b"\n" * (2**20 + 1)), {1009}),
        (
            "in pieces too large",
            (ws(rng, BINARY, b"\n" * 2**19, 0) + ws(rng, 0, b"\n" * 2**19, 0) + ws(rng, 0, b"\n")),
            {1009},
        ),
        ("close", ws(rng, CLOSE, struct.pack("!H", rng.choice((1000, 1001, 3000, 4999))) + "é".encode()), set()),
        ("empty close", ws(rng, CLOSE), set()),
    )
    weights = [1 if "large" in name else 5 for name, _, _ in breaches]
    return rng.choices(breaches, weights)[0]


# STOMP frames


def frame(
    command: str, headers: Sequence[tuple[str, str]], body: bytes = b"", version: str = "1.2", eol: str = "\n"
) -> bytes:
    """A STOMP frame, escaped as the version wants it."""
    if command not in ("CONNECT", "STOMP") and version != "1.0":
        escapes = {"\\": "\\\\", "\n": "\\n", ":": "\\c"} | ({"\r": "\\r"} if version == "1.2" else {})
        table = str.maketrans(escapes)
        headers = [(name.translate(table), value.translate(table)) for name, value in headers]
    lines = [command, *(f"{name}:{value}" for name, value in headers), "", ""]
    return eol.join(lines).encode() + body + b"\0"


class _Dialogue:
    """What a client of this version has said so far, and what of it is still open."""

    def __init__(self, rng: random.Random, world: World, user: str) -> None:
        self.rng = rng
        self.world = world
        self.user = user
        self.version = rng.choice(("1.0", "1.1", "1.2", "1.2"))
        self.eol = "\r\n" if rng.random() < 0.1 else "\n"
        self.receipts: list[str] = []
        self.subscriptions: dict[str, tuple[str, str]] = {}  # key → the header that names it
        self.transactions: dict[str, int] = {}  # → SENDs held
        self.watched: set[str] = set()
        self.ids = 0

    def connect(self) -> bytes:
        rng = self.rng
        token = good_token(self.world, self.user)
        login = rng.choice(
            (
                ("Authorization", f"Bearer {token}"),
                ("authorization", f"bearer {token}"),
                ("passcode", token),
                ("passcode", f"Bearer {token}"),
            )
        )
        headers = [login, ("host", rng.choice(("a", "", "/", "é")))]
        if self.version != "1.0" or rng.random() < 0.5:
            offered = {"1.0": "1.0", "1.1": "1.0,1.1,9.9", "1.2": "1.1,1.2,1.0"}[self.version]
            headers.append(("accept-version", rng.choice((self.version, offered))))
        if rng.random() < 0.4:
            headers.append(("heart-beat", rng.choice(("0,0", "10000,10000", "1,1", "999999999999999999,0", "0,60000"))))
        if rng.random() < 0.2:
            headers.append(("device", rng.choice(("mobile", "web", "tablet", "fridge", "é"))))
        rng.shuffle(headers)
        return frame(rng.choice(("CONNECT", "CONNECT", "STOMP")), headers, eol=self.eol)

    def text(self) -> str:
        """What may stand in a header of this version and comes back as it was."""
        rng = self.rng
        text = rng.choice(ODD) + rng.choice(("", ":", "\\", "\\n", "\n", "\r", ":\\:", "::"))
        if self.version != "1.2":
            text = text.replace("\r", "")
        if self.version == "1.0":
            text = text.replace("\n", "").strip(" \t")
        if text.endswith("\r"):
            text += "."
        return text

    def say(self, command: str, headers: list[tuple[str, str]], body: bytes = b"", ask: float = 0.4) -> bytes:
        """A frame, which perhaps asks for a receipt."""
        rng = self.rng
        if rng.random() < ask:
            self.receipts.append(f"r{len(self.receipts)}{self.text() if rng.random() < 0.2 else ''}")
            headers.append(("receipt", self.receipts[-1]))
        if body and rng.random() < 0.6:
            headers.append(("content-length", str(len(body))))
        if rng.random() < 0.1:
            headers.append((rng.choice(("x", "é", "content-type", "priority")), self.text()))
        rng.shuffle(headers)
        if rng.random() < 0.05:
            headers += [(name, "of no account") for name, _ in headers]  # "only the first header entry"
        return frame(command, headers, body, self.version, self.eol)

    def send(self, action: str, body: bytes = b"", **more: str) -> bytes:
        rng = self.rng
        headers = [("destination", f"/app/{action}"), *more.items()]
        if self.transactions and rng.random() < 0.3 and sum(self.transactions.values()) < 90:
            name = rng.choice(list(self.transactions))
            self.transactions[name] += 1
            headers.append(("transaction", name))
        return self.say("SEND", headers, body)

    def valid(self) -> bytes:
        """Any frame that is right at this moment."""
        rng = self.rng
        match rng.randrange(18):
            case 0 | 1 | 2 | 3:
                body = rng.choice((b"", b"", b"x", "é".encode(), b"{}"))
                return self.send("heartbeat", body)
            case 4:
                return self.send("heartbeat", Authorization=f"Bearer {good_token(self.world, self.user)}")
            case 5 | 6:
                return self.send(
                    "online-status",
                    rng.choice((b'{"online":true}', b' {"online" : false, "x": [1]}\n', b'{"online":0,"online":true}')),
                )
            case 7 | 8:
                ids = [an_id(rng) for _ in range(rng.choice((0, 1, 2, 5, 20)))]
                return self.send("presence.subscribe", json.dumps({"userIds": ids, "x": None}).encode())
            case 9:
                ids = [an_id(rng) for _ in range(rng.choice((0, 1, 5, 50)))]
                return self.send("presence.unsubscribe", json.dumps({"userIds": ids}).encode())
            case 10 | 11 if len(self.subscriptions) < 14:
                return self.subscribe()
            case 12:
                if self.subscriptions and rng.random() < 0.7:
                    key = rng.choice(list(self.subscriptions))
                    return self.say("UNSUBSCRIBE", [self.subscriptions.pop(key)])
                return self.say("UNSUBSCRIBE", [("id", f"none-{rng.randrange(9)}")])
            case 13 if len(self.transactions) < 5:
                self.ids += 1
                name = f"t{self.ids}"
                self.transactions[name] = 0
                return self.say("BEGIN", [("transaction", name)])
            case 14 if self.transactions:
                name = rng.choice(list(self.transactions))
                del self.transactions[name]
                return self.say(rng.choice(("COMMIT", "ABORT")), [("transaction", name)])
            case 15:
                names = {"1.2": ("id",), "1.1": ("message-id", "subscription"), "1.0": ("message-id",)}[self.version]
                commands = ("ACK",) if self.version == "1.0" else ("ACK", "NACK")
                return self.say(rng.choice(commands), [(name, self.text()) for name in names])
            case _:
                return rng.choice((b"\n", b"\n\n\n", b"\r\n"))

    def subscribe(self) -> bytes:
        self.ids += 1
        destination, ack = self.rng.choice(QUEUES), self.rng.choice(("auto", "client", "client-individual", None))
        headers = [("destination", destination)] + ([("ack", ack)] if ack else [])
        key, name = f"s{self.ids}", ("id", f"s{self.ids}{self.text() if self.rng.random() < 0.1 else ''}")
        if self.version == "1.0" and destination not in self.subscriptions and self.rng.random() < 0.5:
            key, name = destination, ("destination", destination)
        else:
            headers.append(name)
        self.subscriptions[key] = name
        return self.say("SUBSCRIBE", headers)

    def mistake(self) -> tuple[str, bytes, int, str | None]:
        """What ends the connection: its name, its bytes, the close code of WIRE §6, and the receipt it asks for."""
        rng, version = self.rng, self.version
        receipt = f"wrong-{rng.randrange(100)}" if rng.random() < 0.5 else None
        asks = [("receipt", receipt)] if receipt else []

        def one(command: str, headers: Sequence[tuple[str, str]], body: bytes = b"") -> bytes:
            return frame(command, [*asks, *headers], body, version, self.eol)

        def send(destination: str, body: bytes = b"", *headers: tuple[str, str]) -> bytes:
            return one("SEND", [("destination", destination), *headers], body)

        begin = frame("BEGIN", [("transaction", "twice")], version=version)
        beat = "/app/heartbeat"
        ids = [f"peer-{number}" for number in range(1_001)]
        word = "".join(rng.choices(string.ascii_letters, k=rng.randrange(1, 40))) + "X"
        raw = f"SEND{self.eol}destination:{beat}{self.eol}" + "".join(
            f"{name}:{value}{self.eol}" for name, value in asks
        )
        held = b"".join(
            frame("SEND", [("destination", beat), ("transaction", "many")], version=version) for _ in range(101)
        )
        other = good_token(self.world, f"another-{rng.randrange(9)}")
        choices: list[tuple[str, bytes, int]] = [
            ("unknown command", one(word, []), 1002),
            ("command in lower case", one("send", [("destination", beat)]), 1002),
            ("frame of the server", one(rng.choice(("MESSAGE", "RECEIPT", "CONNECTED", "ERROR")), []), 1002),
            ("line without a colon", f"{raw}no colon{self.eol}{self.eol}\0".encode(), 1002),
            ("line without a name", f"{raw}:x{self.eol}{self.eol}\0".encode(), 1002),
            ("no blank line", raw.encode().rstrip() + b"\0", 1002),
            ("headers no UTF-8", f"{raw}x:".encode() + b"\xff\n\n\0", 1002),
            (
                "content-length no number",
                f"{raw}content-length:{rng.choice(('x', '-1', '1.0', '', '٣', '+1', '0x1'))}\n\n\0".encode(),
                1002,
            ),
            ("content-length too short", f"{raw}content-length:3\n\nabcdef\0".encode(), 1002),
            (
                "content-length far too large",
                f"{raw}content-length:{rng.choice(('65536', '9' * 18, '9' * 5_000))}\n\nx\0".encode(),
                1009,
            ),
            ("frame too large", f"{raw}\n".encode() + b"x" * 66_000 + b"\0", 1009),
            ("second CONNECT", self.connect(), 1002),
            ("SEND without destination", one("SEND", []), 1002),
            ("SUBSCRIBE without destination", one("SUBSCRIBE", [("id", "new")]), 1002),
            (
                "id taken",
                frame("SUBSCRIBE", [("id", "double"), ("destination", QUEUES[0])], version=version)
                + one("SUBSCRIBE", [("id", "double"), ("destination", QUEUES[1])]),
                1002,
            ),
            (
                "ack mode",
                one("SUBSCRIBE", [("id", "new"), ("destination", QUEUES[0]), ("ack", rng.choice(("", "x", "AUTO")))]),
                1002,
            ),
            ("BEGIN without transaction", one("BEGIN", []), 1002),
            ("BEGIN twice", begin + one("BEGIN", [("transaction", "twice")]), 1002),
            ("unknown transaction", one(rng.choice(("COMMIT", "ABORT")), [("transaction", "unknown")]), 1002),
            ("SEND in unknown transaction", send(beat, b"", ("transaction", "unknown")), 1002),
            ("ACK without id", one("ACK", []), 1002),
            (
                "SEND to unknown destination",
                send(
                    rng.choice(("/app/x", "", "/user/queue/online-status", "/app/heartbeat ", "é", "/app/Heartbeat"))
                    + "?"
                ),
                1008,
            ),
            (
                "SUBSCRIBE to unknown destination",
                one(
                    "SUBSCRIBE",
                    [
                        ("id", "new"),
                        ("destination", rng.choice(("/user/bob/queue/online-status", "/topic/x", "?", "/queue/*"))),
                    ],
                ),
                1008,
            ),
            (
                "no JSON",
                send(
                    f"/app/{rng.choice(ACTIONS[1:])}",
                    rng.choice((b"", b"{", b"\xff", b"[" * 60_000, b"{'a':1}", b'{"a":' * 9_000)),
                ),
                1008,
            ),
            (
                "no object",
                send(f"/app/{rng.choice(ACTIONS[1:])}", rng.choice((b"[]", b"7", b"null", b'"x"', b"NaN", b"1e999"))),
                1008,
            ),
            (
                "online odd",
                send(
                    "/app/online-status",
                    rng.choice((b"{}", b'{"online":1}', b'{"online":null}', b'{"online":"true"}', b'{"Online":true}')),
                ),
                1008,
            ),
            (
                "no array",
                send(
                    "/app/presence.subscribe",
                    rng.choice((b"{}", b'{"userIds":{}}', b'{"userIds":"a"}', b'{"userIds":null}')),
                ),
                1008,
            ),
            (
                "no id",
                send(
                    f"/app/{rng.choice(ACTIONS[2:])}",
                    json.dumps({"userIds": ["ok", rng.choice((bad_id(rng), 7, None, [], {}, True))]}).encode(),
                ),
                1008,
            ),
            ("lone surrogate", send("/app/presence.subscribe", b'{"userIds":["\\ud800"]}'), 1008),
            (
                "id of 4,000 digits",
                send("/app/presence.subscribe", b'{"userIds":[' + b"9" * rng.choice((4_000, 5_000)) + b"]}"),
                1008,
            ),
            ("too many ids", send("/app/presence.subscribe", json.dumps({"userIds": ids}).encode()), 1008),
            (
                "too many headers",
                one("SEND", [("destination", beat), *((f"x{number}", "") for number in range(64))]),
                1008,
            ),
            ("header line too long", one("SEND", [("destination", beat), ("x", "y" * 8_192)]), 1008),
            (
                "too many subscriptions",
                b"".join(
                    frame("SUBSCRIBE", [("id", f"many-{number}"), ("destination", QUEUES[0])], version=version)
                    for number in range(17)
                ),
                1008,
            ),
            ("too many SENDs held", frame("BEGIN", [("transaction", "many")], version=version) + held, 1008),
            ("too many frames", frame("SEND", [("destination", beat)], version=version) * 1_500, 1008),
            (
                "bad renewal",
                send(
                    beat, b"", ("Authorization", rng.choice(("x", "Bearer", "Bearer x", "Basic a", f"Bearer {other}")))
                ),
                1008,
            ),
        ]
        if version != "1.0":
            choices += [
                ("undefined escape", f"{raw}x:\\t{self.eol}{self.eol}\0".encode(), 1002),
                ("escape at the end", f"{raw}x:\\{self.eol}{self.eol}\0".encode(), 1002),
                ("body where none is", one("SUBSCRIBE", [("id", "new"), ("destination", QUEUES[0])], b"x"), 1002),
                ("SUBSCRIBE without id", one("SUBSCRIBE", [("destination", QUEUES[0])]), 1002),
                ("UNSUBSCRIBE without id", one("UNSUBSCRIBE", []), 1002),
            ]
        name, data, code = rng.choice(choices)
        if name in (
            "second CONNECT",
            "too many subscriptions",
            "too many SENDs held",
            "too many frames",
            "no blank line",
        ):
            receipt = None  # asked for none, or it is not said which
        return name, data, code, receipt

    def early(self) -> tuple[str, bytes, int]:
        """A start that fails."""
        rng = self.rng
        token = ("Authorization", f"Bearer {good_token(self.world, self.user)}")
        bad_beat = rng.choice(("", "1", "1,", "a,b", "1,2,3", "-1,0", "1 ,2", "9" * 19 + ",0", "٣,٣"))
        return rng.choice((
            ("before CONNECT", frame(rng.choice(("SEND", "SUBSCRIBE", "ACK", "DISCONNECT", "BEGIN")), []), 1002),
            ("no version in common", frame("CONNECT", [token, ("accept-version", rng.choice(("", "2.0", "1.3,1,x", "1.20")))]), 1002),  # noqa: E501
            ("heart-beat", frame("CONNECT", [token, ("accept-version", "1.2"), ("heart-beat", bad_beat)]), 1002),
            ("no token", frame("CONNECT", [("accept-version", "1.2"), ("login", "a"), ("passcode", "")]), 1008),
            ("bad token", frame("STOMP", [("accept-version", "1.2"), ("passcode", rng.choice(("x", "a.b.c", "é", "." * 99)))]), 1008),  # noqa: E501
            ("CONNECT with a body", frame("CONNECT", [token, ("accept-version", "1.2")], b"x"), 1002),
        ))  # fmt: skip


def stomp(rng: random.Random, world: World, user: str) -> Socket:
    """A dialogue that is right, or right up to a mistake, or mutated."""
    talk = _Dialogue(rng, world, user)
    sockjs = rng.random() < 0.15
    path = (
        f"/ws/{rng.randrange(1_000):03}/s{rng.randrange(99)}/websocket"
        if sockjs
        else rng.choice(("/ws", "/ws", "/ws/websocket"))
    )
    roll = rng.random()
    if roll < 0.08:
        name, data, code = talk.early()
        return _socket(rng, talk, name, [data], path, ends=True, codes={code})
    frames = [talk.connect(), *(talk.valid() for _ in range(rng.choice((1, 5, 30, 100, 200))))]
    if roll < 0.5:
        leaves = rng.choice(("close", "abort", "DISCONNECT"))
        last = frame(
            "DISCONNECT" if leaves == "DISCONNECT" else "SEND",
            [("destination", "/app/heartbeat"), ("receipt", PROBE)],
            version=talk.version,
        )
        talk.receipts.append(PROBE)
        return _socket(rng, talk, f"right, {leaves}", [*frames, last], path, ends=False, leaves=leaves)
    if roll < 0.54 and sockjs:
        odd = [json_text(rng) for _ in range(3)]
        framed = [ws(rng, TEXT, json.dumps([part.decode()]).encode()) for part in frames]
        framed += [ws(rng, TEXT, text.encode(errors="replace")) for text in odd] + [ws(rng, TEXT, b"[7]")]
        chunks = tuple(pieces(rng, b"".join(framed), 5))
        return Socket(
            kind="SockJS of any shape", messages=len(framed), path=path, chunks=chunks, ends=True, version=talk.version
        )
    if roll < 0.8:
        name, data, code, receipt = talk.mistake()
        codes = {code, 1008} if name == "too many SENDs held" else {code}
        return _socket(rng, talk, name, [*frames, data], path, ends=True, codes=codes, receipt=receipt)
    at = rng.randrange(len(frames))
    frames[at] = mutate(rng, frames[at])
    if rng.random() < 0.3:
        rng.shuffle(frames)
    return _socket(rng, talk, "mutated", [*frames, FLUSH], path, ends=True)


def _socket(
    rng: random.Random, talk: _Dialogue, kind: str, frames: list[bytes], path: str, *, ends: bool, **more: Any
) -> Socket:
    """Pack the frames into WebSocket messages: one each, all in one, or cut anywhere."""
    sockjs = path.count("/") == 4
    match rng.randrange(3):
        case 0:
            parts = frames
        case 1:
            parts = pieces(rng, b"".join(frames), 2)
        case _:
            parts = pieces(rng, b"".join(frames), 40)
    if sockjs:
        # In an array of strings are only whole characters: what is cut or broken goes as something else.
        texts = [part.decode(errors="replace") for part in (frames if kind != "mutated" else parts)]
        many = rng.choice((1, 3, 50))
        framed = [ws(rng, TEXT, json.dumps(texts[at : at + many]).encode()) for at in range(0, len(texts), many)]
        if kind == "headers no UTF-8":
            more["codes"], more["ends"] = set(), False
            ends = False
            kind, more["receipt"] = "mutated", None
            more["leaves"] = "abort"
            del more["ends"]
    else:
        framed = [ws(rng, _opcode(part), part) for part in parts]
    more["codes"] = frozenset(more.get("codes", ()))
    chunks = tuple(pieces(rng, b"".join(framed), rng.choice((1, 1, 8))))
    return Socket(
        kind=kind + (" by SockJS" if sockjs else ""), messages=max(len(frames), 1), path=path, chunks=chunks, ends=ends,
        receipts=() if kind == "mutated" else tuple(talk.receipts), version=talk.version, **more,
    )  # fmt: skip


def _opcode(part: bytes) -> int:
    try:
        part.decode()
    except UnicodeDecodeError:
        return BINARY
    return TEXT


_GENERATORS: Mapping[str, Callable[[random.Random, World, str], Case]] = {
    "http": http,
    "websocket": websocket,
    "stomp": stomp,
    "rest": rest,
    "token": token,
    JWKS: token,
}


def generate(seed: str, level: str, number: int, world: World) -> Case:
    """The case of this number."""
    rng = random.Random(hashlib.sha256(f"{seed}/{level}/{number}".encode()).digest())
    return _GENERATORS[level](rng, world, user_of(level, number))


def user_of(level: str, number: int) -> str:
    """Whose case it is."""
    return f"fuzz-{level}-{number % USERS}"
