"""What linking gives, whichever aggregator it is: where a person connects a provider. Values only."""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from workers.aggregators.requests import Request

MAX_TEXT = 200


@dataclass(frozen=True)
class Link:
    """Where a person connects a provider, and for how long that is open. Whoever has it can connect as the person."""

    url: str
    token: str = field(repr=False)  # for a widget of one's own
    expires_in: int  # seconds


def post(path: str, **body: Any) -> Request:
    """A request with a JSON object as its body, without what is None or empty."""
    given = {name: value for name, value in body.items() if value}
    return Request(path, method="POST", body=msgspec.json.encode(given))


def one_line(text: str) -> str:
    """What a stranger says, fit for a line of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:MAX_TEXT].strip()
