"""All connections are lost at once, as when a proxy restarts; all return at once, and the next time spread."""

from __future__ import annotations

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser
from loadtest.validity import RETURN

__all__ = ["ProbeUser", "Storm"]


class Storm(FleetUser):
    """How long until all are back after all connections were lost at once?"""

    share = 1.0
    every = 10.0

    def script(self) -> None:
        self.arrive()
        for name, within in (("storm", 0.0), ("storm with jitter", self.setting("every"))):
            self.phase(f"hold before the {name}")
            self.pause(self.options.hold)
            self.phase(name)
            gone = self.some()
            for session in gone:
                self.crowd.leave(session, self.crowd.engine.now(), "lost")
            self.come_back(gone, within)
            self.pause(within + 0.1)
            self.wait_for(self.is_back, RETURN)
        self.phase("hold after the storms")
        self.wait_for_ever()
