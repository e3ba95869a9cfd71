"""The descriptions that machines read are right by their own tools, and our server answers as `openapi.yaml` says."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest
import pytest_asyncio
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_spec_validator.readers import read_from_filename
from referencing import Registry, Resource
from schemathesis import GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks

from tests.contracts.javascript import HERE, node
from tests.support import versions
from tests.support.server import running

CONTRACTS = Path(__file__).parents[2] / "contracts"
OPENAPI = CONTRACTS / "openapi.yaml"
SCHEMAS = {file.name: json.loads(file.read_text()) for file in sorted((CONTRACTS / "schemas").glob("*.json"))}

# The descriptions themselves.


def test_asyncapi_accepts_its_description():
    command = [node("@asyncapi/parser"), str(HERE / "asyncapi.mjs"), str(CONTRACTS / "asyncapi.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert {"/app/heartbeat", "/user/queue/online-status", "user.presence.status"} <= set(json.loads(done.stdout))


def test_openapi_accepts_its_description():
    document, uri = read_from_filename(str(OPENAPI))
    assert list(OpenAPIV31SpecValidator(document, base_uri=uri).iter_errors()) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_of_2020_12_and_all_its_examples_fit(name):
    registry = Registry().with_resources((file, Resource.from_contents(one)) for file, one in SCHEMAS.items())
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    for example in SCHEMAS[name].get("examples", []):
        # What a schema refers to stands beside it.
        found = Draft202012Validator(
            {"$ref": name}, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER
        ).iter_errors(example)
        assert [error.message for error in found] == []


# Our server, by what `openapi.yaml` says. Whose token a request has is up to the test.

DESCRIPTION = openapi.from_path(
    OPENAPI, config=SchemathesisConfig.from_dict({"generation": {"with-security-parameters": False}})
)
_ALL = [one.ok() for one in DESCRIPTION.get_all_operations()]  # type: ignore[union-attr] # an Err fails here
OPERATIONS = {operation.label: operation for operation in _ALL}
WITH_INPUT = [label for label in OPERATIONS if label != "GET /api/presence/friends"]
ANSWERED_AS_DESCRIBED = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
KNOWN = {"userId": "bob", "conversationId": "team"}
"""What a path may name that is there."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server():
    """Ours; to ann's friends belong bob, who is offline, carol, who is online, and dave, who was never seen."""
    async with running() as process:
        friends = ["bob", "carol", "dave"]
        await process.know(friends={"ann": friends}, conversations={"team": ["ann", *friends]})
        yield process


def requests_of(operation, mode, server):
    """Make 100 requests, the same each time; return the statuses of the answers, all of which are as described."""
    good, *bad = server.token("ann"), server.token("ann", ttl=-60), "none", None
    right = mode is GenerationMode.POSITIVE
    verdict = checks.positive_data_acceptance if right else checks.negative_data_rejection
    statuses: set[int] = set()

    @settings(max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        case=operation.as_strategy(generation_mode=mode),
        token=st.sampled_from([good, good, good, *bad]),
        known=st.booleans(),
    )
    def ask(case, token, known):
        if right and known:
            case.path_parameters = {name: KNOWN[name] for name in case.path_parameters}
            if operation.body:
                case.body = [*case.body, "ann", "bob", "carol", "dave"]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = case.call_and_validate(server.http, session, headers, checks=[*ANSWERED_AS_DESCRIBED, verdict])
        assert (answer.status_code == 401) == (token != good)
        statuses.add(answer.status_code)

    with requests.Session() as session:
        ask()
    return statuses


@pytest.mark.parametrize("label", OPERATIONS)
async def test_what_the_description_allows_is_answered_as_it_says(server, connect, label):
    versions.note_package("schemathesis")
    await (await connect(server, "bob")).disconnect()
    await connect(server, "carol")
    statuses = await asyncio.to_thread(requests_of, OPERATIONS[label], GenerationMode.POSITIVE, server)
    assert statuses == {200, 401} | ({403} if "conversation" in label else set())


@pytest.mark.parametrize("label", WITH_INPUT)
async def test_what_the_description_does_not_allow_is_refused_as_it_says(server, label):
    statuses = await asyncio.to_thread(requests_of, OPERATIONS[label], GenerationMode.NEGATIVE, server)
    assert {400, 401} <= statuses
