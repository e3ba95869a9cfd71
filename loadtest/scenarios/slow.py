"""A share of the watchers reads nothing while a celebrity flips: are the others told as soon as ever?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gevent  # type: ignore[import-untyped]

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["ProbeUser", "Slow"]


class Slow(FleetUser):
    """Do those who read nothing delay those who do?"""

    every = 0.5
    share = 0.2
    stalled = False
    """Some read nothing, or did."""

    @property
    def first_slow(self) -> int:
        """Number of the first session that will read nothing; so will all after it."""
        return self.size - round(self.size * self.setting("share"))

    def watches(self) -> Mapping[int, Sequence[int]]:
        # The server may end a slow session at any moment, and it cannot be seen from here: nobody watches those.
        slow = self.first_slow
        watches = {watcher: [user for user in of if user < slow] for watcher, of in super().watches().items()}
        return {watcher: sorted({0, *watches.get(watcher, ())}) for watcher in range(1, self.size)}

    def script(self) -> None:
        self.arrive()
        flips = gevent.spawn(self.flip, self.crowd.sessions[0])
        try:
            self.phase("hold")
            self.pause(self.options.hold)
            self.phase("slow readers")
            slow = self.crowd.sessions[self.first_slow :]
            for session in slow:
                self.crowd.stall(session)
            self.stalled = True
            self.pause(3 * self.options.hold)
            self.phase("slow readers return")
            for session in slow:
                self.crowd.leave(session, self.crowd.engine.now(), "lost")
            self.come_back(slow, 1.0)
            self.wait_for_ever()
        finally:
            flips.kill(block=False)

    def lacking(self) -> str | None:
        return None if self.stalled else "The run ended before anybody had stopped reading: give it more seconds."
