"""What is found before a run: each is one line that says what would help."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loadtest import preflight
from loadtest.preflight import (
    PreflightError,
    await_offline,
    check_embedded,
    check_files,
    check_ports,
    check_server,
    check_shares,
    check_sources,
    source_addresses,
)
from loadtest.target import Instance, Target

SECRET = "a secret of more than thirty-two bytes"
HERE = Instance("http://127.0.0.1:8080", "127.0.0.1", 8080, "/ws")
AWAY = Instance("http://192.0.2.1:8080", "192.0.2.1", 8080, "/ws")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A server that is never ready is not waited for."""
    monkeypatch.setattr(preflight, "BUSY", 0.0)


@contextmanager
def answering(rest=(200, b'{"isOnline": false}'), upgrade=101, *, first=(), posted=None):
    """A server that answers REST and upgrades in one way, to `first` requests in others; yields the target.

    What is posted is added to `posted`.
    """
    others = list(first)
    posted = [] if posted is None else posted

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append(json.loads(asked))
            self.do_GET()

        def do_GET(self):
            status, body = (upgrade, b"") if self.path == "/ws" else others.pop(0) if others else rest
            self.send_response(status)
            if status != 101:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            http = f"http://127.0.0.1:{server.server_port}"
            yield Target(instances=[Instance(http, "127.0.0.1", server.server_port, "/ws")], secret=SECRET)
        finally:
            server.shutdown()


def refusal(call, *args, **kwargs):
    with pytest.raises(PreflightError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_is_fit_passes():
    with answering() as target:
        preflight.check(target, 100)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"rest": (401, b'{"detail": "bad signature"}')}, "wrong token: .*401: bad signature"),
        ({"rest": (401, b"no")}, "wrong token: "),
        ({"rest": (503, b'{"detail": "store unavailable"}')}, "not ready .503: store unavailable"),
        ({"rest": (404, b"")}, "no presence server: GET /api/presence/check/.* was answered 404"),
        ({"rest": (200, b"<html>")}, "no presence server: "),
        ({"upgrade": 404}, "ws://127.0.0.1:.*/ws: no WebSocket: the upgrade was answered 'HTTP/1.1 404"),
    ],
)
def test_says_what_is_wrong_with_the_server(answers, said):
    with answering(**answers) as target, pytest.raises(PreflightError, match=said) as caught:
        preflight.check(target, 100)
    assert "\n" not in str(caught.value)


def test_says_that_nobody_listens():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        one = Instance(f"http://127.0.0.1:{port}", "127.0.0.1", port, "/ws")
        said = refusal(check_server, one, Target(instances=[one], secret=SECRET))

    assert said == f"http://127.0.0.1:{port}: the target is down: Connection refused"


@pytest.mark.parametrize("host", ["::1", "a..b"])
def test_an_address_that_the_crowd_cannot_connect_to(host):
    one = Instance("http://there", host, 8080, "/ws")
    said = refusal(preflight.check, Target(instances=[one], secret=SECRET), 100)

    assert said.startswith(f"http://there: {host} ") and said.endswith(": the crowd connects over IPv4 only")


def test_says_that_nobody_answers(monkeypatch):
    monkeypatch.setattr(preflight, "ANSWER", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        one = Instance(f"http://127.0.0.1:{port}", "127.0.0.1", port, "/ws")

        assert "no answer within 0.1 s" in refusal(check_server, one, Target(instances=[one], secret=SECRET))


def test_every_instance_is_looked_at():
    with answering() as fit, answering(upgrade=503) as unfit:
        both = Target(instances=[*fit.instances, *unfit.instances], secret=SECRET)
        assert unfit.instances[0].http.removeprefix("http") in refusal(preflight.check, both, 100)


def test_open_files():
    check_files(19_744, 1, 20_000)
    said = refusal(check_files, 19_745, 1, 20_000)
    assert said.startswith(
        "nofile is too low: 19,745 sessions in one process need 20,001 open files each, the hard limit"
    )
    assert said.endswith("is 20,000: raise it (ulimit -Hn), or use --processes 2")
    check_files(19_745, 2, 20_000)
    check_files(10**9, 1, float("inf"))


def test_open_files_of_the_server_started_here():
    check_embedded(19_488, 1, 20_000)
    assert "use --workers 2" in refusal(check_embedded, 19_489, 1, 20_000)
    check_embedded(19_489, 2, 20_000)


def test_ports():
    check_ports(28_232, [AWAY], 28_232, None)
    said = refusal(check_ports, 28_233, [AWAY], 28_232, None)
    assert said.startswith("too few ports: 28,233 sessions, but only 28,232 ports")
    assert "use 2 source addresses" in said
    check_ports(28_233, [AWAY], 28_232, 2)
    check_ports(28_233, [AWAY, AWAY], 28_232, None)


def test_on_loopback_there_are_addresses_enough_unless_they_are_named():
    check_ports(200_000, [HERE], 28_232, None)
    assert "too few ports" in refusal(check_ports, 200_000, [HERE], 28_232, 7)


def test_of_workers_elsewhere_the_ports_are_not_counted_here(monkeypatch):
    monkeypatch.setattr("loadtest.sampling.ports", lambda: [1, 50])
    with answering() as target:
        assert "too few ports" in refusal(preflight.check, target, 100, sources=1)
        preflight.check(target, 100, sources=1, elsewhere=True)


def test_source_addresses():
    assert source_addresses("", 12_000, [HERE]) == ["127.0.0.1"]
    assert source_addresses("", 30_000, [HERE]) == ["127.0.1.1", "127.0.1.2", "127.0.1.3"]
    assert source_addresses("", 30_000, [HERE, HERE, HERE]) == ["127.0.0.1"]
    assert source_addresses("", 30_000, [HERE, AWAY]) == []
    assert source_addresses("10.0.0.7,10.0.0.8", 1, [AWAY]) == ["10.0.0.7", "10.0.0.8"]


@pytest.mark.parametrize("address", ["192.0.2.77", "a..b"])
def test_a_source_address_that_is_not_of_this_machine(address):
    check_sources(["127.0.0.1", "127.0.3.4"])
    said = refusal(check_sources, ["127.0.0.1", address])
    assert said.startswith(f"--sources: {address!r} is no address of this machine: ")


def test_shares():
    check_shares({"share": 1.0, "watchers": None, "beat-receipts": ""})
    assert refusal(check_shares, {"watchers": 1, "share": 2.0}) == "--share 2: is a share, from 0 to 1"


def test_a_server_that_is_busy_with_the_run_before_is_waited_for(monkeypatch):
    monkeypatch.setattr(preflight, "BUSY", 30.0)
    with answering(first=[(503, b'{"detail": "unknown for now"}')]) as target:
        check_server(target.instances[0], target)


def states(**online):
    return 200, json.dumps(
        {user: {"userId": user, "isOnline": is_online} for user, is_online in online.items()}
    ).encode()


def test_who_is_online_of_the_run_before_is_waited_for(monkeypatch):
    monkeypatch.setattr(preflight, "BUSY", 20.0)
    monkeypatch.setattr(preflight, "_LOOK", 0.01)
    monkeypatch.setattr(preflight, "_BATCH", 2)
    posted: list[list[str]] = []
    not_yet = [states(a=True, b=False), (429, b""), (503, b""), states(a=False, b=True), states(a=False, b=False)]
    with answering(states(c=False), first=not_yet, posted=posted) as target:
        assert await_offline(target, ["a", "b", "c"]) is None
    assert posted == [["a", "b"]] * 5 + [["c"]]


def test_the_answer_to_a_whole_batch_is_read(monkeypatch):
    monkeypatch.setattr(preflight, "_LOOK", 0.01)
    users = [f"load-steady-0-{number:07d}-{'x' * 60}" for number in range(1_000)]
    with answering(states(**dict.fromkeys(users, True))) as target:
        assert "1000 users of this run or more" in (await_offline(replace(target, lease=0.05), users) or "")


def test_who_stays_online_is_not_waited_for_longer_than_a_lease(monkeypatch):
    monkeypatch.setattr(preflight, "_LOOK", 0.01)
    with answering(states(a=True, b=True)) as target:
        said = await_offline(replace(target, lease=0.05), ["a", "b"])
    assert said is not None and said.startswith("2 users of this run or more were online before it began")


def test_where_the_data_of_a_run_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path, why in (
        (tmp_path / "nowhere" / "x.json", "No such file or directory"),
        (file / "x.json", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        assert refusal(preflight.check_output, path) == f"--run-json: {path} cannot be written: {why}"
    preflight.check_output(tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left there"


@pytest.mark.parametrize("status", [429, 503])
def test_of_a_server_that_never_says_who_is_online_it_is_not_known(monkeypatch, status):
    monkeypatch.setattr(preflight, "_LOOK", 0.01)
    with answering((status, b"")) as target:
        said = await_offline(replace(target, lease=0.05), ["a", "b"])
    assert said is not None and "were online before" not in said
    assert said.startswith("It is not known whether users of this run were online") and str(status) in said


@pytest.mark.parametrize("answer", [(404, b""), (200, b"<html>"), (200, b"[]"), (200, b'{"a": 1}')])
def test_a_server_that_cannot_say_who_is_online_is_not_waited_for(answer):
    with answering(answer) as target:
        assert await_offline(target, ["a"]) is None
    assert await_offline(target, ["a"]) is None  # it is down
