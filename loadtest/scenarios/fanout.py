"""A celebrity, watched by the whole crowd, goes offline and online every few seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["Fanout", "ProbeUser"]


class Fanout(FleetUser):
    """How long until thousands of watchers have been told of one change?"""

    every = 2.0

    def watches(self) -> Mapping[int, Sequence[int]]:
        others = dict(super().watches())
        return {watcher: sorted({0, *others.get(watcher, ())}) for watcher in range(1, self.size)}

    def script(self) -> None:
        self.arrive()
        self.phase("fan-out")
        self.flip(self.crowd.sessions[0])
