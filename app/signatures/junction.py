"""Junction's signatures: Svix, over the raw bytes."""

import base64
import importlib.util
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from types import ModuleType
from typing import Any

from app.config.settings import Settings
from app.delivery import Headers, Receipt
from app.errors import InvalidSignature

MAX_HEADER = 8192
MAX_ID = 256
SIGNATURE_BYTES = 32
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


def verify(headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:
    """Checks the Svix signature over the raw bytes with each secret in turn. Raises InvalidSignature.

    The library applies its own clock and a tolerance of five minutes in both directions; `now` only determines the
    reason. Its other errors on hostile headers (ValueError, with binascii.Error and UnicodeDecodeError; OverflowError)
    count as invalid signatures.
    """
    given = {name: headers.get(f"Svix-{name}") or headers.get(f"Webhook-{name}") or "" for name in _HEADERS}
    if not all(given.values()):
        raise InvalidSignature("missing")
    message_id, timestamp = given["Id"], given["Timestamp"]
    is_id = len(message_id) <= MAX_ID and message_id.isascii() and message_id.isprintable()
    is_timestamp = timestamp.isascii() and timestamp.isdecimal()
    if not (is_id and is_timestamp) or any(len(value) > MAX_HEADER for value in given.values()):
        raise InvalidSignature("signature")
    given["Signature"] = " ".join(filter(_is_signature, given["Signature"].split(" ")[:MAX_SIGNATURES]))
    named = {f"svix-{name.lower()}": value for name, value in given.items()}
    reason = "missing"
    for secret in settings.junction_webhook_secrets:
        try:
            _verifier(secret).verify(body, named)
        except _svix.WebhookVerificationError:
            reason = "stale" if _is_stale(timestamp, now) else "signature"
        except (ValueError, OverflowError, OSError):
            reason = "signature"
        else:
            return Receipt(message_id)
    raise InvalidSignature(reason)


def _is_stale(timestamp: str, now: datetime) -> bool:
    """Whether a numeric timestamp is out of tolerance, which the library checks before the signature."""
    try:
        return abs(now - datetime.fromtimestamp(float(timestamp), UTC)) > TOLERANCE
    except (ValueError, OverflowError, OSError):  # not a valid date
        return False


def _is_signature(part: str) -> bool:
    """`v1,` and 32 bytes in canonical base64. The library decodes leniently and has no limit."""
    version, _, text = part.partition(",")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return version == "v1" and len(raw) == SIGNATURE_BYTES and base64.b64encode(raw).decode() == text


@cache
def _verifier(secret: str) -> Any:
    return _svix.Webhook(secret)
