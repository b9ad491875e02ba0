"""A deployment whose days are computed in the test's process."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from workers.daily.derive import Deriver
from workers.store.feed import Sequencer

Derive = Callable[[], None]


@pytest.fixture
def deriver(engine: Engine, settings: Settings) -> Deriver:
    """A worker of the lane `derive`, which has started at the end of the empty feed."""
    found = Deriver(engine, settings)
    found.run(lambda: False)
    return found


@pytest.fixture
def derive(engine: Engine, deriver: Deriver) -> Derive:
    """Numbers what was committed, and computes until nothing is left."""
    sequencer = Sequencer(engine)

    def run() -> None:
        sequencer.run(everything=True)
        while deriver.run(lambda: False, linger=0):
            pass

    return run
