"""Bodies that are hashed as they arrive: the same result as for a whole body, and the look at the headers before."""

import base64
import hmac
from datetime import UTC, datetime, timedelta

import pytest
from werkzeug.datastructures import Headers

from app.config.settings import Settings
from app.delivery import Receipt
from app.errors import InvalidSignature
from app.signatures import PRECHECKS, VERIFIERS, HashedBody
from tests.support import JUNCTION_SECRET, TERRA_SECRET, signed
from tests.support.terra import terra_signed

OTHER = "whsec_" + "b3RoZXItc2VjcmV0LW90aGVyLXNlY3JldA=="
SETTINGS = Settings(
    junction_webhook_secrets=(OTHER, JUNCTION_SECRET), terra_signing_secrets=("another-terra-secret", TERRA_SECRET)
)
BODY = b'{"event_type": "x", "title": "\xc3\xbc"}'
HOUR = timedelta(hours=1)
SignedBody = tuple[dict[str, str], bytes]


def not_text() -> dict[str, str]:
    """Headers that sign two bytes that are not UTF-8, which `signed` cannot."""
    given = signed(b"{}")
    text = f"{given['svix-id']}.{given['svix-timestamp']}.".encode() + b"\xff\xfe"
    mac = hmac.digest(base64.b64decode(JUNCTION_SECRET.removeprefix("whsec_")), text, "sha256")
    return given | {"svix-signature": "v1," + base64.b64encode(mac).decode()}


def junction_cases() -> dict[str, SignedBody]:
    """Signed now: Svix's library has a clock of its own."""
    now = signed(BODY)
    old = signed(BODY, at=datetime.now(UTC) - HOUR)
    return {
        "valid": (now, BODY),
        "of the first secret": (signed(BODY, secret=OTHER), BODY),
        "another body": (now, BODY + b" "),
        "old": (old, BODY),
        "old, and another body": (old, BODY + b" "),
        "zeros in front": (now | {"svix-timestamp": "00" + now["svix-timestamp"]}, BODY),
        "not UTF-8": (not_text(), b"\xff\xfe"),
        "no body": (signed(b""), b""),
        "two signatures": (now | {"svix-signature": f"v1,{'A' * 43}= {now['svix-signature']}"}, BODY),
    }


def terra_cases() -> dict[str, SignedBody]:
    """Signed now."""
    return {
        "valid": (terra_signed(BODY), BODY),
        "another body": (terra_signed(BODY), BODY + b" "),
        "old": (terra_signed(BODY, at=datetime.now(UTC) - HOUR), BODY),
    }


CASES = {"junction": junction_cases, "terra": terra_cases}
NAMES = [(aggregator, name) for aggregator, cases in CASES.items() for name in cases()]


def result(aggregator: str, headers: Headers, body: bytes, hashed: HashedBody | None) -> Receipt | str:
    """The receipt, or the reason of the refusal."""
    try:
        return VERIFIERS[aggregator](headers, body, SETTINGS, datetime.now(UTC), hashed)
    except InvalidSignature as refused:
        return refused.reason


@pytest.mark.parametrize(("aggregator", "name"), NAMES)
def test_a_hashed_body_is_verified_as_a_whole_one(aggregator: str, name: str) -> None:
    """Breaks if a large body is accepted that a small one would not be, or the other way round."""
    headers, body = CASES[aggregator]()[name]
    given, now = Headers(headers), datetime.now(UTC)
    try:
        inputs = PRECHECKS[aggregator](given, SETTINGS, now - HOUR if name.startswith("old") else now)
    except InvalidSignature as refused:
        pytest.fail(f"refused before the body: {refused.reason}")
    hashed = HashedBody(inputs)
    for start in range(0, len(body), 7):
        hashed.update(body[start : start + 7])
    whole = result(aggregator, given, body, None)
    assert result(aggregator, given, body, hashed) == whole
    assert isinstance(whole, Receipt) == (
        name in {"valid", "of the first secret", "two signatures", "zeros in front", "no body"}
    )
    assert whole == "stale" or name != "old"


@pytest.mark.parametrize(
    ("aggregator", "headers", "reason"),
    [
        ("junction", {}, "missing"),
        ("junction", signed(BODY) | {"svix-signature": "v1,AAAA"}, "signature"),
        ("junction", signed(BODY) | {"svix-signature": "v2," + "A" * 43 + "="}, "signature"),
        ("junction", signed(BODY) | {"svix-timestamp": "soon"}, "signature"),
        ("junction", signed(BODY) | {"svix-timestamp": "9" * 19}, "stale"),
        ("junction", signed(BODY) | {"svix-id": "x" * 257}, "signature"),
        ("junction", signed(BODY, at=datetime.now(UTC) - HOUR), "stale"),
        ("terra", {}, "missing"),
        ("terra", {"Terra-Signature": "t=1,v1=" + "0" * 63}, "signature"),
        ("terra", {"Terra-Signature": "v1=" + "0" * 64}, "signature"),
        ("terra", terra_signed(BODY, at=datetime.now(UTC) - HOUR), "stale"),
    ],
)
def test_headers_that_fit_no_body_are_refused(aggregator: str, headers: dict[str, str], reason: str) -> None:
    """Breaks if the body of a request without a possible signature is read."""
    with pytest.raises(InvalidSignature) as refused:
        PRECHECKS[aggregator](Headers(headers), SETTINGS, datetime.now(UTC))
    assert refused.value.reason == reason


@pytest.mark.parametrize("aggregator", PRECHECKS)
def test_without_a_secret_no_body_is_read(aggregator: str) -> None:
    """Breaks if the endpoint reads bodies for an aggregator that is not configured."""
    headers = Headers(signed(BODY) | terra_signed(BODY))
    with pytest.raises(InvalidSignature, match="no_secret"):
        PRECHECKS[aggregator](headers, Settings(), datetime.now(UTC))
