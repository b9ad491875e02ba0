"""Free TCP ports, reused on the next start."""

import contextlib
import errno
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


def need_port(host: str, port: int, name: str) -> None:
    """Raises Misconfigured if a server cannot listen on this port. `name` is its option or setting."""
    held_port(host, port, strict=name).close()


def held_port(host: str, wish: int | None = None, *, strict: str = "") -> socket.socket:
    """Like `free_port`, and reserves the port while the socket is open. Raises Misconfigured.

    `strict` names the option or setting that asks for the port. With it, another port is never used instead.

    Granian listens with SO_REUSEPORT: two stacks that start on one port at the same time would each receive half of
    the requests of both. So the port is bound exclusively first, and only then shared with our own server.
    """
    wishes = [] if wish is None else [wish]
    for port in [*wishes, *random.SystemRandom().sample(range(*PORTS), 200)]:
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections that have just ended
        try:
            held.bind((host, port))
        except OSError as error:
            held.close()
            if strict or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                is_taken = error.errno == errno.EADDRINUSE
                reason = "is in use; choose another port" if is_taken else f"cannot be used: {error.strerror}"
                raise Misconfigured(f"port {port} on {host} {reason}", setting=strict or "HEADRACE_HOST") from None
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
