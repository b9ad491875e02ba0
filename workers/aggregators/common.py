"""Shared by the aggregator modules: decoding, reading item by item, times, versions, and the operator's filter."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import msgspec

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import Action, Notice, Record, Samples

CLOCK_SKEW = timedelta(minutes=5)
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NULL = msgspec.Raw(b"null")

DateText = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d")]  # PostgreSQL checks the rest strictly
Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Item = TypeVar("Item")
Read = TypeVar("Read")


def decode(body: bytes, kind: Any, what: str) -> Any:
    """Raises Unprocessable. The text of msgspec's errors names the field and the types, never the value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unprocessable(f"{what}: {error}") from None
    except RecursionError:
        raise Unprocessable(f"{what}: nested too deep") from None


def decode_or(first: Any, body: bytes, kind: Any, what: str) -> Any:
    """Decodes as `first` if that is a type and the body fits it, otherwise as `kind`."""
    if first is not None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return msgspec.json.decode(body, type=first)
    return decode(body, kind, what)


def read_each(items: Iterable[Item], read: Callable[[Item], Read]) -> tuple[list[Read], tuple[str, ...]]:
    """Reads the items of a page. An item that raises Unprocessable is left out; returns the reasons as well."""
    found: list[Read] = []
    refused: list[str] = []
    for item in items:
        try:
            found.append(read(item))
        except Unprocessable as reason:
            refused.append(str(reason))
    return found, tuple(refused)


def moment(text: Any, what: str) -> datetime:
    """An instant from ISO 8601. Without an offset it is UTC, as Junction documents. Raises Unprocessable."""
    try:
        given = datetime.fromisoformat(text)
        return given if given.tzinfo else given.replace(tzinfo=UTC)
    except (ValueError, TypeError):
        raise Unprocessable(f"{what}: expected an ISO 8601 date and time") from None


def moment_or_none(text: Any, *, earliest: datetime | None = None) -> datetime | None:
    """As `moment`, but None if the text is no time; a time before `earliest` counts as `earliest`."""
    try:
        found = moment(text, "")
        return max(found, earliest) if earliest else found
    except (Unprocessable, OverflowError):
        return None


def version_of(created_at: datetime | None, delivery: Delivery) -> datetime:
    """When the event was created, or received if that is unknown. A version far ahead would win over all later ones."""
    return min(created_at or delivery.received, delivery.received + CLOCK_SKEW)


def wanted(found: Sequence[Action], settings: Settings) -> tuple[tuple[Action, ...], str | None]:
    """The actions that HEADRACE_RESOURCES and HEADRACE_PROVIDERS allow; a reason if they exclude every action.

    Only data and history are filtered: connections are always kept.
    """
    kept = tuple(
        action
        for action in found
        if not isinstance(action, Record | Samples | Notice) or settings.keeps(action.resource, action.provider)
    )
    return kept, "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS" if found and not kept else None
