"""The contract is whole: no clause is without a case or a reason, and no id is lost, taken twice or used again."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_spec_validator.readers import read_from_filename

from contracts.cases import load_cases
from contracts.clauses import load_clauses
from contracts.model import Class

ROOT = Path(__file__).parents[2]
CONTRACTS = ROOT / "contracts"
REGISTER = CONTRACTS / "register.txt"
WITHDRAWN = "withdrawn"

CLAUSES = load_clauses()
CASES = load_cases(CLAUSES)


def entries(text):
    """The ids of a register, each with whether it is withdrawn."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, WITHDRAWN in more) for name, *more in lines]


def ever_registered():
    """All entries that any commit added, as far as this clone knows the history."""
    done = subprocess.run(
        ["git", "log", "-p", "--format=", "--", "contracts/register.txt"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    added = [line[1:] for line in done.stdout.splitlines() if line.startswith("+") and not line.startswith("+++")]
    return entries("\n".join(added))


# Clauses and cases.


def test_every_clause_has_a_case_or_a_reason_why_not():
    verified = {clause for case in CASES for clause in case.clauses}
    assert [name for name, clause in CLAUSES.items() if name not in verified and not clause.unseen] == []


def test_no_clause_has_both():
    verified = {clause for case in CASES for clause in case.clauses}
    assert [name for name, clause in CLAUSES.items() if name in verified and clause.unseen] == []


def test_every_case_names_existing_clauses_each_once():
    wrong = [
        case.id
        for case in CASES
        if not set(case.clauses) <= CLAUSES.keys() or len(set(case.clauses)) < len(case.clauses)
    ]
    assert wrong == []


def test_a_case_of_the_guide_is_about_clauses_of_the_guide():
    """Else a server of class `guide` would fail what it never claimed."""
    wrong = [
        f"{case.id}: {clause}"
        for case in CASES
        for clause in case.clauses
        if case.conformance is Class.GUIDE and CLAUSES[clause].conformance is Class.FULL
    ]
    assert wrong == []


def test_every_clause_of_the_guide_that_can_be_seen_has_a_case_of_the_guide():
    verified = {clause for case in CASES if case.conformance is Class.GUIDE for clause in case.clauses}
    guide = {name for name, clause in CLAUSES.items() if clause.conformance is Class.GUIDE and not clause.unseen}
    assert guide - verified == set()


def test_a_clause_stands_in_the_file_of_its_area():
    for file in sorted((CONTRACTS / "spec").glob("[0-9]*.md")):
        area = file.stem.partition("-")[2].upper()
        found = re.findall(r"(?m)^### ([A-Z]+)-\d+", file.read_text())
        assert set(found) == {area}, file.name


def test_a_case_of_the_guide_may_be_played_where_friendship_is_mutual():
    wrong = [
        f"{case.id}: {name} lists {other}"
        for case in CASES
        if case.conformance is Class.GUIDE
        for name, others in case.friends.items()
        for other in others
        if name not in case.friends.get(other, [name])
    ]
    assert wrong == []


def test_a_frozen_client_is_not_to_outlast_the_pings_of_a_server():
    """Which may end a connection that answers none, sooner than a long lease."""
    wrong = [
        case.id
        for case in CASES
        if "short-lease" not in case.needs
        and any("freeze" in step for step in case.steps)
        and any("L" in step.get("not-before", "") for step in case.steps)
    ]
    assert wrong == []


SIGNS = {
    "sockjs": r'"transport": "sockjs"|/ws/(info|websocket)',
    "stomp-1.0": r'"versions": "(1\.0)?"|"version": "1\.0|"subprotocol": "v10',
    "stomp-1.1": r'"versions": "1\.1"|"version": "1\.(0,1\.)?1|"subprotocol": "v11',
    "transactions": r'"(frame|text)": "(BEGIN|COMMIT|ABORT)|"transaction": ',
    "ack": r'"ack": "client|"(frame|text)": "N?ACK',
    "token-renewal": r'/app/heartbeat.*"Authorization"',
    "passcode": r'"token-in": "passcode"|\\npasscode:',
    "upgrade-token": r'"token-in": "upgrade"',
    "english": r'"Accept-Language": "[^"]*\ben\b',
    "conversations": r'"get": "/api/presence/conversation/',
    "friends": r'"get": "/api/presence/friends"',
    "cors": r'"Origin": |Access-Control',
    "snapshots": r'"snapshot": true|"keep": true',
    "heart-beats": r'"expect-heart-beat"',
}
"""Features, by what shows in a step that a server without it may do otherwise."""


def test_a_case_names_the_features_that_its_steps_are_about():
    """Else a server fails for what it said it does not have."""
    wrong, seen = [], set()
    for case in CASES:
        # A request that is to be refused is so by a server without its path, too.
        steps = [json.dumps(step) for step in case.steps if step.get("status") != "!~ ^2"]
        shown = {feature for feature, sign in SIGNS.items() if any(re.search(sign, step) for step in steps)}
        wrong += [f"{case.id}: {feature}" for feature in sorted(shown - case.features)]
        seen |= shown
    assert wrong == []
    assert seen == SIGNS.keys()


def test_the_titles_of_cases_are_sentences_of_their_own():
    titles = [case.title for case in CASES]
    assert sorted(title for title in set(titles) if titles.count(title) > 1) == []
    assert [title for title in titles if title.endswith(".") or "\n" in title] == []


# The register of ids.


def test_every_id_stands_in_the_register_once():
    names = [name for name, _ in entries(REGISTER.read_text())]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
    assert sorted({*CLAUSES, *(case.id for case in CASES)} - set(names)) == []


def test_what_is_there_no_more_is_withdrawn_and_what_is_withdrawn_is_not_used_again():
    used = {*CLAUSES, *(case.id for case in CASES)}
    wrong = [name for name, withdrawn in entries(REGISTER.read_text()) if withdrawn is (name in used)]
    assert wrong == []


def test_the_register_only_grows():
    now = dict(entries(REGISTER.read_text()))
    before = ever_registered()
    assert sorted({name for name, _ in before} - now.keys()) == []
    assert [name for name, withdrawn in before if withdrawn and not now[name]] == []


# The descriptions.


def test_openapi_is_valid():
    document, uri = read_from_filename(str(CONTRACTS / "openapi.yaml"))
    assert list(OpenAPIV31SpecValidator(document, base_uri=uri).iter_errors()) == []


def test_every_schema_is_one_and_has_an_id_and_a_title():
    from jsonschema import Draft202012Validator

    files = sorted((CONTRACTS / "schemas").glob("*.json"))
    assert files
    for file in (*files, CONTRACTS / "cases" / "case.schema.json"):
        schema = json.loads(file.read_text())
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema", file.name
