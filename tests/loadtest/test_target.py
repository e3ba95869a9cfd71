"""The target file, and the tokens that are made by it."""

from __future__ import annotations

import jwt
import pytest

from contracts.target import load_target
from loadtest.target import Instance, TargetError, load
from tests.support.server import ROOT

SECRET = "a secret of more than thirty-two bytes"
FILE = """
class = "full"
lease = 2
slack = 1
[[instances]]
http = "http://127.0.0.1:8080/base/"
[[instances]]
http = "http://[::1]:8081"
websocket = "ws://localhost:9000"
[connection]
path = "/stomp"
[token]
secret = "{secret}"
claims = {{ iss = "us" }}
in = "passcode"
[directory]
loaded = true
[hooks]
kill-instance = ["true"]
"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("LOADTEST_TARGET", "LOADTEST_SECRET", "LOADTEST_LEASE", "LOADTEST_GRACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "target.toml"
        path.write_text(text)
        return path

    return written


def test_reads_a_file_of_the_contract_suite(write):
    path = write(FILE.format(secret=SECRET))
    target = load(path)

    assert list(target.instances) == [
        Instance("http://127.0.0.1:8080/base", "127.0.0.1", 8080, "/base/stomp"),
        Instance("http://[::1]:8081", "localhost", 9000, "/stomp"),
    ]
    assert (target.lease, target.token_in) == (2.0, "passcode")
    assert load_target(path).lease == 2.0  # the suite takes the same file


def test_reads_the_file_that_the_suite_brings():
    target = load(ROOT / "contracts/target.toml")

    assert target.lease == 60 and target.instances[0].port == 8080


def test_a_token_of_the_secret_names_its_user(write):
    target = load(write(FILE.format(secret=SECRET)))

    token = target.token("ann")

    claims = jwt.decode(token, SECRET, algorithms=["HS256"], issuer="us")
    assert claims["sub"] == "ann" and claims["exp"] - claims["iat"] >= 3600
    assert jwt.decode(target.token("bob"), SECRET, algorithms=["HS256"])["sub"] == "bob"


def test_a_command_prints_the_token(write, tmp_path):
    ran = tmp_path / "ran"
    script = f"echo $1 >> {ran}; echo token-of-$1"
    target = load(
        write(f'[[instances]]\nhttp="http://localhost"\n[token]\ncommand=["sh", "-c", "{script}", "-", "{{user}}"]\n')
    )

    assert [target.token("ann"), target.token("ann"), target.token("bob")] == [
        "token-of-ann",
        "token-of-ann",
        "token-of-bob",
    ]
    assert ran.read_text().split() == ["ann", "bob"]
    assert target.instances[0].port == 80


def test_tokens_that_were_printed_before_are_taken(write, tmp_path, monkeypatch):
    (tmp_path / "tokens").write_text('{"ann": "printed-before"}')
    monkeypatch.setenv("LOADTEST_TOKENS", str(tmp_path / "tokens"))
    target = load(write('[[instances]]\nhttp="http://localhost"\n[token]\ncommand=["echo", "new"]\n'))

    assert (target.token("ann"), target.token("bob")) == ("printed-before", "new")
    assert target.printed(["ann", "bob"]) == {"ann": "new", "bob": "new"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ('["sh", "-c", "echo no database >&2; exit 3"]', "token.command: exit 3, no database"),
        ('["true"]', "token.command: exit 0, no token printed"),
        ('["./not-there"]', "token.command: ./not-there: No such file or directory"),
    ],
)
def test_a_command_that_fails_is_one_line(write, command, said):
    target = load(write(f'[[instances]]\nhttp="http://localhost"\n[token]\ncommand={command}\n'))

    with pytest.raises(TargetError) as caught:
        target.token("ann")
    assert str(caught.value) == said


def test_the_secret_is_not_shown(write):
    target = load(write(FILE.format(secret=SECRET)))

    assert SECRET not in repr(target) and SECRET not in str(target.summary)


def test_an_address_and_the_environment_do_without_a_file(monkeypatch):
    monkeypatch.setenv("LOADTEST_SECRET", SECRET)
    monkeypatch.setenv("LOADTEST_LEASE", "5")
    monkeypatch.setenv("LOADTEST_GRACE", "1.5")

    target = load(host="http://127.0.0.1:8080")

    assert target.instances == [Instance("http://127.0.0.1:8080", "127.0.0.1", 8080, "/ws")]
    assert (target.lease, target.grace) == (5.0, 1.5)
    assert jwt.decode(target.token("ann"), SECRET, algorithms=["HS256"])["sub"] == "ann"


def test_the_environment_names_the_file_and_an_address_replaces_its_instances(write, monkeypatch):
    monkeypatch.setenv("LOADTEST_TARGET", str(write(FILE.format(secret=SECRET))))

    assert len(load().instances) == 2
    assert [one.port for one in load(host="http://127.0.0.1:7000").instances] == [7000]
    assert load(host="http://127.0.0.1:7000").lease == 2


def test_sockjs_is_entered_where_it_takes_plain_websockets(write):
    target = load(write(FILE.format(secret=SECRET).replace('"/stomp"', '"/stomp"\ntransport = "sockjs"')))

    assert target.instances[1].path == "/stomp/websocket"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (SECRET, "short", "token.secret: HS256 needs 32 bytes or more"),
        ("secret =", "secrets =", "token: give either 'secret' or 'command'"),
        ("lease = 2", "lease = 0", "lease: must be a number of seconds above 0"),
        ("lease = 2", "lease = true", "lease: must be a number"),
        ("lease = 2", "lease = 2\ngrace = -1", "grace: must be a number of seconds, 0 or more"),
        ("http://127.0.0.1:8080", "https://127.0.0.1:8080", "instances[1]: TLS is not spoken here"),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", "instances[1].http: '127.0.0.1:8080/base/' is no URL"),
        ("ws://localhost:9000", "ws://localhost:90000", "instances[2].websocket: 'ws://localhost:90000' is no URL"),
        ('"/stomp"', '"stomp"', "connection.path: must begin with a slash"),
        ('"passcode"', '"cookie"', "token.in: 'cookie' is none of"),
        ("[[instances]]", "[[instance]]", "instances: at least one"),
        ("[token]", "[token", "Expected"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file_and_the_field(write, old, new, said):
    path = write(FILE.format(secret=SECRET).replace(old, new))

    with pytest.raises(TargetError) as caught:
        load(path)
    assert said in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_without_anything_it_says_what_to_give(tmp_path):
    with pytest.raises(TargetError, match=r"no server is named: .*--target.*--host"):
        load()
    with pytest.raises(TargetError, match="LOADTEST_SECRET"):
        load(host="http://127.0.0.1:8080")
    with pytest.raises(TargetError, match="No such file"):
        load(tmp_path / "none.toml")
