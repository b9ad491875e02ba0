"""A load generator: requests are built and signed beforehand, then sent as fast as they are answered."""

import asyncio
import contextlib
import multiprocessing
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from queue import Empty
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tests.support import START, event, message_id, signed

SAMPLES_AN_EVENT = 1000
PROCESSES = 2


@dataclass
class Load:
    """What came of a run: answers by status, their times, and how long it took."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds_each: list[float] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0

    @property
    def accepted(self) -> int:
        """How many were answered 202."""
        return self.statuses[202]

    def percentile(self, share: float) -> float:
        """The time of answer that this share of requests stayed under, in milliseconds."""
        return sorted(self.seconds_each)[int(len(self.seconds_each) * share)] * 1000


def workout_event(user_id: str, number: int) -> dict[str, Any]:
    """A workout of the usual size, 1.1 kB."""
    start = START + timedelta(minutes=number % 400_000)
    zones = {"hr_zones": [100, 90, 10, 10, 200], "sport": {"id": 1, "name": "Running", "slug": "running"}}
    data = {
        "id": str(uuid.uuid4()),
        "user_id": user_id,
        "average_hr": 120 + number % 40,
        "max_hr": 180,
        "distance": 8000.0 + number % 1000,
        "calendar_date": start.date().isoformat(),
        "time_start": start.isoformat(),
        "time_end": (start + timedelta(minutes=45)).isoformat(),
        "calories": 500.5,
        "moving_time": 2600,
        "provider_id": str(number),
        "source": {"provider": "garmin", "type": "watch"},
        "title": "Run",
        "timezone_offset": 3600,
        "created_at": start.isoformat(),
        "updated_at": start.isoformat(),
    }
    return event("daily.data.workouts.created", user_id, data | zones)


def samples_event(user_id: str, number: int) -> dict[str, Any]:
    """A thousand heart-rate samples, a second apart, none of them sent before."""
    start = START + timedelta(seconds=number * SAMPLES_AN_EVENT)
    samples = [
        {
            "timestamp": (start + timedelta(seconds=second)).isoformat(),
            "value": 60 + second % 90,
            "unit": "bpm",
            "timezone_offset": 3600,
            "type": None,
        }
        for second in range(SAMPLES_AN_EVENT)
    ]
    data = {"source": {"provider": "garmin", "type": "watch"}, "data": samples}
    return event("daily.data.heartrate.created", user_id, data)


MAKERS: dict[str, Callable[[str, int], dict[str, Any]]] = {"workouts": workout_event, "heartrate": samples_event}


def as_request(path: str, body: bytes, secret: str) -> bytes:
    """A signed request as it goes over the wire."""
    now = datetime.now(UTC)
    headers = signed(body, name=message_id(now), at=now, secret=secret)
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _connection(host: str, port: int, requests: list[bytes], deadline: float, load: Load) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    with contextlib.closing(writer):
        while requests and time.time() < deadline:
            request, began = requests.pop(), time.perf_counter()
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"content-length: " in head:
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            load.statuses[int(head.split(b" ", 2)[1])] += 1
            load.seconds_each.append(time.perf_counter() - began)


def _process(what: Any, share: range, plan: Any) -> None:
    url, secret, kind, users = what
    connections, seconds, ready, go, results = plan
    where = urlsplit(url)
    make = MAKERS[kind]
    bodies = (msgspec.json.encode(make(users[number % len(users)], number)) for number in share)
    requests = [as_request(where.path, body, secret) for body in bodies]
    ready.release()
    go.wait()
    load, deadline = Load(), time.time() + seconds

    async def all_connections() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(_connection(where.hostname or "", where.port or 80, requests, deadline, load))

    asyncio.run(all_connections())
    results.put(load)


def run(url: str, secret: str, kind: str, users: Sequence[str], *, connections: int, seconds: float, most: int) -> Load:
    """Sends until the time is up or `most` requests are through, from several processes at once."""
    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    plan = (max(1, connections // PROCESSES), seconds, ready, go, results)
    shares = [range(most * one // PROCESSES, most * (one + 1) // PROCESSES) for one in range(PROCESSES)]
    shares = shares if connections > 1 else [range(most)]
    children = [
        context.Process(target=_process, args=((url, secret, kind, users), share, plan), daemon=True)
        for share in shares
    ]
    for child in children:
        child.start()
    for _ in children:
        if not ready.acquire(timeout=120):
            raise TimeoutError("a process of the load generator did not get ready")
    total = Load(began=time.time())
    go.set()
    for _ in children:
        try:
            part = results.get(timeout=seconds + 60)
        except Empty:
            raise TimeoutError("a process of the load generator did not end") from None
        total.statuses += part.statuses
        total.seconds_each += part.seconds_each
    total.seconds = time.time() - total.began
    return total
