"""What `PRESENCE_REDIS_URL` names: a server, the nodes of a cluster, or a service of Sentinel (DESIGN §5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

SCHEMES = (
    *("redis://", "rediss://", "unix://"),
    *(f"{scheme}+{kind}://" for scheme in ("redis", "rediss") for kind in ("cluster", "sentinel")),
)
PORTS = {"cluster": 6379, "sentinel": 26379}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The parts of the URL, as URLs of single servers: ``redis://``, ``rediss://`` or ``unix://``."""

    kind: Literal["server", "cluster", "sentinel"]
    url: str = field(repr=False)
    """Of a server that holds data. Of a cluster or with Sentinel its host and port stand for any: see `addresses`."""
    addresses: tuple[tuple[str, int], ...] = ()
    """Where to ask first: nodes of the cluster, or sentinels."""
    service: str = ""
    """What the sentinels call the primary and its replicas."""
    sentinel_url: str = field(default="", repr=False)
    """As ``url``, of the sentinels."""
    example: str = "redis://user:password@host:6379/0"
    """Of a good URL of this kind."""


def parse(url: str) -> RedisUrl:
    """Take the URL apart.

    ``redis+cluster://user:password@host:port,host:port`` and
    ``redis+sentinel://user:password@host:port,host:port/service?sentinel_username=…&sentinel_password=…``; each with
    ``rediss`` for TLS, and with the options of redis-py behind the ``?``.

    Raises:
        ValueError: it is none of these. The text holds nothing of the URL.
    """
    scheme, _, rest = url.partition("://")
    plain, _, kind = scheme.partition("+")
    if f"{scheme}://" not in SCHEMES:
        raise ValueError(f"must begin with one of {', '.join(SCHEMES)}")
    if kind not in ("cluster", "sentinel"):
        return RedisUrl("server", url)
    example = f"{scheme}://user:password@host:port,host:port" + ("/service" if kind == "sentinel" else "")
    try:
        parts = urlsplit(f"//{rest}")
        credentials, at, hosts = parts.netloc.rpartition("@")
        addresses = tuple(_address(host, PORTS[kind]) for host in hosts.split(","))
    except ValueError:
        raise ValueError(f"must be a URL like {example}") from None
    name = parts.path.strip("/")
    if "/" in name or parts.fragment or (kind == "sentinel" and not name):
        raise ValueError(f"must be a URL like {example}")
    if kind == "cluster" and name not in ("", "0"):
        raise ValueError("cannot name a database: a cluster has only number 0")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    sentinel = {
        name: options.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in options
    }
    if kind == "cluster" and (sentinel or options.pop("db", "0") != "0"):
        raise ValueError("of a cluster takes neither sentinel_username, sentinel_password nor db")
    head = f"{plain}://{credentials}{at}host"
    if kind == "cluster":
        return RedisUrl("cluster", f"{head}?{urlencode(options)}", addresses, example=example)
    # What is encrypted for the servers is for the sentinels; who may ask them is another matter.
    shared = {name: value for name, value in options.items() if name.startswith(("ssl_", "socket_"))}
    sentinel_url = f"{plain}://host?{urlencode(shared | sentinel)}"
    return RedisUrl("sentinel", f"{head}?{urlencode(options)}", addresses, name, sentinel_url, example)


def _address(host: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname or parts.path or parts.query or " " in host or parts.port == 0:
        raise ValueError
    return parts.hostname, parts.port or port
