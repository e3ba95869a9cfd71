"""The harness distrusts itself: what a lying proxy does is found by the ledger, and a frozen server by the percentiles.

All of it by the real command. The proxies' runs go on at once, each with a server of its own.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest

from loadtest import validity
from loadtest.metrics import Histogram
from loadtest.run import Run
from tests.loadtest.lying_proxy import LyingProxy
from tests.loadtest.test_scenarios import locust
from tests.support.server import ROOT, running

LEASE = 30
LATE = 1.4
EVERY = 2.0
"""Seconds between two changes of a user: more than `LATE`, so that none takes back another that was not told."""
DELAY = 0.5
FAULTS = {"none": 0.0, "lose": 0.3, "repeat": 0.3, "delay": 1.0, "lie": 0.3}
"""Fault to the share of the notices that come to harm. So many that the same pair loses several in a row, too."""


async def loaded(scenario, *options, host, folder, sessions=60, seconds=6):
    """The data of a run, of which all was well but what the server did."""
    data, log = folder / "run.json", folder / "log"
    more = ("--headless", "--sessions", sessions, "--run-time", seconds, "--late", LATE, "--run-json", data)
    async with locust(scenario, *more, *options, host=host, log=log, lease=LEASE) as process:
        code = await asyncio.wait_for(process.wait(), 45)
    assert code == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    return Run.load(data)


async def through_a_proxy(fault, folder):
    """The proxy, which knows what it did, and what the run came to."""
    folder.mkdir()
    async with (
        running(lease_seconds=LEASE) as server,
        LyingProxy(server.port, fault, share=FAULTS[fault], delay=DELAY) as proxy,
    ):
        run = await loaded("fanout", "--every", EVERY, "--connect-rate", 100, host=proxy.http, folder=folder)
    return proxy, run.steps[0]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """For each fault, the proxy and the step of the run."""
    folder = tmp_path_factory.mktemp("proxies")

    async def all_at_once():
        async with asyncio.TaskGroup() as runs:
            tasks = {fault: runs.create_task(through_a_proxy(fault, folder / fault)) for fault in FAULTS}
        return {fault: task.result() for fault, task in tasks.items()}

    return asyncio.run(all_at_once())


def assert_the_books_balance(proxy, step):
    """And what came through was received, but for what was told while a watch was not confirmed yet."""
    assert step.counts["connects"] == 60
    assert proxy.notices > 100
    assert step.ledger["expected"] == sum(step.ledger[name] for name in ("received", "missing", "cancelled"))
    assert step.ledger["received"] == pytest.approx(proxy.notices - proxy.lost, rel=0.2)


def found(step):
    """What the ledger holds against the server."""
    wrong = ("missing", "cancelled", "duplicated", "unexpected", "out_of_order")
    return {name: step.ledger[name] for name in wrong if step.ledger[name]}


def test_what_an_honest_proxy_passes_on_is_all_received(told):
    proxy, step = told["none"]
    assert found(step) == {}
    assert_the_books_balance(proxy, step)


def test_each_notice_that_was_lost_is_missing(told):
    """Of several in a row about one user every other: the one between would have said what the watcher is shown."""
    proxy, step = told["lose"]
    missing = sum((row + 1) // 2 for row in proxy.in_a_row)
    cancelled = sum(row // 2 for row in proxy.in_a_row)
    assert max(proxy.in_a_row) > 1
    assert missing + cancelled == proxy.tampered > 0.2 * proxy.notices
    assert found(step) == {"missing": missing, "cancelled": cancelled}
    assert_the_books_balance(proxy, step)


def test_each_notice_that_came_twice_is_duplicated(told):
    proxy, step = told["repeat"]
    assert proxy.tampered > 0.2 * proxy.notices
    assert found(step) == {"duplicated": proxy.tampered}
    assert_the_books_balance(proxy, step)


def test_a_delay_is_in_the_time_to_notice(told):
    proxy, step = told["delay"]
    assert found(step) == {}
    assert proxy.tampered == proxy.notices
    assert_the_books_balance(proxy, step)
    offline = Histogram.decode(step.ledger["notice"]["disconnect"])
    medians = {
        "disconnect": offline.percentile(50),
        "PUSH online": step.metrics["PUSH online"].p50,
        "PUSH offline": step.metrics["PUSH offline"].p50,
    }
    # A histogram has three digits.
    assert {name: of for name, of in medians.items() if not 999 * DELAY <= of <= 1000 * (DELAY + 1)} == {}
    # Meanwhile the others are shown a user who is gone.
    assert step.ledger["ghost_seconds"] >= 0.99 * DELAY * len(offline)


def test_each_lie_is_found(told):
    """What a lie said was not so, or was known; and what it should have said was not told, unless a lie had said so."""
    proxy, step = told["lie"]
    rows = proxy.in_a_row
    wrong = found(step)
    assert max(rows) > 1
    assert proxy.tampered > 0.2 * proxy.notices
    assert wrong.pop("unexpected") + wrong.pop("duplicated", 0) == proxy.tampered
    assert wrong == {"missing": len(rows), "cancelled": proxy.tampered - len(rows)}
    assert_the_books_balance(proxy, step)


async def with_a_muted_watcher(scenario, folder):
    """A run with the scenario's own period of flips, and the time to be late that a run has by default."""
    folder.mkdir()
    options = ("--late", 5, "--hold", 60, "--connect-rate", 100)
    async with running(lease_seconds=LEASE) as server, LyingProxy(server.port, "mute") as proxy:
        run = await loaded(scenario, *options, host=proxy.http, folder=folder, seconds=12)
    return proxy, run.steps[0]


async def test_a_watcher_who_is_told_nothing_has_lost_something(tmp_path):
    """Of the flips every other would have said what the watcher is shown; of quick ones (`slow`) ten may go untold."""
    async with asyncio.TaskGroup() as both:
        fanout, slow = (both.create_task(with_a_muted_watcher(name, tmp_path / name)) for name in ("fanout", "slow"))
    for (proxy, step), spared in ((fanout.result(), 0), (slow.result(), 10)):
        flips, *comings = sorted(proxy.in_a_row, reverse=True)
        assert flips >= spared + 4
        assert set(comings) <= {1}, "in the ramp, of others"
        missing = len(comings) + (flips - spared + 1) // 2
        assert found(step) == {"missing": missing, "cancelled": proxy.tampered - missing}


async def test_a_frozen_server_shows_in_p90_of_the_beats_that_were_intended(tmp_path):
    """It is frozen for a third of the time: who waits for answers would have a few slow ones only, beyond p90."""
    options = ("--stay", 0, "--period", 0.25, "--beat-receipts", 1)
    async with running(lease_seconds=LEASE) as server, asyncio.TaskGroup() as both:
        locusts = both.create_task(
            loaded("steady", *options, host=server.http, folder=tmp_path, sessions=50, seconds=9)
        )
        await server.wait_online("load-steady-0-0000049", timeout=20)
        await server.freeze()
        try:
            await asyncio.sleep(3)  # for so long it is frozen: that is what is measured
        finally:
            await server.thaw()
    run = locusts.result()
    (step,) = run.steps
    beats = Histogram.decode(step.histograms["STOMP heartbeat"])
    assert step.offered == step.achieved > 0.9 * 50 / 0.25
    assert (beats.max() or 0) >= 2500
    assert (beats.percentile(90) or 0) >= 500
    assert len(beats) > 0.9 * run.workload["counts"]["made"]


@asynccontextmanager
async def null_server():
    """The address of a server that does nothing."""
    command = [sys.executable, "-m", "loadtest.floor"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield (await asyncio.wait_for(process.stdout.readline(), 10)).decode().split()[-1]
    finally:
        process.terminate()
        await process.wait()


async def test_a_null_server_gives_the_floor_and_proves_nothing_of_notices(tmp_path):
    async with null_server() as address:
        options = ("--watchers", 0, "--late", 0.2, "--period", 0.25, "--beat-receipts", 1)
        run = await loaded("hold", *options, host=f"http://{address}", folder=tmp_path, seconds=3)
    (step,) = run.steps
    assert len(Histogram.decode(step.ramp["WS connect"])) == len(Histogram.decode(step.ramp["STOMP CONNECTED"])) == 60
    assert "WS connect" not in step.metrics, "all came in the ramp"
    beats = Histogram.decode(step.histograms["STOMP heartbeat"])
    assert step.errors == {}
    assert step.offered == step.achieved > 0.9 * 60 / 0.25
    assert len(beats) > 0.9 * step.achieved * step.seconds
    assert (beats.percentile(50) or 0) < 100, "ms; a server that is frozen for 3 s shows thousands"
    unknown = "No change of status was due to any watcher: of notices nothing is known."
    assert ("warning", unknown) in validity.judge(run)
    run.slo = "lost=0"
    assert ("fatal", unknown) in validity.judge(run)
