"""Pages that were fetched and are not committed yet, and the transaction that commits them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sqlalchemy import Engine

from app.errors import Unprocessable
from app.observability import metrics, tracing
from workers.actions import Action, Origin, Samples
from workers.aggregators.requests import Page
from workers.store import backfills
from workers.store.backfills import ChunkPosition
from workers.store.engine import transaction
from workers.store.series import SeriesKey, SeriesNumbers
from workers.store.users import is_read_only
from workers.store.writer import BatchItem, write


@dataclass(frozen=True)
class CommitLimits:
    """The pages, rows and seconds after which pending pages are committed.

    A commit costs eight round trips and a flush to disk besides its rows: with eight pages per commit, half as many
    rows again are stored per second. A killed worker loses the requests of one commit.
    """

    pages: int = 8
    rows: int = 10_000
    seconds: float = 1.0


COMMIT_LIMITS = CommitLimits()
ONE_PAGE = CommitLimits(pages=1)


@dataclass
class PendingPages:
    """The contents of pending pages, the position before the first and the position after the last page."""

    work: ChunkPosition
    then: ChunkPosition | None = None
    actions: list[Action] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pages: int = 0
    records: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, page: Page, then: ChunkPosition | None) -> None:
        """Adds the next page; `then` is the position after it, None at the end of the chunk."""
        self.then = then
        self.actions += page.actions
        self.refused += page.refused
        self.pages += 1
        self.records += page.records

    def should_commit(self, limits: CommitLimits) -> bool:
        """Whether a limit is reached. At the end of a chunk the pages are always committed."""
        rows = sum(len(one.rows) if isinstance(one, Samples) else 1 for one in self.actions)
        is_late = time.monotonic() > self.since + limits.seconds
        return self.then is None or self.pages >= limits.pages or rows >= limits.rows or is_late


class PageWriter:
    """Commits pages. One per worker process: it caches series numbers."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._series = engine, SeriesNumbers(engine)

    def commit(self, pending: PendingPages) -> bool:
        """Commits pages and the position after them in one transaction; if PostgreSQL refuses a row, action by action.

        False if the run must end: another worker or an operator has moved the backfill, or the user was erased.
        """
        try:
            return self._commit(pending)
        except Unprocessable:
            refused = self.store(pending.work, pending.actions)
        if refused is None:
            return False
        records = pending.records - len(refused)
        return self._commit(replace(pending, actions=[], records=records, refused=pending.refused + refused))

    def _commit(self, pending: PendingPages) -> bool:
        work, batch = pending.work, [BatchItem(0, action) for action in pending.actions]
        numbers, origin = self._numbers(pending.actions), _origin(work)
        with tracing.span("commit", pages=pending.pages, actions=len(batch)), transaction(self._engine) as connection:
            if is_read_only(connection, work.user_id):
                return False
            with tracing.span("merge", actions=len(batch)):
                written = write(connection, batch, origin, numbers)
            moved = backfills.advance(
                connection, work, pending.then, pages=pending.pages, records=pending.records, refused=pending.refused
            )
        metrics.count_rows(written.rows, origin)
        return moved

    def store(self, work: ChunkPosition, actions: Iterable[Action]) -> list[str] | None:
        """Stores each action in its own transaction. Returns why some were refused; None if the user was erased."""
        refused = []
        for action in actions:
            try:
                numbers = self._numbers([action])
                with transaction(self._engine) as connection:
                    if is_read_only(connection, work.user_id):
                        return None
                    write(connection, [BatchItem(0, action)], _origin(work), numbers)
            except Unprocessable as reason:
                refused.append(str(reason))
        return refused

    def _numbers(self, actions: Iterable[Action]) -> dict[SeriesKey, int]:
        return self._series.of(action.series for action in actions if isinstance(action, Samples))


def _origin(work: ChunkPosition) -> Origin:
    return "reconcile" if work.requested_by == "reconcile" else "backfill"
