"""Ports of brokers that are broken in several ways."""

import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from workers.local.ports import free_port


@contextmanager
def refusing() -> Iterator[int]:
    """A port on which nothing listens."""
    yield free_port()


@contextmanager
def silent() -> Iterator[int]:
    """A port whose kernel accepts connections, as that of a frozen process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@contextmanager
def vanished() -> Iterator[int]:
    """A port that answers no packet, as that of a machine without power: its backlog is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield int(server.getsockname()[1])


@contextmanager
def halting() -> Iterator[int]:
    """A broker that opens connections and channels, and then answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(4) as threads, ExitStack() as stack:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client = stack.enter_context(server.accept()[0])
                    threads.submit(_open_channels, client)

        threads.submit(accept)
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        stack.close()


def _open_channels(client: socket.socket) -> None:
    """AMQP 0-9-1: the answers to a handshake and to channel.open."""
    start = b"\0\x09" + struct.pack(">I", 0) + struct.pack(">I", 5) + b"PLAIN" + struct.pack(">I", 5) + b"en_US"
    answers = {
        (10, 11): (10, 30, struct.pack(">HIH", 100, 131072, 0)),  # start-ok: tune
        (10, 40): (10, 41, b"\0"),  # open: open-ok
        (20, 10): (20, 11, struct.pack(">I", 0)),  # channel.open: open-ok
        (85, 10): (85, 11, b""),  # confirm.select: select-ok
    }
    with suppress(OSError, struct.error), client.makefile("rb") as read:
        read.read(8)
        client.sendall(_frame(0, (10, 10, start)))
        while True:
            _, channel, size = struct.unpack(">BHI", read.read(7))
            if answer := answers.get(struct.unpack(">HH", read.read(size + 1)[:4])):
                client.sendall(_frame(channel, answer))


def _frame(channel: int, method: tuple[int, int, bytes]) -> bytes:
    payload = struct.pack(">HH", *method[:2]) + method[2]
    return struct.pack(">BHI", 1, channel, len(payload)) + payload + b"\xce"


Broken = Callable[[], AbstractContextManager[int]]
BROKEN: dict[str, Broken] = {"refusing": refusing, "silent": silent, "vanished": vanished}


def amqp_url(*ports: int) -> str:
    """The BROKER_URL of RabbitMQ nodes on these ports."""
    return ";".join(f"amqp://guest:guest@127.0.0.1:{port}//" for port in ports)
