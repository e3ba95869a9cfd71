"""An outside Redis as a process, as `tests.support.store` has it, with its version."""

from __future__ import annotations

from tests.support.store import ValkeyProcess


class RedisProcess(ValkeyProcess):
    """A Valkey or Redis set up as the guide says, with expired events, and with room for many of them."""

    version = ""

    def __init__(self, *options: str, behind: float = 0.0) -> None:
        room = ("--client-output-buffer-limit", "pubsub", "256mb", "64mb", "60")
        super().__init__("--notify-keyspace-events", "Ex", *room, *options, behind=behind)

    async def start(self, *, empty: bool = False) -> RedisProcess:
        """Start it, also again after it was killed: with its data, or ``empty``."""
        await super().start(empty=empty)
        info = self.redis().info("server")
        assert isinstance(info, dict)
        valkey = info.get("valkey_version")
        self.version = f"Valkey {valkey}" if valkey else f"Redis {info['redis_version']}"
        return self
