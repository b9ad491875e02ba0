"""Events of Junction, and the actions that they are parsed into."""

import json
from typing import Any

import msgspec

from app.config.settings import Settings
from app.errors import Unprocessable
from tests.support import ROOT, delivery, event
from tests.support.cases import refusal
from workers.actions import Parsed
from workers.aggregators.junction import parse

RECORDED = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((ROOT / "tests" / "recorded" / "junction").glob("*.json"))
}
USER = "0aaca0c5-ccf3-5e68-9bfe-e22fa6a0d79a"
EVERYTHING = Settings()
MOMENT = "2026-03-14T06:30:00+00:00"


def parsed(body: dict[str, Any] | bytes, settings: Settings = EVERYTHING, name: str | None = None) -> Parsed:
    """The parsed form of an event that was created at START."""
    return parse(delivery(body, name=name), body if isinstance(body, bytes) else msgspec.json.encode(body), settings)


def only(body: dict[str, Any]) -> Any:
    """The only action of an event."""
    (action,) = parsed(body).actions
    return action


def series(resource: str, *samples: dict[str, Any], **source: Any) -> dict[str, Any]:
    """A timeseries event."""
    data = {"source": {"provider": "garmin", "type": "watch"} | source, "data": list(samples)}
    return event(f"daily.data.{resource}.created", "u1", data)


def sample(**changes: Any) -> dict[str, Any]:
    """A sample in Junction's current format."""
    return {"timestamp": MOMENT, "value": 1, "unit": "x"} | changes


def dead(body: dict[str, Any] | bytes) -> str:
    """The error message of an event that cannot be parsed."""
    return refusal(parsed, body)


def survives(body: bytes) -> None:
    """Asserts that an event is parsed or raises Unprocessable. Any other exception is a defect."""
    try:
        found = parsed(body)
    except Unprocessable:
        return
    assert found.ignored or found.user_id or found.actions  # a lost delivery may have no user
