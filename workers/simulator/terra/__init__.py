"""The simulated Terra: the same users, connected through the other aggregator."""

from workers.simulator.terra.data import TerraWorld
from workers.simulator.terra.events import first_events, live_events

__all__ = ["TerraWorld", "first_events", "live_events"]
