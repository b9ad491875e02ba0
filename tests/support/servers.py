"""The services of a test run, and servers that a test has for itself."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from workers.local import embedded_postgres
from workers.local.supervisor import running

MEMORY = Path("/dev/shm")
MIN_FREE_BYTES = 2 * 1024**3  # of the memory; the folders of a server take up to 300 MB


@dataclass(frozen=True)
class Servers:
    """The URLs of the services. The database `headrace` is migrated: the tests' databases are copies of it."""

    database_url: str
    broker_url: str


def server_place() -> Path:
    """The folder for the data of servers: in memory if there is room.

    The servers sync every commit, as in production. On a disk each sync takes 5 ms, and more while other tests run.
    """
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MIN_FREE_BYTES
    return MEMORY if has_room else Path(tempfile.gettempdir())


@contextmanager
def server_folder(name: str) -> Iterator[Path]:
    """A new folder for the data of servers, which every user may enter."""
    place = server_place()
    remove_leftovers(place, f"headrace-{name}-")
    folder = Path(tempfile.mkdtemp(prefix=f"headrace-{name}-{os.getpid()}-", dir=place))
    folder.chmod(0o755)  # as root, PostgreSQL runs as another user
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(place: Path, prefix: str) -> None:
    """Removes the folders PREFIX + PID-... of test processes that were killed."""
    for folder in place.glob(f"{prefix}*-*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def own_postgres() -> Iterator[str]:
    """The URL of the empty database of a PostgreSQL that the test may crash."""
    with server_folder("postgres") as folder:
        postgres, url = embedded_postgres.postgres(folder / "postgres", "tests", folder / "log")
        with running(postgres):
            yield url
