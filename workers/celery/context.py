"""What the tasks of one worker process share: engine, applier, fetcher, reconciler, downloader."""

import logging
from collections.abc import Iterable
from functools import cached_property

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine

from app.broker.delays import delay_options
from app.broker.lanes import DOWNLOAD, FETCH
from app.config.settings import Settings
from app.delivery import Delivery, pack
from app.errors import TryLater
from workers.backfill.fetcher import Fetcher, FollowUp
from workers.fetch.client import make_client, make_clients
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.download import Downloader
from workers.ingest.outcomes import Applied
from workers.reconcile.reconciler import AGGREGATOR as COMPARED
from workers.reconcile.reconciler import Reconciler
from workers.store.engine import make_writer

log = logging.getLogger(__name__)
MAX_COUNTDOWN_SECONDS = 50.0


class WorkerContext:
    """Made by the first task and not on import: connection pools do not survive a fork."""

    def __init__(self, celery: Celery, settings: Settings, name: str = "headrace-worker") -> None:
        self.engine: Engine = make_writer(settings, name)
        self.applier = Applier(self.engine, settings)
        self.fetches = bool(settings.readable) and settings.fetch_history
        # Terra has nothing to compare with: it does not tell what it has.
        self.period = settings.reconcile_hours * 3600.0 if settings.junction_api_key else 0.0
        self.celery, self.settings = celery, settings
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "backfill")

    @cached_property
    def fetcher(self) -> Fetcher:
        """What reads history; only a worker of its lane needs one."""
        return Fetcher(self.engine, self.settings, make_clients(self.settings))

    @cached_property
    def reconciler(self) -> Reconciler:
        """What compares it; as above."""
        return Reconciler(self.engine, self.settings, make_client(COMPARED, self.settings))

    @cached_property
    def downloader(self) -> Downloader:
        """What fetches events that were only announced; only a worker of its lane needs one."""
        return Downloader(
            self.applier, self.settings, Files(self.settings.download_hosts, self.settings.max_download_bytes)
        )

    def apply(self, packed: str, *, redelivered: bool) -> Applied:
        """Applies a message, and hands on what is to be fetched first. Raises TryLater."""
        applied = self.applier.apply(packed, redelivered=redelivered)
        for delivery in applied.by_reference:
            self._enqueue_download(delivery)
        return applied

    def _enqueue_download(self, announced: Delivery) -> None:
        """Puts it on its lane before its own message is acknowledged: it is in no table yet."""
        try:
            self.celery.send_task(
                DOWNLOAD, args=(pack([announced]),), queue="download", argsrepr="(1 announcement)", kwargsrepr="{}"
            )
        except OperationalError as error:
            raise TryLater(f"the broker does not take it ({type(error).__name__})", setting="BROKER_URL") from None

    def enqueue(self, follow_ups: Iterable[FollowUp]) -> None:
        """Has backfills gone on with. What must wait longer, or is not taken, stays a row, and the sweep finds it."""
        for one in follow_ups:
            soon = self.fetches and one.seconds <= MAX_COUNTDOWN_SECONDS
            if soon and not self.send(FETCH, (one.backfill_id,), one.seconds):
                return  # a broker that is frozen costs seconds each time

    def keep(self, raw: bytes, reason: str) -> None:
        """Keeps what came from the broker and is no task."""
        self.applier.dead_letter_raw(raw, reason)

    def send(self, task: str, arguments: tuple[int, ...], seconds: float) -> bool:
        """Enqueues a task on the backfill lane; false if the broker does not take it, and the sweep will find it."""
        try:
            options = {"queue": self._lane} | delay_options(self.celery, self._lane.name, seconds)
            self.celery.send_task(task, args=arguments, **options)
        except OperationalError as error:
            log.warning("%s could not be enqueued (%s); the sweep will find it", task, type(error).__name__)
            return False
        return True
