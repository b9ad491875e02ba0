"""Writes computed days and kept sessions: the rows that differ, announced in the change feed."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Generic, TypeVar

import msgspec
from sqlalchemy import Connection, text

from workers.daily.metrics import derived
from workers.daily.model import MAX_OFFSET, ZONE_SOURCES, DayValue, as_date, as_time
from workers.daily.queue import Stretch
from workers.daily.read import Inputs, at_midnight
from workers.daily.sessions import KeptSession
from workers.store.feed import Change, Op, announce
from workers.store.retention import DAILY
from workers.store.sql import RowParameters


@dataclass(frozen=True)
class Computed:
    """The days of one stretch, with the sources to which DayValue and TimedSession refer."""

    inputs: Inputs
    days: list[DayValue]
    kept: list[KeptSession] = field(default_factory=list)


Key = tuple[str, str, date | str]


class DayRow(msgspec.Struct, frozen=True):
    """A row of headrace.days."""

    person: str
    metric: str
    local_date: date
    sources: int
    user_id: str | None
    resource: str
    value: float
    summary_value: float | None
    covered_minutes: int | None
    samples: int
    unit: str
    provider: str
    source_type: str
    method: str
    zone_source: str

    @property
    def key(self) -> Key:
        """The primary key."""
        return self.person, self.metric, self.local_date


class SessionRow(msgspec.Struct, frozen=True):
    """A row of headrace.kept_sessions."""

    user_id: str
    resource: str
    id: str
    person: str
    local_date: date
    is_night: bool
    starts: datetime
    ends: datetime
    provider: str
    source_type: str
    parts: list[float | None]
    also: list[str]
    zone_source: str

    @property
    def key(self) -> Key:
        """The primary key."""
        return self.user_id, self.resource, self.id


Row = TypeVar("Row", DayRow, SessionRow)


class _Table(Generic[Row]):
    """A table of computed rows. The first three columns of `row` are its key.

    A stretch has the rows of its person whose column `scope` is one of `scopes(resource)`. `compute` makes its new
    rows. After some of the stored rows have expired, a row stays unless another one has at least its `weight`.
    """

    def __init__(
        self,
        name: str,
        *,
        row: type[Row],
        scope: str,
        scopes: Callable[[str], Iterable[str]],
        compute: Callable[[Computed], Iterable[Row]],
        weight: Callable[[Row], int],
        now: str = "",
    ) -> None:
        self._row: type[Row] = row
        self._scopes = scopes
        self._compute: Callable[[Computed], Iterable[Row]] = compute
        self._weight: Callable[[Row], int] = weight
        self._given = RowParameters("n int, person text, scope text, first date, last date")
        columns, key = ", ".join(row.__struct_fields__), ", ".join(row.__struct_fields__[:3])
        self._read = text(f"""
SELECT n, stored.* FROM {self._given} JOIN LATERAL (
    SELECT {columns} FROM {name} WHERE person = given.person AND {scope} = given.scope
       AND local_date BETWEEN given.first AND given.last) AS stored ON true""")
        # As JSON, because arrays of different lengths do not fit into an array.
        rows = f"jsonb_populate_recordset(CAST(NULL AS {name}), CAST(:rows AS jsonb)) AS given"
        changes = ", ".join(f"{column} = excluded.{column}" for column in row.__struct_fields__[3:])
        self._put = text(f"""
INSERT INTO {name} ({columns}) SELECT {columns} FROM {rows} ORDER BY {key}
ON CONFLICT ({key}) DO UPDATE SET {now}{changes}""")
        self._remove = text(f"DELETE FROM {name} WHERE ({key}) IN (SELECT {key} FROM {rows})")

    def write(
        self, connection: Connection, found: Sequence[Computed], expired: Mapping[str, datetime]
    ) -> list[tuple[list[Row], list[Row]]]:
        """Writes the rows that differ, and removes those that no longer exist. Returns both for each stretch."""
        stored = self._stored(connection, [one.inputs.stretch for one in found])
        oldest = expired[DAILY].date() if DAILY in expired else date.min
        put: list[list[Row]] = []
        gone: list[list[Row]] = []
        for known, one in zip(stored, found, strict=True):
            new = {row.key: row for row in self._compute(one) if row.local_date >= oldest}
            edge = expired.get(one.inputs.stretch.resource)
            kept = {key for key, row in known.items() if edge and self._stays(row, new.get(key), edge)}
            put.append([row for key, row in new.items() if key not in kept and row != known.get(key)])
            gone.append([row for key, row in known.items() if key not in kept and key not in new])
        # Rows are removed first: a session may have moved from one stretch to another.
        for statement, changed in ((self._remove, gone), (self._put, put)):
            if rows := [row for of_stretch in changed for row in of_stretch]:
                connection.execute(statement, {"rows": msgspec.json.encode(rows).decode()})
        return list(zip(put, gone, strict=True))

    def _stored(self, connection: Connection, stretches: Sequence[Stretch]) -> list[dict[Key, Row]]:
        given = [
            (n, one.person, scope, one.first, one.last)
            for n, one in enumerate(stretches)
            for scope in self._scopes(one.resource)
        ]
        stored: list[dict[Key, Row]] = [{} for _ in stretches]
        for n, *columns in connection.execute(self._read, self._given.values(given)).all():
            row = self._row(*columns)
            stored[n][row.key] = row
        return stored

    def _stays(self, stored: Row, new: Row | None, edge: datetime) -> bool:
        """Whether a row stays as it is, because some of the rows that it was computed from have expired."""
        return has_expired(stored.local_date, edge) and (new is None or self._weight(new) < self._weight(stored))


def _days(one: Computed) -> Iterator[DayRow]:
    stretch = one.inputs.stretch
    for day in one.days:
        source = one.inputs.sources[day.source]
        yield DayRow(
            person=stretch.person,
            metric=day.metric,
            local_date=as_date(day.day),
            sources=day.sources,
            user_id=min(day.users) if len(day.users) == 1 else None,
            resource=stretch.resource,
            value=day.value,
            summary_value=day.summary_value,
            covered_minutes=day.covered_minutes,
            samples=day.samples,
            unit=day.unit,
            provider=source.provider,
            source_type=source.source_type,
            method=day.method,
            zone_source=ZONE_SOURCES[day.zone],
        )


def _sessions(one: Computed) -> Iterator[SessionRow]:
    for kept in one.kept:
        session, source = kept.session, one.inputs.sources[kept.session.source]
        yield SessionRow(
            user_id=session.user_id,
            resource=one.inputs.stretch.resource,
            id=session.id,
            person=one.inputs.stretch.person,
            local_date=as_date(kept.day),
            is_night=kept.is_night,
            starts=as_time(session.start),
            ends=as_time(session.stop),
            provider=source.provider,
            source_type=source.source_type,
            parts=list(session.values),
            also=sorted(other.id for other in kept.others),
            zone_source=ZONE_SOURCES[session.zone],
        )


DAYS = _Table(
    "headrace.days",
    row=DayRow,
    scope="metric",
    scopes=lambda resource: derived()[resource],
    compute=_days,
    weight=lambda row: row.samples,
    now="computed_at = now(), ",
)
KEPT = _Table(
    "headrace.kept_sessions",
    row=SessionRow,
    scope="resource",
    scopes=lambda resource: (resource,),
    compute=_sessions,
    weight=lambda _: 0,
)


def write_days(
    connection: Connection,
    found: Sequence[Computed],
    users: Mapping[str, Sequence[str]],
    expired: Mapping[str, datetime],
) -> int:
    """Writes the days that differ, removes those that no longer exist, and announces both. Returns their number."""
    changes: list[Change] = []
    written = DAYS.write(connection, found, expired)
    for one, (put, gone) in zip(found, written, strict=True):
        stretch, dates = one.inputs.stretch, [row.local_date for row in (*put, *gone)]
        # A person without users has only days to remove: of a name that no user has any longer.
        owners = users.get(stretch.person) or sorted({row.user_id for row in gone if row.user_id})
        if dates and owners:
            changes.append(day_change("put" if put else "remove", owners[0], dates, len(dates), stretch.origin))
    announce(connection, changes)
    return sum(len(put) + len(gone) for put, gone in written)


def write_sessions(connection: Connection, found: Sequence[Computed], expired: Mapping[str, datetime]) -> None:
    """Writes the kept sessions that differ, and removes those that are no longer kept."""
    if found:
        KEPT.write(connection, found, expired)


def day_change(op: Op, user_id: str, dates: Collection[date], rows: int, origin: str) -> Change:
    """The change of days between the first and the last of these dates. The user is one of the person's."""
    period = at_midnight(min(dates)), at_midnight(max(dates))
    return Change(op, user_id, DAILY, None, None, None, *period, rows, origin)


def has_expired(day: date, before: datetime) -> bool:
    """Whether a local date begins before a moment, at any offset."""
    return at_midnight(day) - timedelta(seconds=MAX_OFFSET) < before
