"""Partitions: created before their time or before the first sample of a month, dropped by age.

The SQL functions of migrations 0007 and 0009 create and drop them with the owner's rights, because the role of the
workers may not. Each call is a transaction of its own, which waits for a lock for 100 ms at most.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from sqlalchemy import Connection, Engine, TextClause, text

from app.errors import RetryAlone, TryLater
from workers.actions import Samples
from workers.store.engine import delete_in_batches, execute, scalars, transaction

CREATE = text("SELECT headrace.create_partition(:parent, :moment)")
DROP = text("SELECT headrace.drop_partition(:parent, :name, :only_empty)")
# The rows of a month are counted for the change feed before it is dropped: 0.2 s for a million.
NO_HURRY = text("SET LOCAL statement_timeout = '30min'")
PARENTS = text("SELECT parent, key, unit, ahead FROM headrace.partitioned ORDER BY parent")
# The first moments of the partitions from now on that do not exist yet.
MISSING = text("""
SELECT p.parent, moment FROM headrace.partitioned p, LATERAL (SELECT CAST('1 ' || unit AS interval) AS step) AS one,
LATERAL generate_series(date_trunc(unit, CAST(:now AS timestamptz)),
                        date_trunc(unit, CAST(:now AS timestamptz)) + ahead * step, step) AS moment
WHERE NOT EXISTS (SELECT FROM headrace.partitions c WHERE c.parent = p.parent AND c.first <= moment AND moment < c.last)
ORDER BY 1, 2""")
# The months of rows in the default partition, which may have been written while a lock prevented the partition.
STRAY = """
SELECT DISTINCT date_trunc('{unit}', CAST({key} AS timestamptz)) FROM headrace.{parent}_other
WHERE {key} >= '2000-01-01' AND {key} < date_trunc('{unit}', now()) + {ahead} * interval '1 {unit}' ORDER BY 1"""
UNCOVERED = text("""
SELECT moment FROM unnest(CAST(:months AS timestamptz[])) AS moment
WHERE NOT EXISTS (SELECT FROM headrace.partitions c
                  WHERE c.parent = 'samples' AND c.first <= moment AND moment < c.last)""")
OLDER = text("SELECT name FROM headrace.partitions WHERE parent = :parent AND last <= :before ORDER BY first")
# Of version 0.2 and earlier, which created a partition per year until 2030.
YEARS = text("SELECT name FROM headrace.partitions WHERE parent = 'samples' AND last - first > interval '40 days'")
CROWDED = text("""
SELECT 'samples_other' WHERE EXISTS (
    SELECT FROM headrace.samples_other WHERE ts >= '2000-01-01' AND ts < now() + interval '2 months'
    GROUP BY date_trunc('month', ts) HAVING count(*) > 50000)""")  # the limit of create_partition
EXPIRED = text("""
DELETE FROM headrace.archive WHERE received_at < :before AND (tableoid, ctid) IN (
    SELECT tableoid, ctid FROM headrace.archive WHERE received_at < :before LIMIT :limit)""")
BATCH = 10_000
PAUSES = (0.1, 0.3, 0.6, 1.0)  # seconds between tries for a lock
FIRST_MONTH = 2000 * 12  # earlier times come from wrong clocks, mostly from 1970, and stay in the default partition
CACHE_SECONDS, FAILED_SECONDS = 600.0, 10.0  # of the months that exist, and of one that could not be created
log = logging.getLogger(__name__)


def maintain_partitions(engine: Engine, keep_days: int | None, now: datetime | None = None) -> list[str]:
    """Creates missing partitions and drops old ones of the archive. Returns the names of dropped partitions.

    Without `keep_days` nothing is deleted. Archived rows of the default partition are deleted in batches.
    """
    now = now or datetime.now(UTC)
    for name in scalars(engine, YEARS):
        repeated(engine, DROP, {"parent": "samples", "name": name, "only_empty": True})
    create_ahead(engine, now)
    if keep_days is None:
        return []
    before = datetime.fromordinal(now.toordinal() - keep_days).replace(tzinfo=UTC)
    dropped = drop_older(engine, "archive", before)
    for _ in delete_in_batches(engine, EXPIRED, {"before": before}, BATCH):
        pass
    return dropped


def create_ahead(engine: Engine, now: datetime | None = None) -> None:
    """Creates the partitions of now and of the time ahead, and those for rows of the default partitions."""
    with transaction(engine) as connection:
        found = {(one.parent, one.moment) for one in connection.execute(MISSING, {"now": now or datetime.now(UTC)})}
        for parent in connection.execute(PARENTS).mappings().all():
            found |= {(parent["parent"], moment) for moment in connection.scalars(text(STRAY.format_map(parent)))}
    for name, moment in sorted(found):
        if repeated(engine, CREATE, {"parent": name, "moment": moment}) is False:
            reason = "too many of its rows are in the default partition; run `headrace migrate --convert`"
            log.warning("no partition of %s for %s: %s", name, moment.date().isoformat(), reason)


def misplaced(connection: Connection) -> list[str]:
    """The partitions that `headrace migrate --convert` would convert; none before migration 0007.

    Yearly partitions of samples, and the default one if it has too many rows of a month for `create_ahead` to create
    the month's partition.
    """
    if connection.scalar(text("SELECT to_regclass('headrace.partitions')")) is None:
        return []
    return sorted(connection.scalars(YEARS)) + list(connection.scalars(CROWDED))


def drop_older(engine: Engine, parent: str, before: datetime, *, only_empty: bool = False) -> list[str]:
    """Drops the partitions of a table that end at `before` or earlier. Returns their names."""
    names = scalars(engine, OLDER, {"parent": parent, "before": before})
    values = {"parent": parent, "only_empty": only_empty}
    return [name for name in names if repeated(engine, DROP, {**values, "name": name})]


def repeated(engine: Engine, query: TextClause, values: Mapping[str, object]) -> bool | None:
    """The result of one of the functions; None if it failed, for example because of a lock. The next run repeats it."""
    for pause in (*PAUSES, None):
        try:
            with transaction(engine) as connection:
                connection.execute(NO_HURRY)
                return bool(connection.scalar(query, values))
        except RetryAlone as error:
            if pause is None or error.cause != "lock_timeout":
                log.warning("a partition of %s is neither created nor dropped yet (%s)", values["parent"], error)
                return None
        time.sleep(pause)
    return None


class SampleMonths:
    """Creates the partitions of months before samples are written. One per worker process, which caches known months.

    A month is created when the first sample of it arrives, and not in advance, because every partition costs planning
    time and locks. The next months are an exception: `create_ahead` has created them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: set[int] = set()
        self._until = 0.0

    def ensure(self, given: Iterable[Samples]) -> None:
        """Creates missing partitions. Without one, for example because of a lock, rows go to the default partition.

        `create_ahead` moves them later. Never raises because of a partition: the write itself reports an outage.
        """
        if time.monotonic() > self._until:
            self._known.clear()  # retention may have dropped a partition
            self._until = time.monotonic() + CACHE_SECONDS
        months = {month for one in given if one.rows for month in self._months(one)}
        this_month = _month(datetime.now(UTC))
        missing = [one for one in months - self._known if FIRST_MONTH <= one <= this_month + 1]
        self._known |= months
        if missing:
            moments = [datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC) for month in sorted(missing)]
            try:
                for moment in scalars(self._engine, UNCOVERED, {"months": moments}):
                    execute(self._engine, CREATE, {"parent": "samples", "moment": moment})
            except TryLater as error:
                self._until = min(self._until, time.monotonic() + FAILED_SECONDS)
                log.warning("samples are written to the default partition: %s", error)

    def _months(self, samples: Samples) -> set[int]:
        first, last = min(row.ts for row in samples.rows), max(row.ts for row in samples.rows)
        between = range(_month(first), _month(last) + 1)
        if len(between) <= 2 or self._known.issuperset(between):
            return set(between)
        return {_month(row.ts) for row in samples.rows}


def _month(moment: datetime) -> int:
    """The number of a month in UTC, counted from the year 0; 0 if UTC has the year 0 or 10000."""
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        return 0
    return moment.year * 12 + moment.month - 1
