"""Events of Terra, and the actions that they are parsed into."""

import json
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import ROOT, TERRA_SECRET
from tests.support.cases import refusal
from tests.support.fuzzing import terra_headers
from workers.actions import Parsed, Record, Sample, Samples
from workers.aggregators.terra import parse

RECORDED = ROOT / "tests" / "recorded" / "terra"
RECEIVED = datetime(2026, 3, 14, 18, tzinfo=UTC)
MADE = datetime(2026, 3, 14, 17, 30, tzinfo=UTC)
USER = {"user_id": "t1", "provider": "GARMIN", "reference_id": "member-1"}
START, END = "2026-03-14T00:00:00+01:00", "2026-03-15T00:00:00+01:00"
METADATA = {"start_time": START, "end_time": END, "summary_id": "s1", "upload_type": 1, "type": 0}
NAMES = ["activity", "daily", "body", "sleep", "menstruation", "nutrition", "athlete", "planned_workout", "hormone"]
NAMES += ["health_observation"]
T = TypeVar("T")


def recorded(path: str) -> Any:
    """A recorded event or object."""
    return json.loads((RECORDED / f"{path}.json").read_text(encoding="utf-8"))


def event(name: str, *items: Any, **more: Any) -> dict[str, Any]:
    """An event with these objects."""
    content = {"athlete": items[0]} if name == "athlete" else {"data": list(items)}
    return {"type": name, "user": USER, "version": "2022-03-16"} | content | more


def item(**parts: Any) -> dict[str, Any]:
    """An object with metadata, as in most of Terra's event types."""
    return {"metadata": METADATA} | parts


def parsed(
    body: Any, settings: Settings | None = None, *, made: datetime | None = MADE, reference: str | None = None
) -> Parsed:
    """The parsed form of an event that Terra created at `made` and that was received at RECEIVED."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    ordering = None if made is None else round(made.timestamp() * 1000)
    delivery = Delivery("terra", "trace-1", RECEIVED.timestamp(), b"", ordering, reference)
    return parse(delivery, raw, settings or Settings())


def dead(body: Any) -> str:
    """The error message of an event that cannot be parsed."""
    return refusal(parsed, body)


def of(kind: type[T], found: Parsed) -> list[T]:
    """The actions of one kind."""
    return [action for action in found.actions if isinstance(action, kind)]


def record(name: str, *items: Any) -> Record:
    """The only record of an event with these objects."""
    (found,) = of(Record, parsed(event(name, *items)))
    return found


def columns(name: str, given: Any) -> dict[str, Any]:
    """The typed columns of an object."""
    return dict(json.loads(record(name, given).columns or b"null"))


def series(body: Any, resource: str, subtype: str = "") -> list[Sample]:
    """The samples of a resource, in order of time."""
    found = [one for one in of(Samples, parsed(body)) if (one.resource, one.subtype) == (resource, subtype)]
    return sorted((sample for one in found for sample in one.rows), key=lambda sample: sample.ts)


def terra_signed(body: bytes, *, at: datetime | None = None, secret: str = TERRA_SECRET) -> dict[str, str]:
    """Terra's headers that sign a body."""
    return terra_headers(body, "trace-1", int((at or datetime.now(UTC)).timestamp()), secret)
