"""What a run comes to: whether it kept its SLO, whether it is to be believed, and the one sentence on top. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from loadtest import slo, validity
from loadtest.readings import best, held, notices, recorded, successes
from loadtest.run import Run, Step

HOSTILE = "HOSTILE"
"""How the names of the metrics of hostile clients begin."""

SESSION = "STOMP session"
"""The metric of sessions that were to stay; it knows failures only."""

BACK = 95
"""% of the sessions that have to be back at the end of a storm."""

UNTRUE = {
    "duplicated": ("came twice", "received"),
    "out_of_order": ("came out of order", "received"),
    "unexpected": ("were never true", "received"),
    "contradicted": ("were never true", "checked"),
}
"""Counts of the ledger that should be 0; how a sentence says them, and of which other count they are a part."""

ASKED = re.compile(r"(REST|PUSH) .*|STOMP watch")
"""The metrics of which failures are the server's; that it takes no connections is judged by the sessions it holds."""


def judge(run: Run, text: str) -> None:
    """Hold a run against its SLO, where there is one, and against what makes it worth believing; set the verdict."""
    clauses = slo.parse(text) if text else []
    run.slo = text or None
    untold = []
    for step in run.steps:
        checks = slo.check(clauses, step)
        late = tardy(step, run.target.get("lease_seconds")) if any(one.quantile for one in clauses) else ()
        step.breach = "; ".join(filter(None, [slo.breach(checks), *late, *refusals(step)])) or None
        if reason := slo.untold(checks):
            # What is broken is broken, whatever else is not known.
            untold.append(("warning" if step.breach else "fatal", f"At {step.sessions:,} sessions {reason}."))
    run.validity = [*untold, *findings(run)]
    run.ok = validity.is_valid(run.validity) and not any(step.breach for step in run.steps)
    run.verdict = run.verdict or sentence(run)


def refusals(step: Step) -> Iterator[str]:
    """What the server did not do, whatever the SLO says: hold the sessions, answer them, keep out what is to stay out.

    Of `Step.counts` it reads, beside those of `validity`, `prevented` (heartbeats that could not be sent),
    `receipts` and `receipts_unanswered` (of heartbeats), and `back_percent` (of the sessions, at the end of a storm).
    """
    connected, wanted = step.counts.get("connected", 0), step.counts.get("wanted", 0)
    caused = step.errors or step.counts.get("planned_restarts")
    if connected < 0.99 * wanted and caused and "storm_cut_short" not in step.counts:
        yield f"only {connected:,} of {wanted:,} sessions were there at the end"
    prevented, made = step.counts.get("prevented", 0), step.achieved * step.seconds
    if prevented > 0.01 * (prevented + made):
        yield f"{prevented:,} heartbeats could not be sent, as the server had refused or closed their sessions"
    unanswered, asked = step.counts.get("receipts_unanswered", 0), step.counts.get("receipts", 0)
    if unanswered > few(asked):
        # Who hangs sends no notice either, and where none is due no clause need tell of it.
        yield f"{unanswered:,} of {asked:,} heartbeats that asked for a receipt got none"
    if (share := step.counts.get("back_percent", 100)) < BACK:
        yield f"only {share} % of the sessions were back at the end of the storm"
    ended, connects = ended_early(step), step.counts.get("connects", 0)
    if ended > few(connects):
        yield f"the server ended {ended:,} sessions that were to stay, of {connects:,} connects"
    for name, count in step.errors.items():
        if name.startswith(HOSTILE):
            yield f"hostile input was not kept out: {name} ({count:,})"
    yield from failures(step)
    yield from untrue(step)


def tardy(step: Step, lease: float | None) -> Iterator[str]:
    """Ends that the server had to find out by itself, and told later than the contract lets it: a quarter of a lease.

    They are not among the notices that a clause such as `p99<250ms` is about.
    """
    for name, of in (("PUSH offline-by-loss", "lost connections"), ("PUSH offline-by-expiry", "ended leases")):
        seen = recorded(step, name)
        if lease and seen.total and (at := seen.at(0.99)) > 250 * lease:
            yield f"notices of {of} came within {milliseconds(at)} ms at p99: a quarter of a lease is {lease / 4:g} s"


def ended_early(step: Step) -> int:
    """Sessions that the server ended; not those that a scenario did, nor those of a restart that it made.

    One may be told of it by an ERROR and then closed: that is one session.
    """
    return max((count for error, count in step.errors.items() if error.startswith(f"{SESSION}: ")), default=0)


def few(tried: int) -> float:
    """How many failures of so many attempts are no breach: 1 %, and 3, so that a short run is not judged by one."""
    return 0.01 * tried + 3


def failures(step: Step) -> Iterator[str]:
    """What was asked closely and failed: it is in no latency, so that no clause tells of it."""
    failed: Counter[str] = Counter()
    for error, count in step.errors.items():
        failed[error.rpartition(": ")[0]] += count
    for name, count in failed.items():
        tried = count + successes(step, name)
        if ASKED.fullmatch(name) and count > few(tried):
            yield f"{count:,} of {tried:,} attempts at {name} failed"


def untrue(step: Step) -> Iterator[str]:
    """What the contract allows of no notice and no answer: changes never repeat, versions never go down, all is true.

    A few may be an artefact of when the harness learns of a change.
    """
    for name, (words, of) in UNTRUE.items():
        count, told = step.ledger.get(name, 0), step.ledger.get(of, 0)
        if count > max(3, 0.001 * told):
            yield f"{count:,} of {told:,} {'answers of REST' if of == 'checked' else 'notices'} {words}"


def findings(run: Run) -> list[tuple[str, str]]:
    """What speaks against a run. Of a step that broke its SLO among others that kept it, it is a warning only.

    A server that is beyond its limit answers late and takes no connections: it need not be known how much beyond.
    """
    if len(run.steps) == 1:
        return validity.judge(run)
    return validity.judge(run, {at for at, step in enumerate(run.steps) if step.breach and other_cause(step) is None})


def other_cause(step: Step, *, may_be_late: bool = False) -> str | None:
    """Why a step says nothing of the server's limit, though it broke the SLO: something else may have been what did.

    That is the generator, the load test's own faults, or somebody who restarted the server. Other rules find what a
    server beyond its limit does, too.
    """
    rules = [
        validity.generator_busy,
        validity.out_of_addresses,
        validity.never_begun,
        validity.own_errors,
        validity.before_its_time,
        validity.books_do_not_balance,
        validity.server_restarted,
    ]
    if not may_be_late:
        rules.append(validity.generator_late)
    return next((text for rule in rules for level, text in rule(step) if level == "fatal"), None)


def exit_code(run: Run) -> int:
    """0: kept; 1: the SLO is breached; 2: it cannot be believed."""
    if not validity.is_valid(run.validity):
        return 2
    return 0 if run.ok else 1


def sentence(run: Run) -> str:
    """The verdict in one sentence: the run's own, or one made of its best step."""
    step = best(run)
    if run.verdict or step is None:
        return run.verdict.rstrip(".") or "Nothing was measured"
    seen = notices(step)
    when = "" if held(step) else " while the sessions came"
    told = f", notices within {milliseconds(seen.at(0.99))} ms at p99{when}" if seen.holds(0.99) else ""
    return f"{step.sessions_said} at {step.achieved:,.0f} actions/s{told}{_lost(step)}"


def _lost(step: Step) -> str:
    """What became of the notices. That none was lost is not all: it is said as well what came and should not have."""
    missing = step.ledger.get("missing")
    if missing is None:
        return ""
    lost = f"{missing:,} lost" if missing else "none lost"
    if step.ledger.get("expected") == 0:
        lost = "no notice was due"
    wrong = [
        f"{count:,} {'answers of REST ' if of == 'checked' else ''}{words}"
        for name, (words, of) in UNTRUE.items()
        if (count := step.ledger.get(name, 0))
    ]
    return f", {lost}" + (f", {'and' if missing else 'but'} {', '.join(wrong)}" if wrong else "")


def milliseconds(number: float) -> str:
    """A latency in ms, with as many digits as say something."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"
