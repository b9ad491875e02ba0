"""Samples for the rules of a day, around the moments at which local days differ from 24 hours."""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from workers.daily.model import MINUTE, SECOND, DaySample, TimedSession, as_moment, as_time

# Both clock changes of five zones in 2026; two of them do not change by an hour, or not at full hours of UTC.
CHANGES = {
    "America/New_York": ((2026, 3, 8, 7), (2026, 11, 1, 6)),
    "Europe/Paris": ((2026, 3, 29, 1), (2026, 10, 25, 1)),
    "Australia/Lord_Howe": ((2026, 4, 4, 15), (2026, 10, 3, 15)),
    "America/St_Johns": ((2026, 3, 8, 5), (2026, 11, 1, 4)),
    "Pacific/Auckland": ((2026, 4, 4, 14), (2026, 9, 26, 14)),
}
HALF_HOURS = ("Asia/Kolkata", "Asia/Kathmandu", "Australia/Eucla", "Pacific/Chatham")
UNITS = ("count", "count", "hundreds", "")
FLIGHT = datetime(2026, 6, 1, 9, tzinfo=UTC)  # from Auckland to Honolulu, across the date line


class Clock:
    """The wall clock of a person, who may fly: the offset at a moment."""

    def __init__(self, zone: str, after: str | None = None) -> None:
        self.before, self.after = ZoneInfo(zone), ZoneInfo(after or zone)

    def offset(self, at: datetime) -> int:
        """Seconds east of UTC."""
        found = at.astimezone(self.before if at < FLIGHT else self.after).utcoffset()
        assert found is not None
        return round(found.total_seconds())

    def shown(self, moment: int) -> date:
        """The date that the clock shows."""
        at = as_time(moment)
        return at.astimezone(self.before if at < FLIGHT else self.after).date()

    def __repr__(self) -> str:
        return f"Clock({self.before}, {self.after})"


def situations() -> st.SearchStrategy[tuple[Clock, datetime]]:
    """A clock and a moment near which its days are special: a clock change, the flight, or any local midnight."""
    changes = [(Clock(zone), datetime(*at, tzinfo=UTC)) for zone, pair in CHANGES.items() for at in pair]
    flight = (Clock("Pacific/Auckland", "Pacific/Honolulu"), FLIGHT)
    dates = st.dates(date(2026, 1, 1), date(2026, 12, 31))
    usual = st.builds(_midnight, st.sampled_from([*CHANGES, *HALF_HOURS]), dates)
    return st.one_of(st.sampled_from([*changes, flight]), usual)


def _midnight(zone: str, day: date) -> tuple[Clock, datetime]:
    return Clock(zone), datetime.combine(day, time(), ZoneInfo(zone)).astimezone(UTC)


# Minutes before or after a situation; often exactly at it.
MINUTES = st.one_of(st.integers(-2880, 2880), st.sampled_from([-1440, -60, -1, 0, 1, 60, 1440]))


@st.composite
def timed_samples(draw: st.DrawFn, longest: int = 26 * 60, most: int = 10) -> list[DaySample]:
    """Samples of up to three sources within four days of a situation, in whole minutes of up to `longest`."""
    clock, around = draw(situations())
    rows = draw(
        st.lists(
            st.tuples(
                *(st.integers(0, 2), MINUTES, st.integers(0, longest), st.integers(0, 900)),
                st.sampled_from(UNITS),
            ),
            min_size=1,
            max_size=most,
        )
    )
    return [
        sample(clock, around + timedelta(minutes=minute), *rest, source)._replace(unit=unit)
        for source, minute, *rest, unit in rows
    ]


@st.composite
def timed_sessions(draw: st.DrawFn) -> tuple[Clock, list[TimedSession]]:
    """Sessions of up to three sources around a situation, which often end exactly at it. Offsets are not set."""
    clock, around = draw(situations())
    rows = draw(st.lists(st.tuples(st.integers(0, 2), MINUTES, st.integers(1, 600)), min_size=1, max_size=8))
    found = []
    for n, (source, minute, length) in enumerate(rows):
        stop = as_moment(around) + minute * MINUTE
        values = (float(length),) + (None,) * 4
        found.append(TimedSession(source, stop - length * MINUTE, stop, 0, 0, "u1", f"s{n}", values))
    return clock, found


def sample(clock: Clock, at: datetime, minutes: int, value: float, source: int = 0) -> DaySample:
    """A sample with the offset of the clock at its start."""
    start = as_moment(at)
    return DaySample(source, start, start + minutes * MINUTE, value, clock.offset(at), 0, "count", "u1")


def wall_date(moment: int, offset: int) -> date:
    """The date that the wall clock shows, by the arithmetic of datetime."""
    return (datetime.fromtimestamp(moment // SECOND, UTC) + timedelta(seconds=offset)).date()


def in_one_unit(rows: list[tuple[date, DaySample]]) -> list[tuple[date, DaySample]]:
    """Of samples by date, those in the unit of their date: of its best source's first sample that has a unit."""
    unit: dict[date, str] = {}
    for day, one in sorted(rows, key=lambda row: (row[1].source, row[1].start, row[1].unit)):
        unit[day] = unit.get(day) or one.unit
    return [(day, one) for day, one in rows if one.unit in {unit[day], ""}]
