"""The presence server under uvicorn in place of Hypercorn: ``python -m benchmarks.under_uvicorn``, settings as ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from hypercorn.config import Config

from presence import bootstrap, settings


async def serve(app: Any, config: Config, shutdown_trigger: Callable[[], Awaitable[object]]) -> None:
    """What `hypercorn.asyncio.serve` does, as far as the presence server asks for it."""
    fd = int(config.bind[0].removeprefix("fd://"))
    options: dict[str, Any] = {
        "ws": "wsproto",
        "ws_ping_interval": None,
        "lifespan": "off",
        "backlog": config.backlog,
        "server_header": False,
    }
    server = uvicorn.Server(uvicorn.Config(app, fd=fd, log_level="warning", access_log=False, **options))
    serving = asyncio.create_task(server._serve())  # `serve` would take over the signals
    await shutdown_trigger()
    server.should_exit = True
    await serving


if __name__ == "__main__":
    bootstrap.hypercorn_serve = serve  # type: ignore[attr-defined, assignment]
    bootstrap.serve(settings.load())
