"""Numbers the change feed in a thread of each worker of the lane `notify`. It also starts the tasks that read the feed.

Not a task, because one every quarter of a second would cost four durable messages a second; not a process, because that
costs 15 MB more.
"""

import logging
import time
from threading import Thread

from celery import Celery
from kombu.exceptions import OperationalError

from app.broker.lanes import DERIVE, NOTIFY
from app.config.settings import Settings
from app.errors import TryLater, Unprocessable
from app.observability import metrics
from workers.daily import follow
from workers.store import notifications
from workers.store.engine import SESSION, make_engine
from workers.store.feed import IsDue, Sequencer

LANE = "notify"
BUSY_SECONDS, IDLE_SECONDS = 0.1, 0.4  # between two passes; a change is readable within 1 s of its commit
EVERYTHING_SECONDS = 60.0  # between two passes that read the whole outbox
CHECK_SECONDS = 2.0  # between two queries for work that is due without a new change
MESSAGE_SECONDS = 5  # a message that waits longer expires: the next one follows
PAUSE_SECONDS = 2.0  # after an error
log = logging.getLogger(__name__)


class SequencerThread:
    """Runs the sequencer, and sends a task to its lane if there is work for it."""

    def __init__(self, celery: Celery, settings: Settings, tasks: dict[str, tuple[str, IsDue]]) -> None:
        """`tasks` has the lane of each task, and the query that says whether it has work."""
        # A pass over a long outbox may take longer than a worker's statement.
        self.engine = make_engine(settings, "headrace-feed", {**SESSION, "statement_timeout": "10min"})
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")  # one round trip per query
        self._celery, self._tasks = celery, tasks
        self._sequencer = Sequencer(self.engine)
        self._full_at = self._check_at = self._send_at = 0.0

    def start(self) -> None:
        Thread(target=self._run, name="sequencer", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                numbered = self.step(time.monotonic())
            except (TryLater, Unprocessable) as error:
                log.warning("the change feed waits, the next attempt is in %.0f s: %s", PAUSE_SECONDS, error)
                time.sleep(PAUSE_SECONDS)
            else:
                time.sleep(BUSY_SECONDS if numbered else IDLE_SECONDS)

    def step(self, now: float) -> int:
        """Numbers committed changes and sends tasks. Returns the number of changes.

        An outage of the broker pauses only the tasks: programs that follow the feed still get the changes.
        """
        everything = now >= self._full_at
        numbered = self._sequencer.run(everything=everything)
        if everything:
            self._full_at = now + EVERYTHING_SECONDS
        if numbered:
            metrics.CHANGES.inc(numbered)
        if now >= self._send_at and (numbered or now >= self._check_at):
            self._check_at = now + CHECK_SECONDS
            try:
                self._send_tasks()
            except OperationalError as error:
                log.warning("cannot start the readers of the change feed (%s)", type(error).__name__)
                self._send_at = now + PAUSE_SECONDS
        return numbered

    def _send_tasks(self) -> None:
        for task, (lane, is_due) in self._tasks.items():
            if is_due(self._autocommit):
                self._celery.send_task(task, queue=lane, expires=MESSAGE_SECONDS)


def readers() -> dict[str, tuple[str, IsDue]]:
    """The tasks that read the change feed."""
    return {NOTIFY: ("notify", notifications.is_due), DERIVE: ("derive", follow.is_due)}
