"""The presence server, noting for how long each callback of its loop runs: ``python -m benchmarks.timed``.

At its end it writes the CPU time of each, in ms, to the file named by ``BENCHMARK_HOLDS``; those below 1 ms as one
count in the first line.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from presence import bootstrap, settings

_run = asyncio.Handle._run
_short = 0
_long: list[float] = []


def _timed(handle: asyncio.Handle) -> None:
    global _short  # noqa: PLW0603 - as cheap as may be
    began = time.thread_time()
    _run(handle)
    took = time.thread_time() - began
    if took < 0.001:
        _short += 1
    else:
        _long.append(took * 1000)


if __name__ == "__main__":
    asyncio.Handle._run = _timed  # type: ignore[method-assign, assignment]
    try:
        bootstrap.serve(settings.load())
    finally:
        Path(os.environ["BENCHMARK_HOLDS"]).write_text("\n".join(map(str, [_short, *sorted(_long)])))
