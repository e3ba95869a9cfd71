"""The `presence-contracts` command."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import click

from contracts import cases as case_files
from contracts import report, runner
from contracts.clauses import ClauseError, load_clauses
from contracts.html import to_html
from contracts.junit import to_junit
from contracts.model import Case, Class, Clause, Level, Outcome, Result
from contracts.target import TargetError, load_target

NAME = "presence-contracts"
TEMPLATE = Path(__file__).parent / "target.toml"
"""What `init` writes."""

_INTERRUPTED = 130
_file = click.Path(dir_okay=False, path_type=Path)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command; what its user did wrong is one line, and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Frames hold any text, and a terminal of another encoding is no reason to end in the middle of a report.
            stream.reconfigure(errors="replace")
    try:
        code = commands.main(arguments, prog_name=NAME, standalone_mode=False)
    except click.ClickException as error:
        _complain(error.format_message())
    except (ClauseError, case_files.CaseError, TargetError, runner.TargetUnusable) as error:
        _complain(str(error))
    except click.Abort:
        click.echo(f"{NAME}: interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 (a traceback may hold a token, and exit code 1 would be a verdict)
        _complain(_unforeseen(error))
    sys.exit(code or 0)


def _unforeseen(error: Exception) -> str:
    """What and where, but not the error's own words: they may hold a token."""
    *_, last = traceback.extract_tb(error.__traceback__)
    why = f" ({error.strerror})" if isinstance(error, OSError) else ""
    return f"unforeseen: {type(error).__name__}{why} in {Path(last.filename).name}, line {last.lineno}"


def _complain(message: str) -> NoReturn:
    click.echo(f"{NAME}: {report.printable(' '.join(message.split()))}", err=True)
    sys.exit(2)


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            click.echo(metadata.version(NAME))
        except metadata.PackageNotFoundError:
            click.echo("not installed: run from its folder")
        context.exit()


@click.group(invoke_without_command=True)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.pass_context
def commands(context: click.Context) -> None:
    """Verify that a presence server does what the contract says.

    Start with `init`, which writes a target file to fill in; then `run --target target.toml`.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@commands.command()
@click.argument("file", type=_file, default="target.toml")
def init(file: Path) -> None:
    """Write a commented target file, FILE (target.toml), to be filled in."""
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(TEMPLATE.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise click.ClickException(f"{file} exists; it is left as it is") from error
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from error
    click.echo(f"{file} is written. Fill it in, then: {NAME} run --target {file}")


@commands.command("list")
@click.option("--clauses", "of_clauses", is_flag=True, help="List the clauses instead.")
def list_(of_clauses: bool) -> None:
    """List the cases: id, class, level, title."""
    clauses = load_clauses()
    if of_clauses:
        rows = [(one.id, one.conformance, one.level, _first_line(one.sentence)) for one in clauses.values()]
    else:
        rows = [(one.id, one.conformance, one.level, one.title) for one in case_files.load_cases(clauses)]
    width = max((len(row[0]) for row in rows), default=0)
    for name, conformance, level, sentence in rows:
        click.echo(f"{name:<{width}}  {conformance.value:<5}  {level.value:<6}  {sentence}")


@commands.command()
@click.argument("name", metavar="ID")
def show(name: str) -> None:
    """Show a clause with its cases, or a case with its steps as they stand in its file."""
    clauses = load_clauses()
    cases = case_files.load_cases(clauses)
    if clause := clauses.get(name.upper()):
        click.echo(_clause(clause, cases))
    elif case := next((one for one in cases if one.id == name), None):
        click.echo(_case(case, clauses))
    else:
        raise click.ClickException(f"there is no case and no clause {name!r}; see `{NAME} list`")


def _clause(clause: Clause, cases: Sequence[Case]) -> str:
    lines = [f"{clause.id} {clause.level.value} ({clause.conformance.value})", "", clause.sentence, ""]
    lines.append(f"From: {clause.source}")
    if clause.unseen:
        lines.append(f"Not seen from outside: {clause.unseen}")
    of_it = [one for one in cases if clause.id in one.clauses]
    if of_it:
        lines += ["", "Cases:", *(f"  {one.id}  {one.title}" for one in of_it)]
    return "\n".join(lines)


def _case(case: Case, clauses: dict[str, Clause]) -> str:
    lines = [f"# {case.file}.toml; level {case.level.value}. It verifies"]
    lines += [f"#   {one} {clauses[one].level.value}: {_first_line(clauses[one].sentence)}" for one in case.clauses]
    return "\n".join([*lines, "", as_it_stands(case)])


def as_it_stands(case: Case, folder: Path = case_files.FOLDER) -> str:
    """The text of a case in its file, without the comments that lead to the next one."""
    text = (folder / f"{case.file}.toml").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=\[\[case\]\])", text, flags=re.MULTILINE)
    stands = re.compile(rf"^id *= *([\"']){re.escape(case.id)}\1", re.MULTILINE)
    block = next(one for one in blocks if stands.search(one))
    return re.sub(r"(\n#[^\n]*|\n\s*)+\Z", "", block)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


@commands.command()
@click.option("--target", type=_file, help="With the ids as this target spells them.")
def directory(target: Path | None) -> None:
    """Print the friends and conversations that the cases need, as JSON, to be loaded into the server."""
    # All of it, whatever the target's class and policy: these may change, and what is loaded stays.
    fixture = case_files.fixture(case_files.load_cases(load_clauses()))
    if target is not None:
        of = load_target(target)
        fixture = {
            kind: {of.spelled(name): [of.spelled(one) for one in others] for name, others in entries.items()}
            for kind, entries in fixture.items()
        }
    click.echo(json.dumps(fixture, indent=2))


@commands.command()
@click.option("--target", required=True, type=_file, help="The target file; `init` writes one.")
@click.option("--only", multiple=True, metavar="ID", help="This case, or the cases of this clause. May be repeated.")
@click.option("--class", "conformance", type=click.Choice([one.value for one in Class]), help="Cases of this class.")
@click.option("--level", "levels", multiple=True, type=click.Choice([one.value for one in Level], case_sensitive=False))
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option("--patient", is_flag=True, help="Also the cases that wait for longer than a minute.")
@click.option("--strict", is_flag=True, help="A SHOULD that fails counts like a MUST.")
@click.option("--junit", type=_file, help="Write the results for a CI system.")
@click.option("--json", "json_", type=_file, help="Write all there is to know of the run.")
@click.option("--html", type=_file, help="Write a page to read.")
def run(
    target: Path,
    only: Sequence[str],
    conformance: str | None,
    levels: Sequence[str],
    fail_fast: bool,
    patient: bool,
    strict: bool,
    **files: Path | None,
) -> None:
    """Verify the server that the target file describes.

    Exit code 0: every MUST that was verified holds. 1: some do not. 2: no verdict, as nothing was verified, the target
    file is wrong, or the server cannot be reached.
    """
    clauses = load_clauses()
    cases = case_files.load_cases(clauses)
    wanted = _known(only, cases, clauses)
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise click.ClickException(f"--{name.rstrip('_')}: there is no folder {path.parent}")
    described = load_target(target)
    progress = _Progress(len(cases)) if sys.stderr.isatty() else None
    try:
        done = asyncio.run(
            runner.run(
                described,
                cases,
                clauses,
                only=wanted,
                conformance=Class(conformance) if conformance else None,
                levels=[Level(one) for one in levels],
                fail_fast=fail_fast,
                patient=patient,
                finished=progress,
            )
        )
    finally:
        if progress is not None:
            progress.clear()
    # First: a file that cannot be written takes nothing of it away.
    click.echo(report.text(done, strict=strict))
    writers: dict[str, Callable[..., str]] = {"junit": to_junit, "json_": report.to_json, "html": to_html}
    for name, path in files.items():
        if path is not None:
            _write(path, writers[name](done, strict=strict))
    sys.exit(report.verdict(done, strict=strict).code)


def _known(only: Sequence[str], cases: Sequence[Case], clauses: dict[str, Clause]) -> list[str]:
    """The ids as they are written in the files; raises for one that nothing has, or that no case can verify."""
    ids = {one.id for one in cases}
    found = [one.upper() if one.upper() in clauses else one for one in only]
    for one in found:
        if one not in ids and one not in clauses:
            raise click.ClickException(f"--only: there is no case and no clause {one!r}; see `{NAME} list`")
        if (clause := clauses.get(one)) and clause.unseen:
            raise click.ClickException(f"--only: {one} cannot be seen from outside: {clause.unseen}")
    return found


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error


class _Progress:
    """One line on a terminal that says how far the run is."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._failed = 0

    def __call__(self, result: Result) -> None:
        if result.outcome in {Outcome.NOT_RUN, Outcome.UNSUPPORTED}:
            self._total -= 1
            return
        self._done += 1
        self._failed += result.outcome in {Outcome.FAILED, Outcome.ERROR}
        failed = click.style(f", {self._failed} failed", fg="red") if self._failed else ""
        self._show(f"{self._done}/{self._total}{failed}  {result.case.id}")

    def clear(self) -> None:
        """Leave nothing of the line."""
        self._show("")

    def _show(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
