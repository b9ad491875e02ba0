"""Fixtures of the process tests: one worker of the live lane per module."""

from collections.abc import Iterator

import pytest

from app.config.settings import Settings
from tests.support.workers import SharedWorker


@pytest.fixture(scope="module")
def module_worker(deployment: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """The worker of the module, on Valkey. The first test that uses it starts it."""
    with SharedWorker(deployment, tmp_path_factory.mktemp("worker")) as worker:
        yield worker


@pytest.fixture
def live_worker(module_worker: SharedWorker, settings: Settings, broker_url: str) -> SharedWorker:
    """The worker of the module, ready, with an empty lane and an empty database."""
    return module_worker.ready()


@pytest.fixture
def stopped_worker(module_worker: SharedWorker, settings: Settings, broker_url: str) -> SharedWorker:
    """The worker of the module, stopped until the test calls `ready`."""
    module_worker.end()
    return module_worker
