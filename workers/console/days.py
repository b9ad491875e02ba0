"""The map of a person's days: which days of each resource are stored, empty, missing or being fetched."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, text

from app.catalogue import catalogue
from workers.store import coverage
from workers.store.coverage import ResourceKey

State = Literal["stored", "fetching", "gap", "empty"]
Window = tuple[datetime | None, datetime | None]
ORDER: tuple[State, ...] = ("gap", "fetching", "stored", "empty")  # of a day with several providers
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
    """A row of the map: the state of each day, and what differs between the providers."""

    resource: str
    states: tuple[State, ...]
    details: tuple[str, ...]


def days_of(
    connection: Connection, user_id: str, gaps: Sequence[Row[Any]], first: date, last: date
) -> list[ResourceDays]:
    """The map, by resource. A day is in UTC, as in the reconciliation.

    Of several providers, the one with a gap counts first: another one's data must not hide it.
    """
    keys = _keys(connection, user_id)
    span = datetime.combine(first, time(), UTC), datetime.combine(last, time(), UTC)
    stored = coverage.days_stored(connection, dict.fromkeys(keys, span))
    fetched = coverage.fetched(connection, [user_id])
    fetching: defaultdict[ResourceKey, list[Window]] = defaultdict(list)
    for key, windows in fetched.items():
        fetching[key] += [(one.start, one.end) for one in windows if one.state == "open"]
    missing: defaultdict[ResourceKey, list[Window]] = defaultdict(list)
    for gap in gaps:
        missing[ResourceKey(user_id, gap.provider, gap.resource)].append((gap.window_start, gap.window_end))
    by_resource: defaultdict[str, dict[str, list[State]]] = defaultdict(dict)
    for key in sorted({*keys, *fetching}):
        every = key._replace(provider="")  # of a backfill that is about all providers
        days: dict[int, State] = dict.fromkeys(range(first.toordinal(), last.toordinal() + 1), "empty")
        days |= dict.fromkeys(_within(missing[key] + missing[every], first, last), "gap")
        days |= dict.fromkeys(_within(fetching[key] + fetching[every], first, last), "fetching")
        days |= dict.fromkeys(stored.get(key, set()) & days.keys(), "stored")
        by_resource[key.resource][key.provider] = list(days.values())
    return [_merged(resource, found) for resource, found in sorted(by_resource.items()) if _is_shown(found)]


def _is_shown(by_provider: Mapping[str, Sequence[State]]) -> bool:
    return any(set(states) != {"empty"} for states in by_provider.values())


def _merged(resource: str, by_provider: dict[str, list[State]]) -> ResourceDays:
    if len(by_provider) > 1 and "stored" not in by_provider.get("", ()):
        by_provider.pop("", None)  # the others contain it
    used = {provider: states for provider, states in by_provider.items() if set(states) != {"empty"}}
    merged, details = [], []
    for states in zip(*used.values(), strict=True):
        merged.append(min(states, key=ORDER.index))
        named = zip(used, states, strict=True)
        details.append(", ".join(f"{state} ({provider})" for provider, state in named) if len(set(states)) > 1 else "")
    return ResourceDays(resource, tuple(merged), tuple(details))


def _keys(connection: Connection, user_id: str) -> list[ResourceKey]:
    """The keys of resources with days. A backfill without a provider is about all of them."""
    values = {"user_id": user_id}
    providers = list(connection.scalars(PROVIDERS, values))
    records = [one.name for one in catalogue().values() if not one.is_series and one.day_field]
    found = {(provider, name) for provider in providers for name in records}
    found |= {(row.provider, row.resource) for row in connection.execute(KEYS, values)}
    return [ResourceKey(user_id, *one) for one in sorted(found) if one[1] in catalogue()]


def _within(windows: Iterable[Window], first: date, last: date) -> Iterator[int]:
    """The days of these windows from `first` to `last`. A window without an end is about every day."""
    for start, end in windows:
        begin = max(start.date(), first) if start else first
        yield from range(begin.toordinal(), (min(end.date(), last) if end else last).toordinal() + 1)


def bounds(last: date | None, count: int) -> tuple[date, date]:
    """The first and last day of a map of `count` days that ends on `last`, or today; a year ahead at most."""
    today = datetime.now(UTC).date()
    end = max(EARLIEST, min(last or today, today + timedelta(days=366)))
    return end - timedelta(days=count - 1), end
