"""Fetches history: one backfill at a time, its chunks newest first, page by page, committed with their cursor."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

from sqlalchemy import Engine

from app import metrics, tracing
from app.actions import Action, Origin, Record, Samples
from app.catalogue import Resource, catalogue
from app.config import Settings
from app.delivery import Delivery, Receipt, seal
from app.errors import DeadLetter, TryLater
from app.providers import PROVIDERS, junction
from app.providers.request import Page, Request
from app.sealing import Sealer
from workers.asking import Account, Reply
from workers.http import Answer
from workers.retry import Decision
from workers.store import backfills
from workers.store.backfills import Work
from workers.store.engine import transaction
from workers.store.ledger import bury
from workers.store.series import Key, SeriesNumbers
from workers.store.users import is_closed
from workers.store.writer import Numbered, write

TURN_SECONDS = 20.0  # then the next backfill of the lane has its turn
SOON_SECONDS = 0.0
ENDS = ("gone", "fail", "dead")
MOST_RESTARTS = 5  # of one slice
MOST_CRASHES = 5  # in a row
NO_DATA_IS_BELIEVED = 3  # times: at first it may mean that the aggregator has not looked yet
MOST_LISTS = 64  # of records with streams that are kept at hand
Read = Callable[[Answer], Page]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Again:
    """A backfill that should be gone on with, so many seconds from now."""

    backfill_id: int
    seconds: float


@dataclass(frozen=True)
class Together:
    """What is committed together: so many pages and rows, or what came within so many seconds.

    A page by itself costs eight round trips and a flush to disk beside its rows: of eight together, half as many again
    are stored in a second. A worker that is killed costs the requests of one commit.
    """

    pages: int = 8
    rows: int = 10_000
    seconds: float = 1.0


ALONE = Together(pages=1)


class _Waits(Exception):
    """The turn is over: the backfill was given back, failed, or lost to another worker."""

    def __init__(self, again: Again | None) -> None:
        super().__init__()
        self.again = again


@dataclass
class _Held:
    """Pages that were read and are not committed: the position before them and after them, and what they hold."""

    work: Work
    then: Work | None
    actions: list[Action] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pages: int = 0
    records: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, page: Page, then: Work | None) -> None:
        """Takes in the page that follows."""
        self.then = then
        self.actions += page.actions
        self.refused += page.refused
        self.pages += 1
        self.records += page.records

    def are_enough(self, together: Together) -> bool:
        """Whether they are to be committed now; at the end of a chunk they always are."""
        rows = sum(len(one.rows) if isinstance(one, Samples) else 1 for one in self.actions)
        is_late = time.monotonic() > self.since + together.seconds
        return self.then is None or self.pages >= together.pages or rows >= together.rows or is_late


class Fetcher:
    """Reads history from the aggregators. One for the life of a worker process; nothing in it sleeps."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        accounts: Iterable[Account],
        together: Together = Together(),
    ) -> None:
        self._engine, self._settings, self._together = engine, settings, together
        self._accounts = {account.name: account for account in accounts}
        self._series = SeriesNumbers(engine)
        self._sealer = Sealer(settings.encryption_keys)
        self._held: _Held | None = None
        self._cursors: set[tuple[int, datetime, str | None]] = set()
        self._owners: dict[tuple[int, datetime, int], list[Record]] = {}

    def run(self, backfill_id: int) -> list[Again]:
        """Goes on with a backfill for one turn, if it is due and free. Raises TryLater. Returns what to do next."""
        free = self._settings.backfills_per_user
        most = self._settings.backfills_per_account
        work = backfills.claim(self._engine, backfill_id, free, most, self._accounts)
        if work is None:
            return []
        if work.crashes >= MOST_CRASHES:
            backfills.fail(self._engine, work, f"its worker died {work.crashes} times without a page between")
            return []
        user_id, last, until = work.user_id, work, time.monotonic() + TURN_SECONDS
        try:
            while work is not None:
                if time.monotonic() > until:
                    self._commit()
                    backfills.release(self._engine, work, SOON_SECONDS)
                    return [Again(backfill_id, SOON_SECONDS)]
                last = work
                work = self._step(work) or backfills.next_chunk(self._engine, backfill_id)
        except _Waits as waits:
            return [waits.again] if waits.again else []
        except TryLater:
            with contextlib.suppress(TryLater):  # the lease runs out by itself, only later
                backfills.release(self._engine, last, SOON_SECONDS)
            raise
        finally:
            self._held = None
            self._cursors.clear()
        log.info("fetched, as far as it was announced", extra={"backfill": backfill_id})
        # A place has become free: whoever of this person was turned away may come now.
        theirs = backfills.due(self._engine, user_id=user_id, of=self._accounts, most=free)
        return [Again(one, SOON_SECONDS) for one in theirs]

    def _step(self, work: Work) -> Work | None:
        """One request and its page. Returns where the chunk goes on, None at its end."""
        if work.of.kind == "stream":
            return self._step_of_streams(work)
        request = PROVIDERS[work.aggregator].request(work.of, work.user_id, work.provider, work.slice, work.cursor)
        page = self._page(work, request, _reader(work, work.of), optional=work.of.dates == "none")
        if page.cursor is not None and (work.chunk_id, work.slice_end, page.cursor) in self._cursors:
            self._wait(work, Decision("restart", 1.0, "the cursor goes in a circle"))
        self._cursors.add((work.chunk_id, work.slice_end, page.cursor))
        return self._keep(work, page, work.after(page.cursor, page.records))

    def _step_of_streams(self, work: Work) -> Work | None:
        """One workout's stream: there is no list of streams, so the slice's workouts are listed first, and stored."""
        owners = self._owners_of(work)
        owner = next((one for one in owners if work.cursor is None or one.id > work.cursor), None)
        if owner is None:
            self._owners.pop(_slice_of(work), None)
            return self._keep(work, Page((), 0), work.after(None, len(owners)))
        request = junction.stream_request(work.of, owner.id)
        read = partial(_read_stream, work.of, owner)
        page = self._page(work, request, read, optional=True, item=owner.id)
        return self._keep(work, page, work.after(owner.id, page.records))

    def _owners_of(self, work: Work) -> list[Record]:
        """The records of a slice, listed once: a backfill that has to wait for its rate comes back to many of them."""
        if work.item:  # which may have been erased since
            return self._listed(work)
        key = _slice_of(work)
        if key not in self._owners:
            if len(self._owners) >= MOST_LISTS:
                self._owners.clear()
            self._owners[key] = self._listed(work)
        return self._owners[key]

    def _listed(self, work: Work) -> list[Record]:
        if work.item:
            found = backfills.owner(self._engine, work)
            return [found] if found else []
        listed = catalogue()[work.of.of or ""]
        request = junction.request(listed, work.user_id, work.provider, work.slice)
        page = self._page(work, request, _reader(work, listed))
        for reason in (*page.refused, *self._store(work, page.actions)):
            log.warning("left out of the list: %s", reason, extra={"backfill": work.backfill_id})
        records = (replace(action, payload=b"") for action in page.actions if isinstance(action, Record))
        return sorted(records, key=lambda record: record.id)

    def _page(self, work: Work, request: Request, read: Read, *, optional: bool = False, item: str = "") -> Page:
        """Asks, when it may, and reads the answer. Raises _Waits where there is no page to be had now.

        What is `optional` may be missing, or refused by itself, without ending the backfill.
        """
        account = self._accounts[work.aggregator]
        who = {"aggregator": work.aggregator, "provider": work.provider, "resource": work.resource}
        with tracing.span("page", backfill=work.backfill_id, chunk=work.chunk_id, **who):
            reply = account.ask(request, read, attempts=work.attempts, provider=work.provider, user_id=work.user_id)
            tracing.tell(decision=reply.decision.what)
        if reply.value is not None:
            return reply.value
        if reply.not_yet == "no_data" and work.attempts + 1 >= NO_DATA_IS_BELIEVED:
            return Page((), 0)
        if optional and reply.decision.what in ENDS and 400 <= reply.status < 500:
            return self._without(work, reply, self._evidence(work, request, reply, item))
        return self._wait(work, reply.decision, self._evidence(work, request, reply, item))

    def _without(self, work: Work, reply: Reply[Page], evidence: Delivery | None) -> Page:
        """An empty page, for what may be missing; if its request was refused, the answer is kept."""
        if evidence:
            with transaction(self._engine) as connection:
                if not is_closed(connection, work.user_id):
                    bury(connection, evidence, f"fetch.{work.resource}", reply.decision.reason)
        return Page((), 0, refused=() if reply.decision.what == "gone" else (reply.decision.reason,))

    def _evidence(self, work: Work, request: Request, reply: Reply[Page], item: str) -> Delivery | None:
        """An answer that is to be a dead letter, sealed, under the name of what was asked; asked again, it is one.

        It refers to the record whose stream was asked for: the backfill may be complete when somebody looks at it.
        """
        if reply.decision.what != "dead":
            return None
        name = hashlib.sha256(repr((request.path, request.query)).encode()).hexdigest()[:16]
        receipt = Receipt(f"fetch-{work.backfill_id}-{name}", reference=item or None)
        return seal(work.aggregator, receipt, reply.body, self._sealer)

    def _wait(self, work: Work, decision: Decision, evidence: Delivery | None = None) -> Page:
        """Does what was decided other than using a page, once the pages before are stored, and raises _Waits."""
        self._commit()
        level = logging.DEBUG if decision.what == "wait" else logging.INFO
        log.log(level, "%s %s", decision.what, decision.reason, extra={"backfill": work.backfill_id})
        if decision.what in ENDS or (decision.what == "restart" and work.restarts >= MOST_RESTARTS):
            backfills.fail(self._engine, work, decision.reason, evidence)
            raise _Waits(None)
        if decision.what == "halve":
            backfills.move(self._engine, work, work.halved())
        elif decision.what == "restart":
            backfills.move(self._engine, work, work.restarted())
        backfills.release(self._engine, work, decision.seconds, failed=decision.counts, error=decision.reason or None)
        raise _Waits(Again(work.backfill_id, decision.seconds))

    def _keep(self, work: Work, page: Page, then: Work | None) -> Work | None:
        """Takes a page in, to be committed with those around it. Returns where the chunk goes on."""
        self._held = self._held or _Held(work, then)
        self._held.add(page, then)
        # Where a worker has died lately, the page that it died with must not take those before it along.
        if self._held.are_enough(ALONE if work.crashes else self._together):
            self._commit()
        return then

    def _commit(self) -> None:
        """Pages and their last cursor in one transaction. If PostgreSQL refuses them, their actions go one by one."""
        held, self._held = self._held, None
        if held is None:
            return
        try:
            moved = self._write(held)
        except DeadLetter:
            refused = self._store(held.work, held.actions)
            records = held.records - len(refused)
            moved = self._write(replace(held, actions=[], records=records, refused=held.refused + refused))
        if not moved:
            raise _Waits(None)

    def _write(self, held: _Held) -> bool:
        work, batch = held.work, [Numbered(0, action) for action in held.actions]
        numbers = self._numbers(batch)
        error = f"{len(held.refused)} refused, first: {held.refused[0]}" if held.refused else None
        with tracing.span("commit", pages=held.pages, actions=len(batch)), transaction(self._engine) as connection:
            if is_closed(connection, work.user_id):
                return False
            with tracing.span("merge", actions=len(batch)):
                written = write(connection, batch, _origin(work), numbers)
            counted = {"pages": held.pages, "records": held.records}
            moved = backfills.advance(connection, work, held.then, **counted, error=error)
        metrics.count_rows(written.rows, _origin(work))
        return moved

    def _store(self, work: Work, actions: Iterable[Action]) -> list[str]:
        """Stores actions one by one; why some were refused."""
        refused = []
        for action in actions:
            batch = [Numbered(0, action)]
            try:
                numbers = self._numbers(batch)
                with transaction(self._engine) as connection:
                    if is_closed(connection, work.user_id):
                        raise _Waits(None)
                    write(connection, batch, _origin(work), numbers)
            except DeadLetter as reason:
                refused.append(str(reason))
        return refused

    def _numbers(self, batch: Iterable[Numbered]) -> dict[Key, int]:
        return self._series.of(one.action.series for one in batch if isinstance(one.action, Samples))


def _slice_of(work: Work) -> tuple[int, datetime, int]:
    return work.chunk_id, work.slice_end, work.slice_days


def _origin(work: Work) -> Origin:
    return "reconcile" if work.asked_by == "reconcile" else "backfill"


def _reader(work: Work, resource: Resource) -> Read:
    read_page = PROVIDERS[work.aggregator].read_page
    return lambda answer: read_page(resource, work.user_id, answer.body, answer.asked_at, work.provider)


def _read_stream(resource: Resource, owner: Record, answer: Answer) -> Page:
    return junction.read_stream(resource, owner, answer.body, answer.asked_at)
