"""A real endpoint under senders that hold connections or memory, and one normal sender."""

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

from app.web.limits import CONNECTION_BYTES
from tests.support import HTTP, JUNCTION_SECRET, program, signed, status, until, workout
from tests.support.servers import Servers
from workers.local.ports import free_port

pytestmark = pytest.mark.processes
MIB = 1024 * 1024
CROWD = 6000
BODY = json.dumps(workout("u1")).encode()
HEAD = b"POST /webhooks/junction HTTP/1.1\r\nHost: x\r\n"
# Well-formed headers with a signature that fits no body: the endpoint has to read the body to refuse it.
FORGED = b"".join(f"{name}: {value}\r\n".encode() for name, value in signed(b"another body").items())
BEGINNINGS = {
    "nothing": b"",
    "headers": HEAD + b"X-Endless: ",
    "body": HEAD + b"Content-Length: 1000\r\n\r\nx",
    "forged body": HEAD + FORGED + b"Content-Length: 1000\r\n\r\nx",
    "forged chunks": HEAD + FORGED + b"Transfer-Encoding: chunked\r\n\r\n",
}


class Endpoint:
    """A real endpoint with its operations port."""

    def __init__(self, port: int, operations: int, pid: int) -> None:
        self.port, self.operations, self._pid = port, operations, pid

    def resident(self) -> list[int]:
        """The resident memory of each web process, in bytes."""
        children = psutil.Process(self._pid).children()
        return [one.memory_info().rss for one in children if "app.web.operations" not in one.cmdline()]

    def proportional(self) -> int:
        """The memory of the web processes (PSS), in bytes."""
        children = psutil.Process(self._pid).children()
        return sum(one.memory_full_info().pss for one in children if "app.web.operations" not in one.cmdline())

    def metrics(self) -> str:
        return HTTP.get(f"http://127.0.0.1:{self.operations}/metrics").text


@pytest.fixture(scope="module")
def endpoint(servers: Servers) -> Iterator[Endpoint]:
    """An endpoint with its default limits."""
    port, operations = free_port(), free_port()
    environment = {
        "BROKER_URL": servers.broker_url,
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "HEADRACE_PORT": str(port),
        "HEADRACE_OPERATIONS_PORT": str(operations),
    }
    with program("workers.cli", "web", **environment) as process:
        until(lambda: is_ready(port) and is_ready(operations))
        yield Endpoint(port, operations, process.pid)


def is_ready(port: int) -> bool:
    """Whether /readyz answers 200 at this port."""
    return status(f"http://127.0.0.1:{port}/readyz") == 200


@contextmanager
def crowd(port: int, beginning: bytes) -> Iterator[Sequence[socket.socket]]:
    """CROWD connections that have sent the beginning of a request and, unless it is empty, send a byte every second."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    senders = [socket.create_connection(("127.0.0.1", port)) for _ in range(CROWD)]
    over = threading.Event()

    def drip(part: bytes) -> None:
        while True:
            for sender in senders:
                with contextlib.suppress(OSError):
                    sender.send(part)
            part = b"x"
            if not beginning or over.wait(1):
                return

    thread = threading.Thread(target=drip, args=(beginning,))
    thread.start()
    try:
        yield senders
    finally:
        over.set()
        thread.join()
        for sender in senders:
            sender.close()


def slowest(port: int, *, requests: int = 10) -> float:
    """The time of the slowest of some valid requests, in seconds, each on a connection of its own."""
    longest = 0.0
    for number in range(requests):
        began = time.monotonic()
        headers = signed(BODY, name=f"msg_{number}")
        assert HTTP.post(f"http://127.0.0.1:{port}/webhooks/junction", content=BODY, headers=headers).status_code == 202
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_crowd_of_connections_does_not_keep_others_out(endpoint: Endpoint, beginning: bytes) -> None:
    """Breaks if slow senders occupy threads or the connections: 6,000 idle ones once shut a good sender out."""
    with crowd(endpoint.port, beginning):
        assert slowest(endpoint.port) < 4  # tens of milliseconds on an idle machine
        assert is_ready(endpoint.operations)
    assert slowest(endpoint.port) < 4


@pytest.mark.parametrize("beginning", [b"", HEAD, BEGINNINGS["body"], BEGINNINGS["forged body"]])
def test_a_connection_that_does_not_authenticate_is_closed(endpoint: Endpoint, beginning: bytes) -> None:
    """Breaks if a connection without a complete request stays open until the limit is reached."""
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as sender:
        sender.sendall(beginning)
        began = time.monotonic()
        while sender.recv(4096):
            pass
        assert time.monotonic() - began < 8  # the limits are 5 s for headers or a small body, 1 s for a refused body


def test_a_sender_with_a_signature_keeps_its_connection(endpoint: Endpoint) -> None:
    """Breaks if a valid sender has to connect for each event, or one without a signature keeps its connection."""
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as sender:
        headers = "".join(f"{name}: {value}\r\n" for name, value in signed(BODY).items()).encode()
        length = f"Content-Length: {len(BODY)}\r\n\r\n".encode()
        for _ in range(3):
            sender.sendall(HEAD + headers + length + BODY)
            assert b" 202 " in sender.recv(4096)
        sender.sendall(HEAD + FORGED + length + BODY)
        answer = b""
        while part := sender.recv(4096):
            answer += part
        assert b" 401 " in answer
        assert b"connection: close" in answer.lower()


def post(port: int, headers: bytes, body: bytes) -> bytes:
    """Sends a request and returns the beginning of the response; a reset after the response is no error."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sender:
        with contextlib.suppress(OSError):
            sender.sendall(HEAD + headers + b"Content-Length: %d\r\n\r\n" % len(body))
            sender.sendall(body)
        with contextlib.suppress(OSError):
            return sender.recv(4096)
    return b""


@pytest.mark.parametrize(
    ("headers", "allowed_mib"),
    [(b"", 30), (FORGED, 330)],  # a forged body is kept until it is refused: a budget of 256 MiB
    ids=["unsigned", "forged"],
)
def test_large_bodies_without_a_signature_leave_the_memory_flat(
    endpoint: Endpoint, headers: bytes, allowed_mib: int
) -> None:
    """Breaks if unsigned bodies fill the memory (16 of 64 MiB once took 1.2 GB in one process), or keep it."""
    slowest(endpoint.port)
    before, over = endpoint.resident(), threading.Event()
    highest = list(before)

    def watch() -> None:
        while not over.wait(0.02):
            highest[:] = map(max, zip(highest, endpoint.resident(), strict=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    body = os.urandom(MIB) * 64
    try:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: post(endpoint.port, headers, body), range(16)))
    finally:
        over.set()
        watcher.join()
    wanted = {b"401"} if not headers else {b"401", b"503"}
    assert {answer.split(b" ")[1] for answer in answers if answer} <= wanted
    assert max(new - old for new, old in zip(highest, before, strict=True)) < allowed_mib * MIB
    until(lambda: all(after - old < 30 * MIB for after, old in zip(endpoint.resident(), before, strict=True)), 20)
    unverified = [line for line in endpoint.metrics().splitlines() if line.startswith("headrace_answers_total")]
    assert not [line for line in unverified if 'status="503"' in line or 'status="413"' in line]


def test_large_headers_are_refused(endpoint: Endpoint) -> None:
    """Breaks if 1,000 requests with 400 kB of headers each take that memory."""
    before = endpoint.resident()
    senders = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) for _ in range(1000)]
    for sender in senders:
        sender.settimeout(0.01)
        with contextlib.suppress(OSError):
            sender.sendall(HEAD + b"X-Large: " + b"x" * 400_000)
    after = endpoint.resident()
    answers = []
    for sender in senders:
        with contextlib.suppress(OSError), sender:
            sender.settimeout(20)
            answers.append(sender.recv(100))
    assert {answer.split(b" ")[1] for answer in answers if answer} == {b"431"}
    assert max(new - old for new, old in zip(after, before, strict=True)) < 60 * MIB


# The number of requests before the first measurement, and of all.
WARM, MANY = 10_000, 100_000


@pytest.mark.timeout(3600)
def test_many_requests_leave_the_memory_flat(endpoint: Endpoint, *, full: bool) -> None:
    """Breaks if each request, accepted or refused, leaves some memory behind. Runs with `--full` only."""
    if not full:
        pytest.skip("100,000 requests: --full")
    after_warming, after_many = requests_and_memory(endpoint, WARM), requests_and_memory(endpoint, MANY - WARM)
    print(f"memory in MiB: {after_warming / MIB:.1f} after {WARM}, {after_many / MIB:.1f} after {MANY}")
    assert after_many - after_warming < 10 * MIB  # 110 bytes a request


def requests_and_memory(endpoint: Endpoint, number: int) -> int:
    """Sends requests: a third is valid, a third forged and a third unsigned. Returns the memory (PSS) afterwards."""

    def send(n: int) -> tuple[int, int]:
        headers = (signed(BODY, name=f"msg_{n}_{number}"), signed(b"another body"), {})[n % 3]
        answer = HTTP.post(f"http://127.0.0.1:{endpoint.port}/webhooks/junction", content=BODY, headers=headers)
        return n % 3, answer.status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(send, range(number))) == {(0, 202), (1, 401), (2, 401)}
    return endpoint.proportional()


def test_a_held_connection_costs_what_the_default_limit_allows(endpoint: Endpoint) -> None:
    """Breaks if as many connections as are accepted, with small bodies that do not end, exceed the memory limit."""
    before = sum(endpoint.resident())
    request = HEAD + FORGED + b"X-Padding: " + b"x" * 30_000 + b"\r\nContent-Length: 16384\r\n\r\n" + b"x" * 16_383
    with contextlib.ExitStack() as senders:
        for _ in range(500):
            senders.enter_context(socket.create_connection(("127.0.0.1", endpoint.port))).sendall(request)
        time.sleep(1)
        assert sum(endpoint.resident()) - before < 500 * CONNECTION_BYTES


def test_a_crowd_at_the_operations_port_does_not_stop_webhooks(endpoint: Endpoint) -> None:
    """Breaks if scrapes and probes, or connections that hang there, share a thread or a limit with webhooks."""
    scrape = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
    with contextlib.ExitStack() as crowd:
        for number in range(200):
            one = crowd.enter_context(socket.create_connection(("127.0.0.1", endpoint.operations), timeout=5))
            with contextlib.suppress(OSError):  # connections over the limit are closed at once
                one.sendall(scrape + b"\r\n" * (number % 2))  # half of them never end their request
        for _ in range(20):
            slowest(endpoint.port, requests=1)  # each is answered 202
    until(lambda: is_ready(endpoint.operations))
