"""`headrace status`: what waits, what became of what came, and what needs a hand."""

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
from workers.operate.durations import format_duration
from workers.operate.health import Delay, Status
from workers.store.backfill_admin import OPEN, Backfill, Filter, listed
from workers.store.engine import transaction
from workers.store.jobs import SWEPT
from workers.store.status import BACKFILLS, BROKEN, CRASHED, DEAD, DELAY, GAPS, IDLE, SWEEP, OutcomeCounter

MAX_SHOWN = 10  # of the backfills under way; `headrace backfill list` has the rest
BAR_WIDTH = 20
BELOW_COUNTS = 3  # lanes, deliveries and counts of backfills go first


def progress(found: Sequence[Backfill], title: str | None = None) -> RenderableType:
    """Backfills as a table with bars."""
    if not found:
        return "no backfills"
    columns = ("id", "user", "provider", "resource", "asked by", "status", "progress", "", "records", "per s", "left")
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (*columns, "error"):
        table.add_column(name, justify="right" if name in ("id", "records", "per s") else "left")
    for one in found:
        bar = ProgressBar(total=1, completed=one.share, width=BAR_WIDTH)
        rate = "" if one.rate is None else f"{one.rate:,.0f}"
        about = (
            str(one.id),
            one.user_id,
            one.provider or "any",
            f"{one.resource} {one.item}".rstrip(),
            one.requested_by,
        )
        share = (bar, f"{one.share:.0%}", f"{one.records:,}", rate, format_duration(one.left))
        table.add_row(*about, one.status, *share, one.error or "")
    return table


def render(status: Status) -> Group:
    """The picture as something rich can print, or keep fresh on a terminal."""
    waiting = [
        {"lane": lane.name, "messages waiting": lane.messages, "oldest": _words(lane.oldest)} for lane in status.lanes
    ]
    backfills = [{name: value for name, value in row.items() if name != "last_day"} for row in status.backfills]
    paused = [{name: value for name, value in row.items() if name != "kind"} for row in status.pauses]
    parts = [("Lanes", waiting), ("Deliveries", status.deliveries), ("Backfills", backfills)]
    parts += [("Paused accounts", paused), ("Gaps, by whose turn it is", status.gaps)]
    parts += [("Connections in error", status.connections_in_error), ("Dead letters", status.dead_letters)]
    tables: list[RenderableType] = [_table(title, rows) for title, rows in parts if rows]
    if status.open_backfills:
        tables.insert(BELOW_COUNTS, progress(status.open_backfills, "Backfills under way"))
    return Group(verdict(status), *problems(status), *tables)


def verdict(status: Status, before: Status | None = None) -> Text:
    """The answer to the first question."""
    is_well = next(health.problems(status, before), None) is None
    return Text("healthy", style="bold green") if is_well else Text("not healthy", style="bold red")


def problems(status: Status, before: Status | None = None) -> list[RenderableType]:
    """What is wrong and what to type, a line each; and in an outage how long senders still wait."""
    lines: list[RenderableType] = [
        Text(f"  {one.what}").append(f"  -> {one.do}", style="bold") for one in health.problems(status, before)
    ]
    for name, left in health.retry_window_left(status).items():
        how_long = (
            f"in {format_duration(left)} or later" if left > timedelta() else "now: headrace reconcile once it is over"
        )
        lines.append(Text(f"  {name} gives up on what it cannot deliver {how_long}", style="red"))
    return lines


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def _words(age: timedelta | None) -> str:
    return "-" if age is None else f"{age.total_seconds():.1f} s"


def read(engine: Engine, lanes: list[Lane], pauses: list[Pause], ledger: OutcomeCounter | None = None) -> Status:
    """Reads the picture from the database. Raises TryLater."""
    with transaction(engine) as connection:
        deliveries = (ledger or OutcomeCounter()).read(connection)
        backfills, gaps, broken, dead = (
            [dict(row) for row in connection.execute(query).mappings()] for query in (BACKFILLS, GAPS, BROKEN, DEAD)
        )
        took = connection.scalar(DELAY)
        delay = Delay(*(round(seconds, 3) for seconds in took)) if took else None
        swept = connection.scalar(SWEEP, {"name": SWEPT})
        crashed_deliveries = connection.scalar(CRASHED) or 0
        idle = connection.scalar(IDLE) or 0
    paused = [
        {"account": one.account, "because_of": one.reason, "seconds_left": round(one.seconds), "kind": one.kind}
        for one in pauses
    ]
    under_way = listed(engine, Filter(states=OPEN), MAX_SHOWN)
    return Status(
        lanes, deliveries, backfills, under_way, paused, gaps, broken, dead, delay, swept, crashed_deliveries, idle
    )
