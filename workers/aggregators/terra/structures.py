"""The types with which Terra's objects are decoded, from the tables of `mapping`."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import msgspec

from app.catalogue import FieldType, catalogue
from workers.aggregators.common import NULL, DateText
from workers.aggregators.scalars import day, integer
from workers.aggregators.terra.mapping import TYPES, Column, Derived, Newest, Scaled, Series, Values, Whole
from workers.aggregators.terra.repair import KeyText, TimeText
from workers.aggregators.terra.series import Clock

LOCALIZATION = "metadata.timestamp_localization"
SCORES = "data_enrichment"


def _instant(text: str) -> str | None:
    moment = Clock().read(text, "")
    return moment.at.isoformat() if moment else None


class ColumnType(NamedTuple):
    """The type that Terra's value must have, and its conversion to the column's if they differ."""

    decoded: Any
    convert: Callable[[Any], Any] | None = None  # raises ValueError


COLUMN_TYPES: Mapping[FieldType, ColumnType] = {
    "text": ColumnType(str),
    "number": ColumnType(float),
    "boolean": ColumnType(bool),
    "integer": ColumnType(float, integer),
    "date": ColumnType(DateText, lambda text: day(text).isoformat()),
    "datetime": ColumnType(DateText, _instant),
}


@cache
def columns_of_type(name: str) -> Mapping[str, tuple[Column, ColumnType]]:
    """The columns of a type of Terra's, with the types that the catalogue gives them."""
    types = {column.name: COLUMN_TYPES[column.type] for column in catalogue().of_terra(name).fields}
    return {column: (source, types[column]) for column, source in TYPES[name].columns.items()}


@cache
def steps(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


@cache
def structure(name: str, *, in_parts: bool = False) -> Any:
    """A type that checks, during decoding, every field that the tables read and skips all others.

    With `in_parts`, arrays are left encoded.
    """
    return _struct(name, leaves_of(name), in_parts=in_parts)


@cache
def item_type(name: str, path: str) -> Any:
    """The type of the items of an array."""
    prefix = f"{path}[]."
    return (
        _struct(name, {one[len(prefix) :]: kind for one, kind in leaves_of(name).items() if one.startswith(prefix)})
        | None
    )


@cache
def leaves_of(name: str) -> Mapping[str, Any]:
    """The fields that the tables read, with their types."""
    kind = TYPES[name]
    leaves: dict[str, Any] = {LOCALIZATION: float, SCORES: dict[str, msgspec.Raw]}
    leaves |= dict.fromkeys(kind.key, KeyText)
    for source, column in columns_of_type(name).values():
        leaves |= _leaves(source, column.decoded)
    for series in kind.series:
        leaves |= _leaves(series)
    leaves |= {path: DateText for path in (kind.start, kind.end) if path}
    leaves |= {kind.retracted[0]: float} if kind.retracted else {}
    return leaves


def _leaves(source: Column | Series, of_text: Any = None) -> dict[str, Any]:
    """The paths that a row of the tables reads, with their types; `of_text` for a row that is just a path."""
    match source:
        case str():
            return {source: of_text}
        case Derived():
            return {}
        case Scaled() | Whole():
            return {source.path: float}
        case Newest():
            names: dict[str, Any] = {source.time: TimeText, source.value: float}
        case Values():
            names = {source.time: TimeText} | dict.fromkeys(source.names, float)
            names |= {source.unless[0]: float} if source.unless else {}
            names |= {source.subtype: KeyText} if source.subtype else {}
    return {f"{source.array}[].{name}": kind for name, kind in names.items()}


def _struct(name: str, leaves: Mapping[str, Any], *, in_parts: bool = False) -> Any:
    """A struct of structs from paths, in which `[]` marks an array. Every field may be absent or null."""
    fields: dict[str, Any] = {}
    encoded: list[str] = []
    below: dict[str, dict[str, Any]] = {}
    for path, kind in leaves.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = kind
        else:
            fields[head] = kind
    for head, inner in below.items():
        plain = head.removesuffix("[]")
        if plain == head:
            fields[plain] = _struct(plain, inner, in_parts=in_parts)
        elif in_parts:
            encoded.append(plain)
        else:
            fields[plain] = list[_struct(plain, inner) | None]  # type: ignore[misc]
    optional = [(one, kind | None, None) for one, kind in fields.items()]
    return msgspec.defstruct(name, [*optional, *((one, msgspec.Raw, NULL) for one in encoded)])
