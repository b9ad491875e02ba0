"""A worker of the live lane that crashes on certain deliveries and is restarted after each SIGKILL.

`python -m tests.support.killing_worker KIND SPENT DEATHS MAX_CRASHES`. Each worker is a fork of a process that has
imported the worker's modules and opened nothing, because an interpreter takes two seconds to start. The file SPENT
exists after the one crash of the kinds ONCE and AFTERWARDS; DEATHS has one byte per crash.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from app.config.settings import Settings, load
from app.delivery import Delivery
from workers.actions import Parsed
from workers.aggregators import AGGREGATORS, junction
from workers.celery.app import run_worker
from workers.ingest import crashes, outcomes
from workers.ingest.apply import Applier

ALWAYS, ONCE, AFTERWARDS = "sesame always", "sesame once", "sesame afterwards"


def prepare(kind: str, spent: Path, most_crashes: int) -> None:
    """Patches the worker so that it crashes."""
    crashes.MAX_CRASHES = most_crashes
    applied = Applier.apply

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_once() -> None:
        if not spent.exists():
            spent.touch()
            die()

    def parse(given: Delivery, body: bytes, settings: Settings) -> Parsed:
        if ALWAYS.encode() in body:
            die()
        if ONCE.encode() in body:
            die_once()
        return junction.parse(given, body, settings)

    def dying_afterwards(self: Applier, packed: str, *, redelivered: bool = False) -> outcomes.Applied:
        done = applied(self, packed, redelivered=redelivered)
        die_once()
        return done

    if kind == AFTERWARDS:
        Applier.apply = dying_afterwards  # type: ignore[method-assign]
    AGGREGATORS["junction"] = SimpleNamespace(parse=parse)  # type: ignore[index]


class Life:
    """Starts one worker after another until SIGTERM, which may arrive between two of them."""

    pid = 0
    is_over = False

    def stop(self, *_: object) -> None:
        """Stops the current worker and starts no other."""
        self.is_over = True
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def live(life: Life, settings: Settings) -> int:
    """Runs one worker and returns its exit status."""
    life.pid = os.fork()
    if life.pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(run_worker(settings, "live"))
    status = os.waitstatus_to_exitcode(os.waitpid(life.pid, 0)[1])
    life.pid = 0
    return status


def main() -> None:
    """Restarts the worker until it ends in another way than by SIGKILL."""
    kind, spent, deaths, most_crashes = sys.argv[1:]
    prepare(kind, Path(spent), int(most_crashes))
    life, status = Life(), 0
    signal.signal(signal.SIGTERM, life.stop)
    while not life.is_over and (status := live(life, load())) == -signal.SIGKILL:
        with Path(deaths).open("ab") as file:
            file.write(b".")
    sys.exit(status)


if __name__ == "__main__":
    main()
