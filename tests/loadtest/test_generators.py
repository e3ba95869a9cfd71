"""What the null server counts for the comparison of load generators."""

from __future__ import annotations

from benchmarks.generators import __main__ as generators
from loadtest import wire


def test_a_connect_is_counted_once_whatever_else_the_session_sends(monkeypatch):
    moments = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(moments))
    seen = generators.Seen()
    for _ in range(3):
        seen.note(wire.stomp("CONNECT", {"accept-version": "1.2", "host": "h"}))
        seen.note(wire.stomp("SUBSCRIBE", {"id": "0", "destination": "/user/queue/online-status"}))
        seen.note(wire.stomp("SEND", {"destination": "/app/heartbeat", "receipt": "b"}))

    assert (seen.connects.value, seen.beats.value, seen.rate) == (3, 3, 1.0)
