"""User-Agent → device. No I/O, no clock."""

from __future__ import annotations

_TABLETS = ("ipad", "tablet", "kindle", "silk/", "playbook")
_MOBILES = ("mobi", "iphone", "ipod", "opera mini", "blackberry", "windows phone")


def device_of(user_agent: str | None) -> str:
    """Return ``tablet``, ``mobile`` or else ``web`` (WIRE §4). An iPad that poses as a Mac is ``web``."""
    agent = (user_agent or "").lower().replace("tablet pc", "")  # old Windows says "Tablet PC" on every desktop
    if any(word in agent for word in _TABLETS) or ("android" in agent and "mobi" not in agent):
        return "tablet"
    return "mobile" if any(word in agent for word in _MOBILES) else "web"
