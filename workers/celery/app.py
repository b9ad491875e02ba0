"""The Celery application with its tasks, and the processes that run it: worker and beat."""

import os
import socket
import time
from contextlib import ExitStack
from typing import Any

from celery import Celery, Task, signals
from celery.worker.consumer import Consumer

from app.broker.celery import make_celery
from app.broker.lanes import SENT_AT, SWEEP, messaging_system
from app.config.settings import Settings
from app.observability import gc, logs, metrics, tracing
from app.observability.ready import mark_ready
from workers.celery import sequencing
from workers.celery.delayed import start_delayed_messages
from workers.celery.heartbeats import INTERVAL_SECONDS, start_heartbeats
from workers.celery.sequencing import SequencerThread
from workers.celery.tasks import register


def make_app(settings: Settings) -> Celery:
    """The application with its tasks and its schedule. It does not connect yet."""
    celery = make_celery(settings, "worker")
    celery.conf.beat_schedule = {
        "sweep": {"task": SWEEP, "schedule": 5.0, "options": {"queue": "maintenance", "expires": 15}},
    }
    register(celery, settings)
    return celery


def run_worker(settings: Settings, lane: str) -> int:
    """Runs a worker of the lane until SIGTERM. Returns the exit status.

    Celery's command line would load Flower and every other command: 0.25 s of CPU and 12 MB per process.
    """
    _connect_signals(settings)
    # The pool `solo` runs one task at a time; `concurrency` is its prefetch count, by default the number of cores.
    worker = make_app(settings).Worker(
        hostname=f"{lane}.{os.getpid()}@{socket.gethostname()}",
        queues=[lane],
        pool_cls="solo",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        heartbeat_interval=INTERVAL_SECONDS,
        loglevel=settings.log_level,
    )
    worker.start()
    return int(worker.exitcode or 0)


def run_beat(settings: Settings) -> None:
    """Runs beat until SIGTERM. The schedule is in memory only, because a sweep processes all work that is due."""
    _connect_signals(settings)
    make_app(settings).Beat(scheduler="celery.beat:Scheduler", loglevel=settings.log_level).run()


def _connect_signals(settings: Settings) -> None:
    """Connects the handlers for logs, metrics and traces of this process, and those that start its threads."""

    def configure_logs(**_: Any) -> None:
        # Celery's own log configuration would print task arguments.
        logs.configure(settings)

    def start_tracing(sender: Any, **_: Any) -> None:
        tracing.start(settings, sender.hostname.partition(".")[0], messaging_system(settings))

    def mark_process_ready(**_: Any) -> None:
        gc.freeze()
        mark_ready(settings)

    def start_sequencer(sender: Consumer, **_: Any) -> None:
        (lane,) = sender.app.amqp.queues.consume_from
        if lane == sequencing.LANE:
            SequencerThread(sender.app, settings, sequencing.readers()).start()

    for signal, handler in (
        (signals.setup_logging, configure_logs),
        (signals.worker_init, start_tracing),
        (signals.worker_shutdown, lambda **_: tracing.stop()),
        (signals.worker_ready, mark_process_ready),
        (signals.worker_ready, start_heartbeats),
        (signals.worker_ready, start_delayed_messages),
        (signals.worker_ready, start_sequencer),
        (signals.beat_init, mark_process_ready),
        (signals.before_task_publish, _add_headers),
        (signals.task_prerun, _begin),
        (signals.task_postrun, _end),
    ):
        signal.connect(handler, weak=False)


def _add_headers(sender: str, headers: dict[str, Any], **_: Any) -> None:
    """Adds the time, from which the age of a lane's oldest message is computed, and the trace context."""
    headers |= {SENT_AT: time.time(), **tracing.inject()}
    metrics.PUBLISHED.labels(sender).inc()


def _begin(task: Task, **_: Any) -> None:
    request = task.request
    lane = (request.delivery_info or {}).get("routing_key", "")
    request.began, request.resources = time.monotonic(), ExitStack()
    request.resources.enter_context(tracing.consumer_span(task.name, lane, request.id, request.headers))
    logs.bind(task=task.name, task_id=request.id)


def _end(task: Task, state: str | None = None, **_: Any) -> None:
    state = state or "REJECTED"
    metrics.TASK_SECONDS.labels(task.name).observe(time.monotonic() - task.request.began)
    metrics.TASKS.labels(task.name, state).inc()
    tracing.set_attributes(state=state)
    task.request.resources.close()
    logs.bind()
