"""Names the samples, sessions and sources behind one value of health.daily."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from app.catalogue import catalogue
from workers.daily.compute import compute, samples_of
from workers.daily.counters import won
from workers.daily.gauges import best_by_minute, by_day, last_of
from workers.daily.metrics import SESSIONS, resource_of
from workers.daily.model import (
    MINUTE,
    ZONE_SOURCES,
    DataSource,
    DaySample,
    TimedSession,
    as_day,
    as_time,
    local_day,
    unit_of,
)
from workers.daily.priorities import lists_of, zone_of
from workers.daily.queue import Stretch
from workers.daily.state import users_of
from workers.daily.write import Computed

STORED = text("""
SELECT value, unit, provider, source_type, sources, covered_minutes, summary_value, method, zone_source, samples,
       computed_at
FROM headrace.days WHERE (person, metric, local_date) = (:person, :metric, :date)""")


@dataclass(frozen=True)
class RankedSource:
    """A source of the day, and what it contributed."""

    rank: int
    provider: str
    source_type: str
    user_id: str
    samples: int
    value: float | None = None  # of counters: its share of the sum
    summary_value: float | None = None


@dataclass(frozen=True)
class ExplainedSample:
    """A sample of the day. `is_counted` is true if all of it, or a part, is in the value."""

    start: datetime
    stop: datetime
    provider: str
    source_type: str
    offset: int  # seconds east of UTC, of the local date
    zone_source: str
    is_counted: bool
    value: float


@dataclass(frozen=True)
class WonStretch:
    """Time in which one source won, at one offset, without interruption by another one; or a session."""

    start: datetime
    stop: datetime
    provider: str
    source_type: str
    samples: int
    offset: int
    zone_source: str
    id: str | None = None  # of a session
    also: tuple[str, ...] = ()  # the sessions for which it stands


@dataclass(frozen=True)
class DayExplanation:
    """The origin of one value. `stored` is None if there is none."""

    person: str
    metric: str
    local_date: date
    stored: Mapping[str, Any] | None
    lists: list[list[str]]  # of priorities, in the order in which they rank sources
    sources: list[RankedSource]
    stretches: list[WonStretch]  # none if a summary is the day's value
    samples: list[ExplainedSample]
    zone: str | None  # of the person; it decides where zone_source is `user`


class _Won(NamedTuple):
    sample: DaySample
    start: int
    stop: int
    value: float


def explain_day(connection: Connection, person: str, metric: str, day: date) -> DayExplanation:
    """Computes one day again, and returns the rows that decide its value. Raises KeyError for an unknown metric."""
    resource = resource_of(metric)
    if resource is None:
        raise KeyError(metric)
    users = users_of(connection, [person])
    (found,) = compute(connection, [Stretch(person, resource, day, day, "")], users)
    row = connection.execute(STORED, {"person": person, "metric": metric, "date": day}).mappings().first()
    lists = lists_of(connection, [(person, resource)])[person, resource]
    samples: list[ExplainedSample] = []
    if resource in SESSIONS:
        sources, stretches = _of_sessions(found)
    else:
        sources, stretches, samples = _of_samples(found, connection, users, metric)
    zone = zone_of(connection, person)
    return DayExplanation(
        person=person,
        metric=metric,
        local_date=day,
        stored=dict(row) if row else None,
        lists=[["/".join(entry) for entry in entries] for entries in lists],
        sources=sources,
        stretches=stretches,
        samples=samples,
        zone=zone and zone.name,
    )


def _of_sessions(found: Computed) -> tuple[list[RankedSource], list[WonStretch]]:
    compared: dict[int, list[TimedSession]] = defaultdict(list)
    for kept in found.kept:
        for one in (kept.session, *kept.others):
            compared[one.source].append(one)
    sources = [
        RankedSource(
            rank=place + 1,
            **found.inputs.sources[place]._asdict(),
            user_id=here[0].user_id,
            samples=len(here),
        )
        for place, here in sorted(compared.items())
    ]
    stretches = [
        WonStretch(
            start=as_time(kept.session.start),
            stop=as_time(kept.session.stop),
            **found.inputs.sources[kept.session.source]._asdict(),
            samples=1,
            offset=kept.session.offset,
            zone_source=ZONE_SOURCES[kept.session.zone],
            id=kept.session.id,
            also=tuple(sorted(one.id for one in kept.others)),
        )
        for kept in found.kept
    ]
    return sources, stretches


def _of_samples(
    found: Computed, connection: Connection, users: Mapping[str, Sequence[str]], metric: str
) -> tuple[list[RankedSource], list[WonStretch], list[ExplainedSample]]:
    resource = catalogue()[found.inputs.stretch.resource]
    rows = samples_of(connection, found.inputs, users)
    samples = next(mine for name, mine in rows.items() if metric.startswith(name))
    day = as_day(found.inputs.stretch.first)
    is_counter = resource.day == "counter"
    here = [one for one in samples if _touches(one, day, with_end=is_counter)]
    is_summary = any(one.method == "summary" for one in found.days if one.metric == metric)
    winners = [] if is_summary else list(_winners(samples, day, resource.day or ""))
    if resource.day != "last":
        units = ("", unit_of(here))
        winners = [one for one in winners if one.sample.unit in units]
    sources = []
    for place, source in enumerate(found.inputs.sources):
        mine = [one for one in here if one.source == place]
        said = next((one for one in found.inputs.summaries if (one.source, one.day) == (place, day)), None)
        if mine or said:
            shares = [one.value for one in winners if one.sample.source == place]
            value = sum(shares) if is_counter and not is_summary else None
            sources.append(
                RankedSource(
                    rank=place + 1,
                    **source._asdict(),
                    user_id=next(one.user_id for one in (*mine, said) if one),
                    samples=len(mine),
                    value=value,
                    summary_value=said and said.value,
                )
            )
    counted = {id(one.sample) for one in winners}
    explained = [
        ExplainedSample(
            start=as_time(one.start),
            stop=as_time(one.stop),
            **found.inputs.sources[one.source]._asdict(),
            offset=one.offset,
            zone_source=ZONE_SOURCES[one.zone],
            is_counted=id(one) in counted,
            value=one.value,
        )
        for one in sorted(here, key=lambda one: (one.start, one.source))
    ]
    return sources, _stretches(winners, found.inputs.sources), explained


def _touches(sample: DaySample, day: int, *, with_end: bool) -> bool:
    last = max(sample.start, sample.stop - 1) if with_end else sample.start
    return local_day(sample.start, sample.offset) <= day <= local_day(last, sample.offset)


def _winners(samples: Sequence[DaySample], day: int, kind: str) -> Iterator[_Won]:
    if kind == "counter":
        for piece in won(samples):
            if piece.day == day:
                one = piece.sample
                part = (piece.stop - piece.start) / (one.stop - one.start) if one.stop > one.start else 1.0
                yield _Won(one, piece.start, piece.stop, one.value * part)
        return
    here = by_day(samples).get(day, [])
    if kind == "last":
        winners = [last_of(here)] if here else []
    else:
        best = best_by_minute(samples)
        winners = [one for one in here if best[one.start // MINUTE] == one.source]
    yield from (_Won(one, one.start, one.start, one.value) for one in winners)


def _stretches(winners: Iterable[_Won], sources: Sequence[DataSource]) -> list[WonStretch]:
    found = []
    in_time = sorted(winners, key=lambda one: (one.start, one.sample.source, one.stop))
    for (place, offset), group in groupby(in_time, key=lambda one: (one.sample.source, one.sample.offset)):
        here = list(group)
        found.append(
            WonStretch(
                start=as_time(here[0].start),
                stop=as_time(max(one.stop for one in here)),
                **sources[place]._asdict(),
                samples=len(here),
                offset=offset,
                zone_source=ZONE_SOURCES[max(one.sample.zone for one in here)],
            )
        )
    return found
