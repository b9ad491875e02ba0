"""Lost deliveries: the sender has reported that it gave them up, and no reconciliation has followed yet."""

from dataclasses import asdict
from datetime import datetime

from sqlalchemy import Connection, Engine, text

from app.delivery import Delivery
from workers.actions import LostDelivery
from workers.store.engine import execute, scalars, transaction

ALL_USERS_SECONDS = 3600.0  # between two reconciliations of all users: after an outage, reports arrive for 28 hours
# Such a delivery is not lost: the endpoint accepted it but answered too late, or an operator resent it.
ARRIVED = """EXISTS (SELECT 1 FROM headrace.deliveries entry
    WHERE (entry.aggregator, entry.message_id) = (lost.aggregator, lost.message_id))"""
# Old reports are left out: FORGET has deleted their rows, and a replay must not report the loss again.
REPORT = text(f"""
INSERT INTO headrace.lost_deliveries AS stored (aggregator, message_id, user_id, reported_at)
SELECT lost.aggregator, lost.message_id, coalesce(:user_id, (
    SELECT min(user_id) FROM headrace.users
    WHERE client_user_id = :client_user_id AND erased_at IS NULL AND merged_into IS NULL
      AND coalesce(aggregator, lost.aggregator) = lost.aggregator HAVING count(*) = 1)),
    :reported_at
FROM (SELECT CAST(:aggregator AS text) AS aggregator, CAST(:message_id AS text) AS message_id) AS lost
WHERE NOT {ARRIVED} AND CAST(:reported_at AS timestamptz) > now() - interval '30 days'
ON CONFLICT (aggregator, message_id) DO UPDATE SET user_id = coalesce(stored.user_id, excluded.user_id)""")
OPEN = f"lost.reconciled_at IS NULL AND NOT {ARRIVED}"
COUNT_OPEN = text(f"SELECT count(*) FROM headrace.lost_deliveries lost WHERE {OPEN}")
# Each report starts at most one run. If that run fails, the next one follows after HEADRACE_RECONCILE_HOURS.
NOT_STARTED = f"""lost.aggregator = :aggregator AND (lost.user_id IS NULL) = :is_of_all
    AND lost.started_at IS NULL AND {OPEN}"""
START_RECONCILIATION = text(f"""
WITH job AS (
    UPDATE headrace.jobs SET due_at = least(due_at, greatest(now(), done_at + make_interval(secs => :seconds)))
    WHERE name = :job AND position IS NULL AND lease_until < now()
      AND EXISTS (SELECT 1 FROM headrace.lost_deliveries lost WHERE {NOT_STARTED}) RETURNING 1)
UPDATE headrace.lost_deliveries lost SET started_at = now() WHERE EXISTS (SELECT 1 FROM job) AND {NOT_STARTED}""")
NEXT_USER = text(f"""
SELECT min(lost.user_id) FROM headrace.lost_deliveries lost
WHERE lost.aggregator = :aggregator AND lost.user_id > :after AND {OPEN}""")
RECONCILED = text("""
UPDATE headrace.lost_deliveries SET reconciled_at = now()
WHERE aggregator = :aggregator AND reconciled_at IS NULL AND reported_at < :began
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)""")
FORGET = text("DELETE FROM headrace.lost_deliveries WHERE reconciled_at < now() - interval '30 days'")


def report(connection: Connection, reported_by: Delivery, lost: LostDelivery) -> bool:
    """Records a lost delivery, once if it is reported repeatedly. False if the ledger has the delivery.

    The user of a client_user_id is recorded only if the reporting aggregator has exactly one.
    """
    about = {"aggregator": reported_by.aggregator, "reported_at": reported_by.received}
    return connection.execute(REPORT, asdict(lost) | about).rowcount > 0


def start_reconciliation(engine: Engine, aggregator: str, job: str, *, of_users: bool) -> None:
    """Makes the job due if there are new reports: those that name a user, or those that do not.

    A running job is not changed: the reports start the run after it.
    """
    seconds = 0.0 if of_users else ALL_USERS_SECONDS
    about = {"aggregator": aggregator, "job": job, "is_of_all": not of_users, "seconds": seconds}
    execute(engine, START_RECONCILIATION, about)


def next_user(engine: Engine, aggregator: str, after: str) -> str | None:
    """The first user with a lost delivery after this one, in the order of user ids."""
    user_id: str | None
    (user_id,) = scalars(engine, NEXT_USER, {"aggregator": aggregator, "after": after})
    return user_id


def reconciled(engine: Engine, aggregator: str, user_id: str | None, began: datetime) -> None:
    """Closes the reports that arrived before a reconciliation began: of one user, or all if `user_id` is None."""
    with transaction(engine) as connection:
        connection.execute(RECONCILED, {"aggregator": aggregator, "user_id": user_id, "began": began})
        connection.execute(FORGET)
