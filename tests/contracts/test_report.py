"""What is made of a run: text, JUnit, JSON, HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import click
import pytest

from contracts import report, runner
from contracts.cases import load_cases
from contracts.clauses import load_clauses
from contracts.html import to_html
from contracts.junit import to_junit
from contracts.model import TOO_LONG, Class, Level, Outcome, Result
from contracts.report import State
from contracts.target import Instance, Target
from tests.contracts.made_up import TRANSCRIPT, broken, clause, failed, not_run, passed, run, unsupported

SHOULD = {"level": Level.SHOULD, "clauses": ["WATCH-02"]}
CLAUSES = [
    clause("WATCH-01", sentence="Every change reaches every session that watches <the user>."),
    clause("WATCH-02", Level.SHOULD),
    clause("REST-01", sentence="`GET` is answered."),
    clause("REST-02"),
    clause("AUTH-01", unseen="It is in the server's head."),
]


def doctored():
    """A run with one of each."""
    return run(
        passed(clauses=["REST-01"]),
        failed(),
        failed("slow", **SHOULD),
        broken(file="faults"),
        unsupported(clauses=["REST-02"]),
        not_run(),
        clauses=CLAUSES,
    )


@pytest.mark.parametrize(
    ("results", "strict", "expected"),
    [
        ([passed()], False, ("PASS", 0)),
        ([passed(), unsupported(), not_run()], False, ("PASS", 0)),
        ([passed(), failed()], False, ("FAIL", 1)),
        ([failed()], False, ("FAIL", 1)),
        ([passed(), failed("slow", **SHOULD)], False, ("PASS", 0)),
        ([passed(), failed("slow", **SHOULD)], True, ("FAIL", 1)),
        ([passed(), failed("rare", level=Level.MAY)], True, ("PASS", 0)),
        ([passed(), broken()], False, ("NO VERDICT", 2)),
        ([passed(), broken(), failed()], False, ("FAIL", 1)),
        ([], False, ("NO VERDICT", 2)),
        ([unsupported(), not_run()], True, ("NO VERDICT", 2)),
        ([failed("slow", **SHOULD)], False, ("NO VERDICT", 2)),
    ],
)
def test_the_verdict_is_a_success_only_if_something_was_verified_and_no_must_is_broken(results, strict, expected):
    judged = report.verdict(run(*results), strict=strict)
    assert (judged.word, judged.code) == expected


def test_a_warning_alone_is_no_verdict_and_is_told():
    assert (
        report.verdict(run(failed("slow", **SHOULD))).sentence
        == "No MUST was verified: no case passed, with 1 warning."
    )
    assert report.verdict(run(unsupported())).sentence == "Nothing was verified: no case passed."


def test_a_clause_holds_only_if_no_case_of_it_failed_or_ended_in_an_error():
    found = report.states(doctored())
    assert found == {
        "WATCH-01": State.BROKEN,
        "WATCH-02": State.BROKEN,
        "REST-01": State.HOLDS,
        "REST-02": State.UNSUPPORTED,
        "AUTH-01": State.UNVERIFIED,
    }
    assert report.states(run(passed(), broken()))["WATCH-01"] is State.UNVERIFIED


@pytest.mark.parametrize("other", [not_run(), unsupported()])
def test_a_clause_holds_in_part_where_not_all_of_its_cases_were_run(other):
    some = run(passed(), other)
    assert report.states(some)["WATCH-01"] is State.IN_PART
    assert "0 of 1 clauses hold, 1 in part." in report.text(some)
    document = json.loads(report.to_json(some))
    assert document["clauses"]["WATCH-01"]["state"] == "holds in part"
    assert document["states"]["holds in part"] == 1
    assert _Page(to_html(some)).cells == {"WATCH-01": "holds-in-part"}


def left_out(name="left", reason="not chosen", **more):
    return replace(not_run(name, **more), reason=reason)


def test_the_first_line_says_how_many_of_the_cases_that_apply_were_chosen():
    some = run(passed(), left_out(), left_out("other", policy="contacts"), not_run(), unsupported())
    first = click.unstyle(report.text(some)).splitlines()[0]
    assert first == "PASS (1 of 2 cases chosen)  Every MUST that was verified holds."
    assert json.loads(report.to_json(some))["verdict"]["partial"] == "1 of 2 cases chosen"
    assert "Pass (1 of 2 cases chosen)." in to_html(some) and "partial run" in to_html(some)
    root = ET.fromstring(to_junit(some))
    assert root.get("name") == "presence-contracts (partial: 1 of 2 cases chosen)"
    assert [one.get("value") for one in root.iter("property")] == ["1 of 2 cases chosen"]


@pytest.mark.parametrize(
    "more",
    [
        {"secret": "s"},
        {"secret": "s", "claims": {"iss": "https://issuer", "aud": "presence"}},
        {"command": ["make-token"]},
        {"ids": "uuid"},
        {"lease": 2.0, "policy": "contacts", "directory_loaded": True, "unsupported": frozenset({"limits"})},
        {"conformance": Class.GUIDE, "hooks": {"stop-store": ["x"], "start-store": ["x"]}},
    ],
    ids=str,
)
def test_what_applies_is_what_the_runner_would_run(more):
    target = Target(**{"file": "", "conformance": Class.FULL, "instances": [Instance("http://h", "ws://h")]} | more)
    of = replace(run(), summary=target.summary)
    cases = load_cases(load_clauses())
    applying = {one.id for one in cases if report._applies(Result(one, Outcome.NOT_RUN), of)}
    assert applying == {one.id for one in cases if runner._not_applying(one, target) is None}


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (left_out(reason="of class full, not chosen"), "1 of 2 cases chosen"),
        (left_out(reason="another case had failed before"), "stopped after 1 of 2 cases"),
        (left_out(reason=TOO_LONG), None),
        (left_out(needs=frozenset({"instances"})), None),
        (left_out(needs=frozenset({"directory"})), None),
        (left_out(needs=frozenset({"hook:stop-store"})), None),
        (left_out(features=frozenset({"cors"})), None),
        (left_out(needs=frozenset({"short-lease", "secret"})), "1 of 2 cases chosen"),
    ],
)
def test_a_run_is_partial_only_if_a_case_was_left_out_that_says_something_of_the_target(result, expected):
    assert report.partial(run(passed(), result)) == expected


def test_the_text_names_what_only_a_patient_run_plays():
    some = click.unstyle(report.text(run(passed(), left_out("long", reason=TOO_LONG))))
    assert f"    not run     1  {TOO_LONG}" in some
    assert some.endswith("\nOnly with --patient: long")
    assert "--patient" not in report.text(run(passed(), not_run()))


def test_a_server_of_contacts_is_told_how_much_nobody_verified():
    def judged(policy, *results):
        known = [clause("WATCH-01"), clause("WATCH-02"), clause("WATCH-03")]
        made = run(passed(policy="any"), *results, clauses=known)
        return report.verdict(replace(made, summary={**made.summary, "policy": policy})).sentence

    holds = "Every MUST that was verified holds"
    about = [left_out(f"of-{name}", reason="about the policy", clauses=[name]) for name in ("WATCH-01", "WATCH-02")]
    assert judged("contacts", *about) == f"{holds}; 1 clause was not verified, as its cases need the policy anyone."
    about.append(left_out("third", reason="about the policy", clauses=["WATCH-03"]))
    assert judged("contacts", *about).startswith(f"{holds}; 2 clauses were not verified")
    # For other reasons, too, or of no concern to the server.
    about.append(left_out("fourth", reason="it lacks a hook", policy="any", clauses=["WATCH-03"]))
    assert judged("contacts", *about) == f"{holds}; 2 clauses were not verified, for the reasons given."
    assert judged("contacts", left_out("third", clauses=["WATCH-03"])) == f"{holds}."
    assert (
        judged("contacts", left_out("third", reason="x", clauses=["WATCH-03"], features=frozenset({"cors"})))
        == f"{holds}."
    )
    assert judged("anyone", left_out("third", reason="x", clauses=["WATCH-03"], policy="contacts")) == f"{holds}."


def test_a_pass_says_how_much_the_target_file_keeps_from_being_verified():
    """Else a server without a directory or a second instance would seem to be verified whole."""

    def judged(result, **summary):
        made = run(passed(), result, clauses=[clause("WATCH-01"), clause("WATCH-02")])
        return report.verdict(replace(made, summary={**made.summary, **summary})).sentence

    holds = "Every MUST that was verified holds"
    lacking = left_out("directory", reason="the target lacks directory", clauses=["WATCH-01", "WATCH-02"])
    assert judged(lacking) == f"{holds}; 1 clause was not verified, for the reasons given."
    assert judged(left_out("long", reason=TOO_LONG, clauses=["WATCH-02"])).startswith(f"{holds}; 1 clause was not")
    contacts = left_out("contacts", reason="about the policy", policy="contacts", clauses=["WATCH-02"])
    assert judged(contacts, policy="anyone") == f"{holds}."
    full = left_out("full", reason="of class full", clauses=["WATCH-02"], conformance=Class.FULL)
    assert judged(full, **{"class": "guide"}) == f"{holds}."
    assert judged(full, **{"class": "full"}) != f"{holds}."


def test_clauses_are_counted_of_those_that_bind_the_target_and_can_be_seen():
    of_guide = replace(clause("WATCH-01"), conformance=Class.GUIDE)
    known = [of_guide, clause("WATCH-02"), clause("WATCH-03", unseen="It is in the server's head.")]
    made = run(passed(), clauses=known)
    assert "1 of 2 clauses hold." in report.totals(replace(made, summary={**made.summary, "class": "full"}))
    assert "1 of 1 clauses of class guide hold." in report.totals(
        replace(made, summary={**made.summary, "class": "guide"})
    )


def test_the_text_begins_with_the_verdict_and_tells_all_of_a_failure():
    lines = click.unstyle(report.text(doctored())).splitlines()
    assert lines[0] == "FAIL  Not every MUST holds: 1 case fails."
    assert lines[1].startswith("  6 cases: 1 passed, 2 failed, 1 error, 1 unsupported, 1 not run. 1 of 4 clauses hold.")
    assert lines[2] == "  target.toml: class full, http://127.0.0.1:8080, lease 2 s, slack 1 s"
    assert "FAIL  bad  The story of bad  (watching.toml, step 2)" in lines
    assert "WARN  slow  The story of slow  (watching.toml, step 2)" in lines
    assert "ERROR  odd  The story of odd  (faults.toml, step 1)" in lines
    for line in (
        "WATCH-01 MUST  Every change reaches every session that watches <the user>.",
        'step 2         expect = "ann", about = "bob", online = true',
        "expected       MESSAGE about bob, within 3 s",
        "actual         nothing came; <script>alert(1)</script>",
        "     0.001 s  ann  → CONNECT",
        "                     accept-version:1.2",
    ):
        assert f"  {line}" in lines
    assert any("the target lacks instances" in line for line in lines)


def test_what_a_server_sends_does_not_reach_the_terminal():
    plain = click.unstyle(report.text(doctored()))
    assert "server:␛[31mred\\ufffe" in plain and "\x1b" not in plain
    assert report.printable("a\r\n\tb\x9b\ud800\x7f") == "a␍\n\tb\\x9b\\ud800\\x7f"


def test_a_long_transcript_is_cut_in_the_text_and_whole_in_the_files():
    long = run(failed(file="a"))
    entries = TRANSCRIPT * 50
    object.__setattr__(long.results[0], "transcript", entries)
    assert "its last 40 entries; --html or --json has the 160 before" in report.text(long)
    assert len(json.loads(report.to_json(long))["results"][0]["transcript"]) == 200
    assert to_html(long).count('<td class="at">') == 200


def test_junit_has_a_suite_for_each_file_and_an_element_for_each_outcome():
    root = ET.fromstring(to_junit(doctored()))
    assert root.tag == "testsuites"
    assert root.attrib == {
        "name": "presence-contracts",
        "tests": "6",
        "failures": "1",
        "errors": "1",
        "skipped": "3",
        "time": "4.250",
    }
    # Cases of one file stand together in a real run; here `faults` comes between.
    assert [(one.get("name"), one.get("tests")) for one in root] == [
        ("contracts.watching", "3"),
        ("contracts.faults", "1"),
        ("contracts.watching", "2"),
    ]
    cases = {str(one.get("name")).partition(":")[0]: one for one in root.iter("testcase")}
    assert {name: [child.tag for child in one] for name, one in cases.items()} == {
        "good": ["system-out"],
        "bad": ["failure", "system-out"],
        "slow": ["skipped", "system-out"],
        "odd": ["error"],
        "cors": ["skipped"],
        "far": ["skipped"],
    }
    assert (cases["bad"].get("classname"), cases["bad"].get("time")) == ("contracts.watching", "2.500")
    failure = cases["bad"][0]
    assert str(failure.get("message")).startswith("WATCH-01: expected MESSAGE about bob, within 3 s; actual: nothing")
    assert "Every change reaches every session that watches <the user>." in str(failure.text)
    assert "0.013 s  ann  ← CONNECTED" in str(cases["bad"][1].text)
    assert cases["far"][0].get("message") == "not run: the target lacks instances"


def test_in_junit_a_should_is_a_failure_only_where_it_counts():
    root = ET.fromstring(to_junit(doctored(), strict=True))
    assert root.get("failures") == "2"


def test_the_json_has_the_whole_run():
    document = json.loads(report.to_json(doctored()))
    assert document["verdict"] == {
        "word": "FAIL",
        "sentence": "Not every MUST holds: 1 case fails.",
        "exit": 1,
        "strict": False,
        "partial": None,
    }
    assert document["states"] == {"holds": 1, "holds in part": 0, "broken": 2, "unsupported": 1, "not verified": 1}
    assert document["counts"] == {"passed": 1, "failed": 2, "error": 1, "unsupported": 1, "not run": 1}
    assert document["summary"]["instances"] == ["http://127.0.0.1:8080"]
    assert document["clauses"]["WATCH-01"]["state"] == "broken"
    assert document["clauses"]["AUTH-01"]["unseen"] == "It is in the server's head."
    bad = document["results"][1]
    assert (bad["case"], bad["outcome"], bad["step"]) == ("bad", "failed", 2)
    assert bad["transcript"][2]["text"] == TRANSCRIPT[2].text
    assert [one["reason"] for one in document["results"][-1:]] == ["the target lacks instances"]


class _Page(HTMLParser):
    """What a page has: its text, its ids, where its links lead, and the elements that could fetch or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.outside: list[str] = []
        self.cells: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attrs}
        if "id" in of:
            self.ids.append(of["id"])
        if "href" in of:
            self.links.add(of["href"])
        if "src" in of or tag in {"script", "link", "iframe", "object"}:
            self.outside.append(tag)
        if of.get("class", "").startswith("cell ") and "title" in of:
            self.cells[of["title"].partition(" ")[0]] = of["class"].removeprefix("cell ")


def test_the_page_stands_alone_and_each_link_leads_somewhere():
    page = _Page(to_html(doctored()))
    assert page.outside == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_has_a_cell_for_each_clause_in_the_colour_of_its_state():
    assert _Page(to_html(doctored())).cells == {
        "WATCH-01": "broken",
        "WATCH-02": "warned",
        "REST-01": "holds",
        "REST-02": "unsupported",
        "AUTH-01": "not-verified",
    }
    assert _Page(to_html(doctored(), strict=True)).cells["WATCH-02"] == "broken"


def test_the_page_escapes_what_the_server_sent():
    page = to_html(doctored())
    assert "<script" not in page and "<b>bold" not in page
    assert "nothing came; &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "watches &lt;the user&gt;." in page
    assert "<code>GET</code> is answered." in page


@pytest.mark.parametrize("results", [[], [passed()], [broken()]])
def test_a_page_can_be_made_of_any_run(results):
    judged = report.verdict(run(*results))
    assert judged.sentence in to_html(run(*results))
