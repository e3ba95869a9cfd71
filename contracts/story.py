"""A case while it runs: its actors and users, its clock, what it saved, and the transcript."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from contracts import rest
from contracts.cases import user_id
from contracts.client import Connection, Received
from contracts.faults import Failed, Misused, NotUndone
from contracts.match import shown
from contracts.model import Case, Class, Entry
from contracts.stage import Idle
from contracts.stomp import Frame, encode
from contracts.target import Target, TokenMaker, call

T = TypeVar("T")

WITHIN = 3.0
"""s: the deadline of a wait that names none."""
QUEUE = "/user/queue/online-status"
_SHOWN = 4000
"""Characters of one entry of the transcript."""
_HOOK_LIMIT = 60.0
"""s: for a command of the target."""
_UNDO = {
    "kill-instance": "restart-instance",
    "stop-instance": "restart-instance",
    "freeze-instance": "thaw-instance",
    "stop-store": "start-store",
}
_ENDING = frozenset({"closed", "connect-refused"})
_REPLACED = re.compile(r"\$\{([^}]*)\}")


def seconds(text: str, lease: float) -> float:
    """The length of a time in s: "1L + 0.25s" at a lease of 2 s is 2.25."""
    total, sign = 0.0, 1
    for part in text.split():
        if part in {"+", "-"}:
            sign = 1 if part == "+" else -1
        else:
            total += sign * float(part[:-1]) * (lease if part.endswith("L") else 1)
    return total


class Story:
    """One run of one case.

    Args:
        run: what makes this run's users its own: a few letters and digits.
        started: Unix time in s when the run of all cases began.
        tokens: the run's; None: one of the story's own.
    """

    def __init__(
        self,
        case: Case,
        target: Target,
        run: str,
        started: float,
        tokens: TokenMaker | None = None,
        idle: Idle = contextlib.nullcontext,
    ) -> None:
        self.case = case
        self.target = target
        self.run = run
        self.started = started
        self.full = case.conformance is Class.FULL
        """Whether receipts may be used: a case of class `guide` makes do with what the guide gives, on any target."""
        self.connections: dict[str, Connection] = {}
        """The newest of each actor."""
        self.all: list[Connection] = []
        self.saved: dict[str, Any] = {}
        self.answers: dict[str, rest.Answer] = {}
        self.marks: dict[str, float] = {}
        self.bans: list[tuple[Connection, str, Callable[[Received], bool]]] = []
        """What may never come: to whom, in words, and how it is known."""
        self.transcript: list[Entry] = []
        self.index = 0
        """Of the step at work, from 0."""
        self.news = asyncio.Event()
        self.clock: asyncio.Timeout | None = None
        """Of the whole case, while its steps are taken."""
        self.minded: Connection | None = None
        """The connection whose end the step at work looks at itself."""
        self.idle = idle
        self._tokens = tokens or TokenMaker(target)
        self._names: dict[str, str] = {}
        """Of users and conversations, by their ids."""
        self._token_names: dict[str, str] = {}
        self._token_pattern: re.Pattern[str] | None = None
        self._count = itertools.count(1)
        self.broke = False
        """Whether a hook took something away, be it back or not."""
        self._outstanding: list[tuple[str, int]] = []
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()

    # Time.

    @property
    def now(self) -> float:
        """The loop's clock, s: that of all frames and marks."""
        return self._loop.time()

    def length(self, text: str | None, default: float = 0.0) -> float:
        return default if text is None else seconds(text, self.target.lease)

    @property
    def limit(self) -> float:
        """s: for whatever the server must answer and the case states no deadline for."""
        return WITHIN + self.target.slack

    def since(self, step: Mapping[str, Any]) -> float:
        """The moment from which a step's deadline counts."""
        if "since" not in step:
            return self.now
        if step["since"] not in self.marks:
            raise Misused(f"there is no mark {step['since']!r}")
        return self.marks[step["since"]]

    def within(self, step: Mapping[str, Any]) -> float:
        """s: the deadline of a step, with the target's slack."""
        return self.length(step.get("within"), WITHIN) + self.target.slack

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around what is neither the server's time nor the case's: a command of the target, other cases."""
        clock = self.clock
        end = clock.when() if clock is not None else None
        if clock is None or end is None:
            yield
            return
        left = end - self.now
        clock.reschedule(None)
        try:
            yield
        finally:
            clock.reschedule(self.now + left)

    async def until(self, probe: Callable[[], T | None], deadline: float) -> T | None:
        """Wait until the probe has something; None: it had nothing at the deadline.

        Raises:
            Failed: a connection ended, or something came that may never come.
        """
        while True:
            self.alarm()
            found = probe()
            if found is not None:
                return found
            if self.now >= deadline:
                return None
            self.news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self.news.wait()

    # What no step asked for.

    def alarm(self) -> None:
        """Raise Failed for an ERROR or a close that no step asks for, for broken STOMP, and for what may never come."""
        for connection, words, fits in self.bans:
            for received in connection.unread:
                if fits(received):
                    raise Failed(f"{connection.actor} never to get {words}", self.got(received))
        for connection in self.all:
            if connection.broken:
                raise Failed(f"good STOMP for {connection.actor}", f"the server sent {connection.broken}")
            if connection.over or connection is self.minded or self._end_is_asked_for(connection):
                continue
            if connection.error:
                raise Failed(f"no ERROR for {connection.actor}", self.got(connection.error))
            if connection.closed:
                closed = connection.closed
                raise Failed(
                    f"the connection of {connection.actor} to stay open",
                    f"it was closed with {closed.code} {closed.reason}".rstrip(),
                )

    def _end_is_asked_for(self, connection: Connection) -> bool:
        """Whether this step or a later one of the same connection is about its end."""
        for step in self.case.steps[self.index :]:
            verb = next(iter(step))
            if not _same_actor(step[verb], connection.actor):
                continue
            if verb in _ENDING or (verb == "expect" and step.get("frame") in {"ERROR", "ANY"}):
                return True
            if verb in {"connect", "open"} and step is not self.case.steps[self.index]:
                return False
        return False

    # Names.

    def user(self, name: str) -> str:
        """The id of a user: by its name, or as it is where the text was no mere name."""
        if name in self._names or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            return name
        return self._spelled(user_id(self.case, name, self.run))

    def _spelled(self, name: str) -> str:
        made = self.target.spelled(name)
        self._names[made] = name
        return made

    async def fill(self, value: Any, extra: Mapping[str, Any]) -> Any:
        """A step with all `${…}` replaced, in keys and values.

        Args:
            extra: further names: `i`.
        """
        if isinstance(value, str):
            if ids := re.fullmatch(r"\$ids (\d+)(?: from (\d+))?", value):
                first = int(ids[2] or 1)
                return [self._spelled(f"{self.case.id}.some.{self.run}.{n}") for n in range(first, first + int(ids[1]))]
            if (whole := _REPLACED.fullmatch(value)) and whole[1] in self.saved:
                return self.saved[whole[1]]
            parts = _REPLACED.split(value)
            # In a regular expression what the server made up is text.
            escaped = re.escape if value.startswith(("~ ", "!~ ")) else str
            for at in range(1, len(parts), 2):
                parts[at] = escaped(await self._replaced(parts[at], extra))
            return "".join(parts)
        if isinstance(value, Mapping):
            return {await self.fill(name, extra): await self.fill(one, extra) for name, one in value.items()}
        if isinstance(value, Sequence):
            return [await self.fill(one, extra) for one in value]
        return value

    async def _replaced(self, name: str, extra: Mapping[str, Any]) -> str:
        if name in extra or name in self.saved:
            found = extra[name] if name in extra else self.saved[name]
            return found if isinstance(found, str) else json.dumps(found)
        if repeated := re.fullmatch(r"(\d+)\*(.+)", name, re.DOTALL):
            return repeated[2] * int(repeated[1])
        kind, colon, rest_of_name = name.partition(":")
        if not colon:
            return self.user(name)
        if kind == "host":
            return str(urlsplit(self.instance(int(rest_of_name)).websocket).netloc)
        if kind == "rest-host":
            return str(urlsplit(self.instance(int(rest_of_name)).http).netloc)
        if kind == "conversation":
            return self.user(rest_of_name)
        if kind == "token":
            return await self.token(self.user(rest_of_name)) or ""
        if kind == "session":
            session = self.connection(rest_of_name).session
            if session is None:
                raise Failed(f"a session header in the CONNECTED of {rest_of_name}", "there is none")
            return session
        raise Misused(f"${{{name}}} means nothing")

    async def token(self, user: str, kind: str = "valid") -> str | None:
        with self.uncounted():
            made = await asyncio.to_thread(self._tokens.make, user, kind)
        if made is not None and made not in self._token_names:
            # In a frame a colon is escaped.
            for form in (made, made.replace(":", r"\c")):
                self._token_names[form] = f"<{kind} token of {self._names.get(user, user)}>"
            # All in one go and the longest first, as one may be a part of another or of its name.
            forms = sorted(self._token_names, key=len, reverse=True)
            self._token_pattern = re.compile("|".join(map(re.escape, forms)))
        return made

    # Connections.

    def connection(self, actor: str) -> Connection:
        if actor not in self.connections:
            raise Misused(f"{actor} has no connection")
        return self.connections[actor]

    async def open(
        self,
        actor: str,
        user: str,
        *,
        instance: int = 1,
        path: str | None = None,
        transport: str | None = None,
        headers: Mapping[str, str] | None = None,
        origin: str | None = None,
        subprotocols: Sequence[str] = ("v12.stomp",),
    ) -> Connection:
        """A WebSocket; it becomes the actor's.

        Raises:
            Refused, Failed, Unreachable: as `Connection.open`.
        """
        connection = await Connection.open(
            actor,
            user,
            self.instance(instance).websocket + (path or self.target.path),
            instance=instance,
            sockjs=(transport or self.target.transport) == "sockjs",
            headers=headers or {},
            origin=origin,
            subprotocols=subprotocols,
            tls=self.target.tls,
            limit=self.limit,
            log=self.log,
            news=self.news,
        )
        self.all.append(connection)
        return connection

    def instance(self, number: int) -> Any:
        if number > len(self.target.instances):
            raise Misused(f"the target has no instance {number}")
        return self.target.instances[number - 1]

    async def send(
        self,
        connection: Connection,
        command: str,
        headers: Mapping[str, str],
        body: str = "",
    ) -> None:
        """One frame, as given."""
        text = encode(command, headers.items(), body, version=connection.decoder.version)
        await connection.send(text, limit=self.limit)

    async def send_with_receipt(
        self, connection: Connection, command: str, headers: Mapping[str, str], body: str = ""
    ) -> None:
        """One frame, and wait for its RECEIPT.

        Raises:
            Failed: it does not come.
        """
        name = f"runner-{next(self._count)}"
        connection.own_receipts.add(name)
        await self.send(connection, command, {**headers, "receipt": name}, body)
        destination = f" to {headers['destination']}" if "destination" in headers else ""

        def probe() -> bool | None:
            return True if name in connection.receipts or connection.closed else None

        await self.until(probe, self.now + self.limit)
        if name not in connection.receipts:
            expected = f"RECEIPT for the {command}{destination} of {connection.actor} within {self.limit:g} s"
            raise Failed(expected, self.nothing(connection))

    # REST.

    async def request(
        self,
        method: str,
        path: str,
        *,
        caller: str | None,
        token: str | None,
        instance: int = 1,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        quiet: bool = False,
        limit: float | None = None,
    ) -> rest.Answer:
        """One request.

        Args:
            caller: whose name the transcript shows.
            quiet: it goes into the transcript only with `log_answer`.
        """
        sent = {} if token is None else {"Authorization": f"Bearer {token}"}
        sent |= headers or {}
        shown_headers = "".join(f"{name}: {value}\n" for name, value in sent.items())
        text = (body or b"").decode(errors="backslashreplace")
        actor = self.short(caller) if caller else "-"
        if not quiet:
            self.log(actor, "→", f"{method} {path}\n{shown_headers}\n{text}".rstrip())
        answer = await rest.request(
            self.instance(instance).http,
            method,
            path,
            list(sent.items()),
            body,
            limit=limit or self.limit + 2,
            tls=self.target.tls,
        )
        if not quiet:
            self.log(actor, "←", str(answer))
        return answer

    # Hooks.

    async def hook(self, name: str, instance: int = 1) -> None:
        """Run a command of the target, and remember how it is undone.

        Raises:
            Misused: it failed: that is no fault of the server.
        """
        if name not in self.target.hooks:
            raise Misused(f"the target has no hook {name!r}")
        command = [part.replace("{instance}", str(instance)) for part in self.target.hooks[name]]
        if name in {"kill-instance", "stop-instance"}:
            for connection in self.all:
                # They end with it, whether a step asks for it or not.
                connection.over = connection.over or (
                    connection.instance == instance and not self._end_is_asked_for(connection)
                )
        if undo := _UNDO.get(name):
            self.broke = True
            self._outstanding.append((undo, instance))
        self.log("-", "·", f"hook: {name}{f', {instance}' if name.endswith('-instance') else ''}")
        with self.uncounted():
            await asyncio.to_thread(call, f"hooks.{name}", command, _HOOK_LIMIT)
        self._outstanding = [one for one in self._outstanding if one != (name, instance)]

    # The end.

    async def close(self) -> None:
        """Leave nothing behind: no session, no socket, no instance that is down.

        Raises:
            NotUndone: hooks failed; each was tried.
        """
        await asyncio.gather(*(self._leave(connection) for connection in self.all), return_exceptions=True)
        failed = []
        for name, instance in reversed(self._outstanding.copy()):
            try:
                await self.hook(name, instance)
            except Exception as fault:  # noqa: BLE001 (whatever it is, the others are undone)
                failed.append(f"hooks.{name} failed: {str(fault).removeprefix(f'hooks.{name}: ')}")
        if failed:
            raise NotUndone("; ".join(dict.fromkeys(failed)))

    async def _leave(self, connection: Connection) -> None:
        if connection.over or connection.closed or connection.frozen:
            connection.cut()
        else:
            connection.over = True
            with contextlib.suppress(Failed, Misused):
                if connection.connected:
                    await connection.send(encode("DISCONNECT", ()), limit=0.5)
            await connection.close()
        await connection.drop()

    # Words.

    def log(self, actor: str, direction: str, text: str) -> None:
        text = self.without_tokens(text).replace("\0", "␀")
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]}… ({len(text)} characters)"
        self.transcript.append(Entry(round(self.now - self._begun, 4), actor, direction, text))

    def without_tokens(self, text: str) -> str:
        """A text that may be shown to anybody."""
        if self._token_pattern is None:
            return text
        return self._token_pattern.sub(lambda found: self._token_names[found[0]], text)

    def short(self, user: str) -> str:
        """A user's name without what makes it this case's."""
        return self._names.get(user, user).removeprefix(f"{self.case.id}.").removesuffix(f".{self.run}")

    def got(self, received: Received) -> str:
        """A frame in one line."""
        return self.got_frame(received.frame)

    def got_frame(self, frame: Frame) -> str:
        if frame.command == "MESSAGE":
            return f"MESSAGE {shown(frame.body)} came"
        headers = " ".join(f"{name}:{value}" for name, value in frame.headers if name != "content-length")
        return f"{frame.command} {headers} {shown(frame.body)}".strip() + " came"

    def nothing(self, connection: Connection) -> str:
        """What there is instead of what was waited for."""
        told = ""
        if connection.closed:
            told = f"the connection was closed with {connection.closed.code} {connection.closed.reason}".rstrip() + "; "
        unread = [self.got(received).removesuffix(" came") for received in connection.unread[:5]]
        more = len(connection.unread) - len(unread)
        listed = "; ".join(unread) + (f"; and {more} more" if more else "")
        return told + ("none came" + (f"; unread: {listed}" if unread else ""))


def _same_actor(written: Any, actor: str) -> bool:
    """Whether the actor of a step, as it is written in the case, is this one."""
    if not isinstance(written, str):
        return False
    if "${i}" in written:
        return re.fullmatch(re.escape(written).replace(re.escape("${i}"), r"\d+"), actor) is not None
    return written == actor
