"""`headrace status`: what waits, what became of what came, and what needs a hand."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from sqlalchemy import Engine, text

from workers.broker import Lane
from workers.store.engine import transaction
from workers.store.history import OPEN, Backfill, Filter, listed
from workers.throttle import Hush

MOST_SHOWN = 10  # of the backfills under way; `headrace backfill list` has the rest
BAR_WIDTH = 20
BELOW_COUNTS = 3  # lanes, deliveries and counts of backfills go first

OUTCOMES = text("""
SELECT outcome, count(*) AS total, count(*) FILTER (WHERE received_at > now() - interval '1 hour') AS last_hour
FROM headrace.deliveries GROUP BY outcome ORDER BY outcome""")
BACKFILLS = text("""
SELECT status, count(*) AS backfills, coalesce(sum(chunks_done), 0)::bigint AS chunks_done,
       coalesce(sum(chunks_total), 0)::bigint AS chunks_total, coalesce(sum(records), 0)::bigint AS records
FROM health.backfills GROUP BY status ORDER BY status""")
GAPS = text("""
SELECT whose, count(*) AS gaps, count(DISTINCT user_id) AS people, min(since)::text AS since FROM headrace.gaps
GROUP BY whose ORDER BY whose""")
BROKEN = text("SELECT user_id, provider, since, error FROM health.connections WHERE status = 'error' ORDER BY since")
DEAD = text("SELECT reason, count(*) AS letters FROM headrace.dead_letters GROUP BY reason ORDER BY letters DESC")


@dataclass(frozen=True)
class Status:
    """A moment's picture, in plain values."""

    lanes: list[Lane]
    deliveries: list[dict[str, Any]]
    backfills: list[dict[str, Any]]
    open_backfills: list[Backfill]
    silences: list[dict[str, Any]]
    gaps: list[dict[str, Any]]
    connections_in_error: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]

    def plain(self) -> dict[str, Any]:
        """As JSON would have it: ages in seconds, times as text."""
        return {
            "lanes": [{**asdict(lane), "oldest": _seconds(lane.oldest)} for lane in self.lanes],
            "deliveries": self.deliveries,
            "backfills": self.backfills,
            "open_backfills": [plain(one) for one in self.open_backfills],
            "silences": self.silences,
            "gaps": self.gaps,
            "connections_in_error": [{**row, "since": row["since"].isoformat()} for row in self.connections_in_error],
            "dead_letters": self.dead_letters,
        }


def read(engine: Engine, lanes: list[Lane], hushes: list[Hush]) -> Status:
    """Reads the picture from the database. Raises TryLater."""
    with transaction(engine) as connection:
        deliveries, backfills, gaps, broken, dead = (
            [dict(row) for row in connection.execute(query).mappings()]
            for query in (OUTCOMES, BACKFILLS, GAPS, BROKEN, DEAD)
        )
    silences = [
        {"account": one.account, "because_of": one.reason, "seconds_left": round(one.seconds)} for one in hushes
    ]
    under_way = listed(engine, Filter(states=OPEN), MOST_SHOWN)
    return Status(lanes, deliveries, backfills, under_way, silences, gaps, broken, dead)


def plain(one: Backfill) -> dict[str, Any]:
    """A backfill with what follows from it, as JSON would have it."""
    values = asdict(one) | {"rate": one.rate, "left": _seconds(one.left)}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


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
    parts = [("Lanes", waiting), ("Deliveries", status.deliveries), ("Backfills", status.backfills)]
    parts += [("Paused accounts", status.silences), ("Gaps, by whose turn it is", status.gaps)]
    parts += [("Connections in error", status.connections_in_error), ("Dead letters", status.dead_letters)]
    tables: list[RenderableType] = [_table(title, rows) for title, rows in parts if rows]
    if status.open_backfills:
        tables.insert(BELOW_COUNTS, progress(status.open_backfills, "Backfills under way"))
    return Group(*tables)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def _seconds(age: timedelta | None) -> float | None:
    return None if age is None else round(age.total_seconds(), 1)


def _words(age: timedelta | None) -> str:
    return "-" if age is None else f"{age.total_seconds():.1f} s"
