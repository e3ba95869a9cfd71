"""The server is restarted as on a deployment, with `--restart COMMAND` or from outside; nobody is to go offline."""

from __future__ import annotations

import logging
import math
import shlex
import subprocess

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["ProbeUser", "Rolling"]

LIMIT = 120.0
"""Seconds that the command may take."""

log = logging.getLogger(__name__)


class Rolling(FleetUser):
    """Does a planned restart go unnoticed?"""

    sheltered = True
    closed_before = math.inf
    """Connections that the server had closed before the restart."""

    def script(self) -> None:
        self.arrive()
        self.phase("hold")
        self.pause(self.options.hold)
        self.phase("rolling restart")
        self.closed_before = self._closed()
        if self.options.restart is None:
            log.info("No --restart: the server is to be restarted from outside, now")
            self.wait_for(self.is_restarted, math.inf)
            self.crowd.counts["planned restarts"] += self.place == 0
        elif self.place == 0:
            self._restart(self.options.restart)
        self.pause(self.setting("every"))
        self.wait_for(self.is_back, 120.0)
        self.phase("hold after the restart")
        self.wait_for_ever()

    def is_restarted(self) -> bool:
        """Whether the server has closed a connection since it was to be restarted."""
        return self._closed() > self.closed_before

    def lacking(self) -> str | None:
        return None if self.is_restarted() else "The server was not restarted: it closed no connection."

    def _closed(self) -> int:
        return sum(count for name, count in self.crowd.counts.items() if name.startswith("closed: "))

    def _restart(self, command: str) -> None:
        try:
            subprocess.run(shlex.split(command), check=True, timeout=LIMIT)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.recording.fail(f"--restart failed: {error}")
        else:
            self.crowd.counts["planned restarts"] += 1
