"""A page server that uses almost no CPU: its pages are encoded in advance, so that the reader limits the rate."""

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tests.support import START

SAMPLES_PER_PAGE = 1000
PAGES = 50  # per user
WINDOW = timedelta(days=11)  # with one additional day on each side it is still one date range
SOURCE = {"provider": "garmin", "type": "watch"}


def page(number: int, pages: int) -> bytes:
    """A page of heart rates, the same for every user; all pages together fill WINDOW evenly."""
    step = WINDOW / (pages * SAMPLES_PER_PAGE)
    begin = number * SAMPLES_PER_PAGE
    data = [_sample(START + step * place, place) for place in range(begin, begin + SAMPLES_PER_PAGE)]
    following = str(number + 1) if number + 1 < pages else None
    return msgspec.json.encode({"groups": {"garmin": [{"source": SOURCE, "data": data}]}, "next_cursor": following})


def _sample(ts: datetime, place: int) -> dict[str, Any]:
    at = ts.replace(microsecond=0).isoformat()
    return {"timestamp": at, "value": 60 + place % 90, "unit": "bpm", "timezone_offset": 3600, "type": None}


class _Connection(asyncio.Protocol):
    """Selects the page by the cursor only, for every user."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers, self._received = answers, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            target = head.split(b" ", 2)[1]
            number = int(target.partition(b"next_cursor=")[2].partition(b"&")[0] or 0)
            self._transport.write(self._answers[number])


def _serve(pages: int, sender: Any) -> None:
    answers = []
    for number in range(pages):
        body = page(number, pages)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        answers.append(head.encode() + body)

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(answers), "127.0.0.1", 0)
        sender.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await server.serve_forever()

    asyncio.run(forever())


@contextlib.contextmanager
def serving(pages: int) -> Iterator[str]:
    """The URL of a separate process that serves the same pages for every user."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(pages, sender), daemon=True)
    process.start()
    try:
        if not receiver.poll(60):
            raise TimeoutError("the page server did not start")
        yield str(receiver.recv())
    finally:
        process.terminate()
        process.join(10)


def ceiling(url: str, pages: int, seconds: float = 2.0, connections: int = 2) -> float:
    """Samples a second that the server sends to clients that do not parse them."""
    address, deadline = urlsplit(url), time.perf_counter() + seconds
    count = 0

    async def read() -> None:
        nonlocal count
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**20)
        with contextlib.closing(writer):
            while time.perf_counter() < deadline:
                writer.write(f"GET /?next_cursor={count % pages} HTTP/1.1\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.rpartition(b"Content-Length: ")[2]))
                count += 1

    async def all_connections() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(read())

    began = time.perf_counter()
    asyncio.run(all_connections())
    return count * SAMPLES_PER_PAGE / (time.perf_counter() - began)
