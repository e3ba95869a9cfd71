"""The options of the crowd on Locust's own command line; each is also read from the environment.

`--sessions` is `LOADTEST_SESSIONS` there, and so with all of them. Importing this module adds them to `locust --help`.
Locust's `-u` counts Locust's users: the crowd is one of them in each process, the others are probes.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any, NamedTuple

from locust import events


def _above(least: float, kind: type[int | float]) -> Any:
    """A parser of numbers above or at `least`, for argparse."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no number") from None
        if not least <= value < float("inf"):
            raise ArgumentTypeError(f"{text} is below {least:g}" if value < least else f"{text!r} is no number")
        return value

    return parse


class _Option(NamedTuple):
    name: str
    help: str
    type: Any = str
    default: Any = None
    page: bool = True
    """It can also be set on the web page."""


OPTIONS = (
    _Option("sessions", "Sessions of the crowd, over all processes.", _above(1, int), 1000),
    _Option(
        "period", "Seconds between two heartbeats of a session (the scenario's own: mostly 30).", _above(0.05, float)
    ),
    _Option("jitter", "Share of the period by which a heartbeat varies.", _above(0, float), 0.1),
    _Option("friends", "Friends of a user on average; each session watches its friends.", _above(0, float), 20.0),
    _Option("most", "Friends of a user at most.", _above(1, int), 500),
    _Option("watchers", "Share of the sessions that watch their friends, 0 to 1.", _above(0, float), 1.0),
    _Option(
        "connect-rate",
        "Connects a second, over all processes; of a rate that rises, the highest.",
        _above(0.1, float),
        200.0,
    ),
    _Option("stay", "Mean seconds for which a session stays before it leaves; 0: for ever.", _above(0, float)),
    _Option("away", "Mean seconds until a session that left is back.", _above(0, float)),
    _Option("share", "Share of the sessions that the scenario's disturbance takes, 0 to 1.", _above(0, float)),
    _Option("every", "Seconds between two disturbances, or the period of flips.", _above(0.01, float)),
    _Option("hold", "Seconds of calm before a disturbance.", _above(0, float), 10.0),
    _Option("rest-rate", "REST requests a second, over all processes.", _above(0, float), 20.0),
    _Option("beat-receipts", "Share of the heartbeats that ask for a receipt, and are timed.", _above(0, float), 0.1),
    _Option(
        "late",
        "Seconds after which a notice is late; the end of a run waits as long.",
        _above(0, float),
        5.0,
    ),
    _Option("seed", "Of all that is drawn.", int, 0),
    _Option(
        "sources",
        "Source addresses of the connections, separated by commas; none: on loopback as many as are needed.",
        str,
        "",
        page=False,
    ),
    _Option("target", "Target file; without one, --host and LOADTEST_SECRET.", page=False),
    _Option("restart", "Command that restarts the server (the rolling scenario runs it).", page=False),
    _Option("run-json", "Write the data of the run to this file.", page=False),
    _Option("fixed-masks", "Mask all frames with one key: cheaper, and not what clients do.", bool, page=False),
    _Option("no-wait", "Do not wait until the users of a run before are offline.", bool, page=False),
    _Option("slo", "What must hold, such as p99<250ms, lost=0; a breach makes the exit code 1.", page=False),
)


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add(parser: Any, **_: Any) -> None:
    """Adds the options to Locust's parser."""
    group = parser.add_argument_group("Crowd")
    for option in OPTIONS:
        variable = f"LOADTEST_{option.name.upper().replace('-', '_')}"
        kind: dict[str, Any] = {"type": option.type, "default": option.default, "env_var": variable}
        if option.type is bool:
            kind = {"action": "store_true", "env_var": variable}
        action = group.add_argument(f"--{option.name}", help=option.help, **kind)
        # A group is argparse's own, and knows no Locust argument for this.
        action.include_in_web_ui = option.page
        action.is_secret = action.is_required = action.is_multiple = False


def number(value: str | float | None, default: float) -> float:
    """An option that the scenario has its own default for; the web page sends what was left empty as text."""
    return default if value is None or value == "" else float(value)
