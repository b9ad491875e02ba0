"""Junction's events, and their actions."""

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
    """An event that was delivered at START, parsed."""
    return parse(delivery(body, name=name), body if isinstance(body, bytes) else msgspec.json.encode(body), settings)


def only(body: dict[str, Any]) -> Any:
    """The one action of an event."""
    (action,) = parsed(body).actions
    return action


def series(resource: str, *samples: dict[str, Any], **source: Any) -> dict[str, Any]:
    """A timeseries event."""
    data = {"source": {"provider": "garmin", "type": "watch"} | source, "data": list(samples)}
    return event(f"daily.data.{resource}.created", "u1", data)


def sample(**changes: Any) -> dict[str, Any]:
    """A sample in today's shape."""
    return {"timestamp": MOMENT, "value": 1, "unit": "x"} | changes


def dead(body: dict[str, Any] | bytes) -> str:
    """The reason why an event is a dead letter."""
    return refusal(parsed, body)


def survives(body: bytes) -> None:
    """Asserts that an event is parsed or refused. Any other error is a defect."""
    try:
        found = parsed(body)
    except Unprocessable:
        return
    assert found.ignored or found.user_id
