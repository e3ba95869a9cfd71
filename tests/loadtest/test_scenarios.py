"""Each scenario as a user of Locust runs it: the real command, against a real server, for a few seconds."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from loadtest import verdict
from loadtest.metrics import Histogram
from loadtest.run import Run
from tests.support.process import free_port
from tests.support.server import ROOT, SECRET, ServerProcess, running
from tests.support.waiting import wait_until

LOCUST = Path(sys.executable).with_name("locust")
LEASE = 3
COMMON = ("--period", "0.5", "--friends", "8", "--late", "2", "--hold", "0.5", "--only-summary")
SESSIONS = 60


@pytest.fixture(scope="module", autouse=True)
def server_loop():
    """One loop for the module's server: it outlives the tests."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def server(server_loop):
    context = running(lease_seconds=LEASE)
    yield server_loop.run(context.__aenter__())
    server_loop.run(context.__aexit__(None, None, None))


@asynccontextmanager
async def locust(scenario, *options, host, log, secret=SECRET, lease=LEASE):
    """The command at work; what it says goes to the file `log`.

    Args:
        scenario: names of scenarios, separated by commas, or the path of a locustfile.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "LOADTEST_SECRET": secret, "LOADTEST_LEASE": str(lease)}
    files = scenario
    if not isinstance(scenario, Path):
        files = ",".join(f"loadtest/scenarios/{name}.py" for name in scenario.split(","))
    command = [LOCUST, "-f", files, "--host", host, *COMMON, *options]
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *map(str, command), env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 15)
            except TimeoutError:
                process.kill()
                await process.wait()


async def to_end(scenario, *options, server, folder, sessions=SESSIONS, seconds=4, secret=SECRET):
    """Runs a scenario headless; returns its exit code, what it said, and the data of the run if there is any."""
    data, log = folder / "run.json", folder / "log"
    options = ("--headless", "--sessions", sessions, "--run-time", seconds, "--run-json", data, *options)
    host = server if isinstance(server, str) else server.http
    async with locust(scenario, *options, host=host, log=log, secret=secret) as process:
        code = await asyncio.wait_for(process.wait(), 50)
    return code, log.read_text(), Run.load(data) if data.exists() else None


def assert_all_told(run):
    """Nothing was lost, nothing was wrong."""
    (step,) = run.steps
    wrong = {
        name: step.ledger[name] for name in ("missing", "duplicated", "out_of_order", "unexpected", "contradicted")
    }
    assert wrong == dict.fromkeys(wrong, 0)
    assert step.ledger["received"] > 0
    assert step.ledger["expected"] == step.ledger["received"] + step.ledger["cancelled"]
    assert step.counts["negative_latencies"] == 0
    # More, when what was overdue as the ramp ended was made in the hold: it was offered before.
    assert step.achieved >= 0.99 * step.offered


SCENARIOS = {
    "hold": ((), {"PUSH online", "generator lag"}),
    "steady": (("--stay", 10), {"PUSH offline"}),
    "ramp": ((), {"PUSH online"}),
    "churn": (("--stay", 2, "--away", 1), {"PUSH offline", "PUSH offline-by-loss"}),
    "fanout": (("--every", 0.5), {"PUSH offline"}),
    "expiry": (("--share", 0.3), {"PUSH offline-by-expiry"}),
    "storm": (("--every", 1), {"PUSH online"}),
    "slow": (("--every", 0.3), {"PUSH offline"}),
    "background": (("--period", LEASE + 1), {"PUSH offline-by-expiry"}),
    "rest": (("--rest-rate", 50), {"REST friends", "REST batch", "REST check"}),
    "hostile": (("--every", 0.05), {"HOSTILE bad token", "HOSTILE unknown command", "HOSTILE bad JSON"}),
}
LONGER = {"expiry": 9, "background": 8, "slow": 5, "storm": 6}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_scenario_runs_alone_and_loses_nothing(scenario, server, tmp_path):
    options, names = SCENARIOS[scenario]
    code, said, run = await to_end(scenario, *options, server=server, folder=tmp_path, seconds=LONGER.get(scenario, 4))
    assert code == 0, said
    assert run is not None
    assert run.title == scenario
    assert "Traceback" not in said
    assert_all_told(run)
    assert names | {"WS connect", "STOMP CONNECTED", "STOMP watch", "STOMP heartbeat"} <= recorded(run.steps[0]).keys()
    assert run.steps[0].counts["connected"] >= 0.9 * run.steps[0].counts["wanted"] > 0
    assert run.steps[0].counts["connects"] >= SESSIONS
    assert verdict.ended_early(run.steps[0]) == 0, "what a scenario ends itself is not the server's doing"
    assert (run.phases[0].name, run.phases[-1].name) == ("ramp", "drain")
    assert {"sessions", "sessions_wanted", "offered", "achieved", "generator_cpu_percent"} <= set(run.series)
    if scenario == "rest":
        assert run.steps[0].ledger["checked"] > 100
    if scenario == "churn":
        assert 0 < run.steps[0].held < 0.9 * SESSIONS, "a third of them is away"
    if scenario == "hold":
        assert run.steps[0].held == run.steps[0].sessions == SESSIONS


@pytest.mark.parametrize(
    ("scenario", "options", "said"),
    [
        ("expiry", (), "The run ended before the leases had: give it more seconds."),
        ("slow", ("--hold", 30), "The run ended before anybody had stopped reading: give it more seconds."),
    ],
)
async def test_a_run_that_ends_before_what_it_is_for_is_not_believed(scenario, options, said, server, tmp_path):
    _, log, run = await to_end(scenario, *options, server=server, folder=tmp_path, seconds=3)
    assert run is not None
    assert (verdict.exit_code(run), run.faults) == (2, [said]), log


async def test_a_server_that_waits_for_lost_connections_is_judged_by_its_grace(tmp_path, monkeypatch):
    """They are shown as offline after the grace, which is neither late nor false; without it all would be late."""
    monkeypatch.setenv("LOADTEST_GRACE", "1.8")
    options = ("--stay", 2, "--away", 2.5, "--late", 1.6)
    async with running(lease_seconds=LEASE, grace_seconds=1.8) as server:
        code, said, run = await to_end("churn", *options, server=server, folder=tmp_path, seconds=7)
    assert code == 0, said
    assert run is not None
    assert_all_told(run)
    assert run.steps[0].ledger["late"] == 0
    assert "PUSH offline-by-expiry" in recorded(run.steps[0])
    assert "PUSH offline-by-loss" not in recorded(run.steps[0])


async def test_a_planned_restart_of_the_server_goes_unnoticed(tmp_path):
    server = ServerProcess(lease_seconds=8)
    try:
        await server.start().ready()
        data, log = tmp_path / "run.json", tmp_path / "log"
        options = ("--headless", "--sessions", SESSIONS, "--run-time", 12, "--every", 1, "--run-json", data)
        async with locust("rolling", *options, host=server.http, log=log, lease=8) as process:
            await wait_until(lambda: "restarted from outside, now" in log.read_text(), 20, what="the phase")
            await server.restart()
            assert await asyncio.wait_for(process.wait(), 40) == 0, log.read_text()
        run = Run.load(data)
        assert_all_told(run)
        assert run.workload["counts"]["closed: 1001"] == SESSIONS
        assert "PUSH offline" not in run.steps[0].metrics
        assert run.series["sessions"][-1][1] == SESSIONS
        assert recorded(run.steps[0])["STOMP back"] == SESSIONS
        assert (run.steps[0].counts["planned_restarts"], run.faults) == (1, [])
        assert "hold after the restart" in {phase.name for phase in run.phases}
        await server.finish()
    finally:
        server.close()


NO_RESTART = "The server was not restarted: it closed no connection."


@pytest.mark.parametrize(
    ("restart", "planned", "faults"),
    [
        ((), 0, [NO_RESTART]),
        (("--restart", "true"), 1, [NO_RESTART]),
        (
            ("--restart", "false"),
            0,
            ["--restart failed: Command '['false']' returned non-zero exit status 1.", NO_RESTART],
        ),
    ],
)
async def test_a_restart_that_did_not_happen_is_a_fault(restart, planned, faults, server, tmp_path):
    _, said, run = await to_end("rolling", *restart, server=server, folder=tmp_path)
    assert run is not None, said
    assert run.faults == faults
    assert run.steps[0].counts["planned_restarts"] == planned


BROKEN_SCRIPT = """
from loadtest.fleet import FleetUser


class Broken(FleetUser):
    def script(self):
        self.arrive()
        raise RuntimeError("on purpose")
"""


async def test_a_script_that_raises_is_a_fault_and_is_not_run_again(server, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(BROKEN_SCRIPT)
    _, said, run = await to_end(file, server=server, folder=tmp_path)
    assert run is not None, said
    assert run.faults == ["The script of broken ended early: RuntimeError('on purpose')."]
    assert run.workload["counts"]["connects"] == run.steps[0].counts["begun"] == SESSIONS
    assert "Traceback" not in said


RAISING_TIMER = """
from loadtest.fleet import FleetUser


class Raising(FleetUser):
    def script(self):
        self.arrive()
        self.crowd.engine.at(self.crowd.engine.now(), {}.pop, "nothing")
        self.wait_for_ever()
"""


async def test_what_the_harness_itself_did_wrong_is_counted(server, tmp_path):
    file = tmp_path / "raising.py"
    file.write_text(RAISING_TIMER)
    _, said, run = await to_end(file, server=server, folder=tmp_path)
    assert run is not None, said
    assert run.steps[0].counts["harness_errors"] == 1


ANSWERS = """
import itertools
from loadtest.probe import RestClient
from loadtest.scenarios.rest import Rest

answers = itertools.cycle(([], {"isOnline": 1}, {"u": []}, None))


def request(self, *_):
    self.sent += 1
    return next(answers)


RestClient.request = request
"""


async def test_a_rest_answer_of_the_wrong_shape_is_a_failure(server, tmp_path):
    file = tmp_path / "answers.py"
    file.write_text(ANSWERS)
    _, said, run = await to_end(file, "--rest-rate", 50, server=server, folder=tmp_path)
    assert run is not None, said
    kinds = {f"REST {kind}" for kind in ("friends", "batch", "check")}
    assert {f"{kind}: ProbeError" for kind in kinds} <= run.steps[0].errors.keys()
    assert not kinds & recorded(run.steps[0]).keys()
    assert "Traceback" not in said


ONE_IN_200 = """
import itertools
from loadtest.probe import RestClient
from loadtest.scenarios.rest import Rest

numbers = itertools.count()
ask = RestClient.request


def request(self, *what):
    answer = ask(self, *what)
    return None if next(numbers) % 200 == 20 else answer


RestClient.request = request
"""


async def test_data_that_could_not_be_written_begin_no_run(server, tmp_path):
    where = tmp_path / "nowhere" / "x.json"
    code, said, run = await to_end("hold", "--run-json", where, server=server, folder=tmp_path)
    assert (code, run) == (2, None)
    (line,) = [line for line in said.splitlines() if "--run-json" in line]
    assert f"--run-json: {where} cannot be written: No such file" in line and "Traceback" not in said


@pytest.mark.parametrize(("answers", "code"), ((ONE_IN_200, 0), (ANSWERS, 1)))
async def test_few_failures_are_no_breach_and_many_are(server, tmp_path, answers, code):
    """Whatever the SLO says of latencies, in which no failure is; Locust's own exit code is 1 for a single one."""
    file = tmp_path / "answers.py"
    file.write_text(answers)
    options = ("--rest-rate", 100, "--slo", "STOMP CONNECTED max<60s")
    found, said, run = await to_end(file, *options, server=server, folder=tmp_path)
    assert run is not None and run.steps[0].errors, said
    assert run.ok == (code == 0), said
    assert found == code


async def test_a_frozen_server_shows_in_the_percentiles(server, tmp_path):
    """An open schedule counts from the intended moment: who waits for answers would see a few slow ones only."""
    options = ("--headless", "--sessions", 50, "--run-time", 7, "--run-json", tmp_path / "run.json")
    more = ("--beat-receipts", 1, "--period", 0.2, "--connect-rate", 500, "--late", 5)
    async with locust("hold", *options, *more, host=server.http, log=tmp_path / "log") as process:
        await server.wait_online("load-hold-0-0000049", timeout=10)
        pids = server._freezable()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(2)  # for so long it is frozen: that is what is measured
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        await asyncio.wait_for(process.wait(), 40)
    run = Run.load(tmp_path / "run.json")
    worst = Histogram.decode(run.steps[0].histograms["STOMP heartbeat"]).max()
    assert worst is not None
    assert worst > 1800
    assert run.steps[0].ledger["missing"] == 0


async def test_locusts_csv_counts_the_same(server, tmp_path):
    code, said, run = await to_end("hold", "--csv", tmp_path / "stats", server=server, folder=tmp_path)
    assert code == 0, said
    ours = recorded(run.steps[0])
    assert ours.pop("generator lag"), "the harness' own, of which Locust is told nothing: it is no request"
    locusts = counts(tmp_path / "stats_stats.csv")
    assert locusts.keys() == ours.keys()
    # Locust writes its files when the time is over, and the run then waits for the last answers.
    assert [name for name in ours if not 0.9 * ours[name] <= locusts[name] <= ours[name]] == []


def recorded(step):
    """Samples by metric, in the ramp and since."""
    found: Counter[str] = Counter()
    for of in (step.ramp, step.histograms):
        found.update({name: len(Histogram.decode(text)) for name, text in of.items()})
    return found


def counts(file):
    """Requests by name, of Locust's CSV."""
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["Name"] != "Aggregated"]
    return {f"{row['Type']} {row['Name']}": int(row["Request Count"]) for row in rows}


def assert_merged(run, file, sessions):
    assert_all_told(run)
    assert sorted(worker["connected"] for worker in run.harness["workers"]) == [sessions // 2, sessions - sessions // 2]
    ours = recorded(run.steps[0])
    assert ours["STOMP CONNECTED"] == ours["STOMP watch"] == run.steps[0].counts["connects"] == sessions
    # Beats and lag go on between the last report and the end; what happened once is the same in both.
    theirs = counts(file)
    assert {name: theirs[name] for name in ("STOMP CONNECTED", "STOMP watch", "PUSH online")} == {
        name: ours[name] for name in ("STOMP CONNECTED", "STOMP watch", "PUSH online")
    }
    assert max(value for _, value in run.series["sessions"]) == sessions


async def test_two_processes_share_the_sessions_and_merge(server, tmp_path):
    port = free_port()  # Locust's own may be in use
    reach = ("--master-port", port, "--master-bind-port", port)
    code, said, run = await to_end(
        "hold",
        *reach,
        "--processes",
        2,
        "--csv",
        tmp_path / "stats",
        server=server,
        folder=tmp_path,
        sessions=61,
        seconds=6,
    )
    assert code == 0, said
    assert_merged(run, tmp_path / "stats_stats.csv", 61)


async def test_a_master_and_two_workers_merge(server, tmp_path):
    port = free_port()
    reach = ("--master-port", port)
    workers = [
        locust("hold", "--worker", *reach, host=server.http, log=tmp_path / f"worker{number}") for number in range(2)
    ]
    async with workers[0] as one, workers[1] as two:
        code, said, run = await to_end(
            "hold",
            *("--master", "--master-bind-port", port, "--expect-workers", 2, "--csv", tmp_path / "stats"),
            server=server,
            folder=tmp_path,
            sessions=51,
            seconds=6,
        )
        assert code == 0, said
        assert [await asyncio.wait_for(worker.wait(), 10) for worker in (one, two)] == [0, 0]
    assert_merged(run, tmp_path / "stats_stats.csv", 51)


async def test_the_web_page_starts_shows_and_stops(server, tmp_path):
    port, data = free_port(), tmp_path / "run.json"
    page = f"http://127.0.0.1:{port}"
    options = ("--web-host", "127.0.0.1", "--web-port", port, "--sessions", 10, "--run-json", data)
    async with locust("hold", *options, host=server.http, log=tmp_path / "log"):
        said = await wait_until(lambda: asyncio.to_thread(fetch, page), 20, what="the page")
        assert "<html" in said
        assert "connect_rate" in said
        form = "user_count=1&spawn_rate=1&sessions=20&stay=&period=0.5"
        assert json.loads(await asyncio.to_thread(fetch, f"{page}/swarm", form))["success"]

        async def names():
            stats = json.loads(await asyncio.to_thread(fetch, f"{page}/stats/requests"))["stats"]
            return {f"{row['method']} {row['name']}": row["num_requests"] for row in stats}

        async def all_are_there():
            return (await names()).get("STOMP watch") == 20

        await wait_until(all_are_there, 15, what="20 watches on the page")
        assert {"WS connect", "STOMP CONNECTED", "PUSH online"} <= set(await names())
        assert json.loads(await asyncio.to_thread(fetch, f"{page}/stop", ""))["success"]
        await wait_until(data.exists, 10, what="the data of the run")
    assert_all_told(Run.load(data))


def fetch(url, form=None):
    """What is answered; "" while nobody listens."""
    try:
        with urllib.request.urlopen(url, None if form is None else form.encode(), timeout=20) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError:
        raise
    except OSError:
        return ""


async def test_two_scenarios_and_probes_at_once(server, tmp_path):
    options = ("-u", 5, "-r", 10, "--every", 0.5)
    code, said, run = await to_end("fanout,rest", *options, server=server, folder=tmp_path, seconds=5)
    assert code == 0, said
    assert_all_told(run)
    assert run.title == "fanout and rest"
    assert run.steps[0].counts["connects"] == 2 * SESSIONS
    assert {"PUSH offline", "REST batch", "STOMP DISCONNECT"} <= recorded(run.steps[0]).keys()


@pytest.mark.parametrize(
    ("why", "says"),
    [
        ({"secret": "another secret, of 32 bytes and more"}, "wrong token"),
        ({"server": f"http://127.0.0.1:{free_port()}"}, "the target is down"),
        ({"sessions": 2_000_000}, "nofile is too low"),
        ({"options": ("--share", 2)}, "--share 2: is a share, from 0 to 1"),
        ({"options": ("--sources", "192.0.2.77")}, "'192.0.2.77' is no address of this machine"),
    ],
)
async def test_what_would_spoil_the_run_is_one_line_before_it(why, says, server, tmp_path):
    options = why.get("options", ())
    why = {name: value for name, value in why.items() if name != "options"}
    code, said, run = await to_end("hold", *options, **({"server": server, "folder": tmp_path} | why))
    assert code == 2
    assert run is None
    assert [line for line in said.splitlines() if says in line], said
    assert "Traceback" not in said


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_what_ports_there_are_is_known_for_named_addresses_of_this_machine_alone(where, tmp_path):
    """Nothing listens there: that is looked at after the ports."""
    port = free_port()
    reach = ("--master-port", port, "--master-bind-port", port)
    options = {
        "here": (*reach, "--processes", 2, "--sources", ""),
        "elsewhere": (*reach, "--master", "--expect-workers", 2, "--sources", "127.0.0.1"),
    }
    down = f"http://127.0.0.1:{free_port()}"
    _, said, _ = await to_end("hold", *options[where], server=down, folder=tmp_path, sessions=30_000)
    if "nofile is too low" in said:
        pytest.skip("the limit of open files is met before that of ports")
    assert "the target is down" in said and "too few ports" not in said


async def test_source_addresses_are_taken_as_they_are_needed(server, tmp_path):
    code, said, run = await to_end("hold", "--sources", "", server=server, folder=tmp_path)
    assert code == 0, said
    assert run is not None
    assert run.limits["source_addresses"] == "as many as needed"
    assert run.steps[0].counts["connected"] == SESSIONS


async def test_what_locust_forked_ends_with_the_refused_run(tmp_path):
    port = free_port()
    reach = ("--master-port", port, "--master-bind-port", port)
    down = f"http://127.0.0.1:{free_port()}"
    code, said, _ = await to_end("hold", *reach, "--processes", 2, server=down, folder=tmp_path)
    assert code == 2
    assert said.count("the target is down") == 1

    def alive():
        return [
            one.pid for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or ())
        ]

    await wait_until(lambda: not alive(), 10, what="the workers' end")


async def test_a_breach_of_the_slo_is_told_by_the_exit_code(server, tmp_path):
    code, said, run = await to_end(
        "hold", "--slo", "STOMP CONNECTED max<0.001ms", server=server, folder=tmp_path, seconds=3
    )
    assert code == 1
    assert run.ok is False
    assert re.search(r"Not kept: STOMP CONNECTED max was", said)
