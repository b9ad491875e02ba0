"""Junction's signatures (Svix): accepted and rejected requests, and the reasons."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.config.settings import Settings
from app.errors import InvalidSignature
from app.signatures import junction
from app.signatures.junction import verify
from tests.support import JUNCTION_SECRET, START, signed
from tests.support.cases import Failures

SETTINGS = Settings(junction_webhook_secrets=(JUNCTION_SECRET,))


def test_a_signature_is_checked_and_gives_the_id() -> None:
    """Breaks if a valid signature is rejected or its id is lost."""
    headers = {name.title(): value for name, value in signed(b"{}", name="msg_x").items()}
    assert verify(headers, b"{}", SETTINGS, START).message_id == "msg_x"


def reason(headers: dict[str, str], body: bytes = b"{}", settings: Settings = SETTINGS) -> str:
    """The reason for which these headers are rejected. A plain mapping is case-sensitive."""
    with pytest.raises(InvalidSignature) as refused:
        verify({name.title(): value for name, value in headers.items()}, body, settings, datetime.now(UTC))
    return refused.value.reason


def test_each_header_is_needed() -> None:
    """Breaks if a request without one of the three headers is accepted."""
    failures = Failures()
    for prefix in ("Svix", "Webhook"):
        for missing in ("Id", "Timestamp", "Signature"):
            with failures.of(prefix, missing):
                headers = {name.title().replace("Svix", prefix): value for name, value in signed(b"{}").items()}
                assert verify(headers, b"{}", SETTINGS, START).message_id == "msg_1"
                assert reason(headers | {f"{prefix}-{missing}": ""}) == "missing"
    assert failures == {}


@pytest.mark.parametrize(("minutes", "expected"), [(-6, "stale"), (6, "stale"), (-10_000, "stale")])
def test_stale_is_distinguished_from_wrong(minutes: int, expected: str) -> None:
    """Breaks if the reason does not distinguish a wrong clock from a wrong secret."""
    assert reason(signed(b"{}", at=datetime.now(UTC) + timedelta(minutes=minutes))) == expected


@pytest.mark.parametrize("minutes", [-4, 0, 4])
def test_clocks_may_differ_by_minutes(minutes: int) -> None:
    """Breaks if a small clock difference is rejected."""
    headers = signed(b"{}", at=datetime.now(UTC) + timedelta(minutes=minutes))
    verify({name.title(): value for name, value in headers.items()}, b"{}", SETTINGS, START)


def test_junk_is_refused() -> None:
    """Breaks if an error of the library on malformed headers (ValueError, OverflowError ...) is not caught."""
    failures = Failures()
    for changes in (
        {"svix-signature": "v1"},
        {"svix-signature": "v1,a,b"},
        {"svix-signature": "v1,%%%=="},
        {"svix-signature": "v1,\u00e9"},
        {"svix-signature": "v2,AAAA"},
        {"svix-signature": "v1," + "A" * 9000},
        {"svix-timestamp": "nan"},
        {"svix-timestamp": "1e400"},
        {"svix-timestamp": "soon"},
        {"svix-timestamp": "9" * 5000},
        {"svix-id": "x" * 257},
        {"svix-id": "msg_\u00e9"},
        {"svix-id": "msg_\x00"},
    ):
        with failures.of(changes):
            assert reason(signed(b"{}") | changes) == "signature"
    assert failures == {}


def test_a_body_that_is_not_utf8_is_refused() -> None:
    """Breaks if bytes that the library cannot decode raise another error."""
    assert reason(signed(b"{}"), b"\xff\xfe") == "signature"


def test_without_a_secret_nothing_is_accepted() -> None:
    """Breaks if a missing secret disables the verification."""
    assert reason(signed(b"{}"), settings=Settings()) == "no_secret"


def test_any_of_several_secrets_is_accepted() -> None:
    """Breaks if only the first secret is tried."""
    other = "whsec_" + "b3RoZXItc2VjcmV0LW90aGVyLXNlY3JldA=="
    settings = replace(SETTINGS, junction_webhook_secrets=(other, JUNCTION_SECRET))
    for secret in settings.junction_webhook_secrets:
        headers = {name.title(): value for name, value in signed(b"{}", secret=secret).items()}
        assert verify(headers, b"{}", settings, START).message_id == "msg_1"


BODY = b'{"event_type": "x"}'
OTHER_SECRET = "whsec_" + "b3RoZXItb3RoZXItb3RoZXItb3RoZXIt"


def refusal(headers: dict[str, str], settings: Settings, now: datetime) -> str:
    """The reason for which a delivery is rejected."""
    with pytest.raises(InvalidSignature) as refused:
        junction.verify({f"Svix-{name[5:].title()}": value for name, value in headers.items()}, BODY, settings, now)
    return refused.value.reason


@pytest.mark.parametrize(
    ("seconds", "reason"), [(-100_000, "stale"), (-310, "stale"), (310, "stale"), (-200, "signature")]
)
@pytest.mark.parametrize("secret", [JUNCTION_SECRET, OTHER_SECRET])
def test_a_timestamp_too_old_or_too_new_is_stale(
    plain_settings: Settings, monkeypatch: pytest.MonkeyPatch, seconds: int, reason: str, secret: str
) -> None:
    """Breaks if a wrong clock looks like a wrong secret, an unsigned request raises the alert for a wrong clock, or the
    reason depends on the library's texts.
    """
    now = datetime.now(UTC)
    given = signed(BODY, at=now + timedelta(seconds=seconds), secret=secret)
    if reason == "signature" and secret == JUNCTION_SECRET:
        given = signed(b"another body", at=now + timedelta(seconds=seconds))
    if secret == OTHER_SECRET:
        reason = "signature"
    verify = junction._svix.Webhook.verify

    def with_other_words(*arguments: object) -> None:
        try:
            verify(*arguments)
        except junction._svix.WebhookVerificationError:
            raise junction._svix.WebhookVerificationError("no timestamp like that") from None

    assert refusal(given, plain_settings, now) == reason
    monkeypatch.setattr(junction._svix.Webhook, "verify", with_other_words)
    assert refusal(given, plain_settings, now) == reason


@pytest.mark.parametrize("timestamp", ["9" * 12, "9" * 30, "9" * 5000])
def test_a_moment_that_there_is_not_is_no_stale_one(plain_settings: Settings, timestamp: str) -> None:
    """Breaks if a malformed timestamp causes an error, or counts as stale."""
    given = signed(BODY) | {"svix-timestamp": timestamp}
    assert refusal(given, plain_settings, datetime.now(UTC)) == "signature"


def test_any_secret_is_accepted(plain_settings: Settings) -> None:
    """Breaks if one of two secrets is rejected during a rotation."""
    both = replace(plain_settings, junction_webhook_secrets=(OTHER_SECRET, JUNCTION_SECRET))
    given = {f"Svix-{name[5:].title()}": value for name, value in signed(BODY).items()}
    assert junction.verify(given, BODY, both, datetime.now(UTC)).message_id == "msg_1"
