"""Reading the cases."""

from __future__ import annotations

import dataclasses
import json

import pytest
from jsonschema import Draft202012Validator

from contracts.cases import SCHEMA, CaseError, fixture, load_cases, marks
from contracts.model import Class, Clause, Level
from contracts.steps import VERBS
from contracts.target import FEATURES, HOOKS, TOKENS

CLAUSES = {
    name: Clause(name, "A", level, Class.FULL, "A sentence.", "here")
    for name, level in {"A-01": Level.MAY, "A-02": Level.MUST}.items()
}
GOOD = """
[[case]]
id = "{id}"
title = "A title"
clauses = ["A-01", "A-02"]
class = "full"
{more}
steps = [
    {{ connect = "ann", expect = {{ version = "1.2" }} }},
    {step}
]
"""


def write(folder, step='{ wait = "1L + 0.5s" }', more="", name="file.toml", identity="one"):
    (folder / name).write_text(GOOD.format(id=identity, step=step, more=more))


def test_a_case_is_read_and_has_the_strictest_of_its_levels(tmp_path):
    write(tmp_path, more='needs = ["hook:kill-instance"]')
    (case,) = load_cases(CLAUSES, tmp_path)
    assert (case.id, case.file, case.level, case.policy) == ("one", "file", Level.MUST, "anyone")
    assert case.needs == {"hook:kill-instance"}
    assert case.steps[1] == {"wait": "1L + 0.5s"}


@pytest.mark.parametrize(
    ("step", "more", "told"),
    [
        ('{ conect = "ann" }', "", r"file.toml: one: steps\[2\]: the first key, 'conect', is no verb"),
        ('{ expect = "ann", abuot = "bob" }', "", r"one: steps\[2\]: .*'abuot' was unexpected"),
        ('{ online = true, expect = "ann" }', "", r"the first key, 'online', is no verb"),
        ('{ expect = "ann", within = "1 L" }', "", r"one: steps\[2\]\.within: '1 L' does not match"),
        ('{ watch = "ann" }', "", r"'users' is a required property"),
        ('{ wait = "1s" }', 'colour = "red"', r"file.toml: one: .*'colour' was unexpected"),
        ('{ wait = "1s" }', 'needs = ["luck"]', r"file.toml: one: needs\[1\]"),
        ('{ expect = "ann", json = { version = "$intger" } }', "", r"expect: '\$intger' is no matcher"),
        ('{ expect = "ann", body = "~ (" }', "", r"is no regular expression"),
        ('{ connect = "bob", token = "expired" }', "", r"token: 'expired' needs 'secret'"),
        ('{ connect = "bob", token = "other-iss" }', 'needs = ["secret"]', r"token: 'other-iss' needs 'claim:iss'"),
        ('{ connect = "bob", instance = 2 }', "", r"instance: needs 'instances'"),
        ('{ beat = "bob" }', "", r"one: steps\[2\]: beat: bob has no connection before it"),
        ('{ get = "/x", at-least = 1 }', "", r"one: steps\[2\]: 'at-once' is a dependency of 'at-least'"),
        ('{ get = "/x", at-once = 2, or-status = 429 }', "", r"'at-least' is a dependency of 'or-status'"),
        ('{ get = "/x", at-once = 2, or-status = 429, at-least = 3 }', "", r"at-least: is more than at-once"),
        ('{ get = "/x", at-once = 2, save-as = "first" }', "", r"one: steps\[2\]: save-as: of which answer"),
        ('{ wait = "60s", idle = true }', "", r"one: steps\[2\]: idle: ann is connected"),
        ('{ wait = "60s", idle = true }', "alone = true", r"one: alone: a case that is idle cannot"),
        ('{ closed = "ann", since = "t" }', "", r"since: there is no mark 't' before it"),
        ('{ hook = "stop-store" }', "", r"needs 'hook:stop-store'"),
        ('{ wait = "1s" }', 'friends = { ann = ["bob"] }', r"one: needs: 'directory' is missing"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_case_and_field(tmp_path, step, more, told):
    write(tmp_path, step, more)
    with pytest.raises(CaseError, match=told) as caught:
        load_cases(CLAUSES, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_clause_must_exist_and_an_id_be_the_only_one(tmp_path):
    write(tmp_path)
    with pytest.raises(CaseError, match=r"file.toml: one: clauses: there is no A-02"):
        load_cases({"A-01": CLAUSES["A-01"]}, tmp_path)
    write(tmp_path, name="other.toml")
    with pytest.raises(CaseError, match=r"other.toml: one: the id is taken by a case of file.toml"):
        load_cases(CLAUSES, tmp_path)


def test_the_fixture_has_all_friends_and_conversations_under_ids_that_stay(tmp_path):
    write(
        tmp_path, more='needs = ["directory"]\nfriends = { ann = ["bob"] }\nconversations = { team = ["ann", "eve"] }'
    )
    write(tmp_path, name="plain.toml", identity="plain")
    cases = load_cases(CLAUSES, tmp_path)
    found = fixture(cases)
    user, friend, conversation = marks(cases)
    assert found["friends"].pop("one.ann") == ["one.bob"]
    assert (found["friends"].pop(user), found["friends"].pop(friend)) == ([friend], [user])
    assert found["conversations"] == {"one.team": ["one.ann", "one.eve"], conversation: [user, friend]}
    # Ann may see her canaries under the policy `contacts`, too; the case that has no directory has none.
    assert found["friends"] == {f"one.canary-ann-{n}": ["one.ann"] for n in range(1, 5)}
    # The marks change when anything else does.
    assert marks([dataclasses.replace(cases[0], friends={"ann": ["eve"]}), *cases[1:]])[0] != user


def test_the_schema_and_the_code_know_the_same_words():
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    definitions = schema["$defs"]
    assert {name.removeprefix("step:") for name in definitions if name.startswith("step:")} == set(VERBS)
    steps = definitions["case"]["properties"]["steps"]["items"]["oneOf"]
    assert {one["$ref"].rpartition(":")[2] for one in steps} == set(VERBS)
    assert definitions["case"]["properties"]["features"]["items"]["enum"] == list(FEATURES)
    assert definitions["step:hook"]["properties"]["hook"]["enum"] == list(HOOKS)
    assert definitions["token"]["anyOf"][0]["enum"] == list(TOKENS)


def test_our_own_cases_can_be_read():
    from contracts.clauses import load_clauses

    load_cases(load_clauses())
