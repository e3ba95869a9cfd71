"""A canary: a user of the runner who comes and goes, and whose change shows that nothing else is on its way.

The guide has no receipts. That a frame has taken effect is seen by a canary's change, which a session is told of only
if it watches the canary.
"""

from __future__ import annotations

import asyncio
import json

from contracts.cases import has_directory
from contracts.client import Connection, Refused
from contracts.faults import Failed, Misused
from contracts.story import QUEUE, Story

SETTLING = 10.0
"""s: how long a change may take to be told where the guide says nothing of it."""
_FIRST_PAUSE = 0.5
"""s: from one flip to the next; it grows."""
_QUIET = 0.3
"""s: of silence where no canary can be had."""


class Canary:
    """One user who comes and goes, at the instance of the actor who watches."""

    def __init__(self, story: Story, name: str, instance: int) -> None:
        self.story = story
        self.user = story.user(name)
        self._name = name
        self._instance = instance
        self._connection: Connection | None = None

    async def flip(self) -> bool:
        """Come, or go.

        Returns:
            whether the canary is online now.
        """
        if self._connection is None:
            self._connection = await connect(self.story, self._name, self.user, self._instance)
            self._connection.beating = asyncio.create_task(self._beat(self._connection))
            self._connection.tasks.append(self._connection.beating)
            return True
        await leave(self.story, self._connection)
        self._connection = None
        return False

    async def _beat(self, connection: Connection) -> None:
        """Stay online until the next flip, however far that is: a lease that ends would be a flip by itself."""
        while not (connection.over or connection.closed):
            await asyncio.sleep(0.3 * self.story.target.lease)
            await self.story.send(connection, "SEND", {"destination": "/app/heartbeat"})


async def connect(story: Story, actor: str, user: str, instance: int) -> Connection:
    """A plain session.

    Raises:
        Failed: the server refuses it.
    """
    token = await story.token(user)
    place = story.target.token_in
    upgrade = {"Authorization": f"Bearer {token}"} if place == "upgrade" else {}
    try:
        connection = await story.open(actor, user, instance=instance, headers=upgrade)
    except Refused as error:
        raise Failed(f"a connection for {actor}", str(error)) from error
    headers = {"accept-version": "1.2", "host": "presence", "heart-beat": "0,0"}
    if place == "authorization":
        headers["Authorization"] = f"Bearer {token}"
    elif place == "passcode":
        headers |= {"login": user, "passcode": token or ""}
    await story.send(connection, "CONNECT", headers)
    if not await story.until(lambda: connection.connected, story.now + story.limit):
        raise Failed(f"CONNECTED for {actor} within {story.limit:g} s", story.nothing(connection))
    connection.unread.clear()
    return connection


async def leave(story: Story, connection: Connection) -> None:
    """DISCONNECT and close; in `full` once the RECEIPT has come."""
    if connection.beating is not None:
        # Nothing may follow DISCONNECT.
        connection.beating.cancel()
    if story.full:
        await story.send_with_receipt(connection, "DISCONNECT", {})
        connection.over = True
    else:
        connection.over = True
        await story.send(connection, "DISCONNECT", {})
    await connection.close()


class Watching:
    """What one connection watches, and how it is known that a watch has taken effect."""

    def __init__(self, story: Story, connection: Connection) -> None:
        self.story = story
        self.connection = connection
        self.canary: Canary | None = None
        """One that the connection surely watches."""

    async def watch(self, users: list[str]) -> None:
        """`presence.subscribe`, and wait until it has taken effect."""
        story, connection = self.story, self.connection
        if not connection.subscribed:
            await story.send(connection, "SUBSCRIBE", {"id": "runner", "destination": QUEUE})
            connection.subscribed = True
        if story.full:
            await self._send("presence.subscribe", users, receipt=True)
        else:
            canary = self._new()
            await self._send("presence.subscribe", [*users, canary.user])
            await self._seen_online(canary)
            self.canary = canary
        connection.watches = True

    async def unwatch(self, users: list[str]) -> None:
        """`presence.unsubscribe`, and wait until it has taken effect."""
        if self.story.full:
            await self._send("presence.unsubscribe", users, receipt=True)
            return
        # The one canary is watched no more, the other one still: what the second brings and the first does not.
        gone = self.canary
        if gone is None:
            raise Misused("unwatch without a watch before")
        await self.watch([])
        stays = self.canary
        assert stays is not None
        await self._send("presence.unsubscribe", [*users, gone.user])
        deadline = self.story.now + SETTLING + self.story.target.slack
        while True:
            self.connection.sightings.clear()
            await gone.flip()
            await self._flip_and_see(stays)
            if await self.story.until(lambda: self._saw(gone, 0), self.story.now + _QUIET) is None:
                return
            if self.story.now > deadline:
                raise Failed(
                    "presence.unsubscribe to take effect", "the user who is no longer watched is still told of"
                )

    async def settle(self) -> None:
        """Wait until whatever the server has caused so far for this connection has come.

        Raises:
            Failed: the connection does not work any more.
        """
        story, connection = self.story, self.connection
        if story.full:
            await story.send_with_receipt(connection, "SEND", {"destination": "/app/heartbeat"})
        if not (connection.watches and connection.subscribed):
            if not story.full:
                await story.until(lambda: None, story.now + _QUIET)
            return
        if story.target.policy == "contacts" and not has_directory(story.case):
            # Nobody whom this user may see can be made here.
            await story.until(lambda: None, story.now + _QUIET)
            return
        if self.canary is None:
            canary = self._new()
            await self._send("presence.subscribe", [canary.user], receipt=story.full)
            if not story.full:
                await self._seen_online(canary)
            self.canary = canary
        await self._flip_and_see(self.canary)

    def _new(self) -> Canary:
        actor = self.connection.actor
        # Those of the actor's earlier connections may still be online.
        number = 1 + sum(len(one.canaries) for one in self.story.all if one.actor == actor)
        canary = Canary(self.story, f"canary-{actor}-{number}", self.connection.instance)
        self.connection.canaries.add(canary.user)
        return canary

    async def _send(self, name: str, users: list[str], *, receipt: bool = False) -> None:
        headers = {"destination": f"/app/{name}", "content-type": "application/json"}
        send = self.story.send_with_receipt if receipt else self.story.send
        await send(self.connection, "SEND", headers, json.dumps({"userIds": users}))

    async def _seen_online(self, canary: Canary) -> None:
        """Flip a canary until the connection is told of it. It was never online before: "online" is a change."""
        story = self.story
        deadline = story.now + SETTLING + story.target.slack
        pause = _FIRST_PAUSE
        while True:
            await canary.flip()
            end = min(story.now + pause, deadline)
            if await story.until(lambda: self._saw(canary, 0, online=True), end):
                return
            if story.now >= deadline:
                expected = f"{self.connection.actor} to be told of a user who is watched and comes and goes"
                raise Failed(
                    expected,
                    f"no MESSAGE about {self.story.short(canary.user)} came; " + story.nothing(self.connection),
                )
            pause *= 1.5

    async def _flip_and_see(self, canary: Canary) -> None:
        """Flip a canary that is watched, and wait until the connection is told of it."""
        story = self.story
        limit = story.limit if story.full else SETTLING + story.target.slack
        before = len(self.connection.sightings)
        online = await canary.flip()
        if not await story.until(lambda: self._saw(canary, before, online=online), story.now + limit):
            expected = f"{self.connection.actor} to be told that {story.short(canary.user)} is {_word(online)}"
            raise Failed(f"{expected}, within {limit:g} s", story.nothing(self.connection))

    def _saw(self, canary: Canary, start: int, *, online: bool | None = None) -> bool | None:
        """True when the connection was told of the canary; None when not.

        Args:
            start: how many sightings to pass over.
        """
        for received in self.connection.sightings[start:]:
            fits = online is None or received.online is online
            if received.about == canary.user and fits and not received.snapshot:
                return True
        return None


def _word(online: bool) -> str:
    return "online" if online else "offline"
