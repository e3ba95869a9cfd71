"""The command: a user's mistake is one line and exit code 2; a run ends with its report and the code of its verdict."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from loadtest import cli, launch, preflight, slo, verdict
from loadtest.embedded import Embedded, EmbeddedError
from loadtest.launch import LaunchError
from loadtest.run import Phase, Run
from loadtest.target import load
from tests.loadtest.made_up import made_up
from tests.loadtest.one_step import one_step
from tests.support.server import ROOT

SECRET = "a secret of more than thirty-two bytes"


@pytest.fixture(scope="module")
def server():
    with Embedded(lease=2) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("LOADTEST_", "LOCUST_", "PRESENCE_"))]:
        monkeypatch.delenv(name)


def loadtest(*args, **kwargs):
    command = [sys.executable, "-m", "loadtest", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=55, check=False, **kwargs)


def mistake(*args, **kwargs):
    """Run it, and return the one line that it says."""
    done = loadtest(*args, **kwargs)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "", done.stdout + done.stderr
    return done.stderr


def target_file(tmp_path, http, secret=SECRET):
    path = tmp_path / "target.toml"
    path.write_text(f'lease = 2\n[[instances]]\nhttp = "{http}"\n[token]\nsecret = "{secret}"\n')
    return path


def test_a_target_that_is_down(tmp_path):
    with Embedded(lease=2) as gone:
        path = target_file(tmp_path, gone.http)

    assert "the target is down: Connection refused" in mistake("run", "hold", "--target", path)


def test_a_wrong_token(tmp_path, server):
    said = mistake("run", "hold", "--target", target_file(tmp_path, server.http))
    assert f"{server.http}: wrong token" in said
    said = mistake("capacity", "--host", server.http, env={**os.environ, "LOADTEST_SECRET": SECRET})
    assert f"{server.http}: wrong token" in said


def test_too_few_open_files(server):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1_000, 1_000))

    said = mistake("run", "hold", "--sessions", 2_000, "--target", server.target, preexec_fn=few)
    assert (
        "nofile is too low: 2,000 sessions in one process need 2,256 open files each, the hard limit is 1,000" in said
    )
    # No target: it is known before a server is started.
    said = mistake("run", "hold", "--sessions", 700, preexec_fn=few)
    assert "nofile is too low for the server started here" in said and "--workers 2" in said


def test_too_few_ports(server):
    many = ["--sessions", 400_000, "--processes", 64, "-o", "sources=127.0.0.1"]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < 400_000 / 64 + preflight.SPARE_FILES:
        pytest.skip("the limit of open files is met before that of ports")

    assert "too few ports: 400,000 sessions, but only" in mistake("run", "hold", *many, "--target", server.target)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "steadily"], "there is no scenario 'steadily'; there are .*hold"),
        (["run", "hold", "--slo", "p99"], "SLO: 'p99' is no clause"),
        (["run", "hold", "-o", "=60"], "-o =60: must be NAME=VALUE"),
        (["run", "hold", "-o", "run-time=60s"], "-o run-time=60s: is --seconds here"),
        (["run", "hold", "-o", "connect-rate=fast"], "-o connect-rate=fast: must be connect-rate=NUMBER, of 0.1 or"),
        (["run", "hold", "-o", "connect-rate"], "-o connect-rate: must be connect-rate=NUMBER"),
        (["run", "hold", "-o", "connect-rate=0"], "-o connect-rate=0: must be connect-rate=NUMBER"),
        (["capacity", "-o", "connect-rate=inf"], "-o connect-rate=inf: must be connect-rate=NUMBER"),
        (["run", "hold", "-o", "late=nan"], "-o late=nan: must be late=NUMBER, of 0 or more"),
        (["run", "hold", "--target", "none.toml"], "none.toml: No such file"),
        (["run", "hold", "--target", "none.toml", "--host", "http://127.0.0.1:1"], "--host and --target .* exclude"),
        (["run", "hold", "--target", "none.toml", "--workers", "1"], "--workers is of the server started here"),
        (["capacity", "--host", "http://127.0.0.1:1", "--lease", "60"], "--lease is of the .*: with --host none is"),
        (["run", "hold", "--html", "pyproject.toml/a.html"], "pyproject.toml cannot be written: "),
        (["run", "hold", "--json", "pyproject.toml/a.json"], "pyproject.toml cannot be written: "),
        (
            ["capacity", "--folder", "pyproject.toml/reports"],
            "pyproject.toml/reports cannot be written: Not a directory",
        ),
        (["run", "hold", "--html", "a.json"], "a.json: the report and its data cannot be one file"),
        (["capacity", "--growth", "inf"], "'--growth': inf is no number"),
        (["capacity", "--growth", "nan"], "'--growth': nan is no number"),
        (["run", "--seconds", "inf"], "'--seconds': inf is no number"),
        (["floor", "--port", "70000"], "'--port': 70000 is not in the range 0<=x<=65535"),
        (["capacity", "--host", "http://127.0.0.1:1"], "no way to make tokens"),
        (["report", "pyproject.toml"], "pyproject.toml is no data of a run"),
        (["compare", "pyproject.toml", "pyproject.toml"], "pyproject.toml is no data of a run"),
    ],
)
def test_other_mistakes(args, said):
    assert re.search(said, mistake(*args))


def test_the_environment_names_the_target(tmp_path):
    environment = {**os.environ, "LOADTEST_TARGET": str(tmp_path / "none.toml")}

    assert "none.toml: No such file" in mistake("run", "hold", env=environment)
    both = mistake("run", "hold", "--host", "http://127.0.0.1:1", env=environment)
    assert "--host and --target (or LOADTEST_TARGET) exclude each other" in both


def test_an_address_of_ipv6(tmp_path):
    said = mistake("run", "hold", "--target", target_file(tmp_path, "http://[::1]:8080"))
    assert said == "loadtest: http://[::1]:8080: ::1 is an IPv6 address: the crowd connects over IPv4 only\n"


def test_an_option_that_the_scenario_does_not_know(tmp_path, server):
    done = loadtest("run", "hold", "-o", "stray=60", "--target", server.target, "--folder", tmp_path)

    assert done.returncode == 2 and "hold did not run (exit code 2): unrecognized arguments: --stray" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_set_up_ends_with_its_report(tmp_path):
    html, data = tmp_path / "new" / "report.html", tmp_path / "run.json"
    done = loadtest(
        *("run", "hold", "--sessions", 40, "--seconds", 5, "--lease", 10, "--period", 3, "-o", "friends=10"),
        *("--slo", "lost=0, PUSH online max<30s", "--folder", tmp_path, "--html", html, "--json", data),
    )

    run = Run.load(data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{html}  {data}" and done.stdout.splitlines()[-2].endswith(": OK")
    assert "<svg" in html.read_text()
    assert run.ok and run.steps[0].counts["connected"] == 40 and run.steps[0].ledger["expected"] > 0
    assert run.target["configuration"]["workers"] == 1 and run.target["lease_seconds"] == 10
    assert run.target["file"] == "made for this run", "what was removed with it helps nobody"
    assert run.steps[0].resources["server_rss_bytes"] > 10_000_000 and run.series["server_cpu_percent"]
    assert run.command.startswith("python -m loadtest run hold --sessions 40")
    assert "secret" not in data.read_text()
    port = str(urlsplit(run.target["instances"][0]).port)
    assert [process for process in psutil.process_iter() if port_of(process) == port] == []


def port_of(process):
    """The port that a server was started for; its store has the same environment."""
    try:
        return process.environ().get("PRESENCE_PORT")
    except psutil.Error:  # it has ended, or is another's
        return None


def test_a_breach_is_exit_code_1(tmp_path, server):
    done = loadtest(
        *("run", "hold", "--sessions", 20, "--seconds", 3, "--target", server.target, "--period", 1),
        *("--slo", "STOMP CONNECTED max<0.001ms", "-o", "friends=10", "--folder", tmp_path),
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"At 20 sessions: STOMP CONNECTED max was [\d.]+ m?s, allowed is less than 0.001 ms", done.stdout)
    assert not Run.load(tmp_path / "hold.json").ok


def test_data_of_the_wrong_shape_is_a_mistake(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"title": "x", "series": []}')
    done = CliRunner().invoke(cli.main, ["report", str(path)])
    assert done.exit_code == 2 and f"{path} is no data of a run" in done.output


def test_the_embedded_server_ends_with_its_context():
    with Embedded(workers=2, lease=5) as running:
        processes = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        folder = running.target.parent
        assert len(processes) >= 4 and running.target.stat().st_mode & 0o077 == 0

    assert not psutil.wait_procs(processes, timeout=5)[1]
    assert not folder.exists()


def test_an_embedded_server_that_does_not_start_says_why():
    with (
        pytest.raises(EmbeddedError, match=r"exit code 2: .*PRESENCE_WATCH_POLICY"),
        Embedded(settings={"watch_policy": "everyone"}),
    ):
        pass


def _connected(pid):
    """Whether a generator that this process has started is in the middle of its run."""
    generators = [child for child in psutil.Process(pid).children() if "locust" in child.cmdline()]
    return any(len(one.net_connections("tcp")) > 10 for one in generators)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, end):
    # As from a terminal; a shell's background job, and so its children, ignore SIGINT.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "loadtest", "run", "hold"]
    command += ["--seconds", "300", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        log = tmp_path / "1-hold.log"
        deadline = time.monotonic() + 30
        while not (log.exists() and _connected(process.pid)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(end)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 128 + end and len(children) >= 2
    assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.mark.timeout(180)
def test_report_and_comparison_of_data(tmp_path):
    for name, factor in (("a", 1.0), ("b", 1.2)):
        made_up(factor=factor, storm=False).save(tmp_path / f"{name}.json")

    assert loadtest("report", tmp_path / "a.json").returncode == 0
    assert "12,000 sessions" in (tmp_path / "a.html").read_text()
    both = loadtest("compare", tmp_path / "a.json", tmp_path / "b.json", "--html", tmp_path / "new" / "both.html")
    assert both.returncode == 0, both.stderr
    assert "<html" in (tmp_path / "new" / "both.html").read_text()


class TestCapacity:
    """Over runs that are made up: what a server that holds so many would give."""

    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        jobs = []

        def runs(holds, generator=10**9, returns=10**9, change=lambda *_: None):
            def made(job, server, *, said):
                jobs.append(job)
                run = one_step(
                    started=f"2026-03-02T{9 + len(jobs):02}:00:00Z",
                    sessions=job.sessions,
                    ms=400 if job.sessions > holds else 10,
                )
                run.steps[0].resources["generator_cpu_percent"] = 99.0 if job.sessions > generator else 20.0
                if job.scenario == "storm":
                    run.workload["storm"] = {}
                    run.phases = [Phase("hold before the storm", 0, 20), Phase("storm", 20, 60), Phase("hold", 60, 80)]
                    run.steps[0].counts["back_percent"] = 50 if job.sessions > returns else 100
                change(job, run)
                verdict.judge(run, job.slo)
                return run

            monkeypatch.setattr(launch, "run", made)
            monkeypatch.setattr(preflight, "check", lambda *_, **__: None)
            path = target_file(tmp_path, "http://127.0.0.1:9")
            args = ["capacity", "--target", str(path), "--start", "1000", "--max", "4000", "--folder", str(tmp_path)]
            done = CliRunner().invoke(cli.main, args)
            return done, jobs, json.loads((tmp_path / "capacity.json").read_text())

        return runs

    def test_says_how_many_and_what_stopped_it(self, run):
        done, jobs, data = run(2_000)

        assert done.exit_code == 0, done.output
        assert re.match(r"2,000 sessions at .*; at 2,100 sessions p99 was", data["verdict"]), data["verdict"]
        assert [(job.scenario, job.sessions, job.seconds) for job in jobs[-2:]] == [
            ("steady", 2_000, 900),
            ("storm", 2_000, 180),
        ]
        assert (jobs[-2].slo, jobs[-1].slo) == (slo.DEFAULT, "lost=0")
        assert {job.options["period"] for job in jobs} == {"1"}
        assert {job.seconds for job in jobs[:-2]} == {4}  # a lease of 2 s and two heartbeats
        assert len(data["steps"]) == len(jobs) and data["ok"]

    def test_a_generator_at_its_limit_is_a_floor(self, run):
        done, _, data = run(10**6, generator=2_000)

        assert done.exit_code == 0, done.output
        assert "the step at 2,100 sessions was not to be believed: the generator was the limit" in data["verdict"]
        assert "a floor: the server may hold more" in data["verdict"]
        assert all(step["sessions"] <= 2_000 for step in data["steps"])
        assert any("not to be believed" in sentence for _, sentence in data["validity"])

    def test_a_storm_after_which_not_all_return_is_no_confirmation(self, run):
        done, _, data = run(2_000, returns=1_900)

        assert done.exit_code == 0, done.output
        assert data["verdict"].startswith("1,800 sessions")
        assert "the storm at 2,000 sessions was not kept: only 50 % of the sessions were back at the" in data["verdict"]

    def test_a_storm_that_never_came_confirms_nothing(self, run):
        def change(job, run):
            run.phases = [phase for phase in run.phases if phase.name != "storm"]

        done, _, data = run(2_000, change=change)

        assert done.exit_code == 2, done.output
        said = "the storm at 1,600 sessions was not to be believed: the run ended before its storm had begun"
        assert data["validity"][0] == ["fatal", f"There is no verdict: {said}."]

    def test_a_server_that_holds_nothing_is_exit_code_1(self, run):
        done, _, data = run(0)

        assert done.exit_code == 1, done.output
        assert data["verdict"].startswith("No load was confirmed: at 60 sessions p99 was 400 ms")

    def test_the_headline_is_that_of_the_long_hold(self, run):
        def change(job, run):
            run.steps[0].sessions += 37  # the most that there were at a time: who leaves and who comes overlap
            run.steps[0].resources["generator_cpu_percent"] = 80
            if job.scenario == "storm":
                run.steps[0].sessions += 500
                run.steps[0].seconds, run.steps[0].achieved = 2_000, 150

        _, jobs, data = run(2_000, change=change)

        assert data["verdict"].startswith("2,000 sessions at 100 actions/s, notices within 10.0 ms"), data["verdict"]
        assert [step["sessions"] for step in data["steps"]] == [job.sessions for job in jobs]
        said = {text.partition(":")[0] for _, text in data["validity"]}
        where = {"steady": "at", "storm": "in the storm of"}
        assert said == {f"{where[job.scenario]} {job.sessions:,} sessions" for job in jobs}

    def test_what_bounds_it_is_named_by_its_process(self, run):
        def change(job, run):
            busy = job.sessions > 2_000
            run.machine["cores"] = 4
            run.steps[0].resources |= {
                "server_cpu_percent": 352 if busy else 88,
                "server_busiest_cpu_percent": 70 if busy else 22,
            }

        _, _, data = run(2_000, change=change)
        assert (
            ", limited by the CPU of the machine (the server used 352 %, the generator 20 % on 4 cores); at 2,100"
            in (data["verdict"])
        )

    def test_a_breach_beside_a_full_generator_is_a_floor(self, run):
        def change(job, run):
            run.steps[0].resources["generator_cpu_percent"] = 90

        _, _, data = run(2_000, change=change)
        assert "limited by the CPU of the generator (90 % of a core) (a floor: the server may" in data["verdict"]

    def test_beyond_the_winner_nothing_makes_it_invalid(self, run):
        """Neither a storm in which much was not made, nor a run of which the load test says that it went wrong."""

        def change(job, run):
            if job.scenario == "storm" and job.sessions > 1_900:
                run.steps[0].achieved = 50
            if job.sessions > 2_000:
                run.faults.append("A worker ended.")

        done, _, data = run(2_000, returns=1_900, change=change)

        assert done.exit_code == 0, done.output
        assert data["ok"] and data["verdict"].startswith("1,800 sessions")
        assert not [text for level, text in data["validity"] if level == "fatal"]
        assert ["warning", "At 2,100 sessions the run was not to be believed: A worker ended."] in data["validity"]

    def test_an_interrupted_search_writes_what_it_has(self, run):
        def change(job, _):
            if job.sessions > 1_500:
                raise KeyboardInterrupt

        done, _, data = run(10**6, change=change)

        assert done.exit_code == 130, done.output
        assert data["verdict"] == (
            "No load was confirmed: the search was interrupted; 1,500 sessions were kept for 4 s"
        )
        assert [step["sessions"] for step in data["steps"]] == [1_000, 1_500] and not data["ok"]
        assert ["fatal", "There is no verdict: the search was interrupted; 1,500 sessions were kept for 4 s."] in data[
            "validity"
        ]

    def test_a_server_that_dies_leaves_a_report(self, run):
        def change(job, _):
            if job.sessions > 1_500:
                raise LaunchError("steady did not run (exit code 2): the target is down")

        done, _, data = run(10**6, change=change)

        assert done.exit_code == 2, done.output
        said = "the server was gone after 1,500 sessions: steady did not run (exit code 2): the target is down"
        assert data["verdict"].startswith(f"No load was confirmed: {said}; 1,500 sessions were kept for 4 s")
        assert [step["sessions"] for step in data["steps"]] == [1_000, 1_500]

    @pytest.mark.parametrize("option", ["--long-hold", "--storm", "--lease"])
    def test_times_are_of_a_second_or_more(self, option):
        done = CliRunner().invoke(cli.main, ["capacity", "--target", "none.toml", option, "0.5"])
        assert done.exit_code == 2 and f"Invalid value for '{option}'" in done.output

    def test_where_no_long_hold_is_to_be_believed_there_is_no_verdict(self, run):
        def change(job, run):
            if job.seconds == 900:
                run.faults.append("A worker ended.")

        done, _, data = run(10**6, change=change)

        assert done.exit_code == 2, done.output
        assert not any(step["breach"] for step in data["steps"])
        assert data["validity"][0] == [
            "fatal",
            "There is no verdict: the long hold at 3,200 sessions was not to be believed: a worker ended.",
        ]


def test_the_scenarios_are_there():
    assert "hold" in launch.scenarios() and all(
        (launch.SCENARIOS / f"{one}.py").is_file() for one in launch.scenarios()
    )
    assert Path(cli.__file__).parent == launch.SCENARIOS.parent


def test_sessions_beat_twice_a_lease_and_hidden_tabs_once(tmp_path):
    target = load(target_file(tmp_path, "http://127.0.0.1:9"))
    common: dict[str, Any] = {
        "period": None,
        "text": slo.DEFAULT,
        "processes": 1,
        "options": [],
        "folder": "x",
        "html": None,
        "data": None,
    }

    assert cli._Ready(target, None, common).job("steady", 10, 5).options["period"] == "1"  # the lease is 2 s
    assert cli._Ready(target, None, common).job("background", 10, 5).options["period"] == "2"
    assert cli._Ready(target, None, common | {"period": 7.0}).job("background", 10, 5).options["period"] == "7"
