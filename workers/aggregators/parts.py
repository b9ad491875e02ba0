"""Large JSON documents in parts, so that to read one takes little more memory than its text.

Decoded at once, objects take up to 30 times the size of their text. An event of 60 MB with 20 million empty arrays took
1.6 GB of memory.
"""

import re
from collections.abc import Iterator

import msgspec

LARGE_BYTES = 2 * 1024 * 1024  # a smaller document is decoded at once, which is faster
PART_BYTES = 1024 * 1024
MAX_TRIES = 50
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Between two items of an array, or of an array inside an item, or in a string: a part that ends here is tried.
BETWEEN = re.compile(rb"[}\]]\s*,\s*(?=[{\[])")


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
