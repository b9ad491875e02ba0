"""An empty broker, for what publishes to one or reads from it."""

from collections.abc import Iterator

import pytest

from tests.support.broker import fake_server, stop


@pytest.fixture
def fake_url() -> Iterator[str]:
    """A fakeredis server's URL."""
    server = fake_server()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    stop(server)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.services)])
def url(request: pytest.FixtureRequest) -> str:
    """An empty broker: fakeredis, and the real Valkey."""
    return str(request.getfixturevalue("fake_url" if request.param == "fake" else "broker_url"))
