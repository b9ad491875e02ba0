"""`headrace report completeness`: delivery outcomes by day, refused items, open gaps, and days without data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Engine

from workers.broker_admin import Lane
from workers.reconcile.gaps import DENSE
from workers.store import completeness as store
from workers.store.completeness import OpenGap, OutcomeCount, RefusedItems, Unfinished
from workers.store.coverage import Fetched, ResourceKey, fetched
from workers.store.engine import transaction

OUTCOMES = ("applied", "duplicate", "stale", "ignored", "dead")
STUCK = ("failed", "paused")  # an operator must resume these
MAX_LISTED = 1000  # gaps, backfills, and users with refused items
DAY = timedelta(days=1)


@dataclass(frozen=True)
class DayOutcomes:
    """The outcomes of one provider's deliveries on one day. Counts distinct delivery ids of the ledger."""

    provider: str
    day: date
    counts: Mapping[str, int]
    attempts: int  # including redeliveries
    dead_letters: int  # that still exist

    @property
    def accepted(self) -> int:
        """Excludes queued messages, which have no ledger row and so no day yet."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class MissingDays:
    """Days without data between days with data, of a resource that has data on most days."""

    key: ResourceKey
    days: tuple[date, ...]


@dataclass
class Completeness:
    since: datetime
    until: datetime
    days: list[DayOutcomes]
    pending: Mapping[str, int]  # messages by lane, now; each holds one delivery or more
    gaps: Mapping[str, int]  # by responsible party
    listed_gaps: list[OpenGap]
    unfinished: list[Unfinished]
    refused_items: int  # of webhooks and history
    listed_refused: list[RefusedItems]
    holes: list[MissingDays] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """A phrase for each kind of missing or dead data. A backfill in progress is neither."""
        counts = {
            "dead letters": sum(one.dead_letters for one in self.days),
            "refused items": self.refused_items,
            "gaps that are ours": self.gaps.get("ours", 0),
            "backfills that failed or are paused": sum(one.status in STUCK for one in self.unfinished),
            "days without data between days with data": sum(len(hole.days) for hole in self.holes),
        }
        return [f"{count} {what}" for what, count in counts.items() if count]


def read_report(
    engine: Engine,
    lanes: Iterable[Lane],
    since: datetime,
    until: datetime,
    on_progress: Callable[[int, int], None] | None,
) -> Completeness:
    """`on_progress` gets the users checked so far and their total; None skips the search for missing days."""
    entries = list(store.ledger(engine, since, until))
    with transaction(engine) as connection:
        days = list(_by_day(entries, store.dead_letters(connection, since, until)))
        counts, listed = store.gaps(connection, MAX_LISTED)
        unfinished = store.unfinished(connection, since, MAX_LISTED)
        refused, listed_refused = store.refused_items(connection, since, until, MAX_LISTED)
        people = store.count_people(connection)
    pending = {lane.name: lane.messages for lane in lanes}
    report = Completeness(since, until, days, pending, counts, listed, unfinished, refused, listed_refused)
    if on_progress is not None:
        done = 0
        for users, stored in store.days(engine, since, until):
            with transaction(engine) as connection:
                asked = fetched(connection, users)
            report.holes += holes(stored, asked)
            done += len(users)
            on_progress(done, people)
    return report


def _by_day(entries: Sequence[OutcomeCount], dead_letters: Mapping[tuple[str, date], int]) -> Iterator[DayOutcomes]:
    for name, day in sorted({(one.provider, one.day) for one in entries} | dead_letters.keys()):
        of_day = [one for one in entries if (one.provider, one.day) == (name, day)]
        counts = dict.fromkeys(OUTCOMES, 0) | {one.outcome: one.deliveries for one in of_day}
        yield DayOutcomes(name, day, counts, sum(one.attempts for one in of_day), dead_letters.get((name, day), 0))


def holes(
    stored: Mapping[ResourceKey, set[int]], asked: Mapping[ResourceKey, Sequence[Fetched]]
) -> Iterator[MissingDays]:
    """Days without data between stored days. A day that was fetched after it ended counts as empty, not missing.

    Resources with data on fewer than half of the days are skipped: a day without a workout is normal.
    """
    for key, days in sorted(stored.items()):
        if len(days) < 2:
            continue
        span = range(min(days), max(days) + 1)
        if len(days) < DENSE * len(span):
            continue
        empty = [one for one in span if one not in days and not _was_fetched(one, asked.get(key, ()))]
        if empty:
            yield MissingDays(key, tuple(date.fromordinal(one) for one in empty))


def _was_fetched(day: int, asked: Sequence[Fetched]) -> bool:
    start = datetime.combine(date.fromordinal(day), datetime.min.time(), UTC)
    end = start + DAY
    return any(one.state == "done" and one.start < end and one.end >= start and one.created_at >= end for one in asked)
