"""What the tests of processes share: one worker of the live lane for each module."""

from collections.abc import Iterator

import pytest

from app.config.settings import Settings
from tests.support.workers import SharedWorker


@pytest.fixture(scope="module")
def module_worker(deployment: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """The worker of the module, on Valkey. It starts with the first test that asks for it."""
    with SharedWorker(deployment, tmp_path_factory.mktemp("worker")) as one:
        yield one


@pytest.fixture
def live_worker(module_worker: SharedWorker, settings: Settings, broker_url: str) -> SharedWorker:
    """The worker of the module, ready, with nothing in the lane or in the database."""
    return module_worker.ready()


@pytest.fixture
def later_worker(module_worker: SharedWorker, settings: Settings, broker_url: str) -> SharedWorker:
    """The worker of the module, away from the lane until the test has it ready."""
    module_worker.end()
    return module_worker
