"""Named consumers of the change feed: their positions, and the changes behind them."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Engine, text

from app.errors import NotFound, PositionDropped, Unprocessable
from workers.store.engine import execute, transaction, wait_for_notification
from workers.store.feed import CHANNEL

POLL_SECONDS = 5.0  # while no notification arrives
To = Literal["start", "now"] | int
STATE = text("SELECT dropped, newest FROM headrace.feed")
CREATE = text("""
INSERT INTO headrace.consumers (name, position) SELECT :name, dropped FROM headrace.feed ON CONFLICT DO NOTHING""")
POSITION = text("SELECT position FROM headrace.consumers WHERE name = :name")
READ = text("""
SELECT position, changed_at, op, user_id, client_user_id, resource, provider, source_type, id, ts_min, ts_max, rows,
       origin
FROM health.changes WHERE position > :position ORDER BY position LIMIT :limit""")
ACK = text("""
UPDATE headrace.consumers SET position = :position, moved_at = now() WHERE name = :name AND position <= :position""")
RESET = text("""
INSERT INTO headrace.consumers AS stored (name, position) VALUES (:name, :position)
ON CONFLICT (name) DO UPDATE SET position = excluded.position, moved_at = now()""")
REMOVE = text("DELETE FROM headrace.consumers WHERE name = :name RETURNING 1")
# `since` is the time of the first change that the consumer has not read. Without one, it has read everything.
LIST = text("""
SELECT name, c.position, feed.newest - c.position AS changes, next.changed_at AS since, c.moved_at,
       c.position < feed.dropped AS is_dropped
FROM headrace.feed, headrace.consumers c LEFT JOIN LATERAL (
    SELECT changed_at FROM headrace.changes WHERE position > c.position ORDER BY position LIMIT 1) AS next ON true
ORDER BY name""")
# Counting stops at this number.
MAX_UNNUMBERED = 100_000
UNNUMBERED = text(f"SELECT count(*) FROM (SELECT FROM headrace.outbox LIMIT {MAX_UNNUMBERED}) AS outbox")


@dataclass(frozen=True)
class Consumer:
    """A consumer and its lag."""

    name: str
    position: int
    changes: int  # behind the newest position
    since: datetime | None  # when the oldest unread change became readable
    moved_at: datetime
    is_dropped: bool  # retention has dropped changes that it has not read

    def expires_in(self, feed_days: int, now: datetime) -> timedelta | None:
        """The time until retention drops an unread change; None if all are read."""
        if self.is_dropped:
            return timedelta()
        return None if self.since is None else self.since + timedelta(days=feed_days) - now


def consumers(connection: Connection) -> list[Consumer]:
    return [Consumer(**row) for row in connection.execute(LIST).mappings()]


def read(engine: Engine, name: str, limit: int) -> Sequence[dict[str, Any]]:
    """The next changes of a consumer, which starts at the oldest one. Raises PositionDropped.

    Reading does not move the position: `acknowledge` does.
    """
    with transaction(engine) as connection:
        connection.execute(CREATE, {"name": name})
        position = _position(connection, name)
        return _page(connection, name, position, limit)


def read_after(engine: Engine, name: str, position: int, limit: int) -> Sequence[dict[str, Any]]:
    """The changes after any position, instead of the consumer's own. Raises PositionDropped."""
    with transaction(engine) as connection:
        return _page(connection, name, position, limit)


def follow(engine: Engine, name: str, position: int, limit: int) -> Generator[Sequence[dict[str, Any]], None, None]:
    """Pages of the changes after a position, without end. Waits for notifications of the sequencer.

    Raises PositionDropped, and TryLater if the connection breaks.
    """
    listening = engine.execution_options(isolation_level="AUTOCOMMIT")
    with transaction(listening) as connection:
        connection.execute(text(f"LISTEN {CHANNEL}"))
        while True:
            if page := read_after(engine, name, position, limit):
                position = page[-1]["position"]
                yield page
            else:
                wait_for_notification(connection, POLL_SECONDS)


def acknowledge(engine: Engine, name: str, position: int) -> None:
    """Moves a consumer forward. Raises NotFound, and Unprocessable if `position` is behind it or does not exist yet."""
    with transaction(engine) as connection:
        current = _position(connection, name)
        newest = connection.execute(STATE).one().newest
        if position > newest:
            raise _not_yet(position, newest)
        if not connection.execute(ACK, {"name": name, "position": position}).rowcount:
            hint = f"`headrace feed reset --consumer {name} --to {position}` moves it back"
            raise Unprocessable(f"consumer {name} is at position {current} already, behind {position}; {hint}")


def reset(engine: Engine, name: str, to: To) -> int:
    """Sets the position of a consumer, which may be new. Returns it. Raises Unprocessable, and PositionDropped."""
    with transaction(engine) as connection:
        state = connection.execute(STATE).one()
        position = int({"start": state.dropped, "now": state.newest}.get(str(to), to))
        if position > state.newest:
            raise _not_yet(position, state.newest)
        if position < state.dropped:
            raise _dropped(name, position, state.dropped)
        connection.execute(RESET, {"name": name, "position": position})
    return position


def remove(engine: Engine, name: str) -> None:
    """Raises NotFound."""
    if not execute(engine, REMOVE, {"name": name}):
        raise _unknown(name)


def _position(connection: Connection, name: str) -> int:
    position = connection.scalar(POSITION, {"name": name})
    if position is None:
        raise _unknown(name)
    return int(position)


def _not_yet(position: int, newest: int) -> Unprocessable:
    return Unprocessable(f"position {position} does not exist yet: the newest one is {newest}")


def _unknown(name: str) -> NotFound:
    return NotFound(f"unknown consumer {name}; `headrace feed list` shows all, `headrace feed read` creates one")


def _page(connection: Connection, name: str, position: int, limit: int) -> list[dict[str, Any]]:
    found = [dict(row) for row in connection.execute(READ, {"position": position, "limit": limit}).mappings().all()]
    # Retention moves `dropped` before it drops, so this finds every gap that the page may have.
    if position < (dropped := connection.execute(STATE).one().dropped):
        raise _dropped(name, position, dropped)
    return found


def _dropped(name: str, position: int, dropped: int) -> PositionDropped:
    return PositionDropped(
        f"the changes from {position + 1} to {dropped} are dropped (HEADRACE_FEED_DAYS) and consumer {name} has not "
        f"read them. Run `headrace feed reset --consumer {name} --to now`, and then read the tables again"
    )
