"""Queries of `headrace status`: delivery outcomes, backfills, gaps, connections, dead letters, refused items."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, text

from workers.store import lost_deliveries
from workers.store.engine import execute

EDGE_SECONDS = 600.0  # how long the count of deliveries older than an hour is cached: there may be 10^8 of them
BEFORE = text("SELECT outcome, count(*) AS total FROM headrace.deliveries WHERE received_at < :edge GROUP BY outcome")
SINCE = text("""
SELECT outcome, count(*) AS total, count(*) FILTER (WHERE received_at > now() - interval '1 hour') AS last_hour
FROM headrace.deliveries WHERE received_at >= :edge GROUP BY outcome""")
DELAY = text("""
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM applied_at - received_at))
FROM headrace.deliveries WHERE received_at > now() - interval '5 minutes'""")
SINCE_LAST_DELIVERY = text("""
SELECT aggregator, now() - max(received_at) AS since FROM headrace.deliveries
WHERE received_at > now() - interval '2 days' AND aggregator <> 'unknown' GROUP BY aggregator""")
SWEEP = text("SELECT now() - done_at FROM headrace.jobs WHERE name = :name")
LOST = lost_deliveries.COUNT_OPEN
CRASHED = text("SELECT count(*) FROM headrace.crash_counts WHERE since < now() - interval '1 minute'")
# Backfills overdue while no worker fetches from their aggregator: a key or a worker is missing. A worker that fetches
# has a lease, or has released a backfill it started: to be continued at once, or later because of an error or a pause.
IDLE = text("""
SELECT coalesce(sum(overdue), 0)::bigint FROM (
    SELECT count(*) FILTER (WHERE due_at < now() - interval '5 minutes') AS overdue FROM headrace.backfills
    WHERE status IN ('pending', 'running') GROUP BY aggregator
    HAVING NOT bool_or(lease_until > now()
                       OR started_at IS NOT NULL AND due_at > now() - interval '5 minutes')) AS by_aggregator""")
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
SELECT reason, count(*) AS dead_letters, count(*) FILTER (WHERE died_at > now() - interval '1 hour') AS last_hour
FROM headrace.dead_letters WHERE item = '' GROUP BY reason ORDER BY dead_letters DESC""")
# `reason` is the most frequent one of the last hour, else of all.
REFUSED_ITEMS = text("""
SELECT origin, sum(items)::bigint AS items, sum(last_hour)::bigint AS last_hour,
       (array_agg(reason ORDER BY last_hour DESC, items DESC))[1] AS reason
FROM (SELECT CASE message_id WHEN 'history' THEN 'history' ELSE 'webhooks' END AS origin, reason, sum(items) AS items,
             coalesce(sum(items) FILTER (WHERE died_at > now() - interval '1 hour'), 0) AS last_hour
      FROM headrace.dead_letters WHERE item <> '' GROUP BY 1, 2) AS by_reason
GROUP BY origin ORDER BY origin DESC""")


class OutcomeCounter:
    """Counts deliveries by outcome. Those older than an hour are counted every 10 minutes, the rest at each read."""

    def __init__(self) -> None:
        self._edge = datetime.min.replace(tzinfo=UTC)
        self._due = 0.0
        self._before: dict[str, int] = {}

    def read(self, connection: Connection) -> list[dict[str, Any]]:
        """One row per outcome: `outcome`, `total`, `last_hour`."""
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


def since_last_delivery(engine: Engine) -> dict[str, timedelta]:
    """Time since the last delivery of each aggregator, within the last two days. Raises TryLater."""
    return {row.aggregator: row.since for row in execute(engine, SINCE_LAST_DELIVERY)}
