"""An SLO as text, and what a step says to it."""

from __future__ import annotations

import pytest

from loadtest.metrics import Histogram
from loadtest.run import Step
from loadtest.slo import DEFAULT, SloError, breach, check, parse, untold, without_latencies

WHOLE = {
    "expected": 4_000,
    "missing": 0,
    "late": 0,
    "duplicated": 0,
    "out_of_order": 0,
    "unexpected": 0,
    "cancelled": 0,
    "false_offline_seconds": 0.0,
    "ghost_seconds": 3.5,
}


def histogram(ms, count):
    made = Histogram()
    for _ in range(count):
        made.record(ms * 1000)
    return made


def step(online=((10, 1_980), (300, 20)), offline=((10, 1_000),), **ledger):
    """Notices as `(ms, how many)`; by default 20 of 3,000 took 300 ms: p99 is 10, p99.9 is 300."""
    made = {}
    for name, parts in (("PUSH online", online), ("PUSH offline", offline)):
        whole = Histogram()
        for ms, count in parts:
            whole.add(histogram(ms, count))
        made[name] = whole.encode()
    made["STOMP CONNECTED"] = histogram(80, 2_000).encode()
    return Step(sessions=2_000, seconds=60, histograms=made, ledger=WHOLE | ledger)


def said(text, of):
    return [(one.kept, one.said) for one in check(parse(text), of)]


def test_a_good_step_keeps_the_default():
    checks = check(parse(DEFAULT), step())

    assert [one.kept for one in checks] == [True, True, True]
    assert breach(checks) is None and untold(checks) is None


def test_the_percentile_is_of_both_kinds_of_notices_together():
    # 20 of 3,000 are slow: of "PUSH online" alone, p99 would be 300 ms.
    assert said("p99<250ms", step())[0][0] is True
    assert said("p99<250ms", step(online=((10, 1_960), (300, 40))))[0] == (
        False,
        "p99 was 300 ms, allowed is less than 250 ms",
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("p50<=10.01ms", True),
        ("p50<9ms", False),
        ("p99.5 < 0.5s", True),
        ("p99.5<0.2s", False),
        ("max<301ms", True),
        ("max<299ms", False),
        ("STOMP CONNECTED p99<81ms", True),
        ("STOMP CONNECTED p99<79ms", False),
        ("ghost<=3.5s", True),
        ("ghost<3.5", False),
    ],
)
def test_operators_and_units(text, kept):
    assert said(text, step())[0][0] is kept


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lost", "missing"),
        ("late", "late"),
        ("duplicated", "duplicated"),
        ("out-of-order", "out_of_order"),
        ("unexpected", "unexpected"),
        ("cancelled", "cancelled"),
        ("false-offline", "false_offline_seconds"),
    ],
)
def test_each_count_is_read_from_the_ledger(name, field):
    assert said(f"{name}=0", step())[0][0] is True
    assert said(f"{name}=0", step(**{field: 1}))[0][0] is False


@pytest.mark.parametrize(("seconds", "kept"), [(-2e-12, True), (3e-9, True), (0.002, False)])
def test_seconds_are_as_good_as_sums_of_floats_are(seconds, kept):
    assert said("false-offline=0", step(false_offline_seconds=seconds))[0][0] is kept


def test_a_storm_is_not_asked_for_latencies():
    assert without_latencies(DEFAULT) == "lost=0"
    assert without_latencies("p99<1s, lost<1%, late=0, ghost<60s, duplicated=0") == "lost<1%, duplicated=0"
    assert without_latencies("p99<1s") == "lost=0"


def test_a_share_is_of_what_was_due():
    assert said("lost<0.1%", step(missing=3))[0][0] is True
    assert said("lost<0.1%", step(missing=4))[0] == (
        False,
        "0.1 % (4 of 4,000) notices were lost, allowed are less than 0.1 %",
    )
    assert said("cancelled<0.1%", step(cancelled=4))[0][0] is False


def test_the_breach_names_all_that_was_not_kept():
    checks = check(parse(DEFAULT), step(missing=2, false_offline_seconds=12.25))

    assert breach(checks) == ("2 notices were lost, allowed are 0; 12.2 s false-offline, allowed are 0 s")


def test_too_few_samples_are_judged_by_the_worst_or_not_at_all():
    few = step(online=((10, 100),), offline=())

    assert said("p99<250ms", few)[0] == (True, "the worst of 100 notices was 10 ms, allowed is less than 250 ms")
    assert said("p99<5ms", few)[0] == (None, "p99 cannot be told from 100 samples of notices")
    assert untold(check(parse("p99<5ms"), few)) and breach(check(parse("p99<5ms"), few)) is None


def test_nothing_seen_is_nothing_kept():
    nothing = Step(sessions=10, seconds=60, ledger={"expected": 0, "missing": 0})

    assert [one.kept for one in check(parse(DEFAULT), nothing)] == [None, None, None]


@pytest.mark.parametrize(
    ("text", "said_of_it"),
    [
        ("contradicted=0", "contradicted cannot be told: no answer of REST was compared with the truth"),
        ("contradicted<1%", "contradicted cannot be told: no answer of REST was compared with the truth"),
        ("lost<0.1%", "lost cannot be told: no notice was due"),
        ("late<0.1%", "late cannot be told: no notice was due"),
    ],
)
def test_where_nothing_was_to_be_counted_no_count_is_kept(text, said_of_it):
    assert said(text, step(expected=0, checked=0, contradicted=0)) == [(None, said_of_it)]
    assert said(text, step(checked=10, contradicted=0))[0][0] is True


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "is empty"),
        ("p99", "'p99'"),
        ("p99<250", "'p99<250'"),
        ("p99=250ms", "'p99=250ms'"),
        ("lsot=0", "'lsot'"),
        ("lost=0ms", "'lost=0ms'"),
        ("p99<250ms; lost=0", "'p99<250ms; lost=0'"),
    ],
)
def test_what_is_no_slo_is_one_line(text, names):
    with pytest.raises(SloError, match="SLO") as caught:
        parse(text)
    assert names in str(caught.value) and "\n" not in str(caught.value)
