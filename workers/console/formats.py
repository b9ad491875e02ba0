"""How values are shown, and how the parameters of a search are read."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

from flask import request
from markupsafe import Markup, escape

from app.errors import Unprocessable
from workers.operate.durations import format_duration, format_short

PAGE_ROWS = 50


def shown(value: Any) -> Any:
    """A table cell."""
    if value is None or value == "":
        return Markup("&ndash;")
    if isinstance(value, bool):
        return "yes" if value else "no"
    for kind, shape in SHAPES.items():
        if isinstance(value, kind):
            return shape(value)
    return value


def moment(value: datetime | None) -> Markup:
    """A time in UTC, to the second."""
    if value is None:
        return Markup("&ndash;")
    at = value.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), f"{at:%Y-%m-%d %H:%M:%S}")


def outcome(value: str | None) -> Markup:
    """A state as a coloured word."""
    return Markup('<span class="state {}">{}</span>').format(str(value or "").split(" ")[0], escape(value or "unknown"))


SHAPES: dict[type, Callable[[Any], Any]] = {
    datetime: moment,
    int: lambda value: f"{value:,}".replace(",", "\N{NO-BREAK SPACE}"),
    float: lambda value: f"{value:.6g}",
    timedelta: format_short,
}
FILTERS = {"shown": shown, "moment": moment, "duration": format_duration, "outcome": outcome}


def text(name: str) -> str:
    """A parameter of the query."""
    return request.args.get(name, "").strip()


def number(name: str, value: str) -> int:
    """An id. Raises Unprocessable."""
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise Unprocessable(f"{name} is not a number")
    return int(value)


def instant(name: str, value: str) -> datetime | None:
    """A day or a time in ISO 8601, UTC without an offset; None for ''. Raises Unprocessable."""
    if not value:
        return None
    try:
        given = datetime.fromisoformat(value)
        return (given if given.tzinfo else given.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Unprocessable(f"{name} is neither a day (2026-03-14) nor a time (2026-03-14T06:30:00Z)") from None


def day(name: str, value: str) -> date | None:
    found = instant(name, value)
    return found.date() if found else None
