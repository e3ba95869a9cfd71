"""An idle crowd: it connects, watches its friends, and beats."""

from __future__ import annotations

from loadtest.fleet import FleetUser
from loadtest.probe import ProbeUser

__all__ = ["Hold", "ProbeUser"]


class Hold(FleetUser):
    """How many sessions are held, and what does one cost?"""
