"""What `celery -A workers.celery_app` and Flower load: the Celery application of a worker, its tasks and its log."""

import time
from pathlib import Path
from typing import Any

from celery import Task, signals

from app import log, metrics
from app.config import load
from app.queue import SENT_AT, SWEEP, make_celery
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


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
@signals.beat_init.connect  # type: ignore[untyped-decorator]
def _tell_ready(**_: Any) -> None:
    """Tells the supervisor that this process takes work, and whoever asks what it has counted."""
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    if settings.ready_file:
        Path(settings.ready_file).touch()


@signals.before_task_publish.connect  # type: ignore[untyped-decorator]
def _say_when(sender: str, headers: dict[str, Any], **_: Any) -> None:
    """By this a lane knows how long its next message has waited."""
    headers[SENT_AT] = time.time()
    metrics.PUBLISHED.labels(sender).inc()


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def _begin(task: Task, **_: Any) -> None:
    task.request.began = time.monotonic()
    log.bind(task=task.name, task_id=task.request.id)


@signals.task_postrun.connect  # type: ignore[untyped-decorator]
def _end(task: Task, state: str | None = None, **_: Any) -> None:
    metrics.TASK_SECONDS.labels(task.name).observe(time.monotonic() - task.request.began)
    metrics.TASKS.labels(task.name, state or "REJECTED").inc()
    log.bind()
