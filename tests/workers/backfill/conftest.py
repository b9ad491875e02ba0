"""Settings of the backfill tests."""

from dataclasses import replace

import pytest

from app.config.settings import Settings
from workers.simulator.server import API_KEY


@pytest.fixture
def settings(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may fetch history without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key=API_KEY, request_rate="1000000/second")
