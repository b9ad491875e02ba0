"""What `python -P -m workers.celery` and Flower load: the Celery application of a worker, its tasks and its log."""

import time
from contextlib import ExitStack
from typing import Any

from celery import Task, signals

from app.broker.celery import make_celery
from app.broker.lanes import SENT_AT, SWEEP, messaging_system
from app.config.settings import load
from app.observability import gc, logs, metrics, tracing
from app.observability.ready import mark_ready
from workers.celery.tasks import register

APP = f"{__name__}:celery"  # how Celery's command line is told of it
settings = load()
celery = make_celery(settings, "worker")
celery.conf.beat_schedule = {
    "sweep": {"task": SWEEP, "schedule": 5.0, "options": {"queue": "maintenance", "expires": 15}},
}
register(celery, settings)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _our_log(**_: Any) -> None:
    """Our format instead of Celery's, whose messages quote task arguments."""
    logs.configure(settings)


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _trace(sender: Any, **_: Any) -> None:
    """Of workers alone, whose names begin with their lane: beat only sends what they do, and Flower only looks."""
    tracing.start(settings, sender.hostname.partition(".")[0], messaging_system(settings))


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _trace_no_more(**_: Any) -> None:
    tracing.stop()


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
@signals.beat_init.connect  # type: ignore[untyped-decorator]
def _mark_process_ready(**_: Any) -> None:
    gc.freeze()
    mark_ready(settings)


@signals.before_task_publish.connect  # type: ignore[untyped-decorator]
def _say_when(sender: str, headers: dict[str, Any], **_: Any) -> None:
    """By this a lane knows how long its next message has waited, and its work from where it came."""
    headers |= {SENT_AT: time.time(), **tracing.inject()}
    metrics.PUBLISHED.labels(sender).inc()


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def _begin(task: Task, **_: Any) -> None:
    task.request.began = time.monotonic()
    task.request.at_hand = ExitStack()
    lane = (task.request.delivery_info or {}).get("routing_key", "")
    task.request.at_hand.enter_context(tracing.consumer_span(task.name, lane, task.request.id, task.request.headers))
    logs.bind(task=task.name, task_id=task.request.id)


@signals.task_postrun.connect  # type: ignore[untyped-decorator]
def _end(task: Task, state: str | None = None, **_: Any) -> None:
    metrics.TASK_SECONDS.labels(task.name).observe(time.monotonic() - task.request.began)
    metrics.TASKS.labels(task.name, state or "REJECTED").inc()
    tracing.set_attributes(state=state or "REJECTED")
    task.request.at_hand.close()
    logs.bind()
