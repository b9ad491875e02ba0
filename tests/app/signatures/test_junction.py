"""Junction's signature: why it is refused, told by the timestamp and not by the library's words."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.config.settings import Settings
from app.errors import InvalidSignature
from app.signatures import junction
from tests.support import JUNCTION_SECRET, signed

BODY = b'{"event_type": "x"}'
OTHER_SECRET = "whsec_" + "b3RoZXItb3RoZXItb3RoZXItb3RoZXIt"


def refusal(headers: dict[str, str], settings: Settings, now: datetime) -> str:
    """Why a delivery is refused."""
    with pytest.raises(InvalidSignature) as refused:
        junction.verify({f"Svix-{name[5:].title()}": value for name, value in headers.items()}, BODY, settings, now)
    return refused.value.reason


@pytest.mark.parametrize(
    ("seconds", "reason"), [(-100_000, "stale"), (-310, "stale"), (310, "stale"), (-200, "signature")]
)
@pytest.mark.parametrize("secret", [JUNCTION_SECRET, OTHER_SECRET])
def test_what_is_too_old_or_too_new_is_stale(
    plain_settings: Settings, monkeypatch: pytest.MonkeyPatch, seconds: int, reason: str, secret: str
) -> None:
    """Breaks if a wrong clock looks like a wrong secret; or if the library's words decide which of them it is."""
    now = datetime.now(UTC)
    given = signed(BODY, at=now + timedelta(seconds=seconds), secret=secret)
    if reason == "signature" and secret == JUNCTION_SECRET:
        given = signed(b"another body", at=now + timedelta(seconds=seconds))
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
    """Breaks if a hostile timestamp ends in an error of ours, or in the advice to look at the clock."""
    given = signed(BODY) | {"svix-timestamp": timestamp}
    assert refusal(given, plain_settings, datetime.now(UTC)) == "signature"


def test_any_secret_will_do(plain_settings: Settings) -> None:
    """Breaks if a rotation refuses the one secret or the other."""
    both = replace(plain_settings, junction_webhook_secrets=(OTHER_SECRET, JUNCTION_SECRET))
    given = {f"Svix-{name[5:].title()}": value for name, value in signed(BODY).items()}
    assert junction.verify(given, BODY, both, datetime.now(UTC)).message_id == "msg_1"
