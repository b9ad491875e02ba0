"""Backfills: announced history, how far it has been fetched, and the lease of the worker that fetches it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource, catalogue
from app.delivery import Delivery
from workers.actions import NO_NOTES, Notes, Notice, Record, Refused
from workers.aggregators.requests import DateRange
from workers.store import feed
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import execute, scalars, transaction
from workers.store.schema import record_table
from workers.store.users import claim_user

RequestedBy = Literal["notice", "operator", "reconcile"]
LEASE = "interval '60 seconds'"  # longer than the longest request
MARGIN = timedelta(days=1)  # added at both ends: the APIs do not document whether edges are inclusive, nor their zone
EARLIEST_HISTORY = datetime(1970, 1, 1, tzinfo=UTC)  # earlier dates are errors, and year 1 minus MARGIN is invalid
DEFAULT_HISTORY = timedelta(days=180)
FIRST_SLICE_DAYS = {"timeseries": 14, "summary": 60, "stream": 30, "device": 60}
MANY_PAGES = 200  # in one slice; the next slice is half as long
KNOWN = text("""
SELECT 1 FROM headrace.chunks c JOIN headrace.backfills b ON b.id = c.backfill_id
WHERE c.message_id = :message_id AND b.aggregator = :aggregator AND b.resource = :resource AND b.item = :item""")
REOPEN = text("""
UPDATE headrace.backfills SET status = 'running', finished_at = NULL WHERE id = (
    SELECT id FROM headrace.backfills b WHERE user_id = :user_id AND provider = :provider AND resource = :resource
       AND item = '' AND requested_by = 'notice' AND status = 'complete' AND finished_at > now() - interval '1 day'
       AND NOT EXISTS (SELECT 1 FROM headrace.backfills o WHERE o.user_id = b.user_id AND o.provider = b.provider
                       AND o.resource = b.resource AND o.item = '' AND o.requested_by = 'notice'
                       AND o.status IN ('pending', 'running', 'paused'))
    ORDER BY id DESC LIMIT 1)""")
OPEN = text("""
INSERT INTO headrace.backfills AS stored
    (aggregator, user_id, provider, resource, item, requested_by, window_start, window_end, is_final_seen)
VALUES (:aggregator, :user_id, :provider, :resource, :item, :requested_by, :window_start, :window_end, :is_final)
ON CONFLICT (user_id, provider, resource, item, requested_by) WHERE status IN ('pending', 'running', 'paused')
DO UPDATE SET
    window_start = least(stored.window_start, excluded.window_start),
    window_end = greatest(stored.window_end, excluded.window_end),
    is_final_seen = stored.is_final_seen OR excluded.is_final_seen
RETURNING id""")
ADD_CHUNK = text("""
INSERT INTO headrace.chunks (backfill_id, message_id, window_start, window_end, is_final, slice_end, slice_days)
VALUES (:backfill_id, :message_id, :window_start, :window_end, :is_final, :slice_end, :slice_days)
ON CONFLICT (message_id, backfill_id) DO NOTHING""")
# Concurrent claims would each count the other one against the limits, so claims are serialized.
SERIALIZE_CLAIMS = text("SELECT pg_advisory_xact_lock(hashtext('headrace.claim'))")
CLAIM = text(f"""
UPDATE headrace.backfills AS b
SET status = 'running', started_at = coalesce(started_at, now()), lease_until = now() + {LEASE},
    crashes = crashes + CASE WHEN lease_until > '-infinity' THEN 1 ELSE 0 END  -- the lease expired without a release
WHERE id = :id AND status IN ('pending', 'running') AND due_at <= now() AND lease_until < now()
  AND (CAST(:aggregators AS text[]) IS NULL OR aggregator = ANY(:aggregators))
  AND EXISTS (SELECT 1 FROM headrace.chunks c WHERE c.backfill_id = b.id AND c.status = 'pending')
  AND (SELECT count(*) < :per_account AND count(*) FILTER (WHERE o.user_id = b.user_id) < :per_user
              AND count(*) FILTER (WHERE (o.user_id, o.provider, o.resource) = (b.user_id, b.provider, b.resource)) = 0
       FROM headrace.backfills o
       WHERE o.aggregator = b.aggregator AND o.lease_until > '-infinity' AND o.lease_until > now() AND o.id <> b.id)
RETURNING id""")
NEXT = text("""
SELECT b.id AS backfill_id, b.aggregator, b.user_id, b.provider, b.resource, b.item, b.requested_by,
       b.attempts, b.crashes, c.id AS chunk_id, c.window_start, c.slice_end, c.slice_days, c.cursor, c.pages, c.restarts
FROM headrace.backfills b JOIN headrace.chunks c ON c.backfill_id = b.id
WHERE b.id = :id AND c.status = 'pending' ORDER BY c.window_end DESC, c.id LIMIT 1""")
# The condition includes the old position, so that a worker that lost its lease cannot move the position back.
ADVANCE = text("""
UPDATE headrace.chunks SET slice_end = :slice_end, slice_days = :slice_days, cursor = :cursor, pages = :pages,
       restarts = :restarts, status = :status
WHERE id = :chunk_id AND status = 'pending' AND slice_end = :was_slice_end
  AND cursor IS NOT DISTINCT FROM :was_cursor""")
COUNT = text(f"""
UPDATE headrace.backfills SET records = records + :records, pages = pages + :pages, attempts = 0, crashes = 0,
       refused = refused + :refused, first_refusal = coalesce(first_refusal, :first_refusal), error = NULL,
       lease_until = CASE WHEN status = 'running' THEN now() + {LEASE} ELSE '-infinity' END
WHERE id = :id RETURNING status = 'running' AS is_running, refused, first_refusal, CAST(notes AS text)""")
REMARK = text("UPDATE headrace.backfills SET error = :error, notes = CAST(:notes AS jsonb) WHERE id = :id")
RELEASE = text("""
UPDATE headrace.backfills SET lease_until = '-infinity', due_at = now() + make_interval(secs => :seconds),
       attempts = attempts + :failed, error = coalesce(:error, error) WHERE id = :id""")
LOCK = text("SELECT 1 FROM headrace.backfills WHERE id = :id FOR UPDATE")
# Announces the completed history in the change feed.
COMPLETE = text(f"""
WITH complete AS (
    UPDATE headrace.backfills SET status = 'complete', finished_at = now(), lease_until = '-infinity'
    WHERE id = :id AND is_final_seen AND status = 'running'
      AND NOT EXISTS (SELECT 1 FROM headrace.chunks WHERE backfill_id = :id AND status <> 'done')
    RETURNING user_id, provider, resource)
INSERT INTO headrace.outbox ({feed.COLUMNS})
SELECT 'put', user_id, 'history', provider, NULL, resource, NULL, NULL, 1, 'backfill' FROM complete""")
FAIL = text("""
UPDATE headrace.backfills SET status = 'failed', finished_at = now(), lease_until = '-infinity', error = :error
WHERE id = :id AND status = 'running'
  AND EXISTS (SELECT 1 FROM headrace.chunks WHERE id = :chunk_id AND status = 'pending')""")
DUE = text("""
SELECT id FROM headrace.backfills b
WHERE status IN ('pending', 'running') AND due_at <= now() AND lease_until < now()
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
  AND (CAST(:aggregators AS text[]) IS NULL OR aggregator = ANY(:aggregators))
  AND EXISTS (SELECT 1 FROM headrace.chunks c WHERE c.backfill_id = b.id AND c.status = 'pending')
ORDER BY row_number() OVER (PARTITION BY user_id ORDER BY due_at, id), due_at, id LIMIT :limit""")


def first_slice_days(aggregator: str, resource: Resource) -> int:
    return min(FIRST_SLICE_DAYS[resource.kind], max_slice_days(aggregator))


def max_slice_days(aggregator: str) -> int:
    """The maximum length of a request's date range, in days."""
    from workers.aggregators.registry import AGGREGATORS  # noqa: PLC0415 - 0.05 s that `headrace status` does not need

    return AGGREGATORS[aggregator].API_LIMITS.max_slice_days


@dataclass(frozen=True)
class ChunkPosition:
    """A chunk and its position. All data later than `slice_end` and, within the slice, before `cursor` is stored."""

    backfill_id: int
    aggregator: str
    user_id: str
    provider: str
    resource: str
    item: str
    requested_by: RequestedBy
    attempts: int
    crashes: int
    chunk_id: int
    window_start: datetime
    slice_end: datetime
    slice_days: int
    cursor: str | None
    pages: int
    restarts: int

    @property
    def of(self) -> Resource:
        return catalogue()[self.resource]

    @property
    def lowest(self) -> datetime:
        """The oldest instant that is requested."""
        return self.window_start - MARGIN

    @property
    def slice(self) -> DateRange:
        return DateRange(max(self.lowest, self.slice_end - timedelta(days=self.slice_days)), self.slice_end)

    def after(self, cursor: str | None, records: int) -> "ChunkPosition | None":
        """The position after a page; None at the end. An empty slice doubles the next one, over 200 pages halve it."""
        if cursor is not None:
            return replace(self, cursor=cursor, pages=self.pages + 1, attempts=0)
        if self.item:
            return None
        start = self.slice.start
        if start <= self.lowest or self.of.dates == "none":
            return None
        days = self.slice_days
        if records == 0 and self.pages == 0:
            days = min(days * 2, max_slice_days(self.aggregator))
        elif self.pages > MANY_PAGES:
            days = max(days // 2, 1)
        return replace(self, cursor=None, pages=0, slice_end=start, slice_days=days, attempts=0, restarts=0)

    def halved(self) -> "ChunkPosition":
        """The same position with a slice of half the length."""
        return replace(self, cursor=None, pages=0, slice_days=max(self.slice_days // 2, 1))

    def restarted(self) -> "ChunkPosition":
        """The start of the slice, which is halved: cursors may expire before the last page of a long slice."""
        return replace(self.halved(), restarts=self.restarts + 1)


@dataclass(frozen=True)
class BackfillRequest:
    """The source of a request for history: a notice's message id, or a generated one."""

    aggregator: str
    message_id: str
    by: RequestedBy
    at: datetime


def open_backfill(connection: Connection, asked: BackfillRequest, notice: Notice) -> int | None:
    """Opens a backfill for a notice, or extends the open one. None if this notice was processed before.

    Pulls are identified by delivery id, not by (user, resource): after a re-authorisation the same notice arrives under
    a new id and means a new pull. A non-final chunk that arrives up to a day after its pull was completed is late, and
    reopens that pull.
    """
    identity = {name: getattr(notice, name) for name in ("user_id", "provider", "resource", "item")}
    identity |= {"aggregator": asked.aggregator, "message_id": asked.message_id, "requested_by": asked.by}
    if connection.execute(KNOWN, identity).first():
        return None
    if not notice.is_final:
        connection.execute(REOPEN, identity)
    end = max(min(notice.window_end or asked.at, datetime.now(UTC)), EARLIEST_HISTORY)
    start = max(min(notice.window_start or end - DEFAULT_HISTORY, end), EARLIEST_HISTORY)
    window = {"window_start": start, "window_end": end, "is_final": notice.is_final}
    backfill_id = int(connection.scalar(OPEN, identity | window) or 0)
    days = first_slice_days(asked.aggregator, catalogue()[notice.resource])
    position = {"backfill_id": backfill_id, "slice_end": end + MARGIN, "slice_days": days}
    connection.execute(ADD_CHUNK, identity | window | position)
    return backfill_id


def claim(
    engine: Engine, backfill_id: int, per_user: int, per_account: int, of: Iterable[str] | None = None
) -> ChunkPosition | None:
    """Leases a backfill and returns its next chunk; None if it is not due, leased, or too many backfills are leased.

    `of` restricts the aggregators to those with an API key.
    """
    with transaction(engine) as connection:
        connection.execute(SERIALIZE_CLAIMS)
        values = {"id": backfill_id, "per_user": per_user, "per_account": per_account, "aggregators": of and list(of)}
        claimed = connection.execute(CLAIM, values).first()
        return _next(connection, backfill_id) if claimed else None


def _next(connection: Connection, backfill_id: int) -> ChunkPosition | None:
    row = connection.execute(NEXT, {"id": backfill_id}).mappings().first()
    return ChunkPosition(**row) if row else None


def advance(
    connection: Connection,
    work: ChunkPosition,
    then: ChunkPosition | None,
    *,
    pages: int,
    records: int,
    refused: Sequence[Refused] = (),
    notes: Notes = NO_NOTES,
) -> bool:
    """Moves the position, in the transaction that stores the rows of these pages.

    `refused` has a reason for each record that was left out. Their number, the first reason and all `notes` stay as the
    backfill's error. Any other error is cleared. False if the worker must stop: another one has moved the position, or
    an operator has stopped the backfill.
    """
    if not _moved(connection, work, then):
        return False
    counted: dict[str, Any] = {"id": work.backfill_id, "pages": pages, "records": records}
    counted["refused"] = sum(one.items for one in refused)
    counted["first_refusal"] = refused[0].reason if refused else None
    row = connection.execute(COUNT, counted).one()
    notes += msgspec.json.decode(row.notes, type=Notes) if row.notes else NO_NOTES
    refusals = [f"{row.refused} refused, first: {row.first_refusal}"] if row.refused else []
    if remarks := (*refusals, *notes.sentences()):
        values = {"error": "; ".join(remarks), "notes": msgspec.json.encode(notes).decode()}
        connection.execute(REMARK, values | {"id": work.backfill_id})
    if then is None:  # here, because a worker that crashes before `next_chunk` would leave a backfill that is never due
        connection.execute(COMPLETE, {"id": work.backfill_id})
    return bool(row.is_running)


def _moved(connection: Connection, work: ChunkPosition, then: ChunkPosition | None) -> bool:
    to = then or work
    position = {name: getattr(to, name) for name in ("slice_end", "slice_days", "cursor", "pages", "restarts")}
    was = {"chunk_id": work.chunk_id, "was_slice_end": work.slice_end, "was_cursor": work.cursor}
    moved = connection.execute(ADVANCE, position | was | {"status": "pending" if then else "done"})
    return moved.rowcount == 1


def next_chunk(engine: Engine, backfill_id: int) -> ChunkPosition | None:
    """The next chunk of a leased backfill, newest first. Without one, the backfill is completed or released.

    It is complete once the final notice has arrived. The row is locked first: a concurrent notice must not find the
    backfill complete.
    """
    with transaction(engine) as connection:
        connection.execute(LOCK, {"id": backfill_id})
        work = _next(connection, backfill_id)
        if work is None and not connection.execute(COMPLETE, {"id": backfill_id}).rowcount:
            connection.execute(RELEASE, {"id": backfill_id, "seconds": 0, "failed": 0, "error": None})
        return work


def release(
    engine: Engine, work: ChunkPosition, seconds: float, *, failed: bool = False, error: str | None = None
) -> None:
    """Releases the lease; the backfill is due again in `seconds`."""
    values = {"id": work.backfill_id, "seconds": seconds, "failed": int(failed), "error": error}
    execute(engine, RELEASE, values)


def move(engine: Engine, work: ChunkPosition, to: ChunkPosition) -> None:
    """Moves the position without a page, so that failed attempts still count."""
    with transaction(engine) as connection:
        _moved(connection, work, to)


def fail(engine: Engine, work: ChunkPosition, error: str, evidence: Delivery | None = None) -> None:
    """Ends a backfill that retries cannot help. `evidence`, the response that ended it, becomes a dead letter."""
    with transaction(engine) as connection:
        user = claim_user(connection, work.user_id, work.aggregator)
        if user.is_erased or user.merged_into:
            return
        failed = connection.execute(FAIL, {"id": work.backfill_id, "chunk_id": work.chunk_id, "error": error})
        if failed.rowcount and evidence:
            add_dead_letter(connection, evidence, error, f"fetch.{work.resource}", work.user_id)


def owner(engine: Engine, work: ChunkPosition) -> Record | None:
    """The record of a stream, from the stored notice or the stored record. None if it was erased."""
    listed = catalogue()[work.of.of or work.resource]
    for table in (record_table(work.of), record_table(listed)):
        query = text(f"SELECT provider, source_type FROM {table} WHERE user_id = :user_id AND id = :id")
        for row in execute(engine, query, {"user_id": work.user_id, "id": work.item}):
            return Record(listed.name, work.user_id, work.item, row.provider, row.source_type, b"{}", work.slice_end)
    return None


def due(engine: Engine, *, user_id: str | None = None, of: Iterable[str] | None = None, limit: int = 500) -> list[int]:
    """The ids of backfills that are due now, optionally of one user or of these aggregators."""
    return scalars(engine, DUE, {"user_id": user_id, "aggregators": of and list(of), "limit": limit})
