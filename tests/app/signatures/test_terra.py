"""Terra's signatures."""

import hashlib
import hmac
import json
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.settings import Settings
from app.delivery import DIGEST_BYTES
from app.errors import InvalidSignature
from app.signatures.terra import MAX_AGE_MS, MAX_AHEAD_MS, verify
from tests.support import ROOT
from tests.support.cases import Failures

RECORDED = ROOT / "tests" / "recorded" / "terra" / "signature_vectors.json"
VECTORS = json.loads(RECORDED.read_text(encoding="utf-8"))
SECRET = "terra_whsec_test_7f3c2a"
SETTINGS = Settings(terra_signing_secrets=(SECRET,))
NOW = datetime.fromtimestamp(1773512405, UTC)
BODY = b'{"type":"auth"}'
REASONS = {"T5 stale": "stale", "T7 future": "stale", "T12 empty header": "missing"}


def header(*, t: str = "1773512405", body: bytes = BODY, secret: str = SECRET) -> str:
    """A signature header."""
    return f"t={t},v1={hmac.new(secret.encode(), f'{t}.'.encode() + body, hashlib.sha256).hexdigest()}"


def reason(headers: dict[str, str], body: bytes = BODY, settings: Settings = SETTINGS, now: datetime = NOW) -> str:
    """The reason for which these headers are rejected."""
    with pytest.raises(InvalidSignature) as refused:
        verify(headers, body, settings, now)
    return refused.value.reason


def test_there_are_thirteen_vectors() -> None:
    """Breaks if a test vector is removed from the file."""
    assert len(VECTORS) == 13


def test_vectors() -> None:
    """Breaks if a signature is verified otherwise than by Terra's documentation and SDK."""
    failures = Failures()
    for name in ("X-Terra-Signature", "Terra-Signature"):
        for vector in VECTORS:
            with failures.of(name, vector):
                body = vector["body_utf8"].encode()
                assert hashlib.sha256(body).hexdigest() == vector["body_sha256"]
                settings = Settings(terra_signing_secrets=(vector["secret"],))
                now = datetime.fromtimestamp(vector["now"], UTC)
                if vector["valid"]:
                    verify({name: vector["header"]}, body, settings, now)
                else:
                    assert reason({name: vector["header"]}, body, settings, now) == REASONS.get(
                        vector["name"], "signature"
                    )
    assert failures == {}


@pytest.mark.parametrize("good", ["X-Terra-Signature", "Terra-Signature"])
def test_either_header_is_accepted(good: str) -> None:
    """Breaks if one header invalidates a valid signature in the other."""
    bad = {"X-Terra-Signature": header(secret="other"), "Terra-Signature": header(secret="other")}
    verify(bad | {good: header()}, BODY, SETTINGS, NOW)
    assert reason(bad) == "signature"


@pytest.mark.parametrize("junk", ["v2=1", "t=,v1=x", "x" * 9000])
def test_an_unreadable_header_does_not_spoil_the_other(junk: str) -> None:
    """Breaks if an unknown form of one header invalidates the other."""
    verify({"X-Terra-Signature": junk, "Terra-Signature": header()}, BODY, SETTINGS, NOW)


def test_any_of_several_secrets_is_accepted() -> None:
    """Breaks if the events of a second account are rejected."""
    settings = replace(SETTINGS, terra_signing_secrets=("another-secret-of-terra", SECRET))
    for secret in settings.terra_signing_secrets:
        verify({"Terra-Signature": header(secret=secret)}, BODY, settings, NOW)
    assert reason({"Terra-Signature": header(secret="a-third-secret")}, settings=settings) == "signature"


def test_stale_is_distinguished_from_wrong() -> None:
    """Breaks if the reason does not distinguish a stale signature from a wrong secret."""
    old = "1773512000"
    assert reason({"Terra-Signature": header(t=old)}) == "stale"
    assert reason({"Terra-Signature": header(t=old, secret="other")}) == "signature"
    verify({"Terra-Signature": header(t=old)}, BODY, replace(SETTINGS, terra_tolerance_seconds=405), NOW)


def test_a_fresh_header_next_to_a_stale_one_suffices() -> None:
    """Breaks if a stale signature invalidates a second one that is valid."""
    verify({"X-Terra-Signature": header(t="1773512000"), "Terra-Signature": header()}, BODY, SETTINGS, NOW)


def test_junk_is_refused() -> None:
    """Breaks if a malformed header raises another error."""
    failures = Failures()
    for junk in (
        "t",
        "=",
        ",",
        "t=1773512405",
        "v1=00",
        "t=1773512405,v1=",
        "t=,v1=",
        "t=-1,v1=",
        "t=1e9,v1=",
        "t= 1773512405",
        "t=1773512405,t=1773512405,v1=00",
        "t=" + "9" * 13 + ",v1=00",
        "t=\u0661,v1=00",
        "t=1773512405,v1=\u00e9",
        "t=1773512405;v1=00",
        "t=1773512405,v1=" + "0" * 9000,
    ):
        with failures.of(junk):
            assert reason({"Terra-Signature": junk}) == "signature"
    assert failures == {}


@given(value=st.text(max_size=80), body=st.binary(max_size=20))
def test_no_random_header_is_accepted(value: str, body: bytes) -> None:
    """Breaks if a random text is accepted or raises another error."""
    for name in ("X-Terra-Signature", "Terra-Signature"):
        assert reason({name: value}, body) in ("missing", "signature")


def test_without_a_secret_nothing_is_accepted() -> None:
    """Breaks if an empty list of secrets or an empty secret accepts a request."""
    assert reason({"Terra-Signature": header(secret="")}, settings=Settings()) == "no_secret"


SIGNED_MS = 1_773_512_405_000


def test_the_content_of_the_receipt() -> None:
    """Breaks if Terra's ids or its time are lost, or a time is believed that the signed time contradicts.

    With a time of its choice, a captured body could be newer than all that Terra sends later.
    """
    failures = Failures()
    for ordering, expected in (
        ("1773512405123", 1773512405123),
        ("1773512345123", 1773512345123),  # a retry, a minute later
        (str(SIGNED_MS + MAX_AHEAD_MS), SIGNED_MS + MAX_AHEAD_MS),
        (str(SIGNED_MS + MAX_AHEAD_MS + 1), SIGNED_MS + MAX_AHEAD_MS),
        ("9" * 15, SIGNED_MS + MAX_AHEAD_MS),
        (str(SIGNED_MS - MAX_AGE_MS), SIGNED_MS - MAX_AGE_MS),
        ("0", SIGNED_MS - MAX_AGE_MS),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("9" * 16, None),
        ("\u0661", None),
    ):
        with failures.of(ordering, expected):
            headers = {
                "Terra-Signature": header(),
                "X-Terra-Trace-Id": "t" * 256,
                "X-Terra-Ordering-Timestamp": ordering,
                "Terra-Reference": "r1",
            }
            receipt = verify(headers, BODY, SETTINGS, NOW)
            assert (receipt.message_id, receipt.ordering_ms, receipt.reference) == ("t" * 256, expected, "r1")
    assert failures == {}


@pytest.mark.parametrize("name", ["", "t" * 257, "t" * 8000, "a\0b", "caf\u00e9", "\x7f"])
def test_an_odd_id_counts_as_none(name: str) -> None:
    """Breaks if an unsigned header of 8 kB is queued and exceeds an index of PostgreSQL, or two long ids become one."""
    headers = {"Terra-Signature": header(), "X-Terra-Trace-Id": name, "Terra-Reference": name}
    receipt = verify(headers, BODY, SETTINGS, NOW)
    assert (receipt.message_id, receipt.reference) == ("", None)


def test_the_digest_identifies_what_was_signed() -> None:
    """Breaks if a captured request gets another digest with other unsigned headers, or another body gets the same."""

    def digest(body: bytes = BODY, *, secrets: tuple[str, ...] = (SECRET,), **given: str) -> bytes | None:
        headers = {"Terra-Signature": header(body=body, **given), "X-Terra-Trace-Id": str(uuid.uuid4())}
        return verify(headers, body, Settings(terra_signing_secrets=secrets), NOW).digest

    first, new = digest(), "another-secret-of-terra"
    assert first == digest() == digest(secrets=(new, SECRET)) == digest(secrets=(SECRET, new))
    assert digest(secret=new, secrets=(new, SECRET)) == digest(secret=new, secrets=(new,)), "after the rotation"
    assert len(first or b"") == DIGEST_BYTES
    assert len({first, digest(body=b"{}"), digest(t="1773512406"), digest(secret=new, secrets=(new,))}) == 4
