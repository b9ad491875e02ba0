"""Shared by the aggregator modules: decoding, reading item by item, times, versions, and the operator's filter."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import msgspec

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import Action, Notice, Record, Refused, Samples
from workers.aggregators import scalars

T = TypeVar("T")
CLOCK_SKEW = timedelta(minutes=5)
MAX_AHEAD = timedelta(days=2)  # of a sample, after its receipt; clocks and time zones explain no more than this
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NULL = msgspec.Raw(b"null")

DateText = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d")]  # PostgreSQL checks the rest strictly
# Characters of an id, and of another text in a key. PostgreSQL refuses an index entry of more than 2,704 bytes, and the
# key of a series has an id and three names, each character of up to four bytes.
MAX_ID, MAX_NAME = 256, 100
Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)]
ShortText = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
# Items of one delivery or page that are refused one by one, in 12 us each. With more of them it is refused as a whole.
MAX_REFUSED = 100_000
UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
TYPE_WORDS = {
    "object": "an object",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}
TYPES = re.compile("`((?:{0})(?: \\| (?:{0}))*)`".format("|".join(TYPE_WORDS)))  # as msgspec's errors write them
NO_CURSOR = (None, "", "None", 0, False)  # one of Junction's public examples has the text "None"


def decode(body: bytes, kind: Any, what: str) -> Any:
    """Raises Unprocessable. The text of msgspec's errors names the field and the types, never the value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unprocessable(f"{what}: {TYPES.sub(_type_in_words, str(error))}") from None
    except RecursionError:
        raise Unprocessable(f"{what}: nested too deep") from None


def _type_in_words(found: re.Match[str]) -> str:
    return " or ".join(TYPE_WORDS[name] for name in found[1].split(" | "))


def canonical_id(user_id: str) -> str:
    """A user_id as it is stored: a UUID in lower case. Phones print UUIDs in capitals (RFC 9562, section 4)."""
    lower = user_id.lower()
    return lower if lower != user_id and UUID.fullmatch(user_id) else user_id


def key_text(value: Any, name: str, longest: int = MAX_ID) -> str:
    """As `optional_text`, '' for anything else. Raises Unprocessable for a text that is too long for a key."""
    found = optional_text(value, None) or ""
    if len(found) > longest:
        raise Unprocessable(f"{name} is longer than {longest} characters")
    return found


def optional_text(value: Any, longest: int | None = MAX_ID) -> str | None:
    """A scalar, or the JSON of one, as text; None for anything else: for names that must not cost the data."""
    found = _scalar_text(value)
    return None if longest and found and len(found) > longest else found


def _scalar_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    try:
        if isinstance(value, msgspec.Raw):  # decoded here, because a number beyond double precision is an error
            value = msgspec.json.decode(value)
        return None if value is None else scalars.text(value) or None
    except (ValueError, msgspec.DecodeError, RecursionError):
        return None


def cursor_of(*given: Any) -> str | None:
    """The cursor of the next page: the first of these values, a text or a number; None after the last page.

    Raises Unprocessable for a value of another form: there may be more pages.
    """
    value = next((one for one in given if one not in NO_CURSOR), None)
    found = None if value is True else optional_text(value, None)
    if value is not None and found is None:
        raise Unprocessable("the cursor of the next page: expected a text or a number")
    return found


def first_reason(refused: Sequence[Refused], what: str) -> Unprocessable:
    """The error of a delivery of which every part was refused."""
    return Unprocessable(refused[0].reason if len(refused) == 1 else f"{what}: all refused, first: {refused[0].reason}")


def reject_too_many(refused: Sequence[Refused], what: str) -> None:
    """Raises Unprocessable if more items are refused than can be refused one by one."""
    if len(refused) > MAX_REFUSED:
        raise Unprocessable(f"{what}: more than {MAX_REFUSED:,} refused, first: {refused[0].reason}")


def or_none(read: Callable[[Any], T], value: Any) -> T | None:
    """The value as `read` returns it; None if it is null or cannot be read."""
    try:
        return None if value is None else read(value)
    except ValueError:
        return None


def ordered_at(delivery: Delivery) -> datetime | None:
    """The time of the ordering timestamp; a time beyond the calendar counts as a day after the receipt."""
    if delivery.ordering_ms is None:
        return None
    return UNIX_EPOCH + timedelta(milliseconds=min(delivery.ordering_ms, int(delivery.received_at * 1000) + 86_400_000))


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
