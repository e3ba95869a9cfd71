from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presence.stomp import (
    Connect,
    Connection,
    Disconnect,
    Event,
    Limits,
    Send,
    StompError,
    Subscribe,
    Unsubscribe,
)
from presence.stomp.connection import Nothing
from presence.stomp.frames import Frame, Parser, encode

VERSIONS = ("1.0", "1.1", "1.2")
QUEUE = "/user/queue/online-status"


def frame(command: str, body: str = "", **headers: str) -> bytes:
    """Return a frame as a client may write it. Underlines in names stand for hyphens."""
    lines = [command, *(f"{name.replace('_', '-')}:{value}" for name, value in headers.items())]
    return ("\n".join(lines) + "\n\n" + body + "\0").encode()


def connect(connection: Connection, version: str = "1.2", now: float = 0.0, **headers: str) -> Frame:
    """Connect, and return the CONNECTED frame."""
    [event] = connection.receive(frame("CONNECT", accept_version=version, host="h", **headers), now)
    assert isinstance(event, Connect)
    return read(connection.connected(session="s1", server="presence/1", user="u1", now=now))


def connected(version: str = "1.2", limits: Limits = Limits(), **headers: str) -> Connection:  # noqa: B008
    connection = Connection(now=0.0, limits=limits)
    connect(connection, version, 0.0, **headers)
    return connection


def read(data: bytes, version: str = "1.2") -> Frame:
    """Return the one frame in what the server sent."""
    parser = Parser(Limits())
    parser.version = version
    parser.feed(data)
    [one] = iter(parser.next_frame, None)
    return one


def events(connection: Connection, *frames: bytes, now: float = 0.0) -> list[Event]:
    return list(connection.receive(b"".join(frames), now))


def fails(
    connection: Connection, *frames: bytes, code: int = 1002, receipt: str | None = None, match: str
) -> StompError:
    """The frames end the connection with this error, and the next bytes are ignored."""
    with pytest.raises(StompError, match=match) as caught:
        events(connection, *frames)
    assert (caught.value.code, caught.value.receipt) == (code, receipt)
    assert events(connection, frame("NO-SUCH"), b"\xff\n\n\0") == []
    return caught.value


# CONNECT


@pytest.mark.parametrize("command", ["CONNECT", "STOMP"])
def test_connect_and_stomp_are_the_same(command):
    """WIRE §6: "`STOMP` is `CONNECT`"."""
    connection = Connection(now=0.0)
    data = frame(command, accept_version="1.2", host="h:80", Authorization="Bearer a:b", passcode="\\t")
    headers = {"accept-version": "1.2", "host": "h:80", "Authorization": "Bearer a:b", "passcode": "\\t"}
    assert events(connection, data) == [Connect(headers, "1.2")]
    assert connection.version is None
    connection.connected(session="s1", server="presence/1", user="u1", now=0.0)
    assert connection.version == "1.2"


def test_connected_carries_what_wire_lists():
    """WIRE §3: "CONNECTED carries `version`, `heart-beat` (always), `session`, `server`, `user-name`"."""
    connection = Connection(now=0.0, beat_seconds=2.5)
    events(connection, frame("CONNECT", accept_version="1.1"))
    assert connection.connected(session="s1", server="presence/1", user="u1", now=0.0) == (
        b"CONNECTED\nversion:1.1\nheart-beat:2500,2500\nsession:s1\nserver:presence/1\nuser-name:u1\n\n\0"
    )


@pytest.mark.parametrize(
    ("offered", "version"),
    [
        ("1.2", "1.2"),
        ("1.1", "1.1"),
        ("1.0", "1.0"),
        ("1.0,1.1,1.2", "1.2"),
        ("1.2,1.1,1.0", "1.2"),
        ("1.0,1.1,2.0", "1.1"),
        ("1.0, 1.1 ", "1.1"),
        (None, "1.0"),
    ],
)
def test_the_highest_common_version_is_chosen(offered, version):
    """STOMP: "the highest protocol version that both the client and server have in common"; none named is 1.0."""
    connection = Connection(now=0.0)
    [event] = events(connection, frame("CONNECT", **({"accept_version": offered} if offered else {})))
    assert isinstance(event, Connect)
    assert event.version == version
    assert read(connection.connected(session="s", server="p", user="u", now=0.0)).headers["version"] == version


@pytest.mark.parametrize("offered", ["2.0", "", "1.3,0.9", "1", "1.20"])
def test_no_common_version_is_an_error_that_lists_ours(offered):
    """WIRE §6: "no common version: ERROR with `version:1.0,1.1,1.2`"."""
    connection = Connection(now=0.0)
    error = fails(connection, frame("CONNECT", accept_version=offered), match="accept-version")
    assert read(connection.error(error)).headers["version"] == "1.0,1.1,1.2"


def test_a_missing_host_is_accepted():
    """WIRE §3: "A missing `host` is accepted"."""
    assert len(events(Connection(now=0.0), frame("CONNECT", accept_version="1.2"))) == 1


def test_headers_of_a_padded_1_0_connect_are_trimmed():
    connection = Connection(now=0.0)
    [event] = events(connection, b"CONNECT\nlogin: u1\n passcode : a b \n\n\0")
    assert event == Connect({"login": "u1", "passcode": "a b"}, "1.0")


def test_headers_of_a_later_connect_are_not_trimmed():
    [event] = events(Connection(now=0.0), frame("CONNECT", accept_version="1.1", passcode=" a"))
    assert isinstance(event, Connect)
    assert event.headers["passcode"] == " a"


def test_connect_cannot_ask_for_a_receipt():
    """STOMP: "Any client frame other than CONNECT MAY specify a receipt header"."""
    [event] = events(Connection(now=0.0), frame("CONNECT", accept_version="1.2", receipt="r"))
    assert (event.receipt, event.acknowledge) == (None, False)


@pytest.mark.parametrize("command", ["SEND", "SUBSCRIBE", "DISCONNECT", "ACK"])
def test_a_frame_before_connect_is_an_error(command):
    """WIRE §6: 1002, "frame before CONNECT"."""
    data = frame(command, destination="/a", id="1", receipt="a\\cb")
    fails(Connection(now=0.0), data, receipt="a\\cb", match=f"{command} before CONNECT")


def test_a_frame_after_connect_that_was_not_accepted_is_an_error():
    connection = Connection(now=0.0)
    events(connection, frame("CONNECT", accept_version="1.2"))
    fails(connection, frame("SEND", destination="/a"), match="SEND before CONNECT")


@pytest.mark.parametrize("command", ["CONNECT", "STOMP"])
def test_a_second_connect_is_an_error(command):
    """WIRE §6: 1002, "second CONNECT"."""
    fails(connected(), frame(command, accept_version="1.2", host="h:80"), match=command)


def test_a_second_connect_before_the_first_was_answered_is_an_error():
    data = frame("CONNECT", accept_version="1.2")
    fails(Connection(now=0.0), data, data, match="CONNECT")


def test_connecting_without_a_connect_is_a_mistake_of_the_caller():
    with pytest.raises(RuntimeError):
        Connection(now=0.0).connected(session="s", server="p", user="u", now=0.0)


@pytest.mark.parametrize(
    "value", ["", "1", "1,", ",1", "1,2,3", "a,b", "-1,0", "1.5,0", "1, 2", "9" * 19 + ",0", "١,٢"]
)
@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_a_bad_heart_beat_is_an_error(version, value):
    """WIRE §6: 1002, "bad `heart-beat` [...] value"."""
    fails(Connection(now=0.0), frame("CONNECT", accept_version=version, heart_beat=value), match="heart-beat")


def test_1_0_knows_no_heart_beat_header():
    assert connect(Connection(now=0.0), "1.0", heart_beat="x").headers["heart-beat"] == "10000,10000"


# Frames


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_command_is_an_error(version):
    """WIRE §6: 1002, "unknown command"."""
    for command in ("NO-SUCH", "MESSAGE", "send", " SEND", "CONNECTED", "X" * 10_000):
        error = fails(connected(version), frame(command, receipt="r"), receipt="r", match="unknown command")
        assert len(error.message) < 60


def test_an_error_of_grammar_ends_the_connection():
    fails(connected(), b"SEND\nreceipt:7\nx\n\n\0", receipt="7", match="name:value")


def test_headers_are_unescaped_from_the_frame_after_connected_on():
    """Even in the same bytes: state is exact for each frame."""
    connection = Connection(now=0.0)
    seen = []
    data = frame("CONNECT", accept_version="1.2", x="\\t") + frame("SEND", destination="/a\\cb")
    for event in connection.receive(data, 0.0):
        seen.append(event)
        if isinstance(event, Connect):
            connection.connected(session="s", server="p", user="u", now=0.0)
    assert isinstance(seen[0], Connect)
    assert seen[0].headers["x"] == "\\t"
    assert seen[1] == Send("/a:b", {"destination": "/a:b"}, b"")


def test_frames_may_be_split_over_any_number_of_messages():
    """WIRE §6: "STOMP frames may be split over several WebSocket messages"."""
    connection = connected()
    data = frame("SEND", "hello", destination="/a") + b"\n" + frame("SEND", "you", destination="/b")
    seen = [event for at in range(len(data)) for event in events(connection, data[at : at + 1])]
    assert seen == [Send("/a", {"destination": "/a"}, b"hello"), Send("/b", {"destination": "/b"}, b"you")]


def test_empty_input_is_nothing():
    assert events(Connection(now=0.0), b"") == []


def test_events_come_one_by_one():
    """A frame is not looked at before the caller has taken the effect of the one before it."""
    connection = connected()
    stream = connection.receive(frame("SUBSCRIBE", id="1", destination="/a") + frame("UNSUBSCRIBE", id="1"), 0.0)
    assert next(stream) == Subscribe("1", "/a")
    assert "1" in connection.subscriptions
    assert next(stream) == Unsubscribe("1")
    assert "1" not in connection.subscriptions


def test_frames_behind_an_error_of_the_caller_are_ignored():
    connection = connected()
    stream = connection.receive(frame("SEND", destination="/a") + frame("SEND", destination="/b"), 0.0)
    next(stream)
    connection.error(StompError("destination /a", 1008))
    assert list(stream) == []
    assert events(connection, frame("SEND", destination="/b")) == []


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (frame("SEND", "x", destination="/a"), Send("/a", {"destination": "/a"}, b"x")),
        (frame("SUBSCRIBE", id="1", destination="/a"), Subscribe("1", "/a")),
        (frame("UNSUBSCRIBE", id="1"), Unsubscribe("1")),
        (frame("DISCONNECT"), Disconnect()),
        (frame("BEGIN", transaction="t"), None),
        (frame("ACK", id="1"), None),
        (frame("NACK", id="1"), None),
    ],
)
def test_every_frame_that_asks_for_a_receipt_is_to_be_acknowledged(data, event):
    """WIRE §6: "RECEIPT for every frame that asks"; one that does not is not acknowledged."""
    assert events(connected(), data) == ([event] if event else [])
    [asked] = events(connected(), data.replace(b"\n", b"\nreceipt:r\\c1\n", 1))
    assert type(asked) is (type(event) if event else Nothing)
    assert (asked.receipt, asked.acknowledge) == ("r:1", True)


def test_an_empty_receipt_id_is_one():
    assert events(connected(), frame("BEGIN", transaction="t", receipt="")) == [Nothing(receipt="", acknowledge=True)]


@pytest.mark.parametrize(
    ("command", "headers", "missing"),
    [
        ("SEND", {}, "destination"),
        ("SEND", {"transaction": "t"}, "destination"),
        ("SUBSCRIBE", {"id": "1"}, "destination"),
        ("SUBSCRIBE", {"destination": "/a"}, "id"),
        ("UNSUBSCRIBE", {"destination": "/a"}, "id"),
        ("BEGIN", {}, "transaction"),
        ("COMMIT", {}, "transaction"),
        ("ABORT", {}, "transaction"),
    ],
)
@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_a_missing_header_is_an_error_that_names_it(version, command, headers, missing):
    """WIRE §6: 1002, "missing `id`/`destination`/`transaction`"."""
    data = frame(command, receipt="r", **headers)
    fails(connected(version), data, receipt="r", match=f"{command} without {missing}$")


def test_a_missing_header_is_an_error_in_1_0_as_well():
    fails(connected("1.0"), frame("SUBSCRIBE", id="1"), match="SUBSCRIBE without destination")
    fails(connected("1.0"), frame("UNSUBSCRIBE"), match="UNSUBSCRIBE without destination")
    fails(connected("1.0"), frame("SEND"), match="SEND without destination")


# Subscriptions


def test_a_subscription_is_kept_under_its_id():
    connection = connected()
    events(connection, frame("SUBSCRIBE", id="sub-0", destination=QUEUE, ack="client"))
    [(key, subscription)] = connection.subscriptions.items()
    assert (key, subscription.id, subscription.destination, subscription.ack) == ("sub-0", "sub-0", QUEUE, "client")


def test_without_an_id_a_1_0_subscription_is_kept_under_its_destination():
    """WIRE §6: "1.0: `id` may be missing on SUBSCRIBE, then UNSUBSCRIBE is by destination"."""
    connection = connected("1.0")
    assert events(connection, frame("SUBSCRIBE", destination=QUEUE)) == [Subscribe(QUEUE, QUEUE)]
    assert connection.subscriptions[QUEUE].id is None
    assert connection.subscriptions[QUEUE].ack == "auto"
    assert events(connection, frame("UNSUBSCRIBE", destination=QUEUE)) == [Unsubscribe(QUEUE)]
    assert connection.subscriptions == {}


def test_with_an_id_a_1_0_subscription_is_kept_under_the_id():
    connection = connected("1.0")
    assert events(connection, frame("SUBSCRIBE", id="1", destination=QUEUE)) == [Subscribe("1", QUEUE)]
    assert connection.subscriptions["1"].id == "1"
    assert events(connection, frame("UNSUBSCRIBE", id="1", destination=QUEUE)) == [Unsubscribe("1")]
    assert connection.subscriptions == {}


def test_one_destination_may_be_subscribed_twice_and_an_id_used_again():
    connection = connected()
    subscribe = [frame("SUBSCRIBE", id=key, destination=QUEUE) for key in "12"]
    events(connection, *subscribe, frame("UNSUBSCRIBE", id="1"), subscribe[0])
    assert set(connection.subscriptions) == {"1", "2"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_repeated_id_is_an_error(version):
    """WIRE §6: 1002, "repeated subscription id"."""
    first, again = (
        frame("SUBSCRIBE", id="i1", destination="/a"),
        frame("SUBSCRIBE", id="i1", destination="/b", receipt="r"),
    )
    fails(connected(version), first, again, receipt="r", match="id of another subscription, i1")


def test_unsubscribing_what_is_not_subscribed_is_a_no_op_that_is_acknowledged():
    """WIRE §6: "UNSUBSCRIBE of an id that is not subscribed [is a no-op]"."""
    data = frame("UNSUBSCRIBE", id="no", receipt="r")
    assert events(connected(), data) == [Unsubscribe("no", receipt="r", acknowledge=True)]


@pytest.mark.parametrize("ack", ["", "Auto", "none", "client_individual"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_bad_ack_mode_is_an_error(version, ack):
    """WIRE §6: 1002, "bad [...] `ack` value"."""
    connection = connected(version)
    fails(connection, frame("SUBSCRIBE", id="1", destination="/a", ack=ack, receipt="r"), receipt="r", match="ack")
    assert connection.subscriptions == {}


def test_as_many_subscriptions_as_the_limit_pass_and_one_more_does_not():
    """WIRE §6: 1008, "too many [...] subscriptions"; "16 subscriptions a connection"."""
    connection = connected()
    events(connection, *(frame("SUBSCRIBE", id=str(number), destination="/a") for number in range(16)))
    one_more = frame("SUBSCRIBE", id="16", destination="/a", receipt="r")
    fails(connection, one_more, code=1008, receipt="r", match="more than 16 subscriptions")


# Acknowledgements


@pytest.mark.parametrize("command", ["ACK", "NACK"])
@pytest.mark.parametrize(
    ("version", "headers"),
    [
        ("1.0", {"message_id": "1"}),
        ("1.1", {"message_id": "1", "subscription": "0"}),
        ("1.2", {"id": "1"}),
    ],
)
def test_acks_are_accepted_and_need_what_their_version_says(version, headers, command):
    """WIRE §6: "ACK/NACK are accepted; delivery does not depend on them"."""
    assert events(connected(version), frame(command, **headers)) == []
    for name in headers:
        others = {other: value for other, value in headers.items() if other != name}
        others |= {"id": "1"} if version != "1.2" else {"message_id": "1", "subscription": "0"}
        missing = name.replace("_", "-")
        fails(connected(version), frame(command, **others), match=f"{command} without {missing}$")


def test_an_ack_in_a_transaction_needs_that_transaction():
    connection = connected()
    ack = frame("ACK", id="1", transaction="t")
    assert events(connection, frame("BEGIN", transaction="t"), ack) == []
    fails(connection, frame("COMMIT", transaction="t"), ack, match="ACK in an unknown transaction, t")


# Transactions

BEGIN, COMMIT, ABORT = (frame(command, transaction="t") for command in ("BEGIN", "COMMIT", "ABORT"))


def held(number: int = 0, transaction: str = "t", **headers: str) -> bytes:
    return frame("SEND", str(number), destination="/a", transaction=transaction, **headers)


def bodies(seen: list[Event]) -> list[bytes]:
    return [event.body for event in seen if isinstance(event, Send)]


def test_sends_of_a_transaction_are_held_until_commit():
    """WIRE §6: "SENDs are held until COMMIT"."""
    connection = connected()
    assert events(connection, BEGIN, held(1), held(2)) == []
    assert bodies(events(connection, frame("SEND", "3", destination="/b"))) == [b"3"]
    assert bodies(events(connection, COMMIT)) == [b"1", b"2"]


def test_a_commit_yields_whole_sends():
    connection = connected()
    events(connection, BEGIN, held(1, x="y"))
    headers = {"destination": "/a", "transaction": "t", "x": "y"}
    assert events(connection, COMMIT) == [Send("/a", headers, b"1")]


def test_a_held_send_is_acknowledged_when_held_and_the_commit_at_its_end():
    """WIRE §6: "for a SEND inside a transaction: once it is held"; "for an error inside a COMMIT, the COMMIT's"."""
    connection = connected()
    assert events(connection, BEGIN, held(1, receipt="s1")) == [Nothing(receipt="s1", acknowledge=True)]
    seen = events(connection, held(2), frame("COMMIT", transaction="t", receipt="c1"))
    assert bodies(seen[:2]) == [b"1", b"2"]
    assert [(event.receipt, event.acknowledge) for event in seen[:2]] == [("c1", False)] * 2
    assert seen[2:] == [Nothing(receipt="c1", acknowledge=True)]


def test_sends_of_a_commit_without_receipt_have_none():
    seen = events(connected(), BEGIN, held(1, receipt="s1"), COMMIT)
    assert [(type(event), event.receipt, event.acknowledge) for event in seen] == [
        (Nothing, "s1", True),
        (Send, None, False),
    ]


def test_sends_of_an_aborted_transaction_are_dropped():
    """WIRE §6: "dropped on ABORT"."""
    connection = connected()
    assert events(connection, BEGIN, held(1), ABORT) == []
    assert bodies(events(connection, BEGIN, held(2), COMMIT)) == [b"2"]


def test_transactions_are_apart_from_one_another():
    connection = connected()
    other = [frame(command, transaction="u") for command in ("BEGIN", "COMMIT")]
    events(connection, BEGIN, other[0], held(1), held(2, "u"), held(3))
    assert bodies(events(connection, other[1])) == [b"2"]
    assert bodies(events(connection, COMMIT)) == [b"1", b"3"]


@pytest.mark.parametrize("data", [COMMIT, ABORT, held(1)])
@pytest.mark.parametrize("before", [(), (BEGIN, COMMIT), (BEGIN, ABORT)])
def test_a_transaction_that_is_not_open_is_an_error(data, before):
    """WIRE §6: 1002, "unknown transaction"."""
    fails(connected(), *before, data, match="unknown transaction, t")


def test_a_transaction_cannot_begin_twice():
    """WIRE §6: 1002, "BEGIN twice"."""
    fails(connected(), BEGIN, frame("BEGIN", transaction="t", receipt="r"), receipt="r", match="BEGIN .* open, t")


def test_as_many_sends_as_the_limit_are_held_over_all_transactions_and_one_more_is_not():
    """WIRE §6: "at most 100 held"; 1008, "too many [...] held SENDs"."""
    connection = connected()
    events(connection, BEGIN, frame("BEGIN", transaction="u"), held() * 60, held(transaction="u") * 40)
    assert len(events(connection, COMMIT)) == 60
    events(connection, BEGIN, held() * 60)
    fails(connection, held(receipt="r"), code=1008, receipt="r", match="more than 100 SENDs in transactions")


def test_open_transactions_are_limited_as_well():
    connection = connected()
    events(connection, *(frame("BEGIN", transaction=str(number)) for number in range(100)))
    fails(connection, BEGIN, code=1008, match="more than 100 open transactions")


# Frame rate


def test_frames_may_burst_and_then_come_at_the_rate():
    """WIRE §6: "100 frames a second sustained with bursts of 400"; 1008, "too many [...] frames"."""
    connection = Connection(now=0.0)
    connect(connection)
    send = frame("SEND", destination="/a")
    assert len(events(connection, send * 399)) == 399
    for tick in range(1, 11):
        assert len(events(connection, send * 10, now=tick / 10 + 0.001)) == 10
    with pytest.raises(StompError, match="more than 100 frames a second") as caught:
        events(connection, frame("SEND", destination="/a", receipt="r"), now=1.002)
    assert (caught.value.code, caught.value.receipt) == (1008, "r")


def test_heart_beats_are_not_counted_as_frames():
    connection = connected()
    assert events(connection, b"\n" * 100_000) == []
    assert events(connection, b"\r\n" * 100_000) == []
    assert len(events(connection, frame("SEND", destination="/a"))) == 1


# DISCONNECT


def test_what_comes_after_disconnect_is_ignored():
    """STOMP: "Clients MUST NOT send any more frames after the DISCONNECT frame is sent"."""
    connection = connected()
    seen = events(connection, frame("DISCONNECT", receipt="77"), frame("SEND", destination="/a"), b"\xff\n\n\0")
    assert seen == [Disconnect(receipt="77", acknowledge=True)]
    assert events(connection, frame("SEND", destination="/a")) == []
    assert connection.receipt("77") == b"RECEIPT\nreceipt-id:77\n\n\0"


def test_disconnect_drops_open_transactions():
    """STOMP: transactions not committed "will be implicitly aborted if the client sends a DISCONNECT frame"."""
    assert events(connected(), BEGIN, held(1), frame("DISCONNECT"), COMMIT) == [Disconnect()]


def test_nothing_is_due_after_disconnect():
    connection = connected(heart_beat="1000,1000")
    connection.expires_at = 20.0
    events(connection, frame("DISCONNECT"))
    assert connection.timer_at is None
    assert connection.handle_timer(1000.0) == b""


# Frames of the server


def subscribed(version: str, **headers: str) -> Connection:
    connection = connected(version)
    events(connection, frame("SUBSCRIBE", destination=QUEUE, **headers))
    return connection


def test_a_message_is_as_wire_shows_it():
    """WIRE §5, the MESSAGE."""
    connection = subscribed("1.2", id="sub-0")
    assert connection.message(connection.subscriptions["sub-0"], '{"userId":"ế"}'.encode()) == (
        b"MESSAGE\ndestination:/user/queue/online-status\ncontent-type:application/json\nsubscription:sub-0\n"
        b'message-id:1\ncontent-length:16\n\n{"userId":"\xe1\xba\xbf"}\0'
    )


def test_message_ids_are_unique_over_all_subscriptions_of_a_connection():
    connection = subscribed("1.2", id="1")
    events(connection, frame("SUBSCRIBE", destination=QUEUE, id="2"))
    ids = [read(connection.message(connection.subscriptions[key], b"{}")).headers["message-id"] for key in "1212"]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("ack", ["client", "client-individual"])
def test_a_message_to_acknowledge_carries_ack_in_1_2(ack):
    """WIRE §6: "MESSAGEs for a `client`/`client-individual` subscription carry `ack` (1.2)"."""
    connection = subscribed("1.2", id="0", ack=ack)
    message = read(connection.message(connection.subscriptions["0"], b"{}"))
    assert message.headers["ack"] == message.headers["message-id"]
    assert message.body == b"{}"
    assert events(connection, frame("ACK", id=message.headers["ack"])) == []


@pytest.mark.parametrize(("version", "ack"), [("1.2", "auto"), ("1.1", "client"), ("1.0", "client")])
def test_other_messages_carry_no_ack(version, ack):
    connection = subscribed(version, id="0", ack=ack)
    assert "ack" not in read(connection.message(connection.subscriptions["0"], b"{}"), version).headers


def test_a_message_for_a_1_0_subscription_without_id_has_no_subscription():
    """WIRE §6, 1.0: "MESSAGE has no `subscription`"."""
    connection = subscribed("1.0")
    headers = read(connection.message(connection.subscriptions[QUEUE], b"{}"), "1.0").headers
    assert headers == {
        "destination": QUEUE,
        "content-type": "application/json",
        "message-id": "1",
        "content-length": "2",
    }


@pytest.mark.parametrize(("version", "escaped"), [("1.1", b"100%d\\cb"), ("1.2", b"100%d\\cb"), ("1.0", b"100%d\\cb")])
def test_a_message_gives_the_id_back_as_it_came(version, escaped):
    connection = connected(version)
    [event] = events(connection, b"SUBSCRIBE\ndestination:/a\nid:" + escaped + b"\n\n\0")
    assert isinstance(event, Subscribe)
    assert b"\nsubscription:" + escaped + b"\n" in connection.message(connection.subscriptions[event.id], b"{}")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_receipt_gives_the_id_back_as_it_came(version):
    connection = connected(version)
    [event] = events(connection, frame("BEGIN", transaction="t", receipt="a\\cb"))
    assert event.receipt is not None
    assert connection.receipt(event.receipt) == b"RECEIPT\nreceipt-id:a\\cb\n\n\0"


def test_an_error_frame_is_as_wire_says():
    """WIRE §6: "`message`, `content-type: text/plain`, `receipt-id` when the bad frame asked for a receipt".

    WIRE §3: "Header values that we make contain no colon or backslash (old clients do not unescape)"; the body has all.
    """
    error = StompError("destination /a:b", 1008, receipt="r:1")
    assert connected("1.2").error(error) == (
        b"ERROR\nmessage:destination /a,b\ncontent-type:text/plain\nreceipt-id:r\\c1\ncontent-length:16\n\n"
        b"destination /a:b\0"
    )
    assert b"message:destination /a,b\n" in connected("1.0").error(error)
    assert "receipt-id" not in read(connected().error(StompError("silence", 1002))).headers


def test_an_error_before_connected_is_written_in_the_version_that_was_asked_for():
    connection = Connection(now=0.0)
    events(connection, frame("CONNECT", accept_version="1.2"))
    assert b"receipt-id:a\\cb\n" in connection.error(StompError("", 1008, receipt="a:b"))


def test_an_error_before_connect_gives_the_receipt_id_back_as_it_came():
    connection = Connection(now=0.0)
    error = fails(connection, frame("SEND", receipt="a\\cb"), receipt="a\\cb", match="before")
    assert b"\nreceipt-id:a\\cb\n" in connection.error(error)


def test_a_lone_surrogate_in_an_error_does_not_break_the_frame():
    assert read(connected().error(StompError("id \ud800", 1008))).body == b"id ?"


# Time


def due(connection: Connection, until: float) -> list[tuple[float, bytes | str]]:
    """Run the timer as a caller does, and return what it gave and when, rounded to a millisecond."""
    seen: list[tuple[float, bytes | str]] = []
    while (at := connection.timer_at) is not None and at <= until:
        try:
            out: bytes | str = connection.handle_timer(at)
        except StompError as error:
            out = f"{error.code} {error.message}"
        if out:
            seen.append((round(at, 3), out))
    return seen


def test_a_connect_must_come_in_time():
    """WIRE §3: "The CONNECT frame must come within 10 s"; §6: 1008, "no CONNECT in time"."""
    connection = Connection(now=5.0)
    events(connection, b"\n", now=14.0)
    assert connection.handle_timer(14.999) == b""
    assert due(connection, 100.0) == [(15.0, "1008 no CONNECT within 10 s")]


def test_a_connect_that_came_in_time_may_be_answered_later():
    connection = Connection(now=0.0, silence_seconds=90)
    events(connection, frame("CONNECT", accept_version="1.2"), now=9.9)
    assert due(connection, 60.0) == []
    connection.connected(session="s", server="p", user="u", now=60.0)
    assert due(connection, 99.8) == []
    assert due(connection, 200.0) == [(99.9, "1002 silence")]


@pytest.mark.parametrize(
    ("client", "server", "silence", "tolerated"),
    [
        ("0,0", 10, 90, 90),  # no client heart-beats agreed: PRESENCE_SILENCE_SECONDS alone
        ("10000,0", 10, 90, 90),
        ("40000,0", 10, 90, 120),  # 3 times the agreed interval
        ("1000,0", 10, 5, 30),  # agreed is the larger of the two
        ("20000,0", 10, 5, 60),
        ("20000,0", 0, 5, 5),  # the server wants none
        ("0,10000", 10, 5, 5),  # the client can send none
        ("10000,0", 10, 0, 30),
        ("0,0", 10, 0, None),  # 0: never
        (None, 10, 0, None),  # "A missing heart-beat header MUST be treated the same way as a "heart-beat:0,0" header"
        (None, 10, 90, 90),
    ],
)
def test_silence_is_tolerated_as_agreed(client, server, silence, tolerated):
    """WIRE §3: "Silence tolerated: max(3 x agreed interval, `PRESENCE_SILENCE_SECONDS`)"."""
    connection = Connection(now=0.0, beat_seconds=server, silence_seconds=silence)
    connect(connection, now=1.0, **({"heart_beat": client} if client else {}))
    ends = [moment for moment in due(connection, 1000.0) if isinstance(moment[1], str)]
    assert ends == ([(1.0 + tolerated, "1002 silence")] if tolerated else [])


def test_any_byte_is_a_sign_of_life():
    """WIRE §3: "Any STOMP byte counts"; no byte does not."""
    connection = connected()
    for now, data in ((50.0, b"\n"), (100.0, b"SEN"), (150.0, b"D\ndestination:/a\n\n\0"), (200.0, b"")):
        assert connection.heard_at == now - 50
        events(connection, data, now=now)
        assert connection.heard_at == min(now, 150.0)
    assert due(connection, 1000.0) == [(240.0, "1002 silence")]


@pytest.mark.parametrize(
    ("client", "server", "every"),
    [
        ("0,10000", 10, 10),
        ("0,1", 10, 10),
        ("0,20000", 10, 20),
        ("0,10000", 2, 10),
        ("10000,0", 10, None),
        ("0,10000", 0, None),
        (None, 10, None),
    ],
)
def test_beats_are_sent_a_little_more_often_than_agreed(client, server, every):
    """STOMP: "the sender MUST send new data [...] at least every <n> milliseconds", n the larger of both."""
    connection = Connection(now=0.0, beat_seconds=server, silence_seconds=0)
    connect(connection, now=1.0, **({"heart_beat": client} if client else {}))
    seen = due(connection, 101.0)
    times = [1.0, *(at for at, out in seen if out == b"\n")]
    gaps = {round(after - before, 3) for before, after in pairwise(times)}
    assert gaps == ({0.9 * every} if every else set())


def test_what_is_sent_puts_off_the_next_beat():
    connection = connected(heart_beat="0,10000")
    connection.sent(5.0)
    assert connection.handle_timer(9.0) == b""
    assert due(connection, 24.0) == [(14.0, b"\n"), (23.0, b"\n")]


def test_no_beat_is_sent_before_connected():
    connection = Connection(now=0.0)
    events(connection, frame("CONNECT", accept_version="1.2", heart_beat="0,1000"))
    assert connection.handle_timer(100.0) == b""


def test_1_0_has_no_heart_beats():
    """But `heart-beat` is in CONNECTED always (WIRE §3), and silence counts."""
    connection = Connection(now=0.0)
    assert connect(connection, "1.0", heart_beat="40000,1000").headers["heart-beat"] == "10000,10000"
    assert due(connection, 1000.0) == [(90.0, "1002 silence")]


def test_a_connection_ends_with_its_token():
    """WIRE §1: "A connection whose token ends [...] without renewal gets ERROR `token expired` and close 1008"."""
    connection = connected()
    connection.expires_at = 30.0
    assert connection.handle_timer(29.999) == b""
    assert due(connection, 1000.0) == [(30.0, "1008 token expired")]


def test_a_renewed_token_ends_later():
    connection = connected()
    connection.expires_at = 30.0
    connection.expires_at = 80.0
    assert due(connection, 1000.0) == [(80.0, "1008 token expired")]


def test_an_end_by_the_timer_is_an_end():
    connection = connected()
    with pytest.raises(StompError, match=r"^silence$"):
        connection.handle_timer(90.0)
    assert events(connection, frame("SEND", destination="/a"), now=91.0) == []
    assert connection.timer_at is None
    assert connection.handle_timer(1000.0) == b""


def test_nothing_is_due_after_an_error():
    connection = connected(heart_beat="0,1000")
    connection.error(StompError("destination /a", 1008))
    assert connection.timer_at is None
    assert connection.handle_timer(1000.0) == b""


@given(
    st.sampled_from(("0,0", "1000,1000", "30000,20000", "0,5000", "50000,0")),
    st.lists(st.tuples(st.sampled_from(("heard", "sent", "frame")), st.floats(0.01, 5.0)), max_size=40),
)
def test_input_and_output_never_bring_the_timer_forward(heart_beat, steps):
    """So a timer that was set once may fire early, never late."""
    connection = Connection(now=0.0, silence_seconds=20)
    connect(connection, heart_beat=heart_beat)
    now = 0.0
    armed = connection.timer_at
    for step, seconds in steps:
        now += seconds
        if armed is not None and now >= armed:
            try:
                connection.handle_timer(now)
            except StompError:
                return
            armed = connection.timer_at
        if step == "sent":
            connection.sent(now)
        else:
            events(connection, b"\n" if step == "heard" else frame("ACK", id="1"), now=now)
        assert armed is not None
        assert connection.timer_at is not None
        assert connection.timer_at >= armed


# Any input

COMMANDS = (
    "CONNECT",
    "STOMP",
    "SEND",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "BEGIN",
    "COMMIT",
    "ABORT",
    "ACK",
    "NACK",
    "DISCONNECT",
)
HEADERS = {
    "accept-version": st.sampled_from((*VERSIONS, "1.0,1.2", "3")),
    "heart-beat": st.sampled_from(("0,0", "1,1", "x")),
    "destination": st.sampled_from(("/a", QUEUE)),
    "id": st.sampled_from(("0", "1", ":")),
    "message-id": st.just("1"),
    "subscription": st.just("1"),
    "transaction": st.sampled_from(("t", "u")),
    "receipt": st.sampled_from(("r", "a:b", "")),
    "ack": st.sampled_from(("auto", "client", "x")),
}


@given(
    st.sampled_from(VERSIONS),
    st.lists(
        st.builds(
            lambda command, headers, body: (command, headers, body),
            st.sampled_from((*COMMANDS, "X")),
            st.fixed_dictionaries({}, optional=HEADERS),
            st.sampled_from((b"", b"", b"x")),
        )
        | st.binary(max_size=5),
        max_size=20,
    ),
)
def test_any_frames_give_events_or_one_error_and_every_receipt_asked_for_is_owed_once(version, pieces):
    connection = connected(version, Limits(subscriptions=2, held_sends=2))
    error = None
    asked = []
    owed = []
    for piece in pieces:
        data = piece if isinstance(piece, bytes) else encode(*piece, version=version)
        try:
            owed += [event.receipt for event in connection.receive(data, 0.0) if event.acknowledge]
        except StompError as ended:
            error = ended
            break
        if isinstance(piece, bytes) and piece.strip(b"\r\n"):
            return  # the beginning of a frame, so the next piece is no frame
        if isinstance(piece, tuple) and "receipt" in piece[1]:
            asked.append(piece[1]["receipt"])
        if piece[:1] == ("DISCONNECT",):
            break
    if error is not None:
        assert error.code in {1002, 1008, 1009}
        assert read(connection.error(error), version).command == "ERROR"
    assert owed == asked
    assert len(connection.subscriptions) <= 2
    assert sum(map(len, connection._transactions.values())) <= 2
