"""Junction's events, and what a worker makes of them."""

import json
from typing import Any

import msgspec
import pytest

from app.config.settings import Settings
from app.errors import Unprocessable
from tests.support import ROOT, delivery, event
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
    """What an event means, delivered at START."""
    sent = delivery(body, name=name)
    return parse(sent, body if isinstance(body, bytes) else msgspec.json.encode(body), settings)


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
    """Why an event is a dead letter."""
    with pytest.raises(Unprocessable) as reason:
        parsed(body)
    assert reason.value.__cause__ is None
    assert "canary" not in str(reason.value)
    return str(reason.value)


def survives(body: bytes) -> None:
    """Parses, or refuses as it should: any other error is one."""
    try:
        found = parsed(body)
    except Unprocessable:
        return
    assert found.ignored or found.user_id
