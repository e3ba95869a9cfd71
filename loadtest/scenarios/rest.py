"""REST beside the crowd: `friends`, `batch` and `check`, and what they say is held against the truth."""

from __future__ import annotations

import math
import random
from typing import Any

import gevent  # type: ignore[import-untyped]

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeError, ProbeUser, RestClient, is_online, timed
from loadtest.workload import arrivals

__all__ = ["ProbeUser", "Rest"]

_BATCH = 50  # ids
_MIX = ("friends", "batch", "check"), (5, 3, 2)


class Rest(FleetUser):
    """How long do REST's answers take, and are they true?"""

    stay = 300.0

    def script(self) -> None:
        self.arrive()
        self.phase("REST mix")
        self._idle = [RestClient(instance) for instance in self.crowd.target.instances]
        start = self.crowd.engine.now()
        rate = self.options.rest_rate / self.processes
        moments = arrivals(rate, start, math.inf, dice=random.Random(self.seed))
        self.crowd.keep_to(((at, self.dice.choices(*_MIX)[0]) for at in moments), self._begin)
        self.wait_for_ever()

    def _begin(self, kind: str, intended: float) -> None:
        if not self.crowd.quiet:
            # A greenlet for each: a slow answer holds up no later request.
            gevent.spawn(self._ask, kind, intended)

    def _ask(self, kind: str, intended: float) -> None:
        client = self._idle.pop(0) if self._idle else RestClient(self.dice.choice(self.crowd.target.instances))
        sent = client.sent
        timed(self.recording.metrics, f"REST {kind}", lambda: self._compare(client, kind), intended)
        if client.sent > sent:
            self.crowd.counts["offered"] += 1
            self.crowd.counts["made"] += 1
        else:
            self.crowd.counts["prevented"] += 1
        self._idle.append(client)

    def _compare(self, client: RestClient, kind: str) -> None:
        users = [session.user for session in self.dice.sample(self.crowd.sessions, min(_BATCH, self.size))]
        token = self.crowd.target.token(users[0])
        asked = self.crowd.engine.now()
        answer: Any
        if kind == "batch":
            answer = client.request("POST", "/api/presence/batch", token, users)
        elif kind == "friends":
            answer = client.request("GET", "/api/presence/friends", token)
        else:
            answer = {users[0]: client.request("GET", f"/api/presence/check/{users[0]}", token)}
        at = self.crowd.engine.now()
        if not isinstance(answer, dict):
            raise ProbeError("an answer of the wrong shape")
        for user, said in answer.items():
            online = is_online(said)
            if user in self.crowd.by_user:
                self.ledger.checked(user, online, asked, at)
