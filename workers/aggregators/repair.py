"""Records with fields of other types than documented: their columns, and a payload that jsonb can store."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from app.catalogue import Resource, catalogue
from app.errors import Unprocessable
from workers.actions import Record
from workers.aggregators.common import decode
from workers.aggregators.scalars import READERS, Unreadable

LARGE_EXPONENT = re.compile(r"[eE][+-]?0*[1-9]\d{3}")  # numeric ends at 131,072 digits; no health value has 1,000
MAX_DIGITS = 1000


def value_of(raw: bytes | None) -> Any:
    """The value of a JSON text; None for null or no text. Raises Unreadable for a number that no double can hold."""
    try:
        return None if raw is None else msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raise Unreadable("a value in the range of its type") from None


def columns_of(resource: Resource, document: Mapping[str, msgspec.Raw]) -> tuple[bytes, tuple[str, ...]]:
    """JSON of the columns that can be read from an object, and the names of the fields that cannot be read."""
    columns: dict[str, Any] = {}
    unreadable = []
    for field in resource.fields:
        try:
            if (value := value_of(document.get(field.name))) is not None:
                columns[field.name] = READERS[field.type](value)
        except ValueError:
            unreadable.append(field.name)
    return msgspec.json.encode(columns), tuple(unreadable)


def repaired(record: Record) -> Record:
    """The record as PostgreSQL can store it. For a record that PostgreSQL has refused. Raises Unprocessable."""
    document = decode(record.payload, dict[str, msgspec.Raw], record.resource)
    columns = record.columns or columns_of(catalogue()[record.resource], document)[0]
    try:
        payload = json.loads(record.payload, parse_int=_number, parse_float=_number)
        return replace(record, columns=columns, payload=msgspec.json.encode(payload))
    except (ValueError, RecursionError):
        raise Unprocessable(f"{record.resource}: the object is no JSON that PostgreSQL can store") from None


def _number(text: str) -> msgspec.Raw | str:
    """The number as received; as text if PostgreSQL's numeric cannot hold it."""
    is_storable = len(text) <= MAX_DIGITS and not LARGE_EXPONENT.search(text)
    return msgspec.Raw(text.encode()) if is_storable else text
