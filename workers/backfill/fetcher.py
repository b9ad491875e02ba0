"""Fetches history: one backfill per run, its chunks newest first, page by page, committed with the position."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Engine

from app.broker.lanes import FETCH
from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, seal
from app.errors import RetryAlone, TryLater, Unprocessable
from app.observability import metrics, tracing
from app.sealing import Sealer
from workers.actions import Record, Refused
from workers.aggregators import junction
from workers.aggregators.junction.api import read_stream, stream_request
from workers.aggregators.registry import AGGREGATORS
from workers.aggregators.requests import Page, Request
from workers.backfill.pending import COMMIT_LIMITS, ONE_PAGE, CommitLimits, PageWriter, PendingPages
from workers.fetch.backoff import backoff
from workers.fetch.client import AggregatorClient, FetchResult
from workers.fetch.http import HttpResponse
from workers.fetch.retry import FINAL, Decision, FetchAction
from workers.ingest.outcomes import is_last_try
from workers.store import backfills
from workers.store.backfills import ChunkPosition
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import transaction
from workers.store.users import is_read_only

TIME_SLICE_SECONDS = 20.0  # then the lane's next backfill runs
MAX_RESTARTS = 5  # of one slice
MAX_CRASHES = 5  # in a row
NO_DATA_ATTEMPTS = 3  # a first `no_data` may mean that the aggregator has not asked the provider yet
MAX_CACHED_LISTS = 64
MAX_RETRY_SECONDS = 30.0  # after a statement that PostgreSQL did not execute
SliceKey = tuple[int, datetime, int]
Read = Callable[[HttpResponse], Page]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FollowUp:
    """A backfill to continue after `seconds`."""

    backfill_id: int
    seconds: float


class Fetcher:
    """Fetches history from the aggregators. One per worker process. It never sleeps: a wait becomes a FollowUp."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        clients: Iterable[AggregatorClient],
        limits: CommitLimits = COMMIT_LIMITS,
    ) -> None:
        self.engine, self.settings, self.limits = engine, settings, limits
        self.clients = {client.name: client for client in clients}
        self.sealer = Sealer(settings.encryption_keys)
        self.writer = PageWriter(engine, self.sealer)
        # Cached because a backfill that waits for its rate limit resumes the same slice in many runs.
        self.owners: dict[SliceKey, list[Record]] = {}

    def run(self, backfill_id: int) -> list[FollowUp]:
        """Runs a backfill for a time slice, if it is due and not claimed. Returns the next runs. Raises TryLater."""
        per_user, per_account = self.settings.backfills_per_user, self.settings.backfills_per_account
        work = backfills.claim(self.engine, backfill_id, per_user, per_account, self.clients)
        if work is None:
            return []
        if work.crashes >= MAX_CRASHES:
            backfills.fail(self.engine, work, f"the worker crashed {work.crashes} times in a row during this backfill")
            return []
        run = BackfillRun(self, work)
        try:
            is_complete = run.run()
        except TryLater as error:
            with contextlib.suppress(TryLater):  # without a release, the lease expires
                if isinstance(error, RetryAlone):
                    run.retry(error)
                    return run.follow_ups
                backfills.release(self.engine, work, 0)
            raise
        if not is_complete:
            return run.follow_ups
        log.info("fetched all announced history", extra={"backfill": backfill_id})
        # The user's limit has room again: continue a backfill that could not be claimed because of it.
        found = backfills.due(self.engine, user_id=work.user_id, of=self.clients, limit=per_user)
        return [FollowUp(one, 0) for one in found]


class BackfillRun:
    """One time slice of a backfill: its position, its pending pages and the cursors it has seen.

    A method returns None or False to end the run: the backfill has failed, has to wait, or has been claimed or stopped.
    """

    def __init__(self, fetcher: Fetcher, work: ChunkPosition) -> None:
        self.follow_ups: list[FollowUp] = []
        self._fetcher, self._engine = fetcher, fetcher.engine
        self._work = work  # the position of the next request
        self._pending: PendingPages | None = None
        self._cursors: set[tuple[int, datetime, str | None]] = set()

    def run(self) -> bool:
        """Fetches page after page. True if no announced history is left. Raises TryLater."""
        until = time.monotonic() + TIME_SLICE_SECONDS
        while time.monotonic() <= until:
            step = self._fetch_stream() if self._work.of.kind == "stream" else self._fetch_page()
            if step is None:
                return False
            page, then = step
            if not self._keep(page, then):
                return False
            following = then or backfills.next_chunk(self._engine, self._work.backfill_id)
            if following is None:
                return True
            self._work = following
        if self._commit():
            self._release(0)
        return False

    def retry(self, error: RetryAlone) -> None:
        """Releases the backfill until the next try; fails it after several tries of one page."""
        metrics.RETRIES.labels(FETCH, error.cause).inc()
        tries = self._work.attempts + 1
        if is_last_try(tries, error):
            reason = f"{error}, in {tries} tries; headrace backfill resume {self._work.backfill_id} continues it"
            backfills.fail(self._engine, self._work, reason)
        else:
            self._release(backoff(self._work.attempts, limit=MAX_RETRY_SECONDS), failed=True, error=str(error))

    def _fetch_page(self) -> tuple[Page, ChunkPosition | None] | None:
        """One page of the slice and the position after it."""
        work = self._work
        api = AGGREGATORS[work.aggregator]
        try:
            request = api.request(work.of, work.user_id, work.provider, work.slice, work.cursor)
        except Unprocessable as reason:  # an id would change the path
            self._suspend(Decision(FetchAction.REJECT, reason=str(reason)))
            return None
        page = self._request(request, self._reader(work.of), optional=work.of.dates == "none")
        if page is None:
            return None
        seen = work.chunk_id, work.slice_end, page.cursor
        if page.cursor is not None and seen in self._cursors:
            self._suspend(Decision(FetchAction.RESTART, 1.0, "the aggregator returned the same cursor twice"))
            return None
        self._cursors.add(seen)
        return page, work.after(page.cursor, page.records)

    def _fetch_stream(self) -> tuple[Page, ChunkPosition | None] | None:
        """The stream of one of the slice's workouts and the position after it: the cursor is the workout's id."""
        work, owners = self._work, self._owners()
        if owners is None:
            return None
        owner = next((one for one in owners if work.cursor is None or one.id > work.cursor), None)
        if owner is None:
            self._fetcher.owners.pop(_slice_key(work), None)
            return Page((), 0), work.after(None, len(owners))
        try:
            request = stream_request(work.of, owner.id)
        except Unprocessable as reason:  # concerns this record only
            decision = Decision(FetchAction.REJECT, reason=str(reason))
            return self._empty_page(decision, None), work.after(owner.id, 0)
        page = self._request(
            request,
            lambda response: read_stream(work.of, owner, response.body, response.asked_at),
            optional=True,
            item=owner.id,
        )
        return (page, work.after(owner.id, page.records)) if page else None

    def _owners(self) -> list[Record] | None:
        """The slice's workouts by id, without payloads. The aggregator cannot list streams, only their workouts.

        A single record is looked up each time: it may have been erased since.
        """
        work, cache = self._work, self._fetcher.owners
        if work.item:
            found = backfills.owner(self._engine, work)
            return [found] if found else []
        key = _slice_key(work)
        if key in cache:
            return cache[key]
        resource = catalogue()[work.of.of or ""]
        request = junction.request(resource, work.user_id, work.provider, work.slice)
        page = self._request(request, self._reader(resource))
        refused = self._fetcher.writer.store(work, page.actions) if page else None
        if page is None or refused is None:
            return None
        for one in (*page.refused, *refused):
            log.warning("omitted from the list of workouts: %s", one.reason, extra={"backfill": work.backfill_id})
        if len(cache) >= MAX_CACHED_LISTS:
            cache.clear()
        owners = [replace(action, payload=b"") for action in page.actions if isinstance(action, Record)]
        return cache.setdefault(key, sorted(owners, key=lambda owner: owner.id))

    def _reader(self, resource: Resource) -> Read:
        work, read_page = self._work, AGGREGATORS[self._work.aggregator].read_page

        def read(response: HttpResponse) -> Page:
            page = read_page(resource, work.user_id, response.body, response.asked_at, work.provider)
            return replace(page, asked_at=response.asked_at)

        return read

    def _request(self, request: Request, read: Read, *, optional: bool = False, item: str = "") -> Page | None:
        """Sends a request and returns its page.

        An `optional` request may be refused without ending the backfill: its page is empty then.
        """
        work = self._work
        client = self._fetcher.clients[work.aggregator]
        attributes = {"aggregator": work.aggregator, "provider": work.provider, "resource": work.resource}
        with tracing.span("page", backfill=work.backfill_id, chunk=work.chunk_id, **attributes):
            reply = client.fetch(request, read, attempts=work.attempts, provider=work.provider, user_id=work.user_id)
            tracing.set_attributes(decision=reply.decision.action)
        if reply.value is not None:
            return reply.value
        if reply.not_ready == "no_data" and work.attempts + 1 >= NO_DATA_ATTEMPTS:
            return Page((), 0)
        evidence = self._evidence(request, reply, item)
        if optional and reply.decision.action in FINAL and 400 <= reply.status < 500:
            return self._empty_page(reply.decision, evidence)
        self._suspend(reply.decision, evidence)
        return None

    def _empty_page(self, decision: Decision, evidence: Delivery | None) -> Page:
        """An empty page in place of a refused one, whose response becomes a dead letter."""
        if evidence:
            with transaction(self._engine) as connection:
                if not is_read_only(connection, self._work.user_id, self._work.aggregator):
                    name = f"fetch.{self._work.resource}"
                    add_dead_letter(connection, evidence, decision.reason, name, self._work.user_id)
        refused = () if decision.action == FetchAction.NOT_FOUND else (Refused(decision.reason, b""),)
        return Page((), 0, refused=refused)

    def _evidence(self, request: Request, reply: FetchResult[Page], item: str) -> Delivery | None:
        """The sealed response of a rejected request, for a dead letter.

        Its id depends on the request only, so a repeated request adds no second dead letter. It refers to the record
        whose stream was requested, because the backfill may be complete by the time an operator looks at it.
        """
        if reply.decision.action != FetchAction.REJECT:
            return None
        digest = hashlib.sha256(repr((request.path, request.query)).encode()).hexdigest()[:16]
        receipt = Receipt(f"fetch-{self._work.backfill_id}-{digest}", reference=item or None)
        return seal(self._work.aggregator, receipt, reply.body, self._fetcher.sealer)

    def _suspend(self, decision: Decision, evidence: Delivery | None = None) -> None:
        """Commits the pending pages, then fails the backfill or releases it until the next attempt."""
        if not self._commit():
            return
        work, action = self._work, decision.action
        level = logging.DEBUG if action == FetchAction.WAIT else logging.INFO
        log.log(level, "%s %s", action, decision.reason, extra={"backfill": work.backfill_id})
        if action in FINAL or (action == FetchAction.RESTART and work.restarts >= MAX_RESTARTS):
            backfills.fail(self._engine, work, decision.reason, evidence)
            return
        if action == FetchAction.SPLIT:
            backfills.move(self._engine, work, work.halved())
        elif action == FetchAction.RESTART:
            backfills.move(self._engine, work, work.restarted())
        self._release(decision.seconds, failed=decision.counts, error=decision.reason or None)

    def _release(self, seconds: float, *, failed: bool = False, error: str | None = None) -> None:
        backfills.release(self._engine, self._work, seconds, failed=failed, error=error)
        self.follow_ups.append(FollowUp(self._work.backfill_id, seconds))

    def _keep(self, page: Page, then: ChunkPosition | None) -> bool:
        """Adds a page to the pending ones and commits them if a limit is reached. False if that ends the run."""
        metrics.DUPLICATE_SAMPLES.inc(page.duplicate_samples)
        metrics.SAMPLES_WITHOUT_TIMESTAMP.inc(page.notes.without_timestamp)
        self._pending = self._pending or PendingPages(self._work)
        self._pending.add(page, then)
        # After a crash or an error, each page is committed alone: the one that caused it must not cost the ones before.
        limits = ONE_PAGE if self._work.crashes or self._work.attempts else self._fetcher.limits
        return not self._pending.should_commit(limits) or self._commit()

    def _commit(self) -> bool:
        pending, self._pending = self._pending, None
        return pending is None or self._fetcher.writer.commit(pending)


def _slice_key(work: ChunkPosition) -> SliceKey:
    return work.chunk_id, work.slice_end, work.slice_days
