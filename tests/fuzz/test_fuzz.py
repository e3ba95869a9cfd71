"""100,000 hostile messages, of all levels: the server lives, leaks nothing, logs no traceback, keeps its neighbours.

The same ones each time, or those of PRESENCE_TEST_SEED; `make fuzz` looks for others.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz.campaign import SHARE, Campaign
from tests.fuzz.generate import JWKS, LEVELS, World, generate

MESSAGES = 100_000


@pytest.mark.timeout(300)
@pytest.mark.parametrize("levels", [LEVELS, (JWKS,)], ids=["secret", "jwks"])
async def test_hostile_messages_harm_neither_the_server_nor_a_neighbour(levels):
    """DESIGN §7: "A clear error, and nothing lost"; "What one client does never delays [...] another".

    One server gets them all, but for those that are about public keys: what leaks a little with each shows in the sum.
    """
    seed = os.environ.get("PRESENCE_TEST_SEED", "1")
    campaign = Campaign(seed, levels, say=lambda _: None)
    campaign.server.start()
    try:
        await campaign.run(messages=round(MESSAGES * sum(SHARE[level] for level in levels)))
        assert not campaign.findings, f"seed {seed}\n" + "\n".join([*campaign.findings, *campaign.lines()])
        await campaign.server.finish()
    finally:
        campaign.server.close()


@pytest.mark.parametrize("level", LEVELS)
def test_a_case_is_the_same_for_the_same_seed_and_number(level):
    world = World(b"a secret of the tests, of 32 bytes and more", 1_800_000_000.0)
    first, again = [[generate("1", level, number, world) for number in range(50)] for _ in range(2)]
    assert first == again
    assert first != [generate("2", level, number, world) for number in range(50)]
