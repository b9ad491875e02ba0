"""Queries of the sender: subscriptions with due notifications, attempts, and their results.

A transaction locks the subscription first and its notifications afterwards, like the planner, to avoid deadlocks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Literal, NamedTuple

from sqlalchemy import Connection, Engine, text

from workers.store.engine import execute, transaction
from workers.store.planning import NotificationContent
from workers.store.sql import RowParameters
from workers.store.subscriptions import BEHIND, COLUMNS, Subscription

NotificationStatus = Literal["pending", "sent", "dead"]


@dataclass
class Notification(NotificationContent):
    """A notification, as it is sent, and its state."""

    created_at: datetime
    attempts: int
    status: NotificationStatus
    last_error: str
    sent_at: datetime | None


RUN = "notify"  # the row of headrace.jobs whose lease shows that a run is requested or active
RUN_SECONDS = 5  # of that lease, which a run renews
LEASE = "interval '30 seconds'"  # of a subscription: longer than a request and its result
MIN_KEEP_DAYS = 14  # sent and dead notifications, or longer: as long as the feed
DUE = """s.status = 'active' AND s.retry_at <= now() AND s.lease_until < now() AND EXISTS (
    SELECT FROM headrace.notifications n
    WHERE n.subscription_id = s.id AND n.status = 'pending' AND n.due_at <= now())"""
# Requests at most one run in RUN_SECONDS, so that messages do not accumulate in the lane while no worker runs.
REQUEST_RUN = text(f"""
INSERT INTO headrace.jobs AS stored (name, due_at, lease_until)
SELECT '{RUN}', now(), now() + interval '{RUN_SECONDS} seconds'
WHERE NOT EXISTS (SELECT FROM headrace.jobs WHERE name = '{RUN}' AND lease_until > now())
  AND (EXISTS ({BEHIND}) OR EXISTS (SELECT FROM headrace.subscriptions s WHERE {DUE}))
ON CONFLICT (name) DO UPDATE SET lease_until = excluded.lease_until WHERE stored.lease_until <= now()
RETURNING 1""")
RENEW_RUN = text(f"""
INSERT INTO headrace.jobs (name, due_at, lease_until) VALUES ('{RUN}', now(), now() + interval '{RUN_SECONDS} seconds')
ON CONFLICT (name) DO UPDATE SET lease_until = excluded.lease_until""")
END_RUN = text(f"UPDATE headrace.jobs SET lease_until = '-infinity', done_at = now() WHERE name = '{RUN}'")
NEXT_DUE = text("""
SELECT extract(epoch FROM min(greatest(first.due_at, s.retry_at, s.lease_until)) - now())::float8
FROM headrace.subscriptions s, LATERAL (
    SELECT due_at FROM headrace.notifications WHERE subscription_id = s.id AND status = 'pending'
    ORDER BY due_at LIMIT 1) AS first
WHERE s.status = 'active'""")
# Endpoints that work come first, so that any number of failing ones takes no place from them.
CLAIM = text(f"""
UPDATE headrace.subscriptions s SET lease_until = now() + {LEASE}
WHERE s.id = ANY (ARRAY(
    SELECT s.id FROM headrace.subscriptions s WHERE {DUE} AND s.failures <= :max_failures
    ORDER BY s.failures, s.lease_until, s.id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED))
RETURNING {COLUMNS}""")
RELEASE = text("UPDATE headrace.subscriptions SET lease_until = '-infinity' WHERE id = :id")
START_LEASE = text(f"""
UPDATE headrace.subscriptions SET lease_until = now() + {LEASE} WHERE id = :id AND status = 'active' RETURNING 1""")
FIELDS = ", ".join(field.name for field in fields(Notification))
START = text(f"""
UPDATE headrace.notifications SET attempts = attempts + 1
WHERE id = ANY (ARRAY(SELECT id FROM headrace.notifications
    WHERE subscription_id = :id AND status = 'pending' AND due_at <= now() ORDER BY due_at, id LIMIT :limit))
RETURNING {FIELDS}""")
SUCCEEDED = text("""
UPDATE headrace.subscriptions SET failures = 0, failing_since = NULL, last_error = '', retry_at = '-infinity'
WHERE id = :id AND (failures > 0 OR last_error <> '')""")
FAILED = text("""
UPDATE headrace.subscriptions SET failures = failures + :failures, failing_since = coalesce(failing_since, now()),
       last_error = :error, retry_at = now() + make_interval(secs => :pause) WHERE id = :id""")
GONE = text("UPDATE headrace.subscriptions SET status = 'paused', reason = :reason WHERE id = :id")
RESULTS = RowParameters("id text, error text, pause float8", "result")
# Only pending rows: an operator, or another worker after the lease has ended, may have settled one meanwhile.
SETTLE = text(f"""
UPDATE headrace.notifications n
SET status = CASE WHEN result.error = '' THEN 'sent' WHEN n.expires_at <= now() THEN 'dead' ELSE 'pending' END,
    sent_at = CASE WHEN result.error = '' THEN now() END, last_error = result.error,
    due_at = CASE WHEN result.error = '' THEN n.due_at
                  ELSE least(now() + make_interval(secs => result.pause), greatest(n.expires_at, now())) END
FROM {RESULTS} WHERE n.id = result.id AND n.status = 'pending' RETURNING n.status""")
EXPIRE = text("""
UPDATE headrace.notifications SET status = 'dead', attempts = greatest(attempts, 1), last_error = :error
WHERE subscription_id = :id AND status = 'pending' AND expires_at <= now()""")
# After an outage of the endpoint, the other notifications skip the pauses that have grown during it.
CATCH_UP = text("""
UPDATE headrace.notifications SET due_at = now()
WHERE subscription_id = :id AND status = 'pending' AND attempts > 0 AND due_at > now()""")
RESEND = text("""
UPDATE headrace.notifications SET status = 'pending', attempts = 1, due_at = now(), sent_at = NULL,
       expires_at = now() + make_interval(days => :days)
WHERE subscription_id = (SELECT id FROM headrace.subscriptions WHERE name = :name) AND created_at >= :since
  AND status = ANY(:statuses)""")
OF_SUBSCRIPTION = text(f"""
SELECT {FIELDS} FROM headrace.notifications
WHERE subscription_id = (SELECT id FROM headrace.subscriptions WHERE name = :name)
ORDER BY created_at DESC, id LIMIT :limit""")
PRUNE = text("""
DELETE FROM headrace.notifications WHERE id = ANY (ARRAY(SELECT id FROM headrace.notifications
    WHERE status <> 'pending' AND created_at < now() - make_interval(days => :days)
    LIMIT :limit FOR UPDATE SKIP LOCKED))""")
PRUNED_AT_ONCE = 5000
# Gauges, by subscription.
PENDING = text("""
SELECT s.name, (SELECT count(*) FROM headrace.notifications n WHERE n.subscription_id = s.id AND n.status = 'pending')
FROM headrace.subscriptions s""")
OLDEST = text("""
SELECT s.name, coalesce((SELECT greatest(extract(epoch FROM now() - min(n.created_at)), 0)::float8
    FROM headrace.notifications n
    WHERE n.subscription_id = s.id AND n.status = 'pending' AND (n.due_at <= now() OR n.attempts > 0)), 0)
FROM headrace.subscriptions s WHERE s.status = 'active'""")
BY_STATUS = text("SELECT status, count(*) FROM headrace.subscriptions GROUP BY status")
# For `headrace status`: subscriptions that are paused, fail, or wait although their endpoint works.
TROUBLED = text("""
SELECT * FROM (
    SELECT s.name, s.status, s.reason, s.failures, s.last_error, now() - s.failing_since AS failing,
           now() - least((SELECT min(n.due_at) FROM headrace.notifications n
                          WHERE n.subscription_id = s.id AND n.status = 'pending'),
                         (SELECT changed_at FROM headrace.changes WHERE position > s.position
                          ORDER BY position LIMIT 1)) AS late
    FROM headrace.subscriptions s) AS subscriptions
WHERE status = 'paused' OR reason <> '' OR failures > 0 OR late > interval '2 minutes' ORDER BY name""")


class SendAttempt(NamedTuple):
    """The result of one attempt. `error` is empty after a 2xx; `pause` is in seconds."""

    id: str
    error: str
    pause: float


@dataclass(frozen=True)
class EndpointState:
    """The state of a subscription after attempts."""

    failures: int = 0  # new ones in a row; 0: an attempt succeeded
    error: str = ""
    pause: float = 0.0  # seconds before the next request to this endpoint
    gone: str = ""  # the reason to pause the subscription
    recovered: bool = False  # after so many failures that requests were held back


def is_due(engine: Engine) -> bool:
    """Whether to send `headrace.notify` now: changes or notifications are due, and no run is active or requested.

    True counts as a request: it is not true again for 5 s.
    """
    return bool(execute(engine, REQUEST_RUN))


def renew_run(engine: Engine) -> float | None:
    """Shows that a run is active. Returns the seconds until the next notification is due; None if none is pending."""
    with transaction(engine) as connection:
        connection.execute(RENEW_RUN)
        seconds: float | None = connection.scalar(NEXT_DUE)
        return seconds


def end_run(engine: Engine, feed_days: int) -> None:
    """Shows that no run is active, and deletes old notifications.

    Those of changes that the feed still has are kept: `resend` plans only changes from before the subscription's start.
    """
    with transaction(engine) as connection:
        connection.execute(PRUNE, {"days": max(MIN_KEEP_DAYS, feed_days), "limit": PRUNED_AT_ONCE})
        connection.execute(END_RUN)


def claim(engine: Engine, limit: int, max_failures: int) -> list[Subscription]:
    """Leases subscriptions with due notifications, except those with more failures in a row than `max_failures`."""
    rows = execute(engine, CLAIM, {"limit": limit, "max_failures": max_failures})
    return [Subscription(**row._asdict()) for row in rows]


def start(engine: Engine, subscription_id: int, limit: int) -> list[Notification]:
    """Counts an attempt of the due notifications before it is made, and thereby fixes their bodies.

    Empty if the subscription is no longer active.
    """
    with transaction(engine) as connection:
        if connection.execute(START_LEASE, {"id": subscription_id}).first() is None:
            return []
        rows = connection.execute(START, {"id": subscription_id, "limit": limit}).mappings()
        return [Notification(**row) for row in rows]


def record(
    engine: Engine, subscription_id: int, attempts: Sequence[SendAttempt], state: EndpointState
) -> Counter[NotificationStatus]:
    """Stores the results of attempts. Returns the number of notifications by their new status."""
    of = {"id": subscription_id}
    with transaction(engine) as connection:
        if state.failures:
            values = {"failures": state.failures, "error": state.error, "pause": state.pause}
            connection.execute(FAILED, of | values)
        else:
            connection.execute(SUCCEEDED, of)
        if state.gone:
            connection.execute(GONE, of | {"reason": state.gone})
        counts = Counter(connection.scalars(SETTLE, RESULTS.values(attempts)))
        if state.failures:
            counts["dead"] += connection.execute(EXPIRE, of | {"error": state.error}).rowcount
        if state.recovered:
            connection.execute(CATCH_UP, of)
        return counts


def release(engine: Engine, subscription_id: int) -> None:
    execute(engine, RELEASE, {"id": subscription_id})


def resend(connection: Connection, name: str, since: datetime, statuses: Sequence[str], retry_days: int) -> int:
    """Makes notifications of these statuses due again under their ids, with their bodies. Returns their number."""
    values = {"name": name, "since": since, "statuses": list(statuses), "days": retry_days}
    return connection.execute(RESEND, values).rowcount


def of_subscription(connection: Connection, name: str, limit: int) -> list[Notification]:
    rows = connection.execute(OF_SUBSCRIPTION, {"name": name, "limit": limit}).mappings()
    return [Notification(**row) for row in rows]
