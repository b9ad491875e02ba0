"""Applies the message of the standard input and prints the outcome and the peak memory (MiB) of this process."""

import re
import sys
from pathlib import Path

from app.config.settings import load
from app.delivery import unpack
from workers.celery.app import run_worker  # noqa: F401 - a worker has loaded Celery
from workers.ingest.apply import Applier
from workers.ingest.outcomes import ParsedDelivery
from workers.store.engine import make_writer


def main() -> None:
    """As the lane `download` applies a large delivery."""
    settings = load()
    batch = [ParsedDelivery(one) for one in unpack(sys.stdin.read())]
    applied = Applier(make_writer(settings), settings).apply_batch(batch)
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(*applied.outcomes, int(peak) // 1024)


if __name__ == "__main__":
    main()
