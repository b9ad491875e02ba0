"""The values that the rules of a day read and return. Times are microseconds since 1970 UTC, and days count from it."""

from collections.abc import Collection, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Literal, NamedTuple

SECOND = 1_000_000
MINUTE = 60 * SECOND
DAY = 86_400 * SECOND
EPOCH_TIME = datetime(1970, 1, 1, tzinfo=UTC)
EPOCH_ORDINAL = EPOCH_TIME.toordinal()
# From the most to the least reliable; `zone` in this module is an index of this tuple.
ZONE_SOURCES = ("sample", "neighbour", "user", "utc")
# Real offsets lie between -12 h and +14 h. An offset beyond 18 h is an error of the provider, and treated as missing.
MAX_OFFSET = 18 * 3600
Method = Literal["samples", "summary"]

SOURCE_TYPES = (  # from the best to the worst
    *("lab", "automatic", "watch", "ring", "chest_strap", "scale", "cuff", "fingerprick", "manual_scan", "phone"),
    *("app", "multiple_sources", "unknown"),
)
ANY = "*"  # every person, resource, provider or source type


class DataSource(NamedTuple):
    """A device or an app of a person, as `health` names it."""

    provider: str
    source_type: str


class DaySample(NamedTuple):
    """One measured value. `source` is the source's place in the order of ranks: 0 is the best."""

    source: int
    start: int
    stop: int  # equal to `start` if it has no length
    value: float
    offset: int  # seconds east of UTC
    zone: int
    unit: str
    user_id: str


class TimedSession(NamedTuple):
    """A night, a nap or a workout. `values` are those of its metrics, in the order of the rule; None if unknown."""

    source: int
    start: int
    stop: int
    offset: int
    zone: int
    user_id: str
    id: str
    values: tuple[float | None, ...]


class Summary(NamedTuple):
    """The value of one counter of one day in a source's own summary."""

    source: int
    day: int
    value: float
    user_id: str


class DayValue(NamedTuple):
    """The value of one metric on one local day."""

    day: int
    metric: str
    value: float
    unit: str
    source: int  # that contributed most
    sources: int  # that contributed
    covered_minutes: int | None
    zone: int  # the least reliable one of the values that contributed
    users: frozenset[str]  # whose samples or summaries of this day were compared
    samples: int  # that were compared, including summaries
    summary_value: float | None = None
    method: Method = "samples"


def unit_of(samples: Collection[DaySample]) -> str:
    """The unit of a day: that of the best source's first sample with a unit, '' if none has one.

    Samples with another unit cannot be added to it: 5 mmol/L and 90 mg/dL have no average.
    """
    units = {one.unit for one in samples} - {""}
    if len(units) > 1:
        return min((one.source, one.start, one.unit) for one in samples if one.unit)[2]
    return units.pop() if units else ""


def local_day(moment: int, offset: int) -> int:
    """The wall-clock date of a moment, as a day number."""
    return (moment + offset * SECOND) // DAY


def split_at_midnight(start: int, stop: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """The parts of an interval with length by local day: the day, its start and its end."""
    day = local_day(start, offset)
    while (midnight := (day + 1) * DAY - offset * SECOND) < stop:
        yield day, start, midnight
        start, day = midnight, day + 1
    yield day, start, stop


def as_date(day: int) -> date:
    """The date of a day number."""
    return date.fromordinal(EPOCH_ORDINAL + day)


def as_day(of: date) -> int:
    """The day number of a date."""
    return of.toordinal() - EPOCH_ORDINAL


def as_time(moment: int) -> datetime:
    """The time of microseconds since 1970."""
    return EPOCH_TIME + timedelta(microseconds=moment)


def as_moment(at: datetime) -> int:
    """The microseconds since 1970 of a time."""
    return (at - EPOCH_TIME) // timedelta(microseconds=1)
