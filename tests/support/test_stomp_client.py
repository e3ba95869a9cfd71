"""The tests' own STOMP codec, and the waiting of their client: a test is worth no more than what it looks through."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from websockets.asyncio.server import ServerConnection, serve

from tests.support.stomp_client import Frame, StompClient, decode, encode


def test_a_frame_is_encoded_as_the_specification_prints_it():
    frame = Frame("SEND", {"destination": "/queue/a", "content-type": "text/plain"}, "hello queue a")
    assert encode(frame) == "SEND\ndestination:/queue/a\ncontent-type:text/plain\n\nhello queue a\0"


@pytest.mark.parametrize(("version", "text"), [("1.2", r"a\cb\\\n\r"), ("1.1", "a\\cb\\\\\\n\r"), ("1.0", "a:b\\\n\r")])
def test_each_version_has_its_own_escapes(version, text):
    assert encode(Frame("SEND", {"x": "a:b\\\n\r"}), version) == f"SEND\nx:{text}\n\n\0"


def test_connect_is_never_escaped():
    assert encode(Frame("CONNECT", {"host": "a:1"})) == "CONNECT\nhost:a:1\n\n\0"
    assert decode("CONNECTED\nserver:a:1\\x\n\n\0") == [Frame("CONNECTED", {"server": "a:1\\x"})]


def test_several_whole_frames_are_read_from_one_message():
    message = "MESSAGE\ncontent-length:3\n\na\0é".replace("é", "b") + "\0" + "RECEIPT\nreceipt-id:1\\c2\n\n\0"
    assert decode(message) == [
        Frame("MESSAGE", {"content-length": "3"}, "a\0b"),
        Frame("RECEIPT", {"receipt-id": "1:2"}),
    ]


def test_content_length_counts_bytes():
    assert decode("MESSAGE\ncontent-length:4\n\ngiờ\0".replace("4", "5"))[0].body == "giờ"


@pytest.mark.parametrize(
    "message",
    [
        "",
        "\n\n",
        "\nRECEIPT\nreceipt-id:1\n\n\0",
        "RECEIPT\nreceipt-id:1\n\n\0\n",
        "RECEIPT\nreceipt-id:1\n\n",
        "RECEIPT\r\nreceipt-id:1\r\n\r\n\0",
        "RECEIPT\nreceipt-id\n\n\0",
        "RECEIPT\nreceipt-id:1\nreceipt-id:2\n\n\0",
        "RECEIPT\nreceipt-id:\\t\n\n\0",
        "MESSAGE\ncontent-length:1\n\nab\0",
        "MESSAGE\ncontent-length:x\n\nab\0",
        "MESSAGE\n\nab\0RECEI",
    ],
)
def test_whatever_is_not_one_or_more_whole_frames_is_refused(message):
    with pytest.raises(ValueError, match="in the message"):
        decode(message)


# The client against a script in place of a server.

Script = Callable[[ServerConnection], Awaitable[None]]


@contextlib.asynccontextmanager
async def client_of(script: Script) -> AsyncIterator[StompClient]:
    async with serve(script, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = await StompClient.connect(f"ws://127.0.0.1:{port}", handshake=False, subprotocols=None)
        try:
            yield client
        finally:
            await client.dispose()


def message(user: str, online: bool, **more: object) -> str:
    return encode(Frame("MESSAGE", {"message-id": user}, json.dumps({"userId": user, "online": online, **more})))


RECEIPT = "RECEIPT\nreceipt-id:receipt-1\n\n\0"
ERROR = "ERROR\nmessage:no\n\n\0"


async def test_a_receipt_is_found_behind_messages_and_these_are_kept():
    async def script(ws: ServerConnection) -> None:
        await ws.recv()
        await ws.send(message("a", True) + RECEIPT)
        await ws.wait_closed()

    async with client_of(script) as client:
        await client.beat()
        await client.expect_event("a", True)


async def test_events_of_one_user_are_taken_in_order_and_those_of_others_kept():
    async def script(ws: ServerConnection) -> None:
        await ws.send(message("a", True) + message("b", True) + message("a", False))
        await ws.wait_closed()

    async with client_of(script) as client:
        await client.expect_event("b", True)
        await client.expect_event("a", True)
        with pytest.raises(AssertionError, match="instead of online: True"):
            await client.expect_event("a", True)
        assert client.changes("a") == [True, False]


async def test_a_snapshot_is_no_change():
    async def script(ws: ServerConnection) -> None:
        await ws.send(message("a", True, snapshot=True))
        await ws.wait_closed()

    async with client_of(script) as client:
        with pytest.raises(AssertionError, match="snapshot: False"):
            await client.expect_event("a", True)
        assert client.changes("a") == []


async def test_an_error_fails_whatever_waits_for_something_else():
    async def script(ws: ServerConnection) -> None:
        await ws.send(ERROR)
        await ws.close(1008)

    async with client_of(script) as client:
        with pytest.raises(AssertionError, match=r"ERROR.* instead of MESSAGE"):
            await client.expect_event("a", True)
        await client.expect("ERROR")
        assert await client.closed() == (1008, Frame("ERROR", {"message": "no"}))


async def test_an_end_without_a_close_frame_is_told_apart():
    async def script(ws: ServerConnection) -> None:
        ws.transport.abort()

    async with client_of(script) as client:
        assert await client.closed() == (1006, None)
        with pytest.raises(AssertionError, match="closed with 1006 instead of RECEIPT"):
            await client.expect("RECEIPT")


async def test_nothing_means_that_no_frame_came():
    async def script(ws: ServerConnection) -> None:
        await ws.send("\n")
        await ws.recv()
        await ws.send(message("a", True))
        await ws.wait_closed()

    async with client_of(script) as client:
        await client.expect_nothing(0.1)
        assert len(client.beats) == 1
        await client.raw("go on")
        with pytest.raises(AssertionError, match="instead of nothing"):
            await client.expect_nothing(5)


async def test_an_end_of_the_connection_is_not_nothing():
    async def script(ws: ServerConnection) -> None:
        await ws.close()

    async with client_of(script) as client:
        with pytest.raises(AssertionError, match="closed with 1000 instead of nothing"):
            await client.expect_nothing(5)


async def test_half_a_frame_in_a_message_fails_the_test():
    async def script(ws: ServerConnection) -> None:
        await ws.send(RECEIPT[:-1])
        await ws.wait_closed()

    async with client_of(script) as client:
        with pytest.raises(AssertionError, match="in the message"):
            await client.expect("RECEIPT")


async def test_a_receipt_of_presence_subscribe_without_a_snapshot_fails_the_test():
    async def script(ws: ServerConnection) -> None:
        await ws.recv()
        await ws.send(RECEIPT)
        await ws.recv()
        await ws.send(message("a", False, snapshot=True) + RECEIPT.replace("-1", "-2"))
        await ws.wait_closed()

    async with client_of(script) as client:
        await client.subscribe()
        with pytest.raises(AssertionError, match=r"without snapshots of \{'b'\}"):
            await client.watch(["a", "b"])


@pytest.mark.parametrize(
    ("leave", "code"), [(StompClient.close, 1000), (StompClient.abort, 1006), (StompClient.vanish, 1006)]
)
async def test_clients_leave_with_and_without_a_close_frame(leave, code):
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def script(ws: ServerConnection) -> None:
        await ws.wait_closed()
        assert ws.close_code is not None
        ended.set_result(ws.close_code)

    async with client_of(script) as client:
        await leave(client)
        assert await asyncio.wait_for(ended, 5) == code


async def test_sockjs_is_unwrapped_and_wrapped():
    async def script(ws: ServerConnection) -> None:
        await ws.send("o")
        [frame] = json.loads(await ws.recv())
        assert frame == encode(Frame("SEND", {"destination": "/app/heartbeat", "receipt": "receipt-1"}))
        await ws.send("a" + json.dumps(["\n", RECEIPT]))
        await ws.send('c[1008,"no"]')
        await ws.close(1008)

    async with serve(script, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = await StompClient.connect(url, handshake=False, sockjs=True, subprotocols=None)
        await client.beat()
        assert await client.closed() == (1008, None)
        assert client.sockjs_frames == ["o", 'c[1008,"no"]']
        assert len(client.beats) == 1
        await client.dispose()
