"""What the runner works with: clauses, cases, what became of them."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Level(enum.Enum):
    """How strict a clause is (RFC 2119). The order is that of strictness."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    MAY = "MAY"


class Class(enum.Enum):
    """A conformance class: what the guide itself fixes, or the whole contract."""

    GUIDE = "guide"
    FULL = "full"


@dataclass(frozen=True)
class Clause:
    """One sentence that is true or false of a server (`spec/README.md`)."""

    id: str
    area: str
    level: Level
    conformance: Class
    sentence: str
    source: str
    unseen: str | None = None
    """Why no case can verify it from outside."""


@dataclass(frozen=True)
class Case:
    """A story with actors that verifies clauses (`cases/README.md`)."""

    id: str
    title: str
    clauses: Sequence[str]
    conformance: Class
    level: Level
    """The strictest of its clauses'."""
    steps: Sequence[Mapping[str, Any]]
    file: str
    """The name of the file it stands in, without its suffix: `watching`."""
    needs: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    policy: str = "anyone"
    friends: Mapping[str, Sequence[str]] = field(default_factory=dict)
    conversations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    alone: bool = False


class Outcome(enum.Enum):
    """What became of a case."""

    PASSED = "passed"
    FAILED = "failed"
    """The server did not do what a clause says."""
    ERROR = "error"
    """The suite's own fault, or the target could not be reached: it says nothing of the server."""
    UNSUPPORTED = "unsupported"
    """It is about a feature that the target declares as unsupported."""
    NOT_RUN = "not run"
    """The target lacks what the case needs, or it was not chosen."""


@dataclass(frozen=True)
class Entry:
    """One line of a transcript."""

    at: float
    """Seconds since the case began."""
    actor: str
    direction: str
    """`→` to the server, `←` from it, `·` of the runner: a step, a note."""
    text: str
    """A frame with its NUL shown as ␀, a request, an answer, or the step as it is written."""


@dataclass(frozen=True)
class Result:
    """What became of one case, with all that a reader needs in order to act on it."""

    case: Case
    outcome: Outcome
    seconds: float = 0.0
    step: int | None = None
    """Which step failed, counted from 1."""
    expected: str | None = None
    actual: str | None = None
    reason: str | None = None
    """Of an error, of what is unsupported or was not run: one line."""
    transcript: Sequence[Entry] = ()
    left: str | None = None
    """What of the target the case left broken, in one line: what came after it would not find a whole server."""


@dataclass(frozen=True)
class Run:
    """A whole run against one target."""

    target: str
    """Its file, as it was named."""
    summary: Mapping[str, Any]
    """Of the target: class, lease, policy, base URLs, unsupported features; no secrets."""
    version: str
    """Of the suite."""
    started: str
    """RFC 3339 UTC."""
    seconds: float
    results: Sequence[Result]
    clauses: Mapping[str, Clause]


NOT_CHOSEN = "not chosen"
"""How the reason ends of a case that the run's options left out; before it may stand by which."""
STOPPED = "another case had failed before"
TOO_LONG = "it waits for longer than a minute (--patient)"

SHORT_LEASE = 5.0
"""s: what `needs = ["short-lease"]` asks for."""
