"""Browsers' hidden tabs: their timers fire once a minute, and a lease of a minute may end before the beat comes."""

from __future__ import annotations

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["Background", "ProbeUser"]


class Background(FleetUser):
    """How often does one go offline who beats once a minute?"""

    period = 60.0
