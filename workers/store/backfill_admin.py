"""Operator commands for backfills: list, plan with an estimate of requests, start, pause, resume, cancel."""

import math
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.errors import NotFound, UserErased
from workers.actions import Notice
from workers.aggregators.providers import KNOWN
from workers.store.backfills import COMPLETE, MARGIN, BackfillRequest, first_slice_days, max_slice_days, open_backfill
from workers.store.coverage import connected
from workers.store.engine import execute, scalars, transaction
from workers.store.schema import record_table
from workers.store.sql import quoted
from workers.store.users import claim_user, is_read_only

BackfillState = Literal["pending", "running", "paused", "complete", "failed", "cancelled"]
OPEN = ("pending", "running", "paused")
REQUESTED = text("""
SELECT aggregator, user_id, provider, resource, item, window_start, window_end
FROM headrace.backfills WHERE id = :id""")
# `share` is the part of the windows, with a day's margin at both ends, that has been fetched.
LIST = text("""
SELECT b.id, b.user_id, b.provider, b.resource, b.item, b.requested_by, b.status, b.window_start, b.window_end,
       b.is_final_seen, count(c.id) AS chunks, count(c.id) FILTER (WHERE c.status = 'done') AS chunks_done,
       b.records, b.pages, b.attempts, b.created_at, b.started_at, b.finished_at, b.due_at, b.error,
       coalesce(sum(extract(epoch FROM CASE c.status WHEN 'done' THEN c.window_end - c.window_start + interval '2 days'
                                       ELSE c.window_end - c.slice_end + interval '1 day' END))
                / sum(extract(epoch FROM c.window_end - c.window_start + interval '2 days')), 0)::float8 AS share,
       extract(epoch FROM coalesce(b.finished_at, now()) - b.started_at)::float8 AS seconds
FROM headrace.backfills b LEFT JOIN headrace.chunks c ON c.backfill_id = b.id
WHERE (CAST(:ids AS bigint[]) IS NULL OR b.id = ANY(:ids))
  AND (CAST(:user_ids AS text[]) IS NULL OR b.user_id = ANY(:user_ids))
  AND (CAST(:provider AS text) IS NULL OR b.provider = :provider)
  AND (CAST(:resource AS text) IS NULL OR b.resource = :resource)
  AND (CAST(:states AS text[]) IS NULL OR b.status = ANY(:states))
GROUP BY b.id ORDER BY array_position(ARRAY['running', 'paused', 'pending'], b.status), b.id DESC LIMIT :limit""")
CHUNKS = text("""
SELECT id, message_id, status, is_final, window_start, window_end, slice_end, slice_days,
       status = 'pending' AND cursor IS NOT NULL AS amid, pages, restarts, created_at
FROM headrace.chunks WHERE backfill_id = :id ORDER BY window_end DESC, id""")
PAUSE = text("""
UPDATE headrace.backfills SET status = 'paused', lease_until = '-infinity'
WHERE id = ANY(:ids) AND status IN ('pending', 'running') RETURNING id""")
CANCEL = text("""
UPDATE headrace.backfills SET status = 'cancelled', lease_until = '-infinity', finished_at = now()
WHERE id = ANY(:ids) AND status IN ('pending', 'running', 'paused') RETURNING id""")
RESUME = text("""
UPDATE headrace.backfills b SET status = CASE WHEN started_at IS NULL THEN 'pending' ELSE 'running' END, attempts = 0,
       crashes = 0, due_at = now(), finished_at = NULL, error = NULL
WHERE id = ANY(:ids) AND status IN ('paused', 'failed', 'cancelled')
  AND NOT EXISTS (SELECT 1 FROM headrace.users u WHERE u.user_id = b.user_id AND u.aggregator <> b.aggregator)
  AND (status = 'paused' OR NOT EXISTS (
      SELECT 1 FROM headrace.backfills o WHERE o.status IN ('pending', 'running', 'paused')
      AND (o.user_id, o.provider, o.resource, o.item, o.requested_by)
        = (b.user_id, b.provider, b.resource, b.item, b.requested_by)))
RETURNING id""")
RESET_RESTARTS = text("UPDATE headrace.chunks SET restarts = 0 WHERE backfill_id = ANY(:ids) AND status = 'pending'")
AGGREGATOR_OF_USER = text("SELECT aggregator FROM headrace.users WHERE user_id = :user_id")
PROVIDERS = text("""
SELECT provider FROM headrace.connections UNION SELECT provider FROM headrace.backfills
UNION SELECT provider FROM headrace.series""")
MEASURED_COSTS = text("""
SELECT provider, resource, sum(pages)::float8 AS pages,
       sum(extract(epoch FROM window_end - window_start + interval '2 days') / 86400)::float8 AS days
FROM headrace.backfills WHERE status = 'complete' AND item = '' AND pages > 0 GROUP BY 1, 2""")
NEWEST_IDS = text("SELECT id FROM headrace.backfills ORDER BY id DESC LIMIT 1000")


@dataclass(frozen=True)
class Backfill:
    """A backfill and its progress."""

    id: int
    user_id: str
    provider: str
    resource: str
    item: str
    requested_by: str
    status: BackfillState
    window_start: datetime | None
    window_end: datetime | None
    is_final_seen: bool
    chunks: int
    chunks_done: int
    records: int
    pages: int
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    due_at: datetime
    error: str | None
    share: float  # fetched part of the windows, 0 to 1
    seconds: float | None  # from the start to the end, or until now

    @property
    def rate(self) -> float | None:
        """Records per second."""
        return self.records / self.seconds if self.seconds else None

    @property
    def left(self) -> timedelta | None:
        """The estimated time left at the rate so far; None if unknown."""
        if self.status != "running" or not self.seconds or not self.share:
            return None
        return timedelta(seconds=self.seconds * (1 - self.share) / self.share)


class Chunk(NamedTuple):
    """One window of a backfill, and its position."""

    id: int
    message_id: str
    status: str
    is_final: bool
    window_start: datetime
    window_end: datetime
    slice_end: datetime
    slice_days: int
    amid: bool  # between two pages of a slice
    pages: int
    restarts: int
    created_at: datetime


@dataclass(frozen=True)
class Filter:
    """Selects backfills; None selects all."""

    ids: tuple[int, ...] | None = None
    user_ids: tuple[str, ...] | None = None
    provider: str | None = None
    resource: str | None = None
    states: tuple[str, ...] | None = None


def listed(engine: Engine, which: Filter, limit: int = 100) -> list[Backfill]:
    """Backfills, open ones first, then newest first."""
    lists = {"ids": which.ids, "user_ids": which.user_ids, "states": which.states}
    values = asdict(which) | {name: list(given) if given else None for name, given in lists.items()}
    return [Backfill(**row._asdict()) for row in execute(engine, LIST, values | {"limit": limit})]


def chunks_of(engine: Engine, backfill_id: int) -> list[Chunk]:
    """The chunks of a backfill, in the order in which they are fetched."""
    return [Chunk(**row._asdict()) for row in execute(engine, CHUNKS, {"id": backfill_id})]


def pause(engine: Engine, ids: Sequence[int]) -> list[int]:
    """Pauses backfills after the current page. Returns the ids; the others were paused or had ended before."""
    return scalars(engine, PAUSE, {"ids": list(ids)}, confirm=True)


def cancel(engine: Engine, ids: Sequence[int]) -> list[int]:
    """Cancels backfills after the current page; fetched data stays. Returns the ids."""
    return scalars(engine, CANCEL, {"ids": list(ids)}, confirm=True)


def resume(engine: Engine, ids: Sequence[int]) -> list[int]:
    """Resumes paused, cancelled and failed backfills at their position. Returns the ids."""
    with transaction(engine, confirm=True) as connection:
        # One by one: of two backfills of the same history, the second must see that the first is open.
        resumed = [found for number in ids for found in connection.scalars(RESUME, {"ids": [number]})]
        connection.execute(RESET_RESTARTS, {"ids": resumed})
        for number in resumed:  # the last page may have been stored while the backfill was stopped
            connection.execute(COMPLETE, {"id": number})
        return resumed


def newest_ids(engine: Engine) -> list[int]:
    return scalars(engine, NEWEST_IDS)


def known_providers(connection: Connection, names: Collection[str]) -> frozenset[str]:
    """The documented providers. If one of the names is not documented, the providers of stored data are included.

    The query for them reads all series.
    """
    if all(name.lower() in KNOWN for name in names):
        return KNOWN
    return KNOWN.union(filter(None, connection.scalars(PROVIDERS)))


@dataclass(frozen=True)
class HistoryWanted:
    """A request for history. Without providers or resources, all are requested."""

    user_id: str
    since: datetime
    until: datetime
    providers: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    aggregator: str = "junction"


@dataclass(frozen=True)
class RequestEstimate:
    """The pages that were fetched, and the days of history in them, by provider and resource."""

    of: Mapping[tuple[str, str], tuple[float, float]]  # pages, days

    def requests(
        self, provider: str, resource: Resource, start: datetime, end: datetime, aggregator: str = "junction"
    ) -> tuple[int, bool]:
        """The number of requests for a window. True if it was measured, False if it is only the lower bound."""
        days = (end - start + 2 * MARGIN) / timedelta(days=1)
        if resource.dates == "none":
            return _min_requests(aggregator, resource, days), True
        known = [self.of[key] for key in self.of if key == (provider, resource.name)]
        known = known or [cost for (_, name), cost in self.of.items() if name == resource.name]
        if known:
            pages, walked = sum(pages for pages, _ in known), sum(walked for _, walked in known)
            return max(1, math.ceil(days * pages / walked)), True
        return _min_requests(aggregator, resource, days), False


def measured_costs(connection: Connection) -> RequestEstimate:
    return RequestEstimate(
        {(row.provider, row.resource): (row.pages, row.days) for row in connection.execute(MEASURED_COSTS)}
    )


def _min_requests(aggregator: str, resource: Resource, days: float) -> int:
    """The number of slices in a window without data."""
    if resource.dates == "none" and resource.kind != "stream":
        return 1
    count, length, max_days = 0, first_slice_days(aggregator, resource), max_slice_days(aggregator)
    while days > 0:
        days, length, count = days - length, min(length * 2, max_days), count + 1
    return count


@dataclass(frozen=True)
class BackfillPlan:
    """A backfill to start, and its cost in requests."""

    aggregator: str
    user_id: str
    provider: str
    resource: str
    since: datetime
    until: datetime
    requests: int
    is_measured: bool  # from completed backfills; otherwise `requests` is the lower bound


def plan(connection: Connection, settings: Settings, wanted: HistoryWanted) -> list[BackfillPlan]:
    """One backfill per provider and resource. Raises NotFound for a resource of which Terra has no history.

    Without a known provider, one backfill per resource covers all providers.
    """
    providers = wanted.providers or [*connected(connection, wanted.user_id)] or [""]
    is_terra = wanted.aggregator == "terra"
    names = wanted.resources or [
        name for name, one in catalogue().items() if (one.terra is not None if is_terra else one.has_history)
    ]
    if is_terra and (missing := [name for name in names if not catalogue()[name].terra]):
        raise NotFound(f"Terra has no history of {', '.join(missing)}; leave these resources out")
    costs = measured_costs(connection)
    return [
        _plan_one(connection, wanted, costs, provider, catalogue()[name])
        for provider in providers
        for name in names
        if settings.keeps(name, provider)
    ]


def aggregator_of(connection: Connection, settings: Settings, user_id: str) -> str:
    """The aggregator that owns the user; without an owner, the first one with an API key."""
    known: str | None = connection.scalar(AGGREGATOR_OF_USER, {"user_id": user_id})
    return known or next(iter(settings.readable), "junction")


def _plan_one(
    connection: Connection, wanted: HistoryWanted, costs: RequestEstimate, provider: str, resource: Resource
) -> BackfillPlan:
    requests, is_measured = costs.requests(provider, resource, wanted.since, wanted.until, wanted.aggregator)
    if resource.of and not is_measured:
        requests += _count_records(connection, catalogue()[resource.of], wanted, provider)
    return BackfillPlan(
        **{name: getattr(wanted, name) for name in ("aggregator", "user_id", "since", "until")},
        provider=provider,
        resource=resource.name,
        requests=requests,
        is_measured=is_measured,
    )


def _count_records(connection: Connection, resource: Resource, wanted: HistoryWanted, provider: str) -> int:
    """The number of records in the window. Each has a stream, which costs one request."""
    query = text(f"""
SELECT count(*) FROM {record_table(resource)} WHERE user_id = :user_id AND :provider IN ('', provider)
   AND {quoted(resource.day_field or "version")} BETWEEN :since AND :until""")
    return int(connection.scalar(query, vars(wanted) | {"provider": provider}) or 0)


def start(connection: Connection, planned: BackfillPlan) -> int:
    """Opens a backfill, or extends the open one of the same history. Returns its id.

    Raises UserErased, and NotFound if the user belongs to another aggregator.
    """
    user = claim_user(connection, planned.user_id, planned.aggregator)
    if user.other_owner:
        raise NotFound(f"{planned.user_id} belongs to {user.other_owner}; {planned.aggregator} has no such user")
    if user.is_read_only:
        raise UserErased(f"{planned.user_id} was erased, and is not fetched again")
    notice = Notice(
        user_id=planned.user_id,
        provider=planned.provider,
        resource=planned.resource,
        window_start=planned.since,
        window_end=planned.until,
        is_final=True,
    )
    return _open(connection, planned.aggregator, notice)


def reopen(engine: Engine, number: int, item: str = "") -> bool:
    """Opens a backfill that requests the window of a completed one again, or the stream of one record (`item`).

    False if there is no such backfill, or its user was erased or belongs to another aggregator.
    """
    with transaction(engine, confirm=True) as connection:
        row = connection.execute(REQUESTED, {"id": number}).mappings().first()
        if row is None or is_read_only(connection, row["user_id"], row["aggregator"]):
            return False
        requested = dict(row)
        aggregator = requested.pop("aggregator")
        requested["item"] = item or requested["item"]
        _open(connection, aggregator, Notice(**requested, is_final=True))
        return True


def _open(connection: Connection, aggregator: str, notice: Notice) -> int:
    asked = BackfillRequest(aggregator, f"operator-{uuid.uuid4()}", "operator", datetime.now(UTC))
    return open_backfill(connection, asked, notice) or 0
