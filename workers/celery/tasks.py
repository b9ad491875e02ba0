"""Every Celery task: a shell of a few lines around a plain function, with the retry decision in one place."""

import json
import logging
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

from celery import Celery, Task
from celery.exceptions import Reject

from app.broker.delays import delay_options
from app.broker.lanes import APPLY, DOWNLOAD, FETCH, RECONCILE, SWEEP
from app.config.settings import Settings
from app.errors import TryLater
from app.observability import metrics, tracing
from workers.backfill.fetcher import FollowUp
from workers.celery.consumer import make_consumer
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs

T = TypeVar("T")
Decorator = Callable[[Callable[..., None]], Callable[..., None]]
log = logging.getLogger(__name__)
MAX_RETRY_SECONDS = 30.0


def retry_delay(attempt: int) -> float:
    """Seconds to wait before trying again: doubling from half a second, jittered so that workers do not come at once.

    Never longer than half a minute, because a waiting task sits in the broker under its visibility timeout.
    """
    limit: float = min(MAX_RETRY_SECONDS, 0.5 * 2 ** min(attempt, 10))
    return limit * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


def register(celery: Celery, settings: Settings) -> None:
    """Makes the tasks known to a worker's Celery application, and where it keeps what is no task."""

    @cache
    def work() -> WorkerContext:
        return WorkerContext(celery, settings)

    @cache
    def jobs() -> Jobs:
        return Jobs(work())

    # Shared, which is Celery's default, they would become tasks of every other application in this process too.
    task: Callable[..., Decorator] = partial(celery.task, bind=True, shared=False)
    celery.conf.worker_consumer = make_consumer(lambda raw, why: work().keep(raw, why))

    @task(name=APPLY, max_retries=None)
    def apply(task: Task, *given: Any, **named: Any) -> None:
        """Applies one message of deliveries, and has the history fetched that it announces."""
        packed = given[0] if len(given) == 1 and not named else json.dumps([given, named])
        redelivered = _is_redelivered(task)
        applied = retry_later(task, lambda: work().apply(str(packed), redelivered=redelivered))
        work().enqueue(FollowUp(one, 0) for one in applied.backfills)

    @task(name=DOWNLOAD, max_retries=None)
    def download(task: Task, packed: str) -> None:
        """Fetches one delivery that was only announced, and applies it."""
        redelivered = _is_redelivered(task)
        applied = retry_later(task, lambda: work().downloader.run(packed, redelivered=redelivered))
        work().enqueue(FollowUp(one, 0) for one in applied.backfills)

    @task(name=FETCH, max_retries=None)
    def fetch(task: Task, backfill_id: int) -> None:
        """Goes on with one backfill for a turn."""
        if work().fetches:
            work().enqueue(retry_later(task, lambda: work().fetcher.run(backfill_id)))

    @task(name=SWEEP, max_retries=0)
    def sweep(task: Task) -> None:  # noqa: ARG001
        """Finds work that is due, whatever became of the message that should have brought it."""
        jobs().sweep()

    @task(name=RECONCILE, max_retries=None)
    def reconcile(task: Task) -> None:
        """Goes on with comparing what there should be with what is stored, for a turn."""
        if work().fetches and work().period:
            retry_later(task, jobs().reconcile)


def _is_redelivered(task: Task) -> bool:
    """Whether a worker may have died with this message."""
    redelivered = bool((task.request.delivery_info or {}).get("redelivered"))
    if redelivered:
        metrics.REDELIVERED.inc()
    return redelivered


def retry_later(task: Task, work: Callable[[], T]) -> T:
    """Runs the work; puts the task back if that failed, whatever the reason. Nothing gives up: rows may wait.

    A task that fails is acknowledged, and with it gone for good, so none may. If it cannot be put back either, because
    the broker is away too, Celery would reject and drop it: it is rejected to be given out again.
    """
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the edge of a task
        tracing.record_error(error)
        seconds = retry_delay(task.request.retries)
        reason = str(error) if isinstance(error, TryLater) else f"unforeseen {type(error).__name__}"
        log.warning("%s waits %.1f s: %s", task.name, seconds, reason)
        try:
            options = delay_options(task.app, task.request.delivery_info["routing_key"], seconds)
            raise task.retry(**options, exc=TryLater(reason), argsrepr=task.request.argsrepr, kwargsrepr="{}")
        except Reject as rejected:
            raise Reject(rejected.reason, requeue=True) from None
