"""`python -m tests.fleet check FILE`: hold a recorded history against the rules. `… soak`: break things for hours."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from tests.fleet import faults
from tests.fleet.checker import Report, check
from tests.fleet.history import History, HistoryError
from tests.support.store import clock_library


@click.group()
def main() -> None:
    """Look at what the clients of a fleet saw."""


@main.command("check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check_file(file: Path) -> None:
    """Hold the history in FILE against all rules."""
    with file.open() as lines:
        try:
            history = History.parse(lines)
        except HistoryError as error:
            raise click.ClickException(f"{file}: {error}") from None
    report = check(history)
    for finding in report.findings:
        click.echo(str(finding))
    click.echo(summary(report))
    sys.exit(bool(report.findings))


@main.command()
@click.option("--seconds", default=60.0, help="How long, s; what has begun is ended.")
@click.option(
    "--fault", "names", multiple=True, type=click.Choice(sorted(faults.FAULTS)), help="Only this; may repeat."
)
@click.option("--seed", default=None, help="Of the first run; else a random one.")
@click.option("--users", default=300, help="Users, and watchers.")
@click.option("--full", is_flag=True, help="With Kafka and Cassandra.")
@click.option("--folder", default=None, type=click.Path(path_type=Path), help="Where the histories are left.")
def soak(
    seconds: float, names: tuple[str, ...], seed: str | None, users: int, folder: Path | None, *, full: bool
) -> None:
    """Break one thing after the other, and print the table of docs/reliability.md."""
    folder = folder or Path(tempfile.mkdtemp(prefix="fleet-"))
    folder.mkdir(parents=True, exist_ok=True)
    seed = seed or f"{random.getrandbits(32):08x}"
    chosen = [name for name in names or faults.FAULTS if full or not faults.FAULTS[name].needs]
    if not chosen:
        raise click.ClickException("these faults need --full")
    if clock_library() is None and (without := [name for name in chosen if "behind" in faults.FAULTS[name].world]):
        if names:
            raise click.ClickException(f"without libfaketime there is no {', '.join(without)}")
        click.echo(f"left out, as libfaketime is not here: {', '.join(without)}")
        chosen = [name for name in chosen if name not in without]
    reports = asyncio.run(_soak(seconds, chosen, seed, folder, users=users, full=full))
    click.echo("\n" + "\n".join(table(reports)))
    sys.exit(any(report.findings for runs in reports.values() for report in runs))


async def _soak(
    seconds: float, names: list[str], seed: str, folder: Path, *, users: int, full: bool
) -> dict[str, list[Report]]:
    until = time.monotonic() + seconds
    reports: dict[str, list[Report]] = defaultdict(list)
    services: dict[str, Any] = {}
    if full:
        from tests.support.cassandra import CassandraProcess
        from tests.support.kafka import KafkaProcess

        services = {"kafka": await KafkaProcess().start(), "cassandra": await CassandraProcess().start()}
    try:
        number = 0
        while time.monotonic() < until or number == 0:
            name, one = names[number % len(names)], f"{seed}-{number}"
            file = folder / f"{number}-{name.replace(' ', '-').replace(',', '')}.jsonl"
            report, _ = await faults.run_fault(name, one, file, users=users, watchers=users, **services)
            reports[name].append(report)
            click.echo(f"{name}, seed {one}: {summary(report)}")
            for finding in report.findings[:20]:
                click.echo(f"  {finding}")
            if report.findings:
                click.echo(f"  {len(report.findings)} findings, history: {file}")
            else:
                file.unlink()
            number += 1
    finally:
        for service in services.values():
            service.close()
    return reports


def summary(report: Report) -> str:
    """One line of figures."""
    counts = report.counts
    return (
        f"{len(report.findings)} findings in {counts['connected']} sessions ({counts['lost']} lost, "
        f"{counts['refused']} refused), {counts['beat']} beats, {counts['change']} changes, {counts['told']} told; "
        f"longest ghost {report.longest_ghost:.2f} s, slowest change {report.slowest:.2f} s, "
        f"recovery {report.recovery:.2f} s"
    )


def table(reports: dict[str, list[Report]]) -> list[str]:
    """The rows of docs/reliability.md, in Markdown: of each fault the worst run."""
    columns = "fault, runs, changes, connections lost, refused, slowest change s, longest ghost s, lost, repeated, "
    columns += "false offline, other findings, recovery s"
    titles = columns.split(", ")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, runs in reports.items():
        missed = sum(run.of("missed", "unanswered", "last word", "log", "row", "kept") for run in runs)
        repeated = sum(run.of("repeated", "order") for run in runs)
        false = sum(run.of("false offline") for run in runs)
        other = sum(len(run.findings) for run in runs) - missed - repeated - false
        cells = [
            name,
            len(runs),
            *(sum(run.counts[what] for run in runs) for what in ("change", "lost", "refused")),
            f"{max(run.slowest for run in runs):.2f}",
            f"{max(run.longest_ghost for run in runs):.2f}",
            missed,
            repeated,
            false,
            other,
            f"{max(run.recovery for run in runs):.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
