"""Pages that were fetched and are not committed yet, and the transaction that commits them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from sqlalchemy import Engine

from app.errors import RetryAlone, Unprocessable
from app.observability import metrics, tracing
from app.sealing import Sealer
from workers.actions import NO_NOTES, Action, Notes, Origin, Record, Refused, Samples
from workers.aggregators.registry import AGGREGATORS
from workers.aggregators.repair import repaired
from workers.aggregators.requests import Page
from workers.ingest.outcomes import is_last_try, reason_of
from workers.ingest.refused import count, dead_letters_of, of_page
from workers.store import backfills
from workers.store.backfills import ChunkPosition
from workers.store.dead_letters import RefusedItem, add_items
from workers.store.engine import transaction
from workers.store.series import SeriesNumbers
from workers.store.users import is_read_only
from workers.store.writer import BatchItem, write

MAX_TRIES_TOGETHER = 2  # of pages, before their actions are applied one by one


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
    refused: list[Refused] = field(default_factory=list)
    notes: Notes = NO_NOTES
    asked_at: datetime | None = None  # of the first page
    pages: int = 0
    records: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, page: Page, then: ChunkPosition | None) -> None:
        """Adds the next page; `then` is the position after it, None at the end of the chunk."""
        self.then = then
        self.actions += page.actions
        self.refused += page.refused
        self.notes += page.notes
        self.asked_at = self.asked_at or page.asked_at
        self.pages += 1
        self.records += page.records

    def should_commit(self, limits: CommitLimits) -> bool:
        """Whether a limit is reached. At the end of a chunk the pages are always committed."""
        rows = sum(len(one.rows) if isinstance(one, Samples) else 1 for one in self.actions)
        is_late = time.monotonic() > self.since + limits.seconds
        return self.then is None or self.pages >= limits.pages or rows >= limits.rows or is_late


class PageWriter:
    """Commits pages. One per worker process: it caches series numbers."""

    def __init__(self, engine: Engine, sealer: Sealer) -> None:
        self._engine, self._sealer, self._series = engine, sealer, SeriesNumbers(engine)

    def commit(self, pending: PendingPages) -> bool:
        """Commits pages and the position after them in one transaction.

        If PostgreSQL refuses a row, or did not execute a statement in several tries, action by action. False if the run
        must end: another worker or an operator has moved the backfill, or the user is read-only. Raises TryLater.
        """
        try:
            return self._commit(pending)
        except (Unprocessable, RetryAlone) as error:
            if isinstance(error, RetryAlone) and pending.work.attempts < MAX_TRIES_TOGETHER:
                raise
            refused = self.store(pending.work, pending.actions)
        if refused is None:
            return False
        records = pending.records - count(refused)
        return self._commit(replace(pending, actions=[], records=records, refused=pending.refused + refused))

    def _commit(self, pending: PendingPages) -> bool:
        work, batch = pending.work, [BatchItem(0, action) for action in pending.actions]
        numbers, origin = self._series.prepare(work.aggregator, pending.actions), _origin(work)
        with tracing.span("commit", pages=pending.pages, actions=len(batch)), transaction(self._engine) as connection:
            if is_read_only(connection, work.user_id, work.aggregator):
                return False
            with tracing.span("merge", actions=len(batch)):
                written = write(connection, batch, origin, numbers)
            add_items(connection, self._dead_letters(pending))
            moved = backfills.advance(
                connection,
                work,
                pending.then,
                pages=pending.pages,
                records=pending.records,
                refused=pending.refused,
                notes=pending.notes,
            )
        metrics.count_rows(written.rows, origin)
        metrics.REFUSED_ITEMS.labels(origin).inc(count(pending.refused))
        return moved

    def _dead_letters(self, pending: PendingPages) -> list[RefusedItem]:
        work = pending.work
        page = of_page(work.aggregator, pending.asked_at or datetime.now(UTC))
        name, number = f"fetch.{work.resource}", work.backfill_id
        return dead_letters_of(pending.refused, page, name, work.user_id, self._sealer, backfill_id=number)

    def store(self, work: ChunkPosition, actions: Iterable[Action]) -> list[Refused] | None:
        """Stores each action in its own transaction. Returns those refused; None if the user is read-only.

        A record that PostgreSQL did not store in several tries is refused too; samples would be lost, as their dead
        letter has no content. Raises RetryAlone after the last action.
        """
        refused, failed = [], None
        for action in actions:
            try:
                if not self._store(work, action):
                    return None
            except Unprocessable as reason:
                refused.append(_refused(work, action, str(reason)))
            except RetryAlone as error:
                if isinstance(action, Record) and is_last_try(work.attempts + 1, error):
                    refused.append(_refused(work, action, reason_of(error)))
                else:
                    failed = failed or error
        if failed:
            raise failed
        return refused

    def _store(self, work: ChunkPosition, action: Action, *, is_repaired: bool = False) -> bool:
        """False if the user is read-only. Raises Unprocessable if PostgreSQL refuses the action, and its repair too."""
        numbers = self._series.prepare(work.aggregator, [action])
        try:
            with transaction(self._engine) as connection:
                if is_read_only(connection, work.user_id, work.aggregator):
                    return False
                write(connection, [BatchItem(0, action)], _origin(work), numbers)
        except Unprocessable:
            if is_repaired or not isinstance(action, Record):
                raise
            return self._store(work, repaired(action), is_repaired=True)
        return True


def _refused(work: ChunkPosition, action: Action, reason: str) -> Refused:
    event = AGGREGATORS[work.aggregator].event_of(action) if isinstance(action, Record) else b""
    return Refused(reason, event, len(action.rows) if isinstance(action, Samples) else 1)


def _origin(work: ChunkPosition) -> Origin:
    return "reconcile" if work.requested_by == "reconcile" else "backfill"
