"""What other tests take for granted of a server under their thumb."""

from __future__ import annotations

import pytest

from tests.support.process import free_port
from tests.support.server import run_presence
from tests.support.waiting import wait_until


async def test_frozen_it_answers_nothing_and_thawed_it_goes_on(start_server):
    server = await start_server()
    await server.freeze()
    with pytest.raises(OSError, match="timed out"):
        await server.get("/health/live", timeout=0.3)
    await server.thaw()
    assert (await server.get("/health/live")).status == 200


async def test_its_family_is_known_and_ends_with_it(start_server):
    server = await start_server()
    assert server.pid in server.family()
    assert len(server.family()) > 1, "an embedded store is a process of its own"
    await server.kill9()
    await wait_until(lambda: not server.family(), what="the family to be gone")


async def test_it_starts_again_with_its_data(start_server, connect, user):
    server = await start_server()
    client = await connect(server, user)
    await client.disconnect()
    await server.wait_online(user, False)
    await server.restart()
    known = await server.post("/api/presence/batch", user, json=[user])
    assert known.json()[user]["lastSeen"] is not None


async def test_what_the_directory_is_told_is_known(start_server, user):
    server = await start_server()
    await server.know(friends={user: ["bob"]}, conversations={"c1": [user]})
    assert list((await server.get("/api/presence/friends", user)).json()) == ["bob"]
    await server.know(friends={user: ["carol"]})
    assert list((await server.get("/api/presence/friends", user)).json()) == ["carol"]
    assert list((await server.get("/api/presence/conversation/c1", user)).json()) == [user]


async def test_one_that_ends_at_once_is_told_with_its_log(start_server):
    with pytest.raises(AssertionError, match=r"(?s)the server ended with 2:.*PRESENCE_LEASE_SECONDS"):
        await start_server(lease_seconds="soon")


async def test_a_traceback_in_its_log_is_an_error_once(start_server):
    server = await start_server()
    with server.log_file.open("a") as log:
        log.write("Traceback (most recent call last):\n")
    with pytest.raises(AssertionError, match="holds a traceback"):
        server.check_log()
    server.check_log()


async def test_its_command_runs_to_its_end():
    code, out, err = await run_presence("--help")
    assert (code, err) == (0, "")
    assert "serve" in out


def test_a_port_is_given_to_nobody_else_before_it_is_used(monkeypatch):
    port = free_port()
    drawn = iter((port, port, *range(20_000, 32_000)))
    monkeypatch.setattr("tests.support.process.random.randrange", lambda _low, _high: next(drawn))
    assert free_port() != port
