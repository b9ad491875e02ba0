"""The simulated provider's other half: the same people, connected through Terra."""

from collections.abc import Iterator
from datetime import UTC, datetime
from random import Random

from workers.simulator.terra.data import TerraWorld
from workers.simulator.terra.events import Message, arrival, data, elsewhere

__all__ = ["TerraWorld", "first_events", "live_events"]

SHARE_OF_UPDATES = 0.3


def first_events(terra: TerraWorld) -> Iterator[Message]:
    """What comes when people connect: the connection and who it is. Nobody announces that there is history."""
    for account in terra.accounts():
        yield from arrival(terra, account)


def live_events(terra: TerraWorld, seed: int = 0, pinged: float = 0.0, base_url: str = "") -> Iterator[Message]:
    """Events about what is newest, of anybody and any type, while anybody is left; some correct what was sent.

    Days and bodies are told again and again while they last, each time with more in them. The world's end moves on to
    the present with each event. What was asked for, and who has connected since, is told first. `pinged` is the part
    of the events that only say where the event is: at `base_url`.
    """
    dice = Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        terra.world.until = max(terra.world.until, datetime.now(UTC))
        yield from terra.waiting()
        accounts = terra.accounts()
        if not accounts:
            return
        account = dice.choice(accounts)
        event = data(terra, account, dice.choice(terra.kinds(account)), updated=dice.random() < SHARE_OF_UPDATES)
        yield elsewhere(terra, event, base_url) if dice.random() < pinged else event
