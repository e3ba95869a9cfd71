"""A healthy neighbour, in a process of its own: beats with a receipt, and watches a user who flips.

On each line of standard input it says, as a line of JSON, how long its answers took since the last one, in ms.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tests.support.stomp_client import StompClient

DEADLINE = 5.0  # s for each answer


async def _beats(client: StompClient, taken: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await client.send("/app/heartbeat", timeout=DEADLINE)
        taken.append((time.perf_counter() - began) * 1000)
        del client.frames[:]
        await asyncio.sleep(0.01)


async def _flips(watcher: StompClient, flipper: StompClient, taken: list[float]) -> None:
    online = False
    while True:
        began = time.perf_counter()
        await flipper.send("/app/online-status", {"online": online}, timeout=DEADLINE)
        await watcher.expect_event("fuzz-flipper", online, DEADLINE)
        taken.append((time.perf_counter() - began) * 1000)
        online = not online
        await watcher.raw("\n")  # who says nothing for 90 s counts as lost
        del watcher.frames[:], flipper.frames[:]
        await asyncio.sleep(0.1)


def _summary(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken) or [0.0]
    return {
        "answers": len(taken),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[int(len(ordered) * 0.99)],
        "max": ordered[-1],
    }


async def _main(url: str, *tokens: str) -> None:
    client, watcher, flipper = [await StompClient.connect(url, token) for token in tokens]
    await watcher.subscribe()
    await watcher.watch(["fuzz-flipper"])
    beats: list[float] = []
    flips: list[float] = []
    work = [asyncio.create_task(_beats(client, beats)), asyncio.create_task(_flips(watcher, flipper, flips))]
    while await asyncio.to_thread(sys.stdin.readline):
        error = next((repr(task.exception()) for task in work if task.done()), None)
        answer = {"beats": _summary(beats), "flips": _summary(flips), "error": error}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        beats.clear()
        flips.clear()
    for task in work:
        task.cancel()
    for one in (client, watcher, flipper):
        await one.dispose()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
