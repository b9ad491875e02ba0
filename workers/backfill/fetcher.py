"""Fetches history: one backfill at a time, its chunks newest first, page by page, committed with their cursor."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from sqlalchemy import Engine

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal
from app.errors import TryLater, Unprocessable
from app.observability import metrics, tracing
from app.sealing import Sealer
from workers.actions import Action, Origin, Record, Samples
from workers.aggregators import AGGREGATORS, junction
from workers.aggregators.requests import Page, Request
from workers.backfill.pending import COMMIT_LIMITS, ONE_PAGE, CommitLimits, PendingPages
from workers.backfill.streams import OwnerLists, next_owner, owners_in, read_stream
from workers.fetch.client import AggregatorClient, FetchResult
from workers.fetch.http import HttpResponse
from workers.fetch.retry import Decision, FetchAction
from workers.store import backfills
from workers.store.backfills import ChunkPosition
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import transaction
from workers.store.series import SeriesKey, SeriesNumbers
from workers.store.users import is_read_only
from workers.store.writer import BatchItem, write

TIME_SLICE_SECONDS = 20.0  # then the next backfill of the lane has its turn
SOON_SECONDS = 0.0
ENDS = (FetchAction.NOT_FOUND, FetchAction.FAIL, FetchAction.REJECT)
MAX_RESTARTS = 5  # of one slice
MAX_CRASHES = 5  # in a row
NO_DATA_IS_BELIEVED = 3  # times: at first it may mean that the aggregator has not looked yet
Read = Callable[[HttpResponse], Page]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FollowUp:
    """A backfill that should be gone on with, so many seconds from now."""

    backfill_id: int
    seconds: float


class _Suspend(Exception):
    """The turn is over: the backfill was given back, failed, or lost to another worker."""

    def __init__(self, again: FollowUp | None) -> None:
        super().__init__()
        self.again = again


class Fetcher:
    """Reads history from the aggregators. One for the life of a worker process; nothing in it sleeps."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        accounts: Iterable[AggregatorClient],
        limits: CommitLimits = COMMIT_LIMITS,
    ) -> None:
        self._engine, self._settings, self._limits = engine, settings, limits
        self._accounts = {account.name: account for account in accounts}
        self._series = SeriesNumbers(engine)
        self._sealer = Sealer(settings.encryption_keys)
        self._pending: PendingPages | None = None
        self._cursors: set[tuple[int, datetime, str | None]] = set()
        self._owners = OwnerLists()

    def run(self, backfill_id: int) -> list[FollowUp]:
        """Goes on with a backfill for one turn, if it is due and free. Raises TryLater. Returns what to do next."""
        free = self._settings.backfills_per_user
        limit = self._settings.backfills_per_account
        work = backfills.claim(self._engine, backfill_id, free, limit, self._accounts)
        if work is None:
            return []
        if work.crashes >= MAX_CRASHES:
            backfills.fail(self._engine, work, f"its worker died {work.crashes} times without a page between")
            return []
        user_id, last, until = work.user_id, work, time.monotonic() + TIME_SLICE_SECONDS
        try:
            while work is not None:
                if time.monotonic() > until:
                    self._commit()
                    backfills.release(self._engine, work, SOON_SECONDS)
                    return [FollowUp(backfill_id, SOON_SECONDS)]
                last = work
                work = self._step(work) or backfills.next_chunk(self._engine, backfill_id)
        except _Suspend as waits:
            return [waits.again] if waits.again else []
        except TryLater:
            with contextlib.suppress(TryLater):  # the lease runs out by itself, only later
                backfills.release(self._engine, last, SOON_SECONDS)
            raise
        finally:
            self._pending = None
            self._cursors.clear()
        log.info("fetched, as far as it was announced", extra={"backfill": backfill_id})
        # A place has become free: whoever of this person was turned away may come now.
        theirs = backfills.due(self._engine, user_id=user_id, of=self._accounts, limit=free)
        return [FollowUp(one, SOON_SECONDS) for one in theirs]

    def _step(self, work: ChunkPosition) -> ChunkPosition | None:
        """One request and its page. Returns where the chunk goes on, None at its end."""
        if work.of.kind == "stream":
            return self._step_of_streams(work)
        request = AGGREGATORS[work.aggregator].request(work.of, work.user_id, work.provider, work.slice, work.cursor)
        page = self._page(work, request, _reader(work, work.of), optional=work.of.dates == "none")
        if page.cursor is not None and (work.chunk_id, work.slice_end, page.cursor) in self._cursors:
            self._wait(work, Decision(FetchAction.RESTART, 1.0, "the cursor goes in a circle"))
        self._cursors.add((work.chunk_id, work.slice_end, page.cursor))
        return self._keep(work, page, work.after(page.cursor, page.records))

    def _step_of_streams(self, work: ChunkPosition) -> ChunkPosition | None:
        """One workout's stream: there is no list of streams, so the slice's workouts are listed first, and stored."""
        owners = self._owners.get(work, self._listed)
        owner = next_owner(owners, work.cursor)
        if owner is None:
            self._owners.forget(work)
            return self._keep(work, Page((), 0), work.after(None, len(owners)))
        request = junction.stream_request(work.of, owner.id)
        read = partial(read_stream, work.of, owner)
        page = self._page(work, request, read, optional=True, item=owner.id)
        return self._keep(work, page, work.after(owner.id, page.records))

    def _listed(self, work: ChunkPosition) -> list[Record]:
        if work.item:
            found = backfills.owner(self._engine, work)
            return [found] if found else []
        listed = catalogue()[work.of.of or ""]
        request = junction.request(listed, work.user_id, work.provider, work.slice)
        page = self._page(work, request, _reader(work, listed))
        for reason in (*page.refused, *self._store(work, page.actions)):
            log.warning("left out of the list: %s", reason, extra={"backfill": work.backfill_id})
        return owners_in(page)

    def _page(
        self, work: ChunkPosition, request: Request, read: Read, *, optional: bool = False, item: str = ""
    ) -> Page:
        """Asks, when it may, and reads the answer. Raises _Suspend where there is no page to be had now.

        What is `optional` may be missing, or refused by itself, without ending the backfill.
        """
        account = self._accounts[work.aggregator]
        who = {"aggregator": work.aggregator, "provider": work.provider, "resource": work.resource}
        with tracing.span("page", backfill=work.backfill_id, chunk=work.chunk_id, **who):
            reply = account.fetch(request, read, attempts=work.attempts, provider=work.provider, user_id=work.user_id)
            tracing.set_attributes(decision=reply.decision.action)
        if reply.value is not None:
            return reply.value
        if reply.not_ready == "no_data" and work.attempts + 1 >= NO_DATA_IS_BELIEVED:
            return Page((), 0)
        if optional and reply.decision.action in ENDS and 400 <= reply.status < 500:
            return self._without(work, reply, self._evidence(work, request, reply, item))
        return self._wait(work, reply.decision, self._evidence(work, request, reply, item))

    def _without(self, work: ChunkPosition, reply: FetchResult[Page], evidence: Delivery | None) -> Page:
        """An empty page, for what may be missing; if its request was refused, the answer is kept."""
        if evidence:
            with transaction(self._engine) as connection:
                if not is_read_only(connection, work.user_id):
                    add_dead_letter(connection, evidence, f"fetch.{work.resource}", reply.decision.reason)
        return Page((), 0, refused=() if reply.decision.action == FetchAction.NOT_FOUND else (reply.decision.reason,))

    def _evidence(self, work: ChunkPosition, request: Request, reply: FetchResult[Page], item: str) -> Delivery | None:
        """An answer that is to be a dead letter, sealed, under the name of what was asked; asked again, it is one.

        It refers to the record whose stream was asked for: the backfill may be complete when somebody looks at it.
        """
        if reply.decision.action != FetchAction.REJECT:
            return None
        name = hashlib.sha256(repr((request.path, request.query)).encode()).hexdigest()[:16]
        receipt = Receipt(f"fetch-{work.backfill_id}-{name}", reference=item or None)
        return seal(work.aggregator, receipt, reply.body, self._sealer)

    def _wait(self, work: ChunkPosition, decision: Decision, evidence: Delivery | None = None) -> Page:
        """Does what was decided other than using a page, once the pages before are stored, and raises _Suspend."""
        self._commit()
        level = logging.DEBUG if decision.action == FetchAction.WAIT else logging.INFO
        log.log(level, "%s %s", decision.action, decision.reason, extra={"backfill": work.backfill_id})
        if decision.action in ENDS or (decision.action == FetchAction.RESTART and work.restarts >= MAX_RESTARTS):
            backfills.fail(self._engine, work, decision.reason, evidence)
            raise _Suspend(None)
        if decision.action == FetchAction.SPLIT:
            backfills.move(self._engine, work, work.halved())
        elif decision.action == FetchAction.RESTART:
            backfills.move(self._engine, work, work.restarted())
        backfills.release(self._engine, work, decision.seconds, failed=decision.counts, error=decision.reason or None)
        raise _Suspend(FollowUp(work.backfill_id, decision.seconds))

    def _keep(self, work: ChunkPosition, page: Page, then: ChunkPosition | None) -> ChunkPosition | None:
        """Takes a page in, to be committed with those around it. Returns where the chunk goes on."""
        self._pending = self._pending or PendingPages(work, then)
        self._pending.add(page, then)
        # Where a worker has died lately, the page that it died with must not take those before it along.
        if self._pending.should_commit(ONE_PAGE if work.crashes else self._limits):
            self._commit()
        return then

    def _commit(self) -> None:
        """Pages and their last cursor in one transaction. If PostgreSQL refuses them, their actions go one by one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            moved = self._write(pending)
        except Unprocessable:
            refused = self._store(pending.work, pending.actions)
            records = pending.records - len(refused)
            moved = self._write(replace(pending, actions=[], records=records, refused=pending.refused + refused))
        if not moved:
            raise _Suspend(None)

    def _write(self, pending: PendingPages) -> bool:
        work, batch = pending.work, [BatchItem(0, action) for action in pending.actions]
        numbers = self._numbers(batch)
        with tracing.span("commit", pages=pending.pages, actions=len(batch)), transaction(self._engine) as connection:
            if is_read_only(connection, work.user_id):
                return False
            with tracing.span("merge", actions=len(batch)):
                written = write(connection, batch, _origin(work), numbers)
            counted = {"pages": pending.pages, "records": pending.records}
            moved = backfills.advance(connection, work, pending.then, **counted, refused=pending.refused)
        metrics.count_rows(written.rows, _origin(work))
        return moved

    def _store(self, work: ChunkPosition, actions: Iterable[Action]) -> list[str]:
        """Stores actions one by one; why some were refused."""
        refused = []
        for action in actions:
            batch = [BatchItem(0, action)]
            try:
                numbers = self._numbers(batch)
                with transaction(self._engine) as connection:
                    if is_read_only(connection, work.user_id):
                        raise _Suspend(None)
                    write(connection, batch, _origin(work), numbers)
            except Unprocessable as reason:
                refused.append(str(reason))
        return refused

    def _numbers(self, batch: Iterable[BatchItem]) -> dict[SeriesKey, int]:
        return self._series.of(one.action.series for one in batch if isinstance(one.action, Samples))


def _origin(work: ChunkPosition) -> Origin:
    return "reconcile" if work.requested_by == "reconcile" else "backfill"


def _reader(work: ChunkPosition, resource: Resource) -> Read:
    read_page = AGGREGATORS[work.aggregator].read_page
    return lambda answer: read_page(resource, work.user_id, answer.body, answer.asked_at, work.provider)
