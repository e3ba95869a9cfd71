"""The presence server as users run it: `python -m presence serve`, a process with settings in its environment."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import jwt
import redis

from tests.support import versions
from tests.support.fork_server import fork_presence
from tests.support.process import Process, free_port
from tests.support.rest import Response, request
from tests.support.waiting import wait_until

SECRET = "a secret of the tests, of 32 bytes and more"
ROOT = Path(__file__).parents[2]


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """The environment for a server with these settings: ``lease_seconds=2`` becomes ``PRESENCE_LEASE_SECONDS=2``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRESENCE_")}
    ours = {f"PRESENCE_{name.upper()}": str(value) for name, value in settings.items() if value is not None}
    return inherited | ours | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class ServerProcess(Process):
    """One `presence serve`.

    Args:
        allow_traceback: this test provokes one in the log.
        settings: by their names in lower case without the prefix; None leaves one unset. Unless said otherwise the
            server has a free port, an embedded store in a folder of its own, a known secret and an empty directory.
    """

    alive: ClassVar[list[ServerProcess]] = []
    """All that are not closed: their logs are attached to the report of a test that fails."""

    def __init__(self, *, allow_traceback: bool = False, **settings: object) -> None:
        super().__init__()
        self.allow_traceback = allow_traceback
        self._checked = 0
        self._clients: list[redis.Redis] = []
        self._directory: dict[str, dict[str, list[str]]] = {"friends": {}, "conversations": {}}
        self.directory_file = self.root / "directory.json"
        self._write_directory()
        self.settings: dict[str, Any] = {
            "port": free_port(),
            "data_dir": self.root / "data",
            "jwt_secret": SECRET,
            "directory": self.directory_file,
        } | settings
        self.port = int(str(self.settings["port"]))
        self.data_dir = Path(str(self.settings["data_dir"]))
        self.http = f"http://127.0.0.1:{self.port}"
        self.ws = f"ws://127.0.0.1:{self.port}/ws"
        ServerProcess.alive.append(self)

    def start(self) -> ServerProcess:
        """Start it; also again, after it ended, with the same settings and data."""
        assert not self.running, "still running"
        self.process = fork_presence(["serve"], environment(self.settings), self.root, self.log_file, self.log_file)
        return self

    async def ready(self, timeout: float = 20.0) -> ServerProcess:
        """Wait until it says that it is ready, `GET /health/ready`."""

        async def is_ready() -> bool:
            assert self.running, f"the server ended with {self.process and self.process.returncode}:\n{self.log}"
            try:
                return (await self.get("/health/ready", timeout=2)).status == 200
            except OSError:
                return False

        await wait_until(is_ready, timeout, what=f"GET /health/ready to be 200\n{self.log}", every=0.05)
        self._note_versions()
        return self

    async def restart(self) -> ServerProcess:
        """Stop it as an operator does, and start it again."""
        await self.stop()
        return await self.start().ready()

    def _freezable(self) -> list[int]:
        """The server's own processes: its embedded store goes on."""
        return [pid for pid, name in self.family().items() if not name.startswith(("valkey", "redis"))]

    # What it is asked.

    def token(self, user: str, ttl: float = 3600, **claims: object) -> str:
        """An access token for ``user`` that ends ``ttl`` s from now. A claim of None is left out."""
        payload = {"sub": user, "exp": time.time() + ttl} | claims
        secret = str(self.settings["jwt_secret"])
        return jwt.encode({name: value for name, value in payload.items() if value is not None}, secret, "HS256")

    async def request(self, method: str, path: str, user: str | None = None, **options: Any) -> Response:
        """Ask over REST, with a token of ``user`` if one is named. Options: see `tests.support.rest.request`."""
        if user is not None:
            options["token"] = self.token(user)
        return await request(method, self.http + path, **options)

    async def get(self, path: str, user: str | None = None, **options: Any) -> Response:
        """GET ``path``."""
        return await self.request("GET", path, user, **options)

    async def post(self, path: str, user: str | None = None, **options: Any) -> Response:
        """POST to ``path``."""
        return await self.request("POST", path, user, **options)

    async def options(self, path: str, **options: Any) -> Response:
        """OPTIONS of ``path``."""
        return await self.request("OPTIONS", path, **options)

    async def is_online(self, user: str) -> bool:
        """What REST says of ``user``."""
        answer = (await self.get(f"/api/presence/check/{user}", user)).json()["isOnline"]
        assert isinstance(answer, bool)
        return answer

    async def wait_online(self, user: str, online: bool = True, timeout: float = 5.0) -> None:
        """Wait until REST says that ``user`` is online, or offline."""

        async def so() -> bool:
            return await self.is_online(user) is online

        await wait_until(so, timeout, what=f"REST to say that {user} is {'online' if online else 'offline'}")

    def redis(self) -> redis.Redis:
        """A client of the server's store."""
        url = self.settings.get("redis_url") or f"unix://{self.data_dir}/valkey.sock"
        client = redis.Redis.from_url(str(url), decode_responses=True, socket_timeout=5)
        self._clients.append(client)
        return client

    async def know(
        self,
        friends: Mapping[str, Sequence[str]] | None = None,
        conversations: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Add to the directory file (an entry replaces the one of the same name); wait until the server has read it."""
        self._directory["friends"] |= {user: list(others) for user, others in (friends or {}).items()}
        self._directory["conversations"] |= {name: list(users) for name, users in (conversations or {}).items()}
        marker = f"version-{uuid.uuid4()}"
        self._directory["friends"][marker] = [marker]
        self._write_directory()

        async def is_known() -> bool:
            return bool((await self.get("/api/presence/friends", marker)).json())

        if self.running:
            await wait_until(is_known, what="the server to read the directory")
        del self._directory["friends"][marker]

    def _write_directory(self) -> None:
        new = self.directory_file.with_suffix(".new")
        new.write_text(json.dumps(self._directory))
        new.replace(self.directory_file)

    # Its log and its end.

    def check_log(self) -> None:
        """Assert that since the last check nothing unforeseen was logged."""
        new, self._checked = self.log[self._checked :], len(self.log)
        if "Traceback" in new and not self.allow_traceback:
            raise AssertionError(f"the server's log holds a traceback:\n{new}")

    async def finish(self) -> None:
        """Stop it if it runs, and assert that it went well and left nothing behind."""
        try:
            if self.running:
                await self.thaw()
                code = await self.stop()
                assert code == 0, f"the server ended with {code}:\n{self.log}"
            self.check_log()
            await wait_until(lambda: not self.family(), what=f"no process to be left behind: {self.family()}")
        finally:
            self.close()

    def close(self) -> None:
        """Remove all of it."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self in ServerProcess.alive:
            ServerProcess.alive.remove(self)
        super().close()

    def _note_versions(self) -> None:
        for distribution in ("quart", "hypercorn"):
            versions.note_package(distribution)
        if "+" in str(self.settings.get("redis_url") or ""):
            return  # `redis()` knows no cluster
        client = self.redis()
        info = client.info("server")
        assert isinstance(info, dict)
        if "valkey_version" in info:
            versions.note("Valkey", str(info["valkey_version"]))
        else:
            versions.note("Redis", str(info["redis_version"]))


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[ServerProcess]:
    """A server for the tests of a module: ready, and at the end stopped, which must go well."""
    process = ServerProcess(**settings)  # type: ignore[arg-type]
    try:
        yield await process.start().ready()
    except BaseException:
        process.close()
        raise
    await process.finish()


async def run_presence(*arguments: str, timeout: float = 50.0, **settings: object) -> tuple[int, str, str]:
    """Run `python -m presence ARGUMENTS` to its end; return its exit code, standard output and standard error."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = fork_presence(list(arguments), environment(settings), Path("/"), out, err)
        try:
            await wait_until(lambda: process.poll() is not None, timeout, what=f"the end of presence {arguments}")
        finally:
            process.kill()
        assert process.returncode is not None
        return process.returncode, _text(out), _text(err)


def _text(file: Path) -> str:
    return file.read_text()
