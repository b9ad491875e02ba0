"""Terra's signatures."""

import hashlib
import hmac
from datetime import datetime

from app.config.settings import Settings
from app.delivery import Headers, Receipt
from app.errors import InvalidSignature

SIGNATURE_HEADERS = ("X-Terra-Signature", "Terra-Signature")  # the second is the old name; Terra sends either or both
MAX_HEADER = 8192
MAX_ID = 256


def verify(headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:
    """Checks `t=<unix seconds>,v1=<hex HMAC-SHA256 of t.body>` (Terra: reference/signing). Raises InvalidSignature.

    The signature does not cover the trace id, the reference and the ordering time: do not rely on them alone.
    """
    given = [header for name in SIGNATURE_HEADERS if (header := headers.get(name))]
    if not given or not settings.terra_signing_secrets:
        raise InvalidSignature("missing")
    stale = False
    for header in given:
        timestamp, candidates = _signatures(header)
        if not (timestamp and _matches(timestamp, candidates, body, settings.terra_signing_secrets)):
            continue
        if abs(now.timestamp() - int(timestamp)) <= settings.terra_tolerance_seconds:
            return _receipt(headers)
        stale = True
    # "stale" is a reason of its own: if Terra signs retries with the first attempt's time, raise the tolerance.
    raise InvalidSignature("stale" if stale else "signature")


def _signatures(header: str) -> tuple[str, list[str]]:
    """The `t` and every `v1` of a signature header; '' and [] if it is malformed. Other schemes are ignored."""
    if len(header) > MAX_HEADER:
        return "", []
    pairs = [part.strip().partition("=") for part in header.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    if len(times) != 1 or not (times[0].isascii() and times[0].isdigit() and len(times[0]) <= 12):
        return "", []
    return times[0], [value for name, _, value in pairs if name == "v1"]


def _matches(timestamp: str, candidates: list[str], body: bytes, secrets: tuple[str, ...]) -> bool:
    for secret in secrets:
        expected = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest().encode()
        if any(hmac.compare_digest(expected, candidate.encode("utf-8", "replace")) for candidate in candidates):
            return True
    return False


def _receipt(headers: Headers) -> Receipt:
    trace = (headers.get("X-Terra-Trace-Id") or "")[:MAX_ID]
    ordering = headers.get("X-Terra-Ordering-Timestamp") or ""
    known = ordering.isascii() and ordering.isdigit() and len(ordering) <= 15
    return Receipt(trace, int(ordering) if known else None, headers.get("Terra-Reference"))
