"""The WebSocket endpoint: STOMP sessions over plain WebSocket and SockJS (WIRE §3–6; guide, WebSocketPresenceHandler).

An ASGI callable in front of Quart's: its inbound queue is bounded, so that a client that floods waits (DESIGN §6).
Frames take effect in order as they come in. What is sent goes through one queue and one writer a connection, in which a
receipt waits for its effect; so a store that is away delays receipts and snapshots, and no heartbeat.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from presence import stomp
from presence.core.device import device_of
from presence.core.model import Session, Status, no_ids
from presence.fanout import Watcher
from presence.ports import DirectoryUnavailable, StoreUnavailable, TooManyConnections
from presence.server.auth import LEEWAY_SECONDS, InvalidToken, KeysUnavailable, Token, TokenVerifier, bearer
from presence.server.budget import IdBudget
from presence.server.origins import Origins
from presence.server.problems import Problem
from presence.server.share import turn
from presence.server.transport import Transport
from presence.service import PresenceService
from presence.stomp import StompError, sockjs
from presence.stomp.bucket import TokenBucket

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Outgoing = bytes | Callable[[], Coroutine[Any, Any, "bytes | list[bytes]"]]

QUEUES = ("/user/queue/online-status", "/queue/online-status")
SUBPROTOCOLS = ("v12.stomp", "v11.stomp", "v10.stomp")
DEVICES = ("web", "mobile", "tablet")
SERVER = "presence"
PACK_BYTES = 32_768  # frames are packed into WebSocket messages of about this size
OUT_LIMIT = 1_000  # things to send before the client is read no further
FLUSH_CLIENTS = 100  # written to in one turn of the loop
LINGER = 1.0  # s that a client has to close after its last frame from us
MANY_WATCHES = 1_000  # above it SUBSCRIBEs are limited, since each has them all sent again
_SOCKJS_PATH = re.compile(r"/ws/[^/.]+/[^/.]+/websocket")


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """What one client may do (WIRE §3, §6). Times in s."""

    frames: stomp.Limits = stomp.Limits()  # noqa: RUF009 (frozen)
    connections: int = 10_000
    ids: int = 1_000
    watches: int = 5_000
    subscribes_per_second: float = 4.0
    send_seconds: float = 10.0
    beat_seconds: float = 10.0
    silence_seconds: float = 90.0
    ping_seconds: float = 20.0


class Endpoint:
    """`/ws` and below for WebSocket upgrades; all else goes to ``app``."""

    def __init__(
        self,
        app: ASGIApp,
        service: PresenceService,
        verifier: TokenVerifier,
        origins: Origins,
        budget: IdBudget,
        limits: EndpointLimits,
    ) -> None:
        self.service = service
        self.verifier = verifier
        self.budget = budget
        self.limits = limits
        self.clients: set[Client] = set()
        self.stopping = False
        self._app = app
        self._origins = origins
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: deque[Client] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            if scope["type"] == "http" and (not scope["path"] or scope["path"].startswith("//")):
                scope["path"] = "*"  # nowhere; of no path Quart would make a 500, of several slashes Werkzeug one
            await turn()
            return await self._app(scope, receive, send)
        await receive()  # websocket.connect
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        is_sockjs = _SOCKJS_PATH.fullmatch(scope["path"]) is not None
        try:
            if not is_sockjs and scope["path"] not in ("/ws", "/ws/websocket"):
                raise Problem(404, f"no WebSocket at {scope['path']}")
            if "origin" in headers and not self._origins.allow(headers["origin"], headers.get("host", "")):
                raise Problem(403, "Origin is not allowed")
            if self.stopping or len(self.clients) >= self.limits.connections:
                raise Problem(503, "no more connections on this server now", {"Retry-After": "1"})
        except Problem as problem:
            return await _refuse(send, problem)
        # Always one of those offered: browsers fail without; the highest: some clients take the version from it.
        chosen = next((name for name in SUBPROTOCOLS if name in scope["subprotocols"]), None)
        await Client(self, headers, receive, send, is_sockjs=is_sockjs).run(chosen)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for; its failure is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("task of a connection failed", exc_info=error)

    def ready(self, client: Client) -> None:
        """Have the client's `flush` called, soon."""
        self._ready.append(client)
        if len(self._ready) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        try:
            for _ in range(min(FLUSH_CLIENTS, len(self._ready))):
                self._ready.popleft().flush()
        finally:
            if self._ready:  # let others have their turn
                asyncio.get_running_loop().call_soon(self._flush)

    async def revise(self) -> None:
        """Let all connections look again whom they may see (policy `contacts`)."""
        for client in list(self.clients):
            with suppress(DirectoryUnavailable):  # then it is looked up again at the next revision, or delivery
                await client.revise()

    async def stop(self, timeout: float) -> None:
        """Planned stop: shorten all leases first, then close the sockets with 1001 (WIRE §4)."""
        self.stopping = True
        for client in self.clients:
            client.note_input()
        await self.service.drain(timeout)
        for client in list(self.clients):
            client.finish(1001, "server stops", patience=0.0)
        deadline = time.monotonic() + timeout
        while (self.clients or self._tasks or self.service.records) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


async def _refuse(send: Send, problem: Problem) -> None:
    headers = {"content-type": "application/problem+json", **problem.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "websocket.http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "websocket.http.response.body", "body": json.dumps(problem.body()).encode()})


class Client:
    """One WebSocket connection."""

    def __init__(
        self, endpoint: Endpoint, headers: dict[str, str], receive: Receive, send: Send, *, is_sockjs: bool
    ) -> None:
        limits = endpoint.limits
        self._endpoint = endpoint
        self._headers = headers
        self._receive = receive
        self._send = send
        self._is_sockjs = is_sockjs
        self._transport = Transport(receive, send)
        self._ping_at = time.monotonic() + limits.ping_seconds
        self._pinging = False
        self._stomp = stomp.Connection(
            now=time.monotonic(),
            limits=limits.frames,
            beat_seconds=limits.beat_seconds,
            silence_seconds=limits.silence_seconds,
        )
        self._session: Session | None = None  # None before CONNECTED
        self._watcher: Watcher | None = None
        self._effect: Future[None] | None = None  # of the last frame that had one on the session
        self._subscribes: TokenBucket | None = None
        self._new: set[stomp.Subscription] = set()  # those whose snapshot is still to come
        self._out: list[Outgoing] = []
        self._room: asyncio.Event | None = None  # set when there is room in `_out` again
        self._ready = False  # `flush` is to be called
        self._parked = False  # `_read` waits for a message
        self._writer: asyncio.Task[None] | None = None  # only while there is something that cannot be written at once
        self._waiting = False  # the writer waits for an effect, not for the client
        self._ending = False
        self._revising = False  # `_revised` is queued
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None

    async def run(self, subprotocol: str | None) -> None:
        """Accept the connection and serve it until it is gone."""
        self._task = asyncio.current_task()
        self._endpoint.clients.add(self)
        try:
            await self._send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": []})
            if self._is_sockjs:
                await self._send({"type": "websocket.send", "text": sockjs.OPEN})
            self._transport.divert(self._take)
            self._arm()
            await self._read()
        except asyncio.CancelledError:
            if not self._ending or self._task is None:
                raise  # not by ourselves
            self._task.uncancel()
        finally:
            self._gone()

    # Reading

    async def _read(self) -> None:
        while True:
            self._parked = True
            message = await self._receive()
            self._parked = False
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            await self._transport.share.take(self._handle_queued(message["bytes"] if text is None else text.encode()))
            while len(self._out) > OUT_LIMIT and not self._ending:
                self._room = asyncio.Event()
                await self._room.wait()

    async def _handle_queued(self, message: bytes) -> None:
        await self._handle_all(message)
        self._parked = True  # also while others have their turn: what comes then is counted where it is read

    async def _take(self, message: bytes) -> bool:
        """Handle the message in the task that read it, if nobody has to wait for its effect."""
        if self._session is None or not self._parked or len(self._out) > OUT_LIMIT:
            return False
        try:
            await self._handle_all(message)
        except Exception:
            log.exception("a message of a client failed")
            self._abort("server error")
        return True

    async def _handle_all(self, message: bytes) -> None:
        try:
            for event in self._stomp.receive(self._unwrapped(message), time.monotonic()):
                if self._task is None:
                    return  # it has gone while an earlier one was handled
                await self._handle(event)
        except StompError as error:
            self._fail(error)

    def _unwrapped(self, message: bytes) -> bytes:
        if not self._is_sockjs:
            return message
        return b"" if self._ending else "".join(sockjs.unwrap(message.decode(errors="replace"))).encode()

    async def _handle(self, event: stomp.Event) -> None:
        """Take the effect of one frame. Waits only for the record of a new session."""
        try:
            match event:
                case stomp.Send():
                    action = self._ACTIONS.get(event.destination)
                    if action is None:
                        raise StompError(f"SEND to unknown destination {event.destination[:128]}", 1008)
                    await action(self, event)
                case stomp.Connect():
                    await self._connect(event)
                case stomp.Subscribe():
                    self._subscribe(event)
                case stomp.Unsubscribe():
                    if self._watcher and not self._stomp.subscriptions:
                        self._watcher.forget(list(self._watcher.session.watched))
                    self._acknowledge(event)
                case stomp.Disconnect():
                    self._disconnect(event)
                case _:
                    self._acknowledge(event)
        except StompError as error:
            if error.receipt is None:
                error.receipt = event.receipt
            raise

    def _acknowledge(self, event: stomp.Event, effect: Future[None] | None = None) -> None:
        """Send the receipt that is owed, once the effect has been taken, and that of the frames before."""
        self._effect = effect = effect or self._effect
        if event.acknowledge and event.receipt is not None:
            receipt = self._stomp.receipt(event.receipt)
            self._push(receipt if effect is None or effect.done() else partial(_after, effect, receipt))

    # Connecting and leaving

    async def _connect(self, event: stomp.Connect) -> None:
        headers = event.headers
        given = headers.get("Authorization") or headers.get("authorization")
        token = bearer(given) if given else bearer(f"Bearer {headers.get('passcode', '').removeprefix('Bearer ')}")
        if not given and token is None:
            token = bearer(self._headers.get("authorization"))
        verified = await self._verify(token)
        device = headers.get("device", "")
        if device not in DEVICES:
            device = device_of(self._headers.get("user-agent"))
        service = self._endpoint.service
        try:
            session = await service.set_user_online(verified.user, device, secrets.token_urlsafe(16))
        except TooManyConnections:
            raise StompError("too many connections of this user", 1008) from None
        except StoreUnavailable:
            raise StompError("store unavailable", 1013) from None
        self._session = session
        self._headers = {}  # all that was needed of them
        self._watcher = Watcher(session, self._wake)
        if self._ending:  # the server stops, or the client was given up meanwhile
            service.connection_lost(session)
            return
        now = time.monotonic()
        self._push(self._stomp.connected(session=session.id, server=SERVER, user=session.user, now=now))
        self._expire(verified)

    async def _verify(self, token: str | None) -> Token:
        if token is None:
            raise StompError("Authorization is missing, or no bearer token", 1008)
        try:
            return await self._endpoint.verifier.verify(token)
        except InvalidToken as error:
            raise StompError(f"Authorization: {error}", 1008) from None
        except KeysUnavailable:
            raise StompError("token cannot be verified now", 1013) from None

    def _expire(self, token: Token) -> None:
        self._stomp.expires_at = time.monotonic() + token.expires_at + LEEWAY_SECONDS - time.time()
        self._arm()

    def _disconnect(self, event: stomp.Disconnect) -> None:
        session, _ = self._connected
        effect = self._endpoint.service.set_user_offline(session)
        self._acknowledge(event, effect)
        if event.acknowledge:
            self._push(self._leave)
        else:
            self.finish(1000, "", patience=LINGER)

    async def _leave(self) -> bytes:
        # "RECEIPT, then the client closes (the server after 1 s)"; before that it may not have read the RECEIPT.
        asyncio.get_running_loop().call_later(LINGER, partial(self.finish, 1000, "", patience=0.0))
        return b""

    @property
    def _connected(self) -> tuple[Session, Watcher]:
        assert self._session is not None and self._watcher is not None  # no event but Connect comes before
        return self._session, self._watcher

    # What a client sends (guide, WebSocket API)

    async def _heartbeat(self, event: stomp.Send) -> None:
        session, _ = self._connected
        given = event.headers.get("Authorization") or event.headers.get("authorization")
        if given is not None:
            token = await self._verify(bearer(given))
            if token.user != session.user:
                raise StompError("Authorization: sub is not the user of this connection", 1008)
            self._expire(token)
        service = self._endpoint.service
        self._acknowledge(event, service.refresh_user_session(session, wait=event.acknowledge))

    async def _online_status(self, event: stomp.Send) -> None:
        session, _ = self._connected
        online = _body(event).get("online")
        if online is True:
            effect = self._endpoint.service.sign_on(session, wait=event.acknowledge)
        elif online is False:
            effect = self._endpoint.service.sign_off(session)
        else:
            raise StompError("online must be true or false", 1008)
        self._acknowledge(event, effect)

    async def _watch(self, event: stomp.Send) -> None:
        session, watcher = self._connected
        users = self._ids(event)
        limit = self._endpoint.limits.watches
        if len(session.watched.union(users)) > limit:
            raise StompError(f"userIds: more than {limit} users watched", 1008)
        self._endpoint.service.watch(watcher, users)
        self._push(partial(self._snapshot, users))
        self._acknowledge(event)

    async def _unwatch(self, event: stomp.Send) -> None:
        session, watcher = self._connected
        users = [user for user in self._ids(event) if user in session.watched]
        self._endpoint.service.unwatch(watcher, users)
        self._acknowledge(event)

    _ACTIONS = {  # noqa: RUF012 (no field)
        "/app/heartbeat": _heartbeat,
        "/app/online-status": _online_status,
        "/app/presence.subscribe": _watch,
        "/app/presence.unsubscribe": _unwatch,
    }

    def _ids(self, event: stomp.Send) -> list[str]:
        session, _ = self._connected
        users = _body(event).get("userIds")
        limit = self._endpoint.limits.ids
        if not isinstance(users, list):
            raise StompError("userIds must be an array of ids", 1008)
        if len(users) > limit:
            raise StompError(f"userIds: more than {limit} ids in one frame", 1008)
        if wrong := no_ids(users):
            raise StompError(f"userIds: {str(wrong[0])[:64]!r} is not an id", 1008)
        if self._endpoint.budget.take(session.user, len(users), time.monotonic()):
            raise StompError("userIds: too many ids a second", 1008)
        return list(dict.fromkeys(users))

    # Telling

    def _subscribe(self, event: stomp.Subscribe) -> None:
        session, _ = self._connected
        if event.destination not in QUEUES:
            raise StompError(f"SUBSCRIBE to unknown destination {event.destination[:128]}", 1008)
        if len(session.watched) > MANY_WATCHES:
            rate = self._endpoint.limits.subscribes_per_second
            self._subscribes = self._subscribes or TokenBucket(rate, rate)
            if not self._subscribes.take(1, time.monotonic()):
                raise StompError(f"more than {rate:g} SUBSCRIBEs a second", 1008)
        subscription = self._stomp.subscriptions[event.id]
        self._new.add(subscription)
        self._push(partial(self._subscribed, subscription, list(session.watched)))
        self._acknowledge(event)

    async def _subscribed(self, subscription: stomp.Subscription, users: list[str]) -> list[bytes]:
        out = []
        if subscription in self._stomp.subscriptions.values():
            out = await self._snapshot(users, subscription)
        self._new.discard(subscription)
        return out

    async def _snapshot(self, users: list[str], only: stomp.Subscription | None = None) -> list[bytes]:
        """Return MESSAGEs with the present state of ``users``, for one subscription, or all that had theirs before.

        The others are told of what turns round what they were told before.
        """
        if not users or not (only or self._told):
            return []
        if self._effect is not None:
            await asyncio.shield(self._effect)  # the client may watch its own user
        told = await self._endpoint.service.snapshot(self._connected[1], users)
        return _pack(self._messages(told, only))

    @property
    def _told(self) -> list[stomp.Subscription]:
        """The subscriptions that have had their snapshot."""
        return [one for one in self._stomp.subscriptions.values() if one not in self._new]

    def _messages(
        self, told: Iterable[tuple[Status, bytes | None]], only: stomp.Subscription | None = None
    ) -> Iterator[bytes]:
        others = self._told
        for status, news in told:
            if only is not None:
                yield self._stomp.message(only, status.snapshot)
            body = status.snapshot if only is None else news
            if body is not None:
                for subscription in others:
                    yield self._stomp.message(subscription, body)

    async def _news(self) -> list[bytes]:
        """Return MESSAGEs for the changes that are pending."""
        if not self._has_news:
            return []
        out = await self._revised() if self._endpoint.service.rules.contacts_only else []
        return out + self._flips()

    @property
    def _has_news(self) -> bool:
        watcher = self._watcher
        return bool(watcher and watcher.has_news and self._stomp.subscriptions and not watcher.session.closed)

    def _flips(self) -> list[bytes]:
        if not self._has_news:
            return []
        (_, watcher), told = self._connected, self._told
        return _pack(self._stomp.message(to, status.event) for status in watcher.flips() for to in told)

    async def _revised(self) -> list[bytes]:
        """Apply the policy `contacts` anew to what has been told."""
        self._revising = False
        _, watcher = self._connected
        told, revealed = await self._endpoint.service.revise(watcher)
        if revealed:
            self._push(partial(self._reveal, revealed))
        return _pack(self._messages((status, None) for status in told))

    async def _reveal(self, users: list[str]) -> list[bytes]:
        _, watcher = self._connected
        return await self._snapshot([user for user in users if user in watcher.hidden])  # a subscription may have, too

    async def revise(self) -> None:
        """Look again whom this client may see."""
        watcher = self._watcher
        if watcher and watcher.told:
            visible = await self._endpoint.service.visible(watcher.session.user)
            if visible is not watcher.visible and visible != watcher.visible and not self._revising:
                self._revising = True
                self._push(self._revised)
            elif watcher.has_news:  # the directory could not be asked when it came
                self._wake()

    # Writing

    def _push(self, item: Outgoing) -> None:
        if not self._ending:
            self._out.append(item)
            self._wake()

    def _wake(self) -> None:
        if not self._ready and self._writer is None and not self._ending:
            self._ready = True
            self._endpoint.ready(self)

    def flush(self) -> None:
        """Write what can be written at once; for the rest there is a task."""
        self._ready = False
        if self._writer is not None or self._ending:
            return
        self._write_now(self._out)
        flips: list[bytes] = []
        if not self._out and self._transport.clear and not self._endpoint.service.rules.contacts_only:
            flips = self._flips()
            self._write_now(flips)
            rest = bool(flips)
        else:
            rest = bool(self._out) or self._has_news
        self._make_room()
        if rest:
            self._writer = asyncio.create_task(self._write(flips))

    def _write_now(self, items: list[bytes] | list[Outgoing]) -> None:
        while items and isinstance(data := items[0], bytes) and self._transport.write(self._wrapped(data)):
            items.pop(0)
            self._stomp.sent(time.monotonic())

    def _make_room(self) -> None:
        if self._room and len(self._out) < OUT_LIMIT:
            self._room.set()
            self._room = None

    async def _write(self, first: list[bytes]) -> None:
        try:
            for data in first:
                await self._transmit(data)
            while True:
                news = not self._out
                item = self._news if news else self._out.pop(0)
                if isinstance(item, bytes):
                    messages: bytes | list[bytes] = item
                else:
                    self._waiting = True
                    messages = await item()
                    self._waiting = False
                    if news and not messages and not self._out:  # which may have grown meanwhile
                        return
                for data in [messages] if isinstance(messages, bytes) else messages:
                    if data:
                        await self._transmit(data)
                self._make_room()
        except TimeoutError:
            self._abort("slow reader")
        except DirectoryUnavailable as error:
            log.info("a client is told later: %s", error)  # `revise` comes again
        except Exception:
            log.exception("writing to a client failed")
            self._abort("server error")
        finally:
            self._waiting = False
            self._writer = None
            if self._out:
                self._wake()

    async def _transmit(self, data: bytes) -> None:
        async with asyncio.timeout(self._endpoint.limits.send_seconds):
            await self._send({"type": "websocket.send", "text": self._wrapped(data).decode()})
        self._stomp.sent(time.monotonic())

    def _wrapped(self, data: bytes) -> bytes:
        return sockjs.wrap(data.decode()).encode() if self._is_sockjs else data

    # Time

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._ending and self._task is not None:
            at = min(self._ping_at, self._stomp.timer_at or self._ping_at)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(loop.time() + max(0.0, at - time.monotonic()), self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        try:
            beat = self._stomp.handle_timer(now)
        except StompError as error:
            return self._fail(error)
        if beat and self._waiting:  # the writer waits for the store: the beat goes past it
            self._endpoint.spawn(self._past(self._transmit(beat)))
        elif beat:
            self._push(beat)
        if now >= self._ping_at:
            self._ping_at = now + self._endpoint.limits.ping_seconds
            if not self._pinging:
                self._pinging = True
                self._endpoint.spawn(self._past(self._ping()))
        self._arm()

    async def _ping(self) -> None:
        async with asyncio.timeout(self._endpoint.limits.send_seconds):
            await self._transport.ping()
        self._pinging = False

    async def _past(self, sending: Awaitable[None]) -> None:
        """Send something past the writer."""
        try:
            await sending
        except TimeoutError:
            self._abort("slow reader")

    # Ending

    def _fail(self, error: StompError) -> None:
        """ERROR, then close (WIRE §6); the session ends as with a lost connection."""
        if not self._ending:
            expires_at = self._stomp.expires_at
            self._lose(token_expired=expires_at is not None and time.monotonic() >= expires_at)
            self.finish(error.code, error.message, patience=LINGER, last=self._stomp.error(error))

    def _abort(self, reason: str) -> None:
        """Nothing can be written: leave without a word."""
        log.info("a client is dropped: %s", reason)
        self._lose()
        if not self._ending and self._task is not None:
            self._ending = True
            self._task.cancel()
        self._transport.abort()

    def finish(self, code: int, reason: str, *, patience: float, last: bytes = b"") -> None:
        """Send ``last`` and close, once what is queued has been written, or ``patience`` s have gone by."""
        if self._ready:
            self.flush()
        if not self._ending:
            self._ending = True
            self._endpoint.spawn(self._finish(code, reason, patience, last))

    async def _finish(self, code: int, reason: str, patience: float, last: bytes) -> None:
        writer, task = self._writer, self._task
        if task is None:
            return  # gone already
        if writer is not None:
            await asyncio.wait({writer}, timeout=patience)
            writer.cancel()
        reason = reason.encode()[:120].decode(errors="ignore")  # RFC 6455 §5.5: control frames are short
        try:
            async with asyncio.timeout(LINGER):
                if last:
                    await self._transmit(last)
                if self._is_sockjs:
                    await self._send({"type": "websocket.send", "text": sockjs.closing(code, reason)})
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
            # What the client still sends is read, for a moment: closing before that would reset the connection, and the
            # ERROR frame might be lost with it.
            await asyncio.wait({task}, timeout=LINGER)
        except TimeoutError:
            log.info("a client is dropped: it takes in no close")
        if self._task is not None:
            self._task.cancel()
            self._transport.abort()

    def _lose(self, *, token_expired: bool = False) -> None:
        """The session's connection is gone."""
        if self._session is None:
            return
        service = self._endpoint.service
        self.note_input()
        if token_expired:
            service.token_expired(self._session)
        else:
            service.connection_lost(self._session)

    def note_input(self) -> None:
        """Take over into the session when the last byte came in."""
        if self._session is not None:
            self._session.last_input = self._stomp.heard_at

    def _gone(self) -> None:
        self._task = None
        self._transport.leave()
        self._endpoint.clients.discard(self)
        self._lose()
        if self._timer is not None:
            self._timer.cancel()
        self._out.clear()
        if self._writer is not None:
            self._writer.cancel()
        if self._watcher is not None:
            self._watcher.leave()
            self._endpoint.service.unwatch(self._watcher, list(self._watcher.session.watched))


async def _after(effect: Future[None], receipt: bytes) -> bytes:
    await asyncio.shield(effect)
    return receipt


def _pack(frames: Iterable[bytes]) -> list[bytes]:
    """Join frames into messages of about `PACK_BYTES`."""
    out: list[bytes] = []
    pack: list[bytes] = []
    size = 0
    for frame in frames:
        pack.append(frame)
        size += len(frame)
        if size >= PACK_BYTES:
            out.append(b"".join(pack))
            pack, size = [], 0
    return [*out, b"".join(pack)] if pack else out


def _body(event: stomp.Send) -> dict[str, Any]:
    """Return the JSON object in the body."""
    try:
        body = json.loads(event.body)
    except (ValueError, RecursionError):
        raise StompError(f"body of SEND to {event.destination} is not JSON", 1008) from None
    if not isinstance(body, dict):
        raise StompError(f"body of SEND to {event.destination} is not a JSON object", 1008)
    return body
