"""A campaign: cases of all levels against one server, with a healthy neighbour beside them, and what must hold after."""  # noqa: E501

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.fuzz import peer as peers
from tests.fuzz.generate import JWKS, Bytes, Request, Socket, TokenCase, World, generate, good_token
from tests.fuzz.peer import Finding, Peer
from tests.support.server import ROOT, SECRET, ServerProcess, environment, running
from tests.support.waiting import wait_until

SLOTS = {"http": 24, "websocket": 8, "stomp": 8, "rest": 4, "token": 4, JWKS: 4}  # connections at a time
SHARE = {"http": 0.03, "websocket": 0.35, "stomp": 0.54, "rest": 0.04, "token": 0.02, JWKS: 0.02}  # of the messages
GROWTH = 10 * 2**20  # bytes
MANY = 20  # findings after which a campaign gives up


class Campaign:
    """One server, and what is sent to it."""

    def __init__(
        self,
        seed: str,
        levels: tuple[str, ...],
        say: Callable[[str], object] = print,
        *,
        rate: float = float("inf"),
        nice: int = 0,
        apart: bool = False,
        **settings: Any,
    ) -> None:
        """Start nothing yet.

        Args:
            nice: how much the attacker gives way on the cores that all share.
            apart: the neighbour is on a server of its own: what it feels then is the machine's doing, and not ours.
        """
        self.seed = seed
        self.levels = levels
        self.findings: list[str] = []
        self.messages: Counter[str] = Counter()
        self.connections: Counter[str] = Counter()
        self.answers: dict[str, Counter[str]] = {level: Counter() for level in levels}
        self.report: dict[str, Any] = {}
        self.server = ServerProcess(**{"lease_seconds": 5, "cleanup_seconds": 5} | settings)
        self._apart = apart
        self._say = say
        self._rate = rate  # messages a second, at most
        self._nice = nice
        self._due = 0.0  # when the next may be sent
        self._next: Counter[str] = Counter()
        self._world = World(SECRET.encode(), time.time(), _private_keys() if JWKS in levels else {})
        if self._world.keys:
            file = self.server.root / "jwks.json"
            file.write_text(json.dumps({"keys": [_public(*pair) for pair in self._world.keys.items()]}))
            self.server.settings |= {"jwks": file, "jwt_secret": None}

    async def run(self, *, messages: int = 0, seconds: float = 0.0) -> None:
        """Warm up with a tenth as much, take the measures, and go on for so many messages or seconds."""
        await self.server.ready()
        self._store = self.server.redis()
        pid = self.server.pid
        async with self._neighbour() as neighbour:
            await asyncio.sleep(2)
            quiet = await self._ask(neighbour)
            os.nice(self._nice)
            await self._attack(messages // 10, min(seconds / 10, 30))
            await self._settle(None)
            before = self._memory(), self._files()
            await self._ask(neighbour)
            began = time.monotonic()
            await self._attack(messages, seconds)
            took = time.monotonic() - began
            attacked = await self._ask(neighbour)
            await self._settle(before[1])
            growth = self._memory() - before[0]
            self.report = {"took": took, "rss": before[0], "growth": growth, "quiet": quiet, "attacked": attacked}
            if growth > GROWTH:
                self.findings.append(f"all: the server grew by {growth / 2**20:.1f} MiB")
            if not self.server.running or self.server.pid != pid:
                self.findings.append("all: the server is gone")
        if "Traceback" in self.server.log or " ERROR " in self.server.log:
            at = self.server.log.find("Traceback")
            self.findings.append(
                f"all: the log holds a traceback or an error: {self.server.log[max(at - 300, 0) : at + 3_000]}"
            )

    async def only(self, level: str, number: int) -> None:
        """Send one case."""
        await self.server.ready()
        await self._one(level, number, {})
        await asyncio.sleep(0.5)
        if "Traceback" in self.server.log:
            self.findings.append(self.server.log)

    async def _attack(self, messages: int, seconds: float) -> None:
        until = time.monotonic() + seconds if seconds else float("inf")
        total = sum(SHARE[level] for level in self.levels)
        async with asyncio.TaskGroup() as group:
            for level in self.levels:
                most = self.messages[level] + (messages * SHARE[level] / total if messages else float("inf"))
                for _ in range(SLOTS[level]):
                    group.create_task(self._slot(level, most, until))

    async def _slot(self, level: str, most: float, until: float) -> None:
        kept: dict[str, Peer] = {}
        while self.messages[level] < most and time.monotonic() < until and len(self.findings) < MANY:
            number = self._next[level]
            self._next[level] += 1
            await self._one(level, number, kept)
        for one in kept.values():
            one.transport.abort()

    async def _one(self, level: str, number: int, kept: dict[str, Peer]) -> None:
        case = generate(self.seed, level, number, self._world)
        self.messages[level] += case.messages
        now = time.monotonic()
        due = max(self._due, now)
        self._due = due + case.messages / self._rate
        await asyncio.sleep(due - now)
        try:
            outcome = await self._send(case, kept)
        except (Finding, OSError, ValueError, KeyError) as error:
            outcome = "FINDING"
            line = f"{level} {number} ({case.kind}): {error!r}"
            self.findings.append(line)
            self._say(f"FINDING --seed {self.seed} --level {level} --only {number}: {line}")
        self.answers[level][outcome] += 1

    async def _send(self, case: Any, kept: dict[str, Peer]) -> str:
        port = self.server.port
        match case:
            case Bytes():
                self.connections["http"] += 1
                return await peers.http(case, port)
            case Socket():
                self.connections["socket"] += 1
                return await peers.socket(case, port)
            case TokenCase() if case.by != "rest":
                return await peers.token_on_socket(case, port, self._world)
            case TokenCase():
                case = peers.token_request(case)
        assert isinstance(case, Request)
        if "rest" not in kept or kept["rest"].closed or kept["rest"].transport.is_closing():
            kept["rest"] = await Peer.open(port)
            self.connections["rest"] += 1
        peer = kept["rest"]
        try:
            status, headers, body = await peers.ask(peer, case.data, case.method)
        except Finding:
            del kept["rest"]
            peer.transport.abort()
            raise
        if headers.get("connection", "").lower() == "close" or status == 413 or case.method not in ("GET", "POST"):
            peer.transport.abort()
            del kept["rest"]
        return peers.check(status, headers, body, case)

    # What must hold

    async def _settle(self, files: int | None) -> None:
        """Wait until nothing is left of any connection: no session, nobody online, no file."""

        def leftovers() -> list[str]:
            online: Any = self._store.smembers("presence:online")
            found = [user for user in online if user.startswith("fuzz-") and "-" in user[5:]]
            for pattern in ("online:*", "sessions"):
                keys: Any = self._store.keys(f"presence:user:fuzz-*-*:{pattern}")
                found += keys
            return found

        try:
            await wait_until(lambda: not leftovers(), 15, what="nobody to be left online", every=0.2)
            if files is not None:
                await wait_until(lambda: self._files() <= files, 20, what="the files to be closed", every=0.2)
            else:
                await asyncio.sleep(0.5)
        except AssertionError as error:
            self.findings.append(f"all: {error}; {leftovers()[:5]}, {self._files()} files, before {files}")

    def _memory(self) -> int:
        return int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1]) * 4096

    def _files(self) -> int:
        """How many the server has open, but for its connections to the store, which keep to the most that it needed."""
        clients: Any = self._store.client_list()
        return len(list(Path(f"/proc/{self.server.pid}/fd").iterdir())) - len(clients)

    @asynccontextmanager
    async def _neighbour(self) -> AsyncIterator[asyncio.subprocess.Process]:
        tokens = [good_token(self._world, f"fuzz-{name}") for name in ("neighbour", "watcher", "flipper")]
        own = ("port", "data_dir", "directory")
        alike = {name: value for name, value in self.server.settings.items() if name not in own}
        async with running(**alike) if self._apart else nullcontext(self.server) as home:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.fuzz.neighbour", home.ws, *tokens, cwd=ROOT,
                env=environment({}), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                yield process
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()

    async def _ask(self, neighbour: asyncio.subprocess.Process) -> Mapping[str, Any]:
        assert neighbour.stdin is not None
        assert neighbour.stdout is not None
        neighbour.stdin.write(b"\n")
        line = await asyncio.wait_for(neighbour.stdout.readline(), 10)
        if not line:
            self.findings.append("all: the neighbour is gone")
            return {}
        answer: dict[str, Any] = json.loads(line)
        if answer["error"]:
            self.findings.append(f"all: the neighbour was not answered: {answer['error']}")
        return answer

    def lines(self) -> list[str]:
        """The counts."""
        out = []
        for level in self.levels:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in self.answers[level].most_common())
            out.append(f"{level}: {self.messages[level]} messages in {self._next[level]} cases; {kinds}")
        if self.report:
            quiet, attacked = (self.report[name]["beats"] for name in ("quiet", "attacked"))
            flips = [self.report[name]["flips"] for name in ("quiet", "attacked")]
            out.append(
                f"server: {self.report['rss'] / 2**20:.0f} MiB, grew by {self.report['growth'] / 2**20:.1f} MiB in {self.report['took']:.0f} s"  # noqa: E501
            )
            out.append(
                f"neighbour, heartbeat: p50 {quiet['p50']:.1f} → {attacked['p50']:.1f} ms, p99 {quiet['p99']:.1f} → {attacked['p99']:.1f} ms (× {attacked['p99'] / max(quiet['p99'], 0.01):.1f}), max {attacked['max']:.0f} ms of {attacked['answers']}"  # noqa: E501
            )
            out.append(
                f"neighbour, change: p50 {flips[0]['p50']:.1f} → {flips[1]['p50']:.1f} ms, p99 {flips[0]['p99']:.1f} → {flips[1]['p99']:.1f} ms, max {flips[1]['max']:.0f} ms of {flips[1]['answers']}"  # noqa: E501
            )
        return [*out, f"{sum(self.messages.values())} messages, {len(self.findings)} findings"]


def _private_keys() -> dict[str, Any]:
    return {
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "RS256": rsa.generate_private_key(65_537, 2_048),
    }


def _public(algorithm: str, key: Any) -> dict[str, Any]:
    jwk: Any = jwt.get_algorithm_by_name(algorithm)
    return {**jwk.to_jwk(key.public_key(), as_dict=True), "kid": algorithm, "key_ops": ["verify"]}
