"""How many ids a user may ask for, REST and STOMP together (WIRE §6)."""

from __future__ import annotations

from presence.stomp.bucket import TokenBucket

MANY = 10_000  # users remembered before those whose bucket is full are forgotten


class IdBudget:
    """One bucket a user: ``per_second`` ids sustained, ``burst`` at once."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._buckets: dict[str, TokenBucket] = {}
        self._prune_at = MANY

    def take(self, user: str, ids: int, now: float) -> float:
        """Take ``ids`` for ``user`` at ``now`` (monotonic s). Returns 0, or in how many s there will be that many."""
        bucket = self._buckets.get(user)
        if bucket is None:
            if len(self._buckets) >= self._prune_at:
                self._buckets = {name: kept for name, kept in self._buckets.items() if not _full(kept, now)}
                self._prune_at = max(MANY, 2 * len(self._buckets))
            bucket = self._buckets[user] = TokenBucket(self._per_second, self._burst)
        ids = min(ids, int(self._burst))
        return 0.0 if bucket.take(ids, now) else max(bucket.wait(ids), 0.001)


def _full(bucket: TokenBucket, now: float) -> bool:
    bucket.take(0, now)
    return bucket.wait(bucket.burst) == 0
