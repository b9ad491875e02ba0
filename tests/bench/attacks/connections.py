"""Attacks by senders without a secret: idle and slow connections, large unsigned bodies, large headers."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from tests.bench.attacks.target import Signals, Target

HEAD = b"POST /webhooks/junction HTTP/1.1\r\nHost: x\r\n"
SLOW_BODY = HEAD + b"Content-Length: 100000\r\n\r\nx"
SLOW_HEADER = HEAD + b"X-Endless: "
DRIP_SECONDS = 5.0  # between two bytes of one connection
BODY_BYTES, BODIES = 64 * 2**20, 16
HEADER_BYTES, HEADER_REQUESTS, HEADER_CONNECTIONS = 400_000, 1_000, 50
PART = b"x" * 2**20


class Crowd:
    """`count` connections that have sent `beginning`. Those that the server closes are opened again, once a second."""

    def __init__(self, target: Target, count: int, beginning: bytes) -> None:
        self._address, self._count, self._beginning = (target.host, target.port), count, beginning
        self._selector = selectors.DefaultSelector()
        self.closed = 0

    def fill(self) -> None:
        """Opens connections until there are `count`, or until one cannot be opened."""
        with contextlib.suppress(OSError):
            while len(self._selector.get_map()) < self._count:
                sender = socket.create_connection(self._address, timeout=1)
                sender.setblocking(False)
                sender.send(self._beginning)
                self._selector.register(sender, selectors.EVENT_READ)

    def drop_closed(self) -> None:
        """Forgets the connections that the server has closed or answered."""
        for key, _ in self._selector.select(timeout=0):
            self._drop(key.fileobj)

    def drip(self) -> None:
        """Sends one byte on each connection."""
        for key in list(self._selector.get_map().values()):
            try:
                key.fileobj.send(b"x")  # type: ignore[union-attr]  # a socket
            except BlockingIOError:
                pass
            except OSError:
                self._drop(key.fileobj)

    def close(self) -> None:
        """Closes all connections."""
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)

    def _drop(self, sender: object) -> None:
        assert isinstance(sender, socket.socket)
        self._selector.unregister(sender)
        sender.close()
        self.closed += 1


def crowd(target: Target, signals: Signals, *, count: int, beginning: bytes = b"", drips: bool = False) -> str:
    """Keeps `count` connections open, if `drips` with a byte each now and then."""
    connections = Crowd(target, count, beginning)
    connections.fill()
    signals.ready.set()
    dripped = time.monotonic()
    while not signals.over.wait(1):
        connections.drop_closed()
        if drips and time.monotonic() - dripped > DRIP_SECONDS:
            connections.drip()
            dripped = time.monotonic()
        connections.fill()
    found = f"{connections.closed:,} connections closed by the server"
    connections.close()
    return found


def large_bodies(target: Target, signals: Signals) -> str:
    """Sends unsigned bodies of 64 MiB, BODIES at a time."""
    head = HEAD + b"Content-Length: %d\r\n\r\n" % BODY_BYTES
    return _repeat(target, signals, BODIES, lambda sender: _send_parts(sender, head))


def large_headers(target: Target, signals: Signals) -> str:
    """Sends requests with 400 kB of headers."""
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 4000) for number in range(HEADER_BYTES // 4000))
    request = HEAD + lines + b"Content-Length: 2\r\n\r\n{}"
    return _repeat(target, signals, HEADER_CONNECTIONS, lambda sender: sender.sendall(request), HEADER_REQUESTS)


def _send_parts(sender: socket.socket, head: bytes) -> None:
    sender.sendall(head)
    for _ in range(BODY_BYTES // len(PART)):
        sender.sendall(PART)


def _repeat(
    target: Target, signals: Signals, threads: int, send: Callable[[socket.socket], None], at_least: int = 1
) -> str:
    """Sends requests in several threads until `over`, and at least so many."""
    statuses: list[bytes] = []

    def work() -> None:
        while not signals.over.is_set() or len(statuses) < at_least:
            statuses.append(_answer(target, send))

    signals.ready.set()
    pool = [threading.Thread(target=work) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return ", ".join(f"{statuses.count(status):,} x {status.decode()}" for status in sorted(set(statuses)))


def _answer(target: Target, send: Callable[[socket.socket], None]) -> bytes:
    """The status of one request over a new connection. An early answer may arrive before the request is sent."""
    try:
        with socket.create_connection((target.host, target.port), timeout=20) as sender:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                send(sender)
            return sender.recv(64)[9:12] or b"closed"
    except OSError as error:
        return type(error).__name__.encode()


ATTACKS = {
    "idle-2100": partial(crowd, count=2_100),
    "idle-6000": partial(crowd, count=6_000),
    "trickle-headers": partial(crowd, count=6_000, beginning=SLOW_HEADER, drips=True),
    "trickle-bodies": partial(crowd, count=6_000, beginning=SLOW_BODY, drips=True),
    "bodies-64mib": large_bodies,
    "headers-400k": large_headers,
}
