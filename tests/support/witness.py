"""What a watcher was told, held against the rules of WIRE §5 and against the truth."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Mapping, Sequence

from tests.support.stomp_client import StompClient
from tests.support.truth import Truth


def changes_told(watcher: StompClient, user: str) -> list[bool]:
    """All changes of the user that the watcher was told of, in order; they keep WIRE §5, or the test fails.

    "A MESSAGE without `snapshot` always turns round what this session was last told of that user, with a higher
    version"; "per subscription and user the versions never go down".
    """
    events = watcher.events(user)
    said = f"{watcher.connected and watcher.connected.headers['user-name']} was told of {user}: {events}"
    for before, after in itertools.pairwise(events):
        assert before["version"] <= after["version"], f"a version went down: {said}"
        if "snapshot" not in after:
            assert before["online"] is not after["online"], f"a change that is none: {said}"
            assert before["version"] < after["version"], f"a change without a version of its own: {said}"
    assert not events or "snapshot" in events[0], f"a change before the first snapshot: {said}"
    return [event["online"] for event in events if "snapshot" not in event]


async def told_truly(watchers: Collection[StompClient], truth: Truth, expected: Mapping[str, Sequence[bool]]) -> None:
    """Assert that each watcher was told exactly these changes of these users, and the truth last."""
    for watcher in watchers:
        told = {user: changes_told(watcher, user) for user in expected}
        wrong = {user: told[user] for user, changes in expected.items() if told[user] != list(changes)}
        assert not wrong, f"told: {wrong}; in the stream: { {user: truth.changes(user) for user in wrong} }"
        for user in expected:
            last = watcher.events(user)[-1]["online"]
            true = await asyncio.to_thread(truth.online, user)
            assert last is true, f"the last word on {user} was {last}"
