"""The record of a run: what every client did and saw, what was broken when, and what the stores said at the end.

No I/O and no clock. As a file it is JSON lines: the settings first, then one event a line, in the order in which they
were noted. Fields that have their default are left out. All times are s of one monotonic clock, 0 at the start.

====================  ==================================================================================================
``what``              meaning; further fields
====================  ==================================================================================================
``connecting``        CONNECT is about to be sent: ``session`` (an id of the record's own, one for each connection),
                      ``user``, ``instance``
``connected``         CONNECTED was read: ``session``
``refused``           the connection ended before: ``session``, ``why``
``beat``              a heartbeat is about to be sent: ``session``, ``ref`` if a receipt was asked for
``off``, ``on``       a sign-off or sign-on is about to be sent: likewise
``receipt``           ``session``, ``ref``
``left``              DISCONNECT is about to be sent; ``closed``: the client closes without; ``died``: its TCP
                      connection is about to be reset: ``session``
``cut``               the network lets nothing through any more, and nobody is told: ``session``
``lost``              the connection has ended, and not by the client: ``session``, ``why``
``subscribed``        SUBSCRIBE is about to be sent: ``session``, ``subscription``
``watching``          a watch of ``users`` is about to be sent: ``session``; ``watched``: its receipt came: ``session``,
                      ``users``; ``unwatched``: an end of the watch is about to be sent: ``session``, ``users``
``told``              a MESSAGE: ``session``, ``subscription``, ``user``, ``online``, ``version``, ``snapshot``
``polled``            REST on an ``instance`` was asked ``seconds`` before, and says: ``user``, ``online``; or for
                      all of them ``how``: unknown, a 503
``change``            a change in the store's stream: ``user``, ``online``, ``version``, ``why``; it had not been there
                      when the stream was looked at ``seconds`` before
``amnesty``           the store has begun an amnesty at ``at`` by its clock, that lasts for ``seconds``
``stalled``           from ``at`` on the process of the clients did nothing for ``seconds``
``fault``             something is about to be broken: ``on`` (redis, kafka, cassandra, or the name of an instance),
                      ``how`` (killed, frozen, stopped: as planned, emptied: killed, and its data are lost, failed
                      over: killed, and what takes its place lacks the last writes)
``mended``            it works again: ``on``
``recovered``         every instance says for certain again who is offline
``end``               nobody does anything any more, all should have settled
``store``             at the end the store says: ``user``, ``online``; who is not named is offline
``rest``              at the end REST says on an ``instance``: ``user``, ``online``
``row``               at the end a history store says: ``user``, ``online``, ``version``, ``instance`` if it is its own
``kept``              at the end a history store keeps of a user's changes: likewise
``log``               Kafka's log, of each partition in order: ``user``, ``online``, ``version``
====================  ==================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

_SESSIONS = {
    "connecting",
    "connected",
    "refused",
    "beat",
    "off",
    "on",
    "receipt",
    "left",
    "closed",
    "died",
    "cut",
    "lost",
}
_WATCHERS = {"subscribed", "watching", "watched", "unwatched", "told"}
_STORES = {"polled", "change", "amnesty", "stalled", "recovered", "end", "store", "rest", "row", "kept", "log"}
EVENTS = frozenset(_SESSIONS | _WATCHERS | _STORES | {"fault", "mended"})


class HistoryError(Exception):
    """A file is no history. One line, which names the line of the file."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings that the rules depend on; all times in s."""

    lease: float = 2.0
    amnesty: float = 2.0
    drain: float = 2.0
    unix: float = 0.0
    """The store's clock (Unix epoch) when the record's was 0."""
    behind: float = 0.0
    """How much earlier it is by the clock of what takes the store's place in a fail-over."""
    relayed: bool = False
    """Changes go through Kafka, whose log is in the record."""
    takeover: float = 0.0
    """By then another instance brings the changes to Kafka, when the one that did is killed, stopped or frozen."""
    retry: float = 0.0
    """By then, once Kafka is back, whoever writes or reads there has tried anew."""
    instances: tuple[str, ...] = ()
    """Each is asked over REST at the end."""
    histories: tuple[str, ...] = ()
    """Names of the history stores, each of which is read at the end."""
    seed: str = ""
    name: str = ""
    """Of the fault, for the reader."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; the module says which fields go with which."""

    at: float
    what: str
    session: str = ""
    user: str = ""
    instance: str = ""
    ref: int = 0
    subscription: str = ""
    users: tuple[str, ...] = ()
    online: bool = False
    version: int = 0
    snapshot: bool = False
    on: str = ""
    how: str = ""
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return json.dumps(_written(self), ensure_ascii=False)


_DEFAULTS = {one.name: one.default for one in fields(Event) if one.default is not MISSING}
# `online: false` is said: it is what a reader looks for.
_ALWAYS = dict.fromkeys(("told", "polled", "change", "store", "rest", "row", "kept", "log"), "online")


def _written(event: Event) -> dict[str, Any]:
    always = _ALWAYS.get(event.what)
    out: dict[str, Any] = {"at": round(event.at, 4), "what": event.what}
    for name, default in _DEFAULTS.items():
        value = getattr(event, name)
        if value != default or name == always:
            out[name] = value
    return out


@dataclass
class History:
    """A run: its settings and its events, in the order in which they were noted."""

    setup: Setup = field(default_factory=Setup)
    events: list[Event] = field(default_factory=list)

    def note(self, at: float, what: str, **rest: Any) -> None:
        """Add an event."""
        self.events.append(Event(at, what, **rest))

    def lines(self) -> Iterator[str]:
        """The history as a file's lines; the event with index i is line i + 2."""
        yield json.dumps(asdict(self.setup)) + "\n"
        for event in self.events:
            yield f"{event}\n"

    @classmethod
    def parse(cls, lines: Iterable[str]) -> History:
        """Read a file's lines.

        Raises:
            HistoryError: they are no history.
        """
        history: History | None = None
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                if history is None:
                    setup = Setup(**content)
                    instances, histories = tuple(setup.instances), tuple(setup.histories)
                    history = cls(replace(setup, instances=instances, histories=histories))
                    continue
                event = Event(**content | {"users": tuple(content.get("users", ()))})
                if event.what not in EVENTS:
                    raise HistoryError(f"line {number}: there is no event {event.what!r}")
            except (ValueError, TypeError) as error:
                raise HistoryError(f"line {number}: {error}") from None
            history.events.append(event)
        if history is None:
            raise HistoryError("line 1: the settings are missing")
        return history
