"""`headrace status`: what waits, what became of what came, and what needs a hand."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, Engine, text

from workers import health
from workers.broker import Lane
from workers.health import Delay, Status
from workers.store.chores import SWEPT
from workers.store.engine import transaction
from workers.store.history import OPEN, Backfill, Filter, listed
from workers.throttle import Hush

MOST_SHOWN = 10  # of the backfills under way; `headrace backfill list` has the rest
BAR_WIDTH = 20
BELOW_COUNTS = 3  # lanes, deliveries and counts of backfills go first

EDGE_SECONDS = 600.0  # so long, what is older than an hour is not counted again: it may be hundreds of millions
BEFORE = text("SELECT outcome, count(*) AS total FROM headrace.deliveries WHERE received_at < :edge GROUP BY outcome")
SINCE = text("""
SELECT outcome, count(*) AS total, count(*) FILTER (WHERE received_at > now() - interval '1 hour') AS last_hour
FROM headrace.deliveries WHERE received_at >= :edge GROUP BY outcome""")
DELAY = text("""
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM applied_at - received_at))
FROM headrace.deliveries WHERE received_at > now() - interval '5 minutes'""")
UNTAKEN = text("""
SELECT aggregator, now() - max(received_at) AS since FROM headrace.deliveries
WHERE received_at > now() - interval '2 days' AND aggregator <> 'unknown' GROUP BY aggregator""")
SWEEP = text("SELECT now() - done_at FROM headrace.chores WHERE name = :name")
SUSPECTS = text("SELECT count(*) FROM headrace.suspects WHERE since < now() - interval '1 minute'")
# Due for long, and nobody is at any: a key is missing, or workers. Of a long queue, somebody always is at one.
IDLE = text("""
SELECT count(*) FROM headrace.backfills WHERE status IN ('pending', 'running') AND due_at < now() - interval '5 minutes'
AND NOT EXISTS (SELECT 1 FROM headrace.backfills WHERE status IN ('pending', 'running') AND lease_until > now())""")
BACKFILLS = text("""
SELECT status, count(*) AS backfills, count(*) FILTER (WHERE finished_at > now() - interval '1 day') AS last_day,
       coalesce(sum(chunks_done), 0)::bigint AS chunks_done,
       coalesce(sum(chunks_total), 0)::bigint AS chunks_total, coalesce(sum(records), 0)::bigint AS records
FROM health.backfills GROUP BY status ORDER BY status""")
GAPS = text("""
SELECT whose, count(*) AS gaps, count(DISTINCT user_id) AS people, min(since)::text AS since FROM headrace.gaps
GROUP BY whose ORDER BY whose""")
BROKEN = text("SELECT user_id, provider, since, error FROM health.connections WHERE status = 'error' ORDER BY since")
DEAD = text("""
SELECT reason, count(*) AS letters, count(*) FILTER (WHERE died_at > now() - interval '1 hour') AS last_hour
FROM headrace.dead_letters GROUP BY reason ORDER BY letters DESC""")


class Ledger:
    """Counts the deliveries; what is older than an hour once in a while, the rest at every look."""

    def __init__(self) -> None:
        self._edge = datetime.min.replace(tzinfo=UTC)
        self._due = 0.0
        self._before: dict[str, int] = {}

    def read(self, connection: Connection) -> list[dict[str, Any]]:
        """A row for each outcome."""
        if time.monotonic() >= self._due:
            self._edge = datetime.now(UTC) - timedelta(hours=1)
            self._before = {row.outcome: row.total for row in connection.execute(BEFORE, {"edge": self._edge})}
            self._due = time.monotonic() + EDGE_SECONDS
        since = {row.outcome: row for row in connection.execute(SINCE, {"edge": self._edge})}
        return [
            {
                "outcome": name,
                "total": self._before.get(name, 0) + (since[name].total if name in since else 0),
                "last_hour": since[name].last_hour if name in since else 0,
            }
            for name in sorted(self._before.keys() | since.keys())
        ]


def read(engine: Engine, lanes: list[Lane], hushes: list[Hush], ledger: Ledger | None = None) -> Status:
    """Reads the picture from the database. Raises TryLater."""
    with transaction(engine) as connection:
        deliveries = (ledger or Ledger()).read(connection)
        backfills, gaps, broken, dead = (
            [dict(row) for row in connection.execute(query).mappings()] for query in (BACKFILLS, GAPS, BROKEN, DEAD)
        )
        took = connection.scalar(DELAY)
        delay = Delay(*(round(seconds, 3) for seconds in took)) if took else None
        swept = connection.scalar(SWEEP, {"name": SWEPT})
        suspects = connection.scalar(SUSPECTS) or 0
        idle = connection.scalar(IDLE) or 0
    silences = [
        {"account": one.account, "because_of": one.reason, "seconds_left": round(one.seconds)} for one in hushes
    ]
    under_way = listed(engine, Filter(states=OPEN), MOST_SHOWN)
    return Status(lanes, deliveries, backfills, under_way, silences, gaps, broken, dead, delay, swept, suspects, idle)


def untaken(engine: Engine) -> dict[str, timedelta]:
    """How long ago the last event of each aggregator was taken. Reads two days of the ledger. Raises TryLater."""
    with transaction(engine) as connection:
        return {row.aggregator: row.since for row in connection.execute(UNTAKEN)}


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
        about = (str(one.id), one.user_id, one.provider or "any", f"{one.resource} {one.item}".rstrip(), one.asked_by)
        share = (bar, f"{one.share:.0%}", f"{one.records:,}", rate, in_words(one.left))
        table.add_row(*about, one.status, *share, one.error or "")
    return table


def in_words(duration: timedelta | None) -> str:
    """A duration to the two units that matter: 3 d 4 h, 12 min 5 s."""
    if duration is None:
        return "-"
    seconds, parts = int(duration.total_seconds()), list[str]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def picture(status: Status) -> Group:
    """The picture as something rich can print, or keep fresh on a terminal."""
    waiting = [
        {"lane": lane.name, "messages waiting": lane.messages, "oldest": _words(lane.oldest)} for lane in status.lanes
    ]
    backfills = [{name: value for name, value in row.items() if name != "last_day"} for row in status.backfills]
    parts = [("Lanes", waiting), ("Deliveries", status.deliveries), ("Backfills", backfills)]
    parts += [("Paused accounts", status.silences), ("Gaps, by whose turn it is", status.gaps)]
    parts += [("Connections in error", status.connections_in_error), ("Dead letters", status.dead_letters)]
    tables: list[RenderableType] = [_table(title, rows) for title, rows in parts if rows]
    if status.open_backfills:
        tables.insert(BELOW_COUNTS, progress(status.open_backfills, "Backfills under way"))
    return Group(word(status), *faults(status), *tables)


def word(status: Status, before: Status | None = None) -> Text:
    """The answer to the first question."""
    is_well = next(health.faults(status, before), None) is None
    return Text("healthy", style="bold green") if is_well else Text("not healthy", style="bold red")


def faults(status: Status, before: Status | None = None) -> list[RenderableType]:
    """What is wrong and what to type, a line each; and in an outage how long senders still wait."""
    lines: list[RenderableType] = [
        Text(f"  {one.what}").append(f"  -> {one.do}", style="bold") for one in health.faults(status, before)
    ]
    for name, left in health.patience_left(status).items():
        how_long = f"in {in_words(left)} or later" if left > timedelta() else "now: headrace reconcile once it is over"
        lines.append(Text(f"  {name} gives up on what it cannot deliver {how_long}", style="red"))
    return lines


def short(duration: timedelta) -> str:
    """A duration for a column: 12 ms, 3.4 s, 2 min 5 s."""
    seconds = duration.total_seconds()
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else in_words(duration)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def _words(age: timedelta | None) -> str:
    return "-" if age is None else f"{age.total_seconds():.1f} s"
