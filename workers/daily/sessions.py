"""Sessions: nights, naps and workouts that several sources recorded are one; the best-ranked is kept."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum

from workers.daily.model import MINUTE, SECOND, DayValue, TimedSession, local_day

# The metrics of a session, with their units, in the order of `TimedSession.values`.
SLEEP = {"sleep_total": "s", "sleep_deep": "s", "sleep_rem": "s", "sleep_light": "s", "sleep_awake": "s"}
WORKOUTS = {"workouts_distance": "m", "workouts_calories": "kcal"}
NAPS, COUNT, DURATION = "nap_total", "workouts_count", "workouts_duration"
UNITS = {**SLEEP, NAPS: "s", COUNT: "count", DURATION: "s", **WORKOUTS}


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
    return _days(kept, _of_sleep)


def workout_days(kept: Iterable[KeptSession]) -> list[DayValue]:
    """The number of workouts of each date, and the sums of their durations, distances and calories."""
    return _days(kept, _of_workout)


def _of_sleep(one: KeptSession) -> Mapping[str, float | None]:
    values = one.session.values
    return dict(zip(SLEEP, values, strict=True)) if one.is_night else {NAPS: values[0]}


def _of_workout(one: KeptSession) -> Mapping[str, float | None]:
    seconds = (one.session.stop - one.session.start) / SECOND
    return {COUNT: 1.0, DURATION: seconds} | dict(zip(WORKOUTS, one.session.values, strict=True))


def _days(
    kept: Iterable[KeptSession], values_of: Callable[[KeptSession], Mapping[str, float | None]]
) -> list[DayValue]:
    """The sum of each metric of each date. `values_of` returns what a session adds to which metric."""
    days: dict[int, list[KeptSession]] = defaultdict(list)
    known: dict[tuple[int, str], list[tuple[TimedSession, float]]] = defaultdict(list)
    for one in kept:
        days[one.day].append(one)
        for metric, value in values_of(one).items():
            if value is not None:
                known[one.day, metric].append((one.session, value))
    users = {day: frozenset().union(*(one.users for one in of_day)) for day, of_day in days.items()}
    compared = {day: sum(1 + len(one.others) for one in of_day) for day, of_day in days.items()}
    found = []
    for (day, metric), values in known.items():
        sums: dict[int, list[float]] = defaultdict(list)
        for session, value in values:
            sums[session.source].append(value)
        found.append(
            DayValue(
                day=day,
                metric=metric,
                value=fsum(value for _, value in values),
                unit=UNITS[metric],
                source=min(sums, key=lambda source: (-fsum(sums[source]), source)),
                sources=len(sums),
                covered_minutes=round(sum(session.stop - session.start for session, _ in values) / MINUTE),
                zone=max(session.zone for session, _ in values),
                users=users[day],
                samples=compared[day],
            )
        )
    return found
