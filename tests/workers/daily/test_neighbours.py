"""Offsets of samples that have none, and their local days as stored, compared with a calculation by zoneinfo."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, event, rows
from tests.support.daily import CHANGES, HALF_HOURS
from workers.daily import priorities
from workers.daily.derive import Deriver
from workers.daily.model import ZONE_SOURCES
from workers.daily.neighbours import OffsetTimeline
from workers.store.engine import transaction

PEOPLE = 60
OTHER_ZONE = "Asia/Kathmandu"
DAYS = "SELECT client_user_id, local_date, value, zone_source FROM health.daily WHERE metric = 'steps'"
Days = dict[tuple[str, date], tuple[float, str]]  # the value and its zone_source, by person and date


@dataclass(frozen=True)
class Person:
    """A person near a moment at which local days are special, whose samples mostly have no offset."""

    number: int
    steps: dict[datetime, tuple[int, int | None]]  # the value and the offset of samples without length
    fallback: str | None  # the aggregator's zone
    zone: str | None  # the operator's

    def event(self, moments: list[datetime]) -> dict[str, Any]:
        """The samples of these moments."""
        data = [
            {"timestamp": at.isoformat(), "value": value, "unit": "count", "timezone_offset": offset}
            for at in moments
            for value, offset in (self.steps[at],)
        ]
        content = {"source": {"provider": "garmin", "type": "watch"}, "data": data}
        return event("daily.data.steps.created", f"u{self.number}", content, f"member-{self.number}")

    def expected(self) -> Days:
        known = [(at, offset) for at, (_, offset) in self.steps.items() if offset is not None]
        values: dict[date, list[int]] = defaultdict(list)
        sources: dict[date, list[int]] = defaultdict(list)
        for at, (value, offset) in self.steps.items():
            source = "sample" if offset is not None else "neighbour" if known else "user"
            if known:
                _, nearest = min(known, key=lambda one, at=at: (abs(one[0] - at), *one))  # type: ignore[misc]
                day = (at + timedelta(seconds=nearest)).date()
            elif zone := self.zone or self.fallback:
                day = at.astimezone(ZoneInfo(zone)).date()
            else:
                day, source = at.date(), "utc"
            values[day].append(value)
            sources[day].append(ZONE_SOURCES.index(source))
        return {(f"member-{self.number}", day): (sum(values[day]), ZONE_SOURCES[max(sources[day])]) for day in values}


@cache
def clock_changes(zone: str) -> list[datetime]:
    """The clock changes of a zone in 2025: samples of the future are refused."""
    moments = [datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=30 * n) for n in range(365 * 48)]
    return [at for before, at in pairwise(moments) if offset_in(zone, before) != offset_in(zone, at)]


def offset_in(zone: str, at: datetime) -> int:
    return int((at.astimezone(ZoneInfo(zone)).utcoffset() or timedelta()).total_seconds())


def random_person(rng: random.Random, number: int) -> Person:
    zone = rng.choice([*CHANGES, *HALF_HOURS])
    day = date(2025, 1, 1) + timedelta(days=rng.randrange(365))
    midnight = datetime.combine(day, time(), ZoneInfo(zone)).astimezone(UTC)
    around = rng.choice([midnight, *clock_changes(zone)])
    arrival = rng.choice([zone, zone, "Pacific/Honolulu"])  # where the person is from this moment on
    share = rng.choice([0, 0, 0.4])  # of samples with an offset
    minutes = {rng.choice([-1440, -60, -1, 0, 1, 60, 1440, rng.randint(-2880, 2880)]) for _ in range(6)}
    moments = [around + timedelta(minutes=minute) for minute in sorted(minutes)]
    offsets = [offset_in(zone if at < around else arrival, at) if rng.random() < share else None for at in moments]
    return Person(
        number=number,
        steps={at: (rng.randint(1, 99), offset) for at, offset in zip(moments, offsets, strict=True)},
        fallback=rng.choice([None, zone]),
        zone=rng.choice([None, None, OTHER_ZONE]),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_days_of_samples_without_an_offset_are_those_of_zoneinfo(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Callable[[], None], seed: int
) -> None:
    """Breaks if such a sample counts on another date at a local midnight, a clock change or a flight.

    Each person's samples arrive in two parts, before and after the zones are known, so old days must move too.
    """
    rng = random.Random(seed)
    people = [random_person(rng, number) for number in range(PEOPLE)]
    first = {one.number: rng.sample([*one.steps], rng.randint(1, len(one.steps))) for one in people}
    apply(engine, settings, *(delivery(one.event(first[one.number])) for one in people))
    derive()
    with transaction(engine) as connection:
        for one in people:
            if one.fallback:
                priorities.set_fallback_zone(connection, f"u{one.number}", one.fallback)
            if one.zone:
                priorities.set_zone(connection, f"member-{one.number}", one.zone)
    rest = [(one, [at for at in one.steps if at not in first[one.number]]) for one in people]
    apply(engine, settings, *(delivery(one.event(moments)) for one, moments in rest))
    derive()
    expected: Days = {key: value for one in people for key, value in one.expected().items()}
    assert {source for _, source in expected.values()} == set(ZONE_SOURCES)
    assert found(engine) == expected
    deriver.rebuild(None, lambda *_: None)
    assert found(engine) == expected


def found(engine: Engine) -> Days:
    return {
        (row["client_user_id"], row["local_date"]): (row["value"], row["zone_source"]) for row in rows(engine, DAYS)
    }


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([-36000, 0, 3600, 20700])), max_size=10), st.integers(-5, 45)
)
def test_the_nearest_offset(points: list[tuple[int, int]], moment: int) -> None:
    """Breaks if another point than the nearest one decides: of two the earlier, at one moment the smaller offset."""
    expected = min(points, key=lambda one: (abs(one[0] - moment), *one), default=None)
    assert OffsetTimeline(points).nearest(moment) == (expected and expected[1])


def test_an_impossible_offset_is_no_offset() -> None:
    """Breaks if an offset in milliseconds moves samples by years."""
    assert OffsetTimeline([(0, 3_600_000), (9, 7200)]).nearest(0) == 7200
