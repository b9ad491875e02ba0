"""The server side of RSGI: the scope of a request and its protocol."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

# Paths that are answered like /webhooks/junction.
SLASHED = (
    *("/webhooks/junction/", "/webhooks/junction//", "//webhooks/junction", "/webhooks//junction"),
    "///webhooks///junction///",
)


class Headers:
    """Headers as in granian: names in lower case, repeated names allowed."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = list(pairs)

    def get(self, name: str) -> str | None:
        return next((value for key, value in self._pairs if key == name), None)

    def items(self) -> list[tuple[str, str]]:
        return self._pairs


@dataclass
class Scope:
    headers: Headers
    method: str = "POST"
    path: str = "/webhooks/junction"
    query_string: str = ""
    http_version: str = "1"
    scheme: str = "http"
    server: str = "127.0.0.1:8000"
    client: str = "127.0.0.1:40000"


@dataclass
class Exchange:
    """The protocol: yields a body in parts, then raises `then` if that is set. Records the response."""

    parts: Sequence[bytes]
    then: Exception | None = None
    wait: float = 0.0
    read: int = 0
    status: int = 0
    answer: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self) -> bytes:
        return b"".join([part async for part in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            await asyncio.sleep(self.wait)
            self.read += 1
            yield part
        if self.then:
            raise self.then

    def response_empty(self, status: int, headers: list[tuple[str, str]]) -> None:
        """Records an answer without a body."""
        self.response_bytes(status, headers, b"")

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status, self.headers, self.answer = status, dict(headers), body
