"""The report of `headrace drill`: as JSON values, and as text with tables."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from workers.verify.drill.plan import FAULT_KINDS
from workers.verify.drill.report import MAX_RESPONSE_SECONDS, Report
from workers.verify.totals import OUTCOMES, Totals, Verdict

MAX_NAMED = 5
VERDICTS: dict[Verdict, str] = {
    "proven": "[green]PASSED: nothing lost, nothing doubled.[/]",
    "unfinished": "[yellow]UNFINISHED: events or backfills were still open when there was no more progress.[/]",
    "different": "[red]FAILED.[/]",
}


def plain(report: Report) -> dict[str, Any]:
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
        "lost_deliveries": totals.nowhere,
        "pending_deliveries": totals.pending,
        "wrongly_dead": totals.wrongly_dead,
        "missing_rows": totals.missing,
        "outdated_rows": totals.outdated,
        "doubled_deliveries": totals.twice,
        "unexplained_rows": totals.surplus,
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


def show(console: Console, report: Report) -> None:
    _show_faults(console, report)
    for line in (*_about_answers(report), *_about_history(report), *_about_feed(report), *_about_end(report)):
        console.print(line, highlight=False, soft_wrap=True)
    _show_totals(console, report.totals)
    for name, found in _evidence(report.totals).items():
        if found:
            named = ", ".join(str(one) for one in found[:MAX_NAMED])
            console.print(f"{name}: {named}{' ...' if len(found) > MAX_NAMED else ''}", highlight=False, soft_wrap=True)
    console.print(VERDICTS[report.verdict], style="bold", soft_wrap=True)


def _show_faults(console: Console, report: Report) -> None:
    table = Table("group", *FAULT_KINDS, title="Injected faults", title_justify="left")
    for group, counts in report.faults_by().items():
        table.add_row(group, *(str(count or "") for count in counts.values()))
    totals = [sum(counts[kind] for counts in report.faults_by().values()) for kind in FAULT_KINDS]
    table.add_row("all", *map(str, totals), style="bold")
    console.print(table)


def _about_answers(report: Report) -> Iterator[str]:
    statuses = report.statuses
    accepted = sum(count for status, count in statuses.items() if 200 <= status < 300)
    others = {status or "no answer": count for status, count in sorted(statuses.items()) if not 200 <= status < 300}
    other_text = ", ".join(f"{count} x {status}" for status, count in others.items()) or "0"
    yield f"Requests to the endpoint: {sum(statuses.values()):,}; answered 202: {accepted:,}; others: {other_text}"
    late = "" if report.max_response <= MAX_RESPONSE_SECONDS else "  [red]TOO LONG[/]"
    yield (
        f"Longest response: {report.max_response:.2f} s (limit {MAX_RESPONSE_SECONDS:.0f} s){late}; "
        f"including the time in which the endpoint was frozen: {report.max_response_with_freezes:.2f} s"
    )
    if report.never_taken:
        yield f"[red]Never accepted: {report.never_taken} events, despite all retries[/]"


def _about_history(report: Report) -> Iterator[str]:
    states = ", ".join(f"{count} {status}" for status, count in sorted(report.backfills.items()))
    yield (
        f"History: {states} backfills, in {report.provider_requests:,} requests, "
        f"{report.provider_refused:,} of them rejected or cut off by the provider"
    )
    excused = f"; {report.excused} more right after a fault, not counted" if report.excused else ""
    yield f"Requests during a pause that the provider had asked for: {report.rate_limit_violations}{excused}"


def _about_feed(report: Report) -> Iterator[str]:
    for one in report.followers:
        wrong = "" if one.is_exact else f"  [red]missed {one.missed}, read twice {one.repeated}[/]"
        yield f"Change feed: {one.name} read {one.read:,} changes once each, and was killed {one.kills} times{wrong}"
    told = report.subscriber
    wrong = "" if told.is_exact else f"  [red]{told.missing} records without one, {told.forged} forged[/]"
    yield (
        f"Notifications: {told.accepted:,} accepted, {told.refused:,} refused and {told.unanswered:,} not answered "
        f"by the subscriber, and sent again{wrong}"
    )


def _about_end(report: Report) -> Iterator[str]:
    if report.settled_after is None:
        yield "[red]Some events or backfills did not finish[/]"
    else:
        yield f"All events and backfills finished {report.settled_after:.0f} s after the last fault"


def _show_totals(console: Console, totals: Totals) -> None:
    table = Table(title="Totals", title_justify="left")
    for name in ("acked", *OUTCOMES, "pending", "lost", "doubled"):
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


def _evidence(totals: Totals) -> dict[str, list[Any]]:
    return {
        "Lost deliveries": totals.nowhere,
        "Pending deliveries": totals.pending,
        "Wrongly dead deliveries": totals.wrongly_dead,
        "Doubled deliveries": totals.twice,
        "Missing rows": totals.missing,
        "Rows not in the newest version": totals.outdated,
        "Unexplained rows": totals.surplus,
    }
