"""Checks of JSON text: repeated names, and characters that PostgreSQL cannot store."""

import json
import re
from typing import Any

import msgspec

from app.errors import Unprocessable
from workers.aggregators.parts import LARGE_BYTES, divided

# Of a large document. PostgreSQL refuses an array of more than 16 million items, for which it would allocate over 1 GB
# (XX000). 60 MB of the shortest samples have 3 million values.
MAX_VALUES = 5_000_000
REPLACEMENT = b"\\ufffd"
# An escape in a JSON string. A backslash before another backslash is read as one escape, so `\\u0000` is text.
ESCAPE = re.compile(
    rb"\\(?:(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(u0000|u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


class _Repeated:
    """Stands for an object that repeats a name."""


def reject_duplicate_keys(raw: bytes, what: str, *, in_arrays: bool = True) -> bool:
    """Raises Unprocessable if an object repeats a name, whose meaning RFC 8259 (section 4) leaves open.

    PostgreSQL's jsonb and most parsers silently keep the last value. A document without repeated names is the same,
    but for spaces, when it is decoded and encoded again. That comparison costs 8 us for a workout; the exact check,
    100 us, runs only where it fails, because a number or an escape is written differently. Text that neither check can
    read is refused: a decoder that skips unknown fields may read it, and then the last of two names would decide.

    Without `in_arrays`, an object inside an array does not raise: False is returned, and the array has to be read item
    by item, with a check of each item.
    """
    if len(raw) > LARGE_BYTES:
        return _reject_in_parts(raw, what, in_arrays=in_arrays)
    return _reject(raw, what, in_arrays=in_arrays)


def _reject_in_parts(raw: bytes, what: str, *, in_arrays: bool) -> bool:
    if raw.count(b",") > MAX_VALUES:
        raise Unprocessable(f"{what}: more than {MAX_VALUES:,} values")
    is_unique = True
    pending = [(raw, False)]  # and whether it is in an array
    while pending:
        document, is_in_array = pending.pop()
        for part, is_of_array in divided(document):
            is_item = is_in_array or is_of_array
            if LARGE_BYTES < len(part) < len(document):
                pending.append((part, is_item))
                continue
            try:
                is_unique &= _reject(part, what, in_arrays=in_arrays or is_item)
            except Unprocessable:
                if in_arrays or not is_item:
                    raise
                is_unique = False
    return is_unique


def _reject(raw: bytes, what: str, *, in_arrays: bool) -> bool:
    try:
        if msgspec.json.encode(msgspec.json.decode(raw)) == msgspec.json.format(raw, indent=-1):
            return True
        error = None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as unread:
        error = unread
    try:
        # As text: json.loads would guess the encoding of bytes.
        found = json.loads(raw.decode(), object_pairs_hook=unless_repeated, parse_int=str, parse_float=str)
        is_unique = not _repeats(found, in_arrays=True)
        is_refused = not is_unique and _repeats(found, in_arrays=in_arrays)
    except RecursionError:
        raise Unprocessable(f"{what}: nested too deep") from None
    except ValueError:
        raise Unprocessable(f"{what}: {error or 'not JSON'}") from None
    if is_refused:
        raise Unprocessable(f"{what}: an object repeats a name")
    return is_unique


def is_unambiguous(raw: bytes) -> bool:
    """Whether the text can be read and no object outside of an array repeats a name."""
    try:
        reject_duplicate_keys(raw, "", in_arrays=False)
    except Unprocessable:
        return False
    return True


def unless_repeated(pairs: list[tuple[str, Any]]) -> Any:
    """The object of these pairs; if it repeats a name, a value that is neither an object nor a scalar."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated()


def _repeats(value: Any, *, in_arrays: bool) -> bool:
    if isinstance(value, dict):
        return any(_repeats(one, in_arrays=in_arrays) for one in value.values())
    if isinstance(value, list):
        return in_arrays and any(_repeats(one, in_arrays=in_arrays) for one in value)
    return isinstance(value, _Repeated)


def storable(raw: bytes) -> tuple[bytes, bool]:
    """JSON text in which U+FFFD replaces U+0000, lone surrogates and invalid UTF-8; and whether one was replaced.

    PostgreSQL stores none of them in text or jsonb. Two searches, 1 us for 16 kB, find that nearly all bodies have no
    backslash and are ASCII. A search for two bytes would cost 20 us.
    """
    replaced = 0
    if not raw.isascii():
        text = raw.decode(errors="replace").encode()
        replaced, raw = int(text != raw), text
    if b"\\" in raw:
        raw, number = _replace_escapes(raw)
        replaced += number
    return raw, replaced > 0


def _replace_escapes(raw: bytes) -> tuple[bytes, int]:
    count = 0

    def replacement(found: re.Match[bytes]) -> bytes:
        nonlocal count
        if found[2] is None:
            return found[0]
        count += 1
        return REPLACEMENT

    return ESCAPE.sub(replacement, raw), count
