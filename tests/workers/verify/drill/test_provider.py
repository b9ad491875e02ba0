"""What the provider of a drill asks for."""

import pytest

from workers.simulator.faults import Fault
from workers.verify.drill.provider import MIN_PAUSE, pause_of


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault("429", retry_after=1), 1.0),
        (Fault("503", retry_after=2, as_date=True), 1.5),
        (Fault("429"), MIN_PAUSE),
    ],
)
def test_a_refusal_asks_for_silence(fault: Fault, seconds: float) -> None:
    """Breaks if requests that should not have been sent are looked for at the wrong time."""
    assert pause_of(fault, 100.5) == seconds
