"""Verifiers of webhook signatures, by aggregator."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

from app.config.settings import Settings
from app.delivery import Headers, Receipt
from app.signatures import junction, terra
from app.signatures.hashing import HashedBody, HmacInput


class Verifier(Protocol):
    """Verifies the signature of a webhook over its raw bytes."""

    def __call__(
        self, headers: Headers, body: bytes, settings: Settings, now: datetime, hashed: HashedBody | None = None
    ) -> Receipt:
        """The verified headers. `hashed`: the body, if it was hashed as it arrived. Raises InvalidSignature."""


class Precheck(Protocol):
    """Looks at the headers of a webhook before its body is read."""

    def __call__(self, headers: Headers, settings: Settings, now: datetime) -> Sequence[HmacInput]:
        """The HMAC inputs for the body. Raises InvalidSignature if these headers cannot fit any body.

        Here the reason "stale" means only that the time is out of tolerance: the signature is not checked yet.
        """


VERIFIERS: Mapping[str, Verifier] = {"junction": junction.verify, "terra": terra.verify}
PRECHECKS: Mapping[str, Precheck] = {"junction": junction.precheck, "terra": terra.precheck}
