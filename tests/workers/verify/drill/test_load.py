"""The load of a drill."""

from datetime import UTC, datetime

from workers.simulator import World
from workers.simulator.events import supplied
from workers.verify.drill.load import events, is_usable


def test_the_load_leads_to_every_outcome() -> None:
    """Breaks if the load has no unusable event, no unknown type, or not every notice of history."""
    world = World(1, 1, datetime(2026, 3, 14, 12, tzinfo=UTC), 2)
    sent = list(events(world, 1, 2.0, 100.0))
    types = [one.get("event_type", "") for one in sent if isinstance(one, dict)]
    assert [one for one in sent if not is_usable(one)]
    assert "daily.data.mood_ring.created" in types
    announced = [one for one in types if one.startswith("historical.data.")]
    resources = {resource.name for one in world.members[0].connections for resource in supplied(one)}
    assert {f"historical.data.{name}.created" for name in resources} <= set(announced)
    assert [one for one in types if one.startswith("daily.data.") and one.endswith(".updated")]
