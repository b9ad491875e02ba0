"""`headrace status`: queue depths, delivery outcomes, backfill progress, and problems."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine, TextClause

from workers.aggregators.admin_token import Token
from workers.broker_admin import Lane
from workers.daily import queue
from workers.fetch.rate_limits import Failures, Pause
from workers.operate import health
from workers.operate.backfill_table import progress
from workers.operate.durations import format_duration, format_short
from workers.operate.health import Delay, Problem, Status
from workers.store.backfill_admin import OPEN, Filter, listed
from workers.store.consumers import UNNUMBERED, Consumer, consumers
from workers.store.engine import transaction
from workers.store.jobs import SWEPT, TERRA_TOKEN, errors, noted
from workers.store.notifications import TROUBLED
from workers.store.status import (
    BACKFILLS,
    BROKEN,
    CRASHED,
    DEAD,
    DELAY,
    GAPS,
    IDLE,
    LOST,
    REFUSED_ITEMS,
    SWEEP,
    OutcomeCounter,
)

MAX_SHOWN = 10  # backfills in progress; `headrace backfill list` shows all
BELOW_COUNTS = 3  # the table of open backfills follows those of lanes, deliveries and backfill counts


def render(status: Status) -> Group:
    lanes = [
        {
            "lane": one.name,
            "messages queued": one.messages,
            "oldest": format_short(one.oldest),
            "unacknowledged": "-" if one.unacked is None else one.unacked,
            "longest": format_short(one.unacked_for),
        }
        for one in status.lanes
    ]
    retried = [
        {
            "lane": one.name,
            "messages": one.retrying,
            "since": format_short(one.retrying_for),
            "most retries": one.retries or "-",
            "last error": one.retry_reason or "-",
        }
        for one in status.lanes
        if one.retrying
    ]
    pauses = [row | {"api_key": health.key_note(row)} for row in status.pauses]
    parts = {
        "Lanes": lanes,
        "Deliveries": status.deliveries,
        "Backfills": _columns(status.backfills, "status", "backfills", "chunks_done", "chunks_total", "records"),
        "Retried messages": retried,
        "Paused accounts": _columns(pauses, "account", "because_of", "seconds_left", "api_key"),
        "Gaps, by responsible party": status.gaps,
        "Connections in error": status.connections_in_error,
        "Dead letters": status.dead_letters,
        "Consumers of the change feed": _columns(status.consumers, "consumer", "position", "lag"),
        "Refused items": status.refused_items,
        "Token of Terra's Admin API": _token(status.terra_token),
    }
    tables: list[RenderableType] = [_table(title, rows) for title, rows in parts.items() if rows]
    if status.open_backfills:
        tables.insert(BELOW_COUNTS, progress(status.open_backfills, "Backfills in progress"))
    return Group(verdict(status), *(line for line, _ in problems(status)), *tables)


def _columns(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


def verdict(status: Status, before: Status | None = None) -> Text:
    is_well = next(health.problems(status, before), None) is None
    return Text("healthy", style="bold green") if is_well else Text("not healthy", style="bold red")


@dataclass(frozen=True)
class _ProblemLine:
    """A problem and the command that helps, on one line if they fit. A line break within a command prevents copying."""

    of: Problem

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        what, do = f"  {self.of.what}", f"  -> {self.of.do}"
        is_short = cell_len(what + do) <= options.max_width
        yield Text(what).append(do if is_short else f"\n  {do}", style="bold")


def problems(status: Status, before: Status | None = None) -> list[tuple[RenderableType, Problem | None]]:
    """A line per problem with the command that helps; in an outage, also how long senders keep retrying."""
    lines: list[tuple[RenderableType, Problem | None]] = [
        (_ProblemLine(one), one) for one in health.problems(status, before)
    ]
    at = len(status.away) + bool(status.endpoint and status.endpoint.why_not)  # below the problems that are the outage
    for name, left in reversed(health.retry_window_left(status).items()):
        if left > timedelta():
            line = f"  {name} keeps retrying its oldest event for at least {format_duration(left)}"
        else:
            line = f"  {name} may have stopped retrying events: run headrace reconcile after the outage"
        lines.insert(at, (Text(line, style="red"), None))
    return lines


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def read(
    engine: Engine,
    lanes: list[Lane],
    pauses: Sequence[Pause],
    failures: Sequence[Failures] = (),
    ledger: OutcomeCounter | None = None,
    *,
    feed_days: int = 14,
) -> Status:
    """Reads a snapshot from the database. Raises TryLater."""
    with transaction(engine) as connection:

        def rows(query: TextClause) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(query).mappings()]

        took = connection.scalar(DELAY)  # median and p99, in seconds
        token = noted(connection, TERRA_TOKEN)
        found = Status(
            lanes=lanes,
            deliveries=(ledger or OutcomeCounter()).read(connection),
            backfills=rows(BACKFILLS),
            pauses=[_account(one) for one in pauses],
            gaps=rows(GAPS),
            connections_in_error=rows(BROKEN),
            dead_letters=rows(DEAD),
            refused_items=rows(REFUSED_ITEMS),
            failures=[_account(one) for one in failures],
            delay=Delay(median=round(took[0], 3), p99=round(took[1], 3)) if took else None,
            swept=connection.scalar(SWEEP, {"name": SWEPT}),
            crashed_deliveries=connection.scalar(CRASHED) or 0,
            lost_deliveries=connection.scalar(LOST) or 0,
            idle=connection.scalar(IDLE) or 0,
            failed_jobs=errors(connection),
            consumers=[_consumer(one, feed_days) for one in consumers(connection)],
            unnumbered=connection.scalar(UNNUMBERED) or 0,
            subscriptions=rows(TROUBLED),
            days_behind=queue.behind(connection),
            days_failed=queue.failed(connection),
            terra_token=msgspec.json.decode(token, type=Token) if token else None,
        )
    return replace(found, open_backfills=listed(engine, Filter(states=OPEN), MAX_SHOWN))


def _token(token: Token | None) -> list[dict[str, Any]]:
    times = {"expires": token.expires_at, "approve_by": token.approve_by} if token else {}
    return [{name: f"{at:%Y-%m-%d}" if at else "-" for name, at in times.items()}] if any(times.values()) else []


def _account(one: Pause | Failures) -> dict[str, Any]:
    about: dict[str, Any] = {"account": one.account, "because_of": one.reason}
    if isinstance(one, Pause):
        about |= {"seconds_left": round(one.seconds), "kind": one.kind}
    else:
        about["failures"] = one.count
    return about | {"key": one.key, "is_own_key": one.is_own}


def _consumer(one: Consumer, feed_days: int) -> dict[str, Any]:
    left = one.expires_in(feed_days, datetime.now(UTC))
    about = {"consumer": one.name, "position": one.position, "lag": one.changes, "is_dropped": one.is_dropped}
    return about | {"expires_in": left and round(left.total_seconds())}
