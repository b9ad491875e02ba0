"""Runs one attack on a stack of its own, together with a good sender. Both run in separate processes."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.bench.attacks import connections, deliveries, good, mutations
from tests.bench.attacks.good import Good
from tests.bench.attacks.target import CONTEXT, Signals, Target
from tests.bench.attacks.watch import Resident, Watch
from tests.bench.stack import running_up

T = TypeVar("T")
Attack = Callable[[Target, Signals], str]


def nothing(_: Target, signals: Signals) -> str:
    """No attack."""
    signals.ready.set()
    signals.over.wait()
    return ""


ATTACKS: Mapping[str, Attack] = {"nothing": nothing} | deliveries.ATTACKS | connections.ATTACKS | mutations.ATTACKS
WARM_SECONDS, WARM_SETTLE_SECONDS, AFTER_SECONDS = 5.0, 30.0, 5.0
PREPARE_SECONDS, END_SECONDS = 400, 900


@dataclass(frozen=True)
class Plan:
    """The options of a run."""

    seconds: float = 20.0  # of each attack
    rate: float = 50.0  # good events a second
    settle: float = 90.0  # seconds until a good event without a row counts as lost
    workers: int = 2  # processes per lane


@dataclass(frozen=True)
class Row:
    """The result of one attack."""

    attack: str
    good: Good
    memory: dict[str, Resident]
    deaths: int
    note: str


class Child:
    """A process of the run, from its start until the end of the `with` block."""

    def __init__(self, run: Callable[..., None], target: Target, *arguments: Any) -> None:
        self._signals = Signals.new()
        self._process = CONTEXT.Process(target=run, args=(target, self._signals, *arguments), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._wait_for(lambda: self._signals.ready.wait(1), PREPARE_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.over.set()
        self._process.join(10)
        self._process.kill()

    def end(self) -> Any:
        """Ends the process; returns its result. Raises RuntimeError if it failed, TimeoutError if it does not end."""
        self._signals.over.set()
        found = self._wait_for(self._result, END_SECONDS)
        return found[0]

    def _result(self) -> tuple[Any] | None:
        with contextlib.suppress(Empty):
            return (self._signals.result.get(timeout=1),)
        return None

    def _wait_for(self, condition: Callable[[], T], seconds: float) -> T:
        deadline = time.monotonic() + seconds
        while True:
            was_alive = self._process.is_alive()
            if found := condition():
                return found
            if not was_alive:
                raise RuntimeError("a process of the run failed")
            if time.monotonic() > deadline:
                raise TimeoutError("a process of the run neither became ready nor ended in time")


def measure(name: str, plan: Plan) -> Row:
    """Runs one attack on a stack of its own."""
    with running_up("--workers", str(plan.workers)) as info:
        target = Target.of(info)
        with Child(good.run, target, plan.rate, WARM_SETTLE_SECONDS) as warm:
            time.sleep(WARM_SECONDS)
            warm.end()
        watch = Watch(target)
        try:
            # The attack is prepared before the good sender starts.
            with Child(_attack, target, name) as attack, Child(good.run, target, plan.rate, plan.settle) as sender:
                time.sleep(plan.seconds)
                note, found = attack.end(), sender.end()
            time.sleep(AFTER_SECONDS)
        finally:
            memory = watch.stop()
    return Row(name, found, memory, watch.deaths, note)


def _attack(target: Target, signals: Signals, name: str) -> None:
    signals.result.put(ATTACKS[name](target, signals))
