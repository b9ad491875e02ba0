"""Reads scalars of another type than documented, where that loses nothing."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from app.catalogue import FieldType

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
MAX_INTEGER = 9_200_000_000_000_000_000  # bigint's limit, rounded down to a number that a float has
# psycopg reads the years 1 to 9999, in the reader's own time zone.
EARLIEST, LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)
FIRST_EPOCH = 100_000_000  # smaller numbers (1973 and before) are no epoch times: 20261120 is rather a date
MILLISECONDS = 100_000_000_000  # epoch times from here on are in milliseconds: in seconds it is the year 5138
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Unreadable(ValueError):
    """A value cannot be read. The text says what was expected, without the value."""


def text(value: Any) -> str:
    """A text, or a number or boolean as JSON writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise Unreadable("text")


def short_text(value: Any, max_length: int) -> str:
    """As `text`, of at most this number of characters."""
    found = text(value)
    if len(found) > max_length:
        raise Unreadable(f"at most {max_length} characters")
    return found


def number(value: Any) -> float:
    """A number, or text that is one."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = value.strip()
    elif isinstance(value, bool | str) or not isinstance(value, int | float):
        raise Unreadable("a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Unreadable("a number in the range of double precision")
    return found


def integer(value: Any) -> int:
    """A number, or text that is one, rounded half away from zero, as PostgreSQL rounds numeric."""
    found = number(value)
    if abs(found) > MAX_INTEGER:
        raise Unreadable("an integer of 64 bits")
    exact = value if isinstance(value, int) else Decimal(str(value).strip() if isinstance(value, str) else repr(found))
    return int(Decimal(exact).to_integral_value(ROUND_HALF_UP))


def boolean(value: Any) -> bool:
    """A boolean, 0 or 1, or the text of one."""
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    try:
        return known[text(value).strip().lower()]
    except KeyError:
        raise Unreadable("true or false") from None


def moment(value: Any) -> datetime:
    """An instant from ISO 8601 or an epoch time in seconds or milliseconds. Without an offset it is UTC (Junction)."""
    is_iso = isinstance(value, str) and (value[4:5] == "-" or not NUMBER.fullmatch(value))
    try:
        given = datetime.fromisoformat(value) if is_iso else _epoch(value)
    except (ValueError, OverflowError):
        raise Unreadable("an ISO 8601 date and time") from None
    given = given if given.tzinfo else given.replace(tzinfo=UTC)
    if not 1 < given.year < 9999 and not EARLIEST <= given <= LATEST:  # the year alone costs a tenth
        raise Unreadable("a time between the years 1 and 9999")
    return given


def _epoch(value: Any) -> datetime:
    seconds = number(value)
    if abs(seconds) < FIRST_EPOCH:
        raise Unreadable("an epoch time")
    return EPOCH + timedelta(seconds=seconds / 1000 if abs(seconds) >= MILLISECONDS else seconds)


def day(value: Any) -> date:
    """A day, as sent: the time and the offset after it are left out. Also the day of an epoch time, in UTC."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return date.fromisoformat(value[:10])
    try:
        return moment(value).date()
    except ValueError:
        raise Unreadable("a date") from None


READERS: Mapping[FieldType, Callable[[Any], Any]] = {
    "text": text,
    "integer": integer,
    "number": number,
    "boolean": boolean,
    "date": lambda value: day(value).isoformat(),
    "datetime": lambda value: moment(value).astimezone(UTC).isoformat(),
}
