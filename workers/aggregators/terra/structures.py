"""The types with which Terra's objects are decoded, from the tables of `mapping`."""

import operator
from collections.abc import Callable, Mapping
from functools import cache, reduce
from typing import Any, NamedTuple

import msgspec

from app.catalogue import FieldType, catalogue
from workers.aggregators.common import NULL, DateText
from workers.aggregators.scalars import day, integer
from workers.aggregators.terra.mapping import TYPES, Column, Derived, Newest, Scaled, Series, Values, Whole
from workers.aggregators.terra.repair import KeyText, TimeText, Tree
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
    return _struct(name, fields_of(name), in_parts=in_parts)


@cache
def item_type(name: str, path: str) -> Any:
    """The type of the items of an array."""
    return _struct(name, reduce(operator.getitem, steps(f"{path}[]"), fields_of(name))) | None


@cache
def fields_of(name: str) -> Tree:
    """The fields that the tables read, with their types."""
    tree: dict[str, Any] = {}
    for path, kind in _leaves_of(name).items():
        *above, last = steps(path)
        reduce(lambda below, step: below.setdefault(step, {}), above, tree)[last] = kind
    return tree


def _leaves_of(name: str) -> Mapping[str, Any]:
    """The paths of these fields, with their types."""
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


def _struct(name: str, tree: Tree, *, in_parts: bool = False) -> Any:
    """A struct of structs. Every field may be absent or null."""
    fields: list[Any] = []
    for key, kind in tree.items():
        plain = key.removesuffix("[]")
        if not isinstance(kind, dict):
            fields.append((plain, kind | None, None))
        elif plain == key:
            fields.append((plain, _struct(plain, kind, in_parts=in_parts) | None, None))
        elif in_parts:
            fields.append((plain, msgspec.Raw, NULL))
        else:
            fields.append((plain, list[_struct(plain, kind) | None] | None, None))  # type: ignore[misc]
    return msgspec.defstruct(name, fields)
