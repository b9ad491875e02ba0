"""Reads JSON text strictly: no repeated names, and only what PostgreSQL can store. Large documents are read in parts.

Decoded at once, objects take up to 30 times the size of their text. An event of 60 MB with 20 million empty arrays took
1.6 GB of memory.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec

from app.errors import Unprocessable
from workers.actions import NO_NOTES, Notes
from workers.aggregators.common import decode

T = TypeVar("T")
LARGE_BYTES = 2 * 1024 * 1024  # a smaller document is decoded at once, which is faster
PART_BYTES = 1024 * 1024
MAX_TRIES = 50
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Between two items of an array, or of an array inside an item, or in a string: a part that ends here is tried.
BETWEEN = re.compile(rb"[}\]]\s*,\s*(?=[{\[])")

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
# The literals, and strings, which may contain their names. A string without an end extends to the end of the text, so
# that the search stays linear.
LITERAL_OR_STRING = re.compile(rb'(NaN|-?Infinity)|"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)


class _Repeated:
    """Stands for an object that repeats a name."""


class Document(NamedTuple):
    """A body after `checked`."""

    text: bytes
    is_unique: bool  # no object in an array repeats a name
    notes: Notes


def checked(body: bytes, what: str) -> Document:
    """The body as PostgreSQL can store it, after the check of `reject_duplicate_keys`. Raises Unprocessable."""
    text, is_replaced = storable(body)
    check = partial(reject_duplicate_keys, what=what, in_arrays=False)
    is_unique, text, has_nulls = read_leniently(text, check)
    notes = Notes(is_replaced=is_replaced, has_nulls=has_nulls) if is_replaced or has_nulls else NO_NOTES
    return Document(text, is_unique, notes)


def read_leniently(text: bytes, read: Callable[[bytes], T]) -> tuple[T, bytes, bool]:
    """The result of a strict reader, the text that it has read, and whether null replaces a literal in it.

    Only text that the reader refuses is searched for literals and read again, so that other texts cost nothing more.
    """
    try:
        return read(text), text, False
    except Unprocessable:
        if (replaced := with_nulls(text)) == text:
            raise
    return read(replaced), replaced, True


def with_nulls(text: bytes) -> bytes:
    """The text with null in place of NaN, Infinity and -Infinity.

    RFC 8259 (section 6) and PostgreSQL do not have them; Python's json.dumps writes them by default.
    """
    if b"NaN" not in text and b"Infinity" not in text:
        return text
    return LITERAL_OR_STRING.sub(lambda found: b"null" if found[1] else found[0], text)


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
    decode(raw, msgspec.Raw, what)  # text that cannot be read is refused before its objects take memory
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
    except UNREADABLE as unread:
        error = unread
    try:
        # As text: json.loads would guess the encoding of bytes.
        found = json.loads(
            raw.decode(),
            object_pairs_hook=unless_repeated,
            parse_int=str,
            parse_float=str,
            parse_constant=_refuse_literal,
        )
        is_unique = not _repeats(found, in_arrays=True)
        is_refused = not is_unique and _repeats(found, in_arrays=in_arrays)
    except RecursionError:
        raise Unprocessable(f"{what}: nested too deep") from None
    except ValueError:
        raise Unprocessable(f"{what}: {error or 'not JSON'}") from None
    if is_refused:
        raise Unprocessable(f"{what}: an object repeats a name")
    return is_unique


def _refuse_literal(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


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

    PostgreSQL cannot store them in text or jsonb. Two searches, 1 us for 16 kB, find that nearly all bodies have no
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


# Parts of large documents


def parts(array: bytes) -> Iterator[bytes]:
    """The items of a JSON array as arrays of about PART_BYTES. Text that cannot be divided is one part.

    A part that is valid JSON ends between two items of the array, because the text before it is read in one way only.
    """
    start = 1
    while array[:1] == b"[" and len(array) - start > LARGE_BYTES:
        end = _end_of_part(array, start)
        if end is None:
            break
        yield b"[%b]" % array[start : end[0]]
        start = end[1]
    yield array if start == 1 else b"[" + array[start:]


def _end_of_part(array: bytes, start: int) -> tuple[int, int] | None:
    """The end of the part that begins at `start`, and the start of the next one."""
    position = start + PART_BYTES
    for _ in range(MAX_TRIES):
        between = BETWEEN.search(array, position)
        if between is None:
            return None
        try:
            msgspec.json.decode(b"[%b]" % array[start : between.start() + 1], type=list[msgspec.Raw])
        except UNREADABLE:
            position = between.end()
        else:
            return between.start() + 1, between.end()
    return None


def divided(document: bytes) -> Iterator[tuple[bytes, bool]]:
    """The parts of an array, or an object without its large values and each of these; and whether it is an array's.

    Text that cannot be divided is one part.
    """
    first = document[:64].lstrip()[:1]
    try:
        if first == b"{":
            yield from ((part, False) for part in _without_large_values(document))
            return
        found = False
        for part in parts(document):
            if len(part) == len(document):
                break
            found = True
            yield part, True
        if not found:  # one large item
            yield from ((bytes(item), True) for item in msgspec.json.decode(document, type=list[msgspec.Raw]))
    except UNREADABLE:
        yield document, False


def _without_large_values(document: bytes) -> list[bytes]:
    fields = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
    large = [bytes(value) for value in fields.values() if len(bytes(value)) > PART_BYTES]
    for value in large:
        document = document.replace(value, b"0", 1)
    return [document, *large]
