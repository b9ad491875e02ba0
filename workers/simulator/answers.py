"""Reading the query of a request to the simulated read API, and the answers that several of its routes share."""

import base64
import re
from collections.abc import Sequence
from datetime import UTC, datetime, time
from typing import Any, Never

import msgspec
from flask import Response, request
from werkzeug.exceptions import HTTPException

from app.catalogue import Resource
from workers.simulator.query import Position

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
MIN_MOMENT = len("2026-01-31T10:00")


def answer(body: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status, mimetype="application/json")


def refuse(status: int, detail: Any) -> Never:
    """Ends the request with an error in the provider's form."""
    raise HTTPException(response=answer({"detail": detail}, status))


def invalid(name: str, message: str) -> Never:
    """Ends the request with 422: a parameter is missing or wrong."""
    refuse(422, [{"loc": ["query", name], "msg": message, "type": "value_error"}])


def window(resource: Resource, newest: datetime) -> tuple[datetime, datetime]:
    """The window that a request asks for. A bare end date means 23:59:59, as the public document has it."""
    start = _moment(resource, "start_date", time())
    end = _moment(resource, "end_date", time(23, 59, 59))
    if start is None:
        invalid("start_date", "field required")
    end = newest if end is None else end
    if start > end:
        invalid("end_date", "ends before it starts")
    return start, end


def number(name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query."""
    text = request.args.get(name, str(default))
    if not text.isdecimal() or not low <= int(text) <= high:
        invalid(name, f"not a number from {low} to {high}")
    return int(text)


def seconds(name: str, default: float, low: float, high: float) -> float:
    """A number of seconds of the query, whole or not."""
    try:
        asked = float(request.args.get(name, default))
    except ValueError:
        invalid(name, "not a number")
    # Written so that "nan", which is a number to Python, is refused too.
    return asked if low <= asked <= high else invalid(name, f"not a number from {low:g} to {high:g}")


def cursor() -> str | None:
    """The cursor, under its present name or the old one."""
    return request.args.get("next_cursor") or request.args.get("cursor") or None


def pages(total: Sequence[Any], size: int) -> tuple[Sequence[Any], str | None]:
    """The part of a list that the cursor asks for, and the cursor of the next part."""
    (begin,) = _open(1)
    end = begin + size
    return total[begin:end], _seal(end) if end < len(total) else None


def position() -> Position:
    """Where the cursor says that the page begins."""
    return Position(*_open(3))


def cursor_at(position: Position | None) -> str | None:
    """The cursor of the page that begins here."""
    return None if position is None else _seal(position.connection, position.slot, position.sample)


def _moment(resource: Resource, name: str, of_day: time) -> datetime | None:
    text = request.args.get(name)
    if text is None:
        return None
    is_day = DAY.fullmatch(text) is not None
    if not is_day and (resource.dates == "day" or len(text) < MIN_MOMENT):
        invalid(name, "invalid date format")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        invalid(name, "invalid datetime format")
    if is_day:
        # Where only days are taken, the whole last day counts; elsewhere its last second cuts fractions off.
        end_of_day = time.max if resource.dates == "day" and of_day != time() else of_day
        moment = datetime.combine(moment, end_of_day)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _seal(*numbers: int) -> str:
    # The pages are counted, so that no cursor comes twice, not even after an empty page: a client would see a circle.
    page = _opened()[0] + 1
    return base64.urlsafe_b64encode(".".join(str(each) for each in (page, *numbers)).encode()).decode()


def _open(count: int) -> list[int]:
    numbers = _opened()[1:] or [0] * count
    if len(numbers) != count:
        invalid("next_cursor", "no such cursor")
    return numbers


def _opened() -> list[int]:
    sealed = cursor()
    if sealed is None:
        return [0]
    try:
        return [int(part) for part in base64.urlsafe_b64decode(sealed).decode().split(".")]
    except ValueError:
        invalid("next_cursor", "no such cursor")
