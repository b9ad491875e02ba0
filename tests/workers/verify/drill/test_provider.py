"""The pauses that the provider of a drill asks for."""

import pytest

from workers.simulator.faults import Fault, Faults
from workers.verify.drill.plan import Options
from workers.verify.drill.provider import MIN_PAUSE, Pause, make_simulator, pause_of


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault("429", retry_after=1), 1.0),
        (Fault("503", retry_after=2, as_date=True), 1.5),
        (Fault("429"), MIN_PAUSE),
    ],
)
def test_a_refusal_asks_for_a_pause(fault: Fault, seconds: float) -> None:
    """Breaks if a pause is recorded with a wrong length."""
    assert pause_of(fault, 100.5) == seconds


def test_on_pick_is_called_with_each_produced_fault() -> None:
    """Breaks if `on_pick` misses a produced fault, or is called for another."""
    picked: list[Fault] = []
    faults = Faults(on_pick=picked.append)
    faults.add("429", where="/a", times=1)
    assert [faults.pick("/b"), faults.pick("/a"), faults.pick("/a")] == [None, *picked, None]
    assert [fault.kind for fault in picked] == ["429"]


def test_refusals_of_the_simulator_are_recorded_as_pauses() -> None:
    """Breaks if a drill misses a pause, or patches the simulator."""
    pauses: list[Pause] = []
    simulator = make_simulator(Options(seconds=1, seed=1, rate=1, visibility_seconds=5), pauses)
    for kind in ("500", "429", "503"):
        simulator.faults.add(kind, times=1, retry_after=2)
    found = [simulator.faults.pick("/v2/summary") for _ in range(4)]
    assert [fault and fault.kind for fault in found] == ["500", "429", "503", None]
    assert [ends - begins for begins, ends in pauses] == [pytest.approx(2), pytest.approx(2)]
    assert "pick" not in vars(simulator.faults)
