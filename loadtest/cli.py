"""The command: `python -m loadtest run|capacity|report|compare|floor`. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loadtest import capacity as search
from loadtest import floor as null_server
from loadtest import launch, preflight, report, slo, verdict
from loadtest.capacity import Kind, Plan, ServerGone, Trial
from loadtest.capacity_run import made_of, trial_of
from loadtest.embedded import Embedded, EmbeddedError
from loadtest.launch import Job, LaunchError
from loadtest.preflight import PreflightError
from loadtest.run import Run
from loadtest.slo import SloError
from loadtest.target import TARGET, Target, TargetError, load

_OWN = {
    **{name: name for name in ("sessions", "target", "host", "slo", "period", "processes")},
    "run-time": "seconds",
    "run-json": "json",
}
"""Options of Locust's that are given here otherwise."""

_NUMBERS = {"connect-rate": 0.1, "late": 0.0}
"""Options that are read here too, and the least each may be: Locust would tell of the rest."""

_INTERRUPTED = 128 + signal.SIGINT

_MISTAKES = (TargetError, PreflightError, EmbeddedError, LaunchError, ServerGone, SloError)


class _Number(click.FloatRange):
    """A number of at least so much. Infinity and NaN are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


class _Group(click.Group):
    """Ends with one line and exit code 2 for whatever kept the run from being."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            click.echo(f"loadtest: {error.format_message()}", err=True)
            sys.exit(2)
        except _MISTAKES as error:
            click.echo(f"loadtest: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("loadtest: interrupted", err=True)
            sys.exit(_INTERRUPTED)


@click.group(cls=_Group)
def main() -> None:
    """Capacity testing of a presence server: a crowd that beats, a ledger of the truth, a report with a verdict."""


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what puts load on a server."""
    for option in (
        click.option(
            "--target",
            envvar=TARGET,
            show_envvar=True,
            type=click.Path(dir_okay=False),
            help="Target file; none: a server is started here.",
        ),
        click.option("--host", metavar="URL", help="Base URL of the server; LOADTEST_SECRET makes the tokens."),
        click.option("--slo", "text", default=slo.DEFAULT, show_default=True, help="What must hold."),
        click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 64), help="Of the generator."),
        click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Of the server here."),
        click.option(
            "--lease", default=60.0, show_default=True, type=_Number(1), help="Of the server started here, s."
        ),
        click.option("--period", type=_Number(0.05), help="Between heartbeats, s; none: half a lease."),
        click.option("-o", "--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the scenario."),
        click.option("--folder", default="load-reports", show_default=True, type=click.Path(file_okay=False)),
        click.option("--html", type=click.Path(dir_okay=False), help="The report; none: in the folder."),
        click.option("--json", "data", type=click.Path(dir_okay=False), help="Its data; none: beside the report."),
    ):
        function = option(function)
    return function


@main.command()
@click.argument("scenarios", nargs=-1)
@click.option("--sessions", default=1_000, show_default=True, type=click.IntRange(1, 10_000_000))
@click.option("--seconds", type=_Number(1), help="Of each scenario; none: 60, or what it takes at least.")
@_common
def run(scenarios: Sequence[str], sessions: int, seconds: float | None, **common: Any) -> None:
    """Run SCENARIOS (steady, unless others are named), one after the other, and write the report."""
    known = launch.scenarios()
    names = list(scenarios) or ["steady"]
    for name in names:
        if name not in known:
            raise LaunchError(f"there is no scenario {name!r}; there are {', '.join(known)}")
    with _prepared(sessions, **common) as ready:
        runs = []
        for at, name in enumerate(names, 1):
            lasts = seconds or launch.seconds(name, ready.target)
            click.echo(f"{name}: {sessions:,} sessions for {lasts:g} s against {ready.target.instances[0].http}")
            job = replace(ready.job(name, sessions, lasts), name=f"{at}-{name}")
            runs.append(ready.run(job))
        whole = runs[0] if len(runs) == 1 else launch.joined(", ".join(names), runs)
        if len(runs) > 1:
            whole.verdict = ""
            verdict.judge(whole, ready.slo)
        _finish(whole, ready, "-".join(names))


@main.command()
@click.option("--start", default=1_000, show_default=True, type=click.IntRange(1), help="Sessions of the first step.")
@click.option("--max", "most", type=click.IntRange(1), help="Sessions at most; none: 20,000, or what nofile allows.")
@click.option("--growth", default=1.5, show_default=True, type=_Number(1.01), help="From step to step.")
@click.option("--hold", type=_Number(1), help="Of a step, s; none: a lease and two heartbeat periods.")
@click.option("--long-hold", default=900.0, show_default=True, type=_Number(1), help="For the confirmation, s.")
@click.option("--storm", default=180.0, show_default=True, type=_Number(1), help="Of the storm that follows, s.")
@_common
def capacity(
    start: int, most: int | None, growth: float, hold: float | None, long_hold: float, storm: float, **common: Any
) -> None:
    """Find the most sessions that keep the SLO: step up, bisect at the first breach, confirm by a hold and a storm."""
    maximum = most or _allowed(20_000, common)
    with _prepared(maximum, **common) as ready:
        least = search.least_hold(ready.target.lease, ready.period("steady"))
        if hold is not None and hold < least:
            click.echo(f"note: a step of {hold:g} s is shorter than a lease and two heartbeats ({least:g} s)", err=True)
        plan = Plan(start=start, maximum=maximum, growth=growth, hold=hold or least, long_hold=long_hold, storm=storm)
        # What is asked is how many are held, not how fast they can come: the ramp is to be no peak of its own.
        ready.options.setdefault("connect-rate", "100")
        runs: list[Run] = []

        def step(sessions: int, seconds: float, kind: Kind) -> Trial:
            click.echo(f"{kind}: {sessions:,} sessions for {seconds:g} s")
            name = f"{len(runs) + 1:02}-{sessions}-{kind.replace(' ', '-')}"
            job = ready.job("storm" if kind == "storm" else "steady", sessions, seconds)
            if kind == "storm":
                # All come at once: that each is told of within so many ms is not asked, but that none is forgotten.
                job = replace(job, slo=slo.without_latencies(ready.slo))
            try:
                made = ready.run(replace(job, name=name))
                trial = trial_of(sessions, kind, made)
            except LaunchError as error:
                raise ServerGone(error) from error
            runs.append(made)
            click.echo(f"  {'kept' if trial.kept else trial.why}")
            return trial

        found = search.search(plan, step)
        if not found.trials:
            sys.exit(_INTERRUPTED)
        code = _INTERRUPTED if found.interrupted else None
        _finish(made_of(found, runs[: len(found.trials)], ready.slo), ready, "capacity", code)


@main.command("report")
@click.argument("data", type=click.Path(exists=True, dir_okay=False))
@click.option("--html", type=click.Path(dir_okay=False), help="The file to write; none: beside the data.")
def report_(data: str, html: str | None) -> None:
    """Write the report of DATA, the JSON of a run."""
    path = Path(html) if html else Path(data).with_suffix(".html")
    _write(path, report.to_html(_read(data), data=Path(data).name))
    click.echo(path)


@main.command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False))
@click.argument("b", type=click.Path(exists=True, dir_okay=False))
@click.option("--html", default="load-reports/comparison.html", show_default=True, type=click.Path(dir_okay=False))
def compare(a: str, b: str, html: str) -> None:
    """Set the runs A and B (JSON) side by side."""
    path = Path(html)
    _write(path, report.compare(_read(a), _read(b)))
    click.echo(path)


main.add_command(null_server.main, "floor")


class _Ready:
    """A server that was looked at, and what all runs on it have in common."""

    def __init__(self, target: Target, server: Embedded | None, common: Mapping[str, Any]) -> None:
        self.target = target
        self.server = server
        self._period: float | None = common["period"]
        self.slo: str = common["text"]
        self.processes: int = common["processes"]
        self.options = _options(common["options"])
        self.folder = Path(common["folder"])
        self.html: str | None = common["html"]
        self.data: str | None = common["data"]

    def job(self, scenario: str, sessions: int, seconds: float) -> Job:
        return Job(
            scenario=scenario,
            target=self.target,
            sessions=sessions,
            seconds=seconds,
            processes=self.processes,
            options=self.options | {"period": f"{self.period(scenario):g}"},
            slo=self.slo,
            folder=self.folder,
            name=scenario,
            facts=self.server.facts if self.server else {},
        )

    def period(self, scenario: str) -> float:
        """The time between two heartbeats, s; hidden tabs beat once where others would twice."""
        return self._period or self.target.lease / (1 if scenario == "background" else 2)

    def run(self, job: Job) -> Run:
        server = self.server
        pids = launch.server_processes(self.target) if server is None else lambda: [server.pid]
        return launch.run(job, pids, said=click.echo)


@contextmanager
def _prepared(sessions: int, **common: Any) -> Iterator[_Ready]:
    """Check all that can be checked, with a server of our own where none is named."""
    _check_server(common)
    slo.parse(common["text"])
    options = _options(common["options"])
    _check_places(common)
    embedded = None
    if common["target"] or common["host"]:
        target = load(common["target"], host=common["host"])
    else:
        limit = preflight.file_limit()
        preflight.check_files(sessions, common["processes"], limit)
        preflight.check_embedded(sessions, common["workers"], limit)
        embedded = Embedded(common["workers"], common["lease"])
        embedded.__enter__()
    try:
        if embedded is not None:
            target = load(embedded.target)
        sources = len(options["sources"].split(",")) if "sources" in options else None
        preflight.check(target, sessions, processes=common["processes"], sources=sources)
        ready = _Ready(target, embedded, common)
        if ready.period("steady") >= target.lease:
            click.echo("note: beats no more often than a lease ends: users will go offline in between", err=True)
        yield ready
    finally:
        if embedded is not None:
            embedded.stop()


def _check_server(common: Mapping[str, Any]) -> None:
    """Whether one server is named, and nothing is said of another one."""
    if common["target"] and common["host"]:
        raise TargetError(f"--host and --target (or {TARGET}) exclude each other: the file names the address")
    context = click.get_current_context()
    for name in ("workers", "lease"):
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and (common["target"] or common["host"]):
            named = "--host" if common["host"] else f"--target (or {TARGET})"
            raise TargetError(f"--{name} is of the server started here: with {named} none is")


def _check_places(common: Mapping[str, Any]) -> None:
    """Make the folders, and see that the files can be written: to be told so after an hour would be late."""
    html, data = (Path(common[name]) if common[name] else None for name in ("html", "data"))
    if html and html == (data or html.with_suffix(".json")):
        raise LaunchError(f"{html}: the report and its data cannot be one file")
    for folder in (Path(common["folder"]), *(path.parent for path in (html, data) if path)):
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    for path in (html, data):
        if path and path.exists():
            with _writing(path):
                path.open("ab").close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What keeps a file or folder from being written is a user's mistake."""
    try:
        yield
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _allowed(sessions: int, common: Mapping[str, Any]) -> int:
    """So many sessions, or as many as the limit of open files lets be."""
    limit = preflight.file_limit()
    allowed = common["processes"] * (limit - preflight.SPARE_FILES)
    if not common["target"] and not common["host"]:
        allowed = min(allowed, common["workers"] * (limit - preflight.SERVER_FILES))
    return int(max(min(sessions, allowed), 1))


def _finish(whole: Run, ready: _Ready, name: str, code: int | None = None) -> None:
    """Write the report, say the verdict, and end with its exit code, unless another is given."""
    whole.command = shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])
    html = Path(ready.html) if ready.html else ready.folder / f"{name}.html"
    data = Path(ready.data) if ready.data else html.with_suffix(".json")
    _write(data, whole.to_json() + "\n")
    _write(html, report.to_html(whole, data=data.name))
    status = report.status(whole)
    click.echo(f"{whole.verdict}: {status.word}")
    for line in status.reasons:
        click.echo(f"  {line}")
    click.echo(f"{html}  {data}")
    sys.exit(verdict.exit_code(whole) if code is None else code)


def _options(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.lstrip("-").partition("=")
        if not name or name in _OWN:
            raise LaunchError(f"-o {pair}: {f'is --{_OWN[name]} here' if name else 'must be NAME=VALUE'}")
        if name in _NUMBERS and not _is_number(value, _NUMBERS[name]):
            raise LaunchError(f"-o {pair}: must be {name}=NUMBER, of {_NUMBERS[name]:g} or more")
        found[name] = value
    return found


def _is_number(text: str, least: float) -> bool:
    try:
        return least <= float(text) < float("inf")
    except ValueError:
        return False


def _read(path: str) -> Run:
    try:
        return Run.load(Path(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LaunchError(f"{path} is no data of a run: {error}") from error
