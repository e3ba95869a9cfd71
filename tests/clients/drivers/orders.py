"""The orders for a client, one a line on standard input, and what it tells, one a line on standard output, as JSON."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()


def read() -> Iterator[dict[str, Any]]:
    """Iterate over the orders."""
    for line in sys.stdin:
        yield json.loads(line)


def tell(client: str, saw: str, **more: Any) -> None:
    """Tell what ``client`` saw."""
    with _lock:
        sys.stdout.write(json.dumps({"client": client, "saw": saw, **more}) + "\n")
        sys.stdout.flush()
