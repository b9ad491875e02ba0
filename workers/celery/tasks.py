"""The Celery tasks: a few lines each around a plain function, and their retry policy."""

import logging
import time
from collections.abc import Callable
from functools import cache, partial
from typing import TypedDict, TypeVar

from celery import Celery, Task
from celery.exceptions import Reject
from celery.worker import state

from app.broker.delays import delay_options
from app.broker.lanes import APPLY, DERIVE, DOWNLOAD, FAILURES, FETCH, LOST, NOTIFY, RECONCILE, SWEEP
from app.config.settings import Settings
from app.errors import TryLater, Unprocessable
from app.observability import metrics, tracing
from workers.backfill.fetcher import FollowUp
from workers.celery.consumer import make_consumer
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.celery.retries import count_of, retry_headers, seconds_before
from workers.daily.derive import Deriver
from workers.ingest.outcomes import MAX_LOST, cause_of, failures_after, retry_reason
from workers.notify.sender import Notifier
from workers.store.engine import make_background

T = TypeVar("T")
Decorator = Callable[[Callable[..., None]], Callable[..., None]]
STOP_CHECK_SECONDS = 0.5  # a worker that gets SIGTERM must end within 10 s
log = logging.getLogger(__name__)


def register(celery: Celery, settings: Settings) -> None:
    """Registers the tasks, and a consumer that stores invalid messages as dead letters."""

    @cache
    def context() -> WorkerContext:
        return WorkerContext(celery, settings)

    @cache
    def jobs() -> Jobs:
        return Jobs(context())

    # By default a task is shared, that is, registered with every other Celery application in this process too.
    task: Callable[..., Decorator] = partial(celery.task, bind=True, shared=False)
    celery.conf.worker_consumer = make_consumer(
        lambda raw, reason: context().applier.dead_letter_raw(raw, reason)  # noqa: PLW0108 - creates the context late
    )

    @task(name=APPLY, max_retries=None)
    def apply(task: Task, packed: str) -> None:
        """Applies one message of deliveries and enqueues the backfills that they announce."""
        history = _history(task)
        applied = retry_later(task, lambda: context().apply(packed, **history))
        context().enqueue(FollowUp(one, 0) for one in applied.backfills)

    @task(name=DOWNLOAD, max_retries=None)
    def download(task: Task, packed: str) -> None:
        """Applies one delivery that is large or contains only a URL."""
        history = _history(task)
        applied = retry_later(task, lambda: context().downloader.run(packed, **history))
        context().enqueue(FollowUp(one, 0) for one in applied.backfills)

    @task(name=FETCH, max_retries=None)
    def fetch(task: Task, backfill_id: int) -> None:
        if context().fetches:
            context().enqueue(retry_later(task, lambda: context().fetcher.run(backfill_id)))

    @task(name=SWEEP, max_retries=0)
    def sweep(task: Task) -> None:  # noqa: ARG001
        _run_slice(jobs().sweep, "the sweep", TryLater)

    @task(name=RECONCILE, max_retries=None)
    def reconcile(task: Task) -> None:
        if context().fetches and context().period:
            retry_later(task, jobs().reconcile)

    _register_readers(task, context)


def _register_readers(task: Callable[..., Decorator], context: Callable[[], WorkerContext]) -> None:
    @cache
    def notifier() -> Notifier:
        return Notifier(context().engine, context().settings)

    @cache
    def deriver() -> Deriver:
        return Deriver(make_background(context().settings, "headrace-derive"), context().settings)

    @task(name=NOTIFY, max_retries=0)
    def notify(task: Task) -> None:  # noqa: ARG001
        _run_slice(partial(notifier().run, _is_stopping), "sending notifications", TryLater, Unprocessable)

    @task(name=DERIVE, max_retries=0)
    def derive(task: Task) -> None:  # noqa: ARG001
        _run_slice(partial(deriver().run, _is_stopping), "the computation of days", TryLater, Unprocessable)


def _run_slice(work: Callable[[], object], name: str, *errors: type[Exception]) -> None:
    """Runs work whose rest stays due, so that the task is sent again. An outage is one line of the log.

    Celery would log it as an unexpected error with a traceback, for the sweep every five seconds.
    """
    try:
        work()
    except errors as reason:
        log.warning("%s stopped (%s); the next task continues", name, reason)


class _History(TypedDict):
    """What earlier workers have seen of a message."""

    redelivered: bool  # an earlier worker, or PostgreSQL's process, may have crashed while processing it
    failures: int  # its tries that PostgreSQL did not execute


def _history(task: Task) -> _History:
    redelivered = bool((task.request.delivery_info or {}).get("redelivered"))
    if redelivered:
        metrics.REDELIVERED.inc()
    headers = task.request.headers
    return {"redelivered": redelivered or count_of(headers, LOST) >= MAX_LOST, "failures": count_of(headers, FAILURES)}


def retry_later(task: Task, work: Callable[[], T]) -> T:
    """Runs the work; on any error, enqueues the task again with a delay. There is no retry limit.

    Celery acknowledges a task that fails, so its message would be lost. While the retry cannot be enqueued because the
    broker accepts no messages, the work is repeated here. A message that is returned to the broker instead is
    redelivered at once, and RabbitMQ 4 drops it after 20 returns.
    """
    while True:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the edge of a task
            seconds = _enqueue_retry(task, error)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if _is_stopping():
                raise Reject("the worker stops", requeue=True)
            time.sleep(min(left, STOP_CHECK_SECONDS))


def _is_stopping() -> bool:
    """Whether the worker got a signal to stop. Celery sets an exit code, which may be 0."""
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))


def _enqueue_retry(task: Task, error: Exception) -> float:
    """Raises Retry, which ends the task. Returns the delay in seconds if the broker does not accept the retry."""
    tracing.record_error(error)
    metrics.RETRIES.labels(task.name, cause_of(error)).inc()
    request, reason = task.request, retry_reason(error)
    seconds = seconds_before(request.retries)
    log.warning("%s is retried in %.1f s: %s", task.name, seconds, reason)
    failures = failures_after(count_of(request.headers, FAILURES), error)
    options = delay_options(task.app, request.delivery_info["routing_key"], seconds)
    options |= {"headers": retry_headers(request.headers, failures, error)}
    try:
        raise task.retry(**options, exc=TryLater(reason), argsrepr=request.argsrepr, kwargsrepr="{}")
    except Reject as rejected:
        what = type(rejected.reason).__name__
        log.warning("%s cannot be enqueued and is repeated by this worker (%s)", task.name, what)
    return seconds
