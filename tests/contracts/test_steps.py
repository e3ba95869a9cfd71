"""The steps and the runner, against small servers that do what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from math import inf
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from contracts import rest, runner, story
from contracts.faults import Failed, TargetUnusable
from contracts.match import mismatch
from contracts.model import Case, Class, Clause, Level, Outcome, Result, Run
from contracts.runner import run
from contracts.target import Instance, Target

SECRET = "a secret of the tests, of 32 bytes and more"
CLAUSES = {"A-01": Clause("A-01", "A", Level.MUST, Class.GUIDE, "A sentence.", "here")}

Handler = Callable[[ServerConnection], Awaitable[None]]


def case(*steps, identity="one", conformance=Class.FULL, **more) -> Case:
    return Case(identity, "A title", ("A-01",), conformance, Level.MUST, steps, "file", **more)


def target(port: int, **more) -> Target:
    url = f"127.0.0.1:{port}"
    defaults: dict[str, Any] = {"conformance": Class.FULL, "lease": 1.0, "slack": 0.2, "secret": SECRET}
    defaults["instances"] = [Instance(f"http://{url}", f"ws://{url}")]
    return Target("file", **(defaults | more))


@asynccontextmanager
async def server(handler: Handler, **more) -> AsyncIterator[int]:
    """A WebSocket server; its port."""
    async with serve(handler, "127.0.0.1", 0, compression=None, **more) as running:
        yield running.sockets[0].getsockname()[1]


async def verdict(handler: Handler, *steps, conformance=Class.FULL) -> Result:
    """What becomes of a case against a server."""
    async with server(handler) as port:
        found = await run(target(port), [case(*steps, conformance=conformance)], CLAUSES, probe=False)
    return found.results[0]


@pytest.fixture
def short(monkeypatch):
    """Nothing waits long for what will not come."""
    monkeypatch.setattr(story, "WITHIN", 0.3)
    monkeypatch.setattr(runner, "_BACK_LEASES", 0)


async def silent(socket: ServerConnection) -> None:
    await socket.wait_closed()


def answering(*messages: str | bytes) -> Handler:
    """A server that answers CONNECT with CONNECTED and these messages, and nothing else."""

    async def handler(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send("CONNECTED\nversion:1.2\nsession:s-1\n\n\0")
        for message in messages:
            await socket.send(message)
        await socket.wait_closed()

    return handler


def event(user: str, online: bool, **more) -> str:
    return f"MESSAGE\nsubscription:0\n\n{json.dumps({'userId': user, 'online': online, **more})}\0"


class Sloppy:
    """A server of the guide and no more: CR LF, no content-length, no receipts, each event three times and late.

    Args:
        forget_unwatch: `presence.unsubscribe` does nothing.
        mute: nobody is told of anything.
    """

    def __init__(self, *, forget_unwatch: bool = False, mute: bool = False) -> None:
        self.forget_unwatch = forget_unwatch
        self.mute = mute
        self.watching: dict[ServerConnection, set[str]] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, socket: ServerConnection) -> None:
        user = ""
        try:
            async for message in socket:
                assert isinstance(message, str)
                head, _, body = message.rstrip("\0").partition("\n\n")
                command = head.partition("\n")[0]
                if command == "CONNECT":
                    # The middle of the token is who it is; a look at the signature is not the point here.
                    user = json.loads(_unpadded(head.partition("Bearer ")[2].split(".")[1]))["sub"]
                    await socket.send("CONNECTED\r\nversion:1.2\r\n\r\n\0\r\n")
                    self.tell(user, True)
                elif command == "DISCONNECT":
                    return
                elif "presence.subscribe" in head:
                    self.watching.setdefault(socket, set()).update(json.loads(body)["userIds"])
                elif "presence.unsubscribe" in head and not self.forget_unwatch:
                    self.watching[socket] -= set(json.loads(body)["userIds"])
        except ConnectionClosed:
            pass
        finally:
            self.watching.pop(socket, None)
            self.tell(user, False)

    def tell(self, user: str, online: bool) -> None:
        async def later(socket: ServerConnection) -> None:
            for _ in range(3):
                await asyncio.sleep(0.02)
                try:
                    await socket.send(event(user, online).replace("\n", "\r\n"))
                except ConnectionClosed:
                    return

        for watcher, users in self.watching.items():
            if user in users and not self.mute:
                task = asyncio.create_task(later(watcher))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)


def _unpadded(text: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


GUIDE = [
    {"connect": "ann"},
    {"watch": "ann", "users": ["bob"]},
    {"connect": "bob"},
    {"expect": "ann", "about": "bob", "online": True},
    {"expect-nothing": "ann", "about": "bob"},
    {"still-open": "ann"},
    {"disconnect": "bob"},
    {"expect": "ann", "about": "bob", "online": False},
]


async def test_the_guide_alone_is_enough_for_a_case_of_its_class():
    found = await verdict(Sloppy(), *GUIDE, conformance=Class.GUIDE)
    assert (found.outcome, found.actual, found.reason) == (Outcome.PASSED, None, None)


async def test_a_watch_that_has_no_effect_fails(monkeypatch):
    monkeypatch.setattr("contracts.canary.SETTLING", 0.5)
    found = await verdict(Sloppy(mute=True), *GUIDE, conformance=Class.GUIDE)
    assert (found.outcome, found.step) == (Outcome.FAILED, 2)
    assert "no MESSAGE about canary-ann-1 came" in str(found.actual)


@pytest.mark.parametrize("forget", [False, True])
async def test_an_unwatch_is_seen_to_take_effect_or_not(monkeypatch, forget):
    monkeypatch.setattr("contracts.canary.SETTLING", 1.0)
    steps = [*GUIDE[:2], {"unwatch": "ann", "users": ["bob"]}]
    found = await verdict(Sloppy(forget_unwatch=forget), *steps, conformance=Class.GUIDE)
    assert found.outcome is (Outcome.FAILED if forget else Outcome.PASSED), found


@pytest.mark.parametrize(
    "step",
    [
        {"connect": "ann"},
        {"connect-refused": "ann"},
        {"open": "ann", "refused": 403},
        {"get": "/x"},
        {"check": "ann", "online": False},
        {"await": "ann", "online": False},
        {"stays": "ann", "online": False, "for": "0s"},
    ],
    ids=lambda step: next(iter(step)),
)
async def test_a_server_that_answers_nothing_fails(short, step):
    # No REST answer either: a plain GET gets 426 from this server, which is none of the answers that are asked for.
    found = await verdict(silent, step)
    assert (found.outcome, found.step) == (Outcome.FAILED, 1)


@pytest.mark.parametrize("deaf", [False, True])
async def test_a_ping_is_to_be_answered(short, deaf):
    async def handler(socket: ServerConnection) -> None:
        if deaf:
            socket.transport.pause_reading()
            await asyncio.sleep(1)
            socket.transport.resume_reading()
        await socket.wait_closed()

    found = await verdict(handler, {"open": "ann"}, {"ping": "ann"})
    told = (Outcome.FAILED, 2, "a pong for ann within 0.5 s") if deaf else (Outcome.PASSED, None, None)
    assert (found.outcome, found.step, found.expected) == told


BOB = "MESSAGE about bob (online: true) for ann, within 0.5 s"


@pytest.mark.parametrize(
    ("step", "expected", "actual"),
    [
        ({"beat": "ann"}, "RECEIPT for the SEND to /app/heartbeat of ann within 0.5 s", "none came"),
        ({"expect": "ann", "about": "bob", "online": True}, BOB, "none came"),
        ({"closed": "ann"}, "the server to close the connection of ann, within 0.5 s", "none came"),
        ({"expect-heart-beat": "ann"}, "a heart-beat for ann, within 0.5 s", "none came"),
        ({"expect-nothing": "ann"}, "RECEIPT for the SEND to /app/heartbeat of ann within 0.5 s", "none came"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
async def test_what_does_not_come_is_told(short, step, expected, actual):
    found = await verdict(answering(), {"connect": "ann"}, step)
    assert (found.outcome, found.step) == (Outcome.FAILED, 2)
    assert (found.expected, found.actual) == (expected, actual)


EXPECT = {"expect": "ann", "about": "x:bob", "online": True}


@pytest.mark.parametrize(
    ("messages", "step", "actual"),
    [
        ([event("x:bob", False)], EXPECT, 'MESSAGE {"userId": "x:bob", "online": false} came'),
        ([event("x:eve", True)], EXPECT, 'unread: MESSAGE {"userId": "x:eve"'),
        ([event("x:bob", True, snapshot=True)], EXPECT, "none came; unread"),
        ([event("x:bob", True, version="1")], {**EXPECT, "json": {"version": "$integer"}}, "version: 1; MESSAGE"),
        ([event("x:bob", True)], {**EXPECT, "headers": {"message-id": "$any"}}, "header message-id: absent"),
        ([event("x:bob", True) * 2], {**EXPECT, "message": 1}, "frames in its WebSocket message: 2"),
        ([event("x:bob", True).encode()], {**EXPECT, "wire": {"type": "text"}}, "type: binary"),
        ([event("x:bob", True)], {"expect-nothing": "ann"}, 'MESSAGE {"userId": "x:bob"'),
        ([event("x:bob", True)], {"expect-none-ever": "ann", "times": 2}, 'MESSAGE {"userId": "x:bob"'),
        (["MESSAGE\nbroken\n\n\0"], EXPECT, "the header line 'broken'"),
        (["ERROR\nmessage:no reason\n\n\0"], EXPECT, "ERROR message:no reason came"),
        (["ERROR\nmessage:no reason\n\n\0"], {"wait": "20s"}, "ERROR message:no reason came"),
    ],
)
async def test_what_comes_instead_is_told(short, messages, step, actual):
    # The receipt that a frame after these asks for does not come: so only what is wrong about them can be told.
    found = await verdict(answering(*messages), {"connect": "ann"}, {"wait": "0.1s"}, step)
    assert found.outcome is Outcome.FAILED
    assert actual in str(found.actual)


async def test_what_was_expected_passes_with_its_values_kept(short):
    messages = [event("x:bob", True, version=7), event("x:bob", False, version=8)]
    found = await verdict(
        answering("\n", *messages),
        {"connect": "ann", "expect": {"session": "s-1", "heart-beat": "$absent"}},
        {"expect-heart-beat": "ann"},
        {**EXPECT, "save": {"v": "version", "sub": "header:subscription"}, "headers": {"subscription": "0"}},
        {**EXPECT, "online": False, "json": {"version": "> ${v}"}, "headers": {"subscription": "${sub}"}},
        {"mark": "late"},
    )
    assert (found.outcome, found.expected, found.actual, found.reason) == (Outcome.PASSED, None, None, None)


@pytest.mark.parametrize(
    ("more", "outcome"),
    [
        ({"within": "0.5s"}, Outcome.PASSED),
        # With the slack of 0.2 s this is over at 0.3 s.
        ({"within": "0.1s", "since": "t"}, Outcome.FAILED),
        ({"not-before": "0.25s", "since": "t"}, Outcome.PASSED),
        ({"not-before": "0.5s", "since": "t"}, Outcome.FAILED),
        ({"within": "0.01s"}, Outcome.FAILED),
        # In leases, of 1 s; late on a busy machine, it can still only pass or fail as it should.
        ({"not-before": "0.3L", "within": "5L", "since": "t"}, Outcome.PASSED),
        ({"within": "0.1L", "since": "t"}, Outcome.FAILED),
        ({"not-before": "5L", "since": "t"}, Outcome.FAILED),
    ],
)
async def test_deadlines_count_from_the_step_or_its_mark(more, outcome):
    async def handler(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send("CONNECTED\nversion:1.2\n\n\0")
        await asyncio.sleep(0.31)
        await socket.send(event("x:bob", True))
        await socket.wait_closed()

    found = await verdict(handler, {"mark": "t"}, {"connect": "ann"}, {**EXPECT, **more})
    assert found.outcome is outcome, (found.expected, found.actual)


async def test_a_close_fails_unless_a_step_asks_for_it():
    async def handler(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send("CONNECTED\nversion:1.2\n\n\0")
        await socket.send("ERROR\nmessage:enough\n\n\0")
        await socket.close(1008)

    connect = {"connect": "ann"}
    found = await verdict(handler, connect, {"wait": "20s"}, {"connect": "ann"}, {"closed": "ann"})
    assert (found.outcome, found.step) == (Outcome.FAILED, 2)
    found = await verdict(handler, connect, {"wait": "0.1s"}, {"closed": "ann", "code": 1008, "error": "~ ^enough"})
    assert found.outcome is Outcome.PASSED
    found = await verdict(handler, connect, {"closed": "ann", "code": 1002})
    assert (found.expected, found.actual) == ("the close code for ann: 1002", "was 1008")
    found = await verdict(handler, connect, {"closed": "ann", "error": False})
    assert found.outcome is Outcome.FAILED


async def test_what_the_server_cannot_help_is_an_error():
    found = await verdict(silent, {"beat": "ann"})
    assert (found.outcome, found.reason) == (Outcome.ERROR, "ann has no connection")
    async with server(silent) as port:
        pass
    gone = await run(target(port), [case({"connect": "ann"})], CLAUSES, probe=False)
    assert gone.results[0].outcome is Outcome.ERROR
    assert "cannot be reached" in str(gone.results[0].reason)


async def test_the_transcript_shows_both_directions_and_no_token(short):
    found = await verdict(answering(), {"connect": "ann"}, {"disconnect": "ann"})
    texts = [(entry.direction, entry.text) for entry in found.transcript]
    assert any(direction == "→" and "Bearer <valid token of one.ann." in text for direction, text in texts)
    assert ("←", "CONNECTED\nversion:1.2\nsession:s-1\n\n␀") in texts
    assert not any("eyJ" in text for _, text in texts)


async def test_what_stands_in_braces_is_replaced():
    told = story.Story(case({"wait": "0s"}), target(1), "run", 0.0)
    told.saved["v"] = 7
    step = {"a ${bob}": ["${v}", "> ${v}", "${3*ab}", "sub-${i}"], "users": "$ids 2"}
    assert await told.fill(step, {"i": 1}) == {
        "a one.bob.run": [7, "> 7", "ababab", "sub-1"],
        "users": ["one.some.run.1", "one.some.run.2"],
    }
    assert (told.user("bob"), told.user("Not/an id")) == ("one.bob.run", "Not/an id")


@pytest.mark.parametrize(("text", "length"), [("1.5L", 3.0), ("0.25s", 0.25), ("1L + 0.25s", 2.25), ("2L - 0.5s", 3.5)])
def test_times_are_in_leases_and_seconds(text, length):
    assert story.seconds(text, lease=2.0) == length


async def test_over_sockjs_frames_are_wrapped_and_the_close_is_told_by_its_frame():
    got = []

    async def handler(socket: ServerConnection) -> None:
        await socket.send("o")
        (connect,) = json.loads(await socket.recv())
        got.append(connect.partition("\n")[0])
        await socket.send("h")
        await socket.send("a" + json.dumps(["CONNECTED\nversion:1.2\n\n\0", "\n"]))
        got.append(await socket.recv())
        await socket.send('c[1002,"no array"]')

    found = await verdict(
        handler,
        {"connect": "ann", "transport": "sockjs"},
        {"expect-heart-beat": "ann"},
        {"raw": "ann", "text": "no array", "unwrapped": True},
        {"closed": "ann", "code": 1002},
    )
    assert (found.outcome, found.actual) == (Outcome.PASSED, None)
    assert got == ["CONNECT", "no array"]


async def test_what_a_hook_has_done_is_undone_when_the_case_fails(short, tmp_path):
    log = tmp_path / "log"
    hooks = {name: ["sh", "-c", f"echo {name} {{instance}} >> {log}"] for name in ("freeze-instance", "thaw-instance")}
    steps = [{"hook": "freeze-instance"}, {"beat": "nobody"}]
    found = await run(target(1, hooks=hooks), [case(*steps)], CLAUSES, probe=False)
    assert found.results[0].outcome is Outcome.ERROR
    assert log.read_text() == "freeze-instance 1\nthaw-instance 1\n"


async def test_what_a_case_has_undone_itself_is_not_undone_again(short, tmp_path):
    log = tmp_path / "log"
    hooks = {name: ["sh", "-c", f"echo {name} {{instance}} >> {log}"] for name in ("freeze-instance", "thaw-instance")}
    steps = [{"hook": "freeze-instance"}, {"hook": "freeze-instance", "instance": 2}, {"hook": "thaw-instance"}]
    await run(target(1, hooks=hooks), [case(*steps)], CLAUSES, probe=False)
    did = ["freeze-instance 1", "freeze-instance 2", "thaw-instance 1", "thaw-instance 2"]
    assert log.read_text().splitlines() == did


async def test_a_hook_that_cannot_be_run_ends_its_case_alone(monkeypatch):
    def broken(*_):
        raise IndexError("no words")

    monkeypatch.setattr(story, "call", broken)
    cases = [case({"hook": "empty-store"}), case({"wait": "0s"}, identity="two", alone=True)]
    found = await run(target(1, hooks={"empty-store": ["x"]}), cases, CLAUSES, probe=False)
    assert [one.outcome for one in found.results] == [Outcome.ERROR, Outcome.PASSED]
    assert found.results[0].reason == "IndexError: no words"


def answering_rest(*statuses: int) -> Any:
    """What answers requests with these statuses, the last one over and over; upgrades it lets pass."""
    left = list(statuses)

    def answer(socket: ServerConnection, request: Any) -> Any:
        if request.path.startswith("/api/"):
            return socket.respond(HTTPStatus(left.pop(0) if len(left) > 1 else left[0]), "{}")
        return None

    return answer


STOP = {"stop-store": ["true"], "start-store": ["true"]}


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ({"wait": "0s"}, Outcome.ERROR),
        # The case tries it, and at its end it is tried again.
        ({"hook": "start-store"}, Outcome.ERROR),
        # What the server did wrong before is not the hook's.
        ({"get": "/api/x", "status": 404}, Outcome.FAILED),
    ],
    ids=str,
)
async def test_after_a_hook_that_does_not_undo_no_case_is_run(step, outcome):
    hooks = {**STOP, "start-store": ["sh", "-c", "exit 3"]}
    cases = [case({"hook": "stop-store"}, step, alone=True), case({"wait": "0s"}, identity="two", alone=True)]
    async with server(silent, process_request=answering_rest(200)) as port:
        first, second = (await run(target(port, hooks=hooks), cases, CLAUSES, probe=False)).results
    failed = "hooks.start-store failed: sh: exit 3; its output is not shown, as it may hold secrets"
    assert first.outcome is outcome
    assert str(first.reason).endswith(failed)
    assert (second.outcome, second.reason) == (Outcome.NOT_RUN, failed)


async def test_after_what_broke_instances_the_next_case_waits_until_they_answer():
    cases = [case({"hook": "stop-store"}), case({"get": "/api/x", "status": 200}, identity="two", alone=True)]
    async with server(silent, process_request=answering_rest(503, 503, 200)) as port:
        found = (await run(target(port, hooks=STOP), cases, CLAUSES, probe=False)).results
    assert [(one.outcome, one.reason) for one in found] == [(Outcome.PASSED, None)] * 2


async def test_after_an_instance_that_does_not_come_back_no_case_is_run(short):
    cases = [case({"hook": "stop-store"}), case({"wait": "0s"}, identity="two", alone=True)]
    async with server(silent, process_request=answering_rest(503)) as port:
        found = (await run(target(port, hooks=STOP), cases, CLAUSES, probe=False)).results
    gone = "instance 1 does not answer again, 0.5 s after one"
    assert [(one.outcome, one.reason) for one in found] == [(Outcome.ERROR, gone), (Outcome.NOT_RUN, gone)]


@asynccontextmanager
async def deaf() -> AsyncIterator[int]:
    """The port of a machine that does not even answer a SYN: its queue of connections is full."""
    loop = asyncio.get_running_loop()
    with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for one in (first, second):
            one.setblocking(False)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await loop.sock_connect(one, listening.getsockname())
        yield listening.getsockname()[1]


@pytest.mark.parametrize("step", [{"get": "/x"}, {"open": "ann"}], ids=["rest", "websocket"])
async def test_what_ends_before_there_is_a_connection_says_nothing_of_the_server(monkeypatch, short, step):
    monkeypatch.setattr(story.Story, "request", functools.partialmethod(story.Story.request, limit=0.5))

    async def reason(to: Target) -> str:
        found = (await run(to, [case(step)], CLAUSES, probe=False)).results[0]
        assert found.outcome is Outcome.ERROR, found.actual
        assert str(found.reason).startswith("the server cannot be reached: ")
        return str(found.reason)

    async with deaf() as port:
        assert (await reason(target(port))).endswith("no TCP connection within 0.5 s")
    # No TCP connection leads to a broadcast address.
    nowhere = Instance("http://255.255.255.255:1", "ws://255.255.255.255:1")
    assert "255.255.255.255" in await reason(target(1, instances=[nowhere]))


@pytest.mark.parametrize("step", [{"get": "/x"}, {"open": "ann"}], ids=["rest", "websocket"])
async def test_what_is_silent_over_a_connection_fails(monkeypatch, short, step):
    monkeypatch.setattr(story.Story, "request", functools.partialmethod(story.Story.request, limit=0.5))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = (await run(target(listening.getsockname()[1]), [case(step)], CLAUSES, probe=False)).results[0]
    assert (found.outcome, found.actual) == (Outcome.FAILED, "none came" if "get" in step else "none was opened")


async def test_the_end_of_a_case_may_go_wrong(monkeypatch):
    async def broken(_):
        raise IndexError("no words")

    monkeypatch.setattr(story.Story, "close", broken)
    found = await run(target(1), [case({"wait": "0s"})], CLAUSES, probe=False)
    assert found.results[0].reason == "its end went wrong: IndexError: no words"


async def test_a_look_at_the_target_that_goes_wrong_is_told_in_one_line(monkeypatch):
    async def broken(*_, **__):
        raise IndexError("no words")

    monkeypatch.setattr(story.Story, "request", broken)
    monkeypatch.setattr(story.Story, "close", broken)
    with pytest.raises(TargetUnusable, match="could not be looked at: IndexError: no words"):
        await run(target(1), [], CLAUSES)


async def test_a_transcript_names_a_hook_and_not_its_words(short):
    hooks = {"stop-store": ["sh", "-c", "exit 3 # hunter2"], "start-store": ["sh", "-c", "true # hunter2"]}
    found = (await run(target(1, hooks=hooks), [case({"hook": "stop-store"})], CLAUSES, probe=False)).results[0]
    assert str(found.reason).startswith("hooks.stop-store: sh: exit 3;")
    assert "hunter2" not in str(found)
    assert [one.text for one in found.transcript if "hook:" in one.text] == ["hook: stop-store", "hook: start-store"]


async def test_a_hook_may_leave_a_child_with_its_output_open(monkeypatch):
    monkeypatch.setattr(story, "_HOOK_LIMIT", 2.0)
    hooks = {"empty-store": ["sh", "-c", "sleep 3 & true"]}
    found = await run(target(1, hooks=hooks), [case({"hook": "empty-store"})], CLAUSES, probe=False)
    assert found.results[0].outcome is Outcome.PASSED
    assert found.seconds < 2


async def test_a_hook_for_which_the_lease_is_too_short_says_nothing_of_the_server():
    hooks = {"empty-store": ["sleep", "0.3"]}
    cases = [
        case({"hook": "empty-store", "within": "2L"}),
        case({"hook": "empty-store", "within": "0.1L"}, identity="two"),
    ]
    found = (await run(target(1, hooks=hooks), cases, CLAUSES, probe=False)).results
    assert [one.outcome for one in found] == [Outcome.PASSED, Outcome.ERROR]
    assert re.fullmatch(
        r"hooks\.empty-store took 0\.\d s, longer than the 0\.1 s that the lease of 1 s allows; .* the lease longer",
        str(found[1].reason),
    )


@pytest.mark.parametrize("token", ["short", "a:b"])
async def test_a_token_is_never_shown_however_short_it_is(short, token):
    more: dict[str, Any] = {"secret": None, "command": ["echo", token]}
    async with server(answering(event(token, True))) as port:
        found = await run(target(port, **more), [case({"connect": "ann"}, {"wait": "0.1s"})], CLAUSES, probe=False)
    assert found.results[0].outcome is Outcome.PASSED
    sent = next(one.text for one in found.results[0].transcript if "Bearer" in one.text)
    assert "Bearer <valid token of one.ann." in sent
    assert all(form not in str(found.results[0].transcript) for form in (token, token.replace(":", r"\\c")))


async def test_a_token_is_made_once_in_a_run(tmp_path):
    log = tmp_path / "log"
    command = ["sh", "-c", f"echo made >> {log}; echo token"]
    step = {"get": "/x", "as": "Ann", "status": 426}
    async with server(silent) as port:
        cases = [case(step), case(step, identity="two", alone=True)]
        found = await run(target(port, secret=None, command=command), cases, CLAUSES, probe=False)
    assert [one.outcome for one in found.results] == [Outcome.PASSED] * 2
    assert log.read_text() == "made\n"


async def test_an_answer_that_drips_is_cut_off():
    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        finally:
            writer.close()
            ended.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as running:
        port = running.sockets[0].getsockname()[1]
        with pytest.raises(Failed, match=r"within 0\.3 s; none came"):
            await rest.request(f"http://127.0.0.1:{port}", "GET", "/", [], None, limit=0.3)
        async with asyncio.timeout(1):
            await ended.wait()
            # The thread is over, too: the end of a run waits for it.
            await asyncio.get_running_loop().shutdown_default_executor()


ANSWERS = {"get": "/x", "at-once": 3, "status": 429, "response": {"Retry-After": "1"}, "or-status": 200}


@pytest.mark.parametrize(
    ("answers", "step", "actual"),
    [
        ([200, 429, 429], {**ANSWERS, "at-least": 2}, None),
        ([200, 200, 429], {**ANSWERS, "at-least": 2}, "1 had it, and 2 had 200"),
        ([200, 429, 500], {**ANSWERS, "at-least": 1}, "status: 500"),
        ([200, 429, 429], {**ANSWERS, "at-least": 1, "response": {"Retry-After": "2"}}, "header Retry-After"),
        ([200, 200, 200], {"get": "/x", "at-once": 3}, None),
        ([200, 200, 429], {"get": "/x", "at-once": 3}, "status: 429"),
    ],
)
async def test_requests_are_sent_at_once_and_all_answers_judged(answers, step, actual):
    left, together = list(answers), asyncio.Barrier(len(answers))

    async def answer(socket: ServerConnection, _: object) -> Any:
        # Nobody is answered before all have asked.
        await together.wait()
        made = socket.respond(HTTPStatus(left.pop()), "")
        made.headers["Retry-After"] = "1"
        return made

    async with server(silent, process_request=answer) as port:
        # At most one case at once: the requests have room all the same.
        found = (await run(target(port, parallel=1), [case(step)], CLAUSES, probe=False)).results[0]
    assert found.outcome is (Outcome.FAILED if actual else Outcome.PASSED), (found.actual, found.reason)
    assert actual is None or actual in str(found.actual)


@pytest.mark.parametrize("user", [{}, [], 1, None])
async def test_an_event_about_no_user_is_about_nobody(short, user):
    message = f"MESSAGE\nsubscription:0\n\n{json.dumps({'userId': user, 'online': True})}\0"
    found = await verdict(answering(message), {"connect": "ann"}, {"expect": "ann", "about": "bob", "online": True})
    assert (found.outcome, found.step) == (Outcome.FAILED, 2)
    assert "none came; unread: MESSAGE" in str(found.actual)


@pytest.mark.parametrize("made", ["*1", "a+b", "(", "m.1"])
async def test_what_the_server_made_up_is_text_in_a_regular_expression(made):
    told = story.Story(case({"wait": "0s"}), target(1), "run", 0.0)
    told.saved["a"] = made
    for matcher, fits in (("~ ^(${a}|x)$", True), ("!~ ^(${a}|x)$", False)):
        filled = await told.fill(matcher, {})
        assert (mismatch(filled, made) is None) is fits
        assert (mismatch(filled, "mx1") is None) is not fits


async def test_an_instance_may_have_another_host_for_rest():
    instance = Instance("http://rest.example:8080", "ws://ws.example")
    told = story.Story(case({"wait": "0s"}), target(1, instances=[instance]), "run", 0.0)
    assert await told.fill("${host:1} ${rest-host:1}", {}) == "ws.example rest.example:8080"


async def test_ids_are_spelled_as_uuids_where_the_target_asks_for_it():
    told = story.Story(case({"wait": "0s"}), target(1, ids="uuid"), "run", 0.0)
    bob = told.user("bob")
    assert bob == str(uuid.uuid5(uuid.NAMESPACE_URL, "one.bob.run"))
    assert await told.fill(["${bob}", "${conversation:bob}"], {}) == [bob, bob]
    assert [len(one) for one in await told.fill("$ids 2", {})] == [36, 36]
    assert (told.user(bob), told.short(bob)) == (bob, "bob")


@pytest.mark.parametrize(
    ("step", "runs"),
    [
        ({"connect": "c${i}", "user": "ann"}, True),
        ({"connect": "odd", "user": "9${odd}.A"}, False),
        ({"connect-refused": "ann", "user": "${ann}:x"}, True),
        ({"get": "/api/presence/check/${ann}", "as": "ann"}, True),
        ({"get": "/api/presence/check/q", "as": "ann"}, False),
        ({"get": "/api/presence/check/a*", "as": "ann", "status": 400}, True),
        ({"post": "/api/presence/batch", "as": "ann", "json": ["${bob}", "0"]}, False),
        ({"post": "/api/presence/batch", "as": "ann", "json": "$ids 5", "text": "~ some"}, False),
        ({"send": "ann", "json": {"userIds": ["${i}a"]}}, False),
        ({"send": "ann", "json": {"userIds": "$ids 5"}}, True),
        ({"post": "/api/presence/batch", "as": "ann", "body": '[${15*"a",}"b"]'}, False),
        ({"post": "/api/presence/batch", "as": "ann", "body": '["${bob}"]'}, True),
        ({"send": "ann", "body": '{"userIds": ["x"]}'}, False),
        ({"send": "ann", "body": '{"userIds": ["${bob}"]'}, True),
        ({"watch": "ann", "users": ["bob", "${cat}"]}, True),
    ],
)
def test_what_needs_other_ids_is_not_run_where_ids_are_uuids(step, runs):
    not_run = runner._not_applying(case(step), target(1, ids="uuid"))
    assert (not_run is None) is runs
    assert runner._not_applying(case(step), target(1)) is None


@pytest.mark.parametrize(
    "step", [{"beat": "ann"}, {"expect": "ann", "about": "bob", "online": True}, {"closed": "ann"}], ids=str
)
async def test_a_case_that_overruns_fails_and_names_the_step_that_took_longest(monkeypatch, step):
    monkeypatch.setattr(runner, "_LIMIT", 1.2)
    monkeypatch.setattr(runner, "_LIMIT_LEASES", 0)
    monkeypatch.setattr(runner, "_HELD_UP", inf)
    async with server(answering()) as port:
        steps = [{"wait": "0s"}, {"connect": "ann"}, step]
        found = (await run(target(port, slack=0.1), [case(*steps)], CLAUSES, probe=False)).results[0]
    assert (found.outcome, found.step, found.reason) == (Outcome.FAILED, 3, None)
    assert found.expected == "answers that let the case end within 1.5 s"
    assert re.fullmatch(rf"it did not: step 3 \({next(iter(step))}\) took \d\.\d s", str(found.actual))


async def test_a_case_that_overruns_as_the_runner_was_held_up_is_an_error(monkeypatch):
    async def busy(*_: object) -> None:
        time.sleep(0.4)  # noqa: ASYNC251 (to hold up the loop is the point)
        await asyncio.sleep(1)

    monkeypatch.setattr(runner, "_LIMIT", 0.1)
    monkeypatch.setattr(runner, "_LIMIT_LEASES", 0)
    monkeypatch.setattr(runner, "_LATE", 0.2)
    monkeypatch.setattr(runner, "take", busy)
    found = (await run(target(1, slack=0.0), [case({"wait": "0s"})], CLAUSES, probe=False)).results[0]
    assert (found.outcome, found.actual) == (Outcome.ERROR, None)
    assert str(found.reason).startswith("the runner was held up, and the case not over after 0.1 s: step 1 (wait) took")


@pytest.mark.parametrize(("blocked", "held_up"), [(0.0, inf), (0.6, 0.25)])
async def test_a_case_that_fails_while_the_runner_was_held_up_says_so(monkeypatch, blocked, held_up):
    async def wrong(*_: object) -> None:
        await asyncio.sleep(0.1)
        time.sleep(blocked)  # noqa: ASYNC251 (to hold up the loop is the point)
        await asyncio.sleep(0.1)
        raise Failed("a RECEIPT", "none came")

    monkeypatch.setattr(runner, "take", wrong)
    monkeypatch.setattr(runner, "_HELD_UP", held_up)
    found = (await run(target(1), [case({"wait": "0s"})], CLAUSES, probe=False)).results[0]
    assert (found.outcome, found.actual) == (Outcome.FAILED, "none came")
    if blocked:
        assert re.match(r"the runner was held up for \d\.\d s meanwhile", str(found.reason))
    else:
        assert found.reason is None


async def test_the_time_of_the_targets_commands_is_not_the_cases(monkeypatch):
    monkeypatch.setattr(runner, "_LIMIT", 0.3)
    monkeypatch.setattr(runner, "_LIMIT_LEASES", 0)
    more = {
        "hooks": {"empty-store": ["sleep", "0.4"]},
        "secret": None,
        "command": ["sh", "-c", "sleep 0.4; echo token"],
    }
    async with server(silent) as port:
        steps = [{"hook": "empty-store"}, {"get": "/x", "as": "ann", "status": 426}]
        found = await run(target(port, **more), [case(*steps)], CLAUSES, probe=False)
    assert (found.results[0].outcome, found.results[0].reason) == (Outcome.PASSED, None)


# The runner.


async def outcomes(cases, **more) -> Run:
    async with server(answering()) as port:
        return await run(target(port, **more.pop("target", {})), cases, CLAUSES, probe=False, **more)


async def test_a_case_runs_only_where_it_says_something_of_the_target():
    step = {"connect": "ann"}
    cases = [
        case(step, identity="runs", policy="any"),
        case(step, identity="policy", policy="contacts"),
        case(step, identity="needs", needs=frozenset({"instances", "hook:stop-store"})),
        case(step, identity="claims", needs=frozenset({"claim:iss"})),
        case(step, identity="issued", needs=frozenset({"claim:aud"})),
        case(step, identity="feature", features=frozenset({"ack"}), needs=frozenset({"instances"})),
    ]
    found = await outcomes(cases, target={"unsupported": frozenset({"ack"}), "claims": {"aud": "us"}})
    told = {one.case.id: (one.outcome, one.reason) for one in found.results}
    assert told == {
        "runs": (Outcome.PASSED, None),
        "policy": (Outcome.NOT_RUN, "about the watch policy 'contacts'; the target has 'anyone'"),
        "needs": (Outcome.NOT_RUN, "the target lacks hook:stop-store, instances"),
        "claims": (Outcome.NOT_RUN, "the target lacks claim:iss"),
        "issued": (Outcome.PASSED, None),
        "feature": (Outcome.UNSUPPORTED, "the target does not support ack"),
    }
    found = await outcomes(cases[:1], target={"conformance": Class.GUIDE})
    assert found.results[0].outcome is Outcome.NOT_RUN


async def test_only_what_is_chosen_runs():
    cases = [case({"wait": "0s"}, identity=name) for name in ("a", "b")]
    found = await outcomes(cases, only=["b"])
    assert [one.outcome for one in found.results] == [Outcome.NOT_RUN, Outcome.PASSED]
    assert [one.outcome for one in (await outcomes(cases, only=["A-01"])).results] == [Outcome.PASSED] * 2
    for more in ({"levels": [Level.MAY]}, {"conformance": Class.GUIDE}, {"only": ["A-02"]}):
        found = await outcomes(cases, **more)
        assert {one.outcome for one in found.results} == {Outcome.NOT_RUN}


async def test_who_disturbs_others_runs_after_them_alone():
    ended = []
    cases = [
        case({"wait": "0s"}, identity="alone", alone=True),
        case({"wait": "0.2s"}, identity="slow"),
        case({"wait": "0s"}, identity="fast"),
    ]
    found = await outcomes(cases, finished=lambda result: ended.append(result.case.id))
    assert ended == ["fast", "slow", "alone"]
    assert [one.case.id for one in found.results] == ["alone", "slow", "fast"]


IDLE = {"wait": "0.2s", "idle": True}


async def test_who_is_idle_lends_the_target_and_waits_until_it_is_given_back(monkeypatch):
    # That others have the target is not the case's time.
    monkeypatch.setattr(runner, "_LIMIT", 0.3)
    monkeypatch.setattr(runner, "_LIMIT_LEASES", 0)
    ended = []
    cases = [
        case({"wait": "0.9s"}, identity="alone", alone=True),
        case(IDLE, {"mark": "back"}, {"wait": "0.2s", "since": "back"}, identity="idle"),
        case({"wait": "0.1s"}, identity="short"),
    ]
    found = await outcomes(cases, finished=lambda result: ended.append(result.case.id))
    assert ended == ["short", "alone", "idle"]
    assert {one.outcome for one in found.results} == {Outcome.PASSED}


async def test_those_alone_that_break_something_come_last():
    ended = []
    cases = [
        case({"hook": "stop-store"}, identity="breaks", alone=True, needs=frozenset({"hook:stop-store"})),
        case({"wait": "0s"}, identity="floods", alone=True),
    ]
    async with server(silent, process_request=answering_rest(200)) as port:
        await run(target(port, hooks=STOP), cases, CLAUSES, probe=False, finished=lambda one: ended.append(one.case.id))
    assert ended == ["floods", "breaks"]


@pytest.mark.parametrize(
    ("others", "statuses", "outcome"),
    [
        ([{"wait": "0.4s"}], [503, 200], Outcome.PASSED),
        ([{"wait": "0.4s"}], [503, 503], Outcome.FAILED),
        ([], [503, 200], Outcome.FAILED),
    ],
    ids=["disturbed", "all the same", "undisturbed"],
)
async def test_who_fails_after_others_had_the_target_is_run_again_by_himself(others, statuses, outcome):
    ask = {"get": "/api/${bob}", "as": "bob", "status": 200}
    cases = [case(IDLE, ask), *(case(one, identity="alone", alone=True) for one in others)]
    told: list[Result] = []
    answer = answering_rest(*statuses)
    asked = []

    def noting(socket: ServerConnection, request: Any) -> Any:
        asked.append(request.path)
        return answer(socket, request)

    async with server(silent, process_request=noting) as port:
        found = await run(target(port), cases, CLAUSES, probe=False, finished=told.append)
    assert found.results[0].outcome is outcome
    assert len(told) == len(cases)
    assert len(asked) == len(set(asked)) == 1 + len(others), "each time of other users"


async def test_who_was_idle_is_not_blamed_for_what_others_left_broken():
    hooks = {**STOP, "start-store": ["sh", "-c", "exit 3"]}
    cases = [case(IDLE, {"get": "/api/x", "status": 200}), case({"hook": "stop-store"}, identity="two", alone=True)]
    async with server(silent, process_request=answering_rest(503)) as port:
        first, second = (await run(target(port, hooks=hooks), cases, CLAUSES, probe=False)).results
    assert (first.outcome, second.outcome) == (Outcome.NOT_RUN, Outcome.ERROR)
    assert first.reason == second.left


async def test_the_first_failure_may_be_the_last_case():
    cases = [
        case({"wait": "20s"}, identity="long"),
        case({"beat": "nobody"}, identity="fails"),
        case({"wait": "0s"}, identity="alone", alone=True),
    ]
    found = await outcomes(cases, fail_fast=True)
    assert [one.outcome for one in found.results] == [Outcome.NOT_RUN, Outcome.ERROR, Outcome.NOT_RUN]


async def test_a_target_that_is_no_presence_server_is_told_in_one_line():
    async def told(answer) -> str:
        async with server(silent, process_request=answer) as port:
            with pytest.raises(TargetUnusable) as caught:
                await run(target(port), [], CLAUSES)
            assert "\n" not in str(caught.value)
            return str(caught.value)

    assert "no presence server: 404 for GET" in await told(lambda socket, _: socket.respond(HTTPStatus.NOT_FOUND, "no"))
    assert "the token is refused: 401" in await told(lambda socket, _: socket.respond(HTTPStatus.UNAUTHORIZED, "no"))

    def rest_only(status):
        def answer(socket, request):
            if request.path.startswith("/api/"):
                return socket.respond(HTTPStatus.OK, '{"isOnline": false}')
            return socket.respond(status, "no")

        return answer

    said = await told(rest_only(HTTPStatus.NOT_FOUND))
    assert "/ws was answered with 404; see path in [connection]" in said and "the upgrade of ws://" in said
    assert "/ws was answered with 401; see in of [token]" in await told(rest_only(HTTPStatus.UNAUTHORIZED))
    with pytest.raises(TargetUnusable, match=r"the server cannot be reached: .*refused"):
        await run(target(1), [], CLAUSES)


async def test_what_waits_for_longer_than_a_minute_is_run_by_the_patient_only(monkeypatch):
    cases = [case({"wait": "71s"}, identity="minute"), case({"wait": "0.2s"}, identity="moment")]
    found = await outcomes(cases)
    assert [one.outcome for one in found.results] == [Outcome.NOT_RUN, Outcome.PASSED]
    monkeypatch.setattr(runner, "LONG", 0.1)
    impatient, patient = [await outcomes(cases[1:], patient=choice) for choice in (False, True)]
    assert [impatient.results[0].outcome, patient.results[0].outcome] == [Outcome.NOT_RUN, Outcome.PASSED]
