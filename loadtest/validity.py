"""Is the run to be believed? Rules over its data; each says in one sentence what is wrong and where.

`fatal`: the figures say nothing about the server. `warning`: they do, but read this first. A server that does badly is
no reason: that is what the verdict is for.

Beside metrics, ledger, `offered` and `achieved`, the rules read what the harness counted and sampled. What is absent is
not judged.

- `Step.counts`: `asked` (sessions that the run was to come to), `wanted` and `connected` (sessions that were to be
  there at the end of the step, and that were; not those that had just begun to connect), `storm_cut_short` (s from
  its beginning to the end of the run), `begun` (that have tried to connect), `connects` and
  `connect_failures` (attempts), `watches_unconfirmed`,
  `harness_errors` (its own code raised), `address_errors`
  (EMFILE, EADDRNOTAVAIL), `negative_latencies`, `server_restarts` and `planned_restarts`, and what the kernel counted
  meanwhile: `listen_overflows`, `listen_drops`, `tcp_timeouts`, `swapped_pages`.
- `Step.errors`: failures by metric and cause. `Run.faults`: what the load test found wrong with itself.
- `Step.resources`: `generator_cpu_percent`, of one core, of the busiest process of the generator.
- `Run.workload["seconds"]`: how long it was to take. `Run.workload["storm"]`: there where a storm was to come.
  `Run.harness["workers"]`: `{"wanted": n, "connected": n}` of each.
- `Run.machine`: `cores` and `load_before`, the load average of the last minute before the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator

from loadtest.run import Run, Step

Finding = tuple[str, str]
"""`(level, sentence)`, level `fatal` or `warning`."""

LAG = "generator lag"
LATE = 250.0
"""ms of it at p99 that no run bears, though too few samples of any latency were taken to compare: what the SLO gives a
notice unless told otherwise."""
STORM = "storm"
"""The scenario in which all connections are lost, and how its phases begin in which they are."""
RETURN = 120.0
"""s that a storm's sessions have to be back."""
_KERNEL = {
    "listen_overflows": "connections were refused by a full accept queue",
    "listen_drops": "connection requests were dropped by the kernel",
    "tcp_timeouts": "TCP retransmission timeouts occurred",
    "swapped_pages": "pages were swapped",
}


def judge(run: Run, beyond: Container[int] = ()) -> list[Finding]:
    """All that speaks against the run, the fatal first.

    Args:
        beyond: places of steps beyond the server's limit: what is found in them is a warning only.
    """
    findings = [finding for rule in _RUN_RULES for finding in rule(run)]
    for place, step in enumerate(run.steps):
        where = f"at {step.sessions:,} sessions: "
        for rule in _STEP_RULES:
            for level, sentence in rule(step):
                findings.append(("warning" if place in beyond else level, where + sentence))
    return sorted(dict.fromkeys(findings), key=lambda finding: finding[0] != "fatal")


def is_valid(findings: Iterable[tuple[str, str]]) -> bool:
    """Whether none of the findings is fatal."""
    return all(level != "fatal" for level, _ in findings)


# Of one step.


def nobody_connected(step: Step) -> Iterator[Finding]:
    """A step in which no session ever came about."""
    if step.sessions > 0 and step.counts.get("connected") == 0 and not _ever_connected(step):
        yield "fatal", "no session was connected."


def fewer_sessions(step: Step) -> Iterator[Finding]:
    """Sessions that are not there and of which no failure tells."""
    connected, wanted = step.counts.get("connected"), step.counts.get("wanted", step.sessions)
    if connected is None or not (connected or _ever_connected(step)):
        return
    if connected < 0.99 * wanted and not step.errors and not step.breach:
        yield "fatal", f"only {connected:,} of {wanted:,} sessions were connected, and no failure says why."


def _ever_connected(step: Step) -> bool:
    return step.counts.get("connects", 0) > step.counts.get("connect_failures", 0)


def never_begun(step: Step) -> Iterator[Finding]:
    """A run that ended while its sessions were still coming."""
    asked, begun = step.counts.get("asked", 0), step.counts.get("begun", 0)
    if begun < 0.99 * asked:
        yield "fatal", f"only {begun:,} of {asked:,} sessions had begun to connect when the run ended."


def storm_cut_short(step: Step) -> Iterator[Finding]:
    """Nobody can tell how many would have been back."""
    if "storm_cut_short" in step.counts and not step.breach:
        seconds = step.counts["storm_cut_short"]
        yield "fatal", f"the run ended {seconds} s after the beginning of its storm: give it more seconds."


def silent_clients(step: Step) -> Iterator[Finding]:
    """Clients that were not answered, and of whom no figure tells: what they would have seen is not known."""
    unconfirmed = step.counts.get("watches_unconfirmed", 0)
    if unconfirmed > 0.01 * step.counts.get("connects", 0):
        yield "fatal", f"{unconfirmed:,} clients failed silently: what they watch was never confirmed."


def own_errors(step: Step) -> Iterator[Finding]:
    """What raised in the load test was not recorded."""
    if count := step.counts.get("harness_errors", 0):
        yield "fatal", f"the load test itself failed {count:,} times: see its log."


def failures(step: Step) -> Iterator[Finding]:
    """Failures stay out of the latencies."""
    if step.errors:
        worst = sorted(step.errors.items(), key=lambda item: -item[1])
        more = f", and {len(worst) - 3} more kinds" if len(worst) > 3 else ""
        said = ", ".join(f"{name} ({count:,})" for name, count in worst[:3])
        yield "warning", f"{sum(step.errors.values()):,} failures: {said}{more}."


def connects_failed(step: Step) -> Iterator[Finding]:
    """One in a hundred attempts to connect."""
    failed, tried = step.counts.get("connect_failures", 0), step.counts.get("connects", 0)
    if failed and failed >= 0.01 * tried:
        yield "warning", f"{failed:,} of {tried:,} attempts to connect failed."


def offered_less(step: Step) -> Iterator[Finding]:
    """An open schedule that was not kept."""
    if step.offered > 0 and step.achieved < 0.99 * step.offered:
        share = 100 * step.achieved / step.offered
        yield "fatal", f"only {share:.1f} % of the intended actions were made ({step.achieved:.1f}/s)."


def generator_busy(step: Step) -> Iterator[Finding]:
    """A generator without a core to spare measures itself."""
    cpu = step.resources.get("generator_cpu_percent", 0.0)
    if cpu > 95:
        yield "fatal", f"the generator was the limit: it used {cpu:.0f} % of its core."
    elif cpu > 70:
        yield "warning", f"the generator used {cpu:.0f} % of its core."


def generator_late(step: Step) -> Iterator[Finding]:
    """The generator's own lag is part of every latency."""
    lag = step.metrics.get(LAG)
    if lag is None:
        return
    if lag.p99 is None:
        yield "warning", f"the generator's lag is not known: {lag.count:,} samples are too few."
        return
    quoted = {name: summary.p99 for name, summary in step.metrics.items() if name != LAG and summary.p99}
    name, least = min(quoted.items(), key=lambda item: item[1], default=("", float("inf")))
    if lag.p99 > LATE and not quoted:
        yield "fatal", f"the generator was late: its lag was {lag.p99:.0f} ms at p99."
    elif lag.p99 > 5 and lag.p99 > 0.5 * least:
        yield "fatal", f"the generator was late: its lag of {lag.p99:.1f} ms is most of {name} ({least:.1f} ms at p99)."
    elif lag.p99 > 5:
        yield "warning", f"the generator's lag was {lag.p99:.1f} ms at p99."
    elif lag.p99 > 0.1 * least:
        yield "warning", f"the generator's lag, {lag.p99:.2f} ms, is a part of {name} ({least:.2f} ms at p99)."


def out_of_addresses(step: Step) -> Iterator[Finding]:
    """EMFILE and EADDRNOTAVAIL are limits of the generator."""
    if count := step.counts.get("address_errors", 0):
        yield "fatal", f"the generator ran out of ports or open files {count:,} times."


def before_its_time(step: Step) -> Iterator[Finding]:
    """Nothing can be answered before it was intended."""
    if count := step.counts.get("negative_latencies", 0):
        yield "fatal", f"{count:,} latencies were negative: the clocks or the harness are wrong."


def books_do_not_balance(step: Step) -> Iterator[Finding]:
    """More received than due is an error of the ledger, not of the server."""
    due, came = step.ledger.get("expected", 0), step.ledger.get("received", 0)
    if came > 1.005 * due:
        yield "fatal", f"{came:,} notices were received, but only {due:,} were due."
    elif step.ledger and due != came + step.ledger.get("missing", 0) + step.ledger.get("cancelled", 0):
        yield "fatal", "the ledger does not balance: expected is not received + missing + cancelled."


def server_restarted(step: Step) -> Iterator[Finding]:
    """Outside of what the scenario did itself. Where it does, one restart may be of any number of processes."""
    count = step.counts.get("server_restarts", 0)
    if count and not step.counts.get("planned_restarts"):
        yield "fatal", f"the server restarted {count} times, and the scenario did not do it."


def kernel_complains(step: Step) -> Iterator[Finding]:
    """What the kernel dropped, nobody measured."""
    for name, what in _KERNEL.items():
        if count := step.counts.get(name, 0):
            yield "warning", f"{count:,} {what}."


def few_samples(step: Step) -> Iterator[Finding]:
    """Percentiles that are left out, for the notices: the rest is read off the table."""
    for name, summary in step.metrics.items():
        if name.startswith("PUSH ") and summary.count and summary.p99 is None:
            yield "warning", f"{name} has {summary.count:,} samples, too few for its p99."


# Of the run.


def nothing_measured(run: Run) -> Iterator[Finding]:
    """A run without a step."""
    if not run.steps:
        yield "fatal", "Nothing was measured."


def faults(run: Run) -> Iterator[Finding]:
    """What the load test found wrong with itself."""
    for fault in run.faults:
        yield "fatal", fault


def nothing_due(run: Run) -> Iterator[Finding]:
    """No change of status: then "none lost" says nothing."""
    if any(step.ledger for step in run.steps) and not any(step.ledger.get("expected") for step in run.steps):
        level = "fatal" if run.slo and re.search(r"lost|missing|offline", run.slo) else "warning"
        yield level, "No change of status was due to any watcher: of notices nothing is known."


def no_storm(run: Run) -> Iterator[Finding]:
    """A storm that never came was not survived."""
    if STORM in run.workload and not any(phase.name.startswith(STORM) for phase in run.phases):
        yield "fatal", "The run ended before its storm had begun."


def took_longer(run: Run) -> Iterator[Finding]:
    """A run that took half as long again as configured did not keep its schedule."""
    configured = run.workload.get("seconds")
    if configured and run.seconds > 1.5 * configured:
        yield "fatal", f"The run took {run.seconds:.0f} s, but was to take {configured:.0f} s."


def generator_wall(run: Run) -> Iterator[Finding]:
    """Servers do not stop all workers at the same number; a limit of the generator does."""
    workers = run.harness.get("workers", [])
    reached = {worker["connected"] for worker in workers}
    if len(workers) > 1 and len(reached) == 1 and all(worker["connected"] < worker["wanted"] for worker in workers):
        yield "fatal", f"Every worker stopped at {reached.pop():,} sessions: a limit of the generator."


def busy_machine(run: Run) -> Iterator[Finding]:
    """Load of others before the start."""
    load, cores = run.machine.get("load_before"), run.machine.get("cores")
    if load is not None and cores and load > 0.25 * cores:
        yield "warning", f"The machine was busy before the start: load {load:.2f} on {cores} cores."


_RUN_RULES: list[Callable[[Run], Iterator[Finding]]] = [
    nothing_measured,
    faults,
    nothing_due,
    no_storm,
    took_longer,
    generator_wall,
    busy_machine,
]
_STEP_RULES: list[Callable[[Step], Iterator[Finding]]] = [
    nobody_connected,
    fewer_sessions,
    never_begun,
    storm_cut_short,
    silent_clients,
    own_errors,
    failures,
    connects_failed,
    offered_less,
    generator_busy,
    generator_late,
    out_of_addresses,
    before_its_time,
    books_do_not_balance,
    server_restarted,
    kernel_complains,
    few_samples,
]
