"""Access tokens (WIRE §1): who is asking, and until when that holds."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import secrets
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from presence.core.model import ID
from presence.ports import Unavailable

LEEWAY_SECONDS = 10
MIN_SECRET_BYTES = 32
KNOWN_TOKENS = 1_000
"""Tokens kept as verified: whoever asks over REST brings the same one again and again."""
FETCH_SECONDS = 5.0
MAX_JWKS_BYTES = 1_048_576
UNKNOWN_KEY_SECONDS = 60.0
"""WIRE §1: "an unknown kid fetched again at most once a minute"."""
NO_KEYS_SECONDS = 1.0
"""The least time between two fetches as long as no keys are known."""
STALE_KEYS_SECONDS = 3600.0
"""Keys from a URL are fetched again after this time, so that one that was withdrawn does not hold for ever."""

_UNREADABLE = (OSError, http.client.HTTPException, ValueError, RecursionError)
_ALGORITHMS = {("RSA", None): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
_REASONS: Mapping[type[Exception], str] = {
    jwt.InvalidSignatureError: "bad signature",
    jwt.InvalidAlgorithmError: "algorithm not accepted",
    jwt.ImmatureSignatureError: "token not valid yet",
    jwt.InvalidIssuerError: "wrong iss",
    jwt.InvalidAudienceError: "wrong aud",
}

log = logging.getLogger(__name__)


class InvalidToken(Exception):
    """The token is refused. The text is a short reason, safe to show."""


class KeysUnavailable(Unavailable):
    """No key is known and none can be had now: whether a token is good is unknown."""


class SecretError(Exception):
    """The secret cannot be used. One line."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a verified token says."""

    user: str
    expires_at: float
    """Its ``exp``, Unix epoch in s. It is accepted until 10 s later."""


class TokenVerifier:
    """Verifies tokens with one HS256 secret, or with the public keys of a JWKS.

    Args:
        secret: at least 32 bytes.
        jwks: file or http(s) URL of a JWKS, in place of a secret.
        issuer, audience: the ``iss`` and ``aud`` a token must have; None: not looked at.

    Raises:
        SecretError: the secret is too short or is no secret.
        KeysUnavailable: the JWKS file cannot be read.
    """

    def __init__(
        self,
        *,
        secret: bytes | None = None,
        jwks: str | None = None,
        issuer: str | None = None,
        audience: str | None = None,
    ) -> None:
        if (secret is None) == (jwks is None):
            raise ValueError("either a secret or a JWKS")
        self._key: bytes | _Keys
        if jwks is None:
            self._key = check_secret(secret or b"")
        else:
            self._key = _UrlKeys(jwks) if jwks.startswith(("http://", "https://")) else _FileKeys(Path(jwks))
        self._known: dict[str, Token] = {}  # verified with the secret, which does not change
        self._claims: dict[str, Any] = {"issuer": issuer, "audience": audience, "leeway": LEEWAY_SECONDS}
        self._claims["options"] = {
            "require": ["exp", "sub"],
            "verify_exp": False,  # looked at below: PyJWT rounds fractions down
            "verify_sub": False,  # looked at below as well
            "verify_iat": False,
            "verify_jti": False,
            "verify_aud": audience is not None,
        }

    async def verify(self, token: str, *, again: bool = False) -> Token:
        """Return what the token says; ``again``: it may well be asked again.

        Raises:
            InvalidToken: it is refused.
            KeysUnavailable: no keys are known.
        """
        now = time.time()
        if (known := self._known.get(token)) is not None and now < known.expires_at + LEEWAY_SECONDS:
            return known
        verified = await self._verify(token, now)
        if again and isinstance(self._key, bytes) and len(token) <= 1_024:  # keys of a JWKS may be withdrawn
            if len(self._known) >= KNOWN_TOKENS:
                self._known.clear()
            self._known[token] = verified
        return verified

    async def _verify(self, token: str, now: float) -> Token:
        try:
            if isinstance(self._key, bytes):
                claims = jwt.decode(token, self._key, algorithms=["HS256"], **self._claims)
            else:
                header = jwt.get_unverified_header(token)
                key = await self._key.find(header.get("kid"), header.get("alg"))
                claims = jwt.decode(token, key, algorithms=[key.algorithm_name], **self._claims)
        except jwt.MissingRequiredClaimError as error:
            raise InvalidToken(f"{error.claim} is missing") from None
        except (jwt.PyJWTError, ValueError) as error:
            raise InvalidToken(_REASONS.get(type(error), "malformed token")) from None
        user, expires = claims["sub"], claims["exp"]
        if type(expires) not in (int, float) or not abs(expires) < 2**53:
            raise InvalidToken("exp is not a time")
        if expires + LEEWAY_SECONDS <= now:
            raise InvalidToken("token expired")
        if not isinstance(user, str) or not ID.fullmatch(user):
            raise InvalidToken("sub is not a user id")
        return Token(user, float(expires))


class _Keys:
    """The usable keys of a JWKS."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._keys: list[jwt.PyJWK] = []

    async def find(self, kid: object, algorithm: object) -> jwt.PyJWK:
        """Return the key named ``kid`` for the algorithm. Without a ``kid``, the only one that there is for it."""
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS.values():
            raise InvalidToken("algorithm not accepted")
        await self._refresh()
        if (key := self._pick(kid, algorithm)) is None:
            await self._refresh(unknown=True)
            key = self._pick(kid, algorithm)
        if not self._keys:
            raise KeysUnavailable(f"no keys could be read from {self.source}")
        if key is None:
            raise InvalidToken("unknown key")
        return key

    def _pick(self, kid: object, algorithm: str) -> jwt.PyJWK | None:
        fitting = [key for key in self._keys if key.algorithm_name == algorithm and kid in (key.key_id, None)]
        return fitting[0] if len(fitting) == 1 else None

    async def _refresh(self, *, unknown: bool = False) -> None:
        raise NotImplementedError

    def _load(self, text: bytes) -> None:
        """Take over the keys in ``text``; ValueError when there are none that could be used."""
        document = json.loads(text)
        entries = document.get("keys") if isinstance(document, dict) else None
        keys = [key for entry in entries if (key := _usable(entry))] if isinstance(entries, list) else []
        if not keys:
            raise ValueError("there is no key for RS256, ES256 or EdDSA in it")
        self._keys = keys

    def _keep(self, error: Exception) -> None:
        log.warning("JWKS %s cannot be read, %d known keys are kept: %s", self.source, len(self._keys), _line(error))


class _FileKeys(_Keys):
    """Read again when the file changes."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._seen = _stamp(path)
        try:
            self._load(path.read_bytes())
        except _UNREADABLE as error:
            raise KeysUnavailable(f"JWKS {path} cannot be read: {_line(error)}") from None

    async def _refresh(self, *, unknown: bool = False) -> None:
        if (stamp := _stamp(self._path)) != self._seen:
            self._seen = stamp
            try:
                self._load(await asyncio.to_thread(self._path.read_bytes))
            except _UNREADABLE as error:
                self._keep(error)


class _UrlKeys(_Keys):
    """Fetched when first needed, when a key is unknown and, meanwhile going on with the old ones, when stale."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._tried = float("-inf")  # when the last fetch ended, monotonic s
        self._fetching: asyncio.Task[None] | None = None

    async def _refresh(self, *, unknown: bool = False) -> None:
        pause = NO_KEYS_SECONDS if not self._keys else UNKNOWN_KEY_SECONDS if unknown else STALE_KEYS_SECONDS
        if self._fetching is None and time.monotonic() - self._tried >= pause:
            self._fetching = asyncio.create_task(self._fetch())
        if self._fetching is not None and (unknown or not self._keys):
            await asyncio.shield(self._fetching)  # it is everybody's: one client that leaves does not end it

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                self._load(await asyncio.to_thread(_get, self.source))
        except _UNREADABLE as error:
            self._keep(error)
        finally:
            self._tried = time.monotonic()
            self._fetching = None


def _get(url: str) -> bytes:
    deadline = time.monotonic() + FETCH_SECONDS
    text = b""
    with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as response:
        while chunk := response.read1(65_536):
            text += chunk
            if len(text) > MAX_JWKS_BYTES or time.monotonic() > deadline:
                raise OSError("the answer is too large or too slow")
    return text


def _usable(entry: Any) -> jwt.PyJWK | None:
    """Return the public key, bound to the algorithm of its type; None if it is none of ours."""
    try:
        # WIRE §1: "algorithm bound to the key's type, `oct` keys ignored"
        algorithm = _ALGORITHMS[entry["kty"], entry.get("crv")]
        if entry.get("alg", algorithm) != algorithm or entry.get("use", "sig") != "sig":
            return None
        key = jwt.PyJWK({name: entry[name] for name in entry if name != "d"}, algorithm)
        return None if key.Algorithm.check_key_length(key.key) else key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        return None


def bearer(header: str | None) -> str | None:
    """Return the token of an ``Authorization`` header, None when it holds none."""
    scheme, _, token = (header or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def make_token(
    secret: bytes, user: str, ttl_seconds: float, issuer: str | None = None, audience: str | None = None, *, now: float
) -> str:
    """Return an HS256 token for ``user`` that ends ``ttl_seconds`` after ``now`` (Unix epoch in s)."""
    claims = {"sub": user, "exp": now + ttl_seconds, "iss": issuer, "aud": audience}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, secret, "HS256")


def check_secret(secret: bytes) -> bytes:
    """Return the secret if it can be one: at least 32 bytes (WIRE §1), and not a public key by mistake."""
    if len(secret) < MIN_SECRET_BYTES:
        raise SecretError(f"the JWT secret must be at least {MIN_SECRET_BYTES} bytes long")
    try:
        return jwt.get_algorithm_by_name("HS256").prepare_key(secret)  # type: ignore[no-any-return]
    except jwt.InvalidKeyError:
        raise SecretError("the JWT secret is a key or certificate of another kind; use JWKS for those") from None


def secret_of(explicit: str | None, data_dir: Path) -> bytes:
    """Return the HS256 secret: ``explicit``, or else the one in ``<data_dir>/jwt-secret``, made when missing.

    Raises:
        SecretError: it is too short, or the file can neither be read nor made.
    """
    if explicit is not None:
        return check_secret(os.fsencode(explicit))  # any bytes: the environment need not be UTF-8
    path = data_dir / "jwt-secret"
    try:
        if not path.exists():
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create(path, secrets.token_urlsafe(48).encode())
        return check_secret(path.read_bytes().strip())
    except OSError as error:
        raise SecretError(f"{path} cannot be used: {_line(error)}") from None
    except SecretError as error:
        raise SecretError(f"{path}: {error}") from None


def _create(path: Path, content: bytes) -> None:
    """Make the file (0600), complete from its first moment on; when another process was faster, its file stays."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when the file does; None while there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
