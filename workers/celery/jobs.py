"""Scheduled work: the sweep, the archive's partitions, retention, and the reconciliation."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from app.broker.lanes import RECONCILE
from app.errors import RetryAlone
from workers.backfill.fetcher import FollowUp
from workers.broker_admin import drain_invalid, lanes
from workers.celery.context import MAX_COUNTDOWN_SECONDS, WorkerContext
from workers.operate.gauges import GaugeCollector
from workers.reconcile.comparisons import JOBS, start_after_losses
from workers.reconcile.runs import run_slice
from workers.store import feed, retention
from workers.store.backfills import due
from workers.store.jobs import SWEPT, claim, ensure_job, report, save, touch
from workers.store.partitions import maintain_partitions

log = logging.getLogger(__name__)
PARTITIONS, PARTITIONS_SECONDS = "partitions", 6 * 3600.0
RETENTION, RETENTION_SECONDS, RETENTION_SLICE_SECONDS = "retention", 6 * 3600.0, 20.0
GAUGES = "gauges"
REPORTED_SECONDS = 150.0  # longer than the time until the next try
MAX_QUEUED_FETCHES = 500  # messages on the backfill lane up to which a sweep fills it


class Jobs:
    """The tasks that beat triggers. One per worker process."""

    def __init__(self, context: WorkerContext) -> None:
        self._context, self._engine, self._settings = context, context.engine, context.settings
        self._gauges = GaugeCollector(context.engine, context.settings)

    def sweep(self) -> None:
        """Enqueues due backfills, in case their messages were lost, then runs the maintenance.

        It stops at MAX_QUEUED_FETCHES, so that sweeps do not enqueue the same backfills again while no worker runs.
        """
        found = lanes(self._settings)
        limit = MAX_QUEUED_FETCHES - next(lane.messages for lane in found if lane.name == "backfill")
        if self._context.fetches and limit > 0:
            backfills = due(self._engine, of=self._settings.readable, limit=limit)
            self._context.enqueue(FollowUp(one, 0) for one in backfills)
            if self._context.period and self._is_reconciliation_due():
                self._context.send(RECONCILE, (), 0)
        drain_invalid(self._settings, self._context.applier.dead_letter_raw)
        with self._reported(PARTITIONS):
            self._maintain_partitions()
        with self._reported(RETENTION):
            self._retain()
        touch(self._engine, SWEPT)
        with self._reported(GAUGES):
            self._gauges.poll(found)

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Shows in `headrace status` that PostgreSQL did not execute a statement of this job. The sweep continues.

        The job is due again when its lease ends, after 60 s.
        """
        try:
            yield
        except RetryAlone as error:
            log.warning("job %s stopped: %s", name, error)
            report(self._engine, name, str(error), REPORTED_SECONDS)

    def reconcile(self) -> None:
        """Runs each aggregator's reconciliation for a time slice and enqueues the next slice."""
        slices = [run_slice(self._engine, one, self._context.period) for one in self._context.comparisons]
        if soon := [seconds for seconds in slices if seconds is not None and seconds <= MAX_COUNTDOWN_SECONDS]:
            self._context.send(RECONCILE, (), min(soon))

    def _is_reconciliation_due(self) -> bool:
        """Also creates the jobs that are missing."""
        start_after_losses(self._engine, self._settings)
        names = [job for name in self._settings.reconcilable for job in JOBS[name]]
        due = [ensure_job(self._engine, name, self._context.period) for name in names]
        return any(due)

    def _maintain_partitions(self) -> None:
        """Creates partitions, and drops old ones of the archive and the change feed, four times a day."""
        if ensure_job(self._engine, PARTITIONS, PARTITIONS_SECONDS) and claim(self._engine, PARTITIONS):
            for name in maintain_partitions(self._engine, self._settings.keep_days):
                log.info("dropped partition %s: older than HEADRACE_KEEP_DAYS", name)
            today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
            for name in feed.drop_older(self._engine, today - timedelta(days=self._settings.feed_days)):
                log.info("dropped partition %s: older than HEADRACE_FEED_DAYS", name)
            save(self._engine, PARTITIONS, None, PARTITIONS_SECONDS)

    def _retain(self) -> None:
        """Deletes data older than HEADRACE_RETENTION for a time slice; the next sweep continues."""
        edges = retention.limits(self._settings, datetime.now(UTC))
        if not edges or not ensure_job(self._engine, RETENTION, 0) or not claim(self._engine, RETENTION):
            return
        until, pause = time.monotonic() + RETENTION_SLICE_SECONDS, RETENTION_SECONDS
        for name in retention.drop_partitions(self._engine, edges):
            log.info("dropped partition %s: older than HEADRACE_RETENTION", name)
        for name, count in retention.remove(self._engine, edges):
            log.info("deleted %d rows of %s: older than HEADRACE_RETENTION", count, name)
            if time.monotonic() > until:
                pause = 0.0
                break
        save(self._engine, RETENTION, None, pause)
