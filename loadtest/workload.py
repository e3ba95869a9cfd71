"""Who is there, who watches whom, and when each action is intended. Pure: from a seed, the same on every machine.

The schedule is open: no moment in it depends on when the server answers, so that a slow server is not asked less.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, Literal, NamedTuple

Kind = Literal["connect", "beat", "leave"]

RISING: Final = 2.0
"""A rate that rises evenly from 0 is half of its highest on average: so many times as long does the ramp take."""


class Action(NamedTuple):
    """One intended action of one session."""

    at: float
    """Seconds since the start of the schedule."""
    kind: Kind
    session: int
    """Number of the session, from 0. A session that returns keeps its number."""


def user_ids(count: int, *, first: int = 0, prefix: str = "load-") -> list[str]:
    """Names of `count` users. Workers take disjoint ranges by `first`."""
    return [f"{prefix}{number:07d}" for number in range(first, first + count)]


def part(sessions: int, place: int, processes: int) -> int:
    """How many of the sessions are in one process, from 0: as evenly as can be."""
    return sessions // processes + (place < sessions % processes)


def crowd_ids(scenario: str, sessions: int, place: int, processes: int) -> list[str]:
    """The users of a scenario in one process."""
    return user_ids(part(sessions, place, processes), prefix=f"load-{scenario}-{place}-")


def friend_graph(
    users: int, *, mean: float = 50.0, most: int = 1000, exponent: float = 1.0, seed: int = 0
) -> list[list[int]]:
    """Who is a friend of whom: friendship is mutual, few have very many friends, most have few.

    The number of friends a user attracts falls with the user's rank as in Zipf's law; ranks are dealt at random, so
    that no range of users (a worker's, say) holds all the celebrities.

    Args:
        users: How many users.
        mean: Friends of a user on average; fewer where the population or `most` does not allow as many.
        most: Friends of a user at most.
        exponent: Of Zipf's law; 0 makes all users alike.
        seed: The same seed makes the same graph.

    Returns:
        For each user the sorted numbers of its friends.
    """
    if users < 2:
        return [[] for _ in range(users)]
    dice = random.Random(seed)
    ranks = list(range(1, users + 1))
    dice.shuffle(ranks)
    # Half of the friends are drawn by popularity and half evenly: a plain Zipf draw leaves most of the tail with none.
    weights = [rank**-exponent for rank in ranks]
    even = sum(weights) / users
    reach = list(accumulate(weight + even for weight in weights))
    friends: list[set[int]] = [set() for _ in range(users)]
    most = min(most, users - 1)
    wanted = min(round(users * mean / 2), users * most // 2)
    made = tried = 0
    # Pairs that exist already and users who are full are drawn again, but not for ever: near the cap few are left.
    while made < wanted and tried < 20 * wanted:
        tried += 1
        a = dice.randrange(users)
        b = bisect_left(reach, dice.random() * reach[-1])
        if a == b or b in friends[a] or len(friends[a]) >= most or len(friends[b]) >= most:
            continue
        friends[a].add(b)
        friends[b].add(a)
        made += 1
    return [sorted(some) for some in friends]


def watch_lists(graph: Sequence[Sequence[int]], *, share: float = 1.0, seed: int = 0) -> dict[int, list[int]]:
    """Whom each watcher watches: its friends. A `share` (0..1) of the users who have friends are watchers."""
    dice = random.Random(seed)
    return {user: list(friends) for user, friends in enumerate(graph) if friends and dice.random() < share}


def beats(
    start: float, end: float, *, period: float = 30.0, jitter: float = 0.1, dice: random.Random
) -> Iterator[float]:
    """The moments of one session's heartbeats in [start, end), s.

    The first lies anywhere within a period, so that sessions that start together do not beat together; the rest are
    `period` apart, give or take `jitter` of it, without drifting: a beat that is early makes the next no earlier.
    """
    due = start + period * dice.random()
    while due < end:
        moment = _moment(due, period, jitter, dice)
        if moment < end:
            yield max(start, moment)
        due += period


def _moment(due: float, period: float, jitter: float, dice: random.Random) -> float:
    return due + period * jitter * (dice.random() - 0.5) if jitter else due


def arrivals(rate: float, start: float, end: float, *, dice: random.Random) -> Iterator[float]:
    """Moments of a Poisson process of `rate` events a second in [start, end), s."""
    if rate <= 0:
        return
    at = start + dice.expovariate(rate)
    while at < end:
        yield at
        at += dice.expovariate(rate)


def schedule(
    sessions: int,
    seconds: float,
    *,
    ramp: float = 0.0,
    period: float = 30.0,
    jitter: float = 0.1,
    churn: float = 0.0,
    away: float = 30.0,
    seed: int = 0,
) -> Iterator[Action]:
    """The actions of a crowd in the order of their moments, made as they are asked for.

    Sessions connect evenly over the ramp. Then they come and go: departures are a Poisson process, each takes a present
    session at random, which returns after an exponential time. A session's beats start when it connects.

    Args:
        sessions: Sessions in the crowd.
        seconds: Length of the schedule.
        ramp: Seconds over which they connect.
        period: Seconds between two heartbeats of a session.
        jitter: Share of the period by which a heartbeat varies in all (0.1: 5 % either way).
        churn: Departures a second of the whole crowd, after the ramp.
        away: Mean seconds until a session that left returns.
        seed: The same seed makes the same schedule.
    """
    dice = random.Random(seed)
    # With each beat when it would be due without jitter: as `beats`, of which one for each session is too large.
    due: list[tuple[float, int, Kind, int, float]] = []
    leaving = arrivals(churn, ramp, seconds, dice=dice)
    present: list[int] = []
    place: dict[int, int] = {}
    visit = [0] * sessions  # its number: beats of an earlier visit do not count

    def push(at: float | None, kind: Kind, session: int, even: float = 0.0) -> None:
        if at is not None and at < seconds:
            heapq.heappush(due, (at, session, kind, visit[session] if session >= 0 else 0, even))

    for session in range(sessions):
        push(session * ramp / sessions, "connect", session)
    push(next(leaving, None), "leave", -1)
    while due:
        at, session, kind, number, even = heapq.heappop(due)
        if kind == "connect":
            place[session] = len(present)
            present.append(session)
            visit[session] += 1
            even = at + period * dice.random()
            push(max(at, _moment(even, period, jitter, dice)), "beat", session, even)
        elif kind == "beat":
            if visit[session] != number or session not in place:
                continue
            even += period
            push(_moment(even, period, jitter, dice), "beat", session, even)
        else:
            push(next(leaving, None), "leave", -1)
            if not present:
                continue
            session = dice.choice(present)
            # The last one takes its place: no list is moved along for one who leaves.
            last = present.pop()
            hole = place.pop(session)
            if last != session:
                present[hole] = last
                place[last] = hole
            push(at + dice.expovariate(1 / away) if away > 0 else at, "connect", session)
        yield Action(at, kind, session)
