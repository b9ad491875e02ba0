"""Webhook signatures by aggregator: each verifier takes the raw bytes and raises InvalidSignature."""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from app.config.settings import Settings
from app.delivery import Headers, Receipt
from app.signatures import junction, terra


class Verifier(Protocol):
    """Who sent a webhook, proven by the signature over its raw bytes."""

    def __call__(self, headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:
        """Raises InvalidSignature."""


VERIFIERS: Mapping[str, Verifier] = {"junction": junction.verify, "terra": terra.verify}
