"""`headrace status`: queue depths, delivery outcomes, backfill progress, and problems."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from workers.broker_admin import Lane
from workers.fetch.rate_limits import Pause
from workers.operate import health
from workers.operate.durations import format_duration, format_short
from workers.operate.health import Delay, Status
from workers.store.backfill_admin import OPEN, Backfill, Filter, listed
from workers.store.engine import transaction
from workers.store.jobs import SWEPT
from workers.store.status import BACKFILLS, BROKEN, CRASHED, DEAD, DELAY, GAPS, IDLE, SWEEP, OutcomeCounter

MAX_SHOWN = 10  # backfills in progress; `headrace backfill list` shows all
BAR_WIDTH = 20
BELOW_COUNTS = 3  # the table of open backfills follows those of lanes, deliveries and backfill counts


def progress(found: Sequence[Backfill], title: str | None = None) -> RenderableType:
    """Backfills as a table with progress bars."""
    if not found:
        return "no backfills"
    cells: list[dict[str, RenderableType]] = [
        {
            "id": str(one.id),
            "user": one.user_id,
            "provider": one.provider or "any",
            "resource": f"{one.resource} {one.item}".rstrip(),
            "requested by": one.requested_by,
            "status": one.status,
            "progress": ProgressBar(total=1, completed=one.share, width=BAR_WIDTH),
            "": f"{one.share:.0%}",
            "records": f"{one.records:,}",
            "per s": "" if one.rate is None else f"{one.rate:,.0f}",
            "left": format_duration(one.left),
            "error": one.error or "",
        }
        for one in found
    ]
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in cells[0]:
        table.add_column(name, justify="right" if name in ("id", "records", "per s") else "left")
    for row in cells:
        table.add_row(*row.values())
    return table


def render(status: Status) -> Group:
    lanes = [
        {"lane": one.name, "messages queued": one.messages, "oldest": format_short(one.oldest) if one.oldest else "-"}
        for one in status.lanes
    ]
    backfills = [{name: value for name, value in row.items() if name != "last_day"} for row in status.backfills]
    paused = [{name: value for name, value in row.items() if name != "kind"} for row in status.pauses]
    parts = [("Lanes", lanes), ("Deliveries", status.deliveries), ("Backfills", backfills)]
    parts += [("Paused accounts", paused), ("Gaps, by responsible party", status.gaps)]
    parts += [("Connections in error", status.connections_in_error), ("Dead letters", status.dead_letters)]
    tables: list[RenderableType] = [_table(title, rows) for title, rows in parts if rows]
    if status.open_backfills:
        tables.insert(BELOW_COUNTS, progress(status.open_backfills, "Backfills in progress"))
    return Group(verdict(status), *problems(status), *tables)


def verdict(status: Status, before: Status | None = None) -> Text:
    is_well = next(health.problems(status, before), None) is None
    return Text("healthy", style="bold green") if is_well else Text("not healthy", style="bold red")


def problems(status: Status, before: Status | None = None) -> list[RenderableType]:
    """A line per problem with the command that helps; in an outage, also how long senders keep retrying."""
    lines: list[RenderableType] = [
        Text(f"  {one.what}").append(f"  -> {one.do}", style="bold") for one in health.problems(status, before)
    ]
    for name, left in health.retry_window_left(status).items():
        if left > timedelta():
            line = f"  {name} keeps retrying its oldest event for at least {format_duration(left)}"
        else:
            line = f"  {name} may have stopped retrying events: run headrace reconcile after the outage"
        lines.append(Text(line, style="red"))
    return lines


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def read(engine: Engine, lanes: list[Lane], pauses: list[Pause], ledger: OutcomeCounter | None = None) -> Status:
    """Reads a snapshot from the database. Raises TryLater."""
    with transaction(engine) as connection:
        deliveries = (ledger or OutcomeCounter()).read(connection)
        backfills, gaps, broken, dead = (
            [dict(row) for row in connection.execute(query).mappings()] for query in (BACKFILLS, GAPS, BROKEN, DEAD)
        )
        took = connection.scalar(DELAY)  # median and p99, in seconds
        swept = connection.scalar(SWEEP, {"name": SWEPT})
        crashed_deliveries = connection.scalar(CRASHED) or 0
        idle = connection.scalar(IDLE) or 0
    paused = [
        {"account": one.account, "because_of": one.reason, "seconds_left": round(one.seconds), "kind": one.kind}
        for one in pauses
    ]
    return Status(
        lanes=lanes,
        deliveries=deliveries,
        backfills=backfills,
        open_backfills=listed(engine, Filter(states=OPEN), MAX_SHOWN),
        pauses=paused,
        gaps=gaps,
        connections_in_error=broken,
        dead_letters=dead,
        delay=Delay(median=round(took[0], 3), p99=round(took[1], 3)) if took else None,
        swept=swept,
        crashed_deliveries=crashed_deliveries,
        idle=idle,
    )
