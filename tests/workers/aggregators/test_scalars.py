"""Scalars of other types than documented."""

import contextlib
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import each
from workers.aggregators.scalars import READERS, Unreadable, boolean, day, integer, moment, number, text

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


def refused(read: Callable[[Any], Any], value: Any) -> str:
    """What a reader expected instead of a value."""
    with pytest.raises(Unreadable) as raised:
        read(value)
    assert "canary" not in str(raised.value)
    return str(raised.value)


@each(
    *(("", ""), ("a", "a"), (7, "7"), (-0.5, "-0.5"), (146.0, "146.0"), (True, "true"), (False, "false")),
    *((10**30, "1" + "0" * 30), (1e300, "1e+300")),
)
def test_text(value: Any, expected: str) -> None:
    """Breaks if a numeric title is not text, or is written otherwise than in JSON."""
    assert text(value) == expected


@each(None, [], ["canary"], {}, {"canary": 1}, math.inf, -math.inf, math.nan)
def test_no_text(value: Any) -> None:
    """Breaks if an object becomes text, or a number beyond double precision becomes the word `inf`."""
    assert refused(text, value) == "text"


@each(
    *((1, 1.0), (1.5, 1.5), (-0.0, 0.0), ("12.5", 12.5), (" 12.5 ", 12.5), ("-3", -3.0), ("+3", 3.0), ("1e3", 1000.0)),
    *((".5", 0.5), ("5.", 5.0), ("1E-3", 0.001), ("007", 7.0), (10**300, 1e300), ("1e-400", 0.0)),
)
def test_number(value: Any, expected: float) -> None:
    """Breaks if text that is a number is not read, or as another number."""
    assert number(value) == expected


@each(
    *((value, "a number") for value in (None, True, False, [], {}, [1], "", " ", "canary", "1,5", "1_000", "0x10")),
    *((value, "a number") for value in ("nan", "inf", "Infinity", "-", ".", "1e", "1 2", "12 bpm", "1e1000")),
    *((value, "a number in the range of double precision") for value in (math.inf, -math.inf, math.nan, 10**400)),
    *((value, "a number in the range of double precision") for value in ("1e999", "-1e999", "9" * 400)),
)
def test_no_number(value: Any, expected: str) -> None:
    """Breaks if a boolean, a word that Python's `float` knows, or a number that no double holds is stored."""
    assert refused(number, value) == expected


@each(
    *((146, 146), (146.0, 146), ("146", 146), ("146.0", 146), (146.5, 147), (147.5, 148), (-146.5, -147)),
    *((0.5, 1), (-0.5, -1), (0.49999999999999994, 0), (2.4, 2), (2.6, 3), ("2.5", 3), ("-2.5", -3), ("1e3", 1000)),
    *((2**53 + 1, 2**53 + 1), (str(2**53 + 1), 2**53 + 1), (9_200_000_000_000_000_000, 9_200_000_000_000_000_000)),
    *((1.005e2, 101), ("0.50000000000000000001", 1), ("0.4999999999999999999999", 0)),
)
def test_integer(value: Any, expected: int) -> None:
    """Breaks if a half is rounded to even, which PostgreSQL's numeric does not do, or a large integer loses digits."""
    assert integer(value) == expected


@each(
    *(
        (value, "an integer of 64 bits")
        for value in (2**63, -(2**63) - 1, 1e300, "9e18" + "0", 9_300_000_000_000_000_000)
    ),
    *((value, "a number") for value in (None, True, "canary", [1], {})),
    (10**400, "a number in the range of double precision"),
)
def test_no_integer(value: Any, expected: str) -> None:
    """Breaks if a number beyond bigint reaches PostgreSQL, which refuses the record for it."""
    assert refused(integer, value) == expected


@given(st.decimals(-(10**12), 10**12, places=3))
def test_integers_are_rounded_half_away_from_zero(value: Any) -> None:
    """Breaks if two readers of one number store two integers."""
    magnitude = int(abs(value) + type(value)("0.5"))
    assert integer(str(value)) == (magnitude if value >= 0 else -magnitude)


@each(
    *((value, True) for value in (True, 1, 1.0, "1", "true", "TRUE", " True ", "1.0")),
    *((value, False) for value in (False, 0, 0.0, "0", "false", "False", "0.0")),
)
def test_boolean(value: Any, expected: Any) -> None:
    """Breaks if a flag as text or number is not read, or as its opposite."""
    assert boolean(value) is expected


@each(None, [], {}, 2, -1, 0.5, "yes", "no", "", "canary", math.inf)
def test_no_boolean(value: Any) -> None:
    """Breaks if a value that is neither counts as one of them."""
    refused(boolean, value)


@each(
    ("2026-03-14T12:00:00Z", NOON),
    ("2026-03-14T12:00:00", NOON),
    ("2026-03-14 12:00:00", NOON),
    ("2026-03-14T13:00:00+01:00", NOON),
    ("20260314T120000Z", NOON),
    ("2026-03-14", NOON.replace(hour=0)),
    ("2026-03-14T12:00:00.1234567Z", NOON.replace(microsecond=123_456)),
    (1773489600, NOON),
    (1773489600.5, NOON + timedelta(milliseconds=500)),
    ("1773489600", NOON),
    (1773489600000, NOON),
    ("1773489600500", NOON + timedelta(milliseconds=500)),
    (-200_000_000, datetime(1963, 8, 31, 4, 26, 40, tzinfo=UTC)),
    ("0001-01-02T00:00:00Z", datetime(1, 1, 2, tzinfo=UTC)),
    ("9999-12-30T00:00:00Z", datetime(9999, 12, 30, tzinfo=UTC)),
)
def test_moment(value: Any, expected: datetime) -> None:
    """Breaks if an epoch time is not read, is read in the wrong unit, or a time without an offset is refused."""
    assert moment(value) == expected
    assert moment(value).tzinfo is not None


def test_the_offset_of_a_moment_is_kept() -> None:
    """Breaks if the day of a time in another zone becomes the day in UTC."""
    assert moment("2026-03-14T00:30:00+01:00").tzinfo == timezone(timedelta(hours=1))


YEARS = "a time between the years 1 and 9999"
TIME = "an ISO 8601 date and time"


@each(
    *(
        (value, TIME)
        for value in (None, True, [], {}, "", "canary", "soon", "now", "2026-02-30", "2026-13-01T00:00:00Z")
    ),
    *((value, TIME) for value in ("2026-03-14T25:00:00Z", "0000-01-01", "12026-01-01T00:00:00Z", "14.3.2026")),
    *((value, TIME) for value in (0, 1, 20260314, "20260314", 1e300, -1e300, math.inf, math.nan, 10**400, "1e999")),
    *((value, YEARS) for value in ("0001-01-01T00:00:00Z", "9999-12-31T00:00:00Z", "0001-01-01T00:00:00+14:00")),
    *((value, YEARS) for value in ("9999-12-31T23:59:59-14:00", 253402214400000, -62135596800000)),
)
def test_no_moment(value: Any, expected: str) -> None:
    """Breaks if a time is guessed, or one that psycopg cannot read is stored."""
    assert refused(moment, value) == expected


@each(
    ("2026-03-14", date(2026, 3, 14)),
    ("2026-03-14T23:59:59-11:00", date(2026, 3, 14)),
    ("2026-03-14T00:00:00+14:00", date(2026, 3, 14)),
    ("2026-03-14 canary", date(2026, 3, 14)),
    (1773489600, date(2026, 3, 14)),
    ("1773489600000", date(2026, 3, 14)),
    ("20260314T120000Z", date(2026, 3, 14)),
)
def test_day(value: Any, expected: date) -> None:
    """Breaks if a day is turned into UTC's."""
    assert day(value) == expected


@each(None, True, [], {}, "", "canary", "none", "14.3.2026", "2026-02-30", "2026-3-14", 5, math.inf, "0000-01-01")
def test_no_day(value: Any) -> None:
    """Breaks if a day is guessed, or a birth date that is none reaches PostgreSQL."""
    assert refused(day, value) == "a date"


@each(
    ("text", 7, "7"),
    ("integer", "146.5", 147),
    ("number", "12.5", 12.5),
    ("boolean", "true", True),
    ("date", "2026-03-14T23:00:00-05:00", "2026-03-14"),
    ("datetime", "2026-03-14T13:00:00+01:00", "2026-03-14T12:00:00+00:00"),
)
def test_the_reader_of_a_type_returns_what_postgresql_reads(kind: Any, value: Any, expected: Any) -> None:
    """Breaks if a column's value has a form that PostgreSQL reads in another way."""
    assert READERS[kind](value) == expected


@given(value=JSON, name=st.sampled_from(sorted(READERS)))
def test_no_value_raises_anything_else(value: Any, name: Any) -> None:
    """Breaks if an odd value raises an unexpected error, so that it costs its delivery."""
    with contextlib.suppress(Unreadable):
        found = READERS[name](value)
        assert found is not None
        assert not isinstance(found, float) or math.isfinite(found)
