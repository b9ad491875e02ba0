"""A task message as Celery and kombu write it to Redis, built without them: 8 us instead of 350."""

import base64
import os
import socket
import uuid
from collections.abc import Mapping

import msgspec

from app.broker.envelope import CONTENT

_encoder = msgspec.json.Encoder()
_OPTIONS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_TASK: dict[str, object] = {
    "lang": "py",
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": (None, None),
    "parent_id": None,
    "kwargsrepr": "{}",
    "ignore_result": None,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}


def task_message(task: str, argument: str, lane: str, argsrepr: str, headers: Mapping[str, str]) -> bytes:
    """The message of a task with one argument, for the list of a lane. Flower shows `argsrepr` instead of the argument.

    The headers, properties and body are those of Celery's message protocol 2 ("Message Protocol" in its documentation),
    in the envelope of kombu's virtual transports.
    """
    name = str(uuid.uuid4())
    message = {
        "body": base64.b64encode(_encoder.encode(((argument,), {}, _OPTIONS))).decode(),
        "content-encoding": CONTENT[1],
        "content-type": CONTENT[0],
        "headers": {
            "task": task,
            "id": name,
            "root_id": name,
            **_TASK,
            "argsrepr": argsrepr,
            "origin": _origin(),
            **headers,
        },
        "properties": {
            "correlation_id": name,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": lane},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": name,  # a consumer replaces it
        },
    }
    return _encoder.encode(message)


def _origin() -> str:
    return f"gen{os.getpid()}@{socket.gethostname()}"
