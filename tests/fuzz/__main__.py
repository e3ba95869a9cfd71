"""`python -m tests.fuzz --seconds 60 --seed 1`: fuzz a server for as long as asked."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys

from tests.fuzz.campaign import Campaign
from tests.fuzz.generate import JWKS, LEVELS


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--messages", type=int, default=0, help="so many, however long it takes")
    parser.add_argument("--rate", type=float, default=float("inf"), help="messages a second, at most")
    parser.add_argument("--nice", type=int, default=0, help="how much the attacker gives way to the server")
    parser.add_argument("--apart", action="store_true", help="the neighbour on a server of its own, for comparison")
    parser.add_argument("--seed", default="")
    parser.add_argument("--level", choices=("all", *LEVELS, JWKS), default="all")
    parser.add_argument("--only", type=int, help="the case of this number alone")
    options = parser.parse_args()
    seed = options.seed or secrets.token_hex(4)
    levels = LEVELS if options.level == "all" else (options.level,)
    _say(f"seed {seed}")
    campaign = Campaign(seed, levels, _say, rate=options.rate, nice=options.nice, apart=options.apart)
    campaign.server.start()
    try:
        if options.only is not None:
            await campaign.only(levels[0], options.only)
        else:
            await campaign.run(messages=options.messages, seconds=0 if options.messages else options.seconds)
    finally:
        campaign.server.close()
    for line in (*campaign.lines(), *(f"FINDING {finding}" for finding in campaign.findings)):
        _say(line)
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
