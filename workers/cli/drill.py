"""`headrace drill`: injects faults into a stack under load, then checks that no event was lost or doubled."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from app.config.settings import load, process_environment
from app.errors import HeadraceError
from workers.cli import options, output
from workers.local import temporary
from workers.verify import totals as comparing
from workers.verify.drill import plan, provider, run
from workers.verify.drill import report as reporting

VISIBILITY_SECONDS = 15  # instead of 60: messages of killed workers are redelivered sooner
SEEDS = 1_000_000
OURS = {"postgres": "DATABASE_URL", "broker": "BROKER_URL"}
MAX_NAMED = 5
# The deliveries and rows that a verdict is about: the name in the report, and the attribute of Totals.
EVIDENCE = {
    "lost_deliveries": "nowhere",
    "pending_deliveries": "pending",
    "wrongly_dead": "wrongly_dead",
    "missing_rows": "missing",
    "outdated_rows": "outdated",
    "doubled_deliveries": "twice",
    "unexplained_rows": "surplus",
}
VERDICTS: dict[comparing.Verdict, str] = {
    "proven": "[green]PASSED: nothing lost, nothing doubled.[/]",
    "unfinished": "[yellow]UNFINISHED: events or backfills were still open when there was no more progress.[/]",
    "different": "[red]FAILED.[/]",
}


@click.command("drill")
@click.option("--minutes", type=click.FloatRange(0.1), default=2.0, show_default=True, help="duration of the load")
@click.option("--seed", type=int, help="repeats the users, events and faults of an earlier drill (default: random)")
@click.option("--rate", type=click.FloatRange(1), default=100.0, show_default=True, help="events per second")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="worker processes per lane")
@click.option("--keep", is_flag=True, help="keep data and logs (always kept after a failure)")
@options.json_option
def command(*, minutes: float, seed: int | None, rate: float, workers: int, keep: bool) -> None:
    """Test a stack under load and faults. Kills, freezes and restarts processes, then checks every accepted event.

    The exit status is 0 only if nothing was lost or doubled, 1 if the drill failed, and 5 if the work did not finish.
    """
    seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
    visibility = load().visibility_timeout_seconds
    if "HEADRACE_VISIBILITY_TIMEOUT_SECONDS" not in process_environment():
        visibility = VISIBILITY_SECONDS
    again = f"headrace drill --minutes {minutes:g} --rate {rate:g} --workers {workers} --seed {seed}"
    click.echo(f"Seed {seed}. To repeat this drill: {again}", err=output.is_json())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _drill(plan.Options(minutes * 60, seed, rate, visibility), workers, keep=keep)
    except KeyboardInterrupt:
        click.echo("interrupted; all processes of the stack have been stopped", err=output.is_json())
        sys.exit(130)


def _drill(drill: plan.Options, workers: int, *, keep: bool) -> None:
    """Runs a drill, prints its report, and ends the process with its exit status."""
    console = Console(stderr=True) if output.is_json() else Console(width=None if sys.stdout.isatty() else 140)
    report = _run(console, drill, workers, keep=keep)
    if output.is_json():
        output.print_json(_plain(report))
    else:
        _show(console, report)
    sys.exit(comparing.EXIT_STATUS[report.verdict])


def _run(console: Console, drill: plan.Options, workers: int, *, keep: bool) -> reporting.Report:
    began = time.monotonic()
    console.print("Starting a stack ...")
    pauses: list[provider.Pause] = []
    with provider.make_simulator(drill, pauses) as simulator:
        with temporary.running_stack("drill", run.environment(simulator, drill), workers) as stack:
            console.print(f"Ready after {time.monotonic() - began:.0f} s.", highlight=False)
            _print_external_causes(console, stack)
            try:
                with output.progress("load", screen=console) as update:
                    report = run.Drill(
                        simulator,
                        pauses,
                        stack,
                        drill,
                        show=lambda moment: _show_progress(update, moment),
                        on_progress=lambda fault: console.print(str(fault), style="dim", highlight=False),
                    ).run()
            except HeadraceError:
                stack.keep = True
                console.print(f"Data and logs are kept in {stack.folder}", soft_wrap=True)
                raise
            stack.keep = keep or not report.holds
        if stack.keep:
            (stack.folder / "report.json").write_text(json.dumps(_plain(report), indent=2, default=str))
            console.print(f"Data, logs and report.json are kept in {stack.folder}", soft_wrap=True)
    return report


def _print_external_causes(console: Console, stack: temporary.Stack) -> None:
    processes = stack.info()["processes"]
    for group, variable in OURS.items():
        if group not in processes:
            console.print(f"{variable} is set: the {group} is not part of this stack and gets no faults.")


def _show_progress(update: output.Update, moment: reporting.Snapshot) -> None:
    total, done = moment.seconds + moment.left, moment.seconds
    if moment.phase == "settling":
        total, done = moment.acked, min(moment.settled, moment.acked)
    time_text = f"{moment.left:.0f} s left" if moment.phase == "load" else f"for {moment.seconds:.0f} s"
    counts = (
        f"acked {moment.acked:,} · in the ledger {moment.settled:,}, applied {moment.applied:,} · "
        f"faults {moment.faults} · open backfills {moment.backfills_open}"
    )
    update(done, total or None, phase=moment.phase, detail=f"{time_text} · {counts}")


def _plain(report: reporting.Report) -> dict[str, Any]:
    """The report as JSON values."""
    totals = report.totals
    return {
        "seed": report.seed,
        "holds": report.holds,
        "verdict": report.verdict,
        "accepted": totals.accepted,
        **totals.outcomes,
        "pending": len(totals.pending),
        "exact": totals.is_exact,
        "lost": totals.lost,
        "doubled": totals.doubled,
        "expected_rows": totals.expected,
        **{name: getattr(totals, attribute) for name, attribute in EVIDENCE.items()},
        "answers": {str(status or "none"): count for status, count in sorted(report.statuses.items())},
        "longest_answer_seconds": round(report.max_response, 3),
        "longest_answer_with_freezes_seconds": round(report.max_response_with_freezes, 3),
        "never_taken": report.never_taken,
        "settled_after_seconds": report.settled_after,
        "backfills": report.backfills,
        "provider_requests": report.provider_requests,
        "provider_refused": report.provider_refused,
        "requests_in_a_silence": report.rate_limit_violations,
        "requests_in_a_silence_excused": report.excused,
        "subscriber": asdict(report.subscriber),
        "consumers": [asdict(one) for one in report.followers],
        "strikes": [asdict(one) for one in report.faults],
    }


def _show(console: Console, report: reporting.Report) -> None:
    _show_faults(console, report)
    for line in (*_about_answers(report), *_about_history(report), *_about_feed(report), *_about_end(report)):
        console.print(line, highlight=False, soft_wrap=True)
    _show_totals(console, report.totals)
    for name, attribute in EVIDENCE.items():
        if found := getattr(report.totals, attribute):
            named = ", ".join(str(one) for one in found[:MAX_NAMED]) + (" ..." if len(found) > MAX_NAMED else "")
            console.print(f"{name.replace('_', ' ')}: {named}", highlight=False, soft_wrap=True)
    console.print(VERDICTS[report.verdict], style="bold", soft_wrap=True)


def _show_faults(console: Console, report: reporting.Report) -> None:
    table = Table("group", *plan.FAULT_KINDS, title="Injected faults", title_justify="left")
    for group, counts in report.faults_by().items():
        table.add_row(group, *(str(count or "") for count in counts.values()))
    totals = [sum(counts[kind] for counts in report.faults_by().values()) for kind in plan.FAULT_KINDS]
    table.add_row("all", *map(str, totals), style="bold")
    console.print(table)


def _about_answers(report: reporting.Report) -> Iterator[str]:
    statuses = report.statuses
    accepted = sum(count for status, count in statuses.items() if 200 <= status < 300)
    others = {status or "no answer": count for status, count in sorted(statuses.items()) if not 200 <= status < 300}
    other_text = ", ".join(f"{count} x {status}" for status, count in others.items()) or "0"
    yield f"Requests to the endpoint: {sum(statuses.values()):,}; answered 202: {accepted:,}; others: {other_text}"
    late = "" if report.max_response <= reporting.MAX_RESPONSE_SECONDS else "  [red]TOO LONG[/]"
    yield (
        f"Longest response: {report.max_response:.2f} s (limit {reporting.MAX_RESPONSE_SECONDS:.0f} s){late}; "
        f"including the time in which the endpoint was frozen: {report.max_response_with_freezes:.2f} s"
    )
    if report.never_taken:
        yield f"[red]Never accepted: {report.never_taken} events, despite all retries[/]"


def _about_history(report: reporting.Report) -> Iterator[str]:
    states = ", ".join(f"{count} {status}" for status, count in sorted(report.backfills.items()))
    yield (
        f"History: {states} backfills, in {report.provider_requests:,} requests, "
        f"{report.provider_refused:,} of them rejected or cut off by the provider"
    )
    excused = f"; {report.excused} more right after a fault, not counted" if report.excused else ""
    yield f"Requests during a pause that the provider had asked for: {report.rate_limit_violations}{excused}"


def _about_feed(report: reporting.Report) -> Iterator[str]:
    for one in report.followers:
        wrong = "" if one.is_exact else f"  [red]missed {one.missed}, read twice {one.repeated}[/]"
        yield f"Change feed: {one.name} read {one.read:,} changes once each, and was killed {one.kills} times{wrong}"
    told = report.subscriber
    wrong = "" if told.is_exact else f"  [red]{told.missing} records without one, {told.forged} forged[/]"
    yield (
        f"Notifications: {told.accepted:,} accepted, {told.refused:,} refused and {told.unanswered:,} not answered "
        f"by the subscriber, and sent again{wrong}"
    )


def _about_end(report: reporting.Report) -> Iterator[str]:
    if report.settled_after is None:
        yield "[red]Some events or backfills did not finish[/]"
    else:
        yield f"All events and backfills finished {report.settled_after:.0f} s after the last fault"


def _show_totals(console: Console, totals: comparing.Totals) -> None:
    table = Table(title="Totals", title_justify="left")
    for name in ("acked", *comparing.OUTCOMES, "pending", "lost", "doubled"):
        table.add_column(name, justify="right", no_wrap=True)
    counts = [totals.accepted, *totals.outcomes.values(), len(totals.pending), totals.lost, totals.doubled]
    table.add_row(*(f"{count:,}" for count in counts))
    console.print(table)
    parts = [f"{count} {outcome}" for outcome, count in totals.outcomes.items()] + [f"{len(totals.pending)} pending"]
    is_exact = "[green]exactly[/]" if totals.is_exact else "[red]WRONG, the sides differ[/]"
    console.print(f"{totals.accepted} accepted = {' + '.join(parts)}: {is_exact}", highlight=False, soft_wrap=True)
    console.print(
        f"Events and provider contained {totals.expected} records and samples. In the views {len(totals.missing)} are "
        f"missing, {len(totals.outdated)} not in the newest version, {len(totals.surplus)} doubled or unexplained",
        highlight=False,
        soft_wrap=True,
    )
