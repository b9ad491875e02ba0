"""Scheduled work: the sweep, the archive's partitions, retention, and the reconciliation."""

import logging
import time
from datetime import UTC, datetime

from app.broker.lanes import RECONCILE
from workers.backfill.fetcher import FollowUp
from workers.broker_admin import drain_invalid, lanes
from workers.celery.context import MAX_COUNTDOWN_SECONDS, WorkerContext
from workers.operate.gauges import GaugeCollector
from workers.reconcile.comparisons import JOBS, start_after_losses
from workers.reconcile.runs import run_slice
from workers.store import retention
from workers.store.archive import maintain_partitions
from workers.store.backfills import due
from workers.store.jobs import SWEPT, claim, ensure_job, save, touch

log = logging.getLogger(__name__)
PARTITIONS, PARTITIONS_SECONDS = "partitions", 6 * 3600.0
RETENTION, RETENTION_SECONDS, RETENTION_SLICE_SECONDS = "retention", 6 * 3600.0, 20.0
MAX_QUEUED_FETCHES = 500  # messages on the backfill lane up to which a sweep fills it


class Jobs:
    """The tasks that beat triggers. One per worker process."""

    def __init__(self, context: WorkerContext) -> None:
        self._context, self._engine, self._settings = context, context.engine, context.settings
        self._gauges = GaugeCollector(context.engine, context.settings)

    def sweep(self) -> None:
        """Enqueues backfills that are due, whatever happened to their messages; then runs the maintenance.

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
        self._maintain_partitions()
        self._retain()
        touch(self._engine, SWEPT)
        self._gauges.poll(found)

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
        """Creates and drops partitions of the archive, four times a day."""
        if ensure_job(self._engine, PARTITIONS, PARTITIONS_SECONDS) and claim(self._engine, PARTITIONS):
            for name in maintain_partitions(self._engine, self._settings.keep_days):
                log.info("dropped partition %s: older than HEADRACE_KEEP_DAYS", name)
            save(self._engine, PARTITIONS, None, PARTITIONS_SECONDS)

    def _retain(self) -> None:
        """Deletes data older than HEADRACE_RETENTION for a time slice; the next sweep continues."""
        edges = retention.limits(self._settings, datetime.now(UTC))
        if not edges or not ensure_job(self._engine, RETENTION, 0) or not claim(self._engine, RETENTION):
            return
        until, pause = time.monotonic() + RETENTION_SLICE_SECONDS, RETENTION_SECONDS
        for name, count in retention.remove(self._engine, edges):
            log.info("deleted %d rows of %s: older than HEADRACE_RETENTION", count, name)
            if time.monotonic() > until:
                pause = 0.0
                break
        save(self._engine, RETENTION, None, pause)
