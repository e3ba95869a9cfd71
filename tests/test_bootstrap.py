"""presence.bootstrap: what only the composition root knows; what it composes is met by tests/wire and tests/faults."""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import closing, suppress
from typing import Any

import jwt
import pytest

from presence import bootstrap
from presence.adapters.redis import RedisStore
from presence.bootstrap import StartError
from presence.settings import load
from presence.watch_records import WatchRecords
from tests.support.process import free_port
from tests.support.waiting import wait_until

SECRET = "a secret of the tests, of 32 bytes and more"


# Jobs


async def test_a_job_that_ends_or_fails_is_started_again_and_that_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(bootstrap, "RESTART_SECONDS", 0.0)
    runs = 0

    async def job() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError("broken")
        if runs > 2:
            await asyncio.sleep(60)

    task = asyncio.create_task(bootstrap._lasting(job, "the sweep"))
    await wait_until(lambda: runs == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [record.getMessage() for record in caplog.records] == [
        "the sweep has failed; it is started again",
        "the sweep has ended; it is started again",
    ]
    assert "broken" in caplog.text


@pytest.mark.parametrize(
    ("settings", "more"),
    (
        ({}, set()),
        ({"lease_renewed_by": "connection"}, {"renewal"}),
        ({"watch_policy": "contacts"}, {"revision"}),
        (
            {"redis_url": "redis://localhost", "redis_partitions": 2},
            {"sweep 1", "follow 1", "relay 1 to h", "redis check"},
        ),
    ),
)
async def test_the_jobs_are_those_that_the_settings_ask_for(settings, more):
    """The store's own work comes first, as it is ended last. Each partition is swept, followed and relayed."""
    chosen = load(**settings)
    store = RedisStore("redis://127.0.0.1:1/0", instance="i", partitions=chosen.redis_partitions)
    sink: Any = type("History", (), {"name": "h"})()
    service: Any = type("Service", (), {"store": store, "history": sink, "records": WatchRecords(store)})()
    endpoint: Any = type("Endpoint", (), {"revise": None})()
    parts = bootstrap._Parts(store, sink, sink, None, None, None)
    names = [name for name, _ in bootstrap._jobs(chosen, parts, service, endpoint)]
    assert names[0] == "store"
    assert len(names) == len(set(names))
    always = {
        "store",
        "sweep 0",
        "follow 0",
        "relay 0 to h",
        "cleanup",
        "stats",
        "watches",
        "watch records",
        "lag",
        "trim",
    }
    assert set(names) == always | more
    await store.close()


# The socket


def test_a_socket_of_one_server_listens_at_once():
    """So that of two servers that start at the same time one is refused."""
    settings = load(port=free_port())
    with closing(bootstrap._listen(settings, shared=False)):
        with pytest.raises(StartError) as caught:
            bootstrap._listen(settings, shared=False)
        assert caught.value.code == 1
        assert f"PRESENCE_PORT={settings.port}" in str(caught.value)


def test_sockets_of_workers_share_the_port_and_none_else_does(monkeypatch):
    """DESIGN §5: "each has a listening socket of its own (SO_REUSEPORT)"."""
    settings = load(port=free_port(), workers=2)
    monkeypatch.setattr("multiprocessing.parent_process", object)
    with (
        closing(bootstrap._listen(settings, shared=True)) as first,
        closing(bootstrap._listen(settings, shared=True)) as second,
    ):
        first.listen()
        second.listen()
        assert first.getsockname() == second.getsockname()
        monkeypatch.undo()
        with pytest.raises(StartError):
            bootstrap._listen(settings, shared=True)  # the main process of another server


def test_a_port_may_be_taken_up_again_at_once():
    """SO_REUSEADDR: connections that were just closed do not keep the next start waiting."""
    settings = load(port=free_port())
    with (
        closing(bootstrap._listen(settings, shared=False)) as listening,
        closing(socket.create_connection(("127.0.0.1", settings.port))) as client,
    ):
        accepted, _ = listening.accept()
        accepted.close()  # by us, first: it is ours that waits
        with suppress(OSError):
            client.recv(1)
    bootstrap._listen(settings, shared=False).close()


def test_port_0_is_any_free_one():
    with closing(bootstrap._listen(load(port=0), shared=False)) as sock:
        assert sock.getsockname()[1] > 0


def test_localhost_is_an_ipv4_address_if_it_has_one():
    with closing(bootstrap._listen(load(port=0, host="localhost"), shared=False)) as sock:
        assert sock.family is socket.AF_INET


def test_the_kernel_ends_connections_that_do_not_answer():
    """WIRE §3: "TCP user timeout 45 s"; accepted connections inherit it."""
    settings = load(port=free_port())
    with (
        closing(bootstrap._listen(settings, shared=False)) as listening,
        closing(socket.create_connection(("127.0.0.1", settings.port))),
        closing(listening.accept()[0]) as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 45_000


# Limits


def test_by_default_there_are_as_many_connections_as_open_files_less_512():
    """WIRE §3: "the configured connections in a process (default: open-file limit − 512)"."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert bootstrap._limits(load()).connections == max(1, files - 512)
    assert bootstrap._limits(load(max_connections=7)).connections == 7


def test_every_limit_of_the_settings_reaches_the_endpoint():
    """WIRE §6: "Limits (each a setting)"."""
    numbers = {
        name: number
        for number, name in enumerate(
            (
                "max_frame_bytes", "max_header_lines", "max_header_line_bytes", "max_subscriptions", "max_held_sends",
                "max_frames_per_second", "max_frames_burst", "connect_seconds", "max_connections",
                "max_ids_per_request", "max_watches", "max_subscribes_per_second", "send_seconds", "beat_seconds",
                "silence_seconds", "ping_seconds",
            ),
            start=1_000,
        )
    }  # fmt: skip
    limits = bootstrap._limits(load(**numbers))
    frames = limits.frames
    assert [
        frames.frame_bytes, frames.header_lines, frames.header_line_bytes, frames.subscriptions, frames.held_sends,
        frames.frames_per_second, frames.frames_burst, frames.connect_seconds, limits.connections,
        limits.ids, limits.watches, limits.subscribes_per_second, limits.send_seconds, limits.beat_seconds,
        limits.silence_seconds, limits.ping_seconds,
    ] == list(numbers.values())  # fmt: skip


# Tokens


def test_a_token_has_what_the_settings_ask_of_tokens():
    settings = load(jwt_secret=SECRET, jwt_issuer="us", jwt_audience="them")
    claims = jwt.decode(bootstrap.token(settings, "ann", 60), SECRET, ["HS256"], audience="them", issuer="us")
    assert claims["sub"] == "ann"


def test_where_tokens_are_made_elsewhere_there_is_none():
    with pytest.raises(StartError) as caught:
        bootstrap.token(load(jwks="keys.json"), "ann", 60)
    assert caught.value.code == 2
