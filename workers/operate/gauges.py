"""Gauges that the sweep samples: queue depth, backfills, gaps, connections, dead letters, pauses, days to compute."""

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.observability import metrics
from workers.broker_admin import Lane
from workers.daily import queue
from workers.fetch.rate_limits import pauses
from workers.store import notifications
from workers.store.consumers import UNNUMBERED, consumers
from workers.store.engine import transaction
from workers.store.jobs import TERRA_TOKEN
from workers.store.lost_deliveries import COUNT_OPEN

MIN_INTERVAL_SECONDS = 15.0  # between two samples of the database
SHARE = 20  # the interval also grows by this many durations of the last sample: counting large tables takes long
COUNTS = {
    metrics.BACKFILLS: text("SELECT status, count(*) FROM headrace.backfills WHERE item = '' GROUP BY status"),
    metrics.GAPS: text("SELECT whose, count(*) FROM headrace.gaps GROUP BY whose"),
    metrics.DEAD_LETTERS: text(
        "SELECT aggregator, count(*) FROM headrace.dead_letters WHERE item = '' GROUP BY aggregator"
    ),
    metrics.CONNECTIONS: text("SELECT status, count(*) FROM headrace.connections GROUP BY status"),
    metrics.SUBSCRIPTIONS: notifications.BY_STATUS,
    metrics.NOTIFICATIONS_PENDING: notifications.PENDING,
    metrics.NOTIFICATIONS_OLDEST: notifications.OLDEST,
}
# A token that no reconciliation has used for two weeks is no longer set.
TOKEN_EXPIRES = text("""
SELECT extract(epoch FROM CAST(position ->> 'expires_at' AS timestamptz))::float8 FROM headrace.jobs
WHERE name = :name AND CAST(position ->> 'checked_at' AS timestamptz) > now() - interval '14 days'""").bindparams(
    name=TERRA_TOKEN
)
NUMBERS = {
    metrics.UNNUMBERED: UNNUMBERED,
    metrics.CRASHED_DELIVERIES: text("SELECT count(*) FROM headrace.crash_counts"),
    metrics.LOST_DELIVERIES: COUNT_OPEN,
    metrics.TERRA_TOKEN_EXPIRES: TOKEN_EXPIRES,
}


class GaugeCollector:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._due = 0.0
        self._consumers: set[str] = set()

    def poll(self, lanes: Sequence[Lane]) -> None:
        """Called after each sweep with its queue depths; samples the database when due. Raises TryLater."""
        metrics.LAST_SWEEP.set_to_current_time()
        metrics.show(metrics.LANE_MESSAGES, {lane.name: lane.messages for lane in lanes})
        metrics.show(metrics.LANE_RETRYING, {lane.name: lane.retrying for lane in lanes})
        for lane in lanes:
            seconds = lane.unacked_for.total_seconds() if lane.unacked_for else 0
            # NaN: unknown. No comparison with it is true, so no alert fires.
            metrics.LANE_UNACKED.labels(lane.name).set(math.nan if lane.unacked is None else lane.unacked)
            metrics.LANE_UNACKED_SECONDS.labels(lane.name).set(math.nan if lane.unacked is None else seconds)
            if lane.oldest is not None or not lane.messages:
                metrics.LANE_OLDEST.labels(lane.name).set(lane.oldest.total_seconds() if lane.oldest else 0)
        began = time.monotonic()
        if began >= self._due:
            self._due = began + MIN_INTERVAL_SECONDS
            self._count()
            self._due += SHARE * (time.monotonic() - began)

    def _count(self) -> None:
        with transaction(self._engine) as connection:
            for gauge, query in COUNTS.items():
                metrics.show(gauge, {row[0]: row[1] for row in connection.execute(query)})
            for gauge, query in NUMBERS.items():
                gauge.set(connection.scalar(query) or 0)
            following = consumers(connection)
            metrics.DAYS_PENDING.set(queue.pending_days(connection))
            metrics.DAYS_OLDEST.set(queue.behind(connection).total_seconds())
            metrics.DAYS_FAILED.set(sum(one.people for one in queue.failed(connection)))
        now, days = datetime.now(UTC), self._settings.feed_days
        metrics.show(metrics.CONSUMER_LAG, {one.name: one.changes for one in following})
        left = {one.name: one.expires_in(days, now) for one in following}
        self._consumers |= left.keys()
        for name in self._consumers:  # a removed consumer loses nothing
            expires = left.get(name)
            seconds = days * 86_400.0 if expires is None else expires.total_seconds()
            metrics.CONSUMER_EXPIRES.labels(name).set(seconds)
        if self._settings.has_redis:
            # The pause of one user has a user_id in its name, which must not become a label. The pause of another key,
            # for example of a wrong one in an operator's shell, does not pause this deployment.
            found = (one for one in pauses(self._settings) if "/" not in one.account and one.is_own is not False)
            metrics.show(metrics.PAUSED, {one.account: one.seconds for one in found})
