"""Every Celery task: a shell of a few lines around a plain function, with the retry decision in one place."""

import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache, cached_property
from typing import Any, TypeVar

from celery import Celery, Task
from celery.exceptions import Reject
from kombu.exceptions import OperationalError
from sqlalchemy import Engine

from app import metrics, tracing
from app.config import Settings
from app.delivery import Delivery, pack
from app.errors import TryLater
from app.queue import APPLY, DOWNLOAD, FETCH, RECONCILE, SWEEP, after
from workers.apply import Applied, Applier
from workers.asking import account, accounts
from workers.backfill import Again, Fetcher
from workers.broker import lanes, take_foreign
from workers.consumer import consumer_that_keeps
from workers.download import Downloader
from workers.http import Files
from workers.observed import Observer
from workers.reconcile import ACCOUNT as COMPARED
from workers.reconcile import CHORE, Reconciler, turn
from workers.store import retention
from workers.store.backfills import due
from workers.store.chores import SWEPT, claim, mark, plan, save
from workers.store.engine import make_writer
from workers.store.kept import tend

T = TypeVar("T")
log = logging.getLogger(__name__)
LONGEST_PAUSE_SECONDS = 30.0
LONGEST_COUNTDOWN_SECONDS = 50.0
TEND, TEND_SECONDS = "tend", 6 * 3600.0
RETAIN, RETAIN_SECONDS, RETAIN_TURN_SECONDS = "retain", 6 * 3600.0, 20.0
MOST_WAITING = 500  # messages of the backfill lane that a sweep fills it up to


def pause_before(attempt: int) -> float:
    """Seconds to wait before trying again: doubling from half a second, jittered so that workers do not come at once.

    Never longer than half a minute, because a waiting task sits in the broker under its visibility timeout.
    """
    longest: float = min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** min(attempt, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


class Work:
    """What the tasks of a process share. Made by the first task and not on import: pools do not survive a fork."""

    def __init__(self, celery: Celery, settings: Settings, name: str = "headrace-worker") -> None:
        self.engine: Engine = make_writer(settings, name)
        self.applier = Applier(self.engine, settings)
        self.fetches = bool(settings.readable) and settings.fetch_history
        # Terra has nothing to compare with: it does not tell what it has.
        self.period = settings.reconcile_hours * 3600.0 if settings.junction_api_key else 0.0
        self._observer = Observer(self.engine, settings)
        self._celery, self._settings = celery, settings
        self._lane = next(queue for queue in celery.conf.task_queues if queue.name == "backfill")

    @cached_property
    def fetcher(self) -> Fetcher:
        """What reads history; only a worker of its lane needs one."""
        return Fetcher(self.engine, self._settings, accounts(self._settings))

    @cached_property
    def reconciler(self) -> Reconciler:
        """What compares it; as above."""
        return Reconciler(self.engine, self._settings, account(COMPARED, self._settings))

    @cached_property
    def downloader(self) -> Downloader:
        """What fetches events that were only announced; only a worker of its lane needs one."""
        return Downloader(
            self.applier, self._settings, Files(self._settings.download_hosts, self._settings.max_download_bytes)
        )

    def apply(self, packed: str, *, again: bool) -> Applied:
        """Applies a message, and hands on what is to be fetched first. Raises TryLater."""
        applied = self.applier.apply(packed, again=again)
        for delivery in applied.elsewhere:
            self._hand_on(delivery)
        return applied

    def _hand_on(self, announced: Delivery) -> None:
        """Puts it on its lane before its own message is acknowledged: it is in no table yet."""
        try:
            self._celery.send_task(
                DOWNLOAD, args=(pack([announced]),), queue="download", argsrepr="(1 announcement)", kwargsrepr="{}"
            )
        except OperationalError as error:
            raise TryLater(f"BROKER_URL: the broker does not take it ({type(error).__name__})") from None

    def enqueue(self, again: Iterable[Again]) -> None:
        """Has backfills gone on with. What must wait longer, or is not taken, stays a row, and the sweep finds it."""
        for one in again:
            soon = self.fetches and one.seconds <= LONGEST_COUNTDOWN_SECONDS
            if soon and not self._send(FETCH, (one.backfill_id,), one.seconds):
                return  # a broker that is frozen costs seconds each time

    def keep(self, raw: bytes, reason: str) -> None:
        """Keeps what came from the broker and is no task."""
        self.applier.set_aside(raw, reason)

    def sweep(self) -> None:
        """Enqueues what is due, whatever became of the message that should have brought it.

        No more than the lane can take: a sweep that comes before the last one's messages were worked on adds nothing.
        """
        found = lanes(self._celery, self._settings)
        (lane,) = (one for one in found if one.name == self._lane.name)
        if self.fetches and lane.messages < MOST_WAITING:
            self.enqueue(Again(one, 0) for one in self._due(MOST_WAITING - lane.messages))
            if self.period and plan(self.engine, CHORE, self.period):
                self._send(RECONCILE, (), 0)
        take_foreign(self._settings, self.applier.set_aside)
        self._tend()
        self._retain()
        mark(self.engine, SWEPT)
        self._observer.look(found)

    def _due(self, most: int) -> list[int]:
        return due(self.engine, of=self._settings.readable, most=most)

    def _tend(self) -> None:
        """Makes and drops the partitions of kept deliveries, a few times a day."""
        if plan(self.engine, TEND, TEND_SECONDS) and claim(self.engine, TEND):
            for name in tend(self.engine, self._settings.keep_days):
                log.info("dropped %s: older than HEADRACE_KEEP_DAYS", name)
            save(self.engine, TEND, None, TEND_SECONDS)

    def _retain(self) -> None:
        """Removes what is older than HEADRACE_RETENTION, for a turn; what is left then waits for the next sweep."""
        edges = retention.limits(self._settings, datetime.now(UTC))
        if not edges or not plan(self.engine, RETAIN, 0) or not claim(self.engine, RETAIN):
            return
        ends, pause = time.monotonic() + RETAIN_TURN_SECONDS, RETAIN_SECONDS
        for name, gone in retention.remove(self.engine, edges):
            log.info("removed %d rows of %s: older than HEADRACE_RETENTION", gone, name)
            if time.monotonic() > ends:
                pause = 0.0
                break
        save(self.engine, RETAIN, None, pause)

    def reconcile(self) -> None:
        """Goes on with the reconciliation, and comes back to it soon if it is not at its end."""
        seconds = turn(self.engine, self.reconciler, self.period)
        if seconds is not None and seconds <= LONGEST_COUNTDOWN_SECONDS:
            self._send(RECONCILE, (), seconds)

    def _send(self, task: str, arguments: tuple[int, ...], seconds: float) -> bool:
        try:
            options = {"queue": self._lane} | after(self._celery, self._lane.name, seconds)
            self._celery.send_task(task, args=arguments, **options)
        except OperationalError as error:
            log.warning("%s could not be enqueued (%s); the sweep will find it", task, type(error).__name__)
            return False
        return True


def register(celery: Celery, settings: Settings) -> None:
    """Makes the tasks known to a worker's Celery application, and where it keeps what is no task."""

    @cache
    def work() -> Work:
        return Work(celery, settings)

    celery.conf.worker_consumer = consumer_that_keeps(lambda raw, why: work().keep(raw, why))

    @celery.task(name=APPLY, bind=True, max_retries=None)  # type: ignore[untyped-decorator]
    def apply(task: Task, *given: Any, **named: Any) -> None:
        """Applies one message of deliveries, and has the history fetched that it announces."""
        packed = given[0] if len(given) == 1 and not named else json.dumps([given, named])
        again = _is_given_again(task)
        applied = again_later(task, lambda: work().apply(str(packed), again=again))
        work().enqueue(Again(one, 0) for one in applied.backfills)

    @celery.task(name=DOWNLOAD, bind=True, max_retries=None)  # type: ignore[untyped-decorator]
    def download(task: Task, packed: str) -> None:
        """Fetches one delivery that was only announced, and applies it."""
        again = _is_given_again(task)
        applied = again_later(task, lambda: work().downloader.run(packed, again=again))
        work().enqueue(Again(one, 0) for one in applied.backfills)

    @celery.task(name=FETCH, bind=True, max_retries=None)  # type: ignore[untyped-decorator]
    def fetch(task: Task, backfill_id: int) -> None:
        """Goes on with one backfill for a turn."""
        if work().fetches:
            work().enqueue(again_later(task, lambda: work().fetcher.run(backfill_id)))

    @celery.task(name=SWEEP, bind=True, max_retries=0)  # type: ignore[untyped-decorator]
    def sweep(task: Task) -> None:  # noqa: ARG001
        """Finds work that is due, whatever became of the message that should have brought it."""
        work().sweep()

    @celery.task(name=RECONCILE, bind=True, max_retries=None)  # type: ignore[untyped-decorator]
    def reconcile(task: Task) -> None:
        """Goes on with comparing what there should be with what is stored, for a turn."""
        if work().fetches and work().period:
            again_later(task, work().reconcile)


def _is_given_again(task: Task) -> bool:
    """Whether a worker may have died with this message."""
    again = bool((task.request.delivery_info or {}).get("redelivered"))
    if again:
        metrics.REDELIVERED.inc()
    return again


def again_later(task: Task, work: Callable[[], T]) -> T:
    """Runs the work; puts the task back if that failed, whatever the reason. Nothing gives up: rows may wait.

    A task that fails is acknowledged, and with it gone for good, so none may. If it cannot be put back either, because
    the broker is away too, Celery would reject and drop it: it is rejected to be given out again.
    """
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the edge of a task
        tracing.failed(error)
        seconds = pause_before(task.request.retries)
        reason = str(error) if isinstance(error, TryLater) else f"unforeseen {type(error).__name__}"
        log.warning("%s waits %.1f s: %s", task.name, seconds, reason)
        try:
            options = after(task.app, task.request.delivery_info["routing_key"], seconds)
            raise task.retry(**options, exc=TryLater(reason), argsrepr=task.request.argsrepr, kwargsrepr="{}")
        except Reject as rejected:
            raise Reject(rejected.reason, requeue=True) from None
