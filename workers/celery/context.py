"""The objects that the tasks of one worker process share: engine, applier, fetcher, comparisons, downloader."""

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine

from app.broker.delays import delay_options
from app.broker.lanes import DOWNLOAD, FETCH
from app.config.settings import Settings
from app.delivery import pack
from app.errors import TryLater
from workers.backfill.fetcher import Fetcher, FollowUp
from workers.fetch.client import make_clients
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.download import Downloader
from workers.ingest.outcomes import Applied
from workers.reconcile.comparisons import make_scheduled
from workers.reconcile.runs import Comparison
from workers.store.engine import make_writer

log = logging.getLogger(__name__)
MAX_COUNTDOWN_SECONDS = 50.0  # the sweep enqueues backfills that wait longer


class WorkerContext:
    """Created by the first task and not on import: connection pools do not survive a fork."""

    def __init__(self, celery: Celery, settings: Settings, name: str = "headrace-worker") -> None:
        self.celery, self.settings = celery, settings
        self.engine: Engine = make_writer(settings, name)
        self.applier = Applier(self.engine, settings)
        self.fetches = bool(settings.readable) and settings.fetch_history
        self.period = settings.reconcile_hours * 3600.0 if settings.reconcilable else 0.0
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "backfill")

    @cached_property
    def fetcher(self) -> Fetcher:
        """Used by workers of the backfill lane only."""
        return Fetcher(self.engine, self.settings, make_clients(self.settings))

    @cached_property
    def comparisons(self) -> list[Comparison[Any]]:
        """Used by workers of the backfill lane only."""
        return make_scheduled(self.engine, self.settings)

    @cached_property
    def downloader(self) -> Downloader:
        """Used by workers of the download lane only."""
        files = Files(self.settings.download_hosts, self.settings.max_download_bytes)
        return Downloader(self.applier, self.settings, files)

    def apply(self, packed: str, *, redelivered: bool) -> Applied:
        """Applies a message and enqueues a download for each delivery that only contains a URL. Raises TryLater."""
        applied = self.applier.apply(packed, redelivered=redelivered)
        for delivery in applied.by_reference:
            # Before this message is acknowledged: the delivery is in no table yet.
            representation = {"argsrepr": "(1 announcement)", "kwargsrepr": "{}"}
            try:
                self.celery.send_task(DOWNLOAD, args=(pack([delivery]),), queue="download", **representation)
            except OperationalError as error:
                raise TryLater(f"cannot enqueue a download ({type(error).__name__})", setting="BROKER_URL") from None
        return applied

    def enqueue(self, follow_ups: Iterable[FollowUp]) -> None:
        """Enqueues backfills. The sweep finds those that wait longer or that the broker does not accept."""
        for one in follow_ups:
            is_soon = self.fetches and one.seconds <= MAX_COUNTDOWN_SECONDS
            if is_soon and not self.send(FETCH, (one.backfill_id,), one.seconds):
                return  # if the broker does not respond, each attempt takes seconds

    def send(self, task: str, arguments: tuple[int, ...], seconds: float) -> bool:
        """Enqueues a task on the backfill lane. False if the broker does not accept it."""
        try:
            options = {"queue": self._lane} | delay_options(self.celery, self._lane.name, seconds)
            self.celery.send_task(task, args=arguments, **options)
        except OperationalError as error:
            log.warning("cannot enqueue %s (%s); the next sweep enqueues it", task, type(error).__name__)
            return False
        return True
