"""Ports of brokers that are broken in several ways."""

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

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


Broken = Callable[[], AbstractContextManager[int]]
BROKEN: dict[str, Broken] = {"refusing": refusing, "silent": silent, "vanished": vanished}


def amqp_url(*ports: int) -> str:
    """The BROKER_URL of RabbitMQ nodes on these ports."""
    return ";".join(f"amqp://guest:guest@127.0.0.1:{port}//" for port in ports)
