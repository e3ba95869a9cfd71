"""A proxy before a server of the contract that loses, repeats, delays or falsifies what it tells of changes.

It keeps a record of what it did, so that a test can hold the ledger of a run against it.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import defaultdict
from contextlib import suppress
from itertools import count, groupby
from typing import Literal, Self

Fault = Literal["none", "lose", "repeat", "delay", "lie", "mute"]

_MUTED = 10  # number of the connection that is told of no change

_FINAL_TEXT = 0x81


class LyingProxy:
    """Passes on all bytes but the notices: the MESSAGEs of the server that are no snapshot.

    It is for a crowd that stays: when the first of those who were there leaves, the test is over, and it is honest.

    Args:
        server: Port of the server on this machine.
        fault: What it does to a notice. "mute" loses all that are for one of the watchers.
        share: To how many of the notices, 0 to 1; to which, the seed says. Not of "mute".
        delay: Seconds for which "delay" keeps a notice back, while all else overtakes it.
    """

    def __init__(self, server: int, fault: Fault, *, share: float = 1.0, delay: float = 0.0, seed: int = 0) -> None:
        self.record: dict[tuple[int, str], list[bool]] = defaultdict(list)
        """For the number of a connection and the user that is told of: was the notice tampered with? In order."""
        self._server = server
        self._fault = fault
        self._share = share
        self._delay = delay
        self._seed = seed
        self._numbers = count()
        self._leaving = False
        """The crowd leaves: from now on nobody may read what the server makes of that."""
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.http = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def notices(self) -> int:
        """Notices that the server made."""
        return sum(map(len, self.record.values()))

    @property
    def tampered(self) -> int:
        """Notices that came to harm."""
        return sum(map(sum, self.record.values()))

    @property
    def lost(self) -> int:
        """Notices of which the true state did not come through."""
        return self.tampered if self._fault in ("lose", "lie", "mute") else 0

    @property
    def in_a_row(self) -> list[int]:
        """How many notices that one connection was to get about one user came to harm one after the other."""
        rows = [groupby(notices) for notices in self.record.values()]
        return [len(list(row)) for of_pair in rows for harmed, row in of_pair if harmed]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            # Cancelled at the end: that is no error of a connection.
            with suppress(asyncio.CancelledError):
                await self._join(reader, writer)
        finally:
            self._open.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server)
        ways = [asyncio.ensure_future(_pass(reader, to_server)), asyncio.ensure_future(self._tell(from_server, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            self._leaving = self._leaving or bool(self.record)
        finally:
            for way in ways:
                way.cancel()
            to_server.close()
            writer.close()
            for error in await asyncio.gather(*ways, return_exceptions=True):
                if error and not isinstance(error, (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)):
                    raise error

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        if not head.startswith(b"HTTP/1.1 101"):
            await _pass(reader, writer)
            return
        while True:
            first, size = await reader.readexactly(2)
            if size > 125:
                size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
            payload = await reader.readexactly(size)
            if first != _FINAL_TEXT:
                writer.write(_frame(payload, first))
            else:  # one or more whole STOMP frames, and line feeds between them
                for frame in re.findall(rb"[^\0]*\0|[^\0]+\Z", payload):
                    self._hand_on(frame, number, writer)
            await writer.drain()

    def _hand_on(self, frame: bytes, number: int, writer: asyncio.StreamWriter) -> None:
        head, _, body = frame.rstrip(b"\0").partition(b"\n\n")
        if self._leaving or not head.lstrip(b"\n").startswith(b"MESSAGE\n") or b'"snapshot"' in body:
            writer.write(_frame(frame))
            return
        user = json.loads(body)["userId"]
        notices = self.record[number, user]
        # Of this notice alone, as the order of the connections among each other is not the same in each run.
        dice = random.Random(f"{self._seed} {number} {user} {len(notices)}")
        harmed = self._fault != "none" and dice.random() < self._share
        if self._fault == "mute":
            harmed = number == _MUTED
        notices.append(harmed)
        if not harmed:
            writer.write(_frame(frame))
        elif self._fault == "repeat":
            writer.write(2 * _frame(frame))
        elif self._fault == "delay":
            asyncio.get_running_loop().call_later(self._delay, writer.write, _frame(frame))
        elif self._fault == "lie":
            writer.write(_frame(_turned_round(head, body)))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


def _turned_round(head: bytes, body: bytes) -> bytes:
    """The MESSAGE with the other state."""
    notice = json.loads(body)
    body = json.dumps(notice | {"online": not notice["online"]}).encode()
    return re.sub(rb"(?m)^content-length:\d+", b"content-length:%d" % len(body), head) + b"\n\n" + body + b"\0"


def _frame(payload: bytes, first: int = _FINAL_TEXT) -> bytes:
    """A WebSocket frame of a server; `first` is its first octet."""
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    wide = 2 if size < 1 << 16 else 8
    return bytes((first, 126 if wide == 2 else 127)) + size.to_bytes(wide, "big") + payload
