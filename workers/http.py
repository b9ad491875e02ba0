"""The only HTTP client: asks a provider and hands back what came, whatever it was."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from app.providers.request import Request
from workers.retry import NO_ANSWER

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
LARGEST_ANSWER = 64 * 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """An answer. `asked_at` is the version of what it holds: a page is at least as new as the asking."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    asked_at: datetime


class Client:
    """One provider's API. Redirects are not followed: a key must not go where somebody else points."""

    def __init__(self, base_url: str, headers: Mapping[str, str], transport: httpx.BaseTransport | None = None) -> None:
        self._client = httpx.Client(base_url=base_url, headers=dict(headers), timeout=TIMEOUT, transport=transport)

    def ask(self, request: Request) -> Answer:
        """Never raises for what the network or the provider does."""
        asked_at = datetime.now(UTC)
        sent: dict[str, Any] = {"params": dict(request.query)}
        if request.body is not None:
            sent |= {"content": request.body, "headers": {"Content-Type": "application/json"}}
        try:
            with self._client.stream(request.method, request.path, **sent) as response:
                body = bytearray()
                for part in response.iter_bytes():
                    body += part
                    if len(body) > LARGEST_ANSWER:
                        return Answer(413, {}, b"", asked_at)
                return Answer(response.status_code, response.headers, bytes(body), asked_at)
        except httpx.ReadTimeout:
            return Answer(504, {}, b"", asked_at)  # as a gateway would say: too slow, so less is to be asked for
        except httpx.HTTPError:
            return Answer(NO_ANSWER, {}, b"", asked_at)

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()
