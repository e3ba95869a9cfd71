"""The verbs of the steps (`cases/README.md`, "Steps"): what each one does and what it demands."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from contracts import rest
from contracts.canary import Watching, leave
from contracts.client import Connection, Received, Refused
from contracts.faults import Failed, Misused, Unreachable
from contracts.match import ABSENT, mismatch, shown
from contracts.stomp import encode
from contracts.story import Story

Step = Mapping[str, Any]
Verb = Callable[[Story, Step], Awaitable[None]]

VERBS: dict[str, Verb] = {}
_POLL = 0.05
"""s: between two questions of REST."""
_EVENTS = "queue/online-status"


def verb(name: str) -> Callable[[Verb], Verb]:
    """Registers the function that does a verb."""

    def register(function: Verb) -> Verb:
        VERBS[name] = function
        return function

    return register


async def take(story: Story, step: Step) -> None:
    """Do one step, `times` times.

    Raises:
        Failed: the server did otherwise.
        Misused: the step makes no sense here.
        Unreachable: no TCP connection came up.
    """
    do = VERBS[next(iter(step))]
    for number in range(1, step.get("times", 1) + 1):
        story.alarm()
        await do(story, await story.fill(step, {"i": number}))


# Connections.


@verb("connect")
async def _connect(story: Story, step: Step) -> None:
    actor = step["connect"]
    connection = await _opened(story, step)
    story.minded = connection
    try:
        await _send_connect(story, step, connection)

        def probe() -> bool | None:
            return True if connection.connected or connection.error or connection.closed else None

        await story.until(probe, story.now + story.limit)
        if connection.connected is None:
            raise Failed(f"CONNECTED for {actor} within {story.limit:g} s", story.nothing(connection))
    finally:
        story.minded = None
    frame = connection.connected
    _hold_headers(story, step.get("expect", {}), frame.get, f"CONNECTED for {actor}", story.got_frame(frame))
    connection.unread = [received for received in connection.unread if received.frame is not frame]


@verb("open")
async def _open(story: Story, step: Step) -> None:
    try:
        connection = await _opened(story, step, refusal=True)
    except Refused as error:
        if "refused" not in step:
            raise Failed("the upgrade to be answered with 101", str(error)) from error
        _hold(story, step["refused"], error.status, "the status of the upgrade's answer")
        values = {name.lower(): value for name, value in reversed(error.headers)}
        _hold_headers(
            story, step.get("response", {}), lambda name: values.get(name.lower()), "the upgrade's answer", str(values)
        )
        return
    if "refused" in step:
        connection.over = True
        raise Failed(f"the upgrade to be refused with {shown(step['refused'])}", "it was answered with 101")


@verb("connect-refused")
async def _connect_refused(story: Story, step: Step) -> None:
    actor = step["connect-refused"]
    try:
        connection = await _opened(story, step, refusal=True)
    except Refused as error:
        if not story.full and "error" not in step and "code" not in step:
            return
        raise Failed("an ERROR, after an upgrade that is answered with 101", str(error)) from error
    story.minded = connection
    try:
        await _send_connect(story, step, connection)

        def probe() -> bool | None:
            enough = connection.closed or (connection.error and "code" not in step) or connection.connected
            return True if enough else None

        await story.until(probe, story.now + story.limit)
        if connection.connected:
            raise Failed(f"{actor} to be refused", "CONNECTED came")
        if connection.error is None and connection.closed is None:
            raise Failed(f"an ERROR or a close for {actor} within {story.limit:g} s", story.nothing(connection))
        _hold_error(story, step, connection)
        if "code" in step:
            if connection.closed is None:
                raise Failed(f"a close for {actor} within {story.limit:g} s", "none came")
            _hold(story, step["code"], connection.closed.code, "the close code")
    finally:
        story.minded = None
        connection.over = True


async def _opened(story: Story, step: Step, *, refusal: bool = False) -> Connection:
    """The upgrade of a step; what came before of the actor is over."""
    actor = next(iter(step.values()))
    user = story.user(step.get("user", actor))
    headers = dict(step.get("upgrade", {}))
    place = step.get("token-in", story.target.token_in)
    if place == "upgrade" and (token := await story.token(user, step.get("token", "valid"))):
        headers = {"Authorization": f"Bearer {token}"} | headers
    try:
        connection = await story.open(
            actor,
            user,
            instance=step.get("instance", 1),
            path=step.get("path"),
            transport=step.get("transport"),
            headers=headers,
            origin=step.get("origin"),
            subprotocols=step.get("subprotocols", ["v12.stomp"]),
        )
    except Refused as error:
        if refusal:
            raise
        raise Failed(f"a WebSocket for {actor}", str(error)) from error
    story.connections[actor] = connection
    if "subprotocol" in step:
        chosen = connection.socket.subprotocol
        _hold(story, step["subprotocol"], ABSENT if chosen is None else str(chosen), "the subprotocol chosen")
    return connection


async def _send_connect(story: Story, step: Step, connection: Connection) -> None:
    headers = {"accept-version": step.get("versions", "1.2"), "host": "presence", "heart-beat": "0,0"}
    if headers["accept-version"] == "":
        del headers["accept-version"]
    place = step.get("token-in", story.target.token_in)
    if place != "upgrade" and (token := await story.token(connection.user, step.get("token", "valid"))):
        if place == "authorization":
            headers["Authorization"] = f"Bearer {token}"
        else:
            headers |= {"login": connection.user, "passcode": token}
    headers |= step.get("headers", {})
    kept = {name: value for name, value in headers.items() if value != "$absent"}
    await story.send(connection, step.get("command", "CONNECT"), kept)


@verb("disconnect")
async def _disconnect(story: Story, step: Step) -> None:
    await leave(story, story.connection(step["disconnect"]))


@verb("close")
async def _close(story: Story, step: Step) -> None:
    await story.connection(step["close"]).close(step.get("code", 1000))


@verb("cut")
async def _cut(story: Story, step: Step) -> None:
    story.connection(step["cut"]).cut()


@verb("freeze")
async def _freeze(story: Story, step: Step) -> None:
    story.connection(step["freeze"]).freeze()


@verb("thaw")
async def _thaw(story: Story, step: Step) -> None:
    story.connection(step["thaw"]).thaw()


@verb("closed")
async def _closed(story: Story, step: Step) -> None:
    actor = step["closed"]
    connection = story.connection(actor)
    start, within = story.since(step), story.within(step)
    await story.until(lambda: connection.closed, start + within)
    if connection.closed is None:
        raise Failed(
            f"the server to close the connection of {actor}{_deadline(step, within)}", story.nothing(connection)
        )
    connection.over = True
    _hold_time(story, step, connection.closed.at, start, within, f"the close for {actor}")
    _hold_error(story, step, connection)
    if "code" in step:
        _hold(story, step["code"], connection.closed.code, f"the close code for {actor}")


def _hold_error(story: Story, step: Step, connection: Connection) -> None:
    """What a step says of the ERROR frame: `error` and, in `closed`, `headers`."""
    received, of_error = connection.error, step.get("headers", {}) if "closed" in step else {}
    if step.get("error") is False:
        if received:
            raise Failed(f"no ERROR for {connection.actor}", story.got(received))
        return
    if "error" not in step and not of_error:
        return
    if received is None:
        raise Failed(f"an ERROR for {connection.actor} before the close", story.nothing(connection))
    wanted = of_error | ({"message": step["error"]} if "error" in step else {})
    _hold_headers(story, wanted, received.frame.get, f"ERROR for {connection.actor}", story.got(received))


@verb("still-open")
async def _still_open(story: Story, step: Step) -> None:
    connection = story.connection(step["still-open"])
    if story.full:
        await story.send_with_receipt(connection, "SEND", {"destination": "/app/heartbeat"})
        return
    await story.send(connection, "SEND", {"destination": "/app/heartbeat"})
    await _pinged(story, connection)


@verb("ping")
async def _ping(story: Story, step: Step) -> None:
    await _pinged(story, story.connection(step["ping"]))


async def _pinged(story: Story, connection: Connection) -> None:
    """Send a WebSocket ping; it must be answered."""
    try:
        async with asyncio.timeout(story.limit):
            await (await connection.socket.ping())
    except TimeoutError as error:
        raise Failed(f"a pong for {connection.actor} within {story.limit:g} s", "none came") from error
    except Exception as error:
        raise Failed(f"the connection of {connection.actor} to be open", story.nothing(connection)) from error


# Frames.


@verb("send")
async def _send(story: Story, step: Step) -> None:
    connection = story.connection(step["send"])
    command = step.get("frame", "SEND")
    body = json.dumps(step["json"], ensure_ascii=False) if "json" in step else step.get("body", "")
    headers = {"destination": step["destination"]} if "destination" in step else {}
    if "json" in step:
        headers["content-type"] = "application/json"
    if body and step.get("content-length", True):
        headers["content-length"] = str(len(body.encode()))
    headers |= step.get("headers", {})
    headers = {name: value for name, value in headers.items() if value != "$absent"}
    if step.get("receipt"):
        await story.send_with_receipt(connection, command, headers, body)
    else:
        await story.send(connection, command, headers, body)
    _keep_in_mind(connection, f"{command}\n{headers.get('destination', '')}")


@verb("raw")
async def _raw(story: Story, step: Step) -> None:
    connection = story.connection(step["raw"])
    wrapped = not step.get("unwrapped", False)
    for text in [step["text"]] if "text" in step else step.get("texts", []):
        await connection.send(text, limit=story.limit, wrapped=wrapped)
        _keep_in_mind(connection, text)
    if "binary" in step:
        await connection.send(step["binary"].encode(), limit=story.limit)
        _keep_in_mind(connection, step["binary"])
    if "hex" in step:
        await connection.send(bytes.fromhex(step["hex"]), limit=story.limit)


def _keep_in_mind(connection: Connection, sent: str) -> None:
    """Know whether the connection can be told of a canary."""
    if _EVENTS in sent:
        connection.subscribed = "SUBSCRIBE" in sent and "UNSUBSCRIBE" not in sent
    elif sent.startswith("UNSUBSCRIBE"):
        connection.subscribed = False
    if "presence.subscribe" in sent:
        connection.watches = True


@verb("watch")
async def _watch(story: Story, step: Step) -> None:
    connection = story.connection(step["watch"])
    users = [story.user(name) for name in step["users"]]
    await _watching(story, connection).watch(users)
    if not step.get("keep"):
        # In `full` what is here are snapshots; in `guide` it is what came before the watch is known to hold.
        connection.unread = [
            received
            for received in connection.unread
            if received.about not in users or (story.full and not received.snapshot)
        ]
    for user in users:
        connection.told.pop(user, None)


@verb("unwatch")
async def _unwatch(story: Story, step: Step) -> None:
    connection = story.connection(step["unwatch"])
    await _watching(story, connection).unwatch([story.user(name) for name in step["users"]])


def _watching(story: Story, connection: Connection) -> Watching:
    if connection.watching is None:
        connection.watching = Watching(story, connection)
    assert isinstance(connection.watching, Watching)
    return connection.watching


@verb("beat")
async def _beat(story: Story, step: Step) -> None:
    send = story.send_with_receipt if story.full else story.send
    await send(story.connection(step["beat"]), "SEND", {"destination": "/app/heartbeat"})


@verb("keep-beating")
async def _keep_beating(story: Story, step: Step) -> None:
    connection = story.connection(step["keep-beating"])
    every = story.length(step.get("every", "0.3L"))
    frame = encode("SEND", [("destination", "/app/heartbeat")], version=connection.decoder.version)

    async def beat() -> None:
        while not (connection.over or connection.closed):
            if not connection.frozen:
                await connection.send(frame, limit=story.limit)
            await asyncio.sleep(every)

    connection.beating = asyncio.create_task(beat())
    connection.tasks.append(connection.beating)


@verb("stop-beating")
async def _stop_beating(story: Story, step: Step) -> None:
    connection = story.connection(step["stop-beating"])
    if connection.beating is None:
        raise Misused(f"{connection.actor} does not keep beating")
    connection.beating.cancel()


# Expectations.


@verb("expect")
async def _expect(story: Story, step: Step) -> None:
    connection = story.connection(step["expect"])
    start, within = story.since(step), story.within(step)
    fits = _selector(story, step, connection, snapshot=False)

    def probe() -> Received | bool | None:
        found = next((received for received in connection.unread if fits(received)), None)
        return found or (True if connection.closed else None)

    found = await story.until(probe, start + within)
    what = _words(story, step, connection)
    if not isinstance(found, Received):
        raise Failed(what + _deadline(step, within), story.nothing(connection))
    _read(story, connection, found)
    if found is connection.error:
        # Its close is no surprise any more.
        connection.over = True
    _hold_time(story, step, found.at, start, within, what)
    if "online" in step:
        if found.online is not step["online"]:
            raise Failed(what, story.got(found))
        if found.about is not None:
            connection.told[found.about] = step["online"]
    _hold_frame(story, step, found, what)
    for name, source in step.get("save", {}).items():
        value = _header(found.frame.get, source[7:]) if source.startswith("header:") else _member(found.json, source)
        if value is ABSENT:
            raise Failed(f"{source} in {what}", story.got(found))
        story.saved[name] = value


def _hold_frame(story: Story, step: Step, found: Received, what: str) -> None:
    """Raise Failed unless a frame is as `expect` states."""
    frame, got = found.frame, story.got(found)
    if "json" in step:
        _hold(story, step["json"], found.json, what, got)
    if "body" in step:
        _hold(story, step["body"], frame.body, what, got, at="body")
    _hold_headers(story, step.get("headers", {}), frame.get, what, got)
    if "message" in step:
        _hold(story, step["message"], found.frames, what, got, at="frames in its WebSocket message")
    if "wire" in step:
        wire = {
            "type": "binary" if found.binary else "text",
            "line-end": "CRLF" if frame.crlf else "LF",
            "whole": found.whole,
        }
        _hold(story, step["wire"], wire, what, got)


def _read(story: Story, connection: Connection, found: Received) -> None:
    """Take a frame; in `guide` with all that came before it about the same user: the guide lets events repeat."""
    before = True
    rest_of_them = []
    for received in connection.unread:
        if received is found:
            before = False
        elif story.full or not before or received.about is None or received.about != found.about:
            rest_of_them.append(received)
    connection.unread = rest_of_them


@verb("expect-nothing")
async def _expect_nothing(story: Story, step: Step) -> None:
    connection = story.connection(step["expect-nothing"])
    fits = _selector(story, step, connection, snapshot="any")
    words = _words(story, step, connection)

    def probe() -> Received | None:
        return next((received for received in connection.unread if fits(received)), None)

    length = story.length(step.get("for"))
    found = await story.until(probe, story.now + length)
    if found is None:
        await _watching(story, connection).settle()
        found = probe()
    if found is not None:
        raise Failed(f"no {words}" + (f" for {length:g} s" if length else ""), story.got(found))


@verb("expect-none-ever")
async def _expect_none_ever(story: Story, step: Step) -> None:
    connection = story.connection(step["expect-none-ever"])
    fits = _selector(story, step, connection, snapshot="any")
    story.bans.append((connection, _words(story, step, connection), fits))


@verb("drain")
async def _drain(story: Story, step: Step) -> None:
    story.connection(step["drain"]).unread.clear()


@verb("expect-heart-beat")
async def _expect_heart_beat(story: Story, step: Step) -> None:
    connection = story.connection(step["expect-heart-beat"])
    start, within = story.since(step), story.within(step)
    await story.until(lambda: connection.beats or (True if connection.closed else None), start + within)
    if not connection.beats:
        raise Failed(f"a heart-beat for {connection.actor}{_deadline(step, within)}", story.nothing(connection))
    _hold_time(story, step, connection.beats.pop(0), start, within, f"the heart-beat for {connection.actor}")


@verb("expect-no-heart-beat")
async def _expect_no_heart_beat(story: Story, step: Step) -> None:
    connection = story.connection(step["expect-no-heart-beat"])
    length = story.length(step.get("for"))
    if await story.until(lambda: connection.beats or None, story.now + length):
        raise Failed(f"no heart-beat for {connection.actor}", "one came")


def _selector(story: Story, step: Step, connection: Connection, *, snapshot: bool | str) -> Callable[[Received], bool]:
    """Which frames a step is about."""
    command = step.get("frame", "MESSAGE")
    about = story.user(step["about"]) if "about" in step else None
    wanted = step.get("snapshot", snapshot)

    def fits(received: Received) -> bool:
        frame = received.frame
        if command not in {"ANY", frame.command}:
            return False
        if about is not None and received.about != about:
            return False
        if "subscription" in step and frame.get("subscription") != step["subscription"]:
            return False
        if frame.command == "MESSAGE" and wanted != "any" and received.snapshot is not wanted:
            return False
        return story.full or _is_news(step, connection, received)

    return fits


def _is_news(step: Step, connection: Connection, received: Received) -> bool:
    """Whether a MESSAGE counts in `guide`: what repeats the state that was told is passed over."""
    if "online" in step:
        return received.online is step["online"]
    if "expect" in step or received.about not in connection.told:
        return True
    return received.online is not connection.told[received.about]


# REST.


@verb("get")
async def _get(story: Story, step: Step) -> None:
    await _ask(story, step, "GET", step["get"])


@verb("post")
async def _post(story: Story, step: Step) -> None:
    await _ask(story, step, "POST", step["post"])


@verb("request")
async def _request(story: Story, step: Step) -> None:
    await _ask(story, step, step.get("method", "GET"), step["request"])


async def _ask(story: Story, step: Step, method: str, path: str) -> None:
    """A request whose answer must be as stated; with `until` it is asked again until it is."""
    start, within = story.since(step), story.within(step)
    what = f"{method} {path}"
    while True:
        try:
            answers = await _answers(story, step, method, path)
            _hold_answers(story, step, answers, what)
        except (Failed, Unreachable) as fault:
            if not step.get("until") or story.now >= start + within:
                if step.get("until") and isinstance(fault, Failed):
                    raise Failed(fault.expected + _deadline(step, within), fault.actual) from fault
                raise
            await story.until(lambda: None, story.now + _POLL)
        else:
            break
    if "not-before" in step:
        _hold_time(story, step, story.now, start, within, f"the answer to {what}")
    answer = answers[0]
    for name, source in step.get("save", {}).items():
        value = answer.header(source[7:]) if source.startswith("header:") else _member(answer.json, source)
        if value is ABSENT:
            raise Failed(f"{source} in the answer to {what}", shown(answer.text))
        story.saved[name] = value
    if "save-as" in step:
        story.answers[step["save-as"]] = answer


async def _answers(story: Story, step: Step, method: str, path: str) -> list[rest.Answer]:
    """One request and its answer; with `at-once` so many of them, none of which waits for another."""
    caller = story.user(step["as"]) if "as" in step else None
    kind = step.get("token", "valid" if caller else "absent")
    token = await story.token(caller or story.user("nobody"), kind)
    headers = dict(step.get("headers", {}))
    body = None
    if "json" in step or "body" in step:
        body = (json.dumps(step["json"], ensure_ascii=False) if "json" in step else step["body"]).encode()
        if "content-type" not in {name.lower() for name in headers}:
            headers["Content-Type"] = step.get("content-type", "application/json")
    headers = {name: value for name, value in headers.items() if value != "$absent"}
    number = step.get("instance", 1)
    requests = [
        story.request(method, path, caller=caller, token=token, instance=number, headers=headers, body=body)
        for _ in range(step.get("at-once", 1))
    ]
    # Each to its end, also when another one fails: none is left behind.
    ended = await asyncio.gather(*requests, return_exceptions=True)
    for one in ended:
        if isinstance(one, BaseException):
            raise one
    return [one for one in ended if isinstance(one, rest.Answer)]


def _hold_answers(story: Story, step: Step, answers: Sequence[rest.Answer], what: str) -> None:
    """Raise Failed unless the answers are as stated: all but those with `or-status`, and `at-least` so many."""
    stated = [answer for answer in answers if answer.status != step.get("or-status")]
    for answer in stated:
        _hold_answer(story, step, answer, what)
    least = step.get("at-least", 0)
    if len(stated) < least:
        wanted = f"at least {least} of {len(answers)} answers to {what} with status {shown(step.get('status', 200))}"
        raise Failed(wanted, f"{len(stated)} had it, and {len(answers) - len(stated)} had {step['or-status']}")


def _hold_answer(story: Story, step: Step, answer: rest.Answer, what: str) -> None:
    said = f"{answer.status}: {shown(answer.text)}"
    _hold(story, step.get("status", 200), answer.status, f"the answer to {what}", said, at="status")
    if "answer" in step:
        _hold(story, step["answer"], answer.json, f"the answer to {what}", said)
    if "text" in step:
        _hold(story, step["text"], answer.text, f"the answer to {what}", said, at="the body")
    for name, matcher in step.get("response", {}).items():
        _hold(story, matcher, answer.header(name), f"the answer to {what}", said, at=f"header {name}")


@verb("same")
async def _same(story: Story, step: Step) -> None:
    missing = [name for name in step["same"] if name not in story.answers]
    if missing:
        raise Misused(f"no answer was saved as {missing[0]!r}")
    one, other = (story.answers[name] for name in step["same"])
    for part, left, right in [
        ("status", one.status, other.status),
        ("headers", _undated(one), _undated(other)),
        (
            "body",
            one.text if one.body == other.body else repr(one.body),
            other.text if one.body == other.body else repr(other.body),
        ),
    ]:
        if left != right:
            raise Failed(f"the same {part} in both answers", f"{shown(left)} and {shown(right)}")


def _undated(answer: rest.Answer) -> list[list[str]]:
    return [[name, value] for name, value in answer.headers if name.lower() != "date"]


async def _check_once(story: Story, step: Step, user: str, *, quiet: bool = False) -> rest.Answer:
    token = await story.token(user)
    path = f"/api/presence/check/{user}"
    return await story.request("GET", path, caller=user, token=token, instance=step.get("instance", 1), quiet=quiet)


@verb("check")
async def _check(story: Story, step: Step) -> None:
    answer = await _check_once(story, step, story.user(step["check"]))
    _hold_online(story, step, answer, step["check"])


@verb("await")
async def _await(story: Story, step: Step) -> None:
    user = story.user(step["await"])
    start, within = story.since(step), story.within(step)
    while True:
        asked = story.now
        try:
            answer = await _check_once(story, step, user)
            _hold_online(story, step, answer, step["await"])
        except (Failed, Unreachable) as fault:
            if story.now >= start + within:
                if isinstance(fault, Unreachable):
                    raise
                raise Failed(fault.expected + _deadline(step, within), fault.actual) from fault
            await story.until(lambda: None, story.now + _POLL)
        else:
            # How long the answer took is no fault of the state: it was asked in time, and answered not before its time.
            what = f"{step['await']} to be {_state(step)}"
            late, early = ({k: v for k, v in step.items() if k != left} for left in ("not-before", "since"))
            _hold_time(story, late, asked, start, within, what)
            _hold_time(story, early, story.now, start, within, what)
            return


@verb("stays")
async def _stays(story: Story, step: Step) -> None:
    user = story.user(step["stays"])
    start = story.now
    length = story.length(step["for"])
    while True:
        answer = await _check_once(story, step, user, quiet=True)
        if answer.status != step.get("or-status"):
            try:
                _hold_online(story, step, answer, step["stays"])
            except Failed as fault:
                story.log(story.short(user), "←", str(answer))
                raise Failed(
                    f"{step['stays']} to stay {_state(step)} for {length:g} s",
                    f"after {story.now - start:.2f} s: {fault.actual}",
                ) from fault
        if story.now - start >= length:
            return
        await story.until(lambda: None, min(story.now + _POLL, start + length))


def _hold_online(story: Story, step: Step, answer: rest.Answer, name: str) -> None:
    said = f"{answer.status}: {shown(answer.text)}"
    wrong = mismatch(200, answer.status) or mismatch({"isOnline": step["online"]}, answer.json)
    if wrong:
        raise Failed(f"{name} to be {_state(step)} in the answer of /api/presence/check", said)


def _state(step: Step) -> str:
    return "online" if step["online"] else "offline"


# Other.


@verb("wait")
async def _wait(story: Story, step: Step) -> None:
    end = story.since(step) + story.length(step["wait"])
    if not step.get("idle"):
        await story.until(lambda: None, end)
        return
    with contextlib.ExitStack() as others:
        async with story.idle():
            await story.until(lambda: None, end)
            others.enter_context(story.uncounted())  # until the target is given back


@verb("mark")
async def _mark(story: Story, step: Step) -> None:
    story.marks[step["mark"]] = story.now


@verb("hook")
async def _hook(story: Story, step: Step) -> None:
    name, begun = step["hook"], story.now
    await story.hook(name, step.get("instance", 1))
    took = story.now - begun
    if "within" in step and took > (bearable := story.length(step["within"])):
        # Leases went on meanwhile: what comes now is not what the case is about.
        limit = f"longer than the {bearable:g} s that the lease of {story.target.lease:g} s allows"
        raise Misused(f"hooks.{name} took {took:.1f} s, {limit}; make the command faster, or the lease longer")


# What a step states.


def _hold(story: Story, matcher: Any, value: Any, what: str, got: str | None = None, *, at: str = "") -> None:
    """Raise Failed unless the matcher holds."""
    wrong = mismatch(matcher, value, since=story.started, at=at)
    if wrong:
        if got is None:
            raise Failed(f"{what}: {shown(matcher)}", f"was {shown(value)}")
        raise Failed(f"{what}: {wrong.place}{wrong.expected}", f"{wrong.place}{wrong.actual}; {got}")


def _hold_headers(
    story: Story, matchers: Mapping[str, Any], get: Callable[[str], str | None], what: str, got: str
) -> None:
    for name, matcher in matchers.items():
        _hold(story, matcher, _header(get, name), what, got, at=f"header {name}")


def _header(get: Callable[[str], str | None], name: str) -> Any:
    value = get(name)
    return ABSENT if value is None else value


def _member(value: Any, source: str) -> Any:
    """A part of JSON: "version", or the path "/a/b" for what lies deeper."""
    for name in source.removeprefix("/").split("/") if source.startswith("/") else [source]:
        if not isinstance(value, Mapping) or name not in value:
            return ABSENT
        value = value[name]
    return value


def _hold_time(story: Story, step: Step, at: float, start: float, within: float, what: str) -> None:
    """Raise Failed if something came too early or too late for a step; too late only counts from a mark."""
    after = at - start
    if "not-before" in step and after < (earliest := story.length(step["not-before"])):
        raise Failed(f"{what}, not before {earliest:.2f} s", f"it came after {after:.3f} s")
    if "since" in step and after > within:
        raise Failed(f"{what}{_deadline(step, within)}", f"it came after {after:.3f} s")


def _deadline(step: Step, within: float) -> str:
    return f", within {within:g} s" + (f" of {step['since']}" if step.get("since") else "")


def _words(story: Story, step: Step, connection: Connection) -> str:
    """What a step is about: "MESSAGE about bob (online: true) for ann"."""
    words = [step.get("frame", "MESSAGE")]
    if "about" in step:
        words.append(f"about {story.short(step['about'])}")
    if "online" in step:
        words.append(f"(online: {shown(step['online'])})")
    if step.get("snapshot") is True:
        words.append("(snapshot)")
    if "subscription" in step:
        words.append(f"of subscription {step['subscription']}")
    return " ".join([*words, f"for {connection.actor}"])
