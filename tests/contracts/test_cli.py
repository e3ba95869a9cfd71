"""The `presence-contracts` command: what it prints, its exit codes, one line for each mistake."""

from __future__ import annotations

import dataclasses
import http.server
import json
import socket
import threading
import tomllib
import uuid
from typing import Any

import pytest

from contracts import cases as case_files
from contracts import cli, runner
from contracts.clauses import load_clauses
from contracts.faults import TargetUnusable
from contracts.model import Class, Level
from contracts.target import load_target
from tests.contracts.made_up import case, failed, passed, run, unsupported

SECRET = "a secret of the tests, of 32 bytes and more"
TARGET = """class = "full"
lease = 2
[[instances]]
http = "http://127.0.0.1:{port}"
[token]
secret = "{secret}"
"""


@pytest.fixture
def command(capsys):
    """Run the command; return its exit code, standard output and standard error."""

    def of(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return ended.value.code, out, err

    return of


@pytest.fixture
def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made.getsockname()[1]


@pytest.fixture
def target(tmp_path, free_port):
    """A target file for a port on which nobody listens."""
    path = tmp_path / "target.toml"
    path.write_text(TARGET.format(port=free_port, secret=SECRET))
    return path


@pytest.fixture
def played(monkeypatch):
    """Let a run end as a test says, without any server; returns the arguments that the runner was given."""
    given: dict[str, Any] = {}

    def of(*results, fault=None):
        async def played(target, cases, clauses, **options):
            given.update(options, target=target)
            if fault is not None:
                raise fault
            return run(*results)

        monkeypatch.setattr(runner, "run", played)
        return given

    return of


@pytest.fixture
def made_up_cases(monkeypatch):
    """Two cases, whatever the files hold."""
    cases = [
        case("both-edges", title="A watcher is told of both edges"),
        case("renews", ["SESS-01"], title="A beat renews", conformance=Class.GUIDE, friends={"ann": ["bob"]}),
    ]
    monkeypatch.setattr(case_files, "load_cases", lambda _: cases)
    return cases


def one_line(text):
    (line,) = text.splitlines()
    assert line.startswith("presence-contracts: ")
    return line.removeprefix("presence-contracts: ")


@pytest.mark.parametrize(
    ("results", "options", "code"),
    [
        ([passed()], [], 0),
        ([passed(), failed()], [], 1),
        ([passed(), failed("slow", level=Level.SHOULD)], [], 0),
        ([passed(), failed("slow", level=Level.SHOULD)], ["--strict"], 1),
        ([unsupported()], [], 2),
        ([], [], 2),
    ],
)
def test_the_exit_code_is_the_verdict(command, played, target, results, options, code):
    played(*results)
    assert command("run", "--target", target, *options)[0] == code


def test_the_runner_is_told_what_was_chosen(command, played, target, made_up_cases):
    given = played(passed())
    options = ["--only", "renews", "--only", "watch-01", "--class", "guide", "--level", "must", "--fail-fast"]
    assert command("run", "--target", target, *options)[0] == 0
    assert given["only"] == ["renews", "WATCH-01"]
    assert (given["conformance"], given["levels"], given["fail_fast"]) == (Class.GUIDE, [Level.MUST], True)
    assert given["target"].secret == SECRET


def test_the_reports_are_written_and_say_the_same(command, played, target, tmp_path):
    played(passed(), failed())
    files = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "json", "html")}
    code, out, err = command("run", "--target", target, *(f"--{kind}={path}" for kind, path in files.items()))
    assert (code, err) == (1, "")
    assert out.startswith("FAIL  Not every MUST holds: 1 case fails.\n")
    assert json.loads(files["json"].read_text())["verdict"]["exit"] == 1
    assert 'failures="1"' in files["junit"].read_text()
    assert "Not every MUST holds: 1 case fails." in files["html"].read_text()


def test_a_report_that_cannot_be_written_loses_no_verdict(command, played, target, tmp_path):
    played(passed(), failed())
    code, out, err = command("run", "--target", target, "--json", tmp_path)
    assert (code, out) == (2, "")  # seen before the run
    (tmp_path / "link.json").symlink_to(tmp_path / "none" / "of.json")
    code, out, err = command("run", "--target", target, "--json", tmp_path / "link.json")
    assert out.startswith("FAIL  Not every MUST holds: 1 case fails.\n")
    assert (code, one_line(err)) == (2, f"{tmp_path / 'link.json'}: No such file or directory")


def test_nothing_of_a_progress_line_is_in_what_is_no_terminal(command, played, target):
    played(passed())
    _, out, err = command("run", "--target", target)
    assert "\x1b" not in out and err == ""


def test_a_progress_line_counts_only_what_is_played(capsys):
    progress = cli._Progress(3)
    for result in (unsupported(), passed("a"), failed("b")):
        progress(result)
    progress.clear()
    *_, last, cleared = capsys.readouterr().err.split("\r\x1b[K")
    assert last.startswith("2/2") and "1 failed" in last and cleared == ""


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing option '--target'."),
        (["run", "--target", "nowhere.toml"], "nowhere.toml: No such file or directory"),
        (["run", "--target", "TARGET", "--only", "WATCH-999"], "there is no case and no clause 'WATCH-999'"),
        (
            ["run", "--target", "TARGET", "--only", "store-01"],
            "STORE-01 cannot be seen from outside: there is no access",
        ),
        (["run", "--target", "TARGET", "--class", "best"], "'best' is not one of"),
        (["run", "--target", "TARGET", "--level", "WILL"], "'WILL' is not one of"),
        (["run", "--target", "TARGET", "--html", "no/such/folder/x.html"], "--html: there is no folder no/such/folder"),
        (["run", "--target", "TARGET", "--colour"], "No such option"),
        (["walk"], "No such command 'walk'."),
        (["show"], "Missing argument 'ID'."),
        (["show", "nothing"], "there is no case and no clause 'nothing'; see `presence-contracts list`"),
        (["directory", "--target", "nowhere.toml"], "nowhere.toml: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, target, arguments, said):
    code, out, err = command(*(target if one == "TARGET" else one for one in arguments))
    assert (code, out) == (2, "")
    assert said in one_line(err)


def test_a_wrong_target_file_is_one_line(command, target):
    target.write_text(target.read_text().replace("lease = 2", "lease = -2"))
    code, out, err = command("run", "--target", target)
    assert (code, out) == (2, "")
    assert "lease" in one_line(err)


def test_a_server_that_is_down_is_one_line(command, target, free_port):
    code, out, err = command("run", "--target", target)
    assert (code, out) == (2, "")
    assert "cannot be reached" in one_line(err) and str(free_port) in err


def test_a_plain_web_server_is_one_line(command, target, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            target.write_text(TARGET.format(port=server.server_port, secret=SECRET))
            code, out, err = command("run", "--target", target)
        finally:
            server.shutdown()
            thread.join()
    assert (code, out) == (2, "")
    assert "no presence server" in one_line(err)


def test_a_target_that_cannot_be_used_is_one_line_whatever_it_says(command, played, target):
    played(fault=TargetUnusable("no presence server:\n\x1b[2J<html>"))
    code, _, err = command("run", "--target", target)
    assert code == 2
    assert one_line(err) == "no presence server: ␛[2J<html>"


def test_what_nobody_foresaw_is_one_line_that_shows_no_token(command, played, target):
    played(fault=ValueError("Invalid header value: Bearer hunter2"))
    code, _, err = command("run", "--target", target)
    assert code == 2
    assert "unforeseen: ValueError in test_cli.py, line " in one_line(err)
    assert "hunter2" not in err


def test_a_report_that_cannot_be_written_is_one_line(command, played, target, tmp_path):
    played(passed())
    (tmp_path / "page").mkdir()
    code, _, err = command("run", "--target", target, "--html", tmp_path / "page")
    assert code == 2
    assert "is a directory" in one_line(err)


def test_an_interrupted_run_says_so(command, played, target):
    played(fault=KeyboardInterrupt())
    code, _, err = command("run", "--target", target)
    assert code == 130
    assert one_line(err.strip()) == "interrupted"


def test_without_a_command_the_help_comes(command):
    code, out, err = command()
    assert (code, out) == (2, "")
    assert "init" in err
    assert command("--help")[0] == 0


# list, show, directory, init


def test_list_has_a_line_for_each_case(command, made_up_cases):
    code, out, _ = command("list")
    assert code == 0
    assert out.splitlines() == [
        "both-edges  full   MUST    A watcher is told of both edges",
        "renews      guide  MUST    A beat renews",
    ]


def test_list_has_a_line_for_each_clause(command):
    code, out, _ = command("list", "--clauses")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(load_clauses())


def test_show_tells_of_a_clause_and_of_its_cases(command, made_up_cases):
    code, out, _ = command("show", "watch-01")
    assert code == 0
    assert out.startswith("WATCH-01 MUST (guide)\n") and load_clauses()["WATCH-01"].sentence in out
    assert "both-edges  A watcher is told of both edges" in out and "renews" not in out


def test_show_prints_a_case_as_it_stands_in_its_file(tmp_path):
    block = '[[case]]\nid = "both-edges"\nsteps = [\n    { connect = "ann" },  # the watcher\n]'
    other = '[[case]]\nid = "both-edges-2"\n'
    (tmp_path / "watching.toml").write_text(f"# Watching.\n\n{other}\n# Of both edges.\n{block}\n\n# More.\n\n{other}")
    assert cli.as_it_stands(case("both-edges"), tmp_path) == block


def test_show_finds_every_case_in_its_file(command):
    for one in case_files.load_cases(load_clauses())[:3]:
        code, out, _ = command("show", one.id)
        assert code == 0
        assert f'id = "{one.id}"' in out and one.title in out


def test_directory_prints_the_same_whatever_else_the_target_says(command, target, made_up_cases):
    code, out, _ = command("directory")
    assert code == 0
    assert json.loads(out)["friends"]["renews.ann"] == ["renews.bob"]
    made_up_cases[1] = dataclasses.replace(made_up_cases[1], conformance=Class.FULL, features=frozenset({"friends"}))
    text = target.read_text().replace('"full"', '"guide"')
    target.write_text(f"policy = 'contacts'\nunsupported = ['friends']\n{text}")
    assert command("directory", "--target", target)[1] == out


def test_directory_spells_the_ids_as_the_target_does(command, target, made_up_cases):
    target.write_text('ids = "uuid"\n' + target.read_text())
    found = json.loads(command("directory", "--target", target)[1])["friends"]
    ann, bob = (str(uuid.uuid5(uuid.NAMESPACE_URL, f"renews.{name}")) for name in ("ann", "bob"))
    assert found[ann] == [bob]


def test_init_writes_a_target_file_that_only_wants_its_secret(command, tmp_path):
    path = tmp_path / "mine.toml"
    code, out, _ = command("init", path)
    assert code == 0
    assert f"run --target {path}" in out
    of = load_target(path)
    assert (of.conformance, of.lease, of.path, of.hooks) == (Class.GUIDE, 60.0, "/ws", {})
    before = path.read_text()
    code, out, err = command("init", path)
    assert (code, out) == (2, "")
    assert "exists" in one_line(err)
    assert path.read_text() == before


def test_whatever_is_commented_out_in_the_target_file_can_be_used(tmp_path):
    text = cli.TEMPLATE.read_text()
    for line in text.splitlines():
        if (
            line.startswith(("# [[", "# http", "# websocket", "# claims"))
            or "-instance = " in line
            or "-store = " in line
        ):
            text = text.replace(f"\n{line}", f"\n{line.removeprefix('# ')}", 1)
    path = tmp_path / "target.toml"
    path.write_text(text)
    of = load_target(path)
    assert (
        len(of.instances) == 2
        and len(of.hooks) == 8
        and of.claims == {"iss": "https://issuer.example", "aud": "presence"}
    )
    assert tomllib.loads(text)["token"]["in"] == "authorization"


def test_the_target_file_names_every_feature_and_hook():
    from contracts.target import FEATURES, HOOKS

    text = cli.TEMPLATE.read_text()
    assert [one for one in FEATURES if f'"{one}"' not in text] == []
    assert [one for one in HOOKS if f"# {one} = " not in text] == []
