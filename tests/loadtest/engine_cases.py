"""Cases of test_engine.py. Each runs in a process of its own, patched by gevent, as under Locust."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, SO_RCVBUF, SOCK_STREAM, SOL_SOCKET, socket
from time import monotonic
from typing import Any

import gevent  # type: ignore[import-untyped]
from gevent.event import Event  # type: ignore[import-untyped]
from gevent.queue import Queue  # type: ignore[import-untyped]

from loadtest import wire
from loadtest.engine import Connection, Engine, sources_for

LIMIT = 10.0  # seconds that anything may take


class Peer:
    """The server's side of one connection, on a greenlet."""

    def __init__(self, sock: socket, address: tuple[str, int]) -> None:
        self.sock, self.address, self.head = sock, address, b""
        self.keys: list[bytes] = []
        sock.settimeout(LIMIT)

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def receive(self) -> tuple[int, bytes]:
        first, size = self.take(2)
        assert first & 0x80 and size & 0x80  # whole, and masked
        size &= 0x7F
        if size > 125:
            size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
        key, payload = self.take(4), self.take(size)
        self.keys.append(key)
        return first & 0x0F, bytes(octet ^ key[at % 4] for at, octet in enumerate(payload))

    def send(self, payload: bytes, opcode: int = wire.TEXT) -> None:
        assert len(payload) < 1 << 16
        size = len(payload)
        head = bytes([0x80 | opcode, size]) if size < 126 else bytes([0x80 | opcode, 126]) + size.to_bytes(2, "big")
        self.sock.sendall(head + payload)

    def upgrade(self) -> None:
        while b"\r\n\r\n" not in self.head:
            self.head += self.take(1)
        key = self.head.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
        self.sock.sendall(b"HTTP/1.1 101 x\r\nSec-WebSocket-Accept: " + wire.accept_of(key) + b"\r\n\r\n")

    def greet(self) -> bytes:
        self.upgrade()
        _, connect = self.receive()
        self.send(b"CONNECTED\nversion:1.2\n\n\0")
        return connect

    def at_end(self) -> bool:
        return self.sock.recv(1) == b""


class Server:
    def __init__(self, receive_buffer: int = 0) -> None:
        self.listener = socket(AF_INET, SOCK_STREAM)
        if receive_buffer:
            self.listener.setsockopt(SOL_SOCKET, SO_RCVBUF, receive_buffer)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(100)
        self.listener.settimeout(LIMIT)
        self.address = ("127.0.0.1", self.listener.getsockname()[1])

    def accept(self) -> Peer:
        return Peer(*self.listener.accept())


class Told:
    """A handler that keeps what it is told."""

    def __init__(self) -> None:
        self.queue: Queue[tuple[Any, ...]] = Queue()
        self.then: Callable[[Connection], None] | None = None

    def next(self) -> tuple[Any, ...]:
        told: tuple[Any, ...] = self.queue.get(timeout=LIMIT)
        return told

    def nothing(self) -> bool:
        """Whether nothing is told by the time that a timer, made now, is called twice: what was to be read, is."""
        done, engine = Event(), Engine()
        engine.at(monotonic() + 0.1, done.set)
        assert done.wait(LIMIT)
        return bool(self.queue.empty())

    def on_connected(self, conn: Connection, at: float) -> None:
        self.queue.put(("connected",))
        if self.then:
            self.then(conn)

    def on_message(self, conn: Connection, headers: Mapping[str, str], body: str, at: float) -> None:
        assert monotonic() - 1 < at <= monotonic()
        self.queue.put(("message", dict(headers), body))
        if self.then:
            self.then(conn)

    def on_receipt(self, conn: Connection, receipt_id: str, at: float) -> None:
        self.queue.put(("receipt", receipt_id))

    def on_error(self, conn: Connection, message: str, at: float) -> None:
        self.queue.put(("error", message))

    def on_closed(self, conn: Connection, code_or_reason: str, at: float) -> None:
        assert not conn.is_open
        self.queue.put(("closed", code_or_reason))

    def on_refused(self, conn: Connection, reason: str, at: float) -> None:
        assert not conn.is_open
        self.queue.put(("refused", reason))


def session(**options: Any) -> tuple[Engine, Told, Connection, Peer]:
    """An open one."""
    engine, told, server = Engine(**options), Told(), Server()
    conn = engine.connect(server.address, "/ws", told, token="t")
    peer = server.accept()
    peer.greet()
    assert told.next() == ("connected",) and conn.is_open
    return engine, told, conn, peer


def a_session_from_the_upgrade_to_the_close() -> None:
    engine, told, server = Engine(), Told(), Server()
    before = engine.now()
    conn = engine.connect(
        server.address, "/ws", told, token="abc", upgrade={"User-Agent": "iPad"}, connect={"device": "web", "host": "h"}
    )
    peer = server.accept()
    connect = peer.greet()
    assert b"GET /ws HTTP/1.1\r\n" in peer.head and b"User-Agent: iPad\r\n" in peer.head
    assert f"Host: 127.0.0.1:{server.address[1]}\r\n".encode() in peer.head
    head, *lines = connect.removesuffix(b"\n\n\0").split(b"\n")
    assert head == b"CONNECT"
    assert sorted(lines) == [
        b"Authorization:Bearer abc", b"accept-version:1.2", b"device:web", b"heart-beat:0,0", b"host:h",
    ]  # fmt: skip
    assert told.next() == ("connected",)
    assert conn.is_open and before < conn.upgraded_at < engine.now() and len(engine) == 1

    conn.send("SEND", {"destination": "/a", "receipt": "1"}, "{}")
    assert peer.receive() == (wire.TEXT, b"SEND\ndestination:/a\nreceipt:1\ncontent-length:2\n\n{}\0")
    peer.send(b"\n")
    peer.send(b'RECEIPT\nreceipt-id:1\n\n\0MESSAGE\nsubscription:0\n\n{"x":"\xc3\xbc"}\0')
    assert told.next() == ("receipt", "1")
    assert told.next() == ("message", {"subscription": "0"}, '{"x":"ü"}')
    peer.send(b"ping", wire.PING)
    assert peer.receive() == (wire.PONG, b"ping")
    peer.send(b"ERROR\nmessage:no such thing\n\nbody\0")
    assert told.next() == ("error", "no such thing")
    peer.send(b"\x03\xf0why", wire.CLOSE)
    assert told.next() == ("closed", "1008")
    assert peer.receive() == (wire.CLOSE, b"\x03\xf0") and peer.at_end()
    conn.send("SEND", {})
    conn.close()
    conn.drop()
    conn.freeze()
    conn.thaw()
    assert told.nothing() and len(engine) == 0 and engine.errors == 0


def what_ends_a_session_is_told_once() -> None:
    _, told, _, peer = session()
    peer.sock.close()
    assert told.next() == ("closed", "no close frame")
    _, told, _, peer = session()
    peer.sock.setsockopt(SOL_SOCKET, 13, bytes((1, 0, 0, 0, 0, 0, 0, 0)))  # SO_LINGER
    peer.sock.close()
    assert told.next() == ("closed", "reset")
    _, told, conn, peer = session()
    peer.send(b"GARBAGE\0")
    kind, reason = told.next()
    assert kind == "closed" and "blank line" in reason
    assert told.nothing() and not conn.is_open


def what_is_refused_says_why() -> None:
    engine, told, server = Engine(), Told(), Server()

    def refused(conn: Connection) -> str:
        kind, reason = told.next()
        assert kind == "refused" and not conn.is_open
        return str(reason)

    conn = engine.connect(server.address, "/", told, token="")
    peer = server.accept()
    assert peer.take(5) == b"GET /"
    peer.sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
    assert refused(conn) == "503 Service Unavailable"
    conn = engine.connect(server.address, "/", told, token="")
    peer = server.accept()
    peer.upgrade()
    assert b"Authorization" not in peer.receive()[1]
    peer.send(b"ERROR\nmessage:token expired\n\n\0")
    peer.send(b"\x03\xf0", wire.CLOSE)
    assert refused(conn) == "ERROR: token expired"
    conn = engine.connect(server.address, "/", told, token="")
    server.accept().sock.close()
    assert refused(conn) in {"no close frame", "reset"}
    server.listener.close()
    assert refused(engine.connect(server.address, "/", told, token="")) == "connection refused"
    assert told.nothing() and len(engine) == 0

    nowhere = Engine(sources=["192.0.2.1"])  # kept for documentation: no machine has it
    conn = nowhere.connect(server.address, "/", told, token="")
    assert told.queue.empty(), "told before the owner has the connection"
    assert "EADDRNOTAVAIL" in refused(conn)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        conn = engine.connect(server.address, "/", told, token="")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "EMFILE" in refused(conn)
    assert errno.EMFILE and told.nothing()


def masks_are_fresh_or_fixed() -> None:
    for fresh in (True, False):
        engine, _, conn, peer = session(fresh_masks=fresh)
        prepared = engine.prepare("SEND", {"destination": "/b"})
        assert prepared == conn.prepare("SEND", {"destination": "/b"})
        for _ in range(3):
            conn.send_prepared(prepared)
            assert peer.receive() == (wire.TEXT, b"SEND\ndestination:/b\n\n\0")
        conn.send("SEND", {"destination": "/b"})
        peer.receive()
        assert len(set(peer.keys)) == (5 if fresh else 1)


def a_close_says_disconnect_and_waits_for_the_answer() -> None:
    engine, told, conn, peer = session()
    peer.send(b"MESSAGE\n\n\0")  # unread when it closes: the kernel must not make a reset of it
    conn.close()
    assert not conn.is_open and len(engine) == 1
    conn.send("SEND", {})
    assert peer.receive() == (wire.TEXT, b"DISCONNECT\n\n\0")
    assert peer.receive() == (wire.CLOSE, b"\x03\xe8")
    peer.send(b"\x03\xe8", wire.CLOSE)
    assert peer.at_end()
    assert told.nothing() and len(engine) == 0

    engine, told, conn, peer = session()
    conn.freeze()
    conn.close()
    assert b"DISCONNECT" in peer.receive()[1]
    began = monotonic()
    peer.sock.close()
    while len(engine):
        gevent.sleep(0.01)
        assert monotonic() - began < 3, "a frozen one did not hear the answer"


def a_drop_says_nothing() -> None:
    engine, told, conn, peer = session()
    conn.drop()
    assert peer.at_end() and len(engine) == 0
    engine, told, conn, peer = session()
    conn.drop(reset=True)
    try:
        peer.sock.recv(1)
    except ConnectionResetError:
        pass
    else:
        raise AssertionError("no reset")
    assert told.nothing()


def a_frozen_one_neither_reads_nor_writes_until_it_thaws() -> None:
    engine, told, conn, peer = session()
    conn.freeze()
    conn.freeze()
    peer.send(b"MESSAGE\n\n1\0")
    peer.send(b"", wire.PING)
    conn.send("SEND", {"n": "frozen"})
    assert told.nothing() and conn.is_open and len(engine) == 1
    conn.thaw()
    conn.thaw()
    assert told.next()[2] == "1"
    assert peer.receive() == (wire.PONG, b"")
    conn.send("SEND", {"n": "thawed"})
    assert peer.receive()[1] == b"SEND\nn:thawed\n\n\0"
    conn.freeze()
    peer.sock.close()
    assert told.nothing()
    conn.thaw()
    assert told.next()[0] == "closed"


def a_slow_server_gets_everything_in_order() -> None:
    engine, told, server = Engine(), Told(), Server(receive_buffer=4096)
    conn = engine.connect(server.address, "/ws", told, token="t")
    peer = server.accept()
    peer.greet()
    told.next()
    bodies = [str(number) * 60_000 for number in range(10, 40)]
    for body in bodies:
        conn.send("SEND", {}, body)
    for body in bodies:
        assert body.encode() in peer.receive()[1]
    conn.send("SEND", {"n": "after"})
    assert peer.receive()[1] == b"SEND\nn:after\n\n\0"


def timers_are_called_in_order_and_never_early() -> None:
    engine, done, called = Engine(), Event(), []
    start = engine.now()

    def call(name: str, when: float) -> None:
        called.append((name, engine.now() - when))
        if name == "c":
            engine.at(start, call, "late", start)  # in the past: at once
        if name == "d":
            done.set()

    def broken() -> None:
        raise ValueError("on purpose")

    for name, after in (("d", 0.5), ("b", 0.02), ("c", 0.05), ("a", 0.01), ("x", 0.03)):
        timer = engine.at(start + after, call, name, start + after)
        if name == "x":
            timer.cancel()
    engine.at(start + 0.04, broken)
    assert done.wait(LIMIT)
    assert [name for name, _ in called] == ["a", "b", "c", "late", "d"]
    assert all(0 <= lag < 0.4 for _, lag in called[:3]), "some waited for the one that was made first"
    assert engine.errors == 1
    lag = engine.take_lag()
    assert len(lag) == 6 and len(engine.take_lag()) == 0
    assert min(lag) >= 0 and max(lag) >= 0.05, "the one for the past is late"


def what_is_due_all_at_once_leaves_room_for_the_rest() -> None:
    engine, told, _, peer = session()
    calls: list[float] = []

    def call() -> None:
        end = monotonic() + 0.001
        while monotonic() < end:
            pass
        calls.append(monotonic())

    peer.send(b"MESSAGE\n\n\0")
    now = engine.now()
    for _ in range(500):
        engine.at(now, call)
    assert told.next()[0] == "message"
    assert len(calls) < 100
    while len(calls) < 500:
        gevent.sleep(0.01)
        assert monotonic() - now < LIMIT


def an_event_of_one_that_was_just_closed_reaches_nobody() -> None:
    _drop_both_and_connect(0)


def an_event_of_one_that_was_just_closed_does_no_harm_to_who_has_its_number_now() -> None:
    _drop_both_and_connect(2)


def _drop_both_and_connect(count: int) -> None:
    """Two sockets are ready at once; the first's owner drops the other, and connects anew."""
    engine, told, server = Engine(), Told(), Server()
    conns, peers = [], []
    for _ in range(2):
        conns.append(engine.connect(server.address, "/ws", told, token="t"))
        peers.append(server.accept())
        peers[-1].greet()
        told.next()
    made: list[Connection] = []

    def then(conn: Connection) -> None:
        told.then = None
        for one in conns:
            one.drop()
        made.extend(engine.connect(server.address, "/ws", told, token="t") for _ in range(count))

    told.then = then
    for peer in peers:
        peer.sock.setblocking(False)  # no turn for the engine in between
        peer.send(b"MESSAGE\n\n\0")
    assert told.next()[0] == "message"
    for _ in range(count):
        peers.append(server.accept())
        peers[-1].greet()
        assert told.next() == ("connected",)
    assert all(one.is_open for one in made) and told.nothing() and engine.errors == 0


def an_owner_that_raises_harms_no_other() -> None:
    engine, told, conn, peer = session()

    def then(_: Connection) -> None:
        told.then = None
        raise ValueError("on purpose")

    told.then = then
    peer.send(b"MESSAGE\n\n1\0")
    assert told.next()[2] == "1"
    peer.send(b"MESSAGE\n\n2\0")
    assert told.next()[2] == "2"
    assert engine.errors == 1 and conn.is_open


def sources_take_turns() -> None:
    assert sources_for(12_000) == ["127.0.0.1"]
    assert sources_for(12_001) == ["127.0.1.1", "127.0.1.2"]
    assert len(set(sources_for(12_000 * 600))) == 600
    engine, told, server = Engine(sources=sources_for(20_000)), Told(), Server()
    for _ in range(4):
        engine.connect(server.address, "/ws", told, token="t")
    assert [server.accept().address[0] for _ in range(4)] == ["127.0.1.1", "127.0.1.2"] * 2
    engine, servers = Engine(sources=sources_for(20_000)), (Server(), Server())
    for number in range(4):  # each instance from each address, though they take turns as well
        engine.connect(servers[number % 2].address, "/ws", told, token="t")
    for one in servers:
        assert [one.accept().address[0] for _ in range(2)] == ["127.0.1.1", "127.0.1.2"]


@contextmanager
def floor():
    process = subprocess.Popen([sys.executable, "-m", "loadtest.floor"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield ("127.0.0.1", int(process.stdout.readline().rpartition(":")[2]))
    finally:
        process.kill()
        process.wait()


def a_thousand_sessions_on_the_null_server_take_little_room() -> None:
    count, engine, told = 1_000, Engine(), Told()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with floor() as address:
        conns: list[Connection] = []

        def connect(number: int) -> None:
            conns.extend(engine.connect(address, "/ws", told, token="t" * 200) for _ in range(number))
            for _ in range(number):
                assert told.next() == ("connected",)

        connect(200)  # what is needed once is there now
        before = resident()
        for _ in range(count // 200):
            connect(200)
        beat = engine.prepare("SEND", {"destination": "/app/heartbeat", "receipt": "b\\1"})
        for conn in conns:
            conn.send_prepared(beat)
        for _ in conns:
            assert told.next() == ("receipt", "b\\1")
        assert (resident() - before) / count <= 2048
        large = "x" * 100_000
        conns[0].send("SEND", {"destination": "/x"}, "\nreceipt:none\n")
        conns[0].send("SEND", {"destination": "/x", "receipt": "large"}, large)
        assert told.next() == ("receipt", "large")
        for conn in conns:
            conn.close()
        end = monotonic() + LIMIT
        while len(engine):
            assert monotonic() < end
            gevent.sleep(0.01)
        engine.connect(address, "/ws", told, token="t")
        assert told.next() == ("connected",)
        engine.close()
        assert told.queue.empty() and engine.errors == 0 and len(engine) == 0
