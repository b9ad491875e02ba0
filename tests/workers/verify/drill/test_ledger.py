"""Deliveries in the broker."""

import base64
import json
from typing import Any

import fakeredis
import pytest

from app.delivery import pack
from tests.support import START, delivery, message_id, workout
from workers.verify.drill import ledger
from workers.verify.drill.ledger import queued_ids


def test_queued_deliveries_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a delivery that is queued, or held by a worker, counts as lost."""
    server = fakeredis.FakeRedis()
    monkeypatch.setattr(ledger, "redis_client", lambda _: server)
    names = [message_id(START, number) for number in range(3)]

    def message(name: str) -> dict[str, Any]:
        packed = pack([delivery(workout("u"), name=name)])
        return {"body": base64.b64encode(json.dumps([[packed], {}, {}]).encode()).decode(), "properties": {}}

    server.lpush("live", json.dumps(message(names[0])), b"no message")
    server.lpush("live:processing", json.dumps(message(names[1])))
    server.hset("unacked", "tag", json.dumps([message(names[2]), "live", "live"]))
    assert queued_ids("redis://somewhere") == set(names)
    assert queued_ids("amqp://somewhere") is None
