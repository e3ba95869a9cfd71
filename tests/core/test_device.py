"""presence.core.device: the device, from the User-Agent of the upgrade (WIRE §4)."""

from __future__ import annotations

import pytest

from presence.core.device import device_of

MOZILLA = "Mozilla/5.0"
AGENTS = (
    (f"{MOZILLA} (iPad; CPU OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile/15E148 Safari", "tablet"),
    (f"{MOZILLA} (Linux; Android 14; SM-X710) AppleWebKit/537.36 Chrome/126.0.0.0 Safari/537.36", "tablet"),
    (f"{MOZILLA} (Android 14; Tablet; rv:127.0) Gecko/127.0 Firefox/127.0", "tablet"),
    (f"{MOZILLA} (Macintosh; U) AppleWebKit/533.16 Silk/1.0.22.79 Safari", "tablet"),
    (f"{MOZILLA} (PlayBook; U; RIM Tablet OS 2.1.0) AppleWebKit/536.2+ Version/7.2.1.0 Safari/536.2+", "tablet"),
    (f"{MOZILLA} (iPhone; CPU iPhone OS 17_5 like Mac OS X) Version/17.5 Mobile/15E148 Safari/604.1", "mobile"),
    (f"{MOZILLA} (Linux; Android 14; Pixel 8) AppleWebKit/537.36 Chrome/126.0.0.0 Mobile Safari/537.36", "mobile"),
    (f"{MOZILLA} (Android 14; Mobile; rv:127.0) Gecko/127.0 Firefox/127.0", "mobile"),
    ("Opera/9.80 (J2ME/MIDP; Opera Mini/9.80) Presto/2.5.25", "mobile"),
    ("MyApp/3 CFNetwork/1494 (iPhone; iOS 17.5)", "mobile"),
    (f"{MOZILLA} (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/126.0.0.0 Safari/537.36", "web"),
    ("Mozilla/4.0 (compatible; MSIE 8.0; Windows NT 6.1; Tablet PC 2.0)", "web"),
    (f"{MOZILLA} (Macintosh; Intel Mac OS X 14_5) AppleWebKit/605.1.15 Version/17.5 Safari/605.1.15", "web"),
    ("okhttp/4.12.0", "web"),
    ("", "web"),
    (None, "web"),
)


@pytest.mark.parametrize(("agent", "device"), AGENTS)
def test_the_device_follows_from_the_user_agent(agent, device):
    """WIRE §4: "Device, from the User-Agent of the upgrade: `tablet`, `mobile`, else `web`"."""
    assert device_of(agent) == device


def test_the_case_of_a_user_agent_does_not_matter():
    assert [device_of("IPAD"), device_of("ANDROID MOBILE")] == ["tablet", "mobile"]
