"""The steps that the benchmark measures alone."""

from app.config.settings import Settings
from tests.bench.floors import applying, merging, publishing, verifying


def test_each_step_runs(settings: Settings, broker_url: str) -> None:
    """Breaks if a step is changed and the benchmark, which no other test runs, still calls its former interface."""
    database_url = settings.database_url
    assert database_url
    assert verifying(0.01) > 0
    assert publishing(broker_url, 2, seconds=0.01) > 0
    assert applying(settings, 2, 1) > 0
    assert merging(database_url, people=1, processes=1) > 0
