"""Terra's objects with fields of other types than documented, rewritten for the tables of `mapping`."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec

from app.errors import Unprocessable
from workers.aggregators.common import DateText
from workers.aggregators.json import unless_repeated
from workers.aggregators.scalars import NUMBER, Unreadable, boolean, moment, number, short_text, text
from workers.aggregators.terra.series import Clock

MAX_KEY = 256
MAX_DIGITS = 308  # of an integer that a double can hold
DATE = re.compile(r"\d{4}-\d\d-\d\d")  # as DateText
KeyText = Annotated[str, msgspec.Meta(max_length=MAX_KEY)]
TimeText = Annotated[str, "the time of an item of an array"]
Tree = Mapping[str, Any]  # a type, or a tree below the name; `[]` after a name marks an array


def _key(value: Any) -> str:
    return short_text(value, MAX_KEY)


def _time(value: Any) -> str:
    """A time as received, because its offset is the user's; an epoch time in UTC."""
    at = moment(value)
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return at.isoformat()
    return value if DATE.match(value) else datetime.fromisoformat(value).isoformat()


def _time_of_item(value: Any) -> str:
    """As `_time`; a text that stands for "unknown" stays."""
    with contextlib.suppress(Unprocessable):
        if isinstance(value, str) and Clock().read(value, "") is None:
            return value
    return _time(value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable("an object")
    return value


READERS: Mapping[Any, Callable[[Any], Any]] = {
    float: number,
    str: text,
    bool: boolean,
    KeyText: _key,
    DateText: _time,
    TimeText: _time_of_item,
    dict[str, msgspec.Raw]: _mapping,
}


class Repair:
    """Rewrites one object. Fields that cannot be read are left out. Arrays and their items are refused."""

    def __init__(self, name: str, fields: Tree) -> None:
        self.refused: list[str] = []  # the reason of each refused item
        self.unreadable: set[str] = set()  # paths
        self._name, self._fields = name, fields

    def repaired(self, raw: bytes) -> bytes:
        """JSON of the fields in the tables. Raises Unprocessable if the text is no object."""
        try:
            document = json.loads(raw, object_pairs_hook=unless_repeated, parse_int=_integer)
        except (ValueError, RecursionError):
            raise Unprocessable(f"{self._name}: not a JSON object") from None
        if not isinstance(document, dict):
            raise Unprocessable(f"{self._name}: expected an object")
        return msgspec.json.encode(self._object(document, self._fields, ""))

    def _object(self, value: dict[str, Any], tree: Tree, at: str) -> dict[str, Any]:
        found = {}
        for name, below in tree.items():
            plain = name.removesuffix("[]")
            if (given := value.get(plain)) is None:
                continue
            try:
                found[plain] = self._field(given, below, at + plain, is_array=plain != name)
            except ValueError:
                self.unreadable.add(at + plain)
        return found

    def _field(self, given: Any, below: Any, path: str, *, is_array: bool) -> Any:
        """Raises ValueError if the field cannot be read."""
        if is_array:
            return self._items(given, below, path)
        if not isinstance(below, dict):
            found = READERS[below](given)
            return self._scores(found, path) if isinstance(found, dict) else found
        if not isinstance(given, dict):
            raise Unreadable("an object")
        return self._object(given, below, f"{path}.")

    def _scores(self, given: dict[str, Any], path: str) -> dict[str, Any]:
        """The scores without those that no double can hold."""
        found = {name: one for name, one in given.items() if not isinstance(one, float) or math.isfinite(one)}
        if len(found) < len(given):
            self.unreadable.add(path)
        return found

    def _items(self, given: Any, below: Tree, path: str) -> list[dict[str, Any]]:
        if not isinstance(given, list):
            self.refused.append(f"{self._name}: {path}: expected an array")
            return []
        found = []
        for place, item in enumerate(given):
            given[place] = None  # frees the item: an array of 60 MB would take 300 MB twice
            if item is None:
                continue
            try:
                found.append(_item(item, below))
            except ValueError as reason:
                self.refused.append(f"{self._name}: {path}: {reason}")
        return found


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _item(item: Any, fields: Tree) -> dict[str, Any]:
    """An item of an array. Raises ValueError, because a value without its time or number means nothing."""
    if not isinstance(item, dict):
        raise Unreadable("expected an object whose names are unique")
    found = {}
    for name, kind in fields.items():
        try:
            if (value := item.get(name)) is not None:
                found[name] = READERS[kind](value)
        except ValueError as expected:
            raise Unreadable(f"{name}: expected {expected}") from None
    return found
