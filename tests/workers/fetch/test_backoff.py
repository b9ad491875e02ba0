"""The delays before retries, with the bases and limits of their uses."""

import pytest

from workers.celery.retries import MAX_RETRY_SECONDS
from workers.fetch.backoff import backoff
from workers.fetch.retry import FIRST_PAUSE, MAX_PAUSE

TASKS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900)


@pytest.mark.parametrize(
    ("base", "limit", "attempt", "longest"),
    [
        *((0.5, MAX_RETRY_SECONDS, attempt, longest) for attempt, longest in [*enumerate(TASKS), (10**9, 30.0)]),
        *((FIRST_PAUSE, MAX_PAUSE, attempt, longest) for attempt, longest in [*enumerate(REQUESTS), (10**9, 900.0)]),
    ],
)
def test_a_delay_doubles_up_to_its_limit(base: float, limit: float, attempt: int, longest: float) -> None:
    """Breaks if processes retry in step, hammer a service that is down, or wait longer than the limit."""
    delays = [backoff(attempt, base=base, limit=limit) for _ in range(300)]
    assert longest / 2 <= min(delays) < max(delays) <= longest
    assert max(delays) - min(delays) > longest / 4
