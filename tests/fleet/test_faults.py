"""Nothing is lost, told twice or told wrongly, whatever is broken: what all clients saw is held against `checker`.

The same each time as far as the clients go, or those of PRESENCE_TEST_SEED; `python -m tests.fleet soak` goes on for
hours. A run's history stays in pytest's folder: `python -m tests.fleet check FILE` looks at it again. Where a run has
to share the machine, PRESENCE_TEST_FLEET_USERS makes it smaller or larger.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.faults import FAULTS, run_fault
from tests.support.store import clock_library

FULL = ("instance killed", "rolling restart", "redis empty, instance killed")
"""Faults of what is always there that are tried with Kafka and Cassandra beside it; `soak --full` tries them all so."""
CONTAINED = (
    "redis killed, with its data",
    "redis frozen for less than a lease",
    "redis frozen for more than a lease",
    "kafka killed",
    "kafka frozen 30 s",
    "kafka restarted",
    "cassandra killed",
    "cassandra frozen",
    "cassandra away at the start",
)
"""Those of one service that is killed or frozen: they are tried with it in a container, too."""
CASES = [
    pytest.param(form, name, id=f"{name}-{form}")
    for name, fault in FAULTS.items()
    for form in ["full" if fault.needs or name in FULL else "redis", *["container"] * (name in CONTAINED)]
]


@pytest.fixture
def services(request: pytest.FixtureRequest, form: str, name: str) -> dict[str, Any]:
    """What the run has not by itself: services of the whole test run, or how to start one that may be broken."""
    broken = FAULTS[name].needs
    found: dict[str, Any] = {}
    if form == "full" or (form == "container" and broken):
        found = {one: request.getfixturevalue(one) for one in ("kafka", "cassandra") if one != broken}
    if form == "container":
        found[broken or "redis"] = partial(request.getfixturevalue("start_container"), broken or "redis")
    elif broken:
        found[broken] = request.getfixturevalue(f"start_{broken}")
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("form", "name"), CASES)
async def test_what_all_clients_saw_was_true(form, name, services, tmp_path):
    if "behind" in FAULTS[name].world and clock_library() is None:
        pytest.skip("a clock of its own for Redis: libfaketime is not here")
    seed = os.environ.get("PRESENCE_TEST_SEED", "1")
    users = int(os.environ.get("PRESENCE_TEST_FLEET_USERS", "100"))
    made = {one: await service() if callable(service) else service for one, service in services.items()}
    file = tmp_path / "history.jsonl"
    report, _ = await run_fault(name, seed, file, users=users, watchers=users, **made)
    assert report.counts["told"] > 10 * users
    assert report.counts["polled"] > 50
    assert report.counts["change"] > users, "it was a run worth the name"
    found = "\n".join([*map(str, report.findings[:20]), *(_end(log) for log in sorted(tmp_path.glob("*.log")))])
    assert not report.findings, f"{len(report.findings)} findings; seed {seed}, history {file}\n{found}"


def _end(log: Path) -> str:
    """The last that the instance had to say of what it needs."""
    lines = [
        line for line in log.read_text().splitlines() if re.search("WARNING|ERROR|Kafka|Cassandra|store|got", line)
    ]
    return "\n".join([log.name, *lines[-15:]])
