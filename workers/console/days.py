"""The map of a person's days: which days of each resource are stored, empty, missing or being fetched."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, text

from app.catalogue import catalogue
from workers.store import coverage
from workers.store.coverage import Fetched, ResourceKey

State = Literal["stored", "fetching", "gap", "empty"]
DAYS = 60
EARLIEST = date(1970, 1, 1)
# What the user has or should have: series, backfills, gaps, and connections for records.
KEYS = text("""
SELECT DISTINCT provider, resource FROM headrace.series WHERE user_id = :user_id
UNION SELECT DISTINCT provider, resource FROM headrace.backfills WHERE user_id = :user_id AND item = ''
UNION SELECT DISTINCT provider, resource FROM headrace.gaps WHERE user_id = :user_id""")
PROVIDERS = text("""
SELECT provider FROM headrace.connections WHERE user_id = :user_id
UNION SELECT provider FROM headrace.series WHERE user_id = :user_id""")


@dataclass(frozen=True)
class ResourceDays:
    """A row of the map: the state of each day."""

    resource: str
    states: tuple[State, ...]

    def count(self, state: State) -> int:
        return self.states.count(state)


def days_of(
    connection: Connection, user_id: str, gaps: Sequence[Mapping[str, Any]], first: date, last: date
) -> list[ResourceDays]:
    """The map, by resource, over all providers. A day is in UTC, as in the reconciliation."""
    keys = _keys(connection, user_id)
    span = datetime.combine(first, time(), UTC), datetime.combine(last, time(), UTC)
    stored = coverage.days_stored(connection, dict.fromkeys(keys, span))
    fetched = coverage.fetched(connection, [user_id])
    by_resource: defaultdict[str, set[ResourceKey]] = defaultdict(set)
    for key in (*keys, *fetched):
        by_resource[key.resource].add(key)
    numbers = range(first.toordinal(), last.toordinal() + 1)
    rows = []
    for resource, of_resource in sorted(by_resource.items()):
        present = set[int]().union(*(stored.get(key, set()) for key in of_resource))
        fetching = _days(_open(fetched.get(key, [])) for key in of_resource)
        missing = _days([(one["window_start"], one["window_end"])] for one in gaps if one["resource"] == resource)
        states = tuple(_state(number, present, fetching, missing) for number in numbers)
        if set(states) != {"empty"}:
            rows.append(ResourceDays(resource, states))
    return rows


def _keys(connection: Connection, user_id: str) -> list[ResourceKey]:
    """The keys of resources with days. A backfill without a provider is about all of them."""
    values = {"user_id": user_id}
    providers = list(connection.scalars(PROVIDERS, values))
    records = [one.name for one in catalogue().values() if not one.is_series and one.day_field]
    found = {(provider, name) for provider in providers for name in records}
    found |= {(row.provider, row.resource) for row in connection.execute(KEYS, values)}
    return [ResourceKey(user_id, *one) for one in sorted(found) if one[1] in catalogue()]


def _open(windows: Iterable[Fetched]) -> list[tuple[datetime, datetime]]:
    return [(one.start, one.end) for one in windows if one.state == "open"]


def _days(windows: Iterable[Iterable[tuple[datetime | None, datetime | None]]]) -> list[tuple[int, int]]:
    """Windows as ordinals of days. One without an end is about every day."""
    return [
        (start.toordinal() if start else 0, end.toordinal() if end else date.max.toordinal())
        for group in windows
        for start, end in group
    ]


def _state(
    number: int, stored: set[int], fetching: Sequence[tuple[int, int]], missing: Sequence[tuple[int, int]]
) -> State:
    if number in stored:
        return "stored"
    if any(start <= number <= end for start, end in fetching):
        return "fetching"
    return "gap" if any(start <= number <= end for start, end in missing) else "empty"


def bounds(last: date | None, count: int) -> tuple[date, date]:
    """The first and last day of a map of `count` days that ends on `last`, or today; a year ahead at most."""
    today = datetime.now(UTC).date()
    end = max(EARLIEST, min(last or today, today + timedelta(days=366)))
    return end - timedelta(days=count - 1), end
