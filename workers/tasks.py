"""Every Celery task: a shell of a few lines around a plain function, with the retry decision in one place."""

import logging
import random
from functools import cache
from typing import Any

from celery import Celery, Task

from app.config import Settings
from app.errors import TryLater
from app.queue import APPLY, SWEEP
from workers.apply import Applier
from workers.store.engine import make_writer

log = logging.getLogger(__name__)
LONGEST_PAUSE_SECONDS = 30.0


def pause_before(attempt: int) -> float:
    """Seconds to wait before trying again: doubling from half a second, jittered so that workers do not come at once.

    Never longer than half a minute, because a waiting task sits in the broker under its visibility timeout.
    """
    longest: float = min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** min(attempt, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


def register(celery: Celery, settings: Settings) -> None:
    """Makes the tasks known to a worker's Celery application."""

    @cache
    def applier() -> Applier:
        # Made by the first task and not on import: pools must not be shared over a fork.
        return Applier(make_writer(settings), settings)

    @celery.task(name=APPLY, bind=True, max_retries=None)  # type: ignore[untyped-decorator]
    def apply(task: Task, packed: str) -> None:
        """Applies one message of deliveries."""
        again_later(task, lambda: applier().apply(packed))

    @celery.task(name=SWEEP, bind=True, max_retries=0)  # type: ignore[untyped-decorator]
    def sweep(task: Task) -> None:
        """Looks for work that is due."""


def again_later(task: Task, work: Any) -> None:
    """Runs the work; puts the task back where something it depends on is away. Nothing gives up: rows may wait."""
    try:
        work()
    except TryLater as reason:
        seconds = pause_before(task.request.retries)
        log.warning("%s waits %.1f s: %s", task.name, seconds, reason)
        raise task.retry(countdown=seconds, exc=reason, argsrepr=task.request.argsrepr, kwargsrepr="{}") from None
