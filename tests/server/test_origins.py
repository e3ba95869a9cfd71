"""presence.server.origins: which web pages may talk to the server (WIRE §2 CORS, §3 Origin)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from presence.server.origins import Origins, is_loopback

PUBLIC = Origins(("https://app.example", "http://tool.example:8080", "capacitor://localhost"), loopback_only=False)
LOCAL = Origins((), loopback_only=True)


@pytest.mark.parametrize(
    ("origin", "host"),
    (
        ("http://chat.example", "chat.example"),
        ("https://chat.example", "chat.example"),
        ("https://chat.example", "chat.example:443"),
        ("http://chat.example", "chat.example:80"),
        ("https://chat.example:8443", "chat.example:8443"),
        ("https://CHAT.example", "chat.EXAMPLE"),
        ("http://[2001:db8::1]:8080", "[2001:db8::1]:8080"),
        ("http://[2001:db8::80]", "[2001:db8::80]"),
    ),
)
def test_the_servers_own_host_and_port_are_allowed_whatever_the_scheme(origin, host):
    """WIRE §3: "the host and port of the request (scheme not compared)"."""
    assert PUBLIC.allow(origin, host)
    assert LOCAL.allow(origin, host)


@pytest.mark.parametrize(
    ("origin", "host"),
    (
        ("https://chat.example", "chat.example:8443"),
        ("https://chat.example:8443", "chat.example"),
        ("https://chat.example:8080", "chat.example:80"),
        ("https://evil.example", "chat.example"),
        ("https://chat.example.evil.example", "chat.example"),
        ("https://evil-chat.example", "chat.example"),
        ("https://chat.example@evil.example", "chat.example"),
        ("https://chat.example\\@evil.example", "chat.example"),
        ("http://[2001:db8::80]", "[2001:db8:]"),
        ("null", "null"),
        ("null", "chat.example"),
        ("", ""),
        ("chat.example", "chat.example"),
        ("//chat.example", "chat.example"),
        ("https://", ""),
        ("https:///", ""),
        ("file://", ""),
        ("http://[::1", "[::1"),
    ),
)
def test_all_else_is_not(origin, host):
    """WIRE §3: "all else, and `null`, 403"."""
    assert not PUBLIC.allow(origin, host)
    assert not LOCAL.allow(origin, host)


def test_the_configured_list_is_allowed_as_it_is():
    """WIRE §3: "or one of a configured list": scheme, host and port."""
    for origin in ("https://app.example", "HTTPS://App.Example", "http://tool.example:8080", "capacitor://localhost"):
        assert PUBLIC.allow(origin, "chat.example")
    for origin in ("http://app.example", "https://app.example:8443", "http://tool.example", "https://x.app.example"):
        assert not PUBLIC.allow(origin, "chat.example")


@pytest.mark.parametrize(
    "origin",
    ("http://localhost", "https://localhost:3000", "http://127.0.0.1:1", "http://127.9.9.9", "http://[::1]:8080"),
)
def test_loopback_is_allowed_when_nobody_else_can_reach_the_server(origin):
    """WIRE §3: "when the server listens on loopback only, any loopback origin"."""
    assert LOCAL.allow(origin, "127.0.0.1:8080")
    assert not PUBLIC.allow(origin, "chat.example")


@pytest.mark.parametrize(
    "origin", ("http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://10.0.0.1", "http://0.0.0.0")
)
def test_what_looks_like_loopback_is_not(origin):
    """WIRE §3: "any loopback origin; all else [...] 403"."""
    assert not LOCAL.allow(origin, "127.0.0.1:8080")


@pytest.mark.parametrize(
    ("host", "expected"),
    (
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
        ("", False),
    ),
)
def test_loopback_means_this_machine_alone(host, expected):
    """WIRE §3: "when the server listens on loopback only"."""
    assert is_loopback(host) is expected


@given(st.text(), st.text())
def test_no_header_makes_it_raise(origin, host):
    assert PUBLIC.allow(origin, host) in (True, False)
    assert LOCAL.allow(f"http://{origin}", host) in (True, False)
