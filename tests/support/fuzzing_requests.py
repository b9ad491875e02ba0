"""Mutations of signed requests: their headers and the bytes of their bodies."""

import random

TEXT = "0123456789abcdefABCDEF+/=_-.,; \t\x7f\xe9\xff\u20acv1ta=\\\"'"
Pairs = dict[str, str]


def mutated_body(dice: random.Random, body: bytes) -> bytes:
    """A body with bytes changed, truncated, inserted, doubled or removed."""
    at, kind = dice.randrange(len(body)), dice.randrange(6)
    if kind == 0:
        return body[:at] + bytes([body[at] ^ (1 << dice.randrange(8))]) + body[at + 1 :]
    if kind == 1:
        return body[:at]
    if kind == 2:
        return body[:at] + dice.randbytes(dice.randint(1, 9)) + body[at:]
    if kind == 3:
        return body + dice.choice([b" ", b"\n", b"\0", body, b"}"])
    if kind == 4:
        return body[:at] + body[at + dice.randint(1, 9) :]
    return dice.choice([b"", b"{}", b"null", b"[]", b"\xff\xfe", body.swapcase()])


def mutated_text(dice: random.Random, text: str) -> str:  # noqa: PLR0911 - a table, a line a case
    """A mutated header value."""
    at, kind = dice.randrange(len(text)), dice.randrange(7)
    if kind == 0:
        return text[:at] + dice.choice(TEXT) + text[at + 1 :]
    if kind == 1:
        return text[:at]
    if kind == 2:
        return text[:at] + dice.choice(TEXT) * dice.randint(1, 3) + text[at:]
    if kind == 3:
        return text[:at] + text[at + 1 :]
    if kind == 4:
        return text.swapcase()
    if kind == 5:
        return "".join(dice.choice(TEXT) for _ in range(dice.randint(0, 200)))
    return dice.choice(["", ",", "v1,", "v1", "v1,=", "v1a," + text, "t=,v1=", text * 30, " , ", "v1,,v1", "0", "-1"])


def mutated(dice: random.Random, headers: Pairs, body: bytes) -> tuple[Pairs, bytes]:
    """The request with one to three of its parts changed, dropped or exchanged."""
    headers = dict(headers)
    for _ in range(dice.randint(1, 3)):
        name, kind = dice.choice(list(headers)), dice.randrange(8)
        if kind < 3:
            body = mutated_body(dice, body or b"x")
        elif kind < 6 and headers[name]:
            headers[name] = mutated_text(dice, headers[name])
        elif kind == 6 and len(headers) > 1:
            del headers[name]
        else:
            headers[name] = headers[dice.choice(list(headers))]
    return headers, body
