"""Heartbeat events of a worker during a task. Without them Flower shows a worker as offline while it works.

Celery sends heartbeats from its event loop, which the pool `solo` blocks during a task.
"""

import time
from threading import Lock, Thread
from typing import Any

from celery import signals
from celery.utils.sysinfo import load_average
from celery.worker import state
from celery.worker.consumer import Consumer

INTERVAL_SECONDS = 4.0  # between two heartbeats of the event loop; Flower shows a worker as offline after 8 s
TICK_SECONDS = INTERVAL_SECONDS / 2  # of the thread: a task may begin right before the event loop's next heartbeat


class TaskHeartbeats:
    """A thread that sends the worker's heartbeats while a task runs, on the connection of its other events.

    It sends only during a task, because the connection must not be used by two threads at a time and the event loop is
    blocked then. A longer interval instead would show a killed worker as online for minutes; a connection of its own
    would double the broker's connections.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._is_in_task, self._lock = False, Lock()

    def start(self) -> None:
        """Starts the thread, which ends with the process. It costs one wake-up every two seconds."""
        signals.task_prerun.connect(self._begin, weak=False)
        signals.task_postrun.connect(self._end, weak=False)
        Thread(target=self._run, name="heartbeats", daemon=True).start()

    def _begin(self, **_: Any) -> None:
        self._is_in_task = True

    def _end(self, **_: Any) -> None:
        with self._lock:  # waits for a heartbeat that is being sent
            self._is_in_task = False

    def _run(self) -> None:
        while True:
            time.sleep(TICK_SECONDS)
            with self._lock:
                if self._is_in_task:
                    self._send()

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


def start_heartbeats(sender: Consumer, **_: Any) -> None:
    """The handler of the signal `worker_ready`."""
    TaskHeartbeats(sender).start()
