"""A load generator: requests are built and signed in advance, then sent in a closed loop or at a fixed rate."""

import gc
import multiprocessing
import select
import socket
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from queue import Empty
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from tests.bench.results import SAMPLES_PER_EVENT
from tests.support import START, event, message_id, signed

READY_SECONDS = 300


@dataclass
class Load:
    """The result of a run: responses by status, response times, duration, and CPU of the generator itself."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds_each: list[float] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def accepted(self) -> int:
        """The number of 202 responses."""
        return self.statuses[202]


def workout_event(user_id: str, number: int) -> dict[str, Any]:
    """A workout of typical size, 1.1 kB."""
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
    return event("daily.data.workouts.created", user_id, data | zones, client_user_id=f"load-{user_id}")


def samples_event(user_id: str, number: int) -> dict[str, Any]:
    """1,000 heart-rate samples, one second apart, unique per user and number."""
    start = START + timedelta(seconds=number * SAMPLES_PER_EVENT)
    samples = [
        {
            "timestamp": (start + timedelta(seconds=second)).isoformat(),
            "value": 60 + second % 90,
            "unit": "bpm",
            "timezone_offset": 3600,
            "type": None,
        }
        for second in range(SAMPLES_PER_EVENT)
    ]
    data = {"source": {"provider": "garmin", "type": "watch"}, "data": samples}
    return event("daily.data.heartrate.created", user_id, data, client_user_id=f"load-{user_id}")


MAKERS: dict[str, Callable[[str, int], dict[str, Any]]] = {"workouts": workout_event, "heartrate": samples_event}


def as_request(path: str, body: bytes, secret: str) -> bytes:
    """The bytes of a signed HTTP request."""
    now = datetime.now(UTC)
    headers = signed(body, name=message_id(now), at=now, secret=secret)
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Connection:
    """A connection with at most one request in flight."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self.received = b""

    def send(self, request: bytes, began: float) -> None:
        """Sends a request; its response time counts from `began`."""
        self.began = began
        self.socket.sendall(request)

    def receive(self) -> int | None:
        """The status of the response once it is complete, otherwise None. Responses to webhooks have small bodies."""
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
    """Sends for `seconds`. With a pause, sends one request per pause without waiting for responses, as real senders do.

    The time of such a request counts from its due time; otherwise a slow response would hide the delay of later ones.
    asyncio is not used: its streams cost 100 us per request, on two cores a third of the measured total; this costs 20.
    """
    lines, load, poll = [_Connection(address) for _ in range(connections)], Load(), select.epoll()
    by_number = {line.socket.fileno(): line for line in lines}
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    # In turn, because the endpoint closes a connection that it has not heard of for 5 s.
    idle, due = deque(lines), time.perf_counter()
    deadline = due + seconds
    while True:
        now = time.perf_counter()
        is_over = now >= deadline or not requests
        while idle and requests and not is_over and (not pause or due <= now):
            idle.popleft().send(requests.pop(), due if pause else time.perf_counter())
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


def _process(content: Any, plan: Any) -> None:
    (url, secret, kind, users, numbers), (connections, seconds, pause, ready, go, result) = content, plan
    address, make = urlsplit(url), MAKERS[kind]
    bodies = (msgspec.json.encode(make(users[number % len(users)], number)) for number in numbers)
    requests = [as_request(address.path, body, secret) for body in bodies]
    gc.disable()
    ready.set()
    go.wait()
    began, cpu = time.time(), time.process_time()
    load = _send_all((address.hostname or "", address.port or 80), requests, connections, seconds, pause)
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
    """Sends from a separate process for `seconds`, or until the events of all `numbers` are sent.

    Sends at `rate` events a second if given. Calls `on_go` after the preparation, just before the first request.
    """
    context = multiprocessing.get_context("spawn")
    ready, go, result = context.Event(), context.Event(), context.Queue()
    plan = (connections, seconds, 1 / rate if rate else 0.0, ready, go, result)
    child = context.Process(target=_process, args=((url, secret, kind, users, numbers), plan), daemon=True)
    child.start()
    deadline = time.monotonic() + READY_SECONDS
    while not ready.wait(1):
        if not child.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the load generator did not become ready")
    if on_go:
        on_go()
    go.set()
    try:
        return cast("Load", result.get(timeout=seconds + 90))
    except Empty:
        raise TimeoutError("the load generator did not end") from None
    finally:
        child.join(10)
