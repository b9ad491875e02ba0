"""How Junction signs: Svix, over the raw bytes."""

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
MAX_SIGNATURES = 16  # a rotation makes two
TOLERANCE = timedelta(minutes=5)  # the library's, which does not tell which of its checks failed
_HEADERS = ("Id", "Timestamp", "Signature")


def _svix_webhooks() -> ModuleType:
    """The module `svix.webhooks` without its package's `__init__`, which brings Svix's API client along.

    That client is an HTTP client, 0.7 s and 49 MB in every process of the endpoint, which has no use for it.
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

    The tolerance of five minutes, both ways, is the library's, and so is its clock; `now` only tells why it refused.
    Whatever else the library raises on hostile headers (ValueError, binascii.Error, UnicodeDecodeError: all of them
    ValueErrors; OverflowError) refuses as well.
    """
    given = {name: headers.get(f"Svix-{name}") or headers.get(f"Webhook-{name}") or "" for name in _HEADERS}
    if not all(given.values()):
        raise InvalidSignature("missing")
    message_id = given["Id"]
    if len(message_id) > MAX_ID or not (message_id.isascii() and message_id.isprintable()):
        raise InvalidSignature("signature")
    if any(len(value) > MAX_HEADER for value in given.values()):
        raise InvalidSignature("signature")
    if not given["Timestamp"].isdecimal() or not given["Timestamp"].isascii():
        raise InvalidSignature("signature")
    given["Signature"] = " ".join(filter(_is_signature, given["Signature"].split(" ")[:MAX_SIGNATURES]))
    named = {f"svix-{name.lower()}": value for name, value in given.items()}
    reason = "missing"
    for secret in settings.junction_webhook_secrets:
        try:
            _verifier(secret).verify(body, named)
        except _svix.WebhookVerificationError:
            reason = "stale" if _is_stale(given["Timestamp"], now) else "signature"
        except (ValueError, OverflowError, OSError):
            reason = "signature"
        else:
            return Receipt(message_id)
    raise InvalidSignature(reason)


def _is_stale(timestamp: str, now: datetime) -> bool:
    """Whether a timestamp of digits is out of tolerance. The library looks at it before it looks at the signature."""
    try:
        return abs(now - datetime.fromtimestamp(float(timestamp), UTC)) > TOLERANCE
    except (ValueError, OverflowError, OSError):  # a moment that there is not
        return False


def _is_signature(part: str) -> bool:
    """`v1,` and 32 bytes in base64, written in the one right way; the library reads it leniently, and has no limit."""
    version, _, text = part.partition(",")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return version == "v1" and len(raw) == SIGNATURE_BYTES and base64.b64encode(raw).decode() == text


@cache
def _verifier(secret: str) -> Any:
    return _svix.Webhook(secret)
