"""Duplicate names in JSON objects, and characters that PostgreSQL cannot store."""

import itertools
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from tests.support import workout
from tests.support.cases import each
from workers.actions import Notes
from workers.aggregators.json import checked, reject_duplicate_keys, storable, with_nulls
from workers.aggregators.registry import AGGREGATORS

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
# Numbers and escapes that msgspec cannot decode where they are read, and skips where they are not.
LITERALS = [b"NaN", b"Infinity", b"-Infinity"]  # of Python's json.dumps
HALF_JSON = [b"1e999", b"-1e999", b"1E400", b"1" * 5000, b'"\\ud800"', b'"\\u0000"', b"0.1e-400"]
NO_JSON = [
    b"",
    b'{"a":',
    b'{"a":1,"a":',
    b"[" * 100_000,
    b'{"a":' * 995 + b"1" + b"}" * 995,
    b"\xff",
    b'{"a":1}{"a":1}',
]
NO_JSON += [b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), b"01", b"tru", b"[1,]", b'"\x01"']
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


@each(*(ONCE + HALF_JSON))
def test_everything_else_passes(raw: Any) -> None:
    """Breaks if another notation of a number or an escape counts as a duplicate name."""
    reject_duplicate_keys(raw, "what")


@each(*NO_JSON)
def test_text_that_cannot_be_checked_is_refused(raw: Any) -> None:
    """Breaks if a name may stand twice in a document that the check cannot read, and the decoder after it can."""
    for in_arrays in (True, False):
        with pytest.raises(Unprocessable, match="what: "):
            reject_duplicate_keys(raw, "what", in_arrays=in_arrays)


JUNCTION = json.dumps(workout("uA"))
TERRA = json.dumps({"type": "auth", "user": {"user_id": "uA", "provider": "GARMIN"}, "status": "success"})
ODD_VALUES = [one.decode() for one in LITERALS + HALF_JSON] + ["[" * n + "]" * n for n in (900, 980, 990, 995, 999)]


@each("junction", "terra")
def test_no_value_switches_the_check_off(name: str) -> None:
    """Breaks if an event whose user_id stands twice goes to the second user, or its dead letter does."""
    event, aggregator = {"junction": JUNCTION, "terra": TERRA}[name], AGGREGATORS[name]
    found, twice = '"user_id": "uA"', ('"user_id": "uB"', '"user\\u005fid": "uB"')
    for value, second in itertools.product(ODD_VALUES, twice):
        doubled = event.replace(found, f"{found}, {second}")
        for body in (
            doubled[:-1] + f', "x": {value}}}',
            f'{{"x": {value}, {doubled[1:]}',
            doubled.replace(found, f'"x": {{"y": [{value}]}}, {found}'),
        ):
            with pytest.raises(Unprocessable):
                aggregator.parse(Delivery(name, "m", 1_773_512_408.0, b""), body.encode(), Settings())
            assert aggregator.identify(body.encode()).user_id is None


@each("[{}]", '{{"groups": {{"garmin": [{}]}}}}', '{{"workouts": [{}]}}', '{{"data": [{}]}}')
def test_no_value_switches_the_check_of_an_item_off(page: str) -> None:
    """Breaks if an item of a page or a raw group that repeats a name is not reported to its reader."""
    for value in ODD_VALUES[: len(LITERALS + HALF_JSON)]:
        raw = page.format(f'{{"id": 1, "i\\u0064": 2, "x": {value}}}').encode()
        assert not checked(raw, "what").is_unique


@each(
    (b'{"a":1,"b":[1,{"c":1}]}', True),
    (b'{"a":1.50,"b":[{"c":1}]}', True),
    (b'{"a":[{"b":1,"b":1}]}', False),
    (b'{"a":1.50,"b":[[{"c":{"d":1,"d":2}}]]}', False),
    (b'[{"a":1,"a":2}]', False),
    *((raw, True) for raw in LITERALS + HALF_JSON),
)
def test_a_duplicate_name_in_an_array_is_left_to_the_check_of_its_item(raw: bytes, is_unique: Any) -> None:
    """Breaks if a repeated name in one item costs all others, or is not reported to the reader of the items."""
    assert checked(raw, "what").is_unique is is_unique


@each(
    b'{"a":1,"a":1}',
    b'{"a":{"b":1,"b":1},"c":[]}',
    b'{"a":[{"b":1,"b":1}],"c":1,"c":1}',
    b'{"a":[{"b":1,"b":1}],"c":{"d":1,"d":1}}',
)
def test_a_duplicate_name_outside_of_arrays_is_rejected_in_both_modes(raw: bytes) -> None:
    """Breaks if a repeated name of the envelope passes because an item repeats one too."""
    for in_arrays in (True, False):
        with pytest.raises(Unprocessable, match="what: an object repeats a name"):
            reject_duplicate_keys(raw, "what", in_arrays=in_arrays)


# Literals that are not JSON


@each(
    *((value, b"null") for value in LITERALS),
    (b'{"a":NaN,"b":[-Infinity,1e999, Infinity ]}', b'{"a":null,"b":[null,1e999, null ]}'),
    (rb'{"NaN":NaN,"a\"NaN":"\\\"Infinity\\"}', rb'{"NaN":null,"a\"NaN":"\\\"Infinity\\"}'),
)
def test_a_literal_is_read_as_null(raw: bytes, expected: bytes) -> None:
    """Breaks if a literal costs its document, or a string that contains its name is changed."""
    found = checked(raw, "what")
    assert (found.text, found.notes) == (expected, Notes(has_nulls=True))
    json.loads(found.text)


@each(*HALF_JSON, b'["NaN","Infinity"]', b'{"NaN":1}')
def test_a_document_without_literals_is_the_same(raw: bytes) -> None:
    """Breaks if another value is replaced, or a text is noted."""
    assert not checked(raw, "what").notes.has_nulls
    assert with_nulls(raw) == raw


@each(*(b'{"a":%s,%s}' % (value, twice) for value in LITERALS for twice in (b'"b":1,"b":2', b'"a":1')))
def test_a_duplicate_name_beside_a_literal_is_rejected(raw: bytes) -> None:
    """Breaks if the second reading of a document skips the check."""
    with pytest.raises(Unprocessable, match="what: an object repeats a name"):
        checked(raw, "what")


@each(b"-NaN", b"nan", b"+Infinity", b"NaN1", b"[NaN", b"{NaN:1}", b'"NaN', b'{"a":NaN,}', b'"\\' + b'\\"NaN' * 100_000)
def test_other_text_that_is_not_json_is_refused(raw: bytes) -> None:
    """Breaks if text becomes JSON because a literal in it is replaced, or a string without an end takes minutes."""
    with pytest.raises(Unprocessable):
        checked(raw, "what")


# Characters

FFFD = b"\\ufffd"


@each(
    (rb'"a\u0000b"', rb'"a\ufffdb"'),
    (rb'"\u0000\u0000"', rb'"\ufffd\ufffd"'),
    (rb'"\\\u0000"', rb'"\\\ufffd"'),
    (rb'"\\\\\u0000"', rb'"\\\\\ufffd"'),
    (rb'"\"\u0000\n"', rb'"\"\ufffd\n"'),
    (rb'"\ud83d"', rb'"\ufffd"'),
    (rb'"\uDE00"', rb'"\ufffd"'),
    (rb'"\ud83dx"', rb'"\ufffdx"'),
    (rb'"\ud83d\n\ude00"', rb'"\ufffd\n\ufffd"'),
    (rb'"\ude00\ud83d"', rb'"\ufffd\ufffd"'),
    (rb'"\ud83d\ud83d\ude00"', rb'"\ufffd\ud83d\ude00"'),
    (rb'"\ud83d\u0041"', rb'"\ufffd\u0041"'),
    (rb'"\ud83d\u0000"', rb'"\ufffd\ufffd"'),
    (rb'"\ud83d\\ude00"', rb'"\ufffd\\ude00"'),
    (rb'{"\u0000":1}', rb'{"\ufffd":1}'),
    (b'"\xff"', '"\ufffd"'.encode()),
    (b'"\xed\xa0\x80"', '"\ufffd\ufffd\ufffd"'.encode()),
    (b'"\xed\xa0\xbd\xed\xb8\x80"', ('"' + "\ufffd" * 6 + '"').encode()),
    (b'"\xc3"', '"\ufffd"'.encode()),
    (b'"\xff\\u0000"', '"\ufffd'.encode() + FFFD + b'"'),
)
def test_a_character_that_postgresql_refuses_is_replaced(raw: bytes, expected: bytes) -> None:
    """Breaks if a character costs its delivery, or replacing it changes another one."""
    assert storable(raw) == (expected, True)
    msgspec.json.decode(expected)


@each(
    *(
        rb'"\\u0000"',
        rb'"\\\\u0000"',
        rb'"\\ud83d"',
        rb'"\ud83d\ude00"',
        rb'"\uD83D\uDE00"',
        rb'"\u0001"',
        rb'"\ud7ff\ue000"',
    ),
    *(
        b'"u0000"',
        b'"ud800"',
        "\u00e9\u20ac\U0001f600".encode(),
        "\ufffd".encode(),
        rb'"\ufffd"',
        b'"\x7f"',
        b"",
        b"{}",
    ),
    *(rb'"\ud8', rb'"\ud8"', rb'"\ud8xx"', rb'"\u', rb'"\u000"', b"\\"),
)
def test_everything_else_is_the_same(raw: bytes) -> None:
    """Breaks if an escaped backslash, a pair or an incomplete escape is changed, or a good body is noted."""
    assert storable(raw) == (raw, False)


PIECES = st.sampled_from(
    [
        "\\\\",
        "\\u0000",
        "\\ud83d",
        "\\ude00",
        "\\n",
        '\\"',
        "u0000",
        "ud83d",
        "a",
        "\u00e9",
        "\\u0041",
        "\\uDbFf",
        "\\udFFF",
    ]
)


@given(st.lists(PIECES, max_size=8))
def test_any_text_is_what_python_reads_with_its_characters_replaced(pieces: list[str]) -> None:
    """Breaks if an escape is found where there is none, or one that PostgreSQL refuses is missed."""
    raw = f'"{"".join(pieces)}"'.encode()
    replaced, is_replaced = storable(raw)
    expected = re.sub("[\u0000\ud800-\udfff]", "\ufffd", json.loads(raw))
    assert json.loads(replaced) == expected
    assert is_replaced is (json.loads(raw) != expected)
    assert storable(replaced) == (replaced, False)


@given(st.binary(max_size=20))
def test_any_bytes_become_utf_8(raw: bytes) -> None:
    """Breaks if some bytes raise, or are not UTF-8 afterwards."""
    replaced, is_replaced = storable(raw)
    replaced.decode()
    assert is_replaced is (replaced != raw)


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
