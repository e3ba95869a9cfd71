"""The server that is put under load: where it listens, how long its leases are, and how a token for it is made.

The target file is the one of the contract suite (`contracts/target.toml`); what only the suite needs is not looked at.
Without a file, an address (Locust's `--host`) and the secret in `LOADTEST_SECRET` are enough.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import jwt

TARGET = "LOADTEST_TARGET"
"""Environment variable: path of the target file."""

SECRET = "LOADTEST_SECRET"  # noqa: S105 (the name of the variable)
"""Environment variable: the secret of the server, where no file names one."""

LEASE, GRACE = "LOADTEST_LEASE", "LOADTEST_GRACE"
"""Environment variables: the lease and the grace of the server in s, where no file names them."""

TOKENS = "LOADTEST_TOKENS"
"""Environment variable: a JSON file of tokens by user, which the target's command printed before."""

PLACES = ("authorization", "passcode", "upgrade")
"""Where a client shows its token: a header of CONNECT, the other header of CONNECT, or one of the HTTP upgrade."""

_LIFE = 24 * 3600
"""s: how long a token holds; longer than any run, so that none ends in it."""

_COMMANDS_AT_ONCE = 8

_COMMAND_LIMIT = 10.0
"""s: for the command that prints a token."""


class TargetError(Exception):
    """The target cannot be used as it is described: one line that names the field."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One process of the server: its base URL for REST, without a slash at the end, and where its WebSocket is."""

    http: str
    host: str
    port: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server to put under load. Times are in seconds."""

    instances: Sequence[Instance]
    lease: float = 60.0
    grace: float = 0.0
    """How long a lost connection may be away before its session ends."""
    secret: str | None = field(default=None, repr=False)
    command: Sequence[str] = ()
    """Prints a token on its standard output; `{user}` stands for the user's id."""
    claims: Mapping[str, Any] = field(default_factory=dict)
    """Further claims of the tokens that are made with the secret: `iss`, `aud`."""
    token_in: str = "authorization"  # noqa: S105 (the place of a token, not one)
    file: str | None = None
    _made: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def summary(self) -> dict[str, Any]:
        """What a report says of the target; no secrets."""
        return {
            "instances": [one.http for one in self.instances],
            "path": self.instances[0].path,
            "lease_seconds": self.lease,
            "grace_seconds": self.grace,
            "token": self.token_in,
        }

    def token(self, user: str) -> str:
        """An access token for a user. One that the target's command prints is kept: it blocks while the command runs.

        Raises:
            TargetError: the command failed.
        """
        if self.secret is not None:
            return self._signed(user)  # made in less time than it would need memory
        found = self._made.get(user)
        if found is None:
            found = self._made[user] = self._printed(user)
        return found

    def printed(self, users: Iterable[str]) -> dict[str, str]:
        """New tokens of users by the target's command, some at a time.

        Raises:
            TargetError: the command failed.
        """
        users = list(users)
        with ThreadPoolExecutor(_COMMANDS_AT_ONCE) as pool:
            try:
                return dict(zip(users, pool.map(self._printed, users), strict=True))
            except TargetError:
                pool.shutdown(cancel_futures=True)
                raise

    def _signed(self, user: str) -> str:
        assert self.secret is not None
        now = int(time.time())
        return jwt.encode({**self.claims, "sub": user, "iat": now, "exp": now + _LIFE}, self.secret, algorithm="HS256")

    def _printed(self, user: str) -> str:
        command = [part.replace("{user}", user) for part in self.command]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_LIMIT, check=False)
        except subprocess.TimeoutExpired:
            raise TargetError(f"token.command: printed no token within {_COMMAND_LIMIT:g} s") from None
        except OSError as error:
            raise TargetError(f"token.command: {command[0]}: {error.strerror}") from error
        token = done.stdout.strip()
        if done.returncode or not token:
            said = done.stderr.strip().splitlines()
            raise TargetError(f"token.command: exit {done.returncode}, {said[-1] if said else 'no token printed'}")
        return token


def load(path: str | Path | None = None, *, host: str | None = None) -> Target:
    """The target of a file, of the environment, or of an address.

    Args:
        path: the target file; without it, the one that `LOADTEST_TARGET` names.
        host: the base URL, like Locust's `--host`; it replaces the instances of the file.

    Raises:
        TargetError: it cannot be read, a field is wrong, or there is not enough to go by.
    """
    path = path or os.environ.get(TARGET) or None
    if path is None:
        times = {"lease": _seconds(LEASE, "60"), "grace": _seconds(GRACE, "0")}
        raw: dict[str, Any] = {**times, "token": {"secret": os.environ.get(SECRET)}}
        if host is None:
            raise TargetError(f"no server is named: give a target file (--target, or {TARGET}), or --host http://…")
        if not os.environ.get(SECRET):
            raise TargetError(f"no way to make tokens: give a target file (--target, or {TARGET}), or set {SECRET}")
        return _target(None, raw, host)
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: {error}") from error
    try:
        return _target(str(path), raw, host)
    except TargetError as error:
        raise TargetError(f"{path}: {error}") from None


def _seconds(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        return float(text)
    except ValueError:
        raise TargetError(f"{name}: {text!r} is no number of seconds") from None


def _target(file: str | None, raw: Mapping[str, Any], host: str | None) -> Target:
    connection, token = (_take(raw, name, dict, {}) for name in ("connection", "token"))
    path = _take(connection, "path", str, "/ws", "connection.")
    if not path.startswith("/"):
        raise TargetError("connection.path: must begin with a slash")
    if _take(connection, "transport", str, "raw", "connection.") == "sockjs":
        path += "/websocket"  # SockJS's own entrance for plain WebSockets: the same STOMP, without the arrays
    described = [{"http": host}] if host is not None else _take(raw, "instances", list, [])
    if not described:
        raise TargetError("instances: at least one [[instances]] with its http is needed")
    lease = _take(raw, "lease", (int, float), 60.0)
    if not 0 < lease < float("inf"):
        raise TargetError("lease: must be a number of seconds above 0")
    grace = _take(raw, "grace", (int, float), 0.0)
    if not 0 <= grace < float("inf"):
        raise TargetError("grace: must be a number of seconds, 0 or more")
    secret, command = _take(token, "secret", str, None, "token."), _take(token, "command", list, [], "token.")
    if (secret is None) == (not command):
        raise TargetError("token: give either 'secret' or 'command'")
    if secret is not None and len(secret.encode()) < 32:
        raise TargetError(f"{'token.secret' if file else SECRET}: HS256 needs 32 bytes or more")
    if not all(isinstance(word, str) for word in command):
        raise TargetError("token.command: must be an array of strings")
    place = _take(token, "in", str, "authorization", "token.")
    if place not in PLACES:
        raise TargetError(f"token.in: {place!r} is none of {', '.join(PLACES)}")
    made = os.environ.get(TOKENS) if command else None
    return Target(
        _made=json.loads(Path(made).read_text(encoding="utf-8")) if made else {},
        instances=[
            _instance(one, "--host" if host else f"instances[{at}]", path) for at, one in enumerate(described, 1)
        ],
        lease=float(lease),
        grace=float(grace),
        secret=secret,
        command=command,
        claims=_take(token, "claims", dict, {}, "token."),
        token_in=place,
        file=file,
    )


def _instance(raw: Any, name: str, path: str) -> Instance:
    if not isinstance(raw, dict):
        raise TargetError(f"{name}: must be a table")
    where = "" if name == "--host" else ".http"
    http = _take(raw, "http", str, None, f"{name}.")
    if http is None:
        raise TargetError(f"{name}{where}: is missing")
    base = _url(http, f"{name}{where}", ("http", "https"))
    websocket = _take(raw, "websocket", str, None, f"{name}.")
    ws = base if websocket is None else _url(websocket, f"{name}.websocket", ("ws", "wss"))
    if ws.scheme in {"https", "wss"}:
        # The crowd's sockets are plain: what TLS costs, the generator would pay as well, and be the limit.
        raise TargetError(f"{name}: TLS is not spoken here; name an address behind what ends it")
    assert ws.hostname is not None
    return Instance(http.rstrip("/"), ws.hostname, ws.port or 80, ws.path.rstrip("/") + path)


def _url(text: str, name: str, schemes: Sequence[str]) -> SplitResult:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in schemes and parts.hostname and parts.port != 0 and not parts.query + parts.fragment
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise TargetError(f"{name}: {text!r} is no URL of the kind {schemes[0]}://host:port")
    return parts


def _take(raw: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any, table: str = "") -> Any:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = _KINDS[kind if isinstance(kind, type) else kind[0]]
        raise TargetError(f"{table}{name}: must be {expected}")
    return value


_KINDS: dict[type, str] = {str: "text", int: "a number", list: "an array", dict: "a table"}
