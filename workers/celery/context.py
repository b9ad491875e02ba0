"""The objects that the tasks of one worker process share: engine, applier, fetcher, comparisons, downloader."""

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine

from app.broker.delays import delay_options
from app.broker.lanes import APPLY, DOWNLOAD, FETCH
from app.config.settings import Settings
from app.delivery import pack
from app.errors import TryLater
from app.observability import metrics
from workers.backfill.fetcher import Fetcher, FollowUp
from workers.celery.retries import retry_headers, seconds_before
from workers.fetch.client import make_clients
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.download import Downloader
from workers.ingest.outcomes import Applied, Unsettled, cause_of, retry_reason
from workers.reconcile.comparisons import make_scheduled
from workers.reconcile.runs import Comparison
from workers.store.engine import WORKER_SESSION, make_writer

log = logging.getLogger(__name__)
MAX_COUNTDOWN_SECONDS = 50.0  # the sweep enqueues backfills that wait longer


class WorkerContext:
    """Created by the first task and not on import: connection pools do not survive a fork."""

    def __init__(self, celery: Celery, settings: Settings, name: str = "headrace-worker") -> None:
        self.celery, self.settings = celery, settings
        self.engine: Engine = make_writer(settings, name, WORKER_SESSION)
        self.applier = Applier(self.engine, settings)
        self.fetches = bool(settings.readable) and settings.fetch_history
        self.period = settings.reconcile_hours * 3600.0 if settings.reconcilable else 0.0

    # Each of these is used by the workers of one lane.

    @cached_property
    def fetcher(self) -> Fetcher:
        return Fetcher(self.engine, self.settings, make_clients(self.settings))

    @cached_property
    def comparisons(self) -> list[Comparison[Any]]:
        return make_scheduled(self.engine, self.settings)

    @cached_property
    def downloader(self) -> Downloader:
        files = Files(self.settings.download_hosts, self.settings.max_download_bytes)
        return Downloader(self.applier, self.settings, files)

    def apply(self, packed: str, *, redelivered: bool, failures: int = 0) -> Applied:
        """Applies a message and enqueues the deliveries that it leaves without an outcome. Raises TryLater."""
        applied = self.applier.apply(packed, redelivered=redelivered, failures=failures)
        self.hand_over(applied)
        return applied

    def hand_over(self, applied: Applied) -> None:
        """Passes deliveries on to the download lane, and enqueues the retries of single deliveries.

        Call it before the message is acknowledged: these deliveries are in no table yet. Raises TryLater.
        """
        try:
            for delivery in applied.for_download:
                representation = {"argsrepr": "(1 deliveries)", "kwargsrepr": "{}"}
                self.celery.send_task(DOWNLOAD, args=(pack([delivery]),), queue="download", **representation)
            for one in applied.unsettled:
                self._retry_alone(one)
        except OperationalError as error:
            raise TryLater(f"cannot enqueue a delivery ({type(error).__name__})", setting="BROKER_URL") from None

    def _retry_alone(self, one: Unsettled) -> None:
        """Enqueues a delivery as a message of its own, which is never merged with others."""
        seconds = seconds_before(one.failures) if one.error else 0.0
        if one.error:
            metrics.RETRIES.labels(APPLY, cause_of(one.error)).inc()
            reason, ids = retry_reason(one.error), {"delivery": one.delivery.message_id}
            log.warning("a delivery is retried alone in %.1f s: %s", seconds, reason, extra=ids)
        self.celery.send_task(
            APPLY,
            args=(pack([one.delivery]),),
            retries=one.failures + 1,
            headers=retry_headers({}, one.failures, one.error),
            argsrepr="(1 deliveries)",
            kwargsrepr="{}",
            **delay_options(self.celery, "live", seconds),
        )

    def enqueue(self, follow_ups: Iterable[FollowUp]) -> None:
        """Enqueues backfills. The sweep finds those that wait longer or that the broker does not accept."""
        for one in follow_ups:
            is_soon = self.fetches and one.seconds <= MAX_COUNTDOWN_SECONDS
            if is_soon and not self.send(FETCH, (one.backfill_id,), one.seconds):
                return  # if the broker does not respond, each attempt takes seconds

    def send(self, task: str, arguments: tuple[int, ...], seconds: float) -> bool:
        """Enqueues a task on the backfill lane. False if the broker does not accept it."""
        try:
            self.celery.send_task(task, args=arguments, **delay_options(self.celery, "backfill", seconds))
        except OperationalError as error:
            log.warning("cannot enqueue %s (%s); the next sweep enqueues it", task, type(error).__name__)
            return False
        return True
