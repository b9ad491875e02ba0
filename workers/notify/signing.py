"""Bodies and signatures of notifications, as Standard Webhooks defines them (standardwebhooks.com)."""

import base64
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from standardwebhooks.webhooks import Webhook

from app.sealing import Sealer
from workers.store.notifications import Notification

SECRET_BYTES = 32  # Standard Webhooks asks for 24 to 64
TEST_TYPE = "subscription.test"


def new_secret() -> str:
    """A new signing secret, in the form that the libraries of Standard Webhooks accept."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def seal_secret(sealer: Sealer, name: str, secret: str) -> bytes:
    """The sealed secret, which can be opened for the subscription of this name only."""
    return sealer.seal(secret.encode(), _aad(name))


def open_secrets(sealer: Sealer, name: str, sealed: Sequence[bytes]) -> list[str]:
    """The signing secrets. Raises Unprocessable if a key of HEADRACE_ENCRYPTION_KEY is missing."""
    return [sealer.open(one, _aad(name), _aad(name)).decode() for one in sealed]


def body_of(one: Notification) -> bytes:
    """The body: the same bytes for the same row, whose times are in UTC. It names what changed, without values."""
    data = {
        "user_id": one.user_id,
        "client_user_id": one.client_user_id,
        "resource": one.resource or None,
        "provider": one.provider or None,
        "ids": one.ids,
        "from": one.ts_min,
        "to": one.ts_max,
        "rows": one.row_count,
        "position": one.last_position,
    }
    return _encoded(one.type, one.changed_at, data)


def body_of_test(name: str, now: datetime) -> bytes:
    """The body of `headrace subscriptions test`."""
    return _encoded(TEST_TYPE, now, {"subscription": name})


def signed_headers(message_id: str, body: bytes, signing_secrets: Sequence[str], now: datetime) -> dict[str, str]:
    """The headers of an attempt at `now`. With several secrets the header has a signature of each."""
    moment = now.astimezone(UTC)  # the library ignores the time zone and assumes UTC
    signatures = [Webhook(one).sign(message_id, moment, body.decode()) for one in signing_secrets]
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _encoded(kind: str, at: datetime, data: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"type": kind, "timestamp": at, "data": data})


def _aad(name: str) -> bytes:
    return b"subscription\0" + name.encode()
