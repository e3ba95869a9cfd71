"""A token bucket. Free of clocks: the caller says what time it is."""

from __future__ import annotations


class TokenBucket:
    """Lets through ``rate`` units a second sustained, with bursts of ``burst``."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at: float | None = None  # s, any monotonic clock; None before the first call

    def take(self, units: float, now: float) -> bool:
        """Take ``units`` at ``now`` (s). False, and nothing is taken, when there are not that many."""
        if self._at is not None:
            self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        if units > self._left:
            return False
        self._left -= units
        return True

    def wait(self, units: float) -> float:
        """Return for how many s after the last call ``units`` will not be there."""
        return max(0.0, (min(units, self.burst) - self._left) / self.rate)
