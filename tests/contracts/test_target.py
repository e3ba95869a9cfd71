"""Reading the target file, and making tokens."""

from __future__ import annotations

import time

import jwt
import pytest

from contracts.faults import Misused
from contracts.model import Class
from contracts.target import TargetError, TokenMaker, load_target

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
        ("lease = 0", TOKEN, "lease: must be above 0"),
        ("parallel = true", TOKEN, "parallel: must be an integer"),
        ('policy = "all"', TOKEN, "policy: 'all' is none of"),
        ('unsupported = ["luck"]', TOKEN, "unsupported: 'luck' is none of"),
        ("", TOKEN + "[[instances]]\n", r"instances\[2\].http: is missing"),
        ("", TOKEN + '[[instances]]\nhttp = "localhost:80"', r"instances\[2\].http: 'localhost:80' is no URL"),
        ("", "", "token: give either 'secret' or 'command'"),
        ("", '[token]\nsecret = "short"', "token.secret: HS256 needs 32 bytes"),
        ("", TOKEN + '[connection]\ntransport = "pigeon"', "connection.transport: 'pigeon' is none of"),
        ("", TOKEN + '[hooks]\nkill = ["x"]', "hooks.kill: is unknown"),
        ("", "[token", "line"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field(tmp_path, more, tables, told):
    with pytest.raises(TargetError, match=told) as caught:
        target(tmp_path, more, tables)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(TargetError, match="No such file"):
        load_target(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("valid", None),
        ("expired", jwt.ExpiredSignatureError),
        ("wrong-secret", jwt.InvalidSignatureError),
        ("alg-none", jwt.InvalidAlgorithmError),
        ("not-yet", jwt.ImmatureSignatureError),
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
    with pytest.raises(Misused, match=r"token.command: exit 3, no key"):
        TokenMaker(found).make("ann")
