"""A real endpoint under slow senders that never finish their requests, and one normal sender."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.support import HTTP, JUNCTION_SECRET, program, signed, until, workout
from tests.support.servers import Servers
from workers.local.ports import free_port

pytestmark = pytest.mark.processes
SENDERS = 250
HEAD = b"POST /webhooks/junction HTTP/1.1\r\nHost: x\r\n"
UNFINISHED = {"body": HEAD + b"Content-Length: 1000\r\n\r\nx", "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n"}
UNFINISHED["headers"] = HEAD + b"X-Endless: "


@pytest.fixture(scope="module")
def endpoint(servers: Servers) -> Iterator[int]:
    """The port of a real endpoint."""
    port = free_port()
    environment = {
        "BROKER_URL": servers.broker_url,
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "HEADRACE_PORT": str(port),
    }
    with program("workers.cli", "web", **environment):
        until(lambda: is_ready(port))
        yield port


def is_ready(port: int) -> bool:
    """Whether the endpoint is ready."""
    with contextlib.suppress(httpx.TransportError):
        return HTTP.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    return False


@contextmanager
def dripping(port: int, beginning: bytes) -> Iterator[list[socket.socket]]:
    """SENDERS connections that have sent the beginning of a request and then send one byte every 0.5 s."""
    senders = [socket.create_connection(("127.0.0.1", port)) for _ in range(SENDERS)]
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.5):
            for sender in senders:
                with contextlib.suppress(OSError):
                    sender.send(b"x")

    for sender in senders:
        sender.sendall(beginning)
    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield senders
    finally:
        over.set()
        thread.join()
        for sender in senders:
            sender.close()


@pytest.mark.parametrize("beginning", UNFINISHED.values(), ids=UNFINISHED)
def test_slow_senders_do_not_block_others(endpoint: int, beginning: bytes) -> None:
    """Breaks if a slow sender occupies a thread: 250 of them once blocked the endpoint permanently."""
    body = json.dumps(workout("u1")).encode()
    with dripping(endpoint, beginning):
        began = time.monotonic()
        with httpx.Client(base_url=f"http://127.0.0.1:{endpoint}", timeout=30) as client:
            for number in range(20):
                headers = signed(body, name=f"msg_{number}")
                assert client.post("/webhooks/junction", content=body, headers=headers).status_code == 202
        assert time.monotonic() - began < 30  # 1.5 s per request, far above a normal response time
