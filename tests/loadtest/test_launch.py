"""What becomes of a scenario's data: judged, sampled, and several as one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest import launch, preflight, verdict
from loadtest.launch import Job
from loadtest.run import Phase
from loadtest.target import Instance, Target
from tests.loadtest.one_step import one_step


def job(sessions=1_000, hosts=("127.0.0.1",), **fields):
    instances = [Instance(f"http://{host}:80", host, 80, "/ws") for host in hosts]
    target = Target(instances=instances, secret="x" * 32)
    fields = {"scenario": "steady", **fields}
    fields = {"folder": Path("reports"), **fields}
    return Job(target=target, sessions=sessions, seconds=60, name="a", **fields)


@pytest.mark.parametrize(
    ("run", "code"),
    [
        (one_step(), 0),
        (one_step(ms=300), 1),
        (one_step(missing=1, received=1_999), 1),
        (one_step(missing=1), 2),  # the books do not balance
    ],
)
def test_the_exit_code_tells_kept_from_breached_from_invalid(run, code):
    verdict.judge(run, "p99<250ms, lost=0, false-offline=0")

    assert verdict.exit_code(run) == code
    assert run.ok is (code == 0)
    assert run.verdict.startswith("100 sessions at 100 actions/s")


def test_what_cannot_be_told_makes_the_run_invalid():
    run = one_step()
    verdict.judge(run, "STOMP CONNECTED p50<1s")

    assert verdict.exit_code(run) == 2
    assert run.validity == [
        ("fatal", "At 100 sessions STOMP CONNECTED p50 cannot be told: there were no samples of STOMP CONNECTED.")
    ]


def test_beyond_its_limit_a_server_makes_no_run_invalid():
    # It took no connections, so fewer actions were made than intended; a step before it kept all.
    kept, broken = one_step(), one_step(sessions=200, ms=300)
    broken.steps[0].achieved = 50
    whole = launch.joined("two", [kept, broken])
    verdict.judge(whole, "p99<250ms, lost=0")

    assert verdict.exit_code(whole) == 1
    assert whole.validity == [("warning", "at 200 sessions: only 50.0 % of the intended actions were made (50.0/s).")]
    verdict.judge(broken, "p99<250ms, lost=0")
    assert verdict.exit_code(broken) == 2  # alone it is not known whether it was the server


def test_a_server_that_does_not_hold_the_sessions_is_at_fault():
    """Whatever the SLO says: it is no run to be called invalid, and none to be called kept."""
    run = one_step(sessions=6_000)
    run.steps[0].counts = {
        "asked": 6_000,
        "begun": 6_000,
        "connects": 9_000,
        "connected": 5_000,
        "wanted": 6_000,
        "prevented": 500,
    }
    run.steps[0].errors = {"WS connect: Refused": 4_000}
    verdict.judge(run, "p99<250ms, lost=0")

    assert verdict.exit_code(run) == 1
    assert run.steps[0].breach == (
        "only 5,000 of 6,000 sessions were there at the end; "
        "500 heartbeats could not be sent, as the server had refused or closed their sessions"
    )


def test_a_server_that_died_is_at_fault():
    """All had been connected: that nobody is there at the end is no reason not to believe it."""
    run = one_step()
    run.steps[0].counts = {"asked": 100, "begun": 100, "connects": 100, "connected": 0, "wanted": 100}
    run.steps[0].errors = {"STOMP session: Closed": 100}
    verdict.judge(run, "lost=0")

    assert verdict.exit_code(run) == 1, run.validity


def test_a_server_that_tells_nothing_is_at_fault():
    """Of no notice no latency can be told; that all are lost is enough."""
    run = one_step(received=0, missing=2_000)
    run.steps[0].histograms = {}
    verdict.judge(run, "p99<250ms, lost=0")

    assert verdict.exit_code(run) == 1
    untold = "At 100 sessions p99 cannot be told: there were no samples of notices."
    assert run.validity == [("warning", untold)]


def test_a_fault_of_the_load_test_is_one_though_every_step_is_broken():
    broken = [one_step(ms=300), one_step(ms=300, sessions=200)]
    broken[1].faults = ["1 of 2 workers did not report."]
    whole = launch.joined("two", broken)
    verdict.judge(whole, "p99<250ms")

    assert verdict.exit_code(whole) == 2
    assert whole.validity[0] == ("fatal", "1 of 2 workers did not report.")


@pytest.mark.parametrize(
    ("name", "seconds", "slo", "said"),
    [
        ("PUSH offline-by-loss", 16, "p99<250ms", "notices of lost connections came within 16,0"),
        ("PUSH offline-by-expiry", 16, "p99<250ms", "notices of ended leases came within 16,0"),
        ("PUSH offline-by-loss", 14, "p99<250ms", None),
        ("PUSH offline-by-loss", 16, "lost=0", None),  # as of a storm
    ],
)
def test_who_takes_too_long_to_find_out_is_at_fault(name, seconds, slo, said):
    """A quarter of the lease (SESS-07); `p99` is about those who say that they go."""
    run, late = one_step(), one_step(ms=1000 * seconds)
    run.target["lease_seconds"] = 60.0
    run.steps[0].histograms[name] = late.steps[0].histograms["PUSH online"]
    verdict.judge(run, slo)

    assert verdict.exit_code(run) == (1 if said else 0)
    assert (run.steps[0].breach or "").startswith(said or "")
    assert "a quarter of a lease is 15 s" in (run.steps[0].breach or "") or not said


@pytest.mark.parametrize(("unanswered", "code"), [(13, 0), (14, 1)])
def test_a_server_that_hangs_is_at_fault(unanswered, code):
    """What was recorded before it hung may keep all that the SLO asks."""
    run = one_step()
    run.steps[0].counts = {"receipts": 1_000, "receipts_unanswered": unanswered}
    verdict.judge(run, "p99<250ms, lost=0")

    assert verdict.exit_code(run) == code
    said = "14 of 1,000 heartbeats that asked for a receipt got none"
    assert run.steps[0].breach == (said if code else None)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({"REST check: ProbeError": 3, "REST check: TimeoutError": 2}, "5 of 5 attempts at REST check failed"),
        ({"PUSH online: ProbeError": 24}, "24 of 2,024 attempts at PUSH online failed"),
        ({"PUSH online: ProbeError": 23}, None),
        ({"STOMP watch: ProbeError": 4}, "4 of 4 attempts at STOMP watch failed"),
        ({"STOMP watch: ProbeError": 3}, None),
    ],
)
def test_what_always_fails_is_a_breach(errors, said):
    """Failures are in no latency, and a probe that catches the server in a lie is one of them."""
    run = one_step()
    run.steps[0].errors = errors
    verdict.judge(run, "p99<250ms, lost=0")

    assert run.steps[0].breach == said
    assert verdict.exit_code(run) == (1 if said else 0)


@pytest.mark.parametrize(
    ("closed", "connects", "said"),
    [
        (5_000, 5_100, "the server ended 5,000 sessions that were to stay, of 5,100 connects"),
        (5, 100, "the server ended 5 sessions that were to stay, of 100 connects"),
        (4, 100, None),
    ],
)
def test_a_server_that_throws_its_clients_out_is_at_fault(closed, connects, said):
    """They return at once, so that all are there at the end, and what was told in between keeps the SLO."""
    run = one_step()
    run.steps[0].counts = {"connects": connects, "connected": 100, "wanted": 100}
    # An ERROR comes before the close: it is the same session.
    run.steps[0].errors = {"STOMP session: Closed": closed, "STOMP session: StompError": closed}
    verdict.judge(run, "p99<250ms, lost=0")

    assert run.steps[0].breach == said
    assert verdict.exit_code(run) == (1 if said else 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"duplicated": 21}, "21 of 20,000 notices came twice"),
        ({"out_of_order": 21}, "21 of 20,000 notices came out of order"),
        ({"unexpected": 21}, "21 of 20,000 notices were never true"),
        ({"duplicated": 21, "unexpected": 40}, "21 of 20,000 notices came twice; 40 of 20,000 notices were never true"),
        ({"checked": 400, "contradicted": 4}, "4 of 400 answers of REST were never true"),
        ({"duplicated": 3, "out_of_order": 3, "unexpected": 3, "checked": 400, "contradicted": 3}, None),
    ],
)
def test_a_server_that_repeats_or_lies_is_at_fault(wrong, said):
    """Whatever the SLO says: the contract allows none of it, and every notice that was due may have come."""
    allowed = {"duplicated": 20, "out_of_order": 20, "unexpected": 20, "checked": 0, "contradicted": 0}
    run = one_step(expected=20_000, received=20_000, **(allowed | wrong))
    verdict.judge(run, "p99<250ms, lost=0")

    assert run.steps[0].breach == said
    assert verdict.exit_code(run) == (1 if said else 0)


def test_none_lost_is_not_all_that_is_said_of_notices():
    run = one_step(duplicated=2_000, unexpected=500, out_of_order=100, checked=900, contradicted=40)
    verdict.judge(run, "p99<250ms, lost=0")

    assert run.verdict.endswith(
        "none lost, but 2,000 came twice, 100 came out of order, 500 were never true, "
        "40 answers of REST were never true"
    )


def test_failures_are_held_against_the_ramp_as_well():
    run = one_step()
    run.steps[0].errors = {"PUSH online: ProbeError": 30}
    run.steps[0].ramp = dict(run.steps[0].histograms)
    verdict.judge(run, "p99<250ms, lost=0")

    assert run.steps[0].breach is None


def test_hostile_input_that_is_let_in_is_a_breach():
    run = one_step()
    run.steps[0].errors = {"HOSTILE bad token: ProbeError": 3}
    verdict.judge(run, "p99<250ms")
    assert run.steps[0].breach == "hostile input was not kept out: HOSTILE bad token: ProbeError (3)"


def test_without_an_slo_a_run_is_judged_as_well():
    run = one_step()
    run.steps[0].achieved = 50
    verdict.judge(run, "")
    assert verdict.exit_code(run) == 2
    assert run.slo is None


def test_among_others_the_generator_s_fault_is_its_own():
    kept, broken = one_step(), one_step(sessions=200, ms=300)
    broken.steps[0].resources["generator_cpu_percent"] = 99
    whole = launch.joined("two", [kept, broken])
    verdict.judge(whole, "p99<250ms")
    assert verdict.exit_code(whole) == 2


def test_a_generator_at_its_limit_is_at_fault():
    step = one_step(ms=300).steps[0]
    assert verdict.other_cause(step) is None
    step.resources["generator_cpu_percent"] = 99
    assert "generator was the limit" in (verdict.other_cause(step) or "")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"harness_errors": 1}, "the load test itself failed"),
        ({"negative_latencies": 1}, "latencies were negative"),
        ({"server_restarts": 1}, "the scenario did not do it"),
        ({"asked": 100, "begun": 50}, "had begun to connect when the run ended"),
    ],
)
def test_faults_that_are_not_the_server_s_are_no_limit_of_it(counts, said):
    step = one_step(ms=300).steps[0]
    step.counts = counts
    assert said in (verdict.other_cause(step) or "")


def test_books_that_do_not_balance_are_no_limit_of_the_server():
    assert "does not balance" in (verdict.other_cause(one_step(missing=1).steps[0]) or "")


def test_several_runs_are_one_on_one_axis_of_time():
    whole = launch.joined("two", [one_step(), one_step(started="2026-03-02T09:00:40.5Z", sessions=200)])

    assert [step.sessions for step in whole.steps] == [100, 200]
    assert whole.phases[3:] == [Phase("ramp", 40.5, 45.5), Phase("hold", 45.5, 65.5), Phase("drain", 65.5, 70.5)]
    assert whole.series["sessions"] == [(0, 0), (5, 100), (40.5, 0), (45.5, 100)]
    assert [t for t, _ in whole.intervals["PUSH online"]] == [10, 50.5]
    assert whole.seconds == 70.5
    assert whole.workload["seconds"] == 70.5


def test_runs_in_turn_are_no_workers_that_stopped_together():
    runs = [one_step(), one_step(started="2026-03-02T09:01:00Z")]
    for run in runs:
        run.harness["workers"] = [{"wanted": 100, "connected": 99}]
    whole = launch.joined("two", runs)
    verdict.judge(whole, "p99<250ms, lost=0")
    assert verdict.exit_code(whole) == 0, whole.validity


def test_to_join_changes_none_of_them():
    first = one_step()
    launch.joined("two", [first, one_step(started="2026-03-02T09:01:00Z")])

    assert len(first.steps) == 1 and len(first.phases) == 3 and len(first.series["sessions"]) == 2


def test_resources_are_read_while_all_are_connected():
    assert launch.windows(one_step()) == [(5, 25)]
    storm = one_step()
    storm.phases = [Phase("ramp", 0, 5), Phase("hold", 5, 15), Phase("storm", 15, 28), Phase("drain", 28, 30)]
    assert launch.windows(storm) == [(5, 28)], "what disturbs is part of it"
    storm.phases = [Phase("ramp", 0, 28), Phase("drain", 28, 30)]
    assert launch.windows(storm) == [(0, 28)], "it ended in the ramp"


def test_who_is_back_after_a_storm():
    run = one_step()
    run.phases = [
        Phase("hold before the storm", 0, 10),
        Phase("storm", 10.2, 11.1),
        Phase("hold before the storm with jitter", 11.1, 20),
        Phase("storm with jitter", 20, 30),
        Phase("hold after the storms", 30, 40),
    ]
    run.series["sessions"] = [(9.5, 100), (10.5, 0), (11.5, 100), (20.5, 5), (29.5, 90), (30.5, 99), (39.5, 100)]
    assert launch.back(run) == 99
    run.series["sessions"][4:6] = [(29.5, 40), (31.5, 40)]
    assert launch.back(run) == 40
    assert launch.back(one_step()) is None


def test_those_who_were_there_are_counted_before_the_first_generator_begins_the_storm():
    run = one_step()
    run.phases = [Phase("storm", 10.5, 20.0)]
    run.series["sessions"] = [(8.0, 1000), (9.0, 1000), (10.0, 500), (11.0, 0), (20.0, 400)]
    assert launch.back(run) == 40


@pytest.mark.parametrize(("returned", "code"), [(95, 0), (94.9, 1)])
def test_a_storm_is_judged_by_who_is_back_after_it(returned, code):
    run = one_step()
    run.phases = [Phase("hold before the storm", 0, 10), Phase("storm", 10, 20), Phase("hold", 20, 30)]
    run.series["sessions"] = [(9, 100), (11, 0), (19, returned), (29, 100)]
    sampler: Any = SimpleNamespace(series=lambda _: {}, groups=[SimpleNamespace(changed=0)])
    launch._add(run, job(scenario="storm"), sampler, {}, {})
    verdict.judge(run, "lost=0")

    assert verdict.exit_code(run) == code
    assert run.steps[0].breach == ("only 94 % of the sessions were back at the end of the storm" if code else None)
    verdict.judge(joined := launch.joined("two", [one_step(), run]), "lost=0")
    assert joined.steps[1].breach == run.steps[0].breach, "among others as well"


@pytest.mark.parametrize(
    ("lasted", "code", "said"),
    [
        (10, 2, "at 100 sessions: the run ended 10 s after the beginning of its storm: give it more seconds."),
        (121, 1, ""),
    ],
)
def test_a_storm_that_the_end_of_the_run_cut_short_is_not_judged(lasted, code, said):
    run = one_step()
    run.phases = [
        Phase("hold before the storm", 0, 10),
        Phase("storm", 10, 10 + lasted),
        Phase("drain", 10 + lasted, 140),
    ]
    run.series["sessions"] = [(9, 100), (11, 0), (19, 45)]
    run.steps[0].counts = {"connected": 45, "wanted": 100}
    run.steps[0].errors = {"WS connect: Refused": 1}
    sampler: Any = SimpleNamespace(series=lambda _: {}, groups=[SimpleNamespace(changed=0)])
    launch._add(run, job(scenario="storm"), sampler, {}, {})
    verdict.judge(run, "lost=0")

    assert verdict.exit_code(run) == code
    assert [text for level, text in run.validity if level == "fatal"] == ([said] if said else [])


def test_a_run_lasts_a_minute_or_until_leases_have_ended():
    target = job().target
    assert launch.seconds("steady", target) == launch.seconds("expiry", replace(target, lease=2.0)) == 60
    assert launch.seconds("expiry", replace(target, lease=60.0)) == 80


def test_a_run_counts_its_seconds_from_the_end_of_the_ramp():
    assert job().whole == 65
    assert job(options={"connect-rate": "50"}).whole == 80
    assert job(scenario="ramp").whole == 70, "the rate rises from 0"
    command = launch.command(job(), Path("out.json"))
    assert command[command.index("--run-time") + 1] == "65s"
    assert command[command.index("--sessions") + 1] == "1000"
    assert "--processes" not in command


def test_options_of_the_scenario_reach_locust():
    command = launch.command(
        job(processes=2, options={"stay": "20", "fixed-masks": "", "sources": "127.0.0.9"}), Path("out.json")
    )

    assert command[command.index("--stay") + 1] == "20"
    assert command[command.index("--processes") + 1] == "2"
    assert command[command.index("--fixed-masks") + 1].startswith("--")  # a switch
    assert command[command.index("--sources") + 1] == "127.0.0.9" and command.count("--sources") == 1


def test_those_who_are_waited_for_are_the_users_of_all_processes():
    assert (
        job(5, processes=2).users == [f"load-steady-{place}-{number:07}" for place in (0, 1) for number in range(3)][:5]
    )


@pytest.mark.parametrize("left", [None, "2 users of this run or more were online."])
def test_the_users_of_a_run_before_are_waited_for_before_locust_counts_its_time(left, monkeypatch, tmp_path):
    made, output = tmp_path / "made.json", tmp_path / "a.json"
    one_step().save(made)
    asked = []

    def await_offline(target, users):
        assert not output.exists(), "Locust has been started"
        asked.append(list(users))
        return left

    monkeypatch.setattr(preflight, "await_offline", await_offline)
    copy = [sys.executable, "-c", f"import shutil; shutil.copy({str(made)!r}, {str(output)!r})"]
    monkeypatch.setattr(launch, "command", lambda *_: list(copy))
    one = replace(job(), folder=tmp_path)
    run = launch.run(one, list)
    assert asked == [one.users]
    assert run.faults == ([left] if left else [])
    assert verdict.exit_code(run) == (2 if left else 0)


def test_tokens_of_a_command_are_made_before_locust_counts_its_time(monkeypatch, tmp_path):
    made, output, seen = (tmp_path / name for name in ("made.json", "a.json", "seen.json"))
    one_step().save(made)
    monkeypatch.setattr(preflight, "await_offline", lambda *_: None)
    script = "import os, pathlib, shutil, sys; tokens = pathlib.Path(os.environ['LOADTEST_TOKENS']); "
    script += "assert not tokens.stat().st_mode & 0o077; shutil.copy(tokens, sys.argv[1]); shutil.copy(*sys.argv[2:4])"
    copy = [sys.executable, "-c", script, str(seen), str(made), str(output)]
    monkeypatch.setattr(launch, "command", lambda *_: list(copy))
    one = job(20, folder=tmp_path)
    one = replace(one, target=replace(one.target, secret=None, command=["echo", "token-of-{user}"]))
    launch.run(one, list)

    assert json.loads(seen.read_text()) == {user: f"token-of-{user}" for user in one.users}
    assert not list(tmp_path.glob("*.tokens"))
    failing = replace(one, target=replace(one.target, command=["false"]))
    with pytest.raises(launch.LaunchError, match=r"token\.command: exit 1"):
        launch.run(failing, list)


def test_locust_does_not_wait_again():
    assert "--no-wait" in launch.command(job(), Path("out.json"))


def test_source_addresses_are_as_many_as_are_needed():
    assert job(12_000).sources == "127.0.0.1"
    assert job(12_001).sources == "127.0.1.1,127.0.1.2"
    assert job(24_000, hosts=("127.0.0.1", "127.0.0.2")).sources == "127.0.0.1"
    assert job(50_000, hosts=("192.0.2.1",)).sources == ""
