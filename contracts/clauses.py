"""The clauses, read from `spec/*.md` (`spec/README.md` describes their shape)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from contracts.model import Class, Clause, Level

FOLDER = Path(__file__).parent / "spec"

_HEADING = re.compile(r"### ([A-Z]+)-(\d{2,}) (\S+) \((\S+)\)")
_FROM = "From:"
_UNSEEN = "**Not seen from outside:**"


class ClauseError(Exception):
    """A clause is not as `spec/README.md` says: one line with the file and the line."""


def load_clauses(folder: Path = FOLDER) -> dict[str, Clause]:
    """All clauses by their ids, in the order of the files and of their text.

    Raises:
        ClauseError: one is malformed, or two have one id.
    """
    clauses: dict[str, Clause] = {}
    for path in sorted(folder.glob("*.md")):
        if path.name == "README.md":
            continue
        for number, clause in _clauses(path):
            if clause.id in clauses:
                raise ClauseError(f"{path.name}:{number}: {clause.id} is already another clause's id")
            clauses[clause.id] = clause
    return clauses


def _clauses(path: Path) -> Iterator[tuple[int, Clause]]:
    """Each clause of a file, with the line of its heading."""
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith("### ")]
    for at in starts:
        end = next((i for i in range(at + 1, len(lines)) if re.match(r"#{1,3} ", lines[i])), len(lines))
        try:
            yield at + 1, _clause(lines[at], "\n".join(lines[at + 1 : end]))
        except ValueError as error:
            raise ClauseError(f"{path.name}:{at + 1}: {error}") from error


def _clause(heading: str, text: str) -> Clause:
    """One clause.

    Raises:
        ValueError: what is wrong with it.
    """
    parts = _HEADING.fullmatch(heading.strip())
    if parts is None:
        raise ValueError(f"{heading!r} is not of the shape '### AREA-01 MUST (guide)'")
    area, number, level, conformance = parts.groups()
    if level not in Level.__members__:
        raise ValueError(f"the level {level!r} is none of {', '.join(Level.__members__)}")
    if conformance not in {one.value for one in Class}:
        raise ValueError(f"the class {conformance!r} is neither 'guide' nor 'full'")
    sentence, source, unseen = "", "", None
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        joined = " ".join(paragraph.split())
        if joined.startswith(_FROM):
            source = joined.removeprefix(_FROM).strip()
        elif joined.startswith(_UNSEEN):
            unseen = joined.removeprefix(_UNSEEN).strip()
        elif not sentence:
            sentence = joined
        else:
            # A table or a list that the sentence refers to.
            sentence += "\n" + paragraph.strip()
    if not sentence:
        raise ValueError(f"{area}-{number} has no sentence")
    if not source:
        raise ValueError(f"{area}-{number} does not say where it comes from ('From: …')")
    return Clause(f"{area}-{number}", area, Level[level], Class(conformance), sentence, source, unseen)
