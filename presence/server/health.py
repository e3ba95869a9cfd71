"""Liveness and readiness: each dependency with its state, since when, and how far it is behind."""

from __future__ import annotations

from collections.abc import Mapping

from presence.core.model import rfc3339
from presence.ports import Health

LAGGING = 5.0  # s behind the changes, from which on a dependency is degraded


def readiness(dependencies: Mapping[str, Health], *, stopping: bool) -> tuple[dict[str, object], int]:
    """Return the body and the status: 503 while the presence store cannot be reached, or the server stops."""
    ready = dependencies["store"].state in ("up", "degraded") and not stopping
    described = {name: _described(health) for name, health in dependencies.items()}
    status = "stopping" if stopping else "ready" if ready else "not ready"
    return {"status": status, "dependencies": described}, 200 if ready else 503


def _described(health: Health) -> dict[str, object]:
    state = "degraded" if health.state == "up" and (health.lag or 0) > LAGGING else health.state
    described: dict[str, object] = {"state": state, "since": rfc3339(int(health.since * 1000))}
    if health.lag is not None:  # why is in the log, for the operator
        described["lagSeconds"] = round(health.lag, 1)
    if health.unread is not None:
        described["unread"] = health.unread
    return described
