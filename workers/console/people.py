"""People: search, and what the page of one person shows. States, counts and ids; values only from `values`."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, text

from app.catalogue import catalogue
from app.errors import NotFound
from workers.console.formats import PAGE_ROWS
from workers.store import coverage, user_lookup
from workers.store.coverage import ResourceKey

PAGE = """
SELECT user_id, client_user_id, first_seen, erased_at FROM headrace.users
WHERE {which} AND (CAST(:after AS text) IS NULL OR user_id > :after) ORDER BY user_id LIMIT :limit"""
ALL = text(PAGE.format(which="merged_into IS NULL"))
# Without an index, as `user_lookup`: with a million users it takes 0.3 s.
PART = "(position(lower(:name) IN lower(user_id)) > 0 OR position(lower(:name) IN lower(client_user_id)) > 0)"
CONTAINING = text(PAGE.format(which=f"merged_into IS NULL AND {PART}"))
BY_IDS = text(PAGE.format(which="user_id = ANY(:users)"))
ONE = text("""
SELECT user_id, client_user_id, first_seen, erased_at, aggregator, merged_into FROM headrace.users
WHERE user_id = :user_id""")
FORMER = text("SELECT user_id FROM headrace.users WHERE merged_into = ANY(:users) ORDER BY user_id")
SAME_PERSON = text("""
SELECT user_id FROM headrace.users
WHERE coalesce(client_user_id, user_id) = coalesce(CAST(:client_user_id AS text), :user_id) AND user_id <> :user_id
  AND merged_into IS NULL ORDER BY user_id LIMIT 50""")
# With the resources that were and were not granted.
GRANTS = "SELECT resource FROM headrace.grants g WHERE (g.user_id, g.provider) = (c.user_id, c.provider)"
CONNECTIONS = text(f"""
SELECT provider, status, stored_at AS since, error, ARRAY({GRANTS} AND granted ORDER BY resource) AS granted,
       ARRAY({GRANTS} AND NOT granted ORDER BY resource) AS refused
FROM headrace.connections c WHERE user_id = :user_id ORDER BY provider""")
GAPS = text("""
SELECT provider, resource, whose, reason, since, window_start, window_end FROM headrace.gaps
WHERE user_id = :user_id ORDER BY since DESC LIMIT 200""")
# The rows of health.daily, by the key of their table: the view would read the days of all people.
VALUES = text("""
SELECT local_date, metric, value, unit, provider, source_type, method FROM headrace.days
WHERE person = coalesce(CAST(:client_user_id AS text), :user_id)
  AND local_date BETWEEN :first AND :last ORDER BY local_date DESC, metric""")
MAX_EXPLAINED = 2000  # archived deliveries, which an explanation opens: about 2 s
ARCHIVED = text(f"""
SELECT count(*) FROM (SELECT FROM headrace.archive WHERE user_id = :user_id LIMIT {MAX_EXPLAINED + 1}) AS theirs""")
State = Literal["stored", "fetching", "gap", "empty"]
Window = tuple[datetime | None, datetime | None]
ORDER: tuple[State, ...] = ("gap", "fetching", "stored", "empty")  # of a day with several providers
DAYS = 60
EARLIEST = date(1970, 1, 1)
# The keys that a user has or should have: of series, backfills and gaps, and of records from known providers.
KEYS = text("""
SELECT provider, resource FROM headrace.series WHERE user_id = :user_id
UNION SELECT provider, resource FROM headrace.backfills WHERE user_id = :user_id AND item = ''
UNION SELECT provider, resource FROM headrace.gaps WHERE user_id = :user_id
UNION SELECT provider, resource FROM unnest(CAST(:records AS text[])) AS resource,
    (SELECT provider FROM headrace.connections WHERE user_id = :user_id
     UNION SELECT provider FROM headrace.series WHERE user_id = :user_id) AS known""")


def search(connection: Connection, name: str, after: str) -> Sequence[Row[Any]]:
    """Users by name, or else by a part of it, in pages after a user_id; all of them without a name."""
    values: dict[str, Any] = {"name": name, "after": after or None, "limit": PAGE_ROWS + 1}
    query = CONTAINING if name else ALL
    if name and (found := user_lookup.find(connection, name)):
        query, values["users"] = BY_IDS, [one.user_id for one in found]
    return connection.execute(query, values).all()


def person(connection: Connection, user_id: str) -> Row[Any]:
    """The user. Raises NotFound."""
    if (row := connection.execute(ONE, {"user_id": user_id}).first()) is None:
        raise NotFound(f"unknown user {user_id}")
    return row


def is_explained(connection: Connection, user_id: str) -> bool:
    """Whether the user has few enough deliveries to open them all for a page."""
    count: int = connection.scalar(ARCHIVED, {"user_id": user_id}) or 0
    return count <= MAX_EXPLAINED


def names(connection: Connection, one: Row[Any]) -> dict[str, Sequence[str]]:
    """Former ids of the user, and other users of the same person."""
    values = {"user_id": one.user_id, "client_user_id": one.client_user_id}
    return {
        "former": with_former(connection, (one.user_id,))[1:],
        "others": connection.scalars(SAME_PERSON, values).all(),
    }


def with_former(connection: Connection, users: tuple[str, ...]) -> tuple[str, ...]:
    """These users, then the ids that they had before."""
    return users + tuple(connection.scalars(FORMER, {"users": list(users)}))


def connections(connection: Connection, user_id: str) -> Sequence[Row[Any]]:
    return connection.execute(CONNECTIONS, {"user_id": user_id}).all()


def gaps(connection: Connection, user_id: str) -> Sequence[Row[Any]]:
    return connection.execute(GAPS, {"user_id": user_id}).all()


def values(connection: Connection, one: Row[Any], first: date, last: date) -> Sequence[Row[Any]]:
    """The person's values of these days, newest first. Health data."""
    given = {"user_id": one.user_id, "client_user_id": one.client_user_id, "first": first, "last": last}
    return connection.execute(VALUES, given).all()


@dataclass(frozen=True)
class ResourceDays:
    """A row of the map: the state of each day, and a text that names the providers if they differ."""

    resource: str
    days: list[tuple[State, str]]


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
        if set(days.values()) != {"empty"}:
            by_resource[key.resource][key.provider] = list(days.values())
    return [_merged(resource, found) for resource, found in sorted(by_resource.items())]


def _merged(resource: str, by_provider: dict[str, list[State]]) -> ResourceDays:
    if len(by_provider) > 1 and "stored" not in by_provider.get("", ()):
        by_provider.pop("", None)  # the others contain it
    days: list[tuple[State, str]] = []
    for states in zip(*by_provider.values(), strict=True):
        named = (f"{state} ({provider})" for provider, state in zip(by_provider, states, strict=True))
        days.append((min(states, key=ORDER.index), ", ".join(named) if len(set(states)) > 1 else states[0]))
    return ResourceDays(resource, days)


def _keys(connection: Connection, user_id: str) -> list[ResourceKey]:
    """The keys of resources with days. A backfill without a provider is about all of them."""
    records = [one.name for one in catalogue().values() if not one.is_series and one.day_field]
    rows = connection.execute(KEYS, {"user_id": user_id, "records": records})
    return [ResourceKey(user_id, row.provider, row.resource) for row in rows if row.resource in catalogue()]


def _within(windows: Iterable[Window], first: date, last: date) -> Iterator[int]:
    """The days of these windows from `first` to `last`. A window without an end is about every day."""
    for start, end in windows:
        begin = max(start.date(), first) if start else first
        yield from range(begin.toordinal(), (min(end.date(), last) if end else last).toordinal() + 1)


def bounds(last: date | None) -> tuple[date, date]:
    """The first and last day of a map that ends on `last`, or today; a year ahead at most."""
    today = datetime.now(UTC).date()
    end = max(EARLIEST, min(last or today, today + timedelta(days=366)))
    return end - timedelta(days=DAYS - 1), end
