"""The Celery application of a worker, and how a worker process and beat run it."""

import os
import socket
import time
from contextlib import ExitStack
from typing import Any

from celery import Celery, Task, signals

from app.broker.celery import make_celery
from app.broker.lanes import SENT_AT, SWEEP, messaging_system
from app.config.settings import Settings
from app.observability import gc, logs, metrics, tracing
from app.observability.ready import mark_ready
from workers.celery.tasks import register


def make_app(settings: Settings) -> Celery:
    """The application with its tasks and its schedule. Nothing connects yet."""
    celery = make_celery(settings, "worker")
    celery.conf.beat_schedule = {
        "sweep": {"task": SWEEP, "schedule": 5.0, "options": {"queue": "maintenance", "expires": 15}},
    }
    register(celery, settings)
    return celery


def run_worker(settings: Settings, lane: str) -> int:
    """Works on a lane until SIGTERM. Returns the exit status.

    Not by Celery's command line, which loads Flower and every other command: 0.25 s of CPU and 12 MB a process.
    """
    _observe(settings)
    # The pool `solo` runs one task at a time; the concurrency is what is fetched ahead, by default a message per core.
    worker = make_app(settings).Worker(
        hostname=f"{lane}.{os.getpid()}@{socket.gethostname()}",
        queues=[lane],
        pool_cls="solo",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        loglevel=settings.log_level,
    )
    worker.start()
    return int(worker.exitcode or 0)


def run_beat(settings: Settings) -> None:
    """Sends what is due until SIGTERM. The schedule is in memory: each job looks for all that is due."""
    _observe(settings)
    make_app(settings).Beat(scheduler="celery.beat:Scheduler", loglevel=settings.log_level).run()


def _observe(settings: Settings) -> None:
    """Connects the signals that log, measure and trace what this process does."""

    def configure_logs(**_: Any) -> None:
        """Our format instead of Celery's, whose messages quote task arguments."""
        logs.configure(settings)

    def start_tracing(sender: Any, **_: Any) -> None:
        """Of workers alone: beat only sends tasks."""
        tracing.start(settings, sender.hostname.partition(".")[0], messaging_system(settings))

    def mark_process_ready(**_: Any) -> None:
        gc.freeze()
        mark_ready(settings)

    for signal, handler in (
        (signals.setup_logging, configure_logs),
        (signals.worker_init, start_tracing),
        (signals.worker_shutdown, _stop_tracing),
        (signals.worker_ready, mark_process_ready),
        (signals.beat_init, mark_process_ready),
        (signals.before_task_publish, _add_headers),
        (signals.task_prerun, _begin),
        (signals.task_postrun, _end),
    ):
        signal.connect(handler, weak=False)


def _stop_tracing(**_: Any) -> None:
    tracing.stop()


def _add_headers(sender: str, headers: dict[str, Any], **_: Any) -> None:
    """When a message was sent, from which its lane's age is read, and the trace it belongs to."""
    headers |= {SENT_AT: time.time(), **tracing.inject()}
    metrics.PUBLISHED.labels(sender).inc()


def _begin(task: Task, **_: Any) -> None:
    task.request.began = time.monotonic()
    task.request.at_hand = ExitStack()
    lane = (task.request.delivery_info or {}).get("routing_key", "")
    task.request.at_hand.enter_context(tracing.consumer_span(task.name, lane, task.request.id, task.request.headers))
    logs.bind(task=task.name, task_id=task.request.id)


def _end(task: Task, state: str | None = None, **_: Any) -> None:
    metrics.TASK_SECONDS.labels(task.name).observe(time.monotonic() - task.request.began)
    metrics.TASKS.labels(task.name, state or "REJECTED").inc()
    tracing.set_attributes(state=state or "REJECTED")
    task.request.at_hand.close()
    logs.bind()
