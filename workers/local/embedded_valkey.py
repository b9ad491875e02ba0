"""Valkey from its wheel, as a program for the supervisor."""

import functools
import logging
import os
import socket
from pathlib import Path

from app.errors import Misconfigured
from app.scheduling import preempt_others
from workers.local.files import write_secret
from workers.local.ports import saved_port
from workers.local.supervisor import Program
from workers.local.wheels import ENVIRONMENT, valkey_binary

VALKEY_CONFIGURATION = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass "{password}"
dir "{folder}"
daemonize no
logfile ""
save ""
appendonly yes
appendfsync always
aof-load-truncated yes
maxmemory-policy noeviction
enable-debug-command no
hide-user-data-from-log yes
crash-log-enabled no
hz 2
"""  # hz: by default Valkey wakes up ten times a second, and reads /proc each time
CHUNK_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


def valkey(folder: Path, password: str, log: Path) -> tuple[Program, str]:
    """Valkey and its URL; its data is in `folder`. Raises Misconfigured."""
    binary = valkey_binary()
    if binary is None:
        raise Misconfigured("not set, and no embedded Valkey exists for this platform; set it", setting="BROKER_URL")
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = saved_port(folder / "port")
    configuration = folder / "valkey.conf"
    text = VALKEY_CONFIGURATION.format(port=port, password=_quoted(password), folder=_quoted(str(folder)))
    write_secret(configuration, text)
    program = Program(
        group="broker",
        name="broker",
        command=(str(binary), str(configuration)),
        environment=ENVIRONMENT,
        log=log,
        ready=lambda: _valkey_answers(port, password),
        cwd=folder,
        before_exec=preempt_others,
        before_start=functools.partial(_cut_zeros, folder / "appendonlydir"),
    )
    return program, f"redis://:{password}@127.0.0.1:{port}/0"


def _cut_zeros(folder: Path) -> None:
    """Removes zero bytes at the end of the append-only files, which a power cut can leave there.

    The file system had enlarged the file, but not written the data. Valkey then exits with "bad format";
    `aof-load-truncated` only covers a file that ends within a command. No confirmed write is lost: a command ends with
    CR LF, so zeros after the last one belong to a command that was never synced, and therefore never confirmed.
    """
    for file in folder.glob("*.incr.aof"):
        with file.open("r+b") as opened:
            size = end = opened.seek(0, os.SEEK_END)
            rest = b""
            while end and not rest:
                begin = max(0, end - CHUNK_BYTES)
                opened.seek(begin)
                rest = opened.read(end - begin).rstrip(b"\0")
                end = begin + len(rest)
            if end < size:
                opened.truncate(end)
                os.fsync(opened.fileno())
                _log.warning("removed %d zero bytes, left by a power cut, from the end of %s", size - end, file)


def _valkey_answers(port: int, password: str) -> bool:
    """Speaks the protocol itself: the client library would cost the supervisor 0.1 s of CPU and 10 MB."""
    secret = password.encode()
    login = b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n*1\r\n$4\r\nPING\r\n" % (len(secret), secret)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection, connection.makefile("rb") as lines:
            connection.sendall(login)
            return (lines.readline(), lines.readline()) == (b"+OK\r\n", b"+PONG\r\n")
    except OSError:
        return False


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
