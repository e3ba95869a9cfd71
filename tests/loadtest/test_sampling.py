"""Figures of processes, of the kernel and of the machine."""

from __future__ import annotations

import gc
import itertools
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from loadtest import sampling
from loadtest.sampling import GcWatch, Processes, Sampler, between
from tests.support.waiting import wait_until

BUSY = "import sys; print('up', flush=True)\nwhile True: pass"
# A parent that does nothing, with a child that is busy, and with many open files of its own.
PARENT = (
    "import subprocess, sys; kept = [open('/dev/null') for _ in range(40)]\n"
    f"child = subprocess.Popen([sys.executable, '-c', {BUSY!r}])\nsys.stdin.read(); child.kill(); child.wait()"
)


# One that starts a child for each line "start", and ends one for "end oldest" or "end newest"; each time it says so.
SUPERVISOR = """
import subprocess, sys
children = []
print("up", flush=True)
for line in sys.stdin:
    if line == "start\\n":
        children.append(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]))
    else:
        child = children.pop(0 if 'oldest' in line else -1)
        child.kill()
        child.wait()
    print("done", flush=True)
for child in children:
    child.kill()
    child.wait()
"""


@contextmanager
def running(code):
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"up\n"
        yield process
    finally:
        if code in (PARENT, SUPERVISOR):
            process.communicate()  # its input ends: it ends its child, and then itself
        else:
            process.kill()
            process.communicate()


def cpu_used(process):
    """Read until the busy process has had some time, however busy the machine is."""
    found = process.read(time.monotonic())
    deadline = time.monotonic() + 20
    while found.get("server_busiest_cpu_percent", 0) < 5:
        assert time.monotonic() < deadline, found
        found = process.read(time.monotonic())
        time.sleep(0.05)
    return found


def test_a_process_is_read_with_its_children():
    with running(PARENT) as parent:
        found = cpu_used(Processes("server", lambda: [parent.pid]))

    assert found["server_cpu_percent"] >= found["server_busiest_cpu_percent"]
    assert found["server_rss_bytes"] > 10_000_000  # two interpreters
    assert 43 <= found["server_open_files"] < 60


def test_cpu_is_that_of_the_time_between_two_readings():
    with running(BUSY) as process:
        server = Processes("server", lambda: [process.pid])
        assert "server_cpu_percent" not in server.read(time.monotonic())
        assert cpu_used(server)["server_cpu_percent"] < 150


def test_of_a_generator_the_busiest_process_counts():
    with running(PARENT) as parent:
        group = Processes("server", lambda: [parent.pid], busiest=True)
        deadline = time.monotonic() + 20
        while (found := group.read(time.monotonic())).get("server_cpu_percent", 0) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    assert found["server_all_cpu_percent"] >= found["server_cpu_percent"]


def test_a_server_that_was_replaced_is_noticed():
    alive: list[int] = []
    group = Processes("server", lambda: alive)
    with running(BUSY) as first:
        alive[:] = [first.pid]
        assert group.read(0.0)
        group.read(1.0)
    assert group.read(2.0) == {}
    before = group.changed
    with running(BUSY) as second:
        alive[:] = [second.pid]
        assert group.read(3.0)
    assert (before, group.changed) == (0, 1)


def test_a_restart_that_takes_long_is_noticed():
    """For some readings there is nobody: what comes then is still another one."""
    alive: list[int] = []
    group = Processes("server", lambda: alive)
    with running(BUSY) as first:
        alive[:] = [first.pid]
        group.read(0.0)
    alive.clear()
    assert [group.read(float(second)) for second in range(1, 8)] == [{}] * 7
    with running(BUSY) as second:
        alive[:] = [second.pid]
        assert group.read(8.0)
        group.read(9.0)
    assert group.changed == 1


def test_of_two_instances_each_that_is_restarted_is_noticed_and_read():
    alive: list[int] = []
    group = Processes("server", lambda: alive)
    seconds = iter(range(1_000))

    def look():
        """Read until the processes have been looked for."""
        for _ in range(5):
            group.read(float(next(seconds)))
        return len(group.open_files)

    with running(BUSY) as other:
        with running(BUSY) as first:
            alive[:] = [first.pid, other.pid]
            assert look() == 2
        alive[:] = [other.pid]
        assert (look(), look(), group.changed) == (1, 1, 0)
        with running(BUSY) as second:
            alive[:] = [second.pid, other.pid]
            assert (look(), group.changed) == (2, 1)
        alive[:] = [other.pid]
        assert look() == 1
        with running(BUSY) as third:
            alive[:] = [third.pid, other.pid]
            assert (look(), group.changed) == (2, 2)


@pytest.fixture
def supervisor():
    """Of two workers, and how they are read: `tell` it what to do, and `look` returns the restarts until then."""
    with running(SUPERVISOR) as process:
        group = Processes("server", lambda: [process.pid])
        seconds = itertools.count()

        def tell(*orders):
            for order in orders:
                process.stdin.write(f"{order}\n".encode())
                process.stdin.flush()
                assert process.stdout.readline() == b"done\n"

        def look():
            for _ in range(5):  # in one of which the processes are looked for
                group.read(float(next(seconds)))
            return group.changed

        tell("start", "start")
        assert (look(), look()) == (0, 0)
        yield tell, look


def test_a_worker_that_its_supervisor_restarts_is_noticed(supervisor):
    tell, look = supervisor
    tell("end oldest", "start")
    assert (look(), look(), look()) == (1, 1, 1)
    tell("end oldest")
    assert look() == 1
    tell("start")
    assert (look(), look(), look()) == (2, 2, 2)


def test_helpers_that_come_and_go_are_no_restart(supervisor):
    tell, look = supervisor
    for _ in range(3):
        tell("start")
        assert look() == 0
        tell("end newest")
        assert look() == 0


def test_the_roots_are_asked_for_only_while_one_is_missing():
    asked: list[int] = []

    def roots():
        asked.append(1)
        return [os.getpid()]

    group = Processes("server", roots)
    for second in range(20):
        group.read(float(second))
    assert len(asked) == 1


async def test_the_sampler_reads_on_until_it_is_stopped(monkeypatch):
    monkeypatch.setattr(sampling, "PERIOD", 0.02)
    sampler = Sampler([Processes("generator", lambda: [os.getpid()])])
    sampler.start()
    try:
        await wait_until(lambda: len(sampler.points.get("generator_cpu_percent", [])) >= 3)
    finally:
        sampler.stop()
    count = len(sampler.points["generator_rss_bytes"])
    began = sampler.points["generator_rss_bytes"][1][0]

    series = sampler.series(began)
    assert len(series["generator_rss_bytes"]) == count - 1  # the one from before the start is left out
    assert series["generator_rss_bytes"][0][0] == 0.0
    assert series["listen_overflows"][0][1] >= 0


def test_one_figure_for_a_stretch_of_time():
    series = {
        "server_cpu_percent": [(0, 100.0), (10, 20.0), (11, 40.0), (30, 90.0)],
        "server_rss_bytes": [(0, 9.0), (10, 5.0), (11, 7.0), (30, 8.0)],
        "listen_overflows": [(0, 1.0), (10, 3.0), (11, 8.0), (30, 9.0)],
    }

    assert between(series, 10, 20) == {"server_cpu_percent": 30.0, "server_rss_bytes": 7.0, "listen_overflows": 5.0}
    assert between(series, 12, 20) == {}


def test_the_server_is_found_by_its_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        assert sampling.listeners("127.0.0.1", port) == [os.getpid()]
        assert sampling.listeners("192.0.2.1", port) == []


@pytest.mark.parametrize(("host", "local"), [("127.1.2.3", True), ("localhost", True), ("192.0.2.1", False)])
def test_knows_the_machines_own_addresses(host, local):
    assert sampling.is_local(host) is local


def test_the_collector_is_timed():
    watch = GcWatch()
    try:
        gc.collect()
        assert watch.collections == 1 and 0 < watch.longest <= watch.total
    finally:
        watch.close()
    gc.collect()
    assert watch.collections == 1


def test_the_facts_of_the_machine():
    machine, limits, harness = sampling.machine(), sampling.limits(), sampling.harness()

    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28 and machine["load_before"] >= 0
    assert limits["nofile"] >= 256 and limits["ip_local_port_range"][0] < limits["ip_local_port_range"][1]
    assert harness["locust"].startswith("2.")
