"""The values that connecting a provider needs, the same for every aggregator."""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from workers.aggregators.requests import Request

MAX_TEXT = 200


@dataclass(frozen=True)
class Link:
    """A page where a person connects a provider. The link is a secret: anyone who has it can connect as this person."""

    url: str
    token: str = field(repr=False)  # for an application's own widget
    expires_in: int  # seconds


def post(path: str, **body: Any) -> Request:
    """A request with a JSON object as its body, without the entries that are None or empty."""
    given = {name: value for name, value in body.items() if value}
    return Request(path, method="POST", body=msgspec.json.encode(given))


def one_line(text: str) -> str:
    """An aggregator's text made safe for a line of a terminal: no control characters, at most MAX_TEXT characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:MAX_TEXT].strip()
