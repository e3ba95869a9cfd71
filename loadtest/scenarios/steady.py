"""An ordinary day: the crowd beats, and its users come and go."""

from __future__ import annotations

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["ProbeUser", "Steady"]


class Steady(FleetUser):
    """Are all told in time while users come and go as on an ordinary day?"""

    stay = 600.0
    away = 60.0
