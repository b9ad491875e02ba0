"""The consumers of a drill: processes that follow the change feed, and are killed and restarted again and again.

Each appends the positions that it reads to a file. The file is the consumer's own store: positions and their place are
written together, so a killed consumer continues after the last whole line. That is how any consumer reads each change
exactly once.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event as Flag
from threading import Thread

from app.commands import own
from app.config.settings import load, process_environment
from app.errors import TryLater
from workers.store import consumers
from workers.store.engine import make_engine

LIFE = (1.0, 6.0)  # seconds until a consumer is killed: from, to
PAGE = 500
PAUSE_SECONDS = 0.2
PARENT_GONE = 1  # the pid of the parent of an orphan


@dataclass(frozen=True)
class FollowerTotals:
    """The changes that a consumer has read, compared with those in the feed."""

    name: str
    kills: int
    read: int
    missed: int
    repeated: int

    @property
    def is_exact(self) -> bool:
        return not self.missed and not self.repeated


class Follower(Thread):
    """Runs a consumer, and repeatedly kills and restarts it until stopped."""

    def __init__(self, name: str, folder: Path, database_url: str, start: int, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self._file, self._url, self._start = folder / f"{name}.positions", database_url, start
        self._rng = Random(seed)  # noqa: S311 - repeatable on purpose
        self._calm, self._ended = Flag(), Flag()
        self.kills = 0

    def run(self) -> None:
        while not self._ended.is_set():
            process = self._process()
            self._calm.wait(self._rng.uniform(*LIFE))
            if self._calm.is_set():
                self._ended.wait()
            else:
                self.kills += 1
            process.kill()
            process.wait()

    def _process(self) -> subprocess.Popen[bytes]:
        command = own("workers.verify.drill.followers", str(self._file), self.name, str(self._start))
        environment = process_environment() | {"DATABASE_URL": self._url}
        return subprocess.Popen(command, env=environment, cwd=os.sep, stdin=subprocess.DEVNULL)

    def settle(self) -> None:
        """From now on the consumer is not killed."""
        self._calm.set()

    def stop(self) -> None:
        self._calm.set()
        self._ended.set()
        self.join()

    def last(self) -> int:
        """The last position that the consumer has read."""
        read = read_positions(self._file)
        return read[-1] if read else self._start

    def totals(self, stored: Sequence[int]) -> FollowerTotals:
        """Compares with the positions that are stored now."""
        newest = stored[-1] if stored else self._start
        read = [one for one in read_positions(self._file) if one <= newest]
        missed = len(set(stored) - set(read))
        return FollowerTotals(self.name, self.kills, len(read), missed, len(read) - len(set(read)))


def read_positions(file: Path) -> list[int]:
    """The positions that a consumer has written. A line that it was writing when it was killed does not count."""
    whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
    return [int(line) for line in whole.split()]


def consume(file: Path, name: str, start: int) -> None:
    """Appends the positions after `start`, until the process is killed or its parent has ended."""
    engine = make_engine(load(), f"headrace-drill-{name}")
    read = read_positions(file)
    last = read[-1] if read else start
    with file.open("r+b" if file.exists() else "w+b") as output:
        output.truncate(sum(len(f"{one}\n") for one in read))
        output.seek(0, os.SEEK_END)
        while os.getppid() != PARENT_GONE:
            page = []
            with contextlib.suppress(TryLater):
                page = [change["position"] for change in consumers.read_after(engine, name, last, PAGE)]
            if not page:
                time.sleep(PAUSE_SECONDS)
                continue
            output.write(b"".join(b"%d\n" % one for one in page))
            output.flush()
            last = page[-1]


if __name__ == "__main__":
    consume(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
