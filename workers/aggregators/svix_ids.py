"""The creation time inside a Svix message id: `msg_` and a KSUID, whose first bytes are a clock."""

import operator
from datetime import UTC, datetime, timedelta

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KSUID_EPOCH = datetime(2014, 5, 13, 16, 53, 20, tzinfo=UTC)  # 1,400,000,000 s after 1970: where every KSUID starts
LENGTH, RAW_BYTES = 27, 20
_weights = [62**place for place in reversed(range(LENGTH))]
_digits = {letter: digit for digit, letter in enumerate(ALPHABET)}


def created_at(message_id: str) -> datetime | None:
    """When the message was created, to 4 ms; None where the id does not have that form.

    Svix's open server makes ids as KsuidMs: 4 bytes of seconds, 1 byte of 4-ms steps, 15 random bytes. An ordinary
    KSUID has a random byte where the steps are; read as steps it errs by less than a second.
    """
    text = message_id.removeprefix("msg_")
    if len(text) != LENGTH:
        return None
    try:
        number = sum(map(operator.mul, map(_digits.__getitem__, text), _weights))
    except KeyError:
        return None
    if number >> (RAW_BYTES * 8):
        return None
    raw = number.to_bytes(RAW_BYTES, "big")
    milliseconds = min(raw[4] * 4, 999)
    return KSUID_EPOCH + timedelta(seconds=int.from_bytes(raw[:4], "big"), milliseconds=milliseconds)
