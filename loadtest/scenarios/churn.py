"""Users who hardly stay: many connects, disconnects and lost connections a second."""

from __future__ import annotations

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["Churn", "ProbeUser"]


class Churn(FleetUser):
    """How many comings and goings a second are told in time?"""

    stay = 20.0
    away = 5.0
