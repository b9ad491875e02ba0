"""The delay before a retry."""

import random


def backoff(attempt: int, *, base: float = 0.5, limit: float) -> float:
    """Seconds before retry number `attempt`, counted from 0: exponential backoff with equal jitter.

    The delay doubles from `base` up to `limit`. A random factor of 0.5 to 1.0 keeps processes from retrying in step.
    """
    delay: float = min(limit, base * 2.0 ** min(attempt, 64))  # an attempt above 1023 would overflow the float
    return delay * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
