"""Connecting ever faster, up to `--connect-rate`: at which rate does it begin to take longer?"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser
from loadtest.workload import RISING, Action, beats

__all__ = ["ProbeUser", "Ramp"]


class Ramp(FleetUser):
    """How many can connect in a second?"""

    ramps = RISING

    def actions(self) -> Iterator[Action]:
        dice = random.Random(self.seed)

        def visit(session: int) -> Iterator[Action]:
            start = self.ramp * math.sqrt(session / self.size)
            yield Action(start, "connect", session)
            moments = beats(start, math.inf, period=self.setting("period"), jitter=self.options.jitter, dice=dice)
            for at in moments:
                yield Action(at, "beat", session)

        return heapq.merge(*(visit(session) for session in range(self.size)))
