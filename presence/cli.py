"""The `presence` command."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import click

from presence import bootstrap
from presence.core.model import ID, rfc3339
from presence.logs import configure_logging
from presence.settings import Settings, SettingsError, explain, load


class _Group(click.Group):
    """Prints the settings under the help, as they are, and errors in one line."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(
            f"\nSettings, from the environment (or as options of `serve`, --port for PRESENCE_PORT):\n\n{explain()}\n"
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            _fail(str(error), 2)
        except bootstrap.StartError as error:
            _fail(str(error), error.code)


def _fail(message: str, code: int) -> None:
    click.echo(f"presence: {message}", err=True)
    sys.exit(code)


def _check_user(user: str) -> None:
    if not ID.fullmatch(user):
        _fail(f"USER {user!r} is not an id: letters, digits and . _ ~ @ - only, at most 128", 2)


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command an option for each setting."""
    for name, field in reversed(Settings.model_fields.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, help=field.description, metavar="VALUE")(command)
    return command


@click.group(cls=_Group)
@click.version_option(package_name="online-status")
def main() -> None:
    """Online-status server: who is online, over STOMP, WebSocket and REST."""


@main.command()
@_settings_options
def serve(**options: str | None) -> None:
    """Run the server. With no settings it brings its own stores and demo users."""
    settings = load(**options)
    configure_logging(settings.log_level, settings.log_format)
    bootstrap.serve(settings)


@main.command()
@click.argument("user")
@click.option(
    "--ttl", default=3600, show_default=True, help="How long the token holds, s.", type=click.IntRange(1, 10**9)
)
def token(user: str, ttl: int) -> None:
    """Print an access token for USER, for a server with the same settings."""
    _check_user(user)
    click.echo(bootstrap.token(load(), user, ttl))


@main.command()
@click.option("--partitions", default=12, show_default=True, help="Of the topic.", type=click.IntRange(1, 10_000))
@click.option("--replication", default=1, show_default=True, help="Copies of all.", type=click.IntRange(1, 100))
@click.option("--retention", default=86_400, show_default=True, help="Of the topic, s.", type=click.IntRange(1))
def init(partitions: int, replication: int, retention: int) -> None:
    """Make the topic, keyspace and tables that are missing; run it again whenever you like."""
    settings = load()
    configure_logging("error", settings.log_format)
    lines = bootstrap.init(settings, partitions=partitions, replication=replication, retention_seconds=retention)
    for line in asyncio.run(lines):
        click.echo(line)


@main.command()
@click.argument("user")
@click.option("--limit", default=20, show_default=True, help="Changes at most.", type=click.IntRange(1, 100_000))
def history(user: str, limit: int) -> None:
    """Print USER's last changes, the newest first: when, status, device, reason."""
    _check_user(user)
    settings = load()
    configure_logging("error", settings.log_format)
    for change in asyncio.run(bootstrap.history(settings, user, limit)):
        status = "online" if change.online else "offline"
        click.echo(f"{rfc3339(change.version // 1000)} {status:7} {change.device:6} {change.reason}")


@main.command()
def cleanup() -> None:
    """Run the cleanup once, beside the running server, and print what it repaired."""
    settings = load()
    configure_logging("error", settings.log_format)  # what goes wrong is told by `_fail`, once
    for name, number in asyncio.run(bootstrap.cleanup(settings)).items():
        click.echo(f"{name} {number}")
