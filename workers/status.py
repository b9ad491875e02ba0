"""`headrace status`: what waits, what became of what came, and what needs a hand."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from sqlalchemy import Engine, text

from workers.broker import Lane
from workers.store.engine import transaction

OUTCOMES = text("""
SELECT outcome, count(*) AS total, count(*) FILTER (WHERE received_at > now() - interval '1 hour') AS last_hour
FROM headrace.deliveries GROUP BY outcome ORDER BY outcome""")
BACKFILLS = text("""
SELECT status, count(*) AS backfills, coalesce(sum(chunks_done), 0)::bigint AS chunks_done,
       coalesce(sum(chunks_total), 0)::bigint AS chunks_total, coalesce(sum(records), 0)::bigint AS records
FROM health.backfills GROUP BY status ORDER BY status""")
BROKEN = text("SELECT user_id, provider, since, error FROM health.connections WHERE status = 'error' ORDER BY since")
DEAD = text("SELECT reason, count(*) AS letters FROM headrace.dead_letters GROUP BY reason ORDER BY letters DESC")


@dataclass(frozen=True)
class Status:
    """A moment's picture, in plain values."""

    lanes: list[Lane]
    deliveries: list[dict[str, Any]]
    backfills: list[dict[str, Any]]
    connections_in_error: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]

    def plain(self) -> dict[str, Any]:
        """As JSON would have it: ages in seconds, times as text."""
        return {
            "lanes": [{**asdict(lane), "oldest": _seconds(lane.oldest)} for lane in self.lanes],
            "deliveries": self.deliveries,
            "backfills": self.backfills,
            "connections_in_error": [{**row, "since": row["since"].isoformat()} for row in self.connections_in_error],
            "dead_letters": self.dead_letters,
        }


def read(engine: Engine, lanes: list[Lane]) -> Status:
    """Reads the picture from the database. Raises TryLater."""
    with transaction(engine) as connection:
        parts = [
            [dict(row) for row in connection.execute(query).mappings()] for query in (OUTCOMES, BACKFILLS, BROKEN, DEAD)
        ]
    return Status(lanes, *parts)


def show(status: Status, console: Console) -> None:
    """Prints the picture as tables; what is empty is left out."""
    console.print(picture(status))


def picture(status: Status) -> Group:
    """The picture as something rich can print, or keep fresh on a terminal."""
    waiting = [
        {"lane": lane.name, "messages waiting": lane.messages, "oldest": _words(lane.oldest)} for lane in status.lanes
    ]
    parts = [("Lanes", waiting), ("Deliveries", status.deliveries), ("Backfills", status.backfills)]
    parts += [("Connections in error", status.connections_in_error), ("Dead letters", status.dead_letters)]
    return Group(*(_table(title, rows) for title, rows in parts if rows))


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
