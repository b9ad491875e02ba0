"""Free TCP ports, kept from one start to the next."""

import contextlib
import random
import socket
from pathlib import Path

from app.errors import Misconfigured
from workers.local.files import write_secret

# Under the range from which systems take the ports of outgoing connections: one of those must not get our port while
# the server is being started again.
PORTS = (15000, 30000)


def free_port(host: str = "127.0.0.1", wish: int | None = None) -> int:
    """The wished port if nobody listens there, otherwise any free one. Raises Misconfigured."""
    with held_port(host, wish) as held:
        return int(held.getsockname()[1])


def held_port(host: str, wish: int | None = None) -> socket.socket:
    """As `free_port`, and nobody else finds it free while the socket is open. Raises Misconfigured.

    Granian opens its port to whoever shares it (SO_REUSEPORT): of two stacks that start at once on one port, each would
    get half of the requests of both. So the port is bound by us alone first, and only then opened to our own server.
    """
    wishes = [] if wish is None else [wish]
    for port in [*wishes, *random.SystemRandom().sample(range(*PORTS), 200)]:
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
        try:
            held.bind((host, port))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return held
    raise Misconfigured(f"no free port between {PORTS[0]} and {PORTS[1]} on {host}")


def saved_port(file: Path) -> int:
    """The port of last time, so that clients find the server again; another one if somebody has taken it."""
    kept = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        kept = int(file.read_text())
    port = free_port(wish=kept)
    if port != kept:
        write_secret(file, f"{port}\n")  # which follows no link: the folder is not always our own
    return port
