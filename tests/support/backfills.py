"""Functions that announce, run and inspect backfills."""

from typing import Any

import redis
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import pack
from tests.support import delivery, event, message_id, rows
from tests.support.provider import DAY, FIRST, Provider
from workers.backfill.fetcher import Fetcher
from workers.fetch.rate_limits import PREFIX
from workers.ingest.apply import Applier
from workers.store import backfill_admin
from workers.store.backfill_admin import BackfillPlan, HistoryWanted
from workers.store.backfills import due
from workers.store.engine import transaction

STATES = ("pending", "running", "paused", "complete", "failed", "cancelled")


def notice(
    user: str = "u1",
    resource: str = "heartrate",
    days: tuple[float, float] = (0, 10),
    *,
    final: bool = True,
    name: str | None = None,
) -> Any:
    """A delivery that announces the history between two days after FIRST."""
    start, end = (FIRST + number * DAY for number in days)
    data = {"start_date": start.isoformat(), "end_date": end.isoformat(), "is_final": final, "provider": "garmin"}
    return delivery(event(f"historical.data.{resource}.created", user, data), name=name or message_id(FIRST))


def announce(engine: Engine, settings: Settings, *notices: Any) -> list[int]:
    """Applies notices as a worker does. Returns the ids of the backfills to run."""
    return Applier(engine, settings).apply(pack(notices or (notice(),))).backfills


def make_due(engine: Engine, *, leases: bool = False) -> None:
    """Makes all backfills due; with `leases`, also ends the leases of killed workers."""
    past = "now() - interval '1 second'"
    with engine.begin() as connection:
        connection.execute(
            text(f"UPDATE headrace.backfills SET due_at = {past} WHERE status IN ('pending', 'running')")
        )
        if leases:
            connection.execute(text(f"UPDATE headrace.backfills SET lease_until = {past}"))


def settle(engine: Engine, fetcher: Fetcher, rounds: int = 60) -> None:
    """Runs the due backfills until none is due, at most `rounds` times."""
    for _ in range(rounds):
        make_due(engine)
        if not (found := due(engine)):
            return
        for backfill_id in found:
            fetcher.run(backfill_id)


def fetch_history(engine: Engine, settings: Settings, provider: Provider, *notices: Any, rounds: int = 60) -> None:
    """Applies notices and runs their backfills with one new worker."""
    announce(engine, settings, *notices)
    settle(engine, provider.fetcher(engine, settings), rounds)


def status(engine: Engine, user: str = "u1") -> list[tuple[str, int, int]]:
    """The backfills of a user, the oldest first: status, finished chunks, all chunks."""
    query = """
        SELECT b.status, count(c.id) FILTER (WHERE c.status = 'done') AS done, count(c.id) AS total
        FROM headrace.backfills b LEFT JOIN headrace.chunks c ON c.backfill_id = b.id
        WHERE user_id = :user GROUP BY b.id ORDER BY b.id"""
    return [(row["status"], row["done"], row["total"]) for row in rows(engine, query, user=user)]


def backfill(engine: Engine) -> dict[str, Any]:
    """The row of the only backfill."""
    (row,) = rows(engine, "SELECT id, status, records, error, attempts, finished_at FROM headrace.backfills")
    return row


def forget_pauses(settings: Settings) -> None:
    """Ends the pauses of the Junction account."""
    with redis.Redis.from_url(settings.need_broker()) as client:
        for name in client.scan_iter(PREFIX + "junction*"):
            client.delete(name)


def change(engine: Engine, number: int, assignments: str) -> None:
    """Updates a backfill; `assignments` is the SET clause."""
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE headrace.backfills SET {assignments} WHERE id = :id"), {"id": number})


def put(engine: Engine, number: int, state: str, *, started: bool = True) -> None:
    """Sets the state of a backfill."""
    times = f"started_at = {'now()' if started else 'NULL'}"
    times += f", finished_at = {'now()' if state in STATES[3:] else 'NULL'}"
    change(engine, number, f"status = '{state}', {times}")


def planned(engine: Engine, settings: Settings, **wanted: Any) -> list[BackfillPlan]:
    """The backfills that `headrace backfill start` would create."""
    given: dict[str, Any] = {"user_id": "u1", "since": FIRST, "until": FIRST + 54 * DAY} | wanted
    with transaction(engine) as connection:
        return backfill_admin.plan(connection, settings, HistoryWanted(**given))
