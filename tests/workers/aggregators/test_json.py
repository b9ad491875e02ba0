"""Duplicate names in JSON objects."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Unprocessable
from tests.support.cases import each
from workers.aggregators.json import reject_duplicate_keys

TWICE = [
    b'{"a":1,"a":2}',
    b'{"a":1,"a":1}',
    b'{"d":[{"x":{"y":1,"z":0,"y":1}}]}',
    b'{"a":1,"\\u0061":2}',
    b'{"a" : 1,\n "a" :1e5}',
    b'[{"":0},{"":0,"":0}]',
]
ONCE = [
    b'{"a":1,"b":{"a":1}}',
    b'[{"a":1},{"a":1}]',
    b'{"a":1.50,"b":"\\u00e9\\/","c":1E5,"d":-0.0,"e":1e-07}',
    b'{"a":"\\"a\\":1"}',
    b'{"a":123456789012345678901234567890}',
    b"[]",
    b'"text"',
]
NO_JSON = [b"", b'{"a":', b"NaN", b'{"a":1,"a":', b"[" * 100_000, b"\xff", b'"\\ud800"', b'{"a":1}{"a":1}']
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@each(*TWICE)
def test_a_duplicate_name_is_rejected(raw: Any) -> None:
    """Breaks if one of two values of the same name is silently dropped."""
    with pytest.raises(Unprocessable, match="what: an object repeats a name"):
        reject_duplicate_keys(raw, "what")


@each(*(ONCE + NO_JSON))
def test_everything_else_passes(raw: Any) -> None:
    """Breaks if another notation of a number or an escape counts as a duplicate name."""
    reject_duplicate_keys(raw, "what")


@given(VALUES)
def test_documents_as_others_write_them_pass(value: object) -> None:
    """Breaks if what Python's json or msgspec writes is refused."""
    for raw in (json.dumps(value).encode(), json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "replace")):
        reject_duplicate_keys(raw, "what")
    reject_duplicate_keys(msgspec.json.encode(json.loads(json.dumps(value))) if _plain(value) else b"{}", "what")


@given(VALUES, st.text(max_size=3))
def test_a_second_name_anywhere_is_found(value: object, name: str) -> None:
    """Breaks if a document slips through by what else is in it."""
    twice = f"{{{json.dumps(name)}:{json.dumps(value)},{json.dumps(name, ensure_ascii=False)}:0}}"
    with pytest.raises(Unprocessable):
        reject_duplicate_keys(f"[{json.dumps(value)},{twice}]".encode("utf-8", "surrogatepass"), "what")


def _plain(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
