"""The server's side of one STOMP connection. No I/O and no clock: bytes and ``now`` in, events and bytes out.

All times are seconds of one monotonic clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from presence.stomp.bucket import TokenBucket
from presence.stomp.errors import StompError
from presence.stomp.frames import Frame, Limits, Parser, encode

VERSIONS = ("1.0", "1.1", "1.2")

_ACK_MODES = frozenset({"auto", "client", "client-individual"})
_HEART_BEAT = re.compile(r"([0-9]{1,18}),([0-9]{1,18})")
# The sender "MUST send new data at least every <n> milliseconds": aiming a little below leaves room for a late timer
# and for the way, as there are clients that check to the millisecond.
_EARLY = 0.9
# "the receiver SHOULD be tolerant and take into account an error margin". There are clients that beat 1.5 times as
# slowly as agreed, and clients expect a margin of 3 from other servers (WIRE §3).
_MARGIN = 3
_PLAIN = str.maketrans(":\\", ",/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a frame asks of the server."""

    receipt: str | None = None
    """Receipt id that the frame carries, for the ERROR frame if its effect fails."""
    acknowledge: bool = False
    """A RECEIPT is owed once the effect has been taken."""


@dataclass(frozen=True, slots=True)
class Connect(Event):
    """The client wants to be connected. Answer with `Connection.connected`, or with an error."""

    headers: Mapping[str, str]
    version: str


@dataclass(frozen=True, slots=True)
class Subscribe(Event):
    """A subscription was made: ``Connection.subscriptions[id]``."""

    id: str
    destination: str


@dataclass(frozen=True, slots=True)
class Unsubscribe(Event):
    """There is no subscription under ``id`` any more, if ever there was."""

    id: str


@dataclass(frozen=True, slots=True)
class Send(Event):
    """A message for the server."""

    destination: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Disconnect(Event):
    """The client goes. It closes once it has its RECEIPT; nothing more is read from it."""


@dataclass(frozen=True, slots=True)
class Nothing(Event):
    """A frame without effect outside, which is to be acknowledged in its turn."""


class Subscription:
    """One subscription of a connection."""

    __slots__ = ("_acked", "_head", "ack", "destination", "id")

    def __init__(self, id: str | None, destination: str, ack: str, version: str) -> None:  # noqa: A002
        self.id = id
        """None for a 1.0 client that gave none."""
        self.destination = destination
        self.ack = ack
        """``auto``, ``client`` or ``client-individual``."""
        headers = {"destination": destination, "content-type": "application/json"}
        if id is not None:
            headers["subscription"] = id
        self._head = encode("MESSAGE", headers, version=version).removesuffix(b"\n\0")
        # 1.2: "If the message is received from a subscription that requires explicit acknowledgment [...] then the
        # MESSAGE frame MUST also contain an ack header".
        self._acked = ack != "auto" and version == "1.2"

    def message(self, number: int, body: bytes) -> bytes:
        """Return the MESSAGE frame that brings ``body`` (JSON); its message-id is ``number``."""
        ack = b"ack:%d\n" % number if self._acked else b""
        return b"%bmessage-id:%d\n%bcontent-length:%d\n\n%b\0" % (self._head, number, ack, len(body), body)


class Connection:
    """State of one STOMP connection, as STOMP and WIRE §3, §5, §6 have it.

    The caller has one timer, set to `timer_at`, and calls `handle_timer` when it fires. It looks at `timer_at` again
    after that, after `connected` and after it has set `expires_at`; input only ever puts the moment off.
    """

    def __init__(
        self,
        *,
        now: float,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        beat_seconds: float = 10.0,
        silence_seconds: float = 90.0,
    ) -> None:
        """Begin a connection that was opened at ``now``.

        Args:
            now: the present moment.
            limits: what the client may send.
            beat_seconds: heart-beats that the server offers, both ways; 0 for none.
            silence_seconds: least silence after which the connection counts as lost; 0: heart-beats alone decide.
        """
        self.version: str | None = None
        """STOMP version agreed; None before `connected`."""
        self.subscriptions: dict[str, Subscription] = {}
        """By id; by destination where a 1.0 client gave no id."""
        self.expires_at: float | None = None
        """When the client's token ends, leeway included; None: never."""
        self.heard_at = now
        """When the last byte came in."""
        self._limits = limits
        self._parser = Parser(limits)
        self._bucket = TokenBucket(limits.frames_per_second, limits.frames_burst)
        self._beat_ms = round(beat_seconds * 1000)
        self._silence_seconds = silence_seconds
        self._connect: Connect | None = None  # received; not yet answered as long as there is no version
        self._client_beats = (0, 0)  # ms: between those it can send, and those it wants
        self._connect_by = now + limits.connect_seconds
        self._beat_every = 0.0  # s between two beats to the client; 0: none
        self._silent_after = 0.0  # s of silence tolerated; 0: any
        self._sent_at = now
        self._transactions: dict[str, list[Event]] = {}  # SENDs held, by transaction
        self._messages = 0  # sent so far; their message-ids
        self._over = False

    # Input.

    def receive(self, data: bytes, now: float) -> Iterator[Event]:
        """Take in bytes and yield what the frames among them ask for.

        Take the effect of each event, and send its receipt if one is owed, before going on to the next.

        Raises:
            StompError: the connection is to end with `error` and a close.
        """
        if self._over:
            return  # "Clients MUST NOT send any more frames after the DISCONNECT frame is sent."
        if data:
            self.heard_at = now  # "any new data received [...] is an indication that the remote end is alive"
        self._parser.feed(data)
        try:
            for frame in iter(self._parser.next_frame, None):
                yield from self._handle(frame, now)
                if self._over:
                    return
        except StompError:
            self._over = True
            raise

    def _handle(self, frame: Frame, now: float) -> Iterator[Event]:
        # "Any client frame other than CONNECT MAY specify a receipt header".
        receipt = None if frame.command in {"CONNECT", "STOMP"} else frame.headers.get("receipt")
        try:
            *held, event = self._take(frame, now)
        except StompError as error:
            error.receipt = receipt
            raise
        for send in held:
            yield replace(send, receipt=receipt)
        if receipt is not None:
            yield replace(event, receipt=receipt, acknowledge=True)
        elif not isinstance(event, Nothing):
            yield event

    def _take(self, frame: Frame, now: float) -> Sequence[Event]:
        """Take the frame's effect on this state. Return its events; a receipt acknowledges the last."""
        if not self._bucket.take(1, now):
            raise StompError(f"more than {self._limits.frames_per_second:g} frames a second", 1008)
        handler = self._HANDLERS.get(frame.command)
        if handler is None:
            raise StompError(f"unknown command {frame.command[:32]}", 1002)
        if self.version is None and handler is not Connection._accept:
            raise StompError(f"{frame.command} before CONNECT", 1002)
        return handler(self, frame)

    def _accept(self, frame: Frame) -> Sequence[Event]:
        if self._connect is not None:
            raise StompError(f"{frame.command} on a connection that has had one", 1002)
        # "If the accept-version header is missing, it means that the client only supports version 1.0".
        offered = {version.strip() for version in frame.headers.get("accept-version", "1.0").split(",")}
        version = max(offered.intersection(VERSIONS), default=None)
        if version is None:
            known = ",".join(VERSIONS)
            raise StompError(f"accept-version has none of {known}", 1002, headers={"version": known})
        # There was no version by which to read the headers; 1.0 knows padding, and no heart-beats.
        headers = {n.strip(): v.strip() for n, v in frame.headers.items()} if version == "1.0" else frame.headers
        # "A missing heart-beat header MUST be treated the same way as a "heart-beat:0,0" header".
        beats = _HEART_BEAT.fullmatch("0,0" if version == "1.0" else headers.get("heart-beat", "0,0"))
        if beats is None:
            raise StompError("heart-beat is not two numbers of milliseconds", 1002)
        self._client_beats = int(beats[1]), int(beats[2])
        self._connect = Connect(headers, version)
        return (self._connect,)

    def _send(self, frame: Frame) -> Sequence[Event]:
        send = Send(_need(frame, "destination"), frame.headers, frame.body)
        if "transaction" not in frame.headers:
            return (send,)
        held = self._transaction(frame)
        if sum(map(len, self._transactions.values())) >= self._limits.held_sends:
            raise StompError(f"more than {self._limits.held_sends} SENDs in transactions", 1008)
        held.append(send)
        return (Nothing(),)

    def _subscribe(self, frame: Frame) -> Sequence[Event]:
        key, destination = self._key(frame), _need(frame, "destination")
        ack = frame.headers.get("ack", "auto")
        if ack not in _ACK_MODES:
            raise StompError(f"ack is none of auto, client, client-individual, {ack[:32]}", 1002)
        # "Within the same connection, different subscriptions MUST use different subscription identifiers."
        if key in self.subscriptions:
            raise StompError(f"SUBSCRIBE with the id of another subscription, {key[:64]}", 1002)
        if len(self.subscriptions) >= self._limits.subscriptions:
            raise StompError(f"more than {self._limits.subscriptions} subscriptions", 1008)
        self.subscriptions[key] = Subscription(frame.headers.get("id"), destination, ack, self._wire_version)
        return (Subscribe(key, destination),)

    def _unsubscribe(self, frame: Frame) -> Sequence[Event]:
        key = self._key(frame)
        self.subscriptions.pop(key, None)
        return (Unsubscribe(key),)

    def _begin(self, frame: Frame) -> Sequence[Event]:
        transaction = _need(frame, "transaction")
        # "Within the same connection, different transactions MUST use different transaction identifiers."
        if transaction in self._transactions:
            raise StompError(f"BEGIN of a transaction that is open, {transaction[:64]}", 1002)
        if len(self._transactions) >= self._limits.held_sends:
            raise StompError(f"more than {self._limits.held_sends} open transactions", 1008)
        self._transactions[transaction] = []
        return (Nothing(),)

    def _commit(self, frame: Frame) -> Sequence[Event]:
        held = self._transaction(frame)
        del self._transactions[frame.headers["transaction"]]
        return (*held, Nothing())

    def _abort(self, frame: Frame) -> Sequence[Event]:
        self._transaction(frame)
        del self._transactions[frame.headers["transaction"]]
        return (Nothing(),)

    def _ack(self, frame: Frame) -> Sequence[Event]:
        """Check an ACK or NACK. That is all: delivery does not depend on them."""
        _need(frame, "id" if self.version == "1.2" else "message-id")
        if self.version == "1.1":
            _need(frame, "subscription")
        if "transaction" in frame.headers:
            self._transaction(frame)
        return (Nothing(),)

    def _disconnect(self, _frame: Frame) -> Sequence[Event]:
        self._over = True
        return (Disconnect(),)

    def _key(self, frame: Frame) -> str:
        """Return under which key the subscription is that the frame names."""
        return _need(frame, "destination" if self.version == "1.0" and "id" not in frame.headers else "id")

    def _transaction(self, frame: Frame) -> list[Event]:
        """Return the SENDs held in the transaction that the frame names."""
        transaction = _need(frame, "transaction")
        if transaction not in self._transactions:
            raise StompError(f"{frame.command} in an unknown transaction, {transaction[:64]}", 1002)
        return self._transactions[transaction]

    _HANDLERS: ClassVar[Mapping[str, Callable[[Connection, Frame], Sequence[Event]]]] = {
        "CONNECT": _accept,
        "STOMP": _accept,
        "SEND": _send,
        "SUBSCRIBE": _subscribe,
        "UNSUBSCRIBE": _unsubscribe,
        "BEGIN": _begin,
        "COMMIT": _commit,
        "ABORT": _abort,
        "ACK": _ack,
        "NACK": _ack,
        "DISCONNECT": _disconnect,
    }

    # Output.

    def connected(self, *, session: str, server: str, user: str, now: float) -> bytes:
        """Accept the CONNECT that was received and return the CONNECTED frame."""
        connect = self._connect
        if connect is None:
            raise RuntimeError("no CONNECT was received")
        self.version = self._parser.version = connect.version
        self._connect = replace(connect, headers={})  # the token among them is not to be kept
        offered = self._beat_ms
        can, wants = self._client_beats
        # "if <cx> is 0 [...] or <sy> is 0 [...] then there will be none; otherwise, there will be heart-beats every
        # MAX(<cx>,<sy>) milliseconds. In the other direction, <sx> and <cy> are used the same way."
        agreed = max(can, offered) / 1000 if can and offered else 0.0
        self._silent_after = max(_MARGIN * agreed, self._silence_seconds)
        self._beat_every = _EARLY * max(offered, wants) / 1000 if wants and offered else 0.0
        self._sent_at = now
        # `heart-beat` always: there are clients that fail without it.
        headers = {
            "version": connect.version,
            "heart-beat": f"{offered},{offered}",
            "session": session,
            "server": server,
            "user-name": user,
        }
        return encode("CONNECTED", headers, version=connect.version)

    def receipt(self, receipt_id: str) -> bytes:
        """Return the RECEIPT frame for ``receipt_id``."""
        return encode("RECEIPT", {"receipt-id": receipt_id}, version=self._wire_version)

    def error(self, error: StompError) -> bytes:
        """Return the ERROR frame; whatever comes in after it is ignored."""
        self._over = True
        # WIRE §3: "Header values that we make contain no colon or backslash (old clients do not unescape)".
        headers = {"message": error.message.translate(_PLAIN), "content-type": "text/plain"}
        if error.receipt is not None:
            # "if the frame included a receipt header, the ERROR frame SHOULD set the receipt-id header to match".
            headers["receipt-id"] = error.receipt
        body = error.message.encode(errors="replace")
        return encode("ERROR", headers | dict(error.headers), body, version=self._wire_version)

    def message(self, subscription: Subscription, body: bytes) -> bytes:
        """Return the MESSAGE frame that brings ``body`` (JSON) to the subscription (WIRE §5)."""
        self._messages += 1
        return subscription.message(self._messages, body)

    @property
    def _wire_version(self) -> str:
        """The version to write in. Before one is known headers go out as they came in, verbatim: as in 1.0."""
        return self._connect.version if self._connect else "1.0"

    # Time.

    def sent(self, now: float) -> None:
        """Note that bytes were sent, which stands for a heart-beat."""
        self._sent_at = now

    @property
    def timer_at(self) -> float | None:
        """When `handle_timer` must be called next; None: not before something else happens."""
        moments = [moment for moment, _, _ in self._ends()]
        if self._beat_every and not self._over:
            moments.append(self._sent_at + self._beat_every)
        return min(moments, default=None)

    def handle_timer(self, now: float) -> bytes:
        """Return the heart-beat to send now, empty if none is due.

        Raises:
            StompError: 1008 ``token expired``, 1008 when no CONNECT came in time, 1002 ``silence``.
        """
        for moment, message, code in self._ends():
            if now >= moment:
                self._over = True
                raise StompError(message, code)
        if self._over or not self._beat_every or now < self._sent_at + self._beat_every:
            return b""
        self._sent_at = now
        return b"\n"  # "if the sender has no real STOMP frame to send, it MUST send an end-of-line (EOL)"

    def _ends(self) -> Iterator[tuple[float, str, int]]:
        """Iterate over what will end the connection if nothing happens: when, and with which error."""
        if self._over:
            return
        if self.expires_at is not None:
            yield self.expires_at, "token expired", 1008
        if self._connect is None:
            yield self._connect_by, f"no CONNECT within {self._limits.connect_seconds:g} s", 1008
        if self._silent_after:
            yield self.heard_at + self._silent_after, "silence", 1002


def _need(frame: Frame, header: str) -> str:
    if header not in frame.headers:
        raise StompError(f"{frame.command} without {header}", 1002)
    return frame.headers[header]
