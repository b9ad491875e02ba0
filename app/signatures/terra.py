"""Terra's signatures, and the limits of its unsigned headers."""

import hmac
import logging
from collections.abc import Iterator
from datetime import datetime

from app.config.settings import Settings
from app.delivery import DIGEST_BYTES, MAX_NAME, Headers, Receipt
from app.errors import InvalidSignature
from app.signatures import hashing
from app.signatures.hashing import HashedBody, HmacInput

SIGNATURE_HEADERS = ("X-Terra-Signature", "Terra-Signature")  # the second is the old name; Terra sends either or both
MAX_HEADER = 8192
HEX_DIGITS = 64  # of a signature
# Terra sets the ordering time before it signs. Its machines' clocks may differ by seconds.
MAX_AHEAD_MS = 5_000
# A retry repeats the ordering time. Terra retries for 8.5 h according to one page and for 24 h according to another;
# whether it signs a retry with a new time is unknown.
MAX_AGE_MS = 24 * 3600 * 1000
log = logging.getLogger(__name__)


def precheck(headers: Headers, settings: Settings, now: datetime) -> list[HmacInput]:
    """The HMAC inputs for the body. Raises InvalidSignature if these headers cannot fit any body."""
    times = {timestamp for timestamp, _ in _signatures(headers, settings)}
    if not times:
        raise InvalidSignature("signature")
    if all(_is_stale(timestamp, settings, now) for timestamp in times):
        raise InvalidSignature("stale")
    return [_hmac_input(secret, timestamp) for secret in settings.terra_signing_secrets for timestamp in times]


def verify(
    headers: Headers, body: bytes, settings: Settings, now: datetime, hashed: HashedBody | None = None
) -> Receipt:
    """Checks `t=<unix seconds>,v1=<hex HMAC-SHA256 of t.body>` (Terra: reference/signing). Raises InvalidSignature.

    The signature does not cover the trace id, the reference and the ordering time, so a captured request can be sent
    again with others. The digest identifies the signed time and body whatever the trace id says. It is a part of the
    HMAC with the secret that signed, whatever other secrets are configured, so it reveals nothing of the body.
    """
    stale = False
    for timestamp, candidates in _signatures(headers, settings):
        digest = _digest(timestamp, candidates, body, hashed, settings.terra_signing_secrets)
        if digest is None:
            continue
        if _is_stale(timestamp, settings, now):
            stale = True
            continue
        ordering = headers.get("X-Terra-Ordering-Timestamp") or ""
        return Receipt(  # with the unsigned headers that are within their limits
            message_id=_name(headers, "X-Terra-Trace-Id") or "",
            ordering_ms=_ordering_ms(ordering, int(timestamp) * 1000),
            reference=_name(headers, "Terra-Reference"),
            digest=digest,
        )
    # "stale" is a reason of its own: if Terra signs retries with the first attempt's time, raise the tolerance.
    raise InvalidSignature("stale" if stale else "signature")


def _signatures(headers: Headers, settings: Settings) -> Iterator[tuple[str, list[str]]]:
    """The `t` and every `v1` of each signature header. Malformed headers, and other schemes, are left out.

    Raises InvalidSignature if there is no header, or no secret.
    """
    given = [header for name in SIGNATURE_HEADERS if (header := headers.get(name))]
    if not given or not settings.terra_signing_secrets:
        raise InvalidSignature("no_secret" if given else "missing")
    for header in given:
        if len(header) > MAX_HEADER:
            continue
        pairs = [part.strip().partition("=") for part in header.split(",")]
        times = [value for name, _, value in pairs if name == "t"]
        candidates = [value for name, _, value in pairs if name == "v1" and len(value) == HEX_DIGITS]
        if candidates and len(times) == 1 and times[0].isascii() and times[0].isdigit() and len(times[0]) <= 12:
            yield times[0], candidates


def _is_stale(timestamp: str, settings: Settings, now: datetime) -> bool:
    return abs(now.timestamp() - int(timestamp)) > settings.terra_tolerance_seconds


def _hmac_input(secret: str, timestamp: str) -> HmacInput:
    return HmacInput(secret.encode(), timestamp.encode() + b".")


def _digest(
    timestamp: str, candidates: list[str], body: bytes, hashed: HashedBody | None, secrets: tuple[str, ...]
) -> bytes | None:
    """The digest of the signed time and body, or None if no secret made one of the signatures."""
    for secret in secrets:
        mac = hashing.digest(_hmac_input(secret, timestamp), body, hashed)
        expected = mac.hex().encode()
        if any(hmac.compare_digest(expected, candidate.encode("utf-8", "replace")) for candidate in candidates):
            return mac[:DIGEST_BYTES]
    return None


def _name(headers: Headers, header: str) -> str | None:
    """An id of at most 256 printable ASCII characters; any other is ignored.

    A long id is not cut, because two of them could begin with the same characters.
    """
    name = headers.get(header)
    if not name:
        return None
    if len(name) <= MAX_NAME and name.isascii() and name.isprintable():
        return name
    log.info("%s is ignored: it is longer than %d characters or not printable", header, MAX_NAME)
    return None


def _ordering_ms(text: str, signed_ms: int) -> int | None:
    """The ordering time, moved into the range that the signed time allows. None if it is absent or not a number."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        return None
    return max(signed_ms - MAX_AGE_MS, 0, min(int(text), signed_ms + MAX_AHEAD_MS))
