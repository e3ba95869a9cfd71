"""With which real servers and clients the tests were run: each is noted where it is used, and told at the end."""

from __future__ import annotations

import importlib.metadata
import platform

seen: dict[str, set[str]] = {}
"""Name of a server or client → versions met in this process."""


def note(name: str, version: str) -> None:
    """Remember that ``name`` took part, as it named its own ``version``."""
    seen.setdefault(name, set()).add(version)


def note_package(distribution: str) -> None:
    """Remember that an installed Python package took part."""
    note(distribution, importlib.metadata.version(distribution))


def merge(others: dict[str, list[str]]) -> None:
    """Add what another process met, as `dump` gave it."""
    for name, versions in others.items():
        seen.setdefault(name, set()).update(versions)


def dump() -> dict[str, list[str]]:
    """What this process met, in a form that travels between processes."""
    return {name: sorted(versions) for name, versions in seen.items()}


def lines() -> list[str]:
    """One line for each server or client met."""
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [python, *(f"{name} {', '.join(sorted(versions))}" for name, versions in sorted(seen.items()))]
