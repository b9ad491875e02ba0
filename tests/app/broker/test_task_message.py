"""Messages that are built without Celery: a worker cannot tell them from Celery's own."""

import base64
import json
from typing import Any

from app.broker.celery import make_celery
from app.broker.lanes import APPLY
from app.broker.task_message import task_message
from app.config.settings import Settings
from tests.support.broker import waiting

CHANGES = {"id", "root_id", "origin", "correlation_id", "delivery_tag"}  # from message to message
# Celery's address for replies, which a worker of ours never sends; and copies of headers that kombu does not read.
ONLY_CELERY = {"reply_to", "argsrepr", "kwargsrepr"}


def test_a_message_is_what_celery_would_have_written(url: str) -> None:
    """Breaks if a new version of Celery or kombu writes another message, or ours has another header or property."""
    celery = make_celery(Settings(broker_url=url), "publisher")
    celery.send_task(APPLY, args=("packed",), queue="live", argsrepr="(1 deliveries)", kwargsrepr="{}", retry=False)
    (theirs,) = waiting(url)
    ours = json.loads(task_message(APPLY, "packed", "live", "(1 deliveries)", {}))
    assert (parts(ours), set(ours)) == (parts(theirs), set(theirs))
    assert json.loads(task_message(APPLY, "", "live", "", {"traceparent": "t"}))["headers"]["traceparent"] == "t"


def test_each_message_has_ids_of_its_own() -> None:
    """Breaks if two messages share an id: Celery would take the second for the first."""
    one, other = (json.loads(task_message(APPLY, "packed", "live", "", {})) for _ in range(2))
    assert one["headers"]["id"] == one["headers"]["root_id"] == one["properties"]["correlation_id"]
    assert one["headers"]["id"] != other["headers"]["id"]


def parts(message: dict[str, Any]) -> list[Any]:
    """The parts that are the same in all messages. The body is JSON with or without spaces."""
    headers = {name: value for name, value in message["headers"].items() if name not in CHANGES}
    properties = {name: value for name, value in message["properties"].items() if name not in CHANGES | ONLY_CELERY}
    body = json.loads(base64.b64decode(message["body"]))
    return [headers, properties, message["content-type"], message["content-encoding"], body]
