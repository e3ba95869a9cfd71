"""Reading the clauses."""

from __future__ import annotations

import pytest

from contracts.clauses import ClauseError, load_clauses
from contracts.model import Class, Level

GOOD = """# An area

### AREA-02 SHOULD (guide)

A sentence over
two lines.

From: guide,
"A section".

**Not seen from outside:** it is within.

## A part

### AREA-01 MUST (full)

Another.

From: decided here: because.
"""


def test_a_clause_is_read_with_all_its_parts(tmp_path):
    (tmp_path / "README.md").write_text("### not one\n")
    (tmp_path / "area.md").write_text(GOOD)
    clauses = load_clauses(tmp_path)
    assert list(clauses) == ["AREA-02", "AREA-01"]
    clause = clauses["AREA-02"]
    assert (clause.area, clause.level, clause.conformance) == ("AREA", Level.SHOULD, Class.GUIDE)
    assert clause.sentence == "A sentence over two lines."
    assert clause.source == 'guide, "A section".'
    assert clause.unseen == "it is within."
    assert clauses["AREA-01"].unseen is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("### AREA-1 MUST (full)\n\nA.\n\nFrom: x\n", r"area.md:1: .*is not of the shape"),
        ("\n### AREA-01 must (full)\n\nA.\n\nFrom: x\n", r"area.md:2: the level 'must'"),
        ("### AREA-01 MUST (most)\n\nA.\n\nFrom: x\n", r"area.md:1: the class 'most'"),
        ("### AREA-01 MUST (full)\n\nFrom: x\n", r"area.md:1: AREA-01 has no sentence"),
        ("### AREA-01 MUST (full)\n\nA.\n", r"area.md:1: AREA-01 does not say where it comes from"),
        (GOOD + "\n### AREA-02 MUST (full)\n\nA.\n\nFrom: x\n", r"area.md:21: AREA-02 is already"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, text, told):
    (tmp_path / "area.md").write_text(text)
    with pytest.raises(ClauseError, match=told):
        load_clauses(tmp_path)


def test_our_own_clauses_can_be_read():
    assert load_clauses()
