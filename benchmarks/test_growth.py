"""Cost at ten times the size, in ratio to the cost at the size: what the design promises to be linear is linear."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import redis

from presence.adapters.redis import _script
from presence.core.model import Session, Status
from presence.fanout import Fanout, Watcher
from presence.stomp.frames import Limits, Parser, encode
from tests.support.store import ValkeyProcess

SIZE = 200
RUNS = 7
HEARTBEAT = b"SEND\ndestination:/app/heartbeat\n\n\0"


def parse_frames(count: int) -> object:
    parser = Parser(Limits())
    parser.version = "1.2"
    parser.feed(HEARTBEAT * count)
    return sum(1 for _ in iter(parser.next_frame, None)) == count


def parse_in_pieces(count: int) -> object:
    """One frame whose body comes in pieces of 20 bytes."""
    parser = Parser(Limits(frame_bytes=10**6))
    parser.version = "1.2"
    frame = encode("SEND", {"destination": "/app/presence.subscribe"}, b"x" * 20 * count, version="1.2")
    frames = []
    for start in range(0, len(frame), 20):
        parser.feed(frame[start : start + 20])
        frames.append(parser.next_frame())
    return frames[-1] is not None


def parse_headers(count: int) -> object:
    parser = Parser(Limits(frame_bytes=10**6, header_lines=10**6))
    parser.version = "1.2"
    parser.feed(encode("SEND", [(f"name-{number}", "a:b") for number in range(count)], version="1.2"))
    return parser.next_frame()


def tell_sessions(count: int) -> object:
    """One change, watched by so many sessions."""
    fanout = Fanout()
    woken: list[int] = []
    watchers = [Watcher(Session(f"u{n}", f"s{n}", "web", 0.0, 0.0), lambda: woken.append(1)) for n in range(count)]
    for watcher in watchers:
        fanout.watch(watcher, ["alice"])
        watcher.snapshot([Status("alice")])
    fanout.deliver(Status("alice", True, 1))
    return sum(len(watcher.flips()) for watcher in watchers) == count == len(woken)


def tell_users(count: int) -> object:
    """Changes of so many users, watched by one session."""
    fanout = Fanout()
    watcher = Watcher(Session("u", "s", "web", 0.0, 0.0), lambda: None)
    users = [f"user-{number}" for number in range(count)]
    fanout.watch(watcher, users)
    watcher.snapshot([Status(user) for user in users])
    for user in users:
        fanout.deliver(Status(user, True, 1))
    return [status.event for status in watcher.flips()]


def write_bodies(count: int) -> object:
    return [Status(f"user-{number}", True, 1752748200123456 + number).snapshot for number in range(count)]


WORK = (parse_frames, parse_in_pieces, parse_headers, tell_sessions, tell_users, write_bodies)


def growth(work: Callable[[int], object]) -> float:
    """Return the cost at ten times the size in ratio to that at the size: the best of some runs of each."""
    best = {SIZE: float("inf"), 10 * SIZE: float("inf")}
    gc.collect()
    gc.disable()  # it would run at the larger size alone
    for _ in range(RUNS):
        for size, before in best.items():
            began = perf_counter()
            assert work(size)
            best[size] = min(before, perf_counter() - began)
    gc.enable()
    return best[10 * SIZE] / best[SIZE]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_ten_times_the_size_costs_eleven_times_at_most(work):
    assert growth(work) <= 11


@pytest.fixture(scope="module")
def store():
    process = ValkeyProcess("--appendonly", "no", "--save", "")
    asyncio.run(process.start())
    yield process.redis()
    process.close()


def calls(script: str, *of_each: object) -> Callable[[redis.Redis, int], object]:
    def call(store: redis.Redis, count: int) -> object:
        args: list[Any] = [arg for number in range(count) for arg in (f"user-{number}", *of_each)]
        return store.register_script(_script(script))(["presence:online"], [0, *args, ""])

    return call


SCRIPTS = {
    "connect": calls("connect", "s", "web", 60_000, 0, "connected", 50, 0),
    "refresh": calls("refresh", "s", "web", 60_000, 0),
    "read": calls("read"),
    "end": calls("end", "s", "disconnected", 0),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_ten_times_the_commands_in_a_call_cost_eleven_times_at_most(store, name):
    def work(count: int) -> object:
        if name != "connect":
            SCRIPTS["connect"](store, count)
        store.set("presence:swept", 10**15)
        return SCRIPTS[name](store, count)

    assert growth(work) <= 11


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_transition_of_a_hundred(benchmark, store, name):
    SCRIPTS["connect"](store, 100)
    assert benchmark(SCRIPTS[name], store, 100)
