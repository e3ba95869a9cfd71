"""Broken servers that the contract must catch: each is ours with one small patch (`mutants/*.toml`).

A mutant has a `name`; `says`, what this server does wrong; the `clauses` that it breaks; `edits`, each a `file` of
`presence/` with an `old` text, which must occur exactly once in it, and the `new` one; and `caught-by`, the cases that
are meant for it. Where it needs them: `settings` of the server by their names in lower case, `policy` (`anyone`),
`instances` (1); `slow`, if these cases take a minute or more.

    python -m tests.contracts.mutants [NAME…]          runs the cases meant for each, until one fails
    python -m tests.contracts.mutants --all [NAME…]    runs the whole suite on each: a case meant for it must be among
                                                       those that fail

`unmodified`, `unmodified-contacts` and `unmodified-two` are no mutants: nothing may catch them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from contracts import runner
from contracts.cases import fixture, load_cases
from contracts.clauses import load_clauses
from contracts.model import Case, Class, Clause, Outcome, Result, Run
from contracts.target import Instance, Target, load_target
from tests.contracts.verified import CLAIMS, IDENTITY, LEASE, SLACK, Keeper
from tests.support.fork_server import fork_presence
from tests.support.server import ROOT, SECRET, ServerProcess, environment

FOLDER = Path(__file__).parent / "mutants"


@dataclass(frozen=True)
class Edit:
    """One text of one file, replaced."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A broken server."""

    name: str
    says: str
    clauses: Sequence[str] = ()
    caught_by: Sequence[str] = ()
    edits: Sequence[Edit] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: str = "anyone"
    instances: int = 1
    slow: bool = False

    def patched(self) -> dict[Path, str]:
        """The new text of each file that the patch changes, by its path from the root of the project."""
        texts: dict[Path, str] = {}
        for edit in self.edits:
            path = Path("presence", edit.file)
            text = texts.get(path) or (ROOT / path).read_text(encoding="utf-8")
            assert text.count(edit.old) == 1, f"{self.name}: {path} has {text.count(edit.old)} times: {edit.old}"
            texts[path] = text.replace(edit.old, edit.new)
        return texts

    def apply(self, folder: Path) -> None:
        """Put a copy of `presence/` into the folder, with the patch."""
        # With its compiled files, and the times by which they are found to be good.
        shutil.copytree(ROOT / "presence", folder / "presence")
        for path, text in self.patched().items():
            (folder / path).write_text(text, encoding="utf-8")


UNMODIFIED = (
    Mutant("unmodified", "Does what it should."),
    Mutant("unmodified-contacts", "Does what it should.", policy="contacts"),
    Mutant("unmodified-two", "Does what it should.", instances=2),
)


def load_mutants(folder: Path = FOLDER) -> dict[str, Mutant]:
    """All mutants by name, in the order of the files and of their text."""
    mutants: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.toml")):
        for raw in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            named = {name.replace("-", "_"): value for name, value in raw.items()}
            named["edits"] = [Edit(**edit) for edit in named["edits"]]
            mutant = Mutant(**named)
            assert mutant.name not in mutants, f"{path.name}: {mutant.name} is there twice"
            mutants[mutant.name] = mutant
    return mutants


@cache
def suite() -> tuple[dict[str, Clause], list[Case]]:
    """All clauses, and all cases."""
    clauses = load_clauses()
    return clauses, load_cases(clauses)


class MutantServer(ServerProcess):
    """One instance of a broken server."""

    def __init__(self, mutant: Mutant, **settings: object) -> None:
        common = {"lease_seconds": LEASE, "watch_policy": mutant.policy} | IDENTITY
        # What a broken server says in its log is not what is asked here.
        super().__init__(allow_traceback=True, **(common | settings | dict(mutant.settings)))
        self.directory_file.write_text(json.dumps(fixture(suite()[1])))
        mutant.apply(self.root)

    def start(self) -> MutantServer:
        assert not self.running, "still running"
        here = environment(self.settings) | {"PYTHONPATH": str(self.root)}
        self.process = fork_presence(["serve"], here, self.root, self.log_file, self.log_file, self.root)
        return self


class MutantKeeper(Keeper):
    """Two instances of a broken server that share a store, with a hook for whatever the cases break."""

    def __init__(self, folder: Path, mutant: Mutant) -> None:
        self.mutant = mutant
        super().__init__(folder, mutant.policy)

    def instances(self, settings: dict[str, object]) -> list[ServerProcess]:
        return [MutantServer(self.mutant, redis_url=settings["redis_url"]) for _ in range(self.mutant.instances)]

    async def start(self) -> None:
        for server in self.servers:
            await server.start().ready()  # one after the other: which is the first is the same each time

    async def finish(self) -> None:
        """How a broken server stops is not what is asked."""


@asynccontextmanager
async def running(mutant: Mutant) -> AsyncIterator[Target]:
    """The broken server, on all its instances; the target that it is."""
    if mutant.instances > 1:
        with tempfile.TemporaryDirectory(prefix="pm-", dir="/tmp") as folder:
            async with MutantKeeper(Path(folder), mutant).keeping() as file:
                yield load_target(file)
        return
    server = MutantServer(mutant)
    try:
        await server.start().ready()
        instances = [Instance(server.http, f"ws://127.0.0.1:{server.port}")]
        said: dict[str, Any] = {
            "lease": LEASE,
            "slack": SLACK,
            "policy": mutant.policy,
            "secret": SECRET,
            "claims": CLAIMS,
            "directory_loaded": True,
        }
        yield Target(mutant.name, Class.FULL, instances, **said)
    finally:
        server.close()


async def verify(mutant: Mutant, *, whole: bool = False) -> Run:
    """Run the cases meant for the mutant until one fails; or the whole suite."""
    clauses, cases = suite()
    async with running(mutant) as target:
        only = () if whole else mutant.caught_by
        return await runner.run(
            target, cases, clauses, only=only, patient=mutant.slow, fail_fast=not whole, probe=False
        )


def caught(run: Run) -> list[Result]:
    """The cases that found the server wrong."""
    return [result for result in run.results if result.outcome is Outcome.FAILED]


def main() -> int:
    """Print the table. Exit code 0: each mutant was caught, and nothing else was."""
    parser = argparse.ArgumentParser(prog="python -m tests.contracts.mutants", description="Tries broken servers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant; all, if there is none")
    parser.add_argument("--all", action="store_true", help="the whole suite on each, not only the cases meant for it")
    parser.add_argument("--verbose", action="store_true", help="what the cases found, too")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="so many at a time (%(default)s)")
    arguments = parser.parse_args()
    mutants = load_mutants()
    known = mutants | {one.name: one for one in UNMODIFIED}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"there is no mutant {', '.join(unknown)}")
    chosen = [known[name] for name in arguments.names] or list(mutants.values())
    wrong = 0
    say(f"{'mutant':<34}{'caught by':<58}seconds")
    row = partial(tried, everything=arguments.all, verbose=arguments.verbose)
    with ProcessPoolExecutor(arguments.at_once, multiprocessing.get_context("spawn")) as processes:
        for right, lines in processes.map(row, chosen):
            wrong += not right
            for line in lines:
                say(line)
    say(f"{len(chosen) - wrong} of {len(chosen)} as they should be")
    return 1 if wrong else 0


def tried(mutant: Mutant, *, everything: bool, verbose: bool) -> tuple[bool, list[str]]:
    """Whether it fared as it should; its lines of the table."""
    begun = time.monotonic()
    meant, is_right = set(mutant.caught_by), mutant.name in {one.name for one in UNMODIFIED}
    run = asyncio.run(verify(mutant, whole=everything or is_right))
    names = [result.case.id for result in caught(run)]
    names.sort(key=lambda name: name not in meant)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    lines = [f"{mutant.name:<34}{shown or '-':<58}{time.monotonic() - begun:7.1f}"]
    for result in run.results if verbose else ():
        if result.outcome in {Outcome.FAILED, Outcome.ERROR}:
            lines.append(f"    {result.case.id} {result.outcome.value} at step {result.step} after {result.seconds} s:")
            lines.append(f"        {result.reason or f'expected {result.expected}; {result.actual}'}")
    return not names if is_right else not meant.isdisjoint(names), lines


def say(line: str) -> None:
    """A line on the standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
