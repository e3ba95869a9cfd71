"""The server is restarted as on a deployment, with `--restart COMMAND` or from outside; nobody is to go offline."""

from __future__ import annotations

import logging
import shlex
import subprocess

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["ProbeUser", "Rolling"]

log = logging.getLogger(__name__)


class Rolling(FleetUser):
    """Does a planned restart go unnoticed?"""

    sheltered = True

    def script(self) -> None:
        self.arrive()
        self.phase("hold")
        self.pause(self.options.hold)
        self.phase("rolling restart")
        if self.options.restart is None:
            log.info("No --restart: the server is to be restarted from outside, now")
            self.wait_for_ever()
        if self.place == 0:
            self.crowd.counts["planned restarts"] += 1
            done = subprocess.run(shlex.split(self.options.restart), check=False)
            if done.returncode:
                log.error("--restart: exit code %d", done.returncode)
        self.pause(self.setting("every"))
        self.wait_for(self.is_complete, 120.0)
        self.phase("hold after the restart")
        self.wait_for_ever()
