"""The report says what the data says, and no more; it stands alone in one file."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from loadtest import plots, readings, report, verdict
from loadtest.run import Phase, Run, Step, Summary
from tests.loadtest.made_up import BEST, BROKEN, encode, made_up


class Page(HTMLParser):
    """The text of a page, its ids and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"])
        self.loads += [url for name, url in attrs if name in {"src", "href", "data", "action"} and url[0] != "#"]
        if tag not in {"meta", "br", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture(scope="module")
def html():
    return report.to_html(made_up())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def cells(html: str, first: str) -> list[str]:
    """The cells of the table row that begins with a text."""
    begin = re.compile(rf"<th[^>]*>{re.escape(first)}</th>")
    row = next(row for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL) if begin.search(row))
    return [re.sub("<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]


def test_the_verdict_stands_first(page):
    run = made_up()
    assert page.text.index(f"OK {run.verdict}.") < page.text.index("Question") < page.text.index("Results by step")


def test_all_parts_are_there(page):
    for part in ("What limits it", "Is it to be believed?", "Results by step", "Plots", "Ledger", "Resources", "Phases",
                 "Workload", "Machine", "Limits as read", "Server", "Load test", "To repeat it"):  # fmt: skip
        assert part in page.text
    assert made_up().command in page.text
    assert "The generator used 74 % of its core" in page.text


def test_the_ledger_shows_what_it_counted(html):
    assert cells(html, "missing") == ["0", "0", "0", "0", "0", "41"]
    assert cells(html, "false-offline-seconds")[-1] == "96.4"
    assert cells(html, "cancelled")[-2:] == ["20", "23"]
    assert ">contradicted<" not in html  # this run asked nothing over REST
    assert cells(html, "notice after loss")[0] == "60"


def test_what_was_cancelled_is_on_top_and_no_fault(html, page):
    """A server that tells nobody of changes that are soon undone loses nothing: that is to be seen, and allowed."""
    assert "20 notices cancelled" in page.text
    assert not re.search(r'<td class="n fault">20</td>', html)


def test_the_page_stands_alone_and_is_small(html, page):
    assert page.loads == []
    assert "url(http" not in html and "@import" not in html
    assert len(html.encode()) < 2_000_000


def test_the_page_is_well_formed_and_its_ids_are_unique(html, page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(page.ids)


def test_the_same_run_gives_the_same_page(html):
    assert report.to_html(made_up()) == html


def test_plots_take_the_colours_of_the_page(html):
    used = set(re.findall(r"var\((--\w+)\)", html))
    defined = set(re.findall(r"(--\w+):", html))
    assert used <= defined | {"--n", "--tone"}
    for plot in plots.plots(made_up()):
        assert re.findall(r"#[0-9a-f]{6}\b", plot.svg) == []
        assert "<text" in plot.svg and "<dc:date>" not in plot.svg


def test_status_ok_breached_and_invalid():
    run = made_up()
    assert report.status(run) == report.Status("OK", [])
    run.ok = False
    assert report.status(run).word == "breached"
    assert report.status(run).reasons == [f"At {BROKEN:,} sessions: {run.steps[-1].breach}."]
    run.ok = True
    run.validity.append(("fatal", "The generator was late."))
    assert report.status(run) == report.Status("INVALID", ["The generator was late."])
    assert "INVALID" in (text := Page(report.to_html(run)).text)
    assert text.index("not to be quoted: The generator was late.") < text.index("Question")


def test_the_figures_on_top_are_from_the_largest_step_that_kept_the_slo():
    run = made_up()
    step = readings.best(run)
    assert step is not None and step.sessions == BEST
    run.verdict = ""
    p99 = readings.notices(step).at(0.99)
    assert verdict.sentence(run) == f"{BEST:,} sessions at 420 actions/s, notices within {p99:.1f} ms at p99, none lost"
    for step in run.steps:
        step.breach = "all is lost"
    assert verdict.sentence(run).endswith("41 lost")


def test_the_sessions_that_were_held_are_on_top_and_not_those_that_were_asked_for():
    """Users come and go: of 10,000 fewer are there at once."""
    run = made_up()
    run.verdict = ""
    step = readings.best(run)
    assert step is not None
    step.held = 11_077
    assert verdict.sentence(run).startswith(f"11,077 sessions of {BEST:,} at ")
    assert f"11,077 sessions of {BEST:,} " in Page(report.to_html(run)).text
    step.held = BEST
    assert verdict.sentence(run).startswith(f"{BEST:,} sessions at ")


def test_the_slope_counts_the_sessions_that_were_held():
    loads = ((100, 90), (200, 180), (400, 360))
    steps = [
        Step(sessions=asked, held=held, seconds=1, resources={"server_rss_bytes": 5e7 + 2048 * held})
        for asked, held in loads
    ]
    (slope,) = report.slopes(Run(title="t", steps=steps))
    assert (slope.per_session, slope.at_zero, slope.points) == ("2.00 KiB", "47.68 MiB", 3)
    same = [replace(steps[0], held=held) for held in (90, 91)]
    assert report.slopes(Run(title="t", steps=same)) == [], "one load, held twice"


def test_a_search_does_not_differ_from_itself():
    """A load that is confirmed is in it as a step, as a long hold and as a storm."""
    run = Run.load(Path(__file__).parents[2] / "docs/capacity/one-process.json")
    assert sum(step.sessions == run.steps[-1].sessions for step in run.steps) > 1
    assert report._marked(report._figures(run, run)) == []


def test_steps_of_one_load_are_told_apart():
    text = report.to_html(Run.load(Path(__file__).parents[2] / "docs/capacity/one-process.json"))
    for label in ("19,000", "19,000, long hold", "19,000, storm"):
        assert f'<th class="n">{label}</th>' in text
        assert f"<summary>Sessions: {label}; every metric" in text


def test_steps_are_compared_with_those_of_their_kind():
    kinds = ("step", "long hold", "storm")
    a, b = (
        Run(title="t", steps=[Step(sessions=100, seconds=1, kind=kind, achieved=10.0 * n) for n, kind in order])
        for order in ([*enumerate(kinds, 1)], [*enumerate(kinds, 1)][::-1])
    )
    groups = dict(report._figures(a, b))
    assert list(groups)[1:] == ["100 sessions", "100 sessions, long hold", "100 sessions, storm"]
    assert report._marked(report._figures(a, b)) == []
    a.steps.append(Step(sessions=100, seconds=1, achieved=5.0))
    assert len(report._figures(a, b)) == len(groups), "each is compared once"


def test_where_no_notice_was_due_none_was_kept():
    step = Step(sessions=10, seconds=60, ledger={"expected": 0, "missing": 0})
    assert verdict.sentence(Run(title="t", steps=[step])) == "10 sessions at 0 actions/s, no notice was due"


def test_a_percentile_without_samples_is_a_dash_that_says_why():
    step = Step(sessions=10, seconds=60, metrics={"PUSH online": Summary(250, 1.5, 20.25, None, None, 1234.5)})
    html = report.to_html(Run(title="t", steps=[step]))
    assert cells(html, "PUSH online") == ["250", "1.50", "20.2", "–", "–", "1,234"]
    assert "250 samples are too few: this percentile wants 1,000" in html
    assert "250 samples are too few: this percentile wants 10,000" in html


def test_decoded_percentiles_are_those_of_the_values():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(2, 1, 3000), rng.lognormal(3, 1, 2000)
    both = readings.decode([encode(a), encode(b)])
    assert both.total == 5000
    for quantile in (0.0, 0.5, 0.9, 0.99, 1.0):
        expected = np.quantile(np.concatenate([a, b]), quantile, method="inverted_cdf")
        assert both.at(quantile) == pytest.approx(expected, rel=0.003)


def test_the_slope_is_that_of_the_fit(html):
    steps = [Step(sessions=n, seconds=1, resources={"server_rss_bytes": 5e7 + 2048 * n}) for n in (100, 200, 400)]
    (slope,) = report.slopes(Run(title="t", steps=steps))
    assert (slope.per_session, slope.at_zero, slope.points) == ("2.00 KiB", "47.68 MiB", 3)
    assert report.slopes(Run(title="t", steps=steps[:1])) == []
    assert cells(html, "Server RSS")[0] == f"{11_400 / 1024:.2f} KiB"


def test_one_step_gives_the_slope_of_its_memory_while_the_sessions_came():
    read = {"server_rss_bytes": 1.0, "server_cpu_percent": 1.0}
    run = Run(title="t", steps=[Step(sessions=20, seconds=1, resources=read)], phases=[Phase("ramp", 0, 10)])
    run.series = {
        "sessions": [(0, 0), (10, 100), (20, 100)],
        "server_rss_bytes": [(0, 0.0), (5, 51_200.0), (10, 102_400.0), (20, 204_800.0)],
        "server_cpu_percent": [(0, 90.0), (10, 80.0), (20, 5.0)],
    }
    assert [(one.name, one.per_session) for one in report.slopes(run)] == [("server_rss_bytes", "1.00 KiB")]


def test_the_bottleneck_names_what_was_full():
    said = " ".join(report.bottleneck(made_up()))
    assert "Server CPU: 99 % of a core." in said
    assert "Open files: 14,041 of 20,000 (70 %)." in said
    assert "Only 92.4 % of the actions that were due were made." in said
    run = made_up()
    run.steps.pop()
    assert "the limit was not met" in report.bottleneck(run)[-1]


@pytest.mark.parametrize(
    ("slo", "limit"),
    [
        ("p99<250ms, lost=0", (0.99, 250)),
        ("lost=0, p99.9 <= 1.5s", (0.999, 1500)),
        ("p999<1s", (0.999, 1000)),
        ("p100<2s", (1.0, 2000)),
        ("lost=0", None),
        (None, None),
    ],
)
def test_the_limit_of_an_slo(slo, limit):
    assert readings.limit_of(slo) == (limit and pytest.approx(limit))


def test_recovery_is_counted_from_the_drop_and_within_its_phase():
    run = Run(title="t", phases=[Phase("storm", 20, 40), Phase("drain", 40, 50)])
    counts = [100.0] * 20 + [100, 0, *range(10, 101, 10)] + [100.0] * 9 + [0.0] * 10
    run.series["sessions"] = [(float(t), value) for t, value in enumerate(counts)]
    found = readings.recovery(run)
    assert found is not None
    name, points = found
    assert (name, points[0], points[-1][0]) == ("storm", (1.0, 0.0), 20.0)
    assert next(t for t, share in points if share >= 95) == 11
    (plot,) = [plot for plot in plots.plots(run) if plot.name == "recovery"]
    assert plot.caption == "95 % were back after 11.0 s."
    run.series["sessions"] = [(t, min(value, 90) if t > 20 else value) for t, value in run.series["sessions"]]
    assert "never came back" in {plot.name: plot.caption for plot in plots.plots(run)}["recovery"]


def test_a_plot_without_data_is_left_out():
    assert {plot.name for plot in plots.plots(made_up())} == {
        "knee", "percentiles", "heat", "offered", "sessions", "recovery", "cpu", "rss", "expiry", "lag", "cpu-time",
    }  # fmt: skip
    assert "recovery" not in {plot.name for plot in plots.plots(made_up(storm=False))}
    run = made_up()
    run.intervals = {}
    run.series = {}
    assert {plot.name for plot in plots.plots(run)} == {"knee", "percentiles", "offered", "cpu", "rss", "expiry"}
    assert plots.plots(Run(title="t")) == []


def test_a_run_with_nothing_in_it_has_a_page():
    text = Page(report.to_html(Run(title="Empty"))).text
    assert "breached Nothing was measured." in text
    assert "Plots" not in text and "Ledger" not in text


def test_what_comes_from_outside_is_text():
    run = made_up()
    evil = "<script>alert(1)</script>$x_$"
    run.title = run.question = run.verdict = evil
    run.target["address"] = run.machine["cpu"] = evil
    run.phases[1] = Phase(evil, run.phases[1].start, run.phases[1].end)
    for html in (report.to_html(run), report.compare(run, made_up())):
        assert "<script" not in html
        assert "&lt;script" in html


def test_compare_marks_what_differs(tmp_path):
    a, b = made_up(), made_up(factor=1.12)
    b.limits["somaxconn"] = 128
    html = report.compare(a, b)
    page = Page(html)
    assert page.open == [] and page.loads == [] and len(page.ids) == len(set(page.ids))
    assert cells(html, "Server RSS")[2] == "+6 % worse"
    assert cells(html, "Somaxconn") == ["4,096", "128"]
    before = html[: html.index("All of it")]
    assert "Generator CPU" not in before and "Tcp max" not in before
    assert "+12 % better" not in html
    assert cells(report.compare(b, a), "Server CPU")[2] == "-11 % better"


def test_compare_of_a_run_with_itself_finds_nothing():
    text = Page(report.compare(made_up(), made_up())).text
    assert "Nothing that was measured." in text
    assert "Nothing was set differently" in text
    assert "worse" not in text and "better" not in text


def test_what_was_written_can_be_read_back(tmp_path):
    report.write(made_up(), tmp_path / "run.html")
    assert Run.load(tmp_path / "run.json") == made_up()
    assert Page((tmp_path / "run.html").read_text()).loads == ["run.json"]


def test_the_figures_on_top_are_not_a_storms_however_long_it_was():
    run = made_up()
    best = readings.best(run)
    assert best is not None
    storm = replace(best, kind="storm", seconds=10 * best.seconds)
    run.steps.append(storm)
    assert readings.best(run) is best
    run.steps = [storm]
    assert readings.best(run) is storm, "there is nothing else"
