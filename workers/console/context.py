"""Shared by the pages: the settings, the database, and a recent snapshot of the installation."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flask import current_app
from sqlalchemy import Engine

from app.config.settings import Settings
from workers.console.lockout import Lockout
from workers.console.sessions import Sessions
from workers.operate.health import Status
from workers.operate.watch_view import Watcher
from workers.store import audit
from workers.store.engine import make_engine, make_writer

THREADS = 3  # requests at once, each with one connection of the pool
STATEMENT_TIMEOUT = "5s"  # of the pages' queries, which read at most a few hundred rows
FRESH_SECONDS, STALE_SECONDS = 5.0, 30.0  # the ages from which a status is refreshed, and is not shown
MAX_WAIT_SECONDS = 10.0


class StatusCache:
    """The newest status of the installation, which a thread refreshes after a page has asked for it.

    Counting a large ledger takes seconds, and so does the timeout of an unreachable broker, so a page waits for a
    refresh only if the newest status is stale.
    """

    def __init__(self, read: Callable[[], Status]) -> None:
        self._read, self._lock = read, threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._newest: Status | None = None
        self._read_at = -math.inf
        self._running: Future[None] | None = None

    def status(self) -> Status | None:
        """The newest status, at most STALE_SECONDS old; None if reading it takes longer than a page waits.

        Raises the error of a refresh that it waits for.
        """
        with self._lock:
            age = time.monotonic() - self._read_at
            if age >= FRESH_SECONDS and (self._running is None or self._running.done()):
                self._running = self._thread.submit(self._refresh)
            running = self._running
        if age > STALE_SECONDS and running is not None:
            try:
                running.result(MAX_WAIT_SECONDS)
            except TimeoutError:
                return None
        return self._newest

    def close(self) -> None:
        self._thread.shutdown()

    def _refresh(self) -> None:
        self._newest = self._read()
        self._read_at = time.monotonic()


@dataclass(frozen=True)
class Console:
    settings: Settings
    reader: Engine  # for pages
    writer: Engine  # for actions and the audit log
    snapshot: StatusCache
    sessions: Sessions
    lockout: Lockout
    watched: Engine  # of the snapshot

    def close(self) -> None:
        self.snapshot.close()
        for engine in (self.reader, self.writer, self.watched):
            engine.dispose()


def make_console(settings: Settings, web: str | None = None, clock: Callable[[], float] = time.monotonic) -> Console:
    """`web` is the URL of the endpoint's operations port."""
    session = {"statement_timeout": STATEMENT_TIMEOUT, "default_transaction_read_only": "on"}
    watched = make_engine(settings, "headrace-console", pre_ping=True)
    watcher = Watcher(watched, settings, web)
    return Console(
        settings=settings,
        reader=make_engine(settings, "headrace-console", session, pre_ping=True),
        writer=make_writer(settings, "headrace-console", pre_ping=True),
        snapshot=StatusCache(lambda: watcher.page().now),
        sessions=Sessions(clock),
        lockout=Lockout(clock),
        watched=watched,
    )


def console() -> Console:
    found: Any = current_app.extensions["console"]
    assert isinstance(found, Console)
    return found


def record_look(page: str, users: Iterable[str | None], **detail: Any) -> None:
    """Records a look at people in the audit log: one entry, whose `users` are all those that the page shows."""
    if shown := sorted({user for user in users if user}):
        subject = shown[0] if len(shown) == 1 else "people"
        audit.record(console().writer, f"console {page}", subject, detail | {"users": shown})
