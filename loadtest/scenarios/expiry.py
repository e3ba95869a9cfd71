"""A share of the users freezes with the connection open: no beat comes, and only the end of the lease tells."""

from __future__ import annotations

import itertools
import math

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["Expiry", "ProbeUser"]


class Expiry(FleetUser):
    """How long after the end of its lease is a user shown offline, when many leases end together?"""

    over_at = math.inf
    """When all leases of those who froze first are over."""

    def script(self) -> None:
        self.arrive()
        for turn in itertools.count(1):
            number = f" {turn}" if turn > 1 else ""
            self.phase(f"hold{number}")
            self.pause(self.options.hold)
            self.phase(f"expiry{number}")
            frozen = self.some()
            for session in frozen:
                self.crowd.mute(session)
            self.over_at = min(self.over_at, self.crowd.engine.now() + self.crowd.target.lease)
            self.pause(self.crowd.target.lease + self.options.late)
            self.phase(f"return{number}")
            for session in frozen:
                self.crowd.unmute(session, self.crowd.engine.now())
            self.pause(self.options.late)

    def lacking(self) -> str | None:
        is_over = self.crowd.engine.now() >= self.over_at
        return None if is_over else "The run ended before the leases had: give it more seconds."
