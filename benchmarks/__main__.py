"""``python -m benchmarks [ROW …]``: prints the table of docs/performance.md, or some of its rows."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks import fleet, rows
from benchmarks.measure import DRIVER_CORE, PAIRS, SERVER_CORE, pin
from tests.support.server import ROOT

JARS = [
    ROOT / "tests/support/java" / name / "target/installed" for name in ("kafka", "cassandra")
]  # `make` fetches them
ROWS = rows.ROWS | (fleet.ROWS if all(jar.exists() for jar in JARS) else {})


def main(names: list[str]) -> None:
    """Measure the rows with these names; all if there are none."""
    if wrong := [name for name in names if name not in ROWS]:
        sys.exit(f"no such row: {', '.join(wrong)}; there are {', '.join(ROWS)}")
    pin(os.getpid(), DRIVER_CORE)
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ", ".join(f"{name} {version(name)}" for name in ("hypercorn", "quart", "redis", "uvicorn"))
    print(f"{os.cpu_count()} × {model.partition(': ')[2]}, Python {platform.python_version()}, {packages}")
    print(f"server on core {SERVER_CORE}, driver and Redis on core {DRIVER_CORE}; median of {PAIRS} pairs (range)\n")
    print("| what | this server | baseline | ratio | aim | |\n|---|---|---|---|---|---|")
    began = time.monotonic()
    for name in names or ROWS:
        for row in asyncio.run(ROWS[name]()):
            print(row.line(), flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
