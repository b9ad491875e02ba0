"""Heartbeats of a worker during a task: Celery's events, AMQP's heartbeats, and Redis' visibility timeout.

Celery sends heartbeats from its event loop, which the pool `solo` blocks during a task. Without the events, Flower
shows a worker as offline while it works. Without the others, a task that takes longer than two AMQP heartbeats or
HEADRACE_VISIBILITY_TIMEOUT_SECONDS would be redelivered, and run on two workers at a time.
"""

import logging
import time
from threading import Event, Lock, Thread
from typing import Any

from celery import signals
from celery.utils.sysinfo import load_average
from celery.worker import state
from celery.worker.consumer import Consumer

from app.broker.redis_transport import QoS

INTERVAL_SECONDS = 8.0  # between two heartbeats of the event loop; Flower shows a worker as offline after 16 s
TICK_SECONDS = 2.0  # of the thread: an AMQP heartbeat is due every 3 s
# After this a task counts as stuck, and its message is redelivered after the visibility timeout. The longest statement
# may take 45 s, and an event of 60 MB has about 30 of them.
MAX_TASK_SECONDS = 1800.0
log = logging.getLogger(__name__)


class TaskHeartbeats:
    """A thread that works while a task runs: it sends heartbeats and extends the visibility timeout.

    Heartbeats use the connections of the event loop. The thread sends them only during a task, because the
    connections must not be used by two threads at a time and the event loop is blocked then. Rejected: with a longer
    interval, a killed worker would be shown as online for minutes; a connection of the thread's own would double the
    broker's connections; a longer visibility timeout would delay a killed worker's message.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._began: float | None = None
        self._lost: Any = None  # the channel of an AMQP connection that was lost during a task
        self._has_task = Event()
        self._lock = Lock()
        qos = getattr(consumer.task_consumer.channel, "qos", None)  # AMQP channels have none
        self._tick = min(TICK_SECONDS, qos.visibility_timeout / 4) if isinstance(qos, QoS) else TICK_SECONDS

    def start(self) -> None:
        """Starts the thread, which ends with the process. It sleeps while no task runs."""
        signals.task_prerun.connect(self._begin, weak=False)
        signals.task_postrun.connect(self._end, weak=False)
        Thread(target=self._run, name="heartbeats", daemon=True).start()

    def _begin(self, **_: Any) -> None:
        self._began = time.monotonic()
        self._has_task.set()

    def _end(self, **_: Any) -> None:
        with self._lock:  # waits for a heartbeat that is being sent
            self._began = None

    def _run(self) -> None:
        while self._has_task.wait():
            time.sleep(self._tick)
            self._has_task.clear()  # before the look: a task that begins after it sets the event again
            with self._lock:
                if self._began is not None:
                    self._has_task.set()
                    self._send()
                    if time.monotonic() - self._began < MAX_TASK_SECONDS:
                        self._extend()

    def _send(self) -> None:
        """Sends the fields of Celery's own heartbeats. Celery keeps the event if the broker is down."""
        active, processed = len(state.active_requests), state.all_total_count[0]
        self._consumer.event_dispatcher.send(
            "worker-heartbeat",
            freq=INTERVAL_SECONDS,
            active=active,
            processed=processed,
            loadavg=load_average(),
            **state.SOFTWARE_INFO,
        )

    def _extend(self) -> None:
        """Keeps the message of the task: RabbitMQ and Redis redeliver it if the worker is silent for too long."""
        channel = self._consumer.task_consumer.channel
        qos = getattr(channel, "qos", None)
        try:
            if isinstance(qos, QoS):
                qos.extend()
            elif channel.connection is not None and channel is not self._lost:
                channel.connection.send_heartbeat()
                # The connection is not read during a task. Afterwards the event loop would think that the broker was
                # silent, and close it.
                channel.connection.prev_recv = None
        except (*self._consumer.connection_errors, *self._consumer.channel_errors) as error:
            self._lost = channel  # the event loop opens another connection after the task
            log.warning("cannot keep the message of a running task: %s", type(error).__name__)


def start_heartbeats(sender: Consumer, **_: Any) -> None:
    TaskHeartbeats(sender).start()
