"""The contract catches broken servers: each of `mutants/` by a case that is meant for it."""

from __future__ import annotations

import asyncio

import pytest

from tests.contracts.mutants import Mutant, caught, load_mutants, suite, verify

MUTANTS = list(load_mutants().values())


def named(mutants: list[Mutant]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutant", mutants, ids=[mutant.name for mutant in mutants])


async def catch(mutant: Mutant) -> None:
    assert mutant.caught_by, f"no case is meant for {mutant.name}: {mutant.says}"
    assert [result.case.id for result in caught(await verify(mutant))], mutant.says


@named([mutant for mutant in MUTANTS if not mutant.slow])
async def test_a_broken_server_is_caught(mutant: Mutant):
    await catch(mutant)


@pytest.mark.timeout(180)
async def test_those_that_only_time_tells_are_caught():
    """Together: they wait for a minute and more."""
    slow = [mutant for mutant in MUTANTS if mutant.slow]
    assert slow
    async with asyncio.TaskGroup() as tasks:
        for mutant in slow:
            tasks.create_task(catch(mutant))


@named(MUTANTS)
def test_its_patch_is_of_this_code(mutant: Mutant):
    """What the patch replaces occurs exactly once, and what is made of it can be read."""
    for path, text in mutant.patched().items():
        if path.suffix == ".py":
            compile(text, str(path), "exec")


def test_mutants_name_clauses_and_cases_that_there_are():
    clauses, cases = suite()
    ids = {case.id for case in cases}
    for mutant in MUTANTS:
        assert mutant.edits, mutant.name
        assert set(mutant.clauses) <= set(clauses), mutant.name
        assert set(mutant.caught_by) <= ids, mutant.name


def test_a_mutant_breaks_what_its_cases_verify():
    clauses = {case.id: set(case.clauses) for case in suite()[1]}
    for mutant in MUTANTS:
        for case in mutant.caught_by:
            assert clauses[case] & set(mutant.clauses), f"{mutant.name} is said to be caught by {case}"
