"""Sessions: nights, naps and workouts that several sources recorded are one; the best-ranked is kept."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import NamedTuple

from workers.daily.model import MINUTE, SECOND, DayValue, TimedSession, local_day

# The metrics of a session, with their units, in the order of `TimedSession.values`.
SLEEP = {"sleep_total": "s", "sleep_deep": "s", "sleep_rem": "s", "sleep_light": "s", "sleep_awake": "s"}
WORKOUTS = {"workouts_distance": "m", "workouts_calories": "kcal"}


@dataclass(slots=True)
class KeptSession:
    """A session that is kept, and the others that it stands for."""

    session: TimedSession
    day: int
    others: list[TimedSession] = field(default_factory=list)
    is_night: bool = False

    @property
    def users(self) -> frozenset[str]:
        """Whose sessions were compared."""
        return frozenset((self.session.user_id, *(one.user_id for one in self.others)))


class _Metric(NamedTuple):
    name: str
    unit: str
    kept: Sequence[KeptSession]
    value_of: Callable[[TimedSession], float | None]


def merged(sessions: Iterable[TimedSession]) -> list[KeptSession]:
    """The sessions that are kept, in the order of their start; `day` is not set yet.

    The best-ranked sessions are kept first, of one source the longest. A session that overlaps a kept one by half of
    the shorter one or more is the same session. So a night that one device divided and another one did not leaves no
    session out that overlaps no kept one.
    """
    kept: list[KeptSession] = []
    starts: list[tuple[int, int]] = []  # the start of each kept session, and its place in `kept`
    longest = 0
    for one in sorted(sessions, key=lambda one: (one.source, one.start - one.stop, one.start, one.user_id, one.id)):
        first = bisect_left(starts, (one.start - longest, 0))
        near = (place for start, place in starts[first : bisect_left(starts, (one.stop + 1, 0))])
        same = min((place for place in near if _is_same(kept[place].session, one)), default=None)
        if same is not None:
            kept[same].others.append(one)
            continue
        insort(starts, (one.start, len(kept)))
        kept.append(KeptSession(one, 0))
        longest = max(longest, one.stop - one.start)
    return [kept[place] for _, place in starts]


def _is_same(one: TimedSession, other: TimedSession) -> bool:
    overlap = min(one.stop, other.stop) - max(one.start, other.start)
    shorter = min(one.stop - one.start, other.stop - other.start)
    return overlap >= 0 and 2 * overlap >= shorter


def kept_nights(sessions: Iterable[TimedSession]) -> list[KeptSession]:
    """The sleep sessions that are kept, on the local date of their end. The longest one of a date is its night."""
    found = merged(sessions)
    nights: dict[int, KeptSession] = {}
    for one in found:
        one.day = local_day(one.session.stop, one.session.offset)
        longest = nights.setdefault(one.day, one)
        if _length(one) > _length(longest):
            nights[one.day] = one
    for one in nights.values():
        one.is_night = True
    return found


def _length(one: KeptSession) -> tuple[int, int]:
    """By length; of equal ones the best-ranked is the longest."""
    return one.session.stop - one.session.start, -one.session.source


def kept_workouts(sessions: Iterable[TimedSession]) -> list[KeptSession]:
    """The workouts that are kept, on the local date of their start."""
    found = merged(sessions)
    for one in found:
        one.day = local_day(one.session.start, one.session.offset)
    return found


def sleep_days(kept: Iterable[KeptSession]) -> list[DayValue]:
    """The parts of each date's night, and the sum of its naps. Parts that the night does not have are left out."""
    days: list[DayValue] = []
    for day, here in _by_day(kept).items():
        night = [one for one in here if one.is_night]
        naps = [one for one in here if not one.is_night]
        metrics = [_Metric(name, unit, night, _value(place)) for place, (name, unit) in enumerate(SLEEP.items())]
        days += _days(day, here, [*metrics, _Metric("nap_total", "s", naps, _value(0))])
    return days


def workout_days(kept: Iterable[KeptSession]) -> list[DayValue]:
    """The number of workouts of each date, and the sums of their durations, distances and calories."""
    days: list[DayValue] = []
    for day, here in _by_day(kept).items():
        metrics = [_Metric(name, unit, here, _value(place)) for place, (name, unit) in enumerate(WORKOUTS.items())]
        count = _Metric("workouts_count", "count", here, lambda _: 1.0)
        duration = _Metric("workouts_duration", "s", here, lambda one: (one.stop - one.start) / SECOND)
        days += _days(day, here, [count, duration, *metrics])
    return days


def _value(place: int) -> Callable[[TimedSession], float | None]:
    return lambda session: session.values[place]


def _by_day(kept: Iterable[KeptSession]) -> dict[int, list[KeptSession]]:
    days: dict[int, list[KeptSession]] = {}
    for one in kept:
        days.setdefault(one.day, []).append(one)
    return days


def _days(day: int, here: Sequence[KeptSession], metrics: Iterable[_Metric]) -> list[DayValue]:
    found = []
    for metric in metrics:
        known = [(one, value) for one in metric.kept if (value := metric.value_of(one.session)) is not None]
        if not known:
            continue
        sums: dict[int, list[float]] = {}
        for one, value in known:
            sums.setdefault(one.session.source, []).append(value)
        found.append(
            DayValue(
                day=day,
                metric=metric.name,
                value=fsum(value for _, value in known),
                unit=metric.unit,
                source=min(sums, key=lambda source: (-fsum(sums[source]), source)),
                sources=len(sums),
                covered_minutes=round(sum(one.session.stop - one.session.start for one, _ in known) / MINUTE),
                zone=max(one.session.zone for one, _ in known),
                users=frozenset().union(*(one.users for one in here)),
                samples=sum(1 + len(one.others) for one in here),
            )
        )
    return found
