"""The pauses after failed notifications: of one notification, and of an endpoint that keeps failing."""

from workers.fetch.backoff import backoff

RETRY_DAYS = 3  # then a notification is dead
FIRST_PAUSE, MAX_PAUSE = 2.0, 4 * 3600.0  # seconds: 2, 4, 8 ... after half a day every four hours
# Failures in a row from which on an endpoint gets one request at a time, with a pause after each.
OPEN_AFTER = 5
FIRST_BREAK, MAX_BREAK = 4.0, 600.0  # seconds
MAX_ASKED = 3600.0  # seconds; the longest Retry-After that is respected


def retry_pause(attempts: int) -> float:
    """Seconds before the next attempt of a notification that has failed `attempts` times, counted from 1."""
    return backoff(attempts - 1, base=FIRST_PAUSE, limit=MAX_PAUSE)


def endpoint_pause(failures: int, asked: float | None = None) -> float:
    """Seconds before the next request to an endpoint that has failed `failures` times in a row.

    `asked` is its Retry-After.
    """
    pause = backoff(failures - OPEN_AFTER, base=FIRST_BREAK, limit=MAX_BREAK) if failures >= OPEN_AFTER else 0.0
    return max(pause, min(asked or 0.0, MAX_ASKED))
