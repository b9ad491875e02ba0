"""A worker of the live lane that dies of what some deliveries hold, and is started again whenever it was killed.

`python -m tests.support.killing_worker KIND SPENT DEATHS MAX_CRASHES`. Each life is a fork of a process that has
imported what a worker imports and opened nothing, because an interpreter takes two seconds to start; SPENT is a file
that is there when its one life is spent, DEATHS one with a byte for each death.
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
    """Makes what a worker runs deadly."""
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
    """One life after another, until SIGTERM, which may come between two of them."""

    pid = 0
    is_over = False

    def stop(self, *_: object) -> None:
        """Ends the life that is, and begins no other."""
        self.is_over = True
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def live(life: Life, settings: Settings) -> int:
    """One life; how it ended."""
    life.pid = os.fork()
    if life.pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(run_worker(settings, "live"))
    status = os.waitstatus_to_exitcode(os.waitpid(life.pid, 0)[1])
    life.pid = 0
    return status


def main() -> None:
    """Lives until it ends in another way than by SIGKILL."""
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
