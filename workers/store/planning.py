"""Queries of the planner: changes of the feed that subscriptions have not seen, and new or extended notifications.

A subscription has a position of its own in the feed. So a paused subscription does not need rows, and reads the changes
of the pause when it is resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, text

from workers.store.subscriptions import BEHIND


class FeedChange(NamedTuple):
    """A row of headrace.changes, as the planner reads it."""

    position: int
    changed_at: datetime
    op: str
    user_id: str
    client_user_id: str | None
    resource: str | None
    provider: str | None
    record_id: str | None
    ts_min: datetime | None
    ts_max: datetime | None
    row_count: int


class Planned(NamedTuple):
    """The subscription's part of a plan: its id, globs, window, and position in the feed."""

    id: int
    events: Sequence[str]
    window_seconds: int
    position: int


@dataclass
class NotificationContent:
    """The changes of which a subscriber is notified. Empty texts stand for null."""

    id: str
    type: str
    user_id: str
    client_user_id: str | None
    resource: str
    provider: str
    ids: list[str]
    ts_min: datetime | None
    ts_max: datetime | None
    row_count: int
    last_position: int
    changed_at: datetime
    due_at: datetime


@dataclass
class NewNotification(NotificationContent):
    """A notification to insert, or to add to one that no attempt has fixed yet."""

    subscription_id: int
    first_position: int


MAX_IDS = 1000  # in one notification; more rows are counted
IS_BEHIND = text(f"SELECT EXISTS ({BEHIND})")
PLANNED = ", ".join(Planned._fields)
# In the order of the ids. A row that a sender locks at this moment is planned in the next pass.
ACTIVE = text(f"""
SELECT {PLANNED} FROM headrace.subscriptions WHERE status = 'active' ORDER BY id FOR NO KEY UPDATE SKIP LOCKED""")
ONE = text(f"SELECT {PLANNED} FROM headrace.subscriptions WHERE name = :name FOR NO KEY UPDATE")
FEED = text("SELECT newest, dropped FROM headrace.feed")
PAGE = text(f"""
SELECT {", ".join(FeedChange._fields)} FROM headrace.changes
WHERE position > :after AND position <= :until ORDER BY position LIMIT :limit""")
MOVE = text("UPDATE headrace.subscriptions SET position = :position WHERE id = ANY(:ids)")
MISSED = text("UPDATE headrace.subscriptions SET reason = :reason WHERE id = ANY(:ids)")
POSITION_AT = text("SELECT max(position) FROM headrace.changes WHERE changed_at < :since")
BEGIN_AT = text("UPDATE headrace.subscriptions SET start_position = :position WHERE id = :id")
NEW_COLUMNS = ", ".join(field.name for field in fields(NewNotification))
# A planner and a sender lock the subscription first, so that no other transaction adds, extends or fixes its open
# notifications meanwhile. `provider` is empty once changes of several have joined.
SAVE = text(f"""
WITH new AS MATERIALIZED (
    SELECT {NEW_COLUMNS}, due_at + make_interval(days => :days) AS expires_at
    FROM jsonb_populate_recordset(CAST(NULL AS headrace.notifications), CAST(:rows AS jsonb))),
joined AS MATERIALIZED (
    SELECT DISTINCT ON (new.id) new.*, open.id AS open_id FROM new
    JOIN headrace.notifications open USING (subscription_id, user_id, type, resource)
    WHERE open.status = 'pending' AND open.attempts = 0 ORDER BY new.id, open.provider),
extended AS (
    UPDATE headrace.notifications open SET
        ids = (open.ids || ARRAY(SELECT unnest(joined.ids) EXCEPT SELECT unnest(open.ids)))[1 : {MAX_IDS}],
        ts_min = least(open.ts_min, joined.ts_min), ts_max = greatest(open.ts_max, joined.ts_max),
        row_count = open.row_count + joined.row_count,
        provider = CASE WHEN open.provider = joined.provider THEN open.provider ELSE '' END,
        client_user_id = coalesce(joined.client_user_id, open.client_user_id),
        first_position = least(open.first_position, joined.first_position),
        last_position = greatest(open.last_position, joined.last_position),
        changed_at = greatest(open.changed_at, joined.changed_at), due_at = least(open.due_at, joined.due_at),
        expires_at = greatest(open.expires_at, joined.expires_at)
    FROM joined WHERE open.id = joined.open_id)
INSERT INTO headrace.notifications ({NEW_COLUMNS}, expires_at)
SELECT {NEW_COLUMNS}, expires_at FROM new WHERE id NOT IN (SELECT id FROM joined)""")
FIRST_BEHIND = text("SELECT min(position) FROM headrace.changes WHERE position > :after")


def is_behind(connection: Connection) -> bool:
    """Whether the feed has changes that an active subscription has not seen."""
    return bool(connection.scalar(IS_BEHIND))


def lock_active(connection: Connection) -> list[Planned]:
    return [Planned(**row) for row in connection.execute(ACTIVE).mappings()]


def lock_one(connection: Connection, name: str) -> Planned:
    return Planned(**connection.execute(ONE, {"name": name}).mappings().one())


def feed_range(connection: Connection) -> tuple[int, int]:
    """The newest position, and the greatest one that retention has dropped."""
    row = connection.execute(FEED).first()
    return (row.newest, row.dropped) if row else (0, 0)


def page(connection: Connection, after: int, until: int, limit: int) -> list[FeedChange]:
    """Changes behind `after` up to `until`, in order."""
    rows = connection.execute(PAGE, {"after": after, "until": until, "limit": limit})
    return [FeedChange(**row) for row in rows.mappings()]


def save(connection: Connection, new: Sequence[NewNotification], retry_days: int) -> None:
    """Inserts notifications, or adds them to pending ones of the same kind that have had no attempt."""
    if new:
        connection.execute(SAVE, {"rows": msgspec.json.encode(new).decode(), "days": retry_days})


def move(connection: Connection, ids: Sequence[int], position: int) -> None:
    connection.execute(MOVE, {"ids": list(ids), "position": position})


def note_missed(connection: Connection, ids: Sequence[int], reason: str) -> None:
    """Shows, until the subscriptions are resumed, that changes were not planned."""
    connection.execute(MISSED, {"ids": list(ids), "reason": reason})


def first_behind(connection: Connection, after: int) -> int | None:
    """The position of the first change behind `after`."""
    position: int | None = connection.scalar(FIRST_BEHIND, {"after": after})
    return position


def position_at(connection: Connection, since: datetime) -> int:
    """The last position before a moment; 0 if the feed begins later."""
    return connection.scalar(POSITION_AT, {"since": since}) or 0


def begin_at(connection: Connection, subscription_id: int, position: int) -> None:
    connection.execute(BEGIN_AT, {"id": subscription_id, "position": position})
