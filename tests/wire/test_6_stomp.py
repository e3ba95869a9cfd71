"""WIRE §6, over the wire: versions, receipts, transactions, framing, errors and their close codes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.raw_websocket import TEXT
from tests.support.server import ServerProcess
from tests.support.stomp_client import QUEUE, Frame, StompClient, decode, encode
from tests.support.store import ValkeyProcess
from tests.support.waiting import wait_until

VERSIONS = ("1.0", "1.1", "1.2")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two() -> AsyncIterator[tuple[ServerProcess, ServerProcess]]:
    """Two instances on one store. What one has done, the other tells."""
    store = ValkeyProcess()
    servers: list[ServerProcess] = []
    try:
        await store.start()
        for _ in range(2):
            servers.append(ServerProcess(redis_url=store.url, amnesty_seconds=0, lease_seconds=20))
            await servers[-1].start().ready()
        yield servers[0], servers[1]
        for server in servers:
            await server.finish()
    finally:
        for server in servers:
            server.close()
        store.close()


def text(command: str, headers: dict[str, str] | None = None, body: str = "") -> str:
    """One frame as text, for what is sent in one message with others."""
    return encode(Frame(command, headers or {}, body))


def send(destination: str, body: object = None, **headers: str) -> str:
    """A SEND frame as text; ``body`` as JSON."""
    return text("SEND", {"destination": destination, **headers}, "" if body is None else json.dumps(body))


async def fails(client: StompClient, code: int, message: str, receipt: str | None = None) -> Frame:
    """The connection ends with this close code, after an ERROR frame as WIRE §6 has it."""
    got, error = await client.closed()
    assert error is not None, f"closed with {got} without ERROR"
    assert (got, error.headers.get("receipt-id")) == (code, receipt), error
    assert message in error.body, error
    # WIRE §3: "Header values that we make contain no colon or backslash (old clients do not unescape)".
    assert error.headers["message"] == error.body.replace(":", ",").replace("\\", "/")
    assert "\n" not in error.headers["message"]
    assert error.headers["content-type"] == "text/plain"
    return error


# Versions


@pytest.mark.parametrize("command", ["CONNECT", "STOMP"])
@pytest.mark.parametrize(
    ("offered", "agreed"),
    [
        ("1.2", "1.2"),
        ("1.1", "1.1"),
        ("1.0", "1.0"),
        ("1.0,1.1,1.2", "1.2"),
        ("1.2,1.1,1.0", "1.2"),
        ("1.1, 1.0", "1.1"),
        ("1.0,1.1,2.1", "1.1"),
        (None, "1.0"),
    ],
)
async def test_the_highest_common_version_is_spoken(server, connect, user, command, offered, agreed):
    """WIRE §6: "Versions 1.0, 1.1, 1.2; `STOMP` is `CONNECT`."."""
    client = await connect(server, user, command=command, version=offered)
    assert client.connected.headers["version"] == agreed
    await client.beat()


@pytest.mark.parametrize("offered", ["1.3", "2.1,3.0", ""])
async def test_no_common_version_is_an_error_that_names_ours(server, connect, user, offered):
    """WIRE §6: "no common version: ERROR with `version:1.0,1.1,1.2`"."""
    client = await connect(server, handshake=False)
    await client.raw(text("CONNECT", {"accept-version": offered, "Authorization": f"Bearer {server.token(user)}"}))
    error = await fails(client, 1002, "accept-version")
    assert error.headers["version"] == "1.0,1.1,1.2"


@pytest.mark.parametrize(
    ("version", "sent", "back"),
    [("1.0", r"a\c\n", r"a\c\n"), ("1.1", r"a\c\\b", r"a\c\\b"), ("1.2", r"a\c\r\n\\b", r"a\c\r\n\\b")],
)
async def test_each_version_has_its_own_escapes(server, connect, user, version, sent, back):
    client = await connect(server, user, version=version)
    await client.raw(f"SEND\ndestination:/app/heartbeat\nreceipt:{sent}\n\n\0")
    receipt = await client.expect("RECEIPT")
    assert encode(receipt, version) == f"RECEIPT\nreceipt-id:{back}\n\n\0"


async def test_headers_may_be_padded_in_1_0_only(server, connect, users):
    client = await connect(server, users("old"), version="1.0")
    await client.raw("SEND\ndestination : /app/heartbeat \nreceipt: r1 \n\n\0")
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "r1"}
    client = await connect(server, users("new"), version="1.1")
    await client.raw("SEND\ndestination:/app/heartbeat\nreceipt: r1 \n\n\0")
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": " r1 "}


@pytest.mark.parametrize("version", VERSIONS)
async def test_lines_may_end_with_crlf_and_the_first_of_repeated_headers_counts(server, connect, user, version):
    client = await connect(server, user, version=version)
    await client.raw("\r\n\nSEND\r\ndestination:/app/heartbeat\r\nreceipt:one\r\nreceipt:two\r\n\r\n\0\r\n\n")
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "one"}


async def test_1_0_subscriptions_go_by_destination(server, connect, users):
    """WIRE §6.

    "1.0: `id` may be missing on SUBSCRIBE, then UNSUBSCRIBE is by destination and MESSAGE has no `subscription`."
    """
    client, other = await connect(server, users("old"), version="1.0"), users("other")
    await client.subscribe(None)
    await client.watch([other])
    someone = await connect(server, other)
    message = await client.expect_event(other, True)
    assert "subscription" not in message.headers
    assert message.headers["destination"] == QUEUE
    await client.receipt("UNSUBSCRIBE", {"destination": QUEUE})
    await someone.disconnect()
    await client.expect_nothing(0.5)


async def test_a_1_0_client_may_give_an_id_as_well(server, connect, users):
    client, other = await connect(server, users("old"), version="1.0"), users("other")
    await client.subscribe("mine")
    await client.watch([other])
    await connect(server, other)
    assert (await client.expect_event(other, True)).headers["subscription"] == "mine"
    await client.receipt("UNSUBSCRIBE", {"id": "mine"})


# Receipts


@pytest.mark.parametrize(
    ("command", "headers", "body"),
    [
        ("SEND", {"destination": "/app/heartbeat"}, ""),
        ("SEND", {"destination": "/app/heartbeat"}, "any body"),
        ("SEND", {"destination": "/app/online-status"}, '{"online": true}'),
        ("SEND", {"destination": "/app/online-status"}, '{"online": false}'),
        ("SEND", {"destination": "/app/presence.subscribe"}, '{"userIds": ["u1"]}'),
        ("SEND", {"destination": "/app/presence.subscribe"}, '{"userIds": []}'),
        ("SEND", {"destination": "/app/presence.unsubscribe"}, '{"userIds": ["u1"]}'),
        ("SUBSCRIBE", {"destination": QUEUE, "id": "0"}, ""),
        ("SUBSCRIBE", {"destination": "/queue/online-status", "id": "0"}, ""),
        ("UNSUBSCRIBE", {"id": "no such"}, ""),
        ("ACK", {"id": "1"}, ""),
        ("NACK", {"id": "1"}, ""),
        ("BEGIN", {"transaction": "t"}, ""),
        ("DISCONNECT", {}, ""),
    ],
)
async def test_every_frame_that_asks_gets_its_receipt(server, connect, user, command, headers, body):
    """WIRE §6: "RECEIPT for every frame that asks"."""
    client = await connect(server, user)
    await client.receipt(command, headers, body)
    assert [frame.command for frame in client.frames].count("RECEIPT") == 1


async def test_transactions_get_their_receipts(server, connect, user):
    """WIRE §6: "(for a SEND inside a transaction: once it is held)"."""
    client = await connect(server, user)
    for end in ("COMMIT", "ABORT"):
        await client.receipt("BEGIN", {"transaction": "t"})
        await client.send("/app/heartbeat", headers={"transaction": "t"})
        await client.receipt("ACK", {"id": "1", "transaction": "t"})
        await client.receipt(end, {"transaction": "t"})
    assert [frame.command for frame in client.frames] == ["CONNECTED", *["RECEIPT"] * 8]


async def test_frames_that_do_not_ask_get_none(server, connect, user):
    client = await connect(server, user)
    await client.raw(send("/app/heartbeat") + text("UNSUBSCRIBE", {"id": "0"}) + text("ACK", {"id": "1"}))
    await client.beat()
    assert [frame.command for frame in client.frames] == ["CONNECTED", "RECEIPT"]


async def test_a_receipt_comes_after_the_frames_effect(two, connect, users):
    """WIRE §6: "RECEIPT [...], sent after the frame's effect": by then the other instance tells of it."""
    here, there = two
    for _ in range(5):
        user = users("user")
        client = await connect(here, user)
        await client.set_online(False)
        assert not await there.is_online(user)
        await client.set_online(True)
        assert await there.is_online(user)
        await client.set_online(False)
        await client.beat()
        assert not await there.is_online(user), "a heartbeat does not revive after a sign-off"
        await client.set_online(True)
        await client.receipt("DISCONNECT")
        assert not await there.is_online(user)


async def test_the_receipt_of_a_commit_comes_after_the_effects_of_its_sends(two, connect, user):
    here, there = two
    client = await connect(here, user)
    await client.receipt("BEGIN", {"transaction": "t"})
    await client.send("/app/online-status", {"online": False}, {"transaction": "t"})
    assert await there.is_online(user), "held until COMMIT"
    await client.receipt("COMMIT", {"transaction": "t"})
    assert not await there.is_online(user)


async def test_while_the_store_is_away_receipts_wait_and_the_connection_stays(start_server, valkey, connect, user):
    """WIRE §6: "RECEIPT [...], sent after the frame's effect", however long that takes."""
    store = await valkey()
    server = await start_server(redis_url=store.url, amnesty_seconds=0, lease_seconds=30, store_timeout_seconds=0.5)
    client = await connect(server, user)
    await store.freeze()
    await client.raw(send("/app/online-status", {"online": False}, receipt="r1") + send("/app/heartbeat", receipt="r2"))
    await client.expect_nothing(1.2)
    await store.thaw()
    assert (await client.expect("RECEIPT", 10)).headers == {"receipt-id": "r1"}
    assert (await client.expect("RECEIPT", 10)).headers == {"receipt-id": "r2"}


async def test_an_error_is_told_at_once_though_the_store_is_away(start_server, valkey, connect, user):
    """WIRE §6: "An error is an ERROR frame [...]; then close", also when a receipt or a snapshot before it waits."""
    store = await valkey()
    server = await start_server(redis_url=store.url, amnesty_seconds=0, lease_seconds=30, store_timeout_seconds=0.5)
    client = await connect(server, user)
    await client.subscribe()
    await store.freeze()
    await client.raw(send("/app/presence.subscribe", {"userIds": ["u1"]}, receipt="r1"))
    await client.raw("NO-SUCH\nreceipt:r2\n\n\0")
    await fails(client, 1002, "unknown command NO-SUCH", "r2")
    await store.thaw()


# DISCONNECT


async def test_after_disconnect_with_receipt_the_server_closes_after_a_second(server, connect, user):
    """WIRE §6.

    "DISCONNECT with receipt: RECEIPT, then the client closes (the server after 1 s)"; "1000 | after DISCONNECT".
    """
    client = await connect(server, user)
    await client.receipt("DISCONNECT")
    received = time.monotonic()
    assert await client.closed() == (1000, None)
    assert time.monotonic() - received > 0.8


async def test_after_disconnect_without_receipt_the_server_closes_at_once(server, connect, user):
    """WIRE §6: "1000 | after DISCONNECT". It is told apart from the second that a receipt is given."""
    times = []
    for _ in range(3):
        client = await connect(server, user)
        sent = time.monotonic()
        await client.send_frame("DISCONNECT")
        assert await client.closed() == (1000, None)
        times.append(time.monotonic() - sent)
    assert min(times) < 0.8


async def test_frames_after_disconnect_are_ignored(server, connect, users):
    """STOMP: "Clients MUST NOT send any more frames after the DISCONNECT frame is sent."."""
    other = users("other")
    client = await connect(server, users("user"))
    await client.subscribe()
    await client.raw(
        text("DISCONNECT", {"receipt": "bye"})
        + send("/app/presence.subscribe", {"userIds": [other]}, receipt="late")
        + "NO-SUCH\nreceipt:later\n\n\0"
    )
    await client.raw(send("/app/online-status", {"online": True}, receipt="last"))
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "bye"}
    assert await client.closed() == (1000, None)
    assert client.frames[-1].headers == {"receipt-id": "bye"}


async def test_what_is_sent_after_disconnect_does_not_bring_the_user_back(server, connect, user):
    client = await connect(server, user)
    await client.raw(text("DISCONNECT", {"receipt": "bye"}) + send("/app/online-status", {"online": True}))
    await client.raw(send("/app/heartbeat"))
    await client.expect("RECEIPT")
    assert not await server.is_online(user)
    await client.closed()
    assert not await server.is_online(user)


# Order


async def test_frames_in_one_message_take_effect_in_order(server, connect, users):
    """WIRE §6: "Frames of one connection take effect strictly in order."."""
    watched, others = users("watched"), [users("other") for _ in range(20)]
    someone = await connect(server, watched)
    client = await connect(server, users("user"))
    await client.raw(
        text("SUBSCRIBE", {"id": "0", "destination": QUEUE, "receipt": "r0"})
        + send("/app/presence.subscribe", {"userIds": [watched, *others]}, receipt="r1")
        + send("/app/presence.unsubscribe", {"userIds": [watched]}, receipt="r2")
        + send("/app/presence.subscribe", {"userIds": [watched]}, receipt="r3")
        + send("/app/heartbeat", receipt="r4")
    )

    def receipts() -> list[str]:
        return [frame.headers["receipt-id"] for frame in client.frames if frame.command == "RECEIPT"]

    await wait_until(lambda: len(receipts()) == 5, what="five receipts")
    assert receipts() == ["r0", "r1", "r2", "r3", "r4"]
    ids = [f.headers.get("receipt-id") or f.json["userId"] for f in client.frames if f.command != "CONNECTED"]
    assert ids[0] == "r0"
    assert set(ids[1 : ids.index("r1")]) >= set(others), "the snapshots before the receipt"
    assert watched in ids[ids.index("r2") : ids.index("r3")], "it is watched again, and snapshot"
    await someone.disconnect()
    await wait_until(lambda: client.changes(watched) == [False], what="the change")


async def test_the_last_of_many_frames_in_one_message_decides(two, connect, user):
    """WIRE §6: "Frames of one connection take effect strictly in order."."""
    here, there = two
    client = await connect(here, user)
    for last in (False, True, False):
        flips = [send("/app/online-status", {"online": online}) for online in [not last, last] * 10]
        await client.raw("".join(flips) + send("/app/heartbeat", receipt="r"))
        await client.expect("RECEIPT")
        assert await there.is_online(user) is last


async def test_subscribe_and_send_in_the_first_message_are_in_order(server, connect, user):
    """WIRE §6: "Frames of one connection take effect strictly in order.", those behind CONNECT included."""
    client = await connect(server, handshake=False)
    headers = {"accept-version": "1.2", "Authorization": f"Bearer {server.token(user)}"}
    await client.raw(
        text("CONNECT", headers)
        + text("SUBSCRIBE", {"id": "a:b", "destination": QUEUE}).replace("a:b", r"a\cb")
        + send("/app/presence.subscribe", {"userIds": [user]}, receipt="r")
    )
    await client.expect("CONNECTED")
    message = await client.expect("MESSAGE")
    assert (message.headers["subscription"], message.json["online"]) == ("a:b", True)
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "r"}


# Transactions


async def test_sends_are_held_until_commit_and_dropped_on_abort(server, connect, users):
    """WIRE §6: "Transactions: SENDs are held until COMMIT, dropped on ABORT"."""
    one, two, three = users("one"), users("two"), users("three")
    client = await connect(server, users("user"))
    await client.subscribe()
    for name, user in (("t1", one), ("t2", two)):
        await client.receipt("BEGIN", {"transaction": name})
        await client.send("/app/presence.subscribe", {"userIds": [user]}, {"transaction": name})
    await client.watch([three])
    assert [frame.json["userId"] for frame in client.frames if frame.command == "MESSAGE"] == [three]
    await client.receipt("ABORT", {"transaction": "t1"})
    await client.receipt("COMMIT", {"transaction": "t2"})
    await client.beat()
    assert [frame.json["userId"] for frame in client.frames if frame.command == "MESSAGE"] == [three, two]
    # A transaction that ended is unknown, and its name may be used again.
    await client.receipt("BEGIN", {"transaction": "t1"})


async def test_what_was_not_committed_has_no_effect_at_the_end(server, connect, user):
    client, second = await connect(server, user), await connect(server, user)
    await client.receipt("BEGIN", {"transaction": "t"})
    await client.send("/app/online-status", {"online": False}, {"transaction": "t"})
    await client.close()
    await second.beat()
    assert await server.is_online(user)


async def test_an_error_inside_a_commit_carries_the_receipt_of_the_commit(server, connect, user):
    """WIRE §6: "`receipt-id` when the bad frame asked for a receipt (for an error inside a COMMIT, the COMMIT's)"."""
    client = await connect(server, user)
    await client.receipt("BEGIN", {"transaction": "t"})
    await client.send("/app/presence.subscribe", {"userIds": ["no id!"]}, {"transaction": "t"})
    await client.send_frame("COMMIT", {"transaction": "t", "receipt": "commit"})
    await fails(client, 1008, "'no id!' is not an id", "commit")


async def test_an_error_inside_a_commit_without_receipt_carries_none(server, connect, user):
    client = await connect(server, user)
    await client.receipt("BEGIN", {"transaction": "t"})
    await client.send("/app/nothing", None, {"transaction": "t"})
    await client.send_frame("COMMIT", {"transaction": "t"})
    await fails(client, 1008, "/app/nothing", None)


# ACK


@pytest.mark.parametrize("ack", ["client", "client-individual"])
async def test_delivery_does_not_depend_on_acks_and_messages_carry_what_to_ack(server, connect, users, ack):
    """WIRE §6.

    "ACK/NACK are accepted; delivery does not depend on them; MESSAGEs for a `client`/`client-individual`
    subscription carry `ack` (1.2)."
    """
    client, other = await connect(server, users("user")), users("other")
    await client.subscribe("acked", headers={"ack": ack})
    await client.subscribe("auto", headers={"ack": "auto"})
    await client.watch([other])
    for number in range(3):
        someone = await connect(server, other)
        acked = await client.expect_event(other, True, subscription="acked")
        assert "ack" not in (await client.expect_event(other, True, subscription="auto")).headers
        if number < 2:
            await client.receipt(("ACK", "NACK")[number], {"id": acked.headers["ack"]})
        await someone.disconnect()
        await client.expect_event(other, False, subscription="acked")
        await client.expect_event(other, False, subscription="auto")
    acks = [frame.headers["ack"] for frame in client.frames if "ack" in frame.headers]
    assert len(set(acks)) == len(acks)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_before_1_2_messages_carry_no_ack(server, connect, users, version):
    """WIRE §6: "carry `ack` (1.2)"."""
    client, other = await connect(server, users("user"), version=version), users("other")
    await client.subscribe("0", headers={"ack": "client"})
    message = (await client.watch([other])) and client.frames[-2]
    assert message.command == "MESSAGE"
    assert "ack" not in message.headers
    number = message.headers["message-id"]
    await client.receipt("ACK", {"message-id": number, "subscription": "0"})
    await client.receipt("NACK", {"message-id": number, "subscription": "0"})


# Unsubscribing


async def test_ending_what_is_not_there_is_a_no_op(server, connect, user):
    """WIRE §6: "UNSUBSCRIBE of an id that is not subscribed, and unwatching what is not watched, are no-ops."."""
    client = await connect(server, user)
    await client.unsubscribe("no such")
    await client.unwatch(["nobody"])
    await client.subscribe()
    assert set(await client.watch([user])) == {user}
    await client.unsubscribe("no such")
    await client.unwatch(["nobody"])
    await client.set_online(False)
    await client.expect_event(user, False)


async def test_an_id_may_be_used_again_after_unsubscribe(server, connect, user):
    client = await connect(server, user)
    await client.watch([user])
    for _ in range(2):
        assert set(await client.subscribe("0")) == {user}
        await client.unsubscribe("0")
    await client.set_online(False)
    await client.beat()
    assert client.changes(user) == []


# Framing


async def test_frames_may_be_split_over_messages_text_or_binary(server, connect, user):
    """WIRE §6: "binary in is accepted; STOMP frames may be split over several WebSocket messages"."""
    client = await connect(server, handshake=False)
    data = text("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {server.token(user)}"})
    data += send("/app/presence.subscribe", {"userIds": [user]}, receipt="giờ")
    octets = data.encode()
    for at in range(0, len(octets), 7):
        piece = octets[at : at + 7]
        try:
            await client.raw(piece if at % 2 else piece.decode())
        except UnicodeDecodeError:
            await client.raw(piece)
    await client.expect("CONNECTED")
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "giờ"}
    await client.raw(b"")
    await client.raw("")
    await client.beat()


async def test_many_frames_go_into_one_text_message(server, connect, raw, user):
    """WIRE §6.

    "Text frames out, one or more whole frames to a message, LF only" (the test's client is strict on it).
    """
    ws = await raw(server.ws)
    ids = [f"someone-{number}" for number in range(200)]
    connecting = text("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {server.token(user)}"})
    watching = text("SUBSCRIBE", {"id": "0", "destination": QUEUE}) + send("/app/presence.subscribe", {"userIds": ids})
    ws.write(TEXT, (connecting + watching + send("/app/heartbeat", receipt="r")).encode())
    messages: list[list[Frame]] = []
    while not (messages and messages[-1][-1].command == "RECEIPT"):
        frame = await ws.frame()
        assert frame.opcode == TEXT
        assert b"\r" not in frame.payload
        messages.append(decode(frame.payload.decode()))
    told = [len(frames) for frames in messages if frames[0].command == "MESSAGE"]
    assert sum(told) == 200
    assert len(told) <= 4, "packed, many frames to a WebSocket message"


async def test_the_body_of_what_has_none_in_1_0_is_ignored(server, connect, user):
    client = await connect(server, user, version="1.0")
    await client.raw("UNSUBSCRIBE\nid:0\nreceipt:r\n\nbody\0")
    assert (await client.expect("RECEIPT")).headers == {"receipt-id": "r"}


@pytest.mark.parametrize("body", ["", "{}", "no JSON", "\0" * 3])
async def test_a_heartbeat_has_any_or_no_body(server, connect, user, body):
    """WIRE §4: "SEND `/app/heartbeat` (any or no body)"."""
    client = await connect(server, user)
    await client.receipt("SEND", {"destination": "/app/heartbeat", "content-length": str(len(body))}, body)


# Errors


CONNECT = "<CONNECT>"
"""In place of what a client must send first; the other cases are tried on a connected client."""

GRAMMAR = [
    ("header line without a colon", "SEND\ndestination\n\n\0", "header line"),
    ("header without a name", "SEND\n:x\n\n\0", "header line"),
    ("undefined escape", "SEND\ndestination:/app/heart\\tbeat\n\n\0", "escape"),
    ("escape at the end", "SEND\ndestination:x\\\n\n\0", "escape"),
    ("content-length that is no number", "SEND\ndestination:/app/heartbeat\ncontent-length:x\n\n\0", "content-length"),
    ("negative content-length", "SEND\ndestination:/app/heartbeat\ncontent-length:-1\n\n\0", "content-length"),
    ("content-length too small", "SEND\ndestination:/app/heartbeat\ncontent-length:1\n\nab\0", "content-length"),
    ("content-length too large", "SEND\ndestination:/app/heartbeat\ncontent-length:3\n\nab\0\n", "content-length"),
    ("body where none is allowed", "SUBSCRIBE\nid:1\ndestination:/queue/online-status\n\nbody\0", "with a body"),
    ("body of DISCONNECT", "DISCONNECT\n\nbody\0", "with a body"),
    ("no blank line", "SEND\ndestination:/app/heartbeat\0", "blank line"),
    ("NUL alone", "\0", "blank line"),
    ("no UTF-8", b"SEND\ndestination:\xff\n\n\0", "UTF-8"),
]
STATE = [
    ("unknown command", "NO-SUCH\n\n\0", "unknown command NO-SUCH"),
    ("a server's command", "MESSAGE\n\n\0", "unknown command MESSAGE"),
    ("small letters", "send\ndestination:/app/heartbeat\n\n\0", "unknown command send"),
    ("second CONNECT", "CONNECT\naccept-version:1.2\n\n\0", "CONNECT"),
    ("second CONNECT as STOMP", "STOMP\naccept-version:1.2\n\n\0", "STOMP"),
    ("SEND without destination", "SEND\n\n\0", "SEND without destination"),
    ("SUBSCRIBE without destination", "SUBSCRIBE\nid:1\n\n\0", "SUBSCRIBE without destination"),
    ("SUBSCRIBE without id", "SUBSCRIBE\ndestination:/queue/online-status\n\n\0", "SUBSCRIBE without id"),
    ("UNSUBSCRIBE without id", "UNSUBSCRIBE\ndestination:/queue/online-status\n\n\0", "UNSUBSCRIBE without id"),
    ("repeated subscription id", "SUBSCRIBE\nid:1\ndestination:/queue/online-status\n\n\0" * 2, "id of another"),
    ("BEGIN without transaction", "BEGIN\n\n\0", "BEGIN without transaction"),
    ("COMMIT without transaction", "COMMIT\n\n\0", "COMMIT without transaction"),
    ("ABORT without transaction", "ABORT\n\n\0", "ABORT without transaction"),
    ("BEGIN twice", "BEGIN\ntransaction:t\n\n\0" * 2, "open, t"),
    ("COMMIT of an unknown one", "COMMIT\ntransaction:t\n\n\0", "unknown transaction, t"),
    ("ABORT of an unknown one", "ABORT\ntransaction:t\n\n\0", "unknown transaction, t"),
    ("SEND in an unknown one", "SEND\ndestination:/app/heartbeat\ntransaction:t\n\n\0", "unknown transaction, t"),
    ("ACK in an unknown one", "ACK\nid:1\ntransaction:t\n\n\0", "unknown transaction, t"),
    ("COMMIT twice", "BEGIN\ntransaction:t\n\n\0" + "COMMIT\ntransaction:t\n\n\0" * 2, "unknown transaction, t"),
    ("ACK without id", "ACK\nmessage-id:1\nsubscription:0\n\n\0", "ACK without id"),
    ("NACK without id", "NACK\n\n\0", "NACK without id"),
    ("bad ack value", "SUBSCRIBE\nid:1\ndestination:/queue/online-status\nack:maybe\n\n\0", "ack is none of"),
]
CONTENT = [
    ("SEND to an unknown destination", "SEND\ndestination:/app/nothing\n\n\0", "/app/nothing"),
    ("SEND to the queue", "SEND\ndestination:/user/queue/online-status\n\n\0", "/user/queue/online-status"),
    ("SEND to another user", "SEND\ndestination:/user/bob/queue/online-status\n\n\0", "/user/bob/queue/online-status"),
    ("SUBSCRIBE to an unknown one", "SUBSCRIBE\nid:1\ndestination:/topic/x\n\n\0", "/topic/x"),
    ("SUBSCRIBE to /app", "SUBSCRIBE\nid:1\ndestination:/app/heartbeat\n\n\0", "/app/heartbeat"),
    (
        "other users' queues",
        "SUBSCRIBE\nid:1\ndestination:/user/bob/queue/online-status\n\n\0",
        "/user/bob/queue/online-status",
    ),
    (
        "other users' queues as Spring names them",
        "SUBSCRIBE\nid:1\ndestination:/queue/online-status-userX\n\n\0",
        "/queue/online-status-userX",
    ),
    ("pattern", "SUBSCRIBE\nid:1\ndestination:/user/**\n\n\0", "/user/**"),
    ("no JSON", "SEND\ndestination:/app/online-status\n\n{online}\0", "/app/online-status is not JSON"),
    ("missing JSON", "SEND\ndestination:/app/online-status\n\n\0", "/app/online-status is not JSON"),
    ("missing JSON of a watch", "SEND\ndestination:/app/presence.subscribe\n\n\0", "presence.subscribe is not JSON"),
    ("no object", "SEND\ndestination:/app/presence.subscribe\n\n[]\0", "not a JSON object"),
    ("deep JSON", "SEND\ndestination:/app/online-status\n\n" + "[" * 50_000 + "\0", "is not JSON"),
    ("huge number", "SEND\ndestination:/app/online-status\n\n" + "1" * 50_000 + "\0", "is not JSON"),
    ("online missing", "SEND\ndestination:/app/online-status\n\n{}\0", "online must be"),
    ("online of another type", 'SEND\ndestination:/app/online-status\n\n{"online": 1}\0', "online must be"),
    ("userIds missing", "SEND\ndestination:/app/presence.subscribe\n\n{}\0", "userIds must be"),
    ("userIds no array", 'SEND\ndestination:/app/presence.unsubscribe\n\n{"userIds": "u1"}\0', "userIds must be"),
    ("ids that are no ids", 'SEND\ndestination:/app/presence.subscribe\n\n{"userIds": ["u1", "a:b"]}\0', "'a:b'"),
    ("ids that are no strings", 'SEND\ndestination:/app/presence.subscribe\n\n{"userIds": [1]}\0', "userIds: '1'"),
    ("empty id", 'SEND\ndestination:/app/presence.unsubscribe\n\n{"userIds": [""]}\0', "userIds: ''"),
    ("long id", 'SEND\ndestination:/app/presence.subscribe\n\n{"userIds": ["%s"]}\0' % ("x" * 129), "userIds: 'xxx"),
    ("id with LF", 'SEND\ndestination:/app/presence.subscribe\n\n{"userIds": ["u1\\n"]}\0', "userIds: 'u1\\n'"),
    ("lone surrogate", 'SEND\ndestination:/app/presence.subscribe\n\n{"userIds": ["\\ud800"]}\0', "userIds: "),
    ("emoji in the destination", "SEND\ndestination:/app/😀" + "é" * 200 + "\n\n\0", "/app/😀"),
]


@pytest.mark.parametrize(
    ("code", "frames", "message"),
    [
        pytest.param(code, frames, message, id=f"{code} {name}")
        for code, cases in ((1002, GRAMMAR + STATE), (1008, CONTENT))
        for name, frames, message in cases
    ],
)
async def test_what_a_connected_client_must_not_send_ends_with_error_and_the_code_of_the_table(
    server, connect, user, code, frames, message
):
    """WIRE §6.

    "An error is an ERROR frame: `message` (one line, names the field or destination), `content-type: text/plain`
    [...]; then close." and the table of close codes, 1002 and 1008, case by case.
    """
    client = await connect(server, user)
    await client.raw(frames)
    await fails(client, code, message)
    await server.wait_online(user, False, 1.8)  # sooner than the lease: the session has ended with the connection


@pytest.mark.parametrize("sockjs", [False, True], ids=["plain", "SockJS"])
@pytest.mark.parametrize(
    ("version", "frames", "message"),
    [
        ("1.0", "SUBSCRIBE\n\n\0", "SUBSCRIBE without destination"),
        ("1.0", "UNSUBSCRIBE\n\n\0", "UNSUBSCRIBE without destination"),
        ("1.0", "SUBSCRIBE\ndestination:/queue/online-status\n\n\0" * 2, "id of another"),
        ("1.0", "ACK\n\n\0", "ACK without message-id"),
        ("1.1", "SUBSCRIBE\ndestination:/queue/online-status\n\n\0", "SUBSCRIBE without id"),
        ("1.1", "ACK\nmessage-id:1\n\n\0", "ACK without subscription"),
        ("1.1", "NACK\nsubscription:0\n\n\0", "NACK without message-id"),
        ("1.1", "SEND\ndestination:a\\r\n\n\0", "escape"),
    ],
)
async def test_what_a_version_asks_for_must_be_there(server, connect, user, version, frames, message, sockjs):
    """WIRE §6: "missing `id`/`destination`/`transaction`", as the version has it: 1002."""
    url = f"{server.ws}/0/e/websocket" if sockjs else server.ws
    client = await connect(server, user, version=version, url=url, sockjs=sockjs)
    await client.raw(json.dumps([frames]) if sockjs else frames)
    error = await fails(client, 1002, message)
    if sockjs:
        assert client.sockjs_frames == ["o", f"c[1002,{json.dumps(error.body)}]"]


@pytest.mark.parametrize(
    ("code", "frames", "message"),
    [
        (1002, "SEND\ndestination:/app/heartbeat\nreceipt:r\n\n\0", "SEND before CONNECT"),
        (1002, "SUBSCRIBE\nid:0\ndestination:/queue/online-status\nreceipt:r\n\n\0", "SUBSCRIBE before CONNECT"),
        (1002, "DISCONNECT\nreceipt:r\n\n\0", "DISCONNECT before CONNECT"),
        (1002, "NO-SUCH\nreceipt:r\n\n\0", "unknown command"),
        (1002, "GET / HTTP/1.1\nreceipt:r\n\n\0", "unknown command GET / HTTP/1.1"),
    ],
)
async def test_before_connect_nothing_else_is_taken(server, connect, code, frames, message):
    """WIRE §6: "1002 | [...] frame before CONNECT"; "`receipt-id` when the bad frame asked for a receipt"."""
    client = await connect(server, handshake=False)
    await client.raw(frames)
    await fails(client, code, message, "r")


@pytest.mark.parametrize("heart_beat", ["x", "1", "1,2,3", "-1,0", "1.5,0", "", "0, 0", "9999999999999999999,0"])
async def test_a_bad_heart_beat_value_is_an_error(server, connect, user, heart_beat):
    """WIRE §6: "1002 | [...] bad `heart-beat` [...] value"."""
    client = await connect(server, handshake=False)
    headers = {"accept-version": "1.2", "heart-beat": heart_beat, "Authorization": f"Bearer {server.token(user)}"}
    await client.raw(text("CONNECT", headers))
    await fails(client, 1002, "heart-beat")


@pytest.mark.parametrize(
    "data",
    ["{", '{"a": 1}', "[1]", '["x", null]', "null", "12", "[" * 100_000, '["\\ud800"]', "[]]"],
    ids=lambda data: data[:12],
)
async def test_a_sockjs_message_that_is_no_array_of_strings_is_an_error(server, connect, user, data):
    """WIRE §6: "1002 | [...] SockJS message that is no array of strings"; "`c[code,"reason"]` precedes the close"."""
    client = await connect(server, user, url=f"{server.ws}/0/s/websocket", sockjs=True)
    await client.raw(data)
    await fails(client, 1002, "SockJS message")
    assert client.sockjs_frames == ["o", 'c[1002,"SockJS message is no array of strings"]']


async def test_every_end_of_a_sockjs_connection_is_told(server, connect, user):
    """WIRE §6: "`c[code,"reason"]` precedes the close"."""
    client = await connect(server, user, url=f"{server.ws}/0/s/websocket", sockjs=True)
    await client.send_frame("DISCONNECT")
    assert await client.closed() == (1000, None)
    assert client.sockjs_frames == ["o", 'c[1000,""]']


@pytest.mark.parametrize(
    ("token", "message"), [(None, "Authorization is missing"), ("", "Authorization"), ("no token", "Authorization: ")]
)
async def test_a_missing_or_bad_token_is_an_error(server, connect, token, message):
    """WIRE §6: "1008 | content and limits: token"."""
    client = await connect(server, handshake=False)
    await client.send_frame("CONNECT", {"accept-version": "1.2"} | ({} if token is None else {"passcode": token}))
    await fails(client, 1008, message)


@pytest.mark.parametrize("receipt", ["r", "", "a:b\\c\nd"])
async def test_an_error_carries_the_receipt_id_of_the_bad_frame(server, connect, user, receipt):
    """WIRE §6: "`receipt-id` when the bad frame asked for a receipt"."""
    client = await connect(server, user)
    await client.send_frame("SEND", {"destination": "/app/nothing", "receipt": receipt})
    await fails(client, 1008, "/app/nothing", receipt)


async def test_what_came_before_the_bad_frame_has_its_effect_and_what_comes_behind_it_has_none(two, connect, users):
    """WIRE §6: "Frames of one connection take effect strictly in order."."""
    here, there = two
    user = users("user")
    staying = await connect(here, user)
    client = await connect(here, user)
    await client.subscribe()
    await staying.set_online(False)
    await client.raw(
        send("/app/presence.subscribe", {"userIds": [user]}, receipt="before")
        + "NO-SUCH\n\n\0"
        + send("/app/presence.subscribe", {"userIds": ["behind"]}, receipt="behind")
    )
    await fails(client, 1002, "NO-SUCH")
    assert [frame.command for frame in client.frames[-3:]] == ["MESSAGE", "RECEIPT", "ERROR"]
    await there.wait_online(user, False)


async def test_the_reason_of_the_close_is_the_message(server, connect, user):
    client = await connect(server, user)
    await client.raw("SEND\ndestination:/app/" + "ộ" * 100 + "\n\n\0")
    await client.closed()
    assert client.ws.close_reason
    assert client.frames[-1].body.startswith(client.ws.close_reason)


async def test_1013_tells_to_try_again_when_the_store_cannot_be_asked(start_server, valkey, connect, users):
    """WIRE §6: "1013 | store unavailable, try again"."""
    store = await valkey()
    server = await start_server(redis_url=store.url, amnesty_seconds=0, lease_seconds=30, store_timeout_seconds=0.5)
    connected = await connect(server, users("connected"))
    await store.freeze()
    client = await connect(server, handshake=False)
    user = users("user")
    await client.send_frame("CONNECT", {"accept-version": "1.2", "Authorization": f"Bearer {server.token(user)}"})
    await fails(client, 1013, "store unavailable")
    await store.thaw()
    await connected.beat()
    await wait_until(lambda: not store.redis().sismember("presence:online", user), what="nothing to be left of it")


async def test_1001_is_a_planned_stop(start_server, connect, users):
    """WIRE §6: "1001 | planned stop", "`c[code,"reason"]` precedes the close"; §4: "close 1001, no ERROR frame"."""
    server = await start_server()
    plain = await connect(server, users("plain"))
    early = await connect(server, handshake=False)
    sockjs = await connect(server, users("sockjs"), url=f"{server.ws}/0/z/websocket", sockjs=True)
    stopping = asyncio.create_task(server.stop())
    for client in (plain, early, sockjs):
        assert await client.closed(10) == (1001, None)
    assert sockjs.sockjs_frames == ["o", 'c[1001,"server stops"]']
    assert await stopping == 0
