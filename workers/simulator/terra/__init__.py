"""The simulated Terra: the same users, connected through the other aggregator."""

from collections.abc import Iterator
from datetime import UTC, datetime
from random import Random

from workers.simulator.terra.data import TerraWorld
from workers.simulator.terra.events import Message, arrival, by_url, data

__all__ = ["TerraWorld", "first_events", "live_events"]

SHARE_OF_UPDATES = 0.3


def first_events(terra: TerraWorld) -> Iterator[Message]:
    """The events of new connections: `auth` and `athlete`. Terra does not announce history."""
    for account in terra.accounts():
        yield from arrival(terra, account)


def live_events(terra: TerraWorld, seed: int = 0, pinged: float = 0.0, base_url: str = "") -> Iterator[Message]:
    """Events about new data of random accounts and types, until no account is open; some correct earlier events.

    Days and bodies are sent again while they last, each time with more data. Each event moves the world's end to the
    present. Events of `TerraWorld.put` are sent first. `pinged` is the share of events with only a URL at `base_url`.
    """
    rng = Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        terra.world.until = max(terra.world.until, datetime.now(UTC))
        yield from terra.pending()
        accounts = terra.accounts()
        if not accounts:
            return
        account = rng.choice(accounts)
        event = data(terra, account, rng.choice(terra.kinds(account)), updated=rng.random() < SHARE_OF_UPDATES)
        yield by_url(terra, event, base_url) if rng.random() < pinged else event
