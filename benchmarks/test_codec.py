"""What the STOMP codec costs: the ceiling of everything a connection does."""

from __future__ import annotations

import pytest

from presence.core.model import Status
from presence.stomp.frames import Limits, Parser, encode

FRAMES = 1_000
HEARTBEAT = b"SEND\ndestination:/app/heartbeat\ncontent-length:0\n\n\0"
MESSAGE = {
    "destination": "/user/queue/online-status",
    "content-type": "application/json",
    "subscription": "sub-0",
    "message-id": "17",
}


def read_all(data: bytes, piece: int, version: str = "1.2") -> int:
    parser, found = Parser(Limits()), 0
    parser.version = version
    for start in range(0, len(data), piece):
        parser.feed(data[start : start + piece])
        while parser.next_frame():
            found += 1
    return found


def test_parse_a_thousand_heartbeats_each_in_its_own_message(benchmark):
    assert benchmark(read_all, HEARTBEAT * FRAMES, len(HEARTBEAT)) == FRAMES


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
@pytest.mark.parametrize("size", [100, 1_000, 10_000])
def test_parse_a_hundred_frames_by_size_and_version(benchmark, size, version):
    frame = encode("SEND", {"destination": "/app/presence.subscribe"}, b"x" * size, version=version)
    assert benchmark(read_all, frame * 100, len(frame), version) == 100


def test_parse_a_thousand_heartbeats_in_pieces_of_a_kilobyte(benchmark):
    assert benchmark(read_all, HEARTBEAT * FRAMES, 1024) == FRAMES


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_encode_a_thousand_messages_by_version(benchmark, version):
    body = Status("user-1", True, 1752748200123456).event
    assert benchmark(lambda: [encode("MESSAGE", MESSAGE, body, version=version) for _ in range(FRAMES)])


def test_parse_a_frame_of_a_thousand_ids(benchmark):
    ids = b",".join(b'"f1f8f884-a8aa-44ec-9313-%012d"' % number for number in range(1_000))
    frame = b'SEND\ndestination:/app/presence.subscribe\n\n{"userIds":[%b]}\0' % ids
    assert benchmark(read_all, frame, len(frame)) == 1


def test_encode_a_thousand_changes_for_one_session(benchmark):
    def encode_all() -> int:
        bodies = [Status(f"user-{number}", True, 1752748200123456 + number).event for number in range(FRAMES)]
        return sum(len(encode("MESSAGE", MESSAGE, body, version="1.2")) for body in bodies)

    assert benchmark(encode_all) > 0


def test_encode_one_change_for_a_thousand_sessions(benchmark):
    def encode_all() -> int:
        status = Status("user-1", True, 1752748200123456)
        return sum(len(encode("MESSAGE", MESSAGE, status.event, version="1.2")) for _ in range(FRAMES))

    assert benchmark(encode_all) > 0
