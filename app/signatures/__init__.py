"""Verifiers of webhook signatures, by aggregator."""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from app.config.settings import Settings
from app.delivery import Headers, Receipt
from app.signatures import junction, terra


class Verifier(Protocol):
    """Verifies the signature of a webhook over its raw bytes."""

    def __call__(self, headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:
        """The verified headers. Raises InvalidSignature."""


VERIFIERS: Mapping[str, Verifier] = {"junction": junction.verify, "terra": terra.verify}
