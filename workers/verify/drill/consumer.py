"""A consumer of the change feed, as a process that a drill kills: it appends each position to a file.

The file is the consumer's own store: positions and their place are written together, so a killed consumer continues
after the last whole line. That is how any consumer reads each change exactly once.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from app.config.settings import load
from app.errors import TryLater
from workers.store import consumers
from workers.store.engine import make_engine

PAGE = 500
PAUSE_SECONDS = 0.2
PARENT_GONE = 1  # the pid of the parent of an orphan


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
