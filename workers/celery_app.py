"""What `celery -A workers.celery_app` and Flower load: the Celery application of a worker, its tasks and its log."""

import time
from contextlib import ExitStack
from typing import Any

from celery import Task, signals

from app import heap, log, metrics, tracing
from app.config import load
from app.queue import SENT_AT, SWEEP, make_celery, system
from workers.ready import tell_ready
from workers.tasks import register

settings = load()
celery = make_celery(settings, "worker")
celery.conf.beat_schedule = {
    "sweep": {"task": SWEEP, "schedule": 5.0, "options": {"queue": "maintenance", "expires": 15}},
}
register(celery, settings)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _our_log(**_: Any) -> None:
    """Our format instead of Celery's, whose messages quote task arguments."""
    log.configure(settings)


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _trace(sender: Any, **_: Any) -> None:
    """Of workers alone, whose names begin with their lane: beat only sends what they do, and Flower only looks."""
    tracing.start(settings, sender.hostname.partition(".")[0], system(settings))


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _trace_no_more(**_: Any) -> None:
    tracing.stop()


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
@signals.beat_init.connect  # type: ignore[untyped-decorator]
def _tell_ready(**_: Any) -> None:
    heap.keep()
    tell_ready(settings)


@signals.before_task_publish.connect  # type: ignore[untyped-decorator]
def _say_when(sender: str, headers: dict[str, Any], **_: Any) -> None:
    """By this a lane knows how long its next message has waited, and its work from where it came."""
    headers |= {SENT_AT: time.time(), **tracing.carried()}
    metrics.PUBLISHED.labels(sender).inc()


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def _begin(task: Task, **_: Any) -> None:
    task.request.began = time.monotonic()
    task.request.at_hand = ExitStack()
    lane = (task.request.delivery_info or {}).get("routing_key", "")
    task.request.at_hand.enter_context(tracing.processing(task.name, lane, task.request.id, task.request.headers))
    log.bind(task=task.name, task_id=task.request.id)


@signals.task_postrun.connect  # type: ignore[untyped-decorator]
def _end(task: Task, state: str | None = None, **_: Any) -> None:
    metrics.TASK_SECONDS.labels(task.name).observe(time.monotonic() - task.request.began)
    metrics.TASKS.labels(task.name, state or "REJECTED").inc()
    tracing.tell(state=state or "REJECTED")
    task.request.at_hand.close()
    log.bind()
