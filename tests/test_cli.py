"""The `presence` command: help, tokens, cleanup; and what the server logs at its intervals (guide, Scheduled Tasks)."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from contextlib import closing
from typing import Any

import jwt
import pytest

from presence.settings import Settings
from tests.conftest import Connect, StartServer
from tests.support.server import SECRET, ServerProcess, run_presence
from tests.support.truth import Truth
from tests.support.waiting import wait_until

TABLE = {
    "HOST",
    "PORT",
    "WORKERS",
    "DATA_DIR",
    "JWT_SECRET",
    "JWKS",
    "JWT_ISSUER",
    "JWT_AUDIENCE",
    "LEASE_SECONDS",
    "LEASE_RENEWED_BY",
    "GRACE_SECONDS",
    "DRAIN_SECONDS",
    "SILENCE_SECONDS",
    "WATCH_POLICY",
    "DIRECTORY",
    "ALLOWED_ORIGINS",
    "REDIS_URL",
    "REDIS_PARTITIONS",
    "KAFKA_BOOTSTRAP_SERVERS",
    "CASSANDRA_CONTACT_POINTS",
    "LOG_LEVEL",
    "LOG_FORMAT",
}
"""The settings in DESIGN §5's table."""


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


# presence --help


async def test_help_explains_every_setting():
    """DESIGN §5: "Settings keep these names"."""
    code, out, err = await run_presence("--help")
    assert (code, err) == (0, "")
    explained = dict(re.findall(r"^PRESENCE_(\w+) \[(.*)\]\n    \S", out, re.MULTILINE))
    assert set(explained) >= TABLE
    assert set(explained) == {name.upper() for name in Settings.model_fields}
    assert (explained["LEASE_SECONDS"], explained["JWT_SECRET"], explained["LOG_FORMAT"]) == ("60", "none", "text")
    assert all(f"  {command}" in out for command in ("serve", "token", "cleanup"))


async def test_the_help_of_serve_has_an_option_for_every_setting():
    code, out, err = await run_presence("serve", "--help")
    assert (code, err) == (0, "")
    assert {f"--{name.replace('_', '-')}" for name in Settings.model_fields} <= set(re.findall(r"--[a-z-]+", out))


async def test_help_works_whatever_the_environment_says():
    code, out, _ = await run_presence("--help", port="none", no_such_thing=1)
    assert code == 0
    assert "PRESENCE_PORT" in out


@pytest.mark.parametrize("arguments", (("no-such-command",), ("serve", "--no-such-option", "1"), ("token",)))
async def test_a_command_that_is_none_is_told_how_it_is_used(arguments):
    code, out, err = await run_presence(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert "Traceback" not in err


# presence serve


async def test_an_option_wins_over_the_environment(start_server: StartServer, tmp_path):
    """`presence serve --port`; a bad one is named as the setting it stands for."""
    server = await start_server()
    settings = server.settings | {"port": 1, "data_dir": tmp_path}
    code, _, err = await run_presence("serve", "--port", str(server.port), **settings)
    assert code == 1
    assert f"PRESENCE_PORT={server.port}" in only_line(err)
    code, _, err = await run_presence("serve", "--port", "http", **settings)
    assert code == 2
    assert "PRESENCE_PORT " in only_line(err)


# presence token


async def test_a_token_is_good_for_the_running_server(start_server: StartServer, connect: Connect, user):
    """WIRE §1: "with none configured, the embedded mode makes a random one in its data folder"."""
    server = await start_server(jwt_secret=None, jwt_issuer="us", jwt_audience="them")
    code, out, err = await run_presence("token", user, **server.settings)
    assert (code, err) == (0, "")
    token = only_line(out)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["iss"], claims["aud"]) == (user, "us", "them")
    assert abs(claims["exp"] - time.time() - 3600) < 60
    client = await connect(server, token=token)
    assert client.connected is not None
    assert client.connected.headers["user-name"] == user
    assert (await server.get(f"/api/presence/check/{user}", token=token)).json() == {"isOnline": True}


async def test_a_token_may_be_made_before_the_first_start(start_server: StartServer, user, tmp_path_factory):
    """The secret that is made for it is the one that the server takes up."""
    data = tmp_path_factory.mktemp("d") / "data"
    code, out, _ = await run_presence("token", user, data_dir=data)
    assert code == 0
    server = await start_server(jwt_secret=None, data_dir=data)
    assert (await server.get(f"/api/presence/check/{user}", token=only_line(out))).status == 200


async def test_a_token_holds_as_long_as_it_is_told_to(user):
    code, out, _ = await run_presence("token", user, "--ttl", "7", jwt_secret=SECRET)
    assert code == 0
    claims = jwt.decode(only_line(out), SECRET, ["HS256"])
    assert 0 < claims["exp"] - time.time() <= 7
    assert set(claims) == {"sub", "exp"}


@pytest.mark.parametrize("bad", ("a:b", "", "x" * 129, "ann\n"))
async def test_a_user_that_is_no_id_gets_no_token(bad):
    """WIRE §1, ids."""
    code, out, err = await run_presence("token", "--", bad, jwt_secret=SECRET)
    assert (code, out) == (2, "")
    assert "USER" in only_line(err)


@pytest.mark.parametrize("ttl", ("0", "nan", "1e300"))
async def test_a_time_that_is_none_gets_no_token(ttl):
    code, out, err = await run_presence("token", "ann", f"--ttl={ttl}", jwt_secret=SECRET)
    assert (code, out) == (2, "")
    assert "--ttl" in err
    assert "Traceback" not in err


async def test_with_a_jwks_there_is_no_secret_to_make_a_token_with(tmp_path):
    code, out, err = await run_presence("token", "ann", jwks=tmp_path / "keys.json")
    assert (code, out) == (2, "")
    assert "PRESENCE_JWKS" in only_line(err)


async def test_a_bad_setting_is_one_line_for_every_command(tmp_path):
    for command in (("token", "ann"), ("cleanup",)):
        code, out, err = await run_presence(*command, data_dir=tmp_path, lease_seconds=0)
        assert (code, out) == (2, "")
        assert "PRESENCE_LEASE_SECONDS" in only_line(err)


# presence cleanup


async def test_cleanup_repairs_beside_the_running_server_and_prints_what(
    start_server: StartServer, connect: Connect, users
):
    """Guide, Maintenance: "Cleanup Task", "Stale Detection: Removes orphaned presence records"."""
    server = await start_server(lease_seconds=60)
    truth = Truth(server)
    ghost, lost, watched, live = (users(name) for name in ("ghost", "lost", "watched", "live"))
    client = await connect(server, live)
    await client.subscribe()
    assert (await client.watch([ghost, lost]))[ghost]["online"] is False
    truth.redis.sadd("presence:online", ghost)  # who has no session
    truth.redis.zadd("presence:deadlines", {f"{lost}:nothing": truth.now() + 30_000})  # of no session
    truth.redis.sadd(f"presence:user:{watched}:watchers", ghost)  # who does not watch
    await wait_until(lambda: kept_online(server, live), what="the history to have it")
    with closing(sqlite3.connect(server.data_dir / "history.db", timeout=5)) as db, db:
        db.execute("INSERT INTO user_presence VALUES (?, 1, NULL, 'web', 7)", (lost,))
        db.execute("DELETE FROM user_presence WHERE user_id = ?", (live,))
    code, out, err = await run_presence("cleanup", **server.settings)
    assert (code, err) == (0, "")
    repaired = dict(line.split(" ") for line in out.splitlines())
    assert repaired == {
        "offline": "1", "online": "0", "deadlines": "0", "orphans": "1", "watchers": "1",
        "rows_offline": "1", "rows_online": "1",
    }  # fmt: skip
    assert truth.changes(ghost) == [(False, "restored")]
    assert truth.watchers(watched) == set()
    assert kept_online(server, live)
    assert truth.changes(live) == [(True, "connected")], "who is well is left alone"
    code, out, _ = await run_presence("cleanup", **server.settings)
    assert code == 0
    assert {line.split(" ")[1] for line in out.splitlines()} == {"0"}, "nothing is left to repair"


def kept_online(server: ServerProcess, user: str) -> bool:
    """What the history says."""
    with closing(sqlite3.connect(server.data_dir / "history.db", timeout=5)) as db:
        return (1,) in db.execute("SELECT is_online FROM user_presence WHERE user_id = ?", (user,))


async def test_cleanup_without_a_server_is_one_line(tmp_path, start_server: StartServer):
    code, out, err = await run_presence("cleanup", data_dir=tmp_path / "never")
    assert (code, out) == (1, "")
    assert str(tmp_path / "never") in only_line(err)
    assert not (tmp_path / "never").exists()

    server = await start_server()
    await server.stop()
    code, out, err = await run_presence("cleanup", **server.settings)
    assert (code, out) == (1, "")
    assert str(server.data_dir) in only_line(err)

    code, out, err = await run_presence("cleanup", **server.settings, redis_url="redis://127.0.0.1:1/0")
    assert (code, out) == (1, "")
    assert "PRESENCE_REDIS_URL" in only_line(err)


# What it logs


async def test_the_count_of_online_users_and_the_cleanup_are_logged(start_server: StartServer, connect: Connect, users):
    """Guide, Scheduled Tasks: "Cleanup Task: Runs every 5 minutes", "Stats Logging: Logs online user count"."""
    server = await start_server(stats_seconds=0.3, cleanup_seconds=0.4, lease_seconds=30)
    await connect(server, users("ann"))
    for _ in range(2):
        await connect(server, users("bob"))
    await wait_until(lambda: "online users=3 sessions here=3" in server.log, 10)
    repaired = (
        r"cleanup repaired offline=0, online=0, deadlines=0, orphans=0, watchers=0, rows_offline=0, rows_online=0"
    )
    await wait_until(lambda: re.search(repaired, server.log), 10, what=f"the cleanup\n{server.log}")


async def test_with_several_workers_one_of_them_cleans_up_and_each_counts_its_own(
    start_server: StartServer, connect: Connect, users
):
    server = await start_server(workers=2, stats_seconds=0.3, cleanup_seconds=1.0, lease_seconds=30)
    for number in range(8):
        await connect(server, users(f"u{number}"))

    def counted() -> bool:
        here = [int(count) for count in re.findall(r"online users=8 sessions here=(\d+)", server.log)[-2:]]
        return len(here) == 2 and sum(here) == 8

    await wait_until(counted, 15, what=f"two counts that make up 8\n{server.log}")
    began = len(re.findall("cleanup repaired", server.log))
    at = time.monotonic()
    await wait_until(lambda: len(re.findall("cleanup repaired", server.log)) >= began + 2, 15)
    elapsed = time.monotonic() - at
    assert len(re.findall("cleanup repaired", server.log)) - began <= elapsed / 1.0 + 1, "not one for each worker"


@pytest.mark.parametrize("workers", (1, 2))
async def test_with_log_format_json_every_line_is_one_object(
    start_server: StartServer, connect: Connect, user, workers
):
    """DESIGN §5: `PRESENCE_LOG_FORMAT`, "`text` or `json`"."""
    server = await start_server(
        log_format="json", log_level="debug", stats_seconds=0.3, workers=workers, store_timeout_seconds=0.5
    )
    client = await connect(server, user)
    await client.disconnect()
    (valkey,) = [pid for pid, name in server.family().items() if name.startswith("valkey")]
    await server.kill9(valkey)
    await wait_until(lambda: "store reached" in server.log.partition("has died")[2], 10, what="the store to be back")
    assert await server.stop() == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert {"info", "error"} <= {line["level"] for line in lines}
    assert any("the embedded store has died" in line["message"] for line in lines)


# presence history, presence init


async def test_history_prints_a_users_changes_the_newest_first(start_server: StartServer, connect: Connect, user):
    server = await start_server()
    client = await connect(server, user)
    await client.set_online(False)
    await client.set_online(True)
    await client.disconnect()

    async def lines() -> list[str]:
        code, out, err = await run_presence("history", user, data_dir=server.data_dir)
        assert (code, err) == (0, "")
        return out.splitlines() if out.count("\n") == 4 else []

    everything = await wait_until(lines, 20, what="four changes")
    assert [line.split()[1:] for line in everything[:3]] == [
        ["offline", "web", "disconnected"],
        ["online", "web", "revived"],
        ["offline", "web", "signed-off"],
    ]
    moments = [line.split()[0] for line in everything]
    assert moments == sorted(moments, reverse=True)
    code, out, _ = await run_presence("history", user, "--limit", "2", data_dir=server.data_dir)
    assert (code, out.splitlines()) == (0, everything[:2])


async def test_history_of_a_user_never_seen_is_empty(start_server: StartServer):
    server = await start_server()
    assert await run_presence("history", "nobody", data_dir=server.data_dir) == (0, "", "")


async def test_history_without_any_is_one_line(tmp_path):
    code, out, err = await run_presence("history", "alice", data_dir=tmp_path / "none")
    assert (code, out) == (1, "")
    assert only_line(err) == f"presence: no history in {tmp_path / 'none'}: see PRESENCE_DATA_DIR"
    assert not (tmp_path / "none").exists()


async def test_init_without_anything_to_make_is_one_line(tmp_path):
    code, out, err = await run_presence("init", data_dir=tmp_path)
    assert (code, out) == (2, "")
    assert "PRESENCE_KAFKA_BOOTSTRAP_SERVERS" in only_line(err)


@pytest.mark.parametrize("setting", ("kafka_bootstrap_servers", "cassandra_contact_points"))
async def test_init_of_what_is_away_is_one_line(tmp_path, setting):
    settings: dict[str, Any] = {"data_dir": tmp_path, setting: "127.0.0.1:1"}
    code, out, err = await run_presence("init", **settings)
    assert (code, out) == (1, "")
    assert "127.0.0.1:1" in only_line(err)
