"""Reading the target file, and making tokens."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import jwt
import pytest

from contracts.faults import Misused
from contracts.model import Class
from contracts.target import Target, TargetError, TokenMaker, load_target

SECRET = "a secret of the tests, of 32 bytes and more"
GOOD = """class = "full"
{more}
[[instances]]
http = "http://127.0.0.1:8080/"
{tables}
"""
TOKEN = f'[token]\nsecret = "{SECRET}"\n'


def target(folder, more="", tables=TOKEN):
    path = folder / "target.toml"
    path.write_text(GOOD.format(more=more, tables=tables))
    return load_target(path)


def test_a_target_is_read_with_its_defaults(tmp_path):
    found = target(
        tmp_path, 'lease = 2\nunsupported = ["sockjs"]', TOKEN + '[hooks]\nkill-instance = ["kill", "{instance}"]'
    )
    assert (found.conformance, found.lease, found.policy, found.parallel) == (Class.FULL, 2.0, "anyone", 40)
    assert (found.instances[0].http, found.instances[0].websocket) == ("http://127.0.0.1:8080", "ws://127.0.0.1:8080")
    assert found.hooks == {"kill-instance": ["kill", "{instance}"]}
    assert SECRET not in str(found.summary)


@pytest.mark.parametrize(
    ("more", "tables", "told"),
    [
        ("laese = 2", TOKEN, "laese: is unknown"),
        ('lease = "2"', TOKEN, "lease: must be a number"),
        (f"lease = 1{400 * '0'}", TOKEN, "lease: must be a number of seconds"),
        ("lease = inf", TOKEN, "lease: must be a number of seconds"),
        ("lease = 0", TOKEN, "lease: must be above 0"),
        ("lease = 2\ngrace = 5", TOKEN, "grace: the cases need a server with none"),
        ("parallel = true", TOKEN, "parallel: must be an integer"),
        ('policy = "all"', TOKEN, "policy: 'all' is none of"),
        ('unsupported = ["luck"]', TOKEN, "unsupported: 'luck' is none of"),
        ("", TOKEN + "[[instances]]\n", r"instances\[2\].http: is missing"),
        ("", TOKEN + '[[instances]]\nhttp = "localhost:80"', r"instances\[2\].http: 'localhost:80' is no URL"),
        (
            "",
            TOKEN + '[[instances]]\nhttp = "http://127.0.0.1:8080"',
            r"instances\[2\].http: is that of instances\[1\]",
        ),
        (
            "",
            TOKEN + '[[instances]]\nhttp = "http://localhost:8080"',
            r"instances\[2\].http: is that of instances\[1\]",
        ),
        (
            "",
            TOKEN + '[[instances]]\nhttp = "http://h"\n[[instances]]\nhttp = "HTTP://H:80/"',
            r"instances\[3\].http: is that of instances\[2\]",
        ),
        (
            "",
            TOKEN + '[[instances]]\nhttp = "http://h"\nwebsocket = "ws://127.0.0.1:8080"',
            r"instances\[2\].websocket: is that of instances\[1\]",
        ),
        ("", "", "token: give either 'secret' or 'command'"),
        ("", '[token]\nsecret = "short"', "token.secret: HS256 needs 32 bytes"),
        ("", TOKEN + '[connection]\ntransport = "pigeon"', "connection.transport: 'pigeon' is none of"),
        ("", TOKEN + '[hooks]\nkill = ["x"]', "hooks.kill: is unknown"),
        ("", "[token", "line"),
        ("lease = 2\nslack = 1.3", TOKEN, r"slack: must be at most 0.6 leases, here 1.2 s"),
        ("ca = true", TOKEN, "ca: must be text"),
        ('ca = "none.crt"', TOKEN, r"ca: .*none\.crt: No such file"),
        ('ca = "target.toml"', TOKEN, r"ca: .*target\.toml: has no certificates in PEM"),
        ("slack = -1", TOKEN, "slack: must be 0 or more"),
        ("", TOKEN + "claims = { iss = 5 }", "token.claims.iss: must be text"),
        ("", TOKEN + "claims = { aud = [5] }", "token.claims.aud: must be text, or an array"),
        ("", TOKEN + "claims = { born = 2020-01-01 }", "token.claims.born: must be a value that JSON has"),
        ("", TOKEN + 'claims = { sub = "ann" }', "token.claims.sub: the runner sets it itself"),
        ("", TOKEN + "claims = { exp = 5 }", "token.claims.exp: the runner sets it itself"),
        ("", TOKEN + "[hooks]\nkill-instance = []", "hooks.kill-instance: is empty"),
        ("", TOKEN + '[[instances]]\nhttp = "http://h:99999"', r"instances\[2\].http: 'http://h:99999' is no URL"),
        ("", TOKEN + '[[instances]]\nhttp = "http://h:abc"', r"instances\[2\].http: 'http://h:abc' is no URL"),
        ("", f"[token]\nsecret = 'ssh-rsa {'x' * 32}'", "token: no token can be made"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field(tmp_path, more, tables, told):
    with pytest.raises(TargetError, match=told) as caught:
        target(tmp_path, more, tables)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(TargetError, match="No such file"):
        load_target(tmp_path / "none.toml")


@pytest.mark.parametrize(("kind", "leeway"), [("expired", 10), ("not-yet", 10), ("soon", 0)])
def test_a_token_is_early_or_late_by_more_than_its_leeway_but_not_by_twice(tmp_path, kind, leeway):
    token = TokenMaker(target(tmp_path)).make("ann", kind) or ""
    with pytest.raises((jwt.ExpiredSignatureError, jwt.ImmatureSignatureError)):
        jwt.decode(token, SECRET, algorithms=["HS256"], leeway=leeway)
    assert jwt.decode(token, SECRET, algorithms=["HS256"], leeway=20 if leeway else 10)["sub"] == "ann"


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("valid", None),
        ("expired", jwt.ExpiredSignatureError),
        ("wrong-secret", jwt.InvalidSignatureError),
        ("alg-none", jwt.InvalidAlgorithmError),
        ("not-yet", jwt.ImmatureSignatureError),
        ("soon", jwt.ImmatureSignatureError),
        ("no-exp", jwt.MissingRequiredClaimError),
        ("no-sub", jwt.MissingRequiredClaimError),
        ("garbage", jwt.DecodeError),
    ],
)
def test_a_token_is_bad_in_the_way_that_its_kind_says(tmp_path, kind, refused):
    token = TokenMaker(target(tmp_path)).make("ann", kind)
    assert token is not None

    def read():
        return jwt.decode(token, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})

    if refused is None:
        assert read()["sub"] == "ann"
    else:
        with pytest.raises(refused) as caught:
            read()
        assert type(caught.value) is refused


@pytest.mark.parametrize(("name", "refused"), [("iss", jwt.InvalidIssuerError), ("aud", jwt.InvalidAudienceError)])
def test_a_token_of_another_issuer_or_audience_is_good_in_all_else(tmp_path, name, refused):
    found = target(tmp_path, tables=TOKEN + 'claims = { iss = "us", aud = ["them"] }')
    token = TokenMaker(found).make("ann", f"other-{name}") or ""

    def read(**said):
        return jwt.decode(token, SECRET, algorithms=["HS256"], options={"verify_aud": "audience" in said}, **said)

    issuer, audience = {"issuer": "us"}, {"audience": "them"}
    with pytest.raises(refused):
        read(**issuer, **audience)
    assert read(**(audience if name == "iss" else issuer))["sub"] == "ann"


def test_a_token_ends_when_it_is_said(tmp_path):
    token = TokenMaker(target(tmp_path)).make("ann", "ends: 2s")
    assert token is not None
    left = jwt.decode(token, SECRET, algorithms=["HS256"])["exp"] - time.time()
    assert 1.5 < left <= 3


def test_a_command_prints_the_token_once_for_each_user(tmp_path):
    log = tmp_path / "log"
    found = target(
        tmp_path, tables=f"[token]\ncommand = ['sh', '-c', 'echo {{user}} >> {log}; echo token-of-{{user}}']"
    )
    maker = TokenMaker(found)
    assert [maker.make(user) for user in ("ann", "ann", "bob")] == ["token-of-ann", "token-of-ann", "token-of-bob"]
    assert log.read_text() == "ann\nbob\n"
    with pytest.raises(Misused, match="needs the target's secret"):
        maker.make("ann", "expired")


def test_a_command_that_fails_is_told(tmp_path):
    found = target(tmp_path, tables="[token]\ncommand = ['sh', '-c', 'echo no key >&2; exit 3']")
    with pytest.raises(Misused, match=r"token.command: sh: exit 3;"):
        TokenMaker(found).make("ann")


def test_a_user_and_a_password_in_an_address_are_refused_and_not_shown(tmp_path):
    with pytest.raises(TargetError, match=r"instances\[2\].http: must hold no user name") as caught:
        target(tmp_path, tables=TOKEN + '[[instances]]\nhttp = "http://ann:hunter2@host:80"')
    assert "hunter2" not in str(caught.value)


def printing(script: str) -> TokenMaker:
    """The maker of a target whose tokens a line of shell prints."""
    return TokenMaker(Target("file", Class.GUIDE, [], command=["sh", "-c", script]))


@pytest.mark.parametrize("script", ["echo one; echo two", r"printf '\377'", "true", "echo one two", "exit 3 # one"])
def test_what_is_no_token_is_told_without_what_was_printed(script):
    with pytest.raises(Misused, match=r"^token\.command: ") as caught:
        printing(f"echo no one >&2; {script}").make("ann")
    assert "one" not in str(caught.value).removesuffix("must print one token on one line, in ASCII, without quotes")


def test_a_command_that_takes_too_long_is_told_without_its_words(monkeypatch):
    monkeypatch.setattr("contracts.target._COMMAND_LIMIT", 0.1)
    with pytest.raises(Misused) as caught:
        printing("exec sleep 5 # hunter2").make("ann")
    assert str(caught.value) == "token.command: sh: not over after 0.1 s"


def test_only_the_command_is_waited_for_not_what_it_leaves_running(monkeypatch):
    monkeypatch.setattr("contracts.target._COMMAND_LIMIT", 2.0)
    begun = time.monotonic()
    assert printing("sleep 3 & echo token").make("ann") == "token"
    assert time.monotonic() - begun < 2


def test_few_commands_run_at_once_and_the_wait_for_a_place_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("contracts.target._COMMAND_LIMIT", 0.9)
    count = f"mkdir {tmp_path}/$$; ls {tmp_path} | wc -l; sleep 0.3; rmdir {tmp_path}/$$"
    maker = TokenMaker(Target("file", Class.GUIDE, [], command=["sh", "-c", count, "{user}"]))
    with ThreadPoolExecutor(16) as threads:
        at_once = [int(str(one)) for one in threads.map(maker.make, map(str, range(16)))]
    assert max(at_once) <= 4
