"""A load generator: requests are built and signed beforehand, then sent as fast as they are answered."""

import gc
import multiprocessing
import select
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from queue import Empty
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from tests.bench.results import SAMPLES_AN_EVENT
from tests.support import START, event, message_id, signed

READY_SECONDS = 300


@dataclass
class Load:
    """What came of a run: answers by status, their times, how long it took, and what the generator itself cost."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds_each: list[float] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def accepted(self) -> int:
        """How many were answered 202."""
        return self.statuses[202]


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


class _Line:
    """A connection with at most one request on its way."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self.received = b""

    def send(self, request: bytes, began: float) -> None:
        """Sends a request, whose time counts from `began`."""
        self.began = began
        self.socket.sendall(request)

    def receive(self) -> int | None:
        """The status of the answer, once all of it is there. None of the answers to webhooks has a body to speak of."""
        self.received += self.socket.recv(65536)
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(rest) < int(length or 0):
            return None
        self.received = b""
        return int(head[9:12])


def _send_all(address: tuple[str, int], requests: list[bytes], connections: int, seconds: float, pause: float) -> Load:
    """Sends until the time is up. With a pause, one request after each, whoever is still waiting: as senders do.

    Then a request's time counts from when it was due, or a slow answer would hide the requests behind it. No asyncio:
    its streams cost 100 us a request, which on two cores is a third of what is measured; this costs 20.
    """
    lines, load, poll = [_Line(address) for _ in range(connections)], Load(), select.epoll()
    by_number = {line.socket.fileno(): line for line in lines}
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    idle, due = lines.copy(), time.perf_counter()
    deadline = due + seconds
    while True:
        now = time.perf_counter()
        is_over = now >= deadline or not requests
        while idle and requests and not is_over and (not pause or due <= now):
            idle.pop().send(requests.pop(), due if pause else time.perf_counter())
            due += pause
        if is_over and len(idle) == len(lines):
            break
        wait = max(due - time.perf_counter(), 0) if pause and idle and not is_over else 60
        for number, _ in poll.poll(wait):
            line = by_number[number]
            if status := line.receive():
                load.statuses[status] += 1
                load.seconds_each.append(time.perf_counter() - line.began)
                idle.append(line)
    load.seconds = time.perf_counter() - deadline + seconds
    for line in lines:
        line.socket.close()
    return load


def _process(what: Any, plan: Any) -> None:
    (url, secret, kind, users, numbers), (connections, seconds, pause, ready, go, result) = what, plan
    where, make = urlsplit(url), MAKERS[kind]
    bodies = (msgspec.json.encode(make(users[number % len(users)], number)) for number in numbers)
    requests = [as_request(where.path, body, secret) for body in bodies]
    gc.disable()
    ready.set()
    go.wait()
    began, cpu = time.time(), time.process_time()
    load = _send_all((where.hostname or "", where.port or 80), requests, connections, seconds, pause)
    load.began, load.cpu_seconds = began, time.process_time() - cpu
    result.put(load)


def run(
    url: str,
    secret: str,
    kind: str,
    users: Sequence[str],
    *,
    connections: int,
    seconds: float,
    numbers: range,
    rate: float | None = None,
    on_go: Callable[[], None] | None = None,
) -> Load:
    """Sends from a process of its own until the time is up or events of all `numbers` are through.

    At a `rate` if one is given. `on_go` is called when everything is prepared, just before the first request.
    """
    context = multiprocessing.get_context("spawn")
    ready, go, result = context.Event(), context.Event(), context.Queue()
    plan = (connections, seconds, 1 / rate if rate else 0.0, ready, go, result)
    child = context.Process(target=_process, args=((url, secret, kind, users, numbers), plan), daemon=True)
    child.start()
    deadline = time.monotonic() + READY_SECONDS
    while not ready.wait(1):
        if not child.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the load generator did not get ready")
    if on_go:
        on_go()
    go.set()
    try:
        return cast("Load", result.get(timeout=seconds + 90))
    except Empty:
        raise TimeoutError("the load generator did not end") from None
    finally:
        child.join(10)
