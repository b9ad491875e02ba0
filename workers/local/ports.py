"""Free TCP ports, reused on the next start."""

import contextlib
import random
import socket
from pathlib import Path

from app.errors import Misconfigured
from workers.local.files import write_secret

# Below the range of outgoing connections, which could otherwise occupy the port of a server while it restarts.
PORTS = (15000, 30000)


def free_port(host: str = "127.0.0.1", wish: int | None = None) -> int:
    """The preferred port if it is free, otherwise a random one. Raises Misconfigured."""
    with held_port(host, wish) as held:
        return int(held.getsockname()[1])


def held_port(host: str, wish: int | None = None) -> socket.socket:
    """Like `free_port`, and reserves the port while the socket is open. Raises Misconfigured.

    Granian listens with SO_REUSEPORT: two stacks that start on one port at the same time would each receive half of
    the requests of both. So the port is bound exclusively first, and only then shared with our own server.
    """
    wishes = [] if wish is None else [wish]
    for port in [*wishes, *random.SystemRandom().sample(range(*PORTS), 200)]:
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections that have just ended
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
    """The port of the previous start if it is free, so that clients reconnect; otherwise a new one."""
    kept = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        kept = int(file.read_text())
    port = free_port(wish=kept)
    if port != kept:
        write_secret(file, f"{port}\n")  # follows no symbolic link: others may write to the folder
    return port
