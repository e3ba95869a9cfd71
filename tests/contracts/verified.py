"""Verifies our server by the contract: all of it, against processes started for it.

    python -m tests.contracts.verified [--lease SECONDS] [OPTIONS OF presence-contracts run]

Two instances on a Valkey of their own, with a hook for whatever the cases break, and with the policy `anyone`; then the
same with `contacts`, for the cases that are about it. Reports of the second run have `-contacts` in their names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import click

from contracts.cases import fixture, load_cases
from contracts.clauses import load_clauses
from contracts.model import Case
from contracts.target import HOOKS
from tests.support.server import ROOT, SECRET, ServerProcess
from tests.support.store import ValkeyProcess
from tests.support.waiting import wait_until

LEASE = 2
"""s"""
STORE_TIMEOUT = 1
"""s: how soon it is clear to an instance that its store is away."""
SLACK = 0.3
"""s: less than what is late where something is; too little can only find too much."""
CLAIMS: dict[str, Any] = {"iss": "https://issuer.example", "aud": "presence"}
"""What a token has to say beside its user and its end."""
IDENTITY = {"jwt_issuer": CLAIMS["iss"], "jwt_audience": CLAIMS["aud"]}
POLICIES = ("anyone", "contacts")
REPORTS = ("html", "json", "junit")
# Few cases at once: instances, store and suite share a machine, maybe with other tests.
TARGET = """class = "full"
parallel = 12
lease = {lease}
slack = {slack}
policy = "{policy}"
{instances}
[token]
secret = "{secret}"
claims = {claims}
[directory]
loaded = true
[hooks]
{hooks}
"""


class Keeper:
    """Keeps two instances and their store, and breaks them when a hook asks for it.

    Args:
        folder: for its socket and the target file; a short path.
        settings: of the instances, beside those that make them a fleet.
    """

    def __init__(self, folder: Path, policy: str, **settings: object) -> None:
        self.socket = folder / "hooks"
        self.target = folder / "target.toml"
        self.policy = policy
        self.store = ValkeyProcess()
        fleet = {
            "redis_url": self.store.url,
            "store_timeout_seconds": STORE_TIMEOUT,
            "lease_seconds": LEASE,
            "watch_policy": policy,
        } | IDENTITY
        self.lease = (fleet | settings)["lease_seconds"]
        self.servers = self.instances(fleet | settings)

    def instances(self, settings: dict[str, object]) -> list[ServerProcess]:
        """Two, which share the store; not started."""
        directory = json.dumps(fixture(load_cases(load_clauses())))
        servers = [ServerProcess(**settings) for _ in range(2)]  # type: ignore[arg-type]
        for server in servers:
            server.directory_file.write_text(directory)
        return servers

    async def start(self) -> None:
        """Start the instances, at once."""
        for server in self.servers:
            server.start()
        for server in self.servers:
            await server.ready()

    async def finish(self) -> None:
        """Stop them; all must have gone well."""
        for server in self.servers:
            await server.finish()

    @asynccontextmanager
    async def keeping(self) -> AsyncIterator[Path]:
        """Start all; yields the target file. At the end all must have gone well."""
        async with AsyncExitStack() as stack:
            stack.callback(self.store.close)
            for server in self.servers:
                stack.callback(server.close)
            await self.store.start()
            await self.start()
            await wait_until(self._settled, what="the servers to know who is offline")
            await stack.enter_async_context(await asyncio.start_unix_server(self._hook, self.socket))
            self.target.write_text(self._target())
            yield self.target
            await self.finish()

    async def _settled(self) -> bool:
        """A store that is new to an instance may have lost what it knew: for a while nobody is said to be offline."""
        path = "/api/presence/check/nobody"
        answers = [await server.get(path, token=server.token("nobody", **CLAIMS)) for server in self.servers]
        return all(answer.status == 200 for answer in answers)

    def _target(self) -> str:
        hook = [sys.executable, "-I", "-S", str(Path(__file__).with_name("control.py")), str(self.socket)]
        return TARGET.format(
            lease=self.lease,
            slack=SLACK,
            policy=self.policy,
            secret=SECRET,
            claims="{{ {} }}".format(", ".join(f"{name} = {json.dumps(value)}" for name, value in CLAIMS.items())),
            instances="".join(f'[[instances]]\nhttp = "{server.http}"\n' for server in self.servers),
            hooks="\n".join(f"{name} = {json.dumps([*hook, name, '{instance}'])}" for name in HOOKS),
        )

    async def _hook(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name, instance = (await reader.readline()).decode().split()
        try:
            await self.do(name, self.servers[int(instance) - 1])
            said = "done"
        except Exception as error:  # noqa: BLE001 (whatever it is, the case is told that the hook failed)
            said = " ".join(f"{type(error).__name__}: {error}".split())
        writer.write(f"{said}\n".encode())
        writer.close()

    async def do(self, hook: str, server: ServerProcess) -> None:
        """Do what a hook says, to its end."""
        match hook:
            case "kill-instance":
                await server.kill9()
            case "stop-instance":
                await server.stop()
            case "restart-instance":
                await server.start().ready()
            case "freeze-instance":
                await server.freeze()
            case "thaw-instance":
                await server.thaw()
            case "stop-store":
                await self.store.stop()
            case "empty-store":
                shutil.rmtree(self.store.data)
            case "start-store":
                await self.store.start()
            case _:
                raise ValueError(f"there is no hook {hook}")


async def verify(policy: str, options: Sequence[str], **settings: object) -> int:
    """Run the suite, in a process of its own, against fresh instances; it prints its verdict. Returns its exit code.

    If that is not 0, what the instances logged is printed, too.
    """
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp") as folder:
        keeper = Keeper(Path(folder), policy, **settings)
        async with keeper.keeping() as target:
            code = await suite("run", "--target", str(target), *options)
            if code:
                for number, server in enumerate(keeper.servers, 1):
                    click.echo(f"Instance {number} logged:\n{server.log}")
            return code


async def suite(*arguments: str) -> int:
    """Run `presence-contracts ARGUMENTS`; returns its exit code."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "contracts", *arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def cases_of(policy: str, only: Sequence[str] = ()) -> list[Case]:
    """The cases that say something of a server with this policy; ``only``: of these ids of cases and clauses."""
    wanted = {one.lower() for one in only}
    return [
        case
        for case in load_cases(load_clauses())
        if case.policy in {policy, "any"}
        and (not wanted or wanted & {case.id, *(clause.lower() for clause in case.clauses)})
    ]


async def main(arguments: Sequence[str]) -> int:
    """Verify both. Exit code: 1 if a MUST is broken anywhere, else the highest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--lease", type=int, default=LEASE)
    for kind in REPORTS:
        parser.add_argument(f"--{kind}", type=Path)
    chosen, rest = parser.parse_known_args(arguments)
    if not any(cases_of(policy, chosen.only) for policy in POLICIES):
        return await suite("run", "--target", os.devnull, *arguments)  # it knows what to say
    codes = []
    for policy in POLICIES:
        cases = cases_of(policy, chosen.only)
        if not cases:
            continue
        reports = {kind: path for kind in REPORTS if (path := getattr(chosen, kind))}
        if policy != POLICIES[0]:
            reports = {kind: path.with_stem(f"{path.stem}-{policy}") for kind, path in reports.items()}
        options = [*rest, *(f"--{kind}={path}" for kind, path in reports.items())]
        if chosen.only or policy != POLICIES[0]:
            options += [f"--only={case.id}" for case in cases]
        click.echo(f"Policy {policy}:")
        codes.append(await verify(policy, options, lease_seconds=chosen.lease))
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
