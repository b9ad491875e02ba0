"""A worker of the live lane that crashes on certain deliveries and is restarted after each SIGKILL.

`python -m tests.support.killing_worker KIND CRASHED_ONCE CRASH_LOG MAX_CRASHES`. Each worker is a fork of a process
that has imported the worker's modules and opened no connection, because starting an interpreter takes two seconds. The
file CRASHED_ONCE exists after the only crash of the kinds ONCE and AFTERWARDS; CRASH_LOG has one byte per crash.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from app.config.settings import Settings, load
from app.delivery import Delivery
from workers.actions import Parsed
from workers.aggregators import junction
from workers.aggregators.registry import AGGREGATORS
from workers.celery.app import run_worker
from workers.ingest import crashes, outcomes
from workers.ingest.apply import Applier

ALWAYS, ONCE, AFTERWARDS = "sesame always", "sesame once", "sesame afterwards"


def prepare(kind: str, crashed_once: Path, max_crashes: int) -> None:
    """Patches the worker so that it crashes."""
    crashes.MAX_CRASHES = max_crashes
    apply = Applier.apply

    def crash() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def crash_once() -> None:
        if not crashed_once.exists():
            crashed_once.touch()
            crash()

    def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
        if ALWAYS.encode() in body:
            crash()
        if ONCE.encode() in body:
            crash_once()
        return junction.parse(delivery, body, settings)

    def apply_and_crash(self: Applier, packed: str, **history: Any) -> outcomes.Applied:
        result = apply(self, packed, **history)
        crash_once()
        return result

    if kind == AFTERWARDS:
        Applier.apply = apply_and_crash  # type: ignore[method-assign]
    AGGREGATORS["junction"] = SimpleNamespace(parse=parse)  # type: ignore[index]


class Supervisor:
    """Starts one worker after another until SIGTERM, which may arrive between two of them."""

    pid = 0
    is_stopping = False

    def stop(self, *_: object) -> None:
        """Stops the current worker and starts no other."""
        self.is_stopping = True
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def run_once(supervisor: Supervisor, settings: Settings) -> int:
    """Runs one worker and returns its exit status."""
    supervisor.pid = os.fork()
    if supervisor.pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(run_worker(settings, "live"))
    status = os.waitstatus_to_exitcode(os.waitpid(supervisor.pid, 0)[1])
    supervisor.pid = 0
    return status


def main() -> None:
    """Restarts the worker after each SIGKILL. Exits with the status of any other end."""
    kind, crashed_once, crash_log, max_crashes = sys.argv[1:]
    prepare(kind, Path(crashed_once), int(max_crashes))
    supervisor, status = Supervisor(), 0
    signal.signal(signal.SIGTERM, supervisor.stop)
    while not supervisor.is_stopping and (status := run_once(supervisor, load())) == -signal.SIGKILL:
        with Path(crash_log).open("ab") as file:
            file.write(b".")
    sys.exit(status)


if __name__ == "__main__":
    main()
