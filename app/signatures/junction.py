"""Junction's signatures: Svix, over the raw bytes."""

import base64
import hmac
import importlib.util
import re
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from types import ModuleType
from typing import Any

from app.config.settings import Settings
from app.delivery import Headers, Receipt
from app.errors import InvalidSignature
from app.signatures.hashing import HashedBody, HmacInput, digest

MAX_HEADER = 8192
MAX_ID = 256
MAX_DIGITS = 20  # of the timestamp header
# `v1,` and 32 bytes in canonical base64: the last digit has four bits. The library decodes leniently, without a limit.
SIGNATURE = re.compile(r"v1,[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
MAX_SIGNATURES = 16  # a secret rotation sends two
TOLERANCE = timedelta(minutes=5)  # the library's own; it does not report which check failed
_HEADERS = ("Id", "Timestamp", "Signature")


def _svix_webhooks() -> ModuleType:
    """Imports `svix.webhooks` without the package's `__init__`, which imports Svix's API client.

    That HTTP client costs every process of the endpoint 0.7 s and 49 MB and is not used.
    """
    package = importlib.util.find_spec("svix")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("svix")
    path = f"{package.submodule_search_locations[0]}/webhooks.py"
    spec = importlib.util.spec_from_file_location("app.signatures._svix_webhooks", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("svix.webhooks")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_svix = _svix_webhooks()


def precheck(headers: Headers, settings: Settings, now: datetime) -> list[HmacInput]:
    """The HMAC inputs for the body. Raises InvalidSignature if these headers cannot fit any body."""
    given = _signed_headers(headers)
    if not settings.junction_webhook_secrets:
        raise InvalidSignature("no_secret")
    if not given["Signature"]:
        raise InvalidSignature("signature")
    if _is_stale(given["Timestamp"], now):
        raise InvalidSignature("stale")
    return [_hmac_input(secret, given) for secret in settings.junction_webhook_secrets]


def verify(
    headers: Headers, body: bytes, settings: Settings, now: datetime, hashed: HashedBody | None = None
) -> Receipt:
    """Checks the Svix signature over the raw bytes with each secret in turn. Raises InvalidSignature.

    The library checks a whole body, with its own clock and a tolerance of five minutes in both directions. The HMAC of
    a body that was hashed as it arrived is compared here, because the library needs the body as one text (a test shows
    that both agree). "stale" means that the signature fits and the time does not: the library checks the time first and
    does not report which check failed. Its other errors on hostile headers (ValueError, with binascii.Error and
    UnicodeDecodeError; OverflowError) count as invalid signatures.
    """
    given = _signed_headers(headers)
    reason, is_stale = "no_secret", _is_stale(given["Timestamp"], now)
    for secret in settings.junction_webhook_secrets:
        if not hashed and _library_accepts(secret, given, body):
            return Receipt(given["Id"])
        if (hashed or is_stale) and _fits(secret, given, body, hashed):
            if not is_stale:
                return Receipt(given["Id"])
            reason = "stale"
        elif reason != "stale":
            reason = "signature"
    raise InvalidSignature(reason)


def _signed_headers(headers: Headers) -> dict[str, str]:
    """The headers with well-formed signatures only. Raises InvalidSignature if one is missing or malformed."""
    given = {name: headers.get(f"Svix-{name}") or headers.get(f"Webhook-{name}") or "" for name in _HEADERS}
    if not all(given.values()):
        raise InvalidSignature("missing")
    message_id, timestamp = given["Id"], given["Timestamp"]
    is_id = len(message_id) <= MAX_ID and message_id.isascii() and message_id.isprintable()
    is_timestamp = timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= MAX_DIGITS
    if not (is_id and is_timestamp) or any(len(value) > MAX_HEADER for value in given.values()):
        raise InvalidSignature("signature")
    given["Signature"] = " ".join(filter(SIGNATURE.fullmatch, given["Signature"].split(" ")[:MAX_SIGNATURES]))
    return given


def _library_accepts(secret: str, given: dict[str, str], body: bytes) -> bool:
    named = {f"svix-{name.lower()}": value for name, value in given.items()}
    try:
        _verifier(secret).verify(body, named)
    except (_svix.WebhookVerificationError, ValueError, OverflowError, OSError):
        return False
    return True


def _hmac_input(secret: str, given: dict[str, str]) -> HmacInput:
    """The input for `id.timestamp.body`, which Svix signs with the timestamp as a number."""
    prefix = f"{given['Id']}.{int(given['Timestamp'])}."
    return HmacInput(base64.b64decode(secret.removeprefix("whsec_")), prefix.encode())


def _fits(secret: str, given: dict[str, str], body: bytes, hashed: HashedBody | None) -> bool:
    """Whether the signature fits, at any time. As in the library, a body that is not UTF-8 does not fit."""
    expected = digest(_hmac_input(secret, given), body, hashed)
    signatures = [base64.b64decode(one.removeprefix("v1,")) for one in given["Signature"].split()]
    if not any(hmac.compare_digest(expected, one) for one in signatures):
        return False
    try:
        str(body, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_stale(timestamp: str, now: datetime) -> bool:
    """Whether the time of a request is out of tolerance."""
    try:
        return abs(now - datetime.fromtimestamp(int(timestamp), UTC)) > TOLERANCE
    except (ValueError, OverflowError, OSError):  # not a date
        return True


@cache
def _verifier(secret: str) -> Any:
    return _svix.Webhook(secret)
