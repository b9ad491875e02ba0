"""The creation time inside a Svix message id: `msg_` and a KSUID, which begins with a timestamp."""

import operator
from datetime import UTC, datetime, timedelta
from functools import lru_cache

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KSUID_EPOCH = datetime(2014, 5, 13, 16, 53, 20, tzinfo=UTC)  # 1,400,000,000 s after 1970 (segmentio/ksuid)
LENGTH, RAW_BYTES = 27, 20
_weights = [62**place for place in reversed(range(LENGTH))]
_digits = {letter: digit for digit, letter in enumerate(ALPHABET)}


@lru_cache(4096)  # parsing and the ledger read the ids of a whole batch one after the other: 5 us each
def created_at(message_id: str) -> datetime | None:
    """When the message was created, to 4 ms; None if the id has another form.

    Svix's open-source server makes ids as KsuidMs: 4 bytes of seconds, 1 byte of 4-ms steps, 15 random bytes. An
    ordinary KSUID has a random byte in place of the steps; reading it as steps is wrong by less than a second.
    """
    text = message_id.removeprefix("msg_")
    if len(text) != LENGTH:
        return None
    try:
        raw = sum(map(operator.mul, map(_digits.__getitem__, text), _weights)).to_bytes(RAW_BYTES, "big")
    except (KeyError, OverflowError):
        return None
    seconds, milliseconds = int.from_bytes(raw[:4], "big"), min(raw[4] * 4, 999)
    return KSUID_EPOCH + timedelta(seconds=seconds, milliseconds=milliseconds)
