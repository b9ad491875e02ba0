"""What all aggregator modules do in the same way: decoding, reading moments, dating, leaving out what nobody wants."""

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import Action, Notice, Record, Samples

CLOCK_SKEW = timedelta(minutes=5)
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

DateText = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d")]  # PostgreSQL reads the rest, strictly
Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


def decode(body: bytes, kind: Any, what: str) -> Any:
    """Raises Unprocessable; msgspec's text names the field and the types, never the value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unprocessable(f"{what}: {error}") from None
    except RecursionError:
        raise Unprocessable(f"{what}: nested too deep") from None


def decode_or(first: Any, body: bytes, kind: Any, what: str) -> Any:
    """As `decode`, but as `first`, if there is such a type and that is what it is."""
    if first is not None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return msgspec.json.decode(body, type=first)
    return decode(body, kind, what)


def moment(text: Any, what: str) -> datetime:
    """An instant; without an offset it is taken as UTC, which is what Junction means."""
    try:
        given = datetime.fromisoformat(text)
        return given if given.tzinfo else given.replace(tzinfo=UTC)
    except (ValueError, TypeError):
        raise Unprocessable(f"{what}: expected an ISO 8601 date and time") from None


def ordering_time(delivery: Delivery) -> datetime | None:
    """What the clock says that came with a delivery, if one came; None where that is no time."""
    try:
        return UNIX_EPOCH + timedelta(milliseconds=delivery.ordering_ms) if delivery.ordering_ms is not None else None
    except OverflowError:
        return None


def version_of(told: datetime | None, delivery: Delivery) -> datetime:
    """When an event was made, or came if it does not say. One from the future would win over all that comes later."""
    return min(told or delivery.received, delivery.received + CLOCK_SKEW)


def wanted(found: Sequence[Action], settings: Settings) -> tuple[tuple[Action, ...], str | None]:
    """What of it the operator wants, and why nothing is done if that is none of it."""
    kept = tuple(action for action in found if _is_wanted(action, settings))
    return kept, "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS" if found and not kept else None


def _is_wanted(action: Action, settings: Settings) -> bool:
    """Who is connected with what is always of interest."""
    return not isinstance(action, Record | Samples | Notice) or settings.keeps(action.resource, action.provider)
