"""The target file: which server is verified, what it claims, and how a token for it is made."""

from __future__ import annotations

import json
import math
import re
import ssl
import subprocess
import tempfile
import threading
import time
import tomllib
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt

from contracts.faults import Misused
from contracts.model import Class

FEATURES = (
    "sockjs",
    "stomp-1.0",
    "stomp-1.1",
    "transactions",
    "ack",
    "token-renewal",
    "passcode",
    "upgrade-token",
    "english",
    "conversations",
    "friends",
    "cors",
    "snapshots",
    "heart-beats",
    "limits",
)
"""What a target may declare as unsupported."""

HOOKS = (
    "kill-instance",
    "restart-instance",
    "stop-instance",
    "freeze-instance",
    "thaw-instance",
    "stop-store",
    "empty-store",
    "start-store",
)
"""What a command of the target may do: kill -9, start, stop as planned, SIGSTOP, SIGCONT; the store away and back."""

TOKENS = (
    "valid", "absent", "garbage", "expired", "wrong-secret", "alg-none", "alg-other", "no-exp", "no-sub", "bad-sub",
    "not-yet", "soon", "other-iss", "other-aud",
)  # fmt: skip
SECRETLESS = frozenset({"valid", "absent", "garbage"})
"""The kinds that can be had without the secret."""

MOST_SLACK = 0.6
"""Leases. A departure must be told within a quarter of a lease; what takes a whole one is its end."""

TOKEN_IN = ("authorization", "passcode", "upgrade")
_HOUR = 3600
_BEYOND, _WITHIN = 15, 5
"""s: more and less than the leeway of 10 s, by more than clocks are apart."""
_COMMAND_LIMIT = 10.0
"""s: for the command that prints a token."""
_COMMANDS = 4
"""So many of them run at once."""
_PRINTED = re.compile(r"""[!#-&(-\[\]-~]+""")
"""A token that a command prints: ASCII, but no spaces, and no quotes and backslashes, which JSON would change."""


class TargetError(Exception):
    """The target file is wrong: one line that names the field."""


@dataclass(frozen=True)
class Instance:
    """The base URLs of one server instance, without a slash at the end."""

    http: str
    websocket: str


@dataclass(frozen=True)
class Target:
    """A server to be verified. The fields are those of the file; times are in seconds."""

    file: str
    conformance: Class
    instances: Sequence[Instance]
    lease: float = 60.0
    slack: float = 1.0
    policy: str = "anyone"
    unsupported: frozenset[str] = frozenset()
    ids: str = "text"
    """How ids are spelled: "text" or "uuid"."""
    path: str = "/ws"
    transport: str = "raw"
    parallel: int = 40
    ca: str | None = None
    """A file of certificates (PEM): with https and wss they are trusted, and no other; None: those of the system."""
    secret: str | None = None
    command: Sequence[str] = ()
    """Prints a token on its standard output; `{user}` stands for the user's id."""
    claims: Mapping[str, Any] = field(default_factory=dict)
    """Further claims of the tokens that are made with the secret: `iss`, `aud`."""
    token_in: str = "authorization"  # noqa: S105 (the place of a token, not one)
    directory_loaded: bool = False
    hooks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def spelled(self, name: str) -> str:
        """The id of a user or a conversation as this server takes it; the same name has the same id in all runs."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, name)) if self.ids == "uuid" else name

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """How https and wss are spoken."""
        return ssl.create_default_context(cafile=self.ca)

    @property
    def summary(self) -> dict[str, Any]:
        """What a report says of the target; no secrets."""
        return {
            "class": self.conformance.value,
            "lease": self.lease,
            "slack": self.slack,
            "policy": self.policy,
            "instances": [one.http for one in self.instances],
            "websocket": [one.websocket + self.path for one in self.instances],
            "transport": self.transport,
            "unsupported": sorted(self.unsupported),
            "ids": self.ids,
            "token": "command" if self.secret is None else "secret",
            "claims": sorted(self.claims),
            "directory": self.directory_loaded,
            "hooks": sorted(self.hooks),
        }


def load_target(path: str | Path) -> Target:
    """Read a target file.

    Raises:
        TargetError: it cannot be read, or a field is wrong.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: {error}") from error
    try:
        return _target(str(path), raw)
    except ValueError as error:
        raise TargetError(f"{path}: {error}") from error


def _lease(top: _Table) -> float:
    if top.number("grace", 0.0, above=None):
        raise ValueError("grace: the cases need a server with none, as it is by default")
    return top.number("lease", 60.0, above=0)


def _slack(top: _Table) -> float:
    most = MOST_SLACK * top.number("lease", 60.0, above=0)
    slack = top.number("slack", min(1.0, most), above=None)
    if slack > most:
        # With more, the end of a lease could pass for that of a connection.
        raise ValueError(f"slack: must be at most {MOST_SLACK} leases, here {most:g} s")
    return slack


def _ca(top: _Table, folder: Path) -> str | None:
    """The file of the certificates, from the folder of the target file, once it is seen to hold some."""
    name = top.take("ca", str, None)
    if name is None:
        return None
    path = folder / name
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise ValueError(f"ca: {path}: has no certificates in PEM") from error
    except OSError as error:
        raise ValueError(f"ca: {path}: {error.strerror}") from error
    return str(path)


def _target(file: str, raw: dict[str, Any]) -> Target:
    """Raises ValueError: what is wrong, with the field's name."""
    top = _Table("", raw)
    connection, token, directory = (top.table(name) for name in ("connection", "token", "directory"))
    hooks = top.table("hooks")
    made = Target(
        file=file,
        conformance=Class(top.choice("class", [one.value for one in Class])),
        instances=[_instance(one, at) for at, one in enumerate(top.take("instances", list, []), 1)],
        lease=_lease(top),
        slack=_slack(top),
        policy=top.choice("policy", ["anyone", "contacts"], "anyone"),
        unsupported=frozenset(top.choices("unsupported", FEATURES)),
        ids=top.choice("ids", ["text", "uuid"], "text"),
        parallel=top.take("parallel", int, 40),
        ca=_ca(top, Path(file).parent),
        path=connection.take("path", str, "/ws"),
        transport=connection.choice("transport", ["raw", "sockjs"], "raw"),
        secret=token.take("secret", str, None),
        command=token.texts("command"),
        claims=_claims(token.take("claims", dict, {})),
        token_in=token.choice("in", TOKEN_IN, "authorization"),
        directory_loaded=directory.take("loaded", bool, False),
        hooks={name: hooks.texts(name) for name in HOOKS if name in hooks.raw},
    )
    for table in (connection, token, directory, hooks, top):
        table.no_more()
    if not made.instances:
        raise ValueError("instances: at least one [[instances]] with its http is needed")
    _distinct(made.instances)
    if made.parallel < 1:
        raise ValueError("parallel: must be 1 or more")
    if not made.path.startswith("/"):
        raise ValueError("connection.path: must begin with a slash")
    if (made.secret is None) == (not made.command):
        raise ValueError("token: give either 'secret' or 'command'")
    if made.secret is not None and len(made.secret.encode()) < 32:
        raise ValueError("token.secret: HS256 needs 32 bytes or more")
    for name, command in made.hooks.items():
        if not command:
            raise ValueError(f"hooks.{name}: is empty; leave it out when there is no command")
    if made.secret is not None:
        try:
            TokenMaker(made).make("ann")
        except (jwt.PyJWTError, TypeError, ValueError) as error:
            raise ValueError(f"token: no token can be made: {error}") from error
    if made.transport == "sockjs" and "sockjs" in made.unsupported:
        raise ValueError("connection.transport: 'sockjs' is among 'unsupported'")
    return made


def _claims(raw: dict[str, Any]) -> dict[str, Any]:
    """The further claims, once they are seen to be what a token can hold."""
    for name, value in raw.items():
        where = f"token.claims.{name}"
        if name in {"sub", "iat", "exp"}:
            raise ValueError(f"{where}: the runner sets it itself")
        if name == "iss" and not isinstance(value, str):
            raise ValueError(f"{where}: must be text")
        audience = value if isinstance(value, list) else [value]
        if name == "aud" and not all(isinstance(one, str) for one in audience):
            raise ValueError(f"{where}: must be text, or an array of strings")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: must be a value that JSON has") from error
    return raw


def _instance(raw: Any, number: int) -> Instance:
    name = f"instances[{number}]"
    if not isinstance(raw, dict):
        raise ValueError(f"{name}: must be a table")  # noqa: TRY004 (all faults of the file are of one kind)
    table = _Table(name, raw)
    http = table.url("http", ["http", "https"])
    if http is None:
        raise ValueError(f"{name}.http: is missing")
    websocket = table.url("websocket", ["ws", "wss"]) or re.sub("^http", "ws", http)
    table.no_more()
    return Instance(http, websocket)


def _distinct(instances: Sequence[Instance]) -> None:
    """Raises ValueError for an instance that is named twice: it would pass for two that share a store."""
    for name in ("http", "websocket"):
        seen: dict[str, int] = {}
        for number, one in enumerate(instances, 1):
            first = seen.setdefault(_origin(getattr(one, name)), number)
            if first != number:
                raise ValueError(
                    f"instances[{number}].{name}: is that of instances[{first}]; each must be another process"
                )


def _origin(url: str) -> str:
    """A URL as all its spellings have it: the host in small letters, one for this machine, the port written out."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in {"localhost", "::1"} else parts.hostname
    port = parts.port or (443 if parts.scheme in {"https", "wss"} else 80)
    return f"{parts.scheme}://{host}:{port}{parts.path}"


class _Table:
    """A table of the file, read field by field; whatever was not read is unknown."""

    def __init__(self, name: str, raw: dict[str, Any]) -> None:
        self.name = name
        self.raw = raw
        self._read: set[str] = set()

    def at(self, field_name: str) -> str:
        return f"{self.name}.{field_name}" if self.name else field_name

    def take(self, name: str, kind: type, default: Any) -> Any:
        self._read.add(name)
        value = self.raw.get(name, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ValueError(f"{self.at(name)}: must be {_KINDS[kind]}")
        return value

    def table(self, name: str) -> _Table:
        return _Table(name, self.take(name, dict, {}))

    def number(self, name: str, default: float, *, above: float | None) -> float:
        self._read.add(name)
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:  # infinity, and NaN
            raise ValueError(f"{self.at(name)}: must be a number of seconds")
        if value < 0 or (above is not None and value <= above):
            least = "0 or more" if above is None else f"above {above:g}"
            raise ValueError(f"{self.at(name)}: must be {least}")
        return float(value)

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        value = self.take(name, str, default)
        if value is None:
            raise ValueError(f"{self.at(name)}: is missing; one of {', '.join(allowed)}")
        if value not in allowed:
            raise ValueError(f"{self.at(name)}: {value!r} is none of {', '.join(allowed)}")
        return str(value)

    def choices(self, name: str, allowed: Sequence[str]) -> list[str]:
        values = self.texts(name)
        for value in values:
            if value not in allowed:
                raise ValueError(f"{self.at(name)}: {value!r} is none of {', '.join(allowed)}")
        return values

    def texts(self, name: str) -> list[str]:
        values = self.take(name, list, [])
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.at(name)}: must be an array of strings")
        return list(values)

    def url(self, name: str, schemes: Sequence[str]) -> str | None:
        value = self.take(name, str, None)
        if value is None:
            return None
        if "@" in value:
            # It would stand in every report; what is wrong with it does not name it either.
            raise ValueError(f"{self.at(name)}: must hold no user name and no password")
        shown = value.partition("?")[0]
        wrong = ValueError(f"{self.at(name)}: {shown!r} is no URL of the kind {schemes[0]}://host:port")
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError as error:
            raise wrong from error
        if parts.scheme not in schemes or not parts.hostname or port == 0 or parts.query or parts.fragment:
            raise wrong
        return str(value).rstrip("/")

    def no_more(self) -> None:
        """Raises ValueError for a field that nobody read."""
        for name in self.raw:
            if name not in self._read:
                raise ValueError(f"{self.at(name)}: is unknown")


_KINDS: dict[type, str] = {str: "text", int: "an integer", bool: "true or false", list: "an array", dict: "a table"}


def call(name: str, command: Sequence[str], limit: float) -> bytes:
    """Run a command of the target until it has ended, whatever it leaves running.

    Args:
        name: the field of the target file, for messages.
        limit: s.

    Returns:
        its standard output.

    Raises:
        Misused: it failed. Only the program is named: arguments and output may hold secrets.
    """
    program = f"{name}: {Path(command[0]).name}"
    # A file: a pipe would be at its end only when every child that holds it has ended, too.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Misused(f"{program}: not over after {limit:g} s") from error
        except OSError as error:
            raise Misused(f"{program}: {error.strerror}") from error
        except ValueError as error:  # a NUL in a word
            raise Misused(f"{program}: {error}") from error
        if done.returncode:
            raise Misused(f"{program}: exit {done.returncode}; its output is not shown, as it may hold secrets")
        output.seek(0)
        return output.read()


class TokenMaker:
    """Tokens for a target, good ones and bad ones: one for all cases of a run. It may be used by many threads."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._printed: dict[str, str] = {}
        self._places = threading.BoundedSemaphore(_COMMANDS)

    def make(self, user: str, kind: str = "valid") -> str | None:
        """A token; it may block while the target's command runs.

        Args:
            kind: one of `TOKENS`, or "ends: 2s": with a life of 2 s, rounded up to a whole second of the clock.

        Returns:
            None for "absent".

        Raises:
            Misused: the kind needs the secret, and the target has none; or the command failed.
        """
        if kind == "absent":
            return None
        if kind == "garbage":
            return "not.a.token"
        if self._target.secret is None:
            if kind != "valid":
                raise Misused(f"a token of the kind {kind!r} needs the target's secret")
            return self._print(user)
        return self._signed(user, kind, self._target.secret)

    def _signed(self, user: str, kind: str, secret: str) -> str:
        now = int(time.time())
        claims = {**self._target.claims, "sub": user, "iat": now, "exp": now + _HOUR}
        key, algorithm = secret, "HS256"
        if kind.startswith("ends: "):
            claims["exp"] = math.ceil(time.time() + float(kind.removeprefix("ends: ").removesuffix("s")))
        elif kind == "expired":
            claims |= {"iat": now - _HOUR, "exp": now - _BEYOND}
        elif kind == "wrong-secret":
            key = secret[::-1] + "?"
        elif kind == "alg-none":
            key, algorithm = "", "none"
        elif kind == "alg-other":
            algorithm = "HS512"
        elif kind in {"no-exp", "no-sub"}:
            del claims[kind.removeprefix("no-")]
        elif kind == "bad-sub":
            claims["sub"] = f"no id: {user}"
        elif kind == "not-yet":
            claims["nbf"] = now + _BEYOND
        elif kind == "soon":
            claims["nbf"] = now + _WITHIN
        elif kind in {"other-iss", "other-aud"}:
            claims[kind.removeprefix("other-")] = "https://elsewhere.example"
        elif kind != "valid":
            raise Misused(f"there is no token of the kind {kind!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is short for HS512 is right for HS256
            return jwt.encode(claims, key, algorithm=algorithm)

    def _print(self, user: str) -> str:
        # The command's limit counts from its start, not from the wait for a place.
        with self._places:
            if user not in self._printed:
                command = [part.replace("{user}", user) for part in self._target.command]
                token = call("token.command", command, _COMMAND_LIMIT).strip().decode(errors="replace")
                if not _PRINTED.fullmatch(token):
                    raise Misused("token.command: must print one token on one line, in ASCII, without quotes")
                self._printed[user] = token
            return self._printed[user]
