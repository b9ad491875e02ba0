"""Query parameters of the simulated Junction API, and the responses that several routes share."""

import base64
import contextlib
import re
from datetime import UTC, datetime, time
from typing import Any, Never, TypeVar

import msgspec
from flask import Response, request
from werkzeug.exceptions import HTTPException

from app.catalogue import Resource

N = TypeVar("N", int, float)
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
MIN_MOMENT = len("2026-01-31T10:00")


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, mimetype="application/json")


def refuse(status: int, detail: Any) -> Never:
    """Ends the request with an error in Junction's form."""
    raise HTTPException(response=answer({"detail": detail}, status))


def invalid(name: str, message: str) -> Never:
    """Ends the request with 422: a query parameter is missing or wrong."""
    refuse(422, validation_error(["query", name], message))


def validation_error(location: list[str], message: str, kind: str = "value_error") -> list[dict[str, Any]]:
    """The `detail` of a 422 response."""
    return [{"loc": location, "msg": message, "type": kind}]


def window(resource: Resource, newest: datetime) -> tuple[datetime, datetime]:
    """The window of a request. An end date without a time means 23:59:59 (Junction: API document)."""
    start = _moment(resource, "start_date", time()) or invalid("start_date", "field required")
    end = _moment(resource, "end_date", time(23, 59, 59)) or newest
    if start > end:
        invalid("end_date", "ends before it starts")
    return start, end


def number(name: str, default: N, low: N, high: N) -> N:
    """A number parameter of the default's type."""
    with contextlib.suppress(ValueError):
        value = type(default)(request.args.get(name, default))
        if low <= value <= high:  # never true for "nan", which float() accepts
            return value
    invalid(name, f"not a number from {low:g} to {high:g}")


def cursor() -> str | None:
    """The cursor, under its present or its old name."""
    return request.args.get("next_cursor") or request.args.get("cursor") or None


def position(count: int) -> tuple[int, ...]:
    """The position at which the requested page begins, of `count` numbers."""
    numbers = _decoded()[1:] or (0,) * count
    return numbers if len(numbers) == count else invalid("next_cursor", "no such cursor")


def cursor_at(*position: int) -> str:
    """The cursor of the page that begins at a position.

    It contains a page number, so that it never repeats, even after an empty page: clients treat a repetition as a loop.
    """
    page = _decoded()[0] + 1
    return base64.urlsafe_b64encode(".".join(map(str, (page, *position))).encode()).decode()


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
        # A resource that accepts days only includes the whole last day; elsewhere the last second has no fractions.
        moment = datetime.combine(moment, time.max if resource.dates == "day" and of_day != time() else of_day)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _decoded() -> tuple[int, ...]:
    encoded = cursor()
    try:
        return tuple(map(int, base64.urlsafe_b64decode(encoded).decode().split("."))) if encoded else (0,)
    except ValueError:
        invalid("next_cursor", "no such cursor")
