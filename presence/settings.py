"""Every option once: its name, default, unit and meaning (DESIGN §5); and how they go together."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis import ConnectionPool, RedisError

from presence.core import redis_url

PREFIX = "PRESENCE_"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]@]+)(?::(\d{1,5}))?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,]+")

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
SecondsOrNone = Annotated[float, Field(ge=0)]  # 0: none at all


class SettingsError(Exception):
    """A setting is wrong. One line, which names it as an environment variable."""


class Settings(BaseSettings):
    """The settings of one server; each is read from ``PRESENCE_`` + its name in upper case."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    workers: Count = Field(1, description="Processes on that port; each is an instance.")
    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("presence"),
        description="Folder of the embedded stores and the generated secret.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="text, or json: one object a line.")

    jwt_secret: str | None = Field(
        None, repr=False, description="HS256 secret of at least 32 bytes; none: generated in the data folder."
    )
    jwks: str | None = Field(None, description="File or http(s) URL of the public keys for RS256, ES256, EdDSA.")
    jwt_issuer: str | None = Field(None, description="The `iss` a token must have.")
    jwt_audience: str | None = Field(None, description="The `aud` a token must have.")
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins of browsers allowed besides the server's own host, separated by commas; also for CORS."
    )

    lease_seconds: float = Field(60.0, ge=1, description="How long a session lives without a heartbeat, s.")
    lease_renewed_by: Literal["heartbeat", "connection"] = Field(
        "heartbeat", description="What renews a lease: heartbeats, or the open connection itself."
    )
    grace_seconds: SecondsOrNone = Field(0.0, description="Lease left after a lost connection, s.")
    drain_seconds: SecondsOrNone = Field(15.0, description="Lease left at a planned stop, s.")
    silence_seconds: SecondsOrNone = Field(
        90.0, description="Least silence after which a connection counts as lost, s; 0: the heart-beats alone decide."
    )
    beat_seconds: Seconds = Field(10.0, description="Interval of the STOMP heart-beats offered to clients, s.")
    ping_seconds: Seconds = Field(20.0, description="Interval of WebSocket pings, s.")
    tcp_user_timeout_seconds: Seconds = Field(
        45.0, le=86_400, description="Time after which a TCP connection without answer ends, s."
    )
    connect_seconds: Seconds = Field(10.0, description="Time in which the CONNECT frame must come, s.")
    send_seconds: Seconds = Field(10.0, description="Time in which a client must take in what it is sent, s.")

    watch_policy: Literal["anyone", "contacts"] = Field("anyone", description="Who may see whom.")
    directory: str | None = Field(
        None,
        description="Who is whose friend: a JSON file, re-read when changed; `cassandra`; or the http(s) base URL of "
        "the host application; none: demo data.",
    )
    directory_cache_seconds: float = Field(
        5.0, ge=0, le=10, description="How old an answer of the host application may be, s."
    )

    redis_url: str | None = Field(
        None,
        repr=False,
        description="Redis or Valkey: redis://, rediss://, unix://, redis+cluster://host:port,… or "
        "redis+sentinel://host:port,…/service (rediss+… for TLS); none: an embedded one.",
    )
    redis_partitions: Count = Field(1, description="Partitions of the keys, when one Redis is not enough.")
    kafka_bootstrap_servers: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Kafka, host:port separated by commas; none: each instance reads the changes from Redis."
    )
    kafka_topic: str = Field("user.presence.status", description="Topic of the changes.")
    kafka_fallback_seconds: SecondsOrNone = Field(
        0.0, description="Kafka away for so long: changes are told straight from Redis, s; 0: never."
    )
    cassandra_contact_points: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Cassandra, host or host:port separated by commas; none: SQLite in the data folder."
    )
    cassandra_keyspace: str = Field("presence", description="Keyspace of the tables.")
    cassandra_datacenter: str = Field("datacenter1", description="Local datacenter.")
    cassandra_user: str | None = Field(None, description="User name, with PRESENCE_CASSANDRA_PASSWORD.")
    cassandra_password: str | None = Field(None, repr=False, description="Password.")
    history_days: int = Field(30, ge=1, le=3_650, description="How long a user's changes are kept, days.")
    store_timeout_seconds: Seconds = Field(2.0, description="Time limit of one question to a store, s.")
    amnesty_seconds: SecondsOrNone = Field(5.0, description="After a store came back, time without any offline, s.")
    changes_keep_seconds: Seconds = Field(60.0, description="How long changes are kept for slow readers, s.")
    changes_cap: Count = Field(200_000, description="Changes kept at most.")
    cleanup_seconds: Seconds = Field(300.0, description="Interval of the cleanup, s.")
    stats_seconds: Seconds = Field(60.0, description="Interval at which the count of online users is logged, s.")

    max_connections: Count | None = Field(None, description="Connections of a process; none: open-file limit - 512.")
    max_user_connections: Count = Field(50, description="Open connections of a user, over all instances.")
    max_frame_bytes: Count = Field(65_536, description="Size of a STOMP frame, bytes.")
    max_message_bytes: Count = Field(1_048_576, description="Size of a WebSocket message, bytes.")
    max_header_lines: Count = Field(64, description="Header lines of a STOMP frame.")
    max_header_line_bytes: Count = Field(8_192, description="Length of a STOMP header line, bytes.")
    max_subscriptions: Count = Field(16, description="Subscriptions of a connection.")
    max_held_sends: Count = Field(100, description="SENDs held by the open transactions of a connection.")
    max_frames_per_second: Count = Field(100, description="Frames a second of a connection, sustained.")
    max_frames_burst: Count = Field(400, description="Frames of a connection at once.")
    max_ids_per_second: Count = Field(5_000, description="Ids a second and user, sustained; REST and STOMP together.")
    max_ids_burst: Count = Field(10_000, description="Ids of a user at once.")
    max_ids_per_request: Count = Field(1_000, description="Ids in one batch or one frame.")
    max_watches: Count = Field(5_000, description="Users that one session watches.")
    max_subscribes_per_second: Count = Field(
        4, description="SUBSCRIBEs a second, once more than 1,000 users are watched."
    )
    max_body_bytes: Count = Field(262_144, description="Size of a request body, bytes.")

    @field_validator("allowed_origins", "kafka_bootstrap_servers", "cassandra_contact_points", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        origins = tuple(origin.lower() for origin in value)
        if wrong := next((origin for origin in origins if not _ORIGIN.fullmatch(origin)), None):
            raise ValueError(f"must list origins like https://app.example:8443, without a path, not {wrong!r}")
        return origins

    @field_validator("directory")
    @classmethod
    def _check_directory(cls, value: str | None) -> str | None:
        if value is not None and "://" in value and (not _is_http(value) or re.search("[?#@]", value)):
            raise ValueError(
                "must be a JSON file, cassandra, or a base URL like https://app.example/presence, without a password"
            )
        return value

    @field_validator("jwks")
    @classmethod
    def _check_jwks(cls, value: str | None) -> str | None:
        if value is not None and "://" in value and not _is_http(value):
            raise ValueError("must be a file, or a URL like https://issuer.example/jwks.json")
        return value

    @field_validator("kafka_bootstrap_servers", "cassandra_contact_points")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        port = "" if info.field_name == "kafka_bootstrap_servers" else " or host"
        for one in value:
            match = _HOST.fullmatch(one)
            if not match or not (match[2] or port) or not 0 < int(match[2] or 1) < 65_536:
                raise ValueError(f"must list host:port{port}, not {one!r}")
        return value

    @field_validator("kafka_topic", "cassandra_keyspace")
    @classmethod
    def _check_name(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "kafka_topic" and not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", value):
            raise ValueError("must have letters, digits and . _ - only")
        if info.field_name == "cassandra_keyspace" and not re.fullmatch(r"[a-z][a-z0-9_]{0,47}", value):
            raise ValueError("must begin with a small letter, and have small letters, digits and _ only")
        return value

    @field_validator("jwt_secret")
    @classmethod
    def _check_secret(cls, value: str | None) -> str | None:
        if value is not None and len(os.fsencode(value)) < 32:
            raise ValueError("must be at least 32 bytes long")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str | None) -> str | None:
        if value is not None:
            parsed = redis_url.parse(value)
            for url in filter(None, (parsed.url, parsed.sentinel_url)):
                try:
                    ConnectionPool.from_url(url).make_connection()  # connects nowhere yet
                except (ValueError, TypeError, RedisError):  # whose text may hold the password
                    raise ValueError(f"must be a URL like {parsed.example}, with options of redis-py only") from None
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.grace_seconds >= self.lease_seconds:
            raise ValueError("PRESENCE_GRACE_SECONDS must be less than PRESENCE_LEASE_SECONDS")
        if self.jwt_secret is not None and self.jwks is not None:
            raise ValueError(
                "PRESENCE_JWT_SECRET and PRESENCE_JWKS cannot be set together: one of them verifies tokens"
            )
        if self.redis_partitions > 1 and self.redis_url is None:
            raise ValueError("PRESENCE_REDIS_PARTITIONS above 1 needs PRESENCE_REDIS_URL")
        if self.redis_partitions == 1 and self.redis_url and redis_url.parse(self.redis_url).kind == "cluster":
            raise ValueError(
                "PRESENCE_REDIS_PARTITIONS must be above 1 when PRESENCE_REDIS_URL is a cluster, say 12 for 3 primaries"
            )
        if self.directory == "cassandra" and not self.cassandra_contact_points:
            raise ValueError("PRESENCE_DIRECTORY=cassandra needs PRESENCE_CASSANDRA_CONTACT_POINTS")
        if (self.cassandra_user is None) != (self.cassandra_password is None):
            raise ValueError("PRESENCE_CASSANDRA_USER and PRESENCE_CASSANDRA_PASSWORD go together")
        if self.port == 0 and self.workers > 1:
            raise ValueError("PRESENCE_PORT=0 needs PRESENCE_WORKERS=1: several workers must share one port")
        if self.max_ids_burst < self.max_ids_per_request:
            raise ValueError("PRESENCE_MAX_IDS_BURST must not be less than PRESENCE_MAX_IDS_PER_REQUEST")
        if self.max_message_bytes < self.max_frame_bytes:
            raise ValueError("PRESENCE_MAX_MESSAGE_BYTES must not be less than PRESENCE_MAX_FRAME_BYTES")
        return self


def load(**overrides: Any) -> Settings:
    """Read the environment; ``overrides`` (by field name) win, except those that are None.

    Raises:
        SettingsError: something is wrong or unknown.
    """
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    for name, value in os.environ.items():
        variable = name.upper()
        if (
            value
            and variable.startswith(PREFIX)
            and not variable.startswith(PREFIX + "TEST_")
            and variable not in known
        ):
            closest = difflib.get_close_matches(variable, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{name} is not a setting; the closest name is {closest}")
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        lines = [_sentence(str(one["loc"][0]) if one["loc"] else None, one) for one in error.errors()]
        raise SettingsError("; ".join(lines)) from None


def explain() -> str:
    """Return every setting with its default and meaning, for ``presence --help``."""
    lines = []
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = (
            "none" if default is None or default == () else f"{default:g}" if isinstance(default, float) else default
        )
        lines.append(f"{PREFIX}{name.upper()} [{shown}]\n    {field.description}")
    return "\n".join(lines)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False


def _sentence(field: str | None, error: Any) -> str:
    """One error of pydantic's as one line. The value is shown where it is no secret."""
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if field is None:
        return str(text)
    known = Settings.model_fields.get(field)
    secret = known is None or not known.repr or error["type"] == "value_error"
    return f"{PREFIX}{field.upper()} {text}" + ("" if secret else f", not {error['input']!r}")
