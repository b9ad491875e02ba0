"""The planner: turns changes of the feed into notifications, together with the subscriptions' positions."""

import logging
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine

from app.catalogue import catalogue
from app.errors import Unprocessable
from workers.notify.retries import RETRY_DAYS
from workers.store import audit, notifications, planning
from workers.store.engine import transaction
from workers.store.planning import MAX_IDS, FeedChange, NewNotification, Planned
from workers.store.subscriptions import Subscription
from workers.store.users import erased_users

PAGE_CHANGES = 1000
ERASED = "user.erased"
SPECIAL_TYPES = {"history": "history.completed", "connections": "connection.changed"}
MISSED = "changes up to position {} were dropped from the feed before they were read"
REFUSED = "the change at position {} could not be planned and was left out: {}"
log = logging.getLogger(__name__)


def event_types() -> list[str]:
    return [*SPECIAL_TYPES.values(), ERASED, *(f"{name}.changed" for name in (*catalogue(), "daily"))]


def type_of(change: FeedChange) -> str:
    if change.op == "erase":
        return ERASED
    return SPECIAL_TYPES.get(change.resource or "", f"{change.resource}.changed")


def matches(events: Iterable[str], kind: str) -> bool:
    return any(fnmatchcase(kind, glob) for glob in events)


def coalesce(changes: Iterable[FeedChange], subscriptions: Sequence[Planned]) -> list[NewNotification]:
    """One notification for each subscription, type, user and resource with a change that matches a glob."""
    found: dict[tuple[int, str, str, str], NewNotification] = {}
    for change in changes:
        kind = type_of(change)
        for one in subscriptions:
            if not matches(one.events, kind):
                continue
            key = (one.id, kind, change.user_id, change.resource or "")
            if key in found:
                _add(found[key], change)
            else:
                found[key] = _first(one, kind, change)
    return list(found.values())


def _first(subscription: Planned, kind: str, change: FeedChange) -> NewNotification:
    return NewNotification(
        id=f"msg_{uuid4().hex}",
        subscription_id=subscription.id,
        type=kind,
        user_id=change.user_id,
        client_user_id=change.client_user_id,
        resource=change.resource or "",
        provider=change.provider or "",
        ids=[change.record_id] if change.record_id else [],
        ts_min=change.ts_min,
        ts_max=change.ts_max,
        row_count=change.row_count,
        first_position=change.position,
        last_position=change.position,
        changed_at=change.changed_at,
        due_at=change.changed_at + timedelta(seconds=subscription.window_seconds),
    )


def _add(to: NewNotification, change: FeedChange) -> None:
    if change.record_id and change.record_id not in to.ids and len(to.ids) < MAX_IDS:
        to.ids.append(change.record_id)
    to.ts_min = min((at for at in (to.ts_min, change.ts_min) if at), default=None)
    to.ts_max = max((at for at in (to.ts_max, change.ts_max) if at), default=None)
    to.client_user_id = change.client_user_id or to.client_user_id
    to.provider = to.provider if to.provider == change.provider else ""  # of several
    to.row_count += change.row_count
    to.last_position, to.changed_at = change.position, max(to.changed_at, change.changed_at)


def plan(engine: Engine) -> bool:
    """Plans the next page of changes. Returns whether there was one: the feed may have more.

    The active subscriptions with the lowest position read the page. It ends at the next position of others, so that
    they continue together. If PostgreSQL refuses a page, smaller ones are tried, down to the refused change,
    which is skipped and reported; otherwise it would block all changes after it.
    """
    limit = PAGE_CHANGES
    while True:
        at = None
        try:
            with transaction(engine) as connection:
                if not (found := _next_group(connection)):
                    return False
                group, until = found
                at = group[0].position
                changes = planning.page(connection, at, until, limit)
                _save(connection, changes, group)
                is_full = len(changes) == limit
                planning.move(connection, [one.id for one in group], changes[-1].position if is_full else until)
                return True
        except Unprocessable as error:
            if limit > 1:
                limit //= 2
            elif at is None:
                raise
            else:
                _step_over(engine, at, error)
                return True


def _next_group(connection: Connection) -> tuple[list[Planned], int] | None:
    """Locks the active subscriptions with the lowest position, and returns them with the end of their next page."""
    if not planning.is_behind(connection):
        return None
    active = planning.lock_active(connection)
    # After the locks: a page that another planner has committed is not read again.
    newest, dropped = planning.feed_range(connection)
    positions = sorted({one.position for one in active if one.position < newest} | {newest})
    group = [one for one in active if one.position == positions[0] and one.position < newest]
    if not group:
        return None
    if positions[0] < dropped:
        reason = MISSED.format(dropped)
        log.warning("%d subscriptions: %s", len(group), reason)
        planning.note_missed(connection, [one.id for one in group], reason)
    return group, positions[1]


def _step_over(engine: Engine, at: int, error: Unprocessable) -> None:
    """Moves the subscriptions that are at this position behind the next change, which PostgreSQL has refused."""
    with transaction(engine) as connection:
        ids = [one.id for one in planning.lock_active(connection) if one.position == at]
        if ids and (refused := planning.first_behind(connection, at)):
            reason = REFUSED.format(refused, error)
            log.error("%d subscriptions: %s", len(ids), reason)
            planning.note_missed(connection, ids, reason)
            planning.move(connection, ids, refused)


def resend(engine: Engine, to: Subscription, since: datetime, *, only_dead: bool) -> str:
    """Sends notifications again, and plans changes from before the subscription was added. Returns the result.

    Records both in the audit log.
    """
    detail: dict[str, Any] = {"since": since, "only_dead": only_dead}
    with audit.recorded(engine, "subscriptions resend", to.name, detail):
        detail["older_changes"] = older = plan_since(engine, to.name, since, to.start_position)
        with transaction(engine, confirm=True) as connection:
            statuses = ("dead",) if only_dead else ("dead", "sent")
            count = notifications.resend(connection, to.name, since, statuses, RETRY_DAYS)
        detail["notifications"] = count
    return f"{count} notifications are sent again, and notifications of {older} older changes are sent"


def plan_since(engine: Engine, name: str, since: datetime, start_position: int) -> int:
    """Plans changes from before a subscription's start. Returns their number.

    `start_position` moves to the beginning, so that a second call plans nothing twice.
    """
    with transaction(engine, confirm=True) as connection:
        one = planning.lock_one(connection, name)
        first = at = max(planning.position_at(connection, since), planning.feed_range(connection)[1])
        count = 0
        while at < start_position and (changes := planning.page(connection, at, start_position, PAGE_CHANGES)):
            _save(connection, changes, [one])
            at, count = changes[-1].position, count + len(changes)
        if first < start_position:
            planning.begin_at(connection, one.id, first)
        return count


def _save(connection: Connection, changes: Sequence[FeedChange], group: Sequence[Planned]) -> None:
    """Saves the notifications of users who are not erased.

    An erasure whose tombstone is not committed yet waits for the locks of the subscriptions before it deletes
    notifications (`create_tombstone`). Locks on users would wait for user merges, which take minutes.
    """
    found = coalesce(changes, group)
    erased = erased_users(connection, sorted({one.user_id for one in found if one.type != ERASED}))
    planning.save(connection, [one for one in found if one.type == ERASED or one.user_id not in erased], RETRY_DAYS)
