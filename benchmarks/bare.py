"""Serves a baseline as the presence server is served, settings and all: ``python -m benchmarks.bare APP PORT``."""

from __future__ import annotations

import asyncio
import importlib
import sys

from hypercorn.asyncio import serve

from presence import bootstrap
from presence.settings import load


def main(app: str, port: str) -> None:
    """Serve ``benchmarks.baselines.APP:app`` until the process is ended."""
    settings = load(port=int(port))
    config = bootstrap._config(settings, bootstrap._listen(settings, shared=False))
    asyncio.run(serve(importlib.import_module(f"benchmarks.baselines.{app}").app, config))


if __name__ == "__main__":
    main(*sys.argv[1:])
