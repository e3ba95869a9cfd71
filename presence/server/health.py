"""Liveness and readiness: each dependency with its state and since when."""

from __future__ import annotations

from collections.abc import Mapping

from presence.core.model import rfc3339
from presence.ports import Health


def readiness(dependencies: Mapping[str, Health], *, stopping: bool) -> tuple[dict[str, object], int]:
    """Return the body and the status: 503 while the presence store cannot be reached, or the server stops."""
    ready = dependencies["store"].state == "up" and not stopping
    described = {
        name: {"state": health.state, "since": rfc3339(int(health.since * 1000))}  # why is in the log, for the operator
        for name, health in dependencies.items()
    }
    status = "stopping" if stopping else "ready" if ready else "not ready"
    return {"status": status, "dependencies": described}, 200 if ready else 503
