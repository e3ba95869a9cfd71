"""The outside Valkey of the tests keeps what it is said to keep."""

from __future__ import annotations

import pytest
import redis


async def test_data_outlives_a_kill_and_an_empty_restart_loses_it(valkey):
    store = await valkey()
    client = store.redis()
    client.set("key", "value")
    await store.restart()
    assert client.get("key") == "value"
    await store.restart(empty=True)
    assert client.get("key") is None


async def test_frozen_it_answers_nothing_and_thawed_it_goes_on(valkey):
    store = await valkey()
    impatient = redis.Redis.from_url(store.url, socket_timeout=0.2, retry=None)
    await store.freeze()
    with pytest.raises(redis.TimeoutError):
        impatient.ping()
    await store.thaw()
    assert store.redis().ping()
    impatient.close()


async def test_closed_it_leaves_nothing_behind(valkey):
    store = await valkey()
    assert list(store.family()) == [store.pid]
    store.close()
    assert not store.family()
    assert not store.root.exists()
